"""The (mask in training) x (mask in inference) matrix: train, evaluate, compare, report.

    python -m eval.matrix recipes/matrices/tiny.yaml [--KEY VALUE ..] [--wandb]
    python -m eval.matrix CHECKPOINT CHECKPOINT .. --out DIR [--KEY VALUE ..]

What is missing is trained, and every checkpoint is evaluated under every inference mask; a matrix
that is killed goes on where it stopped when the same command is given again. Written to `out`:
report.html, cells.csv, comparisons.csv, results.md, results.tex, results.json, and all answers in
answers.jsonl.gz and what runs logged while they trained in curves.json, from which
`python -m eval.matrix.report` computes every figure again.
"""

import multiprocessing
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval import held_out
from eval.held_out import HeldOut
from eval.matrix import (
    analysis,
    answers,
    cells,
    curves,
    milebench_scores,
    numbers,
    report,
    runs,
    tracking,
)
from eval.matrix.analysis import CAUSAL, MatrixRow
from eval.matrix.answers import Answers
from eval.matrix.recipe import USAGE, MatrixRecipe, parse
from eval.matrix.runs import MatrixRun
from eval.matrix.showcase import showcase
from eval.provenance import made_with
from eval.tables import Table
from fmtrain.command_line import guarded, quiet
from fmtrain.masks import Mask

console = Console(stderr=True, highlight=False)


def inference_masks(recipe: MatrixRecipe, plan: Sequence[MatrixRun]) -> list[Mask]:
    """Those named, or causal and every mask of training, as the checkpoints record them.

    Raises `ValueError` for two masks of one name, which a report could not tell apart.
    """
    trained_with = [run.mask for run in plan]
    wanted = recipe.masks(recipe.eval_masks) or [Mask.parse(CAUSAL), *trained_with]
    by_name: dict[str, Mask] = {}
    for mask in [*wanted, *trained_with]:
        known = by_name.setdefault(str(mask), mask)
        if known != mask:
            raise ValueError(
                f"two masks are called {str(mask)!r}: {known.merge or known.policy} and "
                f"{mask.merge or mask.policy}; give the recipe the merge options that the "
                "checkpoints record"
            )
    return list(dict.fromkeys(wanted))


def source(recipe: MatrixRecipe) -> tuple:
    """Arguments of `held_out.by_task`."""
    return recipe.data, tuple(recipe.tasks), recipe.rows_per_task, recipe.image_root


class Work:
    """Trains and evaluates the runs of a plan, `jobs` of them at a time.

    With more than one, evaluation is in processes of their own.
    """

    def __init__(self, recipe: MatrixRecipe, masks: Sequence[Mask], data: HeldOut):
        self.recipe, self.masks, self.data = recipe, masks, data
        self.started: list[subprocess.Popen] = []
        self.stopped = False

    def one(self, run: MatrixRun, pool: ProcessPoolExecutor | None) -> str:
        """Make one run and its cells; returns what was done."""
        if self.stopped:
            return "not started"
        recipe, done = self.recipe, []
        if run.recipe is not None and runs.train(run, recipe, self.started):
            done.append("trained")
        settings = recipe.max_new_tokens, run.image_aspect
        keys = cells.cell_keys(run.folder, self.masks, self.data, *settings)
        if cells.missing(recipe.folder, run.name, keys):
            work = (recipe.folder, run.name, run.folder, self.masks, source(recipe))
            work += (recipe.batch_size, *settings)
            made = pool.submit(cells.evaluate, *work).result() if pool else cells.evaluate(*work)
            done.append(f"{made} cells evaluated")
        return ", ".join(done) or "finished before"

    def all(self, plan: Sequence[MatrixRun]) -> None:
        """Make everything that is missing.

        Raises `ValueError` for the first run that fails, when those under way ended.
        """
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

    def _watch(self, futures: dict[Future, MatrixRun], plan: Sequence[MatrixRun]) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        paths = []
        for run in plan:
            paths += [cells.cell_path(self.recipe.folder, run.name, mask) for mask in self.masks]
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


