#!/usr/bin/env python3
"""Models go from transformers to demask and back, and both train alike.

    python tests/interop/transformers_check.py [--demask PROGRAM] [--work DIR]

For weights of transformers in f32, in bf16, in shards with the head tied to the embedding, and for
a Qwen2 (biases on q, k and v):

  1. save_pretrained writes a small random model and its tokenizer;
  2. `demask train` goes on from it, autoregressively and by block diffusion;
  3. what it wrote is loaded by AutoModelForCausalLM and AutoTokenizer: no tensor missing or left
     over, the same ids for a text, the same log-probabilities as `demask score`;
  4. torch repeats the steps on transformers' model: the same losses and gradient norms step by
     step, the same weights at the end.

The text fills exactly the sequences of one step, so that each step sees all of them and their
order does not matter. Block diffusion is repeated at B = 1, where the clip hides every token and
nothing is drawn; at B = 4 it is trained and loaded.

Prints the largest differences; exit code 1 if one is above its bound.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                              PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install -r tests/interop/requirements.txt")

LENGTH, BATCH, STEPS = 128, 4, 8
SPECIAL = ["<|endoftext|>", "<|mask|>"]
EOS, MASK = 0, 1
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
# Rounding in f32, in other orders of summation. AdamW divides a gradient by its own size, so what
# rounding leaves of a tiny one moves its weight by a share of the learning rate (1e-3): single
# weights differ by more than rounding, the mean does not.
BOUNDS = {"loss": 2e-5, "grad norm (relative)": 1e-5, "weight": 5e-4, "weight, mean": 1e-7,
          "log-probability": 2e-5}

TRAIN = """
seed = 1
model.from = "{base}"
data = {{ paths = ["text"], length = {length}, held_out = 0.0 }}
optimizer = {{ batch = {batch}, micro_batch = 2 }}
[[phase]]
objective = "{objective}"
steps = {steps}
lr = 1e-3
lr_warmup = 3
lr_min_ratio = 0.1
{more}
"""


class Report:
    """The largest difference of each kind, and whether it is within its bound."""

    def __init__(self):
        self.good = True

    def say(self, case, what, difference):
        good = difference <= BOUNDS[what]
        self.good &= good
        print(f"{case:16} {what:22} {difference:.2e}  {'≤' if good else 'ABOVE'} {BOUNDS[what]:.0e}")

    def check(self, case, what, good):
        self.good &= good
        print(f"{case:16} {what:22} {'equal' if good else 'DIFFERENT'}")


def write_text(folder):
    """One file of Python as long as the sequences of a step, and a little more."""
    lines = Path(__file__).read_text().splitlines(keepends=True)
    tokenizer = train_tokenizer("".join(lines))
    text = ""
    for line in lines:
        text += line
        if len(tokenizer.encode(text).ids) > LENGTH * BATCH:
            break
    count = len(tokenizer.encode(text).ids)
    assert LENGTH * BATCH < count < LENGTH * (BATCH + 1), count
    folder.mkdir()
    (folder / "text.py").write_text(text)
    return tokenizer, text


def train_tokenizer(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def write_base(folder, tokenizer, dtype, shard, tied):
    """A random model with grouped heads, as transformers writes it."""
    torch.manual_seed(20)
    kinds = (Qwen2Config, Qwen2ForCausalLM) if folder.name == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    config = kinds[0](
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=176,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=EOS)
    model = kinds[1](config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which begin at 0
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[EOS],
                            mask_token=SPECIAL[MASK]).save_pretrained(folder)


def load(folder):
    """The model in f32; no tensor may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                       output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    assert not wrong, f"{folder}: {wrong}"
    return model


def demask(program, *arguments):
    """What the program prints with --json."""
    done = subprocess.run([program, *map(str, arguments), "--json"], stdout=subprocess.PIPE,
                          check=True, env={**os.environ, "NO_COLOR": "1"})
    return json.loads(done.stdout)


def train(program, work, base, objective, more=""):
    """Trains in a folder of its own and returns it with the lines of metrics.jsonl."""
    run = work / f"{base}-{objective}{len(more)}"
    recipe = work / f"{run.name}.toml"
    recipe.write_text(TRAIN.format(base=base, length=LENGTH, batch=BATCH, steps=STEPS,
                                   objective=objective, more=more))
    demask(program, "train", recipe, "--out", run, "--no-tune", "--quiet")
    with open(run / "metrics.jsonl") as lines:
        return run / "model", [json.loads(line) for line in lines]


