//! What people's files say: Parquet as pyarrow and datasets write it (`tests/golden/rows/make.py`), JSON in its forms.

use std::fs;

use serde_json::{Map, json};

use super::super::Conversation;
use super::super::recipe::Format;
use super::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/rows").join(name)
}

/// What is said about a file, and its rows.
fn rows(path: &Path) -> (Vec<String>, Vec<Found>) {
    let mut recipe = CorpusRecipe::of_paths(&[path.to_owned()], &[]);
    let said = recipe.recognise().unwrap();
    let mut found = Vec::new();
    for part in parts(&recipe, &mut [Report::default()], LOT).unwrap() {
        let hear = &mut |row| {
            found.push(row);
            Ok(())
        };
        part.read(&recipe.source[part.source], hear).unwrap();
    }
    (said, found)
}

/// The conversation of a row.
fn chat(found: &Found) -> Conversation {
    match &found.as_ref().unwrap().content {
        Content::Chat(chat) => chat.clone(),
        Content::Text(text) => panic!("{text:?} is no conversation"),
    }
}

fn of(messages: Value) -> Conversation {
    Conversation::of(messages.as_array().unwrap().clone())
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[test]
fn parquet_as_people_have_it() {
    let (line, found) = rows(&golden("text-binary.parquet"));
    assert_eq!(line, ["text-binary.parquet: text, by content"]);
    let texts = found.iter().map(|f| f.as_ref().map(|d| d.content.clone())).collect::<Vec<_>>();
    let broken = LeftOut {
        reason: Reason::NotUtf8,
        what: None,
        name: "text-binary.parquet:2".into(),
        bytes: 2,
    };
    let text = |text: &str| Ok(Content::Text(text.into()));
    assert_eq!(texts, [text("x = 'é'\n"), Err(&broken), text("y = 2\n")]);

    let (_, found) = rows(&golden("parts.parquet"));
    assert_eq!(
        chat(&found[0]),
        of(json!([said("user", "Write h"), said("assistant", "def h(): pass")]))
    );
    let left = found[1].as_ref().unwrap_err();
    assert_eq!((left.reason, left.what.as_deref()), (Reason::NotText, Some("image_url")));

    let (_, found) = rows(&golden("json-column.parquet"));
    let messages =
        json!([said("user", "Write a \"quoted\" one"), said("assistant", "say(\"é\\n\")\n")]);
    assert_eq!(chat(&found[0]), of(messages.clone()), "{messages}");

    let (line, found) = rows(&golden("prompt-completion.parquet"));
    assert_eq!(line, ["prompt-completion.parquet: prompts with answers, by prompt, completion"]);
    let messages = json!([
        said("user", "q"),
        said("assistant", "a"),
        said("user", "r"),
        said("assistant", "b")
    ]);
    assert_eq!(chat(&found[0]), Conversation { given: 3, ..of(messages) });

    let (_, found) = rows(&golden("struct-of-lists.parquet"));
    assert_eq!(chat(&found[0]), of(json!([said("user", "q"), said("assistant", "a")])));

    let (line, found) = rows(&golden("messages-brotli.parquet"));
    assert_eq!(line, ["messages-brotli.parquet: conversations, by messages"]);
    assert_eq!(
        chat(&found[1]),
        of(json!([said("user", "Write f1"), said("assistant", "def f1(): pass")]))
    );
}

#[test]
fn calls_of_tools_are_handed_over_with_all_their_keys() {
    let (_, found) = rows(&golden("tools.parquet"));
    let call = |name: &str, arguments: Value| json!({"type": "function", "function": {"name": name, "arguments": arguments}});
    let calls = [call("weather", json!({"city": "Rome"})), call("time", json!({"zone": "CET"}))];
    let messages = json!([
        said("user", "Weather?"),
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "Sunny.", "reasoning_content": "ok"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {}}}]);
    let variables = Map::from_iter([("tools".to_owned(), tools)]);
    assert_eq!(chat(&found[0]), Conversation { variables, ..of(messages) });
}

/// The conversation that one row of JSON is, by its columns.
fn row(value: &Value) -> std::result::Result<Conversation, LeftOut> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, value.to_string()).unwrap();
    let (_, mut found) = rows(&path);
    found.remove(0).map(|document| chat(&Ok(document)))
}

