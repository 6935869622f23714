//! Chat templates: what the goldens of transformers do not hold.

use serde_json::{Value, json};

use super::*;

fn render(template: &str, settings: &Value) -> Result<String> {
    let turns = [json!({"role": "user", "content": "hi"})];
    ChatTemplate::new(template, settings)?.render(&turns, true)
}

#[test]
fn chatml_opens_the_answer_and_a_refusal_is_passed_on() {
    let text = render(CHATML, &Value::Null).unwrap();
    assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    let refused = |template: &str| render(template, &Value::Null).unwrap_err().to_string();
    let said = refused("a\n{{ raise_exception('no ' + messages[0].role) }}");
    assert_eq!(said, "the chat template, line 2: no user");
    assert_eq!(refused("\n\n{% for"), "the chat template, line 3: a tag has no end");
    let said = refused("{%\n  if true %}\n{{ 1 | nope }}");
    assert_eq!(
        said,
        "the chat template, line 1: unexpected end of template: {% if %} is not closed"
    );
    assert_eq!(
        refused("\n{% macro f() %}{{ nothing.x }}{% endmacro %}\n{{ f() }}"),
        "the chat template, line 2: attribute \"x\" of an undefined value is asked for"
    );
}

#[test]
fn special_tokens_are_those_of_the_tokenizer() {
    let settings = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null});
    let text =
        render("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}", &settings).unwrap();
    assert_eq!(text, "<s></s>False");
}

#[test]
fn options_by_name() {
    let mut options = ChatOptions::new(true);
    options.set("tools", json!([{"a": 1}])).unwrap();
    options.set("add_generation_prompt", json!(false)).unwrap();
    options.set("continue_final_message", json!(true)).unwrap();
    options.set("enable_thinking", json!(false)).unwrap();
    assert!(!options.add_generation_prompt);
    assert_eq!(options.continue_final_message.as_deref(), Some("content"));
    let chat = ChatTemplate::new(
        "{{ tools }}{{ enable_thinking }}{{ messages[0].content }}!",
        &Value::Null,
    )
    .unwrap();
    let messages = [json!({"role": "assistant", "content": "a b "})];
    assert_eq!(chat.render_with(&messages, &options).unwrap(), "[{'a': 1}]Falsea b ");
    for (name, value) in [
        ("messages", json!([])),
        ("add_generation_prompt", json!(1)),
        ("continue_final_message", json!(2)),
    ] {
        assert!(options.set(name, value).unwrap_err().to_string().contains(name));
    }
    options.set("tools", json!({"a": 1})).unwrap();
    assert!(chat.render_with(&messages, &options).unwrap_err().to_string().contains("tools"));
    let options = ChatOptions::new(true);
    assert!(
        chat.render_with(&[], &options).unwrap_err().to_string().contains("at least one message")
    );
    assert!(chat.render_with(&[json!("hi")], &options).unwrap_err().to_string().contains("object"));
}

#[test]
fn what_a_template_encloses_is_found_in_its_text() {
    let template = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'a' %}{% generation %}é{{ m.content }}\
        {% endgeneration %}{% endif %}{% endfor %}";
    let chat = ChatTemplate::new(template, &Value::Null).unwrap();
    let messages = [
        json!({"role": "a", "content": "x"}),
        json!({"role": "b"}),
        json!({"role": "a", "content": "y"}),
    ];
    let (text, places) = chat.render_marked(&messages, &ChatOptions::default()).unwrap();
    assert_eq!(text, "<a>éx<b><a>éy");
    assert_eq!(places, [3..6, 12..15]);
    assert!(chat.marks_generation());
    let changed = "{% set t %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}{{ t | trim | length }}";
    let chat = ChatTemplate::new(changed, &Value::Null).unwrap();
    assert!(
        chat.render_marked(&messages, &ChatOptions::default())
            .unwrap_err()
            .to_string()
            .contains("generation")
    );
    assert!(
        !ChatTemplate::new("{% raw %}generation{% endraw %}", &Value::Null)
            .unwrap()
            .marks_generation()
    );
}

/// What Python prints for the same time.
#[test]
fn dates_as_python_writes_them() {
    let day = chrono::NaiveDate::from_ymd_opt(2026, 7, 5).unwrap();
    let time = day.and_hms_micro_opt(3, 4, 9, 1234).unwrap();
    let golden: Value = serde_json::from_str(DATES).unwrap();
    for (format, expected) in golden.as_object().unwrap() {
        assert_eq!(date::strftime(&time, format), *expected, "{format}");
    }
}

/// `datetime.datetime(2026, 7, 5, 3, 4, 9, 1234).strftime(…)` of Python 3.11 on Linux.
const DATES: &str = r#"{
    "%d %b %Y": "05 Jul 2026",
    "%Y-%m-%d": "2026-07-05",
    "%B %d, %Y": "July 05, 2026",
    "%A %a %H:%M:%S %I %p": "Sunday Sun 03:04:09 03 AM",
    "%j %y %U %W %w %u %V %G": "186 26 27 26 0 7 27 2026",
    "%-d/%-m/%y %-H": "5/7/26 3",
    "%c|%x|%X": "Sun Jul  5 03:04:09 2026|07/05/26|03:04:09",
    "%D %F %T %R": "07/05/26 2026-07-05 03:04:09 03:04",
    "%e|%k|%l|%C|%h": " 5| 3| 3|20|Jul",
    "%%|%n|%t|%f|%Z|%z|": "%|\n|\t|001234|||",
    "100%": "100%",
    "%Q %q": "%Q %q",
    "%^a %^B": "SUN JULY",
    "%_d %_H": " 5  3"
}"#;