def matrix_rows(plan: Sequence[MatrixRun]) -> list[MatrixRow]:
    """The rows of the matrix, each with its runs."""
    by_row: dict[str, list[MatrixRun]] = {}
    for run in plan:
        by_row.setdefault(run.row, []).append(run)
    rows = []
    for name, of_row in by_row.items():
        rows.append(MatrixRow(name, str(of_row[0].mask), tuple(run.name for run in of_row)))
    return rows


def collect(
    recipe: MatrixRecipe, plan: Sequence[MatrixRun], masks: Sequence[Mask], data: HeldOut | None
) -> Answers:
    """All answers of a matrix whose cells are all there. data: None where it is from scores."""
    names, scores, texts = [str(mask) for mask in masks], {}, {}
    if data is None:
        questions, scores = milebench_scores.read(Path(recipe.scores), plan, names, recipe.tasks)
        return Answers(questions, scores)
    for run in plan:
        for name in names:
            cell = cells.read_cell(cells.cell_path(recipe.folder, run.name, name))
            scores[run.name, name], texts[run.name, name] = cell["scores"], cell["answers"]
    return Answers(data.questions, scores, texts)


def overall(results: dict) -> Table:
    """The scores of the headline, for the terminal."""
    of_cell, rows = numbers.cells_of(results, results["headline"]), []
    for row in results["rows"]:
        texts = [row["name"]]
        for mask in results["masks"]:
            cell = of_cell[row["name"], mask]
            mark = "* " if row["mask"] == mask else ""
            interval = f"{100 * cell['low']:.0f}..{100 * cell['high']:.0f}"
            texts.append(f"{mark}{100 * cell['score']:.1f}\n{interval}")
        rows.append(texts)
    what = numbers.of_what(results["headline"])
    title = f"right answers in percent, {what}, and 95 % interval; * the mask of training"
    return Table(title, ["mask in training", *results["masks"]], rows)


def make(arguments: Sequence[str]) -> None:
    """Make a matrix and its report."""
    if not arguments:
        raise ValueError(USAGE)
    recipe, wandb = parse(arguments, __doc__)
    plan = runs.plan(recipe)
    masks, data = inference_masks(recipe, plan), None
    if recipe.scores is None:
        data = held_out.by_task(*source(recipe))
        Work(recipe, masks, data).all(plan)
    raw, rows, names = collect(recipe, plan, masks, data), matrix_rows(plan), list(map(str, masks))
    results = {"title": recipe.title, **analysis.results(rows, names, raw.questions, raw.scores)}
    measured = curves.of_runs(plan)
    results |= curves.results(rows, measured)
    results["milebench"] = None if data else milebench_scores.modes(Path(recipe.scores))
    results["chance"] = held_out.chance(recipe.data if data else None, results["tasks"])
    results["samples"] = showcase(data, rows, names, raw, recipe.samples) if data else []
    recipes = {
        "matrix": arguments[0] if Path(arguments[0]).is_file() else None,
        "training": recipe.recipe,
    }
    command = shlex.join(["python", "-m", "eval.matrix", *arguments])
    results["made"] = made_with(command, recipes)
    answers.write(Path(recipe.out), raw)
    curves.write(Path(recipe.out), measured)
    report.write(Path(recipe.out), results, recipe.published)
    if wandb:
        tracking.log(results, Path(recipe.out))
    Console(width=140).print(overall(results).as_rich())
    print(f"wrote {recipe.out}/report.html")


def main(arguments: Sequence[str] | None = None) -> int:
    # TRL still sets names that are deprecated.
    quiet()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()

    def command() -> None:
        try:
            make(list(sys.argv[1:] if arguments is None else arguments))
        except BrokenProcessPool as error:
            raise ValueError(f"a worker process ended: {error}") from error

    return guarded(command)
