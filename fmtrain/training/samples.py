"""Samples of the held-out answers as a run goes: a table in W&B, pictures and texts in
TensorBoard."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import rewrite_logs

from fmtrain.data.encode import Encoded
from fmtrain.data.views import views
from fmtrain.training.answers import Answered, Answers
from fmtrain.training.rows import even_places, sources_of


class Sample(NamedTuple):
    """A question with the number by which its answers are found. pictures: as the model gets them;
    prompt: the text that it gets, one placeholder for each picture."""

    number: int
    row_id: str
    pictures: list[Image.Image]
    prompt: str
    reference: str


class Samples:
    """`count` questions of each set of evaluation rows, of every source its share and the same ones
    at every evaluation; tables grow by them."""

    def __init__(self, count: int):
        self.count = count
        # by the prefix of a set's metrics, as below; with what they are of
        self._samples: dict[str, tuple[Answers, list[Sample]]] = {}
        self._tables: dict[str, Any] = {}
        self._pictured: set[str] = set()

    def log(self, answered: Answered, trainer: Trainer, prefix: str) -> None:
        """Of one evaluation, to what `report_to` names and training has opened; from the first
        process alone."""
        writers = []
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                writers.append(callback.tb_writer)
        to_wandb = "wandb" in trainer.args.report_to
        if not (trainer.is_world_process_zero() and self.count and (writers or to_wandb)):
            return
        if prefix not in self._samples or self._samples[prefix][0] is not answered.asked:
            self._samples[prefix] = answered.asked, samples(answered.asked, self.count)
            self._pictured.discard(prefix)
        step, [name] = trainer.state.global_step, rewrite_logs({f"{prefix}_samples": None})
        for writer in writers:
            self._to_tensorboard(writer, answered, prefix, name, step)
        if to_wandb:
            self._to_wandb(answered, prefix, name, step)

    def _to_wandb(self, answered: Answered, prefix: str, name: str, step: int) -> None:
        import wandb

        if wandb.run is None:  # an evaluation before training
            return
        if prefix not in self._tables:
            columns = ["step", "id", "pictures", "prompt", "reference", *map(str, answered.texts)]
            self._tables[prefix] = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        for sample in self._samples[prefix][1]:
            pictures = [wandb.Image(picture) for picture in sample.pictures]
            texts = [under[sample.number] for under in answered.texts.values()]
            self._tables[prefix].add_data(
                step, sample.row_id, pictures, sample.prompt, sample.reference, *texts
            )
        wandb.log({name: self._tables[prefix], "train/global_step": step})

    def _to_tensorboard(
        self, writer, answered: Answered, prefix: str, name: str, step: int
    ) -> None:
        """The pictures once, the texts at every step."""
        for k, sample in enumerate(self._samples[prefix][1]):
            texts = {"prompt": sample.prompt, "reference": sample.reference}
            texts |= {str(mask): under[sample.number] for mask, under in answered.texts.items()}
            blocks = []
            for heading, text in texts.items():
                quoted = "\n".join("    " + line for line in text.splitlines() or [""])
                blocks.append(f"{heading}:\n\n{quoted}")
            writer.add_text(f"{name}/{k}", "\n\n".join(blocks), step)
            if prefix in self._pictured:
                continue
            for at, picture in enumerate(sample.pictures):
                pixels = np.asarray(picture)
                writer.add_image(f"{name}/{k}/picture_{at}", pixels, step, dataformats="HWC")
        self._pictured.add(prefix)
        writer.flush()


def samples(asked: Answers, count: int) -> list[Sample]:
    """`count` of the questions, of every source its share."""
    taken, sources = [], sources_of(asked.rows)
    for number in even_places([sources[question.row] for question in asked.questions], count):
        question = asked.questions[number]
        encoded = asked.prompt(question)
        shown = int(encoded.layout.image.max()) + 1
        pictures = [view.image for view in views(asked.processor, encoded, shown)]
        row_id = str(asked.rows[question.row].get("id", question.row))
        prompt = _text(asked.processor, encoded)
        taken.append(Sample(number, row_id, pictures, prompt, question.reference))
    return taken


def _text(processor, encoded: Encoded) -> str:
    """The prompt as the model gets it, but for the tokens of a picture behind its first."""
    kept, before = [], -1
    images = encoded.layout.image[0].tolist()
    for token, image in zip(encoded.inputs["input_ids"][0].tolist(), images):
        if image < 0 or image != before:
            kept.append(token)
        before = image
    return processor.tokenizer.decode(kept)
