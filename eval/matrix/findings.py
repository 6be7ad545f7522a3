"""What a matrix shows and what it does not, in sentences: its primary family in words."""

from collections.abc import Sequence

from eval.matrix.analysis import PRIMARY

OPENINGS = {
    "inference-only": "Trained with the mask, against the mask switched on after causal training",
    "causal-causal": "Trained and run with the mask, against causal training run causally",
}


def points(difference: float) -> str:
    """Percentage points with a sign."""
    if not round(difference, 3):
        return "0"
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def primary(results: dict, kind: str) -> list[dict]:
    """The comparisons of one kind in the primary family."""
    return [
        one for one in results["comparisons"] if one["family"] == PRIMARY and one["kind"] == kind
    ]


def findings(results: dict) -> list[str]:
    """A sentence for each kind of the primary family, and one on what it rests on."""
    sentences, count = [], 0
    for kind, opening in OPENINGS.items():
        comparisons = primary(results, kind)
        if comparisons:
            sentences.append(f"{opening}: {_verdicts(comparisons)}.")
            count += len(comparisons)
    if not sentences:
        return ["No row was trained causally, or none with a mask: nothing here says what pays."]
    runs = max(len(row["runs"]) for row in results["rows"])
    taken = f"intervals and tests vary rows and the {runs} training runs of a row"
    if runs == 1:
        taken = "each row is one training run, so nothing here says that another seed would agree"
    number = "one comparison" if count == 1 else f"{count} comparisons, corrected for their number"
    sentences.append(f"Percentage points; {number}; {taken}.")
    return sentences


def _verdicts(comparisons: Sequence[dict]) -> str:
    carried = [one for one in comparisons if one["carried"]]
    groups = {
        "better": [one for one in carried if one["difference"] > 0],
        "worse": [one for one in carried if one["difference"] < 0],
        "no difference is shown": [one for one in comparisons if not one["carried"]],
    }
    parts = []
    for verdict, of_verdict in groups.items():
        if of_verdict:
            names = [f"{one['row']} ({points(one['difference'])})" for one in of_verdict]
            parts.append(f"{verdict} for {listed(names)}")
    return "; ".join(parts)


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
