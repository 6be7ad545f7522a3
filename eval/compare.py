"""A few held-out questions: the pictures' names, the reference, and what two checkpoints answer.

    python -m eval.compare --before fmtrain/tiny_llava --after runs/tiny_v2v_lora-v2v-s0/exported

`before` is shown as it was trained and with the other's mask switched on at inference only.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from eval import held_out
from eval.held_out import HeldOut
from fmtrain.checkpoint import check_folder, load, recorded_mask
from fmtrain.command_line import Parser, guarded
from fmtrain.data.sources import DIGITS
from fmtrain.decoding import Decoder, right
from fmtrain.masks import Mask
from fmtrain.tiny import digits

BATCH = 50  # questions
MAX_NEW_TOKENS = 32


def picture_name(image) -> str:
    """The file of an image, where it has one."""
    return (image.get("path") if isinstance(image, dict) else str(image)) or "embedded"


def answers(checkpoint: str, masks: Sequence[Mask], data: HeldOut) -> list[list[str]]:
    """What a checkpoint answers to all questions, under each mask."""
    model, processor = load(checkpoint, masks[0], backend="sdpa")
    decoder, answers = Decoder(model, processor), [[""] * len(data.questions) for _ in masks]
    prompts = data.prompts(processor)
    for indices, texts in decoder.in_batches(prompts, masks, BATCH, max_new_tokens=MAX_NEW_TOKENS):
        for all_texts, batch_texts in zip(answers, texts):
            for k, text in zip(indices, batch_texts):
                all_texts[k] = text
    return answers


def answers_table(data: HeldOut, answers: Mapping[str, Sequence[str]], show: int) -> Table:
    """Some questions of every task, those first over which the runs disagree."""
    table = Table(title="held-out questions; * the reference answer", show_lines=True)
    for column in ("pictures", "question", "reference", *answers):
        table.add_column(column, overflow="fold")
    images = [turn.images for _, turn in data.turns()]
    tasks = tasks_of(data)
    for task in tasks:
        indices = [k for k, question in enumerate(data.questions) if question.task == task]
        indices.sort(key=lambda k: len({texts[k] for texts in answers.values()}) == 1)
        for k in indices[: max(1, show // len(tasks))]:
            question, cells = data.questions[k], []
            for texts in answers.values():
                cells.append("* " * right(texts[k], question.reference) + texts[k])
            names = "\n".join(map(picture_name, images[k]))
            table.add_row(names, question.text, question.reference, *cells)
    return table


def shares_table(data: HeldOut, answers: Mapping[str, Sequence[str]]) -> Table:
    """The share of exact answers, of each task and of all."""
    table = Table(title="share of exact answers")
    for column in ("task", "questions", *answers):
        table.add_column(column)
    for task in [*tasks_of(data), "all"]:
        indices = [k for k, one in enumerate(data.questions) if task in (one.task, "all")]
        shares = []
        for texts in answers.values():
            scores = [right(texts[k], data.questions[k].reference) for k in indices]
            shares.append(f"{sum(scores) / len(scores):.3f}")
        table.add_row(task, str(len(indices)), *shares)
    return table


def tasks_of(data: HeldOut) -> list[str]:
    """The tasks in the order of their first question."""
    return list(dict.fromkeys(question.task for question in data.questions))


def compare(options: Namespace) -> None:
    """Answer with both checkpoints and print the tables."""
    for checkpoint in (options.before, options.after):
        check_folder(checkpoint)
    before = recorded_mask(options.before) or Mask.parse("causal")
    after = recorded_mask(options.after) or Mask.parse("causal")
    where = options.data, options.tasks, options.count, options.image_root, options.seed
    data = held_out.mixed(*where)
    as_trained, switched_on = answers(options.before, [before, after], data)
    [trained_with] = answers(options.after, [after], data)
    columns = {
        f"before, {before}": as_trained,
        f"before, {after} switched on": switched_on,
        f"after, {after}": trained_with,
    }
    console = Console(width=max(Console().width, 120))
    console.print(answers_table(data, columns, options.show))
    console.print(shares_table(data, columns))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.compare", __doc__)
    add = parser.add_argument
    add("--before", required=True, metavar="CHECKPOINT")
    add("--after", required=True, metavar="CHECKPOINT")
    add("--data", default=DIGITS, help="digits, or rows as a recipe names them")
    add("--tasks", nargs="+", default=list(digits.TASKS), metavar="TASK", help="of digits")
    add("--image_root", metavar="DIR")
    add("--show", type=int, default=10, help="questions to print")
    add("--count", type=int, default=200, help="rows for the share of exact answers")
    add("--seed", type=int, default=held_out.SEED, help="of the digits' rows")
    options = parser.parse_args(arguments)
    return guarded(lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
