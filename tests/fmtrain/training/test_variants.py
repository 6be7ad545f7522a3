"""The seven variants of the paper's table train, export, reload and answer as they were trained."""

import json

import families
import pytest
import torch
import training

import fmtrain
from fmtrain import sft
from fmtrain.data.collator import encode_row
from fmtrain.data.render import markers
from fmtrain.export import export
from fmtrain.infer import Markers
from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, picture

VV, VT = ["VISUAL", "VISUAL"], ["VISUAL", "TEXT"]
REVEALS = {"causal": [], "future": [VT, VV], "v2v": [VV], "v2t": [VT]}
VARIANTS = ["causal", "future", "v2v", "v2t", "future+merge", "v2v+merge", "v2t+merge"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    training.workplace(folder, rows=8)
    return folder


@pytest.mark.parametrize("mask", VARIANTS)
def test_trains_exports_and_reloads(folder, mask):
    name = mask.replace("+", "_")
    out, exported = folder / name, folder / f"{name}_exported"
    pooling = ["--merge_prefix", "2", "--merge_kernel_size", "5"] if "+" in mask else []
    assert (
        sft.main(
            [
                str(folder / "recipe.yaml"),
                "--mask",
                mask,
                "--output_dir",
                str(out),
                "--max_steps",
                "2",
                *pooling,
            ]
        )
        == 0
    )
    export(out, exported)
    section = json.loads((exported / "config.json").read_text())["fmtrain"]
    merge = {"prefix": 2, "kernel_size": 5, "normalize": True} if "+" in mask else None
    table = {"policy": mask.partition("+")[0], "reveals": REVEALS[mask.partition("+")[0]]}
    assert Markers.from_record(section.pop("markers")) == markers(families.processor("llava"))
    assert section == table | {"within_image": False, "merge": merge, "version": 1}

    card = (exported / "README.md").read_text()
    options = ", merge=fmtrain.Merge(prefix=2, kernel_size=5, normalize=True)" if merge else ""
    assert f'`fmtrain.attach(model, "{mask}"{options})`' in card
    assert picture(mask, Layout.parse(EXAMPLE)) in card

    model, processor = fmtrain.load(str(exported))
    row = training.read_rows(folder)[1]  # two images
    inputs, layout = encode_row(processor, row, folder / "data")
    with torch.no_grad():
        logits = model(**inputs, **layout.model_inputs()).logits
        fmtrain.attached(model).detach()
        causal = model(**inputs).logits
        with fmtrain.attach(
            model, section["policy"], "reference", fmtrain.Merge(**merge) if merge else None
        ):
            expected = model(**inputs, **layout.model_inputs()).logits
    assert torch.equal(logits, causal) == (mask == "causal")
    torch.testing.assert_close(
        logits, expected, atol=1e-4, rtol=1e-4
    )  # float32 rounding through four layers
