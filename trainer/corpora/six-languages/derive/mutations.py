"""Edits made from one function: something is put in or taken out, and the edit undoes it."""

import ast
import re
from collections import Counter

from .functions import (MAX_EDIT_CHARS, POOR_DOCSTRING, Function, choose, docstring, is_trivial, order, parse,
                        self_attributes, signature, summary, without_docstring)


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


def mutation(function):
    """(name, before, instruction, after) for the one mutation that the function's hash picks."""
    if not 4 <= function.source.count("\n") + 1 <= 40 or len(function.source) > MAX_EDIT_CHARS:
        return None
    if is_trivial(function.node) or len(self_attributes(function.node)) > 3:
        return None
    name = choose(sorted(MUTATIONS), "mutation", function.key)
    made = MUTATIONS[name](function)
    return made and (name, *made)
