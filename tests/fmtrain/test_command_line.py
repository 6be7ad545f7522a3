"""The command `fmtrain`, its options and errors, and the wheel that brings it."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import training
import warm

import fmtrain
from fmtrain.command_line import Parser, guarded, replacing, write_whole
from fmtrain.training.recipe import find, shipped

FMTRAIN = ["-m", "fmtrain"]


def run(command: list[str], cwd=training.ROOT, **options) -> subprocess.CompletedProcess:
    environment = {"env": training.environment(), **options}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, **environment
    )


def test_help_names_every_command_and_recipe():
    done = run([sys.executable, *FMTRAIN])
    assert done.returncode == 0
    for word in ("train", "audit", "export", "preview", "policies", *shipped()):
        assert word in done.stdout, word
    unknown = run([warm.python(), *FMTRAIN, "trian"])
    assert unknown.returncode == 2 and "unknown command 'trian'" in unknown.stderr


def test_policies_and_their_light_forms():
    done = run([warm.python(), *FMTRAIN, "policies", "v2t+merge", "TIJT A"])
    assert done.returncode == 0 and "v2t+merge: pools V->T" in done.stdout
    assert [line.split()[-1] for line in done.stdout.splitlines()[-5:]] == [
        "#....",
        "##.o.",
        "###o.",
        "####.",
        "#####",
    ]


def test_a_shipped_recipe_is_found_by_name_and_a_file_as_named(tmp_path, monkeypatch):
    shipped_file = training.ROOT / "recipes" / "tiny_v2v_lora.yaml"
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_v2v_lora", "tiny_v2v_lora.yaml", "recipes/tiny_v2v_lora.yaml"):
        assert find(name) == shipped_file
    (tmp_path / "tiny_v2v_lora.yaml").write_text("mask: v2v\n")
    assert find("tiny_v2v_lora.yaml").read_text() == "mask: v2v\n"
    for name in ("tiny_v2v_lroa", "elsewhere/tiny_v2v_lora.yaml"):
        with pytest.raises(ValueError, match="nearest shipped one is 'tiny_v2v_lora'"):
            find(name)


def test_options_are_spelt_with_dashes_or_underscores():
    parser = Parser("x", "doc")
    parser.add_argument("--image_root")
    parser.add_argument("words", nargs="*")
    for given in (["--image_root", "a-b"], ["--image-root", "a-b"], ["--image-root=a-b"]):
        assert parser.parse_args(given).image_root == "a-b"
    assert parser.parse_args(["a-b"]).words == ["a-b"]


def test_an_error_is_one_line(capsys, tmp_path):
    def missing() -> None:
        (tmp_path / "none").read_text()

    def bad() -> None:
        raise ValueError("two\n lines")

    assert guarded(lambda: None) == 0 and guarded(lambda: 1) == 1
    assert guarded(missing) == 2 and guarded(bad) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {tmp_path / 'none'}: No such file or directory"
    assert second == "error: two lines"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_whole(file, "ä")
    assert file.read_bytes() == "ä".encode()
    with pytest.raises(RuntimeError), replacing(file) as staged:
        staged.write_text("half")
        raise RuntimeError
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
    assert file.read_text(encoding="utf-8") == "ä"


@pytest.mark.slow
def test_the_wheel_trains_the_embedded_model_outside_a_checkout(tmp_path):
    """Everything but fmtrain comes from this environment; fmtrain from the wheel alone."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    made = run([*build, "-w", str(tmp_path), str(training.ROOT)], cwd=tmp_path)
    assert made.returncode == 0, made.stderr[-1000:]
    [wheel] = tmp_path.glob("fmtrain-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"fmtrain-{fmtrain.__version__}.dist-info/entry_points.txt" in names
    assert not [name for name in names if not name.startswith("fmtrain")]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    place = tmp_path / "elsewhere"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    where = run([sys.executable, "-c", "import fmtrain; print(fmtrain.__file__)"], place,
                env=environment)  # fmt: skip
    assert where.stdout.strip() == str(tmp_path / "site" / "fmtrain" / "__init__.py")
    options = ["--max_steps", "2", "--dataset_rows", "64", "--logging_steps", "1"]
    done = run(
        [sys.executable, *FMTRAIN, "train", "tiny_v2v_lora", *options], place, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "runs/tiny_v2v_lora-v2v-s0" in done.stderr
    record = json.loads((place / "runs" / "tiny_v2v_lora-v2v-s0" / "run.json").read_text())
    assert record["policy"] == "v2v" and record["base_model"].endswith("fmtrain/tiny_llava")
