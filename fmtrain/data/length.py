"""How many tokens a row has, told from texts and the sizes of its images alone."""

from functools import lru_cache

from PIL import Image

from fmtrain.data.dialogue import image_parts
from fmtrain.data.encode import checked
from fmtrain.data.render import Segment, render


def token_count(processor, messages: list[dict], sizes: list[tuple[int, int]]) -> int:
    """How many tokens `encode` makes of a dialogue whose images have these sizes (width, height),
    without touching a pixel.

    Raises `ValueError` as `encode` does.
    """
    messages = checked(processor, messages, len(sizes))
    return segments_length(processor, messages, render(processor, messages), sizes)


def segments_length(
    processor, messages: list[dict], segments: list[Segment], sizes: list[tuple[int, int]]
) -> int:
    """As `token_count`, of a dialogue that is rendered already."""
    tokenizer = processor.tokenizer
    text = "".join(segment.text for segment in segments)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    total, remaining = len(tokenizer(text, add_special_tokens=special).input_ids), list(sizes)
    group = 0
    for message in [*messages, {"role": "assistant", "content": []}]:
        if message["role"] != "assistant":
            group += image_parts(message)
            continue
        for size in remaining[:group]:
            total += _image_tokens(processor, size, group == 1) - 1
        remaining, group = remaining[group:], 0
    return total


@lru_cache(maxsize=1 << 16)
def _image_tokens(processor, size: tuple[int, int], alone: bool) -> int:
    """Tokens of an image of this size, alone in its prefill or not, asked of the processor once."""
    count = 1 if alone else 2
    blank = Image.new("RGB", size)
    encoded = processor(
        text=[processor.image_token * count], images=[[blank] * count], add_special_tokens=False
    )
    return len(encoded["input_ids"][0]) // count
