//! Filters that make texts.

use minijinja::value::ValueKind;
use minijinja::{State, Value};

use super::arguments::{Arguments, int_or, text_or_none, truth};
use super::filters::one;
use super::methods::{is_space, lines, replace, strip};
use super::python::{
    Result, as_float, error, is_dict, items, length, pairs, text, type_name, undefined,
};

pub(super) fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

pub(super) fn escape(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "escape")?;
    Ok(if value.is_safe() { value } else { Value::from_safe_string(escaped(&text(&value))) })
}

pub(super) fn filesizeformat(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, binary] = arguments.bind("filesizeformat", ["value", "binary"], 1)?;
    let value = value.unwrap_or_default();
    let number = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => as_float(&value),
    };
    let bytes: f64 = number.ok_or_else(|| error("filesizeformat() needs a number"))?;
    let (base, names) = match truth(binary.as_ref()) {
        true => (1024.0_f64, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]),
        false => (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]),
    };
    if bytes == 1.0 {
        return Ok(Value::from("1 Byte"));
    }
    if bytes < base {
        return Ok(Value::from(format!("{} Bytes", bytes.trunc())));
    }
    let power = (1..8).find(|&p| bytes < base.powi(p + 1)).unwrap_or(8);
    Ok(Value::from(format!("{:.1} {}", bytes / base.powi(power), names[power as usize - 1])))
}

pub(super) fn center(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, width] = arguments.bind("center", ["value", "width"], 1)?;
    let width = Value::from(i64::try_from(int_or(width.as_ref(), 80)?).unwrap_or(80));
    super::methods::call(&Value::from(text(&value.unwrap_or_default())), "center", &[width])
}

pub(super) fn indent(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, width, first, blank] =
        arguments.bind("indent", ["s", "width", "first", "blank"], 1)?;
    let width = match width.as_ref().and_then(Value::as_str) {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(int_or(width.as_ref(), 4)?).unwrap_or(0).min(10_000)),
    };
    let value = text_of(value.as_ref(), "indent")?;
    let blank = truth(blank.as_ref());
    let lines = lines(&(value + "\n"), false);
    let indented =
        lines.iter().enumerate().map(|(i, line)| match i > 0 && (blank || !line.is_empty()) {
            true => format!("{width}{line}"),
            false => line.clone(),
        });
    let text = indented.collect::<Vec<_>>().join("\n");
    Ok(Value::from(if truth(first.as_ref()) { width + &text } else { text }))
}

/// A text that must be one.
fn text_of(value: Option<&Value>, name: &str) -> Result<String> {
    match value {
        Some(value) if value.as_str().is_some() => Ok(text(value)),
        Some(value) if value.is_undefined() => Err(undefined()),
        value => {
            let kind = value.map_or("NoneType", type_name);
            Err(error(format!("{name}() needs a text, not '{kind}'")))
        }
    }
}

pub(super) fn replaced(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, old, new, count] = arguments.bind("replace", ["s", "old", "new", "count"], 3)?;
    let count = match count.filter(|c| !c.is_none()) {
        None => -1,
        Some(count) => int_or(Some(&count), -1)?,
    };
    let [value, old, new] = [value, old, new].map(|v| text(&v.unwrap_or_default()));
    Ok(Value::from(replace(&value, &old, &new, count)))
}

pub(super) fn striptags(text: &str) -> String {
    let mut out = text.to_owned();
    for (open, close) in [("<!--", "-->"), ("<", ">")] {
        while let Some(start) = out.find(open) {
            let Some(end) = out[start..].find(close) else { break };
            out.replace_range(start..start + end + close.len(), "");
        }
    }
    let out = out.split_whitespace().collect::<Vec<_>>().join(" ");
    let out = out.replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'");
    out.replace("&#34;", "\"").replace("&quot;", "\"").replace("&amp;", "&")
}

/// Every word begins large; words end at white space, hyphens and opening brackets.
pub(super) fn title(text: &str) -> String {
    let (mut out, mut inside) = (String::new(), false);
    for c in text.chars() {
        let between = is_space(c) || "-({[<".contains(c);
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = !between;
    }
    out
}

pub(super) fn trim(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, chars] = arguments.bind("trim", ["value", "chars"], 1)?;
    let value = text(&value.unwrap_or_default());
    Ok(Value::from(strip(&value, text_or_none(chars.as_ref())?, "strip")))
}

pub(super) fn truncate(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["s", "length", "killwords", "end", "leeway"];
    let [value, most, kill, end, leeway] = arguments.bind("truncate", parameters, 1)?;
    let end = text_or_none(end.as_ref())?.unwrap_or("...").to_owned();
    let size = |value: Option<&Value>, default| -> Result<usize> {
        let value = int_or(value.filter(|v| !v.is_none()), default)?;
        usize::try_from(value).map_err(|_| error("expected length >= 0"))
    };
    let (most, leeway) = (size(most.as_ref(), 255)?, size(leeway.as_ref(), 5)?);
    let ending = end.chars().count();
    if most < ending {
        return Err(error(format!("expected length >= {ending}, got {most}")));
    }
    let value = value.unwrap_or_default();
    if length(&value)? <= most + leeway {
        return Ok(value);
    }
    let value = text_of(Some(&value), "truncate")?;
    let cut: String = value.chars().take(most - ending).collect();
    let kept = match truth(kill.as_ref()) {
        true => &cut,
        false => cut.rsplit_once(' ').map_or(cut.as_str(), |(kept, _)| kept),
    };
    Ok(Value::from(format!("{kept}{end}")))
}

