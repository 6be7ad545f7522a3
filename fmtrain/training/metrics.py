"""What an answer scores against its reference, from 0 to 1, by the metric of the row's source."""

import json
import math
import re
from collections.abc import Callable, Mapping

from rapidfuzz.distance import Levenshtein

from fmtrain.data.row_format import EVALUATION_ONLY
from fmtrain.decoding import right

EXACT = "exact_match"
_MARKED = re.compile(r"^\s*\(?([A-Z])(?:[.):]|,(?!\s*[A-Z]\b)|\s*$)", re.IGNORECASE)
_WORD = r"(?-i:(?![aiI]\s+\w))"  # "a cat", "I think"
_SAID = re.compile(rf"\b(?:answer|option)(?:\s+is)?\s*:?\s*\(?{_WORD}([A-Z])\b", re.IGNORECASE)


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer is the reference but for case and blanks."""
    return float(right(answer, reference))


def anls(answer: str, reference: str) -> float:
    """Average normalised Levenshtein similarity (ST-VQA, arXiv 1905.13648, eq. 1, with its
    threshold of 0.5; the metric of DocVQA): 1 - NL where NL < 0.5, else 0. NL is the edit distance
    over the longer one's length, without regard to case and repeated blanks."""
    said, meant = (" ".join(text.casefold().split()) for text in (answer, reference))
    distance = Levenshtein.normalized_distance(said, meant)
    return 1.0 - distance if distance < 0.5 else 0.0


def relaxed_accuracy(answer: str, reference: str) -> float:
    """ChartQA's (arXiv 2203.10244, after PlotQA, arXiv 1909.00997): a number may be 5 % off the
    reference, anything else is `exact_match`. A percentage is its fraction: 20% is 0.2."""
    said, meant = _number(answer), _number(reference)
    if said is None or meant is None:
        return exact_match(answer, reference)
    return float(abs(said - meant) <= 0.05 * abs(meant) + 1e-9 * abs(meant))


def option_letter(answer: str, reference: str) -> float:
    """1 if the answer names the option that the reference names, as ScienceQA (arXiv 2209.09513)
    and the first step of MMBench (arXiv 2307.06281) read it: "B", "(B)", "B. a cat", "The answer is
    B". A letter that is merely a word of the answer names none."""
    said = option(answer)
    return float(said is not None and said == option(reference))


def option(text: str) -> str | None:
    """The letter of the option that a text names, or None."""
    found = _MARKED.search(text) or _SAID.search(text)
    return found.group(1).upper() if found else None


METRICS: dict[str, Callable[[str, str], float]] = {
    metric.__name__: metric for metric in (exact_match, anls, relaxed_accuracy, option_letter)
}


def parse_metrics(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """`eval_metrics`: the metric of all rows, or of those whose source begins so; a mapping, also
    as JSON. Raises `ValueError` for anything else."""
    found = given or {}
    if isinstance(given, str):
        found = {"": given}
        if given.lstrip().startswith(("{", "[")):
            try:
                found = json.loads(given)
            except json.JSONDecodeError:
                found = None
    if not isinstance(found, Mapping):
        raise ValueError(f"eval_metrics is no mapping of sources to metrics: {given}")
    for name in found.values():
        if name not in METRICS:
            raise ValueError(f"eval_metrics names {name!r}; known are {', '.join(METRICS)}")
    return dict(found)


def unmarked(source: str | None) -> str:
    """A row's source without the mark of evaluation data; of a row that names none, ""."""
    return (source or "").removeprefix(EVALUATION_ONLY)


def metric_of(source: str | None, metrics: Mapping[str, str]) -> str:
    """The metric of the longest key that the source begins with, or `exact_match`."""
    name = unmarked(source)
    fitting = [key for key in metrics if name.startswith(key)]
    return metrics[max(fitting, key=len)] if fitting else EXACT


def check_reference(metric: str, reference: str) -> None:
    """Raises `ValueError` for a reference that no answer could match."""
    if metric == "option_letter" and option(reference) is None:
        raise ValueError(
            f"its answer {reference!r:.80} names no option, which option_letter scores"
        )


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if text.endswith("%") else value
