#!/usr/bin/env bash
# Downloads the pinned sources with the registries' own clients and keeps only the files of the six languages:
#   OUT/{python,rust,c,javascript,php,csharp}/PACKAGE/...  training text
#   OUT/older/PACKAGE/...                                  earlier releases, read by sft.py alone
# A finished part is skipped on the next run.
set -euo pipefail
export LC_ALL=C

usage="usage: fetch.sh OUT [--allow-changed]"
die() { # WHAT REMEDY
    printf 'fetch.sh: %s\n  remedy: %s\n' "$1" "$2" >&2
    exit 1
}

out= allow_changed=
for arg in "$@"; do
    case $arg in
        --allow-changed) allow_changed=yes ;;
        -h | --help) echo "$usage"; exit 0 ;;
        -*) die "unknown option $arg" "$usage" ;;
        *) [[ -z $out ]] || die "more than one folder given: $out and $arg" "$usage"; out=$arg ;;
    esac
done
[[ -n $out ]] || die "no output folder given" "$usage"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$out/.work

need() { # TOOL REMEDY
    command -v "$1" >/dev/null || die "$1 was not found" "$2"
}

# Copies the files with the given extensions, keeping their folders, and replaces what was there.
take() { # FROM TO EXTENSION...
    local from=$1 to=$2 names=() ext
    shift 2
    for ext in "$@"; do names+=(-o -name "*.$ext"); done
    rm -rf "$to"
    # A crate without a single file of its language must not leave an empty folder behind.
    (cd "$from" && find . -type f \( "${names[@]:1}" \) -print0 | sort -z) >"$work/list"
    [[ -s $work/list ]] || return 0
    mkdir -p "$to"
    tar -C "$from" --null -T "$work/list" -cf - | tar -C "$to" -xf - --no-same-owner
}

# Files under licences that are not permissive, inside packages that otherwise are.
copyleft=(
    c/lz4-sys/liblz4/{examples,ossfuzz,programs,tests}              # GPL-2.0; only lib is BSD
    javascript/mathjs/package/lib/{cjs,esm}/function/algebra/sparse # LGPL-2.1
    {python,older}/networkx/networkx/algorithms/bipartite/matching.py # partly CC-BY-SA-3.0
    python/lark/lark/__pyinstaller                                  # GPL-2.0
    python/lark/lark/tools/standalone.py                            # MPL-2.0
    python/setuptools/setuptools/_vendor                            # among others one LGPL-3.0 package
    python/textual/textual/demo/game.py                             # quotes a CC-BY-SA-4.0 program
)

# Runs one part unless it was finished before.
part() { # NAME FOLDERS COMMAND...
    local name=$1 folders=$2 folder report= start=$SECONDS
    shift 2
    if [[ -f $out/.done/$name ]]; then
        echo "$name: already complete"
        return
    fi
    rm -rf "$work"
    mkdir -p "$work"
    "$@"
    (cd "$out" && rm -rf "${copyleft[@]}")
    rm -rf "$work"
    touch "$out/.done/$name"
    for folder in $folders; do report+="; $folder now has $(count "$folder")"; done
    echo "$name: done in $((SECONDS - start)) s$report"
}

# What landed in a language folder: packages, files, MB.
count() { # LANGUAGE
    local dir=$out/$1
    printf '%s packages, %s files, %s MB\n' "$(find "$dir" -mindepth 1 -maxdepth 1 -type d | wc -l)" \
        "$(find "$dir" -type f | wc -l)" \
        "$(find "$dir" -type f -printf '%s\n' | awk '{ n += $1 } END { printf "%.1f", n / 1e6 }')"
}

