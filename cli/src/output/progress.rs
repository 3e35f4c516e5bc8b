//! Shows the progress of long work.

use std::io::{self};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::screen;
use crate::output::stretches::MANY_PAGES;

/// With more bytes than this, progress is shown at once; for pages the limit is [`MANY_PAGES`].
const MANY_BYTES: u64 = 64 << 20;
/// Work that takes longer than this shows its progress in any case.
const LONG: Duration = Duration::from_secs(1);

/// Shows the progress of long work, where stderr is a terminal. The display goes away when this is dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    /// The size of work from which it is drawn at once.
    many: u64,
    /// A thread that draws once a second, also while nothing gets done; it ends when its sender is dropped.
    clock: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// For work on pages that begins now; `what` is its name, as in "poisoning".
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        let template = "{prefix} [{wide_bar}] {pos} of {len} pages, {per_sec:0}, {eta} left";
        Self::begin(what, template, MANY_PAGES as u64)
    }

    /// For work on bytes that begins now; `what` is its name, as in "dumping".
    #[must_use]
    pub fn bytes(what: &'static str) -> Self {
        let template =
            "{prefix} [{wide_bar}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        Self::begin(what, template, MANY_BYTES)
    }

    fn begin(what: &'static str, template: &str, many: u64) -> Self {
        let bar = ProgressBar::hidden().with_prefix(what);
        let bar = match ProgressStyle::with_template(template) {
            // With characters that every terminal has.
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
            // The amount of work may not be known yet.
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
            // A panic on it would have been printed already.
            let _ = clock.join();
        }
        self.bar.finish_and_clear();
    }
}
