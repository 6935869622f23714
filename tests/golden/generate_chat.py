#!/usr/bin/env python3
"""Write chat/golden.json: what transformers makes of chat templates.

    python3 tests/golden/generate_chat.py

Every line of chat/constructs.txt and every file of chat/templates is rendered by
`apply_chat_template(tokenize=False)` with the conversations and variables below; a case that
raises has `null` for a text and the first words of the error. `generation` has the spans, in
characters, that a template encloses by {% generation %}.
Made with transformers 5.24.0, Jinja2 3.1.6.
"""
import json
import os
import sys

try:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.chat_template_utils import render_jinja_template
except ImportError as missing:
    sys.exit(f"generate_chat.py: {missing}; pip install tokenizers transformers jinja2")

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat")
CALL = {"type": "function", "id": "abcdefghi",
        "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "hours": [8, 9.5]}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hello"}],
    "several": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What's <b> & 'x'?"},
        {"role": "assistant", "content": "A tag.\n", "tool_calls": None},
        {"role": "user", "content": " ok "}],
    "finished": [
        {"role": "user", "content": "  Two\nlines  "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes: \"é\" 日本 😀"}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "{\"t\": 20.0}"},
        {"role": "assistant", "reasoning_content": "20 is warm", "content": "It is warm."},
        {"role": "user", "content": "Thanks"}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": " there"}]}],
    "wrong": [
        {"role": "assistant", "content": "I begin."},
        {"role": "assistant", "content": "And go on."},
        {"role": "critic", "content": "No."}],
}
TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "Weather of a <city>.\nBy day.",
        "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "description": "A city's name"},
            "days": {"type": "integer", "default": 1, "minimum": 0.5},
            "hours": {"type": "array", "items": {"type": "number"}},
            "unit": {"type": "string", "enum": ["°C", "°F"]},
            "more": {"type": ["string", "null"], "nullable": True}},
            "required": ["city"]}}},
    {"type": "function", "function": {
        "name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}}]
DOCUMENTS = [{"title": "One", "text": "It's 1e20."}, {"title": "Two", "n": 1e20, "ok": True, "none": None}]
# What every construct may name.
VARIABLES = {
    "d": {"b": 1, "a": "<é'&>", "c": [1.0, None, {"z": True}]}, "l": [3, 1, 2], "l2": ["x", "y"],
    "h": {"items": "text", "type": "object"}}
# What templates are rendered with: (conversation, variables)
RUNS = [
    ("one", {}), ("several", {}), ("finished", {}), ("finished", {"add_generation_prompt": False}),
    ("tools", {"tools": TOOLS}), ("tools", {}), ("parts", {}), ("wrong", {}),
    ("one", {"tools": TOOLS, "documents": DOCUMENTS, "enable_thinking": False}),
    ("several", {"enable_thinking": True, "tools_in_user_message": False, "tools": TOOLS[:1]}),
    ("finished", {"continue_final_message": True, "add_generation_prompt": False}),
]



def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def case(tok, template, conversation, variables):
    arguments = {"add_generation_prompt": True} | variables
    try:
        text = tok.apply_chat_template(CONVERSATIONS[conversation], chat_template=template, tokenize=False,
                                       **arguments)
    except Exception as error:
        return {"expected": None, "error": f"{type(error).__name__}: {error}"[:60]}
    found = {"expected": text}
    if "{%- generation" in template and "continue_final_message" not in variables:
        known = {"tools": None, "documents": None} | arguments
        messages = [{k: v for k, v in m.items() if v is not None} for m in CONVERSATIONS[conversation]]
        _, spans = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True,
                                         **tok.special_tokens_map, **known)
        found["generation"] = spans[0]
    return found


def main():
    tok = tokenizer()
    cases = []
    for line in open(os.path.join(HERE, "constructs.txt"), encoding="utf-8"):
        line = line.rstrip("\n")
        if not line or line.startswith("# "):
            continue
        template = line.replace("⏎", "\n").replace("␍", "\r")
        cases.append({"line": line, **case(tok, template, "several", VARIABLES)})
    templates = []
    for name in sorted(os.listdir(os.path.join(HERE, "templates"))):
        template = open(os.path.join(HERE, "templates", name), encoding="utf-8", newline="").read()
        for run, (conversation, variables) in enumerate(RUNS):
            templates.append({"template": name, "run": run, **case(tok, template, conversation, variables)})
    rows = [json.dumps(row, ensure_ascii=False) for row in cases]
    more = [json.dumps(row, ensure_ascii=False) for row in templates]
    head = {"conversations": CONVERSATIONS, "variables": VARIABLES, "runs": RUNS}
    text = json.dumps(head, ensure_ascii=False)[:-1] + ',\n"constructs": [\n' + ",\n".join(rows)
    text += '\n],\n"templates": [\n' + ",\n".join(more) + "\n]}"
    # No object's address is a golden.
    assert " object at 0x" not in text, text[text.index(" object at 0x") - 200:][:300]
    with open(os.path.join(HERE, "golden.json"), "w", encoding="utf-8") as out:
        out.write(text + "\n")
    failed = sum(c["expected"] is None for c in cases)
    print(len(cases), "constructs,", failed, "of them errors;", len(templates), "renderings of templates,",
          sum(c["expected"] is None for c in templates), "of them errors;", len(text), "bytes")


if __name__ == "__main__":
    main()
