#!/usr/bin/env python3
"""The published sampler of Stable-DiffCoder, step by step, as an oracle for demask's.

Follows `generate_block` of the model's Hugging Face repository as a whole: prefill of the whole
blocks of the prompt under the block-causal mask with its keys and values kept, denoising passes
over one block whose keys and values are dropped, one more pass over the finished block whose keys
and values stay, quotas from the number of masked positions, eos searched from the answer on.
Runs the tiny model of this folder in transformers, with its cache.

    python tests/golden/reference_sampler.py     # writes tiny/sampler.json

Pinned: Python 3.11, torch 2.15.0, transformers 5.23.0 (as tests/interop/requirements.txt). Cases
are kept where no decision hangs on less than 2e-3 and where the sampler's own defects do not show:
it never proposes the mask token there, and every block is full when its passes end.
"""
import copy
import json
import math
import os
import random
import sys

try:
    import torch
    from transformers import DynamicCache, LlamaForCausalLM
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install numpy torch safetensors transformers peft; README.md has versions")

HERE = os.path.dirname(os.path.abspath(__file__))
MASK, BLOCK, VOCAB = 96, 4, 97
GAP = 2e-3


class Close(Exception):
    """A decision that rounding could turn, or one that the sampler gets wrong."""


class Sampler:
    def __init__(self, model):
        self.model = model

    def forward(self, x, start, end, cache, keep):
        """Logits of x[start:end) under the block-causal mask on absolute positions, given the
        keys and values of everything before; their own are kept or dropped."""
        q, k = torch.arange(start, end), torch.arange(end)
        allow = q[:, None] // BLOCK >= k[None] // BLOCK
        cache = cache if keep else copy.deepcopy(cache)
        mask = torch.zeros(allow.shape).masked_fill(~allow, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([x[start:end]]), position_ids=q[None],
                                attention_mask=mask[None, None], past_key_values=cache,
                                use_cache=True).logits[0]
        assert cache.get_seq_length() == end
        return logits.double()

    def generate(self, prompt, gen_length, steps, threshold, eos):
        x = prompt + [MASK] * gen_length
        P, total = len(prompt), len(x)
        cache, commits, nfe = DynamicCache(), [], 0
        aligned = P // BLOCK * BLOCK
        if aligned:
            self.forward(x, 0, aligned, cache, keep=True)
        for s in range(aligned, total, BLOCK):
            e = min(s + BLOCK, total)
            m = sum(token == MASK for token in x[s:e])
            quotas = [m // steps + (i < m % steps) for i in range(steps)]
            while any(token == MASK for token in x[s:e]):
                if not quotas:
                    raise Close("the sampler would leave holes and skip the commit")
                quota = quotas.pop(0)
                if quota == 0:
                    continue
                logits = self.forward(x, s, e, cache, keep=False)
                nfe += 1
                commits.append(self.commit(x, s, logits, quota, threshold))
            first = next((i for i in range(max(s, P), e) if x[i] == eos), None)
            if first is not None:
                return x[P:first], commits, nfe
            self.forward(x, s, e, cache, keep=True)
            nfe += 1
        return x[P:], commits, nfe

    @staticmethod
    def commit(x, start, logits, quota, threshold):
        found = []
        for i, row in enumerate(logits, start):
            if x[i] == MASK:
                top, second = row.topk(2).values.tolist()
                if top - second < GAP or row.argmax() == MASK:
                    raise Close("the token")
                found.append((math.exp(top - row.logsumexp(0).item()), i, row.argmax().item()))
        found.sort(key=lambda f: -f[0])
        if threshold is not None:
            if any(abs(confidence - threshold) < GAP for confidence, _, _ in found[1:]):
                raise Close("the threshold")
            quota = max(1, sum(confidence >= threshold for confidence, _, _ in found))
        if quota < len(found) and found[quota - 1][0] - found[quota][0] < GAP:
            raise Close("the order")
        for _, i, token in found[:quota]:
            x[i] = token
        return sorted(i for _, i, _ in found[:quota])


def main():
    model = LlamaForCausalLM.from_pretrained(os.path.join(HERE, "tiny"), dtype=torch.float32,
                                             attn_implementation="eager").eval()
    sampler, chance, cases = Sampler(model), random.Random(3), []
    for length in range(3, 11):
        for steps, threshold in ((4, None), (2, None), (1, None), (4, 0.2), (4, 0.12)):
            # Once to the full length, once with a token of that answer as eos.
            for stops in (False, True):
                for _ in range(400):
                    prompt = [chance.randrange(3, MASK) for _ in range(length)]
                    try:
                        eos = None
                        if stops:
                            answer, _, _ = sampler.generate(prompt, 16, steps, threshold, None)
                            eos = answer[chance.randrange(3, 12)]
                            # In the prompt as well, where it means nothing.
                            prompt[-2] = eos
                        answer, commits, nfe = sampler.generate(prompt, 16, steps, threshold, eos)
                        if stops and not 0 < len(answer) < 16:
                            continue
                    except Close:
                        continue
                    cases.append(dict(prompt=prompt, steps=steps, threshold=threshold, eos=eos,
                                      gen_length=16, answer=answer, commits=commits, nfe=nfe))
                    break
                else:
                    raise SystemExit(f"no case for {length}, {steps}, {threshold}, {stops}")
    with open(os.path.join(HERE, "tiny", "sampler.json"), "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{len(cases)} cases, prompts of 3 to 10 tokens")


if __name__ == "__main__":
    main()
