//! Trains the byte-level BPE tokenizer of a model made from scratch, in the Hugging Face
//! `tokenizer.json` format. It splits text as SmolLM2's does (each digit alone, then GPT-2's
//! regex), so that vocabularies of both kinds segment code alike.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use demask_engine::model::CHATML;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

use crate::data::filter::Report;
use crate::data::fnv1a;
use crate::data::read::{LOT, parts};
use crate::data::recipe::CorpusRecipe;
use crate::disk::write_atomically;

/// The special tokens of a trained tokenizer; a token's id is its index here.
pub const SPECIAL_TOKENS: [&str; 7] = [
    "<|endoftext|>",
    "<|mask|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|im_start|>",
    "<|im_end|>",
];
/// Id of `<|endoftext|>`, which ends every document.
pub const EOS_ID: u32 = 0;
/// Id of `<|mask|>`, which replaces a masked token and never occurs in text.
pub const MASK_ID: u32 = 1;

/// Special tokens and one token per byte: what a vocabulary holds before the first merge.
const SMALLEST_VOCABULARY: usize = SPECIAL_TOKENS.len() + 256;

/// Text that a tokenizer is trained on by default, in bytes.
pub const MOST_BYTES: u64 = 64 << 20;

/// Trains on the documents of a corpus recipe and writes `tokenizer.json` and `tokenizer_config.json` into `folder`.
/// Returns the size of the vocabulary: `vocab_size`, or less if the text repeats too few pairs. Of `most_bytes` each
/// source gets an equal share, so that a scarce language is not merged away by a common one. The same files give the
/// same tokenizer.
pub fn train(
    recipe: &CorpusRecipe,
    vocab_size: usize,
    most_bytes: u64,
    folder: &Path,
) -> Result<usize> {
    let mut recipe = recipe.clone();
    recipe.recognise()?;
    let recipe = &recipe;
    let parts = parts(recipe, &mut vec![Report::default(); recipe.source.len()], LOT)?;
    let mut texts: Vec<String> = Vec::new();
    for (i, source) in recipe.source.iter().enumerate() {
        let mut room = most_bytes / recipe.source.len() as u64;
        // Documents in the order of their names' hash, so that a part of a source is like the whole.
        let mut mine = Vec::new();
        for part in parts.iter().filter(|p| p.source == i) {
            part.read(source, &mut |found| {
                if let Ok(document) = found {
                    let hash = fnv1a(document.name.bytes());
                    let texts = document.content.into_texts();
                    let fine = |t: &String| recipe.filter.refuses(t).is_none();
                    mine.extend(texts.into_iter().filter(fine).map(|t| (hash, t)));
                }
                Ok(())
            })?;
        }
        mine.sort();
        for (_, text) in mine {
            if text.len() as u64 <= room {
                room -= text.len() as u64;
                texts.push(text);
            }
        }
    }
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let texts = texts.iter().map(String::as_str);
    let size = train_bpe(texts, vocab_size, &folder.join("tokenizer.json"))?;
    // Last: a folder with it is complete.
    let settings = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "eos_token": SPECIAL_TOKENS[EOS_ID as usize],
        "pad_token": SPECIAL_TOKENS[EOS_ID as usize],
        "mask_token": SPECIAL_TOKENS[MASK_ID as usize],
        "chat_template": CHATML,
    });
    let settings = format!("{settings:#}\n");
    write_atomically(&folder.join("tokenizer_config.json"), settings.as_bytes())?;
    Ok(size)
}

