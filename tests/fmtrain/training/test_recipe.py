"""One parser for YAML and command line: types, overrides, and what each refuses."""

import pytest
import training
import yaml

from fmtrain.merge import Merge
from fmtrain.training.recipe import read


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        return training.write_recipe(tmp_path, **changes)

    return write


def test_values_are_typed_and_the_command_line_wins(recipe):
    path = recipe(
        learning_rate="2e-3",
        bf16=False,
        train_parts=["language_model", "projector"],
        report_to=["wandb", "tensorboard"],
        lr_scheduler_type="cosine",
    )
    found = read(path, ["--learning_rate=5e-4", "--mask", "future", "--logging_steps", "3"])
    assert (
        found.training.learning_rate == 5e-4
        and found.training.logging_steps == 3
        and str(found.mask) == "future"
    )
    assert found.data.train_parts == [
        "language_model",
        "projector",
    ] and found.training.report_to == ["wandb", "tensorboard"]
    assert found.training.max_length is None and found.training.remove_unused_columns is False
    # what a run writes is the recipe that would make it again
    assert (
        found.resolved["learning_rate"] == 5e-4
        and found.resolved["mask"] == "future"
        and found.resolved["logging_steps"] == 3
    )
    path.write_text(yaml.safe_dump(found.resolved))
    assert read(path).resolved == found.resolved


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [(1, 1), ("4", 4), (0.1, 0.1), ("0.01", 0.01), (1.0, 1.0)],
    ids=["count", "text", "fraction", "small", "whole"],
)
def test_merge_options(recipe, prefix, expected):
    found = read(
        recipe(mask="v2v+merge", merge_prefix=prefix, merge_kernel_size=5, merge_normalize=False)
    )
    policy, merge = found.mask.policy, found.mask.merge
    assert (
        policy.name == "v2v"
        and merge == Merge(expected, 5, False)
        and type(merge.prefix) is type(expected)
    )


def test_packed_layers_compute_in_a_dtype_that_is_named(recipe):
    with pytest.raises(ValueError, match="dtype auto with load_in_4bit"):
        read(recipe(load_in_4bit=True, dtype="auto"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": ["v2v"]}, ["mask takes one value, not a list of 1"]),
        ({"base_mask": ["v2v"]}, ["base_mask takes one value"]),
        ({"dataset_name": ["a.jsonl", "b.jsonl"]}, ["dataset_name", "not a list of 2"]),
        ({"learning_rate": [1]}, ["learning_rate takes one value"]),
        ({"dataset_rows": -1}, ["dataset_rows -1 is less than 1"]),
        ({"dataset_rows": 0}, ["dataset_rows 0 is less than 1"]),
    ],
)
def test_values_that_would_be_taken_for_others(recipe, changes, words):
    path = recipe(**changes)
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in (str(path), *words))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "v2v+merge", "merge_prefix": 0}, ["prefix 0", "1 or more"]),
        ({"mask": "v2v+merge", "merge_prefix": 1.5}, ["prefix 1.5", "at most 1.0"]),
        ({"mask": "v2v+merge", "merge_prefix": "some"}, ["'some'", "count"]),
        ({"mask": "v2v+merge", "merge_kernel_size": 0}, ["kernel_size 0", "1 or more"]),
        ({"mask": "causal+merge"}, ["causal", "nothing to merge"]),
        ({"mask": "v2v+pool"}, ["v2v+pool", "POLICY+merge"]),
    ],
)
def test_bad_merge_options_say_what_is_allowed(recipe, changes, words):
    with pytest.raises(ValueError) as error:
        read(recipe(**changes))
    assert all(word in str(error.value) for word in words)


def test_zero_is_a_seed(recipe):
    path = recipe()
    assert read(path, ["--seed", "3", "--data_seed", "0"]).data_seed == 0
    assert read(path, ["--seed", "3"]).data_seed == 3


def test_unused_and_unset(recipe):
    with pytest.raises(ValueError, match="merge_kernel_size belong to the light form"):
        read(recipe(mask="v2v", merge_kernel_size=5))
    with pytest.raises(ValueError, match="variable that is not set"):
        read(recipe(output_dir="runs/$NOT_SET_ANYWHERE"))
    with pytest.raises(ValueError, match="no such recipe"):
        read("nowhere.yaml")


def test_a_sweep_run_has_a_folder_of_its_own(recipe, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert (
        read(recipe(), ["--output_dir=runs/sweep/$WANDB_RUN_ID"]).training.output_dir
        == "runs/sweep/abc123"
    )


def test_a_run_is_named_after_recipe_mask_and_seed(recipe, tmp_path):
    path = recipe(output_dir=None)
    training_arguments = read(path).training
    assert training_arguments.output_dir == "runs/recipe-v2v-s42"
    assert training_arguments.run_name == "recipe-v2v-s42"
    other = read(path, ["--mask", "future+merge", "--seed=3"])
    assert other.training.output_dir == "runs/recipe-future+merge-s3"
    assert other.resolved["output_dir"] == other.training.output_dir
    named = read(path, ["--output_dir", "elsewhere", "--run_name", "mine"])
    assert (named.training.output_dir, named.training.run_name) == ("elsewhere", "mine")
    path = recipe(output_dir="elsewhere", seed=1)
    assert read(path).training.run_name == "recipe-v2v-s1"
