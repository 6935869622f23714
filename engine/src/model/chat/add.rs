//! Functions, filters and tests that take arguments as Python's do.

use minijinja::value::{Rest, ValueOrKwargs};
use minijinja::{Environment, State, Value};

use super::arguments::Arguments;
use super::python::Result;

fn values(arguments: Rest<ValueOrKwargs>) -> Vec<Value> {
    arguments.0.into_iter().map(ValueOrKwargs::into_value).collect()
}

pub(super) fn function(
    environment: &mut Environment<'_>,
    name: &'static str,
    function: impl Fn(&mut State<'_, '_>, &Arguments) -> Result<Value> + Send + Sync + 'static,
) {
    environment.add_function(name, move |state: &mut State<'_, '_>, given: Rest<ValueOrKwargs>| {
        function(state, &Arguments::of(&values(given)))
    });
}

pub(super) fn filter(
    environment: &mut Environment<'_>,
    name: &'static str,
    filter: fn(&mut State<'_, '_>, &Arguments) -> Result<Value>,
) {
    environment.add_filter(name, move |state: &mut State<'_, '_>, given: Rest<ValueOrKwargs>| {
        filter(state, &Arguments::of(&values(given)))
    });
}

pub(super) fn test(
    environment: &mut Environment<'_>,
    name: &'static str,
    test: fn(&mut State<'_, '_>, &[Value]) -> Result<bool>,
) {
    environment.add_test(name, move |state: &mut State<'_, '_>, given: Rest<ValueOrKwargs>| {
        test(state, &values(given))
    });
}
