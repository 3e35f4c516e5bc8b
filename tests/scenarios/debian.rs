//! A guest as people run one: Debian with systemd, rasdaemon and sshd, on a disk, with net and vsock.

use mce_relay_tests::debian::{Debian, HOST};
use mce_relay_tests::guest::Options;
use mce_relay_tests::network;

/// The same for an AMD guest, of a page that is told firmware-first: Linux makes a machine check's record of that.
pub fn rasdaemon_records_a_firmware_first_record() {
    network::with_a_tap(HOST, || {
        let mut debian = Debian::boot(Options::amd(2).ghes());
        let pages = debian.over_vsock.alloc("anon", 8);
        debian.guest.poison(pages[3].gpa, "hwpoison-inject");
        debian.over_vsock.sigbus_ao(pages[3]);
        debian.guest.event("acknowledged", pages[3]);
        println!("    AO: {}", debian.recorded(pages[3]));
        debian.over_vsock.others_intact(&pages, &[pages[3]]);
        println!("    {}", debian.services());
        debian.shut_down();
    });
}

/// A page of a program goes bad that nobody touches, and one that is touched: the guest's kernel tells its program,
/// rasdaemon records the machine check, and all goes on.
pub fn rasdaemon_records_it() {
    network::with_a_tap(HOST, || {
        let mut debian = Debian::boot(Options::intel(2, true));
        println!("    {}", debian.services());
        // Of the agent on the serial port, and of the one over vsock.
        let ao = debian.guest.agent.alloc("anon", 8);
        debian.guest.poison(ao[3].gpa, "hwpoison-inject");
        debian.guest.agent.memory_failure(ao[3]);
        debian.guest.agent.sigbus_ao(ao[3]);
        println!("    AO: {}", debian.recorded(ao[3]));
        debian.guest.agent.others_intact(&ao, &[ao[3]]);

        let ar = debian.over_vsock.alloc("anon", 8);
        debian.guest.poison(ar[5].gpa, "uffd");
        let touch = debian.over_vsock.touch(ar[5], "read");
        assert_eq!(
            (&touch["result"], &touch["sigbus"]["code"]),
            (&"sigbus".into(), &"AR".into()),
            "{touch}"
        );
        println!("    AR: {}", debian.recorded(ar[5]));
        debian.over_vsock.others_intact(&ar, &[ar[5]]);

        for page in [ao[3], ar[5]] {
            let words = format!("Memory failure: {:#x}:", page.gpa >> 12);
            debian.until("journalctl -k -o cat --no-pager | grep 'Memory failure'", &words);
            debian.guest.event("acknowledged", page);
        }
        println!("    {}", debian.services());
        debian.shut_down();
    });
}
