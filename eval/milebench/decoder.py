"""Answers of a model: greedy, in batches, under one policy after another on the same image features.

Both evaluations (`generate`, and the lmms-eval adapter `eval.lmms`) decode here. Shape names: B rows, T tokens of the
padded prompts, N tokens of the longest answer, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from fmtrain.audit import on
from fmtrain.data.collator import batch
from fmtrain.data.encode import encode
from fmtrain.layout import Layout, Role
from fmtrain.merge import Merge
from fmtrain.patch import attached, unwrap
from fmtrain.policies import Policy
from fmtrain.training.recipe import MaskArguments


@dataclass(frozen=True)
class Variant:
    """A policy to answer under; `name` as on the command line, e.g. "v2v+merge"."""

    name: str
    policy: Policy
    merge: Merge | None


def variant(name: str, merge_prefix: str = "1", merge_kernel_size: int = 3) -> Variant:
    """What "v2v" or "v2v+merge" means. Raises `ValueError` for an unknown policy or one that has nothing to merge."""
    return Variant(
        name,
        *MaskArguments(
            mask=name, merge_prefix=merge_prefix, merge_kernel_size=merge_kernel_size
        ).policy(),
    )


@dataclass(frozen=True)
class Batch:
    """Encoded dialogues, padded: the text's inputs [B, T], their layout, and the features of all their images."""

    inputs: dict[str, torch.Tensor]
    layout: Layout
    features: Any  # what `get_image_features` returned; None without images

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of `forward` and `generate`; a fresh dict for the features, as `generate` writes into it."""
        images = {} if self.features is None else {"mm_encoder_outputs": {"image": self.features}}
        return {**self.inputs, **self.layout.model_inputs(), **images}


class Decoder:
    """A model with an attached policy, its processor, and the tokens at which an answer ends."""

    def __init__(self, model, processor):
        self.model, self.processor, self.inner = model.eval(), processor, unwrap(model)
        known = self.inner.generation_config.eos_token_id
        ends = {
            *(known if isinstance(known, list) else [known]),
            processor.tokenizer.eos_token_id,
            _taught_end(processor),
        }
        self.ends = sorted(ends - {None})
        self.never = [
            self.inner.config.image_token_id
        ]  # in an answer: it would stand for an image that there is not
        # A checkpoint may ask for sampling or a repetition penalty; generate would fill the gaps of a request with that.
        self.inner.generation_config = GenerationConfig(
            eos_token_id=self.ends,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=self.never,
        )

    def batch(
        self, encoded: Sequence[tuple[dict[str, torch.Tensor], Layout]], padding_side: str = "left"
    ) -> Batch:
        """Pad encoded dialogues and run the vision tower on their images, once."""
        inputs, layout = batch(self.processor, list(encoded), padding_side)
        inputs = on(self.model.device, self.model.dtype, inputs)
        tower = self.inner.base_model.get_image_features
        pixels = {
            name: inputs.pop(name) for name in inspect.signature(tower).parameters if name in inputs
        }
        if not pixels:
            return Batch(inputs, layout.to(self.model.device), None)
        with torch.no_grad():
            return Batch(inputs, layout.to(self.model.device), tower(**pixels, return_dict=True))

    def under(self, chosen: Variant):
        """The model under another policy for a while."""
        return attached(self.model).under(chosen.policy, chosen.merge)

    def answers(self, prompts: Batch, **settings) -> list[list[int]]:
        """Ids of each row's answer, its end token included if it came to that. settings: of `GenerationConfig`."""
        config = GenerationConfig(**settings)
        out = self.model.generate(**prompts.model_inputs(), generation_config=config)
        rows = out[:, prompts.layout.shape[1] :].tolist()
        return [
            row[: 1 + next((k for k, token in enumerate(row) if token in self.ends), len(row))]
            for row in rows
        ]

    def text(self, answer: list[int]) -> str:
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    @torch.no_grad()
    def forced(self, prompts: Batch, answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """The logits [n, V] that teacher forcing gives at each answer token: one forward over prompts and answers.

        prompts are padded on the left. Raises `ValueError` for an answer without a token.
        """
        if not all(answers):
            raise ValueError("an answer has no token to force")
        longest = max(map(len, answers))
        device = prompts.layout.role.device
        lengths = torch.tensor([len(answer) for answer in answers], device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        nothing = torch.full(real.shape, -1, device=device)
        role = torch.where(real, int(Role.ANSWER), int(Role.PAD))
        layout = Layout.cat(
            [prompts.layout, Layout(role, nothing, nothing, torch.where(real, 0, -1))], dim=1
        )
        pad = self.inner.generation_config.pad_token_id
        forced = torch.tensor(
            [answer + [pad] * (longest - len(answer)) for answer in answers], device=device
        )
        inputs = {
            "input_ids": torch.cat([prompts.inputs["input_ids"], forced], dim=1),
            "attention_mask": (layout.role != Role.PAD).long(),
            "position_ids": layout.positions(),
        }
        whole = Batch({**prompts.inputs, **inputs}, layout, prompts.features)
        logits = self.model(
            **whole.model_inputs(), use_cache=False, logits_to_keep=longest + 1
        ).logits
        return [row[: len(answer)] for row, answer in zip(logits, answers)]

    def shortfalls(self, prompts: Batch, answers: Sequence[list[int]]) -> list[list[float]]:
        """How far each greedy token's teacher-forced logit lies below the largest one, relative to the largest absolute
        logit: 0.0 where teacher forcing re-derives the token (argmax), which it must but for rounding.

        No answer has the token of an image, nor starts with an end token (`min_new_tokens` is 1); those are left out.
        """
        found = []
        for logits, answer in zip(self.forced(prompts, answers), answers):
            logits = logits.double()
            scale = logits.abs().max().clamp(min=1.0)
            logits[0, self.ends] = logits[:, self.never] = -torch.inf
            chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
            found.append(((logits.amax(1) - chosen) / scale).tolist())
        return found


def _taught_end(processor) -> int:
    """The token that ended the answers in training."""
    turns = [("user", "?"), ("assistant", "?")]
    inputs, layout = encode(
        processor, [{"role": role, "content": text} for role, text in turns], []
    )
    return int(inputs["input_ids"][layout.role == Role.ANSWER][-1])
