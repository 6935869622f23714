"""Edits between two releases of a package, with instructions worked out from the difference."""

import ast
import difflib
import io
import keyword
import re
import tokenize

from .functions import MAX_EDIT_CHARS, docstring, normal, summary, without_docstring


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
