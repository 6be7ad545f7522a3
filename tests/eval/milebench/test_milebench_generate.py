"""`python -m eval.milebench.generate` on tiny random models.

What it writes, and that nothing but the mask decides it.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
import warm
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GenerationConfig

from eval.milebench import combine, generate, score
from eval.milebench.fitting import Fitter, OriginalFitter
from eval.milebench.llava_prompt import (
    IMAGE_INDEX,
    llava_input_ids,
    llava_messages,
    llava_prompt,
)
from eval.milebench.progress import TaskRun
from eval.milebench.prompt import Window, build_prompt
from eval.milebench.tasks import batches, read_task
from fmtrain.decoding import Decoder
from fmtrain.masks import VERSION
from fmtrain.patch import attach

REPOSITORY = Path(__file__).resolve().parents[3]
SEVEN = ["causal", "future", "v2v", "mma_interleaved", "v2v+merge", "text_future", "prefix_lm"]
SHORT = ["--max_new_tokens", "6"]
TASKS = ("TQA", "IEdit")


def picture(number: int) -> Image.Image:
    size = (20 + 3 * (number % 5), 30 - 2 * (number % 7))
    noise = torch.randint(
        0,
        256,
        (size[1], size[0], 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(number),
    )
    return Image.fromarray(noise.numpy())


def make_task(
    data: Path, name: str, question_type: str, images: list[int], words: str = "what changed?"
) -> None:
    """A task whose i-th sample has images[i] images, at places in its text."""
    (data / name / "images").mkdir(parents=True)
    entries, number = [], 0
    for i, count in enumerate(images):
        names = []
        for _ in range(count):
            names.append(f"{number}.png")
            picture(number).save(data / name / "images" / names[-1])
            number += 1
        context = (
            " ".join(f"picture {k + 1}: {{image#{k + 1}}}" for k in range(count)) + f" {words} {i}"
        )
        instance = {"context": context, "images_path": names}
        if question_type == "multi-choice":
            instance["choice_list"] = ["a red cube", "two blue spheres"]
        response = "a red cube" if question_type == "multi-choice" else "from 3 to 7"
        entries.append(
            {
                "sample_id": i,
                "task_instruction_id": i % 2,
                "task_instance": instance,
                "response": response,
            }
        )
        entries[-1]["image_quantity_level"] = "Few"  # MileBench's own scorer wants it
    meta = {
        "task_instruction": ["Look at the picture.", "The quick brown fox:"],
        "question_type": question_type,
    }
    (data / name / f"{name}.json").write_text(json.dumps({"meta_data": meta, "data": entries}))


def save(folder: Path, family: str = "llava", policy: dict | None = None) -> Path:
    model = families.model(family)
    if policy is not None:
        model.config.fmtrain = {"policy": "v2v", "merge": None, "version": VERSION} | policy
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0
    )
    model.save_pretrained(folder)
    families.processor(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data/ (two tasks), ckpt/ (trained with v2v) and bare/ (no policy on record)."""
    folder = tmp_path_factory.mktemp("generate")
    make_task(folder / "data", "TQA", "multi-choice", [1, 0, 2, 1, 3, 0, 2, 1])
    make_task(folder / "data", "IEdit", "open-ended", [2, 2, 3, 1])
    save(folder / "ckpt", policy={})
    save(folder / "bare")
    return folder


def arguments(place: Path, out: Path, *more: str, model: str = "ckpt") -> list[str]:
    return ["--data", str(place / "data"), "--model", str(place / model), "--out", str(out), *more]


def run(place: Path, out: Path, *more: str, model: str = "ckpt") -> dict[str, dict[str, str]]:
    """Generate in this process; {model/task: {sample: answer}}."""
    assert generate.main(arguments(place, out, *SHORT, *more, model=model)) == 0
    return answers(out)


