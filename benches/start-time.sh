#!/usr/bin/env bash
# How long two builds of demask take from their start to an answer's first token, in turn on the same machine.
#   benches/start-time.sh MODEL BASE HEAD [ROUNDS]     BASE and HEAD are programs; 9 rounds if not said
# Prints each one's median, and the median of HEAD/BASE within a round: once with what the first start left behind (the
# driver's compiled shaders, the choice of kernels, the file in memory), and once without a choice of kernels, as the
# first start with a model on a device finds it. A program may be a runner and its program in one word, in quotes.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
model=$1 base=$2 head=$3 rounds=${4:-9}
command -v python3 > /dev/null || { echo "start-time.sh: no python3; install it" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# once PROGRAM CACHE: seconds from start to first token.
once() {
  local start=$EPOCHREALTIME
  # The words of a program are its caller's.
  # shellcheck disable=SC2086
  DEMASK_CACHE=$2 $1 generate --model "$model" --prompt 'def add(a, b):' --max-tokens 1 --mode ar --quiet > /dev/null
  python3 -c "print($EPOCHREALTIME - $start)"
}

# table NAME FILE: FILE has a line "base head" for each round.
table() {
  python3 - "$1" "$2" << 'END'
import statistics, sys
rows = [tuple(map(float, line.split())) for line in open(sys.argv[2])]
base, head = (statistics.median(column) for column in zip(*rows))
ratio = statistics.median(h / b for b, h in rows)
print(f"{sys.argv[1]:<28} base {base:6.2f} s   head {head:6.2f} s   head/base {ratio:.2f}  ({len(rows)} rounds)")
END
}

mkdir "$work/base" "$work/head"
once "$base" "$work/base" > /dev/null
once "$head" "$work/head" > /dev/null
for _ in $(seq "$rounds"); do
  echo "$(once "$base" "$work/base") $(once "$head" "$work/head")" >> "$work/warm"
done
table "everything warm" "$work/warm"
for _ in $(seq 3); do
  echo "$(once "$base" "$(mktemp -d -p "$work")") $(once "$head" "$(mktemp -d -p "$work")")" >> "$work/first"
done
table "no choice of kernels yet" "$work/first"
