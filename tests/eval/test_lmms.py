"""`python -m eval.lmms`: lmms-eval itself runs small tasks of ours on a tiny checkpoint.

It gets the model's own answers.
"""

import json
import os
import subprocess
from pathlib import Path

import families
import pytest
import torch
import warm
from lmms_eval import evaluator
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager
from PIL import Image

from eval import lmms
from fmtrain.data.encode import encode
from fmtrain.decoding import Decoder
from fmtrain.masks import VERSION, Mask
from fmtrain.patch import attach, attached

REPOSITORY = Path(__file__).resolve().parents[2]
CHOICES = ["a red cube", "two blue spheres", "the lazy dog"]

CODE = """
from PIL import Image

def visuals(doc):
    return [Image.open(path) for path in doc["paths"]]

def text(doc):
    return doc["question"]

def messages(doc):
    parts = [{"type": "text", "text": "first: "}]
    parts += [{"type": "image", "url": image} for image in visuals(doc)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]
"""
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.jsonl
test_split: test
doc_to_visual: !function code.visuals
doc_to_text: !function code.text
"""
ANSWER = """
task: tiny_answer
doc_to_target: answer
output_type: generate_until
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
  image_aspect_ratio: original
  until: ["zzz"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PLACED = ANSWER.replace("tiny_answer", "tiny_placed") + "doc_to_messages: !function code.messages\n"
CHOOSE = """
task: tiny_choose
output_type: multiple_choice
doc_to_choice: {choices}
doc_to_target: answer_index
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint (ckpt/), one without a mask (bare/), and three tasks (tasks/)."""
    folder = tmp_path_factory.mktemp("lmms")
    for name in ("ckpt", "bare"):
        model = families.model("llava")
        if name == "ckpt":
            model.config.fmtrain = {"policy": "prefix_lm", "merge": None, "version": VERSION}
        model.save_pretrained(folder / name)
        families.processor("llava").save_pretrained(folder / name)
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = []
    for number in range(5):
        paths = [str(tasks / f"{number}_{k}.png") for k in range(number % 3)]
        for k, path in enumerate(paths):
            noise = torch.randint(
                0,
                256,
                (20 + number, 30, 3),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(10 * number + k),
            )
            Image.fromarray(noise.numpy()).save(path)
        right = {"answer": CHOICES[number % 3], "answer_index": number % 3}
        rows.append({"question": f"what is it? {'more ' * number}", "paths": paths} | right)
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "code.py").write_text(CODE)
    for name, yaml in (
        ("answer", ANSWER),
        ("placed", PLACED),
        ("choose", CHOOSE.format(choices=CHOICES)),
    ):
        (tasks / f"{name}.yaml").write_text(COMMON.format(folder=tasks) + yaml)
    return folder


