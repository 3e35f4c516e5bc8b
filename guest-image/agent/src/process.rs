//! The memory of other processes of the guest: which guest-physical pages they use.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::proto::{Body, ProcessPage};
use crate::words::Hex;

const KPAGEFLAGS: &str = "/proc/kpageflags";
const FRAME: u64 = 4096;
// Linux, Documentation/admin-guide/mm/pagemap.rst: entries of /proc/PID/pagemap.
const PRESENT: u64 = 1 << 63;
const PFN: u64 = (1 << 55) - 1;
// The same: flags in /proc/kpageflags.
const ANON: u64 = 1 << 12;
const SWAPBACKED: u64 = 1 << 14;
const HUGE: u64 = 1 << 17;
const POISONED: u64 = 1 << 19;
/// PF_KTHREAD in include/linux/sched.h.
const KERNEL_THREAD: u32 = 0x0020_0000;
/// Most pages of address space that are looked at, 4 GiB: some programs reserve terabytes, and
/// nothing else is answered meanwhile.
const MAX_LOOKED: u64 = 1 << 20;
/// Longest name of an area, in bytes: it is in the reply once a page, and a path can be long.
const MAX_NAME: usize = 64;
/// Most pids that an error lists.
const MAX_PIDS: usize = 16;

/// Pages of the process `which` (its pid or its name), `max` at most: resident, and of its own data.
/// Heap and stack come first; of this agent itself those areas for which `is_alloced` is true, since those
/// are pages that it can lose.
///
/// # Errors
/// There is no such process, or it has no such pages.
pub fn pages(which: &str, max: usize, is_alloced: &dyn Fn(u64) -> bool) -> Result<Body, String> {
    let (pid, comm) = find(which)?;
    let path = |file: &str| format!("/proc/{pid}/{file}");
    let failed = |e: io::Error| failed(pid, &comm, &e);
    let stat = fs::read(path("stat")).map_err(failed)?;
    if is_of_kernel(&String::from_utf8_lossy(&stat)) {
        return Err(format!(
            "process {pid} ({comm}) is a thread of the kernel and has no memory of its own; give a \
             process that runs a program"
        ));
    }
    let maps = fs::read(path("maps")).map_err(failed)?;
    let maps = String::from_utf8_lossy(&maps);
    // A zombie has none, either.
    if maps.is_empty() {
        return Err(format!("process {pid} ({comm}) has ended"));
    }
    let mut areas: Vec<Area<'_>> = maps.lines().filter_map(area).collect();
    let is_own = pid == std::process::id();
    areas.sort_by_key(|area| (!(is_own && is_alloced(area.start)), area.kind));

    let pagemap = File::open(path("pagemap")).map_err(failed)?;
    let flags = File::open(KPAGEFLAGS).map_err(|e| {
        format!(
            "{KPAGEFLAGS}: {e}; the agent needs root and a kernel with CONFIG_PROC_PAGE_MONITOR"
        )
    })?;
    let mut search = Search { pagemap, flags, left: MAX_LOOKED, max, pages: Vec::new() };
    for area in &areas {
        search.look(area).map_err(failed)?;
    }
    match search {
        Search { pages, .. } if !pages.is_empty() => Ok(Body::Process { pid, comm, pages }),
        Search { left: 0, .. } => Err(format!(
            "process {pid} ({comm}) has nothing of its own in the first {} GiB that it may write; \
             give another",
            (MAX_LOOKED * FRAME) >> 30
        )),
        _ => Err(format!(
            "process {pid} ({comm}) has nothing of its own in memory: all is swapped out, or it has \
             written nothing yet"
        )),
    }
}

struct Search {
    pagemap: File,
    flags: File,
    /// How many pages of address space may still be looked at.
    left: u64,
    max: usize,
    pages: Vec<ProcessPage>,
}

impl Search {
    fn look(&mut self, area: &Area<'_>) -> io::Result<()> {
        let mut va = area.start;
        while va < area.end && self.left > 0 {
            let mut bytes = [0; 4096];
            let read = self.pagemap.read_at(&mut bytes, va / FRAME * 8)?;
            let (entries, _) = bytes[..read].as_chunks::<8>();
            if entries.is_empty() {
                // Its address space is gone.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for entry in entries {
                if va == area.end || self.left == 0 {
                    break;
                }
                if self.pages.len() == self.max {
                    return Ok(());
                }
                if let Some(frame) = self.frame(area, u64::from_ne_bytes(*entry))? {
                    let (gpa, va) = (Hex(frame * FRAME), Hex(va));
                    self.pages.push(ProcessPage { gpa, va, area: area.name.to_owned() });
                }
                va += FRAME;
                self.left -= 1;
            }
        }
        Ok(())
    }

