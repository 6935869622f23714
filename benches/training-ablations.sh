#!/usr/bin/env bash
# What warm-up, clip and the length of a block do at the switch from autoregressive training to diffusion (arXiv
# 2601.15892 §2): ten steps autoregressive, then eighty of diffusion, once for each variant, from one checkpoint.
#
#   benches/training-ablations.sh [-r RUNNER] MODEL DATASET OUT
#
# MODEL is an autoregressive model with a mask token, DATASET its text (demask data build). -r runs demask through
# RUNNER (another driver, say). Prints a table; `demask report OUT/*/` draws the curves. Needs jq.
set -euo pipefail

runner=""
while getopts r: option; do
    case $option in r) runner=$OPTARG ;; *) sed -n '2,8p' "$0" >&2; exit 2 ;; esac
done
shift $((OPTIND - 1))
[[ $# == 3 ]] || { sed -n '2,8p' "$0" >&2; exit 2; }
model=$(realpath "$1") data=$(realpath "$2") out=$3
demask=${DEMASK:-$(dirname "$0")/../target/release/demask}
command -v jq > /dev/null || { echo "training-ablations.sh: no jq; install it" >&2; exit 2; }
command -v "$demask" > /dev/null ||
    { echo "training-ablations.sh: no $demask; cargo build --release makes it, DEMASK names another" >&2; exit 2; }
mkdir -p "$out"

# variant NAME CORRUPTION_WARMUP CLIP OBJECTIVE [BLOCK_LENGTH]
variant() {
    cat > "$out/$1.toml" <<END
seed = 1
checkpoints = { every = 1000, keep = 1 }
model.from = "$model"
data = { dataset = "$data", length = 128 }
optimizer = { batch = 8, micro_batch = 8 }
# A spike is what this looks for.
guard.spike = 1000.0
[[phase]]
name = "ar"
objective = "ar"
steps = 10
lr = 1e-3
lr_warmup = 5
lr_min_ratio = 1.0
[[phase]]
name = "diffusion"
objective = "$4"
steps = 80
lr = 1e-3
lr_min_ratio = 1.0
corruption_warmup = $2
clip = $3
${5:+block_length = $5}
END
    [[ -d $out/$1/model ]] || $runner "$demask" train "$out/$1.toml" --out "$out/$1" --quiet --no-tune
    jq -rs --arg name "$1" '
        def mean: add / length;
        (map(select(.phase == "ar") | .grad_norm) | mean) as $ar
        | map(select(.phase != "ar")) as $d
        | [$name, $ar, $d[0].grad_norm, $d[1].grad_norm, ($d | map(.grad_norm) | max),
           ($d[-20:] | map(.grad_norm) | mean), ($d[-20:] | map(.ce_per_masked) | mean)]
        | map(if type == "number" then . * 100 | round / 100 else . end) | @tsv' "$out/$1/metrics.jsonl" |
        awk -F'\t' '{ printf "%-18s %8s %8s %8s %8s %8s %8s\n", $1, $2, $3, $4, $5, $6, $7 }'
}

printf '%-18s %8s %8s %8s %8s %8s %8s\n' variant 'norm AR' first second largest 'last 20' 'CE/mask'
variant b1 40 true block_diffusion 1
variant b4 40 true block_diffusion 4
variant b8 40 true block_diffusion 8
variant b32 40 true block_diffusion 32
variant full 40 true full_diffusion
variant b4-no-warmup 0 true block_diffusion 4
variant b4-no-clip 40 false block_diffusion 4
variant b4-neither 0 false block_diffusion 4
