//! What the assistant wrote, under templates of every kind.

use demask_engine::model::CHATML;

use super::*;

/// A template of those that are held against transformers.
fn golden(name: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/chat/templates");
    std::fs::read_to_string(format!("{folder}/{name}.jinja")).unwrap()
}

fn template(text: &str) -> ChatTemplate {
    ChatTemplate::new(text, &json!({"bos_token": "<s>", "eos_token": "</s>"})).unwrap()
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// The parts with the learnt ones in brackets.
fn shown(text: &str, messages: &[Value], given: usize) -> String {
    let parts = parts(&template(text), messages, given, &ChatOptions::default()).unwrap();
    parts.iter().map(|p| if p.learnt { format!("[{}]", p.text) } else { p.text.clone() }).collect()
}

fn two_turns() -> Vec<Value> {
    vec![
        said("user", "A?"),
        said("assistant", "a."),
        said("user", "B?"),
        said("assistant", "b."),
        said("user", "C?"),
    ]
}

#[test]
fn turns_are_what_the_assistant_wrote_and_its_end() {
    let expected = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n[a.<|im_end|>\n]<|im_start|>user\nB?<|im_end|>\n\
        <|im_start|>assistant\n[b.<|im_end|>\n]";
    assert_eq!(shown(CHATML, &two_turns(), 0), expected);
    let given = expected.replacen("[a.<|im_end|>\n]", "a.<|im_end|>\n", 1);
    assert_eq!(shown(CHATML, &two_turns(), 2), given);
    assert_eq!(shown(CHATML, &two_turns()[..1], 0), "");
    let first = shown(CHATML, &[said("assistant", "Hi."), said("user", "A?")], 0);
    assert_eq!(first, "<|im_start|>assistant\n[Hi.<|im_end|>\n]");
}

#[test]
fn a_begun_turn_may_go_on_otherwise_than_a_finished_one() {
    let expected = "<s><User>A?<Assistant>[a.</s>]<User>B?<Assistant>[b.</s>]";
    assert_eq!(shown(&golden("opened-think"), &two_turns(), 0), expected);
    // Both `<think>` of the begun turn and this answer begin alike.
    let alike = [said("user", "A?"), said("assistant", "<thin")];
    assert_eq!(shown(&golden("opened-think"), &alike, 0), "<s><User>A?<Assistant>[<thin</s>]");
    let thought = [said("user", "A?"), said("assistant", "<think>\nhm\n</think>\nb")];
    assert_eq!(shown(&golden("opened-think"), &thought, 0), "<s><User>A?<Assistant>[\nb</s>]");
}

#[test]
fn a_turn_may_be_printed_in_another_way_once_others_follow() {
    let mut messages = two_turns();
    messages[1]["reasoning_content"] = "hm".into();
    messages[3]["reasoning_content"] = "so".into();
    let expected = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n[a.<|im_end|>\n]<|im_start|>user\nB?<|im_end|>\n\
        <|im_start|>assistant\n[<think>\nso\n</think>\n\nb.<|im_end|>\n]";
    assert_eq!(shown(&golden("thinking"), &messages, 0), expected);
}

#[test]
fn calls_of_tools_are_learnt_and_their_results_are_not() {
    let call = json!({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
    let messages = [
        said("user", "A?"),
        json!({"role": "assistant", "content": "", "tool_calls": [call]}),
        said("tool", "7"),
        said("assistant", "It is 7."),
    ];
    let system = "<|im_start|>system\nYou are of help.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n";
    let expected = format!(
        "{system}<|im_start|>assistant\n[<tool_call>\n{{\"name\": \"f\", \"arguments\": {{\"x\": 1}}}}\n</tool_call>\
         <|im_end|>\n]<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n\
         [It is 7.<|im_end|>\n]"
    );
    assert_eq!(shown(&golden("tool-tags"), &messages, 0), expected);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let told = options(json!({"tools": tools}).as_object().unwrap()).unwrap();
    let parts = parts(&template(&golden("tool-tags")), &messages, 0, &told).unwrap();
    assert!(
        parts[0].text.contains(
            "<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"f\"}}\n</tools>"
        )
    );
}

#[test]
fn a_template_may_say_itself_what_is_learnt() {
    let messages = two_turns();
    let expected = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n[a.<|im_end|>]\n<|im_start|>user\nB?<|im_end|>\n\
        <|im_start|>assistant\n[b.<|im_end|>]";
    assert_eq!(shown(&golden("chatml-generation"), &messages, 0), expected);
    assert_eq!(
        shown(&golden("chatml-generation"), &messages, 2),
        expected.replacen("[a.<|im_end|>]", "a.<|im_end|>", 1)
    );
}

#[test]
fn a_turn_that_cannot_be_found_is_an_error() {
    let hidden = "{% for m in messages %}{{ m.role[0] }}{{ m.content | length }}{{ messages | length }}{% endfor %}";
    let failed = parts(&template(hidden), &two_turns(), 0, &ChatOptions::default()).unwrap_err();
    assert!(failed.to_string().contains("message 2"), "{failed}");
    let refusing = "{{ raise_exception('never') }}";
    let failed = parts(&template(refusing), &two_turns(), 0, &ChatOptions::default()).unwrap_err();
    assert!(failed.to_string().contains("never"), "{failed}");
}
