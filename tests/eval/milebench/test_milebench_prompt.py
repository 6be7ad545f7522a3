"""Prompts: `original` against MileBench's own (golden), the default against ones made by hand."""

import json
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from eval.milebench.llava_prompt import llava_input_ids, llava_prompt
from eval.milebench.predictions import prediction_record, predictions_json
from eval.milebench.prompt import Prompt, Window, build_prompt, require_inputs
from eval.milebench.tasks import Task, batches, parse_task, read_task

LARGE = Window(length=1000, per_image=10)


def task_of(context: str, n_images: int, name: str = "TQA", **instance) -> Task:
    """A task of one sample, instruction "Look here."."""
    instance = {
        "context": context,
        "images_path": [f"{k}.jpg" for k in range(1, n_images + 1)],
        **instance,
    }
    sample = {"sample_id": 7, "task_instruction_id": 0, "task_instance": instance, "response": 4.5}
    meta = {"task_instruction": ["Look here."], "question_type": "open-ended"}
    return parse_task(
        {"meta_data": meta, "data": [sample]}, name, Path("a.json"), f"d/{name}/images"
    )


def build(
    words,
    context: str,
    n_images: int,
    window: Window = LARGE,
    combined: int | None = None,
    **instance,
) -> Prompt:
    task = task_of(context, n_images, **instance)
    return build_prompt(task, task.samples[0], words, window, combined)


def test_golden_prompts(golden, golden_tokenizers):
    cases = [
        json.loads(line)
        for line in (golden / "prompt" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    n_prompts = n_errors = n_llava = 0
    for case in cases:
        meta = {"task_instruction": case["task_instruction"], "question_type": "open-ended"}
        document = {"meta_data": meta, "data": [case["annotation"]]}
        task = parse_task(document, case["dataset_name"], Path("golden.json"), case["img_dir"])
        tokenizer = golden_tokenizers[case["tokenizer"]]
        for variant in case["variants"]:
            arguments = task, task.samples[0], tokenizer
            window = Window(variant["max_context_len"], variant["n_tokens_per_image"])
            expected = variant["expected"]
            if "error" in expected:
                with pytest.raises(ValueError, match=r"golden\.json: sample"):
                    build_prompt(*arguments, window, case["combine_image"], original=True)
                n_errors += 1
                continue
            prompt = build_prompt(*arguments, window, case["combine_image"], original=True)
            assert expected == {
                "sample_id": prompt.sample_id,
                "context": prompt.text,
                "raw_img_list": list(prompt.images),
                "response": prompt.response,
            }, case["case"]
            n_prompts += 1
            if "llava" in variant:
                llava = variant["llava"]
                text = llava_prompt(prompt.text, llava["mm_use_im_start_end"])
                assert text == llava["prompt"] and list(prompt.images) == llava["images"]
                assert llava_input_ids(text, tokenizer, bos_id=1) == llava["input_ids"]
                n_llava += 1
    assert (len(cases), n_prompts, n_errors, n_llava) == (193, 480, 9, 42)


def test_golden_generation(golden, golden_tokenizers):
    """Order, batches, prompts and pred.json of a whole run, with scripted answers."""
    script = json.loads((golden / "e2e" / "script.json").read_text())
    config = json.loads((golden / "e2e" / script["config_file"]).read_text())[script["model"]]
    tokenizer = golden_tokenizers[Path(script["tokenizer"]).stem]
    window = Window(config["max_context_len"], config["n_tokens_per_image"])
    for run in script["runs"]:
        name = run["dataset"]
        task = read_task(golden / "e2e" / "data", name)
        task = Task(
            name,
            task.path,
            run["img_dir_as_given"],
            task.question_type,
            task.instructions,
            task.samples,
        )
        groups = batches(task.samples, run["batch_image"])
        assert [[sample.number for sample in group] for group in groups] == script["batches"][name]
        records = []
        for sample in chain.from_iterable(groups):
            prompt = build_prompt(
                task, sample, tokenizer, window, run["combine_image"], original=True
            )
            answer = script["answers"][name][str(sample.number)]
            records.append(
                prediction_record(prompt, answer, config["model_name"], config["gen_kwargs"])
            )
        expected = golden / "e2e" / "outputs" / script["model"] / name / "pred.json"
        assert predictions_json(records) == expected.read_text(encoding="utf-8")
        assert len(records) == 26
    assert len(script["runs"]) == 5


def test_pieces_text_and_messages(words):
    prompt = build(words, "{image#1} and {table#2} differ?", 2)
    assert prompt.text == "Look here.\n<ImageHere> and <ImageHere> differ?"
    assert prompt.images == ("d/TQA/images/1.jpg", "d/TQA/images/2.jpg")
    assert (prompt.sample_id, prompt.response, prompt.notes) == (7, "4.5", ())
    assert prompt.messages() == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look here.\n"},
                {"type": "image"},
                {"type": "text", "text": " and "},
                {"type": "image"},
                {"type": "text", "text": " differ?"},
            ],
        }
    ]


