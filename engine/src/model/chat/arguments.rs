//! Arguments of a call, given by position or by name as in Python.

use minijinja::Value;
use minijinja::value::Kwargs;

use super::python::{Result, as_int, error, pairs, type_name};

/// What a call was given.
pub(super) struct Arguments {
    /// In order.
    pub(super) positional: Vec<Value>,
    /// By name, in the order of the call.
    pub(super) named: Vec<(String, Value)>,
}

impl Arguments {
    /// Takes apart what minijinja hands over: named arguments come last, as one value.
    pub(super) fn of(values: &[Value]) -> Arguments {
        let (positional, named) = match values.split_last() {
            Some((last, rest)) if last.is_kwargs() => (rest, pairs(last)),
            _ => (values, Vec::new()),
        };
        let named = named.into_iter();
        Arguments {
            positional: positional.to_vec(),
            named: named.map(|(k, v)| (k.as_str().unwrap_or_default().to_owned(), v)).collect(),
        }
    }

    /// As minijinja takes them.
    pub(super) fn into_values(self) -> Vec<Value> {
        let mut values = self.positional;
        if !self.named.is_empty() {
            values.push(self.named.into_iter().collect::<Kwargs>().into());
        }
        values
    }

    /// The value of each parameter, of which the first `required` must be given.
    pub(super) fn bind<const N: usize>(
        &self,
        function: &str,
        parameters: [&str; N],
        required: usize,
    ) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            let given = self.positional.len();
            return Err(error(format!("{function}() takes at most {N} arguments ({given} given)")));
        }
        let mut bound = [const { None }; N];
        for (place, value) in bound.iter_mut().zip(&self.positional) {
            *place = Some(value.clone());
        }
        for (name, value) in &self.named {
            let place = parameters.iter().position(|p| p == name).ok_or_else(|| {
                error(format!("{function}() got an unexpected keyword argument '{name}'"))
            })?;
            if bound[place].replace(value.clone()).is_some() {
                let message = format!("{function}() got multiple values for argument '{name}'");
                return Err(error(message));
            }
        }
        match bound[..required].iter().position(Option::is_none) {
            None => Ok(bound),
            Some(missing) => {
                let name = parameters[missing];
                Err(error(format!("{function}() missing required argument '{name}'")))
            }
        }
    }
}

/// An optional whole number.
pub(super) fn int_or(value: Option<&Value>, default: i128) -> Result<i128> {
    match value {
        None => Ok(default),
        Some(value) => as_int(value).ok_or_else(|| {
            error(format!("'{}' object cannot be interpreted as an integer", type_name(value)))
        }),
    }
}

/// An optional text; none counts as not given.
pub(super) fn text_or_none(value: Option<&Value>) -> Result<Option<&str>> {
    match value.filter(|value| !value.is_none()) {
        None => Ok(None),
        Some(value) => match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(error(format!("expected str, got {}", type_name(value)))),
        },
    }
}

/// Whether an optional value is true.
pub(super) fn truth(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}
