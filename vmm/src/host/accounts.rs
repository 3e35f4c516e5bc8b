//! Names of users and groups, as /etc/passwd and /etc/group have them.

use std::fs;

/// The name of user `uid`; its number where it has none.
#[must_use]
pub fn user(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    named(&users, uid).map_or_else(|| uid.to_string(), str::to_owned)
}

/// The name of group `gid`, if it has one.
#[must_use]
pub fn group(gid: u32) -> Option<String> {
    named(&fs::read_to_string("/etc/group").unwrap_or_default(), gid).map(str::to_owned)
}

/// Whether /etc/group has `user` as a member of `group`, which a session that began before does not know.
#[must_use]
pub fn is_member(user: &str, group: &str) -> bool {
    has_member(&fs::read_to_string("/etc/group").unwrap_or_default(), user, group)
}

/// The name that `text` has for `id`. Both files have the number in the third field (passwd(5), group(5)).
fn named(text: &str, id: u32) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse::<u32>() == Ok(id)).then_some(name)
    })
}

fn has_member(groups: &str, user: &str, group: &str) -> bool {
    let members = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(2).unwrap_or_default())
    });
    members.is_some_and(|members| members.split(',').any(|member| member == user))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "root:x:0:\nkvm:x:108:me,you\nbroken\n";

    #[test]
    fn a_number_has_a_name() {
        assert_eq!(named(GROUPS, 108), Some("kvm"));
        assert_eq!(named(GROUPS, 10), None);
        let users = "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1000::/home/alice:/bin/sh\n";
        assert_eq!(named(users, 1000), Some("alice"));
        assert_eq!(user(u32::MAX - 7), (u32::MAX - 7).to_string());
    }

    #[test]
    fn a_group_has_members() {
        assert!(has_member(GROUPS, "you", "kvm") && !has_member(GROUPS, "yo", "kvm"));
        assert!(!has_member(GROUPS, "me", "root") && !has_member(GROUPS, "me", "broken"));
    }
}
