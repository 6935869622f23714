//! What a row of a dataset says: text, or a conversation as a chat template takes it. The forms are those in which
//! people keep conversations: messages of role and content (OpenAI, TRL), from and value (ShareGPT), prompt and answer,
//! instruction and output (Alpaca). Nothing is left out in silence: what a template may want is handed over with all its
//! keys, and a part that is no text is refused by name.

use serde_json::{Map, Value, json};

use super::filter::Reason;
use super::recipe::{Format, SourceRecipe};
use super::{Content, Conversation};

/// Columns with the text of a document.
pub const TEXT_COLUMNS: [&str; 3] = ["content", "text", "code"];
/// Columns with a list of messages.
pub const MESSAGE_COLUMNS: [&str; 3] = ["messages", "conversations", "conversation"];
/// Columns that stand beside a conversation and reach the template with it.
const BESIDE: [&str; 5] = ["tools", "functions", "documents", "system", "chat_template_kwargs"];

/// Why a row is no document, and which part of it is at fault, if one is.
pub type Refused = (Reason, Option<String>);

/// Without the columns of its format.
const NO_TEXT: Refused = (Reason::NoText, None);

/// The columns that a row of this format is made of.
pub fn columns(format: Format) -> Vec<&'static str> {
    let own: &[&str] = match format {
        Format::Text => return TEXT_COLUMNS.to_vec(),
        Format::Messages => &MESSAGE_COLUMNS,
        Format::PromptResponse => &["prompt", "response", "completion"],
        Format::Alpaca => &["instruction", "input", "output", "history"],
        Format::Edit => &["before", "instruction", "after"],
    };
    [own, &BESIDE].concat()
}

/// The format that these columns make (with whether a column holds lists), and the columns that say so.
pub fn recognise(columns: &[(String, bool)]) -> Option<(Format, Vec<&str>)> {
    let named = |name: &str| columns.iter().find(|(column, _)| column == name);
    let all = |names: &[&str]| -> Option<Vec<&str>> {
        names.iter().map(|name| named(name).map(|(column, _)| column.as_str())).collect()
    };
    let messages = MESSAGE_COLUMNS.iter().find_map(|name| named(name));
    let of = |format, columns: Option<Vec<_>>| columns.map(|columns| (format, columns));
    let list = messages.filter(|(_, is_list)| *is_list).map(|(name, _)| vec![name.as_str()]);
    let text = TEXT_COLUMNS.iter().find_map(|name| all(&[name]));
    of(Format::Messages, list)
        .or_else(|| of(Format::PromptResponse, all(&["prompt", "completion"])))
        .or_else(|| of(Format::PromptResponse, all(&["prompt", "response"])))
        .or_else(|| of(Format::Alpaca, all(&["instruction", "output"])))
        .or_else(|| of(Format::Edit, all(&["before", "instruction", "after"])))
        .or_else(|| of(Format::Text, text))
        .or_else(|| of(Format::Messages, messages.map(|(name, _)| vec![name.as_str()])))
}

/// What a row says.
pub fn content(
    source: &SourceRecipe,
    format: Format,
    mut row: Map<String, Value>,
) -> Result<Content, Refused> {
    let row = &mut row;
    let said = |role: &str, text: String| json!({ "role": role, "content": text });
    let (mut messages, answer) = match format {
        Format::Text => {
            let text = match &source.text {
                Some(column) => text(row, column),
                None => TEXT_COLUMNS.into_iter().find_map(|column| text(row, column)),
            };
            return text.map(Content::Text).ok_or(NO_TEXT);
        }
        Format::Messages => {
            let value = MESSAGE_COLUMNS.into_iter().find_map(|column| take(row, column));
            let list = value.and_then(list).ok_or(NO_TEXT)?;
            (list.into_iter().map(message).collect::<Result<_, _>>()?, None)
        }
        Format::PromptResponse => {
            let prompt = take(row, "prompt").ok_or(NO_TEXT)?;
            let answer = take(row, "response").or_else(|| take(row, "completion"));
            let answer = answer.ok_or(NO_TEXT)?;
            let chat = !prompt.is_string() || !answer.is_string();
            let [prompt, answer] = [turns(prompt, "user")?, turns(answer, "assistant")?];
            // Of a prompt that is itself a conversation nothing is learnt, as in TRL.
            (prompt, Some((answer, chat)))
        }
        Format::Alpaca => {
            let instruction = text(row, "instruction").ok_or(NO_TEXT)?;
            let input = text(row, "input").filter(|i| !i.trim().is_empty());
            let question = match input {
                Some(input) => format!("{instruction}\n\n{input}"),
                None => instruction,
            };
            let output = text(row, "output").ok_or(NO_TEXT)?;
            let mut messages = history(take(row, "history")).ok_or(NO_TEXT)?;
            messages.push(said("user", question));
            messages.push(said("assistant", output));
            (messages, None)
        }
        Format::Edit => {
            let before = text(row, "before").ok_or(NO_TEXT)?;
            let instruction = text(row, "instruction").ok_or(NO_TEXT)?;
            let after = text(row, "after").ok_or(NO_TEXT)?;
            let question = said("user", edit_request(&before, &instruction));
            (vec![question, said("assistant", after)], None)
        }
    };
    let has_system = messages.first().and_then(role) == Some("system");
    let system = text(row, "system").filter(|system| !has_system && !system.trim().is_empty());
    if let Some(system) = system {
        messages.insert(0, said("system", system));
    }
    let given = match answer {
        Some((answer, chat)) => {
            let given = if chat { messages.len() } else { 0 };
            messages.extend(answer);
            given
        }
        None => 0,
    };
    let learnt = messages[given..].iter().any(|m| role(m) == Some("assistant"));
    let variables = variables(row)?;
    learnt.then_some(Content::Chat(Conversation { messages, given, variables })).ok_or(NO_TEXT)
}

