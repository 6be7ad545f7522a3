"""Several sets in one run, and sets that are streamed: the rows, their order, and what a resumed
run leaves unopened."""

import copy
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import datasets
import families
import numpy as np
import pytest
import test_data
import torch
import training

import fmtrain.data.collator
from fmtrain import sft
from fmtrain.data import files as data
from fmtrain.data import mixing, stream
from fmtrain.data.collator import encode_row
from fmtrain.tiny import digits
from fmtrain.training.build import build_trainer
from fmtrain.training.recipe import read
from fmtrain.training.rows import evaluation_rows, rows_of, training_rows

own_cache = test_data.own_cache


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """base/, and three sets a (12 rows), b (8) and c (5, Parquet with images); all name their
    images alike."""
    folder = tmp_path_factory.mktemp("mix")
    training.workplace(folder, rows=1)
    for seed, (name, count) in enumerate({"a": 12, "b": 8}.items()):
        rows = [
            test_data.simple(k) | {"id": f"{name}{k}", "images": [f"{k}.png"]} for k in range(count)
        ]
        test_data.write(folder / name / "rows.jsonl", rows)
        for k in range(count):
            training.picture(100 * seed + k, (20 + seed, 20)).save(folder / name / f"{k}.png")
    rows = [test_data.simple(k, 1, id=f"c{k}") for k in range(5)]
    test_data.embedded(folder / "c", rows, False)
    return folder


def entry(place: Path, name: str, **values) -> dict:
    return {"path": str(place / name), **values}


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


# --- what a recipe says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"path": "a", "wieght": 1}], ["entry 1", "'wieght'", "'weight'"]),
        ([{"path": "a"}, {"path": "b", "weight": 0.5, "epochs": 1}], ["entry 2", "b", "both"]),
        ([{"path": "a", "weight": -1}], ["weight -1 of a", "above 0"]),
        ([{"path": "a", "epochs": 0}], ["epochs 0 of a", "above 0"]),
        ([{"path": "a", "epochs": "two"}], ["epochs 'two' of a", "number"]),
        ([{"path": "a", "epochs": True}], ["epochs True of a"]),
        ([{"path": "a", "weight": float("nan")}], ["weight", "of a is not a number above 0"]),
        ([{"epochs": 1}], ["entry 1", "no path"]),
        ([{"path": 3}], ["path 3"]),
        ([{"path": "a", "image_root": ""}], ["image_root ''"]),
        (["a"], ["'a'", "mapping"]),
        ([{"path": "a", "fraction": 0.5}, {"path": "b"}], ["fraction stands in all", "weight"]),
        ([{"path": "a", "fraction": 0.5, "weight": 1}], ["a has both weight and fraction"]),
        ([{"path": "a", "split": 3}], ["entry 1", "split 3 is not a split"]),
        ([{"path": "a", "columns": "images"}], ["columns 'images' is not a list of columns"]),
        ([{"path": "a", "data_files": [3]}], ["data_files [3] is not a file"]),
        ([{"path": "a"}, {"path": "b", "weight": 1.2}], ["add up to 1.2", "below 1"]),
        ([], ["datasets"]),
    ],
)
def test_entries_that_are_refused(tmp_path, entries, words):
    with pytest.raises(ValueError) as error:
        read(training.write_recipe(tmp_path, dataset_name=None, datasets=entries))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(
        error.value
    )


