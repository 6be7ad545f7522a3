"""Runs of the trainer: what they write, what they refuse, and that a killed one goes on as if
nothing had happened."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import training
from peft import LoraConfig, get_peft_model
from PIL import Image
from wandb_files import wandb_records

import fmtrain
from fmtrain import sft
from fmtrain.patch import unwrap
from fmtrain.training import trainable
from fmtrain.training.first_batch import AuditFirstBatch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    training.workplace(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A fresh copy of the workplace."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    training.write_recipe(tmp_path)
    return tmp_path


def refused(folder: Path, *overrides: str) -> str:
    """The message of a run that must be refused, in one line and with nothing written."""
    before = sorted(str(path) for path in folder.rglob("*") if "cache" not in str(path))
    with pytest.raises(ValueError) as error:
        sft.main([str(folder / "recipe.yaml"), *overrides])
    assert sorted(str(path) for path in folder.rglob("*") if "cache" not in str(path)) == before
    message = str(error.value)
    assert "\n" not in message
    return message


def change_row(folder: Path, number: int, change) -> None:
    rows = training.read_rows(folder)
    change(rows[number])
    training.write_rows(folder, rows)


# --- what a run writes ----------------------------------------------------------------------------


def test_a_lora_run_writes_adapter_recipe_and_record(folder):
    assert (
        sft.main([str(folder / "recipe.yaml"), "--max_steps", "2", "--learning_rate", "0.005"]) == 0
    )
    out = folder / "out"
    assert json.loads((out / "config.json").read_text())["fmtrain"] == {
        "policy": "v2v",
        "reveals": [["VISUAL", "VISUAL"]],
        "within_image": False,
        "merge": None,
        "version": 1,
        "markers": fmtrain.markers(training.families.processor("llava")).record(),
    }
    assert (
        json.loads((out / "checkpoint-2" / "config.json").read_text())["fmtrain"]["policy"] == "v2v"
    )
    run = json.loads((out / "run.json").read_text())
    assert (
        run["policy"] == "v2v"
        and run["backend"] == "auto"
        and run["rows"] == 24
        and run["versions"]["torch"] == torch.__version__
    )
    assert "learning_rate: 0.005" in (out / "recipe.yaml").read_text()
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets and not any("vision" in name or "projector" in name for name in targets)
    from safetensors.torch import load_file

    names = load_file(out / "adapter_model.safetensors").keys()
    assert {name.split(".layers.")[0].rsplit(".", 1)[-1] for name in names} == {"language_model"}
    assert not any("lm_head" in name for name in names)


def test_full_fine_tuning_freezes_what_no_gradient_reaches_and_names_it(folder, capsys):
    from safetensors.torch import load_file

    parts = ["--train_parts", "language_model", "projector", "vision_tower"]
    assert (
        sft.main([str(folder / "recipe.yaml"), "--use_peft", "false", *parts, "--max_steps", "2"])
        == 0
    )
    said = "".join(capsys.readouterr().err.split())
    assert (
        "vision_tower.encoder.layers.2.mlp.fc1.weight" in said
        and "vision_tower.post_layernorm.bias" in said
    )
    before, after = (
        load_file(folder / "base" / "model.safetensors"),
        load_file(folder / "out" / "model.safetensors"),
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and all(
        "layers.2." in name or "post_layernorm" in name for name in same if "vision_tower" in name
    )
    assert not any("language_model.layers" in name or "projector" in name for name in same)
    assert any("vision_tower.encoder.layers.1." in name for name in before.keys() - same)


def test_by_default_full_fine_tuning_leaves_the_tower_alone(folder):
    from safetensors.torch import load_file

    assert sft.main([str(folder / "recipe.yaml"), "--use_peft", "false", "--max_steps", "2"]) == 0
    before, after = (
        load_file(folder / "base" / "model.safetensors"),
        load_file(folder / "out" / "model.safetensors"),
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        moved
        and not any("vision_tower" in name for name in moved)
        and any("projector" in name for name in moved)
    )


def test_the_table_of_what_learns_counts_every_parameter_once():
    model = training.families.model("llava").requires_grad_(False)
    model.model.multi_modal_projector.linear_2.requires_grad_(True)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    sizes = {
        part: sum(parameter.numel() for module in modules for parameter in module.parameters())
        for part, modules in {
            "language_model": (model.model.language_model, model.lm_head),
            "projector": (model.model.multi_modal_projector,),
            "linear_2": (model.model.multi_modal_projector.linear_2,),
            "vision_tower": (model.model.vision_tower,),
        }.items()
    }
    text = model.config.text_config
    ends = 2 * text.hidden_size + text.hidden_size + text.intermediate_size  # of q_proj, of up_proj
    adapters = text.num_hidden_layers * 4 * ends
    adapted = get_peft_model(model, lora)
    adapted.base_model.model.model.multi_modal_projector.linear_2.requires_grad_(True)
    tower, projector, learnt = (sizes[name] for name in ("vision_tower", "projector", "linear_2"))
    of_text = sizes["language_model"]
    expected = {
        "language_model": (of_text + adapters, adapters, adapters, of_text),
        "projector": (projector, learnt, 0, projector - learnt),
        "vision_tower": (tower, 0, 0, tower),
    }
    expected["all"] = tuple(map(sum, zip(*expected.values())))
    table = zip(*(column.cells for column in trainable.summary(adapted).columns))
    found = {part: tuple(int(cell.replace(",", "")) for cell in cells) for part, *cells in table}
    assert found == expected
    assert trainable.counts(adapted) == {"language_model": adapters, "projector": learnt}


def test_a_frozen_tower_runs_without_a_graph(folder):
    """Also with LoRA and gradient checkpointing, which makes transformers ask for gradients at the
    patch embedding."""
    seen = []
    original = trainable.run_tower_without_graph

    def watch(model):
        original(model)
        unwrap(model).base_model.vision_tower.register_forward_hook(
            lambda module, args, output: seen.append(
                (module.training, output.last_hidden_state.requires_grad)
            )
        )

    trainable.run_tower_without_graph = watch
    try:
        sft.main(
            [str(folder / "recipe.yaml"), "--max_steps", "1", "--gradient_checkpointing", "true"]
        )
    finally:
        trainable.run_tower_without_graph = original
    assert (True, False) in seen and (True, True) not in seen


def test_rows_that_are_too_long_are_dropped_whole_and_counted(folder):
    from fmtrain.data.collator import encode_row

    processor = training.families.processor("llava")
    rows = training.read_rows(folder)
    lengths = [encode_row(processor, row, folder / "data")[1].shape[1] for row in rows]
    limit = sorted(lengths)[len(lengths) // 2] - 1
    arguments = ["--max_steps", "1", "--max_length", str(limit), "--max_dropped", "0.6"]
    assert sft.main([str(folder / "recipe.yaml"), *arguments]) == 0
    run = json.loads((folder / "out" / "run.json").read_text())
    assert run["rows_dropped"] == sum(length > limit for length in lengths) > 0
    assert run["rows"] == sum(length <= limit for length in lengths) > 0
    assert "none of 24 rows" in refused(
        folder, "--max_length", "5", "--output_dir", str(folder / "other")
    )


def test_a_parameter_that_gets_no_gradient_stops_the_run_by_name(folder):
    original = trainable.set_trainable

    def also_idle(model, config, parts, pixels):
        found = original(model, config, parts, pixels)
        model.get_parameter("model.vision_tower.post_layernorm.weight").requires_grad_(True)
        return found

    trainable.set_trainable = also_idle
    try:
        with pytest.raises(
            ValueError,
            match=r"after step 1 1 trainable .* model\.vision_tower\.post_layernorm\.weight",
        ):
            sft.main([str(folder / "recipe.yaml"), "--use_peft", "false"])
    finally:
        trainable.set_trainable = original


@pytest.mark.parametrize("peft", ["true", "false"], ids=["lora", "full"])
def test_the_best_checkpoint_is_what_a_run_ends_with(folder, peft):
    """Here the highest evaluation loss counts as best, which is that of the first step."""
    from safetensors.torch import load_file

    rows = str(folder / "data" / "rows.jsonl")
    best = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1"]
    best += ["--metric_for_best_model", "loss", "--greater_is_better", "true"]
    steps = ["--max_steps", "3", "--save_steps", "1", "--use_peft", peft]
    arguments = [str(folder / "recipe.yaml"), "--eval_dataset_name", rows, *best, *steps]
    assert sft.main(arguments) == 0
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    chosen = Path(state["best_model_checkpoint"])
    assert chosen.name == "checkpoint-1"
    [file] = [path.name for path in chosen.glob("*.safetensors")]
    expected, last = load_file(chosen / file), load_file(folder / "out" / "checkpoint-3" / file)
    saved = load_file(folder / "out" / file)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)


# --- what a run refuses ---------------------------------------------------------------------------


def test_recipe_mistakes(folder):
    recipe = folder / "recipe.yaml"
    training.write_recipe(folder, learning_rat=1e-3)
    message = refused(folder)
    assert str(recipe) in message and "'learning_rat'" in message and "'learning_rate'" in message
    training.write_recipe(folder, mask="v2w")
    assert "'v2w'" in refused(folder) and "'v2v'" in refused(folder)
    training.write_recipe(folder, mask=None)
    assert "mask" in refused(folder)
    training.write_recipe(folder, max_steps="many")
    assert "max_steps" in refused(folder) and "'many'" in refused(folder)
    training.write_recipe(folder, train_parts=["language_modell"])
    assert "language_modell" in refused(folder)
    training.write_recipe(folder, lora_target_modules=["q_prj"])
    assert "'q_prj'" in refused(folder)
    training.write_recipe(folder, attention_backend="flush")
    assert "'flush'" in refused(folder) and "sdpa" in refused(folder)
    training.write_recipe(folder, flash_impl="fa7")
    assert "'fa7'" in refused(folder) and "flash_attn" in refused(folder)
    training.write_recipe(folder, mask="causal+merge")
    assert "causal" in refused(folder)
    training.write_recipe(folder)
    assert "'--max_step'" in refused(folder, "--max_step", "3")
    recipe.write_text("mask: [v2v\n")
    assert "YAML" in refused(folder)
    recipe.write_text("mask: !!python/object/apply:os.system ['touch pwned']\n")
    assert "YAML" in refused(folder) and not Path("pwned").exists()


def test_keys_named_twice_and_evaluation_rows_that_no_one_asks_for(folder):
    recipe = folder / "recipe.yaml"
    with recipe.open("a") as file:
        file.write("mask: future\n")
    assert "names mask twice" in refused(folder)
    training.write_recipe(folder)
    with recipe.open("a") as file:
        file.write("model_init_kwargs: {a: 1, a: 2}\n")
    assert "names a twice" in refused(folder)
    training.write_recipe(folder, eval_dataset_name=str(folder / "data" / "rows.jsonl"))
    assert "eval_strategy" in refused(folder)
    training.write_recipe(folder, eval_strategy="steps")
    assert "eval_dataset_name" in refused(folder)


def test_rows_longer_than_the_models_positions(folder):
    config = json.loads((folder / "base" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 512
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert "max_length 513" in refused(folder, "--max_length", "513")
    long = training.assistant("a 7 " * 600)
    change_row(folder, 3, lambda row: row["messages"].__setitem__(1, long))
    message = refused(folder)
    assert "1 of 24 rows" in message and "512 positions" in message and "max_length" in message
    message = refused(folder, "--dataset_streaming", "true", "--shuffle_buffer", "1")
    assert "longer than the model's 512 positions" in message
    assert sft.main([str(folder / "recipe.yaml"), "--max_length", "512", "--max_steps", "1"]) == 0


def test_processes_that_would_each_train_alone(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(folder)
    assert "2 processes" in message and "--use_cpu true" in message


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("attn_implementation", ["attn_implementation", "own"]),
        ("torch_dtype", ["torch_dtype", "own", "dtype"]),
        ("device_map", ["device_map", "launcher"]),
        ("unheard_of", ["unheard_of"]),
    ],
)
def test_model_init_kwargs_that_do_not_fit(folder, key, words):
    training.write_recipe(folder, model_init_kwargs={key: "sdpa"})
    message = refused(folder)
    assert all(word in message for word in words)


def test_a_stream_cannot_resume_without_skipping(folder):
    stream = ["--dataset_streaming", "true", "--shuffle_buffer", "1"]
    assert sft.main([str(folder / "recipe.yaml"), *stream, "--max_steps", "2"]) == 0
    resume = ["--resume_from_checkpoint", "true", "--ignore_data_skip", "true"]
    assert "ignore_data_skip" in refused(folder, *stream, *resume)


def test_masks_that_would_silently_be_lost(folder):
    assert "flash_attention_2" in refused(folder, "--attn_implementation", "flash_attention_2")


def test_four_bits_without_bitsandbytes(folder):
    """QLoRA is TRL's `load_in_4bit`; where the package that it needs is missing, one line says
    so."""
    words = [str(folder / "recipe.yaml"), "--load_in_4bit", "true", "--use_cpu", "true"]
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; from fmtrain import sft; "
        f"sys.exit(sft.run({words!r}))"
    )
    env = {**training.environment(), "PYTHONPATH": str(training.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: model .* bitsandbytes", done.stderr, flags=re.M), done.stderr


def test_image_mistakes(folder):
    data = folder / "data"
    change_row(folder, 3, lambda row: row.update(images=["img/none.png"] * len(row["images"])))
    assert all(part in refused(folder) for part in ("rows.jsonl", "r3", "img/none.png"))
    change_row(
        folder, 3, lambda row: row.update(images=["../base/config.json"] * len(row["images"]))
    )
    assert all(part in refused(folder) for part in ("r3", "outside"))
    (data / "img" / "link.png").symlink_to(folder / "base" / "config.json")
    change_row(folder, 3, lambda row: row.update(images=["img/link.png"] * len(row["images"])))
    assert all(part in refused(folder) for part in ("r3", "outside"))
    change_row(
        folder, 3, lambda row: row.update(images=["https://example.org/a.png"] * len(row["images"]))
    )
    assert all(part in refused(folder) for part in ("r3", "URL"))
    (data / "img" / "bad.png").write_bytes(b"not an image")
    change_row(folder, 3, lambda row: row.update(images=["img/bad.png"] * len(row["images"])))
    assert all(part in refused(folder) for part in ("r3", "img/bad.png", "cannot be read"))
    whole = (data / "img" / "0_0.png").read_bytes()
    (data / "img" / "half.png").write_bytes(whole[: len(whole) // 2])
    change_row(folder, 3, lambda row: row.update(images=["img/half.png"] * len(row["images"])))
    assert all(part in refused(folder) for part in ("r3", "img/half.png", "cannot be read"))
    Image.new("L", (9000, 8000)).save(data / "img" / "huge.png")
    change_row(folder, 3, lambda row: row.update(images=["img/huge.png"] * len(row["images"])))
    assert all(part in refused(folder) for part in ("r3", "9000 x 8000", "64000000"))


def test_bad_rows_are_named_before_the_weights_are_read(folder, monkeypatch, capsys):
    (folder / "base" / "model.safetensors").unlink()
    change_row(folder, 3, lambda row: row.update(images=["img/none.png"] * len(row["images"])))
    assert all(part in refused(folder) for part in ("r3", "img/none.png"))
    rows = training.read_rows(folder)
    for row in rows[2:]:
        row["messages"][0]["role"] = "tool"
    training.write_rows(folder, rows)
    capsys.readouterr()
    assert sft.run([str(folder / "recipe.yaml")]) == 2
    head, *lines = capsys.readouterr().err.split("error: ")[1].strip().splitlines()
    assert "22 of 24 rows cannot be trained on; the first 20" in head
    assert len(lines) == 20
    assert [line.split(", row ")[1].split(":")[0] for line in lines] == [
        f"r{number}" for number in range(2, 22)
    ]
    assert not (folder / "out").exists()


def test_decompression_bomb(folder):
    """A PNG that claims 60000 x 60000 pixels in a few bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    (folder / "data" / "img" / "bomb.png").write_bytes(bomb)
    change_row(folder, 0, lambda row: row.update(images=["img/bomb.png"]))
    assert all(part in refused(folder) for part in ("r0", "bomb.png"))


