"""The cells of a matrix from MileBench scores: the `--out` folder of `eval.milebench.score`.

    <scores>/<run>+<mask>/<Task>/sample_scores.json

as `eval.milebench.generate --model <run> --masks <mask> ..` names its predictions;
`<scores>/<run>/` is also read, for the mask that the run was trained with.
"""

from collections.abc import Sequence
from pathlib import Path

from eval.held_out import Question
from eval.matrix.runs import MatrixRun
from eval.milebench.tasks import field, read_json

NAME = "sample_scores.json"


def read(
    scores: Path, runs: Sequence[MatrixRun], masks: Sequence[str], tasks: Sequence[str]
) -> tuple[list[Question], dict[tuple[str, str], list[float]]]:
    """The questions, and {(run, mask): score of each}. Every cell must have the same samples.

    Raises `ValueError` naming the file that is missing or differs.
    """
    folders = {}
    for run in runs:
        for mask in masks:
            folders[run.name, mask] = _folder(scores, run, mask)
    first = next(iter(folders.values()))
    scored = sorted(path.parent.name for path in first.glob(f"*/{NAME}"))
    for task in tasks:
        if task not in scored:
            raise ValueError(
                f"{first / task / NAME}: no such scores; there are {', '.join(scored) or 'none'}"
            )
    questions: list[Question] = []
    cells: dict[tuple[str, str], list[float]] = {cell: [] for cell in folders}
    for task in tasks or scored:
        expected = sorted(_samples(first / task / NAME))
        questions += [Question(task, f"{task}/{number}") for number in expected]
        for cell, folder in folders.items():
            by_id = _samples(folder / task / NAME)
            if sorted(by_id) != expected:
                other = min(set(by_id) ^ set(expected))
                raise ValueError(
                    f"{folder / task / NAME}: sample {other} is not in every cell; "
                    "all cells must score the same samples"
                )
            cells[cell] += [by_id[number] for number in expected]
    if not questions:
        raise ValueError(f"{first}: holds no <task>/{NAME}")
    return questions, cells


def modes(scores: Path) -> dict[str, str]:
    """{"prompts", "scoring"}: fixed or original, as the scores.json of that folder says."""
    path = scores / "scores.json"
    if not path.is_file():
        return {"prompts": "unknown", "scoring": "unknown"}
    described = read_json(path)
    prompts = {model.get("prompts", "unknown") for model in described["models"].values()}
    return {"prompts": " and ".join(sorted(prompts)), "scoring": described["scoring"]}


def _folder(scores: Path, run: MatrixRun, mask: str) -> Path:
    named = scores / f"{run.name}+{mask}"
    if named.is_dir():
        return named
    if mask == str(run.mask) and (scores / run.name).is_dir():
        return scores / run.name
    raise ValueError(
        f"{named}: no such folder; generate with --model {run.folder} --masks {mask}, then score"
    )


def _samples(path: Path) -> dict[int, float]:
    by_id: dict[int, float] = {}
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: is not a list of samples")
    for k, entry in enumerate(entries):
        number = field(entry, "sample_id", int, f"{path}: entry {k}")
        if number in by_id:
            raise ValueError(f"{path}: sample {number} occurs twice")
        by_id[number] = float(field(entry, "score", (int, float), f"{path}: sample {number}"))
    return by_id
