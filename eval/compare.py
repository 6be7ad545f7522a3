"""A few held-out questions: the pictures' names, the reference, and what two checkpoints answer.

    python -m eval.compare --before fmtrain/tiny_llava --after runs/tiny_v2v_lora/exported

`before` is shown as it was trained and with the other's mask switched on at inference only.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from eval.answers import Question, answer, questions
from fmtrain.checkpoint import load, recorded_policy
from fmtrain.data import files as data
from fmtrain.tiny import digits


def picture_name(image) -> str:
    return (image.get("path") if isinstance(image, dict) else str(image)) or "embedded"


def held_out(
    name: str, tasks: str, count: int, image_root: str | None, seed: int
) -> tuple[list[dict], str]:
    """Rows that no training run of the embedded default has seen, or the first of a file."""
    if name == "digits":
        return list(digits.rows("test", tasks.split("+"), count, seed).with_format(None)), "."
    loaded = data.load(name, None, count, image_root)
    return list(loaded.rows), loaded.image_root


def answers_table(
    rows: list[dict],
    asked: list[Question],
    sources: list[str],
    said: dict[str, list[str]],
    show: int,
) -> Table:
    """Some questions of every source, those first over which the runs disagree."""
    table = Table(title="held-out questions; * the reference answer", show_lines=True)
    for column in ("pictures", "question", "reference", *said):
        table.add_column(column, overflow="fold")
    kinds = list(dict.fromkeys(sources))
    for kind in kinds:
        among = [k for k in range(len(asked)) if sources[k] == kind]
        among.sort(key=lambda k: len({answers[k] for answers in said.values()}) == 1)
        for k in among[: max(1, show // len(kinds))]:
            question = asked[k]
            names = "\n".join(picture_name(image) for image in rows[question.row]["images"])
            cells = (
                f"{'* ' if answers[k] == question.reference else ''}{answers[k]}"
                for answers in said.values()
            )
            table.add_row(names, question.text, question.reference, *cells)
    return table


def shares_table(asked: list[Question], sources: list[str], said: dict[str, list[str]]) -> Table:
    table = Table(title="share of exact answers")
    for column in ("source", "questions", *said):
        table.add_column(column)
    for source in [*dict.fromkeys(sources), "all"]:
        chosen = [k for k in range(len(asked)) if source in (sources[k], "all")]
        right = (
            sum(answers[k] == asked[k].reference for k in chosen) / len(chosen)
            for answers in said.values()
        )
        table.add_row(source, str(len(chosen)), *(f"{share:.3f}" for share in right))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--data", default="digits", help="digits, or rows as a recipe names them")
    parser.add_argument("--tasks", default="+".join(digits.TASKS), help="of digits, joined by +")
    parser.add_argument("--image-root")
    parser.add_argument("--show", type=int, default=10, help="questions to print")
    parser.add_argument(
        "--count", type=int, default=200, help="rows for the share of exact answers"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the digits' rows")
    options = parser.parse_args(arguments)
    try:
        rows, root = held_out(
            options.data, options.tasks, options.count, options.image_root, options.seed
        )
        policy, merge = recorded_policy(options.after) or ("causal", None)
        first, known = recorded_policy(options.before) or ("causal", None)
        mask = policy + ("+merge" if merge else "")
        runs = {
            f"before, {first}": dict(path=options.before, policy=first, merge=known),
            f"before, {mask} switched on": dict(path=options.before, policy=policy, merge=merge),
            f"after, {mask}": dict(path=options.after, policy=policy, merge=merge),
        }
        said = {}
        for name, run in runs.items():
            model, processor = load(**run)
            asked = list(questions(processor, rows, root))
            said[name] = answer(model, processor, asked, batch_size=50)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    sources = [str(rows[question.row].get("source", "")) for question in asked]
    console = Console(width=max(Console().width, 120))
    console.print(answers_table(rows, asked, sources, said, options.show))
    console.print(shares_table(asked, sources, said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
