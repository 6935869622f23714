#!/usr/bin/env python3
"""Write folder/: what transformers and PEFT compute of model and adapter folders that say more than the usual.

    python3 tests/golden/generate_folder.py

folder/cases.json holds one entry a case: the folder of the model ("base" of this file, with other fields in its
config.json and other tensors beside), the adapter over it, token ids, and each token's log-probability given those
before it, in float32. Rope cases have a greedy continuation beyond the original context too, by transformers' cache of
keys, up to the first token whose lead over the next one is below 1e-3. Made with torch 2.15 (CPU), transformers 5.24.0,
peft 0.21.2.
"""
import json
import os
import shutil
import sys
import tempfile

try:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
except ImportError as missing:
    sys.exit(f"generate_folder.py: {missing}; pip install torch safetensors transformers peft")

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "folder")
VOCAB = 61
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=24, rms_norm_eps=1e-5, bos_token_id=1,
             eos_token_id=2, initializer_range=0.25)
SHORT, LONG = 14, 40


def ids(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (n,), generator=generator).tolist()


@torch.no_grad()
def scores(model, tokens):
    """Log-probability of each token but the first. A model is loaded for each text: dynamic ones keep a state."""
    logits = model.eval()(torch.tensor([tokens])).logits[0].float()
    rows = torch.log_softmax(logits, -1)[:-1]
    return [round(float(row[token]), 6) for row, token in zip(rows, tokens[1:])]


@torch.no_grad()
def greedy(model, tokens, n):
    out = model.eval().generate(torch.tensor([tokens]), max_new_tokens=n, do_sample=False, eos_token_id=None,
                                pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    leads = [float(top[0] - top[1]) for top in (logits[0].topk(2).values for logits in out.logits)]
    sure = next((i for i, lead in enumerate(leads) if lead < 1e-3), n)
    return out.sequences[0, len(tokens):len(tokens) + sure].tolist()


def base(folder, **more):
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **more))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0.0, 0.3)
            elif "norm" in name:
                p.uniform_(0.6, 1.4)
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "generation_config.json"))


def edit(folder, **fields):
    path = os.path.join(folder, "config.json")
    config = json.load(open(path))
    for key, value in fields.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    json.dump(config, open(path, "w"), indent=2)


def rope_cases():
    half = SHAPE["head_dim"] // 2
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 2.5,
            "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.5, 6.0, 9.0]}
    assert len(long["short_factor"]) == half
    own = {"rope_type": "longrope", "short_factor": long["short_factor"], "long_factor": long["long_factor"]}
    yield "theta_inside", dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=1e6)
    yield "theta_in_scaling", dict(rope_parameters=None, rope_theta=1e6, rope_scaling={
        "type": "linear", "factor": 2.0, "rope_theta": 500.0})
    yield "scaling_over_parameters", dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=2e4,
                                          rope_scaling={"rope_type": "linear", "factor": 3.0})
    yield "dynamic", dict(rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4})
    yield "dynamic_old", dict(rope_parameters=None, rope_theta=3e3, rope_scaling={"type": "dynamic", "factor": 1.5})
    yield "yarn", dict(rope_parameters=dict(yarn, rope_theta=1e4))
    yield "yarn_old", dict(rope_parameters=None, rope_theta=5e2, rope_scaling={"type": "yarn", "factor": 4.0})
    yield "yarn_own", dict(rope_parameters=dict(yarn, rope_theta=1e3, beta_fast=4, beta_slow=0.5, truncate=False,
                                                mscale=1.3, mscale_all_dim=0.7))
    yield "yarn_factor", dict(rope_parameters=dict(yarn, rope_theta=1e3, attention_factor=1.4))
    yield "longrope", dict(rope_parameters=dict(long, rope_theta=1e4))
    # The number beside the others wins; the stretch follows from it.
    yield "longrope_beside", dict(rope_parameters=dict(own, rope_theta=1e4), original_max_position_embeddings=18)
    yield "llama3_beside", dict(original_max_position_embeddings=12, rope_parameters={
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "rope_theta": 20.0})


def bias_cases():
    yield "attention_bias", dict(attention_bias=True)
    yield "mlp_bias", dict(mlp_bias=True)
    yield "all_biases", dict(attention_bias=True, mlp_bias=True)


def adapter(model_folder, folder, config, scale=0.15):
    """A PEFT adapter with random values in all that it trains."""
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", **config)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale)
    model.peft_config["default"].base_model_name_or_path = ""
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    # PEFT sorts the keys as it saves, and takes the first that matches as it loads: back to the order that was meant.
    path = os.path.join(folder, "adapter_config.json")
    saved = json.load(open(path))
    for field in ("rank_pattern", "alpha_pattern"):
        saved[field] = getattr(config, field)
    json.dump(saved, open(path, "w"), indent=2)