/// What a column holds, taken out of the row; `None` where that is nothing.
fn take(row: &mut Map<String, Value>, column: &str) -> Option<Value> {
    row.get_mut(column).map(Value::take).filter(|value| !value.is_null())
}

/// The text that a column holds.
fn text(row: &mut Map<String, Value>, column: &str) -> Option<String> {
    match take(row, column)? {
        Value::String(text) => Some(text),
        _ => None,
    }
}

/// What a user says who wants `before` changed: the same words in training and in `demask edit`. The answer is the
/// changed text alone.
pub fn edit_request(before: &str, instruction: &str) -> String {
    format!("{}\n\n```\n{}\n```", instruction.trim(), before.trim_end_matches('\n'))
}

fn role(message: &Value) -> Option<&str> {
    message["role"].as_str()
}

/// A list of messages, also as one object of lists (what `datasets` once made of a list of objects), or as JSON text.
fn list(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(list) => Some(list),
        Value::Object(columns) => transposed(columns),
        Value::String(text) => match serde_json::from_str(&text).ok()? {
            Value::String(_) => None,
            value => list(value),
        },
        _ => None,
    }
}

/// One object of lists as a list of objects.
fn transposed(columns: Map<String, Value>) -> Option<Vec<Value>> {
    let mut rows: Vec<Map<String, Value>> = Vec::new();
    for (name, column) in columns.into_iter().filter(|(_, column)| !column.is_null()) {
        let Value::Array(values) = column else { return None };
        if rows.is_empty() {
            rows.resize_with(values.len(), Map::new);
        }
        if rows.len() != values.len() {
            return None;
        }
        for (row, value) in rows.iter_mut().zip(values).filter(|(_, value)| !value.is_null()) {
            row.insert(name.clone(), value);
        }
    }
    Some(rows.into_iter().map(Value::Object).collect())
}

/// Messages, or a text that is one message of this role.
fn turns(value: Value, role: &str) -> Result<Vec<Value>, Refused> {
    match value {
        Value::String(text) => Ok(vec![json!({ "role": role, "content": text })]),
        other => list(other).ok_or(NO_TEXT)?.into_iter().map(message).collect(),
    }
}

/// Pairs of question and answer from before the instruction.
fn history(value: Option<Value>) -> Option<Vec<Value>> {
    let mut messages = Vec::new();
    for pair in value.as_ref().and_then(Value::as_array).into_iter().flatten() {
        for (at, role) in ["user", "assistant"].into_iter().enumerate() {
            messages.push(json!({ "role": role, "content": pair[at].as_str()? }));
        }
    }
    Some(messages)
}

