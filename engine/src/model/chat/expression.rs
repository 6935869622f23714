//! Expressions of Jinja2 as minijinja has to compute them, by a parser with the precedence of Jinja2's.

use std::fmt::Write;

use super::desugar::names;
use super::lexer::Token;

pub(super) type Parsed<T> = Result<T, String>;

/// An expression as text, and how tightly it holds together.
pub(super) struct Expr {
    pub(super) text: String,
    binding: Binding,
}

#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub(super) enum Binding {
    /// Needs parentheses wherever it stands.
    Loose,
    /// May be filtered further.
    Filtered,
    /// A literal, name or call.
    Atom,
}

impl Expr {
    fn atom(text: impl Into<String>) -> Expr {
        Expr { text: text.into(), binding: Binding::Atom }
    }

    fn loose(text: String) -> Expr {
        Expr { text, binding: Binding::Loose }
    }

    fn call(name: &str, arguments: &[&Expr]) -> Expr {
        let arguments: Vec<&str> = arguments.iter().map(|a| a.text.as_str()).collect();
        Expr::atom(format!("{name}({})", arguments.join(", ")))
    }

    /// In parentheses where it must hold together at least so tightly.
    fn at_least(&self, binding: Binding) -> String {
        match self.binding >= binding {
            true => self.text.clone(),
            false => format!("({})", self.text),
        }
    }

    pub(super) fn held(&self) -> String {
        self.at_least(Binding::Filtered)
    }
}

/// A text as minijinja reads it.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Parameters of a macro.
#[derive(Default)]
pub(super) struct Signature {
    pub(super) text: String,
    pub(super) names: Vec<String>,
    /// Tags that compute those defaults that name other parameters, without the end of the last one.
    pub(super) later: String,
}

pub(super) struct Parser<'a> {
    pub(super) tokens: &'a [Token<'a>],
    pub(super) at: usize,
    /// Whether a name that is not there is only found out when it is used, as inside of `{% if %}`.
    pub(super) soft: bool,
    pub(super) has_filter: &'a dyn Fn(&str) -> bool,
    pub(super) has_test: &'a dyn Fn(&str) -> bool,
}

impl<'a> Parser<'a> {
    pub(super) fn peek(&self) -> Option<&'a Token<'a>> {
        self.tokens.get(self.at)
    }

    fn next(&mut self) -> Option<&'a Token<'a>> {
        self.at += 1;
        self.tokens.get(self.at - 1)
    }

    pub(super) fn end(&self) -> Parsed<()> {
        match self.peek() {
            None => Ok(()),
            Some(token) => Err(format!("unexpected {}", describe(token))),
        }
    }