    /// The frame behind an entry of the pagemap, if what it holds is the process's own.
    fn frame(&self, area: &Area<'_>, entry: u64) -> io::Result<Option<u64>> {
        if entry & PRESENT == 0 {
            return Ok(None);
        }
        let frame = entry & PFN;
        if frame == 0 {
            // So the kernel hides all of them.
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut flags = [0; 8];
        if self.flags.read_exact_at(&mut flags, frame * 8).is_err() {
            // Not RAM: a device's registers, for instance.
            return Ok(None);
        }
        Ok(area.owns(u64::from_ne_bytes(flags)).then_some(frame))
    }
}

fn failed(pid: u32, comm: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "process {pid} ({comm}): {error}: the kernel shows page frames to root only; run the \
             agent as root"
        ),
        _ => format!("process {pid} ({comm}): {error}; it may have ended"),
    }
}

/// Whether a line of /proc/PID/stat is of a kernel thread.
fn is_of_kernel(stat: &str) -> bool {
    // The name before it may hold blanks and parentheses.
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
    let flags = fields.and_then(|fields| fields.split(' ').nth(6)?.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

fn comm(pid: u32) -> Option<String> {
    let comm = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&comm).trim_end_matches('\n').to_owned())
}

/// Its pid and its name. By its name this agent is not found: whoever loses it has nobody to ask.
fn find(which: &str) -> Result<(u32, String), String> {
    // As long as a name can be: the request may be noise, and the reply has to stay short.
    let shown = cut(which, MAX_NAME);
    if let Ok(pid) = which.parse() {
        let name = comm(pid).ok_or_else(|| format!("there is no process {pid} in this guest"))?;
        return Ok((pid, name));
    }
    let entries = fs::read_dir("/proc").map_err(|e| format!("/proc: {e}; is it mounted?"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let own = std::process::id();
    let all = pids.filter(|pid| comm(*pid).as_deref() == Some(which));
    let (mine, found): (Vec<u32>, Vec<u32>) = all.partition(|pid| *pid == own);
    match found[..] {
        [pid] => Ok((pid, which.to_owned())),
        [] if !mine.is_empty() => Err(format!(
            "{shown:?} is this agent itself; give its pid, {own}, if its own pages are meant"
        )),
        [] => Err(format!("there is no process called {shown:?} in this guest")),
        _ => {
            let list: Vec<String> = found.iter().take(MAX_PIDS).map(ToString::to_string).collect();
            let more = if found.len() > MAX_PIDS { " and others" } else { "" };
            let list = list.join(", ");
            Err(format!("{shown:?} is the name of processes {list}{more}; give a pid"))
        }
    }
}

/// What a stretch of address space is for, in the order in which it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Heap,
    Stack,
    Anonymous,
    Shared,
    /// A private mapping of a file; what was written there is the process's own.
    File,
}

/// A stretch of a process's address space that it may write.
#[derive(Debug, PartialEq, Eq)]
struct Area<'a> {
    start: u64,
    end: u64,
    kind: Kind,
    name: &'a str,
}

impl Area<'_> {
    /// Whether a frame in it with these flags in /proc/kpageflags holds data that is nowhere else.
    /// The zero page and a file's pages do not.
    fn owns(&self, flags: u64) -> bool {
        let wanted = match self.kind {
            Kind::Shared => SWAPBACKED | HUGE,
            _ => ANON,
        };
        flags & wanted != 0 && flags & POISONED == 0
    }
}

/// One line of /proc/PID/maps, if it is of memory that the process may write.
fn area(line: &str) -> Option<Area<'_>> {
    // Start-end, permissions, offset, device, inode; the name may hold blanks.
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let inode = fields.nth(2)?;
    let name = fields.next().unwrap_or_default().trim();
    if permissions.get(1) != Some(&b'w') {
        return None;
    }
    let kind = match name {
        "[heap]" => Kind::Heap,
        "[stack]" => Kind::Stack,
        _ if permissions.get(3) == Some(&b's') => Kind::Shared,
        _ if inode == "0" => Kind::Anonymous,
        _ => Kind::File,
    };
    let name = if name.is_empty() { "anonymous" } else { cut(name, MAX_NAME) };
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(Area { start: number(start)?, end: number(end)?, kind, name })
}

