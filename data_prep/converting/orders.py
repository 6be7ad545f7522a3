"""Where the images of a user's turn stand relative to its text.

Dual-order training (the MMA paper, arXiv 2503.02597) is two passes over the data, one in each
order. Here a turn has an order when its images stand together, before or after its text. A turn
whose text runs between images or on both sides of them refers to images by their place, so it is
left as it is; with `keep` every turn is, as the source has it.
"""

from itertools import pairwise

from data_prep.converting.rows import Message, Part, Row

ORDERS = ("image_first", "text_first", "keep", "dual")


def passes(order: str) -> tuple[str, ...]:
    """The orders that are written one after the other: one, or both for `dual`."""
    return ("image_first", "text_first") if order == "dual" else (order,)


def split_turn(message: Message) -> tuple[list[Part], list[Part]] | None:
    """(images, texts) of a user's turn whose order can be chosen, else None."""
    content = message["content"]
    if len(content) < 2 or message["role"] != "user":
        return None
    changes = sum(first["type"] != second["type"] for first, second in pairwise(content))
    if changes != 1:
        return None
    images = [part for part in content if part["type"] == "image"]
    texts = [part for part in content if part["type"] == "text"]
    return images, texts


def has_order(row: Row) -> bool:
    """Whether the two orders of `row` differ."""
    return any(split_turn(message) is not None for message in row["messages"])


def arrange(row: Row, order: str, question_twice: bool = False) -> Row:
    """`row` with every turn that has an order put into `order` (`image_first`, `text_first` or,
    as it is, `keep`), or, with `question_twice`, with the question before and after the images.
    Messages that change are new objects."""
    if order == "keep":
        return row
    messages = list(row["messages"])
    for number in [k for k, message in enumerate(messages) if len(message["content"]) > 1]:
        parts = split_turn(messages[number])
        if parts is not None:
            images, texts = parts
            if question_twice:
                content = [*texts, *images, *(dict(text) for text in texts)]
            else:
                content = images + texts if order == "image_first" else texts + images
            messages[number] = {"role": "user", "content": content}
    return {**row, "messages": messages}
