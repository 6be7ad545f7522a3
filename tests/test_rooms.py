"""The structure: imports run one way and in no circle, lines and files are short."""

import ast
from pathlib import Path

import pytest
import training

PACKAGES = ("fmtrain", "eval", "data_prep")
# Each line may import from the lines above it (and from itself, in no circle).
FLOORS = [
    ["fmtrain", "fmtrain.layout", "fmtrain.command_line", "fmtrain.hub", "fmtrain.provenance"],
    ["fmtrain.tiny"],
    ["fmtrain.policies"],
    ["fmtrain.merge"],
    ["fmtrain.masks"],
    ["fmtrain.attention"],
    ["fmtrain.infer", "fmtrain.kv_cache", "fmtrain.host"],
    ["fmtrain.patch", "fmtrain.sharded"],
    ["fmtrain.data"],
    ["fmtrain.checkpoint"],
    ["fmtrain.consistency", "fmtrain.decoding"],
    ["fmtrain.training"],
    ["fmtrain.policies.__main__", "fmtrain.preview"],
    ["fmtrain.embed", "fmtrain.servers", "fmtrain.card"],
    ["fmtrain.sft", "fmtrain.audit", "fmtrain.export", "fmtrain.chat"],
    ["fmtrain.__main__"],
    ["data_prep", "eval"],
]


def sources(package: str) -> list[Path]:
    return sorted((training.ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(training.ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in sources(package)}


def imports(path: Path) -> set[str]:
    """First-party modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return {name for name in names if name in MODULES}


def floor(module: str) -> int:
    """The line of FLOORS that a module stands on, by its longest name there."""
    found = -1
    longest = ""
    for number, names in enumerate(FLOORS):
        for name in names:
            inside = module == name or (name != "fmtrain" and module.startswith(name + "."))
            if inside and len(name) > len(longest):
                found, longest = number, name
    assert found >= 0, f"{module} stands on no floor: add it to FLOORS"
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_runs_up(module):
    for other in imports(MODULES[module]):
        assert floor(other) <= floor(module), f"{module} imports {other}, which stands above it"


def test_fmtrain_imports_nothing_that_is_run_from_the_checkout():
    for path in sources("fmtrain"):
        assert {name.split(".")[0] for name in imports(path)} <= {"fmtrain"}, path


def test_there_is_no_circle():
    arrows = {module: imports(path) - {module} for module, path in MODULES.items()}
    left = dict(arrows)
    while left:
        free = [module for module, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


def test_lines_of_text_files_fit():
    """ruff looks at Python; recipes and the Makefile have the same limit."""
    files = [*(training.ROOT / "recipes").rglob("*.yaml"), training.ROOT / "Makefile"]
    long = {}
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if len(line) > 100:
                long[f"{path.name}:{number}"] = len(line)
    assert not long


def test_no_text_is_cut_at_the_plus_of_a_light_form():
    """`Mask` alone knows how a light form is written."""
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert "+merge" not in texts or module == "fmtrain.masks", module
        assert 'partition("+")' not in path.read_text(), module


def test_files_stay_readable():
    """About 300 lines a file and 60 a function; tables of fields and parsers may be longer."""
    for module, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 380, f"{module} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 75, f"{module}.{node.name} has {length} lines"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def test_one_thought_a_line():
    """No second `for` in a comprehension, no walrus in one, no conditional chain of three."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{module}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, COMPREHENSIONS):
                assert len(node.generators) == 1, f"{place}: a second for"
                walruses = [part for part in ast.walk(node) if isinstance(part, ast.NamedExpr)]
                assert not walruses, f"{place}: a walrus in a comprehension"
            if isinstance(node, ast.IfExp):
                assert not isinstance(node.orelse, ast.IfExp), f"{place}: a conditional chain"