def test_recipe_keys_of_data(tmp_path):
    given = [{"path": "it's", "epochs": 1.5}, {"path": "b", "image_root": "im", "weight": 0.25}]
    recipe = read(training.write_recipe(tmp_path, dataset_name=None, datasets=given))
    assert [mixing.Entry(**one).plain() for one in recipe.data.datasets] == [
        mixing.Entry(**one).plain() for one in given
    ]
    assert recipe.resolved["datasets"] == recipe.data.datasets
    assert read(tmp_path / "recipe.yaml", ["--datasets", "{path: x, epochs: 2}"]).data.datasets == [
        {"path": "x", "epochs": 2}
    ]
    for changes, word in (
        ({"datasets": given}, "takes the place of dataset_name"),
        ({"datasets": given, "dataset_name": None, "image_root": "x"}, "its own image_root"),
        ({"dataset_streaming": True, "dataset_name": "digits"}, "dataset_streaming reads files"),
        ({"shuffle_buffer": 0}, "shuffle_buffer 0"),
    ):
        with pytest.raises(ValueError, match=word):
            read(training.write_recipe(tmp_path, **changes))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{}, {}], [100, 40]),
        ([{"fraction": 3}, {"fraction": 1}], [100, 33]),
        ([{"fraction": 0.1}, {"fraction": 0.4}], [10, 40]),
        ([{"epochs": 2.5}, {"epochs": 0.1}], [250, 4]),
        ([{"epochs": 0.6}, {"weight": 0.25}], [60, 20]),
        ([{"epochs": 1}, {"weight": 0.5}], [100, 100]),
        ([{"epochs": 1}, {"weight": 0.001}], [100, 1]),
    ],
)
def test_shares(values, expected):
    assert mixing.shares([mixing.Entry("s", **value) for value in values], [100, 40]) == expected


@pytest.mark.parametrize("weights", [[3, 1], [0.1, 0.4], [1, 99], [0.103, 0.026, 0.5, 0.047]])
@pytest.mark.parametrize("seed", [0, 7])
def test_turns_keep_to_their_weights_from_the_first_row_on(weights, seed):
    sets = list(islice(mixing.turns(weights, seed), 4000))
    counts, shares = np.zeros(len(weights)), np.array(weights) / sum(weights)
    for number, one in enumerate(sets, start=1):
        counts[one] += 1
        # within one row at any time; n rows are there at a time that n is off by as many sets
        assert (abs(counts - shares * number) <= 1 + shares * len(weights)).all()
    other = list(islice(mixing.turns(weights, seed + 1), 4000))
    assert sets != other
    assert len({tuple(sets[k : k + 8]) for k in range(0, 4000, 8)}) > 8, "at random"


def test_weights_alone_reshuffle_every_set_in_every_round(place):
    mixture = mixing.entries([entry(place, "a", weight=3), entry(place, "b", weight=1)])
    indices = mixing.order(mixture, [12, 8], 5, 400)
    a, b = indices[indices < 12][:240].reshape(-1, 12), indices[indices >= 12][:80].reshape(-1, 8)
    assert (np.sort(a) == np.arange(12)).all() and (np.sort(b) == np.arange(12, 20)).all()
    assert len({tuple(one) for one in a}) == 20 and len({tuple(one) for one in b}) == 10


@pytest.mark.parametrize("weights", [[3, 1], [1, 4], [1, 1], [1, 99], [50, 1]])
@pytest.mark.parametrize("seed", range(5))
def test_weights_alone_repeat_no_row_in_a_pass(weights, seed):
    mixture = [mixing.Entry("s", weight=weight) for weight in weights]
    sizes = [100, 40]
    indices = mixing.order(mixture, sizes, seed)
    assert len(set(indices.tolist())) == len(indices)
    longest = min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    assert longest - 1 - sum(weights) / min(weights) <= len(indices) <= longest + 1


def test_a_set_that_would_give_nothing():
    with pytest.raises(ValueError, match=r"epochs 0.01 of small with 10 rows is less than one row"):
        mixing.shares([mixing.Entry("small", epochs=0.01)], [10])


def mixed(mixture: list[dict], seed: int = 0) -> data.Rows:
    entries = mixing.entries(mixture)
    sets = [data.load(entry.path, image_root=entry.image_root) for entry in entries]
    return data.mix(sets, entries, seed)


# --- map-style ------------------------------------------------------------------------------------


