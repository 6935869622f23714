#!/usr/bin/env bash
# Measures demask on a machine with a GPU that has neither Rust nor a network: programs are built and packed here,
# carried there, and run there in one call.
#   benches/gpu-carried.sh pack [FOLDER]          here: builds, strips and packs into FOLDER.tar.gz (.gpu.tar.gz)
#   benches/gpu-carried.sh run PACK OUT [PART…]   there: runs all parts, or those named, in this order; logs go to OUT
# Parts: machine doctor tests kernels decode torch train decode8b. Each has its own limit of time, a part that fails
# does not stop the others, and the end of every log is printed last. There it needs bash, a Vulkan driver and its
# loader; python3 with torch for `torch`, with numpy for `decode8b` (8B-shaped weights are made there).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
tests=(gpu ops model decode sampling batch optimizer score)

die() { echo "gpu-carried.sh: $*" >&2; exit 2; }

pack() {
  local to=${1:-.gpu} name built
  command -v cargo > /dev/null || die "no cargo; install Rust 1.95 or later"
  mkdir -p "$to/bin" || exit
  cargo build --release --bins || exit
  built=$(cargo test --release -p demask-tests --no-run 2>&1) || { echo "$built" >&2; exit 1; }
  for name in "${tests[@]}"; do
    # `Executable tests/ops.rs (target/release/deps/ops-0123)`
    strip -o "$to/bin/test-$name" "$(sed -nE "s|.*tests/$name\.rs \((.*)\)|\1|p" <<< "$built")" || exit
  done
  strip -o "$to/bin/demask" target/release/demask || exit
  # Tests look for their goldens where the tree was when they were built.
  pwd > "$to/tree"
  if [ ! -e "$to/dataset" ]; then
    # A tokenizer as large as SmolLM2's and some million tokens, of crates that the build fetched.
    local -a crates
    mapfile -t crates < <(find "${CARGO_HOME:-$HOME/.cargo}"/registry/src -mindepth 2 -maxdepth 2 -type d \
      '(' -name 'wgpu-*' -o -name 'naga-*' -o -name 'parquet-*' -o -name 'arrow-*' -o -name 'serde*' -o -name 'reg*' \
      -o -name 'tokenizers-*' -o -name 'clap*' -o -name 'syn-*' -o -name 'zerocopy-*' -o -name 'rustix-*' ')')
    [ ${#crates[@]} != 0 ] || die "no fetched crates; set CARGO_HOME"
    target/release/demask tokenizer train "${crates[@]}" --vocab-size 49152 --out "$to/tokenizer" || exit
    target/release/demask data build "${crates[@]}" --tokenizer "$to/tokenizer" --out "$to/dataset" || exit
  fi
  tar -czf "$to.tar.gz" -C "$to" . || exit
  du -h "$to.tar.gz"
}

# part SECONDS NAME COMMAND …: runs it within its limit and keeps its output as NAME.log.
part() {
  local limit=$1 name=$2 start=$SECONDS status
  shift 2
  wanted "$name" || return 0
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  echo "== $name: exit $status after $((SECONDS - start)) s" | tee -a "$out/$name.log"
  [ $status = 0 ] || failed+=("$name")
  done+=("$name")
}

wanted() {
  local one
  [ ${#parts[@]} = 0 ] && return 0
  for one in "${parts[@]}"; do case $1 in "$one" | "$one"-*) return 0 ;; esac; done
  return 1
}

machine() {
  uname -srm
  lscpu | grep -E '^(Model name|CPU\(s\))'
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2> /dev/null
  ldconfig -p | grep libvulkan
}

# All at once: they are checked, not timed.
run_tests() {
  local name status=0
  local -A pids
  for name in "${tests[@]}"; do
    REQUIRE_GPU=1 timeout 110 "$from/bin/test-$name" > "$out/test-$name.log" 2>&1 &
    pids[$name]=$!
  done
  for name in "${tests[@]}"; do
    if ! wait "${pids[$name]}"; then
      status=1
      echo "FAILED $name"
      grep -E 'panicked|FAILED|error' -A3 "$out/test-$name.log" | head -40
    fi
    grep -E '^test result|SKIPPED' "$out/test-$name.log" | sed "s/^/$name: /"
  done
  return $status
}

train() {
  cp benches/gpu/step-135m.toml "$from/step-135m.toml"
  rm -rf "$out/run"
  "$from/bin/demask" train "$from/step-135m.toml" --out "$out/run"
  local status=$?
  cp "$out"/run/*.jsonl "$out/" 2> /dev/null
  rm -rf "$out/run"
  return $status
}

decode_8b() {
  python3 benches/random-model.py "$big" --layers 4 || return
  local precision
  for precision in f16 q4; do
    "$from/bin/demask" bench decode --model "$big" --precision $precision --cache f16 --threshold 0 || return
  done
}

run() {
  from=$(mktemp -d) out=$(realpath "${2:?OUT}")
  tar -xzf "${1:?PACK}" -C "$from" || exit
  shift 2
  parts=("$@") failed=() done=()
  big=$(mktemp -d)/8b
  local tree name
  tree=$(cat "$from/tree")
  [ -e "$tree" ] || { mkdir -p "$(dirname "$tree")" && ln -s "$PWD" "$tree"; }
  part 10 machine "$0" machine-of
  part 60 doctor "$from/bin/demask" doctor
  part 30 doctor-json "$from/bin/demask" doctor --no-tune --json
  part 120 tests "$0" tests-of "$from" "$out"
  part 90 kernels "$from/bin/demask" bench run --suite full --budget 60 --json "$out/kernels.json" --quiet
  part 60 decode "$from/bin/demask" bench decode --model trainer/models/small-coder
  part 60 torch python3 benches/gpu/torch_limits.py --train-config benches/peers/src/smollm2_135m.json \
    --json "$out/torch.json"
  part 90 train "$0" train-of "$from" "$out"
  part 120 decode8b "$0" decode8b-of "$from" "$out" "$big"
  rm -rf "$big" "$from"
  for name in ${done[@]+"${done[@]}"}; do
    echo "======== $name"
    tail -n 45 "$out/$name.log" | cut -c 1-180
  done
  [ ${#failed[@]} = 0 ] || { echo "== failed: ${failed[*]}"; return 1; }
}

case ${1:-} in
  pack) shift; pack "$@" ;;
  run) shift; run "$@" ;;
  machine-of) machine ;;
  tests-of) from=$2 out=$3; run_tests ;;
  train-of) from=$2 out=$3; train ;;
  decode8b-of) from=$2 out=$3 big=$4; decode_8b ;;
  *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
