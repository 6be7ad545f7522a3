"""Answers on held-out rows while a model trains: what they score, under the mask in training and
under others.

Losses under two masks compare nothing; answers do. Wherever the evaluation loss is computed, the
questions of the evaluation rows are answered as every evaluation answers (`fmtrain.decoding`).
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import datasets
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from trl import SFTConfig

from fmtrain.data.collator import encode_prompt
from fmtrain.data.dialogue import turns
from fmtrain.data.encode import Encoded
from fmtrain.data.render import markers
from fmtrain.decoding import Decoder
from fmtrain.masks import Mask, beside
from fmtrain.patch import attach, attached
from fmtrain.training.arguments import EvaluationArguments
from fmtrain.training.interval import mean_with_interval
from fmtrain.training.metrics import METRICS, check_reference, metric_of, unmarked
from fmtrain.training.rows import evenly
from fmtrain.training.tracking import say

SCORE = "score"  # each answer by its own metric, where there are several


class Question(NamedTuple):
    """row: its number among the rows that are answered; turn: of the row's assistant turns."""

    row: int
    turn: int
    reference: str
    metric: str


@dataclass(frozen=True)
class Answers:
    """The rows whose questions are answered, and how.

    rows: with their image folders. masks: beside the one in training. batch_size: questions that
    one process answers together.
    """

    processor: object
    rows: datasets.Dataset
    questions: list[Question]
    masks: tuple[Mask, ...]
    batch_size: int
    max_new_tokens: int
    max_pixels: int

    @property
    def sources(self) -> set[str]:
        """What the rows are from; of rows that do not say it, ""."""
        if "source" not in self.rows.column_names:
            return {""}
        return set(map(unmarked, self.rows["source"]))

    @cached_property
    def metrics(self) -> dict[str, list[int]]:
        """The metrics that are measured, and the numbers of the questions that each is of."""
        found: dict[str, list[int]] = {}
        for number, question in enumerate(self.questions):
            found.setdefault(question.metric, []).append(number)
        return found if len(found) == 1 else {**found, SCORE: list(range(len(self.questions)))}

    def names(self, prefix: str) -> list[str]:
        """The names of what `measured` gives for a prefix, but for intervals, numbers and time."""
        names = []
        for infix in ["", *map(infix_of, self.masks)]:
            names += [f"{prefix}_{infix}{metric}" for metric in self.metrics]
        return names

    def prompt(self, question: Question) -> Encoded:
        """What generation is fed for a question."""
        row = self.rows[question.row]
        turn = turns(row)[question.turn]
        return encode_prompt(self.processor, row, turn, max_pixels=self.max_pixels)

    def answered(self, model: nn.Module, accelerator: Accelerator) -> "Answered":
        """The answers under every mask. Every process calls it, answers the questions of its share
        of the rows, and gets all."""
        began, processes = time.perf_counter(), accelerator.num_processes
        own = attached(model).mask
        masks = list(dict.fromkeys([own, *self.masks]))
        share = []
        for number, question in enumerate(self.questions):
            if question.row % processes == accelerator.process_index:
                share.append(number)
        with accelerator.autocast(), self._on_a_backend(model):
            texts = self._texts(model, share, masks)
        everything, slowest = [""] * len(self.questions), 0.0
        for of_process, seconds in gather_object([(texts, time.perf_counter() - began)]):
            slowest = max(slowest, seconds)
            for number, under in of_process.items():
                everything[number] = under
        by_mask = {mask: [under[k] for under in everything] for k, mask in enumerate(masks)}
        return Answered(self, own, by_mask, slowest)

    def _texts(self, model: nn.Module, share: list[int], masks: list[Mask]) -> dict[int, list[str]]:
        """By the number of the question its answers, mask by mask."""
        decoder, found = Decoder(model, self.processor), {}
        prompts = [self.prompt(self.questions[number]) for number in share]
        settings = {"max_new_tokens": self.max_new_tokens}
        for indices, answers in decoder.in_batches(prompts, masks, self.batch_size, **settings):
            for at, k in enumerate(indices):
                found[share[k]] = [under[at] for under in answers]
        return found

    @contextlib.contextmanager
    def _on_a_backend(self, model: nn.Module) -> Iterator[None]:
        """Where the model's own attention serves in training, which is causal, a backend of
        fmtrain's serves meanwhile if a mask looks ahead."""
        handle = attached(model)
        if not handle.host or not any(mask.looks_ahead for mask in self.masks):
            yield
            return
        own, marks = handle.mask, markers(self.processor)
        handle.detach()
        try:
            with attach(model, own, markers=marks, packed=True):
                yield
        finally:
            attach(model, own, markers=marks)