def test_a_mix_is_what_its_entries_say_and_depends_on_the_seed_alone(place):
    mixture = [
        entry(place, "a", epochs=1.5),
        entry(place, "b", epochs=2),
        entry(place, "c", epochs=0.6),
    ]
    found = mixed(mixture, 3)
    times = Counter(ids(found.rows))
    assert found.size == 18 + 16 + 3 and Counter(name[0] for name in times.elements()) == {
        "a": 18,
        "b": 16,
        "c": 3,
    }
    assert {times[f"a{k}"] for k in range(12)} == {1, 2} and {times[f"b{k}"] for k in range(8)} == {
        2
    }
    assert max(times[f"c{k}"] for k in range(5)) == 1
    assert ids(mixed(mixture, 3).rows) == ids(found.rows)
    other = mixed(mixture, 4)
    assert ids(other.rows) != ids(found.rows) and Counter(ids(other.rows)) != times
    whole = [entry(place, "a"), entry(place, "b", epochs=2)]
    one, two = (ids(mixed(whole, seed).rows) for seed in (3, 4))
    assert one != two and Counter(one) == Counter(two) and max(Counter(one).values()) == 2


def test_every_row_opens_the_images_of_its_own_set(place):
    (place / "elsewhere").mkdir(exist_ok=True)
    for k in range(8):
        training.picture(k, (33, 20)).save(place / "elsewhere" / f"{k}.png")
    mixture = [
        entry(place, "a"),
        entry(place, "b", image_root=str(place / "elsewhere")),
        entry(place, "c"),
    ]
    found, widths = mixed(mixture), {"a": set(), "b": set(), "c": set()}
    opened = fmtrain.data.collator.open_image
    for row in found.rows:
        widths[row["id"][0]] |= {opened(image, row["image_root"]).width for image in row["images"]}
        fmtrain.data.collator.encode_row(families.processor("llava"), row, found.image_root)
    assert widths == {"a": {20}, "b": {33}, "c": {24}}


def recipe_of(place: Path, folder: Path, *overrides: str, **changes):
    values = {
        "dataset_name": None,
        "model_name_or_path": str(place / "base"),
        "output_dir": str(folder / "out"),
        **changes,
    }
    return read(training.write_recipe(folder, **values), [*overrides])


def test_long_rows_are_dropped_before_sets_are_mixed(place, tmp_path):
    mixture = [entry(place, "a"), entry(place, "b", epochs=2)]
    processor = own_processor()
    lengths = {
        row["id"]: fmtrain.data.collator.encode_row(processor, row)[1].shape[1]
        for row in mixed(mixture).rows
    }
    limit = max(lengths.values()) - 1  # two digits make the longest rows: a10, a11
    recipe = recipe_of(place, tmp_path, datasets=mixture, max_length=limit, max_dropped=1)
    found = training_rows(recipe, processor)
    kept = [name for name, length in lengths.items() if length <= limit]
    assert found.dropped == len(lengths) - len(kept) > 0 and set(ids(found.rows)) == set(kept)
    bad = test_data.write(tmp_path / "bad" / "rows.jsonl", [test_data.simple(0)])
    recipe = recipe_of(place, tmp_path, datasets=[*mixture, {"path": str(bad)}])
    with pytest.raises(ValueError, match=r"bad/rows.jsonl, row r0: image '0_0.png' does not exist"):
        training_rows(recipe, processor)


def own_processor():
    """Of which a trainer sets the template; the others of these tests share one."""
    return copy.copy(families.processor("llava"))


# --- rows for the evaluation loss -----------------------------------------------------------------


@pytest.mark.parametrize("training_set", ["single", "mix", "stream"])
def test_the_evaluation_loss_opens_the_pictures_of_its_own_set(place, tmp_path, training_set):
    """a and b name their images alike, and those of b are of another size."""
    changes = {"datasets": [entry(place, "a")]}
    if training_set != "mix":
        changes = {"dataset_name": str(place / "a"), "dataset_streaming": training_set == "stream"}
    recipe = recipe_of(
        place,
        tmp_path,
        eval_dataset_name=str(place / "b"),
        eval_strategy="steps",
        max_pixels=500,
        **changes,
    )
    processor, model = own_processor(), families.model("llava")
    rows, held_out = training_rows(recipe, processor), evaluation_rows(recipe, processor)
    trainer = build_trainer(recipe, model, processor, rows, held_out)
    assert trainer.data_collator.max_pixels == 500
    batch = trainer.data_collator([trainer.eval_dataset[[0]]])
    own = data.load(str(place / "b"))
    expected = encode_row(processor, own.rows[0], own.image_root)
    assert torch.equal(batch["pixel_values"], expected.inputs["pixel_values"])
    other = encode_row(processor, own.rows[0], place / "a")
    assert not torch.equal(batch["pixel_values"], other.inputs["pixel_values"])


