#!/usr/bin/env python3
"""How llama.cpp splits text under each name of tokenizer.ggml.pre that demask knows: gguf/splitting.json.

    NODE_LLAMA_CPP=…/node_modules/node-llama-cpp/dist/index.js generate_splitting.py

The vocabulary's merges were learnt from whole texts without any splitting, so that two pieces which a rule parts would
be one token if it did not, and a wrong rule gives other tokens. Written by the gguf package, read by llama.cpp through
node-llama-cpp (splitting.mjs). Needs gguf 0.19, tokenizers 0.23 and node-llama-cpp 3.22.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    from gguf import GGUFWriter, TokenType
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
except ImportError as missing:
    sys.exit(f"generate_splitting.py: {missing}; pip install gguf tokenizers")

HERE = Path(__file__).parent
# None: the key is missing.
NAMES = [
    None, "default", "gpt-2", "smollm", "starcoder", "refact", "command-r", "llama-bpe", "llama3", "llama-v3",
    "smaug-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "stablelm2", "seed-coder", "deepseek-coder", "deepseek-llm",
]
TEXTS = [
    "def f(x):\n    return x ** 2 + 10_000  # it's 3.14159\n\n\nclass A1B2:\r\n\tpass\r\n",
    "if (a[0] == 'b' && c != \"d\") { x += 12345678; y = ~x | 0xFF; z = `${w}`; }\n",
    "The year 1984, 2024 and 123456789012; we'll see what they've DON'T I'M he'd.",
    "   leading, trailing   \n  \n\t\ttabs\t \n\n",
    " a  b   c    d\n e \r f\u000b g\u000c h",
    "größe = \"Größe\"; naïve café Ünïcödé ß ſ ŉ ǆ",
    "“quotes” ‘single’ – dash — em … ¿qué? ¡sí! «guillemets» · • ‰ § ¶ † ‡",
    "日本語のテキスト、そして。中文字符！全角ＡＢＣ１２３？「括弧」一二三",
    "한국어 문장입니다. ภาษาไทย हिन्दी العربية ٣٤٥٦ עברית",
    "Ωμέγα ᾔδειν Ὀδυσσεύς ὤμοι ᾼ ῼ ΐ Ύ ώ ᾿ K Å Ω ℨ ⅷ Ⅷ ½ ² ³ ①②③ 𝟙𝟚𝟛",
    "Русский текст: ёж, Ћирилица. ქართული Ხ ᲀ ᏣᎳᎩ ꮳꮃꭹ Ա բ գ ﬀ ﬁ ﬓ 𐐀𐐨 𞤀𞤢",
    "x\u00a0y\u2003z\u3000w\u200bv\u0085u\u2028t\ufeff s\u3000\u3001\u3002",
    "emoji 👩‍👩‍👧 🙂🙃 🏳️‍🌈 e\u0301e\u0300 ☃❤️ ♥ → ⇒ ∑∏√∞ ≠≤≥ $5 £6 €7 ¥8 ©®™ ^~|<=>+`",
    "a.b,c;d:e!f?g/h\\i@j#k%l&m*n-o_p(q)r[s]t{u}v 'w' \"x\"",
    "1 22 333 4444 55555 666666 7777777 12a34b56 v1.2.3-rc4 1e-10 0x1F 1,000,000",
    "http://example.org/a/b?c=d&e=f#g <tag attr='v'>text</tag> --flag=value ///// ===== ##### .....",
    "\n", "\r\n\r\n", " ", "    ", " \n ", "a", "!", "0", "\u3000", "'s", " 's", "''", "\t\n\t",
]


def vocabulary():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1100, min_frequency=1, initial_alphabet=alphabet, show_progress=False, max_token_length=24
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def write(path, name, tokens, merges):
    writer = GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    if name:
        writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main():
    tokens, merges = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.gguf" for number in range(len(NAMES))]
        for path, name in zip(paths, NAMES):
            write(path, name, tokens, merges)
        command = ["node", HERE / "splitting.mjs", *paths]
        ran = subprocess.run(command, input=json.dumps(TEXTS).encode(), stdout=subprocess.PIPE, check=True)
    ids = json.loads(ran.stdout)
    # Of names with one rule the tokens are the same: kept once.
    rules = {}
    for name, found in zip(NAMES, ids):
        rules.setdefault(json.dumps(found), []).append(name)
    rules = [{"names": names, "ids": json.loads(found)} for found, names in rules.items()]
    for rule in rules:
        print(rule["names"], sum(map(len, rule["ids"])))
    golden = {"texts": TEXTS, "merges": merges, "rules": rules}
    out = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (HERE / "gguf" / "splitting.json").write_text(out + "\n")


if __name__ == "__main__":
    main()
