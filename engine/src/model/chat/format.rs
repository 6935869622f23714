//! Python's two ways to format: `'%05.1f' % x` and `'{:>5}'.format(x)`.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::python::{
    Result, as_float, as_int, attribute, error, float_repr, is_dict, item, items, repr, text,
    type_name,
};

/// Widest field, and most digits.
const MOST: usize = 1_000_000;

/// In place of a count of fields, where fields are numbered.
const BY_NUMBER: usize = usize::MAX;

/// How one value is written.
#[derive(Clone, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    group: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `template % value`.
pub(super) fn percent(template: &str, value: &Value) -> Result<String> {
    let mapping = is_dict(value).then_some(value);
    let values = if value.is_tuple() { items(value)? } else { vec![value.clone()] };
    let (mut out, mut chars, mut used) = (String::new(), template.chars().peekable(), 0);
    let mut next = || {
        used += 1;
        values.get(used - 1).cloned().ok_or_else(|| error("not enough arguments for format string"))
    };
    let mut by_name = false;
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut named = None;
        if chars.next_if_eq(&'(').is_some() {
            let (mut name, mut depth) = (String::new(), 1);
            for c in chars.by_ref() {
                depth += i32::from(c == '(') - i32::from(c == ')');
                if depth == 0 {
                    break;
                }
                name.push(c);
            }
            if depth > 0 {
                return Err(error("incomplete format key"));
            }
            let mapping = mapping.ok_or_else(|| error("format requires a mapping"))?;
            let found = mapping.as_object().and_then(|m| m.get_value(&Value::from(name.as_str())));
            named = Some(found.ok_or_else(|| error(format!("KeyError: '{name}'")))?);
            by_name = true;
        }
        let mut spec = Spec::default();
        let mut zero = false;
        while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => spec.align = Some('<'),
                '+' => spec.sign = Some('+'),
                ' ' => spec.sign = spec.sign.or(Some(' ')),
                '#' => spec.alternate = true,
                _ => zero = true,
            }
        }
        let mut number =
            |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<Option<i128>> {
                if chars.next_if_eq(&'*').is_some() {
                    return as_int(&next()?).map(Some).ok_or_else(|| error("* wants int"));
                }
                let mut digits = String::new();
                while let Some(c) = chars.next_if(char::is_ascii_digit) {
                    digits.push(c);
                }
                Ok(digits.parse().ok())
            };
        if let Some(width) = number(&mut chars)? {
            if width < 0 {
                spec.align = Some('<');
            }
            spec.width = bounded(width.unsigned_abs())?;
        }
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(bounded(number(&mut chars)?.unwrap_or(0).max(0).unsigned_abs())?);
        }
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let kind = chars.next().ok_or_else(|| error("incomplete format"))?;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => next()?,
        };
        if zero && spec.align.is_none() && !"scra".contains(kind) {
            (spec.fill, spec.align) = (Some('0'), Some('='));
        }
        let align = spec.align.unwrap_or('>');
        spec.align = Some(align);
        spec.kind = Some(kind);
        let wrong = |wants: &str| {
            error(format!("%{kind} format: {wants} is required, not {}", type_name(&value)))
        };
        out.push_str(&match kind {
            's' => written(&text(&value), &spec),
            'r' | 'a' => written(&repr(&value), &spec),
            'c' => match (as_int(&value), value.as_str()) {
                (Some(code), _) => {
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    written(&c.ok_or_else(|| wrong("a character's number"))?.to_string(), &spec)
                }
                (None, Some(s)) if s.chars().count() == 1 => written(s, &spec),
                _ => return Err(wrong("an integer or a character")),
            },
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
                let whole = match kind {
                    'x' | 'X' | 'o' => as_int(&value),
                    _ => as_int(&value).or(as_float(&value).map(|f| f.trunc() as i128)),
                };
                let whole = whole.ok_or_else(|| wrong("a real number"))?;
                let least = spec.precision.take().unwrap_or(0);
                if matches!(kind, 'i' | 'u') {
                    spec.kind = Some('d');
                }
                integer(whole, least, &spec)?
            }
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                float(as_float(&value).ok_or_else(|| wrong("a real number"))?, &spec)
            }
            _ => return Err(error(format!("unsupported format character '{kind}'"))),
        });
    }
    if mapping.is_none() && !by_name && used < values.len() {
        return Err(error("not all arguments converted during string formatting"));
    }
    Ok(out)
}

