//! What a template can call: Jinja2's tests, its functions, those that transformers adds, and the operators that
//! `desugar.rs` makes calls of.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use chrono::NaiveDateTime;
use minijinja::value::{Object, ObjectRepr, ValueKind, ValueOrKwargs};
use minijinja::{Environment, State, Value};

use super::arguments::{Arguments, truth};
use super::desugar::names;
use super::methods::range_bounds;
use super::python::{
    Range, Result, add as sum, as_float, as_int, attribute, compare, contains, dict, error, int,
    is_dict, item, items, multiply, pairs, slice, text, type_name,
};
use super::{add, date, filters, format};

type Test = fn(&mut State<'_, '_>, &[Value]) -> Result<bool>;

const TESTS: [(&str, Test); 38] = [
    ("!=", |_, v| Ok(v.first() != v.get(1))),
    ("<", |_, v| ordered("<", v)),
    ("<=", |_, v| ordered("<=", v)),
    ("==", |_, v| Ok(v.first() == v.get(1))),
    (">", |_, v| ordered(">", v)),
    (">=", |_, v| ordered(">=", v)),
    ("boolean", |_, v| Ok(kind(v) == ValueKind::Bool)),
    ("callable", |_, v| Ok(is_callable(&one(v)))),
    ("defined", |_, v| Ok(kind(v) != ValueKind::Undefined)),
    ("divisibleby", |_, v| Ok(whole(v, 0)?.rem_euclid(nonzero(whole(v, 1)?)?) == 0)),
    ("eq", |_, v| Ok(v.first() == v.get(1))),
    ("equalto", |_, v| Ok(v.first() == v.get(1))),
    ("escaped", |_, v| Ok(one(v).is_safe())),
    ("even", |_, v| Ok(whole(v, 0)? % 2 == 0)),
    ("false", |_, v| Ok(kind(v) == ValueKind::Bool && !one(v).is_true())),
    ("filter", |_, v| Ok(filters::exists(&text(&one(v))))),
    ("float", |_, v| Ok(kind(v) == ValueKind::Number && !one(v).is_integer())),
    ("ge", |_, v| ordered(">=", v)),
    ("greaterthan", |_, v| ordered(">", v)),
    ("gt", |_, v| ordered(">", v)),
    ("in", |_, v| contains(&one(v), v.get(1).unwrap_or(&Value::UNDEFINED))),
    ("integer", |_, v| Ok(one(v).is_integer())),
    ("iterable", |_, v| Ok(is_iterable(&one(v)))),
    ("le", |_, v| ordered("<=", v)),
    ("lessthan", |_, v| ordered("<", v)),
    ("lower", |_, v| cased(&one(v), "islower")),
    ("lt", |_, v| ordered("<", v)),
    ("mapping", |_, v| Ok(is_dict(&one(v)))),
    ("ne", |_, v| Ok(v.first() != v.get(1))),
    ("none", |_, v| Ok(one(v).is_none())),
    ("number", |_, v| Ok(as_float(&one(v)).is_some())),
    ("odd", |_, v| Ok(whole(v, 0)? % 2 != 0)),
    ("sameas", |_, v| Ok(same(&one(v), v.get(1).unwrap_or(&Value::UNDEFINED)))),
    ("sequence", |_, v| Ok(is_sequence(&one(v)))),
    ("string", |_, v| Ok(kind(v) == ValueKind::String)),
    ("test", |_, v| Ok(is_test(&text(&one(v))))),
    ("true", |_, v| Ok(kind(v) == ValueKind::Bool && one(v).is_true())),
    ("undefined", |_, v| Ok(kind(v) == ValueKind::Undefined)),
];

/// Whether there is a test of this name.
pub(super) fn is_test(name: &str) -> bool {
    name == "upper" || TESTS.iter().any(|(known, _)| *known == name)
}

fn one(values: &[Value]) -> Value {
    values.first().cloned().unwrap_or_default()
}

