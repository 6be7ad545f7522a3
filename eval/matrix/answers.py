"""What every cell of a matrix answered, from which all its figures can be computed again.

`answers.jsonl.gz` holds a question a line:

    {"task", "unit", "question", "reference", "scores": {run: {mask: score}},
     "answers": {run: {mask: text}}}

without `answers` where a matrix is made from scores.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.held_out import Question
from fmtrain.command_line import replacing

NAME = "answers.jsonl.gz"

Cell = tuple[str, str]  # run, mask in inference


@dataclass(frozen=True)
class Answers:
    """The questions with the score of each and, of a matrix that made them, the answers."""

    questions: Sequence[Question]
    scores: Mapping[Cell, Sequence[float]]
    texts: Mapping[Cell, Sequence[str]] = field(default_factory=dict)


def write(folder: Path, answers: Answers) -> None:
    """Write the file, all or nothing; the same answers give the same bytes."""
    lines = []
    for k, question in enumerate(answers.questions):
        line = {
            "task": question.task,
            "unit": question.unit,
            "question": question.text,
            "reference": question.reference,
            "scores": _nested(answers.scores, k),
        }
        if answers.texts:
            line["answers"] = _nested(answers.texts, k)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with replacing(folder / NAME) as staged:
        staged.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def _nested(values: Mapping[Cell, Sequence], k: int) -> dict[str, dict]:
    """{run: {mask: value k}}."""
    by_run: dict[str, dict] = {}
    for (run, mask), of_cell in values.items():
        by_run.setdefault(run, {})[mask] = of_cell[k]
    return by_run


def read(folder: Path) -> Answers:
    """The file of a folder. Raises `ValueError` where it is missing or torn."""
    path, questions = folder / NAME, []
    scores: dict[Cell, list[float]] = {}
    texts: dict[Cell, list[str]] = {}
    try:
        # Of bytes; a text also ends lines at characters that JSON does not escape.
        lines = gzip.decompress(path.read_bytes()).splitlines()
        for line in map(json.loads, lines):
            fields = (line[key] for key in ("task", "unit", "question", "reference"))
            questions.append(Question(*fields))
            for values, key in ((scores, "scores"), (texts, "answers")):
                for run, of_run in line.get(key, {}).items():
                    for mask, value in of_run.items():
                        values.setdefault((run, mask), []).append(value)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for (run, mask), of_cell in [*scores.items(), *texts.items()]:
        if len(of_cell) != len(questions):
            raise ValueError(
                f"{path}: {run} under {mask} has {len(of_cell)} of {len(questions)} questions"
            )
    return Answers(questions, scores, texts)