@pytest.fixture(scope="module")
def rows(place) -> list[dict]:
    return [json.loads(line) for line in (place / "tasks" / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def manager(place) -> TaskManager:
    lmms.register()
    return TaskManager(
        include_path=str(place / "tasks"), include_defaults=False, model_name="fmtrain"
    )


def harness(place, manager, task: str, **more) -> dict:
    """Run lmms-eval; its results."""
    arguments = {
        "model": "fmtrain",
        "model_args": f"pretrained={place / 'ckpt'}",
        "batch_size": 2,
        "log_samples": True,
    } | more
    return evaluator.simple_evaluate(
        tasks=[task], task_manager=manager, bootstrap_iters=0, **arguments
    )


def answers(results: dict, task: str) -> list[str]:
    return [
        sample["filtered_resps"][0]
        for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    ]


def expected(rows: list[dict], policy: str, before: str = "") -> list[str]:
    """Greedy answers of the model itself, one dialogue at a time, under `policy`."""
    model, processor = families.model("llava"), families.processor("llava")
    texts = []
    with attach(model, policy, "sdpa"):
        for row in rows:
            images = [Image.open(path) for path in row["paths"]]
            parts = [{"type": "text", "text": before}] * bool(before) + [{"type": "image"}] * len(
                images
            )
            parts.append({"type": "text", "text": row["question"]})
            if before and not images:
                parts = [{"type": "text", "text": before + row["question"]}]
            prompt = encode(
                processor, [{"role": "user", "content": parts}], images, add_generation_prompt=True
            )
            out = model.generate(
                **prompt.kwargs(),
                max_new_tokens=8,
                min_new_tokens=1,
                suppress_tokens=[model.config.image_token_id],
            )
            texts.append(
                processor.tokenizer.decode(
                    out[0, prompt.layout.shape[1] :], skip_special_tokens=True
                ).strip()
            )
    return texts


@pytest.mark.parametrize("more", [{}, {"force_simple": True}, {"batch_size": 1}, {"batch_size": 5}])
def test_the_harness_gets_the_models_answers(place, manager, rows, more):
    """In the order of the documents, whatever the batch size, as messages and as text."""
    results = harness(place, manager, "tiny_answer", **more)
    texts = answers(results, "tiny_answer")
    assert texts == expected(rows, "prefix_lm") != expected(rows, "causal")
    exact = sum(answer == row["answer"] for answer, row in zip(texts, rows)) / 5
    assert results["results"]["tiny_answer"]["exact_match,none"] == exact


def test_images_stay_where_the_task_puts_them(place, manager, rows):
    texts = answers(harness(place, manager, "tiny_placed"), "tiny_placed")
    assert texts == expected(rows, "prefix_lm", before="first: ")


def test_another_mask(place, manager, rows):
    model_args = f"pretrained={place / 'bare'},mask=text_future,dtype=float32"
    assert answers(
        harness(place, manager, "tiny_answer", model_args=model_args), "tiny_answer"
    ) == expected(rows, "text_future")


def test_likelihoods(place, manager, rows, capsys):
    """The loss of each option against a forward of its own; the harness takes the least."""
    results = harness(place, manager, "tiny_choose", force_simple=True, batch_size=4)
    assert "| 4/4 [" in capsys.readouterr().err  # batches: the first process shows how far it is
    model, processor = families.model("llava"), families.processor("llava")
    right = 0
    with attach(model, "prefix_lm", "reference"), torch.no_grad():
        for row, sample in zip(
            rows, sorted(results["samples"]["tiny_choose"], key=lambda sample: sample["doc_id"])
        ):
            images, losses = [Image.open(path) for path in row["paths"]], []
            for choice in CHOICES:
                content = [{"type": "image"}] * len(images) + [
                    {"type": "text", "text": row["question"]}
                ]
                turns = [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": choice},
                ]
                encoded = encode(processor, turns, images)
                start = encode(processor, turns[:1], images, add_generation_prompt=True)[1].shape[1]
                logits = model(**encoded.kwargs()).logits[0]
                ids = encoded.inputs["input_ids"][0]
                losses.append(
                    torch.nn.functional.cross_entropy(logits[start - 1 : -2], ids[start:-1]).item()
                )
            assert [loss for loss, _ in sample["filtered_resps"]] == pytest.approx(losses, rel=1e-4)
            right += min(range(3), key=losses.__getitem__) == row["answer_index"]
    assert results["results"]["tiny_choose"]["acc,none"] == right / 5


def test_settings_and_stop_strings(place, manager):
    assert lmms.generation(
        {"max_new_tokens": 9, "temperature": 0.2, "do_sample": False, "top_p": 0.9, "until": "x"},
        50,
    ) == {
        "max_new_tokens": 9,
        "do_sample": False,
        "min_new_tokens": 1,
    }
    sampled = lmms.generation(
        {"temperature": 0.2, "top_p": 0.9, "image_aspect_ratio": "pad", "num_beams": 1}, 50
    )
    assert sampled == {
        "max_new_tokens": 50,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
        "num_beams": 1,
        "min_new_tokens": 1,
    }
    adapter = lmms.Fmtrain(str(place / "ckpt"))
    prompt = adapter.encoded(
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], []), "here"
    )
    (whole,) = adapter._answer([prompt], {"max_new_tokens": 6})
    assert len(whole.text) > 2 and whole.token_counts.output_tokens == 6
    (cut,) = adapter._answer([prompt], {"max_new_tokens": 6, "until": [whole.text[2:4], "never"]})
    assert cut.text == whole.text[:2].strip()


