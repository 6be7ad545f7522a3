"""The prompt as MileBench's LLaVA worker feeds it to the model.

It is a Llama-2 chat template, even for Vicuna models (Q21).

Only for reproducing MileBench's own LLaVA numbers: all else goes through `fmtrain.data.encode` and
the model's template.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

from eval.milebench.prompt import PLACE, Tokenizer

IMAGE_INDEX = -200  # LLaVA's mark for an image among the ids

_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)


def llava_prompt(text: str, start_end: bool = False) -> str:
    """Text with `<ImageHere>` -> the whole prompt with `<image>`.

    start_end: the model's `mm_use_im_start_end`. Each pair of adjacent places gets a newline after
    both; a third in a row gets none before the next pair.
    """
    image = "<im_start><image><im_end>" if start_end else "<image>"
    text = text.replace(PLACE * 2, f"{PLACE}\n{PLACE}\n").replace(PLACE, image)
    return f"[INST] <<SYS>>\n{_SYSTEM}\n<</SYS>>\n\n{text} [/INST]"


def llava_messages(text: str) -> list[dict[str, Any]]:
    """The prompt as a dialogue for `llava_processor`, image by image; newlines as above."""
    text, parts = text.replace(PLACE * 2, f"{PLACE}\n{PLACE}\n"), []
    for k, piece in enumerate(text.split(PLACE)):
        parts += [{"type": "image"}] * (k > 0)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return [{"role": "user", "content": parts}]


def llava_processor(processor):
    """The processor with the template of `llava_prompt` in place of its own."""
    opening, image = f"[INST] <<SYS>>\n{_SYSTEM}\n<</SYS>>\n\n", processor.image_token
    other = copy.copy(processor)
    other.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] }}{% else %}"
        "{{ " + json.dumps(opening) + " }}{% for part in message['content'] %}"
        "{{ " + json.dumps(image) + " if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{{ ' [/INST]' }}{% endif %}{% endfor %}"
    )
    return other


def llava_input_ids(prompt: str, tokenizer: Tokenizer, bos_id: int) -> list[int]:
    """Ids of a prompt: BOS, then every text around `<image>` encoded by itself.

    `IMAGE_INDEX` is in between.
    """
    pieces: Sequence[str] = prompt.split("<image>")
    ids = [bos_id]
    for i, piece in enumerate(pieces):
        ids += [IMAGE_INDEX] * (i > 0) + list(tokenizer(piece, add_special_tokens=False).input_ids)
    return ids
