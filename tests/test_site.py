"""The site: it builds with strict links, its page of errors has every line that a user may meet,
and its notebook runs from top to bottom."""

import ast
import re
import shutil
import subprocess

import nbformat
import pytest
import training
from nbclient import NotebookClient

ROOT = training.ROOT
PAGE = ROOT / "docs" / "troubleshooting.md"
# Commands whose lines say all there is to say, and the pictures of layouts, for tests.
ELSEWHERE = ("preview/", "tiny/", "layout.py")


# Lines that are put together before they are raised.
BUILT = [
    "RECIPE: OPTION VALUE: …",
    "model …: …",
    "no estimate of memory: …",
    "step …: the loss is … in the batch of rows …",
    "step …: the gradient is not finite, of rows …",
    "…: hub_token: it would be written to logs and checkpoints; set HF_TOKEN in the environment",
    "…: … of … rows cannot be trained on; the first …:",
]


def messages() -> dict[str, str]:
    """The texts of errors in the package, with `…` for what differs, and the files they are in."""
    found = {}
    for path in sorted((ROOT / "fmtrain").rglob("*.py")):
        name = str(path.relative_to(ROOT / "fmtrain"))
        if name.startswith(ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            if call.func.id not in ("ValueError", "TypeError", "Malformed") or not call.args:
                continue
            text = _text(call.args[-1])
            if len(re.findall(r"[a-z]", text)) > 9:  # others pass a message on
                found[text] = name
    return found


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(map(str, parts))
    return ""


def documented() -> list[str]:
    """The lines of the page, each as it would be read on a terminal."""
    lines = re.findall(r"^- `([^`]+)`$", PAGE.read_text(), flags=re.M)
    return [" ".join(line.split()) for line in lines]


def same(line: str, message: str) -> bool:
    """Whether a message is what the line says, `…` standing for any text."""
    return re.fullmatch(".*".join(map(re.escape, line.split("…"))), message) is not None


def test_every_error_has_its_line():
    lines = documented()
    missing = [f"{file}: {text}" for text, file in messages().items() if not _any(lines, text)]
    assert not missing, "\n".join(missing)


def _any(lines: list[str], message: str) -> bool:
    return any(same(line, message) for line in lines)


def test_every_line_is_an_error_that_there_is():
    """No line for an error that has gone, and none so wide that it stands for all."""
    known = [*messages(), *BUILT]
    gone = [line for line in documented() if not any(same(line, message) for message in known)]
    assert not gone, "\n".join(gone)
    assert all(len(re.findall(r"\w", line)) > 4 for line in documented())


def test_the_site_builds_and_its_links_hold(tmp_path):
    command = ["make", "-s", "docs", f"SITE={tmp_path / 'site'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(path.relative_to(tmp_path / "site")) for path in tmp_path.rglob("index.html")}
    named = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {f"docs/{name}/index.html" for name in named} <= pages and "index.html" in pages


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    shutil.copy(ROOT / "docs" / "start.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "start.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 6 and all(cell.execution_count for cell in code)
    assert all(cell.outputs for cell in code if "print(" in cell.source)
