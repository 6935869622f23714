//! Jinja2's filters, all that version 3.1 has but `random`, `urlize`, which do not make a prompt.

use std::cmp::Ordering;

use minijinja::value::ValueKind;
use minijinja::{Environment, State, Value};

use super::arguments::{Arguments, int_or, text_or_none, truth};
use super::methods::{capitalize, is_space, lines, parse_int, replace, strip};
use super::python::{
    Generator, Group, Result, View, as_float, as_int, attribute, compare, error, int, is_dict, item,
    items, length, pairs, repr, sort, text, tuple, type_name, undefined,
};
use super::{add, format, json};

type Filter = fn(&mut State<'_, '_>, &Arguments) -> Result<Value>;

const FILTERS: [(&str, Filter); 52] = [
    ("abs", absolute),
    ("attr", attr),
    ("batch", batch),
    ("capitalize", |_, a| on_text(a, "capitalize", capitalize)),
    ("center", center),
    ("count", |_, a| Ok(Value::from(length(&one(a, "length")?)?))),
    ("d", default),
    ("default", default),
    ("dictsort", dictsort),
    ("e", escape),
    ("escape", escape),
    ("filesizeformat", filesizeformat),
    ("first", first),
    ("float", float),
    ("forceescape", |_, a| Ok(Value::from_safe_string(escaped(&text(&one(a, "forceescape")?))))),
    ("format", printf),
    ("groupby", groupby),
    ("indent", indent),
    ("int", integer),
    ("items", dict_items),
    ("join", join),
    ("last", last),
    ("length", |_, a| Ok(Value::from(length(&one(a, "length")?)?))),
    ("list", |_, a| Ok(Value::from(items(&one(a, "list")?)?))),
    ("lower", |_, a| on_text(a, "lower", str::to_lowercase)),
    ("map", map),
    ("max", |_, a| extreme(a, "max", Ordering::Greater)),
    ("min", |_, a| extreme(a, "min", Ordering::Less)),
    ("pprint", |_, a| Ok(Value::from(repr(&by_key(&one(a, "pprint")?)?)))),
    ("random", |_, _| Err(error("the filter random makes no prompt that can be repeated"))),
    ("reject", |state, a| select(state, a, false, false)),
    ("rejectattr", |state, a| select(state, a, true, false)),
    ("replace", replaced),
    ("reverse", reverse),
    ("round", round),
    ("safe", |_, a| Ok(Value::from_safe_string(text(&one(a, "safe")?)))),
    ("select", |state, a| select(state, a, false, true)),
    ("selectattr", |state, a| select(state, a, true, true)),
    ("slice", sliced),
    ("sort", sorted),
    ("string", |_, a| Ok(Value::from(text(&one(a, "string")?)))),
    ("striptags", |_, a| on_text(a, "striptags", striptags)),
    ("sum", sum),
    ("title", |_, a| on_text(a, "title", title)),
    ("tojson", |_, a| json::tojson(a)),
    ("trim", trim),
    ("truncate", truncate),
    ("unique", unique),
    ("upper", |_, a| on_text(a, "upper", str::to_uppercase)),
    ("urlencode", urlencode),
    ("urlize", |_, _| Err(error("the filter urlize is not supported"))),
    ("wordcount", wordcount),
];

const MORE: [(&str, Filter); 2] = [("wordwrap", wordwrap), ("xmlattr", xmlattr)];

pub(super) fn exists(name: &str) -> bool {
    FILTERS.iter().chain(&MORE).any(|(known, _)| *known == name)
}

pub(super) fn install(environment: &mut Environment<'_>) {
    for (name, filter) in FILTERS.iter().chain(&MORE) {
        add::filter(environment, name, *filter);
    }
}

/// The value itself, of a filter without arguments.
fn one(arguments: &Arguments, name: &str) -> Result<Value> {
    let [value] = arguments.bind(name, ["value"], 1)?;
    Ok(value.unwrap_or_default())
}

