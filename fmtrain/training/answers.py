"""Answers on held-out rows while a model trains: what share of them is exactly right.

Losses under two masks compare nothing; answers do. Wherever the evaluation loss is computed, the
questions of the evaluation rows are answered as every evaluation answers (`fmtrain.decoding`),
under the mask in training.
"""

import os
import time
from dataclasses import dataclass

import datasets
import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig

from fmtrain.data.collator import encode_prompt
from fmtrain.data.dialogue import Turn, turns
from fmtrain.decoding import Decoder, right
from fmtrain.patch import attached
from fmtrain.training.arguments import EvaluationArguments
from fmtrain.training.tracking import say


@dataclass(frozen=True)
class Answers:
    """The rows whose questions are answered, and how.

    rows: with their image folders. batch_size: questions that one process answers together.
    """

    processor: object
    rows: datasets.Dataset
    batch_size: int
    max_new_tokens: int
    max_pixels: int

    def metrics(self, model: nn.Module, accelerator: Accelerator, prefix: str) -> dict[str, float]:
        """`exact_match`, the share of answers that are the reference (`fmtrain.decoding.right`),
        `questions`, how many there were, and `answer_seconds`, with the prefix `eval`.

        Every process calls it and answers the questions of its share of the rows.
        """
        began, processes = time.perf_counter(), accelerator.num_processes
        share = self.rows.select(range(accelerator.process_index, len(self.rows), processes))
        questions = []
        for row in share:
            questions += [(row, turn) for turn in turns(row) if not turn.context]
        with accelerator.autocast():
            correct = self._right(model, questions)
        here = [correct, len(questions), time.perf_counter() - began]
        gathered = accelerator.gather(torch.tensor(here, device=accelerator.device))
        of_processes = gathered.view(processes, 3).cpu()
        correct, asked = of_processes[:, :2].sum(0).int().tolist()
        seconds = of_processes[:, 2].max().item()
        say(f"{correct} of {asked} held-out answers right, in {seconds:.1f} s")
        return {
            f"{prefix}_exact_match": correct / asked,
            f"{prefix}_questions": asked,
            f"{prefix}_answer_seconds": round(seconds, 3),
        }

    def _right(self, model: nn.Module, questions: list[tuple[dict, Turn]]) -> int:
        decoder = Decoder(model, self.processor)
        prompts = []
        for row, turn in questions:
            prompts.append(encode_prompt(self.processor, row, turn, max_pixels=self.max_pixels))
        settings = {"max_new_tokens": self.max_new_tokens}
        masks, correct = [attached(model).mask], 0
        for indices, [texts] in decoder.in_batches(prompts, masks, self.batch_size, **settings):
            for k, text in zip(indices, texts):
                correct += right(text, questions[k][1].reference)
        return correct


def check_answers(training: SFTConfig, evaluation: EvaluationArguments) -> None:
    """Raises `ValueError` for answers under FSDP and ZeRO-3, where every process would have to run
    each module as often as all others."""
    wanted = evaluation.eval_answers
    if training.eval_strategy == "no" or not wanted:
        return
    if training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(f"eval_answers {wanted}: not under FSDP; say `eval_answers: 0`")
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"eval_answers {wanted}: not under ZeRO-3; say `eval_answers: 0`")


def answers_of(
    training: SFTConfig,
    evaluation: EvaluationArguments,
    max_pixels: int,
    processor,
    rows: datasets.Dataset,
) -> Answers | None:
    """What is answered of evaluation rows: `eval_answers` of them, evenly from all; None where that
    is 0."""
    if not evaluation.eval_answers:
        return None
    count = min(evaluation.eval_answers, len(rows))
    taken = rows.select([k * len(rows) // count for k in range(count)])
    return Answers(
        processor,
        taken,
        training.per_device_eval_batch_size,
        evaluation.eval_max_new_tokens,
        max_pixels,
    )
