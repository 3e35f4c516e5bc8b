//! What a guest reads from its disk in the lab, by fio: our devices with guarded guest memory, the same with plain
//! vm-memory, and QEMU's microvm on the same image: `disks QEMU PLAIN`. PLAIN is an `mce-relay` that was built with
//! `--cfg mce_relay_unguarded`. The figures go to $MCE_RELAY_LAB_OUT/disks.json.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what cannot be set up is not measured"
)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use mce_relay_bench::figure::{Figure, Goal, Series, US};
use mce_relay_bench::progress;
use mce_relay_tests::guest::{DEBIAN, below_target, binary, has_debian};
use mce_relay_tests::lab;
use mce_relay_tests::line::Line;

const PLAIN: &str = "plain vm-memory";
const QEMU: &str = "QEMU microvm";
const ROUNDS: usize = 5;
/// Bytes of the disk that is read.
const LEN: u64 = 256 << 20;
/// A shell takes the place of systemd: the guest is up in seconds, and nothing else runs in it.
const CMDLINE: &str =
    "console=ttyS0,115200 loglevel=3 panic=-1 noxsave root=LABEL=debian ro init=/bin/bash";

/// What fio is asked for.
struct Load {
    what: &'static str,
    unit: &'static str,
    arguments: &'static str,
    /// Of its fields in fio's terse output, version 3, and what makes our unit of it.
    field: (usize, f64),
}

const LOADS: [Load; 2] = [
    Load {
        what: "random reads of 4 KiB, 32 at a time",
        unit: "reads a second",
        arguments: "--rw=randread --bs=4k --iodepth=32",
        field: (8, 1.0),
    },
    Load {
        what: "reads of 1 MiB in order, 4 at a time",
        unit: "MiB a second",
        arguments: "--rw=read --bs=1M --iodepth=4",
        field: (7, 1024.0),
    },
];

fn main() -> ExitCode {
    let words: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let [qemu, plain] = &words[..] else {
        eprintln!("usage: disks QEMU PLAIN");
        return ExitCode::from(2);
    };
    if let Err(reason) = lab::may_poison().and_then(|()| has_debian()) {
        eprintln!("disks: {reason}");
        return ExitCode::FAILURE;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fill(&data);
    let mut values = [const { [const { Vec::new() }; 3] }; LOADS.len()];
    for round in 0..ROUNDS {
        // None is always the first.
        for turn in 0..3 {
            let which = (round + turn) % 3;
            progress(&format!(
                "disks, round {} of {ROUNDS}: {}",
                round + 1,
                [US, PLAIN, QEMU][which]
            ));
            let socket = dir.path().join("console");
            let command = match which {
                0 => ours(&binary(), &data, &socket),
                1 => ours(plain, &data, &socket),
                _ => qemus(qemu, &data, &socket),
            };
            let mut guest = Guest::boot(command, &socket);
            for (load, values) in LOADS.iter().zip(&mut values) {
                let value = guest.fio(load);
                progress(&format!("{value:.0} {}", load.unit));
                values[which].push(value);
            }
        }
    }
    let figures: Vec<Figure> =
        LOADS.iter().zip(values).flat_map(|(load, values)| figures(load, values)).collect();
    if let Some(out) = std::env::var_os("MCE_RELAY_LAB_OUT") {
        let path = Path::new(&out).join("disks.json");
        std::fs::write(path, serde_json::to_string_pretty(&figures).unwrap()).unwrap();
    }
    ExitCode::SUCCESS
}

fn figures(load: &Load, [ours, plain, qemu]: [Vec<f64>; 3]) -> [Figure; 2] {
    let figure = |beside: &str, values: Vec<f64>, goal, note: &str| Figure {
        what: format!("a guest's disk beside {beside}: {}", load.what),
        unit: load.unit.into(),
        series: vec![Series::new(US, ours.clone()), Series::new(beside, values)],
        goal,
        command: "make bench FIGURES=disks".into(),
        note: note.into(),
    };
    let note =
        "more is better; fio in a Debian guest, direct, of an image in the host's page cache";
    [
        figure(PLAIN, plain, Goal::NoDifference(PLAIN.into()), note),
        figure(QEMU, qemu, Goal::AtLeastTimes(1.0, QEMU.into()), note),
    ]
}

/// Random bytes, which stay in the host's page cache.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let mut random = fastrand::Rng::with_seed(20);
    let mut block = vec![0; 1 << 20];
    for _ in 0..LEN >> 20 {
        random.fill(&mut block);
        file.write_all(&block).unwrap();
    }
}

