"""Draws one-line bugs and says which of them the tests notice.

    python tests/mutate.py --count 20 --seed 1 --only eval data_prep fmtrain/data

Each is set in a copy of the repository, and the tests that mirror or import its module run there
until one fails. Comparisons flip, `and` is `or`, a `not` is dropped, a constant is one more, two
arguments change places, a statement is gone. Not part of CI: a bug takes as long as its tests.
"""

import argparse
import ast
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("fmtrain", "eval", "data_prep")
FLIPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}
TIME = "not decided in time"
KEPT = (ast.JoinedStr, ast.Assert, ast.arg, ast.Import, ast.ImportFrom)  # nothing inside changes


@dataclass(frozen=True)
class Bug:
    """A module with some of its text replaced."""

    path: Path
    before: str
    after: str

    def __str__(self) -> str:
        lines = self.before.splitlines(), self.after.splitlines()
        name = str(self.path.relative_to(ROOT))
        return "\n".join(difflib.unified_diff(*lines, name, name, lineterm="", n=1))


def changed(node: ast.AST) -> str | None:
    """What stands in the place of a node, if it is one that changes."""
    match node:
        case ast.Compare(left, [op], [right]):
            return _text(ast.Compare(left, [FLIPPED[type(op)]()], [right]))
        case ast.BoolOp(op, values):
            return _text(ast.BoolOp(FLIPPED[type(op)](), values))
        case ast.BinOp(left, op, right) if type(op) in FLIPPED:
            return _text(ast.BinOp(left, FLIPPED[type(op)](), right))
        case ast.UnaryOp(ast.Not(), operand):
            return _text(operand)
        case ast.Constant(bool() as value):
            return repr(not value)
        case ast.Constant(int() | float() as value):
            return repr(value + 1)
        case ast.Call(function, [first, second, *others], keywords) if not any(
            isinstance(each, ast.Starred) for each in (first, second)
        ):
            return _text(ast.Call(function, [second, first, *others], keywords))
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            return "pass"
    return None


def _text(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if isinstance(node, ast.Call) else f"({text})"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Those that may change; annotations and what runs as a script stay."""
    for name, field in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for child in field if isinstance(field, list) else [field]:
            main = isinstance(child, ast.If) and "__name__" in ast.dump(child.test)
            if isinstance(child, ast.AST) and not isinstance(child, KEPT) and not main:
                yield child
                yield from nodes(child)


def bugs(path: Path) -> list[Bug]:
    """All bugs that can be set in a module."""
    text, found = path.read_text(), []
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    for node in nodes(ast.parse(text)):
        new = changed(node)
        if new is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        after = text.encode()[:begin] + new.encode() + text.encode()[end:]
        found.append(Bug(path, text, after.decode()))
    return found


def imports(path: Path) -> set[str]:
    """Names of the modules, and of what is in them, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return names


def tests_of(path: Path) -> list[Path]:
    """Test files: those called as the module, those that import it or have its name as a text,
    those that import a module which does; of each kind, those that name it most often first."""
    module, users = name_of(path), set()
    for package in PACKAGES:
        for other in (ROOT / package).rglob("*.py"):
            if module in imports(other):
                users.add(name_of(other))
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    files.sort(key=lambda file: -file.read_text().count(path.stem))
    home = ROOT / "tests" / path.relative_to(ROOT).parts[0]
    mirrors = list(home.rglob(f"test_*{path.stem}.py"))
    imported = {file: imports(file) for file in files}
    direct = [file for file in files if module in imported[file]]
    named = [file for file in files if f'"{path.stem}"' in file.read_text()]
    indirect = [file for file in files if users & imported[file]]
    return list(dict.fromkeys([*mirrors, *direct, *named, *indirect]))


def name_of(path: Path) -> str:
    """Of a module, as it is imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removesuffix(".__main__")


def failure(copy: Path, tests: list[str], limit: float) -> str | None:
    """The first test that fails in a copy of the repository; `TIME` where they take too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "--no-header"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = {"cwd": copy, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run([*command, *tests], timeout=limit, **options)
    except subprocess.TimeoutExpired:
        return TIME
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if lines:
        return lines[0].split()[1]
    return None if done.returncode in (0, 5) else "no test could run"


def noticed(copy: Path, bug: Bug, files: int, limit: float) -> str | None:
    """What notices a bug. A test that fails without it as well is left out."""
    place = copy / bug.path.relative_to(ROOT)
    tests = [str(file.relative_to(ROOT)) for file in tests_of(bug.path)[:files]]
    left_out: list[str] = []
    while tests:
        place.write_text(bug.after)
        found = failure(copy, [*tests, *left_out], limit)
        place.write_text(bug.before)
        if found is None or "::" not in found or failure(copy, [found], limit) is None:
            return found
        left_out.append(f"--deselect={found}")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--count", type=int, default=20, help="bugs")
    add("--seed", type=int, default=0)
    add("--only", nargs="+", default=PACKAGES, help="folders or files")
    add("--leave", nargs="*", default=[], help="folders or files")
    add("--files", type=int, default=4, help="test files of a bug at most")
    add("--limit", type=float, default=300, help="seconds for its tests")
    options = parser.parse_args()
    paths: set[Path] = set()
    for name in options.only:
        paths |= {ROOT / name} if name.endswith(".py") else set((ROOT / name).rglob("*.py"))
    paths = {
        path for path in paths if not any(path.is_relative_to(ROOT / n) for n in options.leave)
    }
    every = []
    for path in sorted(paths):
        every += bugs(path)
    drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache")
        )
        for number, bug in enumerate(drawn, start=1):
            found = noticed(copy, bug, options.files, options.limit)
            verdicts.append({None: "survived", TIME: TIME}.get(found, "noticed"))
            by = f" by {found}" if verdicts[-1] == "noticed" else ""
            print(f"--- {number}: {verdicts[-1]}{by}\n{bug}\n", flush=True)
    print(*(f"{verdicts.count(name)} {name}," for name in ("noticed", "survived", TIME)), end=" ")
    print(f"of {len(every)} that can be set")


if __name__ == "__main__":
    main()
