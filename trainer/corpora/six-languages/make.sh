#!/usr/bin/env bash
# The whole corpus by one command: sources, fine-tuning data, tokenizer, datasets. Each step goes on where an earlier
# run stopped. DEMASK names the program; further arguments go to both builds, such as --against FILE for evaluation
# sets that no document may share text with.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: make.sh OUT [ARGUMENT OF demask data build]...}
shift
demask=${DEMASK:-demask}
command -v "$demask" > /dev/null ||
    { echo "make.sh: no $demask on PATH; cargo build --release makes it, DEMASK names it" >&2; exit 2; }

"$here/fetch.sh" "$out"
[[ -f $out/sft/edits.jsonl ]] || "$here/sft.py" "$out"
[[ -f $out/tokenizer/tokenizer_config.json ]] ||
    "$demask" tokenizer train "$here/corpus.toml" --root "$out" --vocab-size 4096 --most 24 --out "$out/tokenizer"
"$demask" data build "$here/corpus.toml" --root "$out" --out "$out/data" "$@"
"$demask" data build "$here/sft.toml" --root "$out" --out "$out/sft-data" "$@"
