"""A script of one's own: TRL's trainer with a mask, transformers' with `attach` and `Collator`, and
a bare loop."""

import json
import shutil

import datasets
import families
import pytest
import torch
import training
import trl
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import fmtrain
from fmtrain import sft
from fmtrain.checkpoint import recorded_mask
from fmtrain.data.collator import Collator
from fmtrain.training.arguments import EvaluationArguments, RowArguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    training.workplace(folder, rows=16)
    training.write_recipe(folder, lora_dropout=0.0, train_sampling_strategy="sequential")
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> datasets.Dataset:
    """As TRL's vision sets on the hub are: embedded images, contents in parts."""
    found = []
    for row in training.read_rows(folder):
        images = [{"path": str(folder / "data" / name)} for name in row["images"]]
        found.append({"messages": row["messages"], "images": images})
    features = datasets.Dataset.from_list(found).features
    features["images"] = datasets.List(datasets.Image())
    return datasets.Dataset.from_list(found, features=features)


def config(out, **changes) -> trl.SFTConfig:
    keys = dict(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        save_steps=2,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        max_length=None,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=42,
    )
    return trl.SFTConfig(**keys | changes)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora(**changes) -> LoraConfig:
    targets = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    keys = dict(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    return LoraConfig(**keys | changes)


# --- TRL's vision example, with two lines changed -------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "v2v+merge"])
def test_trls_vision_script_with_a_mask_is_the_run_of_a_recipe(folder, rows, tmp_path, mask):
    """The embedded rows, model, arguments and LoRA of a recipe, in the words of TRL's own script:
    the same losses, the same record."""
    from fmtrain import SFTTrainer  # one of the two lines

    processor = AutoProcessor.from_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=config(tmp_path / "script"),
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora(),
        mask=mask,  # the other
    )
    trainer.train()
    trainer.save_model(trainer.args.output_dir)

    words = ["--mask", mask, "--output_dir", str(tmp_path / "recipe"), "--use_cpu", "true"]
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    of_recipe = training.losses(tmp_path / "recipe")
    assert losses(trainer) == pytest.approx([of_recipe[step] for step in (1, 2, 3, 4)], abs=1e-6)
    ours, theirs = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("script", "recipe")
    )
    assert ours.pop("data") != theirs.pop("data")  # embedded images, and names of files
    assert ours == theirs
    for place in ("script", "script/checkpoint-2"):
        assert str(recorded_mask(tmp_path / place)) == mask