# Wheels are zip files, so nothing is built and no code of a package runs. The tags are spelt out: what comes
# must not depend on the Python or the platform of this machine.
wheels() { # REQUIREMENTS LANGUAGE-FOLDER
    local wheel name
    need python3 "install Python 3 with pip"
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip" "install it (on Debian: python3-pip)"
    python3 -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
        --python-version 311 --implementation cp --abi cp311 --abi abi3 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform any --dest "$work/wheels" -r "$here/$1" ||
        die "pip could not download every wheel of $1" "see pip's message above; run again when PyPI is reachable"
    for wheel in "$work"/wheels/*.whl; do
        name=${wheel##*/}
        name=${name%%-*}
        name=${name,,}
        name=${name//_/-}
        rm -rf "$work/unpacked"
        python3 -m zipfile -e "$wheel" "$work/unpacked"
        take "$work/unpacked" "$out/$2/$name" py
    done
}

# The crates that carry a C library; of these only the C files are kept, of all others only the Rust files.
c_crates=" bzip2-sys libsodium-sys libz-sys lua-src lz4-sys openssl-src zstd-sys "
# Generated bindings, which are tables of constants; and smartstring, whose licence (MPL-2.0) is not permissive.
left_out="windows|windows[-_].*|winapi|winapi-.*|linux-raw-sys|web-sys|libc|smartstring|.*bindings"

crates() {
    local dir name
    need cargo "install Rust"
    mkdir -p "$work/crates"
    cp "$here/Cargo.toml" "$here/Cargo.lock" "$work/crates/"
    touch "$work/crates/lib.rs"
    (cd "$work/crates" && cargo vendor --quiet --locked vendor >/dev/null) ||
        die "cargo vendor failed" "see cargo's message above; run again when the Rust registry is reachable"
    for dir in "$work"/crates/vendor/*/; do
        dir=${dir%/}
        name=${dir##*/}
        # cargo adds the version to the folder of all but the newest of several versions: one is enough.
        [[ $(awk -F'"' '/^name = /{ print $2; exit }' "$dir/Cargo.toml") == "$name" ]] || continue
        [[ $name =~ ^($left_out)$ ]] && continue
        if [[ $c_crates == *" $name "* ]]; then
            take "$dir" "$out/c/$name" c h
        else
            take "$dir" "$out/rust/$name" rs
        fi
    done
}

npm_packages() {
    local file name specs=()
    need npm "install Node.js with npm"
    while read -r _ file; do
        file=${file%.tgz}
        specs+=("${file%-*}@${file##*-}")
    done <"$here/javascript.sha256"
    mkdir -p "$work/packed"
    (cd "$work/packed" && npm pack --silent --ignore-scripts "${specs[@]}" >/dev/null) ||
        die "npm could not download every package of javascript.sha256" "run again when the npm registry is reachable"
    (cd "$work/packed" && sha256sum --check --quiet "$here/javascript.sha256") ||
        die "an npm package differs from its pin" "the files named above are not what javascript.sha256 pins"
    for file in "$work"/packed/*.tgz; do
        name=${file##*/}
        name=${name%-*}
        rm -rf "$work/unpacked"
        mkdir "$work/unpacked"
        tar -C "$work/unpacked" --no-same-owner -xzf "$file"
        if [[ $name == rxjs ]]; then
            # The compiled copies of the TypeScript would only repeat it.
            take "$work/unpacked" "$work/rxjs" ts
            rm -rf "$out/javascript/rxjs"
            mkdir -p "$out/javascript/rxjs"
            mv "$work/rxjs/package/src" "$out/javascript/rxjs/src"
        else
            take "$work/unpacked" "$out/javascript/$name" js mjs cjs
        fi
    done
}

