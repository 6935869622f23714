#!/usr/bin/env python3
"""Derives the fine-tuning data from what fetch.sh left in OUT: OUT/sft/functions.jsonl and OUT/sft/edits.jsonl.

Only the standard library of Python 3.11 is used. Every choice is made by hashing the name of a function, never by
chance or by the order of a folder, so the same sources give the same bytes.
"""

import ast
import builtins
import difflib
import hashlib
import inspect
import io
import json
import keyword
import multiprocessing
import re
import sys
import tokenize
import warnings
from collections import Counter, defaultdict
from pathlib import Path

MAX_FUNCTIONS = 20_000
MAX_FUNCTIONS_PER_PACKAGE = 2_000
MAX_EDITS = 6_000
MAX_PAIRS_PER_PACKAGE = 1_000
MAX_EDITS_PER_MUTATION = 700
MAX_FILE_BYTES = 400_000
# Answers stay short enough for a prompt and an answer to share a small context.
MAX_CODE_CHARS = 1_600
MAX_EDIT_CHARS = 1_500
MAX_LINE = 120

# Tests are no examples of good functions, and these folders hold copies of other projects.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "externals", "idlelib", "lib2to3", "locale",
                   "migrations", "third_party"}
BUILTINS = set(dir(builtins))
STDLIB = sys.stdlib_module_names


def choose(options, *key):
    """The option that the key's hash picks."""
    return options[order(*key) % len(options)]


def order(*key):
    return int.from_bytes(hashlib.sha256("\0".join(map(str, key)).encode()).digest()[:8], "big")


# ---- reading functions -------------------------------------------------------------------------------------------


class Function:
    """One function or method, cut out of its file and moved to the left margin."""

    def __init__(self, package, path, qualname, source, imports):
        self.package, self.path, self.qualname = package, path, qualname
        self.source, self.imports = source, imports
        self.node = parse(source)

    @property
    def key(self):
        return f"{self.package}/{self.path}:{self.qualname}"

    @property
    def is_method(self):
        return "." in self.qualname


def parse(source):
    """The single function in the text, or None."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    if len(body) == 1 and isinstance(body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return body[0]
    return None


def source_files(root):
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        skipped = any(part in SKIPPED_FOLDERS or part.startswith("test_") for part in parts)
        if not skipped and not parts[-1].startswith(("test", "conftest")) and path.stat().st_size <= MAX_FILE_BYTES:
            yield path


def read_functions(root, path, package):
    """The functions of one file's top level and of its classes."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = text.split("\n")
    imports = file_imports(tree)
    found = []

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if not 3 <= node.end_lineno - node.lineno + 1 <= 150 or not is_plain(node):
                    continue
                function = cut(lines, node)
                if function is not None:
                    found.append((prefix + node.name, function, imports))

    visit(tree.body, "")
    relative = path.relative_to(root).as_posix()
    functions = [Function(package, relative, *parts) for parts in found]
    return [f for f in functions if f.node is not None]


def is_plain(node):
    """Dunders and tests make poor exercises; a decorator's meaning lies elsewhere in the file."""
    name = node.name
    return not (name.startswith("__") or name.startswith("test") or node.decorator_list or name == "setUp")


def cut(lines, node):
    indent = node.col_offset
    chosen = lines[node.lineno - 1:node.end_lineno]
    if any(line[:indent].strip() for line in chosen):
        return None  # a string that reaches into the margin cannot be moved
    code = "\n".join(line[indent:].rstrip() for line in chosen)
    if not code.isascii() or "\t" in code or any(len(line) > MAX_LINE for line in chosen):
        return None
    return code