@dataclass(frozen=True)
class Answered:
    """The answers of one evaluation: by mask, the one in training first, the texts in the order of
    the questions; and the seconds of the slowest process."""

    asked: Answers
    own: Mask
    texts: dict[Mask, list[str]]
    seconds: float

    def measured(self, prefix: str) -> dict[str, float]:
        """Each metric with its interval under the mask in training (`eval_exact_match`,
        `eval_exact_match_low`, `eval_exact_match_high`) and under the others
        (`eval_causal_exact_match` ..), `questions`, how many there were, and `answer_seconds`."""
        found: dict[str, float] = {}
        lines = []
        for infix, mask in [("", self.own), *((infix_of(mask), mask) for mask in self.asked.masks)]:
            for metric, numbers in self.asked.metrics.items():
                mean, low, high = self._scored(mask, numbers)
                name = f"{prefix}_{infix}{metric}"
                found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
                interval = f"({100 * low:.1f} to {100 * high:.1f})"
                lines.append(f"{metric} {100 * mean:.1f} % {interval} under {mask}")
        count = len(self.asked.questions)
        say(f"{count} held-out answers in {self.seconds:.1f} s: {'; '.join(lines)}")
        found[f"{prefix}_questions"] = count
        return {**found, f"{prefix}_answer_seconds": round(self.seconds, 3)}

    def _scored(self, mask: Mask, numbers: list[int]) -> tuple[float, float, float]:
        scores = []
        questions = [self.asked.questions[number] for number in numbers]
        for number, question in zip(numbers, questions):
            score = METRICS[question.metric]
            scores.append(score(self.texts[mask][number], question.reference))
        return mean_with_interval(scores, [question.row for question in questions])


def infix_of(mask: Mask) -> str:
    """What names a mask inside the name of a metric, whose letters W&B limits."""
    return str(mask).replace("+", "_") + "_"


def other_masks(names: Iterable | None, own: Mask) -> tuple[Mask, ...]:
    """`eval_masks`; a light form by its name pools as the mask in training, where that is one.

    Raises `ValueError` for an unknown mask, and for one that is named twice.
    """
    masks: dict[str, Mask] = {}
    for name in names or ():
        mask = beside(name, own)
        if infix_of(mask) in masks:
            raise ValueError(f"eval_masks names {mask} twice")
        masks[infix_of(mask)] = mask
    return tuple(masks.values())


def check_answers(training: SFTConfig, evaluation: EvaluationArguments, mask: Mask) -> None:
    """Raises `ValueError` for masks that do not exist, for early stopping without a metric, and for
    answers under FSDP's first version, whose inner modules cannot be called."""
    other_masks(evaluation.eval_masks, mask)
    wanted, evaluates = evaluation.eval_answers, training.eval_strategy != "no"
    if evaluation.early_stopping_patience is not None:
        if not evaluates or training.metric_for_best_model is None:
            raise ValueError(
                f"early_stopping_patience {evaluation.early_stopping_patience} needs eval_strategy "
                "and metric_for_best_model"
            )
    if not evaluates or not wanted:
        return
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    version = os.environ.get("FSDP_VERSION", "1") if launched else "2"
    if training.fsdp:
        version = str(training.fsdp_plugin_args["fsdp_version"])
    if version == "1":
        raise ValueError(
            f"eval_answers {wanted}: not under FSDP's first version; say `fsdp_version: 2`, or "
            "`eval_answers: 0`"
        )


def answers_of(
    training: SFTConfig,
    evaluation: EvaluationArguments,
    mask: Mask,
    max_pixels: int,
    processor,
    rows: datasets.Dataset,
) -> Answers | None:
    """What is answered of evaluation rows: `eval_answers` of them, of every source its share; None
    where that is 0. Raises `ValueError` for a reference that its metric cannot score."""
    if not evaluation.eval_answers:
        return None
    taken, questions = evenly(rows, evaluation.eval_answers), []
    for number, row in enumerate(taken):
        metric = metric_of(row.get("source"), evaluation.eval_metrics)
        for turn in turns(row):
            if turn.context:
                continue
            try:
                check_reference(metric, turn.reference)
            except ValueError as error:
                raise ValueError(f"evaluation row {row.get('id', '?')}: {error}") from error
            questions.append(Question(number, turn.index, turn.reference, metric))
    return Answers(
        processor,
        taken,
        questions,
        other_masks(evaluation.eval_masks, mask),
        training.per_device_eval_batch_size,
        evaluation.eval_max_new_tokens,
        max_pixels,
    )


def check_metrics(
    training: SFTConfig, evaluation: EvaluationArguments, answers: dict[str, Answers]
) -> None:
    """Raises `ValueError` for a key of `eval_metrics` that no evaluation row's source begins with,
    and for a `metric_for_best_model` of answers that no evaluation gives."""
    if training.eval_strategy == "no":
        return
    sources = set()
    for asked in answers.values():
        sources |= asked.sources
    for key in evaluation.eval_metrics:
        if not any(source.startswith(key) for source in sources):
            known = ", ".join(sorted(sources))
            raise ValueError(f"eval_metrics names {key!r}, but the evaluation rows are of {known}")
    best = training.metric_for_best_model
    if best is None or not best.endswith((*METRICS, SCORE)):
        return
    names = []
    for prefix, asked in answers.items():
        names += asked.names(prefix)
    if f"eval_{best.removeprefix('eval_')}" not in names:
        known = ", ".join(names) or "none, as nothing is answered"
        raise ValueError(f"metric_for_best_model {best}: the metrics of answers are {known}")