@pytest.mark.parametrize("config", [None, "read+count", "curriculum"])
def test_digits_for_the_evaluation_loss_are_those_of_the_test_split(place, tmp_path, config):
    changes = {"dataset_name": "digits", "eval_dataset_name": "digits", "dataset_config": config}
    changes["eval_strategy"] = "steps"
    recipe = recipe_of(place, tmp_path, dataset_rows=20, **changes)
    processor = own_processor()
    rows, held_out = training_rows(recipe, processor), evaluation_rows(recipe, processor)
    assert {name.split("-")[0] for name in ids(rows.rows)} == {"train"}
    assert {name.split("-")[0] for name in ids(held_out.rows)} == {"test"}
    tasks = "read+count" if config == "read+count" else "+".join(digits.TASKS)
    assert set(held_out.rows["task"]) == set(tasks.split("+")) and held_out.size == 20


def test_what_looks_at_a_recipe_reads_the_rows_of_training(place, tmp_path):
    """Preview, audit and export read what training does, also of weights with a number of steps."""
    mixture = [entry(place, "a", weight=0.7), entry(place, "b", weight=0.3)]
    recipe = recipe_of(place, tmp_path, datasets=mixture, max_steps=5)
    trained = ids(training_rows(recipe, families.processor("llava")).rows)
    assert ids(rows_of(recipe).rows) == trained and len(trained) == 20
    assert ids(rows_of(recipe, 6).rows) == trained[:6]


def test_of_a_stream_no_more_is_read_than_is_looked_at(place, tmp_path, monkeypatch):
    """Previewing one must not copy the whole set into a cache."""
    mixture = [entry(place, "a"), entry(place, "c")]
    recipe = recipe_of(place, tmp_path, datasets=mixture, dataset_streaming=True, max_steps=3)
    monkeypatch.setattr(datasets, "load_dataset", None)
    trained = training_rows(recipe, families.processor("llava")).first(3)
    assert ids(rows_of(recipe, 3).first(3)) == ids(trained) and len(trained) == 3
    assert len(rows_of(recipe, 9).first(9)) == 9
    with pytest.raises(ValueError, match="a stream has no end"):
        rows_of(recipe)


# --- the same order, whatever the workers ---------------------------------------------------------


