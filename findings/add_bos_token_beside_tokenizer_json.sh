#!/usr/bin/env bash
# Guess: a Hugging Face folder whose tokenizer_config.json says `add_bos_token: true` gives ids that begin with the
# beginning-of-text token, as it did for years, whether or not its tokenizer.json has a post-processor.
# Seen with transformers 5.24.0: beside a tokenizer.json the key counts for nothing. A Llama tokenizer with it true,
# false or left out gives the same ids, without the token; only a post-processor adds it. Printed:
#   add_bos_token true   [3, 4]
#   add_bos_token false  [3, 4]
#   no such key          [3, 4]
#   a post-processor     [1, 3, 4]
# Exit 0: as seen. Exit 1: it behaves otherwise now. Needs python3 with venv, and a package registry.
set -euo pipefail
command -v python3 > /dev/null || { echo "no python3; install it with its venv module" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" << 'END'
import json, pathlib, sys, warnings
warnings.filterwarnings("ignore")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

root = pathlib.Path(sys.argv[1])
vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}

def ids(name, settings, processor=False):
    folder = root / name
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, **settings}))
    return AutoTokenizer.from_pretrained(str(folder)).encode("ab")

seen = {
    "add_bos_token true": ids("true", {"add_bos_token": True}),
    "add_bos_token false": ids("false", {"add_bos_token": False}),
    "no such key": ids("none", {}),
    "a post-processor": ids("processor", {}, True),
}
for name, got in seen.items():
    print(f"{name:<20} {got}")
plain = seen["no such key"]
same = seen["add_bos_token true"] == seen["add_bos_token false"] == plain and plain[0] != 1
sys.exit(0 if same and seen["a post-processor"] == [1, *plain] else 1)
END
