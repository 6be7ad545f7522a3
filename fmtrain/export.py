"""Turn a run into a checkpoint that anybody can load: LoRA folded into the weights, the mask in
`config.json`.

    fmtrain export RUN --out DIR [--embed_code] [--push_to_hub OWNER/NAME]

Nothing is written unless the folded model gives the adapter's logits on real rows, and the weights
that changed are just those that the adapter names (for full fine-tuning: some did). The base
model's key names are kept, weights are safetensors, and both `fmtrain.load(DIR)` and plain
`AutoModelForImageTextToText.from_pretrained(DIR)` load the result (the latter without the mask,
which is then to be attached). With `--embed_code` it holds the code of its mask, and
`from_pretrained(DIR, trust_remote_code=True)` gives it where fmtrain is not installed.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig

from fmtrain import servers
from fmtrain.attention import BACKENDS
from fmtrain.card import write_card
from fmtrain.checkpoint import base_of, is_adapter, load
from fmtrain.command_line import Parser, guarded, write_whole
from fmtrain.data import noise
from fmtrain.data.aspect import aspect_of
from fmtrain.data.collator import batch, encode_row
from fmtrain.embed import AUTO_MAP, embed
from fmtrain.hub import check_push, push
from fmtrain.masks import Mask
from fmtrain.patch import attached, unwrap
from fmtrain.training.recipe import read
from fmtrain.training.rows import rows_of
from fmtrain.training.run_folder import RECIPE, record_of_folder

# Of float32 logits, relative to the largest: (W + BA) x against W x + B (A x), through all layers
TOLERANCE = 1e-4


def rows_at_hand(run: Path, count: int = 4) -> tuple[list[dict], str]:
    """A few real rows of a run and their image folder; noise where the run's data is not at
    hand."""
    recipe = run / RECIPE
    if not recipe.is_file():
        return noise.rows(), "."
    try:
        # A run in bf16 may be exported where there is no GPU.
        rows = rows_of(read(recipe, ["--use_cpu", "true"]), count)
    except ValueError as error:
        print(
            f"note: the run's rows are not at hand ({error}); comparing on images of noise",
            file=sys.stderr,
        )
        return noise.rows(), "."
    return rows.first(count), rows.image_root


def logits(model, processor, rows: list[dict], root: str) -> torch.Tensor:
    """Logits at the real tokens of the rows [tokens, vocabulary], under the attached mask."""
    encoded = batch(processor, [encode_row(processor, row, root) for row in rows])
    with torch.no_grad():
        out = model(**encoded.to(model).kwargs()).logits
    return out[encoded.inputs["attention_mask"].bool()].float()


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint's safetensors files, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def files_of(folder: Path) -> dict[str, Path]:
    """The file that each tensor of a checkpoint is in, by its key."""
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


def compare(base: Path, folded: Path) -> int:
    """How many tensors differ between two checkpoints. Raises `ValueError` if their keys do."""
    before, after = files_of(base), files_of(folded)
    missing, new = before.keys() - after.keys(), after.keys() - before.keys()
    if missing or new:
        raise ValueError(
            f"the export would rename weights: {len(missing)} keys of the base are missing (e.g. "
            f"{min(missing, default='-')}), {len(new)} are new (e.g. {min(new, default='-')})"
        )
    changed = 0
    for name, tensor in tensors(folded):
        with safe_open(before[name], framework="pt") as opened:
            changed += not torch.equal(opened.get_tensor(name), tensor)
    return changed


def fold(model, processor, rows: list[dict], root: str) -> tuple[torch.nn.Module, int]:
    """LoRA put into the base weights; returns the model and how many tensors should have changed.

    Raises `ValueError` if the logits on `rows` move by more than `TOLERANCE`.
    """
    targets = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    targets += sum(".modules_to_save." in name for name, _ in model.named_parameters())
    before = logits(model, processor, rows, root)
    folded = model.merge_and_unload(safe_merge=True)
    after = logits(folded, processor, rows, root)
    off, limit = (
        (before - after).abs().max().item(),
        TOLERANCE * max(1.0, before.abs().max().item()),
    )
    if not off <= limit:
        raise ValueError(
            f"folding moved the logits by {off:.1e}, over the limit of {limit:.1e}; nothing was "
            f"written"
        )
    print(
        f"folded {targets} tensors; logits of adapter and folded model differ by at most {off:.1e} "
        f"on {len(rows)} rows"
    )
    return folded, targets


def base_folder(name: str) -> Path:
    """The folder of a base model's safetensors files, local or in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def check_record(run: Path, mask: Mask, processor) -> None:
    """Raises `ValueError` where a checkpoint's config.json names another mask than the run that it
    is of, or is in, or its processor shows images in another way."""
    record = record_of_folder(run)
    trained = Mask.from_record(record) if "policy" in record else mask
    if trained != mask:
        raise ValueError(
            f"{run}: config.json records the mask '{mask}' ({mask.record()}), the run's run.json "
            f"'{trained}' ({trained.record()}); nothing was written"
        )
    aspect = aspect_of(processor)
    if record.get("image_aspect", aspect) != aspect:
        raise ValueError(
            f"{run}: its processor has image_aspect {aspect}, the run was trained with "
            f"{record['image_aspect']} (run.json); nothing was written"
        )


