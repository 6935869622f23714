//! Methods of Python's texts, lists and dicts.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::arguments::{Arguments, int_or, text_or_none, truth};
use super::format;
use super::python::{
    Result, View, as_int, dict, error, int, is_dict, is_list, is_printable, items, pairs, text,
    tuple, type_name,
};

const TEXT: &str = "capitalize casefold center count endswith expandtabs find format format_map index \
    isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join \
    ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split \
    splitlines startswith strip swapcase title upper zfill";
const LIST: &str = "copy count index";
const DICT: &str = "copy get items keys values";
/// What would change a value; the sandbox in which transformers renders has none of these.
const UNSAFE: &str = "append clear extend insert pop popitem remove reverse setdefault sort update";

fn among(names: &str, name: &str) -> bool {
    names.split_ascii_whitespace().any(|n| n == name)
}

/// Whether the value has this method.
pub(super) fn exists(value: &Value, name: &str) -> bool {
    match value.kind() {
        ValueKind::String => among(TEXT, name),
        ValueKind::Seq if value.is_tuple() => matches!(name, "count" | "index"),
        ValueKind::Seq => is_list(value) && among(LIST, name),
        ValueKind::Map => is_dict(value) && among(DICT, name),
        _ => false,
    }
}

/// Calls a method.
///
/// # Errors
/// If there is none of this name, or it refuses what it is given.
pub(super) fn call(value: &Value, name: &str, arguments: &[Value]) -> Result<Value> {
    let changes = matches!(value.kind(), ValueKind::Seq | ValueKind::Map) && among(UNSAFE, name);
    if changes && !value.is_tuple() {
        return Err(error(format!(
            "access to attribute '{name}' of '{}' object is unsafe",
            type_name(value)
        )));
    }
    if value.is_undefined() {
        let message = format!("method {name:?} of an undefined value is called");
        return Err(Error::new(ErrorKind::UndefinedError, message));
    }
    if !exists(value, name) {
        let message = format!("'{}' object has no attribute '{name}'", type_name(value));
        return Err(Error::new(ErrorKind::UnknownMethod, message));
    }
    let arguments = Arguments::of(arguments);
    match value.as_str() {
        Some(text) => text_method(text, name, &arguments),
        None if is_dict(value) => dict_method(value, name, &arguments),
        None => list_method(value, name, &arguments),
    }
}

fn dict_method(value: &Value, name: &str, arguments: &Arguments) -> Result<Value> {
    let view = |name, values: Vec<Value>| Ok(Value::from_object(View { name, values }));
    if name == "get" {
        let [key, default] = arguments.bind("get", ["key", "default"], 1)?;
        let found = key.and_then(|key| value.as_object()?.get_value(&key));
        return Ok(found.or(default).unwrap_or(Value::from(())));
    }
    let [] = arguments.bind(name, [], 0)?;
    let pairs = pairs(value).into_iter();
    match name {
        "keys" => view("dict_keys", pairs.map(|(key, _)| key).collect()),
        "values" => view("dict_values", pairs.map(|(_, value)| value).collect()),
        "items" => view("dict_items", pairs.map(|(k, v)| tuple(vec![k, v])).collect()),
        _ => Ok(dict(pairs)),
    }
}

fn list_method(value: &Value, name: &str, arguments: &Arguments) -> Result<Value> {
    let values = items(value)?;
    match name {
        "count" => {
            let [wanted] = arguments.bind(name, ["value"], 1)?;
            let count = values.iter().filter(|&v| Some(v) == wanted.as_ref()).count();
            Ok(Value::from(count))
        }
        "index" => {
            let [wanted, start, end] = arguments.bind(name, ["value", "start", "end"], 1)?;
            let (start, end) = ends(start.as_ref(), end.as_ref(), values.len())?;
            let within = values.get(start..end.max(start)).unwrap_or_default();
            match within.iter().position(|v| Some(v) == wanted.as_ref()) {
                Some(at) => Ok(Value::from(start + at)),
                None => Err(error(format!("the value is not in the {}", type_name(value)))),
            }
        }
        _ => {
            let [] = arguments.bind(name, [], 0)?;
            Ok(Value::from(values))
        }
    }
}