fn image(name: &str) -> PathBuf {
    below_target(DEBIAN).join(name)
}

fn ours(binary: &Path, data: &Path, socket: &Path) -> Command {
    let mut command = Command::new(binary);
    command.arg("run").arg("--kernel").arg(image("vmlinux"));
    command.arg("--initramfs").arg(image("initramfs.cpio")).args(["--cmdline", CMDLINE]);
    command.args(["--cpus", "2", "--cpu-vendor", "amd", "--memory", "size=512M"]);
    for path in [&image("disk.img"), data] {
        command.args(["--disk", &format!("path={},readonly=on", path.display())]);
    }
    command.args(["--serial", &format!("socket={}", socket.display())]);
    command
}

fn qemus(qemu: &Path, data: &Path, socket: &Path) -> Command {
    let mut command = Command::new(qemu);
    command.args([
        "-machine",
        // Its disks are virtio-mmio's, as ours are, and its guest finds them by ACPI, as ours does.
        "microvm,accel=kvm,rtc=on,acpi=on",
        "-cpu",
        CPU,
        "-smp",
        "2",
        "-m",
        "512",
    ]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.arg("-kernel").arg(image("vmlinuz")).arg("-initrd").arg(image("initramfs.cpio"));
    command.args(["-append", CMDLINE]);
    command
        .args(["-chardev", &format!("socket,id=c,path={},server=on,wait=off", socket.display())]);
    command.args(["-serial", "chardev:c"]);
    for (id, path) in [("a", &image("disk.img")), ("b", &data.to_owned())] {
        let drive = format!("if=none,id={id},file={},format=raw,readonly=on", path.display());
        command.args(["-drive", &drive, "-device", &format!("virtio-blk-device,drive={id}")]);
    }
    command
}

/// KVM's paravirtual features are off as in tests/src/qemu.rs.
const CPU: &str = "host,kvm-pv-unhalt=off,kvm-pv-ipi=off,kvm-pv-sched-yield=off";

/// A guest with a shell on its console. Dropping it kills its VMM.
struct Guest {
    vmm: Child,
    shell: Line,
}

impl Guest {
    fn boot(mut command: Command, socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let vmm = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while !socket.exists() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{command:?} makes no socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut guest = Self { vmm, shell: Line::at(socket) };
        guest.shell.wait_for("# ");
        for command in [
            "mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp",
            // The disk that is as long.
            &format!("D=/dev/$(grep -lx {} /sys/block/vd*/size | cut -d/ -f4)", LEN / 512),
            "cd /tmp; ls $D",
        ] {
            guest.shell.run(command);
        }
        guest
    }

    fn fio(&mut self, load: &Load) -> f64 {
        let (field, unit) = load.field;
        let said = self.shell.run(&format!(
            "fio --name=r --filename=$D --readonly --direct=1 --ioengine=libaio {} --time_based --ramp_time=1 --runtime=5 \
             --output-format=terse --terse-version=3 | cut -d';' -f{field} | sed 's/^/value /'",
            load.arguments
        ));
        // A shell on a terminal puts sequences before what a command prints.
        let value = said.lines().filter_map(|line| line.rsplit_once("value "));
        let value = value.filter_map(|(_, value)| value.trim().parse::<f64>().ok()).next_back();
        value.unwrap_or_else(|| panic!("{said}")) / unit
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // One that has ended needs no kill.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}
