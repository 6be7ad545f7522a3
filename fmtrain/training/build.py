"""From a recipe to its trainer."""

from collections.abc import Callable

from trl import get_peft_config

from fmtrain.data.files import Rows
from fmtrain.training import trainable
from fmtrain.training.recipe import Recipe
from fmtrain.training.trainer import SFTTrainer


def build_trainer(
    recipe: Recipe,
    model,
    processor,
    rows: Rows,
    eval_rows: Rows | None = None,
    kind: Callable[..., SFTTrainer] = SFTTrainer,
) -> SFTTrainer:
    """The trainer that a recipe describes, of rows and a model that were read as it says.
    kind: what makes it of these arguments, for a trainer of one's own."""
    lora, parts = get_peft_config(recipe.model), recipe.data.train_parts
    if lora is not None and recipe.model.model_revision != "main":
        lora.revision = recipe.model.model_revision  # of the base, which the adapter names
    return kind(
        model,
        recipe.training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        mask=recipe.mask,
        attention_backend=recipe.masking.attention_backend,
        flash_impl=recipe.masking.flash_impl,
        base_mask=recipe.masking.base_mask,
        train_parts=parts or trainable.default_parts(lora),
        rows=recipe.data,
        evaluation=recipe.evaluation,
        peft_config=lora,
    )
