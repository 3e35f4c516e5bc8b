use super::block::*;
use super::words::parse;
use super::*;
use std::fs;
use std::os::unix::fs::FileExt;

use crate::touch;

/// A file of so many blocks of zeros, gone with its owner.
pub struct Blocks(pub String);

impl Blocks {
    /// Makes it; `name` is no other test's.
    pub fn new(name: &str, blocks: u64) -> Self {
        touch::install(2).unwrap();
        let path = std::env::temp_dir().join(format!("agent-{}-{name}", std::process::id()));
        fs::File::create_new(&path).unwrap().set_len(blocks * BLOCK as u64).unwrap();
        Self(path.to_str().unwrap().to_owned())
    }

    /// Puts bytes somewhere into it.
    pub fn put(&self, bytes: &[u8], offset: u64) {
        let file = fs::File::options().write(true).open(&self.0).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn ask(line: &str) -> Result<String, String> {
    let request = parse(line.split(' ').next().unwrap(), &mut line.split(' ').skip(1));
    let reply = perform(&request.unwrap().unwrap(), false, |_, _| {})?;
    // Of the file system that the test happens to use.
    Ok(serde_json::to_string(&reply).unwrap().replace(r#""direct":true,"#, r#""direct":false,"#))
}

#[test]
fn every_word_of_a_block_follows_from_what_it_is() {
    let label = Label { seed: 7, offset: 0x3000, generation: 2 };
    let words = label.words();
    assert_eq!(words[0].to_le_bytes(), *b"mcerelay");
    assert_eq!(words[1..4], [7, 0x3000, 2]);
    // As written down above, for a reader elsewhere.
    assert_eq!(words[4], mix(mix(mix(mix(7) ^ 0x3000) ^ 2) ^ 4));
    // From the generator's authors: https://prng.di.unimi.it/splitmix64.c, started with 0.
    assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    for other in [
        Label { seed: 8, ..label },
        Label { offset: 0x4000, ..label },
        Label { generation: 3, ..label },
    ] {
        let other = other.words();
        assert!((HEADER..WORDS).all(|index| words[index] != other[index]));
        let mut torn = words;
        torn[256..].copy_from_slice(&other[256..]);
        assert_eq!(Found::of(&torn), Found::Torn(label, 256));
    }
    assert_eq!(Found::of(&words), Found::Whole(label));
    assert_eq!(Found::of(&[0; WORDS]), Found::Zeros);
    assert_eq!(Found::of(&[1; WORDS]), Found::Foreign(1));
}

#[test]
fn what_was_written_is_found_and_what_was_not_is_named() {
    let blocks = Blocks::new("transfer", 8);
    let path = &blocks.0;
    assert_eq!(
        ask(&format!("disk-write {path} 0x1000 0x6000 7")).unwrap(),
        r#"{"direct":false,"written":6,"failed":[],"failures":0}"#
    );
    assert_eq!(
        ask(&format!("disk-verify {path} 0x1000 0x6000 7")).unwrap(),
        r#"{"direct":false,"intact":6,"different":[],"differences":0,"failed":[],"failures":0}"#
    );
    ask(&format!("disk-write {path} 0x2000 0x1000 7 1")).unwrap();
    blocks.put(&[1; 16], 0x3800);
    blocks.put(&[2; 8], 0x4000);
    assert_eq!(
        ask(&format!("disk-verify {path} 0 0x8000 7")).unwrap(),
        concat!(
            r#"{"direct":false,"intact":3,"different":["#,
            r#"{"offset":"0x0","found":"zeros"},"#,
            r#"{"offset":"0x2000","found":"seed 7 offset 0x2000 generation 1"},"#,
            r#"{"offset":"0x3000","found":"seed 7 offset 0x3000 generation 0, another one from byte 2048 on"},"#,
            r#"{"offset":"0x4000","found":"no block of this kind: 0x0202020202020202"},"#,
            r#"{"offset":"0x7000","found":"zeros"}],"differences":5,"failed":[],"failures":0}"#
        )
    );
}

#[test]
fn what_cannot_be_used_is_refused() {
    let blocks = Blocks::new("refused", 2);
    let path = &blocks.0;
    let error = ask(&format!("disk-write {path} 0 0x3000 7")).unwrap_err();
    assert!(error.contains("has 8192 bytes, 12288 were asked for"), "{error}");
    let error = ask("disk-verify /no/such/disk 0 4096 7").unwrap_err();
    assert!(error.contains("/no/such/disk: No such file"), "{error}");
    let error = ask("disk-write /dev/null 0 4096 7").unwrap_err();
    assert!(error.contains("expected a block device or a file"), "{error}");
}

#[test]
fn failed_transfers_are_one_run_where_they_are_neighbours() {
    let mut failures = Failures::default();
    for (block, errno) in [(0, "EIO"), (1, "EIO"), (2, "EFAULT"), (4, "EFAULT")] {
        failures.add(block * BLOCK as u64, errno.to_owned());
    }
    assert_eq!(
        serde_json::to_string(&failures.runs).unwrap(),
        concat!(
            r#"[{"offset":"0x0","blocks":2,"errno":"EIO"},{"offset":"0x2000","blocks":1,"errno":"EFAULT"},"#,
            r#"{"offset":"0x4000","blocks":1,"errno":"EFAULT"}]"#
        )
    );
    for block in 0..1000 {
        failures.add(block * 2 * BLOCK as u64, "EIO".to_owned());
    }
    assert_eq!((failures.runs.len(), failures.count), (MAX_NAMED, 1004));
}
