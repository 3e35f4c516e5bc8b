//! ELF notes: a name, a type, and a description.

/// Name of the note with what a Linux kernel says about itself.
pub(super) const NAME_VMCOREINFO: &str = "VMCOREINFO";
/// Name of the notes with the state of a processor.
pub(super) const NAME_CORE: &str = "CORE";
/// Name of our own note.
pub(super) const NAME_OWN: &str = "MCE_RELAY";
/// Three words of 4 bytes: the lengths of name and description, and the type.
const HEAD: usize = 12;
/// Name and description each begin at a multiple of this.
const ALIGN: usize = 4;

/// A note, with its padding.
pub(super) fn note(name: &str, kind: u32, description: &[u8]) -> Vec<u8> {
    let word = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
    let mut note = Vec::with_capacity(len(name, description.len()));
    note.extend(word(name.len() + 1));
    note.extend(word(description.len()));
    note.extend(kind.to_le_bytes());
    note.extend(name.as_bytes());
    note.push(0);
    note.resize(note.len().next_multiple_of(ALIGN), 0);
    note.extend(description);
    note.resize(note.len().next_multiple_of(ALIGN), 0);
    note
}

/// The length of such a note in bytes.
pub(super) fn len(name: &str, description: usize) -> usize {
    HEAD + (name.len() + 1).next_multiple_of(ALIGN) + description.next_multiple_of(ALIGN)
}

/// The description of the note that `bytes` begin with, if its name and type are these and it is complete.
pub(super) fn description<'a>(bytes: &'a [u8], name: &str, kind: u32) -> Option<&'a [u8]> {
    let word = |index: usize| {
        let bytes = bytes.get(index * 4..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let named = bytes.get(HEAD..)?.strip_prefix(name.as_bytes())?.first() == Some(&0);
    if !named || usize::try_from(word(0)?).ok()? != name.len() + 1 || word(2)? != kind {
        return None;
    }
    let start = HEAD + (name.len() + 1).next_multiple_of(ALIGN);
    bytes.get(start..)?.get(..usize::try_from(word(1)?).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for words in [&b""[..], b"a", b"four", b"five."] {
            let bytes = note("NAME", 7, words);
            assert_eq!(bytes.len(), len("NAME", words.len()));
            assert_eq!(bytes.len() % ALIGN, 0);
            assert_eq!(description(&bytes, "NAME", 7), Some(words));
            assert_eq!(description(&bytes, "NAME", 8), None);
            assert_eq!(description(&bytes, "NAM", 7), None);
            assert_eq!(description(&bytes[..11], "NAME", 7), None);
        }
        assert_eq!(description(&[0xff; 100], "NAME", 7), None);
    }
}
