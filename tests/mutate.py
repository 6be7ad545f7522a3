"""Draws one-line bugs and says which of them the tests notice.

    python tests/mutate.py --count 20 --seed 1 --only eval data_prep fmtrain/data --out bugs.jsonl
    python tests/mutate.py --count 20 --seed 1 --only eval data_prep fmtrain/data --out bugs.jsonl \
        --numbers 3 --tests tests/eval/test_paired.py

Each is set in a copy of the repository, and the tests that mirror or import its module run there
until one fails. Comparisons flip, `and` is `or`, a `not` is dropped, a constant is one more, two
arguments change places, a statement is gone. `--out` keeps the verdicts: what is decided is not run
again, and a survivor only on the test files that it has not met, where `--files` allows more. Not
part of CI: a bug takes as long as its tests.
"""

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import shutil
import signal
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
TIME, DIED = "not decided in time", "the tests died"
IMPORTED = [  # before the tests of all bugs, as it takes longer than most of them
    "pytest",
    "hypothesis",
    "datasets",
    "peft",
    "trl.trainer.sft_trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "scipy.stats",
]
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
    those that import a module which does; of each kind first those in the mirrored folder, then by
    how often they name it."""
    module, folder, users = name_of(path), path.relative_to(ROOT).parent, set()
    for package in PACKAGES:
        for other in (ROOT / package).rglob("*.py"):
            if module in imports(other):
                users.add(name_of(other))
    home, mirrored = ROOT / "tests" / path.relative_to(ROOT).parts[0], ROOT / "tests" / folder
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    files.sort(key=lambda file: (file.parent != mirrored, -file.read_text().count(path.stem)))
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


class Failures:
    """A plugin of pytest that keeps the names of tests and files that fail."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.names.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(copy: Path, arguments: list[str], answers) -> None:
    """A process of its own: pytest in a copy of the repository, without a word."""
    import pytest

    multiprocessing.set_start_method(None, force=True)  # of processes that tests start: as ever
    os.setsid()
    os.chdir(copy)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    sys.argv, failures = ["pytest"], Failures()
    sys.path.remove(str(ROOT / "tests"))
    code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[failures])
    answers.send((int(code), failures.names))


def failures(copy: Path, arguments: list[str], limit: float) -> list[str]:
    """Tests that fail; `TIME` alone where they take too long, in seconds."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(IMPORTED)
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=run_tests, args=(copy, arguments, sender))
    process.start()
    sender.close()
    try:
        code, names = receiver.recv() if receiver.poll(limit) else (0, [TIME])
    except EOFError:
        code, names = 0, [DIED]
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return names or ([] if code in (0, 5) else [f"pytest ended with {code}"])


def noticed(copy: Path, bug: Bug, arguments: list[str], limit: float) -> str | None:
    """The first test that fails with a bug in place."""
    place = copy / bug.path.relative_to(ROOT)
    place.write_text(bug.after)
    names = failures(copy, ["-x", *arguments], limit)
    place.write_text(bug.before)
    return names[0] if names else None


def drawn(count: int, seed: int, only: list[str], leave: list[str]) -> list[Bug]:
    """Of all bugs that can be set in some folders or files, so many."""
    paths: set[Path] = set()
    for name in only:
        paths |= {ROOT / name} if name.endswith(".py") else set((ROOT / name).rglob("*.py"))
    every = []
    for path in sorted(paths):
        if not any(path.is_relative_to(ROOT / name) for name in leave):
            every += bugs(path)
    print(f"{len(every)} bugs can be set")
    return random.Random(seed).sample(every, min(count, len(every)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--count", type=int, default=20, help="bugs")
    add("--seed", type=int, default=0)
    add("--only", nargs="+", default=PACKAGES, help="folders or files")
    add("--leave", nargs="*", default=[], help="folders or files")
    add("--files", type=int, default=4, help="test files of a bug at most")
    add("--limit", type=float, default=300, help="seconds for its tests")
    add("--slow", action="store_true", help="also tests that are marked so")
    add("--out", type=Path, help="file of verdicts, a line each")
    add("--numbers", type=int, nargs="+", help="of the bugs drawn these alone, decided or not")
    add("--tests", nargs="+", help="tests to run in place of a bug's own")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sample = drawn(options.count, options.seed, options.only, options.leave)
    verdicts: dict[str, dict] = {}
    if options.out and options.out.exists():
        verdicts = {each["bug"]: each for each in map(json.loads, options.out.open())}
    marks = ["-m", "not cuda" if options.slow else "not slow and not cuda"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        left_out = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
        for number, bug in enumerate(sample, start=1):
            before = verdicts.get(str(bug), {"by": TIME})
            decided = before["by"] not in (None, TIME)
            if decided if options.numbers is None else number not in options.numbers:
                continue
            files = [str(file.relative_to(ROOT)) for file in tests_of(bug.path)][: options.files]
            met = before["tests"] if before["by"] is None else []
            tests = options.tests or [file for file in files if file not in met]
            if not tests:
                continue
            by = noticed(copy, bug, [*marks, *tests], options.limit)
            verdict = {"number": number, "bug": str(bug), "by": by, "tests": [*met, *tests]}
            verdicts[str(bug)] = verdict
            print(f"--- {number}: {by or 'survived'}\n{bug}\n", flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(verdict) + "\n")
        found = [each["by"] for each in verdicts.values()]
        tests = sorted({name for name in found if name and "::" in name})
        for name in failures(copy, [*marks, *tests], 10 * options.limit) if tests else []:
            print(f"fails without a bug as well: {name}")
    undecided, survived = found.count(TIME), found.count(None)
    print(f"{len(found) - survived - undecided} noticed, {survived} survived, {undecided} {TIME}")


if __name__ == "__main__":
    main()
