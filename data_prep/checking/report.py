"""What a check found, as JSON and as tables."""

import argparse
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.checking.findings import Findings
from data_prep.checking.token_lengths import length_summary
from fmtrain.command_line import printable

_EXAMPLES = 3  # of each kind of problem, in the table
_BAR = 40  # characters of the longest bar of the histogram


def report(findings: Findings, options: argparse.Namespace) -> dict[str, Any]:
    """All findings in JSON's types. `problems` counts the bad rows of each kind; a row may have
    several."""
    bad_rows = []
    for file, numbers in findings.bad.items():
        for number, problems in numbers.items():
            bad_rows.append(
                {
                    "file": file.name,
                    "row": number,
                    "id": findings.ids[file, number],
                    "problems": [problem._asdict() for problem in problems],
                }
            )
    kinds = Counter()
    for row in bad_rows:
        kinds.update(list(dict.fromkeys(problem["kind"] for problem in row["problems"])))
    return {
        "rows": findings.rows,
        "bad": len(bad_rows),
        "images": findings.images,
        "problems": dict(kinds.most_common()),
        "ignored": dict(findings.ignored.most_common()),
        "tokens": length_summary(findings.lengths, options.max_length)
        if options.processor
        else None,
        "unreadable_evaluation_images": findings.unreadable_evaluation,
        "moved_to": str(options.reject) if options.reject and bad_rows else None,
        "bad_rows": bad_rows,
    }


def print_report(summary: dict[str, Any], console: Console) -> None:
    """Tables of the problems and of the token lengths."""
    line = f"{summary['rows']:,} rows, {summary['images']:,} images opened"
    console.print(f"{line}, {summary['bad']:,} bad rows", highlight=False)
    if summary["problems"]:
        table = Table("problem", "rows", "for example")
        for kind, count in summary["problems"].items():
            table.add_row(kind, f"{count:,}", "\n".join(_examples(summary["bad_rows"], kind)))
        console.print(table)
    for kind, count in summary["ignored"].items():
        console.print(f"{count:,} rows with the problem {kind}, ignored", highlight=False)
    if summary["tokens"]:
        _print_tokens(summary["tokens"], console)
    if summary["unreadable_evaluation_images"]:
        names = summary["unreadable_evaluation_images"]
        example = escape(printable(names[0]))
        line = f"{len(names):,} evaluation images cannot be read, such as {example}"
        console.print(line, highlight=False)
    if summary["moved_to"]:
        line = f"{summary['bad']:,} rows moved to {escape(summary['moved_to'])}"
        console.print(line, highlight=False)


def _examples(bad_rows: list[dict[str, Any]], kind: str) -> list[str]:
    lines = []
    for row in bad_rows:
        for problem in row["problems"]:
            if problem["kind"] == kind and len(lines) < _EXAMPLES:
                line = f"{row['file']} row {row['row']}: {problem['detail']}"
                lines.append(escape(printable(line)))
    return lines


def _print_tokens(tokens: dict[str, Any], console: Console) -> None:
    table = Table("tokens", "rows", "")
    most = max(tokens["histogram"].values(), default=0) or 1
    for name, count in tokens["histogram"].items():
        table.add_row(name, f"{count:,}", "█" * round(_BAR * count / most))
    console.print(table)
    quantiles = [name for name in ("median", "p95") if name in tokens]
    line = "".join(f"{name} {tokens[name]:.0f}, " for name in quantiles)
    line += f"max {tokens['max']:,} tokens"
    if tokens["limit"] is not None:
        line += f", {tokens['over_limit']:,} over the limit of {tokens['limit']:,}"
    console.print(line, highlight=False)
