"""Supervised fine-tuning of a LLaVA under an attention mask.

    accelerate launch fmtrain/sft.py recipes/llava7b_v2v_lora.yaml [--any_trl_argument value]

Reads top to bottom: recipe, run folder, rows, model, mask, trainer, training (which audits a real
batch first), saving.
"""

import os
import sys

# `accelerate launch fmtrain/sft.py` puts fmtrain/ itself first on the path.
if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

import datasets
import torch

from fmtrain.attention import auto, kernels
from fmtrain.command_line import asks_for_help, one_line, quiet
from fmtrain.data.aspect import described
from fmtrain.data.render import markers
from fmtrain.patch import attach
from fmtrain.training import keys, packing, trainable
from fmtrain.training import recipe as recipes
from fmtrain.training.answers import answers_of
from fmtrain.training.head import check_liger
from fmtrain.training.model import load_processor_of, load_weights
from fmtrain.training.rows import check_boxes, evaluation_rows, training_rows
from fmtrain.training.run_folder import check_resumed, checkpoint_of, record_of, recorded
from fmtrain.training.tracking import prepare_tracking, say, say_error
from fmtrain.training.trainer import SaveOnTerm, build_trainer


def main(arguments: list[str]) -> int:
    """Train as a recipe says, or print the keys of one (`--help`); returns 0. Raises `ValueError`,
    in one line, for what does not fit."""
    if asks_for_help(arguments):
        print(f"{__doc__}\n{keys.described()}")
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "usage: accelerate launch fmtrain/sft.py RECIPE.yaml [--any_trl_argument value]"
        )
    recipe = recipes.read(arguments[0], arguments[1:])
    check_liger(recipe)
    training = recipe.training
    checkpoint = checkpoint_of(recipe)
    prepare_tracking(training.report_to)

    processor, config = load_processor_of(recipe)
    for line in [described(processor), *check_boxes(recipe, processor)]:
        say(line)
    positions = config.get_text_config().max_position_embeddings
    rows = training_rows(recipe, processor, checkpoint, positions)
    eval_rows = evaluation_rows(recipe, processor, positions)
    answers = answers_of(recipe, processor, eval_rows)
    say(f"{rows.size} rows; {rows.dropped} dropped, longer than max_length {training.max_length}")

    kernels.use(recipe.masking.flash_impl)
    model = load_weights(recipe)
    backend, packed = recipe.masking.attention_backend, packing.packs(training)
    handle = attach(model, recipe.mask, backend, markers=markers(processor), packed=packed)
    if backend == "auto" and not handle.host:
        say(f"attention: {auto.described(training.device)}")
    stop = SaveOnTerm()
    trainer = build_trainer(recipe, model, processor, rows, eval_rows, stop, answers)
    say(trainable.summary(trainer.model))
    record = record_of(recipe, handle, processor, rows, trainer.model, trainer.packs)
    check_resumed(checkpoint, record)

    with recorded(recipe, record, trainer.is_world_process_zero()):
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked:
        step = trainer.state.global_step
        say(f"stopped by SIGTERM at step {step}; resume with --resume_from_checkpoint true")
        return 0
    trainer.save_model()
    trainer.save_state()
    say(f"saved to {training.output_dir}; next: fmtrain export {training.output_dir} --out DIR")
    return 0


def run(arguments: list[str]) -> int:
    """`main`, with errors of one line (of bad rows a line each) and exit code 2."""
    quiet()
    datasets.logging.set_verbosity_error()
    try:
        status = main(arguments)
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
