"""The layout of a forward that brings none: read off the ids.

On an empty cache the answers of earlier turns stand between two marks of the chat template, and the
rest is prefill; a token on a cache means decoding. Shape names: B rows, T tokens.
"""

from dataclasses import asdict, dataclass

import torch

from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask

# Of a forward, what carries videos or sounds: parts of its keywords' names, tokens of the config
OTHER_INPUTS = ("video", "audio", "input_features")
OTHER_TOKENS = ("video_token_id", "audio_token_id")


@dataclass(frozen=True)
class Markers:
    """The ids between which a chat template's answers stand."""

    header: tuple[int, ...]  # in which every prompt ends
    end: int  # the last id of every answer
    ends_all: bool  # whether `end` stands behind other turns too, as in ChatML

    def record(self) -> dict:
        """What a checkpoint's `config.json` says under `fmtrain` as `markers`."""
        return asdict(self) | {"header": list(self.header)}

    @classmethod
    def from_record(cls, record: dict) -> "Markers":
        """Raises `ValueError` for what is no record."""
        try:
            header = tuple(int(token) for token in record["header"])
            return cls(header, int(record["end"]), bool(record["ends_all"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the record of the markers is malformed: {record!r:.80}") from error

    def answers(self, ids: list[int]) -> list[tuple[int, int]]:
        """Where the answers of a dialogue stand, end tokens included: (start, stop) of each.

        Raises `ValueError` where the ids can be read in more than one way: a header without an end
        token behind it that is not the last thing, an end token without a header.
        """
        size = len(self.header)
        headers = []  # positions behind each
        for stop in range(size, len(ids) + 1):
            if ids[stop - 1] == self.header[-1] and tuple(ids[stop - size : stop]) == self.header:
                headers.append(stop)
        ends, spans = [k for k, token in enumerate(ids) if token == self.end], []
        for start, following in zip(headers, [*headers[1:], None]):
            limit = len(ids) if following is None else following - size
            inside = [end for end in ends if start <= end < limit]
            if inside:
                spans.append((start, inside[0] + 1))
            elif start < len(ids):
                raise ValueError(
                    f"the header of an answer ends at token {start}, and no end token closes it"
                )
        alone = set(ends) - {stop - 1 for _, stop in spans}
        if alone and not self.ends_all:
            raise ValueError(f"the end token at {min(alone)} closes no answer")
        return spans


def padded(kwargs: dict) -> bool:
    """Whether the padding mask among a forward's keywords closes any token."""
    mask = kwargs.get("attention_mask")
    return mask is not None and not bool(mask.all())


def check_padding(layout: Layout, mask: torch.Tensor | None) -> None:
    """Raises `ValueError` for a layout and a padding mask [B, T] that contradict each other."""
    if mask is None:
        return
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions; beside a layout it is the 2D padding mask"
        )
    if tuple(mask.shape) != layout.shape:
        return  # a forward of another length says so itself
    wrong = (mask.bool() != layout.real.to(mask.device)).nonzero()
    if len(wrong):
        row, token = wrong[0].tolist()
        raise ValueError(
            f"row {row}, token {token}: the layout and the 2D padding mask say different things "
            f"about padding ({len(wrong)} tokens in all)"
        )


def check_inputs(kwargs: dict, config, mask: Mask, layout: Layout) -> None:
    """Raises `ValueError` for keywords of a forward that the layout of its own tokens does not fit:
    images at other places and, under a mask that looks ahead and would take them for text, videos
    and sounds."""
    if mask.looks_ahead:
        _check_media(kwargs, config, mask, layout)
    ids = kwargs.get("input_ids")
    if ids is None:
        return
    wrong = ((ids == config.image_token_id) != layout.visual) & layout.real & ~layout.answer
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        only = "the layout alone shows" if layout.visual[row, token] else "the ids alone show"
        raise ValueError(
            f"row {row}, token {token}: {only} an image there ({int(wrong.sum())} such tokens in "
            "all): the layout is that of another row"
        )


def _check_media(kwargs: dict, config, mask: Mask, layout: Layout) -> None:
    given = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
    ahead = kwargs.get("mm_encoder_outputs") or {}  # computed ahead, as `generate` does
    given += [f"{name} features" for name, value in ahead.items() if value is not None]
    found = [name for name in given if any(word in name for word in OTHER_INPUTS)]
    ids = kwargs.get("input_ids")
    for medium in OTHER_TOKENS if ids is not None and not found else ():
        token = getattr(config, medium, None)
        if token is not None and bool(((ids == token) & ~layout.answer).any()):
            found.append(f"the config's {medium} ({token}) among its ids")
    if found:
        raise ValueError(
            f"mask '{mask}' with {found[0]}: only images are told from text; videos and sounds are "
            "served under causal alone"
        )


def repeated(layout: Layout, rows: int) -> Layout:
    """The layout of a prompt for each of its `rows` beams or samples. Raises `ValueError` if they
    are no multiple."""
    if rows % layout.shape[0]:
        raise ValueError(f"the layout has {layout.shape[0]} rows, the prompt {rows}")
    return layout.map(lambda tensor: tensor.repeat_interleave(rows // layout.shape[0], dim=0))


def infer(
    kwargs: dict,
    config,
    mask: Mask,
    markers: Markers | None,
    rows: int,
    length: int,
    seen: int,
) -> Layout:
    """The layout [B, seen + length] of a forward with the keywords `kwargs` on a cache of `seen`
    tokens.

    Raises `ValueError` for what the ids cannot tell: several tokens on a cache, embeddings without
    ids, images that do not fit the runs of image tokens, and where answers stand.
    """
    ids, padding = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if seen and length > 1 and mask.looks_ahead:
        raise ValueError(
            f"{length} tokens arrive on a cache of {seen} under the mask '{mask}': a "
            "chunk of a prefill would lose what the policy reveals; prefill in one go, or for "
            "a new turn pass the layout of the whole row"
        )
    if ids is None and not seen:
        raise ValueError("inputs_embeds say nothing about images: pass layout.model_inputs()")
    if padding is None:
        device = (kwargs["inputs_embeds"] if ids is None else ids).device
        padding = torch.ones(rows, seen + length, dtype=torch.bool, device=device)
    elif padding.ndim != 2:
        raise ValueError(
            f"attention_mask has {padding.ndim} dimensions; with a policy attached it is the 2D "
            f"padding mask"
        )
    real = padding.bool()
    if seen:
        role = torch.where(real, int(Role.ANSWER), int(Role.PAD))
        nothing = torch.full_like(role, -1)
        return Layout(role, nothing, nothing, torch.where(real, 0, -1))
    assert ids is not None
    visual = (ids == config.image_token_id) & real
    image = _image_index(visual, kwargs, config, mask)
    answer = _answers(ids, real, markers) if mask.looks_ahead else torch.zeros_like(real)
    layout = _layout(visual, real, image, answer)
    if mask.looks_ahead:
        _check_groups(layout, kwargs.get("batch_num_images"))
    return layout


def _answers(ids: torch.Tensor, real: torch.Tensor, markers: Markers | None) -> torch.Tensor:
    """Which tokens are answers of earlier turns, bool [B, T]."""
    if markers is None:
        raise ValueError(
            "nothing says how the chat template marks its answers, so the ids do not tell a "
            "dialogue from one turn: pass layout.model_inputs(), or attach with "
            "markers=fmtrain.markers(processor)"
        )
    answer = torch.zeros_like(real)
    for row, tokens in enumerate(ids.tolist()):
        index = real[row].nonzero().flatten()
        try:
            spans = markers.answers([tokens[k] for k in index.tolist()])
        except ValueError as error:
            raise ValueError(
                f"row {row}: the ids do not tell where its answers stand ({error}): pass "
                "layout.model_inputs()"
            ) from error
        for start, stop in spans:
            answer[row, index[start:stop]] = True
    return answer


def _check_groups(layout: Layout, groups) -> None:
    """llava-onevision tiles an image that is alone in its group, and in training a group is a
    prefill."""
    if groups is None:
        return
    prefills = 0
    for prefill, visual in zip(layout.prefill, layout.visual):
        prefills += len(prefill[visual].unique())
    if prefills != len(groups):
        raise ValueError(
            f"the images stand in {prefills} turns, but the processor was given {len(groups)} "
            "groups, and tiled them otherwise than in training: use encode, or the processor with "
            "images=[those of the first turn, those of the next, ..]"
        )


def _image_index(visual: torch.Tensor, kwargs: dict, config, mask: Mask) -> torch.Tensor:
    """Index of each visual token's image in its row [B, T]: a run of image tokens is one image."""
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    images, kind = kwargs.get("image_sizes"), config.model_type
    if images is None and kind == "llava":
        images = kwargs.get("pixel_values")  # one entry an image
    if images is None and kind != "internvl":  # which marks where an image ends
        ahead = kwargs.get("mm_encoder_outputs") or {}  # computed ahead, as `generate` does
        features = ahead.get("image")
        images = None if features is None else features.pooler_output
    if mask.policy.within_image and images is not None and len(images) != int(starts.sum()):
        raise ValueError(
            f"{len(images)} images make {int(starts.sum())} runs of image tokens, so the ids do "
            "not tell where one image ends: pass layout.model_inputs()"
        )
    return starts.long().cumsum(1) - 1


def _layout(
    visual: torch.Tensor, real: torch.Tensor, image: torch.Tensor, answer: torch.Tensor
) -> Layout:
    role = torch.where(real, int(Role.TEXT), int(Role.PAD)).masked_fill(visual, int(Role.VISUAL))
    role = role.masked_fill(answer, int(Role.ANSWER))
    ended = answer.clone()
    ended[:, :-1] &= ~answer[:, 1:]  # the last token of each answer
    prefill = torch.where(real & ~answer, ended.long().cumsum(1), -1)
    visual = visual & ~answer
    return Layout(role, torch.where(visual, image, -1), prefill, torch.where(real, 0, -1))