/// Trains on `texts`, writes `tokenizer.json` to `path` and returns the size of the vocabulary:
/// `vocab_size`, or less if the texts repeat too few pairs. The same texts give the same file.
pub fn train_bpe<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
    path: &Path,
) -> Result<usize> {
    if vocab_size < SMALLEST_VOCABULARY {
        bail!(
            "a vocabulary of {vocab_size} tokens cannot hold every byte and the special tokens; \
             ask for at least {SMALLEST_VOCABULARY}"
        );
    }
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        // A pair seen once is an accident of one file: its merge would never pay.
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL_TOKENS.map(|t| AddedToken::from(t, true)).to_vec())
        .show_progress(false)
        .build()
        .into();
    let bytes = ByteLevel::new(false, true, true);
    let splitters: Vec<PreTokenizerWrapper> = vec![Digits::new(true).into(), bytes.into()];
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(splitters)))
        .with_decoder(Some(bytes))
        .train(&mut trainer, texts)
        .map_err(|e| anyhow!("training a tokenizer of {vocab_size} tokens: {e}"))?;
    let json = tokenizer
        .to_string(true)
        .map_err(|e| anyhow!("serialising the tokenizer for {}: {e}", path.display()))?;
    write_atomically(path, json.as_bytes())?;
    Ok(tokenizer.get_vocab_size(true))
}

/// Loads a `tokenizer.json` for reading a *corpus*: text that spells a special token, such as the
/// source of a tokenizer, becomes ordinary tokens. Otherwise a file could end its document, or show
/// the model a mask that nothing supervises.
pub fn load_for_corpus(path: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_file(path).map_err(|e| {
        anyhow!("cannot load {} ({e}); it must be a Hugging Face tokenizer.json", path.display())
    })?;
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// The same for a model's own tokenizer, from the text of its `tokenizer.json`.
pub fn for_corpus(json: &str) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_bytes(json)
        .map_err(|e| anyhow!("the model's tokenizer cannot be used for a corpus: {e}"))?;
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// Token ids of a text, without any token of its own before or after.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|e| anyhow!("tokenising: {e}"))?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: [&str; 3] = [include_str!("bpe.rs"), include_str!("noise.rs"), "日本語 日本語"];
    const ODD: [&str; 7] = [
        "",
        " ",
        "\t\tif x == 1234:\r\n\n\n        return 'naïve' # 😀 日本語",
        "\u{0}\u{1}\u{7f}\u{feff}\u{200b}e\u{301}",
        "<|endoftext|> x <|mask|>",
        "   trailing   ",
        "½ ٣ Ⅷ 12.5e-3",
    ];

    fn trained(folder: &Path, name: &str) -> std::path::PathBuf {
        let path = folder.join(name);
        assert_eq!(train_bpe(TEXTS.into_iter(), 600, &path).unwrap(), 600);
        path
    }

    #[test]
    fn odd_text_survives_the_round_trip_and_makes_no_special_token() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = load_for_corpus(&trained(folder.path(), "t.json")).unwrap();
        for text in ODD.into_iter().chain(TEXTS) {
            let ids = encode(&tokenizer, text).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            assert!(ids.iter().all(|&id| id as usize >= SPECIAL_TOKENS.len()), "in {text:?}");
        }
        let digits = encode(&tokenizer, "1234").unwrap();
        assert_eq!(digits.len(), 4, "each digit alone");
    }

    #[test]
    fn special_tokens_have_their_ids() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::from_file(trained(folder.path(), "t.json")).unwrap();
        for (id, token) in SPECIAL_TOKENS.into_iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
            assert_eq!(encode(&tokenizer, token).unwrap(), [id as u32], "a prompt may spell it");
        }
        assert_eq!(SPECIAL_TOKENS[EOS_ID as usize], "<|endoftext|>");
        assert_eq!(SPECIAL_TOKENS[MASK_ID as usize], "<|mask|>");
    }

    #[test]
    fn training_is_deterministic() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name| std::fs::read(trained(folder.path(), name)).unwrap();
        assert_eq!(read("a.json"), read("b.json"));
    }

    #[test]
    fn refuses_a_vocabulary_without_room_for_bytes() {
        let error = train_bpe([""].into_iter(), 262, Path::new("unused")).unwrap_err();
        assert!(error.to_string().contains("at least 263"), "{error}");
    }
}