def test_dialogue_mistakes(folder):
    def content(row, *parts):
        row["messages"][0]["content"] = list(parts)

    image, text = {"type": "image", "text": None}, {"type": "text", "text": "which?"}
    change_row(folder, 0, lambda row: content(row, image, image, text))
    assert all(part in refused(folder) for part in ("r0", "2 image parts", "1 images"))
    change_row(folder, 0, lambda row: content(row, text))
    assert all(part in refused(folder) for part in ("r0", "0 image parts", "1 images"))
    change_row(
        folder, 0, lambda row: content(row, image, {"type": "text", "text": "<image> which?"})
    )
    assert all(part in refused(folder) for part in ("r0", "'<image>'"))
    change_row(
        folder, 0, lambda row: (content(row, image, text), row.update(messages=row["messages"][:1]))
    )
    assert all(part in refused(folder) for part in ("r0", "no assistant"))
    change_row(
        folder, 0, lambda row: row.update(messages=[*row["messages"], training.assistant(" ")])
    )
    assert all(part in refused(folder) for part in ("r0", "empty"))
    change_row(
        folder,
        0,
        lambda row: row.update(
            messages=[row["messages"][0], training.assistant("a"), training.assistant("b")]
        ),
    )
    assert all(part in refused(folder) for part in ("r0", "assistant"))
    change_row(folder, 0, lambda row: row["messages"][1].update(role="tool"))
    assert all(part in refused(folder) for part in ("r0", "'tool'"))