def test_a_model_by_its_name_packed_rows_and_a_resumed_run(folder, rows, tmp_path):
    def trainer(out):
        return fmtrain.SFTTrainer(
            str(folder / "base"),
            config(out, packing=True, max_length=100, per_device_train_batch_size=1, max_steps=4),
            train_dataset=rows,
            mask="v2v",
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert whole.packs is not None and not (tmp_path / "whole" / "recipe.yaml").exists()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "part")
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        trainer(tmp_path / "part").train()
    resumed = trainer(tmp_path / "part")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    other = trainer(tmp_path / "part")
    other.mask = fmtrain.Mask.parse("future")
    with pytest.raises(ValueError, match="records the mask v2v, the recipe says future"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("peft", ["all-linear", None])
def test_what_learns_is_what_trl_would_train_less_what_no_gradient_reaches(
    folder, rows, tmp_path, peft
):
    """LLaVA reads the tower's last layer but one: its last never learns, adapted or not."""
    changes = {} if peft is None else {"peft_config": lora(target_modules=peft)}
    trainer = fmtrain.SFTTrainer(
        str(folder / "base"),
        config(tmp_path, max_steps=1),
        train_dataset=rows,
        mask="v2v",
        **changes,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    stock = trl.SFTTrainer(
        model,
        config(tmp_path / "stock"),
        train_dataset=rows,
        **changes,
        processing_class=AutoProcessor.from_pretrained(folder / "base"),
    )
    frozen = learning(stock.model) - learning(trainer.model)
    last = f".layers.{model.config.vision_config.num_hidden_layers - 1}."
    assert frozen and all(last in name or "post_layernorm" in name for name in frozen)
    assert learning(trainer.model) <= learning(stock.model)
    trainer.train()


def learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- its data sets --------------------------------------------------------------------------------


def test_streamed_rows_give_the_losses_of_the_others(folder, rows, tmp_path):
    found = []
    for name, given in (("map", rows), ("stream", rows.to_iterable_dataset())):
        args = config(tmp_path / name, max_steps=3)
        trainer = fmtrain.SFTTrainer(str(folder / "base"), args, train_dataset=given, mask="v2v")
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and len(found[0]) == 3


def test_evaluation_sets_by_name_and_one_that_comes_later(folder, rows, tmp_path):
    held_out = {"few": rows.select(range(2)), "more": rows.select(range(6))}
    trainer = fmtrain.SFTTrainer(
        str(folder / "base"),
        config(
            tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, prediction_loss_only=True
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        mask="v2v",
        evaluation=EvaluationArguments(eval_answers=4, eval_max_new_tokens=2),
    )
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert (logged["eval_few_questions"], logged["eval_more_questions"]) == (2, 4)
    assert logged["eval_few_loss"] != logged["eval_more_loss"]
    again = trainer.evaluate(rows.select(range(6)), metric_key_prefix="eval_again")
    assert again["eval_again_loss"] == pytest.approx(logged["eval_more_loss"])
    predicted = trainer.predict(rows.select(range(6))).metrics
    assert predicted["test_loss"] == pytest.approx(logged["eval_more_loss"])


def test_rows_over_max_length_are_dropped_and_files_have_a_folder(folder, tmp_path):
    named = datasets.Dataset.from_list(training.read_rows(folder))
    how = RowArguments(image_root=str(folder / "data"), max_dropped=0.6)
    trainer = fmtrain.SFTTrainer(
        str(folder / "base"),
        config(tmp_path, max_length=25),
        train_dataset=named,
        mask="v2v",
        rows=how,
    )
    assert 0 < trainer.rows.dropped and trainer.rows.size + trainer.rows.dropped == 16
    with pytest.raises(ValueError, match="are longer than max_length 25, more than max_dropped"):
        fmtrain.SFTTrainer(
            str(folder / "base"),
            config(tmp_path, max_length=25),
            train_dataset=named,
            mask="v2v",
            rows=RowArguments(image_root=str(folder / "data")),
        )


def test_dialogues_are_split_as_a_recipe_splits_them(folder, rows, tmp_path):
    twice = rows.select(range(4)).map(lambda row: {"messages": row["messages"] * 2})
    twice = twice.map(lambda row: {"images": row["images"] * 2})
    how = RowArguments(turns="split")
    trainer = fmtrain.SFTTrainer(
        str(folder / "base"), config(tmp_path), train_dataset=twice, mask="mma", rows=how
    )
    assert trainer.rows.size == 8 and [*trainer.rows.rows["prompt_messages"]] == [1, 3] * 4
    with pytest.raises(ValueError, match="train_dataset is a stream of a script's own: turns"):
        stream = twice.to_iterable_dataset()
        fmtrain.SFTTrainer(
            str(folder / "base"), config(tmp_path), train_dataset=stream, mask="mma", rows=how
        )


def plain(rows):
    return rows


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"data_collator": plain}, "data_collator: a mask needs the layout of its rows"),
        ({"formatting_func": plain}, "formatting_func: rows are dialogues"),
        ({"args": TrainingArguments("out")}, "args is a TrainingArguments, not trl.SFTConfig"),
        ({"keys": {"pad_to_multiple_of": 8}}, "args: pad_to_multiple_of 8: rows are padded"),
        ({"keys": {"chat_template_path": "a.jinja"}}, "args: chat_template_path a.jinja: rows"),
        ({"keys": {"eos_token": "</s>"}}, "args: eos_token </s>: answers end"),
        ({"keys": {"packing": True}}, "args: packing needs max_length"),
        ({"mask": "v3v"}, "unknown"),
        ({"rows": "transform"}, "train_dataset has a transform"),
        ({"rows": "text"}, "train_dataset: the rows have no column"),
        ({"rows": "empty"}, "train_dataset: holds no row"),
        ({"eval": "stream"}, "eval_dataset is a stream"),
    ],
)
def test_what_a_script_would_lose_is_refused(folder, rows, tmp_path, changes, reason):
    given = {
        "transform": rows.with_transform(plain),
        "text": datasets.Dataset.from_dict({"text": ["a"]}),
        "empty": rows.select([]),
    }
    keys = {key: value for key, value in changes.items() if key not in ("keys", "rows", "eval")}
    keys = {"args": config(tmp_path, **changes.get("keys", {})), "mask": "v2v", **keys}
    if "eval" in changes:
        keys["eval_dataset"] = rows.to_iterable_dataset()
    train = given.get(changes.get("rows"), rows)
    with pytest.raises(ValueError, match=reason):
        fmtrain.SFTTrainer(str(folder / "base"), train_dataset=train, **keys)


