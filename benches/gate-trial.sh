#!/usr/bin/env bash
# Does the gate hold on this machine? Twenty comparisons of a build with itself must report no regression, and of twenty
# comparisons with a build in which one kernel does ten per cent more work at least nineteen must report it. Half of
# each runs on the machine as it is, half beside busy loops, one a core.
#
#   benches/gate-trial.sh [-n 20] [-t SECONDS] [-s SUITE] [-r RUNNER] [-m ab|json|both] [-w FOLDER]
#
# -r runs each program through RUNNER (another driver, say). The programs are built once into FOLDER (target/gate-trial)
# and kept. Prints one line a comparison; exit code 1 if the gate does not hold.
set -euo pipefail
cd "$(dirname "$0")/.."

times=20 budget=20 suite="rms_norm,add [512" runner="" mode=ab work=target/gate-trial
while getopts n:t:s:r:m:w: option; do
    case $option in
        n) times=$OPTARG ;; t) budget=$OPTARG ;; s) suite=$OPTARG ;; r) runner=$OPTARG ;;
        m) mode=$OPTARG ;; w) work=$OPTARG ;; *) sed -n '2,9p' "$0" >&2; exit 2 ;;
    esac
done
command -v perl > /dev/null || { echo "gate-trial.sh: no perl; install it" >&2; exit 2; }
command -v cargo > /dev/null || { echo "gate-trial.sh: no cargo; install Rust 1.95 or later" >&2; exit 2; }
mkdir -p "$work"
work=$(cd "$work" && pwd)
target=${CARGO_TARGET_DIR:-$PWD/target}

# The slow build is the base with the text of one kernel edited inside the binary, at the same length, so that the two
# differ in nothing else: rms_norm runs its second loop, about half of its work, twice for every sixth row. That makes
# it about ten per cent slower whatever the compiler; the first measurement below says how much it is here.
slow_down() {
    perl -0777 -pe '
        BEGIN {
            $from = "for (var d = lane; d < p.pieces; d += WG) {\n        let i = row * p.pieces + d;\n"
                . "        let at = quad_of_piece(i);\n"
                . "        let v = piece(x[at], i) * scale * piece(w[quad_of_piece(d)], d);\n"
                . "        if WIDE == 1u {\n            y[at] = v;\n        } else {\n"
                . "            y[at][i % 4u] = v.x;\n        }\n    }";
            $to = "for(var t=u32(row%6u>0u);t<2u;t++){for(var d=lane;d<p.pieces;d+=WG){let i=row*p.pieces+d;"
                . "let at=quad_of_piece(i);let v=piece(x[at],i)*scale*piece(w[quad_of_piece(d)],d);"
                . "if WIDE==1u{y[at]=v;}else{y[at][i%4u]=v.x;}}}";
            length($to) <= length($from) or die "gate-trial: the slow kernel is longer\n";
            $to .= " " x (length($from) - length($to));
        }
        $n += s/\Q$from\E/$to/g;
        END { $n == 1 or die "gate-trial: found the kernel $n times in the binary\n" }' "$1" > "$2"
    chmod +x "$2"
}

if [ ! -x "$work/base" ]; then
    cargo build --release --quiet -p demask
    cp "$target/release/demask" "$work/base"
fi
slow_down "$work/base" "$work/slow"
for build in base slow; do
    printf '#!/bin/sh\nexec %s "%s" "$@"\n' "$runner" "$work/$build" > "$work/run-$build"
    chmod +x "$work/run-$build"
done

loops=()
busy() {
    for _ in $(seq "$(nproc)"); do
        (while :; do head -c 20000000 /dev/zero | cksum > /dev/null; done) &
        loops+=($!)
    done
}
quiet() {
    [ ${#loops[@]} -eq 0 ] && return
    kill "${loops[@]}" 2> /dev/null || true
    wait "${loops[@]}" 2> /dev/null || true
    loops=()
}
trap quiet EXIT

ab() {
    "$work/run-$1" bench ab "$work/run-$1" "$work/run-$2" --suite "$suite" --max-regress 5% --budget "$budget" "${@:3}"
}
json() {
    "$work/run-$1" bench run --suite "$suite" --budget "$budget" --quiet --json "$work/$1.json" &&
        "$work/run-$2" bench run --suite "$suite" --budget "$budget" --quiet --json "$work/new.json" &&
        "$work/run-$1" bench compare "$work/$1.json" "$work/new.json" --max-regress 5%
}

echo "slow-down, measured at length: "
"$work/run-base" bench ab "$work/run-base" "$work/run-slow" --suite rms_norm --max-regress 10% \
    --budget $((4 * budget)) --quiet | grep -E '^rms_norm' || true

held=0
for how in ab json; do
    [ "$mode" = "$how" ] || [ "$mode" = both ] || continue
    false_alarms=0 caught=0
    for i in $(seq "$times"); do
        state=idle
        if [ "$i" -gt $((times / 2)) ]; then
            state=loaded
            [ ${#loops[@]} -gt 0 ] || busy
        fi
        for new in base slow; do
            code=0
            table=$("$how" base "$new" 2> "$work/errors") || code=$?
            if [ "$code" -gt 1 ] || ! grep -q '^rms_norm' <<< "$table"; then
                echo "gate-trial: the comparison itself failed:" >&2
                cat "$work/errors" >&2
                exit 2
            fi
            # Only the kernel that was slowed counts as caught; any other is a false alarm.
            slow=$(grep -m 1 -c '^rms_norm.*REGRESSION' <<< "$table" || true)
            other=$(grep 'REGRESSION' <<< "$table" | grep -vc '^rms_norm\|;' || true)
            [ "$new" = base ] && false_alarms=$((false_alarms + slow + other))
            [ "$new" = slow ] && caught=$((caught + slow)) && false_alarms=$((false_alarms + other))
            printf '%-4s %2d %-6s load %s  base against %-4s  exit %d  %s\n' "$how" "$i" "$state" \
                "$(cut -d' ' -f1 /proc/loadavg 2> /dev/null || echo ?)" "$new" "$code" \
                "$(grep '^rms_norm' <<< "$table" | sed 's/  */ /g' | paste -sd '|')"
        done
    done
    quiet
    echo "$how: $false_alarms false alarms in $((2 * times)) comparisons, $caught of $times slow builds caught"
    [ "$false_alarms" -eq 0 ] && [ "$caught" -ge $((times * 19 / 20)) ] || held=1
done
exit $held