def test_a_row_that_opens_with_an_answer_is_named(folder):
    change_row(folder, 1, lambda row: row["messages"].pop(0))
    change_row(folder, 1, lambda row: row["images"].clear())
    assert all(part in refused(folder) for part in ("r1", "opens with an assistant's turn"))


def test_data_files_that_are_none(folder):
    assert "nowhere.jsonl" in refused(folder, "--dataset_name", str(folder / "nowhere.jsonl"))
    (folder / "data" / "rows.jsonl").write_text('{"id": "r0", "messages": [}\n')
    assert "rows.jsonl" in refused(folder)
    (folder / "data" / "rows.jsonl").write_text('{"id": "r0", "text": "hello"}\n')
    assert all(part in refused(folder) for part in ("rows.jsonl", "messages", "images"))


def test_a_role_order_that_the_template_refuses(tmp_path):
    """llava-next's template takes text from the first part only of a system message, and knows no
    other roles."""
    training.workplace(tmp_path, "llava_next", rows=4)
    processor = training.families.processor("llava_next")
    strict = processor.chat_template.replace(
        "{% if message['role'] == 'system' %}", "{% if message['role'] == 'none' %}"
    )
    (tmp_path / "base" / "chat_template.jinja").write_text(strict)
    change_row(
        tmp_path,
        1,
        lambda row: row["messages"].insert(
            0, {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
        ),
    )
    assert all(part in refused(tmp_path) for part in ("r1", "Only user and assistant roles"))


def test_output_folders_and_recorded_policies(folder):
    assert sft.main([str(folder / "recipe.yaml"), "--max_steps", "2"]) == 0
    assert "holds a run already" in refused(folder)
    message = refused(folder, "--resume_from_checkpoint", "true", "--mask", "future")
    assert "checkpoint-2" in message and "v2v" in message and "future" in message
    other = ["--output_dir", str(folder / "other")]
    assert "no whole checkpoint" in refused(folder, *other, "--resume_from_checkpoint", "true")
    config = json.loads((folder / "base" / "config.json").read_text())
    config["fmtrain"] = {"policy": "mma", "merge": None, "version": 1}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    message = refused(folder, *other)
    assert "'mma'" in message and "'v2v'" in message and "base_mask: mma" in message
    assert (
        sft.main([str(folder / "recipe.yaml"), *other, "--max_steps", "1", "--base_mask", "mma"])
        == 0
    )


def test_a_failed_start_leaves_its_folder_free(folder, monkeypatch):
    assert "learning rate: nan" in refused(folder, "--learning_rate", "nan")

    def stopped(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AuditFirstBatch, "on_train_begin", stopped)
        assert sft.run([str(folder / "recipe.yaml")]) == 130
    assert sft.main([str(folder / "recipe.yaml"), "--max_steps", "1"]) == 0


def test_a_run_is_resumed_as_the_same_run_or_not_at_all(folder):
    assert sft.main([str(folder / "recipe.yaml"), "--max_steps", "2"]) == 0
    record = (folder / "out" / "run.json").read_text()
    assert json.loads(record)["trainable"].keys() == {"language_model"}
    resolved = (folder / "out" / "recipe.yaml").read_text()
    resume = ["--resume_from_checkpoint", "true"]
    assert "learning rate: nan" in refused(folder, *resume, "--learning_rate", "nan")
    assert (folder / "out" / "recipe.yaml").read_text() == resolved
    message = refused(folder, *resume, "--max_steps", "2")
    assert "checkpoint-2" in message and "step 2 is the end already" in message
    assert "lora" in refused(folder, *resume, "--lora_alpha", "7")
    assert "trainable" in refused(folder, *resume, "--lora_r", "3")
    parts = ["--train_parts", "language_model", "projector"]
    assert "trainable" in refused(folder, *resume, *parts)
    assert "trainable" in refused(folder, *resume, "--use_peft", "false")
    shutil.copytree(folder / "base", folder / "base2")
    message = refused(folder, *resume, "--model_name_or_path", str(folder / "base2"))
    assert "base_model" in message and "base2" in message
    rows = (folder / "data" / "rows.jsonl").read_text()
    change_row(folder, 13, lambda row: row["messages"][1]["content"][0].update(text="9"))
    assert "data" in refused(folder, *resume)
    (folder / "data" / "rows.jsonl").write_text(rows)
    assert (folder / "out" / "run.json").read_text() == record
    named = ["--resume_from_checkpoint", str(folder / "out" / "checkpoint-2")]
    shutil.copytree(folder / "out", folder / "taken")
    taken = ["--output_dir", str(folder / "taken")]
    assert "holds a run already" in refused(folder, *named, *taken)
    respelt = str(folder / "out" / ".." / "base")
    change = ["--model_name_or_path", respelt]
    assert sft.main([str(folder / "recipe.yaml"), *resume, *change]) == 0
    assert len(training.losses(folder / "out")) == 4


@pytest.mark.parametrize(
    "lost",
    [
        ["trainer_state.json", "adapter_model.safetensors"],
        ["adapter_model.safetensors"],
        ["config.json"],
    ],
)
def test_a_run_killed_while_it_saved_gets_its_weights_and_no_step(folder, lost):
    assert sft.main([str(folder / "recipe.yaml"), "--max_steps", "2"]) == 0
    for name in lost:
        (folder / "out" / name).unlink()
    resume = ["--resume_from_checkpoint", "true", "--max_steps", "2"]
    assert sft.main([str(folder / "recipe.yaml"), *resume]) == 0
    weights = "adapter_model.safetensors"
    saved, last = folder / "out" / weights, folder / "out" / "checkpoint-2" / weights
    assert saved.read_bytes() == last.read_bytes()
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and len(training.losses(folder / "out")) == 2
    assert "step 2 is the end already" in refused(folder, *resume)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_is_resumed_on_its_own_files(folder, kind):
    path = folder / "data" / f"streamed.{kind}"

    def write(answer: str) -> None:
        rows = training.read_rows(folder)
        rows[13]["messages"][1] = training.assistant(answer)
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("from 3 to 6")
    stream = ["--dataset_name", str(path), "--dataset_streaming", "true", "--shuffle_buffer", "1"]
    assert sft.main([str(folder / "recipe.yaml"), *stream, "--max_steps", "2"]) == 0
    resume = [*stream, "--resume_from_checkpoint", "true"]
    write("from 3 to 5")
    assert "data" in refused(folder, *resume)
    write("from 3 to 6")
    assert sft.main([str(folder / "recipe.yaml"), *resume]) == 0


def test_an_output_folder_that_cannot_be_written_is_found_first(folder):
    (folder / "base" / "model.safetensors").unlink()
    (folder / "base" / "config.json").unlink()
    (folder / "file").write_text("")
    (folder / "gone").symlink_to(folder / "nowhere")
    for name in ("file", "file/below", "gone", "gone/below"):
        message = refused(folder, "--output_dir", str(folder / name))
        assert f"output_dir {folder / name}: cannot write to" in message
    assert "cannot write to /proc" in refused(folder, "--output_dir", "/proc/out")


# --- in processes of their own --------------------------------------------------------------------


def test_an_error_is_one_line_and_an_exit_code(folder):
    run = training.launch(folder / "recipe.yaml", "--mask", "v2w")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert (
        len([line for line in run.stderr.splitlines() if "error:" in line]) == 1
        and not (folder / "out").exists()
    )


@pytest.mark.slow
def test_wandb_offline_without_a_key_and_tensorboard_can_be_read_back(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training.write_recipe(folder, report_to=["wandb", "tensorboard"])
    run = training.launch(folder / "recipe.yaml", HOME=str(folder))
    assert run.returncode == 0, run.stderr[-2000:]
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    config, logged = {}, []
    for record in wandb_records(file):
        for update in (*record.config.update, *record.run.config.update):
            config[update.key or "/".join(update.nested_key)] = update.value_json
        if record.WhichOneof("record_type") == "history":
            logged.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    assert json.loads(config["fmtrain"])["policy"] == "v2v"
    seen = {
        entry["train/global_step"]: entry["train/loss"] for entry in logged if "train/loss" in entry
    }
    assert seen == pytest.approx(training.losses(folder / "out"))
    [events] = folder.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events.parent)).Reload().Scalars("train/loss")
    assert {event.step: event.value for event in scalars} == pytest.approx(
        training.losses(folder / "out")
    )
