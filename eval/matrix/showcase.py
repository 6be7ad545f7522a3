"""The questions that a report shows, with their pictures and what every row answers."""

import base64
import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageChops

from eval.held_out import HeldOut
from eval.matrix.analysis import MatrixRow
from eval.matrix.answers import Answers, Cell
from fmtrain.data.images import open_image
from fmtrain.decoding import right

LARGEST = 320  # pixels along the longer edge of a picture in the report


def data_uri(image: Image.Image) -> str:
    """A picture as PNG in a data URI, made smaller if it is large."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def changed_part(pictures: Sequence[Image.Image]) -> list[float] | None:
    """Where two pictures of one size differ: left, top, width, height as shares of theirs.

    None for other pictures, for equal ones, and where most of the picture differs.
    """
    if len(pictures) != 2 or pictures[0].size != pictures[1].size:
        return None
    box = ImageChops.difference(*(picture.convert("RGB") for picture in pictures)).getbbox()
    if box is None:
        return None
    width, height = pictures[0].size
    left, top = box[0] / width, box[1] / height
    part = [left, top, box[2] / width - left, box[3] / height - top]
    return part if part[2] * part[3] < 0.25 else None


def most_disputed(
    data: HeldOut, scores: Mapping[Cell, Sequence[float]], cells: Sequence[Cell], count: int
) -> list[int]:
    """For each task the `count` first questions on which the cells differ the most in being right.

    This is not a fair sample.
    """

    def dispute(k: int) -> int:
        right_cells = [scores[cell][k] for cell in cells].count(1)
        return min(right_cells, len(cells) - right_cells)

    by_task: dict[str, list[int]] = {}
    for k, question in enumerate(data.questions):
        by_task.setdefault(question.task, []).append(k)
    disputed = []
    for indices in by_task.values():
        indices.sort(key=dispute, reverse=True)  # stable: of equal ones the first
        disputed += sorted(indices[:count])
    return disputed


def showcase(
    data: HeldOut,
    rows: Sequence[MatrixRow],
    masks: Sequence[str],
    raw: Answers,
    count: int,
) -> list[dict]:
    """The questions to show, each with the answers of every row's first run under every mask."""
    own = [(row.runs[0], row.mask if row.mask in masks else masks[0]) for row in rows]
    turns = [turn for _, turn in data.turns()]
    samples = []
    for k in most_disputed(data, raw.scores, own, count):
        question, turn = data.questions[k], turns[k]
        pictures = [open_image(image, data.image_root) for image in turn.images]
        answers_of: dict[str, dict[str, dict]] = {}
        for row in rows:
            answers_of[row.name] = {}
            for mask in masks:
                text = raw.texts[row.runs[0], mask][k]
                is_right = bool(right(text, question.reference))
                answers_of[row.name][mask] = {"text": text, "right": is_right}
        samples.append(
            {
                "task": question.task,
                "id": question.unit,
                "turn": turn.index,
                "question": question.text,
                "reference": question.reference,
                "images": [data_uri(picture) for picture in pictures],
                "changed": changed_part(pictures),
                "answers": answers_of,
            }
        )
    return samples
