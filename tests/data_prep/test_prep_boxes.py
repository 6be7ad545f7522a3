"""Boxes are where the model sees them: a bright rectangle in a dark picture, found again among the
pixels of transformers' padding processor."""

import json

import families
import numpy as np
import pytest
import training
from PIL import Image
from transformers import LlavaImageProcessorPil

from data_prep.converting.boxes import normalised
from fmtrain import sft
from fmtrain.training.recipe import read
from fmtrain.training.rows import check_boxes

SHAPES = [
    ((640, 427), (100, 60, 200, 120)),
    ((427, 640), (11, 300, 99, 251)),
    ((33, 20), (3, 2, 9, 7)),
    ((20, 33), (4, 8, 15, 24)),
    ((50, 50), (10, 20, 30, 5)),
]


@pytest.mark.parametrize(("size", "box"), SHAPES)
def test_boxes_are_where_a_padded_picture_shows_them(size, box):
    width, height = size
    x, y, across, down = box
    values = np.zeros((height, width, 3), np.uint8)
    values[y : y + down, x : x + across] = 255
    side = max(size)
    processor = LlavaImageProcessorPil(
        do_pad=True, do_resize=False, do_center_crop=False, do_normalize=False
    )
    [seen] = processor([Image.fromarray(values)])["pixel_values"]
    assert np.shape(seen) == (3, side, side)
    rows, columns = np.nonzero(np.asarray(seen).min(0) > 0.9)
    corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert normalised(box, size, "square") == str([round(int(at) / side, 2) for at in corners])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    training.workplace(folder, rows=2)
    return folder


def manifest(place, frame: str | None) -> None:
    (place / "data" / "_manifest").write_text(json.dumps({"box_frame": frame}))


def run(place, *overrides: str) -> int:
    short = ["--use_cpu", "true", "--max_length", "9999"]  # refused later, before any weights
    return sft.main([str(place / "recipe.yaml"), *short, *overrides])


@pytest.mark.parametrize("frame", ["square", "image"])
def test_boxes_of_another_frame_are_refused_or_said(place, frame, capsys):
    manifest(place, frame)
    words = r"rows.jsonl: its boxes are relative to the image.*image_aspect crop"
    with pytest.raises(ValueError, match=words + r"; .* say `image_aspect: crop`"):
        run(place)
    with pytest.raises(ValueError, match="max_length 9999"):
        run(place, "--image_aspect", "crop")
    assert "its boxes are relative to" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_length 9999"):
        run(place, "--image_aspect", "pad")
    assert ("its boxes are relative to" in capsys.readouterr().err) == (frame == "image")


def test_sets_of_a_mix_and_of_evaluation_are_looked_at(place):
    manifest(place, "square")
    rows = str(place / "data")

    processor = families.processor("llava")
    for changes in (
        dict(dataset_name=None, datasets=[{"path": rows}]),
        dict(dataset_name="digits", eval_dataset_name=rows, eval_strategy="steps"),
    ):
        recipe = read(training.write_recipe(place, **changes), ["--use_cpu", "true"])
        with pytest.raises(ValueError, match="its boxes are relative to"):
            check_boxes(recipe, processor)
        for other in ("llava_next", "internvl"):  # which show an image whole
            assert check_boxes(recipe, families.processor(other)) == []
    training.write_recipe(place)


@pytest.mark.parametrize("frame", [None, "none"])
def test_rows_without_boxes_are_trained_as_ever(place, frame, capsys):
    (place / "data" / "_manifest").unlink(missing_ok=True)
    if frame is None:
        manifest(place, frame)
    with pytest.raises(ValueError, match="max_length 9999"):
        run(place)
    assert "boxes" not in capsys.readouterr().err


def test_a_manifest_that_is_none(place):
    (place / "data" / "_manifest").write_text("[3]")
    with pytest.raises(ValueError, match="_manifest: no manifest of prepared rows"):
        run(place)


@pytest.mark.parametrize(
    ("name", "options", "frame"),
    [
        ("refcoco", [], "square"),
        ("refcoco", ["--box_frame", "image"], "image"),
        ("visual_genome", [], "square"),
        ("llava_mix665k", [], "square"),
        ("gqa", [], None),
    ],
)
def test_the_manifest_says_what_boxes_are_relative_to(
    name, options, frame, fixtures, convert, tmp_path
):
    assert convert(name, fixtures / name, tmp_path / "out", *options) == 0
    assert json.loads((tmp_path / "out" / "_manifest").read_text())["box_frame"] == frame
