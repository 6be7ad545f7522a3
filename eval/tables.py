"""Tables of text, and what they look like as CSV, Markdown, LaTeX and in the terminal."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table

MARKDOWN = {"|": "\\|", "\n": " "}
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: "\\" + character for character in "&%$#_{}"}


@dataclass(frozen=True)
class Table:
    """A table of text; its first `labels` columns are names, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    bold: set[tuple[int, int]] = field(default_factory=set)  # (row, column)

    def marked(self, open_: str, close: str, escape: dict[str, str]) -> list[list[str]]:
        """The rows with characters escaped, and bold cells between two marks."""
        rows = []
        for i, row in enumerate(self.rows):
            texts = [escaped(text, escape) for text in row]
            for j in range(len(texts)):
                if (i, j) in self.bold:
                    texts[j] = open_ + texts[j] + close
            rows.append(texts)
        return rows

    def as_csv(self) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])
        return file.getvalue()

    def as_markdown(self) -> str:
        rule = "|" + "---|" * self.labels + "---:|" * (len(self.header) - self.labels)
        header = [escaped(text, MARKDOWN) for text in self.header]
        lines = [f"### {self.title}", "", "| " + " | ".join(header) + " |", rule]
        for row in self.marked("**", "**", MARKDOWN):
            lines.append("| " + " | ".join(row) + " |")
        return "\n".join([*lines, ""])

    def as_latex(self) -> str:
        """A longtable (packages longtable, booktabs)."""
        columns = "l" * self.labels + "r" * (len(self.header) - self.labels)
        header = [escaped(text, LATEX) for text in self.header]
        lines = [
            rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{escaped(self.title, LATEX)}}} \\",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            r"\endhead",
        ]
        for row in self.marked(r"\textbf{", "}", LATEX):
            lines.append(" & ".join(row) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{longtable}", ""])

    def as_rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left")
        for k, column in enumerate(self.header):
            numbers = k >= self.labels
            table.add_column(column, justify="right" if numbers else "left", no_wrap=not numbers)
        for row in self.rows:
            table.add_row(*row)
        return table


def escaped(text: str, escape: dict[str, str]) -> str:
    """The text with some of its characters replaced."""
    return "".join(escape.get(character, character) for character in text)
