"""Reading a data folder: whatever is broken gives one line that says where."""

import json

import pytest

from eval.milebench.tasks import DATASETS, read_task


def test_the_table_is_the_papers():
    codes = {}
    for name, data in DATASETS.items():
        codes.setdefault(data.code, []).append(name)
    assert len(DATASETS) == 29
    assert {code: len(names) for code, names in sorted(codes.items())} == (
        {"I-1": 1, "N-1": 1, "N-2": 1, "S-1": 4, "S-2": 3, "S-3": 3, "S-4": 2, "S-5": 1}
        | {"T-1": 3, "T-2": 4, "T-3": 2, "T-4": 4}
    )
    groups = [data.group for data in DATASETS.values()]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [13, 13, 3]


@pytest.fixture
def annotation(make_data):
    """(data folder, annotation file, its document) of a sound task of two samples."""
    data = make_data(
        "TQA", [("red", ["red", "blue"], 1), ("blue", ["red", "blue"], 2)], "multi-choice"
    )
    path = data / "TQA" / "TQA.json"
    return data, path, json.loads(path.read_text())


def drop(*keys):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


def put(value, *keys):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("meta_data"), "TQA.json: key 'meta_data' is missing"),
        (drop("data"), "TQA.json: key 'data' is missing"),
        (drop("meta_data", "task_instruction"), "meta_data: key 'task_instruction' is missing"),
        (drop("meta_data", "question_type"), "meta_data: key 'question_type' is missing"),
        (
            put("x", "meta_data", "task_instruction"),
            "meta_data: 'task_instruction' is not list or dict but str",
        ),
        (
            put([1], "meta_data", "task_instruction"),
            "meta_data: task_instruction holds an entry that is not a string",
        ),
        (put([], "data"), "TQA.json: no samples in data"),
        (put({}, "data"), "TQA.json: 'data' is not list but dict"),
        (put("x", "data", 1), r"data\[1\]: key 'sample_id' is missing"),
        (drop("data", 1, "sample_id"), r"data\[1\]: key 'sample_id' is missing"),
        (put("x1", "data", 1, "sample_id"), r"data\[1\]: sample_id 'x1' is not a whole number"),
        (put(True, "data", 1, "sample_id"), r"data\[1\]: 'sample_id' is not int or str but bool"),
        (put("0", "data", 1, "sample_id"), r"sample 0 occurs twice \(data\[0\] and data\[1\]\)"),
        (drop("data", 1, "task_instance"), "sample 1: key 'task_instance' is missing"),
        (drop("data", 1, "task_instruction_id"), "sample 1: key 'task_instruction_id' is missing"),
        (drop("data", 1, "response"), "sample 1: key 'response' is missing"),
        (drop("data", 1, "task_instance", "context"), "sample 1: key 'context' is missing"),
        (drop("data", 1, "task_instance", "images_path"), "sample 1: key 'images_path' is missing"),
        (
            put("a.jpg", "data", 1, "task_instance", "images_path"),
            "sample 1: 'images_path' is not list but str",
        ),
        (
            put([1], "data", 1, "task_instance", "images_path"),
            "sample 1: 'images_path' holds an entry that is not a file",
        ),
        (
            put("red", "data", 1, "task_instance", "choice_list"),
            "sample 1: 'choice_list' is not list but str",
        ),
    ],
)
def test_broken_annotations(annotation, change, message):
    data, path, document = annotation
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_task(data, "TQA")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_annotations(annotation):
    data, path, _ = annotation
    path.write_text('{"meta_data": {},\n "data": [}')
    with pytest.raises(ValueError, match=r"TQA.json: not JSON \(line 2, column 11: .*\)"):
        read_task(data, "TQA")
    path.write_bytes(b'{"meta_data": "\xff"}')
    with pytest.raises(ValueError, match=r"TQA.json: not UTF-8 \(byte 15\)"):
        read_task(data, "TQA")
    path.unlink()
    with pytest.raises(ValueError, match=r"TQA.json: cannot be read \(No such file"):
        read_task(data, "TQA")


def test_instructions(annotation):
    data, path, document = annotation
    for instruction_id, table in (
        (1, ["a"]),
        (-2, ["a"]),
        (0, {"0": "a"}),
        ("1", {"0": "a"}),
        ("0", ["a"]),
    ):
        put(instruction_id, "data", 0, "task_instruction_id")(document)
        put(table, "meta_data", "task_instruction")(document)
        path.write_text(json.dumps(document))
        task = read_task(data, "TQA")
        for original in (False, True):
            with pytest.raises(
                ValueError,
                match=rf"TQA.json: sample 0: task_instruction_id {instruction_id!r} is not among",
            ):
                task.instruction(task.samples[0], original)
    put(-1, "data", 0, "task_instruction_id")(document)
    put(["a", "b"], "meta_data", "task_instruction")(document)
    path.write_text(json.dumps(document))
    task = read_task(data, "TQA")
    assert task.instruction(task.samples[0], original=True) == "b"
    with pytest.raises(ValueError, match="task_instruction_id -1 is not among the 2 entries"):
        task.instruction(task.samples[0])


def test_an_unknown_question_type(annotation):
    data, path, document = annotation
    put("yes-no", "meta_data", "question_type")(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"TQA.json: question_type 'yes-no' is not one of"):
        _ = read_task(data, "TQA").scorer
