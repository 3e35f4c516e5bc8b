//! How far a long work is.

use std::io::{self};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::screen;
use crate::output::stretches::MANY_PAGES;

/// Of more bytes than this, it is shown at once how many have been worked on; so it is of [`MANY_PAGES`].
const MANY_BYTES: u64 = 64 << 20;
/// Any work that takes longer than this shows how far it is.
const LONG: Duration = Duration::from_secs(1);

/// Shows how far a long work is, where stderr is a terminal. Goes away when dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    /// Of more than so many it is drawn at once.
    many: u64,
    /// Draws once a second, also while nothing gets done; ends when its sender is dropped.
    clock: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Of a work on pages that is called so, as in "poisoning", and begins now.
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        let template = "{prefix} [{wide_bar}] {pos} of {len} pages, {per_sec:0}, {eta} left";
        Self::begin(what, template, MANY_PAGES as u64)
    }

    /// Of a work on bytes that is called so, as in "dumping", and begins now.
    #[must_use]
    pub fn bytes(what: &'static str) -> Self {
        let template =
            "{prefix} [{wide_bar}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        Self::begin(what, template, MANY_BYTES)
    }

    fn begin(what: &'static str, template: &str, many: u64) -> Self {
        let bar = ProgressBar::hidden().with_prefix(what);
        let bar = match ProgressStyle::with_template(template) {
            // In characters that every terminal has.
            Ok(style) => bar.with_style(style.progress_chars("=> ")),
            Err(_) => bar,
        };
        let clock = screen::stderr().moves.then(|| clock(bar.clone())).and_then(Result::ok);
        Self { bar, many, clock }
    }

    /// `done` of `total` pages are done.
    pub fn step(&mut self, done: usize, total: usize) {
        self.advance(done as u64, total as u64);
    }

    /// `done` of `total` pages or bytes are done.
    pub fn advance(&mut self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
        }
        if total > self.many && done != 0 && self.clock.is_some() && self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done);
    }
}

fn clock(bar: ProgressBar) -> io::Result<(Sender<()>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel();
    let draw = move || {
        while receiver.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
            // How much there is to do may not be known yet.
            if bar.length().is_some_and(|length| length != 0) {
                if bar.is_hidden() {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                }
                bar.tick();
            }
        }
    };
    Ok((sender, thread::Builder::new().name("progress".to_owned()).spawn(draw)?))
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((sender, clock)) = self.clock.take() {
            drop(sender);
            // It cannot have panicked with words that were not printed.
            let _ = clock.join();
        }
        self.bar.finish_and_clear();
    }
}
