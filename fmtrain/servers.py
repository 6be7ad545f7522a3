"""What a server without fmtrain makes of a checkpoint: causal attention, but for `image` on vLLM.

vLLM reads `is_mm_prefix_lm` from `config.json` and then lets the tokens of a picture see each
other while a prompt is prefilled. That is the policy `image`, for models that show a picture as one
run of tokens. Read in vLLM's source (`ModelConfig.is_mm_prefix_lm`, `compute_mm_prefix_ranges`, the
check of its CUDA platform); nothing of it was run here.
"""

from fmtrain.layout import Role
from fmtrain.masks import Mask

FLAG = "is_mm_prefix_lm"
# Model types whose pictures are one run of tokens. The others cut a picture into tiles: their
# tokens stand in one run too, but no server was seen to keep the tiles together.
ONE_RUN = ("llava",)


def within_image(mask: Mask) -> bool:
    """Whether a mask is `image` by its table: pictures that see all of themselves, attended to."""
    table = frozenset({(Role.VISUAL, Role.VISUAL)})
    return mask.policy.within_image and mask.policy.reveals == table and mask.merge is None


def flagged(mask: Mask, model_type: str) -> bool:
    """Whether the checkpoint may carry `FLAG`."""
    return within_image(mask) and model_type in ONE_RUN


def in_words(mask: Mask, model_type: str) -> str:
    """What servers do with it, and which switches they need, as a paragraph of a model card."""
    if not mask.looks_ahead:
        return "Every server runs it as it was trained: the mask is causal."
    if flagged(mask, model_type):
        return (
            f"`config.json` carries `{FLAG}`, by which vLLM lets the tokens of one picture see "
            "each other. It needs a version that knows the key (older ones serve causal attention "
            "without a word), an attention backend that serves it (`TRITON_ATTN` does), and "
            "pictures that are prefilled whole: `--disable-chunked-mm-input`, which versions that "
            "know the key switch on by themselves, with a warning, and `--max-num-batched-tokens` "
            "of a whole picture or more. This was read in vLLM's source and not run: compare some "
            "answers with those of fmtrain first. All other servers run it **causally**."
        )
    reason = "no server is known to express this mask"
    if within_image(mask):
        reason = f"`{FLAG}` is left out, as the model shows a picture in tiles"
    return (
        "Servers without fmtrain, vLLM among them, and `from_pretrained` without code run it "
        f"**causally**, without a word: {reason}."
    )