fn quote(value: &Value, safe: &str, plus: bool) -> String {
    let mut out = String::new();
    for byte in text(value).bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                out.push(char::from(byte));
            }
            b' ' if plus => out.push('+'),
            byte if safe.as_bytes().contains(&byte) => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

pub(super) fn urlencode(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "urlencode")?;
    let iterable = matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable);
    if !iterable {
        return Ok(Value::from(quote(&value, "/", false)));
    }
    let pairs: Vec<(Value, Value)> = match is_dict(&value) {
        true => pairs(&value),
        false => {
            let pair = |pair: Value| match &items(&pair)?[..] {
                [key, value] => Ok((key.clone(), value.clone())),
                _ => Err(error("urlencode() needs pairs")),
            };
            items(&value)?.into_iter().map(pair).collect::<Result<_>>()?
        }
    };
    let parts: Vec<String> = pairs
        .iter()
        .map(|(k, v)| format!("{}={}", quote(k, "", true), quote(v, "", true)))
        .collect();
    Ok(Value::from(parts.join("&")))
}

pub(super) fn wordcount(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = text(&one(arguments, "wordcount")?);
    let words = value.split(|c: char| !c.is_alphanumeric() && c != '_');
    Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
}

pub(super) fn wordwrap(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["s", "width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [value, width, break_long, end, hyphens] = arguments.bind("wordwrap", parameters, 1)?;
    let width = usize::try_from(int_or(width.as_ref(), 79)?).ok().filter(|&w| w > 0);
    let width = width.ok_or_else(|| error("invalid width (must be > 0)"))?;
    let end = text_or_none(end.as_ref())?.unwrap_or("\n").to_owned();
    let break_long = break_long.is_none_or(|b| b.is_true());
    let hyphens = hyphens.is_none_or(|h| h.is_true());
    let value = text_of(value.as_ref(), "wordwrap")?;
    let wrapped: Vec<String> = lines(&value, false)
        .iter()
        .map(|line| wrap(line, width, break_long, hyphens).join(&end))
        .collect();
    Ok(Value::from(wrapped.join(&end)))
}

/// One line in lines of at most `width` characters; white space inside stays.
fn wrap(line: &str, width: usize, break_long: bool, hyphens: bool) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    for c in line.chars() {
        let joins = chunks.last().is_some_and(|last| {
            let ends_word = hyphens && last.ends_with('-') && last.chars().count() > 1;
            last.starts_with(is_space) == is_space(c) && !(ends_word && c.is_alphabetic())
        });
        match chunks.last_mut().filter(|_| joins) {
            Some(last) => last.push(c),
            None => chunks.push(c.to_string()),
        }
    }
    chunks.reverse();
    let (mut out, size) = (Vec::new(), |s: &str| s.chars().count());
    while !chunks.is_empty() {
        let (mut current, mut used) = (Vec::new(), 0);
        if !out.is_empty() && chunks.last().is_some_and(|c| c.trim_matches(is_space).is_empty()) {
            chunks.pop();
        }
        while let Some(chunk) = chunks.pop_if(|chunk| used + size(chunk) <= width) {
            used += size(&chunk);
            current.push(chunk);
        }
        if chunks.last().is_some_and(|chunk| size(chunk) > width) {
            if break_long {
                let chunk = chunks.pop().unwrap_or_default();
                let room = (width - used).max(usize::from(current.is_empty()));
                let head: String = chunk.chars().take(room).collect();
                let tail: String = chunk.chars().skip(room).collect();
                if !head.is_empty() {
                    current.push(head);
                }
                chunks.push(tail);
            } else if current.is_empty() {
                current.extend(chunks.pop());
            }
        }
        if current.last().is_some_and(|c| c.trim_matches(is_space).is_empty()) {
            current.pop();
        }
        if !current.is_empty() {
            out.push(current.concat());
        }
    }
    out
}

pub(super) fn xmlattr(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, space] = arguments.bind("xmlattr", ["d", "autospace"], 1)?;
    let value = value.unwrap_or_default();
    if !is_dict(&value) {
        return Err(error(format!("'{}' object has no attribute 'items'", type_name(&value))));
    }
    let mut parts = Vec::new();
    for (key, value) in pairs(&value) {
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let key = text(&key);
        if key.contains(|c: char| c.is_ascii_whitespace() || "/>=".contains(c)) {
            return Err(error(format!("Invalid character in attribute name: '{key}'")));
        }
        parts.push(format!("{}=\"{}\"", escaped(&key), escaped(&text(&value))));
    }
    let joined = parts.join(" ");
    let lead = if space.is_none_or(|s| s.is_true()) && !joined.is_empty() { " " } else { "" };
    Ok(Value::from(format!("{lead}{joined}")))
}
