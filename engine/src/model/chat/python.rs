//! Python's values in a template: how they print, compare, add, multiply and are indexed. minijinja's own operators
//! are close and not equal (`1e20` prints as digits, `None` can be iterated, `'%d' % 1` is refused), so `desugar.rs`
//! makes them calls of these. Errors are in Python's words, since people look for those.

use std::cmp::Ordering;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::methods;

/// Longest text or list that a product may make.
const MOST_REPEATED: usize = 100_000_000;

pub(super) type Result<T> = std::result::Result<T, Error>;

pub(super) fn error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The name of a value's type, as Python's messages have it.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Bytes => "bytes",
        ValueKind::Seq | ValueKind::Iterable if value.is_tuple() => "tuple",
        ValueKind::Seq => "list",
        ValueKind::Map => "dict",
        ValueKind::Iterable => match value.downcast_object_ref::<View>() {
            Some(view) => view.name,
            None => "generator",
        },
        _ if value.downcast_object_ref::<Range>().is_some() => "range",
        _ => "object",
    }
}

/// Whether it is a dict and no other object with named values.
pub(super) fn is_dict(value: &Value) -> bool {
    value.kind() == ValueKind::Map && !is_loop_or_namespace(value)
}

fn is_loop_or_namespace(value: &Value) -> bool {
    // minijinja keeps both types to itself; neither prints as a map does.
    value.as_object().is_some_and(|object| {
        let name = object.type_name();
        name.ends_with("Namespace") || name.ends_with("Loop") || name.ends_with("Macro")
    })
}

/// Whether it is Python's list (or what stands for one), not a tuple.
pub(super) fn is_list(value: &Value) -> bool {
    value.kind() == ValueKind::Seq && !value.is_tuple()
}

/// An int, also of a bool.
pub(super) fn as_int(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// A number as a float.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
        _ => as_int(value).map(|int| int as f64),
    }
}

pub(super) fn int(value: i128) -> Value {
    i64::try_from(value).map_or_else(|_| Value::from(value), Value::from)
}

pub(super) fn tuple(values: Vec<Value>) -> Value {
    Value::from(Tuple::from(values))
}

/// Python's `str(value)`; an undefined value is nothing.
pub(super) fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> String {
    let list = |values: Vec<Value>| values.iter().map(repr).collect::<Vec<_>>().join(", ");
    match value.kind() {
        ValueKind::Undefined => "Undefined".to_owned(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number if value.is_integer() => value.to_string(),
        ValueKind::Number => float_repr(f64::try_from(value.clone()).unwrap_or(f64::NAN)),
        ValueKind::String => string_repr(value.as_str().unwrap_or_default()),
        ValueKind::Map if is_dict(value) => {
            let pairs = pairs(value).into_iter();
            let pairs: Vec<String> =
                pairs.map(|(k, v)| format!("{}: {}", repr(&k), repr(&v))).collect();
            format!("{{{}}}", pairs.join(", "))
        }
        ValueKind::Seq if value.is_tuple() || value.downcast_object_ref::<Group>().is_some() => {
            let values = items(value).unwrap_or_default();
            let comma = if values.len() == 1 { "," } else { "" };
            format!("({}{comma})", list(values))
        }
        ValueKind::Seq => format!("[{}]", list(items(value).unwrap_or_default())),
        ValueKind::Iterable => match value.downcast_object_ref::<View>() {
            Some(view) => format!("{}([{}])", view.name, list(view.values.clone())),
            None => "<generator object>".to_owned(),
        },
        _ => value.to_string(),
    }
}

/// Shortest digits that give the float back, with an exponent outside of 1e-4 to 1e16.
pub(super) fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{x}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            ' ' => out.push(' '),
            c if is_printable(c) => out.push(c),
            c if (c as u32) < 0x100 => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if (c as u32) < 0x1_0000 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push_str(&format!("\\U{:08x}", c as u32)),
        }
    }
    out.push(quote);
    out
}

