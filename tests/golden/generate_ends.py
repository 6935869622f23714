#!/usr/bin/env python3
"""Writes ends.json: where transformers and llama.cpp begin texts and end answers, by what a model's files say.

python generate_ends.py NODE_LLAMA_CPP, in a folder with the packages torch, transformers 5.24.0 and gguf; the argument
is dist/index.js of an installed node-llama-cpp 3.22.1 (llama.cpp v0.5.0).
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

try:
    import gguf
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
except ImportError as missing:
    sys.exit(f"generate_ends.py: {missing}; pip install gguf torch tokenizers transformers")

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def around(before, behind):
    """A post-processor that puts these tokens before and behind a text."""
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    token = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    single = [*map(token, before), sequence, *map(token, behind)]
    special = {n: {"id": n, "ids": [SPECIAL.index(n)], "tokens": [n]} for n in {*before, *behind}}
    return {"type": "TemplateProcessing", "single": single, "special_tokens": special,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}]}


def tokenizer_json():
    """Bytes and special tokens alone."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": BYTES,
            "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
            "post_processor": None, "decoder": BYTES, "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def folder_ends():
    """Which tokens end an answer: what a loaded model's generate looks at."""
    cases = [
        ({"eos_token_id": 1}, None), ({"eos_token_id": [1, 4]}, None), ({"eos_token_id": None}, None), ({}, None),
        ({"eos_token_id": 1}, {"eos_token_id": [1, 4]}), ({"eos_token_id": [1, 4]}, {"eos_token_id": 4}),
        ({"eos_token_id": 1}, {"temperature": 0.5}), ({"eos_token_id": 1}, {"eos_token_id": None}),
        ({}, {"eos_token_id": 4}), ({"eos_token_id": 1}, {"_from_model_config": True, "eos_token_id": 4}),
        ({"eos_token_id": 1, "bos_token_id": 0}, {"eos_token_id": [4, 1], "pad_token_id": 2, "top_p": 0.8}),
    ]
    sizes = dict(vocab_size=8, **SIZES)
    for config, generation in cases:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
            plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
            (folder / "config.json").write_text(json.dumps({**plain, **config}))
            (folder / "generation_config.json").unlink()
            if generation is not None:
                (folder / "generation_config.json").write_text(json.dumps(generation))
            ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        yield {"config": {**plain, **config}, "generation_config": generation, "ends": ends}


