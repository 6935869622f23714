//! What a user says, as a model that was tuned on conversations reads it.

use anyhow::{Context, Result};
use demask_engine::model::Tokenizer;
use serde_json::json;

/// The tokens of a conversation in which the user has said this and the model's turn comes. What the text spells of
/// special tokens does not end the turn.
pub fn user_message(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let chat = tokenizer.chat()?.context(
        "the model's tokenizer brings no chat template, so there is no way to tell it something",
    )?;
    let render =
        |content: &str| chat.render(&[json!({ "role": "user", "content": content })], true);
    let ids = tokenizer.encode_chat(&render(text)?)?;
    let specials = |ids: &[u32]| ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
    // Not in any text, and no template takes it apart.
    const HERE: &str = "\u{F8FE}here\u{F8FE}";
    let frame = render(HERE)?;
    let (before, behind) =
        frame.split_once(HERE).context("the chat template leaves out what the user says")?;
    let [before, behind] = [tokenizer.encode_chat(before)?, tokenizer.encode(behind, false)?];
    if specials(&ids) == specials(&before) + specials(&behind) {
        return Ok(ids);
    }
    Ok([before, tokenizer.encode_text(text)?, behind].concat())
}
