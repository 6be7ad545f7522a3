"""A sample's prompt, cut so that the whole dialogue fits into the model's window, and encoded for the model."""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from eval.milebench.prompt import Prompt, Window, build_prompt, image_paths
from eval.milebench.tasks import Sample, Task
from fmtrain.data.encode import encode
from fmtrain.data.images import image_size, open_image
from fmtrain.layout import Layout


@dataclass(frozen=True)
class Fitted:
    """One sample ready for the model: its prompt as pred.json shows it, model inputs, and layout [1, T]."""

    prompt: Prompt
    inputs: dict[str, torch.Tensor]
    layout: Layout


class Fitter:
    """Fits prompts into `length` tokens, room for `max_new_tokens` included.

    What an image costs is asked of the processor, for each size of image and for images alone or among others (OneVision
    tiles an image only when it is alone); so is what the chat template puts around the prompt.
    """

    def __init__(self, processor, length: int, max_new_tokens: int):
        self.processor, self.length, self.max_new_tokens = processor, length, max_new_tokens
        self.image_tokens = functools.cache(self._image_tokens)
        self.template_tokens = self._tokens([], "?") - len(
            self.processor.tokenizer("?", add_special_tokens=False).input_ids
        )

    def fit(self, task: Task, sample: Sample, combined: int | None = None) -> Fitted:
        """The sample's prompt and its encoding. Raises `ValueError`, in one line, for an image that cannot be read, a text
        with the model's image placeholder, and a window too short for the instruction."""
        where = f"{task.path}: sample {sample.sample_id}"
        try:
            return self._fit(task, sample, combined)
        except ValueError as error:
            message = str(error)
            raise ValueError(
                message if message.startswith(str(task.path)) else f"{where}: {message}"
            ) from error

    def _fit(self, task: Task, sample: Sample, combined: int | None) -> Fitted:
        root = os.path.dirname(os.path.abspath(task.path))
        sizes = [
            image_size(os.path.abspath(path), root) for path in image_paths(task, sample, combined)
        ]
        costs = tuple(self.image_tokens(size, len(sizes) > 1) for size in sizes)
        overhead = self.template_tokens + self.max_new_tokens
        while True:
            prompt = build_prompt(
                task,
                sample,
                self.processor.tokenizer,
                Window(self.length, costs, overhead),
                combined,
            )
            images = [open_image(os.path.abspath(path), root) for path in prompt.images]
            inputs, layout = encode(
                self.processor, joined(prompt.messages()), images, add_generation_prompt=True
            )
            excess = layout.shape[1] + self.max_new_tokens - self.length
            if excess <= 0:
                return Fitted(prompt, inputs, layout)
            if overhead >= self.length:
                raise ValueError(
                    f"{layout.shape[1]} tokens that cannot be cut, and {self.max_new_tokens} for the answer, do not fit into the "
                    f"window of {self.length}"
                )
            overhead += excess  # pieces of text encode a little differently apart; an image left alone may be tiled

    def _image_tokens(self, size: tuple[int, int], several: bool) -> int:
        """Tokens that one image of this size adds to a prompt, alone or (`several`) beside another."""
        images = [Image.new("RGB", size)] * (1 + several)
        return (self._tokens(images, "?") - self._tokens([], "?")) // len(images)

    def _tokens(self, images: list[Image.Image], text: str) -> int:
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        return encode(
            self.processor,
            [{"role": "user", "content": content}],
            images,
            add_generation_prompt=True,
        )[1].shape[1]


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with adjacent texts as one part: chat templates put a blank or a newline between two."""
    found = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if parts and parts[-1]["type"] == part["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
        found.append({**message, "content": parts})
    return found