def answers(out: Path) -> dict[str, dict[str, str]]:
    by_folder = {}
    for path in sorted(out.glob("*/*/pred.json")):
        records = json.loads(path.read_text())
        by_folder[str(path.parent.relative_to(out))] = {
            record["sample_id"]: record["pred_response"] for record in records
        }
        assert len(records) == len(by_folder[str(path.parent.relative_to(out))]), (
            "a sample is doubled"
        )
    return by_folder


@pytest.fixture(scope="module")
def plain(place) -> Path:
    """The output of an ordinary run."""
    run(place, place / "plain")
    return place / "plain"


def files(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def command(place: Path, out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    call = [
        warm.python(),
        *launcher,
        "-m",
        "eval.milebench.generate",
        *arguments(place, out, *more),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        call,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- what it writes -------------------------------------------------------------------------------


def test_what_is_written_and_that_it_can_be_scored(place, plain, tmp_path):
    assert files(plain) == sorted(
        f"ckpt/{task}/{file}" for task, file in product(TASKS, ("pred.json", "run.json"))
    )
    text = (plain / "ckpt" / "TQA" / "pred.json").read_text()
    records = json.loads(text)
    assert text == json.dumps(records, indent=4, ensure_ascii=False)
    assert [record["sample_id"] for record in records] == [
        0,
        3,
        7,
        1,
        5,
        2,
        6,
        4,
    ]  # MileBench: grouped by number of images
    assert records[5] == {
        "sample_id": 2,
        "image": [str(place / "data" / "TQA" / "images" / f"{k}.png") for k in (1, 2)],
        "question": "Look at the picture.\n"
        "picture 1: <ImageHere> picture 2: <ImageHere> what changed? 2\nChoice list: \n"
        "A. a red cube\nB. two blue spheres\nYour answer is: ",
        "gt_response": "a red cube",
        "gen_model_id": "ckpt",
        "pred_response": records[5]["pred_response"],
        "gen_kwargs": {
            "max_new_tokens": 6,
            "min_new_tokens": 1,
            "do_sample": False,
            "num_beams": 1,
        },
    }
    assert len({record["pred_response"] for record in records}) > 4, (
        "the tiny model answers everything alike"
    )
    recorded = json.loads((plain / "ckpt" / "TQA" / "run.json").read_text())
    assert (
        recorded["settings"]["policy"] == "v2v"
        and recorded["settings"]["window"] == 2048
        and recorded["notes"] == {}
    )
    for scoring in ("original", "fixed"):
        call = [
            "--data",
            str(place / "data"),
            "--predictions",
            str(plain),
            "--out",
            str(tmp_path / scoring),
            "--scoring",
            scoring,
        ]
        assert score.main(call) == 0
        scored = json.loads((tmp_path / scoring / "scores.json").read_text())["models"]["ckpt"][
            "tasks"
        ]
        assert {name: part["n"] for name, part in scored.items()} == {"TQA": 8, "IEdit": 4}


def test_answers_are_the_models_own(place, plain):
    """An independent loop: one sample at a time, plain processor call, argmax by argmax."""
    model, processor = families.model("llava"), families.processor("llava")
    end = processor.tokenizer.eos_token_id
    with (
        attach(model, "v2v", "reference", markers=families.markers(model)),
        torch.no_grad(),
    ):
        for record in json.loads((plain / "ckpt" / "TQA" / "pred.json").read_text()):
            pieces = [piece for piece in re.split("(<ImageHere>)", record["question"]) if piece]
            prompt = (
                "USER: "
                + "\n".join(piece.replace("<ImageHere>", "<image>") for piece in pieces)
                + " ASSISTANT:"
            )
            inputs = processor(
                text=prompt,
                images=[Image.open(path) for path in record["image"]] or None,
                return_tensors="pt",
            )
            inputs.pop("token_type_ids", None)
            out = model(**inputs, use_cache=True)
            made: list[int] = []
            while len(made) < 6 and end not in made:
                logits = out.logits[0, -1].clone()
                logits[model.config.image_token_id] = -torch.inf
                logits[end] = logits[end] if made else -torch.inf
                made.append(int(logits.argmax()))
                out = model(
                    input_ids=torch.tensor([made[-1:]]),
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
            assert (
                record["pred_response"]
                == processor.tokenizer.decode(made, skip_special_tokens=True).strip()
            )


def test_a_second_run_has_nothing_to_do(place, plain, capsys, monkeypatch):
    before = {name: (plain / name).stat().st_mtime_ns for name in files(plain)}
    monkeypatch.setattr(generate, "load", None)
    assert generate.main(arguments(place, plain, *SHORT)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {name: (plain / name).stat().st_mtime_ns for name in files(plain)}


def test_an_adapter_is_accepted(place, tmp_path):
    model = families.model("llava")
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    wrapped.peft_config["default"].base_model_name_or_path = str(place / "bare")
    wrapped.save_pretrained(tmp_path / "adapter")
    model.config.fmtrain = {
        "policy": "v2t",
        "merge": {"prefix": 2, "kernel_size": 1, "normalize": True},
        "version": VERSION,
    }
    model.config.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "folded")
    families.processor("llava").save_pretrained(tmp_path / "adapter")
    families.processor("llava").save_pretrained(tmp_path / "folded")
    call = ["--data", str(place / "data"), "--out", str(tmp_path / "out"), *SHORT]
    for name in ("adapter", "folded"):
        assert generate.main([*call, "--model", str(tmp_path / name)]) == 0
    by_folder = answers(tmp_path / "out")
    assert by_folder["adapter/TQA"] == by_folder["folded/TQA"]
    settings = json.loads((tmp_path / "out" / "adapter" / "TQA" / "run.json").read_text())[
        "settings"
    ]
    assert (settings["policy"], settings["merge"]["prefix"]) == ("v2t", 2)


def test_combined_images(place, tmp_path):
    """What `eval.milebench.combine` writes is shown in front of the text, one image for three."""
    make_task(tmp_path / "data", "TQA", "multi-choice", [3, 1])
    (tmp_path / "ckpt").symlink_to(place / "ckpt")
    assert combine.main(["--data", str(tmp_path / "data"), "--tasks", "TQA", "--images", "1"]) == 0
    run(tmp_path, tmp_path / "out", "--combine", "1")
    records = json.loads((tmp_path / "out" / "ckpt" / "TQA" / "pred.json").read_text())
    folder = tmp_path / "data" / "TQA" / "combined_1_images"
    assert [record["image"] for record in records] == [
        [str(folder / "0-0.jpg")],
        [str(folder / "1-0.jpg")],
    ]
    assert records[0]["question"].startswith(
        "<ImageHere>\nLook at the picture.\npicture 1: <Image 1>  picture 2: <Image 2> "
    )


# --- nothing but the policy decides ---------------------------------------------------------------


@pytest.mark.parametrize("images", ["1", "4", "100"])
def test_batch_size_changes_no_prediction(place, plain, tmp_path, images):
    assert run(place, tmp_path, "--batch_images", images) == answers(plain)


def test_seven_masks_cost_one_pass_of_the_tower(place, plain, tmp_path, monkeypatch):
    passes = []
    load = generate.load

    def counting(*args, **kwargs):
        model, processor = load(*args, **kwargs)
        model.base_model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
        return model, processor

    monkeypatch.setattr(generate, "load", counting)
    together = run(place, tmp_path / "together", "--masks", *SEVEN, model="bare")
    all_batches = []
    for name in TASKS:
        all_batches += batches(read_task(place / "data", name).samples, 24)
    with_images = [batch for batch in all_batches if batch[0].images]
    assert len(passes) == len(with_images) == 6
    assert sorted(together) == sorted(f"bare+{name}/{task}" for name, task in product(SEVEN, TASKS))
    assert len({json.dumps(together[f"bare+{name}/TQA"]) for name in SEVEN}) >= 5, (
        "the policies make no difference"
    )
    assert together["bare+v2v/TQA"] == answers(plain)["ckpt/TQA"]
    apart = {}
    for name in SEVEN:
        apart |= run(place, tmp_path / "apart", "--masks", name, model="bare")
    assert together == apart


@pytest.mark.parametrize("family", families.FAMILIES)
def test_teacher_forcing_rederives_every_answer(place, family):
    """Each greedy token is the argmax of one forward over prompt and answer.

    In all families, on shared features.
    """
    model, processor = families.model(family), families.processor(family)
    attach(model, "v2v", "sdpa")
    decoder, fitter, task = (
        Decoder(model, processor),
        Fitter(processor, 2048, 8),
        read_task(place / "data", "TQA"),
    )
    fitted = [fitter.fit(task, sample) for sample in task.samples]
    prompts = decoder.run_tower([sample.encoded for sample in fitted])
    single = [decoder.run_tower([sample.encoded]) for sample in fitted]
    for name in SEVEN:
        with decoder.under(name):
            made = decoder.answers(prompts, max_new_tokens=6, min_new_tokens=1, do_sample=False)
            assert max(max(gaps) for gaps in decoder.shortfalls(prompts, made)) == 0.0
            if name in ("v2v", "v2v+merge", "prefix_lm"):
                assert [
                    decoder.answers(one, max_new_tokens=6, min_new_tokens=1, do_sample=False)[0]
                    for one in single
                ] == made
    with decoder.under("causal"):  # the answers of another mask, and wrong ones, are told apart
        assert max(max(gaps) for gaps in decoder.shortfalls(prompts, made)) > 0.01
    wrong = [[(token + 1) % 250 + 3 for token in answer] for answer in made]
    assert min(max(gaps) for gaps in decoder.shortfalls(prompts, wrong)) > 0.01


def test_verify(place, plain, tmp_path, monkeypatch, capsys):
    assert run(place, tmp_path / "sound", "--verify") == answers(plain)
    monkeypatch.setattr(
        Decoder, "answers", lambda self, prompts, **settings: [[5]] * prompts.layout.shape[0]
    )
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments(place, tmp_path / "unsound", "--verify"))
    assert stop.value.code == 2
    assert (
        "under v2v: teacher forcing does not give token 0 of the answer" in capsys.readouterr().err
    )


# --- a killed run ---------------------------------------------------------------------------------


def test_notes_of_every_batch_are_in_the_record(tmp_path):
    run, samples = TaskRun(tmp_path, {}, {}), [SimpleNamespace(sample_id=k) for k in range(3)]
    run.start()
    run.append(1, 1, [{"sample_id": 2}], {"2": ["no place"]})
    run.append(0, 0, [{"sample_id": 0}, {"sample_id": 1}], {"1": ["cut"]})
    assert run.finish([samples[:2], samples[2:]]) == 2
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["notes"] == {"1": ["cut"], "2": ["no place"]}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(place, tmp_path, monkeypatch):
    """SIGKILL in the middle, with a torn line on top; then the same command.

    Nothing is lost, doubled or different.
    """
    make_task(tmp_path / "data", "WikiVQA", "multi-choice", [1, 2] * 12)
    (tmp_path / "ckpt").symlink_to(place / "ckpt")
    more = ["--max_new_tokens", "24", "--batch_images", "2", "--masks", "v2v", "causal"]
    assert generate.main(arguments(tmp_path, tmp_path / "whole", *more)) == 0
    running = command(tmp_path, tmp_path / "killed", *more)
    folders = [tmp_path / "killed" / f"ckpt+{name}" / "WikiVQA" for name in ("v2v", "causal")]
    progress = folders[0] / "progress.0.jsonl"
    while not progress.is_file() or progress.read_bytes().count(b'"batch"') < 3:
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not list(tmp_path.glob("killed/*/*/pred.json"))
    progress.write_bytes(
        progress.read_bytes()[:-40]
    )  # as if the kill had come in the middle of a write
    lost = 18 - progress.read_bytes().count(b'"batch"') + 1
    made = []
    real = generate.answer_batch
    monkeypatch.setattr(
        generate,
        "answer_batch",
        lambda *args: made.append([str(mask) for mask in args[2]]) or real(*args),
    )
    assert generate.main(arguments(tmp_path, tmp_path / "killed", *more)) == 0
    assert 1 < len(made) < 18 and sum("v2v" in names for names in made) == lost
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.slow
def test_two_processes_make_the_same_predictions(place, plain, tmp_path):
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    )  # gloo on CPU
    running = command(place, tmp_path / "two", *SHORT, launcher=launcher)
    while running.poll() is None and len(list(tmp_path.glob("two/ckpt/*/progress.1.jsonl"))) < 1:
        time.sleep(0.02)
    took_part = running.poll() is None
    out, error = running.communicate(timeout=300)
    assert running.returncode == 0, error
    assert took_part, "the second process made nothing"
    assert out.count("pred.json: ") == 2
    assert files(tmp_path / "two") == files(plain)
    for name in files(plain):
        assert (tmp_path / "two" / name).read_text() == (plain / name).read_text()


class Process:
    """What a `PartialState` says to one of two processes, which are threads here. The second one
    goes on when the first waits for it again."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int, barrier: threading.Barrier, ahead: threading.Semaphore):
        self.process_index, self.is_main_process = rank, rank == 0
        self._barrier, self._ahead = barrier, ahead

    def wait_for_everyone(self) -> None:
        if self.is_main_process:
            self._ahead.release()
        self._barrier.wait(60)
        if not self.is_main_process:
            self._ahead.acquire(timeout=5)


def test_predictions_are_put_together_when_the_slower_process_is_done(place, plain, tmp_path):
    words = arguments(place, tmp_path / "two", *SHORT)
    options = generate.arguments_parser().parse_args(words)
    planned = options, *generate.plan(options)
    barrier, ahead = threading.Barrier(2), threading.Semaphore(0)
    first, second = (Process(rank, barrier, ahead) for rank in (0, 1))
    slower = threading.Thread(target=lambda: ahead.acquire() and generate.run(*planned, second))
    slower.start()
    try:
        generate.run(*planned, first)
    finally:
        ahead.release()
        slower.join(60)
    assert files(tmp_path / "two") == files(plain)
    for name in files(plain):
        assert (tmp_path / "two" / name).read_text() == (plain / name).read_text()


def test_predictions_made_otherwise_are_not_mixed(place, plain, tmp_path, capsys):
    out = tmp_path / "out"
    call = arguments(place, out, "--tasks", "IEdit")
    run(place, out, "--tasks", "IEdit")

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as stop:
            generate.main([*call, *more])
        errors = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        assert stop.value.code == 2 and len(errors) == 1
        return errors[0]

    assert "IEdit: was made with max_new_tokens 6, not 7; use --overwrite" in refused(
        "--max_new_tokens", "7"
    )
    assert "was made with checkpoint " in refused(
        *SHORT, "--model", str(save(tmp_path / "ckpt", "llava_next", {}))
    )
    (out / "ckpt" / "IEdit" / "run.json").unlink()
    assert "pred.json: is not from here (there is no run.json)" in refused(*SHORT)
    assert generate.main([*call, *SHORT, "--overwrite"]) == 0
    assert answers(out)["ckpt/IEdit"] == answers(plain)["ckpt/IEdit"]
    run(place, out, "--tasks", "IEdit", "--name", "other")
    assert answers(out)["other/IEdit"] == answers(plain)["ckpt/IEdit"]


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_prompts_fit_the_window_and_fill_it(tmp_path, family):
    """Nothing is cut where everything fits exactly; one token less, and the left goes.

    Question and instruction stay.
    """
    make_task(tmp_path, "TQA", "multi-choice", [3, 1, 0], words="the lazy dog " * 5)
    task, processor = read_task(tmp_path, "TQA"), families.processor(family)
    for sample in task.samples:
        whole = Fitter(processor, 5000, 10).fit(task, sample)
        length = whole.encoded.layout.shape[1] + 10
        assert whole.prompt.notes == () and len(whole.prompt.images) == len(sample.images)
        slack = 2 * (
            2 * len(sample.images) + 1
        )  # text encoded in pieces may take a token more at each seam
        exact = Fitter(processor, length + slack, 10).fit(task, sample)
        assert exact.prompt == whole.prompt
        least = (
            10
            + 25
            + len(processor.tokenizer(task.instruction(sample), add_special_tokens=False).input_ids)
        )
        for shorter in range(length - 1, least, -9):
            cut = Fitter(processor, shorter, 10).fit(task, sample)
            assert cut.encoded.layout.shape[1] + 10 <= shorter
            instruction, _, kept = cut.prompt.text.partition("\n")
            assert instruction == task.instruction(sample) and whole.prompt.text.endswith(kept)
            assert cut.prompt.notes and len(cut.prompt.text) < len(whole.prompt.text)
    with pytest.raises(
        ValueError,
        match=r"TQA.json: sample 2: \d+ tokens that cannot be cut, and 10 for the answer, "
        r"do not fit",
    ):
        Fitter(processor, 25, 10).fit(task, task.samples[2])


# --- MileBench's own prompts ----------------------------------------------------------------------


def test_original_prompts_are_fed_as_milebench_feeds_them(place, tmp_path):
    """Its text around its images in its template, whatever the model's own; pairs get newlines."""
    task, processor = read_task(place / "data", "TQA"), families.processor("llava")
    fitter, tokenizer = OriginalFitter(processor, 2048, 6, positions=2048), processor.tokenizer
    sample = task.samples[2]
    fitted = fitter.fit(task, sample)
    window = Window(2048, fitter.image_tokens((23, 28), True))
    prompt = build_prompt(task, sample, tokenizer, window, original=True)
    assert fitted.prompt == prompt and len(prompt.images) == 2
    ids = fitted.encoded.inputs["input_ids"][0].tolist()
    text = llava_prompt(prompt.text)
    words = [token for token in ids if token != processor.image_token_id]
    expected = llava_input_ids(text, tokenizer, bos_id=tokenizer.bos_token_id)
    places = [k for k, token in enumerate(ids) if token == processor.image_token_id]
    assert ids[: places[0]] == expected[: expected.index(IMAGE_INDEX)]
    theirs = tokenizer.decode([token for token in expected if token != IMAGE_INDEX])
    assert tokenizer.decode(words).split() == theirs.split()  # LLaVA has a blank after an image
    assert len(places) == 2 * fitter.image_tokens((23, 28), True)

    for text in ("a<ImageHere><ImageHere>b", "<ImageHere>" * 3, "no picture", '{{ "x" }} \n é'):
        rendered = fitter.processor.apply_chat_template(llava_messages(text), tokenize=False)
        assert rendered == llava_prompt(text)
    own = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    assert "INST" not in processor.apply_chat_template(own, tokenize=False)


def test_original_prompts_as_a_command(place, plain, tmp_path, capsys):
    """They are recorded, and predictions of the other prompts are never mixed with them."""
    made = run(place, tmp_path / "original", "--prompts", "original")
    assert made.keys() == answers(plain).keys() and made != answers(plain)
    for out, prompts in ((tmp_path / "original", "original"), (plain, "fixed")):
        recorded = json.loads((out / "ckpt" / "TQA" / "run.json").read_text())
        assert recorded["settings"]["prompts"] == prompts
        call = ["--data", str(place / "data"), "--predictions", str(out)]
        assert score.main([*call, "--out", str(tmp_path / prompts / "scores")]) == 0
        scores = json.loads((tmp_path / prompts / "scores" / "scores.json").read_text())
        assert scores["models"]["ckpt"]["prompts"] == prompts
    capsys.readouterr()
    save(tmp_path / "next", "llava_next", {})
    refusals = {
        ("--out", str(plain)): "was made with prompts 'fixed', not 'original'",
        ("--model", str(tmp_path / "next")): "next is a llava_next; MileBench's prompts are here",
        ("--window", "2048", "--max_new_tokens", "1990"): "pass the model's 2048 positions",
    }
    for more, message in refusals.items():
        call = arguments(place, tmp_path / "refused", *SHORT, "--prompts", "original", *more)
        with pytest.raises(SystemExit) as stopped:
            generate.main(call)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "{place}/nowhere"], "{place}/nowhere: no such data folder"),
        (["--data", "{place}/ckpt"], "{place}/ckpt: holds no <task>/<task>.json"),
        (
            ["--tasks", "TQQA"],
            "unknown task 'TQQA'; the nearest in {place}/data is 'TQA', there are IEdit, TQA",
        ),
        (
            ["--data", "{place}/broken", "--tasks", "IEdit"],
            "{place}/broken/IEdit/IEdit.json: not JSON (line 1, column 2",
        ),
        (
            ["--data", "{place}/broken", "--tasks", "TQA"],
            "sample 2: image file {place}/broken/TQA/images/2.png is missing",
        ),
        (
            ["--data", "{place}/broken", "--tasks", "OCR"],
            "sample 0: image '{place}/broken/OCR/images/0.png' cannot be read: not an image",
        ),
        (
            ["--data", "{place}/broken", "--tasks", "Mark"],
            "Mark.json: sample 0: a text contains the placeholder '<image>'",
        ),
        (["--model", "{place}/nowhere"], "{place}/nowhere: no such checkpoint folder"),
        (
            ["--model", "{place}/bare"],
            "{place}/bare: its config.json records no mask; name one, e.g. --masks causal",
        ),
        (["--masks", "v3v"], "unknown policy 'v3v'; the nearest is 'v2v'"),
        (
            ["--masks", "v2v", "v2v+marge"],
            "neither a policy nor POLICY+merge; the nearest is 'v2v+merge'",
        ),
        (
            ["--masks", "causal+merge"],
            "policy 'causal' reveals nothing, so there is nothing to merge",
        ),
        (["--window", "4096"], "--window 4096: the model has 2048 positions"),
        (["--window", "40", "--max_new_tokens", "30"], "do not fit into the window of 40"),
        (["--batch_images", "0"], "--batch_images, --window and --combine are 1 or more"),
        (
            ["--out", "{place}/ckpt/config.json"],
            "config.json/ckpt/IEdit: cannot be written (Not a directory)",
        ),
    ],
)
def test_errors_are_one_line(place, tmp_path, capfd, more, message):
    broken = place / "broken"
    if not broken.exists():
        for name, words in (("TQA", "?"), ("IEdit", "?"), ("OCR", "?"), ("Mark", "<image>")):
            make_task(broken, name, "multi-choice", [1, 0, 2], words)
        (broken / "TQA" / "images" / "2.png").unlink()
        (broken / "IEdit" / "IEdit.json").write_text("{")
        (broken / "OCR" / "images" / "0.png").write_text("no picture")
    with pytest.raises(SystemExit) as stop:
        generate.main(
            arguments(place, tmp_path / "out", *(word.format(place=place) for word in more))
        )
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and message.format(place=place) in lines[0]
    assert not list(tmp_path.rglob("pred.json"))


@pytest.mark.slow
def test_an_error_from_the_shell(place, tmp_path):
    running = command(place, tmp_path, "--masks", "v3v")
    out, error = running.communicate(timeout=120)
    assert (
        (running.returncode, out) == (2, "")
        and error.count("\n") == 1
        and error.startswith("error: unknown policy 'v3v'")
    )
