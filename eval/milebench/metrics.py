"""The score of each prediction, by the four scorers of MileBench, repaired or as it has them.

multi-choice: 1 if the option read from the answer is the right one. rouge-l: F. needle-token: 1 if
the gold answer is a token of the prediction. needle-substring (MMCoQA): 1 if it is a substring.
README.md lists what the repair changes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.milebench.choices import extract, extract_original, label, label_original
from eval.milebench.normalize import WORD_END, WORD_START, normalize, normalize_original
from eval.milebench.predictions import Record, match_predictions
from eval.milebench.rouge import ORIGINAL_MAX_STEPS, rouge_l
from eval.milebench.tasks import MULTI_CHOICE, NEEDLE_TOKEN, ROUGE_L, Sample, Task

LEVELS = ("Few", "Medium", "Many")


@dataclass(frozen=True)
class Scored:
    """One prediction's score, a fraction (an integer for accuracies), and its record.

    `extracted` is the label read from a multiple-choice answer ("" for none); `detail` the record
    of pred_with_extracted.json. Both are None for other scorers.
    """

    sample: Sample
    score: float
    record: Record
    extracted: str | None = None
    detail: Record | None = None

    @property
    def level(self) -> str:
        """Image-quantity bin, by the number of the annotation's images (not its field, Q12)."""
        return image_level(len(self.sample.images))


@dataclass(frozen=True)
class ScoredTask:
    """All predictions of a task with their scores, in the order of pred.json."""

    name: str
    scorer: str
    scored: tuple[Scored, ...]

    @property
    def metric(self) -> str:
        """Name of the score in eval.json."""
        return "Rouge-L f" if self.scorer == ROUGE_L else "Accuracy"


def image_level(n_images: int) -> str:
    """Few: fewer than 6 images, Medium: 6 to 31, Many: more."""
    return LEVELS[(n_images > 5) + (n_images > 31)]


def score_task(
    task: Task, records: Sequence[Record], path: Path, original: bool = False
) -> ScoredTask:
    """Score the predictions `records` of `path`.

    Raises ValueError naming file and sample, as where MileBench fails.
    """
    scorer = task.scorer
    score = {MULTI_CHOICE: _score_choice, ROUGE_L: _score_rouge}.get(scorer, _score_needle)
    scored = []
    for sample, record in match_predictions(task, records, path, original):
        if original and sample.level is None:
            raise ValueError(
                f"{task.path}: sample {sample.number}: key 'image_quantity_level' is missing"
            )
        try:
            scored.append(score(task, sample, record, original))
        except ValueError as error:
            raise ValueError(f"{path}: sample {sample.number}: {error}") from error
    return ScoredTask(task.name, scorer, tuple(scored))


def needle_original(gold: str, answer: str, whole_token: bool) -> int:
    """MileBench's rule on normalised texts (Q13).

    Gold is a blank-separated token, or any substring.
    """
    return int(gold in (answer.split() if whole_token else answer))


def needle(gold: str, answer: str) -> int:
    """Repaired rule on raw texts: gold stands in the answer as whole words, whatever marks adjoin.

    A gold answer of marks only is compared as it is.
    """
    words = normalize(gold)
    if not words:
        return int(gold.strip() == answer.strip())
    return int(re.search(WORD_START + re.escape(words) + WORD_END, normalize(answer)) is not None)


def _score_needle(task: Task, sample: Sample, record: Record, original: bool) -> Scored:
    gold, answer = record["gt_response"], record["pred_response"]
    if original:
        whole_token = task.scorer == NEEDLE_TOKEN
        return Scored(
            sample,
            needle_original(normalize_original(gold), normalize_original(answer), whole_token),
            record,
        )
    return Scored(sample, needle(gold, answer), record)


def _score_rouge(task: Task, sample: Sample, record: Record, original: bool) -> Scored:
    clean = normalize_original if original else normalize
    gold, answer = clean(record["gt_response"]), clean(record["pred_response"])
    if not gold:
        raise ValueError(f"the gold answer {record['gt_response']!r} is empty after normalisation")
    if not answer:
        return Scored(sample, 0, record)
    return Scored(sample, rouge_l(answer, gold, ORIGINAL_MAX_STEPS if original else None), record)


def _score_choice(task: Task, sample: Sample, record: Record, original: bool) -> Scored:
    if sample.choices is None:
        raise ValueError(f"no 'choice_list' in {task.path}")
    clean = normalize_original if original else normalize
    gold = clean(record["gt_response"])
    if original:
        if not all(isinstance(choice, str) for choice in sample.choices):
            raise ValueError(f"an option in {task.path} is not a string: {list(sample.choices)!r}")
        raw = list(sample.choices)
    else:
        raw = [str(choice) for choice in sample.choices]
    choices = [clean(choice) for choice in raw]
    if gold not in choices:
        raise ValueError(
            f"the right answer {record['gt_response']!r} is not among the {len(choices)} options"
        )
    answer = clean(record["pred_response"])
    if original:
        extracted = extract_original(answer, choices)
        right = extracted == label_original(choices.index(gold))
    else:
        picked = extract(record["pred_response"], raw, labelled=task.name != "GPR1200")
        extracted = "" if picked is None else label(picked)
        right = picked is not None and _same_option(
            raw, choices, picked, record["gt_response"], gold
        )
    detail = {**record, "gt_response": gold, "pred_response": answer, "image": list(sample.images)}
    detail |= {
        "choice_list": choices,
        "image_quantity_level": sample.level,
        "extracted": extracted,
        "result": int(right),
    }
    return Scored(sample, int(right), record, extracted, detail)


def _same_option(
    raw: Sequence[str], choices: Sequence[str], picked: int, raw_gold: str, gold: str
) -> bool:
    """Is the picked option the right one?

    Options that normalise alike are one option, unless to nothing (Q7).
    """
    return raw[picked] == raw_gold if not gold else choices[picked] == gold
