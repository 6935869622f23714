//! From Jinja2 as transformers reads it to what minijinja does the same with. Statements stay; inside of expressions,
//! operators, attributes, items and slices become calls of Python's (`python.rs`); `{% generation %}` becomes a call
//! block; a macro that takes any arguments is wrapped. Precedences and rules are those of Jinja2 3.1's parser.

use std::fmt::Write;

use super::expression::{Parsed, Parser, Signature, quoted};
use super::lexer::{Piece, Tag, Token, pieces};

/// Why a template is none, and where.
#[derive(Debug, PartialEq)]
pub(super) struct Refused {
    pub(super) line: usize,
    pub(super) message: String,
}

/// Names of what expressions call; a template cannot name them.
pub(super) mod names {
    pub const ADD: &str = "__py_add";
    pub const ATTRIBUTE: &str = "__py_attribute";
    pub const CONCAT: &str = "__py_concat";
    pub const CONTAINS: &str = "__py_contains";
    pub const GENERATION: &str = "__py_generation";
    pub const ITEM: &str = "__py_item";
    pub const ITERATE: &str = "__py_iterate";
    pub const LESS: &str = "__py_less";
    pub const MACRO: &str = "__py_macro";
    pub const MULTIPLY: &str = "__py_multiply";
    pub const REFUSE: &str = "__py_refuse";
    pub const REMAINDER: &str = "__py_remainder";
    pub const SLICE: &str = "__py_slice";
    /// Nothing has this name.
    pub const UNDEFINED: &str = "__py_undefined";
}

/// The template in minijinja's terms. `has_filter` and `has_test` know the names that there are.
pub(super) fn desugar(
    template: &str,
    has_filter: &dyn Fn(&str) -> bool,
    has_test: &dyn Fn(&str) -> bool,
) -> Result<String, Refused> {
    let template = template.replace("\r\n", "\n").replace('\r', "\n");
    let template = template.strip_suffix('\n').unwrap_or(&template);
    let mut writer = Writer { out: String::new(), blocks: Vec::new(), has_filter, has_test };
    for piece in pieces(template)? {
        match piece {
            Piece::Verbatim(text) => writer.out.push_str(text),
            Piece::Tag(tag) => {
                let line = tag.line;
                writer.tag(&tag).map_err(|message| Refused { line, message })?;
            }
        }
    }
    match writer.blocks.pop() {
        None => Ok(writer.out),
        Some(open) => Err(Refused {
            line: open.line,
            message: format!("unexpected end of template: {{% {} %}} is not closed", open.kind),
        }),
    }
}

struct Writer<'a> {
    out: String,
    blocks: Vec<Block>,
    has_filter: &'a dyn Fn(&str) -> bool,
    has_test: &'a dyn Fn(&str) -> bool,
}

/// A statement that has an end.
struct Block {
    kind: &'static str,
    line: usize,
    /// Where in the output the list of a macro's parameters ends, and what it names.
    parameters: usize,
    names: Vec<String>,
    name: String,
    varargs: bool,
    kwargs: bool,
}

/// Statements that have an end; `set` only where it has no value.
const BLOCKS: [&str; 10] =
    ["for", "if", "macro", "call", "filter", "set", "with", "generation", "autoescape", "block"];

