//! Poison by userfaultfd, as the component has it: [`Uffd`].

pub use mce_relay::internals::uffd::Uffd;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_ones_own_reads_as_poisoned() {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(error) => {
                println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}");
                return;
            }
        };
        let ram =
            crate::machine::memory::guest_ram::GuestRam::new(&[crate::config::MemoryZone::new(
                64 << 20,
            )])
            .unwrap();
        let hva = ram.blocks()[0].hva;
        uffd.poison(hva + 0x3000, 4096).unwrap();
        assert_eq!(ram.find_poison(), [0x3000]);
    }
}
