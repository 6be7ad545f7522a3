"""Rows with images of noise, for a model whose data is not at hand."""

import torch
from PIL import Image


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """RGB noise of `size` (width, height) in pixels."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(noise.numpy())


def turn(images: int, question: str, answer: str = "") -> list[dict]:
    """A user's message with so many images before its text and, if there is one, the assistant's
    answer."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def rows() -> list[dict]:
    """Three rows: no image, one, and two turns with one and two."""
    return [
        {"id": "text", "messages": turn(0, "1 2 3", "4 5"), "images": []},
        {"id": "image", "messages": turn(1, "1 2 ?", "3"), "images": [picture(1, (60, 40))]},
        {
            "id": "turns",
            "messages": turn(1, "1 ?", "2 3") + turn(2, "4 5 ?", "6"),
            "images": [picture(2, (40, 60)), picture(3, (50, 50)), picture(4, (80, 30))],
        },
    ]
