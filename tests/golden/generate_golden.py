#!/usr/bin/env python3
"""Goldens for demask from an independent framework.

Writes two tiny random Llamas and what Hugging Face's LlamaForCausalLM computes
with them on torch, CPU, in float64:

    tiny/        hidden 48, 6 query / 2 key-value heads, untied head
    tiny_tied/   hidden 24, 4 query / 1 key-value head, head_dim 16 given
                 explicitly, tied head, llama3 rope scaling

Each folder gets config.json and model.safetensors (f32, Hugging Face layout),
golden.safetensors (tensors) and golden.json (scalars, rules, settings).

Pinned: Debian 12 python3-torch 1.13.1+dfsg-4 (/usr/bin/python3 3.11, numpy
1.24.2), transformers 4.45.2, tokenizers 0.20.3, safetensors 0.4.5,
huggingface_hub 0.24.7. (transformers 4.44 ignores an explicit head_dim.)

    PYTHONPATH=$ORACLE /usr/bin/python3 tests/golden/generate_golden.py
    ... --report    also print how far torch in plain float32 is from the goldens
    ... --out DIR   write the two folders somewhere else

The same versions on the same machine give the same bytes. Before writing,
every result is checked: against a second forward pass written in numpy,
gradients against central differences, the two-copy pass against a
block-by-block pass.
"""
import argparse
import contextlib
import json
import math
import os
import sys

try:
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import transformers
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy torch safetensors transformers peft; README.md has versions")

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(__file__))

VOCAB = 97
MASK_ID = 96
BLOCK = 4
AR_LEN = 37
BD_LEN = 24
AR_DOCS = [[10, 15, 12], [7, 1, 29]]
BD_DOCS = [[8, 4, 12], [16, 4, 4]]
BD_RATES = [[0.25, 0.9, 0.5, 1.0, 0.3, 0.7], [0.6, 0.25, 1.0, 0.4, 0.8, 0.35]]
BD_PROMPT = [0, 6]  # leading tokens that may not be masked (a prompt)
ADAMW = dict(lr=[1e-3, 2e-3, 3e-3, 2e-3, 1e-3], betas=[0.9, 0.95], eps=1e-8,
             weight_decay=0.1, clip_norm=1.0)

COMMON = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB,
    hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0,
    bos_token_id=1, eos_token_id=2, torch_dtype="float32", num_hidden_layers=2,
)
# Of sixty seeds the one whose smallest gradient is largest: AdamW divides by
# the gradient's size, so an entry near zero would move by lr either way.
CONFIGS = {
    "tiny": (20260133, dict(
        COMMON, hidden_size=48, intermediate_size=80, num_attention_heads=6,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=100000.0, rope_scaling=None,
        max_position_embeddings=256, tie_word_embeddings=False)),
    "tiny_tied": (20260240, dict(
        COMMON, hidden_size=24, intermediate_size=40, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                          high_freq_factor=4.0, original_max_position_embeddings=64),
        max_position_embeddings=512, tie_word_embeddings=True)),
}


# --------------------------------------------------------------- the model

@contextlib.contextmanager
def float64_throughout():
    """LlamaForCausalLM goes through float32 in RMSNorm, softmax, rotary tables
    and the logits whatever the dtype of its weights. Inside this context those
    places stay in float64, with the model's own code otherwise untouched."""
    saved = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = saved


