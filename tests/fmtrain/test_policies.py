"""Policies: literal masks, a quadruple loop over random layouts, Gemma 3's mask, the command, and
what an import loads."""

import doctest
import importlib.metadata
import os
import random
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig
from transformers.masking_utils import create_causal_mask

import fmtrain
from fmtrain import POLICIES, Layout, Role, allowed, masks

ROOT = Path(fmtrain.__file__).parent.parent

# T I I J T A / L T L A, the second turn with one image around a word
MATRICES = {
    "causal": """
        1.........  11........  111.......  1111......  11111.....
        111111....  1111111...  11111111..  111111111.  1111111111""",
    "future": """
        1.........  11111.....  11111.....  11111.....  11111.....
        111111....  111111111.  11111111..  111111111.  1111111111""",
    "v2v": """
        1.........  1111......  1111......  1111......  11111.....
        111111....  1111111.1.  11111111..  111111111.  1111111111""",
    "v2t": """
        1.........  11..1.....  111.1.....  11111.....  11111.....
        111111....  11111111..  11111111..  111111111.  1111111111""",
    "mma": """
        1.........  11..1.....  111.1.....  11111.....  11111.....
        111111....  11111111..  11111111..  111111111.  1111111111""",
    "mma_interleaved": """
        1111......  11..1.....  111.1.....  11111.....  11111.....
        111111....  11111111..  111111111.  111111111.  1111111111""",
    "image": """
        1.........  111.......  111.......  1111......  11111.....
        111111....  1111111.1.  11111111..  111111111.  1111111111""",
    "prefix_lm": """
        11111.....  11111.....  11111.....  11111.....  11111.....
        111111....  111111111.  111111111.  111111111.  1111111111""",
    "text_future": """
        11111.....  11........  111.......  1111......  11111.....
        111111....  1111111...  111111111.  111111111.  1111111111""",
}
PADDED_AND_PACKED = {  # . I T A | J T .
    "causal": "1...... .1..... .11.... .111... ....1.. ....11. ......1",
    "future": "1...... .11.... .11.... .111... ....11. ....11. ......1",
    "v2v": "1...... .1..... .11.... .111... ....1.. ....11. ......1",
    "v2t": "1...... .11.... .11.... .111... ....11. ....11. ......1",
    "mma": "1...... .11.... .11.... .111... ....11. ....11. ......1",
    "mma_interleaved": "1...... .11.... .11.... .111... ....11. ....11. ......1",
    "image": "1...... .1..... .11.... .111... ....1.. ....11. ......1",
    "prefix_lm": "1...... .11.... .11.... .111... ....11. ....11. ......1",
    "text_future": "1...... .1..... .11.... .111... ....1.. ....11. ......1",
}
ONE_PREFILL = {  # T I T T I T, no answer, padded on both sides by the test
    "causal": "1..... 11.... 111... 1111.. 11111. 111111",
    "future": "1..... 111111 111... 1111.. 111111 111111",
    "v2v": "1..... 11..1. 111... 1111.. 11111. 111111",
    "v2t": "1..... 1111.1 111... 1111.. 111111 111111",
    "mma": "1..... 1111.1 111... 1111.. 111111 111111",
    "mma_interleaved": "11..1. 1111.1 111.1. 11111. 111111 111111",
    "image": "1..... 11..1. 111... 1111.. 11111. 111111",
    "prefix_lm": "111111 111111 111111 111111 111111 111111",
    "text_future": "111111 11.... 111111 111111 11111. 111111",
}


def matrix(written: str) -> torch.Tensor:
    return torch.tensor([[mark == "1" for mark in line] for line in written.split()])


def test_nine_policies():
    assert list(POLICIES) == list(MATRICES) and len(POLICIES) == 9


@pytest.mark.parametrize("name", MATRICES)
def test_literal_two_turns(name):
    mask = allowed(name, Layout.parse("TIIJT A / LTL A"))
    assert mask.dtype == torch.bool and mask.shape == (1, 10, 10)
    assert torch.equal(mask[0], matrix(MATRICES[name]))


@pytest.mark.parametrize("name", PADDED_AND_PACKED)
def test_literal_padded_and_packed(name):
    assert torch.equal(
        allowed(name, Layout.parse(". I T A | J T ."))[0], matrix(PADDED_AND_PACKED[name])
    )


@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("name", ONE_PREFILL)
def test_literal_one_prefill_padded(name, left, right):
    size = left + 6 + right
    expected = torch.eye(size, dtype=torch.bool)
    expected[left : left + 6, left : left + 6] = matrix(ONE_PREFILL[name])
    assert torch.equal(allowed(name, Layout.parse("TITTIT").pad(left, right))[0], expected)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_quadruple_loop(name, seed):
    layout = oracle.random_layout(random.Random(seed), rows=3, samples=3)
    assert torch.equal(allowed(name, layout), oracle.allowed(name, layout))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_itself_does_for_its_name(name):
    layout = Layout.parse("TIJT A / IT")
    assert torch.equal(allowed(POLICIES[name], layout), allowed(name, layout))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(10))
