//! From files to token shards: `recipe` says what, `read` opens it, `filter` and `contamination` leave out, `sample`
//! turns documents into tokens, `turns` finds what of a conversation the assistant wrote, `build` does it all in parallel and can be interrupted, `shards` is what lies on disk.
//! Sequences for training are made of shards by [`crate::pack`].

pub mod build;
mod contamination;
pub mod filter;
pub mod read;
pub mod recipe;
pub mod sample;
pub mod shards;
pub mod turns;

/// One document of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Path below its directory, or file and line.
    pub name: String,
    /// What it is held out with: the top-level folder, or what a column says.
    pub package: String,
    /// What it says.
    pub content: Content,
}

/// What a document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Text, all of it learnt.
    Text(String),
    /// A conversation, of which the assistant's turns are learnt.
    Chat(Vec<Turn>),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Turn {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Turn {
    /// What `role` says.
    pub fn new(role: &str, content: String) -> Turn {
        Turn { role: role.to_owned(), content }
    }
}

impl Content {
    fn texts(&self) -> Vec<&str> {
        match self {
            Content::Text(text) => vec![text],
            Content::Chat(turns) => turns.iter().map(|t| t.content.as_str()).collect(),
        }
    }

    /// Its texts.
    pub fn into_texts(self) -> Vec<String> {
        match self {
            Content::Text(text) => vec![text],
            Content::Chat(turns) => turns.into_iter().map(|t| t.content).collect(),
        }
    }

    /// Bytes of text.
    pub fn bytes(&self) -> u64 {
        self.texts().iter().map(|t| t.len() as u64).sum()
    }

    /// What two documents that differ only in whitespace share.
    fn fingerprint(&self) -> (u64, u64) {
        let dense = || {
            let bytes = self.texts().into_iter().flat_map(|t| t.bytes().chain([0]));
            bytes.filter(|b| !b.is_ascii_whitespace())
        };
        (dense().count() as u64, fnv1a(dense()))
    }
}

/// 64-bit FNV-1a: unlike the standard library's hasher, the same in every release.
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
