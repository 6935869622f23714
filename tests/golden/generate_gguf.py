#!/usr/bin/env python3
"""Tiny GGUF files in the types that demask reads and does not write, and a split one, with what they must give.

    generate_gguf.py [FOLDER]      default: gguf/ beside this script; the same bytes each time

Files are written and weights decoded by the gguf package (ggml-org); the forward pass is numpy's, in f64, on the rows
as llama.cpp stores them. expected.json has of each file the ids, the log-probability of each after the first, and of
each tensor the CRC-32 of its f32 values in Hugging Face's order. Needs gguf 0.19 and numpy.
"""

import json
import sys
import zlib
from pathlib import Path

try:
    import numpy as np
    from gguf import GGMLQuantizationType as T
    from gguf import GGUFReader, GGUFWriter, quants
except ImportError as missing:
    sys.exit(f"generate_gguf.py: {missing}; pip install gguf numpy")

HERE = Path(__file__).parent
VOCAB, HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 24, 2, 1, 16, 1e-5, 10000.0
IDS = [3, 17, 0, 9, 22, 5, 5, 11, 20, 1, 14, 8, 23, 2, 19, 6]
# What llama.cpp falls back to where rows are no multiple of 256.
FALLBACK = {T.Q2_K: T.IQ4_NL, T.Q3_K: T.IQ4_NL, T.IQ4_XS: T.IQ4_NL, T.Q5_K: T.Q5_1, T.Q4_K: T.Q5_0, T.Q6_K: T.Q8_0}
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def halves(values):
    return np.asarray(values, "<f2").view(np.uint8).reshape(-1, 2)


def iq4_nl(values):
    """Blocks of IQ4_NL: the nearest level under a scale that reaches the largest magnitude."""
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1) / 113).astype(np.float16)
    levels = np.abs(blocks[..., None] / scale.astype(np.float32)[:, None, None] - IQ4).argmin(axis=-1).astype(np.uint8)
    return np.concatenate([halves(scale), levels[:, :16] | levels[:, 16:] << 4], axis=1)


def of_256(kind, n_blocks, size, random):
    """Random blocks of 256: numbers of any bits, scales so that the values have about the deviation `size`."""
    raw = random.integers(0, 256, (n_blocks, 300), dtype=np.uint8)
    d = size * random.uniform(0.8, 1.2, n_blocks)
    if kind == T.Q2_K:
        # x = d s q - e m with s, m below 16, q below 4
        return np.concatenate([raw[:, :80], halves(d / 12), halves(d / 8)], axis=1)
    if kind == T.Q3_K:
        return np.concatenate([raw[:, :108], halves(d / 42)], axis=1)
    if kind == T.Q5_K:
        return np.concatenate([halves(d / 400), halves(d / 26), raw[:, :172]], axis=1)
    assert kind == T.IQ4_XS
    return np.concatenate([halves(d / 1300), raw[:, :134]], axis=1)