fn on_text<T: Into<String>>(
    arguments: &Arguments,
    name: &str,
    change: impl Fn(&str) -> T,
) -> Result<Value> {
    Ok(Value::from(change(&text(&one(arguments, name)?)).into()))
}

/// The value with its dicts sorted, as `pprint` shows it where it is short.
fn by_key(value: &Value) -> Result<Value> {
    if is_dict(value) {
        let mut pairs = pairs(value);
        sort(&mut pairs, false, |(key, _)| key.clone())?;
        let pairs = pairs.into_iter().map(|(key, value)| Ok((key, by_key(&value)?)));
        return Ok(super::python::dict(pairs.collect::<Result<Vec<_>>>()?));
    }
    match value.kind() {
        ValueKind::Seq if !value.is_tuple() => {
            Ok(Value::from(items(value)?.iter().map(by_key).collect::<Result<Vec<_>>>()?))
        }
        _ => Ok(value.clone()),
    }
}

/// `a.b.0` of a value, as `attribute=` of several filters means it.
fn path(value: &Value, path: &Value, default: Option<&Value>) -> Result<Value> {
    let mut value = value.clone();
    let parts: Vec<Value> = match path.as_str() {
        Some(path) => path
            .split('.')
            .map(|part| part.parse::<i64>().map_or_else(|_| Value::from(part), Value::from))
            .collect(),
        None => vec![path.clone()],
    };
    for part in parts {
        value = item(&value, &part)?;
        if let (true, Some(default)) = (value.is_undefined(), default) {
            value = default.clone();
        }
    }
    Ok(value)
}

/// Texts compare without regard to case, unless asked to.
fn fold(value: Value, case_sensitive: bool) -> Value {
    match value.as_str() {
        Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
        _ => value,
    }
}

fn keyed(value: &Value, by: Option<&Value>, case_sensitive: bool) -> Result<Value> {
    let key = match by.filter(|by| !by.is_none()) {
        Some(by) => path(value, by, None)?,
        None => value.clone(),
    };
    Ok(fold(key, case_sensitive))
}

fn absolute(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "abs")?;
    match (as_int(&value), as_float(&value)) {
        (Some(whole), _) => Ok(int(whole.abs())),
        (_, Some(x)) => Ok(Value::from(x.abs())),
        _ => Err(error(format!("bad operand type for abs(): '{}'", type_name(&value)))),
    }
}

fn attr(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, name] = arguments.bind("attr", ["obj", "name"], 2)?;
    let (value, name) = (value.unwrap_or_default(), text(&name.unwrap_or_default()));
    // Attributes only: an item of a dict is none.
    if is_dict(&value) && !super::methods::exists(&value, &name) {
        return Ok(Value::UNDEFINED);
    }
    attribute(&value, &name)
}

fn batch(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, size, fill] = arguments.bind("batch", ["value", "linecount", "fill_with"], 2)?;
    let size = usize::try_from(int_or(size.as_ref(), 0)?).unwrap_or(0);
    let values = items(&value.unwrap_or_default())?;
    let mut lots: Vec<Vec<Value>> = values.chunks(size.max(1)).map(<[Value]>::to_vec).collect();
    if let (Some(last), Some(fill)) = (lots.last_mut(), fill.filter(|f| !f.is_none())) {
        last.resize(size.max(last.len()), fill);
    }
    Ok(Generator::of(lots.into_iter().map(Value::from).collect()))
}

fn sliced(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, slices, fill] = arguments.bind("slice", ["value", "slices", "fill_with"], 2)?;
    let slices = usize::try_from(int_or(slices.as_ref(), 0)?).ok().filter(|&n| n > 0);
    let slices = slices.ok_or_else(|| error("slice() needs a number of slices above 0"))?;
    let values = items(&value.unwrap_or_default())?;
    let (each, longer) = (values.len() / slices, values.len() % slices);
    let (mut out, mut at) = (Vec::new(), 0);
    for i in 0..slices.min(10_000) {
        let end = at + each + usize::from(i < longer);
        let mut part = values[at..end].to_vec();
        if let (Some(fill), true) = (fill.as_ref().filter(|f| !f.is_none()), i >= longer) {
            part.push(fill.clone());
        }
        out.push(Value::from(part));
        at = end;
    }
    Ok(Generator::of(out))
}

