"""A tiny base checkpoint, rows with images and a recipe in a folder, and runs of the trainer on
them."""

import json
import os
import subprocess
from pathlib import Path

import families
import numpy as np
import torch
import warm
import yaml
from PIL import Image
from torch._C._profiler import _EventType

from fmtrain import attach
from fmtrain.data.collator import encode_prompt
from fmtrain.data.dialogue import turns

ROOT = Path(__file__).parents[2]


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )


def user(images: int, text: str) -> dict:
    return {
        "role": "user",
        "content": [{"type": "image", "text": None}] * images + [{"type": "text", "text": text}],
    }


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def row(number: int, images: list[str], *turns: dict) -> dict:
    return {"id": f"r{number}", "source": "test", "messages": list(turns), "images": images}


def workplace(folder: Path, family: str = "llava", rows: int = 24) -> Path:
    """`folder` with base/, data/rows.jsonl, data/img/ and recipe.yaml; returns the recipe."""
    families.model(family).save_pretrained(folder / "base")
    families.processor(family).save_pretrained(folder / "base")
    (folder / "data" / "img").mkdir(parents=True)
    written = []
    for number in range(rows):
        names = [f"img/{number}_{k}.png" for k in range(1 + number % 2)]
        for k, name in enumerate(names):
            picture(10 * number + k).save(folder / "data" / name)
        digit = number % 10
        written.append(
            row(
                number,
                names,
                user(len(names), "which digit?"),
                assistant(f"from {digit} to {9 - digit}"),
            )
        )
    write_rows(folder, written)
    return write_recipe(folder)


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "data" / "rows.jsonl").read_text().splitlines()]


def write_recipe(folder: Path, **changes) -> Path:
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": str(folder / "data" / "rows.jsonl"),
        "mask": "v2v",
        "use_peft": True,
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    recipe.update(changes)
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in recipe.items() if value is not None})
    )
    return path


def own_answers(folder: Path, mask: str, tokens: int) -> list[str]:
    """What the base of a workplace answers to every row, one at a time."""
    model, processor = families.model("llava"), families.processor("llava")
    texts = []
    with attach(model.eval(), mask, "reference"):
        for row in read_rows(folder):
            [turn] = turns(row)
            prompt = encode_prompt(processor, row, turn, folder / "data")
            length = prompt.layout.shape[1]
            never = [model.config.image_token_id]
            ids = model.generate(
                **prompt.kwargs(), max_new_tokens=tokens, do_sample=False, suppress_tokens=never
            )
            text = processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
            texts.append(text.strip())
    return texts


def command(recipe: Path, *overrides: str) -> list[str]:
    return [warm.python(), str(ROOT / "fmtrain" / "sft.py"), str(recipe), *overrides]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def launch(recipe: Path, *overrides: str, **env: str) -> subprocess.CompletedProcess:
    """A whole run in a process of its own."""
    return subprocess.run(
        command(recipe, *overrides),
        env=environment(**env),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


def two_processes(kind: str) -> list[str]:
    """What starts two processes of a strategy, before their script."""
    launcher = [warm.python(), "-m"]
    if kind == "ddp":
        return [*launcher, "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    config = ROOT / "recipes" / "accelerate" / f"{kind}.yaml"
    start = [*launcher, "accelerate.commands.launch", "--config_file", str(config)]
    return [*start, "--num_processes", "2", "--main_process_port", "0"]  # any that is free


def two_of_this_machine(folder: Path) -> Path:
    """An accelerate configuration for two processes of this machine, under DDP."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / "ddp.yaml").read_text())
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(config | {"num_processes": 2, "main_process_port": 0}))
    return path


def watched(seen: str) -> list[str]:
    """The trainer under tests/support/strategy.py, which shards on a CPU too and writes to `seen`
    what it saw."""
    return [str(ROOT / "tests/support/strategy.py"), seen, str(ROOT / "fmtrain/sft.py")]


def losses(output: Path) -> dict[int, float]:
    """Loss of each step, as the trainer logged it."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def allocated(run) -> int:
    """The most bytes that the CPU's allocator has given out in `run`, less those given back: by its
    own running total, for which no event need be in its order or there at all."""
    before = 123_457  # as many bytes as nothing else takes
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.empty(before, dtype=torch.uint8)
        run()
    left, found = profile.profiler.kineto_results.experimental_event_tree(), []
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            found.append(event.extra_fields)
    [start] = [each.total_allocated - before for each in found if each.alloc_size == before]
    return max(each.total_allocated for each in found) - start
