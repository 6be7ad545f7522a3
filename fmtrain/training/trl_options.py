"""Options of TRL's `SFTConfig` that its own data preparation, collator or loss would read: what
they ask for is done in another way here, or not at all, and then they are refused by name."""

import copy

import datasets
from trl import SFTConfig

from fmtrain.training import packing

NO_TOKEN = "it would be written to logs and checkpoints; set HF_TOKEN in the environment"

_REASONS = {
    "completion_only_loss": "would learn prompts; only answers are learnt, all of them in rows of "
    "messages, those of the completion in rows with a prompt",
    "use_liger_kernel": "no logits are kept without it either, and its other kernels are untested "
    "under a mask; leave it out",
    "chat_template_path": "rows are checked and rendered with the processor's template; set "
    "processor.chat_template, or save a processor that has it",
    "eos_token": "answers end as the chat template says; set the tokenizer's, and save it with the "
    "model",
    "pad_token": "the tokenizer's is used; set it there",
    "pad_to_multiple_of": "rows are padded to the longest of their batch; leave it out",
}
_REFUSED = {"completion_only_loss": (False,), "use_liger_kernel": (True,)}  # of others all but None


class Secret(str):
    """A text that is neither pickled, as checkpoints pickle arguments, nor shown."""

    def __reduce__(self):
        return str, ("<SECRET>",)

    def __deepcopy__(self, memo):
        return self

    def __repr__(self):
        return "<SECRET>"


def check(place: object, training: SFTConfig, streaming: bool = False) -> None:
    """Raises `ValueError`, beginning with the place, for an option that would be lost, and for what
    packing does not go with."""
    for option, reason in _REASONS.items():
        value = getattr(training, option)
        if value in _REFUSED[option] if option in _REFUSED else value is not None:
            said = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{place}: {option} {said}: {reason}")
    for key in ("token", "use_auth_token"):
        if key in (training.model_init_kwargs or {}):
            raise ValueError(f"{place}: model_init_kwargs names {key}: {NO_TOKEN}")
    packing.check(place, training, streaming)


def check_script(args: SFTConfig, data_collator, train_dataset, others: dict) -> None:
    """Raises `ValueError` for what TRL's trainer takes and this one would lose."""
    if not isinstance(args, SFTConfig):
        raise ValueError(f"args is a {type(args).__name__}, not trl.SFTConfig")
    if data_collator is not None:
        raise ValueError(
            "data_collator: a mask needs the layout of its rows, which SFTTrainer's own collator "
            "gives; leave it out"
        )
    for name in ("formatting_func", "compute_loss_func"):
        if others.get(name) is not None:
            raise ValueError(
                f"{name}: rows are dialogues in one of TRL's forms and the loss is that of their "
                "answers; leave it out"
            )
    rows_streamed = isinstance(train_dataset, datasets.IterableDataset)
    check("args", args, rows_streamed)


def check_devices(args: SFTConfig) -> None:
    """Raises `ValueError` for several GPUs in one process, over which transformers would run copies
    of the model in threads (nn.DataParallel), which share what belongs to one batch."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: a mask is trained with a process for each; start "
            "with `fmtrain train` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
        )


def for_trl(args: SFTConfig, ordered: bool) -> SFTConfig:
    """The arguments without what TRL would do to rows, or refuse of images, and without what would
    hide the loss that ends a run. ordered: whether the rows have an order to keep."""
    changed = copy.copy(args)
    changed.max_length = None  # rows are dropped whole, before training; TRL would cut them
    changed.dataset_kwargs = {"skip_prepare_dataset": True}
    changed.remove_unused_columns = False
    changed.packing = changed.padding_free = False
    changed.eval_packing = None
    changed.logging_nan_inf_filter = False
    if changed.hub_token is not None:
        changed.hub_token = Secret(changed.hub_token)
    if ordered and changed.train_sampling_strategy == "random":
        changed.train_sampling_strategy = "sequential"
    return changed