fn center(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, width] = arguments.bind("center", ["value", "width"], 1)?;
    let width = Value::from(i64::try_from(int_or(width.as_ref(), 80)?).unwrap_or(80));
    super::methods::call(&Value::from(text(&value.unwrap_or_default())), "center", &[width])
}

fn default(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["value", "default_value", "boolean"];
    let [value, default, boolean] = arguments.bind("default", parameters, 1)?;
    let value = value.unwrap_or_default();
    let missing = value.is_undefined() || truth(boolean.as_ref()) && !value.is_true();
    Ok(if missing { default.unwrap_or(Value::from("")) } else { value })
}

fn dictsort(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["value", "case_sensitive", "by", "reverse"];
    let [value, case, by, reverse] = arguments.bind("dictsort", parameters, 1)?;
    let value = value.unwrap_or_default();
    if !is_dict(&value) {
        return Err(error(format!("'{}' object has no attribute 'items'", type_name(&value))));
    }
    let by_value = match by.as_ref().map(text).as_deref() {
        None | Some("key") => false,
        Some("value") => true,
        _ => return Err(error("You can only sort by either \"key\" or \"value\"")),
    };
    let case = truth(case.as_ref());
    let mut pairs = pairs(&value);
    sort(&mut pairs, truth(reverse.as_ref()), |(k, v)| {
        fold(if by_value { v } else { k }.clone(), case)
    })?;
    Ok(Value::from(pairs.into_iter().map(|(k, v)| tuple(vec![k, v])).collect::<Vec<_>>()))
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

fn escape(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "escape")?;
    Ok(if value.is_safe() { value } else { Value::from_safe_string(escaped(&text(&value))) })
}

fn filesizeformat(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
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

fn first(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "first")?;
    if let Some(generator) = value.downcast_object_ref::<Generator>() {
        return Ok(generator.next().unwrap_or_default());
    }
    Ok(items(&value)?.into_iter().next().unwrap_or_default())
}

fn last(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "last")?;
    if value.downcast_object_ref::<Generator>().is_some() {
        return Err(error("'generator' object is not reversible"));
    }
    Ok(items(&value)?.pop().unwrap_or_default())
}

fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space).replace('_', "").to_ascii_lowercase();
    let plain = text.trim_start_matches(['+', '-']);
    let named = matches!(plain, "inf" | "infinity" | "nan");
    let digits = plain.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if named || digits { text.parse().ok() } else { None }
}

fn integer(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, default, base] = arguments.bind("int", ["value", "default", "base"], 1)?;
    let (value, default) = (value.unwrap_or_default(), default.unwrap_or(Value::from(0)));
    let truncated = |x: f64| x.is_finite().then(|| int(x.trunc() as i128));
    if value.is_undefined() {
        return Err(undefined());
    }
    let found = match value.as_str() {
        Some(text) => {
            let base = u32::try_from(int_or(base.as_ref(), 10)?).unwrap_or(1);
            parse_int(text, base).or_else(|| parse_float(text).and_then(truncated))
        }
        None => as_int(&value).map(int).or_else(|| as_float(&value).and_then(truncated)),
    };
    Ok(found.unwrap_or(default))
}

fn float(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, default] = arguments.bind("float", ["value", "default"], 1)?;
    let value = value.unwrap_or_default();
    if value.is_undefined() {
        return Err(undefined());
    }
    let found = match value.as_str() {
        Some(text) => parse_float(text),
        None => as_float(&value),
    };
    Ok(found.map(Value::from).or(default).unwrap_or(Value::from(0.0)))
}