#[test]
fn conversations_in_all_their_forms() {
    let plain = of(json!([said("user", "q"), said("assistant", "a")]));
    let with = |first: Value| {
        let mut chat = plain.clone();
        chat.messages.insert(0, first);
        chat
    };
    let sharegpt = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
    for value in [
        json!({"messages": plain.messages}),
        json!({"messages": json!(plain.messages).to_string(), "text": "q a"}),
        json!({"conversation": plain.messages}),
        json!({"conversations": sharegpt, "tools": "[]", "system": ""}),
        json!({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}),
        json!({"messages": [
            {"role": "user", "content": {"type": "text", "text": "q"}, "name": null},
            {"role": "assistant", "content": ["a"], "tool_calls": null}]}),
        json!({"prompt": "q", "response": "a"}),
        json!({"instruction": "q", "output": "a", "input": " "}),
    ] {
        assert_eq!(row(&value), Ok(plain.clone()), "{value}");
    }
    let told = json!({"conversations": sharegpt, "system": "S"});
    assert_eq!(row(&told), Ok(with(said("system", "S"))));
    let asked = json!({"prompt": [said("system", "S"), said("user", "q")], "completion": "a"});
    assert_eq!(row(&asked), Ok(Conversation { given: 2, ..with(said("system", "S")) }));
    let history = json!({"instruction": "q", "output": "a", "history": [["p", "o"]]});
    let earlier = Conversation::of(
        [vec![said("user", "p"), said("assistant", "o")], plain.messages.clone()].concat(),
    );
    assert_eq!(row(&history), Ok(earlier));
    let called = json!({"conversations": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"z\": 1, \"a\": 2}}"},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "a"}],
        "tools": "[{\"name\": \"f\"}]", "chat_template_kwargs": {"enable_thinking": false}});
    let called = row(&called).unwrap();
    let call = r#"{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"z":1,"a":2}}}]}"#;
    assert_eq!(called.messages[1].to_string(), call, "in the order of the data");
    assert_eq!(called.messages[2], said("tool", "3"));
    assert_eq!(
        json!(called.variables),
        json!({"tools": [{"name": "f"}], "enable_thinking": false})
    );
}

#[test]
fn what_is_no_conversation_is_named() {
    let left = |value: Value| row(&value).unwrap_err();
    let user = said("user", "q");
    let image =
        json!({"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]});
    let shown = left(json!({"messages": [image, said("assistant", "a")]}));
    assert_eq!((shown.reason, shown.what.as_deref()), (Reason::NotText, Some("image")));
    for value in [
        json!({"messages": [user]}),
        json!({"messages": [user, {"role": "assistant"}]}),
        json!({"messages": [user, {"role": "assistant", "content": 7}]}),
        json!({"messages": [user, "a"]}),
        json!({"messages": [{"content": "q"}, said("assistant", "a")]}),
        json!({"prompt": [user], "completion": []}),
    ] {
        assert_eq!(left(value.clone()).reason, Reason::NoText, "{value}");
    }
    let tools = left(json!({"messages": [user, said("assistant", "a")], "tools": "no JSON"}));
    assert_eq!((tools.reason, tools.what.as_deref()), (Reason::NoText, Some("tools")));
}

#[test]
fn json_in_all_its_forms() {
    let (line, found) = rows(&golden("alpaca.json"));
    assert_eq!(line, ["alpaca.json: instructions with answers, by instruction, output"]);
    assert_eq!(chat(&found[1]), of(json!([said("user", "j\n\nn"), said("assistant", "p")])));
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("a.json", "[{\"text\": \"x\"}, {\"text\": \"y\"}]"),
        ("b.json", "{\n  \"text\": \"x\"\n}\n{\"text\":\n \"y\"}\n"),
        ("c.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \"y\"}"),
        ("d.jsonl", "\n[{\"text\": \"x\"},\n{\"text\": \"y\"}]\n"),
        ("e.jsonl", "\u{feff}{\"text\": \"x\"}\n{\"text\": \"y\"}"),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let (_, found) = rows(&path);
        let texts: Vec<Content> = found.into_iter().map(|f| f.unwrap().content).collect();
        assert_eq!(texts, ["x", "y"].map(|t| Content::Text(t.into())), "{name}");
    }
    for (name, text, place) in [
        ("f.json", "[{\"text\": \"x\"},\n{\"text\" 3}]", "line 2"),
        ("g.jsonl", "{\"text\": \"x\"}\n{\"text\"", "line 2"),
        ("h.json", "7", "an object"),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let error = CorpusRecipe::of_paths(&[path], &[]).recognise().unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(name) && error.contains(place), "{error}");
    }
}

#[test]
fn files_of_several_formats_become_several_sources() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}";
    let paths = [
        path("a.jsonl", "{\"code\": \"x\"}"),
        path("b.jsonl", chat),
        path("c.jsonl", chat),
        folder.path().to_owned(),
    ];
    let mut recipe = CorpusRecipe::of_paths(&paths, &[]);
    let lines = recipe.recognise().unwrap();
    assert_eq!(lines, ["a.jsonl: text, by code", "b.jsonl and 1 more: conversations, by messages"]);
    let sources: Vec<_> =
        recipe.source.iter().map(|s| (s.name.as_str(), s.format, s.paths.len())).collect();
    let expected = [("text", Some(Format::Text), 2), ("messages", Some(Format::Messages), 2)];
    assert_eq!(sources, expected);
    assert_eq!(recipe.recognise().unwrap(), Vec::<String>::new(), "a format that is given stays");
    let mut weighted = CorpusRecipe::of_paths(&paths, &[]);
    weighted.source[0].weight = Some(1.0);
    assert!(weighted.recognise().unwrap_err().to_string().contains("several formats"));
    let unknown = path("u.jsonl", "{\"question\": \"q\", \"grade\": 1}");
    let error = CorpusRecipe::of_paths(&[unknown], &[]).recognise().unwrap_err();
    assert!(format!("{error:#}").contains("(question, grade)"), "{error:#}");
}
