"""Does the model see in training what it will see in inference? `fmtrain.consistency` as a command.

python -m fmtrain.audit CHECKPOINT_OR_RECIPE
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fmtrain.attention import kernels
from fmtrain.checkpoint import load
from fmtrain.command_line import Parser, guarded, write_whole
from fmtrain.consistency import Result, check
from fmtrain.data import noise
from fmtrain.data.render import markers
from fmtrain.patch import attach, attached
from fmtrain.training import recipe as recipes
from fmtrain.training.model import load_model
from fmtrain.training.rows import rows_of

ROWS = 4  # of a recipe's data


def subject(name: str):
    """Model with its mask, processor, a few rows and their image folder, of a checkpoint or a
    recipe."""
    if Path(name).suffix not in (".yaml", ".yml"):
        model, processor = load(name)
        return model, processor, noise.rows(), "."
    # A recipe in bf16 may be audited where there is no GPU.
    accelerated = torch.accelerator.is_available()
    recipe = recipes.read(name, [] if accelerated else ["--use_cpu", "true"])
    kernels.use(recipe.masking.flash_impl if accelerated else "torch")
    model, processor = load_model(recipe)
    attach(model, recipe.mask, recipe.masking.attention_backend, markers=markers(processor))
    rows = rows_of(recipe, ROWS)
    return model.eval(), processor, rows.first(ROWS), rows.image_root


def table(results: list[Result], title: str) -> Table:
    shown = Table(title=title)
    for column in ("check", "result", "figure"):
        shown.add_column(column)
    for result in results:
        shown.add_row(
            result.check, "[green]pass[/]" if result.passed else "[bold red]FAIL[/]", result.figure
        )
    return shown


def audit(name: str, out: str | None = None) -> int:
    """Check, print and write the results to `out` (default: audit.json in the checkpoint, or here);
    1 if one fails."""
    model, processor, rows, image_root = subject(name)
    results = check(model, processor, rows, image_root)
    mask = attached(model).mask
    Console().print(table(results, f"audit of {name} under {mask}"))
    passed = all(result.passed for result in results)
    checks = [asdict(result) for result in results]
    report = {"subject": name, **mask.record(), "passed": passed, "checks": checks}
    folder = Path(name) if Path(name).is_dir() else Path(".")
    write_whole(out or folder / "audit.json", json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("fmtrain audit", __doc__)
    parser.add_argument(
        "subject", help="an exported checkpoint, a run with an adapter, or a recipe"
    )
    parser.add_argument(
        "--json", help="where to write the results (default: audit.json in the checkpoint, or here)"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: audit(options.subject, options.json))


if __name__ == "__main__":
    sys.exit(main())
