//! Python's `strftime` in the C locale.

use std::fmt::Write;

use chrono::NaiveDateTime;

/// A time as the format says. Directives that nobody knows stay as they are; a time zone is none, as of Python's
/// `datetime.now()`.
pub(super) fn strftime(time: &NaiveDateTime, format: &str) -> String {
    let (mut out, mut chars) = (String::new(), format.chars());
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let rest = chars.as_str();
        let flags = rest.len() - rest.trim_start_matches(['-', '_', '^', '#', '0']).len();
        let Some(letter) = rest[flags..].chars().next() else {
            out.push('%');
            continue;
        };
        let flag = rest[..flags].chars().next_back();
        chars = rest[flags + letter.len_utf8()..].chars();
        match (flag, letter) {
            (_, 'Z' | 'z') => {}
            (_, 'f') => {
                let _ = write!(out, "{}", time.format("%6f"));
            }
            (None | Some('-' | '_' | '0'), letter) if KNOWN.contains(letter) => {
                let flag = flag.map(String::from).unwrap_or_default();
                // A flag that chrono does not take with this letter is an error of the write, which leaves it out.
                let mut text = String::new();
                if write!(text, "{}", time.format(&format!("%{flag}{letter}"))).is_err() {
                    text.clear();
                    let _ = write!(text, "{}", time.format(&format!("%{letter}")));
                }
                out.push_str(&text);
            }
            (Some('^' | '#'), letter) if KNOWN.contains(letter) => {
                let text = time.format(&format!("%{letter}")).to_string();
                out.push_str(&text.to_uppercase());
            }
            (_, letter) => {
                out.push('%');
                out.push_str(&rest[..flags]);
                out.push(letter);
            }
        }
    }
    out
}

/// What glibc and chrono mean the same by.
const KNOWN: &str = "aAbBcCdDeFgGhHIjklmMnpPrRSstTuUVwWxXyY%";
