"""The (mask in training) x (mask in inference) matrix: train what is missing, evaluate, compare, report.

    python -m eval.matrix recipes/matrices/tiny.yaml [--KEY VALUE ..] [--wandb]
    python -m eval.matrix CHECKPOINT CHECKPOINT .. --out DIR [--KEY VALUE ..]

Every checkpoint is evaluated under every inference mask, cell by cell; a matrix that is killed goes on where it stopped
when the same command is given again. The keys are those of `eval.matrix.recipe.MatrixRecipe`, VALUE is YAML. Written to
`out`: report.html, cells.csv, comparisons.csv, results.md, results.tex, and results.json, from which
`python -m eval.matrix.report` makes the others again.
"""

import json
import multiprocessing
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from eval import provenance
from eval.matrix import analysis as tabulate
from eval.matrix import cells, milebench_scores, report, runs, tracking
from eval.matrix import recipe as matrix_recipe
from eval.matrix.analysis import CAUSAL, Row
from eval.matrix.cells import HeldOut
from eval.matrix.recipe import MatrixRecipe
from eval.matrix.runs import Run
from eval.matrix.showcase import showcase
from eval.milebench.decoder import Variant
from eval.paired import OVERALL

console = Console(stderr=True, highlight=False)


def eval_variants(recipe: MatrixRecipe, plan: Sequence[Run]) -> list[Variant]:
    """The inference masks: those named, or causal and every mask of training."""
    names = recipe.eval_masks or list(dict.fromkeys([CAUSAL, *(run.mask for run in plan)]))
    return [recipe.variant(name) for name in names]


def source(recipe: MatrixRecipe) -> tuple:
    """Arguments of `cells.held_out`."""
    return recipe.data, tuple(recipe.tasks), recipe.rows_per_task, recipe.image_root


class Work:
    """Trains and evaluates the runs of a plan, `jobs` of them at a time; with more than one, in processes of their own."""

    def __init__(self, recipe: MatrixRecipe, variants: Sequence[Variant], there: HeldOut):
        self.recipe, self.variants, self.there = recipe, variants, there
        self.started: list[subprocess.Popen] = []
        self.stopped = False

    def todo(self, run: Run) -> list[Variant]:
        if not runs.finished(run):
            return list(self.variants)
        return cells.missing(
            self.recipe.folder,
            run.name,
            run.folder,
            self.variants,
            self.there,
            self.recipe.max_new_tokens,
        )

    def one(self, run: Run, pool: ProcessPoolExecutor | None) -> str:
        """Make one run and its cells; returns what was done."""
        if self.stopped:
            return "not started"
        trained = run.recipe is not None and runs.train(run, self.recipe, self.started)
        made = 0
        if self.todo(run):
            place = self.recipe.folder, run.name, run.folder
            how = (
                self.variants,
                source(self.recipe),
                self.recipe.batch_size,
                self.recipe.max_new_tokens,
            )
            made = (
                pool.submit(cells.evaluate, *place, *how).result()
                if pool
                else cells.evaluate(*place, *how)
            )
        return (
            ", ".join(
                [*(["trained"] if trained else []), *([f"{made} cells evaluated"] if made else [])]
            )
            or "finished before"
        )

    def all(self, plan: Sequence[Run]) -> None:
        """Make everything that is missing. Raises `ValueError` for the first run that fails, when those under way ended."""
        pool, jobs = None, self.recipe.jobs
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(
                jobs, spawn, initializer=cells.prepare_worker, initargs=(self.recipe.threads,)
            )
        elif self.recipe.threads:
            torch.set_num_threads(self.recipe.threads)
        threads = ThreadPoolExecutor(jobs)
        try:
            self._watch({threads.submit(self.one, run, pool): run for run in plan}, plan)
        finally:
            self.stopped = True
            for process in self.started:
                if process.poll() is None:
                    process.terminate()  # it saves a checkpoint
            threads.shutdown(cancel_futures=True)
            if pool:
                pool.shutdown()

    def _watch(self, futures: dict[Future, Run], plan: Sequence[Run]) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        paths = [
            cells.cell_path(self.recipe.folder, run.name, variant.name)
            for run in plan
            for variant in self.variants
        ]
        with Progress(*columns, console=console) as progress:
            trained = progress.add_task("runs", total=len(plan))
            evaluated = progress.add_task("cells", total=len(paths))
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                for future in done:
                    progress.console.print(f"{futures[future].name}: {future.result()}")
                progress.update(trained, completed=sum(map(runs.finished, plan)))
                progress.update(evaluated, completed=sum(path.is_file() for path in paths))


