//! Rows of data files as JSON objects: JSON by lines or as one array (plain, .gz, .zst), and Parquet, whose columns of
//! bytes are text and whose columns of JSON are what they spell. Not here: what a row means (`conversation.rs`).

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use parquet::basic::{ConvertedType, LogicalType, Repetition};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Longest line of JSONL.
const MOST_LINE: u64 = 64 << 20;
/// Rows by which the columns of a JSON file are known: where a first one lacks a field, another has it.
const LOOKED_AT: usize = 64;

/// Hears a row with its size in bytes, and says whether to go on.
pub type Hear<'a> = &'a mut dyn FnMut(Value, u64) -> Result<bool>;

/// How a file keeps its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// JSON: an object a line, or a list of them.
    Json,
    /// Parquet.
    Table,
}

/// What the name of a file says.
pub fn kind_of(path: &Path) -> Result<Kind> {
    let name = file_name(path);
    let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
    match plain.rsplit_once('.').map(|(_, ending)| ending) {
        Some("jsonl" | "json" | "ndjson") => Ok(Kind::Json),
        Some("parquet") => Ok(Kind::Table),
        _ => Err(anyhow!(
            "{}: neither a directory nor .jsonl, .json (also .gz, .zst) or .parquet",
            path.display()
        )),
    }
}

/// The last part of a path.
pub fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The names of a file's columns, and whether each holds lists or objects (also as JSON text).
pub fn columns(path: &Path) -> Result<Vec<(String, bool)>> {
    if kind_of(path)? == Kind::Table {
        let reader = open_table(path)?;
        let fields = reader.metadata().file_metadata().schema().get_fields();
        return Ok(fields
            .iter()
            .map(|f| (f.name().to_owned(), f.is_group() || is_json(f)))
            .collect());
    }
    let (mut columns, mut rows) = (Vec::<(String, bool)>::new(), 0);
    json_rows(path, &mut |row, _| {
        for (name, value) in row.as_object().into_iter().flatten() {
            let spelled = value.as_str().is_some_and(|text| {
                text.starts_with(['[', '{']) && serde_json::from_str::<Value>(text).is_ok()
            });
            let is_list = value.is_array() || value.is_object() || spelled;
            match columns.iter_mut().find(|(column, _)| column == name) {
                Some(column) => column.1 |= is_list,
                None => columns.push((name.clone(), is_list)),
            }
        }
        rows += 1;
        Ok(rows < LOOKED_AT)
    })?;
    Ok(columns)
}

/// Hands over each row of a JSON file: an object a line, or each item of a list. A text that begins with a bracket, and
/// any whose name ends in .json, may have its lines where it likes.
pub fn json_rows(path: &Path, hear: Hear<'_>) -> Result<()> {
    let place = || path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot open {}", place()))?;
    let name = file_name(path);
    let plain: Box<dyn Read> = if name.ends_with(".gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else if name.ends_with(".zst") {
        Box::new(zstd::Decoder::new(file).with_context(place)?)
    } else {
        Box::new(file)
    };
    let mut reader = BufReader::with_capacity(1 << 16, plain);
    let head = reader.fill_buf().with_context(|| format!("{}: cannot read", place()))?;
    // A byte order mark, which editors of some systems write.
    let mark = if head.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
    let first = head[mark..].iter().find(|byte| !byte.is_ascii_whitespace()).copied();
    reader.consume(mark);
    let by_lines = name.contains(".jsonl") || name.contains(".ndjson");
    match first == Some(b'[') || !by_lines {
        true => values(path, reader, hear),
        false => lines(path, reader, hear),
    }
}

fn lines(path: &Path, mut reader: impl BufRead, hear: Hear<'_>) -> Result<()> {
    let place = || path.display().to_string();
    let (mut line, mut number) = (Vec::new(), 0_u64);
    loop {
        line.clear();
        number += 1;
        let mut limited = (&mut reader).take(MOST_LINE);
        let read = limited.read_until(b'\n', &mut line);
        let read = read.with_context(|| format!("{} line {number}: cannot read", place()))?;
        if read == 0 {
            return Ok(());
        }
        ensure!(
            (read as u64) < MOST_LINE,
            "{} line {number}: longer than {} MiB; is it JSONL?",
            place(),
            MOST_LINE >> 20
        );
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = serde_json::from_slice(&line).with_context(|| {
            format!("{} line {number} is no JSON; fix or remove the line", place())
        })?;
        if !hear(value, read as u64)? {
            return Ok(());
        }
    }
}

/// Values one behind the other, of which a list is handed over item by item.
fn values(path: &Path, reader: impl Read, hear: Hear<'_>) -> Result<()> {
    let mut parser = serde_json::Deserializer::from_reader(reader);
    let mut failed = None;
    let stopped = Cell::new(false);
    while !stopped.get() && parser.end().is_err() {
        let rows = Rows { hear: &mut *hear, failed: &mut failed, stopped: &stopped };
        let read = rows.deserialize(&mut parser);
        if let Some(error) = failed {
            return Err(error);
        }
        if let (Err(error), false) = (read, stopped.get()) {
            let place = path.display();
            return Err(anyhow!("{place} is no JSON ({error}); fix or remove that place"));
        }
    }
    Ok(())
}

struct Rows<'a, 'h> {
    hear: &'a mut (dyn FnMut(Value, u64) -> Result<bool> + 'h),
    failed: &'a mut Option<anyhow::Error>,
    stopped: &'a Cell<bool>,
}