def file_imports(tree):
    """What each name imported at the top of a file stands for: (statement, is the module another project's?)."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                found[name] = (ast.unparse(ast.Import([alias])), alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
            for alias in node.names:
                statement = ast.unparse(ast.ImportFrom(node.module, [alias], 0))
                found[alias.asname or alias.name] = (statement, node.module.split(".")[0])
    return found


def free_names(node):
    """The names that a function takes from outside, without the built-in ones."""
    bound, used = set(), set()
    for sub in ast.walk(node):
        if isinstance(sub, ast.Name):
            (used if isinstance(sub.ctx, ast.Load) else bound).add(sub.id)
        elif isinstance(sub, ast.arg):
            bound.add(sub.arg)
        elif isinstance(sub, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(sub.name)
        elif isinstance(sub, ast.ExceptHandler) and sub.name:
            bound.add(sub.name)
        elif isinstance(sub, ast.alias):
            bound.add((sub.asname or sub.name).split(".")[0])
        elif isinstance(sub, (ast.MatchAs, ast.MatchStar)) and sub.name:
            bound.add(sub.name)
        elif isinstance(sub, (ast.Global, ast.Nonlocal)):
            used.update(sub.names)
    return used - bound - BUILTINS


def self_attributes(node):
    return {sub.attr for sub in ast.walk(node)
            if isinstance(sub, ast.Attribute) and isinstance(sub.value, ast.Name) and sub.value.id in ("self", "cls")}


def docstring(node):
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()


def summary(text):
    """The first paragraph on one line, without field lists and the marks of reStructuredText."""
    first = " ".join(re.split(r"\n\n|\n(?=[@:][a-z])", text)[0].split())
    first = re.sub(r":[a-z:+]+:`~?\.?([^`<]+?)(?: <[^`]*>)?`", r"`\1`", first)
    return first.replace("``", "`")


def without_docstring(function, instead=()):
    """The text without its docstring, or None where the two share a line; other lines may take its place."""
    node, lines = function.node, function.source.split("\n")
    first = node.body[0]
    if first.lineno == node.lineno or len(node.body) < 2 or node.body[1].lineno <= first.end_lineno:
        return None
    if lines[first.lineno - 1][:first.col_offset].strip():
        return None
    after = first.end_lineno
    while after < len(lines) and not lines[after].strip():
        after += 1
    return "\n".join([*lines[:first.lineno - 1], *instead, *lines[after:]])


def signature(node):
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{start} {node.name}({ast.unparse(node.args)}){returns}"


def is_trivial(node):
    """A body that only refuses, does nothing or forwards a constant teaches nothing."""
    body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    if not body:
        return True
    only = body[0]
    return len(body) == 1 and (isinstance(only, (ast.Pass, ast.Raise)) or
                               isinstance(only, ast.Return) and isinstance(only.value, (ast.Constant, type(None))))


# ---- functions from their docstrings -----------------------------------------------------------------------------

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
POOR_DOCSTRING = re.compile(
    r"deprecated|todo|fixme|internal|helper|override|overrid|subclass|see also|^see\b|hack|xxx|backward|compatib"
    r"|this (test|class|module)|@|\\|\bw\.r\.t|not implemented|callback for|used by|called by|called when", re.I)


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


# ---- edits between two releases ----------------------------------------------------------------------------------


def normal(source):
    return re.sub(r"\s+", "", source)


def tick(text):
    return f"`{' '.join(text.split())}`"


def listed(items):
    items = [f"`{item}`" for item in items]
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def parameters(node):
    """Name, annotation and default of every parameter, in order."""
    args, found = node.args, {}
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for arg, default in list(zip(positional, defaults)) + list(zip(args.kwonlyargs, args.kw_defaults)):
        found[arg.arg] = (arg.annotation and ast.unparse(arg.annotation), default and ast.unparse(default))
    for arg, star in ((args.vararg, "*"), (args.kwarg, "**")):
        if arg:
            found[star + arg.arg] = (arg.annotation and ast.unparse(arg.annotation), None)
    return found


def signature_changes(old, new):
    """Sentences about parameters and annotations."""
    before, after, said = parameters(old), parameters(new), []
    gone = [name for name in before if name not in after]
    come = [name for name in after if name not in before]
    if len(gone) == len(come) == 1 and list(before).index(gone[0]) == list(after).index(come[0]):
        said.append(f"Rename the parameter `{gone[0]}` to `{come[0]}`.")
        gone, come = [], []
    for name in come:
        annotation, default = after[name]
        said.append(f"Add the parameter `{name}`" + (f" of type `{annotation}`" if annotation else "") +
                    (f" with the default value `{default}`" if default else "") + ".")
    if gone:
        said.append(f"Remove the parameter{'s' * (len(gone) > 1)} {listed(gone)}.")
    hints, changed_hints = [], []
    for name in before:
        if name in after and before[name] != after[name]:
            (old_hint, old_default), (new_hint, new_default) = before[name], after[name]
            if old_default != new_default:
                said.append(f"Change the default value of `{name}` from `{old_default}` to `{new_default}`."
                            if old_default and new_default else
                            f"Give `{name}` the default value `{new_default}`." if new_default else
                            f"Make `{name}` required.")
            if old_hint != new_hint:
                if old_hint is None:
                    hints.append(name)
                elif new_hint is not None:
                    changed_hints.append(f"Change the type hint of `{name}` to `{new_hint}`.")
                else:
                    changed_hints.append(f"Remove the type hint of `{name}`.")
    returns = new.returns and ast.unparse(new.returns)
    if returns != (old.returns and ast.unparse(old.returns)):
        if hints and returns and old.returns is None:
            said.append("Add type hints to the parameters and the return value.")
            hints = []
        else:
            said.append(f"Annotate the return type as `{returns}`." if returns else "Remove the return annotation.")
    if hints:
        said.append(f"Add type hints to {listed(hints)}.")
    return said + changed_hints


def identifiers(node):
    """The names a body calls or reads, dotted where they are."""
    found = set()
    for sub in ast.walk(node):
        if isinstance(sub, ast.Call):
            name = ast.unparse(sub.func)
            if re.fullmatch(r"[A-Za-z_][\w.]*", name):
                found.add(name + "()")
    return found


def renaming(before, after):
    """{old: new} if the two texts differ only in how names are spelt, else None."""
    try:
        a, b = words(before), words(after)
    except (tokenize.TokenError, SyntaxError):
        return None
    if len(a) != len(b):
        return None
    found = {}
    for x, y in zip(a, b):
        if x == y:
            if found.get(x, x) != x:
                return None
        elif not (x.isidentifier() and y.isidentifier()) or keyword.iskeyword(x) or keyword.iskeyword(y):
            return None
        elif found.setdefault(x, y) != y:
            return None
    return found


def words(source):
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    return [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]


def line_changes(before, after):
    """What changed line by line, in sentences; None where that would be longer than the code."""
    a = [line for line in before.split("\n") if line.strip()]
    b = [line for line in after.split("\n") if line.strip()]
    said = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if j - i > 2 or m - k > 2:
            return None
        old, new = " ".join(a[i:j]), " ".join(b[k:m])
        if tag == "insert":
            place = f"after {tick(a[i - 1])}" if i else "at the start"
            said.append(f"Add {tick(new)} {place}.")
        elif tag == "delete":
            said.append(f"Remove {tick(old)}.")
        else:
            said.append(f"Replace {tick(old)} by {tick(new)}.")
    return said if 1 <= len(said) <= 2 else None


def describe(old, new):
    """An instruction that leads from one version of a function to the next, or None."""
    said = signature_changes(old.node, new.node)
    if type(old.node) is not type(new.node):
        said.insert(0, "Make it a coroutine." if isinstance(new.node, ast.AsyncFunctionDef) else "Make it synchronous.")
    old_doc, new_doc = docstring(old.node), docstring(new.node)
    bare = [f.source if not docstring(f.node) else without_docstring(f) for f in (old, new)]
    if None in bare:
        return None
    old_body, new_body = ([ast.unparse(n) for n in (f.node.body[1:] if docstring(f.node) else f.node.body)]
                          for f in (old, new))
    if old_body != new_body:
        names = renaming(*bare)
        if names and len(names) <= 2:
            said = [f"Rename `{x}` to `{y}`." for x, y in names.items()]
        else:
            cut_bodies = ["\n".join(f.source.split("\n")[f.node.body[bool(docstring(f.node))].lineno - 1:])
                          for f in (old, new)]
            lines = line_changes(*cut_bodies)
            used, unused = (sorted(x - y) for x, y in
                            ((identifiers(new.node), identifiers(old.node)),
                             (identifiers(old.node), identifiers(new.node))))
            raised = [n for n in ast.walk(new.node) if isinstance(n, ast.Raise) and n.exc]
            was_raised = {ast.unparse(n) for n in ast.walk(old.node) if isinstance(n, ast.Raise)}
            raised = [n for n in raised if ast.unparse(n) not in was_raised]
            if lines:
                said += lines
            elif len(raised) == 1 and len(ast.unparse(raised[0])) < 160:
                said.append(f"Raise an error where it is needed: `{ast.unparse(raised[0])}`.")
            elif 1 <= len(used) <= 3 and 1 <= len(unused) <= 3:
                said.append(f"Use {listed(used)} instead of {listed(unused)}.")
            elif 1 <= len(used) <= 3 and not unused:
                said.append(f"Make it use {listed(used)}.")
            elif 1 <= len(unused) <= 3 and not used:
                said.append(f"Rewrite it so that it no longer uses {listed(unused)}.")
            else:
                return None
    if old_doc != new_doc:
        if not old_doc:
            said.append(f"Add a docstring that says: {summary(new_doc)}")
        elif not new_doc:
            said.append("Remove the docstring.")
        elif summary(old_doc) != summary(new_doc):
            said.append(f"Change the docstring's first paragraph to: {summary(new_doc)}")
        elif (changed := line_changes(old_doc, new_doc)):
            said += ["In the docstring: " + s[0].lower() + s[1:] for s in changed]
        elif old_body == new_body and not said:
            return None
        else:
            said.append("Bring the docstring up to date.")
    if not said:
        return None
    text = " ".join(said)
    return text if len(text) <= 500 and len(said) <= 5 else None


def release_edit(old, new):
    if normal(old.source) == normal(new.source) or max(f.source.count("\n") for f in (old, new)) >= 40:
        return None
    if max(len(f.source) for f in (old, new)) > MAX_EDIT_CHARS:
        return None
    instruction = describe(old, new)
    return instruction and (old.source, instruction, new.source)


# ---- edits made from one function --------------------------------------------------------------------------------


def offset(source, line, column):
    """The place in the text of an ast position; the text is ASCII, so columns are characters."""
    return sum(len(text) + 1 for text in source.split("\n")[:line - 1]) + column


def span(source, node):
    return offset(source, node.lineno, node.col_offset), offset(source, node.end_lineno, node.end_col_offset)


def replace(source, start, end, text):
    return source[:start] + text + source[end:]


FIXES = (
    "Fix the bug in this function.",
    "There is a bug in `{name}`. Fix it.",
    "This function does not work as it should. Correct it.",
    "`{name}` gives wrong results. Find the bug and fix it.",
    "The function should do this: {summary} It has a bug; fix it.",
    "Fix `{name}` so that it does what its description says: {summary}",
    "{hint} Fix that.",
    "Fix the bug: {hint}",
)
COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
               ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
               ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "/"),
              ast.Mod: ("%", "//")}
SWAPPED_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "append": "extend", "lower": "upper",
                 "upper": "lower", "startswith": "endswith", "endswith": "startswith", "keys": "values",
                 "lstrip": "rstrip", "rstrip": "lstrip", "split": "rsplit", "add": "discard", "floor": "ceil"}


def between(source, left, right, old, new):
    """Swaps the operator between two expressions; None where brackets or comments stand in between, too."""
    start, end = span(source, left)[1], span(source, right)[0]
    return replace(source, start, end, source[start:end].replace(old, new)) \
        if source[start:end].strip() == old else None


def bugs(function):
    """Every wrong version of the function that one small slip makes, with a hint at the place."""
    source, found = function.source, []
    # Constants elsewhere are settings: nothing in the function would tell that one is wrong.
    telling = set()
    for node in ast.walk(function.node):
        if isinstance(node, (ast.Return, ast.Compare, ast.BinOp, ast.Subscript, ast.Slice)):
            telling.update(map(id, ast.iter_child_nodes(node)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            telling.update(map(id, node.args))
    for node in ast.walk(function.node):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            old, new = COMPARISONS[type(node.ops[0])]
            found.append((between(source, node.left, node.comparators[0], old, new), "One comparison is wrong."))
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
                continue
            old, new = ARITHMETIC[type(node.op)]
            found.append((between(source, node.left, node.right, old, new), "One arithmetic operator is wrong."))
        elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            found.append((between(source, *node.values, old, new), "A condition is combined in the wrong way."))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start, end = span(source, node)[0], span(source, node.operand)[0]
            if source[start:end] == "not ":
                found.append((replace(source, start, end, ""), "A negation is missing."))
        elif isinstance(node, ast.Constant) and id(node) not in telling:
            continue
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            found.append((replace(source, *span(source, node), str(not node.value)), "A truth value is wrong."))
        elif isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 10:
            found.append((replace(source, *span(source, node), str(node.value + 1)), "It is off by one somewhere."))
        elif isinstance(node, ast.Call):
            end = offset(source, node.func.end_lineno, node.func.end_col_offset)
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in SWAPPED_CALLS and source[end - len(name):end] == name:
                wrong = replace(source, end - len(name), end, SWAPPED_CALLS[name])
                found.append((wrong, "It calls the wrong function."))
            if len(node.args) == 2 and not any(isinstance(a, ast.Starred) for a in node.args):
                (a, b), (c, d) = (span(source, arg) for arg in node.args)
                if "\n" not in source[a:d] and source[a:b] != source[c:d]:
                    swapped = source[:a] + source[c:d] + source[b:c] + source[a:b] + source[d:]
                    found.append((swapped, "Two arguments are in the wrong order."))
        elif isinstance(node, ast.Return) and node.value is not None and function.node.body[-1] is node:
            start = span(source, node)[0]
            found.append((replace(source, start, start + len("return "), ""), "The result is never returned."))
    return sorted({text: (text, hint) for text, hint in found if text}.values())


def bug_edit(function):
    wrong = bugs(function)
    if not wrong:
        return None
    before, hint = choose(wrong, "bug", function.key)
    if not parse(before):
        return None
    text = choose(FIXES, "fix", function.key)
    described = docstring(function.node)
    if "{summary}" in text and (not described or POOR_DOCSTRING.search(described)):
        text = FIXES[0]
    after = function.source
    # With the docstring gone the description in the instruction is the only clue.
    if "{summary}" in text and order("bare", function.key) % 2:
        after, wrong_node = without_docstring(function), parse(before)
        bare = Function(function.package, function.path, function.qualname, before, {})
        before = wrong_node and ast.get_docstring(wrong_node) and without_docstring(bare)
        if not after or not before:
            return None
    short = summary(described)
    short += "" if not short or short[-1] in ".!?" else "."
    return before, text.format(name=function.node.name, summary=short, hint=hint), after


NEW_NAMES = ("result", "value", "items", "total", "count", "current", "entry", "index", "output", "text", "key",
             "element", "buffer", "position", "values", "name", "size", "data", "target", "number")


def rename_edit(function):
    """Renames a local variable; parameters are left alone, as callers may name them."""
    source, node = function.source, function.node
    if any(isinstance(n, (ast.JoinedStr, ast.Lambda, ast.FunctionDef, ast.Global, ast.Nonlocal))
           for n in ast.walk(node) if n is not node):
        return None  # names inside f-strings have no reliable place, inner scopes may shadow
    taken = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {n.arg for n in ast.walk(node) if
                                                                         isinstance(n, ast.arg)}
    arguments = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    stores = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    handlers = {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler)}
    names = sorted(n for n in stores if n not in arguments and n not in handlers and not n.startswith("_"))
    fresh = [n for n in NEW_NAMES if n not in taken and n not in source]
    if not names or not fresh:
        return None
    old, new = choose(names, "old", function.key), choose(fresh, "new", function.key)
    places = [span(source, n)[0] for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == old]
    after = source
    for start in sorted(places, reverse=True):
        after = replace(after, start, start + len(old), new)
    if len(places) < 2 or not parse(after):
        return None
    ask = choose(("Rename the variable `{}` to `{}`.", "Rename `{}` to `{}`.", "Call the variable `{}` `{}` instead.",
                  "Replace the variable name `{}` by `{}`."), "ask", function.key)
    return source, ask.format(old, new), after


def hints_edit(function):
    """Takes the type hints away; the edit brings them back, or the other way round."""
    source, node = function.source, function.node
    args = node.args
    every = args.posonlyargs + args.args + args.kwonlyargs + [a for a in (args.vararg, args.kwarg) if a]
    cuts = [(offset(source, a.lineno, a.col_offset) + len(a.arg), span(source, a.annotation)[1])
            for a in every if a.annotation]
    if node.returns:
        end = span(source, node.returns)[1]
        arrow = source.rfind("->", 0, span(source, node.returns)[0])
        cuts.append((len(source[:arrow].rstrip()), end))
    if len(cuts) < 2:
        return None
    before = source
    for start, end in sorted(cuts, reverse=True):
        # A default after a hint is written with spaces, without one it is not.
        rest = re.sub(r"^ = ", "=", before[end:])
        before = before[:start] + rest
    if not parse(before):
        return None
    hinted = signature(node)
    if order("way", function.key) % 4 == 0:
        return source, choose(("Remove the type hints.", "Drop all type annotations from the signature."),
                              "ask", function.key), before
    ask = choose(("Add type hints.", "Annotate the parameters and the return value of `{name}`.",
                  "Add type hints so that the signature becomes `{hinted}`.",
                  "Give `{name}` type annotations: `{hinted}`."), "ask", function.key)
    return before, ask.format(name=node.name, hinted=hinted), source


def docstring_edit(function):
    bare, text = without_docstring(function) if docstring(function.node) else None, docstring(function.node)
    if not bare or len(text) > 300 or len(summary(text)) < 15:
        return None
    if order("way", function.key) % 5 == 0:
        return function.source, choose(("Remove the docstring.", "Delete the docstring of `{}`."), "ask",
                                       function.key).format(function.node.name), bare
    ask = choose(("Add a docstring.", "Document `{name}`: {summary}", "Add a docstring that says: {summary}",
                  "Write a docstring for `{name}`."), "ask", function.key)
    return bare, ask.format(name=function.node.name, summary=summary(text)), function.source


def guard_edit(function):
    """Takes one check of the arguments out; the edit puts it in."""
    source, lines = function.source, function.source.split("\n")
    guards = [n for n in function.node.body if isinstance(n, ast.If) and not n.orelse and len(n.body) == 1 and
              isinstance(n.body[0], (ast.Raise, ast.Return))]
    if not guards or len(function.node.body) < 3:
        return None
    guard = choose(guards, "guard", function.key)
    test, act = ast.unparse(guard.test), guard.body[0]
    if len(test) > 100 or isinstance(act, ast.Raise) and act.exc is None or guard is function.node.body[-1]:
        return None
    last = guard.end_lineno
    if last < len(lines) and not lines[last].strip():
        last += 1
    before = "\n".join(lines[:guard.lineno - 1] + lines[last:])
    if not parse(before):
        return None
    if isinstance(act, ast.Raise):
        call = ast.unparse(act.exc)
        if len(call) > 160:
            return None
        ask = choose(("Raise `{call}` if `{test}`.", "Add a check: when `{test}`, raise `{call}`.",
                      "The function should raise `{call}` in case `{test}`."), "ask", function.key)
        return before, ask.format(call=call, test=test), source
    value = ast.unparse(act.value) if act.value else ""
    if len(value) > 100:
        return None
    ask = choose(("Return `{value}` early if `{test}`.", "Handle the case `{test}`: return `{value}`.",
                  "When `{test}`, the function should return `{value}` at once."), "ask", function.key)
    if not value:
        ask = "Return early if `{test}`."
    return before, ask.format(value=value, test=test), source


def default_edit(function):
    """Takes the first default value away; the edit gives it back, or changes another."""
    source, args = function.source, function.node.args
    if not args.defaults or args.posonlyargs:
        return None
    arg, default = args.args[-len(args.defaults)], args.defaults[0]
    value = ast.unparse(default)
    if len(value) > 40:
        return None
    start = span(source, arg)[1]
    before = replace(source, start, span(source, default)[1], "")
    if not parse(before):
        return None
    ask = choose(("Give the parameter `{0}` the default value `{1}`.", "Let `{0}` default to `{1}`.",
                  "Make `{0}` optional, with `{1}` as its default."), "ask", function.key)
    return before, ask.format(arg.arg, value), source


MUTATIONS = {"bug": bug_edit, "rename": rename_edit, "hints": hints_edit, "docstring": docstring_edit,
             "guard": guard_edit, "default": default_edit}
# Bugs are the most useful of these: there the instruction does not give the answer away.
SHARES = {"bug": 3, "docstring": 1, "default": 0.5}


def mutation(function):
    """(name, before, instruction, after) for the one mutation that the function's hash picks."""
    if not 4 <= function.source.count("\n") + 1 <= 40 or len(function.source) > MAX_EDIT_CHARS:
        return None
    if is_trivial(function.node) or len(self_attributes(function.node)) > 3:
        return None
    name = choose(sorted(MUTATIONS), "mutation", function.key)
    made = MUTATIONS[name](function)
    return made and (name, *made)