fn printf(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let (template, values) =
        arguments.positional.split_first().ok_or_else(|| error("format() needs a text"))?;
    if !values.is_empty() && !arguments.named.is_empty() {
        return Err(error("can't handle positional and keyword arguments at the same time"));
    }
    let value = match arguments.named.is_empty() {
        true => tuple(values.to_vec()),
        false => Value::from_pairs(arguments.named.iter().map(|(k, v)| (k.as_str(), v.clone()))),
    };
    format::percent(&text(template), &value).map(Value::from)
}

fn groupby(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["value", "attribute", "default", "case_sensitive"];
    let [value, by, default, case] = arguments.bind("groupby", parameters, 2)?;
    let (by, case) = (by.unwrap_or_default(), truth(case.as_ref()));
    let default = default.filter(|d| !d.is_none());
    let mut keyed: Vec<(Value, Value)> = Vec::new();
    for value in items(&value.unwrap_or_default())? {
        keyed.push((path(&value, &by, default.as_ref())?, value));
    }
    sort(&mut keyed, false, |(key, _)| fold(key.clone(), case))?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, value) in keyed {
        match groups.last_mut() {
            Some((last, list)) if fold(last.clone(), case) == fold(key.clone(), case) => {
                list.push(value);
            }
            _ => groups.push((key, vec![value])),
        }
    }
    let group = |(grouper, list): (Value, Vec<Value>)| {
        Value::from_object(Group { grouper, list: Value::from(list) })
    };
    Ok(Value::from(groups.into_iter().map(group).collect::<Vec<_>>()))
}

fn indent(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, width, first, blank] =
        arguments.bind("indent", ["s", "width", "first", "blank"], 1)?;
    let width = match width.as_ref().and_then(Value::as_str) {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(int_or(width.as_ref(), 4)?).unwrap_or(0).min(10_000)),
    };
    let value = text_of(value.as_ref(), "indent")?;
    let blank = truth(blank.as_ref());
    let lines = lines(&(value + "\n"), false);
    let indented = lines.iter().enumerate().map(|(i, line)| match i > 0 && (blank || !line.is_empty()) {
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

fn dict_items(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "items")?;
    if !value.is_undefined() && !is_dict(&value) {
        return Err(error("Can only get item pairs from a mapping."));
    }
    let pairs = pairs(&value).into_iter().map(|(k, v)| tuple(vec![k, v]));
    Ok(Generator::of(pairs.collect()))
}

fn join(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, separator, by] = arguments.bind("join", ["value", "d", "attribute"], 1)?;
    let separator = separator.as_ref().map(text).unwrap_or_default();
    let mut texts = Vec::new();
    for value in items(&value.unwrap_or_default())? {
        let value = match by.as_ref().filter(|by| !by.is_none()) {
            Some(by) => path(&value, by, None)?,
            None => value,
        };
        texts.push(text(&value));
    }
    Ok(Value::from(texts.join(&separator)))
}

/// The values, from the second argument on, that a filter or test is given.
fn rest(arguments: &Arguments, from: usize) -> Vec<Value> {
    let positional = arguments.positional.get(from..).unwrap_or_default().to_vec();
    Arguments { positional, named: arguments.named.clone() }.into_values()
}

fn map(state: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = arguments.positional.first().cloned().unwrap_or_default();
    let values = items(&value)?;
    let mut out = Vec::new();
    if let Some(name) = arguments.positional.get(1) {
        let name = text(name);
        let behind = rest(arguments, 2);
        for value in values {
            out.push(state.apply_filter(&name, &[&[value], &behind[..]].concat())?);
        }
        return Ok(Generator::of(out));
    }
    let named = Arguments { positional: Vec::new(), named: arguments.named.clone() };
    let [by, default] = named.bind("map", ["attribute", "default"], 0)?;
    let by = by.ok_or_else(|| error("map requires a filter argument"))?;
    for value in values {
        out.push(path(&value, &by, default.as_ref())?);
    }
    Ok(Generator::of(out))
}

