#!/usr/bin/env python3
"""Writes the data files of this folder as pyarrow 26 and datasets 5.2 write what people have: python make.py."""
import json
import pathlib
import sys

try:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    sys.exit(f"make.py: {missing}; pip install datasets pyarrow")

HERE = pathlib.Path(__file__).parent
TEXT = pa.string()
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))


def said(role, content):
    return {"role": role, "content": content}


def write(name, columns, types=(), **options):
    types = dict(types)
    arrays = {column: pa.array(rows, type=types.get(column)) for column, rows in columns.items()}
    pq.write_table(pa.table(arrays), HERE / name, **options)


def main():
    turns = [[said("user", f"Write f{i}"), said("assistant", f"def f{i}(): pass")] for i in range(2)]
    write("messages-brotli.parquet", {"messages": turns}, {"messages": MESSAGES}, compression="brotli")
    write("text-binary.parquet", {"content": ["x = 'é'\n".encode(), b"\xff\xfe", b"y = 2\n"]})
    parts = [{"type": "text", "text": "Write "}, {"type": "text", "text": "h"}]
    shown = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    answer = [{"type": "text", "text": "def h(): pass"}]
    write("parts.parquet", {"messages": [[said("user", p), said("assistant", answer)] for p in (parts, shown)]})
    mixed = [[said("user", [parts[0], {"type": "text", "text": 'a "quoted" one'}]), said("assistant", 'say("é\\n")\n')]]
    rows = datasets.Dataset.from_list([{"messages": m} for m in mixed], on_mixed_types="use_json")
    rows.to_parquet(HERE / "json-column.parquet")
    prompt = [[said("user", "q"), said("assistant", "a"), said("user", "r")]]
    completion = [[said("assistant", "b")]]
    write("prompt-completion.parquet", {"prompt": prompt, "completion": completion},
          {"prompt": MESSAGES, "completion": MESSAGES})
    lists = pa.struct([("role", pa.list_(TEXT)), ("content", pa.list_(TEXT))])
    columns = {"conversations": [{"role": ["user", "assistant"], "content": ["q", "a"]}]}
    write("struct-of-lists.parquet", columns, {"conversations": lists})
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    talk = [said("user", "Weather?"), {**said("assistant", None), "tool_calls": [call, other]},
            {**said("tool", "sunny"), "tool_call_id": "1"}, {**said("assistant", "Sunny."), "reasoning_content": "ok"}]
    tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
    write("tools.parquet", {"messages": [talk], "tools": [tools]})
    rows = [{"instruction": "i", "input": "", "output": "o"}, {"instruction": "j", "input": "n", "output": "p"}]
    (HERE / "alpaca.json").write_text("\ufeff" + json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
