#!/usr/bin/env bash
# Everything that a machine with a real GPU is wanted for, in one call: build, tests on its adapter, kernel benches,
# a training step by kernel, the tables against the peers (PyTorch on CUDA among them, where it is there), and decoding
# with weights in the shape of Stable-DiffCoder-8B (16.5 GB of disk in FOLDER, removed afterwards).
#   benches/gpu.sh [--quick] [FOLDER]     FOLDER gets the logs and tables; runs/gpu if not given
# --quick does a little of each part, to show that all of them run. DEMASK_ADAPTER picks an adapter,
# DEMASK_PEERS_PYTHON a Python with torch and numpy. A part that fails does not stop the others; the exit status tells.
set -uo pipefail
quick=
[ "${1:-}" = --quick ] && { quick=1; shift; }
case ${1:-} in -*) echo "gpu.sh: unknown option $1; see the head of this file" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.." || exit
out=${1:-runs/gpu}
mkdir -p "$out" && out=$(realpath "$out") || exit
command -v cargo >/dev/null || { echo "gpu.sh: no cargo; install Rust 1.95 or later" >&2; exit 2; }
export DEMASK_PEERS_PYTHON=${DEMASK_PEERS_PYTHON:-python3}
failed=()

# part NAME COMMAND ...: runs it, shows its output and keeps it as NAME.log.
part() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: exit $status after $((SECONDS - start)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

machine() {
  uname -srm
  git rev-parse HEAD
  lscpu | grep -E '^(Model name|CPU\(s\))'
  if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; fi
}

peers=(cargo run --release --manifest-path benches/peers/Cargo.toml --)
tables=("${peers[@]}" all --markdown --save "$out/peers.jsonl")
part machine machine
part build cargo build --release
part doctor cargo run --quiet --release -- doctor
if [ $quick ]; then
  part tests cargo test --release -p demask-tests --test ops
  part ops cargo bench -p demask-benches --bench ops -- --quick 'matmul NT'
else
  part tests cargo test --release --workspace
  part ops cargo bench -p demask-benches --bench ops
fi
part prepare benches/peers/prepare.sh
part peers-build cargo build --release --manifest-path benches/peers/Cargo.toml
part peers "${tables[@]}" ${quick:+--quick}
model=benches/peers/.cache/random
[ -e $model/model.safetensors ] && part step cargo bench -p demask-benches --bench step -- "$model" train
part decode cargo run --quiet --release -- bench decode --model trainer/models/small-coder
rm -rf "$out/8b"
part random-8b "$DEMASK_PEERS_PYTHON" benches/random-model.py "$out/8b" ${quick:+--layers 1}
for precision in f16 q4; do
  part "decode-8b-$precision" cargo run --quiet --release -- bench decode --model "$out/8b" --precision $precision \
    --cache f16 --threshold 0.95 --threshold 0
done
rm -rf "$out/8b"

echo "== logs and tables are in $out"
[ ${#failed[@]} = 0 ] || { echo "== failed: ${failed[*]}" >&2; exit 1; }
