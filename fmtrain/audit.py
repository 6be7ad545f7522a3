"""Does the model see in training what it will see in inference? Measured, on a real model and real rows.

    python -m fmtrain.audit CHECKPOINT_OR_RECIPE

Four checks: the prompt ids of training are those of generation; teacher-forced logits equal those of prefill and cached
decoding; changing any later token leaves earlier logits bit-identical; and what every layer computes is the reference
attention of the policy, in training mode, in evaluation and inside `generate`.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fmtrain.attention import attend
from fmtrain.data.collator import batch, encode_row
from fmtrain.data.encode import check, image_count
from fmtrain.layout import Layout, Role
from fmtrain.patch import attached, unwrap

# Agreement of logits, relative to the largest logit: rounding of the dtype, through a few dozen layers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Result:
    check: str
    passed: bool
    figure: str


@dataclass(frozen=True)
class Turn:
    """One assistant turn of a row: where its answer stands, and what generation is fed before it."""

    start: int
    stop: int
    prompt: dict[str, torch.Tensor]
    layout: Layout


def turns(processor, row: dict, image_root: str, layout: Layout) -> Iterator[Turn]:
    messages = check(processor, row["messages"], len(row["images"]))
    answer = (layout.role[0] == Role.ANSWER).nonzero().flatten().tolist()
    starts = [position for position in answer if layout.role[0, position - 1] != Role.ANSWER]
    asked = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    for k, start in zip(asked, starts, strict=True):
        images = sum(image_count(processor, message) for message in messages[:k])
        history = {**row, "messages": row["messages"][:k], "images": row["images"][:images]}
        inputs, prompt_layout = encode_row(processor, history, image_root, add_generation_prompt=True)
        stop = next((p for p in range(start, layout.shape[1]) if layout.role[0, p] != Role.ANSWER), layout.shape[1])
        yield Turn(start, stop, inputs, prompt_layout)


def on(device: torch.device, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: v.to(device, dtype) if v.is_floating_point() else v.to(device) for name, v in inputs.items()}


def prompt_ids(processor, rows: list[dict], image_root: str = ".") -> Result:
    """The ids (and pixels) that precede an answer in a training row are those that generation is fed."""
    count = 0
    for row in rows:
        inputs, layout = encode_row(processor, row, image_root)
        for turn in turns(processor, row, image_root, layout):
            count += 1
            same = torch.equal(inputs["input_ids"][:, : turn.start], turn.prompt["input_ids"])
            same &= str(layout[:, : turn.start]) == str(turn.layout)
            if "pixel_values" in turn.prompt:
                fed = turn.prompt["pixel_values"]
                same &= torch.equal(inputs["pixel_values"][: len(fed), : fed.shape[1]], fed)
            if not same:
                return Result("prompt ids: training == generation", False, f"row {row.get('id', '?')}, token {turn.start}")
    return Result("prompt ids: training == generation", True, f"{count} turns")


@torch.no_grad()
def decoding(model, processor, rows: list[dict], image_root: str = ".") -> Result:
    """Teacher-forced logits against prefill and token-by-token decoding with a cache, at every answer position."""
    worst, largest, device, dtype = 0.0, 1.0, model.device, model.dtype
    for row in rows:
        inputs, layout = encode_row(processor, row, image_root)
        inputs = on(device, dtype, inputs)
        forced = model(**inputs, **layout.to(device).model_inputs()).logits[0]
        for turn in turns(processor, row, image_root, layout):
            prompt = on(device, dtype, turn.prompt)
            out = model(**prompt, **turn.layout.to(device).model_inputs(), use_cache=True)
            stepped = [out.logits[0, -1]]
            for position in range(turn.start, turn.stop - 1):
                token = inputs["input_ids"][:, position : position + 1]
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                stepped.append(out.logits[0, -1])
            expected = forced[turn.start - 1 : turn.stop - 1]
            worst = max(worst, (torch.stack(stepped) - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    limit = TOLERANCE[dtype] * largest
    return Result("logits: teacher-forced == prefill + decode", worst <= limit, f"max difference {worst:.1e}, limit {limit:.1e}")


@torch.no_grad()
def leaks(model, inputs: dict[str, torch.Tensor], layout: Layout) -> Result:
    """Change every token from the start of each answer on, and look whether any earlier logit moves by a bit.

    inputs and layout: a batch as in training. All text and answer ids behind the cut are replaced.
    """
    before = model(**inputs, **layout.model_inputs()).logits
    ids, moved, cuts = inputs["input_ids"], 0, 0
    inner = unwrap(model)  # `model` may be wrapped for several processes
    vocabulary, visual_id = inner.get_input_embeddings().num_embeddings, inner.config.image_token_id
    answer = layout.role == Role.ANSWER
    starts = answer.clone()
    starts[:, 1:] &= ~answer[:, :-1]
    for turn in range(int(starts.sum(1).max())):
        behind = (starts.cumsum(1) > turn) & (layout.role != Role.PAD)  # from this turn's answer on
        shifted = (ids + 1) % vocabulary
        other = torch.where(shifted == visual_id, (shifted + 1) % vocabulary, shifted)
        changed = torch.where(behind & (layout.role != Role.VISUAL), other, ids)
        after = model(**{**inputs, "input_ids": changed}, **layout.model_inputs()).logits
        protected = ~behind & (layout.role != Role.PAD)
        moved += int((before != after).any(-1)[protected].sum())
        cuts += int(behind.any(1).sum())
    return Result("leaks: later tokens move no earlier logit", moved == 0, f"{moved} logits moved at {cuts} cuts")


@contextlib.contextmanager
def recorded_attention(model) -> Iterator[list[tuple]]:
    """Record (layer, q, k, v, scale, output) of every attention call of the language model."""
    inner = unwrap(model)
    layers = {id(module): name for name, module in inner.base_model.language_model.named_modules()}
    name = inner.config.get_text_config()._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]
    calls: list[tuple] = []

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if id(module) in layers:
            calls.append((layers[id(module)], query, key, value, scaling, out[0]))
        return out

    ALL_ATTENTION_FUNCTIONS.register(name, record)
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, original)


def layers(model, inputs: dict[str, torch.Tensor], layout: Layout, prompt: dict, prompt_layout: Layout) -> list[Result]:
    """What each layer computes against the reference attention of the policy: training mode, evaluation, `generate`."""
    results, training = [], model.training
    for mode in ("training mode", "evaluation", "generate"):
        model.train(mode == "training mode")
        with torch.no_grad(), recorded_attention(model) as calls:
            if mode == "generate":
                model.generate(**prompt, **prompt_layout.model_inputs(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
            else:
                model(**inputs, **layout.model_inputs())
        results.append(_compare(model, calls, prompt_layout if mode == "generate" else layout, mode))
    model.train(training)
    return results


def _compare(model, calls: list[tuple], layout: Layout, mode: str) -> Result:
    handle, worst, off, limit = attached(model), 0.0, set(), 0.0
    for layer, query, key, value, scale, out in calls:
        grown = key.shape[2] - layout.shape[1]
        real = layout.pad(right=grown)
        if grown:  # tokens decoded since are answers of the row's only sample
            real = Layout(real.role.clone(), real.image, real.prefill, real.sample.clone())
            real.role[:, -grown:], real.sample[:, -grown:] = int(Role.ANSWER), 0
        expected = attend(query, key, value, real, handle.policy, "reference", handle.merge, scale).transpose(1, 2)
        kept = (real.role != Role.PAD)[:, -query.shape[2] :]
        difference = (out - expected)[kept].abs().max().item()
        tolerance = TOLERANCE[query.dtype] * max(1.0, expected[kept].abs().max().item())
        worst, limit = max(worst, difference), max(limit, tolerance)
        if not difference <= tolerance:
            off.add(layer)
    count = len({layer for layer, *_ in calls})
    figure = f"{count} layers, {len(calls)} calls, max difference {worst:.1e}, limit {limit:.1e}"
    expected_layers = unwrap(model).config.get_text_config().num_hidden_layers
    return Result(f"mask in each layer: {mode}", not off and count == expected_layers, figure + (f", off: {sorted(off)}" if off else ""))


def audit(model, processor, rows: list[dict], image_root: str = ".") -> list[Result]:
    """All checks on `model` with its attached policy. rows: a few, with two turns and several images among them."""
    was_training = model.training
    model.eval()
    results = [prompt_ids(processor, rows, image_root), decoding(model, processor, rows, image_root)]
    inputs, layout = batch(processor, [encode_row(processor, row, image_root) for row in rows])
    inputs, layout = on(model.device, model.dtype, inputs), layout.to(model.device)
    results.append(leaks(model, inputs, layout))
    prompts = [next(turns(processor, row, image_root, encode_row(processor, row, image_root)[1])) for row in rows]
    prompt, prompt_layout = batch(processor, [(turn.prompt, turn.layout) for turn in prompts], padding_side="left")
    prompt, prompt_layout = on(model.device, model.dtype, prompt), prompt_layout.to(model.device)
    results += layers(model, inputs, layout, prompt, prompt_layout)
    model.train(was_training)
    return results


def table(results: list[Result], title: str) -> Table:
    shown = Table(title=title)
    for column in ("check", "result", "figure"):
        shown.add_column(column)
    for result in results:
        shown.add_row(result.check, "[green]pass[/]" if result.passed else "[bold red]FAIL[/]", result.figure)
    return shown


def sample_rows() -> list[dict]:
    """Rows for a model whose data is not at hand: no, one and three images, one and two turns, images of noise."""
    from PIL import Image

    def picture(seed: int, size: tuple[int, int]) -> Image.Image:
        noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        return Image.fromarray(noise.numpy())

    def turn(images: int, question: str, answer: str) -> list[dict]:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    return [
        {"id": "text", "messages": turn(0, "1 2 3", "4 5"), "images": []},
        {"id": "image", "messages": turn(1, "1 2 ?", "3"), "images": [picture(1, (60, 40))]},
        {
            "id": "turns",
            "messages": turn(1, "1 ?", "2 3") + turn(2, "4 5 ?", "6"),
            "images": [picture(2, (40, 60)), picture(3, (50, 50)), picture(4, (80, 30))],
        },
    ]


def _subject(name: str):
    """Model with policy, processor, rows and image folder of a checkpoint or a recipe."""
    if Path(name).suffix in (".yaml", ".yml"):
        from fmtrain import sft

        return sft.subject(name)
    from fmtrain.export import load

    model, processor = load(name)
    return model, processor, sample_rows(), "."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fmtrain.audit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("subject", help="an exported checkpoint, a run with an adapter, or a recipe")
    parser.add_argument("--json", help="where to write the results (default: audit.json in the checkpoint, or here)")
    options = parser.parse_args(arguments)
    try:
        model, processor, rows, root = _subject(options.subject)
        results = audit(model, processor, rows, root)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    handle = attached(model)
    Console().print(table(results, f"audit of {options.subject} under {handle.record()['policy']}{'+merge' if handle.merge else ''}"))
    folder = Path(options.subject) if Path(options.subject).is_dir() else Path(".")
    passed = all(result.passed for result in results)
    report = {"subject": options.subject, **handle.record(), "passed": passed, "checks": [asdict(r) for r in results]}
    Path(options.json or folder / "audit.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