apt() { # SUBCOMMAND...: apt with a state of its own, so that the system's lists and sources stay as they are
    apt-get -o Dir::State="$out/.apt" -o Dir::State::status=/dev/null -o Dir::Cache="$out/.apt/cache" \
        -o Dir::Etc::sourcelist="$out/.apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Acquire::Languages=none -o APT::Sandbox::User="$(id -un)" -qq "$@"
}

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
debian_index() {
    need apt-get "run on Debian or a Debian container; the other parts need no apt"
    [[ -f $keyring ]] || die "$keyring is missing" "apt-get install debian-archive-keyring"
    mkdir -p "$out/.apt/lists/partial" "$out/.apt/cache/archives/partial"
    # The archives that this system itself installs from, with their sources. Of equal versions apt takes the first, so
    # the security archive, which drops a tarball once the main one has it, comes behind.
    apt-get indextargets --format "deb-src [signed-by=$keyring] \$(REPO_URI) \$(RELEASE) \$(COMPONENT)" \
        'Created-By: Packages' 'Origin: Debian' | sort -ur >"$out/.apt/sources.list"
    [[ -s $out/.apt/sources.list ]] || die "apt knows no Debian archive" "run apt-get update on a Debian system"
    apt update || die "apt could not read Debian's source lists" "run again when Debian's archive is reachable"
}

# Debian keeps only the newest revision of a source; its upstream tarball stays the same until upstream's version
# changes, which is what the pin tells.
debian_source() { # SOURCE-PACKAGE; leaves the unpacked tarball in $work/unpacked
    local package=$1 pin file sum
    read -r pin file < <(grep "  ${package}_" "$here/debian.sha256") ||
        die "debian.sha256 has no line for $package" "restore the file"
    [[ -f $out/.apt/sources.list ]] || debian_index
    (cd "$work" && apt source --only-source --download-only --tar-only "$package") ||
        die "Debian no longer serves the source $package" "remove it from fetch.sh and debian.sha256, or find $file"
    local got=("$work/${package}"_*.orig.tar.*)
    sum=$(sha256sum "${got[0]}" | cut -d' ' -f1)
    if [[ $sum != "$pin" ]]; then
        [[ -n $allow_changed ]] ||
            die "Debian now serves ${got[0]##*/}, the pin is $file with sha256 $pin" \
                "run with --allow-changed to take it; the corpus is then not the documented one"
        echo "warning: took ${got[0]##*/} instead of the pinned $file" >&2
    fi
    rm -rf "$work/unpacked"
    mkdir "$work/unpacked"
    tar -C "$work/unpacked" --no-same-owner --strip-components=1 -xf "${got[0]}"
}

debian() { # LANGUAGE EXTENSION SOURCE-PACKAGE...
    local language=$1 ext=$2 package
    shift 2
    for package in "$@"; do
        debian_source "$package"
        take "$work/unpacked" "$out/$language/${package#php-}" "$ext"
    done
}

cpython_and_redis() {
    debian_source python3.11
    take "$work/unpacked/Lib" "$out/python/cpython" py
    take "$work/unpacked" "$out/c/cpython" c h
    debian_source redis
    take "$work/unpacked" "$out/c/redis" c h
}

# Other pins or another script make another corpus: what the old ones left must not stay beside it.
languages=(python rust c javascript php csharp older)
pins=$(cd "$here" && sha256sum fetch.sh *.txt Cargo.* *.sha256)
if [[ -f $out/.done/pins && $(<"$out/.done/pins") != "$pins" ]]; then
    echo "the pins have changed: starting afresh"
    (cd "$out" && rm -rf .done "${languages[@]}")
fi
mkdir -p "$out/.done"
printf '%s\n' "$pins" >"$out/.done/pins"

part rust-and-c "rust c" crates
part python python wheels requirements.txt python
part javascript javascript npm_packages
part php php debian php php symfony php-laravel-framework doctrine composer php-codesniffer phpunit
part csharp csharp debian csharp cs newtonsoft-json nunit
part cpython-and-redis "python c" cpython_and_redis
part older older wheels older.txt older
rm -rf "$out/.apt"

# The digest covers every path and every byte: equal digests, equal corpora.
printf '\n%-11s %8s %7s %9s  %s\n' folder packages files MB digest
for language in "${languages[@]}"; do
    read -r packages _ files _ mb _ < <(count "$language")
    digest=$(cd "$out/$language" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    printf '%-11s %8s %7s %9s  %s\n' "$language" "$packages" "$files" "$mb" "${digest:0:16}"
done