/// Start and end of a part, counted from the end where negative.
fn ends(start: Option<&Value>, end: Option<&Value>, length: usize) -> Result<(usize, usize)> {
    let at = |value: Option<&Value>, default: usize| -> Result<usize> {
        let Some(value) = value.filter(|v| !v.is_none()) else { return Ok(default) };
        let at = int_or(Some(value), 0)?;
        let at = if at < 0 { (at + length as i128).max(0) } else { at };
        Ok(usize::try_from(at).unwrap_or(usize::MAX))
    };
    Ok((at(start, 0)?, at(end, length)?.min(length)))
}

fn text_method(s: &str, name: &str, arguments: &Arguments) -> Result<Value> {
    let none = || arguments.bind::<0>(name, [], 0);
    let is =
        |test: fn(char) -> bool| none().map(|_| Value::from(!s.is_empty() && s.chars().all(test)));
    let required = |value: &Option<Value>| -> Result<String> {
        text_or_none(value.as_ref())?
            .map(str::to_owned)
            .ok_or_else(|| error(format!("{name}() must be given str, not NoneType")))
    };
    match name {
        "lower" | "casefold" => none().map(|_| Value::from(s.to_lowercase())),
        "upper" => none().map(|_| Value::from(s.to_uppercase())),
        "capitalize" => none().map(|_| Value::from(capitalize(s))),
        "title" => none().map(|_| Value::from(title(s))),
        "swapcase" => none().map(|_| {
            let swapped = s.chars().map(|c| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            });
            Value::from(swapped.collect::<String>())
        }),
        "isalnum" => is(char::is_alphanumeric),
        "isalpha" => is(char::is_alphabetic),
        "isascii" => none().map(|_| Value::from(s.is_ascii())),
        "isdecimal" | "isdigit" => is(|c| c.is_ascii_digit()),
        "isnumeric" => is(char::is_numeric),
        "isspace" => is(is_space),
        "isprintable" => none().map(|_| Value::from(s.chars().all(is_printable))),
        "isidentifier" => none().map(|_| {
            let starts = s.starts_with(|c: char| c.is_alphabetic() || c == '_');
            Value::from(starts && s.chars().all(|c| c.is_alphanumeric() || c == '_'))
        }),
        "islower" | "isupper" => {
            none()?;
            let (lower, upper) =
                (s.chars().any(char::is_lowercase), s.chars().any(char::is_uppercase));
            Ok(Value::from(if name == "islower" { lower && !upper } else { upper && !lower }))
        }
        "istitle" => {
            none().map(|_| Value::from(s.chars().any(char::is_alphabetic) && title(s) == s))
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = arguments.bind(name, ["chars"], 0)?;
            Ok(Value::from(strip(s, text_or_none(chars.as_ref())?, name)))
        }
        "startswith" | "endswith" => {
            let [affix, start, end] = arguments.bind(name, ["prefix", "start", "end"], 1)?;
            let affix = affix.unwrap_or_default();
            let affixes = match affix.is_tuple() {
                true => items(&affix)?,
                false => vec![affix],
            };
            let chars: Vec<char> = s.chars().collect();
            let (start, end) = ends(start.as_ref(), end.as_ref(), chars.len())?;
            let Some(part) = chars.get(start..end.max(start)) else {
                return Ok(Value::from(false));
            };
            let part: String = part.iter().collect();
            for affix in affixes {
                let affix = required(&Some(affix))?;
                let found = match name {
                    "startswith" => part.starts_with(&affix),
                    _ => part.ends_with(&affix),
                };
                if found {
                    return Ok(Value::from(true));
                }
            }
            Ok(Value::from(false))
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = arguments.bind(name, ["affix"], 1)?;
            let affix = required(&affix)?;
            let rest = match name {
                "removeprefix" => s.strip_prefix(&affix),
                _ => s.strip_suffix(&affix),
            };
            Ok(Value::from(rest.unwrap_or(s)))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let [sought, start, end] = arguments.bind(name, ["sub", "start", "end"], 1)?;
            let sought = required(&sought)?;
            let chars: Vec<char> = s.chars().collect();
            let (start, end) = ends(start.as_ref(), end.as_ref(), chars.len())?;
            let part: Option<String> = chars.get(start..end.max(start)).map(|p| p.iter().collect());
            if name == "count" {
                let count = part.map_or(0, |p| p.matches(&sought).count());
                return Ok(Value::from(count));
            }
            let found = part.and_then(|part| {
                let at =
                    if name.starts_with('r') { part.rfind(&sought) } else { part.find(&sought) };
                at.map(|at| start + part[..at].chars().count())
            });
            match found {
                Some(at) => Ok(Value::from(at)),
                None if name.ends_with("find") => Ok(Value::from(-1)),
                None => Err(error("substring not found")),
            }
        }
        "replace" => {
            let [old, new, count] = arguments.bind(name, ["old", "new", "count"], 2)?;
            let count = int_or(count.as_ref(), -1)?;
            Ok(Value::from(replace(s, &required(&old)?, &required(&new)?, count)))
        }
        "split" | "rsplit" => {
            let [separator, most] = arguments.bind(name, ["sep", "maxsplit"], 0)?;
            let separator = text_or_none(separator.as_ref())?;
            if separator == Some("") {
                return Err(error("empty separator"));
            }
            let most = usize::try_from(int_or(most.as_ref(), -1)?).unwrap_or(usize::MAX);
            let parts = split(s, separator, most, name == "rsplit");
            Ok(Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>()))
        }
        "splitlines" => {
            let [keep] = arguments.bind(name, ["keepends"], 0)?;
            let lines = lines(s, truth(keep.as_ref())).into_iter().map(Value::from);
            Ok(Value::from(lines.collect::<Vec<_>>()))
        }
        "partition" | "rpartition" => {
            let [separator] = arguments.bind(name, ["sep"], 1)?;
            let separator = required(&separator)?;
            if separator.is_empty() {
                return Err(error("empty separator"));
            }
            let last = name == "rpartition";
            let at = if last { s.rfind(&separator) } else { s.find(&separator) };
            let parts = match at {
                Some(at) => [&s[..at], &separator, &s[at + separator.len()..]],
                None if last => ["", "", s],
                None => [s, "", ""],
            };
            Ok(tuple(parts.into_iter().map(Value::from).collect()))
        }
        "join" => {
            let [values] = arguments.bind(name, ["iterable"], 1)?;
            let mut texts = Vec::new();
            for (i, value) in items(&values.unwrap_or_default())?.iter().enumerate() {
                let text = value.as_str().ok_or_else(|| {
                    let kind = type_name(value);
                    error(format!("sequence item {i}: expected str instance, {kind} found"))
                })?;
                texts.push(text.to_owned());
            }
            Ok(Value::from(texts.join(s)))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = arguments.bind(name, ["width", "fillchar"], 1)?;
            let width = usize::try_from(int_or(width.as_ref(), 0)?).unwrap_or(0);
            let fill = text_or_none(fill.as_ref())?.unwrap_or(" ");
            if fill.chars().count() != 1 {
                return Err(error("The fill character must be exactly one character long"));
            }
            let missing = width.saturating_sub(s.chars().count());
            let left = match name {
                "center" => missing / 2 + (missing & width & 1),
                "rjust" => missing,
                _ => 0,
            };
            Ok(Value::from(fill.repeat(left) + s + &fill.repeat(missing - left)))
        }
        "zfill" => {
            let [width] = arguments.bind(name, ["width"], 1)?;
            let width = usize::try_from(int_or(width.as_ref(), 0)?).unwrap_or(0);
            let missing = width.saturating_sub(s.chars().count());
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            Ok(Value::from(format!("{sign}{}{digits}", "0".repeat(missing))))
        }
        "expandtabs" => {
            let [size] = arguments.bind(name, ["tabsize"], 0)?;
            let size = usize::try_from(int_or(size.as_ref(), 8)?).unwrap_or(0);
            let (mut out, mut column) = (String::new(), 0);
            for c in s.chars() {
                match c {
                    '\t' if size > 0 => {
                        let spaces = size - column % size;
                        out.push_str(&" ".repeat(spaces));
                        column += spaces;
                    }
                    '\t' => {}
                    '\n' | '\r' => {
                        out.push(c);
                        column = 0;
                    }
                    _ => {
                        out.push(c);
                        column += 1;
                    }
                }
            }
            Ok(Value::from(out))
        }
        "format" => format::fields(s, &arguments.positional, &arguments.named).map(Value::from),
        "format_map" => {
            let [mapping] = arguments.bind(name, ["mapping"], 1)?;
            let named: Vec<(String, Value)> = pairs(&mapping.unwrap_or_default())
                .into_iter()
                .map(|(key, value)| (text(&key), value))
                .collect();
            format::fields(s, &[], &named).map(Value::from)
        }
        _ => Err(error(format!("'str' object has no attribute '{name}'"))),
    }
}

pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub(super) fn capitalize(s: &str) -> String {
    let mut chars = s.chars();
    let first = chars.next().map(|c| c.to_uppercase().collect::<String>()).unwrap_or_default();
    first + &chars.as_str().to_lowercase()
}

fn title(s: &str) -> String {
    let (mut out, mut inside) = (String::new(), false);
    for c in s.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// Takes white space, or these characters, off one end or both.
pub(super) fn strip<'a>(s: &'a str, chars: Option<&str>, name: &str) -> &'a str {
    let goes = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
    let s = if name == "rstrip" { s } else { s.trim_start_matches(goes) };
    if name == "lstrip" { s } else { s.trim_end_matches(goes) }
}

pub(super) fn replace(s: &str, old: &str, new: &str, count: i128) -> String {
    match usize::try_from(count) {
        Ok(count) => s.replacen(old, new, count),
        Err(_) => s.replace(old, new),
    }
}

fn split(s: &str, separator: Option<&str>, most: usize, from_the_end: bool) -> Vec<String> {
    let most = most.saturating_add(1);
    let mut parts: Vec<&str> = match (separator, from_the_end) {
        (Some(separator), false) => s.splitn(most, separator).collect(),
        (Some(separator), true) => s.rsplitn(most, separator).collect(),
        (None, end) => {
            let (mut parts, mut rest) = (Vec::new(), s.trim_matches(is_space));
            while !rest.is_empty() {
                let cut = match end {
                    false => rest.find(is_space),
                    true => rest.rfind(is_space),
                };
                let Some(cut) = cut.filter(|_| parts.len() + 1 < most) else {
                    parts.push(rest);
                    break;
                };
                let width = rest[cut..].chars().next().map_or(1, char::len_utf8);
                let (before, after) = (&rest[..cut], &rest[cut + width..]);
                if end {
                    parts.push(after);
                    rest = before.trim_end_matches(is_space);
                } else {
                    parts.push(before);
                    rest = after.trim_start_matches(is_space);
                }
            }
            // What is left over keeps its white space at the far end.
            let full = parts.len() == most;
            if let (Some(last), true) = (parts.last_mut(), full) {
                let at = last.as_ptr() as usize - s.as_ptr() as usize;
                *last =
                    if end { s[..at + last.len()].trim_end_matches(is_space) } else { &s[at..] };
            }
            parts
        }
    };
    if from_the_end {
        parts.reverse();
    }
    parts.into_iter().map(str::to_owned).collect()
}

