#!/usr/bin/env python3
"""Write lora/ and dora/: adapters of `tiny` as PEFT saves them, with what PEFT computes.

    python3 tests/golden/generate_lora.py

golden.safetensors beside each adapter holds `ids` i32 [2,24], `logits` f32 [2,24,97] of the adapted
model and `grad.<tensor>` of the mean next-token loss, computed in float64 and rounded once.
Made with torch 2.15, transformers 5.23, peft 0.21.
"""
import os
import shutil
import sys

try:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    from generate_golden import float64_throughout
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy torch safetensors transformers peft; README.md has versions")

HERE = os.path.dirname(os.path.abspath(__file__))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def generate(folder, dora):
    torch.manual_seed(7 + dora)
    base = LlamaForCausalLM.from_pretrained(os.path.join(HERE, "tiny"), torch_dtype=torch.float64)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=dora,
                        task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p).float().double() * 0.1)
            elif "lora_A" in name:
                p.copy_(p.float().double())
            elif "magnitude" in name:
                p.copy_((p * (0.5 + torch.rand_like(p))).float().double())
    ids = torch.randint(0, 96, (2, 24))
    with float64_throughout():
        out = model(ids)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
        loss.backward()
    golden = {"ids": ids.int(), "logits": out.logits.detach().float().contiguous()}
    # The names of the saved file, whose order of tensors is that of the gradients.
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    saved = get_peft_model_state_dict(model, state_dict=grads)
    golden |= {f"grad.{name}": g.float().contiguous() for name, g in saved.items()}
    golden["loss"] = loss.detach().float().reshape(1)
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "../tiny"
    model.float().save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    save_file(golden, os.path.join(folder, "golden.safetensors"))
    adapter = load_file(os.path.join(folder, "adapter_model.safetensors"))
    print(folder, "loss", float(loss), len(adapter), "tensors", len(golden), "goldens")


if __name__ == "__main__":
    for name, dora in [("lora", False), ("dora", True)]:
        generate(os.path.join(HERE, name), dora)
