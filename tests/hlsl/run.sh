#!/usr/bin/env bash
# Runs the cases of ops, models and decoding with every kernel taken through DirectX's language: naga's HLSL, read by
# glslang, as SPIR-V on Vulkan (tests/src/hlsl.rs). Prints a table of the kernels; exit code 1 if a case fails or a
# kernel is refused. Minutes, so outside the gate.
#
#   tests/hlsl/run.sh [-r RUNNER] [-o TABLE.md] [-k FOLDER] [TEST...]     ops model decode unless named
#
# -r runs the tests through RUNNER (another driver, say), -k keeps the HLSL. Needs glslangValidator.
set -euo pipefail
cd "$(dirname "$0")/../.."

runner="" table="" keep=""
while getopts r:o:k: option; do
    case $option in
        r) runner=$OPTARG ;; o) table=$OPTARG ;; k) keep=$OPTARG ;; *) sed -n '2,9p' "$0" >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
command -v glslangValidator > /dev/null ||
    { echo "run.sh: no glslangValidator; apt-get install glslang-tools" >&2; exit 2; }
[ $# -gt 0 ] || set -- ops model decode

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tests=()
for test in "$@"; do tests+=(--test "$test"); done
kernels=${keep:-$folder/kernels}
rm -rf "$kernels" && mkdir -p "$kernels"
log=$kernels/log.tsv
status=0
cargo test --release "${tests[@]}" --no-run
[ -z "$runner" ] || export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$runner
DEMASK_HLSL=$(realpath "$kernels") DEMASK_ADAPTER=vulkan REQUIRE_GPU=1 \
    cargo test --release "${tests[@]}" --no-fail-fast -- --nocapture > "$folder/said" 2>&1 || status=1
grep -E '^test |^test result|cases on|differ|glslang|naga' "$folder/said" >&2 || true

# KERNEL, how many variants were translated and ran, how many were refused and why.
{
    echo "| kernel | variants that ran | bytes of HLSL | refused |"
    echo "|---|---|---|---|"
    sort -u "$log" | awk -F'\t' '
        { names[$1] }
        $3 == "ok" { ran[$1]++; if ($4 > most[$1]) most[$1] = $4 }
        $3 == "refused" { refused[$1]++; why[$1] = $4 }
        END { for (n in names) printf "| %s | %d | %d | %s |\n", n, ran[n], most[n],
                  refused[n] ? refused[n] ": " substr(why[n], 1, 160) : "" }' | sort
    for file in shaders/*.wgsl; do
        name=$(basename "$file" .wgsl)
        cut -f1 "$log" | grep -qx "$name" || echo "| $name | not run here | | |"
    done
} | tee "$folder/table"
[ -z "$table" ] || cp "$folder/table" "$table"
refused=$(cut -f3 "$log" | grep -c '^refused' || true)
[ $status = 0 ] && outcome=passed || outcome=FAILED
echo "$(grep -c '	ok	' "$log" || true) translations, $refused refused; tests: $outcome"
[ $status = 0 ] && [ "$refused" = 0 ]
