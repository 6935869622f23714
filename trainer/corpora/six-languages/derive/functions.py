"""Python functions, cut out of their files, and what is asked about one."""

import ast
import builtins
import hashlib
import inspect
import re

MAX_FILE_BYTES = 400_000
MAX_LINE = 120
# An edit stays short enough for both texts to share a small context.
MAX_EDIT_CHARS = 1_500

# Such a docstring does not say what its function does, or not for a reader outside of its package.
POOR_DOCSTRING = re.compile(
    r"deprecated|todo|fixme|internal|helper|override|overrid|subclass|see also|^see\b|hack|xxx|backward|compatib"
    r"|this (test|class|module)|@|\\|\bw\.r\.t|not implemented|callback for|used by|called by|called when", re.I)

# Tests are no examples of good functions, and these folders hold copies of other projects.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "externals", "idlelib", "lib2to3", "locale",
                   "migrations", "third_party"}
BUILTINS = set(dir(builtins))


def choose(options, *key):
    """The option that the key's hash picks."""
    return options[order(*key) % len(options)]


def order(*key):
    return int.from_bytes(hashlib.sha256("\0".join(map(str, key)).encode()).digest()[:8], "big")


def normal(source):
    return re.sub(r"\s+", "", source)


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
