"""PyTorch as a peer: python3 torch_peer.py cpu|cuda. One JSON object a line in, one out; see src/peer.rs."""

import json
import math
import os
import sys
import time

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
COMPARED = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
]


def values(n, salt):
    """The first n values of array `salt`; src/work.rs has the same."""
    h = (np.arange(n, dtype=np.uint32) + np.uint32(salt * 1000003 & 0xFFFFFFFF)) * np.uint32(2654435761)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    return ((h >> np.uint32(8)).astype(np.float64) / 16777216.0 - 0.5).astype(np.float32)


def sampled(x):
    """64 of the elements; src/work.rs has the same."""
    x = x.detach().float().cpu().reshape(-1)
    n = x.numel()
    return [float(x[(j * 2654435761 & 0xFFFFFFFF) % n]) for j in range(min(n, 64))]


def array(shape, salt):
    return torch.from_numpy(values(math.prod(shape), salt).reshape(shape)).to(device)


class Matmul:
    def __init__(self, work):
        self.a, self.b = array((work["m"], work["k"]), 1), array((work["n"], work["k"]), 2)
        if work["half"]:
            self.a, self.b = self.a.half(), self.b.half()

    def run(self):
        self.y = self.a @ self.b.T

    def results(self):
        return {"y": sampled(self.y)}


class Attention:
    """q, k and v rest with the heads outside, where scaled_dot_product_attention wants them."""

    def __init__(self, work):
        t, block = work["rows"], work["block"]
        make = lambda salt, heads: array((1, t, heads, HEAD_DIM), salt).transpose(1, 2).contiguous()
        self.inputs = [make(s, n).requires_grad_() for s, n in ((1, HEADS), (2, KV_HEADS), (3, KV_HEADS))]
        self.dy = make(4, HEADS)
        row = torch.arange(t, device=device)
        clean, part = row >= t // 2, row % (t // 2) // block
        bq, bk, cq, ck = part[:, None], part[None, :], clean[:, None], clean[None, :]
        self.mask = (~cq & ~ck & (bq == bk)) | (~cq & ck & (bq > bk)) | (cq & ck & (bq >= bk))

    def run(self):
        q, k, v = self.inputs
        for x in self.inputs:
            x.grad = None
        self.o = attend(q, k, v, self.mask)
        self.o.backward(self.dy)

    def results(self):
        named = zip(("o", "dq", "dk", "dv"), [self.o] + [x.grad for x in self.inputs])
        return {name: sampled(x.transpose(1, 2).contiguous()) for name, x in named}


def attend(q, k, v, mask):
    """Grouped-query attention; `mask` is true where a query looks, None is causal."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=device).tril()
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~mask, -math.inf)
    return scores.softmax(3) @ v


class Step:
    """A Llama of plain functions: forward, mean cross-entropy, backward."""

    def __init__(self, work):
        with open(os.path.join(work["folder"], "config.json")) as file:
            self.config = json.load(file)
        self.weights = {n: w.to(device).requires_grad_() for n, w in safetensors(work["folder"]).items()}
        t = work["tokens"]
        ids = torch.tensor([20 + i * 37 % 400 for i in range(t + 1)], device=device)
        self.tokens, self.targets = ids[:-1], ids[1:]
        half = self.head_dim() // 2
        powers = torch.arange(half, dtype=torch.float64) / half
        angles = torch.arange(t, dtype=torch.float64)[:, None] * self.config["rope_theta"] ** -powers
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def head_dim(self):
        return self.config["hidden_size"] // self.config["num_attention_heads"]

    def norm(self, x, name):
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.config["rms_norm_eps"])
        return x * self.weights[name]

    def heads(self, x, rotate):
        x = x.reshape(x.shape[0], -1, self.head_dim()).transpose(0, 1)[None]
        if not rotate:
            return x
        a, b = x.chunk(2, 3)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), 3)

    def run(self):
        w = self.weights
        for x in w.values():
            x.grad = None
        x = F.embedding(self.tokens, w["model.embed_tokens.weight"])
        for i in range(self.config["num_hidden_layers"]):
            name = lambda part: f"model.layers.{i}.{part}.weight"
            linear = lambda x, part: F.linear(x, w[name(part)])
            h = self.norm(x, name("input_layernorm"))
            q, k = (self.heads(linear(h, f"self_attn.{part}_proj"), True) for part in "qk")
            v = self.heads(linear(h, "self_attn.v_proj"), False)
            a = attend(q, k, v, None)[0].transpose(0, 1).reshape(x.shape)
            x = x + linear(a, "self_attn.o_proj")
            h = self.norm(x, name("post_attention_layernorm"))
            x = x + linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
        logits = F.linear(self.norm(x, "model.norm.weight"), w["model.embed_tokens.weight"])
        self.loss = F.cross_entropy(logits, self.targets)
        self.loss.backward()

    def results(self):
        norms = {name: [float(self.weights[name].grad.double().norm())] for name in COMPARED}
        return {"loss": [float(self.loss)], **norms}


def safetensors(folder):
    """The f32 tensors of a folder's model.safetensors."""
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    for name, t in header.items():
        if t["dtype"] != "F32":
            raise ValueError(f"{name} is {t['dtype']}, not F32")
    tensor = lambda t: torch.frombuffer(data, dtype=torch.float32, offset=t["data_offsets"][0],
                                        count=math.prod(t["shape"])).reshape(t["shape"])
    return {name: tensor(t) for name, t in header.items()}


def sync():
    if device == "cuda":
        torch.cuda.synchronize()


def answer(request):
    global job
    if "setup" in request:
        work = request["setup"]
        job = {"matmul": Matmul, "step": Step, "attention": Attention}[work["work"]](work)
        job.run()
        sync()
        if device == "cuda":
            return {"device": torch.cuda.get_device_name()}
        return {"device": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"}
    if "run" in request:
        start = time.perf_counter()
        for _ in range(request["run"]):
            job.run()
        sync()
        return {"seconds": time.perf_counter() - start}
    return {"results": job.results()}


device = sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: torch_peer.py cpu|cuda")
job = None
missing = None
try:
    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(os.cpu_count())
    if device == "cuda" and not torch.cuda.is_available():
        missing = ""
except ImportError as e:
    missing = f"{sys.executable}: {e}; pip install torch numpy, or name another Python with --python"

for line in sys.stdin:
    if missing is not None:
        reply = {"skip": missing}
    else:
        try:
            reply = answer(json.loads(line))
        except Exception as e:
            reply = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(reply), flush=True)