def test_image_is_the_mask_that_transformers_builds_for_gemma3(seed, side):
    """`create_causal_mask` with `block_sequence_ids` is the call that Gemma 3's full-attention
    layers make."""
    rng = random.Random(seed)
    pictures = [oracle.random_picture(rng) for _ in range(3)]
    single = [Layout.parse(picture) for picture in pictures]
    longest = max(layout.shape[1] for layout in single)
    gaps = [longest - layout.shape[1] for layout in single]
    layout = Layout.cat([row.pad(**{side: gap}) for row, gap in zip(single, gaps)])
    real = (layout.role != Role.PAD).long()
    mask = create_causal_mask(
        Gemma3TextConfig(num_hidden_layers=1, attn_implementation="sdpa"),
        inputs_embeds=torch.zeros(3, longest, 4),
        attention_mask=real,
        past_key_values=None,
        block_sequence_ids=layout.image,
        allow_is_causal_skip=False,
    )
    assert mask.dtype == torch.bool and mask.shape == (3, 1, longest, longest)
    # transformers leaves a padded query without keys or with some; nothing reads it
    queries = real.bool()[:, :, None]
    assert torch.equal(allowed("image", layout) & queries, mask[:, 0] & queries)
    assert (layout.role == Role.VISUAL).any()


@pytest.mark.parametrize(
    "unknown, near",
    [
        ("v2vv", "v2v"),
        ("prefixlm", "prefix_lm"),
        ("Causal", "causal"),
        ("mma_inter", "mma_interleaved"),
    ],
)
def test_an_unknown_policy_is_an_error_with_the_nearest_name(unknown, near):
    with pytest.raises(ValueError) as error:
        allowed(unknown, Layout.parse("TI A"))
    assert (
        repr(unknown) in str(error.value)
        and near in str(error.value)
        and "\n" not in str(error.value)
    )


def test_pictures_in_the_docstrings_are_true():
    result = doctest.testmod(masks)
    assert result.attempted > 0 and result.failed == 0


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )


def drawn(text: str, tokens: str) -> list[str]:
    """The marks of each row of a printed picture, found below its line of column names."""
    lines = [line.strip() for line in text.splitlines()]
    top = lines.index(tokens)
    return [line.split()[-1] for line in lines[top + 1 : top + 1 + len(tokens)]]


def test_command_prints_one_policy_on_a_picture():
    done = run("-m", "fmtrain.policies", "v2t", "TIJT A")
    assert done.returncode == 0 and not done.stderr
    assert drawn(done.stdout, "TIJTA") == ["#....", "##.+.", "###+.", "####.", "#####"]


def test_command_prints_every_policy():
    done = run("-m", "fmtrain.policies")
    assert done.returncode == 0 and not done.stderr
    headings = [line.split(":")[0] for line in done.stdout.splitlines() if ": reveals " in line]
    assert headings == list(POLICIES)


@pytest.mark.parametrize("arguments, named", [(["v3v"], "v2v"), (["v2v", "TIQ A"], "'Q'")])
def test_command_refuses_in_one_line(arguments, named):
    done = run("-m", "fmtrain.policies", *arguments)
    assert done.returncode != 0 and not done.stdout
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_no_module_shadows_another_when_sft_is_launched_by_its_path():
    """`accelerate launch fmtrain/sft.py` puts fmtrain/ first on sys.path."""
    inside = {
        path.stem
        for path in Path(fmtrain.__file__).parent.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if set(owners) != {"fmtrain"}
    }
    assert {"policies", "attention"} <= inside and {"torch", "datasets"} <= installed
    assert not (inside - {"__init__"}) & (installed | set(sys.stdlib_module_names))


# All names but that of the trainer, which is TRL's.
NAMES = "import fmtrain; [getattr(fmtrain, n) for n in fmtrain.__all__ if n != 'SFTTrainer']"
EVERYTHING = f"{NAMES}; import fmtrain.data.collator"


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement, optional",
    [
        ("import fmtrain", "torch transformers wandb deepspeed flash_attn bitsandbytes matplotlib"),
        (
            "import fmtrain.data.images",
            "torch transformers wandb deepspeed flash_attn bitsandbytes matplotlib",
        ),
        (EVERYTHING, "trl wandb deepspeed flash_attn bitsandbytes matplotlib"),
    ],
)
def test_an_import_loads_no_optional_package(statement, optional):
    done = run(
        "-c",
        f"{statement}; import sys; print(*(name for name in {optional.split()} if name in "
        f"sys.modules))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_names_of_the_package_do_not_depend_on_what_was_imported_before():
    """`fmtrain.encode` is the function, also where some module has imported the submodule of the
    same name first."""
    done = run(
        "-c",
        "import fmtrain.data.collator, fmtrain; from fmtrain import encode; assert "
        "callable(fmtrain.encode) and callable(encode)",
    )
    assert done.returncode == 0, done.stderr
