//! Fill in the middle: prompts that show a model what stands before and behind a gap (arXiv 2207.14255).

use super::Tokenizer;

/// Names that models give to the tokens before the prefix, the suffix and the middle.
pub const FIM_NAMES: [[&str; 3]; 4] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
];

/// The three tokens of a vocabulary that knows gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fim {
    /// Stands before the text in front of the gap.
    pub prefix: u32,
    /// Stands before the text behind the gap.
    pub suffix: u32,
    /// Stands before what fills the gap.
    pub middle: u32,
}

/// Which side of a gap a model was taught to read first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FimOrder {
    /// Suffix, prefix, middle: Seed-Coder (arXiv 2506.03524), Stable-DiffCoder and what demask trains.
    SuffixFirst,
    /// Prefix, suffix, middle: Qwen2.5-Coder, StarCoder and most others.
    PrefixFirst,
}

impl Fim {
    /// The tokens behind which the middle follows.
    pub fn prompt(&self, prefix: &[u32], suffix: &[u32], order: FimOrder) -> Vec<u32> {
        let before = (self.prefix, prefix);
        let behind = (self.suffix, suffix);
        let sides = match order {
            FimOrder::SuffixFirst => [behind, before],
            FimOrder::PrefixFirst => [before, behind],
        };
        let mut ids = Vec::with_capacity(prefix.len() + suffix.len() + 3);
        for (name, text) in sides {
            ids.push(name);
            ids.extend_from_slice(text);
        }
        ids.push(self.middle);
        ids
    }
}

impl Tokenizer {
    /// Its tokens around gaps, under any of [`FIM_NAMES`].
    pub fn fim(&self) -> Option<Fim> {
        FIM_NAMES.iter().find_map(|[prefix, suffix, middle]| {
            Some(Fim {
                prefix: self.token_id(prefix)?,
                suffix: self.token_id(suffix)?,
                middle: self.token_id(middle)?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_orders() {
        let fim = Fim { prefix: 1, suffix: 2, middle: 3 };
        assert_eq!(fim.prompt(&[10, 11], &[20], FimOrder::SuffixFirst), [2, 20, 1, 10, 11, 3]);
        assert_eq!(fim.prompt(&[10, 11], &[20], FimOrder::PrefixFirst), [1, 10, 11, 2, 20, 3]);
        assert_eq!(fim.prompt(&[], &[], FimOrder::SuffixFirst), [2, 1, 3]);
    }
}
