"""The questions that a report shows: their pictures as data URIs, and what every row answers under every mask."""

import base64
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from eval.matrix.analysis import Row
from eval.matrix.cells import HeldOut, right
from fmtrain.data.images import open_image

LARGEST = 320  # pixels along the longer edge of a picture in the report


def data_uri(image: Image.Image) -> str:
    """A picture as PNG in a data URI, made smaller if it is large."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def choose(
    there: HeldOut,
    scores: Mapping[tuple[str, str], Sequence[float]],
    own: Sequence[tuple[str, str]],
    count: int,
) -> list[int]:
    """For each task the `count` first questions on which cells `own` differ the most in being right: not a fair sample."""
    chosen = []
    for task in dict.fromkeys(item.task for item in there.items):
        numbers = [k for k, item in enumerate(there.items) if item.task == task]
        spread = {
            k: min(shares := [scores[cell][k] for cell in own].count(1), len(own) - shares)
            for k in numbers
        }
        chosen += sorted(sorted(numbers, key=lambda k: -spread[k])[:count])
    return chosen


def showcase(
    there: HeldOut,
    rows: Sequence[Row],
    masks: Sequence[str],
    scores: Mapping[tuple[str, str], Sequence[float]],
    answers: Mapping[tuple[str, str], Sequence[str]],
    count: int,
) -> list[dict]:
    """The questions to show, each with its pictures and the answers of every row's first run under every mask."""
    own = [(row.runs[0], row.mask if row.mask in masks else masks[0]) for row in rows]
    by_id = {str(row["id"]): row for row in there.rows}
    found = []
    for k in choose(there, scores, own, count):
        item = there.items[k]
        row = by_id[item.unit]
        turn = [n for n, other in enumerate(there.items) if other.unit == item.unit].index(k)
        asked = [n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"][
            turn
        ]
        parts = [
            part
            for message in row["messages"][:asked]
            if not isinstance(message["content"], str)
            for part in message["content"]
        ]
        shown = sum(part["type"] == "image" for part in parts)
        found.append(
            {
                "task": item.task,
                "id": item.unit,
                "turn": turn,
                "question": item.text,
                "reference": item.reference,
                "images": [
                    data_uri(open_image(image, there.image_root)) for image in row["images"][:shown]
                ],
                "answers": {
                    each.name: {
                        mask: {
                            "text": answers[each.runs[0], mask][k],
                            "right": bool(right(answers[each.runs[0], mask][k], item.reference)),
                        }
                        for mask in masks
                    }
                    for each in rows
                },
            }
        )
    return found