/// Lines, cut where Python's `splitlines` cuts.
pub(super) fn lines(s: &str, keep: bool) -> Vec<String> {
    let (mut lines, mut line) = (Vec::new(), String::new());
    let mut chars = s.chars().peekable();
    while let Some(c) = chars.next() {
        let ends = matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        );
        if !ends || keep {
            line.push(c);
        }
        if ends {
            if c == '\r' && chars.next_if_eq(&'\n').is_some() && keep {
                line.push('\n');
            }
            lines.push(std::mem::take(&mut line));
        }
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

/// `int(text)` in a base, if it is a number.
pub(super) fn parse_int(s: &str, base: u32) -> Option<Value> {
    let s = s.trim_matches(is_space).replace('_', "");
    let (sign, digits) = match s.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, s.strip_prefix('+').unwrap_or(&s)),
    };
    let prefixed = |base: u32| {
        let marks = match base {
            2 => ["0b", "0B"],
            8 => ["0o", "0O"],
            16 => ["0x", "0X"],
            _ => return None,
        };
        marks.iter().find_map(|mark| digits.strip_prefix(mark))
    };
    let (base, digits) = match base {
        0 => {
            [2, 8, 16].into_iter().find_map(|b| prefixed(b).map(|d| (b, d))).unwrap_or((10, digits))
        }
        base => (base, prefixed(base).unwrap_or(digits)),
    };
    if !(2..=36).contains(&base) || digits.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(digits, base).ok().map(|value| int(sign * value))
}

/// The arguments that a range takes.
pub(super) fn range_bounds(arguments: &Arguments) -> Result<(i128, i128, i128)> {
    let numbers: Option<Vec<i128>> = arguments.positional.iter().map(as_int).collect();
    match numbers.as_deref() {
        Some(&[stop]) => Ok((0, stop, 1)),
        Some(&[start, stop]) => Ok((start, stop, 1)),
        Some(&[_, _, 0]) => Err(error("range() arg 3 must not be zero")),
        Some(&[start, stop, step]) => Ok((start, stop, step)),
        _ => Err(error("range expected from 1 to 3 integers")),
    }
}
