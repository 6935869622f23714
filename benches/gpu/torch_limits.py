#!/usr/bin/env python3
"""What PyTorch does on this machine's CUDA device, beside which demask's figures are read.

    python3 benches/gpu/torch_limits.py [--train-config CONFIG.json] [--json FILE]

Prints a table: a copy's bandwidth; matrix products in f32 (exact and TF32), f16 and bf16; attention forward and
backward; and, with a configuration, training steps of a Llama of that shape. Times are medians by CUDA events.
"""
import argparse
import json
import statistics
import sys

try:
    import torch
    import torch.nn.functional as F
except ImportError as e:
    sys.exit(f"torch_limits.py: {e}; pip install torch, or run it with a Python that has it")

# m, n, k of y = a · wᵀ: demask's benches, and squares that fill a large device.
PRODUCTS = [(512, 512, 512), (128, 1536, 576), (512, 1536, 576), (4, 1536, 576), (1, 4096, 4096), (4, 14336, 4096),
            (2048, 2048, 2048), (4096, 4096, 4096)]
# rows, query heads, key heads, head size
ATTENTION = [(512, 9, 3, 64), (2048, 9, 3, 64), (8192, 9, 3, 64), (2048, 32, 8, 128)]


def seconds(work, least=0.05):
    """Median time of one call of `work`."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    while sum(times) < least or len(times) < 5:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
        if len(times) >= 200:
            break
    return statistics.median(times)


def row(name, value, unit, time):
    rows.append({"name": name, "value": value, "unit": unit, "seconds": time})
    print(f"{name:<52}{value:>12.1f} {unit:<9}{time * 1e6:>12.1f} µs", flush=True)


def products():
    kinds = [("f32", torch.float32, False), ("tf32", torch.float32, True), ("f16", torch.float16, False),
             ("bf16", torch.bfloat16, False)]
    for m, n, k in PRODUCTS:
        for name, dtype, tf32 in kinds:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, w = (torch.randn(r, k, device="cuda", dtype=dtype) for r in (m, n))
            t = seconds(lambda: a @ w.T)
            row(f"matmul NT {m}x{n}x{k} {name}", 2e-9 * m * n * k / t, "GFLOP/s", t)
    torch.backends.cuda.matmul.allow_tf32 = False


def attention():
    for rows_, heads, kv, size in ATTENTION:
        for name, dtype in (("f32", torch.float32), ("f16", torch.float16)):
            q = torch.randn(1, heads, rows_, size, device="cuda", dtype=dtype, requires_grad=True)
            k, v = (torch.randn(1, kv, rows_, size, device="cuda", dtype=dtype, requires_grad=True) for _ in "kv")
            whole = [x.repeat_interleave(heads // kv, 1) for x in (k, v)]
            dy = torch.randn_like(q)
            forward = lambda: F.scaled_dot_product_attention(q, *whole, is_causal=True)
            t = seconds(forward)
            # A causal row sees half of the keys: two products of size H for each pair.
            flops = 2 * heads * size * rows_ * rows_
            row(f"attention causal {rows_} {heads}/{kv} H {size} {name}", 1e-9 * flops / t, "GFLOP/s", t)
            o = forward()
            t = seconds(lambda: torch.autograd.grad(o, [q, k, v], dy, retain_graph=True))
            row(f"  its backward {name}", 2.5e-9 * flops / t, "GFLOP/s", t)


def copies():
    x = torch.empty(1 << 28, device="cuda")
    y = torch.empty_like(x)
    t = seconds(lambda: y.copy_(x))
    row("copy, bytes read and written", 2e-9 * x.numel() * 4 / t, "GB/s", t)


def training(path, batch, length):
    from transformers import LlamaConfig, LlamaForCausalLM

    with open(path, encoding="utf-8") as file:
        config = LlamaConfig(**json.load(file))
    ids = torch.randint(0, config.vocab_size, (batch, length), device="cuda")
    for name, tf32, auto in (("f32", False, False), ("tf32", True, False), ("bf16 autocast", True, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def step():
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=auto):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        torch.cuda.reset_peak_memory_stats()
        t = seconds(step, least=3.0)
        row(f"training step {batch} x {length} {name}", batch * length / t, "tokens/s", t)
        row(f"  its peak memory {name}", torch.cuda.max_memory_allocated() / 1e6, "MB", t)
        del model, optimizer
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-config", metavar="CONFIG.json", help="time training steps of a Llama of this shape")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch_limits.py: torch sees no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    copies()
    products()
    attention()
    if args.train_config:
        training(args.train_config, args.batch, args.length)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


rows = []
main()
