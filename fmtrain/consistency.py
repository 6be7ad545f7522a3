"""Does the model see in training what it will see in inference? The checks, on a real model and
real rows.

The prompt ids of training are those of generation, and those that transformers makes of the same
dialogue with the processor's chat template; teacher-forced logits equal those of prefill and
cached decoding; changing any later token leaves earlier logits bit-identical; a mask that reveals
something changes the logits; and what every layer computes is the reference attention of the mask,
in training mode, in evaluation and inside `generate`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fmtrain.attention import attend, flash, kernels
from fmtrain.data.collator import batch, encode_prompt, encode_row
from fmtrain.data.dialogue import Turn, turns, typed
from fmtrain.data.encode import Encoded
from fmtrain.data.images import open_image
from fmtrain.host import PLAN, unwrap
from fmtrain.infer import OTHER_TOKENS
from fmtrain.layout import Layout, Role
from fmtrain.masks import Allowed
from fmtrain.patch import attached

# Two ways to the same number differ by rounding: by how much, in units of what one rounding does.
LAYER_ROUNDINGS = 8.0  # of one attention call, against the bound in `rounding_of_attention`
LOGIT_ROUNDINGS = 32.0  # of the whole model, against what `rounding_of_logits` measures
SIGNS = 3  # random roundings tried out


@dataclass(frozen=True)
class Result:
    """The outcome of one check, with the figure that it rests on."""

    check: str
    passed: bool
    figure: str


def answer_spans(layout: Layout) -> list[tuple[int, int]]:
    """Where the answers of the first row stand: (start, stop) of each, in tokens."""
    answer = layout.answer[0].tolist()
    spans = []
    for position, inside in enumerate([*answer, False]):
        before = position > 0 and answer[position - 1]
        if inside and not before:
            start = position
        elif before and not inside:
            spans.append((start, position))
    return spans


def prompts(
    processor, row: dict, layout: Layout, image_root: str
) -> Iterator[tuple[int, int, Encoded]]:
    """Each turn of an encoded row: start and stop of its answer, and what generation is fed before
    it."""
    for turn, (start, stop) in zip(turns(row), answer_spans(layout), strict=True):
        yield start, stop, encode_prompt(processor, row, turn, image_root)


def prompt_ids(processor, rows: list[dict], image_root: str = ".") -> Result:
    """The ids (and pixels) that precede an answer in a training row are those that generation is
    fed."""
    name, count = "prompt ids: training == generation", 0
    for row in rows:
        inputs, layout = encode_row(processor, row, image_root)
        for start, _, prompt in prompts(processor, row, layout, image_root):
            count += 1
            same = torch.equal(inputs["input_ids"][:, :start], prompt.inputs["input_ids"])
            same &= str(layout[:, :start]) == str(prompt.layout)
            if "pixel_values" in prompt.inputs:
                pixels = prompt.inputs["pixel_values"]
                same &= torch.equal(
                    inputs["pixel_values"][: len(pixels), : pixels.shape[1]], pixels
                )
            if not same:
                return Result(name, False, f"row {row.get('id', '?')}, token {start}")
    return Result(name, True, f"{count} turns")


def template_ids(processor, rows: list[dict], image_root: str = ".") -> Result:
    """What generation is fed is also what transformers makes of the dialogue with this processor:
    `apply_chat_template`, or the processor on its text where images of several turns are read in
    groups (llava-onevision's)."""
    name, count, by_text = "prompt ids: transformers' template == training", 0, 0
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    for row in rows:
        for turn in turns(row):
            inputs = encode_prompt(processor, row, turn, image_root).inputs
            root = row.get("image_root") or image_root
            dialogue, groups = _shown(turn, [open_image(image, root) for image in turn.images])
            plain = processor.apply_chat_template(dialogue, tokenize=True, **options)
            if "batch_num_images" in plain and len(groups) > 1:
                by_text += 1
                text = processor.apply_chat_template(dialogue, add_generation_prompt=True)
                plain = processor(text=[text], images=groups, return_tensors="pt")
            count += 1
            for key, tensor in inputs.items():
                if key not in plain or not torch.equal(plain[key], tensor):
                    figure = f"row {row.get('id', '?')}, turn {turn.index}: other {key}"
                    return Result(name, False, figure)
    figure = f"{count} turns" + (f", {by_text} as text with images by turn" if by_text else "")
    return Result(name, True, figure)


def _shown(turn: Turn, images: list) -> tuple[list[dict], list[list]]:
    """The dialogue before a turn with its images in their parts, and the images of each prefill
    that shows any."""
    dialogue, groups, left = typed(turn.history, len(images)), [[]], iter(images)
    for message in dialogue:
        if message["role"] == "assistant":
            groups.append([])
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = next(left)
                groups[-1].append(part["image"])
    return dialogue, [group for group in groups if group]


def largest_score(query, key, scale: float | None) -> torch.Tensor:
    """A bound of the scores of an attention call, |q| |k| times the scale."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale * query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()


def rounding_of_attention(query, key, value, scale: float | None) -> float:
    """How far one rounding of each score, weight and value moves what an attention call computes.

    A score is a sum of products: it rounds in proportion to |q| |k|, in float32 at least. Its
    weight moves by as much, relatively, and so does the value that it weighs.
    """
    summed = torch.promote_types(query.dtype, torch.float32)
    steps = torch.finfo(summed).eps * largest_score(query, key, scale).item()
    return (torch.finfo(query.dtype).eps + steps) * value.abs().max().item()


@torch.no_grad()
def rounding_of_logits(model, encoded: Encoded, expected: torch.Tensor) -> float:
    """How far the logits [T, V] of a row move when every layer's output is rounded once more, up or
    down at random: sharp attention in a deep model makes much of little."""
    generator = torch.Generator().manual_seed(0)

    def rounded(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        up = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
        hidden = hidden + hidden * up.to(hidden) * torch.finfo(hidden.dtype).eps
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = unwrap(model).base_model.language_model.layers
    hooks = [layer.register_forward_hook(rounded) for layer in layers]
    try:
        moved = [model(**encoded.kwargs()).logits[0] - expected for _ in range(SIGNS)]
    finally:
        for hook in hooks:
            hook.remove()
    return max(difference.abs().max().item() for difference in moved)


@torch.no_grad()
def decoding(model, processor, rows: list[dict], image_root: str = ".") -> Result:
    """Teacher-forced logits against prefill and token-by-token decoding with a cache, at every
    answer position."""
    worst, limit, over = 0.0, 0.0, False
    for row in rows:
        encoded = encode_row(processor, row, image_root).to(model)
        ids = encoded.inputs["input_ids"]
        forced = model(**encoded.kwargs()).logits[0]
        least = torch.finfo(forced.dtype).eps * forced.abs().max().item()
        allowed = LOGIT_ROUNDINGS * max(least, rounding_of_logits(model, encoded, forced))
        limit = max(limit, allowed)
        for start, stop, prompt in prompts(processor, row, encoded.layout, image_root):
            out = model(**prompt.to(model).kwargs(), use_cache=True)
            stepped = [out.logits[0, -1]]
            for position in range(start, stop - 1):
                token = ids[:, position : position + 1]
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                stepped.append(out.logits[0, -1])
            expected = forced[start - 1 : stop - 1]
            difference = (torch.stack(stepped) - expected).abs().max().item()
            worst, over = max(worst, difference), over or not difference <= allowed
    figure = f"max difference {worst:.1e}, limit {limit:.1e}"
    return Result("logits: teacher-forced == prefill + decode", not over, figure)


def _placeholders(inner) -> torch.Tensor:
    """The tokens that stand for images, videos and sounds: neighbours in many vocabularies."""
    names = ("image_token_id", *OTHER_TOKENS)
    tokens = [getattr(inner.config, name, None) for name in names]
    return torch.tensor([token for token in tokens if token is not None], device=inner.device)


def _cuts(layout: Layout) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What is changed and what must not move then, bool [B, T] each: all tokens from the k-th
    answer of a row on, and those before; a sample of a packed row, and all others."""
    starts = layout.answer
    starts[:, 1:] &= ~layout.answer[:, :-1]
    for turn in range(int(starts.sum(1).max())):
        behind = (starts.cumsum(1) > turn) & layout.real
        yield behind, ~behind & layout.real
    if layout.packed:
        for sample in range(int(layout.sample.max()) + 1):
            own = layout.sample == sample
            yield own, ~own & layout.real


@torch.no_grad()
def leaks(model, encoded: Encoded) -> Result:
    """Change every token from the start of each answer on, and look whether any earlier logit moves
    by a bit; of packed rows, change every sample, and look whether a logit of another does.

    encoded: a batch as in training. All text and answer ids behind the cut are replaced.
    """
    inputs, layout = encoded
    before = model(**encoded.kwargs()).logits
    ids, moved, cuts = inputs["input_ids"], 0, 0
    inner = unwrap(model)  # `model` may be wrapped for several processes
    vocabulary, placeholders = inner.get_input_embeddings().num_embeddings, _placeholders(inner)
    for behind, protected in _cuts(layout):
        other = (ids + 1) % vocabulary
        while bool((among := torch.isin(other, placeholders)).any()):
            other = torch.where(among, (other + 1) % vocabulary, other)
        changed = torch.where(behind & ~layout.visual, other, ids)
        after = model(**Encoded({**inputs, "input_ids": changed}, layout).kwargs()).logits
        moved += int((before != after).any(-1)[protected].sum())
        cuts += int(behind.any(1).sum())
    return Result(
        "leaks: later tokens move no earlier logit",
        moved == 0,
        f"{moved} logits moved at {cuts} cuts",
    )


@contextlib.contextmanager
def recorded_attention(model) -> Iterator[list[tuple]]:
    """Record (layer, q, k, v, scale, output) of every attention call of the language model, and of
    one more in float32 with queries so short that no score is over 1: there every pair of the mask
    weighs something, however sharp the model's own attention is, and however coarse its dtype.
    (In the model's dtype where a flash kernel takes no other.)"""
    inner = unwrap(model)
    layers = {id(module): name for name, module in inner.base_model.language_model.named_modules()}
    name = inner.config.get_text_config()._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]
    calls: list[tuple] = []

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if id(module) in layers:
            calls.append((layers[id(module)], query, key, value, scaling, out[0]))
            wide = torch.promote_types(query.dtype, torch.float32)
            plan = kwargs.get(PLAN)  # none where the model's own attention serves
            flashed = plan is not None and isinstance(plan.prepared, flash.Prepared)
            if flashed and not kernels.serves(query.device, wide):
                wide = query.dtype
            shrunk = query.to(wide) / largest_score(query, key, scaling).clamp(min=1.0)
            even = (shrunk, key.to(wide), value.to(wide))
            with torch.autocast(query.device.type, enabled=False):
                out_even = original(module, *even, attention_mask, scaling=scaling, **kwargs)
            calls.append((layers[id(module)], *even, scaling, out_even[0]))
        return out

    ALL_ATTENTION_FUNCTIONS.register(name, record)
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, original)


