"""TRL's names with TRL's meanings: sets of the hub and folders laid out as one, their
configurations and splits, and entries of a mix."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import families
import pytest
import test_data
import training
from trl import DatasetMixtureConfig, get_dataset

from data_prep import check
from data_prep.checking.reading import count_rows, scan
from fmtrain.data import files, mixing, stream, tables
from fmtrain.data.row_format import features
from fmtrain.data.sources import Source, held_out, row_files, splits
from fmtrain.training.recipe import read
from fmtrain.training.rows import evaluation_rows, rows_of, training_rows

own_cache = test_data.own_cache
CARD = """---
configs:
- config_name: easy
  default: true
  data_files:
  - {split: train, path: one/*}
  - {split: test, path: two/held.parquet}
- config_name: hard
  data_dir: three
---
# A set
"""


def shard(path: Path, *names: str) -> None:
    """A Parquet file with a row, and its image, for each name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [test_data.simple(sum(name.encode()), id=name) for name in names]
    test_data.embedded(path.parent / "made", rows, True)
    shutil.move(path.parent / "made" / "rows-00000.parquet", path)
    shutil.rmtree(path.parent / "made")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A folder as a repository of the hub has it: a card with two configurations."""
    folder = tmp_path / "repository"
    shard(folder / "one" / "a.parquet", "a0", "a1")
    shard(folder / "one" / "b.parquet", "b0")
    shard(folder / "two" / "held.parquet", "t0")
    shard(folder / "three" / "train-00000-of-00001.parquet", "h0", "h1")
    shard(folder / "three" / "validation-00000-of-00001.parquet", "v0")
    (folder / "README.md").write_text(CARD)
    return folder


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


CASES = [
    (None, "train", ["a0", "a1", "b0"]),
    ("easy", "test", ["t0"]),
    ("hard", "train", ["h0", "h1"]),
    ("hard", "validation", ["v0"]),
]


@pytest.mark.parametrize(("name", "split", "expected"), CASES)
def test_a_repository_has_the_splits_that_datasets_finds(repository, name, split, expected):
    """Trainer, stream and checker read what `load_dataset` does."""
    source = Source(str(repository), name, split)
    assert ids(datasets.load_dataset(str(repository), name, split=split)) == expected
    loaded = files.load(source)
    assert ids(loaded.rows) == expected
    assert loaded.rows.features["images"] == datasets.List(datasets.Image(decode=False))
    entry = mixing.Entry(str(repository), name, split)
    sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
    assert ids(stream.load([entry], sequence, 0, head=len(expected)).opened) == expected
    assert [stored.row["id"] for stored in scan(source)] == expected
    assert count_rows(source) == len(expected)
    words = ["--split", split, *([] if name is None else ["--config", name])]
    found = repository.parent / "found.json"
    assert check.main([str(repository), *words, "--json", str(found)]) == 0
    assert json.loads(found.read_text())["rows"] == len(expected)


def test_a_folder_of_folders_has_splits_too(tmp_path):
    shard(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", "a")
    shard(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", "b")
    assert ids(files.load(Source(str(tmp_path / "set"), split="test")).rows) == ["b"]
    assert ids(files.load(str(tmp_path / "set")).rows) == ["a"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "dev"}, r"repository: has no split 'dev', but train, test"),
        ({"name": "odd"}, r"repository: not readable as a set: .*'odd' not found.*'easy', 'hard'"),
        ({"data_files": "none/*"}, "repository: not readable as a set: No .* data files found"),
        ({"path": "{}/one", "name": "easy"}, r"'easy' not found. Available: \['default'\]"),
        ({"path": "{}/one/a.parquet", "name": "easy"}, "a.parquet: dataset_config belong to a"),
        ({"path": "{}/one/a.parquet", "split": "test"}, r"a.parquet: has no split 'test', but tr"),
        ({"path": "json"}, "json: no such rows"),
        ({"columns": ["pixels"]}, r"no column pixels; it has id, source, messages, images"),
        ({"columns": ["id", "messages"]}, "the rows have no column images; they have"),
    ],
)
def test_what_a_folder_does_not_have(repository, changes, reason):
    path = changes.pop("path", "{}").format(repository)
    with pytest.raises(ValueError, match=reason) as error:
        files.load(replace(Source(path), **changes))
    assert "\n" not in str(error.value)


def test_data_files_and_columns_are_those_of_datasets(repository):
    pattern = str(repository / "one" / "*")
    shutil.copytree(repository / "one", repository / "below" / "one")
    for source in (
        Source("parquet", data_files=pattern),
        Source(str(repository), data_files="one/*"),
        Source(str(repository), data_files={"train": "one/*", "test": "two/*"}),
        Source(str(repository / "below"), data_dir="one", columns=["messages", "images"]),
    ):
        loaded = files.load(source)
        assert loaded.size == 3 and set(loaded.rows.column_names) >= {"id", "messages", "images"}
    assert "source" not in loaded.rows.column_names


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def cached(repository) -> str:
    """The name of a set that was read from the hub before: as `datasets` has it in its cache."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    datasets.load_dataset(str(repository), "hard")
    [version] = [path.parent for path in cache.rglob("repository/hard/**/dataset_info.json")]
    place = cache / "someone___pictures" / "hard" / "0.0.0" / ("0" * 40)
    shutil.copytree(version, place)
    shutil.rmtree(cache / "repository")
    for file in place.glob("repository-*"):
        file.rename(place / file.name.replace("repository", "pictures"))
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "pictures"}))
    return "someone/pictures"


