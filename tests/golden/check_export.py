#!/usr/bin/env python3
"""Load a Hugging Face folder written by demask with transformers and report.

    PYTHONPATH=$ORACLE /usr/bin/python3 tests/golden/check_export.py DIR
        [--ids 5,17,3 | --ids-file F | --text S]   token ids (F: a JSON list)
        [--block B]      block-causal mask instead of causal, no shift in the loss
        [--logits FILE]  write ids and all logits as safetensors
        [--float64]      compute in float64 throughout

Prints one JSON object. Exit code 1 when tensors are missing, unexpected or of
the wrong shape, when a value is not finite, or when tokenizer.json does not
load or does not fit the vocabulary; 0 otherwise.

Without ids, 32 ids spread over the vocabulary are used. Versions as in
generate_golden.py.
"""
import argparse
import contextlib
import json
import os
import sys

try:
    import numpy as np
    import torch
    from safetensors import safe_open
    from safetensors.numpy import save_file
    from transformers import LlamaForCausalLM

    from generate_golden import block_causal, causal, float64_throughout
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy torch safetensors transformers peft; README.md has versions")


def stored_tensors(folder):
    """Name -> (shape, dtype) over the folder's safetensors files."""
    index = os.path.join(folder, "model.safetensors.index.json")
    problems = []
    if os.path.exists(index):
        with open(index) as f:
            listed = json.load(f)["weight_map"]
        files = sorted(set(listed.values()))
    else:
        listed, files = None, ["model.safetensors"]
    found = {}
    for name in files:
        with safe_open(os.path.join(folder, name), "pt") as f:
            for key in f.keys():
                part = f.get_slice(key)
                found[key] = (list(part.get_shape()), part.get_dtype())
                if listed is not None and listed.get(key) != name:
                    problems.append(f"{key} is in {name}, the index says {listed.get(key)}")
    if listed is not None:
        problems += [f"{k} is in the index only" for k in listed if k not in found]
    return found, problems


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("folder")
    ap.add_argument("--ids")
    ap.add_argument("--ids-file")
    ap.add_argument("--text")
    ap.add_argument("--block", type=int)
    ap.add_argument("--logits")
    ap.add_argument("--float64", action="store_true")
    args = ap.parse_args()
    dtype = torch.float64 if args.float64 else torch.float32
    torch.set_num_threads(1)
    out = {"folder": os.path.basename(os.path.abspath(args.folder)), "problems": []}
    problems = out["problems"]

    found, bad = stored_tensors(args.folder)
    problems += bad
    model, info = LlamaForCausalLM.from_pretrained(
        args.folder, torch_dtype=torch.float32, attn_implementation="eager",
        use_safetensors=True, local_files_only=True, output_loading_info=True,
        ignore_mismatched_sizes=True)
    if args.float64:  # a new model, so that the rotary tables are float64 too
        with float64_throughout():
            exact = LlamaForCausalLM(model.config).double()
            exact.load_state_dict(model.state_dict())
            model = exact
    model.eval()
    config = model.config
    # from_pretrained overlooks some names on purpose; compare them all
    expected = {k: list(v.shape) for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    missing = sorted(set(expected) - set(found) | set(info["missing_keys"]))
    unexpected = sorted(set(found) - set(expected) | set(info["unexpected_keys"]))
    mismatched = sorted(k for k in found if k in expected and found[k][0] != expected[k])
    out.update(missing_keys=missing, unexpected_keys=unexpected, mismatched_keys=mismatched)
    problems += [f"{what}: {keys}" for what, keys in (
        ("missing", missing), ("unexpected", unexpected), ("wrong shape", mismatched)) if keys]
    out["tensors"] = len(found)
    out["stored_dtypes"] = sorted({d for _, d in found.values()})
    out["parameters"] = sum(p.numel() for p in model.parameters())
    broken = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        problems.append(f"not finite: {broken}")

    tok = None
    path = os.path.join(args.folder, "tokenizer.json")
    if os.path.exists(path):
        from tokenizers import Tokenizer
        try:
            tok = Tokenizer.from_file(path)
            size = tok.get_vocab_size(with_added_tokens=True)
            top = max(tok.get_vocab(with_added_tokens=True).values())
            sample = "def f(x):\n    return x + 12  # ok\n"
            out["tokenizer"] = dict(size=size, highest_id=top,
                                    round_trip=tok.decode(tok.encode(sample).ids) == sample)
            if top >= config.vocab_size:
                problems.append(f"token id {top} outside the vocabulary of {config.vocab_size}")
        except Exception as e:  # noqa: BLE001 - the library raises bare Exception
            problems.append(f"tokenizer.json: {e}")
    else:
        out["tokenizer"] = None

    if args.ids:
        ids = [int(i) for i in args.ids.split(",")]
    elif args.ids_file:
        with open(args.ids_file) as f:
            ids = json.load(f)
    elif args.text is not None:
        if tok is None:
            sys.exit("--text needs tokenizer.json")
        ids = tok.encode(args.text).ids
    else:
        ids = [(i * 7919 + 1) % config.vocab_size for i in range(32)]
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        sys.exit("token id outside the vocabulary")

    t = len(ids)
    allow = torch.as_tensor(block_causal(t, args.block) if args.block else causal(t))
    add = torch.zeros((1, 1, t, t), dtype=dtype).masked_fill(~allow, torch.finfo(dtype).min)
    with torch.no_grad(), float64_throughout() if args.float64 else contextlib.nullcontext():
        logits = model(input_ids=torch.tensor([ids]), attention_mask=add,
                       position_ids=torch.arange(t)[None], use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double(), -1)
    target = torch.tensor(ids)
    if args.block:
        out["loss_same_position"] = -float(logp.gather(1, target[:, None]).mean())
    elif t > 1:
        out["loss"] = -float(logp[:-1].gather(1, target[1:, None]).mean())
    if not torch.isfinite(logits).all():
        problems.append("logits are not finite")
    top = logits[-1].topk(min(5, logits.shape[-1]))
    out.update(
        ids=ids, mask=f"block-causal {args.block}" if args.block else "causal",
        argmax=logits.argmax(-1).tolist(),
        logsumexp=[round(float(v), 6) for v in torch.logsumexp(logits.double(), -1)],
        mean=float(logits.double().mean()), std=float(logits.double().std()),
        last_top_ids=top.indices.tolist(),
        last_top_logits=[round(float(v), 6) for v in top.values])
    if args.logits:
        save_file({"ids": np.array(ids, np.int32), "logits": logits.float().numpy()}, args.logits)
    out["ok"] = not problems
    print(json.dumps(out))
    sys.exit(0 if out["ok"] else 1)


if __name__ == "__main__":
    main()
