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

    Raises `ValueError` for a matrix without answers to the task, or without a causal row.
    """
    raw, results = answers.read(folder), json.loads((folder / "results.json").read_text())
    chosen = [k for k, question in enumerate(raw.questions) if question.task == TASK]
    if not chosen or not raw.texts or results["reference"] is None:
        raise ValueError(f"{folder}: no answers to {TASK!r}, or no causal row to compare with")
    questions, entries = [raw.questions[k] for k in chosen], []
    [task] = tasks_of(questions)
    for digit, word in WORDS.items():
        scores = {}
        for row in [row for row in results["rows"] if row["name"] != "base"]:
            texts = [raw.texts[run, row["mask"]] for run in row["runs"]]
            right = [
                [digit_right(of_run[k], raw.questions[k].reference, word) for k in chosen]
                for of_run in texts
            ]
            scores[row["name"]] = {TASK: np.array(right, float)}
        causal = scores[results["reference"][0]]
        for name, of_row in scores.items():
            share = paired.mean([task], of_row)
            low, high = share.interval()
            entry = {"digit": digit, "row": name, "share": share.value}
            entry["interval"] = [max(0.0, low), min(1.0, high)]
            if of_row is not causal:
                apart = paired.mean([task], paired.difference(of_row, causal))
                entry |= {"difference": asdict(apart) | {"interval": apart.interval()}}
                entry["p"] = apart.p()
            entries.append(entry)
    return entries


def table(entries: Sequence[dict]) -> Table:
    """A line for each row and digit, in percent."""
    lines = []
    for one in entries:
        low, high = one["interval"]
        line = [
            one["row"],
            one["digit"],
            f"{100 * one['share']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        ]
        if "p" in one:
            low, high = one["difference"]["interval"]
            apart = f"{100 * one['difference']['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            line += [apart, numbers.p_value(one["p"])]
        lines.append(line + [""] * (5 - len(line)))
    header = ["mask in training and inference", "digit", "right", "against causal", "p"]
    return Table("The digits of `changed`, percent", header, lines, labels=2)


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