# ---- the whole ---------------------------------------------------------------------------------------------------


def work(job):
    """What one file gives: exercises and mutations, each with the key that orders them."""
    root, path, package = job
    exercises, mutations = [], []
    for function in read_functions(root, path, package):
        made = exercise(function)
        if made:
            exercises.append((made[0], order("exercise", function.key), made[1]))
        made = mutation(function)
        if made:
            mutations.append((order("edit", function.key), *made, package))
    return exercises, mutations


def compare(job):
    """The edits between the two releases of one file."""
    old_root, new_root, relative, package = job
    old = {f.qualname: f for f in read_functions(old_root, old_root / relative, package)}
    edits = []
    for new in read_functions(new_root, new_root / relative, package):
        if new.qualname in old:
            made = release_edit(old[new.qualname], new)
            if made:
                edits.append((order("edit", new.key), *made, package))
    return edits


def pick_functions(exercises):
    """The best first, each code once, no package in command."""
    per_package, seen, picked = Counter(), set(), []
    for rank, place, record in sorted(exercises, key=lambda e: e[:2]):
        code = normal(record["messages"][1]["content"])
        package = record["source"]
        if code in seen or per_package[package] >= MAX_FUNCTIONS_PER_PACKAGE:
            continue
        seen.add(code)
        per_package[package] += 1
        picked.append((place, record))
        if len(picked) == MAX_FUNCTIONS:
            break
    return [record for _, record in sorted(picked, key=lambda p: p[0])]


