//! Chat templates print what transformers prints: constructs and whole templates beside the goldens that
//! `golden/generate_chat.py` made; a conversation from a file to its text by `demask template`.

use std::path::Path;
use std::process::{Command, Output};

use demask_engine::model::{ChatOptions, ChatTemplate};
use demask_tests::{binary, golden, report};
use serde_json::{Value, json};

fn settings() -> Value {
    json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
}

fn options(variables: &Value) -> ChatOptions {
    let mut options = ChatOptions::new(true);
    for (name, value) in variables.as_object().expect("variables have names") {
        options.set(name, value.clone()).expect("goldens have the right types");
    }
    options
}

/// What is wrong about a case, if anything: another text, or a text where transformers has an error.
fn fault(case: &Value, got: &demask_engine::Result<String>) -> Option<String> {
    let fits = match (got, case["expected"].as_str()) {
        (Ok(got), Some(expected)) => got == expected,
        (Err(_), None) => true,
        _ => false,
    };
    let (got, expected, error) = (got.as_ref(), &case["expected"], &case["error"]);
    (!fits).then(|| match got {
        Ok(got) => format!("{got:?} instead of {expected} {error}"),
        Err(e) => format!("«{e}» instead of {expected}"),
    })
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("the file is there")).expect("it is JSON")
}

#[test]
fn every_construct_prints_what_transformers_prints() {
    let golden = read(&golden("chat/golden.json"));
    let messages = golden["conversations"]["several"].as_array().unwrap();
    let options = options(&golden["variables"]);
    let (mut failures, mut texts, mut errors) = (Vec::new(), 0, 0);
    for case in golden["constructs"].as_array().unwrap() {
        let line = case["line"].as_str().unwrap();
        let template = line.replace('⏎', "\n").replace('␍', "\r");
        let got = ChatTemplate::new(&template, &settings())
            .and_then(|template| template.render_with(messages, &options));
        failures.extend(fault(case, &got).map(|fault| format!("{line}: {fault}")));
        *if got.is_ok() { &mut texts } else { &mut errors } += 1;
    }
    println!("{texts} constructs with a text, {errors} with an error");
    assert!(texts > 150 && errors > 100);
    report(failures);
}

#[test]
fn whole_templates_print_what_transformers_prints() {
    let golden_ = read(&golden("chat/golden.json"));
    let (mut failures, mut marked) = (Vec::new(), 0);
    let cases = golden_["templates"].as_array().unwrap();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let run = &golden_["runs"][case["run"].as_u64().unwrap() as usize];
        let path = golden("chat/templates").join(name);
        let template = std::fs::read_to_string(path).expect("the template is there");
        let messages = golden_["conversations"][run[0].as_str().unwrap()].as_array().unwrap();
        let options = options(&run[1]);
        let compiled = ChatTemplate::new(&template, &settings()).expect("it compiles");
        let got = compiled.render_with(messages, &options);
        failures.extend(fault(case, &got).map(|fault| format!("{name} with {run}: {fault}")));
        if let Some(expected) = case["generation"].as_array() {
            let (text, places) = compiled.render_marked(messages, &options).expect("it renders");
            let at = |byte: usize| text[..byte].chars().count();
            let places: Vec<Value> =
                places.iter().map(|p| json!([at(p.start), at(p.end)])).collect();
            if places != *expected {
                failures.push(format!("{name} with {run}: {places:?} instead of {expected:?}"));
            }
            marked += places.len();
        }
    }
    assert!(cases.len() > 200 && marked > 5);
    report(failures);
}

/// Further cases from outside of the tree, as `DEMASK_CHAT_CASES=FILE`: `{"cases": [{name, template, messages, variables,
/// expected}]}`.
#[test]
fn further_cases_where_given() {
    let Some(path) = std::env::var_os("DEMASK_CHAT_CASES") else {
        println!("SKIPPED: DEMASK_CHAT_CASES names no file");
        return;
    };
    let table = read(Path::new(&path));
    let mut failures = Vec::new();
    for case in table["cases"].as_array().expect("there are cases") {
        let messages = case["messages"].as_array().expect("there are messages");
        let got = ChatTemplate::new(case["template"].as_str().unwrap_or_default(), &settings())
            .and_then(|template| template.render_with(messages, &options(&case["variables"])));
        failures.extend(fault(case, &got).map(|fault| format!("{}: {fault}", case["name"])));
    }
    report(failures);
}

