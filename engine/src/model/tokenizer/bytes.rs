//! Which bytes a token stands for, given how it is spelled. Not here: joining them to text
//! (`tokenizer.rs`).

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// How the spelling of a token gives its bytes.
pub(super) struct Scheme {
    byte_level: bool,
    byte_fallback: bool,
    pub strip_space: bool,
}

impl Scheme {
    /// Reads it off the decoder, whose parts are few.
    pub fn of(path: &Path, inner: &tokenizers::Tokenizer) -> Result<Self> {
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or(Value::Null);
        let parts = match decoder["decoders"].as_array() {
            Some(parts) => parts.clone(),
            None => vec![decoder],
        };
        let mut scheme = Self { byte_level: false, byte_fallback: false, strip_space: false };
        let mut sentencepiece = false;
        for part in &parts {
            match part["type"].as_str() {
                Some("ByteLevel") => scheme.byte_level = true,
                Some("ByteFallback") => scheme.byte_fallback = true,
                Some("Replace") if part["pattern"]["String"] == "▁" && part["content"] == " " => {
                    sentencepiece = true
                }
                Some("Metaspace") if part["replacement"] == "▁" => {
                    sentencepiece = true;
                    scheme.strip_space |= part["prepend_scheme"] != "never";
                }
                Some("Strip")
                    if part["content"] == " " && part["start"] == 1 && part["stop"] == 0 =>
                {
                    scheme.strip_space = true;
                }
                Some("Fuse") => {}
                other => {
                    let reason = format!(
                        "its decoder has a part {} that is not supported; expected byte-level or \
                         SentencePiece BPE",
                        other.unwrap_or("null")
                    );
                    return Err(Error::model(path, reason));
                }
            }
        }
        match scheme.byte_level != sentencepiece {
            true => Ok(scheme),
            false => Err(Error::model(
                path,
                "its decoder is neither that of byte-level nor of SentencePiece BPE",
            )),
        }
    }

    pub fn bytes(&self, token: &str) -> Box<[u8]> {
        if self.byte_level {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
            // Spellings outside the alphabet stand for themselves, as in the tokenizers crate.
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec()).into();
        }
        match token
            .strip_prefix("<0x")
            .and_then(|rest| rest.strip_suffix('>'))
            .filter(|hex| hex.len() == 2)
        {
            Some(hex) if self.byte_fallback => match u8::from_str_radix(hex, 16) {
                Ok(byte) => Box::new([byte]),
                Err(_) => token.as_bytes().into(),
            },
            _ => token.replace('▁', " ").into_bytes().into(),
        }
    }

    /// Added tokens are matched in the text as they are spelled.
    pub fn added_bytes(&self, content: &str) -> Box<[u8]> {
        match self.byte_level {
            true => content.as_bytes().into(),
            false => self.bytes(content),
        }
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the 68 other bytes, in
/// order, for the characters from U+0100 on.
pub(super) fn byte_of_char(c: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|&byte| printable(byte)),
        code => (0..=255).filter(|&byte| !printable(byte)).nth((code - 0x100) as usize),
    }
}
