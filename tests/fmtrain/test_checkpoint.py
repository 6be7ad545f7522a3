"""Checkpoints whose files do not hold what their config says: refused in one line, by what loads
them and by a run that would start from them."""

import json
import shutil

import pytest
import training
import trl
from safetensors.torch import load_file, save_file

import fmtrain
from fmtrain import checkpoint, sft

LAYER = "language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    training.workplace(folder, rows=4)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    training.write_recipe(tmp_path)
    return tmp_path


def is_one(name: str) -> bool:
    return "language_model" in name and name.endswith("layers.0.self_attn.q_proj.weight")


def lacking(weights: dict) -> dict:
    return {name: each for name, each in weights.items() if not is_one(name)}


def of_other_shapes(weights: dict) -> dict:
    return {name: each[:8].clone() if is_one(name) else each for name, each in weights.items()}


def refused(folder, *named: str) -> None:
    """By `load`, by a run, and by a script that names it: each in one line that does so too."""
    words = [str(folder / "recipe.yaml"), "--max_steps", "1"]
    args = trl.SFTConfig(str(folder / "script"), use_cpu=True, max_length=None, report_to="none")
    rows = training.read_rows(folder)
    for serve in (
        lambda: fmtrain.load(folder / "base", mask="v2v"),
        lambda: sft.main(words),
        lambda: fmtrain.SFTTrainer(str(folder / "base"), args, train_dataset=rows, mask="v2v"),
    ):
        with pytest.raises(ValueError) as error:
            serve()
        message = str(error.value)
        assert "\n" not in message
        for word in (str(folder / "base"), *named):
            assert word in message, f"{word!r} is not named in {message!r}"
    assert not (folder / "out" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    "change, named", [(lacking, ("lack 1 weight", LAYER)), (of_other_shapes, (LAYER, "config"))]
)
def test_weights_that_are_not_those_of_the_config(change, named, folder):
    path = folder / "base" / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    refused(folder, *named)


def test_a_file_of_weights_that_was_cut(folder):
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, "cannot be read")


@pytest.mark.parametrize("lack", [True, False], ids=["lacking", "cut"])
def test_an_adapter_without_all_its_weights(lack, folder):
    words = ["--max_steps", "1", "--use_peft", "true", "--lora_r", "2"]
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    path = folder / "out" / "adapter_model.safetensors"
    if lack:
        weights = load_file(path)
        kept = {name: each for name, each in weights.items() if "layers.0" not in name}
        save_file(kept, path, {"format": "pt"})
        assert 0 < len(kept) < len(weights)
    else:
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="its weights cannot be read") as error:
        fmtrain.load(folder / "out")
    message = str(error.value)
    assert str(folder / "out") in message and "\n" not in message
    assert ("missing adapter keys" in message) == lack


@pytest.mark.parametrize("value", [{}, {"base_model_name_or_path": None}], ids=["without", "null"])
def test_an_adapter_that_names_no_base(value, tmp_path):
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model") as error:
        fmtrain.load(tmp_path, mask="v2v")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("wanted", [None, "v2"])
def test_the_base_of_an_adapter_is_of_the_revision_it_was_trained_on(wanted, folder, monkeypatch):
    words = ["--max_steps", "1", "--use_peft", "true", "--lora_r", "2", "--model_revision", "v1"]
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    asked, read = [], checkpoint.weights_of

    def weights_of(name, **kwargs):
        asked.append((name, kwargs.get("revision")))
        return read(name, **kwargs)

    monkeypatch.setattr(checkpoint, "weights_of", weights_of)
    fmtrain.load(folder / "out", **({"revision": wanted} if wanted else {}))
    assert asked == [(str(folder / "base"), wanted or "v1")]
