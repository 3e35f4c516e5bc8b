//! The host's programs that have come and not yet said what they want: `CONNECT <port>\n`.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host::VsockLine;
use crate::machine::devices::virtio::device::Wait;

/// How many there may be at once. Further ones are not accepted until these have spoken or gone.
const MOST: usize = 32;
/// How long one may take to say it.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than `CONNECT 4294967295\n`, in bytes.
const LONGEST: usize = 32;
/// How long nobody is accepted after that has failed, for want of descriptors say.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Greeting {
    stream: UnixStream,
    said: Vec<u8>,
    deadline: Instant,
}

/// All of them, and the socket at which they come.
#[derive(Debug)]
pub struct Greetings {
    line: Arc<VsockLine>,
    waiting: HashMap<RawFd, Greeting>,
    pause: Option<Instant>,
}

impl Greetings {
    /// Those at `line`.
    #[must_use]
    pub fn at(line: Arc<VsockLine>) -> Self {
        Self { line, waiting: HashMap::new(), pause: None }
    }

    /// Where they come.
    #[must_use]
    pub fn line(&self) -> &VsockLine {
        &self.line
    }

    /// Adds what to wait for.
    pub fn waits_for(&self, waits: &mut Vec<Wait>) {
        if self.pause.is_none() && self.waiting.len() < MOST {
            waits.push(Wait { fd: self.line.listener().as_raw_fd(), events: libc::POLLIN });
        }
        waits.extend(self.waiting.keys().map(|fd| Wait { fd: *fd, events: libc::POLLIN }));
    }

    /// When [`Self::expire`] is to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.values().map(|greeting| greeting.deadline).chain(self.pause).min()
    }

    /// Drops those who take too long.
    pub fn expire(&mut self, now: Instant) {
        self.waiting.retain(|_, greeting| greeting.deadline > now);
        self.pause = self.pause.filter(|end| *end > now);
    }

    /// Whether `fd` is one of theirs, or where they come.
    #[must_use]
    pub fn has(&self, fd: RawFd) -> bool {
        fd == self.line.listener().as_raw_fd() || self.waiting.contains_key(&fd)
    }

    /// Something has come on `fd`. Returns whoever has said which port it wants.
    pub fn ready(&mut self, fd: RawFd, now: Instant) -> Option<(UnixStream, u32)> {
        if fd == self.line.listener().as_raw_fd() {
            self.accept(now);
            return None;
        }
        let heard = self.waiting.get_mut(&fd)?.hear();
        let port = match heard {
            Ok(None) => return None,
            Ok(Some(port)) => Some(port),
            Err(why) => {
                log::debug!("virtio-vsock: a client is sent away: {why}");
                None
            }
        };
        let greeting = self.waiting.remove(&fd)?;
        port.map(|port| (greeting.stream, port))
    }

    /// Closes the connection of whoever has come.
    pub fn turn_away(&mut self, now: Instant) {
        drop(self.accepted(now));
    }

    fn accept(&mut self, now: Instant) {
        if let Some(stream) = self.accepted(now) {
            let greeting = Greeting { said: Vec::new(), deadline: now + PATIENCE, stream };
            self.waiting.insert(greeting.stream.as_raw_fd(), greeting);
        }
    }

    fn accepted(&mut self, now: Instant) -> Option<UnixStream> {
        let accepted = self.line.listener().accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                log::debug!("virtio-vsock: cannot accept a client: {error}");
                self.pause = Some(now + PAUSE);
                None
            }
        }
    }

    /// All of them go.
    pub fn clear(&mut self) {
        self.waiting = HashMap::new();
        self.pause = None;
    }
}

impl Greeting {
    /// Reads on. `None` if it has not said all yet.
    fn hear(&mut self) -> Result<Option<u32>, &'static str> {
        // Byte by byte: what is behind it is for the guest.
        let mut byte = [0];
        loop {
            match (&self.stream).read(&mut byte) {
                Ok(0) => return Err("it has gone"),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) if self.said.len() == LONGEST => return Err("expected CONNECT PORT"),
                Ok(_) => self.said.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(_) => return Err("it has gone"),
            }
        }
        let said = std::str::from_utf8(&self.said).ok();
        let mut words = said.map(str::split_ascii_whitespace).into_iter().flatten();
        match (words.next(), words.next().map(str::parse), words.next()) {
            (Some(word), Some(Ok(port)), None) if word.eq_ignore_ascii_case("connect") => {
                Ok(Some(port))
            }
            _ => Err("expected CONNECT PORT"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn one_that_says_nothing_goes_in_time_and_as_many_wait_as_may() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let mut greetings = Greetings::at(Arc::new(VsockLine::open(&path).unwrap()));
        let listener = greetings.line.listener().as_raw_fd();
        let accepts = |greetings: &Greetings| {
            let mut waits = Vec::new();
            greetings.waits_for(&mut waits);
            waits.iter().any(|wait| wait.fd == listener)
        };
        let start = Instant::now();
        let mut clients = Vec::new();
        for at in 0..MOST {
            assert!(accepts(&greetings));
            clients.push(UnixStream::connect(&path).unwrap());
            let later = start + Duration::from_millis(at as u64);
            assert!(greetings.ready(listener, later).is_none());
        }
        assert!(!accepts(&greetings));
        assert_eq!(greetings.deadline(), Some(start + PATIENCE));
        // Half of what has to be said does not count.
        clients[0].write_all(b"CONN").unwrap();
        let fds: Vec<RawFd> = greetings.waiting.keys().copied().collect();
        assert!(fds.into_iter().all(|fd| greetings.ready(fd, start).is_none()));
        greetings.expire(start + PATIENCE);
        assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
        assert_eq!(greetings.waiting.len(), MOST - 1);
        assert!(accepts(&greetings));
        clients[1].write_all(b"CONNECT 7\n").unwrap();
        let fds: Vec<RawFd> = greetings.waiting.keys().copied().collect();
        let said: Vec<u32> = fds
            .into_iter()
            .filter_map(|fd| greetings.ready(fd, start))
            .map(|(_, port)| port)
            .collect();
        assert_eq!(said, [7]);
        greetings.expire(start + PATIENCE * 2);
        assert!(greetings.waiting.is_empty() && greetings.deadline().is_none());
    }
}