impl Writer<'_> {
    fn tag(&mut self, tag: &Tag<'_>) -> Parsed<()> {
        let soft = self.blocks.last().is_some_and(|b| b.kind == "if");
        let (has_filter, has_test) = (self.has_filter, self.has_test);
        let mut p = Parser { tokens: &tag.tokens, at: 0, soft, has_filter, has_test };
        let text = match tag.open.starts_with("{{") {
            true => p.tuple(true)?.text,
            false => self.statement(&mut p, tag)?,
        };
        p.end()?;
        for token in &tag.tokens {
            let block = self.blocks.iter_mut().rev().find(|b| matches!(b.kind, "macro" | "call"));
            let (Token::Name(name), Some(block)) = (token, block) else { continue };
            block.varargs |= *name == "varargs";
            block.kwargs |= *name == "kwargs";
        }
        let lines = "\n".repeat(tag.lines);
        let _ = write!(self.out, "{} {text} {lines}{}", tag.open, tag.close);
        Ok(())
    }

    fn open(&mut self, kind: &'static str, line: usize) -> &mut Block {
        self.blocks.push(Block {
            kind,
            line,
            parameters: 0,
            names: Vec::new(),
            name: String::new(),
            varargs: false,
            kwargs: false,
        });
        let last = self.blocks.len() - 1;
        &mut self.blocks[last]
    }

    /// The innermost open statement, which must be of this kind.
    fn close(&mut self, tag: &str, kind: &str) -> Parsed<Block> {
        match self.blocks.pop() {
            Some(block) if block.kind == kind => Ok(block),
            Some(block) => Err(format!(
                "encountered unexpected tag '{tag}'; the innermost block that needs to be closed is '{}'",
                block.kind
            )),
            None => Err(format!("encountered unknown tag '{tag}'")),
        }
    }

    fn statement(&mut self, p: &mut Parser<'_>, tag: &Tag<'_>) -> Parsed<String> {
        let line = tag.line;
        let keyword = p.name().ok_or("a tag name is expected")?;
        Ok(match keyword {
            "for" => {
                let target = p.target()?;
                p.keyword("in")?;
                let iterated = p.tuple(false)?;
                let many = target.contains(',');
                let mut text =
                    format!("for {target} in {}({}, {many})", names::ITERATE, iterated.text);
                if p.skip_name("if") {
                    let test = p.expression()?;
                    let _ = write!(text, " if {}", test.held());
                }
                if p.skip_name("recursive") {
                    text.push_str(" recursive");
                }
                self.open("for", line);
                text
            }
            "if" => {
                // The condition itself is not yet inside.
                let test = p.tuple(false)?;
                self.open("if", line);
                format!("if {}", test.held())
            }
            "elif" => {
                self.inside("elif", &["if"])?;
                format!("elif {}", p.tuple(false)?.held())
            }
            "else" => {
                self.inside("else", &["if", "for"])?;
                "else".into()
            }
            "set" => {
                let target = p.target()?;
                if p.skip("=") {
                    let value = p.tuple(true)?.text;
                    match target.contains(',') {
                        true => format!("set {target} = {}({value}, false)", names::ITERATE),
                        false => format!("set {target} = {value}"),
                    }
                } else {
                    let filters = p.filters()?;
                    self.open("set", line);
                    let bar = if filters.is_empty() { "" } else { " | " };
                    format!("set {target}{bar}{filters}")
                }
            }
            "macro" => {
                let name = p.name().ok_or("a macro needs a name")?.to_owned();
                let signature = p.signature()?;
                let text = format!("macro {name}({}", signature.text);
                let parameters = self.out.len() + tag.open.len() + 1 + text.len();
                let block = self.open("macro", line);
                (block.name, block.names, block.parameters) = (name, signature.names, parameters);
                format!("{text}){}", signature.later)
            }
            "endmacro" => {
                let block = self.close(keyword, "macro")?;
                match block.varargs || block.kwargs {
                    true => self.wrapped(&block),
                    false => "endmacro".into(),
                }
            }
            "call" => {
                let signature = match p.peek() {
                    Some(Token::Operator("(")) => p.signature()?,
                    _ => Signature::default(),
                };
                let call = p.expression()?;
                self.open("call", line);
                format!("call({}) {}{}", signature.text, call.text, signature.later)
            }
            "generation" => {
                self.open("generation", line);
                format!("call {}()", names::GENERATION)
            }
            "endgeneration" => {
                self.close(keyword, "generation")?;
                "endcall".into()
            }
            "filter" => {
                let filters = p.filter_chain()?;
                self.open("filter", line);
                format!("filter {filters}")
            }
            "with" => {
                let mut assigned = Vec::new();
                while p.peek().is_some() {
                    if !assigned.is_empty() {
                        p.expect(",")?;
                    }
                    let target = p.target()?;
                    p.expect("=")?;
                    assigned.push(format!("{target} = {}", p.expression()?.held()));
                }
                self.open("with", line);
                format!("with {}", assigned.join(", "))
            }
            "autoescape" => {
                let on = p.expression()?;
                self.open("autoescape", line);
                format!("autoescape {}", on.held())
            }
            "block" => {
                let name = p.name().ok_or("a block needs a name")?;
                self.open("block", line);
                let mut text = format!("block {name}");
                for word in ["scoped", "required"] {
                    if p.skip_name(word) {
                        let _ = write!(text, " {word}");
                    }
                }
                text
            }
            "endblock" => {
                self.close(keyword, "block")?;
                p.name().map_or("endblock".into(), |name| format!("endblock {name}"))
            }
            "break" | "continue" => {
                if !self.blocks.iter().any(|block| block.kind == "for") {
                    return Err(format!("'{keyword}' outside loop"));
                }
                keyword.into()
            }
            "include" | "import" | "from" | "extends" => {
                p.at = p.tokens.len();
                let why = format!("{{% {keyword} %}}: a chat template is one file");
                format!("set __py_none = {}({})", names::REFUSE, quoted(&why))
            }
            _ => {
                let kind = keyword.strip_prefix("end").unwrap_or_default();
                if !BLOCKS.contains(&kind) {
                    return Err(format!("encountered unknown tag '{keyword}'"));
                }
                self.close(keyword, kind)?;
                keyword.into()
            }
        })
    }

    fn inside(&self, tag: &str, kinds: &[&str]) -> Parsed<()> {
        match self.blocks.last() {
            Some(block) if kinds.contains(&block.kind) => Ok(()),
            _ => Err(format!("encountered unknown tag '{tag}'")),
        }
    }

    /// The end of a macro that takes more arguments than it names: it gets parameters for them, and is wrapped in what
    /// puts them there.
    fn wrapped(&mut self, block: &Block) -> String {
        let (mut added, mut names) = (String::new(), block.names.clone());
        for (used, name, empty) in
            [(block.varargs, "varargs", "()"), (block.kwargs, "kwargs", "{}")]
        {
            if used {
                let comma = if names.is_empty() { "" } else { ", " };
                let _ = write!(added, "{comma}{name}={empty}");
                names.push(name.into());
            }
        }
        self.out.insert_str(block.parameters, &added);
        let listed: Vec<String> = block.names.iter().map(|name| quoted(name)).collect();
        let name = &block.name;
        format!(
            "endmacro +%}}{{% set {name} = {}({name}, [{}], {}, {})",
            names::MACRO,
            listed.join(", "),
            block.varargs,
            block.kwargs
        )
    }
}
