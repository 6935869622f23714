#!/usr/bin/env bash
# Does `demask train --plan` tell what a run takes? Recipes are planned in an empty folder, then trained for two steps a
# phase; prints the planned and the measured peak of each. Exit code 1 if one is off by more than five per cent.
#
#   benches/plan-trial.sh [-r RUNNER] [-w FOLDER]
#
# -r runs demask through RUNNER (another driver, say). The text is this workspace's own. Needs jq.
set -euo pipefail
cd "$(dirname "$0")/.."

runner="" work=target/plan-trial
while getopts r:w: option; do
    case $option in
        r) runner=$OPTARG ;; w) work=$OPTARG ;; *) sed -n '2,7p' "$0" >&2; exit 2 ;;
    esac
done
demask=${CARGO_TARGET_DIR:-$PWD/target}/release/demask
command -v jq > /dev/null || { echo "plan-trial.sh: no jq; install it" >&2; exit 2; }
[ -x "$demask" ] || { echo "plan-trial.sh: no $demask; cargo build --release makes it" >&2; exit 2; }
rm -rf "$work" && mkdir -p "$work"
work=$(cd "$work" && pwd)
export DEMASK_CACHE=$work/cache

# full NAME VOCABULARY HIDDEN FEED_FORWARD LAYERS LENGTH BATCH MICRO_BATCH MOMENTS RECOMPUTE OBJECTIVES [MORE DATA]
full() {
    recipe "$6" "$7" "$8" "$9" "${11}" "${12:-}" > "$work/$1.toml" <<END
recompute = ${10}
[model.fresh]
vocab_size = $2
hidden_size = $3
intermediate_size = $4
layers = $5
heads = 8
kv_heads = 4
END
    trial "$1"
}

# adapter NAME BASE DORA MICRO_BATCH RECOMPUTE: of the model that the first trial trained.
adapter() {
    recipe 256 8 "$4" f32 "block_diffusion" > "$work/$1.toml" <<END
recompute = $5
lora = { base = "$2", dora = $3 }
model.from = "$work/ar/model"
END
    trial "$1"
}

# recipe LENGTH BATCH MICRO_BATCH MOMENTS OBJECTIVES [MORE DATA]; its first lines are on stdin.
recipe() {
    cat
    cat <<END
[data]
paths = ["$PWD/engine/src", "$PWD/trainer/src", "$PWD/tests", "$PWD/cli/src"]
extensions = ["rs"]
length = $1
${6:-}
[optimizer]
batch = $2
micro_batch = $3
moments = "$4"
END
    for objective in $5; do
        printf '[[phase]]\nobjective = "%s"\nsteps = 2\nlr = 1e-4\n' "$objective"
    done
}

failed=0
printf '| recipe | parameters | planned | measured | off by |\n|---|---|---|---|---|\n'
trial() {
    $runner "$demask" train "$work/$1.toml" --out "$work/$1" --plan --json --quiet > "$work/$1.plan"
    $runner "$demask" train "$work/$1.toml" --out "$work/$1" --json --quiet > "$work/$1.run"
    jq -rs --arg name "$1" '
        def tenths: . * 10 | round / 10;
        def mib: "\(. / 1048576 | tenths) MiB";
        .[0].peak_bytes as $planned | .[1].peak_bytes as $measured
        | (($planned / $measured - 1) * 100) as $off
        | "| \($name) | \(.[1].parameters / 1e6 | tenths) M | \($planned | mib) | \($measured | mib) "
        + "| \($off * 100 | round / 100) % |", ($off | fabs <= 5)' "$work/$1.plan" "$work/$1.run" > "$work/$1.row"
    head -n 1 "$work/$1.row"
    [ "$(tail -n 1 "$work/$1.row")" = true ] || failed=1
}

full ar                         4096 256  704 6 256 8 4 f32  false "ar"
full block-micro-2              4096 256  704 6 256 4 2 f32  false "block_diffusion"
full block-recompute-8bit       8192 384 1024 8 256 4 4 8bit true  "block_diffusion"
full full-8bit                  8192 256 704 4 256 4 2 8bit false "full_diffusion"
full curriculum-recompute       4096 320  896 6 512 2 1 f32  true  "ar block_diffusion" "document_mask = true"
full causal-wide                4096 512 1408 4 128 8 8 f32  false "causal_diffusion"
adapter lora-f32               f32  false 8 false
adapter lora-q8                q8   false 4 false
adapter dora-q4-recompute      q4   true  8 true
exit $failed
