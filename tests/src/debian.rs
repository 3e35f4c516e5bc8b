//! The Debian guest: systemd, rasdaemon and sshd on a disk, and what they say of a bad page.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::agent::{Agent, PATIENCE, Page};
use crate::guest::{DEBIAN, DiskImage, Guest, Options};
use crate::line::Line;

/// Its address, and that of the host on the tap.
pub const ADDRESS: &str = "192.168.77.2";
/// The host's, with the length of the network's prefix.
pub const HOST: &str = "192.168.77.1/24";
/// Where its agent listens over vsock.
const VSOCK_PORT: u32 = 1024;

/// A Debian guest with disk, net and vsock, whose console and whose agents answer.
#[derive(Debug)]
pub struct Debian {
    /// The guest, with the agent on its serial port.
    pub guest: Guest,
    /// The same agent's twin over vsock.
    pub over_vsock: Agent,
    shell: Line,
}

impl Debian {
    /// Boots one. It has to be in a network with the tap `t0` (see [`network`](crate::network)).
    pub fn boot(options: Options) -> Self {
        let options = Options {
            memory: "size=512M,shared=on",
            image: DEBIAN,
            disk: Some(DiskImage::Debian),
            net: "tap=t0",
            vsock: true,
            virtio: true,
            ..options
        };
        let guest = Guest::boot(&options);
        let mut shell = Line::at(&guest.path("shell"));
        shell.wait_for("root@debian");
        // Plain words: no prompt, no echo, no colours.
        shell.write("stty -echo; exec env PS1= TERM=dumb PAGER=cat SYSTEMD_COLORS=0 sh\n");
        shell.run("cd");
        let over_vsock = Agent::over_vsock(&guest.path("vsock"), VSOCK_PORT).unwrap();
        Self { guest, over_vsock, shell }
    }

    /// Has root's shell on the console run `command`, and returns what it printed.
    pub fn run(&mut self, command: &str) -> String {
        let text = self.shell.run(command).replace('\r', "");
        text.trim_start_matches('\n').trim_end_matches("the end=0=").to_owned()
    }

    /// Waits until `command` prints something with `wanted` in it; what it printed then.
    pub fn until(&mut self, command: &str, wanted: &str) -> String {
        let start = Instant::now();
        loop {
            let text = self.run(command);
            if text.contains(wanted) {
                return text;
            }
            assert!(start.elapsed() < PATIENCE, "no {wanted:?} in {text}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// rasdaemon's record of a machine check for `page`.
    pub fn recorded(&mut self, page: Page) -> String {
        let addr = format!("addr=0x{:08x}", page.gpa);
        let text = self.until("ras-mc-ctl --errors", &addr);
        let line = text.lines().find(|line| line.contains(&addr));
        line.unwrap_or_default().to_owned()
    }

    /// systemd, rasdaemon and sshd are at work; the first words of sshd.
    pub fn services(&mut self) -> String {
        let state = self.until("systemctl is-system-running || true", "running");
        assert!(!state.contains("degraded"), "{}", self.run("systemctl --failed"));
        let active = self.run("systemctl is-active rasdaemon ssh systemd-journald");
        assert_eq!(active.lines().filter(|line| *line == "active").count(), 3, "{active}");
        self.banner()
    }

    fn banner(&self) -> String {
        let address: SocketAddr = format!("{ADDRESS}:22").parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut words = [0; 64];
        let len = stream.read(&mut words).unwrap();
        String::from_utf8_lossy(&words[..len]).trim().to_owned()
    }

    /// Ends it by its power button, in order.
    pub fn shut_down(mut self) {
        let out = self.guest.command("shutdown", &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(self.guest.ended().code(), Some(0), "the VMM's exit status after power-off");
    }
}
