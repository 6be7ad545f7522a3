"""Loads checkpoints with embedded code where fmtrain cannot be imported, in a process of its own.

    python -I without_fmtrain.py FOLDER

FOLDER has `cases.pt`: by family a checkpoint, inputs, masks to write into its `config.json`. What
the models give is written to `results.pt`.
"""

import importlib
import json
import sys
from pathlib import Path


class Blocked:
    """No fmtrain, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fmtrain":
            raise ImportError(f"{name} is blocked")
        return None


sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    StaticCache,
)

torch.set_num_threads(1)


def load(checkpoint: str, record: dict | None = None, **options):
    if record is not None:
        file = Path(checkpoint) / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"fmtrain": record}))
    options = {"trust_remote_code": True, **options}
    return AutoModelForImageTextToText.from_pretrained(checkpoint, **options)


@torch.no_grad()
def answered(checkpoint: str, record: dict, inputs: dict) -> dict:
    model = load(checkpoint, record)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    return {"logits": model(**inputs).logits, "tokens": tokens, "class": type(model).__name__}


def refused(call) -> str:
    """The error of a call; nothing if there is none."""
    try:
        call()
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def in_two(model, inputs):
    cache = model(**inputs | {"use_cache": True}).past_key_values
    ids = inputs["input_ids"][:, -2:]
    ones = torch.ones(len(ids), cache.get_seq_length() + 2, dtype=torch.long)
    model(input_ids=ids, attention_mask=ones, past_key_values=cache)


def other_attention(model, inputs):
    model.set_attn_implementation("eager")
    model(**inputs)


def with_flash(model):
    """What building a model ends with, where the package of that attention is installed."""
    code = sys.modules[type(model).__module__].fmtrain_patch
    mask = code.attached(model).mask
    code.attached(model).detach()
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    code.attach(model, mask)


def bare_config(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    del config.fmtrain
    AutoModelForImageTextToText.from_config(config, trust_remote_code=True)


@torch.no_grad()
def refusals(checkpoint: str, record: dict, inputs: dict) -> dict[str, str]:
    model, ids = load(checkpoint, record), inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    four = inputs | {"attention_mask": torch.ones(len(ids), 1, ids.shape[1], ids.shape[1])}
    options = {
        "cache_implementation": "static",
        "prefill_chunk_size": 4,
        "use_cache": False,
        "prompt_lookup_num_tokens": 2,
        "guidance_scale": 2.0,
    }
    calls = {
        "flash_attention_2": lambda: with_flash(load(checkpoint)),
        "static cache": lambda: model(**inputs, past_key_values=static, use_cache=True),
        "prefill in two": lambda: in_two(model, inputs),
        "four dimensions": lambda: model(**four),
        "labels": lambda: model(**inputs, labels=ids),
        "generate_batch": lambda: model.generate_batch([[1, 2]]),
        "embeddings": lambda: model(inputs_embeds=embeddings),
        "language model": lambda: model.base_model.language_model(input_ids=ids),
        "no record": lambda: bare_config(checkpoint),
        "version": lambda: load(checkpoint, record | {"version": 0}),
    }
    for name, value in options.items():
        calls[name] = lambda given={name: value}: model.generate(**inputs, **given)
    errors = {name: refused(call) for name, call in calls.items()}
    errors["set_attn_implementation"] = refused(lambda: other_attention(model, inputs))
    return errors


@torch.no_grad()
def elsewhere(folder: Path, checkpoint: str, record: dict, inputs: dict) -> dict:
    """Other ways to the model: plain, saved again, of a config."""
    model = load(checkpoint, record)
    model.save_pretrained(folder / "again")
    built = AutoModelForImageTextToText.from_config(model.config, trust_remote_code=True).eval()
    built.load_state_dict(model.state_dict())
    models = {
        "plain": load(checkpoint, trust_remote_code=False),
        "again": load(str(folder / "again")),
        "multimodal": AutoModelForMultimodalLM.from_pretrained(checkpoint, trust_remote_code=True),
        "built": built,
    }
    return {name: each(**inputs).logits for name, each in models.items()}


@torch.no_grad()
def talked(checkpoint: str, record: dict, messages: list, images: list[str]) -> torch.Tensor:
    """The ids after a dialogue, as a user of transformers asks for them."""
    model, processor = load(checkpoint, record), AutoProcessor.from_pretrained(checkpoint)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    shown = iter(images)
    for message in messages:
        parts = [dict(part) for part in message["content"]]
        for part in parts:
            if part["type"] == "image":
                part["image"] = Image.open(next(shown))
        message["content"] = parts
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    return model.generate(**inputs, do_sample=False, max_new_tokens=5)


def main(folder: Path) -> None:
    cases, results = torch.load(folder / "cases.pt", weights_only=True), {}
    for family, case in cases.items():
        checkpoint, inputs = case["checkpoint"], case["inputs"]
        for name, record in case["records"].items():
            results[family, name] = answered(checkpoint, record, inputs)
        v2v = case["records"]["v2v"]
        results[family, "elsewhere"] = elsewhere(folder / family, checkpoint, v2v, inputs)
        if "messages" in case:
            dialogue = case["messages"], case["images"]
            results[family, "talked"] = talked(checkpoint, v2v, *dialogue)
        results[family, "refused"] = refusals(checkpoint, v2v, inputs)
    results["imported"] = [name for name in sys.modules if name.split(".")[0] == "fmtrain"]
    results["embedded"] = [name for name in sys.modules if name.endswith(".modeling_fmtrain")]
    results["import"] = refused(lambda: importlib.import_module("fmtrain"))
    torch.save(results, folder / "results.pt")


main(Path(sys.argv[1]))
