"""Common to all tests: nothing is downloaded, one thread per worker, and a warning raised by our
own code is an error."""

import functools
import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import families
import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error:::fmtrain")


def pytest_collection_finish():
    """Every trainer has the garbage collected, a third of a second with all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def surroundings():
    """Every test leaves the environment as it was, for accelerate writes ranks into it, and what it
    should do in the next process; what signals do, which children inherit; and the processors that
    tests share with the hub's templates."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    families.restore_templates()
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(params=families.FAMILIES)
def family(request) -> str:
    return request.param


@functools.cache
def _model(family: str, lora: bool):
    if not lora:
        return families.model(family)
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|down_proj)"
    model = get_peft_model(families.model(family), LoraConfig(r=4, target_modules=targets))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero, where LoRA changes nothing
                parameter.normal_(std=0.2)
    return model.eval()


@functools.cache
def _weights(family: str, lora: bool) -> dict[str, torch.Tensor]:
    """Those that `_model` was made with: a copy."""
    return {name: each.clone() for name, each in _model(family, lora).state_dict().items()}


@pytest.fixture
def model_of():
    """`model_of(family, lora=False)`: one random model for the whole session. Attach in a `with`,
    leave it as it was: a test that leaves other weights fails."""
    used = set()

    def model(family: str, lora: bool = False):
        used.add((family, lora))
        _weights(family, lora)
        return _model(family, lora)

    yield model
    for which in used:
        before, after = _weights(*which), _model(*which).state_dict()
        assert before.keys() == after.keys(), f"{which} has other weights"
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        if changed:
            _model(*which).load_state_dict(before)  # for the next test
        assert not changed, f"{which} has changed: {changed[:3]}"
