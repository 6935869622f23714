//! A conversation as the text of its chat template, and which parts of it the assistant wrote.
//!
//! Where the template says so itself, by `{% generation %}`, that is taken. Else an assistant's turn is what its text
//! has more than the text before it with the turn begun. Two kinds of templates make this harder: those whose begun
//! turn goes on otherwise than a finished one (`<think>` that an answer of the past has not), and those that print a
//! turn in another way once others follow (without its reasoning). There the turn is found by its content.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use demask_engine::model::{ChatOptions, ChatTemplate};
use serde_json::{Map, Value, json};

/// In place of a turn's content, to see where the template prints it; not in any text, and no template takes it apart.
const HERE: &str = "\u{F8FE}here\u{F8FE}";

/// A part of a conversation's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What the template prints.
    pub text: String,
    /// Whether a model learns to write it.
    pub learnt: bool,
}

/// Options with which a template prints a conversation that is complete, from what it is told by name.
///
/// # Errors
/// If a value is of a type that its name does not take.
pub fn options(variables: &Map<String, Value>) -> Result<ChatOptions> {
    let mut options = ChatOptions::new(false);
    for (name, value) in variables {
        options.set(name, value.clone())?;
    }
    options.add_generation_prompt = false;
    options.continue_final_message = None;
    Ok(options)
}

/// The parts of a conversation up to the end of the assistant's last turn, of which those that the assistant wrote are
/// learnt, except within the first `given` messages. What is joined is the template's text.
///
/// # Errors
/// If the template refuses the conversation, or prints a turn where it cannot be found.
pub fn parts(
    template: &ChatTemplate,
    messages: &[Value],
    given: usize,
    options: &ChatOptions,
) -> Result<Vec<Part>> {
    let turns: Vec<usize> =
        (given..messages.len()).filter(|&i| is_assistant(&messages[i])).collect();
    let Some(&last) = turns.last() else { return Ok(Vec::new()) };
    if template.marks_generation() {
        return marked(template, messages, given, options);
    }
    let text = |messages: &[Value], open: bool| {
        let options = ChatOptions { add_generation_prompt: open, ..options.clone() };
        template.render_with(messages, &options)
    };
    let messages = &messages[..=last];
    let whole = text(messages, false)?;
    let mut learnt: Vec<Range<usize>> = Vec::new();
    for &turn in &turns {
        let finished = if turn == last { whole.clone() } else { text(&messages[..=turn], false)? };
        let found = place(&whole, &finished, messages, turn, &text)?;
        let after = learnt.last().map_or(0, |last| last.end);
        match found {
            // The template leaves the turn out.
            None => {}
            Some(found) if found.start >= after && found.end > found.start => learnt.push(found),
            Some(_) => bail!(lost(turn)),
        }
    }
    Ok(cut(&whole, &learnt))
}

/// The text of messages, with the assistant's turn begun or not.
type Render<'a> = &'a dyn Fn(&[Value], bool) -> demask_engine::Result<String>;

