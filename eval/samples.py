"""A few held-out questions: the pictures' names, the reference, and what two checkpoints answer.

    python -m eval.samples --before fmtrain/tiny_llava --after runs/tiny_v2v_lora/exported

`before` is shown as it was trained and with the other's mask switched on at inference only.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from eval.answers import answer, questions
from fmtrain import data, tiny
from fmtrain.checkpoint import load, recorded_policy


def picture_name(image) -> str:
    return (image.get("path") if isinstance(image, dict) else str(image)) or "embedded"


def held_out(name: str, tasks: str, count: int, image_root: str | None) -> tuple[list[dict], str]:
    """Rows that no training run of the embedded default has seen, or the first of a file."""
    if name == "digits":
        return list(tiny.rows("test", tasks.split("+"), count, seed=1).with_format(None)), "."
    loaded = data.load(name, None, count, image_root)
    return list(loaded.rows), loaded.image_root


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.samples", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--data", default="digits", help="digits, or rows as a recipe names them")
    parser.add_argument("--tasks", default="+".join(tiny.TASKS), help="of digits, joined by +")
    parser.add_argument("--image-root")
    parser.add_argument("--show", type=int, default=8, help="questions to print")
    parser.add_argument("--count", type=int, default=200, help="rows for the share of exact answers")
    options = parser.parse_args(arguments)
    try:
        rows, root = held_out(options.data, options.tasks, options.count, options.image_root)
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
    table = Table(title=f"{len(asked)} held-out questions; * the reference answer", show_lines=True)
    for column in ("pictures", "question", "reference", *said):
        table.add_column(column)
    for k in range(0, len(asked), max(1, len(asked) // options.show)):
        question = asked[k]
        cells = [f"{'* ' if answers[k] == question.reference else ''}{answers[k]}" for answers in said.values()]
        names = "\n".join(picture_name(image) for image in rows[question.row]["images"])
        table.add_row(names, question.text, question.reference, *cells)
    right = [sum(a == q.reference for a, q in zip(answers, asked)) / len(asked) for answers in said.values()]
    table.add_row("", f"exact answers of {len(asked)}", "", *(f"{share:.3f}" for share in right), style="bold")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