def batches_of(trainer) -> Iterator[list[str]]:
    """The ids of the rows of each batch of an epoch."""
    trainer.data_collator = lambda rows: {"ids": ids(rows)}
    for batch in trainer.get_train_dataloader():
        yield batch["ids"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_workers_do_not_change_the_order(place, tmp_path, streaming):
    mixture = [entry(place, "a", epochs=1.5), entry(place, "b"), entry(place, "c", weight=0.2)]
    processor, found = own_processor(), []
    for workers in (0, 1, 2):
        recipe = recipe_of(
            place,
            tmp_path,
            datasets=mixture,
            dataset_streaming=streaming,
            shuffle_buffer=4,
            max_steps=9,
            dataloader_num_workers=workers,
        )
        rows = training_rows(recipe, processor)
        model = families.model("llava")
        trainer = build_trainer(recipe, model, processor, rows)
        found.append(list(islice(batches_of(trainer), 7)))
    assert found[0] == found[1] == found[2] and all(len(batch) == 4 for batch in found[0])


@pytest.mark.parametrize("kind", ["single", "mix", "stream"])
def test_the_order_is_that_of_the_seed_of_the_data(place, tmp_path, kind):
    changes = {"dataset_name": str(place / "a")}
    if kind != "single":
        mixture = [entry(place, "a"), entry(place, "b")]
        changes = {"datasets": mixture, "dataset_streaming": kind == "stream"}
    processor, found = own_processor(), []
    for seed, data_seed in ((1, 7), (2, 7), (1, 8)):
        seeds = {"seed": seed, "data_seed": data_seed}
        recipe = recipe_of(place, tmp_path, shuffle_buffer=8, max_steps=3, **changes, **seeds)
        rows = training_rows(recipe, processor)
        trainer = build_trainer(recipe, families.model("llava"), processor, rows)
        found.append(list(islice(batches_of(trainer), 3)))
    assert found[0] == found[1] != found[2] and len(set(chain.from_iterable(found[0]))) == 12


MIXTURES = {
    "weights": [("a", {"weight": 0.7}), ("b", {"weight": 0.3})],
    "both": [("a", {"epochs": 1.5}), ("b", {"weight": 0.3})],
    "epochs": [("a", {}), ("c", {"epochs": 2})],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_longer_run_begins_with_the_rows_of_a_shorter_one(place, tmp_path, kind, streaming):
    """24 rows and 48, of sets with 12, 8 and 5: several rounds of each."""
    mixture, processor = [entry(place, name, **part) for name, part in MIXTURES[kind]], None
    processor, batches = own_processor(), {}
    for steps in (3, 6):
        keys = {"datasets": mixture, "dataset_streaming": streaming, "max_steps": steps}
        recipe = recipe_of(place, tmp_path, gradient_accumulation_steps=2, **keys)
        rows = training_rows(recipe, processor)
        trainer = build_trainer(recipe, families.model("llava"), processor, rows)
        found = []
        while len(found) < 2 * steps:  # a pass over the loader is an epoch
            found += list(islice(batches_of(trainer), 2 * steps - len(found)))
        batches[steps] = found
    assert batches[6][:6] == batches[3] and len(batches[3]) == 6


@pytest.mark.parametrize("count", [10, 30])
def test_a_number_of_rows_does_not_depend_on_the_steps(place, tmp_path, count):
    mixture = [entry(place, "a", weight=0.7), entry(place, "b", weight=0.3)]
    found = []
    for steps in (2, 8):
        recipe = recipe_of(place, tmp_path, datasets=mixture, max_steps=steps, dataset_rows=count)
        rows = training_rows(recipe, families.processor("llava"))
        found.append((ids(rows.rows), rows.ordered))
    assert found[0] == found[1] and len(found[0][0]) == count and not found[0][1]


def test_a_number_of_rows_is_the_first_ones_of_a_mix_of_epochs(place, tmp_path):
    mixture = [entry(place, "a"), entry(place, "b", epochs=2)]
    whole = ids(rows_of(recipe_of(place, tmp_path, datasets=mixture)).rows)
    assert len(whole) == 12 + 2 * 8
    for count in (1, 5, 28, 99):
        recipe = recipe_of(place, tmp_path, datasets=mixture, dataset_rows=count)
        assert ids(rows_of(recipe).rows) == whole[:count]


def test_the_rows_of_a_run_are_those_of_all_its_processes(place, tmp_path, monkeypatch):
    mixture = [entry(place, "a", weight=0.7), entry(place, "b", weight=0.3)]
    keys = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4}
    recipe = recipe_of(place, tmp_path, datasets=mixture, **keys)
    monkeypatch.setattr(type(recipe.training), "world_size", 5)
    assert rows_of(recipe).size == 3 * 2 * 4 * 5


def test_a_set_that_gives_no_row_to_a_run_is_named(place, tmp_path, capsys):
    mixture = [entry(place, "a", weight=1000), entry(place, "b", weight=1)]
    recipe = recipe_of(place, tmp_path, datasets=mixture, max_steps=1)
    found = training_rows(recipe, families.processor("llava"))
    assert {name[0] for name in ids(found.rows)} == {"a"} and found.size == 4
    assert f"{place / 'b'}: none of its rows is among the 4 of the mix" in capsys.readouterr().err


def a_stream(place: Path, mixture: list[dict], **values) -> stream.Stream:
    options = dict(seed=1, buffer=4, batch_size=3, check=lambda row, path: None) | values
    made = []
    original = datasets.IterableDataset.from_generator
    try:
        datasets.IterableDataset.from_generator = lambda generator, gen_kwargs: made.append(
            generator.__self__
        )
        loaded = stream.load(mixing.entries(mixture), stream.Stream((), **options), 0)
    finally:
        datasets.IterableDataset.from_generator = original
    assert loaded.size == sum(source.share for source in made[0].sources)
    return made[0]


def test_a_stream_gives_every_set_its_share_in_every_pass(place):
    mixture = [entry(place, "a", epochs=0.5), entry(place, "b", epochs=2), entry(place, "c")]
    rows = ids(islice(a_stream(place, mixture).rows(), 54))
    first, second = Counter(rows[:27]), Counter(rows[27:])
    for times in (first, second):
        assert Counter(name[0] for name in times.elements()) == {"a": 6, "b": 16, "c": 5}
        assert {times[f"b{k}"] for k in range(8)} == {2} and {times[f"c{k}"] for k in range(5)} == {
            1
        }
    assert first.keys() != second.keys(), "another half of a in the next pass"
    assert (
        rows
        == ids(islice(a_stream(place, mixture).rows(), 54))
        != ids(islice(a_stream(place, mixture, seed=2).rows(), 54))
    )
    weights = [entry(place, "a", weight=3), entry(place, "b", weight=1)]
    loaded = [
        stream.load(mixing.entries(one), a_stream(place, one), 0) for one in (mixture, weights)
    ]
    assert [rows.size for rows in loaded] == [6 + 16 + 5, 12 + 8]
    files = ids(islice(a_stream(place, [entry(place, "a")], buffer=1).rows(), 24))
    assert files == [f"a{k}" for k in range(12)] * 2


def test_ranks_share_a_stream_batch_by_batch(place):
    mixture = [entry(place, "a"), entry(place, "b")]
    whole = ids(islice(a_stream(place, mixture).rows(), 24))
    ranks = [
        ids(islice(a_stream(place, mixture, rank=rank, world_size=2).rows(), 12)) for rank in (0, 1)
    ]
    assert [name for k in range(0, 12, 3) for rank in ranks for name in rank[k : k + 3]] == whole
    late = list(islice(a_stream(place, mixture, rank=1, world_size=2, skip=2).rows(), 12))
    assert late[:6] == [stream.SKIPPED] * 6 and ids(late[6:]) == ranks[1][6:]


def test_what_a_stream_refuses(place, tmp_path):
    processor = own_processor()

    def given(rows: list[dict] | str, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_text(rows) if isinstance(rows, str) else test_data.write(file, rows)
        training.picture(1).save(tmp_path / "0_0.png")
        keys = {"dataset_name": str(file), "dataset_streaming": True, "max_steps": 3}
        return recipe_of(place, tmp_path, **keys | {"shuffle_buffer": 1} | changes)

    def refused(rows: list[dict] | str, **changes) -> str:
        """Before training starts: the first four rows are read then."""
        recipe = given(rows, **changes)
        with pytest.raises(ValueError) as error:
            training_rows(recipe, processor)
        assert "\n" not in str(error.value)
        return str(error.value)

    good = test_data.simple(0)
    assert "needs max_steps" in refused([good], max_steps=-1)
    assert "rows.jsonl row 2: not JSON" in refused(json.dumps(good) + "\n{\n")
    assert "rows.jsonl: the rows have no column images" in refused([{"id": "x", "text": "y"}])
    assert "rows.jsonl row 2: a row has messages, or prompt and completion, or one of" in (
        refused([good, {"id": "x", "text": "y"}])
    )
    assert "row r9: image '9_0.png' does not exist" in refused([good] * 3 + [test_data.simple(9)])
    assert "row r0: is evaluation data" in refused([good | {"source": "evaluation_only/x"}])
    length = encode_row(processor, good, tmp_path).layout.shape[1]
    short = f"{length} tokens, longer than max_length {length - 1}; a stream drops no row"
    assert short in refused([good], max_length=length - 1)
    assert len(training_rows(given([good], max_length=length), processor).opened) == 4
    assert "image '0_0.png'" in refused([good], max_pixels=24 * 20 - 1)
    assert "needs the lengths of all rows" in (
        refused([good], train_sampling_strategy="group_by_length")
    )
    assert "holds no row" in refused("\n")
    assert "not .json" in refused(
        [good], dataset_name=str(test_data.write(tmp_path / "rows.json", [good]))
    )
    later = training_rows(given([good] * 4 + [test_data.simple(9)]), processor).rows
    with pytest.raises(ValueError, match=r"row r9: image '9_0.png' does not exist"):
        list(islice(later, 5))


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["both", "weights"])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened_and_opens_no_image_twice(
    place, tmp_path, monkeypatch, streaming, kind
):
    """Counted in the collator, the only place where images are decoded."""
    opened, original = [], fmtrain.data.collator.open_image

    def count(image, root, limit):
        if isinstance(image, str):  # the row of noise that tells shapes has a PIL image
            opened.append(f"{root}/{image}")
        return original(image, root, limit)

    monkeypatch.setattr(fmtrain.data.collator, "open_image", count)
    mixture = [entry(place, name, **part) for name, part in MIXTURES[kind]]
    stream_keys = {"dataset_streaming": True, "shuffle_buffer": 5} if streaming else {}
    recipe_of(
        place,
        tmp_path,
        datasets=mixture,
        max_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        lora_dropout=0.2,
        **stream_keys,
    )
    path = str(tmp_path / "recipe.yaml")

    def run(*overrides: str) -> list[str]:
        opened.clear()
        assert sft.main([path, *overrides]) == 0
        return list(opened)

    whole, expected = run(), training.losses(tmp_path / "out")
    audit = 2  # rows that are audited before step 0
    run("--output_dir", str(tmp_path / "cut"), "--save_steps", "4", "--max_steps", "6")
    for folder in (tmp_path / "cut").glob("checkpoint-6"):
        (folder / "trainer_state.json").unlink()  # as if killed after step 4
    resumed = run(
        "--output_dir",
        str(tmp_path / "cut"),
        "--resume_from_checkpoint",
        "true",
        "--save_steps",
        "4",
    )
    assert training.losses(tmp_path / "cut") == expected and len(expected) == 6
    before = len(whole) - len(resumed)
    assert (
        before == 4 * 2
        and resumed[:audit] == whole[:audit]
        and resumed[audit:] == whole[audit + before :]
    )


# --- in processes of their own --------------------------------------------------------------------


@pytest.mark.slow
def test_two_streaming_processes_with_workers_give_the_losses_of_one(place, tmp_path):
    mixture = [entry(place, "a", epochs=1.5), entry(place, "c")]
    recipe_of(
        place,
        tmp_path,
        datasets=mixture,
        dataset_streaming=True,
        max_steps=4,
        use_peft=False,
        per_device_train_batch_size=2,
    )
    recipe = str(tmp_path / "recipe.yaml")
    assert (
        sft.main(
            [recipe, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "alone")]
        )
        == 0
    )
    start = training.two_processes("ddp")
    words = [
        *start,
        str(training.ROOT / "fmtrain" / "sft.py"),
        recipe,
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "2",
    ]
    run = subprocess.run(
        words, env=training.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert training.losses(tmp_path / "out") == pytest.approx(
        training.losses(tmp_path / "alone"), rel=1e-3
    )


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_line(place, tmp_path):
    bad = test_data.write(
        tmp_path / "bad.jsonl", [test_data.simple(k, 0) for k in range(9)] + [test_data.simple(9)]
    )
    recipe_of(
        place,
        tmp_path,
        dataset_name=str(bad),
        dataset_streaming=True,
        shuffle_buffer=1,
        max_steps=9,
        dataloader_num_workers=1,
    )
    run = training.launch(tmp_path / "recipe.yaml")
    [line] = [line for line in run.stderr.splitlines() if "error:" in line] or [run.stderr[-3000:]]
    assert (
        run.returncode == 2
        and line == f"error: {bad}, row r9: image '9_0.png' does not exist in {tmp_path}"
    )