def shapes(cfg):
    h, f = cfg["hidden_size"], cfg["intermediate_size"]
    d = cfg.get("head_dim", h // cfg["num_attention_heads"])
    q, kv = d * cfg["num_attention_heads"], d * cfg["num_key_value_heads"]
    out = {"model.embed_tokens.weight": (VOCAB, h)}
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out.update({
            p + "input_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (q, h), p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h), p + "self_attn.o_proj.weight": (h, q),
            p + "post_attention_layernorm.weight": (h,),
            p + "mlp.gate_proj.weight": (f, h), p + "mlp.up_proj.weight": (f, h),
            p + "mlp.down_proj.weight": (h, f),
        })
    out["model.norm.weight"] = (h,)
    if not cfg["tie_word_embeddings"]:
        out["lm_head.weight"] = (VOCAB, h)
    return out


def random_weights(cfg, seed):
    """Large enough that attention is far from uniform and confidences differ."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, shape in shapes(cfg).items():
        x = rng.standard_normal(shape)
        if len(shape) == 1:
            x = 1.0 + 0.2 * x
        elif "embed_tokens" in name:
            x = 0.4 * x
        elif "lm_head" in name:
            x = 0.3 * x
        else:
            x = x * (1.4 if "q_proj" in name or "k_proj" in name else 0.9) / math.sqrt(shape[1])
        weights[name] = x.astype(np.float32)
    return weights


def build(cfg, weights, dtype=torch.float64):
    with float64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
        config = LlamaConfig(**cfg)
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config).to(dtype)
        missing, unexpected = model.load_state_dict(
            {k: torch.from_numpy(v.copy()).to(dtype) for k, v in weights.items()}, strict=False)
        model.tie_weights()
    assert not unexpected, unexpected
    assert missing == (["lm_head.weight"] if cfg["tie_word_embeddings"] else []), missing
    assert {n for n, _ in model.named_parameters()} == set(weights)
    if dtype == torch.float64:
        assert model.model.rotary_emb.inv_freq.dtype == torch.float64
    return model.eval()


def logits_of(model, ids, allow, positions=None):
    """ids [R,T]; allow [R,T,T] or [T,T], true where query row sees key column."""
    dtype = model.lm_head.weight.dtype
    ids = torch.as_tensor(ids, dtype=torch.long)
    allow = torch.as_tensor(allow)
    allow = allow.expand(ids.shape[0], *allow.shape[-2:])[:, None]
    add = torch.zeros(allow.shape, dtype=dtype).masked_fill(~allow, torch.finfo(dtype).min)
    if positions is None:
        positions = np.arange(ids.shape[1])
    positions = torch.as_tensor(positions)[None].expand(ids.shape)
    with float64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
        out = model(input_ids=ids, attention_mask=add, position_ids=positions,
                    use_cache=False).logits
    assert out.dtype == dtype
    return out


def numpy_logits(cfg, weights, ids, allow, positions):
    """The same forward pass from the definition, one row, float64."""
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    heads, kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    d = cfg.get("head_dim", cfg["hidden_size"] // heads)
    inv = cfg["rope_theta"] ** (-np.arange(0, d, 2) / d)
    s = cfg["rope_scaling"]
    if s:
        for i, f in enumerate(inv):
            wavelen = 2 * math.pi / f
            low = s["original_max_position_embeddings"] / s["low_freq_factor"]
            high = s["original_max_position_embeddings"] / s["high_freq_factor"]
            if wavelen > low:
                inv[i] = f / s["factor"]
            elif wavelen >= high:
                mix = ((s["original_max_position_embeddings"] / wavelen - s["low_freq_factor"])
                       / (s["high_freq_factor"] - s["low_freq_factor"]))
                inv[i] = (1 - mix) * f / s["factor"] + mix * f
    angle = np.asarray(positions)[:, None] * inv[None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg["rms_norm_eps"]) * w[name]

    def rope(x):
        a, b = x[..., :d // 2], x[..., d // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    t = len(ids)
    x = w["model.embed_tokens.weight"][ids]
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, p + "input_layernorm.weight")
        q = rope((y @ w[p + "self_attn.q_proj.weight"].T).reshape(t, heads, d))
        k = rope((y @ w[p + "self_attn.k_proj.weight"].T).reshape(t, kv, d))
        v = (y @ w[p + "self_attn.v_proj.weight"].T).reshape(t, kv, d)
        out = np.empty_like(q)
        for h in range(heads):
            score = q[:, h] @ k[:, h * kv // heads].T / math.sqrt(d)
            score = np.where(allow, score, -np.inf)
            e = np.exp(score - score.max(-1, keepdims=True))
            out[:, h] = e / e.sum(-1, keepdims=True) @ v[:, h * kv // heads]
        x = x + out.reshape(t, -1) @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, p + "post_attention_layernorm.weight")
        g = y @ w[p + "mlp.gate_proj.weight"].T
        x = x + (g / (1 + np.exp(-g)) * (y @ w[p + "mlp.up_proj.weight"].T)) \
            @ w[p + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if cfg["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ w[head].T


# ------------------------------------------------------------------- masks

def documents(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


def causal(t):
    return np.tril(np.ones((t, t), bool))


def block_causal(t, block=BLOCK):
    b = np.arange(t) // block
    return b[:, None] >= b[None]


def two_copy(length, block=BLOCK, doc=None):
    """[x_t ; x_0]: the mask of the block-diffusion training pass."""
    b = np.tile(np.arange(length) // block, 2)
    clean = np.repeat([False, True], length)
    bq, bk, cq, ck = b[:, None], b[None], clean[:, None], clean[None]
    allow = (~cq & ~ck & (bq == bk)) | (~cq & ck & (bq > bk)) | (cq & ck & (bq >= bk))
    if doc is not None:
        doc = np.tile(doc, 2)
        allow &= doc[:, None] == doc[None]
    return allow


# ------------------------------------------------------------------ inputs

def make_inputs(seed):
    rng = np.random.Generator(np.random.PCG64(seed + 1))
    tokens = rng.integers(3, MASK_ID, (2, AR_LEN))
    x0 = rng.integers(3, MASK_ID, (2, BD_LEN))
    rates = np.repeat(np.array(BD_RATES), BLOCK, axis=1)
    maskable = np.arange(BD_LEN)[None] >= np.array(BD_PROMPT)[:, None]
    masked = (rng.random((2, BD_LEN)) < rates) & maskable
    for r in range(2):  # a block without a mask gets one, where it may
        for s in range(0, BD_LEN, BLOCK):
            free = s + np.flatnonzero(maskable[r, s:s + BLOCK])
            if len(free) and not masked[r, s:s + BLOCK].any():
                masked[r, rng.choice(free)] = True
    weights = np.where(masked, 1 / rates, 0).astype(np.float32)
    return dict(tokens=tokens, x0=x0, xt=np.where(masked, MASK_ID, x0), weights=weights,
                masked=masked, maskable=maskable)


# ------------------------------------------------------------------ losses

def ar_loss(model, inp):
    logits = logits_of(model, inp["tokens"], causal(AR_LEN))
    target = torch.as_tensor(inp["tokens"][:, 1:])
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), target.reshape(-1))
    return loss, logits


def bd_logits(model, inp, docs=None):
    ids = np.concatenate([inp["xt"], inp["x0"]], 1)
    positions = np.tile(np.arange(BD_LEN), 2)
    allow = np.stack([two_copy(BD_LEN, doc=documents(d)) for d in docs]) if docs \
        else two_copy(BD_LEN)
    return logits_of(model, ids, allow, positions)[:, :BD_LEN]


def bd_loss(model, inp):
    logits = bd_logits(model, inp)
    ce = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCAB), torch.as_tensor(inp["x0"]).reshape(-1), reduction="none")
    w = torch.as_tensor(inp["weights"]).to(ce.dtype).reshape(-1)
    return (w * ce).sum() / int(inp["maskable"].sum()), logits, ce


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.detach().numpy().copy() for n, p in model.named_parameters()}


def decays(name, p):
    return p.ndim == 2 and "embed_tokens" not in name


def adamw(model, inp, loss_of):
    named = list(model.named_parameters())
    opt = torch.optim.AdamW(
        [dict(params=[p for n, p in named if decays(n, p)], weight_decay=ADAMW["weight_decay"]),
         dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.0)],
        lr=ADAMW["lr"][0], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"], foreach=False)
    losses, norms = [], []
    for lr in ADAMW["lr"]:
        for group in opt.param_groups:
            group["lr"] = lr
        opt.zero_grad(set_to_none=True)
        loss = loss_of(model, inp)[0]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], ADAMW["clip_norm"])
        opt.step()
        losses.append(float(loss))
        norms.append(float(norm))
    with torch.no_grad():
        final = float(loss_of(model, inp)[0])
    return losses, norms, final, {n: p.detach().numpy().copy() for n, p in named}


# ---------------------------------------------------------------- decoding

def decode(model, prompt, gen, mode, value):
    """Greedy block decoding without a cache: every pass is a block-causal pass
    over x[0..e). mode "fixed": value = steps per block; mode "threshold": value
    = confidence. Returns ids, passes (denoise + one commit per block) and the
    smallest gap any decision hung on."""
    x = [int(t) for t in prompt] + [MASK_ID] * gen
    hole = [False] * len(prompt) + [True] * gen
    total, passes, gap, order = len(x), 0, math.inf, []
    start = len(prompt) // BLOCK * BLOCK
    for s in range(start, total, BLOCK):
        e = min(s + BLOCK, total)
        m = sum(hole[s:e])
        quotas = [m // value + (i < m % value) for i in range(value)] if mode == "fixed" else None
        while any(hole[s:e]):
            quota = quotas.pop(0) if quotas is not None else None
            if quota == 0:
                continue
            with torch.no_grad():
                logits = logits_of(model, [x[:e]], block_causal(e))[0, s:e].numpy()
            passes += 1
            cand = []
            for i in range(s, e):
                if hole[i]:
                    row = logits[i - s]
                    top = np.sort(row)[::-1]
                    gap = min(gap, top[0] - top[1])
                    conf = 1 / np.exp(row - top[0]).sum()
                    cand.append((float(conf), i, int(row.argmax())))
            cand.sort(key=lambda c: (-c[0], c[1]))
            if mode == "threshold":
                quota = max(1, sum(c[0] >= value for c in cand))
                gap = min([gap] + [abs(c[0] - value) for c in cand[1:]])
            if quota < len(cand):
                gap = min(gap, cand[quota - 1][0] - cand[quota][0])
            step = []
            for _, i, token in cand[:quota]:
                if token == MASK_ID:
                    return None  # implementations may differ here
                x[i], hole[i] = token, False
                step.append(i)
            order.append(sorted(step))
        passes += 1
    return dict(mode=mode, value=value, prompt=list(map(int, prompt)), gen_length=gen, ids=x,
                passes=passes, commits=order, smallest_gap=digits(gap, 3))


DECODE = [("fixed", 4), ("fixed", 2), ("threshold", 0.2)]


def decode_cases(model, seed):
    """The first random prompts on which no decision is close. Prompt lengths 6
    and 8: inside a block and on a boundary; 19 and 14 new tokens, so that the
    last block is cut. None for the tied model, which loves its own mask token."""
    rng = np.random.Generator(np.random.PCG64(seed + 2))
    cases = []
    for length, gen in ((6, 19), (8, 14)):
        for _ in range(60):
            prompt = rng.integers(3, MASK_ID, length)
            found = []
            for mode, value in DECODE:
                case = decode(model, prompt, gen, mode, value)
                if case is None or case["smallest_gap"] < 2e-3:
                    break
                found.append(case)
            else:
                cases += found
                break
    return cases


# ------------------------------------------------------------------ checks

def check(cfg, weights, model, inp, out):
    close = lambda a, b, tol: np.abs(np.asarray(a) - np.asarray(b)).max() < tol
    for r in range(2):
        allow = causal(AR_LEN)
        mine = numpy_logits(cfg, weights, inp["tokens"][r], allow, np.arange(AR_LEN))
        assert close(mine, out["ar.logits"][r], 1e-11)
        doc = documents(AR_DOCS[r])
        mine = numpy_logits(cfg, weights, inp["tokens"][r],
                            allow & (doc[:, None] == doc[None]), np.arange(AR_LEN))
        assert close(mine, out["ar_doc.logits"][r], 1e-11)
        both = np.concatenate([inp["xt"][r], inp["x0"][r]])
        positions = np.tile(np.arange(BD_LEN), 2)
        mine = numpy_logits(cfg, weights, both, two_copy(BD_LEN), positions)[:BD_LEN]
        assert close(mine, out["bd.logits"][r], 1e-11)
        # each noisy block after its clean predecessors, as inference does it
        for s in range(0, BD_LEN, BLOCK):
            seq = np.concatenate([inp["x0"][r, :s], inp["xt"][r, s:s + BLOCK]])
            with torch.no_grad():
                part = logits_of(model, seq[None], block_causal(s + BLOCK))[0, s:]
            assert close(part, out["bd.logits"][r, s:s + BLOCK], 1e-11)
    # gradients against central differences along one random direction
    rng = np.random.Generator(np.random.PCG64(7))
    direction = {n: rng.standard_normal(p.shape) for n, p in model.named_parameters()}
    for tag, loss in (("ar", ar_loss), ("bd", bd_loss)):
        slope = sum((out[f"{tag}.grad.{n}"] * d).sum() for n, d in direction.items())
        ends = []
        for h in (1e-6, -1e-6):
            moved = build(cfg, weights)
            with torch.no_grad():
                for n, p in moved.named_parameters():
                    p += h * torch.from_numpy(direction[n])
                ends.append(float(loss(moved, inp)[0]))
        numeric = (ends[0] - ends[1]) / 2e-6
        assert abs(numeric - slope) < 1e-6 * abs(slope) + 1e-8, (tag, numeric, slope)


# ------------------------------------------------------------------ output

def digits(value, n=12):
    return float(f"{value:.{n}g}")


def compute(cfg, weights, inp, dtype):
    """Everything that is stored, in full precision, and the scalars."""
    model = build(cfg, weights, dtype)
    out, num = {}, {}
    loss, logits = ar_loss(model, inp)
    num["ar_loss"] = float(loss)
    out["ar.logits"] = logits.detach().numpy()
    out.update({"ar.grad." + n: g for n, g in gradients(model, loss).items()})
    loss, logits, ce = bd_loss(model, inp)
    num["bd_loss"] = float(loss)
    num["bd_masked_mean_ce"] = float(ce.detach()[torch.as_tensor(inp["masked"]).reshape(-1)].mean())
    out["bd.logits"] = logits.detach().numpy()
    grads = gradients(model, loss)
    out.update({"bd.grad." + n: g for n, g in grads.items()})
    num["bd_grad_norm"] = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum())
                                        for g in grads.values()))
    with torch.no_grad():
        doc = np.stack([documents(d) for d in AR_DOCS])
        allow = causal(AR_LEN) & (doc[:, :, None] == doc[:, None])
        out["ar_doc.logits"] = logits_of(model, inp["tokens"], allow).numpy()
        out["bd_doc.logits"] = bd_logits(model, inp, BD_DOCS).numpy()
        out["block_causal.logits"] = logits_of(
            model, inp["tokens"], block_causal(AR_LEN)).numpy()
    for part, loss_of in (("adamw", bd_loss), ("ar_adamw", ar_loss)):
        losses, norms, final, params = adamw(build(cfg, weights, dtype), inp, loss_of)
        num.update({f"{part}_losses": losses, f"{part}_grad_norms": norms,
                    f"{part}_loss_after": final})
        out.update({f"{part}.param." + n: p for n, p in params.items()})
    return model, out, num


def report(name, cfg, weights, inp, out, num):
    _, f32, n32 = compute(cfg, weights, inp, torch.float32)
    groups = {}
    for key in out:
        err = float(np.abs(f32[key] - out[key]).max())
        group = key.split(".")[0] + "." + key.split(".")[1]
        old = groups.get(group, (0.0, 0.0))
        groups[group] = max(old[0], err), max(old[1], float(np.abs(out[key]).max()))
    print(f"{name}: torch in float32 against the goldens (max abs error; max abs value)")
    for group, (err, size) in groups.items():
        print(f"  {group:22s} {err:.1e}  {size:.3g}")
    for key in num:
        err = np.abs(np.asarray(n32[key]) - np.asarray(num[key])).max()
        print(f"  {key:22s} {err:.1e}")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default=HERE)
    ap.add_argument("--report", action="store_true")
    args = ap.parse_args()
    assert torch.__version__.startswith("1.13") and transformers.__version__ == "4.45.2", \
        (torch.__version__, transformers.__version__)
    for name, (seed, cfg) in CONFIGS.items():
        folder = os.path.join(args.out, name)
        os.makedirs(folder, exist_ok=True)
        weights, inp = random_weights(cfg, seed), make_inputs(seed)
        model, out, num = compute(cfg, weights, inp, torch.float64)
        check(cfg, weights, model, inp, out)
        decoded = [] if cfg["tie_word_embeddings"] else decode_cases(model, seed)
        assert decoded or cfg["tie_word_embeddings"]

        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(cfg, f, indent=2, sort_keys=True)
            f.write("\n")
        save_file(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        tensors = {k: v.astype(np.float32) for k, v in out.items()}
        for key, src in (("ar.tokens", "tokens"), ("bd.x0", "x0"), ("bd.xt", "xt"),
                         ("bd.maskable", "maskable")):
            tensors[key] = inp[src].astype(np.int32)
        tensors["bd.weights"] = inp["weights"]
        save_file(tensors, os.path.join(folder, "golden.safetensors"))
        golden = {
            "made_with": "transformers 4.45.2 LlamaForCausalLM, torch 1.13.1 CPU, float64 throughout, "
                         "stored as float32; generate_golden.py",
            "mask_token_id": MASK_ID, "block": BLOCK,
            "ar": {"loss": digits(num["ar_loss"]),
                   "rule": "mean cross-entropy of logits[:, i] against tokens[:, i + 1], all rows"},
            "ar_doc": {"documents": AR_DOCS, "rule": "causal within a document, positions continuous"},
            "block_causal": {"rule": "key k visible to query q iff q / B >= k / B (integer division)"},
            "bd": {"loss": digits(num["bd_loss"]), "divisor": int(inp["maskable"].sum()),
                   "masked_tokens": int(inp["masked"].sum()),
                   "masked_mean_ce": digits(num["bd_masked_mean_ce"]),
                   "grad_norm": digits(num["bd_grad_norm"]),
                   "block_rates": BD_RATES, "prompt_lengths": BD_PROMPT,
                   "rule": "sum(weights * CE(logits[i], x0[i])) / divisor, no shift; input [xt ; x0], "
                           "positions 0..L-1 on both halves"},
            "bd_doc": {"documents": BD_DOCS,
                       "rule": "two-copy mask and same document, positions continuous"},
            "adamw": dict(ADAMW, losses=[digits(v) for v in num["adamw_losses"]],
                          grad_norms=[digits(v) for v in num["adamw_grad_norms"]],
                          loss_after=digits(num["adamw_loss_after"]),
                          decayed=[n for n, p in model.named_parameters() if decays(n, p)],
                          rule="block-diffusion loss, same batch every step; losses and grad norms are "
                               "taken before the step; weight decay on 2-D weights except embed_tokens "
                               "(lm_head decays, norms and a tied head do not), decoupled: "
                               "p *= 1 - lr * weight_decay before the update; clip: "
                               "g *= min(1, clip_norm / (norm + 1e-6)), norm over all parameters; "
                               "update: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)"),
            "ar_adamw": {"losses": [digits(v) for v in num["ar_adamw_losses"]],
                         "grad_norms": [digits(v) for v in num["ar_adamw_grad_norms"]],
                         "loss_after": digits(num["ar_adamw_loss_after"]),
                         "rule": "the same on the autoregressive loss"},
        }
        if decoded:
            golden["decode"] = {
                "cases": decoded,
                "rule": "temperature 0, softmax over the whole vocabulary, eos ignored; blocks on "
                        "absolute positions; fixed: holes of the block split over `value` steps, "
                        "remainder to the first, empty steps skipped; threshold: the best hole and "
                        "every other hole with confidence >= value; passes = denoise passes + one "
                        "commit pass per block; commits = positions filled in each denoise pass"}
        with open(os.path.join(folder, "golden.json"), "w") as f:
            f.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}"
                                       for k, v in golden.items()) + "\n}\n")
        print(name, {k: v for k, v in num.items()})
        for case in decoded:
            print(" ", case["mode"], case["value"], "passes", case["passes"], "smallest gap",
                  case["smallest_gap"])
        if args.report:
            report(name, cfg, weights, inp, out, num)


if __name__ == "__main__":
    main()
