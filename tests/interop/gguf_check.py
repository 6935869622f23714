"""A GGUF file that demask wrote, read by the gguf package (ggml-org): the same numbers as demask reads, bit for bit.

    gguf_check.py FILE.gguf FOLDER     FOLDER is `demask convert FILE.gguf FOLDER --type f32`

Prints the number of tensors and of values per type; exits with 1 where one differs.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

try:
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install -r tests/interop/requirements.txt")

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name):
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return WHOLE[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def safetensors(path):
    """Name to f32 array."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + length :]
    arrays = {}
    for name, info in header.items():
        assert info["dtype"] == "F32", f"{name} is {info['dtype']}; convert with --type f32"
        first, end = info["data_offsets"]
        arrays[name] = np.frombuffer(body[first:end], np.float32).reshape(info["shape"])
    return arrays


def halves(rows, head_dim):
    """Rows of q and k in Hugging Face's order: llama.cpp has the two halves of a head interleaved."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(rows.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    reader = GGUFReader(args.file)
    head_dim = int(reader.fields["llama.attention.key_length"].contents())
    ours = safetensors(args.folder / "model.safetensors")
    seen = collections.Counter()
    wrong = []
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        shape = [int(n) for n in reversed(tensor.shape)]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            values = halves(values, head_dim)
        name = hf_name(tensor.name)
        own = ours.pop(name)
        seen[tensor.tensor_type.name] += values.size
        if not np.array_equal(values.astype(np.float32), own):
            wrong.append((name, float(np.abs(values - own).max())))
    print(f"{len(reader.tensors)} tensors:", ", ".join(f"{n} values of {t}" for t, n in seen.items()))
    for name in ours:
        wrong.append((name, "missing"))
    for name, difference in wrong:
        print(f"{name} differs: {difference}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
