"""The keys of a recipe that are ours; TRL's own stand in its `SFTConfig` and `ModelConfig`."""

from dataclasses import dataclass, field

from fmtrain.data.aspect import ASPECTS
from fmtrain.data.dialogue import TURNS
from fmtrain.data.images import MAX_PIXELS
from fmtrain.data.mixing import entries
from fmtrain.data.sources import DIGITS
from fmtrain.masks import Mask, parse_masks
from fmtrain.training.metrics import parse_metrics

PARTS = ("language_model", "projector", "vision_tower")


def _argument(default, text: str):
    """A key of the recipe with its default and its line in `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class MaskArguments:
    """Which attention mask the model is trained with."""

    mask: str | None = _argument(None, "A policy (`fmtrain policies` lists them), or POLICY+merge.")
    attention_backend: str = _argument(
        "auto", "auto (the faster one, by device and length), flash, sdpa or reference."
    )
    flash_impl: str = _argument(
        "torch", "Kernels of flash: torch's own, flash_attn (the package), or fa3 (Hopper)."
    )
    base_mask: str | None = _argument(
        None, "The mask that the starting checkpoint records, if neither causal nor `mask`."
    )
    merge_prefix: str = _argument(
        "1",
        "Of +merge: how many first positions share: a count (4), or a part of a prefill (0.1).",
    )
    merge_kernel_size: int = _argument(3, "Of +merge: the kernel of the max pooling.")
    merge_normalize: bool = _argument(True, "Of +merge: make each row of weights add up to 1.")

    def parse(self) -> Mask:
        """The mask with its merge options. Raises `ValueError` for an unknown or unfit one."""
        if self.mask is None:
            raise ValueError("the recipe names no mask; add e.g. `mask: v2v`")
        merge = dict(
            prefix=self.merge_prefix,
            kernel_size=self.merge_kernel_size,
            normalize=self.merge_normalize,
        )
        [mask] = parse_masks([self.mask], **merge)
        return mask


@dataclass
class RowArguments:
    """How rows are read, whatever set they are of."""

    image_root: str | None = _argument(
        None, "Folder of the images; by default the one of dataset_name."
    )
    max_pixels: int = _argument(MAX_PIXELS, "Images with more pixels are refused.")
    max_dropped: float = _argument(
        0.1, "Share of a set's rows that may be longer than max_length; if more are, no run starts."
    )
    check_images: bool = _argument(True, "Decode every image once before training starts.")
    allow_evaluation_data: bool = _argument(False, "Train on rows marked as evaluation data.")
    turns: str = _argument(TURNS[0], "split or split_without_history: a row for every answer.")

    def __post_init__(self):
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped {self.max_dropped:g} is not a share from 0 to 1")
        if self.turns not in TURNS:
            raise ValueError(f"turns is {self.turns!r}; known are {', '.join(TURNS)}")


@dataclass
class DataArguments(RowArguments):
    """What the model is trained on and which of its parts learn."""

    dataset_name: str | None = _argument(
        None, "A name on the hub, `digits`, a .jsonl or .parquet file, or a folder of them."
    )
    dataset_config: str | None = _argument(
        None, "Its configuration; of `digits`: its tasks, joined by +, or `curriculum`."
    )
    dataset_train_split: str = _argument("train", "Its split to train on.")
    dataset_test_split: str = _argument("test", "Its split for the evaluation loss.")
    dataset_streaming: bool = _argument(
        False, "Read files as training goes; no copy, no check ahead, no end."
    )
    datasets: list[str] | None = _argument(
        None,
        "Instead, several, with TRL's keys (path, name, split, fraction, ..) and ours: "
        "{path: .., epochs: 1} or {path: .., weight: 0.3, image_root: ..}.",
    )
    shuffle_buffer: int = _argument(
        1000, "Of a stream: rows of a set to draw from; 1 keeps their order."
    )
    dataset_rows: int | None = _argument(
        None, "Use this many rows (the first ones; `digits` makes as many)."
    )
    eval_dataset_name: str | None = _argument(
        None, "Rows for the evaluation loss, if not dataset_name's dataset_test_split."
    )
    image_aspect: str | None = _argument(
        None,
        "Of LLaVA-1.5: pad images to a square, as LLaVA trains, or crop them, as llava-hf's "
        "processors do; by default as the processor does already.",
    )
    train_parts: list[str] | None = _argument(
        None, f"What learns, of {', '.join(PARTS)}; LoRA: the first, full: the first two."
    )

    def __post_init__(self):
        super().__post_init__()
        for part in self.train_parts or ():
            if part not in PARTS:
                raise ValueError(f"train_parts names {part!r}; known are {', '.join(PARTS)}")
        if self.image_aspect not in (None, *ASPECTS):
            raise ValueError(f"image_aspect is {self.image_aspect!r}; known are pad, crop")
        if self.datasets is not None:
            self.datasets = [entry.plain() for entry in entries(self.datasets)]
            single = {self.dataset_name, self.image_root, self.dataset_config}
            if single != {None} or self.dataset_train_split != "train":
                raise ValueError(
                    "datasets takes the place of dataset_name, dataset_config and "
                    "dataset_train_split, and each entry has its own image_root, name and split"
                )
        files = self.dataset_rows is None and self.dataset_name != DIGITS
        if self.dataset_streaming and not files:
            raise ValueError(
                "dataset_streaming reads files, all of them; it goes with neither dataset_rows nor "
                "`digits`"
            )
        if self.dataset_rows is not None and self.dataset_rows < 1:
            raise ValueError(f"dataset_rows {self.dataset_rows} is less than 1")
        if self.shuffle_buffer < 1:
            raise ValueError(
                f"shuffle_buffer {self.shuffle_buffer} is less than 1, which keeps the files' order"
            )


@dataclass
class EvaluationArguments:
    """What is measured on held-out rows while a model trains, beside the loss."""

    eval_rows: int | None = _argument(
        None, "So many evaluation rows, evenly by source; by default all."
    )
    eval_answers: int = _argument(200, "Of these, so many have their questions answered; 0: none.")
    eval_max_new_tokens: int = _argument(32, "How many tokens such an answer may have.")
    eval_masks: list[str] | None = _argument(
        None, "Masks to answer under as well: eval_causal_exact_match."
    )
    eval_metrics: dict | str | None = _argument(
        None, "anls, relaxed_accuracy, option_letter; or {SOURCE: METRIC}."
    )
    eval_samples: int = _argument(8, "Answers that W&B and TensorBoard show; 0: none.")
    early_stopping_patience: int | None = _argument(
        None, "Stop after so many evaluations that are no better."
    )

    def __post_init__(self):
        if self.eval_rows is not None and self.eval_rows < 1:
            raise ValueError(f"eval_rows {self.eval_rows} is less than 1")
        if self.eval_answers < 0:
            raise ValueError(f"eval_answers {self.eval_answers} is a number of rows; 0: none")
        if self.eval_max_new_tokens < 1:
            raise ValueError(f"eval_max_new_tokens {self.eval_max_new_tokens} is less than 1")
        self.eval_metrics = parse_metrics(self.eval_metrics)
        if self.eval_samples < 0:
            raise ValueError(f"eval_samples {self.eval_samples} is a number of questions; 0: none")
        for key in ("eval_masks", "eval_metrics"):
            if getattr(self, key) and not self.eval_answers:
                raise ValueError(f"{key} with eval_answers 0: nothing is answered")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(
                f"early_stopping_patience {self.early_stopping_patience} is less than 1"
            )