def layers(model, encoded: Encoded, prompt: Encoded | None = None) -> list[Result]:
    """What each layer computes against the reference attention of the mask: in training mode and in
    evaluation on `encoded`, in `generate` on `prompt`."""
    results, training = [], model.training
    for mode in ("training mode", "evaluation", *(["generate"] if prompt else [])):
        model.train(mode == "training mode")
        shown = prompt if prompt and mode == "generate" else encoded
        with torch.no_grad(), recorded_attention(model) as calls:
            if mode == "generate":
                model.generate(
                    **shown.kwargs(), max_new_tokens=3, min_new_tokens=3, do_sample=False
                )
            else:
                model(**shown.kwargs())
        results.append(_compare(model, calls, shown.layout, mode))
    model.train(training)
    return results


@torch.no_grad()
def effect(model, encoded: Encoded) -> Result:
    """A mask that reveals something in these rows changes what the model computes.

    It is compared with causal attention, bit by bit; where the rows leave nothing to reveal (they
    have no image, say) there is nothing to see, and the figure says so.
    """
    handle = attached(model)
    reveals = Allowed.of(handle.mask.policy, encoded.layout).revealed_B1QK
    pairs = 0 if reveals is None else int(reveals.sum())
    ours = model(**encoded.kwargs()).logits
    with handle.under("causal"):
        causal = model(**encoded.kwargs()).logits
    moved = int((ours != causal).any(-1)[encoded.layout.real].sum())
    figure = f"{pairs} pairs revealed, {moved} logits differ from causal attention's"
    return Result("effect: the mask changes the logits", bool(moved) == bool(pairs), figure)


