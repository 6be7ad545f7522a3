"""The two digits of the task `changed`, each on its own: how often the old one, which stands in the
first picture, and the new one, which stands in the second, are right in an answer "from 3 to 8".

    python -m eval.changed DIR

DIR is the folder of a matrix (`python -m eval.matrix`); every row is looked at under its own mask,
and compared with causal training run causally; the base is left out, which has not learnt how to
answer. Written there: digits.json and digits.md.
"""

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eval import paired
from eval.matrix import answers, numbers
from eval.matrix.analysis import tasks_of
from eval.matrix.answers import Answers
from eval.provenance import made_with
from eval.tables import Table
from fmtrain.command_line import Parser, guarded, write_whole

TASK, WORDS = "changed", {"old": 1, "new": 3}  # which word of an answer a digit is


def digit_right(text: str, reference: str, word: int) -> int:
    """1 if this word of an answer is that of the reference; an answer of another form has none."""
    said, wanted = text.casefold().split(), reference.casefold().split()
    return int(len(said) == len(wanted) and said[word] == wanted[word])


def digits(folder: Path) -> list[dict]:
    """Of every row and digit: the share that is right under the row's own mask, with its interval,
    and the difference from the row that was trained causally.

    Raises `ValueError` for a matrix without answers to the task, without a row that was trained
    and run causally, or with one that was not run under its own mask.
    """
    raw, results = answers.read(folder), json.loads((folder / "results.json").read_text())
    asked = [k for k, question in enumerate(raw.questions) if question.task == TASK]
    if not asked or not raw.texts:
        raise ValueError(f"{folder}: no answers to {TASK!r}")
    rows = [row for row in results["rows"] if row["name"] != "base"]
    reference, _ = results["reference"] or (None, None)
    if reference not in [row["name"] for row in rows]:
        raise ValueError(f"{folder}: no row that was trained and run causally, to compare with")
    for row in rows:
        if row["mask"] not in results["masks"]:
            name, mask = row["name"], row["mask"]
            raise ValueError(f"{folder}: row {name!r} was not run under its own mask, {mask}")
    [task], entries = tasks_of([raw.questions[k] for k in asked]), []
    for digit, word in WORDS.items():
        scores = {row["name"]: {TASK: _right(raw, row, asked, word)} for row in rows}
        causal = scores[reference]
        for name, of_row in scores.items():
            share = paired.estimate([task], of_row)
            entry = {"digit": digit, "row": name, "share": share.score}
            entry["interval"] = [share.low, share.high]
            if of_row is not causal:
                apart = paired.mean([task], paired.difference(of_row, causal))
                entry |= {"difference": asdict(apart) | {"interval": apart.interval()}}
                entry["p"] = apart.p()
            entries.append(entry)
    return entries


def _right(raw: Answers, row: dict, asked: Sequence[int], word: int) -> np.ndarray:
    """Which answers have this word right [S, Q]: of each run of a row, to the questions `asked`."""
    lines = []
    for run in row["runs"]:
        texts = raw.texts[run, row["mask"]]
        lines.append([digit_right(texts[k], raw.questions[k].reference, word) for k in asked])
    return np.array(lines, float)


def table(entries: Sequence[dict]) -> Table:
    """A line for each row and digit, in percent."""
    lines = []
    for one in entries:
        against = p = ""
        if "p" in one:
            apart, p = one["difference"], numbers.p_value(one["p"])
            against = _percent([apart["value"], *apart["interval"]], "+.1f")
        right = _percent([one["share"], *one["interval"]], ".1f")
        lines.append([one["row"], one["digit"], right, against, p])
    header = ["mask in training and inference", "digit", "right", "against causal", "p"]
    return Table("The digits of `changed`, percent", header, lines, labels=2)


def _percent(shares: Sequence[float], form: str) -> str:
    """A value and its interval."""
    value, low, high = (format(100 * share, form) for share in shares)
    return f"{value} [{low}, {high}]"


def write(options: Namespace) -> None:
    entries = digits(options.matrix)
    command = shlex.join(["python", "-m", "eval.changed", str(options.matrix)])
    text = table(entries).as_markdown()
    result = {"digits": entries, "made": made_with(command, {})}
    write_whole(options.matrix / "digits.json", json.dumps(result, indent=1))
    write_whole(options.matrix / "digits.md", f"`{command}`\n\n{text}")
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.changed", __doc__)
    parser.add_argument("matrix", type=Path, metavar="DIR", help="the `out` folder of a matrix")
    options = parser.parse_args(arguments)
    return guarded(lambda: write(options))


if __name__ == "__main__":
    sys.exit(main())
