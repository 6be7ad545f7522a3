"""MileBench's data sets, and the reading of a data folder in its format.

    <data_dir>/<Dataset>/<Dataset>.json                  annotation: meta_data and a list of samples
    <data_dir>/<Dataset>/<Dataset>_combined_<N>.json     the same for N combined images a sample
    <data_dir>/<Dataset>/images/...                      image files, named relative to this folder

Source of names, groups and formats: MileBench/MileBench at commit 9583e1f; of the codes: the paper
(arXiv 2404.18532). A broken folder gives a `ValueError` of one line that names the file, the sample
and the numbers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MULTI_CHOICE, ROUGE_L = "multi-choice", "rouge-l"
NEEDLE_TOKEN, NEEDLE_SUBSTRING = "needle-token", "needle-substring"
TEMPORAL, SEMANTIC, DIAGNOSTIC = "Realistic Temporal", "Realistic Semantic", "Diagnostic"


@dataclass(frozen=True)
class Dataset:
    """Where a data set stands in the paper.

    Its task code, MileBench's group, and the scorer its annotation leads to.
    """

    code: str
    group: str
    scorer: str


# In the order of MileBench's result tables: the order of the columns in result.csv.
DATASETS: Mapping[str, Dataset] = {
    "ActionLocalization": Dataset("T-1", TEMPORAL, MULTI_CHOICE),
    "ActionPrediction": Dataset("T-1", TEMPORAL, MULTI_CHOICE),
    "ActionSequence": Dataset("T-1", TEMPORAL, MULTI_CHOICE),
    "CharacterOrder": Dataset("T-4", TEMPORAL, MULTI_CHOICE),
    "CounterfactualInference": Dataset("T-4", TEMPORAL, MULTI_CHOICE),
    "EgocentricNavigation": Dataset("T-3", TEMPORAL, MULTI_CHOICE),
    "MovingAttribute": Dataset("T-2", TEMPORAL, MULTI_CHOICE),
    "MovingDirection": Dataset("T-3", TEMPORAL, MULTI_CHOICE),
    "ObjectExistence": Dataset("T-2", TEMPORAL, MULTI_CHOICE),
    "ObjectInteraction": Dataset("T-2", TEMPORAL, MULTI_CHOICE),
    "ObjectShuffle": Dataset("T-2", TEMPORAL, MULTI_CHOICE),
    "SceneTransition": Dataset("T-4", TEMPORAL, MULTI_CHOICE),
    "StateChange": Dataset("T-4", TEMPORAL, MULTI_CHOICE),
    "ALFRED": Dataset("S-4", SEMANTIC, ROUGE_L),
    "CLEVR-Change": Dataset("S-3", SEMANTIC, ROUGE_L),
    "DocVQA": Dataset("S-2", SEMANTIC, MULTI_CHOICE),
    "IEdit": Dataset("S-3", SEMANTIC, ROUGE_L),
    "MMCoQA": Dataset("S-4", SEMANTIC, NEEDLE_SUBSTRING),
    "MultiModalQA": Dataset("S-1", SEMANTIC, MULTI_CHOICE),
    "nuscenes": Dataset("S-5", SEMANTIC, MULTI_CHOICE),
    "OCR-VQA": Dataset("S-2", SEMANTIC, MULTI_CHOICE),
    "SlideVQA": Dataset("S-2", SEMANTIC, MULTI_CHOICE),
    "Spot-the-Diff": Dataset("S-3", SEMANTIC, ROUGE_L),
    "TQA": Dataset("S-1", SEMANTIC, MULTI_CHOICE),
    "WebQA": Dataset("S-1", SEMANTIC, MULTI_CHOICE),
    "WikiVQA": Dataset("S-1", SEMANTIC, MULTI_CHOICE),
    "TextNeedleInAHaystack": Dataset("N-1", DIAGNOSTIC, NEEDLE_TOKEN),
    "ImageNeedleInAHaystack": Dataset("N-2", DIAGNOSTIC, NEEDLE_TOKEN),
    "GPR1200": Dataset("I-1", DIAGNOSTIC, MULTI_CHOICE),
}


@dataclass(frozen=True)
class Sample:
    """One sample of an annotation file, as it stands there.

    Choices and response may be any JSON value.
    """

    sample_id: int | str
    instruction_id: int | str
    context: str
    images: tuple[str, ...]
    choices: tuple[Any, ...] | None
    response: Any
    level: Any
    combined: Mapping[int, tuple[str, ...]]

    @property
    def number(self) -> int:
        """The sample id as an integer: what predictions are looked up by."""
        return int(self.sample_id)


@dataclass(frozen=True)
class Task:
    """A data set as read: `image_dir` is the folder that the image names are relative to."""

    name: str
    path: Path
    image_dir: str
    question_type: str
    instructions: Sequence[str] | Mapping[str, str]
    samples: tuple[Sample, ...]

    @property
    def scorer(self) -> str:
        """MileBench goes by the data set's name first, then by the question type.

        Raises ValueError for an unknown type.
        """
        if "NeedleInAHaystack" in self.name:
            return NEEDLE_TOKEN
        if "MMCoQA" in self.name:
            return NEEDLE_SUBSTRING
        scorers = {"open-ended": ROUGE_L, "multi-choice": MULTI_CHOICE}
        if self.question_type not in scorers:
            raise ValueError(
                f"{self.path}: question_type {self.question_type!r} is not one of {sorted(scorers)}"
            )
        return scorers[self.question_type]

    def instruction(self, sample: Sample, original: bool = False) -> str:
        """Text of the sample's task instruction, or ValueError.

        In MileBench a negative id counts from the end.
        """
        key, table = sample.instruction_id, self.instructions
        if isinstance(table, Mapping):
            if key in table:
                return table[key]
        elif isinstance(key, int) and (-len(table) if original else 0) <= key < len(table):
            return table[key]
        raise ValueError(
            f"{self.path}: sample {sample.sample_id}: task_instruction_id {key!r} is not among the "
            f"{len(table)} entries of task_instruction"
        )


def read_json(path: Path) -> Any:
    """Content of a JSON file (UTF-8).

    Raises ValueError naming the file, and the line where the JSON breaks.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from error