/// Where the text of a conversation has a turn; `finished` is the text that ends with it. `None` if it is not there.
fn place(
    whole: &str,
    finished: &str,
    messages: &[Value],
    turn: usize,
    text: Render<'_>,
) -> Result<Option<Range<usize>>> {
    let (before, until) = (&messages[..turn], &messages[..=turn]);
    // With nothing before it, or where the template asks for a user's message, there is no begun turn.
    let begun = if turn > 0 { text(before, true).ok() } else { None };
    let begins = begun.as_ref().is_some_and(|begun| finished.starts_with(begun.as_str()));
    if let (Some(begun), true) = (&begun, begins && whole.starts_with(finished)) {
        return Ok(Some(begun.len()..finished.len()));
    }
    let body = find_body(finished, until, turn, text)?;
    let begun = begun.map(|begun| shared(&begun, finished)).filter(|&begun| {
        // Where they part before this turn, they do not say where it begins.
        let earlier = text(before, false).map_or(0, |earlier| shared(&earlier, finished));
        begun >= earlier
    });
    // The begun turn and the finished one may agree a little further by chance, into what the turn says.
    let start = match (&body, begun) {
        (Some(body), Some(begun)) => body.start.min(begun),
        (Some(body), None) => body.start,
        (None, Some(begun)) => begun,
        (None, None) => bail!(lost(turn)),
    };
    if whole.starts_with(finished) {
        return Ok(Some(start..finished.len()));
    }
    // Printed in another way once other turns follow.
    let body = body.with_context(|| lost(turn))?;
    let Some(later) = find_body(whole, messages, turn, text)? else {
        let said = messages[turn]["content"].as_str().unwrap_or_default().trim();
        return if said.is_empty() || whole.contains(said) { bail!(lost(turn)) } else { Ok(None) };
    };
    let head = &finished[start..body.start];
    let head = if whole[..later.start].ends_with(head) { head.len() } else { 0 };
    let tail = shared(&finished[body.end..], &whole[later.end..]);
    Ok(Some(later.start - head..later.end + tail))
}

fn lost(turn: usize) -> String {
    format!(
        "the chat template prints the assistant's turn (message {}) where it cannot be found; a template that encloses it \
         by {{% generation %}} says where",
        turn + 1
    )
}

fn is_assistant(message: &Value) -> bool {
    message["role"] == "assistant"
}

/// By what the template encloses; what belongs to the first `given` messages is not learnt.
fn marked(
    template: &ChatTemplate,
    messages: &[Value],
    given: usize,
    options: &ChatOptions,
) -> Result<Vec<Part>> {
    let (text, mut places) = template.render_marked(messages, options)?;
    if given > 0 {
        let (_, of_prompt) = template.render_marked(&messages[..given], options)?;
        places.drain(..of_prompt.len().min(places.len()));
    }
    places.retain(|place| !place.is_empty());
    places.sort_by_key(|place| (place.start, place.end));
    places.dedup_by(|next, place| {
        let inside = next.start < place.end;
        place.end = if inside { place.end.max(next.end) } else { place.end };
        inside
    });
    Ok(cut(&text, &places))
}

/// Where the text has what a message says, without what the template puts around it, if that is to be seen.
fn find_body(
    text: &str,
    messages: &[Value],
    turn: usize,
    render: Render<'_>,
) -> Result<Option<Range<usize>>> {
    let said = messages[turn]["content"].as_str().unwrap_or_default();
    let mut other = messages.to_vec();
    other[turn]["content"] = HERE.into();
    let bare = json!({ "role": messages[turn]["role"], "content": HERE });
    // Of a message that only calls tools, the calls are the body.
    let variants =
        if said.trim().is_empty() { vec![bare] } else { vec![other[turn].clone(), bare] };
    for variant in variants {
        other[turn] = variant;
        // A template may want more of a content than to be a text.
        let Ok(framed) = render(&other, false) else { continue };
        let Some((before, behind)) = framed.split_once(HERE) else { continue };
        let fits = !behind.contains(HERE)
            && text.len() >= before.len() + behind.len()
            && text.starts_with(before)
            && text.ends_with(behind);
        if fits {
            return Ok(Some(before.len()..text.len() - behind.len()));
        }
    }
    let mut places = text.match_indices(said.trim()).map(|(at, found)| at..at + found.len());
    Ok(places.next().filter(|place| !place.is_empty() && places.next().is_none()))
}

/// Length of what two texts begin with alike, in whole characters.
fn shared(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// A text in parts, up to the end of the last one that is learnt.
fn cut(text: &str, learnt: &[Range<usize>]) -> Vec<Part> {
    let (mut parts, mut done) = (Vec::new(), 0);
    for range in learnt {
        if range.start > done {
            parts.push(Part { text: text[done..range.start].to_owned(), learnt: false });
        }
        parts.push(Part { text: text[range.clone()].to_owned(), learnt: true });
        done = range.end;
    }
    parts
}

#[cfg(test)]
#[path = "turns_tests.rs"]
mod tests;