/// Python's `isprintable` without tables of unassigned characters: controls, separators other than a space, formats,
/// surrogates and private ones are not.
pub(super) fn is_printable(c: char) -> bool {
    let format = matches!(c as u32,
        0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x890 | 0x891 | 0x8e2 | 0x180e
        | 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb
        | 0xe000..=0xf8ff | 0xe0000..=0xe0fff | 0xf0000..=0x10ffff | 0xfff0..=0xfff8);
    let no_character = c as u32 & 0xfffe == 0xfffe || matches!(c, '\u{fdd0}'..='\u{fdef}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || format || no_character)
}

/// The pairs of a dict, in order.
pub(super) fn pairs(value: &Value) -> Vec<(Value, Value)> {
    value.as_object().and_then(DynObject::try_iter_pairs).map(Iterator::collect).unwrap_or_default()
}

pub(super) fn dict(pairs: impl IntoIterator<Item = (Value, Value)>) -> Value {
    Value::from_pairs(pairs)
}

/// What iterating over a value gives: a dict's keys, a text's characters, nothing of an undefined value.
///
/// # Errors
/// If it cannot be iterated: none, a number, a function.
pub(super) fn items(value: &Value) -> Result<Vec<Value>> {
    match value.kind() {
        ValueKind::Undefined => Ok(Vec::new()),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            Ok(text.chars().map(|c| Value::from(c.to_string())).collect())
        }
        ValueKind::Map if !is_loop_or_namespace(value) => {
            Ok(pairs(value).into_iter().map(|(key, _)| key).collect())
        }
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.checked().collect(),
        _ => match value.downcast_object_ref::<Range>() {
            Some(range) => Ok((0..range.len()).map(|i| int(range.at(i))).collect()),
            None => Err(error(format!("'{}' object is not iterable", type_name(value)))),
        },
    }
}

/// `len(value)`.
pub(super) fn length(value: &Value) -> Result<usize> {
    let sized = match value.kind() {
        ValueKind::Undefined => Some(0),
        ValueKind::String | ValueKind::Seq | ValueKind::Map => value.len(),
        ValueKind::Iterable => value.downcast_object_ref::<View>().map(|v| v.values.len()),
        _ => value.downcast_object_ref::<Range>().map(Range::len),
    };
    sized.ok_or_else(|| error(format!("object of type '{}' has no len()", type_name(value))))
}

pub(super) fn undefined() -> Error {
    Error::new(ErrorKind::UndefinedError, "a value is used that is undefined")
}

/// `value.name`: Python's attribute, which for dicts, lists and texts is a method, else the item of that name.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value> {
    if value.is_undefined() {
        return Err(Error::new(
            ErrorKind::UndefinedError,
            format!("attribute {name:?} of an undefined value is asked for"),
        ));
    }
    if name.starts_with("__") {
        return Ok(Value::UNDEFINED);
    }
    if let Some(method) = bound(value, name) {
        return Ok(method);
    }
    Ok(match value.as_object() {
        Some(object) => match object.get_value_by_str(name).unwrap_or_default() {
            names if name == "arguments" && object.type_name().ends_with("Macro") => {
                tuple(items(&names)?)
            }
            found => found,
        },
        None => Value::UNDEFINED,
    })
}

fn bound(value: &Value, name: &str) -> Option<Value> {
    methods::exists(value, name)
        .then(|| Value::from_object(Method { value: value.clone(), name: name.to_owned() }))
}

