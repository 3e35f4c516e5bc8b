//! The report of all checks.

use serde::Serialize;

use crate::commands::check::gap::AS_ROOT;
use crate::commands::check::section::{Line, Section, Standing};
use crate::commands::check::{failure, finding, kvm, memory, poisoning, privileges};
use crate::output::table::{self, Cell, Color};

/// The report of all checks.
#[derive(Debug, Serialize)]
pub struct Report {
    /// One line for each check, grouped.
    pub lines: Vec<Line>,
}

impl Report {
    /// Whether errors can be relayed: nothing that is needed for it is missing.
    pub fn relays(&self) -> bool {
        self.lines.iter().all(|line| line.standing != Standing::Needed)
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = table::sheet(&["", "what", "found", "what to do"]);
        let mut group = "";
        for line in &self.lines {
            if line.group != group {
                group = line.group;
                let heading = Cell::new(format!("{group}:")).bold();
                table.add_row([Cell::new(""), heading, Cell::new(""), Cell::new("")]);
            }
            let (word, colour) = match line.standing {
                Standing::Ok => ("ok", Color::Green),
                Standing::Missing => ("missing", Color::Yellow),
                Standing::Needed => ("NEEDED", Color::Red),
                Standing::InTheWay => ("in the way", Color::Yellow),
                Standing::Unknown => ("unknown", Color::Yellow),
            };
            table.add_row([
                Cell::new(word).fg(colour),
                Cell::new(line.name),
                Cell::new(&line.found),
                Cell::new(&line.mend),
            ]);
        }
        writeln!(f, "{table}")?;
        if self.lines.iter().any(|line| line.mend == AS_ROOT) {
            writeln!(f, "some things cannot be seen by this user: root sees all of them")?;
        }
        f.write_str(if self.relays() {
            "memory errors of this host can be relayed to guests"
        } else {
            "memory errors of this host cannot be relayed to guests: see the lines marked NEEDED"
        })
    }
}

/// Writes a group's lines.
type Look = fn(&mut Section<'_>);

/// The groups, in order.
const GROUPS: [(&str, Look); 6] = [
    ("KVM", kvm::look),
    ("memory failure", failure::look),
    ("finding", finding::look),
    ("poisoning", poisoning::look),
    ("memory", memory::look),
    ("privileges", privileges::look),
];

/// Makes all checks. Changes nothing on the host.
pub fn check() -> Report {
    let mut report = Report { lines: Vec::new() };
    for (group, look) in GROUPS {
        look(&mut Section { group, lines: &mut report.lines });
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::check::gap::{Found, Gap};

    fn report(write: impl FnOnce(&mut Section<'_>)) -> Report {
        let mut report = Report { lines: Vec::new() };
        write(&mut Section { group: "a group", lines: &mut report.lines });
        report
    }

    fn missing() -> Found {
        Err(Gap::Missing("not there".into()))
    }

    #[test]
    fn a_needed_thing_decides_and_every_gap_has_a_mend() {
        let hidden = || Err(Gap::Unknown { found: "hidden".into(), mend: AS_ROOT });
        let write = |section: &mut Section<'_>| {
            section.add("a", Ok("there".into()), Standing::Needed, "do this");
            section.add("b", missing(), Standing::Missing, "do that");
            section.add("c", hidden(), Standing::Needed, "not this");
        };
        let relays = report(write);
        assert!(relays.relays(), "what cannot be seen may well be there");
        let mends: Vec<&str> = relays.lines.iter().map(|line| &*line.mend).collect();
        assert_eq!(mends, ["", "do that", "run as root"]);
        assert_eq!(relays.lines[2].standing, Standing::Unknown);
        let text = relays.to_string();
        assert!(!text.contains("NEEDED") && text.contains("cannot be seen by this user"), "{text}");

        let not = report(|section| {
            write(section);
            section.add("d", missing(), Standing::Needed, "do it");
        });
        assert!(!not.relays());
        assert!(not.to_string().contains("NEEDED"));
    }

    #[test]
    fn a_line_of_json() {
        let one = report(|section| section.add("a", missing(), Standing::Missing, "do it"));
        let json = serde_json::to_string(&one).unwrap();
        let line = r#"{"group":"a group","name":"a","standing":"missing","found":"not there","mend":"do it"}"#;
        assert_eq!(json, format!(r#"{{"lines":[{line}]}}"#));
        assert_eq!(serde_json::to_string(&Standing::Unknown).unwrap(), r#""unknown""#);
    }

    #[test]
    fn a_group_has_one_heading() {
        let two = report(|section| {
            section.add("a", Ok("x".into()), Standing::Missing, "");
            section.add("b", Ok("y".into()), Standing::Missing, "");
        });
        let text = two.to_string();
        assert_eq!(text.matches("a group:").count(), 1, "{text}");
    }

    #[test]
    fn the_check_of_this_host_ends() {
        let lines = check().lines;
        let mut groups: Vec<&str> = lines.iter().map(|line| line.group).collect();
        groups.dedup();
        assert_eq!(groups, GROUPS.map(|(group, _)| group), "in order, and each in one place");
        for line in &lines {
            assert_eq!(line.standing == Standing::Ok, line.mend.is_empty(), "{line:?}");
            assert!(!line.found.is_empty() && !line.found.contains('\n'), "{line:?}");
            assert!(line.name.len() <= 24, "{} is a long name", line.name);
            assert_eq!(lines.iter().filter(|other| other.name == line.name).count(), 1, "{line:?}");
        }
    }
}
