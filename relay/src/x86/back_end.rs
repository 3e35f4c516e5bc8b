//! The interface to a hypervisor on x86.

use std::io;

use super::mca::{McaState, Record};

/// What the relay needs of a hypervisor: one vCPU's machine-check state, and a way to set it.
///
/// All calls are made on the thread that runs the vCPU, while it is not running, by
/// [`VcpuPort::before_run`](crate::VcpuPort::before_run), and without a lock of the relay's.
pub trait Mca {
    /// The vCPU's machine-check state now.
    ///
    /// # Errors
    /// The hypervisor cannot read it. The guest is not told of anything on this vCPU until it can: an AO waits, an AR
    /// is undeliverable.
    fn state(&mut self) -> io::Result<McaState>;

    /// Puts `record` into its bank, and raises the machine check unless its `mcg_status` is 0. Called only when `state`
    /// has just shown that the guest can take it. `Ok` means that it is there: of each form in each bank of a vCPU only the
    /// first is looked for with [`Self::read_back`], so a back end whose hypervisor drops records for reasons that `state`
    /// does not show has to look for each by itself.
    ///
    /// # Errors
    /// The hypervisor refuses the record.
    fn inject(&mut self, record: &Record) -> io::Result<()>;

    /// Returns MCi_STATUS of `bank`, and MCG_STATUS, which show whether a record that was just injected is there. Called
    /// for the first record of each form in each bank of a vCPU, and after one that was not there. The
    /// default reads the whole state; a back end that reads these two registers alone is quicker.
    ///
    /// # Errors
    /// They cannot be read; the record then does not count as injected.
    fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
        let state = self.state()?;
        Ok((state.banks[usize::from(bank)].status, state.mcg_status))
    }

    /// Empties `bank`: sets its MCi_STATUS to 0 from outside (KVM_SET_MSRS), as the guest does when it has read the
    /// bank. Called for a record that was given to a processor which turned out to be offline, so that it does not read
    /// the bank.
    ///
    /// # Errors
    /// `Unsupported`, the default: the back end cannot do it, and is not asked again; nor is it after three other
    /// errors in a row. The guest is told of such a record's page elsewhere all the same; if it brings the processor
    /// back, it may read the record, too.
    fn take_back(&mut self, _bank: u8) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

macro_rules! by_reference {
    ($($type:ty),*) => {$(
        impl<M: Mca + ?Sized> Mca for $type {
            fn state(&mut self) -> io::Result<McaState> {
                (**self).state()
            }

            fn inject(&mut self, record: &Record) -> io::Result<()> {
                (**self).inject(record)
            }

            fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
                (**self).read_back(bank)
            }

            fn take_back(&mut self, bank: u8) -> io::Result<()> {
                (**self).take_back(bank)
            }
        }
    )*};
}
by_reference!(&mut M, Box<M>);

/// The back end of a vCPU that has no machine checks: nothing is told on it, and an AR is undeliverable.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMachineChecks;

impl Mca for NoMachineChecks {
    fn state(&mut self) -> io::Result<McaState> {
        // No vCPU has a handler open.
        Ok(McaState { cr4_mce: false, ..McaState::up() })
    }

    fn inject(&mut self, _: &Record) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
