"""A checkpoint is whole or not there: torn files, a full disk, older checkpoints that go."""

import contextlib
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import training

from fmtrain import Merge, sft
from fmtrain.training import checkpoints

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workplace with a whole run of four steps."""
    folder = tmp_path_factory.mktemp("base")
    training.workplace(folder)
    assert sft.main([str(folder / "recipe.yaml"), "--output_dir", str(folder / "whole")]) == 0
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """The run, whole and as if it had been killed behind its last checkpoint."""
    rows = base / "data" / "rows.jsonl"
    changes = {"model_name_or_path": str(base / "base"), "dataset_name": str(rows)}
    training.write_recipe(tmp_path, **changes)
    for name in ("whole", "out"):
        shutil.copytree(base / "whole", tmp_path / name)
    (tmp_path / "out" / "files.json").unlink()
    return tmp_path


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(ValueError) as error:
        sft.main([str(folder / "recipe.yaml"), *words])
    message = str(error.value)
    assert "\n" not in message
    return message


def cut(path: Path) -> int:
    """Halve a file; its size before."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    return size


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_checkpoint_that_is_half_written_is_passed_over(folder, name, capsys):
    """The newest one, which a resume takes by itself; named, it is refused."""
    torn = folder / "out" / "checkpoint-4"
    size = cut(torn / name)
    said = f"{torn}: not a whole checkpoint ({name}: {size // 2:,} of {size:,} bytes)"
    assert refused(folder, "--resume_from_checkpoint", str(torn)) == said
    assert sft.main([str(folder / "recipe.yaml"), *RESUME]) == 0
    assert f"passed over: {said}" in capsys.readouterr().err
    assert training.losses(folder / "out") == training.losses(folder / "whole")
    checkpoints.check(torn)
    for file in ("adapter_model.safetensors", "checkpoint-4/optimizer.pt"):
        ours, theirs = folder / "out" / file, folder / "whole" / file
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_file_that_is_lost_is_named(folder):
    torn = folder / "out" / "checkpoint-4"
    (torn / "optimizer.pt").unlink()
    named = ["--resume_from_checkpoint", str(torn)]
    assert "not a whole checkpoint (optimizer.pt is missing)" in refused(folder, *named)
    (torn / "files.json").write_text('{"optimi')
    assert "(no files.json, or half of it)" in refused(folder, *named)
    (torn / "files.json").unlink()
    assert "(no files.json, or half of it)" in refused(folder, *named)


def test_a_run_whose_weights_are_cut_has_not_ended(folder):
    """It gets them from its last checkpoint, without another step."""
    shutil.copy(folder / "whole" / "files.json", folder / "out")
    assert "step 4 is the end already" in refused(folder, *RESUME)
    cut(folder / "out" / "adapter_model.safetensors")
    assert sft.main([str(folder / "recipe.yaml"), *RESUME]) == 0
    ours, theirs = (folder / name / "adapter_model.safetensors" for name in ("out", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


@contextlib.contextmanager
def room(size: int):
    """No file of this process may be larger, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_full_disk_loses_nothing_that_was_saved(folder, name):
    """The older checkpoint stays, though only one may, and the run goes on from it."""
    out = folder / "out"
    size = (out / "checkpoint-4" / name).stat().st_size
    shutil.rmtree(out / "checkpoint-4")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = [*RESUME, "--save_total_limit", "1"]
    with room(size - 1):
        message = refused(folder, *words)
    assert message.startswith(f"{out / 'checkpoint-4'}: not saved: ")
    assert re.search(r"; the last file is \S+, [\d,]+ bytes, and [\d,]+ bytes are free; ", message)
    assert message.endswith("make room and resume")
    for path, content in before.items():
        assert path.read_bytes() == content or path.name in ("run.json", "recipe.yaml", "README.md")
    assert not (out / "checkpoint-4").exists() and not (out / "_saving").exists()
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    assert training.losses(out) == training.losses(folder / "whole")
    assert [path.name for path in checkpoints.whole_checkpoints(out)] == ["checkpoint-4"]


def test_the_newest_is_the_one_of_most_steps(folder):
    """Not the last one by name: 10 is more than 8."""
    for step in (8, 10):
        shutil.copytree(folder / "out" / "checkpoint-4", folder / "out" / f"checkpoint-{step}")
    assert checkpoints.newest(folder / "out").name == "checkpoint-10"
    whole = [path.name for path in checkpoints.whole_checkpoints(folder / "out")]
    assert whole == [f"checkpoint-{step}" for step in (10, 8, 4, 2)]


def test_a_light_form_is_resumed_with_its_own_options(folder):
    words = ["--mask", "v2v+merge", "--output_dir", str(folder / "light")]
    assert sft.main([str(folder / "recipe.yaml"), *words, "--max_steps", "1"]) == 0
    for key, other in {"prefix": 2, "kernel_size": 5, "normalize": False}.items():
        message = refused(folder, *words, *RESUME, f"--merge_{key}={str(other).lower()}")
        before, now = message.split("checkpoint-1 records the mask ")[1].split(", the recipe says ")
        assert before.startswith("v2v+merge (") and now.startswith("v2v+merge (")
        assert f"'{key}': {getattr(Merge(), key)}" in before and f"'{key}': {other}" in now


def test_what_a_killed_run_has_half_written_goes(folder):
    (folder / "out" / "_saving" / "checkpoint-4").mkdir(parents=True)
    shutil.rmtree(folder / "out" / "checkpoint-4")
    assert checkpoints.newest(folder / "out").name == "checkpoint-2"
    assert sft.main([str(folder / "recipe.yaml"), *RESUME]) == 0
    assert not (folder / "out" / "_saving").exists()
    assert checkpoints.newest(folder / "out").name == "checkpoint-4"


def test_auto_resumes_or_begins(folder):
    """As a scheduler's script says it each time."""
    auto = ["--resume_from_checkpoint", "auto"]
    for name in ("checkpoint-2", "checkpoint-4"):
        (folder / "out" / name / "files.json").unlink()
    assert "remove it" in refused(folder)
    assert sft.main([str(folder / "recipe.yaml"), *auto]) == 0
    shutil.rmtree(folder / "out" / "checkpoint-4")
    (folder / "out" / "files.json").unlink()
    assert sft.main([str(folder / "recipe.yaml"), *auto]) == 0
    assert training.losses(folder / "out") == training.losses(folder / "whole")
    assert "step 4 is the end already" in refused(folder, *auto)
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(folder / "out" / name)
    assert "the run has ended and has no checkpoint" in refused(folder, *auto)


def test_the_best_checkpoint_is_named_where_it_is(base, folder):
    """In its own state too, which is written before it is in its place."""
    words = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true"]
    words += ["--eval_dataset_name", str(base / "data" / "rows.jsonl"), "--eval_answers", "0"]
    out = folder / "best"
    assert sft.main([str(folder / "recipe.yaml"), *words, "--output_dir", str(out)]) == 0
    for step in (2, 4):
        text = (out / f"checkpoint-{step}" / "trainer_state.json").read_text()
        best = Path(json.loads(text)["best_model_checkpoint"])
        assert best.parent == out and best.is_dir()


def test_an_error_that_no_disk_makes_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a size mismatch$"):
        with checkpoints.saving(tmp_path / "out", tmp_path):
            raise RuntimeError("a size mismatch")