fn select(
    state: &mut State<'_, '_>,
    arguments: &Arguments,
    by_attribute: bool,
    keep: bool,
) -> Result<Value> {
    let value = arguments.positional.first().cloned().unwrap_or_default();
    let by = match by_attribute {
        true => Some(arguments.positional.get(1).cloned().ok_or_else(|| {
            error("missing parameter for attribute name")
        })?),
        false => None,
    };
    let at = 1 + usize::from(by_attribute);
    let test = arguments.positional.get(at).map(text);
    let behind = rest(arguments, at + 1);
    let mut kept = Vec::new();
    for value in items(&value)? {
        let tested = match &by {
            Some(by) => path(&value, by, None)?,
            None => value.clone(),
        };
        let passes = match &test {
            Some(test) => state.perform_test(test, &[&[tested], &behind[..]].concat())?,
            None => tested.is_true(),
        };
        if passes == keep {
            kept.push(value);
        }
    }
    Ok(Generator::of(kept))
}

fn extreme(arguments: &Arguments, name: &str, wanted: Ordering) -> Result<Value> {
    let [value, case, by] = arguments.bind(name, ["value", "case_sensitive", "attribute"], 1)?;
    let case = truth(case.as_ref());
    let mut best: Option<(Value, Value)> = None;
    for value in items(&value.unwrap_or_default())? {
        let key = keyed(&value, by.as_ref(), case)?;
        let better = match &best {
            None => true,
            Some((most, _)) => compare("<", &key, most)? == Some(wanted),
        };
        if better {
            best = Some((key, value));
        }
    }
    Ok(best.map(|(_, value)| value).unwrap_or_default())
}

fn replaced(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, old, new, count] = arguments.bind("replace", ["s", "old", "new", "count"], 3)?;
    let count = match count.filter(|c| !c.is_none()) {
        None => -1,
        Some(count) => int_or(Some(&count), -1)?,
    };
    let [value, old, new] = [value, old, new].map(|v| text(&v.unwrap_or_default()));
    Ok(Value::from(replace(&value, &old, &new, count)))
}

fn reverse(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = one(arguments, "reverse")?;
    if let Some(text) = value.as_str() {
        return Ok(Value::from(text.chars().rev().collect::<String>()));
    }
    let mut values = items(&value)?;
    values.reverse();
    // A view or generator is first made a list.
    let known = matches!(value.kind(), ValueKind::Seq | ValueKind::Map)
        || value.downcast_object_ref::<View>().is_some();
    Ok(if known { Generator::of(values) } else { Value::from(values) })
}

fn round(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, precision, method] =
        arguments.bind("round", ["value", "precision", "method"], 1)?;
    let (value, precision) = (value.unwrap_or_default(), int_or(precision.as_ref(), 0)?);
    let number = as_float(&value);
    let number = number.ok_or_else(|| error("round() needs a number"))?;
    let precision = i32::try_from(precision.clamp(-400, 400)).unwrap_or(0);
    match method.as_ref().map(text).as_deref() {
        None | Some("common") => match as_int(&value) {
            Some(whole) if precision >= 0 => Ok(int(whole)),
            _ if precision >= 0 => {
                let digits = precision.unsigned_abs() as usize;
                let rounded = format!("{number:.digits$}").parse();
                Ok(Value::from(rounded.unwrap_or(number)))
            }
            whole => {
                let unit = 10_f64.powi(-precision);
                let rounded = (number / unit).round_ties_even() * unit;
                Ok(whole.map_or(Value::from(rounded), |_| int(rounded as i128)))
            }
        },
        Some(method @ ("ceil" | "floor")) => {
            let unit = 10_f64.powi(precision);
            let scaled = number * unit;
            Ok(Value::from(if method == "ceil" { scaled.ceil() } else { scaled.floor() } / unit))
        }
        Some(_) => Err(error("method must be common, ceil or floor")),
    }
}

