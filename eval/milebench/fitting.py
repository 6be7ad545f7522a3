"""A sample's prompt, cut so that the whole dialogue fits into the model's window, and encoded."""

import functools
import os
from dataclasses import dataclass

from PIL import Image

from eval.milebench.llava_prompt import llava_messages, llava_processor
from eval.milebench.prompt import Prompt, Window, build_prompt, image_paths
from eval.milebench.tasks import Sample, Task
from fmtrain.data import noise
from fmtrain.data.encode import Encoded, encode
from fmtrain.data.images import image_size, open_image


@dataclass(frozen=True)
class Fitted:
    """One sample ready for the model: its prompt as pred.json shows it, and encoded."""

    prompt: Prompt
    encoded: Encoded


class Fitter:
    """Fits repaired prompts into `length` tokens, room for `max_new_tokens` included.

    What an image costs is asked of the processor, for each size of image and for images alone or
    among others (OneVision tiles an image only when it is alone); so is what the chat template puts
    around the prompt.
    """

    def __init__(self, processor, length: int, max_new_tokens: int):
        self.processor, self.length, self.max_new_tokens = processor, length, max_new_tokens
        self.image_tokens = functools.cache(self._image_tokens)
        words = self.processor.tokenizer("?", add_special_tokens=False).input_ids
        self.template_tokens = self._tokens([]) - len(words)

    def fit(self, task: Task, sample: Sample, combined: int | None = None) -> Fitted:
        """The sample's prompt and its encoding.

        Raises `ValueError`, in one line, for an image that cannot be read, a text with the model's
        image placeholder, and a window too short for the instruction.
        """
        try:
            return self._fit(task, sample, combined)
        except ValueError as error:
            message = str(error)
            if not message.startswith(str(task.path)):
                message = f"{task.path}: sample {sample.sample_id}: {message}"
            raise ValueError(message) from error

    def _fit(self, task: Task, sample: Sample, combined: int | None) -> Fitted:
        root = os.path.dirname(os.path.abspath(task.path))
        paths = [os.path.abspath(path) for path in image_paths(task, sample, combined)]
        costs = tuple(self.image_tokens(image_size(path, root), len(paths) > 1) for path in paths)
        overhead = self.template_tokens + self.max_new_tokens
        while True:
            window = Window(self.length, costs, overhead)
            prompt = build_prompt(task, sample, self.processor.tokenizer, window, combined)
            images = [open_image(os.path.abspath(path), root) for path in prompt.images]
            messages = joined(prompt.messages())
            encoded = encode(self.processor, messages, images, add_generation_prompt=True)
            tokens = encoded.layout.shape[1]
            excess = tokens + self.max_new_tokens - self.length
            if excess <= 0:
                return Fitted(prompt, encoded)
            if overhead >= self.length:
                raise ValueError(
                    f"{tokens} tokens that cannot be cut, and {self.max_new_tokens} for the "
                    f"answer, do not fit into the window of {self.length}"
                )
            # Pieces of text encode a little differently apart; an image left alone may be tiled.
            overhead += excess

    def _image_tokens(self, size: tuple[int, int], several: bool) -> int:
        """Tokens that an image of this size adds to a prompt, alone or (`several`) with another."""
        images = [Image.new("RGB", size)] * (1 + several)
        return (self._tokens(images) - self._tokens([])) // len(images)

    def _tokens(self, images: list[Image.Image]) -> int:
        """Tokens of a prompt with these images and the question "?"."""
        messages = noise.turn(len(images), "?")
        encoded = encode(self.processor, messages, images, add_generation_prompt=True)
        return encoded.layout.shape[1]


class OriginalFitter(Fitter):
    """MileBench's prompts as its LLaVA worker feeds them, Llama-2 template included (Q21).

    They are cut at `length` tokens as there, without room for template and answer (Q17); what then
    passes the model's `positions` is refused, and so are images that cost different numbers of
    tokens.
    """

    def __init__(self, processor, length: int, max_new_tokens: int, positions: int):
        super().__init__(llava_processor(processor), length, max_new_tokens)
        self.positions = positions

    def _fit(self, task: Task, sample: Sample, combined: int | None) -> Fitted:
        root = os.path.dirname(os.path.abspath(task.path))
        paths = [os.path.abspath(path) for path in image_paths(task, sample, combined)]
        costs = {self.image_tokens(image_size(path, root), len(paths) > 1) for path in paths}
        per_image = tuple(sorted(costs)) if len(costs) > 1 else sum(costs)
        window = Window(self.length, per_image)
        tokenizer = self.processor.tokenizer
        prompt = build_prompt(task, sample, tokenizer, window, combined, original=True)
        prompt.messages()  # refuses images that do not fit the places (Q16)
        images = [open_image(os.path.abspath(path), root) for path in prompt.images]
        messages = llava_messages(prompt.text)
        encoded = encode(self.processor, messages, images, add_generation_prompt=True)
        tokens = encoded.layout.shape[1]
        if tokens + self.max_new_tokens > self.positions:
            raise ValueError(
                f"{tokens} tokens and {self.max_new_tokens} for the answer pass the model's "
                f"{self.positions} positions; give a smaller --window or --max_new_tokens"
            )
        return Fitted(prompt, encoded)


def joined(messages: list[dict]) -> list[dict]:
    """The messages with adjacent texts as one part.

    Chat templates put a blank or a newline between two.
    """
    joined = []
    for message in messages:
        parts: list[dict] = []
        for part in message["content"]:
            if parts and parts[-1]["type"] == part["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
        joined.append({**message, "content": parts})
    return joined