fn kind(values: &[Value]) -> ValueKind {
    one(values).kind()
}

fn whole(values: &[Value], at: usize) -> Result<i128> {
    let value = values.get(at).unwrap_or(&Value::UNDEFINED);
    as_int(value)
        .ok_or_else(|| error(format!("a whole number is expected, not '{}'", type_name(value))))
}

fn nonzero(value: i128) -> Result<i128> {
    match value {
        0 => Err(error("integer modulo by zero")),
        value => Ok(value),
    }
}

fn cased(value: &Value, method: &str) -> Result<bool> {
    let value = Value::from(text(value));
    Ok(super::methods::call(&value, method, &[])?.is_true())
}

fn ordered(operator: &str, values: &[Value]) -> Result<bool> {
    match values {
        [a, b, ..] => {
            let order = compare(operator, a, b)?;
            Ok(order.is_some_and(|order| match operator {
                "<" => order.is_lt(),
                "<=" => order.is_le(),
                ">" => order.is_gt(),
                _ => order.is_ge(),
            }))
        }
        _ => Err(error("two values are expected")),
    }
}

/// Identity is not to be had of lists and dicts; equal ones of one type are taken for the same.
fn same(a: &Value, b: &Value) -> bool {
    type_name(a) == type_name(b) && a == b
}

fn is_iterable(value: &Value) -> bool {
    let kind = value.kind();
    let plain = matches!(
        kind,
        ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Undefined
    );
    plain || is_dict(value) || value.downcast_object_ref::<Range>().is_some()
}

fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq)
        || is_dict(value)
        || value.downcast_object_ref::<Range>().is_some()
}

fn is_callable(value: &Value) -> bool {
    value.as_object().is_some_and(|object| {
        let name = object.type_name();
        let data = matches!(object.repr(), ObjectRepr::Seq | ObjectRepr::Iterable);
        !data && !is_dict(value) && !name.ends_with("Range") && !name.ends_with("Namespace")
    })
}

/// Longest range; the sandbox of transformers has the same limit.
const MOST_RANGE: usize = 100_000;

/// Installs everything. `now` is the time that `strftime_now` tells.
pub(super) fn install(environment: &mut Environment<'_>, now: fn() -> NaiveDateTime) {
    for (name, test) in TESTS {
        add::test(environment, name, test);
    }
    add::test(environment, "upper", |_, v| cased(&one(v), "isupper"));
    filters::install(environment);
    operators(environment);
    environment.add_function("namespace", |given: Option<ValueOrKwargs>| {
        let named = given.as_ref().map(|given| pairs(given)).unwrap_or_default();
        match named.iter().find(|(name, _)| text(name).starts_with('_')) {
            Some((name, _)) => Err(error(format!("{name} cannot be stored on a namespace"))),
            None => minijinja::functions::namespace(given),
        }
    });
    environment.add_global("self", Value::from_object(Blocks));
    add::function(environment, "raise_exception", |_, arguments| {
        let [message] = arguments.bind("raise_exception", ["message"], 1)?;
        Err(error(message.as_ref().map(text).unwrap_or_default()))
    });
    add::function(environment, "strftime_now", move |_, arguments| {
        let [format] = arguments.bind("strftime_now", ["format"], 1)?;
        Ok(Value::from(date::strftime(&now(), &format.as_ref().map(text).unwrap_or_default())))
    });
    add::function(environment, "range", |_, arguments| {
        let (start, stop, step) = range_bounds(arguments)?;
        let range = Range { start, stop, step };
        match range.len() > MOST_RANGE {
            true => Err(error("Range too big. The sandbox blocks ranges larger than 100000")),
            false => Ok(Value::from_object(range)),
        }
    });
    add::function(environment, "dict", |_, arguments| {
        let mut all: Vec<(Value, Value)> = Vec::new();
        if let Some(first) = arguments.positional.first() {
            match is_dict(first) {
                true => all = pairs(first),
                false => {
                    for pair in items(first)? {
                        match &items(&pair)?[..] {
                            [key, value] => all.push((key.clone(), value.clone())),
                            _ => return Err(error("dict() needs pairs")),
                        }
                    }
                }
            }
        }
        all.extend(arguments.named.iter().map(|(k, v)| (Value::from(k.as_str()), v.clone())));
        Ok(dict(all))
    });
    add::function(environment, "joiner", |_, arguments| {
        let [separator] = arguments.bind("joiner", ["sep"], 0)?;
        let separator = separator.as_ref().map_or(", ".into(), text);
        Ok(Value::from_object(Joiner { separator, used: AtomicUsize::new(0) }))
    });
    add::function(environment, "cycler", |_, arguments| match arguments.positional.is_empty() {
        true => Err(error("at least one item has to be provided")),
        false => Ok(Value::from_object(Cycler {
            values: arguments.positional.clone(),
            at: AtomicUsize::new(0),
        })),
    });
    add::function(environment, "lipsum", |_, _| {
        Err(error("lipsum() makes no prompt that can be repeated"))
    });
}

