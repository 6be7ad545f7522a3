"""No token is written anywhere: not to a log, a config, a record or a checkpoint."""

import pickle
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import training
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig

from fmtrain import SFTTrainer, sft

TOKENS = {"HF_TOKEN": "hf_" + "Plantd" * 5, "WANDB_API_KEY": "0bad" * 10}
HUB_TOKEN = "hf_" + "Secret" * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    training.workplace(folder)
    return folder


def assert_none(folder: Path, *secrets: str) -> int:
    """That no file below a folder has any of them; how many files there are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, path
    return len(files)


@pytest.mark.slow
def test_tokens_of_the_environment_are_written_nowhere(folder, tmp_path):
    """By a whole run, its checkpoints, W&B offline and TensorBoard."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    recipe = training.write_recipe(tmp_path, report_to=["wandb", "tensorboard"])
    run = training.launch(recipe, HOME=str(tmp_path), WANDB_MODE="offline", **TOKENS)
    assert run.returncode == 0, run.stderr[-2000:]
    assert any(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert (tmp_path / "out" / "checkpoint-4" / "training_args.bin").is_file()
    assert assert_none(tmp_path, *TOKENS.values()) > 40
    assert not any(secret in run.stderr + run.stdout for secret in TOKENS.values())


def test_a_token_in_a_recipe_or_a_command_is_refused(folder):
    """W&B writes a run's command down, and a run its recipe."""
    words = [["--hub_token", HUB_TOKEN], ["--model_init_kwargs", f'{{"token": "{HUB_TOKEN}"}}']]
    for extra in words:
        with pytest.raises(ValueError, match="set HF_TOKEN in the environment") as error:
            sft.main([str(folder / "recipe.yaml"), *extra])
        assert HUB_TOKEN not in str(error.value)
    with pytest.raises(ValueError, match="unknown argument '--hub_tokn'") as error:
        sft.main([str(folder / "recipe.yaml"), f"--hub_tokn={HUB_TOKEN}"])
    assert HUB_TOKEN not in str(error.value)
    assert not (folder / "out").exists()


def test_a_token_of_a_script_is_used_and_not_written(folder, tmp_path):
    out = tmp_path / "out"
    args = SFTConfig(
        str(out),
        hub_token=HUB_TOKEN,
        max_steps=1,
        save_steps=1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="tensorboard",
    )
    rows = training.read_rows(folder)
    for row in rows:
        row["images"] = [str(folder / "data" / name) for name in row["images"]]
    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(folder / "base"),
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder / "base"),
        mask="v2v",
    )
    trainer.train()
    trainer.save_model()
    assert f"Bearer {trainer.args.hub_token}" == f"Bearer {HUB_TOKEN}"
    assert assert_none(out, HUB_TOKEN) > 20 and HUB_TOKEN not in repr(trainer.args)
    saved = torch.load(out / "training_args.bin", weights_only=False)
    assert saved.hub_token == "<SECRET>" and saved.max_steps == 1
    assert HUB_TOKEN.encode() not in pickle.dumps(trainer.args)