    fn is(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(o)) if *o == operator)
    }

    pub(super) fn skip(&mut self, operator: &str) -> bool {
        let there = self.is(operator);
        self.at += usize::from(there);
        there
    }

    pub(super) fn expect(&mut self, operator: &str) -> Parsed<()> {
        match self.skip(operator) {
            true => Ok(()),
            false => Err(format!("expected '{operator}', got {}", self.here())),
        }
    }

    fn here(&self) -> String {
        self.peek().map_or("the end of the tag".into(), describe)
    }

    pub(super) fn name(&mut self) -> Option<&'a str> {
        match self.peek() {
            Some(Token::Name(name)) => {
                self.at += 1;
                Some(name)
            }
            _ => None,
        }
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(n)) if *n == name)
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let there = self.is_name(name);
        self.at += usize::from(there);
        there
    }

    pub(super) fn keyword(&mut self, name: &str) -> Parsed<()> {
        match self.skip_name(name) {
            true => Ok(()),
            false => Err(format!("expected '{name}', got {}", self.here())),
        }
    }

    /// What is assigned to: names, attributes of namespaces, tuples of them.
    pub(super) fn target(&mut self) -> Parsed<String> {
        let mut targets = Vec::new();
        let mut many = false;
        loop {
            if self.skip("(") {
                let inner = self.target()?;
                self.expect(")")?;
                targets.push(format!("({inner})"));
            } else {
                let name =
                    self.name().ok_or_else(|| format!("cannot assign to {}", self.here()))?;
                if matches!(name, "true" | "false" | "none" | "True" | "False" | "None") {
                    return Err(format!("cannot assign to '{name}'"));
                }
                let mut text = name.to_owned();
                if self.skip(".") {
                    let attribute = self.name().ok_or("a name is expected behind the dot")?;
                    if attribute.starts_with('_') {
                        return Err(format!("{attribute:?} cannot be stored on a namespace"));
                    }
                    let _ = write!(text, ".{attribute}");
                }
                targets.push(text);
            }
            if !self.skip(",") {
                break;
            }
            many = true;
            if self.is("=") || self.is_name("in") || self.is(")") {
                break;
            }
        }
        let comma = if many && targets.len() == 1 { "," } else { "" };
        Ok(targets.join(", ") + comma)
    }

    /// The parameters of a macro in parentheses.
    pub(super) fn signature(&mut self) -> Parsed<Signature> {
        self.expect("(")?;
        let (mut text, mut names) = (Vec::new(), Vec::<String>::new());
        let (mut later, mut defaults) = (String::new(), false);
        while !self.skip(")") {
            if !names.is_empty() {
                self.expect(",")?;
            }
            let name = self.name().ok_or_else(|| format!("unexpected {}", self.here()))?;
            if self.skip("=") {
                defaults = true;
                let from = self.at;
                let value = self.expression()?.held();
                let mut tokens = self.tokens[from..self.at].iter();
                let named =
                    |t: &Token<'_>| matches!(t, Token::Name(n) if names.iter().any(|m| m == n));
                if tokens.any(named) {
                    // minijinja computes defaults before the parameters have their values.
                    let _ = write!(
                        later,
                        " +%}}{{% if {name} is undefined() %}}{{% set {name} = {value} %}}{{% endif"
                    );
                    text.push(format!("{name}={}", names::UNDEFINED));
                } else {
                    text.push(format!("{name}={value}"));
                }
            } else if defaults {
                return Err("non-default argument follows default argument".into());
            } else {
                text.push(name.to_owned());
            }
            names.push(name.to_owned());
        }
        Ok(Signature { text: text.join(", "), names, later })
    }

    /// One expression, or several as a tuple.
    pub(super) fn tuple(&mut self, conditional: bool) -> Parsed<Expr> {
        let one = |p: &mut Self| if conditional { p.expression() } else { p.or() };
        let first = one(self)?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut items = vec![first.held()];
        while self.skip(",") {
            if self.peek().is_none() || self.is(")") || self.is_name("recursive") {
                break;
            }
            items.push(one(self)?.held());
        }
        Ok(Expr::atom(format!("({},)", items.join(", "))))
    }

    pub(super) fn expression(&mut self) -> Parsed<Expr> {
        let mut value = self.or()?;
        while self.skip_name("if") {
            let test = self.or()?;
            let otherwise = match self.skip_name("else") {
                true => format!(" else {}", self.softly(Self::expression)?.held()),
                false => String::new(),
            };
            let text = format!("{} if {}{otherwise}", value.held(), test.held());
            value = Expr::loose(text);
        }
        Ok(value)
    }

    fn softly<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        let soft = std::mem::replace(&mut self.soft, true);
        let parsed = parse(self);
        self.soft = soft;
        parsed
    }

    fn words(&mut self, word: &str, part: fn(&mut Self) -> Parsed<Expr>) -> Parsed<Expr> {
        let first = part(self)?;
        if !self.is_name(word) {
            return Ok(first);
        }
        let mut text = first.held();
        while self.skip_name(word) {
            let _ = write!(text, " {word} {}", part(self)?.held());
        }
        Ok(Expr::loose(text))
    }

    fn or(&mut self) -> Parsed<Expr> {
        self.words("or", Self::and)
    }

    fn and(&mut self) -> Parsed<Expr> {
        self.words("and", Self::not)
    }

    fn not(&mut self) -> Parsed<Expr> {
        match self.skip_name("not") {
            true => Ok(Expr::loose(format!("not {}", self.not()?.held()))),
            false => self.compare(),
        }
    }

    fn compare(&mut self) -> Parsed<Expr> {
        let mut left = self.sum()?;
        let mut tests = Vec::new();
        loop {
            let negated = self.is_name("not")
                && matches!(self.tokens.get(self.at + 1), Some(Token::Name("in")));
            let operator = match self.peek() {
                Some(Token::Operator(o @ ("==" | "!=" | "<" | "<=" | ">" | ">="))) => *o,
                Some(Token::Name("in")) => "in",
                Some(Token::Name("not")) if negated => "in",
                _ => break,
            };
            self.at += 1 + usize::from(negated);
            let right = self.sum()?;
            tests.push(match operator {
                "==" | "!=" => format!("{} {operator} {}", left.held(), right.held()),
                "in" => {
                    let call = Expr::call(names::CONTAINS, &[&left, &right]).text;
                    if negated { format!("not {call}") } else { call }
                }
                _ => {
                    let operator = Expr::atom(quoted(operator));
                    Expr::call(names::LESS, &[&operator, &left, &right]).text
                }
            });
            left = right;
        }
        match tests.len() {
            0 => Ok(left),
            1 => Ok(Expr::loose(tests.remove(0))),
            _ => {
                let tests: Vec<String> = tests.into_iter().map(|t| format!("({t})")).collect();
                Ok(Expr::loose(tests.join(" and ")))
            }
        }
    }

    fn sum(&mut self) -> Parsed<Expr> {
        let mut terms = vec![self.concat()?];
        let added = |terms: &mut Vec<Expr>| match terms.len() {
            1 => terms.remove(0),
            _ => Expr::call(names::ADD, &std::mem::take(terms).iter().collect::<Vec<_>>()),
        };
        loop {
            if self.skip("+") {
                terms.push(self.concat()?);
            } else if self.skip("-") {
                let left = added(&mut terms);
                let text = format!("{} - {}", left.held(), self.concat()?.held());
                terms = vec![Expr::loose(text)];
            } else {
                return Ok(added(&mut terms));
            }
        }
    }

    fn concat(&mut self) -> Parsed<Expr> {
        let mut parts = vec![self.product()?];
        while self.skip("~") {
            parts.push(self.product()?);
        }
        match parts.len() {
            1 => Ok(parts.remove(0)),
            _ => Ok(Expr::call(names::CONCAT, &parts.iter().collect::<Vec<_>>())),
        }
    }

    fn product(&mut self) -> Parsed<Expr> {
        let mut left = self.power()?;
        loop {
            let operator = match self.peek() {
                Some(Token::Operator(o @ ("*" | "/" | "//" | "%"))) => *o,
                _ => return Ok(left),
            };
            self.at += 1;
            let right = self.power()?;
            left = match operator {
                "*" => Expr::call(names::MULTIPLY, &[&left, &right]),
                "%" => Expr::call(names::REMAINDER, &[&left, &right]),
                _ => Expr::loose(format!("{} {operator} {}", left.held(), right.held())),
            };
        }
    }

    fn power(&mut self) -> Parsed<Expr> {
        let mut left = self.unary(true)?;
        while self.skip("**") {
            let right = self.unary(true)?;
            left = Expr::loose(format!("{} ** {}", left.held(), right.held()));
        }
        Ok(left)
    }

    fn unary(&mut self, filtered: bool) -> Parsed<Expr> {
        let node = if self.skip("-") {
            Expr::loose(format!("-{}", self.unary(false)?.at_least(Binding::Atom)))
        } else if self.skip("+") {
            // Of a number that is the number, of anything else an error, as minus and minus again.
            Expr::loose(format!("-(-{})", self.unary(false)?.at_least(Binding::Atom)))
        } else {
            self.primary()?
        };
        let node = self.postfix(node)?;
        if filtered { self.filtered(node) } else { Ok(node) }
    }

    fn primary(&mut self) -> Parsed<Expr> {
        Ok(match self.next() {
            Some(Token::Name(name)) => match *name {
                "true" | "True" => Expr::atom("true"),
                "false" | "False" => Expr::atom("false"),
                "none" | "None" => Expr::atom("none"),
                name if name.starts_with("__py_") => {
                    return Err(format!("the name {name:?} is not for templates"));
                }
                name => Expr::atom(name),
            },
            Some(Token::Number(number)) => Expr::atom(number),
            Some(Token::Text(text)) => {
                let mut whole = text.clone();
                while let Some(Token::Text(more)) = self.peek() {
                    whole.push_str(more);
                    self.at += 1;
                }
                Expr::atom(quoted(&whole))
            }
            Some(Token::Operator("(")) => {
                if self.skip(")") {
                    return Ok(Expr::atom("()"));
                }
                let inner = self.tuple(true)?;
                self.expect(")")?;
                match inner.binding {
                    Binding::Atom => inner,
                    _ => Expr::atom(format!("({})", inner.text)),
                }
            }
            Some(Token::Operator("[")) => {
                let items = self.list("]")?;
                Expr::atom(format!("[{items}]"))
            }
            Some(Token::Operator("{")) => {
                let mut pairs = Vec::new();
                while !self.skip("}") {
                    if !pairs.is_empty() {
                        self.expect(",")?;
                        if self.skip("}") {
                            break;
                        }
                    }
                    let key = self.expression()?.held();
                    self.expect(":")?;
                    pairs.push(format!("{key}: {}", self.expression()?.held()));
                }
                Expr::atom(format!("{{{}}}", pairs.join(", ")))
            }
            Some(token) => return Err(format!("unexpected {}", describe(token))),
            None => return Err("expected an expression, got the end of the tag".into()),
        })
    }

    fn list(&mut self, end: &str) -> Parsed<String> {
        let mut items = Vec::new();
        while !self.skip(end) {
            if !items.is_empty() {
                self.expect(",")?;
                if self.skip(end) {
                    break;
                }
            }
            items.push(self.expression()?.held());
        }
        Ok(items.join(", "))
    }

    fn postfix(&mut self, mut node: Expr) -> Parsed<Expr> {
        loop {
            if self.skip(".") {
                node = match self.next() {
                    Some(Token::Name(name)) if self.is("(") => {
                        let arguments = self.arguments()?;
                        let object = node.at_least(Binding::Atom);
                        Expr::atom(format!("{object}.{name}({arguments})"))
                    }
                    Some(Token::Name(name)) => {
                        Expr::call(names::ATTRIBUTE, &[&node, &Expr::atom(quoted(name))])
                    }
                    Some(Token::Number(number)) => {
                        Expr::call(names::ITEM, &[&node, &Expr::atom(number)])
                    }
                    _ => return Err("expected a name or number behind the dot".into()),
                };
            } else if self.skip("[") {
                node = self.subscript(&node)?;
            } else if self.is("(") {
                let arguments = self.arguments()?;
                node = Expr::atom(format!("{}({arguments})", node.at_least(Binding::Atom)));
            } else {
                return Ok(node);
            }
        }
    }

    fn subscript(&mut self, node: &Expr) -> Parsed<Expr> {
        let mut parts = vec![None];
        while !self.skip("]") {
            let last = parts.len() - 1;
            if self.skip(":") {
                parts.push(None);
            } else if self.skip(",") {
                return Err("a subscript of several values is not supported".into());
            } else if parts[last].is_none() {
                parts[last] = Some(self.expression()?);
            } else {
                return Err(format!("unexpected {}", self.here()));
            }
        }
        if parts.len() == 1 {
            let key = parts.remove(0).ok_or("expected subscript expression")?;
            return Ok(Expr::call(names::ITEM, &[node, &key]));
        }
        if parts.len() > 3 {
            return Err("unexpected ':'".into());
        }
        parts.resize_with(3, || None);
        let none = Expr::atom("none");
        let parts: Vec<&Expr> = parts.iter().map(|part| part.as_ref().unwrap_or(&none)).collect();
        Ok(Expr::call(names::SLICE, &[&[node], &parts[..]].concat()))
    }

    /// Arguments of a call in parentheses.
    fn arguments(&mut self) -> Parsed<String> {
        self.expect("(")?;
        let (mut arguments, mut named) = (Vec::new(), false);
        while !self.skip(")") {
            if !arguments.is_empty() {
                self.expect(",")?;
                if self.skip(")") {
                    break;
                }
            }
            let assigned = matches!(self.peek(), Some(Token::Name(_)))
                && matches!(self.tokens.get(self.at + 1), Some(Token::Operator("=")));
            if self.skip("**") {
                named = true;
                arguments.push(format!("**{}", self.expression()?.at_least(Binding::Atom)));
            } else if self.skip("*") {
                arguments.push(format!("*{}", self.expression()?.at_least(Binding::Atom)));
            } else if assigned {
                named = true;
                let name = self.name().unwrap_or_default();
                self.at += 1;
                arguments.push(format!("{name}={}", self.expression()?.held()));
            } else if named {
                return Err("invalid syntax for function call expression".into());
            } else {
                arguments.push(self.expression()?.held());
            }
        }
        Ok(arguments.join(", "))
    }

    fn filter(&mut self) -> Parsed<String> {
        let mut name = self.name().ok_or("expected a filter's name")?.to_owned();
        while self.skip(".") {
            name = format!("{name}.{}", self.name().ok_or("expected a filter's name")?);
        }
        if !self.soft && !(self.has_filter)(&name) {
            return Err(format!("no filter named '{name}'"));
        }
        let arguments = if self.is("(") { self.arguments()? } else { String::new() };
        Ok(format!("{name}({arguments})"))
    }

    pub(super) fn filter_chain(&mut self) -> Parsed<String> {
        let mut filters = vec![self.filter()?];
        while self.skip("|") {
            filters.push(self.filter()?);
        }
        Ok(filters.join(" | "))
    }

    pub(super) fn filters(&mut self) -> Parsed<String> {
        if self.skip("|") { self.filter_chain() } else { Ok(String::new()) }
    }

    fn filtered(&mut self, mut node: Expr) -> Parsed<Expr> {
        loop {
            if self.skip("|") {
                let text = format!("{}|{}", node.held(), self.filter()?);
                node = Expr { text, binding: Binding::Filtered };
            } else if self.skip_name("is") {
                let negated = self.skip_name("not");
                let name = self.name().ok_or("expected a test's name")?;
                if !self.soft && !(self.has_test)(name) {
                    return Err(format!("no test named '{name}'"));
                }
                let arguments = match self.peek() {
                    Some(Token::Operator("(")) => self.arguments()?,
                    Some(Token::Name("else" | "or" | "and")) => String::new(),
                    Some(Token::Name("is")) => {
                        return Err("you cannot chain multiple tests with is".into());
                    }
                    Some(
                        Token::Name(_)
                        | Token::Text(_)
                        | Token::Number(_)
                        | Token::Operator("[" | "{"),
                    ) => {
                        let argument = self.primary()?;
                        self.postfix(argument)?.text
                    }
                    _ => String::new(),
                };
                let not = if negated { "not " } else { "" };
                node = Expr::loose(format!("{not}{} is {name}({arguments})", node.held()));
            } else if self.is("(") {
                let arguments = self.arguments()?;
                node = Expr::atom(format!("{}({arguments})", node.at_least(Binding::Atom)));
            } else {
                return Ok(node);
            }
        }
    }
}

fn describe(token: &Token<'_>) -> String {
    match token {
        Token::Name(name) => format!("'{name}'"),
        Token::Number(number) => format!("'{number}'"),
        Token::Text(text) => format!("{text:?}"),
        Token::Operator(operator) => format!("'{operator}'"),
    }
}
