//! Numbers for people.

/// Bytes in the largest binary unit that leaves at least 1, with about three
/// digits: `0 B`, `1.5 KiB`, `128 MiB`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    let mut unit = "B";
    for larger in UNITS {
        // Not at 1024: 1023.96 would be shown as 1024.
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if value >= 99.95 || (value - value.round()).abs() < 0.005 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// Bytes more or less: `+1.5 KiB`, `-3 MiB`, `+0 B`.
#[must_use]
pub fn change(change: i64) -> String {
    let sign = if change < 0 { "-" } else { "+" };
    format!("{sign}{}", bytes(change.unsigned_abs()))
}

/// From one number of bytes to another, the unit once if both have the same:
/// `5.2 to 12.4 MiB`, `91 KiB to 2.4 MiB`; one number if they read the same.
#[must_use]
pub fn range(low: u64, high: u64) -> String {
    let (low, high) = (bytes(low), bytes(high));
    if low == high {
        return low;
    }
    match (low.rsplit_once(' '), high.rsplit_once(' ')) {
        (Some((number, unit)), Some((_, same))) if unit == same => format!("{number} to {high}"),
        _ => format!("{low} to {high}"),
    }
}

/// A count with its thousands apart: `1,022,020`.
#[must_use]
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place != 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A count of things, with the right number: `1 object`, `2 objects`.
#[must_use]
pub fn counted(number: u64, singular: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {singular}{plural}", count(number))
}

/// How much of the whole a part is: `64.5%`; of nothing, nothing. What is little
/// is not called nothing, and not quite all not all.
#[must_use]
pub fn percent(part: u64, whole: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let share = if whole == 0 {
        0.0
    } else {
        part as f64 * 100.0 / whole as f64
    };
    if part != 0 && share < 0.05 {
        "<0.1%".to_owned()
    } else if part < whole && share >= 99.95 {
        ">99.9%".to_owned()
    } else {
        format!("{share:.1}%")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check the unit and the digits on both sides of each step.
    #[test]
    fn bytes_in_units() {
        for (number, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (102_400, "100 KiB"),
            (524_288, "512 KiB"),
            (1_048_575, "1 MiB"),
            (13_002_342, "12.4 MiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(number), expected, "{number}");
        }
    }

    /// Check that a unit is said once where that is enough, and equal ends too.
    #[test]
    fn ranges() {
        for (low, high, expected) in [
            (16, 31, "16 to 31 B"),
            (1, 1, "1 B"),
            (1024, 2047, "1 to 2 KiB"),
            (93_184, 2_516_582, "91 KiB to 2.4 MiB"),
            (0, 4096, "0 B to 4 KiB"),
            (10_485_760, 10_485_761, "10 MiB"),
        ] {
            assert_eq!(range(low, high), expected);
        }
    }

    /// Check that thousands are set apart, from the right.
    #[test]
    fn counts() {
        for (number, expected) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_022_020, "1,022,020"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(count(number), expected);
        }
        assert_eq!(counted(1, "object"), "1 object");
        assert_eq!(counted(2000, "object"), "2,000 objects");
    }

    /// Check that shares are rounded to a tenth, and that nothing of nothing is
    /// no error.
    #[test]
    fn percents() {
        assert_eq!(percent(1, 3), "33.3%");
        assert_eq!(percent(5, 5), "100.0%");
        assert_eq!(percent(0, 0), "0.0%");
        assert_eq!(percent(1, 10_000), "<0.1%");
        assert_eq!(percent(9_999, 10_000), ">99.9%");
    }
}
