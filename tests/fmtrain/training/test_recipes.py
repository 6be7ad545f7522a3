"""Every shipped recipe loads, opens with what it is and its command, and those that name data sets
train on fixtures."""

import importlib
import json
import re

import families
import pytest
import training
import yaml
from accelerate.commands.launch import launch_command_parser

from data_prep import check
from data_prep.converting.command import main as convert
from fmtrain import sft
from fmtrain.training import model as start
from fmtrain.training.recipe import read

RECIPES = sorted(path for path in (training.ROOT / "recipes").glob("*.yaml"))


def test_how_many_there_are():
    assert len(RECIPES) == 10, [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    recipe = read(path, ["--use_cpu", "true"])  # bf16 needs a GPU otherwise
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and any(
        f"fmtrain train {path.stem}" in line for line in lines if line.startswith("#")
    )
    assert len(lines) <= 50 and str(recipe.mask) == recipe.resolved["mask"]
    name = f"{path.stem}-{recipe.mask}-s{recipe.training.seed}"
    assert recipe.training.output_dir == f"runs/{name}" and recipe.training.run_name == name


LAUNCHES = []
for _path in RECIPES:
    _lines = [line for line in _path.read_text().splitlines() if line[:1] == "#"]
    _head = " ".join(line.strip("# \\") for line in _lines)
    for _match in re.finditer(
        r"accelerate (launch .*?fmtrain/sft\.py \S+\.yaml(?: --\w+ [\w.]+)*)", _head
    ):
        LAUNCHES.append(_match[1])


def test_several_machines_have_launch_lines():
    assert len(LAUNCHES) == 2


@pytest.mark.parametrize("line", LAUNCHES)
def test_a_launch_line_of_several_machines_is_one(line, monkeypatch):
    """As accelerate parses it: a configuration and a recipe that there are, whole machines."""
    words = line.replace("$RANK", "1").replace("$HOST", "10.0.0.1").split()
    arguments = launch_command_parser().parse_args(words[1:])
    monkeypatch.chdir(training.ROOT)
    assert yaml.safe_load(open(arguments.config_file).read())["num_processes"] == 8
    assert arguments.num_processes == 8 * arguments.num_machines and arguments.machine_rank == 1
    recipe, *overrides = arguments.training_script_args
    assert arguments.training_script == "fmtrain/sft.py"
    rows = read(recipe, [*overrides, "--use_cpu", "true"]).training
    step = rows.per_device_train_batch_size * rows.gradient_accumulation_steps
    assert step * arguments.num_processes == 128


def test_distributed_configurations_are_complete():
    found = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (training.ROOT / "recipes" / "accelerate").glob("*.yaml")
    }
    assert {name: config["distributed_type"] for name, config in found.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }


@pytest.mark.parametrize("name", ["masks", "merge"])
def test_a_sweep_compares_held_out_answers(name, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    sweep = yaml.safe_load((training.ROOT / "recipes" / "sweeps" / f"{name}.yaml").read_text())
    assert sweep["metric"] == {"name": "eval/exact_match", "goal": "maximize"}
    words = []
    for key, choice in sweep["parameters"].items():
        words.append(f"--{key}={choice['value'] if 'value' in choice else choice['values'][-1]}")
    [recipe] = [word for word in sweep["command"] if word.endswith(".yaml")]
    monkeypatch.chdir(training.ROOT)
    found = read(recipe, [*words, "--use_cpu", "true"])
    assert found.training.eval_strategy != "no" and found.evaluation.eval_answers == 1000
    assert found.training.output_dir == f"runs/sweeps/{name}/abc"
    named = {"masks": "prefix_lm-s2", "merge": "v2v+merge-prefix=0.1-kernel_size=7-s42"}
    assert found.training.run_name == f"llava7b_v2v_lora-{named[name]}"


FIXTURES = training.ROOT / "tests" / "data_prep" / "fixtures"
FAMILIES = {
    "llava_onevision7b_interleave_lora": "llava_onevision",
    "llava_next7b_v2v_lora": "llava_next",
    "internvl3_8b_v2v_lora": "internvl",
}
PREPARED = {  # converter and options of the sets that are not named like their converter
    "m4_instruct": ["interleave"],
    "refcoco+": ["refcoco"],  # the fixture holds refcoco alone
    "refcocog": ["refcoco"],
}
ON_DATA_SETS = [
    path for path in RECIPES if read(path, ["--use_cpu", "true"]).data.dataset_name != "digits"
]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """`prepare(set, order)`: the rows of a set's fixture, converted and checked as the recipes say,
    and their image root."""
    folder, done = tmp_path_factory.mktemp("prepared"), {}

    def run(name: str, order: str) -> dict:
        converter, out = PREPARED.get(name, [name])[0], folder / f"{name}_{order}"
        if out not in done:
            module = importlib.import_module(f"data_prep.{converter}")
            source = FIXTURES / converter
            assert (
                convert(
                    module.CONVERTER, ["--source", str(source), "--out", str(out), "--order", order]
                )
                == 0
            )
            rejected = folder / f"{name}_{order}_rejected.jsonl"
            assert (
                check.main(
                    [
                        str(out),
                        "--image_root",
                        str(source),
                        "--reject",
                        str(rejected),
                        "--workers",
                        "1",
                    ]
                )
                == 0
            )
            done[out] = {"path": str(out), "image_root": str(source)}
        return done[out]

    return run


def test_recipes_that_name_data_sets():
    assert len(ON_DATA_SETS) == 7, [path.name for path in ON_DATA_SETS]


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_DATA_SETS, ids=lambda path: path.stem)
def test_three_steps_on_fixtures(path, prepare, tmp_path, monkeypatch):
    family, recipe = FAMILIES.get(path.stem, "llava"), read(path, ["--use_cpu", "true"])
    families.model(family).save_pretrained(tmp_path / "base")
    # No torchvision, no video processor.
    monkeypatch.setattr(start, "load_processor", lambda *_, **__: families.processor(family))
    monkeypatch.setattr(families.processor(family), "save_pretrained", lambda *_, **__: [])
    if recipe.data.datasets:
        order = (
            "dual"
            if any("--order dual" in line for line in path.read_text().splitlines())
            else "image_first"
        )
        sets = [
            one | prepare(one["path"].rpartition("/")[2], order) for one in recipe.data.datasets
        ]
        data = ["--datasets", *(json.dumps(one) for one in sets)]
    else:
        one = prepare(recipe.data.dataset_name.rpartition("/")[2], "image_first")
        data = ["--dataset_name", one["path"], "--image_root", one["image_root"]]
    small = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
    }
    small |= {"max_steps": 3, "lora_r": 4, "lora_alpha": 8, "logging_steps": 1, "report_to": "none"}
    small |= {
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
        "output_dir": tmp_path / "out",
    }
    positions = families.model(family).config.get_text_config().max_position_embeddings
    small["max_length"] = min(recipe.training.max_length, positions)
    small |= {"model_name_or_path": tmp_path / "base"}
    assert sft.main([str(path), *data, *(f"--{key}={value}" for key, value in small.items())]) == 0
    losses = training.losses(tmp_path / "out")
    assert list(losses) == [1, 2, 3] and all(0 < loss < 100 for loss in losses.values())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["policy"] == recipe.mask.policy.name and run["rows"] > 0 and run["rows_dropped"] == 0
