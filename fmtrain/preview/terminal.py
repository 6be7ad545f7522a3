"""A row as the terminal shows it: its tokens by role, its labels, its figures, and its mask where
it is short."""

from dataclasses import dataclass
from itertools import groupby

import torch
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fmtrain.data.encode import IGNORED
from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask, picture
from fmtrain.preview.drawing import in_words
from fmtrain.preview.pictures import Picture
from fmtrain.preview.spans import Figures, Span, figures, spans

STYLES = {
    Role.TEXT: "cyan",
    Role.VISUAL: "black on green",
    Role.ANSWER: "bold magenta",
    Role.PAD: "dim",
}
MARKS = {"#": "blue", "+": "bold bright_red", "o": "red", ".": "dim", "x": "dim"}
MARKS |= {"T": "cyan", "A": "bold magenta", **dict.fromkeys("IJKL", "green")}
GRID = 32  # tokens along an edge of the mask in the terminal
HEAD, TAIL = 320, 160  # characters of a long text that are shown


@dataclass(frozen=True)
class EncodedRow:
    """A row as the model gets it: token ids [1, T], their layout [1, T] and labels [1, T], and its
    pictures."""

    name: str
    ids: torch.Tensor
    layout: Layout
    labels: torch.Tensor
    pictures: tuple[Picture, ...] = ()


def visible(words: str) -> str:
    """On one line, with nothing hidden: line ends as ↵, whatever else cannot be seen as its
    escape."""
    shown = []
    for character in words:
        if character == "\n":
            shown.append("↵")
        else:
            escaped = character.encode("unicode_escape").decode()
            shown.append(character if character.isprintable() else escaped)
    return "".join(shown)


def content(
    tokenizer, ids: list[int], row: list[Span], learnt: list[bool], full: bool = False
) -> Text:
    """The tokens of neighbouring spans: texts by role, labels underlined, images and padding as
    their counts."""
    text = Text(overflow="fold")
    for span in row:
        if span.role in (Role.VISUAL, Role.PAD):
            text.append(f"[{span.label} × {span.length}]", STYLES[span.role])
            continue
        context = max(0, span.start - 1)  # decoded with it, a blank in front is not lost
        before = tokenizer.decode(ids[context : span.start])
        words = visible(tokenizer.decode(ids[context : span.stop]).removeprefix(before))
        style = STYLES[span.role] + (" underline" if all(learnt[span.start : span.stop]) else "")
        if full or len(words) <= HEAD + TAIL + 40:
            text.append(words, style)
            continue
        text.append(words[:HEAD], style)
        text.append(f" … {len(words) - HEAD - TAIL:,} characters … ", "dim")
        text.append(words[-TAIL:], style)
    return text


def listing(row: EncodedRow, tokenizer, full: bool = False) -> Table:
    """The row, a line for each prefill and answer."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("sample", "part", "tokens", "labels"):
        table.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    table.add_column("", ratio=1)
    ids = row.ids[0].tolist()
    learnt = (row.labels[0] != IGNORED).tolist()

    def part_of(span: Span) -> tuple[int, int, bool]:
        return span.sample, span.prefill, span.role == Role.PAD

    for (sample, prefill, padding), part in groupby(spans(row.layout), key=part_of):
        part = list(part)
        start, stop = part[0].start, part[-1].stop
        name = Text(f"prefill {prefill}")
        if padding:
            name = Text("padding", "dim")
        elif prefill < 0:
            name = Text("answer", STYLES[Role.ANSWER])
            if not any(learnt[start:stop]):
                name.append(" of the prompt", "dim")
        place = f"{start}–{stop - 1}" if stop - start > 1 else str(start)
        count = sum(learnt[start:stop])
        words = content(tokenizer, ids, part, learnt, full)
        table.add_row("" if padding else str(sample), name, place, str(count or ""), words)
    return table


def legend() -> Text:
    text = Text()
    for name, role in (("text", Role.TEXT), ("[image]", Role.VISUAL), ("answer", Role.ANSWER)):
        text.append(name, STYLES[role]).append("  ")
    text.append("label", "underline").append(": what the model learns to say  ")
    return text.append("↵ line end  prefill: what is fed in one go before an answer", "dim")


def table_of(counts: Figures, mask: Mask, max_length: int | None) -> Table:
    """The figures of a row, each with what it means."""
    room = Text("no max_length is set", "dim")
    if max_length is not None and counts.tokens > max_length:
        over = f"{counts.tokens - max_length:,} over max_length {max_length:,}"
        room = Text(f"{over}: training drops this row", "bold red")
    elif max_length is not None:
        room = Text(f"fits max_length {max_length:,}", "green")
    learnt = "underlined above"
    if not counts.label_tokens:
        learnt = Text("training refuses a row without an answer", "bold red")
    share = f"causal attention alone: {counts.causal:,} pairs"
    if counts.ahead:
        percent = 100 * counts.ahead / max(1, counts.causal)
        share = f"+{percent:.1f} % on causal attention's {counts.causal:,}"
    words = in_words(mask)
    if mask.merge:
        words += ": what they would get goes to the first positions"
    lines = [
        ("tokens", counts.tokens, room),
        ("image tokens", counts.image_tokens, _plural("in", counts.images, "image")),
        ("label tokens", counts.label_tokens, learnt),
        ("prefills", counts.prefills, _plural("in", counts.samples, "sample")),
        ("pairs pooled" if mask.merge else "pairs revealed", counts.ahead, share),
        ("mask", str(mask), words),
    ]
    if counts.unseen is not None:
        lines.insert(-1, ("questions", counts.questions, _seen(counts)))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for width in (None, None, 48):
        table.add_column(max_width=width)
    for name, value, meaning in lines:
        figure = f"{value:,}" if isinstance(value, int) else value
        table.add_row(Text(name, "dim"), Text(figure, "bold", justify="right"), meaning)
    return table


def _seen(counts: Figures) -> Text:
    """How many questions no picture sees, and what is done about it."""
    if not counts.unseen:
        return Text("a picture sees each of them", "green")
    return Text(f"{counts.unseen} seen by no picture; see `turns: split`", "bold red")


def _plural(before: str, count: int, noun: str) -> str:
    return f"{before} {count} {noun}{'s' * (count != 1)}"


def grid(layout: Layout, mask: Mask) -> Text | None:
    """The mask as text; a long row with every span shortened to two tokens; None if that is too
    long as well."""
    index = torch.arange(layout.shape[1])
    shortened = len(index) > GRID
    if shortened:
        ends: list[int] = []
        for span in spans(layout):
            ends += sorted({span.start, span.stop - 1})
        index = torch.tensor(ends)
    if len(index) > GRID:
        return None
    text = Text()
    for character in picture(mask, layout[:1, index]):
        text.append(character, MARKS.get(character, ""))
    ahead = "o pooled, not attended to" if mask.merge else "+ revealed"
    text.append(f"\n# causal  {ahead}  . closed", "dim")
    return text.append("\n(stretches shortened to two tokens)", "dim") if shortened else text


def report(
    row: EncodedRow, mask: Mask, tokenizer, max_length: int | None = None, full: bool = False
) -> Group:
    """What the preview prints."""
    counts = table_of(figures(row.labels, row.layout, mask), mask, max_length)
    drawn = grid(row.layout, mask) or "--png FILE draws the mask"
    facts = Columns([counts, drawn], padding=(1, 4))  # or one below the other
    name = Text(row.name, "bold")
    return Group(name, "", listing(row, tokenizer, full), "", legend(), "", facts)
