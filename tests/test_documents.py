"""The documents say what is there: links, commands, files, options, tables, pictures."""

import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import NAMES, ROOT, TEXTS, table
from PIL import Image

import fmtrain
from fmtrain import policies
from fmtrain.layout import Role
from fmtrain.training.recipe import parser

COMMANDS = ("train", "audit", "export", "chat", "preview", "policies")  # of `fmtrain`


def without_history(name: str) -> str:
    """The text of a document; of the changelog without its column of what was before."""
    text = TEXTS[name]
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.M) if name == "CHANGELOG.md" else text


def blocks(name: str, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of these languages ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[name], flags=re.M | re.S)
    return [body for language, body in fenced if language in languages]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, blanks as dashes, other marks dropped."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(file: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.M)}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    relative = [link for link in links if not link.startswith(("http://", "https://"))]
    assert relative or name == "CHANGELOG.md"
    for link in relative:
        target, _, fragment = link.partition("#")
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), f"{name}: {link}"
        if fragment:
            assert fragment in anchors(file), f"{name}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_are_named_exist(name):
    text = without_history(name)
    run = set(re.findall(r"python -m ([\w.]+)", text)) - {"pytest"}
    spelt = set(re.findall(r"`((?:fmtrain|eval|data_prep)(?:\.\w+)+)[`(]", text))
    for module in sorted(run):
        assert importlib.util.find_spec(module), f"{name}: python -m {module}"
    for dotted in sorted(spelt):
        assert module_or_attribute(dotted), f"{name}: {dotted}"


def module_or_attribute(dotted: str) -> bool:
    """Whether a dotted name is a module, or something that the module before its last dot has."""
    home, _, attribute = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:  # what stands before the last dot is a module, not a package
        pass
    return hasattr(importlib.import_module(home), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    folders = "recipes|docs|eval|fmtrain|data_prep|tests"
    paths = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w/?)", without_history(name))
    for path in sorted(set(paths)):
        written = ROOT / path.replace("NAME.", "vsr.").replace("NAME", "vsr")
        assert written.exists(), f"{name}: {path}"


def test_the_command_has_its_parts_and_no_document_names_another(capsys):
    for name in NAMES:
        for block in blocks(name, "bash"):
            for part in re.findall(r"(?:^|&& )fmtrain (\w+)", block, flags=re.M):
                assert part in COMMANDS, f"{name}: fmtrain {part}"
    assert importlib.import_module("fmtrain.__main__").main(["--help"]) == 0
    shown = capsys.readouterr().out
    for part in COMMANDS:
        assert re.search(rf"^ *fmtrain {part}\b", shown, flags=re.M), shown


def command_lines() -> list[tuple[str, str]]:
    """(module, option) of every `python -m MODULE ... --option` in a block of commands."""
    pairs = set()
    for name in NAMES:
        for block in blocks(name, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[1:2] == ["-m"] and words[2] != "pytest":
                    options = [word.partition("=")[0] for word in words if word.startswith("--")]
                    pairs |= {(words[2], option) for option in options}
    return sorted(pairs)


@pytest.mark.parametrize(("module", "option"), command_lines())
def test_options_that_are_shown_exist(module, option, capsys, monkeypatch):
    if module == "eval.several_masks" and option not in ("--masks", "--seeds", "--out"):
        keys = {action.dest for action in parser()._actions}
        assert option.removeprefix("--") in keys  # an override of its recipe
        return
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    assert exit.value.code == 0
    assert re.search(rf"(?<![\w-]){option}(?![\w-])", capsys.readouterr().out)


def test_the_readme_is_short_and_documents_are_not_wide():
    assert len(TEXTS["README.md"].splitlines()) <= 125
    for name in NAMES:
        for number, line in enumerate(TEXTS[name].splitlines(), start=1):
            wide = 180 if line.startswith("|") else 120  # a table's line cannot be broken
            assert len(line) <= wide, f"{name}:{number} has {len(line)} characters"


def test_every_line_of_what_could_be_lost_has_its_test():
    lines = [line for line in TEXTS["docs/nothing_silent.md"].splitlines() if line[:2] == "| "]
    rows = [line for line in lines if "`test_" in line]
    assert len(rows) == len(lines) - len([line for line in lines if line.endswith("| test |")])
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for line in rows:
        [name] = re.findall(r"`(test_\w+)`", line)
        assert any(f"def {name}(" in source for source in sources), name


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    [code] = blocks("README.md", "python")
    (tmp_path / "llava7b-v2v").symlink_to(ROOT / "fmtrain" / "tiny_llava")
    noise = np.random.default_rng(0)
    for picture in re.findall(r"[\w-]+\.png", code):
        pixels = noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / picture)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    prompt = names["encoded"].inputs["input_ids"].shape[1]
    assert names["tokens"].shape[1] > prompt


def sees(name: str, role: Role) -> str:
    """What a token of a role sees ahead under a policy, in README's words."""
    policy = fmtrain.POLICIES[name]
    keys = {key for query, key in policy.reveals if query == role}
    if policy.within_image and keys == {Role.VISUAL}:
        return "its own image"
    words = {Role.VISUAL: "images", Role.TEXT: "text"}
    return ", ".join(word for key, word in words.items() if key in keys)


def test_the_readmes_table_of_policies():
    shown = table(TEXTS["README.md"], "name")
    assert [row[0].strip("`") for row in shown] == list(fmtrain.POLICIES)
    for name, image, text, _ in shown:
        assert image == sees(name.strip("`"), Role.VISUAL), name
        assert text == sees(name.strip("`"), Role.TEXT), name


def test_the_designs_table_of_policies():
    shown = table(TEXTS["docs/design.md"], "name")
    assert [row[0].strip("`") for row in shown] == list(fmtrain.POLICIES)
    for name, pairs, _ in shown:
        policy = fmtrain.POLICIES[name.strip("`")]
        found = {f"{query.name[0]}->{key.name[0]}" for query, key in policy.reveals}
        assert set(re.findall(r"[TV]->[TV]", pairs)) == found
        assert ("inside one image" in pairs) == policy.within_image
        assert ("nothing" in pairs) == (not found)


def test_pictures_are_what_the_command_prints(capsys):
    from fmtrain.policies.__main__ import main

    shown = [block for block in blocks("docs/design.md", "") if block.startswith("$ ")]
    assert len(shown) == 2
    for block in shown:
        command, _, picture = block.partition("\n")
        words = shlex.split(command)
        assert words[:4] == ["$", "python", "-m", policies.__name__]
        assert main(words[4:]) == 0
        assert picture == capsys.readouterr().out


def test_the_record_is_what_a_checkpoint_carries():
    [record] = blocks("docs/design.md", "json")
    assert json.loads(record) == fmtrain.Mask.parse("v2v+merge").record()


def test_sections_of_the_design_that_code_and_tests_cite_exist():
    sections = set(re.findall(r"^## (\d+)\. ", TEXTS["docs/design.md"], flags=re.M))
    cited = set()
    for folder in ("fmtrain", "eval", "data_prep", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for numbers in re.findall(r"DESIGN (\d+(?:(?:, | and )\d+)*)", file.read_text()):
                cited |= set(re.findall(r"\d+", numbers))
    assert cited and cited <= sections
