#!/usr/bin/env python3
"""Derives the fine-tuning data from what fetch.sh left in OUT: OUT/sft/functions.jsonl and OUT/sft/edits.jsonl.

Only the standard library of Python 3.11 is used. Every choice is made by hashing the name of a function, never by
chance or by the order of a folder, so the same sources give the same bytes. What is made of one function or of two
releases is in derive/; here is what is picked of it.
"""

import hashlib
import json
import multiprocessing
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from derive.exercises import exercise
from derive.functions import normal, order, read_functions, source_files
from derive.mutations import MUTATIONS, mutation
from derive.releases import release_edit

MAX_FUNCTIONS = 20_000
MAX_FUNCTIONS_PER_PACKAGE = 2_000
MAX_EDITS = 6_000
MAX_PAIRS_PER_PACKAGE = 1_000
# Bugs are the most useful mutations: there the instruction does not give the answer away.
SHARES = {"bug": 3, "docstring": 1, "default": 0.5}


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
