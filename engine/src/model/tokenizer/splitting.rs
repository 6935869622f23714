//! How byte-level tokenizers split text before they merge, by the names that GGUF files carry in `tokenizer.ggml.pre`.
//! What llama.cpp does under a name is done here, in the parts that a `tokenizer.json` is made of; where the model's
//! own `tokenizer.json` has a part that llama.cpp leaves out (Qwen's NFC), it is kept.

use serde_json::{Value, json};

use super::with_type;

/// The name of llama.cpp's rule for a file that names none.
pub(super) const DEFAULT: &str = "default";

/// How a byte-level tokenizer prepares text, as `tokenizer.json` has it.
#[derive(PartialEq)]
pub(super) struct Splitting {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    /// Take a word that is a token whole, even where the merges do not lead to it.
    pub ignore_merges: bool,
}

/// One way to split.
struct Rule {
    /// The first is the one that is written.
    names: &'static [&'static str],
    /// Each splits further what the ones before it left: matches, and what is between them, stand alone.
    steps: &'static [Step],
    /// Whether text is composed first.
    nfc: bool,
    ignore_merges: bool,
}

enum Step {
    Regex(&'static str),
    /// One by one, whatever script they are of.
    Digits,
    /// The rule of GPT-2, which byte-level tokenizers have built in; only at the end.
    Gpt2,
}

/// Words with the space before them, numbers, signs, and white space but for its last character.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Digits by threes.
const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|",
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Llama 3's with digits one by one.
const QWEN_2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|",
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Of Seed-Coder, and so of Stable-DiffCoder: digits one by one, line ends apart from signs.
const SEED_CODER: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|",
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Each line end by itself: the first step of DeepSeek's.
const LINE_ENDS: &str = "[\r\n]";
/// Chinese, and much that stands between it and Hangul: DeepSeek's.
const CJK: &str = "[一-龥ࠀ-一가-퟿]+";
/// Letters of the scripts that have cases, as DeepSeek LLM lists them.
const CASED: &str = concat!(
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿ",
    "ᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1f7d}ᾀ-ᾴᾶ-ᾼ\u{1fbe}ῂ-ῄῆ-ῌῐ-\u{1fd3}ῖ-\u{1fdb}ῠ-Ῥῲ-ῴῶ-ῼ",
    "ℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ\u{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ",
    "Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
);
/// Signs as DeepSeek LLM lists them: ASCII's (and all else between them), their wide forms, quotes, Chinese stops.
const SIGNS: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";

const RULES: [Rule; 10] = {
    use Step::{Digits, Gpt2, Regex};
    let plain = Rule { names: &[], steps: &[], nfc: false, ignore_merges: false };
    [
        Rule { names: &["gpt-2"], steps: &[Gpt2], ..plain },
        Rule {
            names: &["smollm", "starcoder", "refact", "command-r"],
            steps: &[Digits, Gpt2],
            ..plain
        },
        Rule {
            names: &["llama-bpe", "llama3", "llama-v3"],
            steps: &[Regex(LLAMA_3)],
            ignore_merges: true,
            ..plain
        },
        Rule { names: &["smaug-bpe", "dbrx"], steps: &[Regex(LLAMA_3)], ..plain },
        Rule { names: &["qwen2"], steps: &[Regex(QWEN_2)], nfc: true, ..plain },
        Rule { names: &["deepseek-r1-qwen", "stablelm2"], steps: &[Regex(QWEN_2)], ..plain },
        Rule { names: &["seed-coder"], steps: &[Regex(SEED_CODER)], ..plain },
        Rule {
            names: &["deepseek-coder"],
            steps: &[
                Regex(LINE_ENDS),
                Regex(r"\s?\p{L}+"),
                Regex(r"\s?\p{P}+"),
                Regex(CJK),
                Digits,
            ],
            ..plain
        },
        Rule {
            names: &["deepseek-llm"],
            steps: &[
                Regex(LINE_ENDS),
                Regex(CASED),
                Regex(SIGNS),
                Regex(r"\s+$"),
                Regex(CJK),
                Regex(r"\p{N}+"),
            ],
            ..plain
        },
        Rule {
            names: &[DEFAULT],
            steps: &[
                Regex(r"[\p{P}\$\+<=>\^~\|]+"),
                Regex(GPT_2),
                Regex(r"\p{N}+"),
                Regex("[0-9][0-9][0-9]"),
            ],
            ..plain
        },
    ]
};

/// What `tokenizer.ggml.pre` names; `None` if it is not known here.
pub(super) fn splitting(pre: &str) -> Option<Splitting> {
    RULES.iter().find(|rule| rule.names.contains(&pre)).map(Rule::parts)
}

/// A name for a way to split; `None` where llama.cpp has none.
pub(super) fn name_of(splitting: &Splitting) -> Option<&'static str> {
    RULES.iter().find(|rule| rule.parts() == *splitting).map(|rule| rule.names[0])
}

/// Every name that is known here.
pub(super) fn known_names() -> Vec<&'static str> {
    RULES.iter().flat_map(|rule| rule.names).copied().collect()
}

/// The part of a `tokenizer.json` that turns text to bytes, with or without GPT-2's splitting.
pub(super) fn byte_level_part(use_regex: bool) -> Value {
    let flags = json!({"add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    with_type("ByteLevel", flags)
}

impl Rule {
    fn parts(&self) -> Splitting {
        let mut parts: Vec<Value> = self.steps.iter().map(Step::part).collect();
        if !matches!(self.steps.last(), Some(Step::Gpt2)) {
            parts.push(byte_level_part(false));
        }
        Splitting {
            normalizer: if self.nfc { json!({"type": "NFC"}) } else { Value::Null },
            pre_tokenizer: match parts.len() {
                1 => parts.remove(0),
                _ => json!({"type": "Sequence", "pretokenizers": parts}),
            },
            ignore_merges: self.ignore_merges,
        }
    }
}

impl Step {
    fn part(&self) -> Value {
        match self {
            Self::Regex(pattern) => {
                let pattern = json!({"Regex": pattern});
                let split = json!({"pattern": pattern, "behavior": "Isolated", "invert": false});
                with_type("Split", split)
            }
            Self::Digits => json!({"type": "Digits", "individual_digits": true}),
            Self::Gpt2 => byte_level_part(true),
        }
    }
}
