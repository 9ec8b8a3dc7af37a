//! Lengths of time as Go writes them: `1h30m`, `1.5s`, `250ms`, `-5s`, `0`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer};

/// A length of time, which may be negative.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GoDuration {
    nanoseconds: i64,
}

/// A text that is no length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("time: invalid duration {0:?}")]
pub(crate) struct NotADuration(String);

const SECOND: i64 = 1_000_000_000;
/// The longer suffixes first where one ends like another.
const UNITS: [(&str, i64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", SECOND),
    ("m", 60 * SECOND),
    ("h", 3600 * SECOND),
];

impl GoDuration {
    pub(crate) const fn from_secs(seconds: i64) -> Self {
        Self { nanoseconds: seconds * SECOND }
    }

    pub(crate) fn is_zero(self) -> bool {
        self.nanoseconds == 0
    }

    pub(crate) fn is_negative(self) -> bool {
        self.nanoseconds < 0
    }

    /// Nothing when it is negative.
    pub(crate) fn get(self) -> Duration {
        Duration::from_nanos(u64::try_from(self.nanoseconds).unwrap_or(0))
    }
}

impl FromStr for GoDuration {
    type Err = NotADuration;
    fn from_str(text: &str) -> Result<Self, NotADuration> {
        let fault = || NotADuration(text.to_owned());
        let (negative, mut rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(fault());
        }
        let mut sum = 0_i64;
        while !rest.is_empty() {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(fault)?;
            let (number, after) = rest.split_at(end);
            let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
            let (unit, after) = after.split_at(end);
            let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(fault)?;
            sum = sum.checked_add(nanoseconds(number, *unit).ok_or_else(fault)?).ok_or_else(fault)?;
            rest = after;
        }
        Ok(Self { nanoseconds: if negative { -sum } else { sum } })
    }
}

/// So many of a unit; exact for every fraction that the unit can hold.
fn nanoseconds(number: &str, unit: i64) -> Option<i64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()?.checked_mul(unit)? };
    let mut share = unit;
    let mut part = 0;
    for digit in fraction.bytes() {
        share /= 10;
        part += i64::from(digit - b'0') * share;
    }
    whole.checked_add(part)
}

/// As Go prints it.
impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanoseconds < 0 {
            f.write_str("-")?;
        }
        let all = self.nanoseconds.unsigned_abs();
        let part = |value: u64, unit: u64| {
            let digits = unit.ilog10() as usize;
            let text = format!("{}.{:0digits$}", value / unit, value % unit);
            if unit == 1 {
                value.to_string()
            } else {
                text.trim_end_matches('0').trim_end_matches('.').to_owned()
            }
        };
        match all {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{all}ns"),
            1_000..1_000_000 => write!(f, "{}µs", part(all, 1_000)),
            1_000_000..1_000_000_000 => write!(f, "{}ms", part(all, 1_000_000)),
            _ => {
                let (minutes, rest) = (all / 60_000_000_000, all % 60_000_000_000);
                match (minutes / 60, minutes % 60) {
                    (0, 0) => {}
                    (0, minutes) => write!(f, "{minutes}m")?,
                    (hours, minutes) => write!(f, "{hours}h{minutes}m")?,
                }
                write!(f, "{}s", part(rest, 1_000_000_000))
            }
        }
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_and_written_as_go_does() {
        for (text, nanoseconds, shown) in [
            ("0", 0, "0s"),
            ("0s", 0, "0s"),
            ("1h30m", 5400 * SECOND, "1h30m0s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            (".5m", 30 * SECOND, "30s"),
            ("250ms", 250_000_000, "250ms"),
            ("1.25us", 1_250, "1.25µs"),
            ("3ns", 3, "3ns"),
            ("-5s", -5 * SECOND, "-5s"),
            ("168h", 168 * 3600 * SECOND, "168h0m0s"),
            ("2m3.5s", 123_500_000_000, "2m3.5s"),
        ] {
            let read: GoDuration = text.parse().unwrap();
            assert_eq!(read.nanoseconds, nanoseconds, "{text}");
            assert_eq!(read.to_string(), shown, "{text}");
        }
        for text in ["", "5", "s", "1d", "1.2.3s", ".s", "-", "1h-5m", "99999999999h"] {
            assert!(text.parse::<GoDuration>().is_err(), "{text}");
        }
        assert_eq!("-5s".parse::<GoDuration>().unwrap().get(), Duration::ZERO);
    }
}
