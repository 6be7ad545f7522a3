"""A compiled run meets rows of many lengths, and compiles for the first few of them alone.

Graphs are counted as dynamo traces them, whatever compiles them afterwards. A size that a backend
turns into a number of Python's is compiled anew for every length, until dynamo reaches its limit
and leaves the layers uncompiled; so here there is no limit.
"""

import families
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlavaForConditionalGeneration

from fmtrain import attach
from fmtrain.attention import BACKENDS, sdpa
from fmtrain.data import noise
from fmtrain.data.collator import Collator

LENGTHS, FIRST = 50, 20  # of rows; behind the first ones no graph is added


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def row(number: int) -> dict:
    question = " ".join(["which"] * (4 + 2 * number))
    images = 1 + number % 3
    shown = [families.photo(number + k) for k in range(images)]
    messages = noise.turn(images, question, "from 3 to 7")
    return {"id": f"r{number}", "messages": messages, "images": shown}


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["v2v", "v2v+merge"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_lengths_need_no_more_graphs_than_a_few(backend, mask):
    config = families.config("llava")
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).train()
    collate, graphs, lengths = Collator(families.processor("llava")), [], set()
    without_end = torch._dynamo.config.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True)
    with attach(model, mask, backend), without_end:
        compiled = torch.compile(model, backend="eager")
        for number in range(LENGTHS):
            batch = collate([row((7 * number) % LENGTHS), row(0)])
            lengths.add(batch["input_ids"].shape[1])
            compiled(**batch, use_cache=False).loss.backward()
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(lengths) == LENGTHS and min(lengths) < sdpa.CHUNK < max(lengths)
    assert graphs[0] > 0 and graphs[FIRST] == graphs[-1], graphs
