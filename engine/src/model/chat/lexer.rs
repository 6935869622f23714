//! A chat template as text and tags, and a tag as tokens, where Jinja2 cuts them.

use super::desugar::Refused;

/// A piece of a template.
#[derive(Debug, PartialEq)]
pub(super) enum Piece<'a> {
    /// Text, comments and raw blocks, to be kept as they are.
    Verbatim(&'a str),
    /// `{{ … }}` or `{% … %}`.
    Tag(Tag<'a>),
}

/// A tag, with its marks of whitespace control in `open` and `close`.
#[derive(Debug, PartialEq)]
pub(super) struct Tag<'a> {
    pub(super) open: &'a str,
    pub(super) close: &'a str,
    pub(super) tokens: Vec<Token<'a>>,
    /// Line breaks inside, so that later lines keep their numbers.
    pub(super) lines: usize,
    /// Where it begins.
    pub(super) line: usize,
}

/// A token of a tag.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token<'a> {
    Name(&'a str),
    /// Without underscores.
    Number(String),
    /// With its escapes resolved.
    Text(String),
    Operator(&'static str),
}

/// Longest first.
const OPERATORS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",",
];

/// Cuts a template, whose line ends are `\n`.
pub(super) fn pieces(template: &str) -> Result<Vec<Piece<'_>>, Refused> {
    let (mut pieces, mut kept, mut at) = (Vec::new(), 0, 0);
    let line_of = |at: usize| 1 + template[..at].matches('\n').count();
    while let Some(found) = template[at..].find("{").map(|i| at + i) {
        let rest = &template[found..];
        let refused = |message: &str| Refused { line: line_of(found), message: message.to_owned() };
        if let Some(comment) = rest.strip_prefix("{#") {
            let end = comment.find("#}").ok_or_else(|| refused("a comment has no end"))?;
            at = found + 2 + end + 2;
        } else if let Some(begun) = simple_tag(rest, "raw") {
            let mut inside = found + begun;
            if !rest[..begun - 2].ends_with(['-', '+']) {
                // A line end behind this tag stays, unlike behind others; minijinja has to be told.
                pieces.push(Piece::Verbatim(&template[kept..inside - 2]));
                pieces.push(Piece::Verbatim("+%}"));
                kept = inside;
            }
            at = loop {
                let next = template[inside..].find("{%").map(|i| inside + i);
                let next = next.ok_or_else(|| refused("a raw block has no end"))?;
                match simple_tag(&template[next..], "endraw") {
                    Some(length) => break next + length,
                    None => inside = next + 2,
                }
            };
        } else if rest.starts_with("{{") || rest.starts_with("{%") {
            if kept < found {
                pieces.push(Piece::Verbatim(&template[kept..found]));
            }
            let (tag, length) = tag(rest, line_of(found))?;
            pieces.push(Piece::Tag(tag));
            at = found + length;
            kept = at;
        } else {
            at = found + 1;
        }
    }
    if kept < template.len() {
        pieces.push(Piece::Verbatim(&template[kept..]));
    }
    Ok(pieces)
}

/// Length of `{% name %}` where the text begins with it.
fn simple_tag(text: &str, name: &str) -> Option<usize> {
    let inside = text.strip_prefix("{%")?;
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside);
    let inside = inside.trim_start().strip_prefix(name)?.trim_start();
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside).strip_prefix("%}")?;
    Some(text.len() - inside.len())
}

/// The tag that a text begins with, and its length.
fn tag(text: &str, line: usize) -> Result<(Tag<'_>, usize), Refused> {
    let block = text.starts_with("{%");
    let marks: &[_] = &['-', '+'];
    let open = &text[..if text[2..].starts_with(marks) { 3 } else { 2 }];
    let ends: &[&str] = if block { &["+%}", "-%}", "%}"] } else { &["-}}", "}}"] };
    let (mut tokens, mut at, mut depth) = (Vec::new(), open.len(), 0_usize);
    loop {
        let rest = &text[at..];
        let refused = |message: String| {
            let line = line + text[..at].matches('\n').count();
            Refused { line, message }
        };
        let Some(c) = rest.chars().next() else {
            return Err(refused("a tag has no end".into()));
        };
        if depth == 0
            && let Some(close) = ends.iter().find(|&&end| rest.starts_with(end))
        {
            let close = &rest[..close.len()];
            let lines = text[..at].matches('\n').count();
            return Ok((Tag { open, close, tokens, lines, line }, at + close.len()));
        }
        let length = if c.is_whitespace() {
            c.len_utf8()
        } else if c == '\'' || c == '"' {
            let length = string_length(rest)
                .ok_or_else(|| refused(format!("unexpected char {c:?}: a text has no end")))?;
            tokens.push(Token::Text(unescape(&rest[1..length - 1]).map_err(refused)?));
            length
        } else if c.is_ascii_digit() {
            let after_dot = text[..at].ends_with('.');
            let length = number_length(rest, after_dot);
            tokens.push(Token::Number(rest[..length].replace('_', "")));
            length
        } else if c.is_alphabetic() || c == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            let name = &rest[..end.unwrap_or(rest.len())];
            tokens.push(Token::Name(name));
            name.len()
        } else {
            let operator = OPERATORS.into_iter().find(|operator| rest.starts_with(operator));
            let operator = operator.ok_or_else(|| refused(format!("unexpected char {c:?}")))?;
            match operator {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => {
                    depth = depth
                        .checked_sub(1)
                        .ok_or_else(|| refused(format!("unexpected '{operator}'")))?;
                }
                _ => {}
            }
            tokens.push(Token::Operator(operator));
            operator.len()
        };
        at += length;
    }
}

