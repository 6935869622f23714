#!/usr/bin/env python3
"""Does demask merge an adapter of peft as peft does?

    peft_check.py make DIR_BASE DIR_ADAPTER [--dora]     a random adapter; DIR_BASE is made if absent
    peft_check.py DIR_BASE DIR_ADAPTER MERGED_DIR        base + adapter against the merged model
    peft_check.py self DIR [--dora]                      peft alone: make, merge, save, check

The check computes logits of fixed ids three times in f32: base with the adapter beside it, after
merge_and_unload, and with the merged model in MERGED_DIR. It prints the largest differences; exit
code 1 if one is above the bound. Adapters that demask wrote are read the same way.
"""
import argparse
import sys
from pathlib import Path

try:
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install -r tests/interop/requirements.txt")

BOUND = 1e-4  # logits are of size 10 at most, rounded in f32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder):
    model, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                   output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


def make_base(folder):
    """A tiny random Llama whose attention is far from uniform."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e5,
        max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_adapter(base, folder, dora):
    """Every linear layer gets an adapter of rank 4 that changes what the model says."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS,
                        use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # peft begins with zeros
                parameter.normal_(std=0.1)
            elif "lora_magnitude_vector" in name:  # and with the norms of the rows
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25))
    model.save_pretrained(folder)


def fixed_ids(vocabulary):
    return torch.tensor([[(7 * i * i + 3 * i + 5) % vocabulary for i in range(64)]])


def check(base, adapter, merged, bound=BOUND):
    """Whether the three agree."""
    model = load(base)
    ids = fixed_ids(model.config.vocab_size)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        model = PeftModel.from_pretrained(model, adapter).eval()
        beside = model(input_ids=ids).logits
        by_peft = model.merge_and_unload()
        theirs = load(merged)
        weights = by_peft.state_dict()
        differences = {
            "merge_and_unload − beside": by_peft(input_ids=ids).logits - beside,
            "merged folder − beside": theirs(input_ids=ids).logits - beside,
            "weights, merged folder − peft": torch.cat(
                [(value - weights[name]).flatten() for name, value in theirs.state_dict().items()]),
        }
    print(f"logits up to {beside.abs().max():.2f}, moved by the adapter by up to "
          f"{(beside - plain).abs().max():.2e}")
    good = True
    for what, difference in differences.items():
        largest = difference.abs().max().item()
        good &= largest <= bound
        print(f"{what:32} {largest:.2e}  {'≤' if largest <= bound else 'ABOVE'} {bound:.0e}")
    return good


def check_self(folder, dora):
    base, adapter, merged = (folder / name for name in ("base", "adapter", "merged"))
    folder.mkdir(parents=True)
    make_base(base)
    make_adapter(base, adapter, dora)
    PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(merged)
    return check(base, adapter, merged)


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(20)
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=__doc__)
    names = {"make": ["base", "adapter"], "self": ["folder"]}.get(verb, ["base", "adapter", "merged"])
    for name in names:
        parser.add_argument(name, type=Path)
    if verb in ("make", "self"):
        parser.add_argument("--dora", action="store_true")
        arguments = parser.parse_args(sys.argv[2:])
    else:
        parser.add_argument("--bound", type=float, default=BOUND, help="for a model rounded to bf16, say")
        arguments = parser.parse_args()
    if verb == "make":
        if not arguments.base.exists():
            make_base(arguments.base)
        make_adapter(arguments.base, arguments.adapter, arguments.dora)
        return 0
    if verb == "self":
        return 0 if check_self(arguments.folder, arguments.dora) else 1
    return 0 if check(**vars(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