def test_q14_labels_past_26_are_those_of_the_scorer(words):
    choices = [f"c{i}" for i in range(54)]
    text = build(words, "", 0, choice_list=choices).text
    assert "\nZ. c25\nAA. c26\n" in text and "\nAZ. c51\nBA. c52\nBB. c53\nYour answer is: " in text
    assert build(words, "", 0, name="GPR1200", choice_list=["p", "q"]).text.endswith(
        "\nChoice list: \np\nq\nYour answer is: "
    )


def test_q15_no_room_leaves_the_instruction(words):
    for length in (0, 1, 2):  # the instruction with its newline is 2 tokens
        prompt = build(words, "{image#1} a b c", 1, Window(length, 0))
        assert prompt.text == "Look here.\n" and prompt.images == ()
        assert any(f"tokens left of {length}" in note for note in prompt.notes)
    assert build(words, "{image#1} a b c", 1, Window(3, 10)).text == "Look here.\nc"


def test_q16_images_go_by_index(words):
    swapped = build(words, "{image#2} before {image#1}", 2)
    assert swapped.images == ("d/TQA/images/2.jpg", "d/TQA/images/1.jpg") and not swapped.notes
    repeated = build(words, "{image#1} or {image#1} or {image#2}", 2)
    assert [Path(path).stem for path in repeated.images] == ["1", "1", "2"]
    assert repeated.notes == ("images with several places: [1]",)
    surplus = build(words, "only {image#2}", 3)
    assert surplus.text == "Look here.\n<ImageHere><ImageHere>only <ImageHere>"
    assert [Path(path).stem for path in surplus.images] == ["1", "3", "2"]
    assert surplus.notes == ("images without a place, put in front: [1, 3]",)
    unknown = build(words, "{image#0} {image#1} {table#4}", 1)
    assert unknown.text == "Look here.\n{image#0} <ImageHere> {table#4}"
    assert unknown.notes == ("{image#0}, {table#4} named, but there are 1 images",)


def test_q16_literal_placeholder_is_no_place(words):
    prompt = build(words, "<ImageHere> {image#1}", 1)
    assert prompt.messages()[0]["content"][1:] == [
        {"type": "text", "text": "<ImageHere> "},
        {"type": "image"},
    ]
    assert len(prompt.images) == 1 and prompt.notes == ("the text itself holds <ImageHere>",)


def test_q16_original_refuses_messages_with_a_place_too_many(words):
    task = task_of("{image#1} {image#1}", 1)
    prompt = build_prompt(task, task.samples[0], words, LARGE, original=True)
    with pytest.raises(ValueError, match="sample 7: 2 places for 1 images"):
        prompt.messages()


def test_q17_the_window_subtracts_what_is_used(words):
    # Instruction with newline 2, overhead 5, image 10, " a " 2 words, "b" none: 4 tokens of text.
    context = "{image#1} a b c"
    assert len(words(" a b c", add_special_tokens=False).input_ids) == 4
    exact = build(words, context, 1, Window(2 + 5 + 10 + 4, 10, overhead=5))
    assert exact.images and not exact.notes
    one_less = build(words, context, 1, Window(2 + 5 + 10 + 3, 10, overhead=5))
    assert not one_less.images and one_less.text == "Look here.\n a b c"
    assert one_less.notes == ("cut to the 13 tokens left of 20: 0 of 1 images kept",)
    task = task_of(context, 1)
    with pytest.raises(ValueError, match="subtracts no overhead"):
        build_prompt(task, task.samples[0], words, Window(100, 10, overhead=5), original=True)


