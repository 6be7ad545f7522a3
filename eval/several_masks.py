"""Train one model under several masks: each micro-batch runs under one of them, drawn at random.

    python -m eval.several_masks RECIPE --masks causal v2v --seeds 0 1 --out DIR [--key value ..]

Other keys are overrides of the recipe (`fmtrain train --help`). DIR/<name of DIR>-seed<k> holds the
run of a seed. A micro-batch has `per_device_train_batch_size` rows; 1 draws row by row. The
checkpoint records the recipe's mask, which has to look ahead; a matrix asks it under every mask
(`checkpoints`, see recipes/matrices/learning_several.yaml).
"""

import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fmtrain.command_line import Parser, guarded, quiet
from fmtrain.masks import Mask
from fmtrain.patch import attached
from fmtrain.training import recipe as recipes
from fmtrain.training.build import build_trainer
from fmtrain.training.model import load_processor_of, load_weights
from fmtrain.training.rows import rows_of_run
from fmtrain.training.tracking import say
from fmtrain.training.trainer import SFTTrainer


class SeveralMasks(SFTTrainer):
    """fmtrain's trainer, which trains under masks that are drawn from the seed. What is evaluated
    and saved is under the recipe's."""

    def __init__(self, *args, masks: Sequence[Mask], **others):
        super().__init__(*args, **others)
        self._masks, self._draws = masks, random.Random(self.args.seed)

    def training_step(self, model, *args, **kwargs):
        with attached(model).under(self._draws.choice(self._masks)):
            return super().training_step(model, *args, **kwargs)


def train(recipe_path: str, words: Sequence[str], masks: Sequence[Mask]) -> None:
    """One run of the recipe with these overrides; raises `ValueError` if its mask is causal."""
    recipe = recipes.read(recipe_path, words)
    if not recipe.mask.looks_ahead:
        raise ValueError(
            f"{recipe_path}: its mask is {recipe.mask}, whose attention is the model's own and "
            "runs under no other; record one that looks ahead with --mask"
        )
    processor, config = load_processor_of(recipe)
    rows, eval_rows = rows_of_run(recipe, processor, config)
    kind = partial(SeveralMasks, masks=masks)
    trainer = build_trainer(recipe, load_weights(recipe), processor, rows, eval_rows, kind)
    say(f"each micro-batch runs under one of {', '.join(map(str, masks))}; recorded: {recipe.mask}")
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.several_masks", __doc__)
    parser.allow_abbrev = False  # --mask and --seed are the recipe's
    parser.add_argument("recipe", help="of training: a YAML file or the name of a shipped one")
    parser.add_argument("--masks", nargs="+", required=True, help="to draw from")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options, words = parser.parse_known_args(arguments)
    quiet()
    return guarded(lambda: train_all(options, words))


def train_all(options: Namespace, words: Sequence[str]) -> None:
    masks = [Mask.parse(name) for name in options.masks]
    for seed in options.seeds:
        run = options.out / f"{options.out.name}-seed{seed}"
        train(options.recipe, [*words, "--seed", str(seed), "--output_dir", str(run)], masks)


if __name__ == "__main__":
    sys.exit(main())