def folder_beginnings():
    """What is put around a text and before a conversation."""
    bos, end = "<|endoftext|>", "<|im_end|>"
    frame = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    for processor in [None, BYTES, around([bos], []), around([], [end]), around([bos], [end]),
                      {"type": "Sequence", "processors": [BYTES, around([bos], [])]}]:
        for settings in [{}, {"add_bos_token": True}, {"add_bos_token": False},
                         {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}, {"add_eos_token": True}]:
            template = "{{ bos_token }}" + frame if len(settings) == 1 else frame
            settings = {"bos_token": bos, "eos_token": end, "chat_template": template, **settings}
            with tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
                tokenizer = tokenizer_json() | {"post_processor": processor}
                (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
                (folder / "tokenizer_config.json").write_text(json.dumps(settings))
                tokenizer = AutoTokenizer.from_pretrained(folder)
                chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
                yield {"post_processor": processor, "tokenizer_config": settings,
                       "text": tokenizer("def f")["input_ids"], "chat": chat["input_ids"]}


def gguf_ends(node):
    """What llama.cpp says of vocabularies without a model."""
    letters = list("abcdefghijklm")
    chatml = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    llama3 = [*letters, "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    qwen = [*chatml, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"]
    harmony = [*letters, "<|return|>", "<|call|>", "<|end|>", "<|channel|>"]
    flush = [*letters, "<|flush|>", "<|calls|>", "<|end|>"]
    gemma = [*letters, "<eos>", "</s>", "<turn|>", "<|tool_response>"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "<|im_end|>"]
    cases = [
        ("gpt2", "gpt-2", letters, {}),
        ("gpt2", "gpt-2", letters, {"eos_token_id": 3}),
        ("gpt2", "gpt-2", letters, {"eos_token_id": 3, "eot_token_id": 5, "eom_token_id": 7}),
        ("gpt2", "gpt-2", letters, {"eos_token_id": 99, "bos_token_id": 99}),
        ("gpt2", "gpt-2", letters[:8], {}),
        ("gpt2", "gpt-2", letters, {"bos_token_id": 2, "add_bos_token": True}),
        ("gpt2", "gpt-2", letters, {"add_bos_token": True}),
        ("gpt2", "smollm", chatml, {"eos_token_id": 15, "bos_token_id": 14, "add_bos_token": False}),
        ("gpt2", "qwen2", qwen, {"eos_token_id": 15, "bos_token_id": 13}),
        ("gpt2", "qwen2", qwen, {"eos_token_id": 15, "fim_pad_token_id": 1}),
        ("gpt2", "llama-bpe", llama3, {"bos_token_id": 13, "eos_token_id": 14}),
        ("gpt2", "llama-bpe", llama3, {"bos_token_id": 13, "eos_token_id": 16, "add_bos_token": False}),
        ("gpt2", "gpt-4o", harmony, {"eos_token_id": 13}),
        ("gpt2", "gpt-4o", flush, {"eos_token_id": 15}),
        ("gpt2", "gpt-2", gemma, {"eos_token_id": 13}),
        ("gpt2", "gpt-2", [*letters, "<reponame>", "</s>", "[EOS]", "[PAD]"], {"eos_token_id": 3}),
        ("llama", None, pieces, {}),
        ("llama", None, pieces, {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}),
        ("llama", None, pieces, {"eos_token_id": 261, "add_eos_token": True}),
    ]
    ask = """
        const { getLlama } = await import(process.argv[2]);
        const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: "error" });
        const all = [];
        for (const file of process.argv.slice(3)) {
          const model = await llama.loadModel({ modelPath: file, vocabOnly: true });
          const n = Number(process.env[file.split("/").pop()]);
          const ends = [];
          for (let id = 0; id < n; id++) if (model._model.isEogToken(id)) ends.push(id);
          const [bos, eos] = [model._model.tokenBos(), model._model.tokenEos()];
          all.push({ ends, bos, eos, add_bos: model._model.shouldPrependBosToken() });
          await model.dispose();
        }
        console.log(JSON.stringify(all));
        process.exit(0);
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "ask.mjs").write_text(ask)
        files, sizes = [], {}
        for i, (model, pre, tokens, keys) in enumerate(cases):
            files.append(str(folder / f"{i}.gguf"))
            sizes[f"{i}.gguf"] = str(len(tokens))
            writer = gguf.GGUFWriter(files[-1], "llama")
            writer.add_context_length(64)
            writer.add_embedding_length(32)
            writer.add_block_count(1)
            writer.add_feed_forward_length(64)
            writer.add_head_count(4)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_vocab_size(len(tokens))
            writer.add_tokenizer_model(model)
            if pre:
                writer.add_tokenizer_pre(pre)
            writer.add_token_list(tokens)
            if model == "llama":
                writer.add_token_scores([-float(i) for i in range(len(tokens))])
            else:
                writer.add_token_merges(["a b"])
            kind = lambda t: gguf.TokenType.BYTE if t.startswith("<0x") else gguf.TokenType.NORMAL
            special = lambda t: gguf.TokenType.CONTROL if len(t) > 1 and not t.startswith("<0x") else kind(t)
            writer.add_token_types([special(t) for t in tokens])
            for key, value in keys.items():
                add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
                add(f"tokenizer.ggml.{key}", value)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        command = ["node", str(folder / "ask.mjs"), node, *files]
        said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **sizes})
        if said.returncode:
            sys.exit(said.stderr)
        for (model, pre, tokens, keys), answer in zip(cases, json.loads(said.stdout.splitlines()[-1])):
            yield {"model": model, "pre": pre, "tokens": tokens, "keys": keys, **answer}


def main():
    tokenizer = json.dumps(tokenizer_json())
    tables = {
        "folder_ends": list(folder_ends()),
        "folder_beginnings": list(folder_beginnings()),
        "gguf": list(gguf_ends(sys.argv[1])),
    }
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in tables.items()]
    (HERE / "ends.json").write_text("{\n" + ",\n".join([f'"tokenizer": {tokenizer}', *lines]) + "\n}\n")


if __name__ == "__main__":
    main()
