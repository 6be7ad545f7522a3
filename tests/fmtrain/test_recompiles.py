"""A compiled run meets rows of many lengths, compiles for the first few of them alone, and computes
what an eager one does.

Graphs are counted as dynamo traces them, whatever compiles them afterwards. A size that a backend
turns into a number of Python's is compiled anew for every length, until dynamo reaches its limit
and leaves the layers uncompiled; so here there is no limit.
"""

import families
import pytest
import torch
from torch._dynamo.utils import counters

from fmtrain import attach
from fmtrain.attention import BACKENDS, sdpa
from fmtrain.data import noise
from fmtrain.data.collator import Collator

LENGTHS, FIRST = 25, 10  # of rows; behind the first ones no graph is added


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def row(number: int) -> dict:
    question = " ".join(["which"] * (4 + 4 * number))
    images = 1 + number % 3
    shown = [families.photo(number + k) for k in range(images)]
    messages = noise.turn(images, question, "from 3 to 7")
    return {"id": f"r{number}", "messages": messages, "images": shown}


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["v2v", "v2v+merge"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_lengths_need_no_more_graphs_than_a_few(backend, mask):
    model = families.model("llava", layers=2).train()
    collate, graphs, lengths = Collator(families.processor("llava")), [], set()
    without_end = torch._dynamo.config.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True)
    with attach(model, mask, backend), without_end:
        compiled = torch.compile(model, backend="eager")
        for number in range(LENGTHS):
            batch = collate([row((7 * number) % LENGTHS), row(0)])
            lengths.add(batch["input_ids"].shape[1])
            loss = compiled(**batch, use_cache=False).loss
            loss.backward()
            eager = model(**batch, use_cache=False).loss
            torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(lengths) == LENGTHS and min(lengths) < sdpa.CHUNK < max(lengths)
    assert graphs[0] > 0 and graphs[FIRST] == graphs[-1], graphs