def test_a_name_of_the_hub_is_loaded_by_datasets(cached, tmp_path):
    """Of a configuration and a split, the images as they are stored."""
    loaded = files.load(Source(cached, "hard", "validation"), image_root=str(tmp_path))
    assert ids(loaded.rows) == ["v0"]
    assert loaded.rows[0]["images"][0]["bytes"][1:4] == b"PNG"
    training.workplace(tmp_path / "place", rows=1)
    recipe = training.write_recipe(
        tmp_path / "place",
        dataset_name=cached,
        dataset_config="hard",
        dataset_test_split="validation",
        eval_strategy="steps",
    )
    processor = families.processor("llava")
    assert ids(training_rows(read(recipe), processor).rows) == ["h0", "h1"]
    assert ids(evaluation_rows(read(recipe), processor).rows) == ["v0"]


def test_what_is_neither_here_nor_on_the_hub():
    with pytest.raises(ValueError, match="nobody/nothing: no such file or folder here, and as a"):
        files.load("nobody/nothing")
    for read_files in (row_files, count_rows):
        with pytest.raises(ValueError, match=r"nobody/nothing: no such .* neither streamed nor ch"):
            read_files(Source("nobody/nothing"))


@pytest.mark.parametrize(
    "name",
    ["/none/here", "./none", "none", "data/none.jsonl", "a/b/c", "fmtrain/tiny_llava", "img/none"],
)
def test_a_path_never_goes_to_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "img").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match="no such rows"):
        tables.read(Source(name))


# --- recipes --------------------------------------------------------------------------------------


