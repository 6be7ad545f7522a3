"""The keys of a recipe, by concept, with their defaults: what `fmtrain train --help` prints."""

import textwrap
from argparse import Action
from dataclasses import fields

from fmtrain.training.arguments import DataArguments, EvaluationArguments, MaskArguments
from fmtrain.training.recipe import parser

TRL = "https://huggingface.co/docs/trl/sft_trainer"
WIDTH, COLUMN = 100, 36
LEARNING = "train_parts", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"
CONCEPTS = {
    "The mask": [key.name for key in fields(MaskArguments)],
    "The data": [key.name for key in fields(DataArguments) if key.name != "train_parts"]
    + ["max_length", "packing", "padding_free", "dataset_num_proc", "dataloader_num_workers"],
    "The model, and what of it learns": ["model_name_or_path", "dtype", *LEARNING],
    "The run": [
        *("output_dir", "run_name", "resume_from_checkpoint", "max_steps", "num_train_epochs"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
        *("lr_scheduler_type", "warmup_steps", "bf16", "gradient_checkpointing", "torch_compile"),
        *("logging_steps", "save_steps", "save_total_limit", "report_to", "seed", "use_cpu"),
    ],
    "Evaluation": [
        *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "metric_for_best_model"),
        *("greater_is_better", "load_best_model_at_end", "eval_packing"),
        *(key.name for key in fields(EvaluationArguments)),
    ],
}
OPEN = {"output_dir": "runs/RECIPE-MASK-sSEED", "run_name": "RECIPE-MASK-sSEED"}
OURS = {  # where TRL's text says something else, or little
    "max_length": "Rows of more tokens are dropped whole and counted.",
    "packing": "Several rows in one of at most max_length tokens; batch sizes count packed rows.",
    "padding_free": "All rows of a batch in one, without padding.",
    "eval_steps": "Steps between evaluations, of eval_strategy: steps.",
    "metric_for_best_model": "What the best checkpoint is best in: eval_exact_match.",
    "gradient_accumulation_steps": "Batches of a process in one step.",
    "dtype": "Load the weights in this one.",
    "eval_packing": "packing of the evaluation rows; by default as in training.",
    "model_name_or_path": "A name on the hub, a folder, or `tiny`, the model inside the package.",
    "output_dir": "Where the run is written; a new folder, unless it is resumed.",
    "run_name": "Of the run, in W&B and elsewhere.",
    "resume_from_checkpoint": "true: the newest one of output_dir; or a checkpoint's folder.",
    "lora_r": "Rank of LoRA.",
    "lora_target_modules": "Ends of layers' names; by default all linear layers of train_parts.",
}


def described() -> str:
    """The keys of each concept, a line or more each; then the names of TRL's other ones."""
    actions: dict[str, Action] = {}
    for action in parser()._actions:
        actions.setdefault(action.dest, action)
    parts = []
    for concept, names in CONCEPTS.items():
        lines = [concept + ":"]
        for name in names:
            lines += _lines(actions.pop(name))
        parts.append("\n".join(lines))
    head = f"All other keys of TRL's SFTConfig and ModelConfig ({TRL}):"
    rest = textwrap.wrap(", ".join(sorted(actions)), WIDTH - 2, break_on_hyphens=False)
    return "\n\n".join([*parts, "\n  ".join([head, *rest])])


def _lines(action: Action) -> list[str]:
    """`key = default`, and beside it the first sentence of its text."""
    default = OPEN.get(action.dest, action.default)
    key = action.dest if default is None else f"{action.dest} = {_plain(default)}"
    text = OURS.get(action.dest, str(action.help).replace("%%", "%"))
    text = text.split(". ")[0].rstrip(".") + "."
    beside = textwrap.wrap(text, WIDTH - COLUMN - 2)
    if len(key) > COLUMN - 2:
        beside.insert(0, "")
    lines = [f"  {key:<{COLUMN}}{beside[0]}".rstrip()]
    return lines + [" " * (COLUMN + 2) + line for line in beside[1:]]


def _plain(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))
