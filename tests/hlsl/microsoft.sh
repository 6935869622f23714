#!/usr/bin/env bash
# Do Microsoft's compilers take every kernel that the tests ran? Compiles the HLSL that run.sh left in a folder: FXC
# what naga wrote for shader model 5.1, DXC what it wrote for 6.2. Prints one line a file and a count; exit code 1 if
# one is refused. The compilers are those in the npm package webgpu (Dawn for Node.js), started under Wine.
#
#   tests/hlsl/microsoft.sh FOLDER        FOLDER was given to run.sh -k
set -euo pipefail
die() { echo "microsoft.sh: $1" >&2; exit 2; }
for tool in npm:npm wine64:wine64 x86_64-w64-mingw32-gcc:gcc-mingw-w64-x86-64; do
    command -v "${tool%%:*}" > /dev/null || [ -x "/usr/lib/wine/${tool%%:*}" ] ||
        die "no ${tool%%:*}; apt-get install ${tool#*:}"
done
[ $# = 1 ] && [ -d "$1" ] || { sed -n '2,7p' "$0" >&2; exit 2; }
sources=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
wine=$(command -v wine64 || echo /usr/lib/wine/wine64)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && npm pack --silent webgpu@0.6.2 > /dev/null && tar -xzf webgpu-*.tgz package/dist/win32-x64)
cp "$folder"/package/dist/win32-x64/*.dll "$folder"
x86_64-w64-mingw32-gcc -O1 -Wall -o "$folder/microsoft.exe" "$here/microsoft.c"
export WINEPREFIX=$folder/wine WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml="
cd "$folder"
status=0
# Paths of Unix are drive Z there; the compilers lie beside the program, before Wine's own.
(cd "$sources" && WINEDLLOVERRIDES="d3dcompiler_47=n;$WINEDLLOVERRIDES" xargs -n 40 "$wine" "$folder/microsoft.exe" \
    "Z:$folder/d3dcompiler_47.dll" "Z:$folder/dxcompiler.dll" < <(ls -- *.hlsl)) > raw || status=$?
tr -d '\r' < raw | tee said
[ "$status" -le 1 ] || [ "$status" = 123 ] || die "the compilers did not run (status $status)"
echo "$(grep -c '	ok	' said || true) compiled, $(grep -c '	refused	' said || true) refused"
[ -s said ] && ! grep -q '	refused	' said
