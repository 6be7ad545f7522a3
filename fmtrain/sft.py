"""Supervised fine-tuning of a LLaVA under an attention mask.

    accelerate launch fmtrain/sft.py recipes/llava7b_v2v_lora.yaml [--any_trl_argument value]

Reads top to bottom: recipe, run folder, rows, model, `fmtrain.SFTTrainer`, training (which audits a
real batch first), saving. Nothing here that a script of one's own could not call.
"""

import os
import signal
import sys
from pathlib import Path

# `accelerate launch fmtrain/sft.py` puts fmtrain/ itself first on the path.
if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

import datasets
import torch
import yaml

from fmtrain.command_line import TRY_AGAIN, asks_for_help, one_line, quiet
from fmtrain.data.aspect import described
from fmtrain.training import dry_run, keys
from fmtrain.training import recipe as recipes
from fmtrain.training.answers import check_answers
from fmtrain.training.build import build_trainer
from fmtrain.training.checkpoints import saving
from fmtrain.training.model import load_processor_of, load_weights
from fmtrain.training.rows import rows_of_run
from fmtrain.training.run_folder import RECIPE, checkpoint_of, recorded
from fmtrain.training.stopping import SIGNALS
from fmtrain.training.tracking import prepare_tracking, say, say_error


def main(arguments: list[str]) -> int:
    """Train as a recipe says, or print the keys of one (`--help`); returns 0, or 75 if a
    signal has stopped it and it has saved. Raises `ValueError`,
    in one line, for what does not fit."""
    if asks_for_help(arguments):
        print(f"{__doc__}\n{keys.described()}")
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "usage: accelerate launch fmtrain/sft.py RECIPE.yaml [--any_trl_argument value]"
        )
    if dry_run.asked(arguments):
        return dry_run.main(arguments)
    recipe = recipes.read(arguments[0], arguments[1:])
    training, resume = recipe.training, recipe.training.resume_from_checkpoint
    checkpoint = checkpoint_of(training, recipe.mask, resume)
    check_answers(training, recipe.evaluation, recipe.mask)
    prepare_tracking(training.report_to)

    processor, config = load_processor_of(recipe)
    say(described(processor))
    rows, eval_rows = rows_of_run(recipe, processor, config, checkpoint)

    trainer = build_trainer(recipe, load_weights(recipe), processor, rows, eval_rows)
    resolved = {RECIPE: yaml.safe_dump(recipe.resolved, sort_keys=False)}
    with recorded(training.output_dir, resolved, trainer.is_world_process_zero()):
        trainer.train(resume_from_checkpoint=checkpoint or resume)
    if trainer.stopping.asked:
        ignore_signals()
        name, step = trainer.stopping.signal or "a signal", trainer.state.global_step
        say(
            f"stopped by {name} and saved at step {step} (exit code {TRY_AGAIN}); resume with "
            "--resume_from_checkpoint true"
        )
        return TRY_AGAIN
    with saving(training.output_dir, Path(training.output_dir)):
        trainer.save_model()
        trainer.save_state()
    say(f"saved to {training.output_dir}; next: fmtrain export {training.output_dir} --out DIR")
    return 0


def try_again(number: int, frame) -> None:
    """What a signal does where there is no step to save."""
    say(f"stopped by {signal.Signals(number).name} outside of training, with nothing to save")
    sys.exit(TRY_AGAIN)


def ignore_signals() -> None:
    """How this process ends is settled: a launcher ends the others when the first one has ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run(arguments: list[str]) -> int:
    """`main`, with errors of one line (of bad rows a line each) and exit code 2."""
    for number in SIGNALS:
        signal.signal(number, try_again)
    quiet()
    datasets.logging.set_verbosity_error()
    try:
        try:
            status = main(arguments)
        finally:
            ignore_signals()
    except (ValueError, OSError) as error:
        message = one_line(error) if isinstance(error, OSError) else str(error).strip()
        if "Traceback (most recent call last)" in message:  # of a data worker; its message is last
            message = message.splitlines()[-1].removeprefix("ValueError: ")
        say_error(message)
        status = 2
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
