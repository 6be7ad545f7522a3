"""Every shipped recipe loads, and opens with what it is and its command."""

import pytest
import training
import yaml

from fmtrain.recipe import read

RECIPES = sorted(path for path in (training.ROOT / "recipes").glob("*.yaml") if not path.name.startswith("matrix"))


def test_how_many_there_are():
    assert len(RECIPES) == 6, [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    recipe = read(path, ["--use_cpu", "true"])  # bf16 needs a GPU otherwise
    policy, _ = recipe.mask.policy()
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and any("fmtrain/sft.py" in line and path.name in line for line in lines if line.startswith("#"))
    assert len(lines) <= 50 and policy.name in recipe.mask.mask
    assert recipe.training.output_dir == f"runs/{path.stem}"


def test_distributed_configurations_are_complete():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (training.ROOT / "recipes" / "accelerate").glob("*.yaml")}
    assert {name: config["distributed_type"] for name, config in found.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