fn bounded(size: u128) -> Result<usize> {
    let size = usize::try_from(size).ok().filter(|&size| size <= MOST);
    size.ok_or_else(|| error("a format's width or precision is too large"))
}

/// `template.format(*positional, **named)`.
pub(super) fn fields(
    template: &str,
    positional: &[Value],
    named: &[(String, Value)],
) -> Result<String> {
    let mut automatic = 0;
    expand(template, positional, named, &mut automatic, 2)
}

fn expand(
    template: &str,
    positional: &[Value],
    named: &[(String, Value)],
    automatic: &mut usize,
    depth: usize,
) -> Result<String> {
    if depth == 0 {
        return Err(error("Max string recursion exceeded"));
    }
    let (mut out, mut chars) = (String::new(), template.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '{' if chars.next_if_eq(&'{').is_some() => out.push('{'),
            '}' if chars.next_if_eq(&'}').is_some() => out.push('}'),
            '}' => return Err(error("Single '}' encountered in format string")),
            '{' => {
                let (mut field, mut open) = (String::new(), 1);
                for c in chars.by_ref() {
                    open += i32::from(c == '{') - i32::from(c == '}');
                    if open == 0 {
                        break;
                    }
                    field.push(c);
                }
                if open > 0 {
                    return Err(error("expected '}' before end of string"));
                }
                let (head, spec) = field.split_once(':').unwrap_or((&field, ""));
                let (name, conversion) = head.split_once('!').unwrap_or((head, ""));
                let value = lookup(name, positional, named, automatic)?;
                let value = match conversion {
                    "" => value,
                    "s" => Value::from(text(&value)),
                    "r" | "a" => Value::from(repr(&value)),
                    other => {
                        return Err(error(format!("Unknown conversion specifier '{other}'")));
                    }
                };
                let spec = match spec.contains('{') {
                    true => expand(spec, positional, named, automatic, depth - 1)?,
                    false => spec.to_owned(),
                };
                out.push_str(&formatted(&value, &spec)?);
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

/// The value of a field's name, as `0`, `user.name`, `list[2]`.
fn lookup(
    name: &str,
    positional: &[Value],
    named: &[(String, Value)],
    automatic: &mut usize,
) -> Result<Value> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let mut value = if first.is_empty() || first.bytes().all(|b| b.is_ascii_digit()) {
        let index = match first.parse::<usize>() {
            Ok(index) if *automatic == 0 || *automatic == BY_NUMBER => {
                *automatic = BY_NUMBER;
                index
            }
            Err(_) if *automatic != BY_NUMBER => {
                *automatic += 1;
                *automatic - 1
            }
            _ => return Err(error("cannot switch between manual and automatic field numbering")),
        };
        positional.get(index).cloned().ok_or_else(|| {
            error(format!("Replacement index {index} out of range for positional args tuple"))
        })?
    } else {
        let found = named.iter().find(|(key, _)| key == first);
        found.map(|(_, v)| v.clone()).ok_or_else(|| error(format!("KeyError: '{first}'")))?
    };
    while !rest.is_empty() {
        if let Some(behind) = rest.strip_prefix('.') {
            let end = behind.find(['.', '[']).unwrap_or(behind.len());
            value = attribute(&value, &behind[..end])?;
            rest = &behind[end..];
        } else {
            let (key, behind) =
                rest[1..].split_once(']').ok_or_else(|| error("Missing ']' in format string"))?;
            let index = key.parse::<i64>().map(Value::from);
            value = item(&value, &index.unwrap_or_else(|_| Value::from(key)))?;
            rest = behind;
        }
    }
    Ok(value)
}

/// `format(value, spec)`.
fn formatted(value: &Value, spec: &str) -> Result<String> {
    if spec.is_empty() {
        return Ok(text(value));
    }
    let mut parsed = parse(spec)?;
    let invalid = |kind: char| {
        let name = type_name(value);
        error(format!("Unknown format code '{kind}' for object of type '{name}'"))
    };
    match value.kind() {
        ValueKind::String => match parsed.kind {
            None | Some('s') => {
                if parsed.sign.is_some() || parsed.align == Some('=') {
                    return Err(error("Sign not allowed in string format specifier"));
                }
                parsed.align = parsed.align.or(Some('<'));
                Ok(written(value.as_str().unwrap_or_default(), &parsed))
            }
            Some(kind) => Err(invalid(kind)),
        },
        ValueKind::Bool | ValueKind::Number => {
            parsed.align = parsed.align.or(Some('>'));
            let whole = as_int(value);
            match (parsed.kind, whole) {
                (None, _) if value.kind() == ValueKind::Bool => Ok(written(&text(value), &parsed)),
                (Some('c'), Some(code)) => {
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    let c = c.ok_or_else(|| error("%c arg not in range(0x110000)"))?;
                    Ok(written(&c.to_string(), &parsed))
                }
                (None | Some('d' | 'x' | 'X' | 'o' | 'b' | 'n'), Some(whole)) => {
                    integer(whole, 0, &parsed)
                }
                (None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%' | 'n'), _) => {
                    let value = as_float(value).ok_or_else(|| error("not a number"))?;
                    Ok(float(value, &parsed))
                }
                (Some(kind), _) => Err(invalid(kind)),
            }
        }
        _ => Err(error(format!(
            "unsupported format string passed to {}.__format__",
            type_name(value)
        ))),
    }
}

fn parse(spec: &str) -> Result<Spec> {
    let chars: Vec<char> = spec.chars().collect();
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
    let (mut parsed, mut at) = (Spec::default(), 0);
    if is_align(chars.get(1)) {
        (parsed.fill, parsed.align, at) = (Some(chars[0]), Some(chars[1]), 2);
    } else if is_align(chars.first()) {
        (parsed.align, at) = (Some(chars[0]), 1);
    }
    let take = |at: &mut usize, among: &str| {
        let found = chars.get(*at).copied().filter(|c| among.contains(*c));
        *at += usize::from(found.is_some());
        found
    };
    let number = |at: &mut usize| {
        let mut digits = String::new();
        while let Some(c) = take(at, "0123456789") {
            digits.push(c);
        }
        digits.parse::<u128>().ok()
    };
    parsed.sign = take(&mut at, "+- ").filter(|&sign| sign != '-');
    parsed.alternate = take(&mut at, "#").is_some();
    if chars.get(at) == Some(&'0') && parsed.align.is_none() {
        (parsed.fill, parsed.align) = (Some('0'), Some('='));
    }
    parsed.width = bounded(number(&mut at).unwrap_or(0))?;
    parsed.group = take(&mut at, ",_");
    if take(&mut at, ".").is_some() {
        let precision =
            number(&mut at).ok_or_else(|| error("Format specifier missing precision"))?;
        parsed.precision = Some(bounded(precision)?);
    }
    parsed.kind = take(&mut at, "bcdeEfFgGnosxX%");
    match at == chars.len() {
        true => Ok(parsed),
        false => Err(error(format!("Invalid format specifier '{spec}'"))),
    }
}

/// A text, cut to the precision and put into the width.
fn written(text: &str, spec: &Spec) -> String {
    let cut: String = text.chars().take(spec.precision.unwrap_or(usize::MAX)).collect();
    padded("", &cut, spec)
}

fn padded(sign: &str, body: &str, spec: &Spec) -> String {
    let missing = spec.width.saturating_sub(sign.chars().count() + body.chars().count());
    let fill = |count: usize| spec.fill.unwrap_or(' ').to_string().repeat(count);
    match spec.align.unwrap_or('<') {
        '<' => format!("{sign}{body}{}", fill(missing)),
        '^' => format!("{}{sign}{body}{}", fill(missing / 2), fill(missing - missing / 2)),
        '=' => format!("{sign}{}{body}", fill(missing)),
        _ => format!("{}{sign}{body}", fill(missing)),
    }
}

fn signed(negative: bool, spec: &Spec) -> String {
    match (negative, spec.sign) {
        (true, _) => "-".into(),
        (false, sign) => sign.map(String::from).unwrap_or_default(),
    }
}

/// With at least so many digits.
fn integer(value: i128, least: usize, spec: &Spec) -> Result<String> {
    if spec.precision.is_some() {
        return Err(error("Precision not allowed in integer format specifier"));
    }
    let magnitude = value.unsigned_abs();
    let (prefix, digits) = match spec.kind {
        Some('x') => ("0x", format!("{magnitude:x}")),
        Some('X') => ("0X", format!("{magnitude:X}")),
        Some('o') => ("0o", format!("{magnitude:o}")),
        Some('b') => ("0b", format!("{magnitude:b}")),
        _ => ("", magnitude.to_string()),
    };
    let digits = "0".repeat(least.saturating_sub(digits.len())) + &digits;
    let sign = signed(value < 0, spec) + if spec.alternate { prefix } else { "" };
    Ok(grouped(&sign, &digits, "", spec))
}

/// Digits with separators between groups; zeros that fill the width are grouped too.
fn grouped(sign: &str, digits: &str, rest: &str, spec: &Spec) -> String {
    let Some(separator) = spec.group else {
        return padded(sign, &format!("{digits}{rest}"), spec);
    };
    let size = if matches!(spec.kind, Some('x' | 'X' | 'o' | 'b')) { 4 } else { 3 };
    let group = |digits: &str| {
        let mut out = String::new();
        for (i, c) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(size) {
                out.push(separator);
            }
            out.push(c);
        }
        out
    };
    let mut digits = digits.to_owned();
    if spec.fill == Some('0') && spec.align == Some('=') {
        let length = |digits: &str| sign.len() + group(digits).len() + rest.len();
        while length(&format!("0{digits}")) <= spec.width
            || length(&digits) < spec.width && length(&format!("0{digits}")) > spec.width
        {
            digits.insert(0, '0');
            if length(&digits) >= spec.width {
                break;
            }
        }
    }
    padded(sign, &format!("{}{rest}", group(&digits)), spec)
}

fn float(value: f64, spec: &Spec) -> String {
    let kind = spec.kind.unwrap_or(' ');
    let magnitude = value.abs();
    let upper = kind.is_ascii_uppercase();
    let sign = signed(value.is_sign_negative() && !value.is_nan(), spec);
    let body = if !magnitude.is_finite() {
        let name = if magnitude.is_nan() { "nan" } else { "inf" };
        if kind == '%' { format!("{name}%") } else { name.to_owned() }
    } else {
        match (kind, spec.precision) {
            ('f' | 'F', precision) => fixed(magnitude, precision.unwrap_or(6), spec.alternate),
            ('%', precision) => {
                fixed(magnitude * 100.0, precision.unwrap_or(6), spec.alternate) + "%"
            }
            ('e' | 'E', precision) => {
                exponential(magnitude, precision.unwrap_or(6), spec.alternate)
            }
            (' ', None) => float_repr(magnitude),
            (kind, precision) => {
                general(magnitude, precision.unwrap_or(6).max(1), spec.alternate, kind == ' ')
            }
        }
    };
    let body = if upper { body.to_uppercase() } else { body };
    let digits = body.find(|c: char| !c.is_ascii_digit()).unwrap_or(body.len());
    grouped(&sign, &body[..digits], &body[digits..], spec)
}

fn fixed(value: f64, precision: usize, point: bool) -> String {
    let native = precision.min(1100);
    let text = format!("{value:.native$}") + &"0".repeat(precision - native);
    if precision == 0 && point { text + "." } else { text }
}

fn exponential(value: f64, precision: usize, point: bool) -> String {
    let native = precision.min(1100);
    let text = format!("{value:.native$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    let zeros = "0".repeat(precision - native);
    let point = if precision == 0 && point { "." } else { "" };
    format!("{mantissa}{zeros}{point}e{sign}{:02}", exponent.abs())
}

/// So many significant digits, in the shorter of the two forms; `as_repr` keeps one digit behind the point.
fn general(value: f64, precision: usize, keep_zeros: bool, as_repr: bool) -> String {
    let precision = precision.min(1100);
    let scientific = format!("{value:.*e}", precision - 1);
    let exponent = scientific.split_once('e').and_then(|(_, e)| e.parse::<i32>().ok()).unwrap_or(0);
    let trimmed = |text: String| match text.contains('.') && !keep_zeros {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    let most = precision as i32 - i32::from(as_repr);
    if value != 0.0 && (exponent < -4 || exponent >= most) {
        let text = exponential(value, precision - 1, keep_zeros);
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "+00"));
        return format!("{}e{exponent}", trimmed(mantissa.to_owned()));
    }
    let decimals = usize::try_from(precision as i32 - 1 - exponent).unwrap_or(0);
    let text = trimmed(fixed(value, decimals, keep_zeros));
    if as_repr && !text.contains('.') { text + ".0" } else { text }
}