def check_loads(report, program, case, folder, text):
    """Does transformers read in the folder what demask reads?"""
    # For a Qwen2 transformers puts the splitting of Qwen's tokenizer into whatever tokenizer it finds.
    kind = PreTrainedTokenizerFast if case.startswith("qwen2") else AutoTokenizer
    tokenizer = kind.from_pretrained(folder)
    scored = demask(program, "score", "--model", folder, "--text", text, "--mode", "ar", "--quiet")["tokens"]
    ids = [token["id"] for token in scored]
    report.check(case, "ids of a text", ids == tokenizer(text, add_special_tokens=False).input_ids)
    special = [tokenizer.eos_token_id, tokenizer.mask_token_id]
    report.check(case, "special tokens", special == [EOS, MASK])
    report.check(case, "text of the ids", tokenizer.decode(ids) == text)
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = load(folder)(input_ids=ids).logits
    want = torch.log_softmax(logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0]
    got = torch.tensor([token["logprob"] for token in scored[1:]], dtype=torch.float64)
    report.say(case, "log-probability", (got - want).abs().max().item())


def autoregressive_loss(model, ids):
    """transformers' own: it shifts the labels."""
    return model(input_ids=ids, labels=ids).loss


def diffusion_loss(model, ids):
    """Block diffusion at B = 1 with every token hidden, as the two-copy pass: row i of the first
    copy sees itself and the clean tokens before i, and predicts token i."""
    length = ids.shape[1]
    both = torch.cat([torch.full_like(ids, MASK), ids], 1)
    before = torch.ones(length, length, dtype=torch.bool).tril(-1)
    self = torch.eye(length, dtype=torch.bool)
    never = torch.zeros_like(before)
    allow = torch.cat([torch.cat([self, before], 1), torch.cat([never, before | self], 1)])
    mask = torch.zeros(allow.shape).masked_fill(~allow, torch.finfo(torch.float32).min)
    positions = torch.arange(length).repeat(2)[None].expand_as(both)
    mask = mask[None, None].expand(len(ids), 1, -1, -1)
    logits = model(input_ids=both, attention_mask=mask, position_ids=positions).logits[:, :length]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def repeat(report, case, base, written, metrics, ids, loss_of):
    """The same steps in torch; the rates are those that demask says it used."""
    model = load(base).train()
    named = dict(model.named_parameters())

    def decays(name):
        return named[name].ndim == 2 and "embed_tokens" not in name

    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in named.items() if decays(n)], "weight_decay": DECAY},
         {"params": [p for n, p in named.items() if not decays(n)], "weight_decay": 0.0}],
        betas=BETAS, eps=EPS)
    assert len(metrics) == STEPS
    print(f"{case:16} step        lr   demask     torch      grad norm  torch")
    worst_loss = worst_norm = 0.0
    for line in metrics:
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item()
        optimizer.step()
        print(f"{case:16} {line['step']:4}  {line['lr']:.2e}   {line['loss']:.6f}   "
              f"{loss.item():.6f}   {line['grad_norm']:.6f}   {norm:.6f}")
        worst_loss = max(worst_loss, abs(line["loss"] - loss.item()))
        worst_norm = max(worst_norm, abs(line["grad_norm"] / norm - 1.0))
    assert metrics[-1]["loss"] < metrics[0]["loss"], "nothing was learnt"
    report.say(case, "loss", worst_loss)
    report.say(case, "grad norm (relative)", worst_norm)
    theirs = load(written).state_dict()
    differences = torch.cat([(theirs[n] - p).abs().flatten() for n, p in model.state_dict().items()])
    before = load(base).state_dict()
    moved = max((theirs[n] - p).abs().max().item() for n, p in before.items())
    print(f"{case:16} weights moved by up to {moved:.2e}")
    report.say(case, "weight", differences.max().item())
    report.say(case, "weight, mean", differences.mean().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demask", default="target/release/demask", help="the program")
    parser.add_argument("--work", type=Path, help="a new folder to keep what is written")
    arguments = parser.parse_args()
    program = os.path.abspath(arguments.demask)
    transformers.utils.logging.disable_progress_bar()
    report = Report()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary) / "work"
        work.mkdir()
        tokenizer, text = write_text(work / "text")
        ids = torch.tensor(tokenizer.encode(text).ids[:LENGTH * BATCH]).reshape(BATCH, LENGTH)
        for base, dtype, shard, tied in (("f32", torch.float32, "5GB", False),
                                         ("bf16", torch.bfloat16, "5GB", False),
                                         ("sharded", torch.float32, "100KB", True),
                                         ("qwen2", torch.float32, "5GB", True)):
            write_base(work / base, tokenizer, dtype, shard, tied)
            files = len(list((work / base).glob("*.safetensors")))
            assert (files > 2) == (base == "sharded"), files
            check_loads(report, program, base, work / base, text)
            written, metrics = train(program, work, base, "ar")
            repeat(report, f"{base} ar", work / base, written, metrics, ids, autoregressive_loss)
            check_loads(report, program, f"{base} ar", written, text)
            written, metrics = train(program, work, base, "block_diffusion", "block_length = 1")
            repeat(report, f"{base} B=1", work / base, written, metrics, ids, diffusion_loss)
            written, _ = train(program, work, base, "block_diffusion",
                               "block_length = 4\ncorruption_warmup = 3")
            check_loads(report, program, f"{base} B=4", written, text)
    print("all within bounds" if report.good else "NOT within bounds")
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
