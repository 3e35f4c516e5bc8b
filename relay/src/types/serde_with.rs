//! How addresses and times are written as data.

/// Addresses and registers as `"0x…"`: common JSON readers have no 64-bit integers.
pub mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// For `serde(with = …)`.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:#x}"))
    }

    /// For `serde(with = …)`.
    ///
    /// # Errors
    /// It is not `0x` and up to 16 hexadecimal digits.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        // The standard library's parser takes a sign.
        let digits = |digits: &&str| {
            (1..=16).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        text.strip_prefix("0x")
            .filter(digits)
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| D::Error::custom(format!("expected \"0x…\", got {text:?}")))
    }
}

/// As [`hex`], or null.
pub mod hex_option {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Hex(#[serde(with = "super::hex")] u64);

    /// For `serde(with = …)`.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn serialize<S: Serializer>(value: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        value.map(Hex).serialize(to)
    }

    /// For `serde(with = …)`.
    ///
    /// # Errors
    /// It is neither null nor what [`super::hex`] takes.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        Ok(Option::<Hex>::deserialize(from)?.map(|Hex(value)| value))
    }
}

/// Times as seconds since 1970, with a fraction.
pub mod unix_time {
    use std::time::{Duration, SystemTime};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        to.serialize_f64(since.as_secs_f64())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let since =
            Duration::try_from_secs_f64(f64::deserialize(from)?).map_err(D::Error::custom)?;
        Ok(SystemTime::UNIX_EPOCH + since)
    }
}

/// As [`unix_time`], or null.
pub mod unix_time_option {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Time(#[serde(with = "super::unix_time")] SystemTime);

    pub fn serialize<S: Serializer>(time: &Option<SystemTime>, to: S) -> Result<S::Ok, S::Error> {
        time.map(Time).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SystemTime>, D::Error> {
        Ok(Option::<Time>::deserialize(from)?.map(|Time(time)| time))
    }
}
