"""pred.json in MileBench's format: writing it, reading it, and matching it with a task's samples.

    [{"sample_id", "image": [paths shown], "question": prompt, "gt_response", "gen_model_id",
      "pred_response", "gen_kwargs"}]

Scoring needs `sample_id`, `gt_response` and `pred_response` only.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.milebench.prompt import Prompt
from eval.milebench.tasks import Sample, Task, field, is_whole_number, read_json

Record = dict[str, Any]


def prediction_record(
    prompt: Prompt, answer: str, model_id: str, gen_kwargs: Mapping[str, Any]
) -> Record:
    """Record of one answer, keys in MileBench's order."""
    return {
        "sample_id": prompt.sample_id,
        "image": list(prompt.images),
        "question": prompt.text,
        "gt_response": prompt.response,
        "gen_model_id": model_id,
        "pred_response": answer,
        "gen_kwargs": dict(gen_kwargs),
    }


def predictions_json(records: Sequence[Record]) -> str:
    """Content of pred.json, byte for byte as MileBench writes it (UTF-8, not ASCII-escaped)."""
    return json.dumps(records, indent=4, ensure_ascii=False)


def read_predictions(path: Path) -> list[Record]:
    """Records of a pred.json.

    Raises ValueError naming file and record for anything that scoring cannot use.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: not a list of predictions")
    for row, record in enumerate(records):
        sample_id = field(record, "sample_id", (int, str), f"{path}: record {row}")
        field(record, "gt_response", str, f"{path}: sample {sample_id}")
        field(record, "pred_response", str, f"{path}: sample {sample_id}")
    return records


def match_predictions(
    task: Task, records: Sequence[Record], path: Path, original: bool = False
) -> list[tuple[Sample, Record]]:
    """Each record with its sample, in the order of the records.

    As in MileBench a record's id must be an integer with `original`; otherwise "12" is 12 too
    (Q20), and the record must carry the annotation's answer. Raises ValueError for a doubled,
    unknown or missing sample id.
    """
    samples = {sample.number: sample for sample in task.samples}
    rows: dict[int, int] = {}
    for row, record in enumerate(records):
        number = _number(record["sample_id"], path, row, original)
        if number in rows:
            raise ValueError(
                f"{path}: sample {number} is predicted twice (records {rows[number]} and {row})"
            )
        if number not in samples:
            raise ValueError(
                f"{path}: sample {number} (record {row}) is not in {task.path} "
                f"({len(samples)} samples)"
            )
        rows[number] = row
    missing = [number for number in samples if number not in rows]
    if missing:
        named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{path}: {len(missing)} of {len(samples)} samples have no prediction: {named}"
        )
    pairs = [(samples[number], records[row]) for number, row in rows.items()]
    for sample, record in pairs:
        if not original and record["gt_response"] != str(sample.response):
            raise ValueError(
                f"{path}: sample {sample.number}: gt_response {record['gt_response']!r} is not the "
                f"answer of {task.path}, {str(sample.response)!r}"
            )
    return pairs


def _number(sample_id: int | str, path: Path, row: int, original: bool) -> int:
    """A record's sample id as an integer."""
    if isinstance(sample_id, int):
        return sample_id
    if not original and is_whole_number(sample_id):
        return int(sample_id)
    raise ValueError(f"{path}: record {row}: sample_id {sample_id!r} is not an integer")