def adapter_cases():
    ends = ["q_proj", "v_proj", "down_proj"]
    usual = dict(r=3, lora_alpha=6, target_modules=ends)
    # The first key that matches wins, in the file's order; a key is a regular expression from a dot to the end.
    patterns = dict(
        rank_pattern={"layers.1.self_attn.q_proj": 5, r".*\.q_proj": 2, "down_proj|v_proj": 4, "v_proj": 7},
        alpha_pattern={r"layers\.\d+\.mlp\.down_proj": 9, "^model.layers.0.self_attn.q_proj": 1.5, "proj": 100,
                       "j_proj|v_proj": 3})
    yield "patterns", False, dict(usual, **patterns)
    yield "patterns_root", False, dict(usual, use_rslora=True, **patterns)
    yield "patterns_dora", False, dict(usual, use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    yield "saved_all", False, dict(usual, modules_to_save=["embed_tokens", "lm_head", "norm", "input_layernorm"])
    yield "saved_projection", False, dict(usual, target_modules=["q_proj"], modules_to_save=["k_proj", "up_proj"])
    for tied in (False, True):
        end = "_tied" if tied else ""
        yield "saved_head" + end, tied, dict(usual, modules_to_save=["lm_head"])
        yield "saved_embedding" + end, tied, dict(usual, modules_to_save=["embed_tokens"])
        yield "tokens" + end, tied, dict(usual, trainable_token_indices=[4, 9, 60])
        yield "tokens_both" + end, tied, dict(usual, trainable_token_indices={"lm_head": [7], "embed_tokens": [4, 9]})
    yield "tokens_head_tied", True, dict(usual, trainable_token_indices={"lm_head": [7, 12]})
    yield "tokens_same_tied", True, dict(usual, trainable_token_indices={"embed_tokens": [7, 12], "lm_head": [7, 12]})
    yield "saved_tied_together", True, dict(usual, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    yield "pissa", False, dict(usual, init_lora_weights="pissa")
    yield "pissa_all", False, dict(r=4, lora_alpha=5, use_rslora=True, init_lora_weights="pissa", target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], rank_pattern={"k_proj": 16})
    yield "pissa_dora", False, dict(usual, init_lora_weights="pissa", use_dora=True)
    yield "olora", False, dict(usual, init_lora_weights="olora")
    yield "orthogonal", False, dict(usual, r=4, init_lora_weights="orthogonal")
    yield "mica", False, dict(usual, init_lora_weights="mica")


def slim(folder):
    """Weights in bfloat16, which both sides widen to the same numbers: half the bytes."""
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    save_file({name: t.bfloat16().contiguous() for name, t in tensors.items()}, path)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    cases = []
    texts = [(SHORT, 1), (LONG, 2)]
    with tempfile.TemporaryDirectory() as work:
        plain, tied, biased = (os.path.join(OUT, name) for name in ("plain", "tied", "biased"))
        base(plain)
        base(tied, tie_word_embeddings=True)
        base(biased, attention_bias=True, mlp_bias=True)
        for folder in (plain, tied, biased):
            path = os.path.join(folder, "model.safetensors")
            save_file({n: t.bfloat16().contiguous() for n, t in load_file(path).items()}, path,
                      metadata={"format": "pt"})

        def add(name, model, fields, drop=(), adapter_folder=None, qwen=False):
            folder = os.path.join(work, name)
            shutil.copytree(model, folder)
            edit(folder, **fields)
            path = os.path.join(folder, "model.safetensors")
            tensors = load_file(path)
            save_file({n: t for n, t in tensors.items() if not any(part in n for part in drop)}, path,
                      metadata={"format": "pt"})
            case = {"name": name, "model": os.path.basename(model), "config": fields, "drop": list(drop)}
            if adapter_folder:
                case["adapter"] = os.path.basename(adapter_folder)
            case["texts"] = []
            for n, seed in texts:
                if n > SHAPE["max_position_embeddings"] and "rope" not in json.dumps(fields):
                    n = SHAPE["max_position_embeddings"]
                kind = Qwen2ForCausalLM if qwen else LlamaForCausalLM
                loaded = kind.from_pretrained(folder, dtype=torch.float32)
                if adapter_folder:
                    loaded = PeftModel.from_pretrained(loaded, adapter_folder)
                tokens = ids(n, seed)
                case["texts"].append({"ids": tokens, "scores": scores(loaded, tokens)})
            if "rope" in json.dumps(fields):
                loaded = kind.from_pretrained(folder, dtype=torch.float32)
                case["greedy"] = greedy(loaded, case["texts"][0]["ids"], 26)
            cases.append(case)

        for name, fields in rope_cases():
            # The scalings that reach beyond max_position_embeddings keep it; the others are given a longer one.
            kind = json.dumps(fields)
            far = "dynamic" in kind or '"factor": 4.0' in kind and "yarn" in kind
            add(name, plain, fields if far else dict(fields, max_position_embeddings=48))
        for name, fields in bias_cases():
            every = {"attention_bias": ["q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"],
                     "mlp_bias": ["gate_proj.bias", "up_proj.bias", "down_proj.bias"]}
            drop = [part for key, parts in every.items() if not fields.get(key) for part in parts]
            add(name, biased, dict({"attention_bias": False, "mlp_bias": False}, **fields), drop)
        add("qwen2", biased, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            ["o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"], qwen=True)
        add("tied_with_other_head", plain, {"tie_word_embeddings": True})
        add("tied_with_head_alone", plain, {"tie_word_embeddings": True}, ["embed_tokens"])
        for name, is_tied, config in adapter_cases():
            folder = os.path.join(OUT, name)
            model = tied if is_tied else plain
            adapter(model, folder, config)
            slim(folder)
            add(name, model, {}, adapter_folder=folder)
    with open(os.path.join(OUT, "cases.json"), "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    total = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(OUT) for f in fs)
    print(len(cases), "cases,", total, "bytes")


if __name__ == "__main__":
    main()