def test_masks_by_name(place):
    adapter = lmms.Fmtrain(str(place / "ckpt"), mask="v2v+merge", merge_kernel_size=5)
    assert isinstance(adapter.decoder, Decoder)
    assert attached(adapter.decoder.model).mask == Mask.parse("v2v+merge", kernel_size=5)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ("pretrained={place}/nowhere", "{place}/nowhere: no such checkpoint folder"),
        (
            "pretrained={place}/bare",
            "{place}/bare: its config.json records no mask; "
            "name one in --model_args, e.g. mask=causal",
        ),
        ("pretrained={place}/bare,mask=v3v", "unknown policy 'v3v'; the nearest is 'v2v'"),
        ("pretrained={place}/bare,msk=v2v", "unexpected keyword argument 'msk'"),
    ],
)
def test_errors_are_one_line(place, capfd, model_args, message):
    with pytest.raises(SystemExit) as stop:
        lmms.FmtrainChat.create_from_arg_string(model_args.format(place=place))
    lines = [line for line in capfd.readouterr().err.splitlines() if "%|" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and message.format(place=place) in lines[0]


def test_places_that_do_not_fit_the_images(place):
    adapter = lmms.Fmtrain(str(place / "ckpt"))
    adapter.task_dict = {"t": {"test": [{}]}}
    image = Image.new("RGB", (20, 20))
    messages, _ = adapter.dialogue("a<image>b<image>", lambda doc: [image, image], "t", "test", 0)
    assert [part.get("text", "image") for part in messages[0]["content"]] == [
        "a",
        "image",
        "b",
        "image",
    ]
    with pytest.raises(ValueError, match="task t, document 0: 1 places <image> for 2 images"):
        adapter.dialogue("a<image>b", lambda doc: [image, image], "t", "test", 0)
    with pytest.raises(
        ValueError, match=r"here: \['str'\] among its visuals; fmtrain takes images only"
    ):
        adapter.encoded(([{"role": "user", "content": [{"type": "image"}]}], ["film.mp4"]), "here")


@pytest.mark.slow
def test_from_the_shell_in_two_processes(place, rows, tmp_path):
    """The harness's own command line; on a CPU `--multi_gpu` means several processes over gloo."""
    launcher = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    call = [
        warm.python(),
        "-m",
        *launcher,
        "-m",
        "eval.lmms",
        "--model",
        "fmtrain",
        "--model_args",
        f"pretrained={place / 'ckpt'}",
    ]
    call += ["--batch_size", "2", "--tasks", "tiny_answer", "--include_path", str(place / "tasks")]
    call += ["--output_path", str(tmp_path), "--log_samples"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        call,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "exact_match" in done.stdout, done.stdout + done.stderr
    assert "Running on rank 1" in done.stdout
    (samples,) = tmp_path.rglob("*samples_tiny_answer.jsonl")
    logged = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()),
        key=lambda sample: sample["doc_id"],
    )
    assert [sample["filtered_resps"] for sample in logged] == expected(rows, "prefix_lm")


def test_the_registration_is_the_harnesss_own(manager):
    assert MODEL_REGISTRY_V2.get_model_class("fmtrain") is lmms.FmtrainChat
    assert MODEL_REGISTRY_V2.get_model_class("fmtrain", force_simple=True) is lmms.Fmtrain