def test_q17_combined_images_take_room(words):
    instance = {"combined_1_images": ["7-0.jpg"]}
    assert (
        build(words, "a b c", 2, Window(2 + 10 + 3, 10), 1, **instance).text
        == "<ImageHere>\nLook here.\na b c"
    )
    assert (
        build(words, "a b c", 2, Window(2 + 10 + 2, 10), 1, **instance).text
        == "<ImageHere>\nLook here.\nb c"
    )


@pytest.mark.parametrize(
    "image_dir", ["/images/my_images/TQA/images", "/images/my_images/TQA/images/"]
)
def test_q19_combined_folder_lies_beside_the_images(words, image_dir):
    task = task_of("{image#1} x {image#2}", 2, combined_2_images=["7-0.jpg", "7-1.jpg"])
    task = Task(
        task.name, task.path, image_dir, task.question_type, task.instructions, task.samples
    )
    prompt = build_prompt(task, task.samples[0], words, LARGE, combined=2)
    folder = "/images/my_images/TQA/combined_2_images"
    assert prompt.images == (f"{folder}/7-0.jpg", f"{folder}/7-1.jpg")
    assert prompt.text == "<ImageHere><ImageHere>\nLook here.\n<Image 1>  x <Image 2> "
    with pytest.raises(ValueError, match=r"a\.json: sample 7: key 'combined_3_images' is missing"):
        build_prompt(task, task.samples[0], words, LARGE, combined=3)


def test_cutting_keeps_the_question(words):
    # "one " is 1 token, an image 10, " two " 2, an image 10, " three four" 3: 26 in all.
    context = "one {image#1} two {image#2} three four"
    kept = [
        build(words, context, 2, Window(2 + room, 10))
        for room in (26, 25, 24, 15, 14, 13, 12, 3, 2)
    ]
    assert [
        (prompt.text.removeprefix("Look here.\n"), [Path(path).stem for path in prompt.images])
        for prompt in kept
    ] == [
        ("one <ImageHere> two <ImageHere> three four", ["1", "2"]),
        ("<ImageHere> two <ImageHere> three four", ["1", "2"]),
        (" two <ImageHere> three four", ["2"]),
        (" two <ImageHere> three four", ["2"]),
        ("<ImageHere> three four", ["2"]),
        ("<ImageHere> three four", ["2"]),
        (" three four", []),
        (" three four", []),
        ("three four", []),
    ]


def test_the_last_text_survives_before_an_image(words):
    prompt = build(words, "a long question {image#1}", 1, Window(2 + 10 + 2, 10))
    assert prompt.text == "Look here.\nlong question <ImageHere>"


def test_uncut_text_does_not_pass_the_tokenizer(golden_tokenizers):
    task = task_of("{image#1} Ünknown  WORDS", 1)
    for tokenizer in golden_tokenizers.values():
        assert (
            build_prompt(task, task.samples[0], tokenizer, LARGE).text
            == "Look here.\n<ImageHere> Ünknown  WORDS"
        )


def test_transformers_tokenizer(golden):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(golden / "prompt" / "tokenizers" / "llama_like.json")
    )
    task = task_of("{image#1} near left of a box", 1)
    ids = tokenizer(" near left of a box", add_special_tokens=False).input_ids
    room = len(tokenizer("Look here.\n", add_special_tokens=False).input_ids) + len(ids) - 1
    prompt = build_prompt(task, task.samples[0], tokenizer, Window(room, 5))
    assert prompt.images == () and prompt.text == "Look here.\n" + tokenizer.decode(ids[1:])


def test_required_inputs(tmp_path, make_data):
    data = make_data("TQA", [("x", None, 2)], "open-ended")
    task, images = read_task(data, "TQA"), data / "TQA" / "images"
    images.mkdir()
    Image.new("RGB", (2, 2)).save(images / "0.jpg")
    with pytest.raises(
        ValueError, match=r"TQA.json: sample 0: image file .*images/1.jpg is missing"
    ):
        require_inputs(task)
    Image.new("RGB", (2, 2)).save(images / "1.jpg")
    require_inputs(task)


def test_samples_without_images_make_a_batch(make_data):
    task = read_task(
        make_data("TQA", [("x", None, 0)] * 3 + [("x", None, 5)] * 2, "open-ended"), "TQA"
    )
    assert [[sample.number for sample in group] for group in batches(task.samples, 2)] == [
        [0, 1],
        [2],
        [3],
        [4],
    ]