/// Name under which a rendering has the two signs to put around what `{% generation %}` encloses.
pub(super) const SIGNS: &str = "__py_signs";

fn operators(environment: &mut Environment<'_>) {
    add::function(environment, names::GENERATION, |state, arguments| {
        let [caller] = arguments.bind("generation", ["caller"], 1)?;
        let inner = text(&caller.unwrap_or_default().call(state, &[])?);
        let signs = state.lookup(SIGNS).filter(|signs| !signs.is_undefined());
        match signs.map(|signs| items(&signs)).transpose()?.as_deref() {
            Some([begin, end]) => Ok(Value::from(format!("{begin}{inner}{end}"))),
            _ => Ok(Value::from(inner)),
        }
    });
    let binary = |arguments: &Arguments| -> [Value; 2] {
        let mut values = arguments.positional.iter().cloned();
        [(); 2].map(|()| values.next().unwrap_or_default())
    };
    add::function(environment, names::ADD, |_, arguments| {
        let mut values = arguments.positional.iter();
        let first = values.next().cloned().unwrap_or_default();
        values.try_fold(first, |total, value| sum(&total, value))
    });
    add::function(environment, names::CONCAT, |_, arguments| {
        Ok(Value::from(arguments.positional.iter().map(text).collect::<String>()))
    });
    add::function(environment, names::MULTIPLY, move |_, arguments| {
        let [a, b] = binary(arguments);
        multiply(&a, &b)
    });
    add::function(environment, names::REMAINDER, move |_, arguments| {
        let [a, b] = binary(arguments);
        match (a.as_str(), as_int(&a), as_int(&b), as_float(&a), as_float(&b)) {
            (Some(template), ..) => format::percent(template, &b).map(Value::from),
            (_, Some(a), Some(b), ..) => {
                let rest = a.wrapping_rem(nonzero(b)?);
                Ok(int(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }))
            }
            (.., Some(a), Some(b)) if b != 0.0 => {
                let rest = a % b;
                let wrong_side = rest != 0.0 && (rest < 0.0) != (b < 0.0);
                Ok(Value::from(if wrong_side { rest + b } else { rest }))
            }
            (.., Some(_), Some(_)) => Err(error("float modulo by zero")),
            _ if a.is_undefined() => Err(super::python::undefined()),
            _ => Err(error(format!(
                "unsupported operand type(s) for %: '{}' and '{}'",
                type_name(&a),
                type_name(&b)
            ))),
        }
    });
    add::function(environment, names::CONTAINS, move |_, arguments| {
        let [needle, haystack] = binary(arguments);
        contains(&needle, &haystack).map(Value::from)
    });
    add::function(environment, names::LESS, |_, arguments| {
        let operator = arguments.positional.first().map(text).unwrap_or_default();
        ordered(&operator, &arguments.positional[1..]).map(Value::from)
    });
    add::function(environment, names::ATTRIBUTE, move |_, arguments| {
        let [value, name] = binary(arguments);
        attribute(&value, name.as_str().unwrap_or_default())
    });
    add::function(environment, names::ITEM, move |_, arguments| {
        let [value, key] = binary(arguments);
        item(&value, &key)
    });
    add::function(environment, names::SLICE, |_, arguments| match &arguments.positional[..] {
        [value, start, stop, step] => slice(value, start, stop, step),
        _ => Err(error("a slice has three parts")),
    });
    add::function(environment, names::ITERATE, move |_, arguments| {
        let [value, many] = binary(arguments);
        let mut values = items(&value)?;
        if many.is_true() {
            // Each is taken apart, which texts and dicts can be too.
            for value in &mut values {
                if value.as_str().is_some() || is_dict(value) {
                    *value = Value::from(items(value)?);
                }
            }
        }
        Ok(Value::from(values))
    });
    add::function(environment, names::REFUSE, |_, arguments| {
        Err(error(arguments.positional.first().map(text).unwrap_or_default()))
    });
    add::function(environment, names::MACRO, |_, arguments| match &arguments.positional[..] {
        [inner, names, varargs, kwargs] => Ok(Value::from_object(Macro {
            inner: inner.clone(),
            names: items(names)?.iter().map(text).collect(),
            varargs: truth(Some(varargs)),
            kwargs: truth(Some(kwargs)),
        })),
        _ => Err(error("a macro is wrapped with its names")),
    });
}