impl Rows<'_, '_> {
    /// An error where no more is wanted, which ends the parsing.
    fn say<E: de::Error>(&mut self, value: Value) -> std::result::Result<(), E> {
        let bytes = text_bytes(&value);
        match (self.hear)(value, bytes) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => *self.failed = Some(error),
        }
        self.stopped.set(true);
        Err(E::custom("stopped"))
    }
}

impl<'de> DeserializeSeed<'de> for Rows<'_, '_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, parser: D) -> std::result::Result<(), D::Error> {
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object, or a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> std::result::Result<(), A::Error> {
        while let Some(value) = list.next_element()? {
            self.say(value)?;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut fields: A) -> std::result::Result<(), A::Error> {
        let mut object = Map::new();
        while let Some((key, value)) = fields.next_entry()? {
            object.insert(key, value);
        }
        self.say(Value::Object(object))
    }
}

/// Bytes of all texts in a value.
fn text_bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 0,
    }
}

fn open_table(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    SerializedFileReader::new(file)
        .with_context(|| format!("{}: not a Parquet file that can be read", path.display()))
}

/// A row of a Parquet file, or, where a column of bytes holds no UTF-8, how many bytes it has.
pub type TableRow = std::result::Result<(Value, u64), u64>;

/// Hands over the rows of a Parquet file, of the columns that are wanted and there.
pub fn table_rows(
    path: &Path,
    wanted: &[&str],
    hear: &mut dyn FnMut(TableRow) -> Result<()>,
) -> Result<()> {
    let place = || format!("{}: not a Parquet file that can be read", path.display());
    let reader = open_table(path)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<_> =
        schema.get_fields().iter().filter(|f| wanted.contains(&f.name())).cloned().collect();
    let projection = Type::group_type_builder(schema.name())
        .with_fields(columns.clone())
        .build()
        .with_context(place)?;
    for row in reader.get_row_iter(Some(projection)).with_context(place)? {
        let mut bytes = 0;
        let mut object = Map::new();
        let mut broken = false;
        for ((name, field), kind) in
            row.with_context(place)?.into_columns().into_iter().zip(&columns)
        {
            match value(&field, kind, &mut bytes)
                .with_context(|| format!("{}: column {name}", path.display()))?
            {
                Some(value) => drop(object.insert(name, value)),
                None => broken = true,
            }
        }
        hear(if broken { Err(bytes) } else { Ok((Value::Object(object), bytes)) })?;
    }
    Ok(())
}

/// A field as JSON, and the bytes of text in it; `None` for bytes that are no UTF-8. Fields of objects that hold
/// nothing are left out: Parquet cannot tell them from fields that are not there.
fn value(field: &Field, kind: &Type, bytes: &mut u64) -> Result<Option<Value>> {
    Ok(Some(match field {
        Field::Bytes(raw) => {
            *bytes += raw.len() as u64;
            match std::str::from_utf8(raw.data()) {
                Ok(text) => text_value(text, kind)?,
                Err(_) => return Ok(None),
            }
        }
        Field::Str(text) => {
            *bytes += text.len() as u64;
            text_value(text, kind)?
        }
        Field::Group(row) => {
            let mut object = Map::new();
            for (name, field) in row.get_column_iter().filter(|(_, f)| **f != Field::Null) {
                let child = children(kind).iter().find(|f| f.name() == name);
                let Some(value) = value(field, child.map_or(kind, |f| f), bytes)? else {
                    return Ok(None);
                };
                object.insert(name.clone(), value);
            }
            Value::Object(object)
        }
        Field::ListInternal(list) => {
            let items = list.elements().iter();
            let items = items.map(|field| value(field, element(kind), bytes));
            match items.collect::<Result<Option<Vec<Value>>>>()? {
                Some(items) => items.into(),
                None => return Ok(None),
            }
        }
        Field::MapInternal(map) => {
            let child = children(kind).first().and_then(|pair| children(pair).get(1));
            let mut object = Map::new();
            for (key, field) in map.entries() {
                let key = key.to_json_value();
                let Some(value) = value(field, child.map_or(kind, |f| f), bytes)? else {
                    return Ok(None);
                };
                object.insert(key.as_str().map_or_else(|| key.to_string(), str::to_owned), value);
            }
            Value::Object(object)
        }
        other => other.to_json_value(),
    }))
}

/// A text, or what it spells in a column of JSON.
fn text_value(text: &str, kind: &Type) -> Result<Value> {
    match is_json(kind) {
        true => serde_json::from_str(text).context("is a column of JSON, and a value is none"),
        false => Ok(text.into()),
    }
}

/// The fields of a group.
fn children(kind: &Type) -> &[Arc<Type>] {
    if kind.is_group() { kind.get_fields() } else { &[] }
}

fn is_json(kind: &Type) -> bool {
    let info = kind.get_basic_info();
    info.logical_type_ref() == Some(&LogicalType::Json)
        || info.converted_type() == ConvertedType::JSON
}

/// The type of a list's items. Of the repeated group in a list that is written as the format says, it is the only
/// field; older writers left the group out, or gave it the fields of the item.
fn element(list: &Type) -> &Type {
    let repeated = |t: &Type| {
        t.get_basic_info().has_repetition()
            && t.get_basic_info().repetition() == Repetition::REPEATED
    };
    if !list.is_group()
        || (repeated(list) && list.get_basic_info().converted_type() != ConvertedType::LIST)
    {
        return list;
    }
    let Some(inner) = children(list).first() else { return list };
    let wrapped = inner.is_group()
        && inner.get_fields().len() == 1
        && inner.name() != "array"
        && inner.name() != format!("{}_tuple", list.name());
    if wrapped { &inner.get_fields()[0] } else { inner }
}