/// `value[key]`.
pub(super) fn item(value: &Value, key: &Value) -> Result<Value> {
    if value.is_undefined() {
        return Err(undefined());
    }
    let at = |length: usize| {
        let at = as_int(key)?;
        let at = if at < 0 { at + length as i128 } else { at };
        usize::try_from(at).ok().filter(|&at| at < length)
    };
    let found = match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            at(text.chars().count())
                .and_then(|at| text.chars().nth(at))
                .map(|c| Value::from(c.to_string()))
        }
        ValueKind::Seq => {
            at(value.len().unwrap_or(0)).and_then(|at| value.get_item_by_index(at).ok())
        }
        ValueKind::Map => value.as_object().and_then(|object| object.get_value(key)),
        ValueKind::Plain => match value.downcast_object_ref::<Range>() {
            Some(range) => at(range.len()).map(|at| int(range.at(at))),
            None => None,
        },
        _ => None,
    };
    match (found, key.as_str()) {
        (Some(found), _) => Ok(found),
        (None, Some(name)) => attribute(value, name),
        (None, None) => Ok(Value::UNDEFINED),
    }
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value> {
    if value.is_undefined() {
        return Err(undefined());
    }
    let bound = |v: &Value| match v.is_none() {
        true => Ok(None),
        false => as_int(v).map(Some).ok_or_else(|| {
            error("slice indices must be integers or None or have an __index__ method")
        }),
    };
    let sliceable = matches!(value.kind(), ValueKind::String | ValueKind::Seq)
        || value.downcast_object_ref::<Range>().is_some();
    if !sliceable {
        return Ok(Value::UNDEFINED);
    }
    let values = items(value)?;
    let length = values.len() as i128;
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return Err(error("slice step cannot be zero"));
    }
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |at: Option<i128>, default: i128| match at {
        None => default,
        Some(at) if at < 0 => (at + length).max(low),
        Some(at) => at.min(high),
    };
    let (first, last) = if step > 0 { (low, high) } else { (high, low) };
    let (mut at, stop) = (clamp(bound(start)?, first), clamp(bound(stop)?, last));
    let mut taken = Vec::new();
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        taken.push(values[at as usize].clone());
        at = at.saturating_add(step);
    }
    Ok(match value.kind() {
        ValueKind::String => Value::from(taken.iter().map(text).collect::<String>()),
        _ if value.is_tuple() => tuple(taken),
        _ => Value::from(taken),
    })
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    if a.is_undefined() || b.is_undefined() {
        return undefined();
    }
    error(format!(
        "unsupported operand type(s) for {operator}: '{}' and '{}'",
        type_name(a),
        type_name(b)
    ))
}

/// `a + b`.
pub(super) fn add(a: &Value, b: &Value) -> Result<Value> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(Value::from(format!("{a}{b}")));
    }
    if a.kind() == ValueKind::Seq && b.kind() == ValueKind::Seq && a.is_tuple() == b.is_tuple() {
        let both = [items(a)?, items(b)?].concat();
        return Ok(if a.is_tuple() { tuple(both) } else { Value::from(both) });
    }
    match (as_int(a), as_int(b)) {
        (Some(x), Some(y)) => x.checked_add(y).map(int).ok_or_else(|| error("overflow of +")),
        _ => match (as_float(a), as_float(b)) {
            (Some(x), Some(y)) => Ok(Value::from(x + y)),
            _ if a.as_str().is_some() && !b.is_undefined() => {
                Err(error(format!("can only concatenate str (not \"{}\") to str", type_name(b))))
            }
            _ => Err(unsupported("+", a, b)),
        },
    }
}

/// `a * b`.
pub(super) fn multiply(a: &Value, b: &Value) -> Result<Value> {
    let repeatable = |v: &Value| matches!(v.kind(), ValueKind::String | ValueKind::Seq);
    let (what, times) = if repeatable(a) { (a, b) } else { (b, a) };
    if repeatable(what) {
        let times = as_int(times).ok_or_else(|| unsupported("*", a, b))?;
        let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
        let size = what.len().unwrap_or(0).checked_mul(times);
        if size.is_none_or(|size| size > MOST_REPEATED) {
            return Err(error("the repeated text or list is too long"));
        }
        if let Some(text) = what.as_str() {
            return Ok(Value::from(text.repeat(times)));
        }
        let values = items(what)?;
        let values: Vec<Value> = (0..times).flat_map(|_| values.iter().cloned()).collect();
        return Ok(if what.is_tuple() { tuple(values) } else { Value::from(values) });
    }
    match (as_int(a), as_int(b)) {
        (Some(x), Some(y)) => x.checked_mul(y).map(int).ok_or_else(|| error("overflow of *")),
        _ => match (as_float(a), as_float(b)) {
            (Some(x), Some(y)) => Ok(Value::from(x * y)),
            _ => Err(unsupported("*", a, b)),
        },
    }
}