def pick_edits(pairs, mutations):
    seen, picked, per_package = set(), [], Counter()

    def take(place, before, instruction, after, package):
        key = normal(before) + "\0" + normal(after)
        if key in seen or before == after:
            return False
        seen.add(key)
        picked.append((place, {"before": before, "instruction": instruction, "after": after, "source": package}))
        return True

    for place, before, instruction, after, package in sorted(pairs):
        if per_package[package] < MAX_PAIRS_PER_PACKAGE and take(place, before, instruction, after, package):
            per_package[package] += 1
    by_kind = defaultdict(list)
    for place, kind, *edit in sorted(mutations):
        by_kind[kind].append((place, *edit))
    left, shares = MAX_EDITS - len(picked), sum(SHARES.get(kind, 1) for kind in MUTATIONS)
    for kind in sorted(MUTATIONS):
        room, per_source = int(left * SHARES.get(kind, 1) / shares), Counter()
        cap = max(1, room // 8)
        for place, *edit in by_kind[kind]:
            if room > 0 and per_source[edit[-1]] < cap and take(place, *edit):
                per_source[edit[-1]] += 1
                room -= 1
    return [record for _, record in sorted(picked, key=lambda p: p[0])]


def write(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(f"{path.name}: {len(records)} lines, {len(text) / 1e6:.1f} MB, sha256 {digest}")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: sft.py OUT\n  OUT is the folder that fetch.sh filled")
    out = Path(sys.argv[1])
    for folder in ("python", "older"):
        if not (out / folder).is_dir():
            sys.exit(f"sft.py: {out / folder} is missing\n  remedy: run fetch.sh {out} first")
    packages = sorted(p.name for p in (out / "python").iterdir() if p.is_dir())
    jobs = [(out / "python" / p, path, p) for p in packages for path in source_files(out / "python" / p)]
    changed = []
    for old in sorted(p for p in (out / "older").iterdir() if p.is_dir()):
        new = out / "python" / old.name
        for path in source_files(old):
            relative = path.relative_to(old)
            if (new / relative).is_file() and (new / relative).read_bytes() != path.read_bytes():
                changed.append((old, new, relative, old.name))
    exercises, mutations, pairs = [], [], []
    with multiprocessing.Pool(initializer=warnings.simplefilter, initargs=("ignore",)) as pool:
        for some, others in pool.imap(work, jobs, chunksize=16):
            exercises += some
            mutations += others
        for some in pool.imap(compare, changed, chunksize=4):
            pairs += some
    print(f"candidates: {len(exercises)} functions, {len(pairs)} edits between releases,",
          f"{len(mutations)} other edits")
    (out / "sft").mkdir(exist_ok=True)
    write(out / "sft" / "functions.jsonl", pick_functions(exercises))
    write(out / "sft" / "edits.jsonl", pick_edits(pairs, mutations))


if __name__ == "__main__":
    main()
