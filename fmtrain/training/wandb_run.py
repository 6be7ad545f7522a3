"""A run in W&B: it keeps its id over a resume, and its config says what `run.json` does."""

import os
import secrets
from pathlib import Path

import yaml
from transformers import Trainer, TrainerCallback

from fmtrain.training.run_folder import RECIPE, read_record
from fmtrain.training.tracking import wandb_mode

RUN_ID = "wandb_run_id"  # in run.json


def run_id(report_to: list[str], folder: str | Path, resumed: bool) -> str | None:
    """The id of the run in W&B: of the one that is open, that `WANDB_RUN_ID` names (as an agent of
    a sweep does), that is resumed, or a new one; None for a run that does not report to it."""
    if "wandb" not in report_to:
        return None
    import wandb

    if wandb.run is not None:
        return wandb.run.id
    before = read_record(Path(folder)).get(RUN_ID) if resumed else None
    return os.environ.get("WANDB_RUN_ID") or before or secrets.token_hex(4)


def open_run(run: str | None, name: str | None) -> None:
    """Begins the W&B run of this id, or goes on with it, from the first process; transformers'
    callback takes the one that is open."""
    if run is None or int(os.environ.get("RANK", "0")) != 0:
        return
    import wandb

    if wandb.run is None:
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        wandb.init(project=project, name=name, id=run, resume="allow", mode=wandb_mode())


class RecordInWandb(TrainerCallback):
    """The config of the W&B run under `fmtrain`: the record of the run, the recipe with every key
    that was set, and the figures of the audit."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if "wandb" not in args.report_to or not state.is_world_process_zero:
            return
        import wandb

        if wandb.run is None:
            return
        folder, config = Path(args.output_dir), {"audit": self.trainer.audited}
        if (folder / RECIPE).is_file():
            config["recipe"] = yaml.safe_load((folder / RECIPE).read_text("utf-8"))
        record = {**read_record(folder), **config}
        wandb.config.update({"fmtrain": record}, allow_val_change=True)
