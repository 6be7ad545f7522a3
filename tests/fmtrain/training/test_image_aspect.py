"""The recipe's `image_aspect`: of training, of every checkpoint, of the export, and never changed
without a word."""

import json
import shutil

import families
import pytest
import torch
import training
from transformers import AutoProcessor

import fmtrain
from fmtrain import sft
from fmtrain.audit import subject
from fmtrain.data.collator import encode_row
from fmtrain.export import export
from fmtrain.training.recipe import read


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workplace with a finished run that padded its pictures, of 24 x 20 pixels."""
    folder = tmp_path_factory.mktemp("aspect")
    training.workplace(folder, rows=4)
    assert run(folder, "--image_aspect", "pad") == 0
    return folder


def run(folder, *overrides: str) -> int:
    return sft.main([str(folder / "recipe.yaml"), "--use_cpu", "true", *overrides])


def pixels_of(processor, folder) -> torch.Tensor:
    """Of the first row's picture, through a processor of transformers alone."""
    picture = training.picture(0)
    assert picture.size == (24, 20)
    return processor(text=["<image>"], images=[picture], return_tensors="pt")["pixel_values"]


def padded(folder) -> torch.Tensor:
    """The same, with the picture put on a gray square by hand and then shown as the base does."""
    square = training.picture(0).crop((0, -2, 24, 22))
    square.paste((122, 116, 104), (0, 0, 24, 2))
    square.paste((122, 116, 104), (0, 22, 24, 24))
    base = AutoProcessor.from_pretrained(folder / "base")
    return base(text=["<image>"], images=[square], return_tensors="pt")["pixel_values"]


def test_every_checkpoint_and_the_export_pad_as_training_did(place, tmp_path):
    export(place / "out", tmp_path / "exported")
    expected = padded(place)
    for folder in (place / "out", place / "out" / "checkpoint-2", tmp_path / "exported"):
        processor = AutoProcessor.from_pretrained(folder)
        assert torch.equal(pixels_of(processor, place), expected), folder
        _, processor = fmtrain.load(folder)
        row = training.read_rows(place)[0]
        inputs, _ = encode_row(processor, row, place / "data")
        assert torch.equal(inputs["pixel_values"], expected), folder
    own = pixels_of(AutoProcessor.from_pretrained(place / "base"), place)
    assert not torch.equal(own, expected)
    assert json.loads((place / "out" / "run.json").read_text())["image_aspect"] == "pad"
    assert "image_aspect: pad" in (place / "out" / "recipe.yaml").read_text()


def test_the_audit_of_a_recipe_pads_too(place):
    recipe = training.write_recipe(place, image_aspect="pad", output_dir=str(place / "none"))
    _, processor, rows, root = subject(str(recipe))
    inputs, _ = encode_row(processor, rows[0], root)
    assert torch.equal(inputs["pixel_values"], padded(place))
    training.write_recipe(place)


@pytest.mark.parametrize(("aspect", "line"), [("pad", "padded to a square"), (None, "cropped to")])
def test_a_run_says_how_it_shows_pictures(place, aspect, line, capsys):
    changes = [] if aspect is None else ["--image_aspect", aspect]
    with pytest.raises(ValueError, match="max_length 9999"):  # and no further
        run(place, *changes, "--max_length", "9999", "--output_dir", str(place / "none"))
    said = capsys.readouterr().err
    assert f"images: {line}" in said and f"image_aspect: {aspect or 'crop'}" in said


@pytest.mark.parametrize("aspect", [[], ["--image_aspect", "crop"]])
def test_a_run_that_padded_is_not_resumed_cropping(place, aspect, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    before = (tmp_path / "out" / "run.json").read_bytes()
    words = "the run has image_aspect pad, the recipe makes it crop; that is another run"
    with pytest.raises(ValueError, match=words):
        more = ["--max_steps", "6", "--resume_from_checkpoint", "true"]
        run(place, *aspect, *more, "--output_dir", str(tmp_path / "out"))
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_a_run_with_another_processor_in_it_is_not_exported(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    families.processor("llava").save_pretrained(tmp_path / "out")
    words = "its processor has image_aspect crop, the run was trained with pad"
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "out", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_values_and_models_that_do_not_go_with_it(place, tmp_path):
    with pytest.raises(ValueError, match="image_aspect is 'square'; known are pad, crop"):
        read(place / "recipe.yaml", ["--image_aspect", "square"])
    training.workplace(tmp_path, "llava_next", rows=2)
    with pytest.raises(ValueError, match="image_aspect pad with LlavaNextImageProcessorPil"):
        run(tmp_path, "--image_aspect", "pad")
