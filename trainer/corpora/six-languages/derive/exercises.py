"""Functions to be written from their docstrings."""

import ast
import sys

from .functions import (MAX_LINE, POOR_DOCSTRING, choose, docstring, free_names, is_trivial, order, self_attributes,
                        signature, summary, without_docstring)

# Answers stay short enough for a prompt and an answer to share a small context.
MAX_CODE_CHARS = 1_600
STDLIB = sys.stdlib_module_names

# {kind} is "function" or "method"; {doc} is the indented docstring with its quotes.
ASKS = (
    "Write a Python {kind} `{signature}`.\n\n{summary}",
    "Implement the Python {kind} `{signature}` that does the following: {summary}",
    "Complete this Python {kind}:\n\n{signature}:\n{doc}\n",
    "{summary}\n\nWrite this as a Python {kind} with the signature `{signature}`.",
    "I need a Python {kind} called `{name}`. Its signature is `{signature}`. {summary}",
    "Fill in the body of this Python {kind}.\n\n{signature}:\n{doc}\n",
    "Please write the code of `{signature}` in Python. Its docstring reads: {summary}",
    "Write Python code.\n\nSignature: `{signature}`\nTask: {summary}",
    "Given the signature and the docstring, write the {kind}.\n\n```python\n{signature}:\n{doc}\n```",
    "How would you implement `{signature}` in Python? {summary}",
)


def exercise(function):
    """(rank, record), or None where the function makes no good exercise; the lowest ranks are the best."""
    node, package = function.node, function.package
    text, shortened = docstring(node), False
    short = summary(text)
    if len(text) > 400:
        # What a long docstring says after its first paragraph is reference, not the task.
        text, shortened = short, True
    if not 15 <= len(text) <= 400 or POOR_DOCSTRING.search(text) or '"""' in text:
        return None
    if len(short) < 15 or short.count(" ") < 2 or not short[0].isalpha() or short.endswith((":", ",")):
        return None
    bare = without_docstring(function)
    if bare is None or is_trivial(node) or len(bare) > MAX_CODE_CHARS:
        return None
    lines = sum(1 for line in bare.split("\n") if line.strip())
    if not 3 <= lines <= 30:
        return None
    attributes = self_attributes(node)
    if len(attributes) > 2 or "super" in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
        return None
    needed, unknown = [], 0
    for name in sorted(free_names(node)):
        statement, module = function.imports.get(name, (None, None))
        if statement and (module in STDLIB or module in ("numpy", "pandas")):
            needed.append(statement)
        elif name != node.name:
            unknown += 1
    if unknown > 2 or len(needed) > 4:
        return None
    keep = order("keep", function.key) % 2 == 0
    if shortened:
        indent = " " * node.body[0].col_offset
        kept = [f'{indent}"""{text}"""'] if len(indent) + len(text) + 6 <= MAX_LINE else []
        code = without_docstring(function, kept) if keep else bare
    else:
        code = function.source if keep else bare
    if needed and not function.is_method:
        code = "\n".join(sorted(set(needed))) + "\n\n\n" + code
    quoted = "\n".join("    " + line if line else "" for line in f'"""{text}"""'.split("\n"))
    ask = choose(ASKS, "ask", function.key).format(
        kind="method" if function.is_method else "function",
        signature=signature(node), name=node.name, summary=short, doc=quoted)
    # Short and self-contained functions come first.
    rank = 4 * unknown + 2 * len(attributes) + 3 * function.is_method + lines // 4 + 2 * node.name.startswith("_")
    messages = [{"role": "user", "content": ask.strip()}, {"role": "assistant", "content": code}]
    return rank, {"messages": messages, "source": package}
