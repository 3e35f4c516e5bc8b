//! Code where a PC's firmware has its reset entry: it writes the ACPI reset register.
//!
//! On a hardware-reduced platform Linux asks EFI for a reboot before it asks ACPI. Without EFI it switches to real mode
//! and jumps to the firmware's entry, where it finds this code.

use super::error::BootError;
use super::layout::RESET_VECTOR;
use crate::machine::devices::ports::{RESET_PORT, RESET_VALUE};
use crate::machine::memory::guest_ram::GuestRam;

/// mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; then hlt for ever.
const fn code() -> [u8; 9] {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

/// Writes the code.
///
/// # Errors
/// Guest memory that cannot be written.
pub fn write(ram: &GuestRam) -> Result<(), BootError> {
    crate::machine::boot::place::write(ram, &code(), RESET_VECTOR, "reset vector")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::boot::layout::HIGH_RAM;

    #[test]
    fn fits_below_the_first_megabyte_and_loops_onto_the_halt() {
        let code = code();
        assert!(RESET_VECTOR + code.len() as u64 <= HIGH_RAM);
        // The jump is relative to its end: back by its own two bytes and the halt.
        assert_eq!(i8::from_le_bytes([code[8]]), -3);
        assert_eq!(code[6], 0xf4);
    }
}
