"""Decoding after a merged prefill is ordinary decoding; the benchmarks say what they measured.

No test asserts a speed.
"""

import copy
import json

import families
import pytest
import torch
from transformers import DynamicCache

from eval import latency, subjects, throughput, timing
from fmtrain import Merge, attach
from fmtrain.attention import sdpa
from fmtrain.data.encode import encode
from fmtrain.patch import attached

LIGHT = ["future", "v2v", "v2t"]
SHORT = ["--size", "mini", "--rounds", "2", "--images", "1", "--words", "6"]


@pytest.fixture
def prompt(family):
    """The first turn of a dialogue with three images, encoded as a prompt, and ids of an answer."""
    messages, images = families.dialogues()["three"]
    processor = families.processor(family)
    whole, _ = encode(processor, messages[:2], images)
    encoded = encode(processor, messages[:1], images, add_generation_prompt=True)
    return encoded, whole["input_ids"][:, encoded.layout.shape[1] :]


@torch.no_grad()
def decode(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """Logits [1, n, V] of decoding ids [1, n] one by one; the cache grows."""
    return torch.cat(
        [
            model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ],
        1,
    )


@pytest.mark.parametrize("name", LIGHT)
def test_the_cache_of_a_merged_prefill_is_one_of_ordinary_decoding(family, name, model_of, prompt):
    """An ordinary DynamicCache, of causal attention's keys and values, as nothing but the prefill
    knows of the mask: the model with nothing attached decodes the same on it.

    In the first layer, whose inputs no mask has touched, the cache is causal's to the bit.
    """
    model, (encoded, answer) = model_of(family), prompt
    with torch.no_grad():
        plain = model(**copy.deepcopy(encoded.inputs), use_cache=True)
        with attach(model, name, "sdpa", Merge()):
            light = model(**copy.deepcopy(encoded.kwargs()), use_cache=True)
            on_light = copy.deepcopy(light.past_key_values)
            served = decode(model, answer, on_light)
    assert type(light.past_key_values) is type(plain.past_key_values) is DynamicCache
    layers = [
        (ours, theirs)
        for ours, theirs in zip(
            light.past_key_values.layers, plain.past_key_values.layers, strict=True
        )
    ]
    assert all(ours.keys.shape == theirs.keys.shape for ours, theirs in layers)
    assert torch.equal(layers[0][0].keys, layers[0][1].keys) and torch.equal(
        layers[0][0].values, layers[0][1].values
    )
    assert not torch.equal(layers[-1][0].keys, layers[-1][1].keys)  # the prefill did merge

    assert answer.shape[1] > 2
    ordinary = decode(model, answer, light.past_key_values)
    assert torch.allclose(served, ordinary, rtol=0, atol=1e-5)
    on_plain = decode(model, answer, plain.past_key_values)
    assert not torch.allclose(ordinary, on_plain, rtol=0, atol=1e-3)
    grown = zip(on_light.layers, light.past_key_values.layers)
    assert all(torch.allclose(ours.keys, theirs.keys, rtol=0, atol=1e-5) for ours, theirs in grown)


# --- interleaved rounds ---------------------------------------------------------------------------


def test_a_ratio_is_paired_so_that_a_slow_round_slows_both():
    ratio = timing.paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    steps = timing.paired_ratio(
        [[1.0, 2.0], [3.0, 8.0]], [[1.0, 1.0], [1.0, 2.0]]
    )  # ratios 1 2 | 3 4
    assert (steps.median, steps.low, steps.high) == (2.5, 1.5, 3.5)  # a round is drawn whole


def test_every_round_holds_every_setup_once():
    orders = list(timing.shuffled(["a", "b", "c"], 20))
    assert (
        all(sorted(order) == ["a", "b", "c"] for order in orders)
        and len({order[0] for order in orders}) == 3
    )


def test_the_processor_clock_wants_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="--threads 1"):
        timing.Stopwatch(torch.device("cpu"), "cpu")


def test_peak_memory_is_what_a_step_needs_above_what_is_held():
    held = torch.ones(2**22)  # 16 MiB
    used = timing.peak(lambda: torch.ones(2**24).sum(), torch.device("cpu"))  # 64 MiB
    assert held[0] == 1 and 60 < used < 80


# --- the commands ---------------------------------------------------------------------------------