def test_a_start_under_another_mask_says_so(folder, rows, tmp_path):
    model = families.model("llava")
    fmtrain.attach(model, "future").detach()
    with fmtrain.attach(model, "future"):
        model.save_pretrained(tmp_path / "future")
    shutil.copytree(folder / "base", tmp_path / "base")
    for file in (tmp_path / "future").iterdir():
        shutil.copy(file, tmp_path / "base" / file.name)
    start, args = str(tmp_path / "base"), config(tmp_path / "out")
    with pytest.raises(ValueError, match="records the mask 'future', and 'v2v' is to be trained"):
        fmtrain.SFTTrainer(start, args, train_dataset=rows, mask="v2v")
    options = {"train_dataset": rows, "mask": "v2v", "base_mask": "future"}
    fmtrain.SFTTrainer(start, args, **options).save_model(tmp_path / "saved")
    assert recorded_mask(tmp_path / "saved") == fmtrain.Mask.parse("v2v")
    loaded, _ = fmtrain.load(start)  # carries its mask, which gives way to the trainer's
    trainer = fmtrain.SFTTrainer(loaded, args, train_dataset=rows, mask="future")
    assert str(fmtrain.attached(trainer.model).mask) == "future"


# --- without TRL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "v2v"])
def test_transformers_trainer_and_a_bare_loop_learn_what_the_trainer_does(
    folder, rows, tmp_path, mask
):
    ours = fmtrain.SFTTrainer(
        str(folder / "base"),
        config(tmp_path / "ours", max_grad_norm=1e9, adam_epsilon=1e-8),
        train_dataset=rows,
        mask=mask,
        train_parts=["language_model"],
    )
    ours.train()

    model, processor = start(folder, mask)
    keys = dict(remove_unused_columns=False, max_grad_norm=1e9, use_cpu=True, disable_tqdm=True)
    keys |= dict(max_steps=4, per_device_train_batch_size=4, learning_rate=0.01, logging_steps=1)
    keys |= dict(train_sampling_strategy="sequential", report_to="none", seed=42)
    args = TrainingArguments(str(tmp_path / "hf"), **keys)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=Collator(processor))
    trainer.train()
    trainer.save_model()
    assert losses(trainer) == pytest.approx(losses(ours), rel=1e-4)
    assert str(recorded_mask(tmp_path / "hf")) == mask

    model, processor = start(folder, mask)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(learnt, lr=0.01, weight_decay=0.0), []
    collate = Collator(processor)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 4)
        loss = model(**collate([rows[4 * step + k] for k in range(4)])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == pytest.approx(losses(ours), rel=1e-4)


def start(folder, mask: str):
    """A model in training under a mask, its language model alone learning, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "base")
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    fmtrain.attach(model, mask, markers=fmtrain.markers(processor))
    return model.train(), processor


def test_a_collator_whose_rows_lost_their_columns_says_why(folder, rows, tmp_path):
    model, processor = start(folder, "v2v")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=Collator(processor))
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_several_gpus_in_one_process_are_refused(folder, rows, tmp_path):
    """transformers would copy the model to each in threads of one process."""
    args = config(tmp_path, max_steps=1)
    trainer = fmtrain.SFTTrainer(
        str(folder / "base"), args, train_dataset=rows, eval_dataset=rows, mask="v2v"
    )
    assert trainer.args.n_gpu <= 1
    trainer.args._n_gpu = 2  # as where two are visible and nothing was launched
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"one process sees 2 GPUs: .*`accelerate launch`"):
            run()