fn sorted(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["value", "reverse", "case_sensitive", "attribute"];
    let [value, reverse, case, by] = arguments.bind("sort", parameters, 1)?;
    let case = truth(case.as_ref());
    let mut keyed_values = Vec::new();
    for value in items(&value.unwrap_or_default())? {
        let key = match by.as_ref().and_then(Value::as_str) {
            Some(paths) => {
                let keys = paths.split(',').map(|p| keyed(&value, Some(&Value::from(p)), case));
                Value::from(keys.collect::<Result<Vec<_>>>()?)
            }
            None => keyed(&value, by.as_ref(), case)?,
        };
        keyed_values.push((key, value));
    }
    sort(&mut keyed_values, truth(reverse.as_ref()), |(key, _)| key.clone())?;
    Ok(Value::from(keyed_values.into_iter().map(|(_, value)| value).collect::<Vec<_>>()))
}

fn striptags(text: &str) -> String {
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

fn sum(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, by, start] = arguments.bind("sum", ["iterable", "attribute", "start"], 1)?;
    let mut total = start.unwrap_or(Value::from(0));
    for value in items(&value.unwrap_or_default())? {
        let value = match by.as_ref().filter(|by| !by.is_none()) {
            Some(by) => path(&value, by, None)?,
            None => value,
        };
        total = super::python::add(&total, &value)?;
    }
    Ok(total)
}

/// Every word begins large; words end at white space, hyphens and opening brackets.
fn title(text: &str) -> String {
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

fn trim(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, chars] = arguments.bind("trim", ["value", "chars"], 1)?;
    let value = text(&value.unwrap_or_default());
    Ok(Value::from(strip(&value, text_or_none(chars.as_ref())?, "strip")))
}

fn truncate(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let parameters = ["s", "length", "killwords", "end", "leeway"];
    let [value, length, kill, end, leeway] = arguments.bind("truncate", parameters, 1)?;
    let end = text_or_none(end.as_ref())?.unwrap_or("...").to_owned();
    let size = |value: Option<&Value>, default| -> Result<usize> {
        let value = int_or(value.filter(|v| !v.is_none()), default)?;
        usize::try_from(value).map_err(|_| error("expected length >= 0"))
    };
    let (length, leeway) = (size(length.as_ref(), 255)?, size(leeway.as_ref(), 5)?);
    let ending = end.chars().count();
    if length < ending {
        return Err(error(format!("expected length >= {ending}, got {length}")));
    }
    let value = value.unwrap_or_default();
    if super::python::length(&value)? <= length + leeway {
        return Ok(value);
    }
    let value = text_of(Some(&value), "truncate")?;
    let cut: String = value.chars().take(length - ending).collect();
    let kept = match truth(kill.as_ref()) {
        true => &cut,
        false => cut.rsplit_once(' ').map_or(cut.as_str(), |(kept, _)| kept),
    };
    Ok(Value::from(format!("{kept}{end}")))
}

fn unique(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let [value, case, by] =
        arguments.bind("unique", ["value", "case_sensitive", "attribute"], 1)?;
    let (mut seen, mut kept) = (Vec::new(), Vec::new());
    for value in items(&value.unwrap_or_default())? {
        let key = keyed(&value, by.as_ref(), truth(case.as_ref()))?;
        if !seen.contains(&key) {
            seen.push(key);
            kept.push(value);
        }
    }
    Ok(Generator::of(kept))
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

fn urlencode(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
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

fn wordcount(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
    let value = text(&one(arguments, "wordcount")?);
    let words = value.split(|c: char| !c.is_alphanumeric() && c != '_');
    Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
}

fn wordwrap(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
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

fn xmlattr(_: &mut State<'_, '_>, arguments: &Arguments) -> Result<Value> {
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
