//! Holds the lab's idle virtual machines (see `lab::hold_kvm`) until it is killed, for programs in
//! the lab that know nothing of them.

fn main() {
    mce_relay_tests::lab::hold_kvm();
    loop {
        std::thread::park();
    }
}
