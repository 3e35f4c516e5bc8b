//! Parses the numbers that people and files write.

/// `0x` and hexadecimal digits, or decimal digits; nothing else, not even a sign (which Rust's own parsers take).
#[must_use]
pub fn plain(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let fine = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
    fine.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// A decimal number with a suffix K, M, G or T (either case) for powers of 1024, or a [`plain`] one.
///
/// # Errors
/// A sentence for the user.
pub fn with_unit(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a number; expected e.g. 512M, 4G, 4096 or 0x1000");
    let shift = match text.chars().last() {
        Some('K' | 'k') => 10,
        Some('M' | 'm') => 20,
        Some('G' | 'g') => 30,
        Some('T' | 't') => 40,
        _ => return plain(text).ok_or_else(wrong),
    };
    // The last character is one byte long.
    let digits = &text[..text.len() - 1];
    let decimal = plain(digits).filter(|_| !digits.starts_with("0x"));
    let number = decimal.ok_or_else(wrong)?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} does not fit into 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_ones() {
        assert_eq!(plain("0x1f"), Some(31));
        assert_eq!(plain("18446744073709551615"), Some(u64::MAX));
        for bad in ["", "0x", "+1", "-1", "0x+1", "0X1", "1K", "0xg", " 1", "18446744073709551616"]
        {
            assert_eq!(plain(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn units() {
        assert_eq!(with_unit("512M"), Ok(512 << 20));
        assert_eq!(with_unit("0x1000"), Ok(4096));
        assert_eq!(with_unit("4g"), Ok(4 << 30));
        for bad in ["", "M", "0x", "-1", "1.5G", "99999999T", "0xg", "é", "+1", "0x+1", "0x1K"] {
            assert!(with_unit(bad).unwrap_err().contains(bad), "{bad}");
        }
    }
}