def _compare(model, calls: list[tuple], layout: Layout, mode: str) -> Result:
    handle, worst, off, limit = attached(model), 0.0, set(), 0.0
    for layer, *inputs, scale, out in calls:
        query, key, value = (each.to(out.dtype) for each in inputs)  # as autocast rounds them
        grown = key.shape[2] - layout.shape[1]
        real = layout.pad(right=grown)
        if grown:  # tokens decoded since are answers of the row's only sample
            real = Layout(real.role.clone(), real.image, real.prefill, real.sample.clone())
            real.role[:, -grown:], real.sample[:, -grown:] = int(Role.ANSWER), 0
        expected = attend(query, key, value, real, handle.mask, scale=scale).transpose(1, 2)
        kept = real.real[:, -query.shape[2] :]
        difference = (out - expected)[kept].abs().max().item()
        tolerance = LAYER_ROUNDINGS * rounding_of_attention(query, key, value, scale)
        worst, limit = max(worst, difference), max(limit, tolerance)
        if not difference <= tolerance:
            off.add(layer)
    count = len({layer for layer, *_ in calls})
    figure = f"{count} layers, {len(calls)} calls, max difference {worst:.1e}, limit {limit:.1e}"
    expected_layers = unwrap(model).config.get_text_config().num_hidden_layers
    return Result(
        f"mask in each layer: {mode}",
        not off and count == expected_layers,
        figure + (f", off: {sorted(off)}" if off else ""),
    )


def check(model, processor, rows: list[dict], image_root: str = ".") -> list[Result]:
    """All checks on `model` with its mask attached. rows: a few, with two turns and several images
    among them."""
    was_training = model.training
    model.eval()
    results = [
        prompt_ids(processor, rows, image_root),
        template_ids(processor, rows, image_root),
        decoding(model, processor, rows, image_root),
    ]
    encoded = batch(processor, [encode_row(processor, row, image_root) for row in rows]).to(model)
    results += [leaks(model, encoded), effect(model, encoded)]
    first = [encode_prompt(processor, row, turns(row)[0], image_root) for row in rows]
    results += layers(model, encoded, batch(processor, first, padding_side="left").to(model))
    model.train(was_training)
    return results