/// `needle in haystack`.
pub(super) fn contains(needle: &Value, haystack: &Value) -> Result<bool> {
    match haystack.kind() {
        ValueKind::String => match (needle.as_str(), haystack.as_str()) {
            (Some(needle), Some(haystack)) => Ok(haystack.contains(needle)),
            _ => Err(error(format!(
                "'in <string>' requires string as left operand, not {}",
                type_name(needle)
            ))),
        },
        ValueKind::Map if is_dict(haystack) => {
            Ok(haystack.as_object().is_some_and(|object| object.get_value(needle).is_some()))
        }
        _ => match items(haystack) {
            Ok(values) => Ok(values.contains(needle)),
            Err(_) => {
                Err(error(format!("argument of type '{}' is not iterable", type_name(haystack))))
            }
        },
    }
}

/// Which of two values is smaller.
///
/// # Errors
/// If they are of kinds that Python does not order.
pub(super) fn compare(operator: &str, a: &Value, b: &Value) -> Result<Option<Ordering>> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(Some(a.cmp(b)));
    }
    if let (Some(a), Some(b)) = (as_int(a), as_int(b)) {
        return Ok(Some(a.cmp(&b)));
    }
    if let (Some(a), Some(b)) = (as_float(a), as_float(b)) {
        return Ok(a.partial_cmp(&b));
    }
    if a.kind() == ValueKind::Seq && b.kind() == ValueKind::Seq && a.is_tuple() == b.is_tuple() {
        let (a, b) = (items(a)?, items(b)?);
        for (x, y) in a.iter().zip(&b) {
            if x != y {
                return compare(operator, x, y);
            }
        }
        return Ok(Some(a.len().cmp(&b.len())));
    }
    if a.is_undefined() || b.is_undefined() {
        return Err(undefined());
    }
    Err(error(format!(
        "'{operator}' not supported between instances of '{}' and '{}'",
        type_name(a),
        type_name(b)
    )))
}

/// Sorts as Python does, stably; an error of `compare` is the result's.
pub(super) fn sort<T>(values: &mut [T], reverse: bool, key: impl Fn(&T) -> Value) -> Result<()> {
    let mut failed = None;
    values.sort_by(|a, b| {
        let (a, b) = (key(a), key(b));
        let order = compare("<", &a, &b).unwrap_or_else(|e| {
            failed.get_or_insert(e);
            None
        });
        let order = order.unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    failed.map_or(Ok(()), Err)
}

/// A method that was taken off its value and not called yet.
#[derive(Debug)]
struct Method {
    value: Value,
    name: String,
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, args: &[Value]) -> Result<Value> {
        methods::call(&self.value, &self.name, args)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = type_name(&self.value);
        write!(f, "<built-in method {} of {kind} object>", self.name)
    }
}

/// What filters as `map` and `select` give: iterated once, without a length, always true.
#[derive(Debug)]
pub(super) struct Generator(Mutex<Vec<Value>>);

impl Generator {
    pub(super) fn of(values: Vec<Value>) -> Value {
        Value::from_object(Generator(Mutex::new(values)))
    }

    /// The next value and no more.
    pub(super) fn next(&self) -> Option<Value> {
        let mut values = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (!values.is_empty()).then(|| values.remove(0))
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(std::mem::take(
            &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

/// A dict's keys, values or items.
#[derive(Debug)]
pub(super) struct View {
    pub(super) name: &'static str,
    pub(super) values: Vec<Value>,
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.values.clone())
    }
}

/// Numbers from one to another.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) start: i128,
    pub(super) stop: i128,
    pub(super) step: i128,
}

impl Range {
    pub(super) fn len(&self) -> usize {
        let span = if self.step > 0 { self.stop - self.start } else { self.start - self.stop };
        let step = self.step.abs();
        usize::try_from((span + step - 1).max(0) / step).unwrap_or(usize::MAX)
    }

    fn at(&self, index: usize) -> i128 {
        self.start + self.step * index as i128
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn is_true(self: &Arc<Self>) -> bool {
        self.len() > 0
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "range({}, {}", self.start, self.stop)?;
        if self.step != 1 {
            write!(f, ", {}", self.step)?;
        }
        f.write_str(")")
    }
}

/// What `groupby` gives of each group: a pair that also has names.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) grouper: Value,
    pub(super) list: Value,
}

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_str(), key.as_usize()) {
            (Some("grouper"), _) | (_, Some(0)) => Some(self.grouper.clone()),
            (Some("list"), _) | (_, Some(1)) => Some(self.list.clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }
}
