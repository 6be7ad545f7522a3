"""Combined images: MileBench's layout (golden), and a folder that prompts can be built from."""

import json
from itertools import product

import pytest
from PIL import Image

from eval.milebench.combine import SIDE, grids, main
from eval.milebench.prompt import image_paths, require_inputs
from eval.milebench.tasks import read_task


def test_golden_layout(golden):
    cases = json.loads((golden / "e2e" / "combined_layout.json").read_text())
    for case in cases:
        made = grids(case["n_images"], case["max_img_num"])
        assert [(grid.captions, [grid.columns, grid.rows]) for grid in made] == [
            (file["captions"], file["cells"]) for file in case["files"]
        ]
        assert [f"{{sample_id}}-{i}.jpg" for i in range(len(made))] == [
            file["name"] for file in case["files"]
        ]
    assert len(cases) == 18
    assert grids(0, 2) == []


@pytest.mark.parametrize(("limit", "sizes"), [(1, [(2, 2)]), (2, [(2, 1), (1, 1)])])
def test_combined_folder(make_data, capsys, limit, sizes):
    data = make_data("TQA", [("x", None, 3)], "open-ended")
    (data / "TQA" / "images").mkdir()
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for k, colour in enumerate(colours):
        Image.new("RGB", (9, 5), colour).save(data / "TQA" / "images" / f"{k}.jpg", quality=95)
    assert main(["--data", str(data), "--tasks", "TQA", "--images", str(limit)]) == 0
    assert capsys.readouterr().out == f"{data / 'TQA' / f'TQA_combined_{limit}.json'}\n"
    task = read_task(data, "TQA", limit)
    require_inputs(task, limit)
    pixels = []
    for path, (columns, rows) in zip(image_paths(task, task.samples[0], limit), sizes, strict=True):
        with Image.open(path) as image:
            assert image.size == (columns * SIDE, rows * SIDE)
            for y, x in product(range(rows), range(columns)):
                pixels.append(image.getpixel((x * SIDE + 9, y * SIDE + 9)))
            assert (
                image.crop((0, SIDE - 60, SIDE, SIDE)).convert("L").getextrema()[1] > 200
            )  # the white caption
    for colour, pixel in zip(colours, pixels):
        assert max(abs(a - b) for a, b in zip(colour, pixel)) < 12


def test_errors(make_data, capsys):
    data = make_data("TQA", [("x", None, 1)], "open-ended")
    assert main(["--data", str(data), "--tasks", "TQA", "--images", "0"]) == 2
    assert main(["--data", str(data), "--tasks", "TQA", "--images", "1"]) == 2
    (data / "TQA" / "images").mkdir()
    (data / "TQA" / "images" / "0.jpg").write_text("no image")
    assert main(["--data", str(data), "--tasks", "TQA", "--images", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: --images 0: at least 1 combined image a sample"
    assert lines[1].endswith(
        "sample 0: image file " + str(data / "TQA" / "images" / "0.jpg") + " is missing"
    )
    assert lines[2].endswith("0.jpg: not an image that can be read") and len(lines) == 3