def finish_config(folder: Path, mask: Mask, model_type: str) -> None:
    """Say in `config.json` what servers may know of the mask, and nothing that a base model's said
    of another one."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for key in (AUTO_MAP, servers.FLAG):
        config.pop(key, None)
    if servers.flagged(mask, model_type):
        config[servers.FLAG] = True
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


def export(
    run: str | Path,
    out: str | Path,
    backend: str = "auto",
    embed_code: bool = False,
    push_to_hub: str | None = None,
) -> None:
    """Write the checkpoint `out` from the run (or checkpoint of a run) `run`.

    embed_code: put the code of the mask into it. push_to_hub: the repository that it is pushed to,
    with the token of huggingface_hub. Raises `ValueError`, writing nothing; where the hub refuses
    at the end, `out` is whole.
    """
    run, out = Path(run), Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already")
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{run}: not a finished run (no config.json); a run in progress has its checkpoints in "
            f"checkpoint-N"
        )
    if push_to_hub is not None:
        check_push(push_to_hub)
    adapter = is_adapter(run)
    base = (
        base_of(run)
        if adapter
        else record_of_folder(run).get("base_model")
        or AutoConfig.from_pretrained(run)._name_or_path
    )
    model, processor = load(run, backend=backend, dtype=torch.float32)
    mask = attached(model).mask
    check_record(run, mask, processor)
    rows, root = rows_at_hand(run)
    expected = None
    if adapter:
        model, expected = fold(model, processor, rows, root)
    inner = unwrap(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        changed = write_weights(staged, inner, processor, base, expected)
        model_type = inner.config.model_type
        finish_config(staged, mask, model_type)
        if embed_code:
            embed(staged, inner)
        source = _source(adapter, record_of_folder(run).get("quantization"))
        how = embed_code, push_to_hub
        write_card(staged, run, mask, base, source, model_type, *how)
        staged.chmod(0o755)
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    print(f"wrote {out}: {changed} tensors differ from {base}; mask {mask}")
    if push_to_hub is not None:
        print(f"pushed to {push(out, push_to_hub)}")


def _source(adapter: bool, quantization: str | None) -> str:
    """What was trained, in the words of the card."""
    if not adapter:
        return "full fine-tuning"
    if quantization is None:
        return "LoRA, folded"
    return f"LoRA that learnt on weights in {quantization}, folded into those of full precision"


def write_weights(folder: Path, model, processor, base: str, expected: int | None) -> int:
    """Save model and processor, in the dtype of the base; returns how many tensors differ from it.
    Raises `ValueError` if that is not what was `expected` (None: some)."""
    dtype = next(tensor.dtype for _, tensor in tensors(base_folder(base)))
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    changed = compare(base_folder(base), folder)
    if changed == 0 or (expected is not None and changed != expected):
        raise ValueError(
            f"{changed} tensors differ from the base, {expected or 'some'} should; nothing was "
            f"written"
        )
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("fmtrain export", __doc__)
    add = parser.add_argument
    add("run", help="output folder of a run, or one of its checkpoints")
    add("--out", required=True, help="folder to write; must not exist")
    add("--backend", default="auto", choices=["auto", *BACKENDS])
    add("--embed_code", action="store_true", help="put the code of the mask into the checkpoint")
    add("--push_to_hub", metavar="OWNER/NAME", help="push it, with huggingface_hub's own token")
    options = parser.parse_args(arguments)
    return guarded(lambda: export(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