/// A message with ShareGPT's names as everyone else's, its parts joined, and without the keys that hold nothing: what
/// transformers makes of it before a template sees it.
fn message(value: Value) -> Result<Value, Refused> {
    let Value::Object(given) = value else { return Err(NO_TEXT) };
    let (has_role, has_content) = (given.contains_key("role"), given.contains_key("content"));
    let mut fields = Map::new();
    for (key, value) in given.into_iter().filter(|(_, value)| !value.is_null()) {
        let key = match key.as_str() {
            "from" if !has_role => "role".to_owned(),
            "value" if !has_content => "content".to_owned(),
            _ => key,
        };
        fields.insert(key, value);
    }
    let role = match fields.get("role").and_then(Value::as_str).ok_or(NO_TEXT)? {
        "human" => "user",
        "gpt" | "function_call" => "assistant",
        "observation" | "function_response" => "tool",
        role => role,
    }
    .to_owned();
    if fields["role"] == "function_call" {
        let calls = fields.get_mut("content").map(Value::take).ok_or(NO_TEXT)?;
        fields.retain(|key, _| key != "content");
        fields.insert("tool_calls".into(), function_calls(calls).ok_or(NO_TEXT)?);
    }
    fields.insert("role".into(), role.as_str().into());
    if let Some(Value::String(text)) = fields.get("tool_calls")
        && let Ok(calls @ Value::Array(_)) = serde_json::from_str(text)
    {
        fields.insert("tool_calls".into(), calls);
    }
    let calls = ["tool_calls", "function_call"].iter().any(|key| fields.contains_key(*key));
    match fields.get_mut("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) if parts.iter().all(is_part) => {
            let text = joined(parts)?;
            fields.insert("content".into(), text.into());
        }
        // What a tool returns may be anything that JSON holds.
        Some(_) if role == "tool" => {}
        Some(part) if is_part(part) => {
            let text = joined(std::slice::from_ref(part))?;
            fields.insert("content".into(), text.into());
        }
        None if calls => {}
        _ => return Err(NO_TEXT),
    }
    Ok(Value::Object(fields))
}

/// ShareGPT's call of a function, or several: `{name, arguments}` as JSON text.
fn function_calls(value: Value) -> Option<Value> {
    let calls = match value {
        Value::String(text) => serde_json::from_str(&text).ok()?,
        other => other,
    };
    let calls = if let Value::Array(calls) = calls { calls } else { vec![calls] };
    let named = calls.iter().all(|call| call["name"].is_string());
    let call = |call| json!({ "type": "function", "function": call });
    named.then(|| calls.into_iter().map(call).collect())
}

/// Whether it is one of the parts that a message's content may be a list of.
fn is_part(value: &Value) -> bool {
    value.is_string() || value["type"].is_string() || value["text"].is_string()
}

/// The text of all parts, one behind the other, as templates print them.
fn joined(parts: &[Value]) -> Result<String, Refused> {
    let text = |part: &Value| {
        let kind = part["type"].as_str().unwrap_or("text");
        let text = part.as_str().or(part["text"].as_str());
        match (kind, text) {
            ("text" | "input_text" | "output_text", Some(text)) => Ok(text.to_owned()),
            _ => Err((Reason::NotText, Some(kind.to_owned()))),
        }
    };
    parts.iter().map(text).collect()
}

/// What stands beside the messages and is for the template: tools, documents, and settings of this row.
fn variables(row: &mut Map<String, Value>) -> Result<Map<String, Value>, Refused> {
    let faulty = |name: &str| (Reason::NoText, Some(name.to_owned()));
    let mut variables = Map::new();
    for name in ["tools", "functions"] {
        let items = match parsed(take(row, name).unwrap_or_default()).ok_or_else(|| faulty(name))? {
            Value::Null => continue,
            Value::Array(items) => items,
            _ => return Err(faulty(name)),
        };
        let tool = |item| {
            let item = parsed(item).filter(Value::is_object)?;
            // What OpenAI called functions before there were tools is a tool without its frame.
            let bare = name == "functions";
            Some(if bare { json!({ "type": "function", "function": item }) } else { item })
        };
        let items: Vec<Value> =
            items.into_iter().map(tool).collect::<Option<_>>().ok_or_else(|| faulty(name))?;
        // An empty list makes some templates print the frame of one.
        if !items.is_empty() {
            variables.insert("tools".into(), items.into());
        }
    }
    // A column of that name with anything else in it is not meant for a template.
    if let Some(Value::Array(documents)) = take(row, "documents")
        && !documents.is_empty()
        && documents.iter().all(Value::is_object)
    {
        variables.insert("documents".into(), documents.into());
    }
    match parsed(take(row, "chat_template_kwargs").unwrap_or_default()) {
        Some(Value::Null) => {}
        Some(Value::Object(kwargs)) => variables.extend(kwargs),
        _ => return Err(faulty("chat_template_kwargs")),
    }
    Ok(variables)
}

/// A value that may be written as JSON text; `None` for text that is none. Empty text says nothing.
fn parsed(value: Value) -> Option<Value> {
    match value {
        Value::String(text) if text.trim().is_empty() => Some(Value::Null),
        Value::String(text) => serde_json::from_str(&text).ok(),
        other => Some(other),
    }
}
