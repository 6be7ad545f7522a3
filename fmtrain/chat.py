"""Ask a checkpoint in the terminal, in several turns, under one mask or several side by side.

    fmtrain chat CHECKPOINT --image before.png --image after.png
    fmtrain chat CHECKPOINT --masks causal v2v
    echo "Which digit changed?" | fmtrain chat CHECKPOINT --image a.png --image b.png

A line is a question. `/image FILE` shows a further picture with the next question, `/new` begins
another dialogue. Under each mask the dialogue goes on with its own answers.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fmtrain.checkpoint import load, recorded_mask
from fmtrain.command_line import Parser, guarded, one_line, printable
from fmtrain.data.encode import encode
from fmtrain.data.images import open_image
from fmtrain.decoding import Decoder
from fmtrain.masks import Mask, beside, parse_masks
from fmtrain.patch import attached

IMAGE, NEW = "/image", "/new"
PROMPT = "> "


@dataclass
class Chat:
    """A dialogue under each of some masks: the same questions and pictures, its own answers.

    waiting: pictures that the next question shows.
    """

    decoder: Decoder
    masks: list[Mask]
    max_new_tokens: int
    waiting: list = field(default_factory=list)
    images: list = field(default_factory=list)
    dialogues: list[list[dict]] = field(default_factory=list)

    def __post_init__(self):
        self.begin()

    def begin(self) -> None:
        """Forget what was said and shown."""
        self.images, self.dialogues = [], [[] for _ in self.masks]

    def show(self, file: str) -> None:
        """A picture for the next question. Raises `ValueError` for a file that is none."""
        path = Path(file).expanduser()
        self.waiting.append(open_image(path.name, path.parent))

    def ask(self, question: str) -> list[str]:
        """The answer under each mask. Raises `ValueError`, and asks nothing, for a question that
        cannot be told from the marks of the template."""
        content = [{"type": "image"} for _ in self.waiting]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        images, answers = [*self.images, *self.waiting], []
        for mask, dialogue in zip(self.masks, self.dialogues, strict=True):
            try:
                prompt = encode(self.decoder.processor, [*dialogue, turn], images, True)
            except ValueError as error:
                raise ValueError(
                    f"under {mask}: {one_line(error)}; {NEW} begins another dialogue"
                ) from error
            with self.decoder.under(mask):
                features = self.decoder.run_tower([prompt])
                [ids] = self.decoder.answers(features, max_new_tokens=self.max_new_tokens)
            answers.append(self.decoder.text(ids))
        self.images, self.waiting = images, []
        for dialogue, answer in zip(self.dialogues, answers, strict=True):
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            dialogue += [turn, said]
        return answers

    def line(self, line: str) -> None:
        """Do what a line says, and print what comes of it. Raises `ValueError` for a command that
        there is not."""
        word, _, rest = line.strip().partition(" ")
        if word == IMAGE and rest.strip():
            self.show(rest.strip())
        elif word == NEW and not rest:
            self.begin()
            self.waiting = []
        elif word.startswith("/"):
            raise ValueError(f"unknown command {printable(word)!r}; known are {IMAGE} FILE, {NEW}")
        elif word:
            width = max(len(str(mask)) for mask in self.masks)
            for mask, answer in zip(self.masks, self.ask(line.strip()), strict=True):
                name = f"{mask!s:{width}}  " if len(self.masks) > 1 else ""
                print(f"{name}{printable(answer)}", flush=True)


def lines() -> Iterable[str]:
    """What is typed, or piped in, until it ends."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (by which `input` edits a line)

    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def chat(options) -> None:
    """Answer line by line. An error of a line ends a piped dialogue; typed, the next one is
    asked for."""
    masks = None if options.masks is None else parse_masks(options.masks)
    mask = None if masks is None else masks[0]
    # One backend for all masks: `auto` would leave causal attention to the model.
    model, processor = load(options.checkpoint, mask, backend="sdpa")
    if masks is None:
        masks = [attached(model).mask]
    elif any(each.merge for each in masks):  # which pool as the checkpoint does
        own = recorded_mask(options.checkpoint)
        masks = [beside(str(each), own) for each in masks]
    talk = Chat(Decoder(model, processor), masks, options.max_new_tokens)
    for image in options.image:
        talk.show(image)
    for line in lines():
        try:
            talk.line(line)
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("fmtrain chat", __doc__)
    add = parser.add_argument
    add("checkpoint", help="an export, a run with an adapter, or a name on the hub")
    add("--image", action="append", default=[], metavar="FILE", help="of the first question")
    add("--masks", nargs="+", metavar="MASK", help="side by side (default: the recorded one)")
    add("--max_new_tokens", type=int, default=256, help="of an answer")
    options = parser.parse_args(arguments)
    try:
        return guarded(lambda: chat(options))
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
