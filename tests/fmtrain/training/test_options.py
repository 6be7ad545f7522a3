"""Whatever options a run is given, its first step learns under the recipe's mask. Seven runs have
each option, and most pairs of them; `OPTION_EXAMPLES=50` in the environment draws as many more.

The oracle of the loss is transformers alone: its eager attention, fed the mask that the table of
the design spells out, pair by pair. That of the gradients, for what is recomputed in the backward
pass, is the same run without options.
"""

import functools
import json
import os
from itertools import chain

import families
import oracle
import pytest
import torch
import torch.nn.functional as F
import training
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from fmtrain import attach, sft
from fmtrain.attention import BACKENDS
from fmtrain.data.collator import Collator
from fmtrain.data.encode import Encoded

LOUD = 3.0  # the layers' weights are multiplied by it, so that every mask moves the loss
MASKS = [*oracle.REVEALS, "v2v+merge", "prefix_lm+merge"]
PRECISIONS = {  # options, relative tolerance of the loss: of float32, and of 8 bits of bfloat16
    "float32": ([], 1e-5),
    "autocast": (["--use_cpu", "true", "--bf16", "true"], 2e-2),
}
GRADIENTS = 3e-4  # of float32: so loud a model differs from its twin in float64 by 5e-5
CHECKPOINTING = {
    "none": [],
    "reentrant": ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
    "non-reentrant": ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'],
}
COMPILED = ["--torch_compile", "true", "--torch_compile_backend", "eager"]
OTHERS = {
    "workers": ["--dataloader_num_workers", "1"],
    "clipped": ["--max_grad_norm", "0.1"],
    "adafactor": ["--optim", "adafactor"],
    "sized": ["--auto_find_batch_size", "true"],
    "counted": ["--include_num_input_tokens_seen", "true"],
    "emptied": ["--torch_empty_cache_steps", "1"],
    "in one row": ["--padding_free", "true"],
    "packed": ["--packing", "true", "--max_length", "100"],
}
ROWS = 4
HOSTS = ["llava", "llava_next"]
DRAWN = int(os.environ.get("OPTION_EXAMPLES", "0"))
# family, mask, backend, rows of a batch, LoRA, precision, checkpointing, compiled, others
RUNS = [
    ("llava", "v2v", "auto", 1, False, "float32", "none", True, ["packed"]),
    ("llava", "v2v+merge", "flash", 4, False, "float32", "non-reentrant", False, ["adafactor"]),
    ("llava", "mma_interleaved", "flash", 2, True, "autocast", "reentrant", False, ["counted"]),
    ("llava", "image", "sdpa", 4, True, "float32", "none", False, ["in one row", "emptied"]),
    ("llava_next", "future", "sdpa", 2, False, "autocast", "none", False, ["workers", "clipped"]),
    ("llava_next", "prefix_lm", "reference", 1, True, "float32", "reentrant", False, ["sized"]),
    ("llava_next", "prefix_lm+merge", "auto", 2, True, "float32", "reentrant", False, ["packed"]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: workplace(tmp_path_factory.mktemp(name), name) for name in HOSTS}


def workplace(folder, family: str):
    """Whose model is loud."""
    training.workplace(folder, family, rows=ROWS)
    training.write_recipe(folder, lora_dropout=0.0)
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if name.startswith("layers.") and parameter.ndim == 2:
                parameter.mul_(LOUD)
    model.save_pretrained(folder / "base")
    return folder


def first_step(folder, mask: str, *options: str) -> dict[str, float]:
    """What the trainer logs of its first step."""
    out = folder / f"run{len(list(folder.glob('run*')))}"
    words = ["--mask", mask, "--output_dir", str(out), "--max_steps", "1", *options]
    torch._dynamo.reset()
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    [first, *_] = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return first


@functools.cache
def expected(folder, mask: str) -> float:
    """The loss of all rows: the mean over the tokens of their answers."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    loaded = Collator(families.processor(folder.name.rstrip("0123456789")), str(folder / "data"))(
        training.read_rows(folder)
    )
    inputs, layout = Encoded.from_batch(loaded)
    labels = inputs.pop("labels")
    with torch.no_grad():
        if "+" in mask:  # the definition in float32; its own oracle is in test_merge
            with attach(model, mask, "reference"):
                logits = model(**Encoded(inputs, layout).kwargs()).logits
        else:
            allowed = oracle.allowed(mask, layout)[:, None]
            inputs["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
            logits = model(**inputs, position_ids=layout.positions()).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


@functools.cache
def plain_gradient(folder, mask: str, batch: int, *options: str) -> float:
    """The norm of the gradient of all rows, without compiling and checkpointing."""
    return float(first_step(folder, mask, *sizes(batch), *options)["grad_norm"])


def sizes(batch: int) -> list[str]:
    return [
        *("--per_device_train_batch_size", str(batch)),
        *("--gradient_accumulation_steps", str(ROWS // batch)),
    ]


def every_run(test):
    """The runs above, and those that are drawn."""
    for run in RUNS:
        test = example(**dict(zip(OPTIONS, run)))(test)
    return test


OPTIONS = ["family", "mask", "backend", "batch", "peft", "precision", "checkpointing"]
OPTIONS += ["compiled", "others"]


@pytest.mark.slow
@settings(
    max_examples=max(DRAWN, 1),
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate][: 2 if DRAWN else 1],
    suppress_health_check=[HealthCheck.too_slow],
)
@every_run
@given(
    family=st.sampled_from(HOSTS),
    mask=st.sampled_from(MASKS),
    backend=st.sampled_from(["auto", *BACKENDS]),
    batch=st.sampled_from([1, 2, 4]),
    peft=st.booleans(),
    precision=st.sampled_from(list(PRECISIONS)),
    checkpointing=st.sampled_from(list(CHECKPOINTING)),
    compiled=st.sampled_from([True] + 7 * [False]),  # each takes ten seconds
    others=st.lists(st.sampled_from(list(OTHERS)), max_size=2, unique=True),
)
def test_options_do_not_change_the_mask(
    folders, family, mask, backend, batch, peft, precision, checkpointing, compiled, others
):
    folder, others = folders[family], [*chain.from_iterable(OTHERS[name] for name in others)]
    precise, tolerance = PRECISIONS[precision]
    fixed = [
        "--use_peft",
        str(peft),
        "--lora_dropout",
        "0",
        "--attention_backend",
        backend,
        *precise,
    ]
    options = [*CHECKPOINTING[checkpointing], *(COMPILED if compiled else []), *others]
    options += ["--gradient_checkpointing", str(checkpointing != "none")]
    step = first_step(folder, mask, *sizes(batch), *fixed, *options)
    assert float(step["loss"]) == pytest.approx(expected(folder, mask), rel=tolerance)
    # In bfloat16 so sharp a model makes a factor of one rounding (norms of 40 to 380 where float32
    # has 62), and other shapes round otherwise: there rows are laid out as in the run itself.
    plain = (batch, *fixed, *others) if precision == "autocast" else (ROWS, *fixed)
    assert float(step["grad_norm"]) == pytest.approx(
        plain_gradient(folder, mask, *plain), rel=max(GRADIENTS, 10 * tolerance)
    )


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("family", HOSTS)
def test_every_mask_moves_the_loss(folders, family, mask):
    """Or a lost mask would not be noticed above."""
    folder = folders[family]
    apart = abs(expected(folder, mask) - expected(folder, "causal"))
    assert apart > 10 * PRECISIONS["float32"][1] * expected(folder, mask)