def test_a_recipe_evaluates_the_test_split(repository, tmp_path):
    training.workplace(tmp_path / "place", rows=1)

    def recipe(**changes):
        changes = {"dataset_name": str(repository), "eval_strategy": "steps"} | changes
        return read(training.write_recipe(tmp_path / "place", **changes))

    processor = families.processor("llava")
    assert ids(evaluation_rows(recipe(), processor).rows) == ["t0"]
    assert ids(rows_of(recipe()).rows) == ["a0", "a1", "b0"]
    other = {"dataset_config": "hard", "dataset_train_split": "validation"}
    assert ids(rows_of(recipe(**other, eval_strategy="no")).rows) == ["v0"]
    single = str(repository / "three" / "train-00000-of-00001.parquet")
    assert ids(evaluation_rows(recipe(eval_dataset_name=single), processor).rows) == ["h0", "h1"]
    with pytest.raises(ValueError, match="has no split 'test', but train, validation"):
        evaluation_rows(recipe(dataset_config="hard"), processor)
    with pytest.raises(ValueError, match="has no split 'test', but train, validation"):
        evaluation_rows(recipe(eval_dataset_name=str(repository / "three")), processor)
    digits = recipe(dataset_name="digits", dataset_config="read", dataset_rows=3)
    assert {name.split("-")[0] for name in ids(evaluation_rows(digits, processor).rows)} == {"test"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"streaming": True}, "unknown key 'streaming'; the nearest known one is 'dataset_strea"),
        ({"dataset_split": "train"}, "nearest known one is 'dataset_test_split'"),
        ({"dataset_test_split": "dev"}, "dataset_test_split dev with eval_strategy no"),
        (
            {"dataset_test_split": "train", "eval_strategy": "steps"},
            "dataset_test_split train is the split of training",
        ),
        (
            {"dataset_name": None, "datasets": [{"path": "a"}], "eval_strategy": "steps"},
            "several datasets have no test split; name eval_dataset_name",
        ),
        (
            {"dataset_name": None, "datasets": [{"path": "a"}], "dataset_train_split": "dev"},
            "datasets takes the place of dataset_name, dataset_config and dataset_train_split",
        ),
        ({"completion_only_loss": False}, "completion_only_loss false: would learn prompts"),
    ],
)
def test_recipes_that_are_refused(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        read(training.write_recipe(tmp_path, **changes))


# --- mixes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (3, 1), (0.2, 0.6)])
def test_fractions_are_those_of_trl(tmp_path, fractions):
    """The same rows as TRL's mixture, though shuffled."""
    given = []
    for name, count, fraction in zip("ab", (9, 5), fractions, strict=True):
        rows = [test_data.simple(k, id=f"{name}{k}") for k in range(count)]
        folder = test_data.write(tmp_path / name / "rows.jsonl", rows).parent
        given.append({"path": str(folder), "fraction": fraction})
    expected = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in given]))
    entries = mixing.entries(given)
    sets = [files.load(entry) for entry in entries]
    mixed = files.mix(sets, entries, seed=0, run=100)
    assert sorted(ids(mixed.rows)) == sorted(expected["train"]["id"])
    sequence = stream.Stream((), 0, 1, 1, stream.unchecked)
    with pytest.raises(ValueError, match="fraction does not go with dataset_streaming"):
        stream.load(entries, sequence, 0)


def test_entries_name_configurations_and_splits(repository):
    given = [
        {"path": str(repository), "split": "test", "weight": 0.5},
        {"path": str(repository), "name": "hard", "split": "validation", "weight": 0.5},
    ]
    entries = mixing.entries(given)
    assert [entry.plain() for entry in entries] == given
    mixed = files.mix([files.load(entry) for entry in entries], entries, 0)
    assert sorted(ids(mixed.rows)) == ["t0", "v0"]
    assert set(mixed.rows.features) == {*features(), "image_root"}


def test_the_one_split_of_an_evaluation_set(tmp_path):
    """Named for evaluation alone it may be called anything; named as one of several it may not."""
    rows = test_data.write(tmp_path / "own" / "rows.jsonl", [test_data.simple(0)])
    assert held_out(Source(str(rows), split="test")).split == "train"
    assert held_out(Source(str(rows.parent), split="test")).split == "train"
    dev = test_data.write(tmp_path / "dev" / "dev.jsonl", [test_data.simple(0)]).parent
    assert held_out(Source(str(dev), split="test")).split == "validation"
    test_data.write(dev / "train.jsonl", [test_data.simple(0)])
    assert list(splits(Source(str(dev)))) == ["train", "validation"]
    assert held_out(Source(str(dev), split="test")).split == "test"
