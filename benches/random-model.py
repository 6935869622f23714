#!/usr/bin/env python3
"""A checkpoint of random weights in the shape of Stable-DiffCoder-8B, to see what a model of that size takes.

    python3 benches/random-model.py OUT [--layers 32] [--tokenizer FOLDER]

Writes a Hugging Face folder as the published one is laid out: config.json, and bf16 weights in four files with an
index, 16.5 GB. The weights are one random block over and over, of the published deviation, so that the values that pass
through the network stay finite. FOLDER's tokenizer is copied beside it. Needs numpy.
"""
import argparse
import json
import shutil
import struct
import sys
from pathlib import Path

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy")

CONFIG = {
    "architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "attention_bias": False,
    "bos_token_id": 0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.009882118, "intermediate_size": 14336, "max_position_embeddings": 8192, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 155136,
}
FILES = 4


def tensors(config):
    d, f = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", [config["vocab_size"], d]
    for i in range(config["num_hidden_layers"]):
        parts = {"input_layernorm": [d], "self_attn.q_proj": [q, d], "self_attn.k_proj": [kv, d],
                 "self_attn.v_proj": [kv, d], "self_attn.o_proj": [d, q], "post_attention_layernorm": [d],
                 "mlp.gate_proj": [f, d], "mlp.up_proj": [f, d], "mlp.down_proj": [d, f]}
        for part, shape in parts.items():
            yield f"model.layers.{i}.{part}.weight", shape
    yield "model.norm.weight", [d]
    yield "lm_head.weight", [config["vocab_size"], d]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": args.layers}
    args.out.mkdir(parents=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if args.tokenizer:
            shutil.copy(args.tokenizer / name, args.out)
    values = np.random.default_rng(0).normal(0, config["initializer_range"], 1 << 24).astype("<f4")
    # bf16 is the upper half of f32. An odd length, so that no two rows are the same.
    block = (values.view("<u4") >> 16).astype("<u2")[:-1].tobytes()
    one = struct.pack("<H", 0x3F80)
    every = list(tensors(config))
    total = sum(2 * int(np.prod(shape)) for _, shape in every)
    files, size = [[]], 0
    for name, shape in every:
        if size >= total / FILES:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    index = {}
    for number, part in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, offset = {}, 0
        for name, shape in part:
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            index[name], offset = file, end
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with open(args.out / file, "wb") as out:
            out.write(struct.pack("<Q", len(head)) + head)
            for name, shape in part:
                left = 2 * int(np.prod(shape))
                if len(shape) == 1:
                    out.write(one * (left // 2))
                    continue
                while left > 0:
                    left -= out.write(block[:left])
        print(file)
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
