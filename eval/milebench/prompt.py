"""The prompt of one MileBench sample: its text, its images, and what of them fits into the window.

Two ways to build it. `original=True` gives what MileBench at commit 9583e1f gives, oddities
included. The default repairs them (Q14-Q17 and Q19 in README.md): images belong to places by index,
a mismatch is reported, and everything that takes room in the window is subtracted.

Both cut from the left, so that instruction and question survive: pieces are kept from the last to
the first while they fit; only the last piece of text is ever cut inside.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eval.milebench.choices import label
from eval.milebench.tasks import Sample, Task

PLACE = "<ImageHere>"  # an image in MileBench's prompts, and in the `question` of pred.json

_REFERENCE = re.compile(r"\{(?:image|table)#([0-9]+)\}")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """An object with `input_ids`, a list of ints."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""


@dataclass(frozen=True)
class Window:
    """Room for a prompt, in tokens.

    `length` in all, `per_image` for an image (or for each of the sample's images), `overhead` for
    everything else. The overhead is what the caller puts around the prompt: chat template, system
    text, BOS, and room for the answer. MileBench has no such term (Q17), and one cost for all
    images, so `original=True` takes neither.
    """

    length: int
    per_image: int | Sequence[int]
    overhead: int = 0


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    `pieces`: text, or None where the next of `images` (paths) stands. `notes`: what was found
    amiss.
    """

    sample_id: int | str
    pieces: tuple[str | None, ...]
    images: tuple[str, ...]
    response: str
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The prompt as MileBench writes it into pred.json: `<ImageHere>` for every image."""
        return "".join(PLACE if piece is None else piece for piece in self.pieces)

    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a dialogue of one user turn with typed content parts, to go with `images`.

        Raises ValueError when places and images differ in number, which only `original=True` lets
        happen (Q16).
        """
        places = self.pieces.count(None)
        if places != len(self.images):
            raise ValueError(
                f"sample {self.sample_id}: {places} places for {len(self.images)} images"
            )
        parts = []
        for piece in self.pieces:
            if piece is None:
                parts.append({"type": "image"})
            elif piece:
                parts.append({"type": "text", "text": piece})
        return [{"role": "user", "content": parts}]


def build_prompt(
    task: Task,
    sample: Sample,
    tokenizer: Tokenizer,
    window: Window,
    combined: int | None = None,
    original: bool = False,
) -> Prompt:
    """Prompt of a sample.

    `combined` N: its images come as (at most N) combined images in front of the text.

    Raises ValueError naming file, sample and numbers for an instruction id out of range, for
    combined images that are missing, and for an overhead or several costs of images in original
    mode.
    """
    instruction = task.instruction(sample, original)
    if original and window.overhead:
        raise ValueError(
            f"{task.path}: MileBench subtracts no overhead ({window.overhead}) from the window"
        )
    if original and not isinstance(window.per_image, int):
        raise ValueError(
            f"{task.path}: MileBench has one cost for all images, not {window.per_image}"
        )
    build = _build_original if original else _build_fixed
    return build(task, sample, instruction, tokenizer, window, combined)


def image_paths(task: Task, sample: Sample, combined: int | None = None) -> list[str]:
    """Paths of all image files of a sample, or of its combined images.

    Those lie beside the image folder.
    """
    if combined is None:
        return [os.path.join(task.image_dir, name) for name in sample.images]
    folder = os.path.join(
        os.path.dirname(task.image_dir.rstrip("/")), f"combined_{combined}_images"
    )
    return [os.path.join(folder, name) for name in _combined_names(task, sample, combined)]


def require_inputs(task: Task, combined: int | None = None) -> None:
    """Check, before a model is loaded, that every instruction and every image file is there.

    Raises ValueError naming the first that is missing.
    """
    for sample in task.samples:
        task.instruction(sample)
        for path in image_paths(task, sample, combined):
            if not os.path.isfile(path):
                raise ValueError(
                    f"{task.path}: sample {sample.sample_id}: image file {path} is missing"
                )


def _combined_names(task: Task, sample: Sample, combined: int) -> tuple[str, ...]:
    if combined not in sample.combined:
        raise ValueError(
            f"{task.path}: sample {sample.sample_id}: key 'combined_{combined}_images' is missing"
        )
    return sample.combined[combined]


def _choice_block(task: Task, sample: Sample, original: bool) -> str:
    """The options, labelled (except for GPR1200), and the cue for the answer.

    Nothing without a choice_list.
    """
    if sample.choices is None:
        return ""
    lines = [str(choice) for choice in sample.choices]
    if task.name != "GPR1200":
        labels = [chr(65 + i) if original else label(i) for i in range(len(lines))]
        lines = [f"{name}. {line}" for name, line in zip(labels, lines)]
    return "\nChoice list: \n" + "\n".join(lines) + "\nYour answer is: "


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


# --- repaired -------------------------------------------------------------------------------------

_Piece = str | int  # text, or the index of an image


def _build_fixed(
    task: Task,
    sample: Sample,
    instruction: str,
    tokenizer: Tokenizer,
    window: Window,
    combined: int | None,
) -> Prompt:
    """Images by index.

    Text that is not cut stays as written; a window without room for more holds the instruction.
    """
    context = sample.context + _choice_block(task, sample, original=False)
    paths = image_paths(task, sample, combined)
    head: list[_Piece] = [f"{instruction}\n"]
    if combined is None:
        pieces, notes = _pieces_by_index(context, len(paths))
    else:
        head = [*range(len(paths)), f"\n{instruction}\n"]
        pieces, notes = [_by_number(context, len(sample.images))], []
    if PLACE in context or PLACE in instruction:
        notes.append(f"the text itself holds {PLACE}")
    room = window.length - window.overhead - sum(_cost(piece, tokenizer, window) for piece in head)
    kept = _fit(pieces, tokenizer, window, room)
    if kept != pieces:
        notes.append(
            f"cut to the {room} tokens left of {window.length}: "
            f"{len(_images(kept))} of {len(_images(pieces))} images kept"
        )
    whole = [*head, *kept]
    return Prompt(
        sample_id=sample.sample_id,
        pieces=tuple(None if isinstance(piece, int) else piece for piece in whole),
        images=tuple(paths[index] for index in _images(whole)),
        response=str(sample.response),
        notes=tuple(notes),
    )


def _images(pieces: Sequence[_Piece]) -> list[int]:
    """The images among the pieces."""
    return [piece for piece in pieces if isinstance(piece, int)]


def _image_index(match: re.Match[str], n_images: int) -> int | None:
    """Index (from 0) of the image that a reference like {image#3} or {table#3} names.

    None when there is none.
    """
    number = int(match[1])
    return number - 1 if 1 <= number <= n_images and match[1] == str(number) else None


def _by_number(context: str, n_images: int) -> str:
    """The context of combined images: a reference becomes the caption that the image carries."""

    def caption(match: re.Match[str]) -> str:
        known = _image_index(match, n_images) is not None
        return f"<Image {match[1]}> " if known else match[0]

    return _REFERENCE.sub(caption, context)


def _pieces_by_index(context: str, n_images: int) -> tuple[list[_Piece], list[str]]:
    """The context cut at its references, and notes on those that do not fit the images (Q16).

    A reference to no image stays as text; an image without a reference comes in front; one with
    several is shown again.
    """
    pieces: list[_Piece] = []
    used: list[int] = []
    unknown, start, text = [], 0, ""
    for match in _REFERENCE.finditer(context):
        index = _image_index(match, n_images)
        if index is None:
            unknown.append(match[0])
            continue
        text = context[start : match.start()]
        pieces += [text, index] if text else [index]
        used.append(index)
        start = match.end()
    if context[start:]:
        pieces.append(context[start:])
    unused = [index for index in range(n_images) if index not in used]
    notes = []
    if unknown:
        notes.append(f"{', '.join(unknown)} named, but there are {n_images} images")
    if unused:
        notes.append(f"images without a place, put in front: {[index + 1 for index in unused]}")
    if len(used) > len(set(used)):
        several = sorted({index + 1 for index in used if used.count(index) > 1})
        notes.append(f"images with several places: {several}")
    return [*unused, *pieces], notes


def _cost(piece: _Piece, tokenizer: Tokenizer, window: Window) -> int:
    if isinstance(piece, int):
        return window.per_image if isinstance(window.per_image, int) else window.per_image[piece]
    return len(_encode(tokenizer, piece))


def _fit(pieces: Sequence[_Piece], tokenizer: Tokenizer, window: Window, room: int) -> list[_Piece]:
    """Pieces kept from the right while they fit into `room` tokens.

    The last text is cut to its last tokens (Q15).
    """
    kept: list[_Piece] = []
    for piece in reversed(pieces):
        cost = _cost(piece, tokenizer, window)
        if cost > room:
            is_last_text = isinstance(piece, str) and not any(
                isinstance(other, str) and other.strip() for other in kept
            )
            if is_last_text and room > 0:
                kept.append(tokenizer.decode(_encode(tokenizer, piece)[-room:]))
            break
        kept.append(piece)
        room -= cost
    return kept[::-1]


# --- as MileBench ---------------------------------------------------------------------------------


def _build_original(
    task: Task,
    sample: Sample,
    instruction: str,
    tokenizer: Tokenizer,
    window: Window,
    combined: int | None,
) -> Prompt:
    """MileBench's text and images, oddities included.

    Places are matched to images from the right, not by index.
    """
    context = sample.context + _choice_block(task, sample, original=True)
    for k in range(1, len(sample.images) + 1):
        mark = PLACE if combined is None else f"<Image {k}> "
        context = context.replace(f"{{image#{k}}}", mark).replace(f"{{table#{k}}}", mark)
    budget = window.length - len(_encode(tokenizer, instruction))
    if combined is None:
        images = image_paths(task, sample)
        text, images = _walk_original(context, images, tokenizer, budget, window.per_image)
        text = f"{instruction}\n{text}"
    else:
        images = _combined_paths_original(task, sample, combined)
        text, _ = _walk_original(context, [], tokenizer, budget, 0)
        text = f"{PLACE}\n{instruction}\n{text}"
    pieces: list[str | None] = []
    for fragment in text.split(PLACE):
        pieces += [fragment, None]
    return Prompt(sample.sample_id, tuple(pieces[:-1]), tuple(images), str(sample.response))


def _walk_original(
    context: str, images: Sequence[str], tokenizer: Tokenizer, budget: int, per_image: int
) -> tuple[str, list[str]]:
    """Text and images that MileBench keeps of a context with `<ImageHere>` places."""
    left, kept_images, kept, total, lead = list(images), [], [], 0, False
    for fragment in reversed(context.split(PLACE)):
        ids = _encode(tokenizer, fragment)
        if len(ids) + total > budget:
            if not kept:
                kept.append(ids[-budget:])  # all of them for a budget of 0 (Q15)
            break
        lead = False
        kept.insert(0, ids)
        total += len(ids)
        if per_image + total > budget:
            break
        if left:
            kept_images.insert(0, left.pop())
            lead = True
            total += per_image
    return PLACE * lead + PLACE.join(tokenizer.decode(ids) for ids in kept), kept_images


def _combined_paths_original(task: Task, sample: Sample, combined: int) -> list[str]:
    """MileBench takes one combined file.

    It replaces the base name of the image folder wherever it occurs in the path (Q19).
    """
    names = _combined_names(task, sample, combined)
    if len(names) != 1:
        raise ValueError(
            f"{task.path}: sample {sample.sample_id}: MileBench takes 1 combined image, "
            f"'combined_{combined}_images' has {len(names)}"
        )
    folder = task.image_dir.replace(os.path.basename(task.image_dir), f"combined_{combined}_images")
    return [os.path.join(folder, name) for name in names]