/// The first `max` bytes of `text`, or as many as make whole characters.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::Pages;

    #[test]
    fn lines_of_maps() {
        let area_of = |kind, name| Some(Area { start: 0x7f00_0000, end: 0x7f02_1000, kind, name });
        for (line, expected) in [
            ("rw-p 00000000 00:00 0          [heap]", area_of(Kind::Heap, "[heap]")),
            ("rw-p 00000000 00:00 0          [stack]", area_of(Kind::Stack, "[stack]")),
            ("rw-p 00000000 00:00 0 ", area_of(Kind::Anonymous, "anonymous")),
            ("rw-p 00000000 00:00 0  [anon:a b]", area_of(Kind::Anonymous, "[anon:a b]")),
            (
                "rw-s 00000000 00:01 1041       /dev/zero (deleted)",
                area_of(Kind::Shared, "/dev/zero (deleted)"),
            ),
            ("rw-p 00001000 08:01 12         /bin/x", area_of(Kind::File, "/bin/x")),
            ("r-xp 00000000 08:01 12         /bin/x", None),
            ("---p 00000000 00:00 0 ", None),
        ] {
            assert_eq!(area(&format!("7f000000-7f021000 {line}")), expected, "{line}");
        }
        for noise in ["", "nonsense", "7f00-8f00", "7f00-8f00 rw-p", "x-y rw-p 0 00:00 0 "] {
            assert_eq!(area(noise), None, "{noise}");
        }
        let long = format!("7f00-8f00 rw-p 00000000 08:01 12 /{}", "\u{e4}".repeat(2000));
        assert_eq!(area(&long).unwrap().name.len(), 63, "cut between characters");
    }

    #[test]
    fn heap_and_stack_come_first() {
        let lines = [
            "1000-2000 rw-p 00000000 08:01 12 /bin/x",
            "3000-4000 rw-s 00000000 00:01 13 /dev/zero (deleted)",
            "5000-6000 rw-p 00000000 00:00 0 ",
            "7000-8000 rw-p 00000000 00:00 0 [stack]",
            "9000-a000 rw-p 00000000 00:00 0 [heap]",
        ];
        let mut areas: Vec<Area<'_>> = lines.into_iter().filter_map(area).collect();
        areas.sort_by_key(|area| area.kind);
        let names: Vec<&str> = areas.iter().map(|area| area.name).collect();
        assert_eq!(names, ["[heap]", "[stack]", "anonymous", "/dev/zero (deleted)", "/bin/x"]);
    }

    #[test]
    fn only_data_that_is_nowhere_else_is_owned() {
        // As Linux 6.18 shows them; UPTODATE and MMAP are set in most.
        let (always, zero_page) = (1 << 3 | 1 << 11, 1 << 24);
        let area = |kind| Area { start: 0, end: FRAME, kind, name: "" };
        for (kind, flags, owned) in [
            (Kind::Heap, ANON | SWAPBACKED, true),
            (Kind::Anonymous, ANON | SWAPBACKED | POISONED, false),
            (Kind::Anonymous, zero_page, false),
            (Kind::Shared, SWAPBACKED, true),
            (Kind::Shared, HUGE, true),
            (Kind::Shared, 0, false),
            (Kind::File, ANON | SWAPBACKED, true),
            (Kind::File, 0, false),
            (Kind::File, SWAPBACKED, false),
        ] {
            assert_eq!(area(kind).owns(always | flags), owned, "{kind:?} {flags:#x}");
        }
    }

    #[test]
    fn threads_of_the_kernel_are_told_by_their_flags() {
        assert!(is_of_kernel("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"));
        assert!(!is_of_kernel("7 (a) S 1) R 1 7 7 0 -1 4194560 0 0"));
        assert!(!is_of_kernel("nonsense"));
    }

    #[test]
    fn who_is_not_there_is_named() {
        assert!(find("4294967295").unwrap_err().contains("4294967295"));
        assert!(find("no such name").unwrap_err().contains("no such name"));
        let noise = find(&"x".repeat(10_000)).unwrap_err();
        assert!(noise.len() < 200, "{noise}");
        let own = std::process::id();
        assert_eq!(find(&own.to_string()).unwrap().0, own);
    }

    #[test]
    fn the_agent_is_not_found_by_its_name() {
        let own = std::process::id();
        match find(&comm(own).unwrap()) {
            Ok((pid, _)) => assert_ne!(pid, own, "another one of that name"),
            // Or there are several others.
            Err(error) => {
                assert!(error.contains(&own.to_string()) || error.contains("give a pid"), "{error}")
            }
        }
    }

    #[test]
    fn pages_are_found_in_order_and_no_more_than_asked_for() {
        let own = std::process::id();
        let mut owned = Pages::default();
        owned.alloc(crate::proto::Kind::Anon, 2, false).unwrap();
        match pages(&own.to_string(), 3, &|va| owned.owns(va)) {
            Ok(Body::Process { pid, pages, .. }) => {
                assert_eq!(pid, own);
                assert!((1..=3).contains(&pages.len()), "{pages:?}");
                assert!(
                    pages.iter().all(|page| page.gpa.0.is_multiple_of(FRAME) && page.gpa.0 > 0)
                );
                let first: Vec<bool> = pages.iter().map(|page| owned.owns(page.va.0)).collect();
                assert_eq!(first, [true, true, false], "what it can lose comes first: {pages:?}");
            }
            Ok(other) => panic!("{other:?}"),
            // Who is not root, or has no kpageflags.
            Err(error) => assert!(error.contains("root"), "{error}"),
        }
    }
}