/// Length of the quoted text that `rest` begins with.
fn string_length(rest: &str) -> Option<usize> {
    let quote = rest.as_bytes()[0];
    let mut escaped = false;
    let end = rest.bytes().skip(1).position(|byte| {
        let ends = byte == quote && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map(|end| end + 2)
}

fn number_length(rest: &str, after_dot: bool) -> usize {
    let bytes = rest.as_bytes();
    let run = |from: usize, is: &dyn Fn(u8) -> bool| {
        let mut at = from;
        while at < bytes.len()
            && (is(bytes[at]) || bytes[at] == b'_' && bytes.get(at + 1).is_some_and(|&b| is(b)))
        {
            at += 1;
        }
        at
    };
    let digit = |b: u8| b.is_ascii_digit();
    let radix: Option<&dyn Fn(u8) -> bool> = match bytes.get(..2) {
        Some(b"0x" | b"0X") => Some(&|b: u8| b.is_ascii_hexdigit()),
        Some(b"0o" | b"0O") => Some(&|b: u8| (b'0'..=b'7').contains(&b)),
        Some(b"0b" | b"0B") => Some(&|b: u8| matches!(b, b'0' | b'1')),
        _ => None,
    };
    if let Some(is) = radix {
        let end = run(2, is);
        if end > 2 {
            return end;
        }
    }
    let mut end = run(0, &digit);
    if after_dot {
        return end;
    }
    let whole = end;
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(|&b| digit(b)) {
        end = run(end + 1, &digit);
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        let exponent = end + 1 + sign;
        if bytes.get(exponent).is_some_and(|&b| digit(b)) {
            end = run(exponent, &digit);
        }
    }
    // A whole number does not begin with zeros.
    if end == whole && bytes[0] == b'0' { run(0, &|b| b == b'0') } else { end }
}

/// Escapes as Python's `unicode-escape` resolves them; an unknown one stays as it is.
fn unescape(text: &str) -> Result<String, String> {
    if !text.contains('\\') {
        return Ok(text.to_owned());
    }
    // Characters beyond ASCII are escapes to that codec, so a backslash before one stands for itself.
    let (mut out, mut chars) = (String::new(), text.chars().peekable());
    let mut high: Option<u32> = None;
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some(escape) = chars.next() else { return Err("\\ at end of string".into()) };
        let digits = match escape {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        match escape {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(escape),
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0c'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\x0b'),
            '0'..='7' => {
                let mut code = escape as u32 - 48;
                for _ in 0..2 {
                    if let Some(digit) = chars.peek().and_then(|c| c.to_digit(8)) {
                        code = code * 8 + digit;
                        chars.next();
                    }
                }
                out.extend(char::from_u32(code));
            }
            _ if digits > 0 => {
                let hex: String = chars.by_ref().take(digits).collect();
                let code = u32::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == digits);
                let code = code.ok_or_else(|| format!("truncated \\{escape} escape"))?;
                match (high.take(), code) {
                    (None, 0xd800..=0xdbff) => high = Some(code),
                    (Some(high), 0xdc00..=0xdfff) => {
                        let code = 0x1_0000 + ((high - 0xd800) << 10) + (code - 0xdc00);
                        out.extend(char::from_u32(code));
                    }
                    (_, code) => match char::from_u32(code) {
                        Some(c) => out.push(c),
                        None => return Err(format!("\\{escape}{hex} is no character")),
                    },
                }
            }
            'N' => return Err("\\N{…} in a text is not supported; write the character".into()),
            c if c.is_ascii() => out.extend(['\\', c]),
            c => {
                let code = c as u32;
                out.push('\\');
                out.push_str(&match code {
                    0..0x100 => format!("x{code:02x}"),
                    0x100..0x1_0000 => format!("u{code:04x}"),
                    _ => format!("U{code:08x}"),
                });
            }
        }
    }
    match high {
        Some(high) => Err(format!("\\u{high:04x} is half a character")),
        None => Ok(out),
    }
}