/// The template's blocks, which are called as methods.
#[derive(Debug)]
struct Blocks;

impl Object for Blocks {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }
}

/// A macro that takes more arguments than it names.
#[derive(Debug)]
struct Macro {
    inner: Value,
    names: Vec<String>,
    varargs: bool,
    kwargs: bool,
}

impl Object for Macro {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.inner.as_object()?.get_value(key)
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, values: &[Value]) -> Result<Value> {
        let mut given = Arguments::of(values);
        let fitting = given.positional.len().min(self.names.len());
        let more = given.positional.split_off(fitting);
        let (mut named, mut others) = (Vec::new(), Vec::new());
        for (name, value) in given.named {
            match self.names.contains(&name) || name == "caller" {
                true => named.push((name, value)),
                false => others.push((Value::from(name), value)),
            }
        }
        let name = || text(&self.get_value(&Value::from("name")).unwrap_or_default());
        if !self.varargs && !more.is_empty() {
            let most = self.names.len();
            return Err(error(format!(
                "macro '{}' takes not more than {most} argument(s)",
                name()
            )));
        }
        if let (false, Some((other, _))) = (self.kwargs, others.first()) {
            return Err(error(format!("macro '{}' takes no keyword argument '{other}'", name())));
        }
        if self.varargs {
            named.push(("varargs".into(), super::python::tuple(more)));
        }
        if self.kwargs {
            named.push(("kwargs".into(), dict(others)));
        }
        self.inner.call(state, &Arguments { positional: given.positional, named }.into_values())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inner)
    }
}

/// Gives nothing the first time it is called, then its separator.
#[derive(Debug)]
struct Joiner {
    separator: String,
    used: AtomicUsize,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, _: &[Value]) -> Result<Value> {
        let first = self.used.swap(1, SeqCst) == 0;
        Ok(Value::from(if first { "" } else { &self.separator }))
    }
}

/// Gives its values in turn.
#[derive(Debug)]
struct Cycler {
    values: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current"))
            .then(|| self.values[self.at.load(SeqCst) % self.values.len()].clone())
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        _: &[Value],
    ) -> Result<Value> {
        match method {
            "next" => Ok(self.values[self.at.fetch_add(1, SeqCst) % self.values.len()].clone()),
            "reset" => {
                self.at.store(0, SeqCst);
                Ok(Value::from(()))
            }
            _ => Err(error(format!("'Cycler' object has no attribute '{method}'"))),
        }
    }
}
