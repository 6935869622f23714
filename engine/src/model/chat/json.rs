//! Python's `json.dumps`, which is what transformers' `tojson` is: order kept, nothing escaped for HTML.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::arguments::{Arguments, text_or_none, truth};
use super::python::{
    Result, as_int, error, float_repr, is_dict, items, pairs, repr, sort, text, type_name,
};

/// Deepest nesting; Python's own limit is about 1000.
const MOST_DEEP: usize = 500;

struct Style {
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

/// The filter.
pub(super) fn tojson(arguments: &Arguments) -> Result<Value> {
    let parameters = ["x", "ensure_ascii", "indent", "separators", "sort_keys"];
    let [value, ascii, indent, separators, sort] = arguments.bind("tojson", parameters, 1)?;
    let indent = match indent.filter(|i| !i.is_none()) {
        None => None,
        Some(indent) => Some(match as_int(&indent) {
            Some(width) => " ".repeat(usize::try_from(width).unwrap_or(0).min(1000)),
            None => text_or_none(Some(&indent))?.unwrap_or_default().to_owned(),
        }),
    };
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned);
    let [item, key] = match separators.filter(|s| !s.is_none()) {
        None => default,
        Some(separators) => match &items(&separators)?[..] {
            [item, key] => [text(item), text(key)],
            _ => return Err(error("separators are two texts: between items, behind keys")),
        },
    };
    let style =
        Style { ascii: truth(ascii.as_ref()), sort: truth(sort.as_ref()), indent, item, key };
    let mut out = String::new();
    write(&value.unwrap_or_default(), &style, 0, &mut out)?;
    Ok(Value::from(out))
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<()> {
    if depth > MOST_DEEP {
        return Err(error("maximum recursion depth exceeded while encoding a JSON object"));
    }
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => string(value.as_str().unwrap_or_default(), style.ascii, out),
        ValueKind::Seq => {
            out.push('[');
            let values = items(value)?;
            for (i, value) in values.iter().enumerate() {
                if i > 0 {
                    out.push_str(&style.item);
                }
                line(out, depth + 1);
                write(value, style, depth + 1, out)?;
            }
            if !values.is_empty() {
                line(out, depth);
            }
            out.push(']');
        }
        ValueKind::Map if is_dict(value) => {
            out.push('{');
            let mut pairs = pairs(value);
            if style.sort {
                sort(&mut pairs, false, |(key, _)| key.clone())?;
            }
            for (i, (key, value)) in pairs.iter().enumerate() {
                if i > 0 {
                    out.push_str(&style.item);
                }
                line(out, depth + 1);
                let key = match key.kind() {
                    ValueKind::String => text(key),
                    ValueKind::None => "null".to_owned(),
                    ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
                    ValueKind::Number => number(key),
                    _ => {
                        let kind = type_name(key);
                        return Err(error(format!(
                            "keys must be str, int, float, bool or None, not {kind}"
                        )));
                    }
                };
                string(&key, style.ascii, out);
                out.push_str(&style.key);
                write(value, style, depth + 1, out)?;
            }
            if !pairs.is_empty() {
                line(out, depth);
            }
            out.push('}');
        }
        _ => {
            let kind = type_name(value);
            return Err(error(format!("Object of type {kind} is not JSON serializable")));
        }
    }
    Ok(())
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        _ if value.is_integer() => repr(value),
        Ok(x) if x.is_nan() => "NaN".into(),
        Ok(x) if x.is_infinite() => if x > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        Ok(x) => float_repr(x),
        Err(_) => repr(value),
    }
}

fn string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            c if c < ' ' || ascii && !(' '..='~').contains(&c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