def test_latency_of_the_seven_variants(tmp_path, capsys):
    out = tmp_path / "made" / "latency.json"
    assert latency.main(["--model", "random", *SHORT, "--new_tokens", "3", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    (model,) = results["models"]
    assert (
        results["paper"] == "arXiv 2505.18605, Table 6"
        and results["machine"]["versions"]["torch"] == torch.__version__
    )
    assert (model["visual_tokens"], model["new_tokens"], model["rounds"], model["class"]) == (
        4,
        3,
        2,
        "LlavaForConditionalGeneration",
    )
    names = [each["variant"] for each in model["variants"]]
    assert names == [
        "nothing attached",
        "causal",
        "future",
        "v2v",
        "v2t",
        "future+merge",
        "v2v+merge",
        "v2t+merge",
    ]
    for each in model["variants"]:
        assert each["decode_ms"] > 0 and each["prefill_ms"] > 0
        for ratio in (each["decode_ratio"], each["prefill_ratio"]):
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert model["variants"][0]["decode_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert [round(each["paper_ratio_to_merge"], 1) for each in model["variants"][2:5]] == [
        3.1,
        2.4,
        1.6,
    ]
    written, printed = out.with_suffix(".md").read_text(), capsys.readouterr().out
    assert "| v2v+merge |" in written and torch.__version__ in written and "v2v+merge" in printed


def test_latency_of_a_checkpoint_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    families.model("llava_next").save_pretrained(tmp_path / "model")
    families.processor("llava_next").save_pretrained(tmp_path / "model")
    seen, made = [], subjects.subject
    monkeypatch.setattr(
        subjects, "subject", lambda *arguments: seen.append(made(*arguments)) or seen[-1]
    )
    model = str(tmp_path / "model")
    assert (
        latency.main(
            [
                "--model",
                model,
                *SHORT,
                "--new_tokens",
                "2",
                "--masks",
                "v2v",
                "--out",
                str(tmp_path / "l.json"),
            ]
        )
        == 0
    )
    assert attached(seen[0].model) is None and "fmtrain" not in seen[0].model.config.to_dict()
    assert (
        json.loads((tmp_path / "l.json").read_text())["models"][0]["class"]
        == "LlavaNextForConditionalGeneration"
    )


def test_masks_are_attached_while_they_are_timed(monkeypatch):
    """A benchmark that measured the plain model eight times would report 1.0 as well."""
    subject, seen = subjects.random_llava("mini"), []
    stopwatch = timing.Stopwatch(torch.device("cpu"))
    prompt, _ = latency.make_prompt(subject, 1, 4, stopwatch)
    subject.model.register_forward_pre_hook(
        lambda module, args: seen.append(attached(module) and attached(module).mask.policy.name)
    )
    setups = latency.setups(["causal", "v2t", "v2t+merge"], ["auto"])
    times = latency.measure(subject.model, prompt, setups, 2, 3, stopwatch)
    assert set(seen) == {None, "causal", "v2t"} and seen.count("v2t") == 2 * seen.count(None)
    assert all(
        len(each.prefill) == 2 and [len(steps) for steps in each.decode] == [3, 3]
        for each in times.values()
    )


def test_throughput_of_lora_and_full(tmp_path, monkeypatch):
    def prepare(layout, mask, start, original=sdpa.prepare):
        if mask.policy.name == "v2t":
            raise ValueError("sdpa cannot\nserve v2t")
        return original(layout, mask, start)

    monkeypatch.setattr(sdpa, "prepare", prepare)
    out = tmp_path / "throughput.json"
    masks = ["--masks", "causal", "v2v+merge", "v2t", "--backends", "sdpa", "reference"]
    assert throughput.main([*SHORT, *masks, "--answer", "3", "--out", str(out)]) == 0
    lora, full = json.loads(out.read_text())["studies"]
    assert (lora["train"], full["train"]) == ("lora", "full") and 0 < lora["trainable"] < full[
        "trainable"
    ] < full["parameters"]
    assert (
        lora["visual_tokens"] == 8
        and lora["batch"][0] == 2
        and lora["tokens"] < lora["batch"][0] * lora["batch"][1]
    )
    for study in (lora, full):
        refused = [each for each in study["variants"] if "refused" in each]
        assert [(each["mask"], each["backend"], each["refused"]) for each in refused] == [
            ("v2t", "sdpa", "sdpa cannot serve v2t")
        ]
        served = [each for each in study["variants"] if "refused" not in each]
        assert [each["backend"] for each in served] == [
            "transformers",
            "sdpa",
            "sdpa",
            "reference",
            "reference",
            "reference",
        ]
        assert served[0]["speed_ratio"]["median"] == 1.0
        assert all(
            each["tokens_per_s"] == pytest.approx(1e3 * study["tokens"] / each["step_ms"])
            for each in served
        )
    assert "sdpa cannot serve v2t" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_step_of_throughput_is_a_training_step(train):
    subject, stopwatch = (
        subjects.random_llava("mini"),
        timing.Stopwatch(torch.device("cpu")),
    )
    batch = throughput.make_batch(subject, 2, 1, 6, 3)
    model, optimizer = throughput.learner(subject, train, batch, checkpointing=train == "lora")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for setup in latency.setups(["v2v+merge"], ["sdpa"]):
        throughput.step(model, optimizer, batch, setup, stopwatch)
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(before[name], parameter)
    }
    assert moved and moved <= {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert all(("lora_" in name) == (train == "lora") for name in moved)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--masks", "v2w"], "unknown policy 'v2w'; the nearest is 'v2v'"),
        (["--masks", "causal+merge"], "nothing to merge"),
        (["--merge_kernel_size", "0"], "kernel_size 0 is not allowed"),
        (["--model", "/nowhere"], "/nowhere: no such checkpoint folder"),
        (["--rounds", "0"], "are 1 or more"),
        (["--words", "9000"], "has 8192 positions"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert latency.main(["--model", "random", *SHORT, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_throughput_names_an_unknown_policy(capsys):
    assert throughput.main([*SHORT, "--masks", "v2w"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: unknown policy 'v2w'")


def test_a_random_llava_is_named_by_its_size():
    with pytest.raises(ValueError, match="unknown size '70b'; known are mini"):
        subjects.random_llava("70b")
