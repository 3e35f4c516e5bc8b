//! The memory of other processes of the guest: which guest-physical pages they use.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::proto::{Body, Hex, ProcessPage};

const FRAME: u64 = 4096;
// Documentation/admin-guide/mm/pagemap.rst
const PRESENT: u64 = 1 << 63;
const PFN: u64 = (1 << 55) - 1;

/// Pages of the process `which` (its pid or its name), `max` at most: such as it has written, not
/// what it shares with everybody who runs the same file.
///
/// # Errors
/// There is no such process, or it has no such pages.
pub fn pages(which: &str, max: usize) -> Result<Body, String> {
    let (pid, comm) = find(which)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| gone(pid, &e))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(|e| gone(pid, &e))?;
    let mut pages = Vec::new();
    for area in maps.lines().filter_map(area) {
        let mut va = area.start;
        while va < area.end && pages.len() < max {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, va / FRAME * 8).map_err(|e| gone(pid, &e))?;
            let entry = u64::from_ne_bytes(entry);
            if entry & PRESENT != 0 && entry & PFN != 0 {
                let gpa = Hex((entry & PFN) * FRAME);
                pages.push(ProcessPage { gpa, va: Hex(va), area: area.name.to_owned() });
            }
            va += FRAME;
        }
    }
    if pages.is_empty() {
        return Err(format!(
            "process {pid} ({comm}) has no pages of its own: it is a thread of the kernel, or has written nothing yet"
        ));
    }
    Ok(Body::Process { pid, comm, pages })
}

fn gone(pid: u32, error: &io::Error) -> String {
    format!("process {pid}: {error}; it may have ended")
}

fn comm(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

/// Its pid and its name.
fn find(which: &str) -> Result<(u32, String), String> {
    if let Ok(pid) = which.parse() {
        let name = comm(pid).ok_or_else(|| format!("there is no process {pid} in this guest"))?;
        return Ok((pid, name));
    }
    let entries = fs::read_dir("/proc").map_err(|e| format!("/proc: {e}; is it mounted?"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let found: Vec<u32> = pids.filter(|pid| comm(*pid).as_deref() == Some(which)).collect();
    match found[..] {
        [pid] => Ok((pid, which.to_owned())),
        [] => Err(format!("there is no process called {which:?} in this guest")),
        _ => {
            let list: Vec<String> = found.iter().map(ToString::to_string).collect();
            Err(format!("{which:?} is the name of processes {}; give a pid", list.join(", ")))
        }
    }
}

/// A stretch of a process's address space.
#[derive(Debug, PartialEq, Eq)]
struct Area<'a> {
    start: u64,
    end: u64,
    name: &'a str,
}

/// One line of /proc/PID/maps, if it is of memory that the process writes.
fn area(line: &str) -> Option<Area<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let writable = words.next()?.as_bytes().get(1) == Some(&b'w');
    let name = words.nth(3).unwrap_or("anonymous");
    let number = |text| u64::from_str_radix(text, 16).ok();
    let area = Area { start: number(start)?, end: number(end)?, name };
    writable.then_some(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let heap = "55d0a000-55d2b000 rw-p 00000000 00:00 0          [heap]";
        assert_eq!(area(heap), Some(Area { start: 0x55d0_a000, end: 0x55d2_b000, name: "[heap]" }));
        let bare = "7f00-8f00 rw-p 00000000 00:00 0 ";
        assert_eq!(area(bare).unwrap().name, "anonymous");
        assert_eq!(area("7f00-8f00 r-xp 00000000 08:01 12  /bin/x"), None);
        assert_eq!(area("nonsense"), None);
    }

    #[test]
    fn who_is_not_there_is_named() {
        assert!(find("4294967295").unwrap_err().contains("4294967295"));
        assert!(find("no such name").unwrap_err().contains("no such name"));
        let own = std::process::id();
        assert_eq!(find(&own.to_string()).unwrap().0, own);
    }
}
