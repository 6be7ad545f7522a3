"""The benchmark of whole runs: its trainers are those of users, and take turns without being
changed by it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import training
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from eval import subjects, throughput, timing, trainers
from fmtrain import Mask
from fmtrain.attention import sdpa
from fmtrain.data.collator import Collator
from fmtrain.training.trainer import SFTTrainer

OPTIONS = {
    "use_peft": True,
    "lora_dropout": 0.0,
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "max_steps": 3,
    "logging_steps": 1,
}
SHORT = ["--size", "mini", "--rounds", "2", "--device", "cpu", "--threads", "1", "--words", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shape = trainers.Shape(rows=8, images=(1, 2), words=6, answer=3)
    trainers.workplace(folder, subjects.random_llava("mini"), shape)
    return folder


def built(folder: Path, **options) -> dict:
    torch.manual_seed(0)
    return trainers.variants(folder, [Mask.parse("v2v")], {**OPTIONS, **options}, limit=None)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainers_that_take_turns_learn_what_they_learn_alone(folder):
    alone = built(folder)
    for trainer in alone.values():
        trainer.train()
        shutil.rmtree(trainer.args.output_dir)  # or it would be a run to resume
    together = built(folder)
    turns = {name: trainers.Turns(trainer) for name, trainer in together.items()}
    for number in range(4):
        for name, trainer in together.items():
            turns[name].step()
            assert trainer.state.global_step == number
    ahead = [4 * 2, 4 * 2 + 2]  # a batch more than steps; fmtrain has audited two rows
    assert [one.samples for one in turns.values()] == ahead
    for one in turns.values():
        one.finish()
    for name, trainer in alone.items():
        assert len(losses(trainer)) == 3 and losses(trainer) == losses(together[name])


@pytest.mark.parametrize("lora", [True, False])
def test_stock_and_fmtrain_learn_the_same_parameters_of_the_same_rows(folder, lora):
    stock, ours = built(folder, use_peft=lora).values()
    assert isinstance(ours, SFTTrainer) and not isinstance(stock, SFTTrainer)
    learnt = []
    for trainer in (stock, ours):
        named = trainer.model.named_parameters()
        learnt.append([name for name, parameter in named if parameter.requires_grad])
    assert learnt[0] == learnt[1] != []
    assert (stock.model.config.model_type, len(stock.train_dataset)) == ("llava", 8)
    for number in range(8):
        row, theirs = ours.train_dataset[number], stock.train_dataset[number]
        assert len(row["images"]) == len(theirs["images"])
        ids = ours.data_collator([row])["input_ids"]
        expected = stock.data_collator([theirs])["input_ids"]
        # stock's has no start token, and ends in what the template puts behind the end token
        assert ids.shape == expected.shape and torch.equal(ids[:, 1:], expected[:, :-1])


def test_an_error_of_a_trainer_reaches_who_waits_for_its_step(folder):
    class Fails(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise ValueError("no more")

    stock = built(folder)[trainers.STOCK]
    stock.add_callback(Fails())
    turns = trainers.Turns(stock)
    turns.step()
    with pytest.raises(ValueError, match="no more"):
        turns.step()


def test_the_operations_of_a_token_are_those_that_torch_counts():
    """Full training on eager attention, which computes all T x T scores, as PaLM counts them."""
    subject = subjects.random_llava("mini")
    model = subject.model.train()
    model.set_attn_implementation("eager")
    batch = Collator(subject.processor)([subjects.row(0, 40, 20)])
    length = batch["input_ids"].shape[1]
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs_embeds=embeddings).logits.sum().backward()
    expected = trainers.flops_per_token(model, length, lora=False)
    assert counter.get_total_flops() / length == pytest.approx(expected, rel=0.01)
    parts = [model.model.language_model.layers, model.lm_head]
    frozen = sum(p.numel() for part in parts for p in part.parameters())
    apart = expected - trainers.flops_per_token(model, length, lora=True)
    assert apart == pytest.approx(2 * frozen, rel=0.01)


def test_the_sum_of_the_frozen_tower_in_the_design():
    """LLaVA-1.5-7B on 700 tokens, one image of CLIP ViT-L/14 at 336 pixels."""
    model = subjects.random_llava("7b", "meta", torch.bfloat16).model
    layers, length, patches = model.model.vision_tower.encoder.layers, 700, 577
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    tower = 2 * weights * patches + 4 * len(layers) * 1024 * patches**2
    figures = [f"{tower / 1e12:.2f} TFLOP"]
    for lora in (False, True):
        step = trainers.flops_per_token(model, length, lora) * length
        figures += [f"{step / 1e12:.1f} TFLOP", f"{100 * tower / (step + tower):.1f} %"]
    design = (training.ROOT / "docs" / "design.md").read_text()
    [paragraph] = [text for text in design.split("\n\n") if "No cache of vision" in text]
    for figure in figures:
        assert figure in paragraph.replace("\n", " "), figure


def test_runs_of_the_command(tmp_path):
    out = tmp_path / "throughput.json"
    words = ["--tables", "runs", "--train", "lora", "--masks", "causal", "v2v", "--answer", "3"]
    words += ["--images", "1", "2", "--peak_tflops", "0.1", "--out", str(out)]
    assert throughput.main([*SHORT, *words]) == 0
    results = json.loads(out.read_text())
    [study] = results["runs"]
    assert results["studies"] == []
    names = [entry["run"] for entry in study["variants"]]
    assert names == ["stock TRL", "fmtrain causal", "fmtrain v2v"]
    assert study["variants"][0]["speed_ratio"]["median"] == 1.0
    for entry in study["variants"]:
        assert 0 < entry["tower_share"] < 0.5
        assert entry["samples_per_s"] == pytest.approx(2e3 / entry["step_ms"])
        gflops = study["flops_per_token"] * entry["tokens_per_s"] / 1e9
        assert entry["gflops"] == pytest.approx(gflops)
        assert entry["utilisation"] == pytest.approx(gflops / 100)
    assert "| fmtrain v2v |" in out.with_suffix(".md").read_text()


def test_a_mask_that_a_run_refuses_is_listed_with_the_reason(folder, monkeypatch):
    def prepare(layout, mask, start, original=sdpa.prepare):
        if mask.policy.name == "v2t":
            raise ValueError("sdpa cannot serve v2t")
        return original(layout, mask, start)

    monkeypatch.setattr(sdpa, "prepare", prepare)
    trained = trainers.variants(folder, [Mask.parse("v2t")], OPTIONS | {"max_steps": 9}, None)
    measured = trainers.measure(trained, 2, timing.Stopwatch(torch.device("cpu")))
    assert measured["fmtrain v2t"] == {"refused": "sdpa cannot serve v2t"}
    entries = trainers.summarize(measured, 1.0, None)
    assert [entry.get("refused") for entry in entries] == [None, "sdpa cannot serve v2t"]
    study = {"model": "m", "train": "lora", "dtype": "float32", "gradient_checkpointing": False}
    study |= {"batch": 2, "images": [1, 2], "tokens_per_sample": 9.0, "rounds": 2}
    assert "sdpa cannot serve v2t" in trainers.table({**study, "variants": entries}).as_markdown()


def test_rows_of_more_images_than_positions_are_refused(capsys):
    assert throughput.main([*SHORT, "--tables", "runs", "--images", "3", "2"]) == 2
    assert "--images" in capsys.readouterr().err
    assert throughput.main([*SHORT, "--tables", "runs", "--words", "9000"]) == 2
    assert "8192 positions" in capsys.readouterr().err


def test_packed_runs_have_rows_for_all_their_steps(tmp_path, monkeypatch):
    shapes, original = [], trainers.workplace

    def watched(folder, subject, shape):
        shapes.append(shape)
        original(folder, subject, shape)

    monkeypatch.setattr(trainers, "workplace", watched)
    out = tmp_path / "packed.json"
    words = ["--tables", "runs", "--train", "lora", "--masks", "causal", "v2v", "--answer", "3"]
    words += ["--images", "1", "3", "--packing", "96", "--out", str(out)]
    assert throughput.main([*SHORT, *words]) == 0
    [study] = json.loads(out.read_text())["runs"]
    assert [entry["run"] for entry in study["variants"]][-1] == "fmtrain v2v, packed"
    assert not any("refused" in entry for entry in study["variants"])
    assert shapes[0].rows * study["tokens_per_sample"] >= 2 * (2 + trainers.WARM + 1) * 60
