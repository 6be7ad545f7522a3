"""Answers of a model: in batches, under one mask after another on the same image features.

Every evaluation answers here. Shape names: B rows, T tokens of the padded prompts, N tokens of the
longest answer, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from fmtrain.data import noise
from fmtrain.data.collator import batch, encode_row
from fmtrain.data.encode import Encoded, encode
from fmtrain.host import unwrap
from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask
from fmtrain.patch import Handle, attached
from fmtrain.sharded import is_sharded, most, outer_weights


@dataclass(frozen=True)
class EncodedFeatures:
    """Encoded dialogues whose pixels went through the tower: inputs [B, T], layout, features."""

    inputs: dict[str, torch.Tensor]
    layout: Layout
    features: Any  # what `get_image_features` returned for all images; None without images

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `forward` and `generate`.

        The features come in a fresh dict, as `generate` writes into it.
        """
        images = {} if self.features is None else {"mm_encoder_outputs": {"image": self.features}}
        return {**self.inputs, **self.layout.model_inputs(), **images}


class Decoder:
    """A model with an attached mask, its processor, and the tokens at which an answer ends.

    The model is left as it was: its generation config, and whether it is in training mode. Where
    weights are spread over processes, each has a decoder and calls `in_batches` at the same time.
    """

    def __init__(self, model: nn.Module, processor):
        self.model, self.processor = unwrap(model), processor
        self._outer, self.sharded = model, is_sharded(model)
        known = self.model.generation_config.eos_token_id
        ends = {
            *(known if isinstance(known, list) else [known]),
            processor.tokenizer.eos_token_id,
            _taught_end(processor),
        }
        self.ends = sorted(ends - {None})
        self.never = [self.model.config.image_token_id]  # an image that there is not
        # `generate` fills the gaps of a request from the model's config, and a checkpoint's may ask
        # for sampling or a repetition penalty.
        self.config = GenerationConfig(
            eos_token_id=self.ends,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=self.never,
        )

    def run_tower(self, rows: Sequence[Encoded], padding_side: str = "left") -> EncodedFeatures:
        """Pad encoded dialogues and run the vision tower on their images, once."""
        inputs, layout = batch(self.processor, rows, padding_side).to(self.model)
        tower = self.model.base_model.get_image_features
        pixels = {}
        for name in inspect.signature(tower).parameters:
            if name in inputs:
                pixels[name] = inputs.pop(name)
        if not pixels:
            if self.sharded:
                self.run_tower([self._blank()])  # as the other processes may
            return EncodedFeatures(inputs, layout, None)
        with torch.no_grad(), self._evaluating(), outer_weights(self._outer):
            return EncodedFeatures(inputs, layout, tower(**pixels, return_dict=True))

    def in_batches(
        self, rows: Sequence[Encoded], masks: Sequence[Mask], batch_size: int, **settings
    ) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Answer prompts under every mask, those of about one length together.

        Yields for each batch the indices of its prompts and, mask by mask, their answers.
        """
        order = sorted(range(len(rows)), key=lambda k: rows[k].layout.shape[1])
        batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
        if self.sharded:
            batches += [[]] * (most(len(batches), self.model.device) - len(batches))
        for indices in batches:
            prompts, texts = self.run_tower([rows[k] for k in indices] or [self._blank()]), []
            for mask in masks:
                with self.under(mask):
                    answers = self.answers(prompts, **settings)
                texts.append([self.text(answer) for answer in answers])
            if indices:
                yield indices, texts

    def under(self, mask: str | Mask) -> contextlib.AbstractContextManager[Handle]:
        """The model under another mask for a while."""
        return attached(self.model).under(mask)

    def answers(self, prompts: EncodedFeatures, **settings) -> list[list[int]]:
        """Ids of each row's answer, its end token included if it came to that.

        settings: of `GenerationConfig`; greedy unless they say otherwise.
        """
        config = GenerationConfig(**settings)
        with self._evaluating(), outer_weights(self._outer):
            out = self.model.generate(**prompts.kwargs(), generation_config=config)
        return [self._ended(row) for row in out[:, prompts.layout.shape[1] :].tolist()]

    def text(self, answer: list[int]) -> str:
        """An answer without special tokens and without blanks around it."""
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    @torch.no_grad()
    def forced(self, prompts: EncodedFeatures, answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """The logits [N, V] of each answer's tokens by teacher forcing: one forward over it all.

        prompts are padded on the left. Raises `ValueError` for an answer without a token.
        """
        if not all(answers):
            raise ValueError("an answer has no token to force")
        longest, device = max(map(len, answers)), prompts.layout.role.device
        lengths = torch.tensor([len(answer) for answer in answers], device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        nothing = torch.full(real.shape, -1, device=device)
        role = torch.where(real, int(Role.ANSWER), int(Role.PAD))
        answer_layout = Layout(role, nothing, nothing, torch.where(real, 0, -1))
        layout = Layout.cat([prompts.layout, answer_layout], dim=1)
        pad = self.config.pad_token_id
        padded = [answer + [pad] * (longest - len(answer)) for answer in answers]
        forced = torch.tensor(padded, device=device)
        inputs = {
            "input_ids": torch.cat([prompts.inputs["input_ids"], forced], dim=1),
            "attention_mask": layout.real.long(),
            "position_ids": layout.positions(),
        }
        whole = EncodedFeatures({**prompts.inputs, **inputs}, layout, prompts.features)
        with self._evaluating():
            out = self.model(**whole.kwargs(), use_cache=False, logits_to_keep=longest + 1)
        return [row[: len(answer)] for row, answer in zip(out.logits, answers)]

    def shortfalls(
        self, prompts: EncodedFeatures, answers: Sequence[list[int]]
    ) -> list[list[float]]:
        """How far each greedy token's teacher-forced logit lies below the largest one.

        Relative to the largest absolute logit: 0.0 where teacher forcing re-derives the token
        (argmax), which it must but for rounding. No answer has the token of an image, nor starts
        with an end token (where `min_new_tokens` is 1); those are left out.
        """
        gaps = []
        for logits, answer in zip(self.forced(prompts, answers), answers):
            logits = logits.double()
            scale = logits.abs().max().clamp(min=1.0)
            logits[0, self.ends] = logits[:, self.never] = -torch.inf
            taken = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
            gaps.append(((logits.amax(1) - taken) / scale).tolist())
        return gaps

    def _blank(self) -> Encoded:
        """A row with an image, for a process that has none left."""
        return encode_row(self.processor, noise.rows()[1])

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids up to the first end token, which is kept."""
        for k, token in enumerate(ids):
            if token in self.ends:
                return ids[: k + 1]
        return ids

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode with our generation config, for a while."""
        config, training = self.model.generation_config, self.model.training
        self.model.generation_config = self.config
        self.model.eval()
        try:
            yield
        finally:
            self.model.generation_config = config
            self.model.train(training)


def _taught_end(processor) -> int:
    """The token that ended the answers in training."""
    turns = [{"role": role, "content": "?"} for role in ("user", "assistant")]
    inputs, layout = encode(processor, turns, [])
    return int(inputs["input_ids"][layout.answer][-1])


def right(answer: str, reference: str) -> int:
    """1 if the answer is the reference but for case and blanks, else 0."""
    return int(answer.casefold().split() == reference.casefold().split())
