"""How often 95 % intervals of a paired difference hold the true one, by simulation.

    python -m eval.coverage [--trials 2000] [--out eval/results/coverage]

Two conditions with S training seeds each answer U rows; every answer is right or wrong. A seed
shifts the chance of a right answer, a row has a difficulty of its own. Three intervals of the same
draws: variance components (`eval.paired.mean`), the bootstrap that draws seeds and rows, and rows
alone, which takes the seeds as given. Written are OUT.json and OUT.md.
"""

import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.intervals import CONFIDENCE, SEED
from eval.paired import QuestionsOfTask, mean
from eval.provenance import made_with
from eval.tables import Table
from fmtrain.command_line import Parser, guarded, write_whole

SEEDS, ROWS, SPREADS = (3, 5), (200, 500), (0.0, 0.02, 0.1)
SHARES = ((0.6, 0.5), (0.94, 0.93))  # of right answers under the two conditions
OWN = 0.5  # chance that an answer is decided by the row's own difficulty, not by a new draw
METHODS = ("components", "bootstrap", "rows alone")
REPLICATES = 999


def answers(rng: np.random.Generator, share_S: np.ndarray, difficulty_U: np.ndarray) -> np.ndarray:
    """Zeros and ones [S, U]; the mean over rows and draws is share_S."""
    shape = len(share_S), len(difficulty_U)
    limit = np.where(rng.random(shape) < OWN, difficulty_U, rng.random(shape))
    return (limit < np.clip(share_S, 0, 1)[:, None]).astype(np.float64)


def draw(
    rng: np.random.Generator, runs: int, rows: int, spread: float, shares: tuple[float, float]
) -> np.ndarray:
    """Differences d [S, U]; `spread` is the standard deviation of a seed's mean difference."""
    difficulty_U = rng.random(rows)
    of_conditions = []
    for share in shares:
        share_S = share + rng.normal(0, spread / np.sqrt(2), runs)
        of_conditions.append(answers(rng, share_S, difficulty_U))
    return of_conditions[0] - of_conditions[1]


def covered(
    runs: int, rows: int, spread: float, shares: tuple[float, float], trials: int
) -> dict[str, float]:
    """{method: share of the trials whose interval holds the true difference}."""
    rng = np.random.default_rng([SEED, runs, rows, round(1000 * spread), round(100 * shares[0])])
    truth, hits = shares[0] - shares[1], dict.fromkeys(METHODS, 0)
    task, tail = QuestionsOfTask("t", np.arange(rows)), (1 - CONFIDENCE) / 2
    weights_RS = rng.multinomial(runs, [1 / runs] * runs, size=REPLICATES) / runs
    weights_RU = rng.multinomial(rows, [1 / rows] * rows, size=REPLICATES) / rows
    for _ in range(trials):
        d_SU = draw(rng, runs, rows, spread, shares)
        replicates_R = np.einsum("rs,rs->r", weights_RU @ d_SU.T, weights_RS)
        limits = {
            "components": mean([task], {"t": d_SU}).interval(),
            "bootstrap": np.quantile(replicates_R, [tail, 1 - tail]),
            "rows alone": mean([task], {"t": d_SU.mean(0, keepdims=True)}).interval(),
        }
        for method, (low, high) in limits.items():
            hits[method] += bool(low <= truth <= high)
    return {method: count / trials for method, count in hits.items()}


def table(entries: Sequence[dict]) -> Table:
    """Coverage in percent, a line for each case."""
    lines = []
    for one in entries:
        case = [str(one[key]) for key in ("seeds", "rows", "spread")]
        shares = " and ".join(map(str, one["shares"]))
        lines.append([*case, shares, *(f"{100 * one[method]:.1f}" for method in METHODS)])
    header = ["seeds", "rows", "sd of seeds", "shares right", *METHODS]
    return Table("Coverage of 95 % intervals, in percent", header, lines, labels=4)


def simulate(options: Namespace) -> None:
    entries = []
    for shares, runs, rows, spread in itertools.product(SHARES, SEEDS, ROWS, SPREADS):
        if max(shares) + 2 * spread > 1:
            continue  # a share above 1 would be cut, and the true difference another one
        case = {"seeds": runs, "rows": rows, "spread": spread, "shares": list(shares)}
        entries.append(case | covered(runs, rows, spread, shares, options.trials))
    command = f"python -m eval.coverage --trials {options.trials} --out {options.out}"
    result = {"trials": options.trials, "coverage": entries, "made": made_with(command, {})}
    text = table(entries).as_markdown()
    write_whole(options.out.with_suffix(".json"), json.dumps(result, indent=1))
    head = f"`{command}`: {options.trials} trials a line.\n\n"
    write_whole(options.out.with_suffix(".md"), head + text)
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.coverage", __doc__)
    parser.add_argument("--trials", type=int, default=2000, help="of each case")
    parser.add_argument("--out", type=Path, default=Path("eval/results/coverage"))
    options = parser.parse_args(arguments)
    return guarded(lambda: simulate(options))


if __name__ == "__main__":
    sys.exit(main())
