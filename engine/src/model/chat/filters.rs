//! Jinja2's filters, all that version 3.1 has but `random`, `urlize`, which do not make a prompt.

use std::cmp::Ordering;

use minijinja::value::ValueKind;
use minijinja::{Environment, State, Value};

use super::arguments::{Arguments, int_or, truth};
use super::methods::{capitalize, is_space, parse_int};
use super::python::{
    Generator, Group, Result, View, as_float, as_int, attribute, compare, error, int, is_dict,
    item, items, length, pairs, repr, sort, text, tuple, type_name, undefined,
};
use super::text_filters::{
    center, escape, escaped, filesizeformat, indent, replaced, striptags, title, trim, truncate,
    urlencode, wordcount, wordwrap, xmlattr,
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
pub(super) fn one(arguments: &Arguments, name: &str) -> Result<Value> {
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
        true => Some(
            arguments
                .positional
                .get(1)
                .cloned()
                .ok_or_else(|| error("missing parameter for attribute name"))?,
        ),
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
