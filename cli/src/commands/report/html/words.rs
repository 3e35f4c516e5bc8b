//! Times and sizes in words.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;

use crate::commands::report::model::Vmm;

/// A length of time, with three digits or so.
pub(super) fn duration(micros: u64) -> String {
    let (whole, part, unit) = match micros {
        0..1_000 => return format!("{micros} µs"),
        1_000..1_000_000 => (micros / 1_000, micros % 1_000, "ms"),
        _ => (micros / 1_000_000, micros / 1_000 % 1_000, "s"),
    };
    match (whole, part) {
        (_, 0) | (100.., _) => format!("{whole} {unit}"),
        (10.., _) => format!("{whole}.{} {unit}", part / 100),
        _ => format!("{whole}.{:02} {unit}", part / 10),
    }
}

/// A number of bytes, a power of two or a multiple of one.
pub(super) fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut bytes, mut unit) = (bytes, 0);
    while bytes >= 1024 && bytes % 1024 == 0 && unit + 1 < units.len() {
        bytes /= 1024;
        unit += 1;
    }
    format!("{bytes} {}", units[unit])
}

/// A time of day, in UTC.
pub(super) fn time_of_day(unix_time: f64) -> String {
    let since = Duration::try_from_secs_f64(unix_time).ok();
    let time = since.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
    match time.and_then(|time| Timestamp::try_from(time).ok()) {
        Some(time) => format!("{time:.3}"),
        None => format!("{unix_time} s since 1970"),
    }
}

/// When something happened: the time of day if it is known, or else the time since the start of its VMM.
pub(super) fn when(vmm: Option<&Vmm>, at: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "it is shown to the millisecond")]
    let seconds = at as f64 / 1e6;
    match vmm.and_then(|vmm| vmm.began) {
        Some(began) => time_of_day(began + seconds),
        None => format!("{seconds:.3} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        for (micros, words) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_000, "1 ms"),
            (2_214, "2.21 ms"),
            (56_113, "56.1 ms"),
            (155_999, "155 ms"),
            (7_000_000, "7 s"),
            (314_159_265, "314 s"),
            (3_050_000, "3.05 s"),
        ] {
            assert_eq!(duration(micros), words);
        }
        assert!(duration(u64::MAX).ends_with(" s"));
    }

    #[test]
    fn sizes() {
        for (bytes, words) in [
            (0, "0 bytes"),
            (4096, "4 KiB"),
            (4097, "4097 bytes"),
            (1 << 40, "1 TiB"),
            (1 << 63, "8 EiB"),
        ] {
            assert_eq!(size(bytes), words);
        }
    }

    #[test]
    fn times_of_day() {
        assert_eq!(time_of_day(1e9), "2001-09-09T01:46:40.000Z");
        assert_eq!(time_of_day(1e19), "10000000000000000000 s since 1970");
        assert_eq!(when(None, 1_500_000), "1.500 s");
        let vmm = Vmm { began: Some(1e9), ..Vmm::default() };
        assert_eq!(when(Some(&vmm), 1_500_000), "2001-09-09T01:46:41.500Z");
    }
}