def read_task(data_dir: Path, name: str, combined: int | None = None) -> Task:
    """Read and check the annotation of data set `name`.

    With `combined` N it is the one of N combined images. For N = 1 that is the plain file, unless
    there is one of its own. Image files are not looked for: scoring does not need them,
    `prompt.require_inputs` looks. Raises ValueError.
    """
    path = data_dir / name / f"{name}.json"
    if combined is not None:
        own = path.with_name(f"{name}_combined_{combined}.json")
        path = own if combined >= 2 or own.is_file() else path
    return parse_task(read_json(path), name, path, str(data_dir / name / "images"))


def parse_task(document: Any, name: str, path: Path, image_dir: str) -> Task:
    """Check an annotation document; `path` is what errors name. Raises ValueError."""
    meta = field(document, "meta_data", dict, f"{path}")
    where = f"{path}: meta_data"
    instructions = field(meta, "task_instruction", (list, dict), where)
    texts = instructions.values() if isinstance(instructions, dict) else instructions
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: task_instruction holds an entry that is not a string")
    question_type = field(meta, "question_type", str, where)
    samples, first = [], {}
    for row, entry in enumerate(field(document, "data", list, f"{path}")):
        sample = _parse_sample(entry, f"{path}: data[{row}]", path)
        if sample.number in first:
            raise ValueError(
                f"{path}: sample {sample.number} occurs twice "
                f"(data[{first[sample.number]}] and data[{row}])"
            )
        first[sample.number] = row
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: no samples in data")
    return Task(name, path, image_dir, question_type, instructions, tuple(samples))


def field(record: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """record[key], of one of the JSON types `kinds` (a bool is no int).

    Raises ValueError starting with `where`.
    """
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"{where}: key {key!r} is missing")
    value = record[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not object):
        each = kinds if isinstance(kinds, tuple) else (kinds,)
        names = " or ".join(kind.__name__ for kind in each)
        raise ValueError(f"{where}: {key!r} is not {names} but {type(value).__name__}")
    return value


def is_whole_number(text: str) -> bool:
    """May `int` read it, without underscores or the like?"""
    return text.strip().removeprefix("-").isdecimal()


def _names(record: dict, key: str, where: str) -> tuple[str, ...]:
    """A list of file names."""
    names = field(record, key, list, where)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: {key!r} holds an entry that is not a file name")
    return tuple(names)


def _parse_sample(entry: Any, where: str, path: Path) -> Sample:
    """One sample of the annotation; errors name the row until the id is known, then the sample."""
    sample_id = field(entry, "sample_id", (int, str), where)
    if isinstance(sample_id, str) and not is_whole_number(sample_id):
        raise ValueError(f"{where}: sample_id {sample_id!r} is not a whole number")
    where = f"{path}: sample {sample_id}"
    instance = field(entry, "task_instance", dict, where)
    combined = {}
    for key in instance:
        match = re.fullmatch(r"combined_(\d+)_images", key)
        if match:
            combined[int(match[1])] = _names(instance, key, where)
    choices = None
    if "choice_list" in instance:
        choices = tuple(field(instance, "choice_list", list, where))
    return Sample(
        sample_id=sample_id,
        instruction_id=field(entry, "task_instruction_id", (int, str), where),
        context=field(instance, "context", str, where),
        images=_names(instance, "images_path", where),
        choices=choices,
        response=field(entry, "response", object, where),
        level=entry.get("image_quantity_level"),
        combined=combined,
    )


def batches(samples: Sequence[Sample], batch_images: int) -> list[list[Sample]]:
    """MileBench's batches: grouped by number of images, at most `batch_images` images in each.

    A batch has at least one sample. Groups stand in the order of first appearance and keep the
    order of their samples. A sample without an image counts as one image (MileBench divides by zero
    there).
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(len(sample.images), []).append(sample)
    batches = []
    for n_images, group in groups.items():
        size = max(batch_images // max(n_images, 1), 1)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches
