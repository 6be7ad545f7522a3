"""`--help` of every command: it is there, short, and names options and keys with their defaults."""

import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import training
from trl import ModelConfig, SFTConfig

from fmtrain import sft
from fmtrain.__main__ import main
from fmtrain.training.arguments import DataArguments, EvaluationArguments, MaskArguments

COMMANDS = []
for package in ("fmtrain", "eval", "data_prep"):
    for path in sorted((training.ROOT / package).rglob("*.py")):
        if "__name__ ==" in path.read_text() or path.name == "__main__.py":
            module = ".".join(path.relative_to(training.ROOT).with_suffix("").parts)
            COMMANDS.append(module.removesuffix(".__main__"))


def test_how_many_there_are():
    assert len(COMMANDS) == 40 and {"fmtrain.audit", "eval.matrix", "data_prep.vsr"} < {*COMMANDS}


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_a_help(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.syspath_prepend(str(training.ROOT))
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    shown = capsys.readouterr()
    assert not exit.value.code and "error" not in shown.err
    assert 5 < len(shown.out.splitlines()) < (130 if module == "fmtrain.sft" else 70)


@pytest.mark.parametrize(
    ("module", "option", "default"),
    [
        ("data_prep.vqav2", "--order", "image_first"),
        ("data_prep.digits", "--seed", "0"),
        ("eval.compare", "--count", "200"),
        ("eval.matrix", "--rows_per_task", "200"),
        ("eval.milebench.generate", "--batch_images", "24"),
        ("fmtrain.tiny", "--seed", "0"),
        ("fmtrain.export", "--backend", "auto"),
    ],
)
def test_options_show_their_defaults(module, option, default, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    text = capsys.readouterr().out.split("options:")[1]
    of_option = re.split(r"\n  -", text.split(f"\n  {option} ")[1])[0]
    shown = " ".join(of_option.split())
    assert f"default: {default})" in shown or shown.endswith(f"{default} by default"), shown


REQUIRED = {
    "data_prep.digits": "--out",
    "data_prep.vqav2": "--source, --out",
    "eval.compare": "--before, --after",
    "eval.milebench.combine": "--data, --tasks, --images",
    "eval.milebench.generate": "--data, --model, --out",
    "eval.milebench.score": "--data, --predictions, --out",
    "fmtrain.export": "run, --out",
    "fmtrain.tiny": "--out",
}


@pytest.mark.parametrize("module", REQUIRED)
def test_what_a_command_needs_is_asked_for(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    said = capsys.readouterr().err.split("the following arguments are required: ")[1]
    assert exit.value.code == 2 and said.strip() == REQUIRED[module]


def test_the_help_of_training_names_every_key(capsys):
    assert main(["train", "tiny_v2v_lora", "--help"]) == 0
    shown = capsys.readouterr().out
    groups = (MaskArguments, DataArguments, EvaluationArguments)
    for key in [key for group in groups for key in fields(group)]:
        default = str(key.default).lower() if isinstance(key.default, bool) else key.default
        line = rf"^  {key.name}" + ("" if default is None else f" = {re.escape(str(default))}")
        assert len(re.findall(rf"{line}( |$)", shown, flags=re.M)) == 1, key.name
        assert " ".join(key.metadata["help"].split()[:3]) in shown
    for group in (SFTConfig, ModelConfig):
        for key in fields(group):
            count = len(re.findall(rf"(?<!\S){key.name}(?=[,\s])", shown + "\n"))
            assert count >= 1 or not key.init, key.name
    assert "  output_dir = runs/RECIPE-MASK-sSEED" in shown and "max_length\n" not in shown
    for concept in ("The mask:", "The data:", "The model, and what of it learns:", "The run:"):
        assert concept in shown
    assert max(map(len, shown.splitlines())) <= 100 and len(shown.splitlines()) < 130
    assert sft.main(["--help"]) == 0
    assert shown.partition("The mask:")[2] in capsys.readouterr().out


def test_a_command_without_words_shows_its_help(capsys):
    assert main(["train"]) == 0 and "The mask:" in capsys.readouterr().out
    assert main([]) == 0 and "fmtrain train RECIPE" in capsys.readouterr().out


def test_the_trainer_shows_its_help_wherever_it_is_started(tmp_path):
    done = training.subprocess.run(
        [sys.executable, str(Path(sft.__file__)), "--help"],
        env=training.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "The mask:" in done.stdout, done.stderr