fn demask(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().expect("the binary runs")
}

fn printed(args: &[&str]) -> String {
    let output = demask(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn refused(args: &[&str], cause: &str) {
    let output = demask(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(cause), "{args:?}: {said}");
}

#[test]
fn a_conversation_in_a_file_becomes_its_text() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    std::fs::create_dir(folder.path().join("code")).unwrap();
    write("code/x.rs", include_str!("chat.rs"));
    let (code, model, messages) = (at("code"), at("tokenizer"), at("chat.json"));
    printed(&["tokenizer", "train", &code, "--vocab-size", "300", "--out", &model, "--quiet"]);
    write("chat.json", r#"[{"role": "user", "content": "Hi <b>"}]"#);
    let base = ["template", "--model", &model, "--messages", &messages];
    let with = |more: &[&str]| printed(&[&base[..], more].concat());
    let begun = "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(with(&[]), begun);
    let closed = with(&["--chat-arg", "add_generation_prompt=false"]);
    assert_eq!(closed, "<|im_start|>user\nHi <b><|im_end|>\n");
    assert_eq!(with(&["--chat-arg", "continue_final_message=true"]), "<|im_start|>user\nHi <b>");

    let template = at("other.jinja");
    write(
        "other.jinja",
        "{{ tools | tojson }}{{ documents }}{{ think }}{{ day }}{% generation %}é{{ messages[0].content }}{% endgeneration %}",
    );
    write("tools.json", r#"[{"z": 1, "a": "<'&>"}]"#);
    let tools = at("tools.json");
    let args = [
        "--template",
        &template,
        "--tools",
        &tools,
        "--chat-arg",
        "think=false",
        "--chat-arg",
        "day=1 May",
    ];
    let text = with(&args);
    assert_eq!(text, "[{\"z\": 1, \"a\": \"<'&>\"}]NoneFalse1 MayéHi <b>");
    let answer: Value = serde_json::from_str(&with(&[&args[..], &["--json"]].concat())).unwrap();
    assert_eq!(answer["text"], text.as_str());
    let start = text.chars().position(|c| c == 'é').unwrap();
    assert_eq!(answer["generation"], json!([[start, start + 7]]));
    assert_eq!(answer["tokens"], answer["ids"].as_array().unwrap().len());

    // What stands beside the messages reaches the template, and the command line counts more.
    write(
        "chat.json",
        r#"{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"think": 1, "day": "-"},
            "documents": [{"title": "t"}]}"#,
    );
    let text = with(&["--template", &template, "--chat-arg", "day=2"]);
    assert_eq!(text, "null[{'title': 't'}]12éHi");

    // Templates in files of their own, by name and by tools.
    std::fs::create_dir(folder.path().join("tokenizer/additional_chat_templates")).unwrap();
    write("tokenizer/additional_chat_templates/tool_use.jinja", "tools: {{ tools | length }}");
    write("tokenizer/additional_chat_templates/rag.jinja", "rag");
    assert_eq!(with(&["--template", "rag"]), "rag");
    assert_eq!(with(&["--tools", &tools]), "tools: 1");
    refused(&base, "none is the default; name one of rag, tool_use");
    write("tokenizer/chat_template.jinja", "default");
    assert_eq!(with(&[]), "default");
    refused(&[&base[..], &["--template", "nope"]].concat(), "rag");

    write("bad.jinja", "a\n{{ messages | nope }}");
    let bad = at("bad.jinja");
    refused(&[&base[..], &["--template", &bad]].concat(), "line 2: no filter named 'nope'");
    write("chat.json", "{}");
    refused(&base, "messages");
    write("chat.json", "[]");
    refused(&base, "at least one message");
    let output = demask(&[&base[..], &["--chat-arg", "tools=[1"]].concat());
    assert_eq!(output.status.code(), Some(2));
}
