//! Memory of the VMM itself goes bad, for real.

use mce_relay_cli::poison::host::hwpoison_inject::Injector;
use mce_relay_tests::hooked::Hooked;
use mce_relay_tests::lab;

/// A page that it does not touch: an event, and it goes on. When it does touch it, it ends with a line and
/// a status of its own.
pub fn a_page_of_the_vmm() {
    let mut vmm = Hooked::start();
    let page = vmm.page();
    let physical = lab::host_physical(vmm.pid(), page);
    Injector::open().unwrap().corrupt(physical >> 12).unwrap();
    let outside = vmm.event("outside");
    assert_eq!((&outside["kind"], &outside["hva"]), (&"AO".into(), &format!("{page:#x}").into()));
    vmm.put("vm.pause");
    vmm.put("vm.resume");

    vmm.order("touch");
    let (status, stderr) = vmm.ended();
    println!("    {}", stderr.trim_end());
    assert_eq!(status.code(), Some(7), "{status}: {stderr}");
    assert!(stderr.contains(&format!("outside: AO at HVA {page:#x}")), "{stderr}");
    assert!(stderr.contains(&format!("(BUS_MCEERR_AR) at {page:#x}, lsb 12")), "{stderr}");
    assert!(stderr.contains("memory of the VMM itself is bad"), "{stderr}");
}