def blocks_of(kind, shape, size, random):
    """The type a tensor gets, and its bytes in rows."""
    values = random.normal(0, size, shape).astype(np.float32)
    if len(shape) == 1:
        return T.F32, 1 + values
    if shape[-1] % 256 != 0:
        kind = FALLBACK.get(kind, kind)
    if kind in FALLBACK:
        rows = of_256(kind, values.size // 256, size, random)
    elif kind == T.IQ4_NL:
        rows = iq4_nl(values)
    else:
        return kind, quants.quantize(values, kind)
    return kind, np.ascontiguousarray(rows.reshape(shape[0], -1))


def tensors(width, ffn, layers):
    yield "token_embd.weight", (VOCAB, width), 2 / width**0.5
    for layer in range(layers):
        for name, shape, size in [
            ("attn_norm", (width,), 0.1),
            ("attn_q", (HEADS * HEAD_DIM, width), 1.5 / width**0.5),
            ("attn_k", (KV_HEADS * HEAD_DIM, width), 1.5 / width**0.5),
            ("attn_v", (KV_HEADS * HEAD_DIM, width), 1 / width**0.5),
            ("attn_output", (width, HEADS * HEAD_DIM), 0.1),
            ("ffn_norm", (width,), 0.1),
            ("ffn_gate", (ffn, width), 1 / width**0.5),
            ("ffn_up", (ffn, width), 1 / width**0.5),
            ("ffn_down", (width, ffn), 0.1),
        ]:
            yield f"blk.{layer}.{name}.weight", shape, size
    yield "output_norm.weight", (width,), 0.1


def write(path, kind, width, ffn, layers, seed, **split):
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama", **split)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    for name, shape, size in tensors(width, ffn, layers):
        dtype, data = blocks_of(kind, shape, size, random)
        writer.add_tensor(name, data, raw_dtype=None if dtype in (T.F32, T.F16) else dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(paths):
    """Each tensor's f32 values as the package decodes them, and the number of tensors of each type."""
    weights, types = {}, {}
    for path in paths:
        for tensor in GGUFReader(path).tensors:
            shape = [int(n) for n in reversed(tensor.shape)]
            weights[tensor.name] = quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return weights, types


def hugging_face(name, values):
    """Rows of q and k in Hugging Face's order: llama.cpp has the two halves of a head interleaved."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return values
    heads = values.reshape(-1, HEAD_DIM // 2, 2, values.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(values.shape)


def norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


def rotate(x):
    """[T, heads, HEAD_DIM]: neighbours are turned, as llama.cpp does with rows in its order."""
    angles = np.arange(len(x))[:, None] * THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def log_probabilities(weights):
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    x = w["token_embd.weight"][IDS]
    n = len(IDS)
    hidden = np.triu(np.full((n, n), -np.inf), 1)
    for layer in range(sum(name.endswith("attn_q.weight") for name in w)):
        part = {name.split(".")[2]: values for name, values in w.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x, part["attn_norm"])
        q = rotate((h @ part["attn_q"].T).reshape(n, HEADS, HEAD_DIM))
        k = rotate((h @ part["attn_k"].T).reshape(n, KV_HEADS, HEAD_DIM))
        v = (h @ part["attn_v"].T).reshape(n, KV_HEADS, HEAD_DIM)
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM) + hidden
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1) @ part["attn_output"].T
        h = norm(x, part["ffn_norm"])
        gate, up = h @ part["ffn_gate"].T, h @ part["ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part["ffn_down"].T
    logits = norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [float(logits[i, IDS[i + 1]]) for i in range(n - 1)]


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    kinds = [T.Q5_0, T.Q5_1, T.IQ4_NL, T.MXFP4, T.Q2_K, T.Q3_K, T.Q5_K, T.IQ4_XS]
    for seed, kind in enumerate(kinds):
        path = folder / f"{kind.name.lower()}.gguf"
        wide = kind in FALLBACK
        write(path, kind, 256 if wide else 32, 32 if wide else 64, 1 if wide else 2, seed)
        expected[path.name] = [path]
    # The first part holds metadata alone, as gguf-split leaves it when asked to.
    for old in folder.glob("split-*.gguf"):
        old.unlink()
    write(folder / "split.gguf", T.Q8_0, 32, 64, 1, 99, split_max_tensors=5, small_first_shard=True)
    parts = sorted(folder.glob("split-*.gguf"))
    expected[parts[0].name] = parts
    for name, paths in expected.items():
        weights, types = read(paths)
        flat = {n: hugging_face(n, values).astype("<f4").tobytes() for n, values in weights.items()}
        expected[name] = {
            "types": types,
            "crc32": {n: zlib.crc32(data) for n, data in flat.items()},
            "logprobs": [round(p, 7) for p in log_probabilities(weights)],
        }
        print(name, types, np.round(expected[name]["logprobs"][:4], 3), sum(p.stat().st_size for p in paths))
    text = json.dumps({"ids": IDS, "files": expected}, indent=1)
    (folder / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