def collect(
    recipe: MatrixRecipe, plan: Sequence[Run], variants: Sequence[Variant], there: HeldOut | None
) -> dict:
    """The results of a matrix whose cells are all there."""
    names = [variant.name for variant in variants]
    rows = [Row(row, next(run.mask for run in plan if run.row == row), tuple(run.name for run in plan if run.row == row))
            for row in dict.fromkeys(run.row for run in plan)]  # fmt: skip
    if there is None:
        items, scores = milebench_scores.read(Path(recipe.scores), plan, names, recipe.tasks)
        shown = []
    else:
        found = {
            (run.name, name): cells.read_cell(cells.cell_path(recipe.folder, run.name, name))
            for run in plan
            for name in names
        }
        items, scores = there.items, {cell: content["scores"] for cell, content in found.items()}
        answers = {cell: content["answers"] for cell, content in found.items()}
        shown = showcase(there, rows, names, scores, answers, recipe.samples)
    return {"title": recipe.title, **tabulate.results(rows, names, items, scores), "samples": shown}


def print_overall(results: dict) -> None:
    table = Table(
        title="right answers in percent, mean of the tasks, and 95 % interval; * the mask of training",
        title_justify="left",
    )
    table.add_column("mask in training", no_wrap=True)
    for mask in results["masks"]:
        table.add_column(mask, justify="right", no_wrap=True)
    for row in results["rows"]:
        found = [
            cell
            for cell in results["cells"]
            if cell["row"] == row["name"] and cell["task"] == OVERALL
        ]
        marks = ["* " if row["mask"] == cell["mask"] else "" for cell in found]
        texts = [
            f"{100 * one['score']:.1f}\n{100 * one['low']:.0f}..{100 * one['high']:.0f}"
            for one in found
        ]
        table.add_row(row["name"], *(mark + text for mark, text in zip(marks, texts)))
    Console(width=140).print(table)


def parse(arguments: Sequence[str]) -> tuple[MatrixRecipe, bool]:
    """The recipe and whether to log to W&B. Raises `ValueError`."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "usage: python -m eval.matrix RECIPE.yaml | CHECKPOINT .. [--KEY VALUE ..] [--wandb]"
        )
    first = next(
        (k for k, argument in enumerate(arguments) if argument.startswith("--")), len(arguments)
    )
    given, rest = (
        list(arguments[:first]),
        [argument for argument in arguments[first:] if argument != "--wandb"],
    )
    overrides: dict[str, str] = {}
    while rest:
        option = rest.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not (equals or rest):
            raise ValueError(f"{option!r}: expected --KEY VALUE")
        overrides[name.replace("-", "_")] = value if equals else rest.pop(0)
    if len(given) == 1 and not Path(given[0]).is_dir():
        return matrix_recipe.read(given[0], overrides), "--wandb" in arguments
    missing = [path for path in given if not Path(path).is_dir()]
    if missing:
        raise ValueError(
            f"{missing[0]}: no such checkpoint folder (give one recipe, or checkpoint folders)"
        )
    return matrix_recipe.read(
        None, {"checkpoints": json.dumps(given)} | overrides
    ), "--wandb" in arguments


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers"
    )  # of names that TRL still sets
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    try:
        recipe, wandb = parse(arguments)
        plan = runs.plan(recipe)
        variants = eval_variants(recipe, plan)
        there = None
        if recipe.scores is None:
            there = cells.held_out(*source(recipe))
            Work(recipe, variants, there).all(plan)
        results = collect(recipe, plan, variants, there)
        written = {
            "matrix": arguments[0] if Path(arguments[0]).is_file() else None,
            "training": recipe.recipe,
        }
        results["made"] = provenance.made_with(
            shlex.join(["python", "-m", "eval.matrix", *arguments]), written
        )
        report.write(Path(recipe.out), results, recipe.published)
        if wandb:
            tracking.log(results, Path(recipe.out))
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_overall(results)
    print(f"wrote {recipe.out}/report.html")
    return 0
