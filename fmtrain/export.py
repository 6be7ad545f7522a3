"""Turn a run into a checkpoint that anybody can load: LoRA folded into the weights, the mask in
`config.json`.

    python -m fmtrain.export RUN --out DIR

Nothing is written unless the folded model gives the adapter's logits on real rows, and the weights
that changed are just those that the adapter names (for full fine-tuning: some did). The base
model's key names are kept, weights are safetensors, and both `fmtrain.load(DIR)` and plain
`AutoModelForImageTextToText.from_pretrained(DIR)` load the result (the latter without the mask,
which is then to be attached).
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig

from fmtrain.attention import BACKENDS
from fmtrain.checkpoint import base_of, is_adapter, load
from fmtrain.command_line import Parser, guarded
from fmtrain.data import noise
from fmtrain.data.aspect import aspect_of
from fmtrain.data.collator import batch, encode_row
from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, Mask, picture
from fmtrain.patch import attached, unwrap
from fmtrain.training.recipe import read
from fmtrain.training.rows import rows_of
from fmtrain.training.run_folder import RECIPE, read_record

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


def card(run: Path, mask: Mask, base: str, source: str) -> str:
    """A model card that says what a user of the checkpoint must know: the mask."""
    record = read_record(run)
    versions = ", ".join(
        f"{name} {version}" for name, version in record.get("versions", {}).items()
    )
    recipe = (run / RECIPE).read_text() if (run / RECIPE).is_file() else ""
    pooled, merge = "", ""
    if mask.merge:
        pooled = ", `o` pooled into the first positions, not attended to"
        merge = f", merge=fmtrain.{mask.merge}"
    return f"""---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [fmtrain, attention-mask, {mask}]
---
# {run.name}

`{base}` fine-tuned with the attention mask **`{mask}`** ({source}). Run it under the same one:

```python
import fmtrain

model, processor = fmtrain.load("THIS_FOLDER")  # the mask is attached, generate() as usual
```

`AutoModelForImageTextToText.from_pretrained` loads the same weights, causally: then
`fmtrain.attach(model, "{mask}"{merge})`.

On `{EXAMPLE}` (`T` text, `I J K` tokens of three images, `A` answer, `/` next turn), rows look
at columns: `#` causal, `+` revealed by the mask{pooled}, `.` closed.

```
{picture(mask, Layout.parse(EXAMPLE))}
```

Trained by fmtrain at revision {record.get("git_revision")} ({versions or "versions unknown"}).

```yaml
{recipe}```
"""


def check_record(run: Path, mask: Mask, processor) -> None:
    """Raises `ValueError` where a checkpoint's config.json names another mask than the run that it
    is of, or is in, or its processor shows images in another way."""
    record = read_record(run) or read_record(run.parent)
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


def export(run: str | Path, out: str | Path, backend: str = "auto") -> None:
    """Write the checkpoint `out` from the run (or checkpoint of a run) `run`. Raises `ValueError`,
    writing nothing."""
    run, out = Path(run), Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already")
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{run}: not a finished run (no config.json); a run in progress has its checkpoints in "
            f"checkpoint-N"
        )
    adapter = is_adapter(run)
    base = (
        base_of(run)
        if adapter
        else read_record(run).get("base_model") or AutoConfig.from_pretrained(run)._name_or_path
    )
    model, processor = load(run, backend=backend, dtype=torch.float32)
    mask = attached(model).mask
    check_record(run, mask, processor)
    rows, root = rows_at_hand(run)
    expected = None
    if adapter:
        model, expected = fold(model, processor, rows, root)
    dtype = next(tensor.dtype for _, tensor in tensors(base_folder(base)))
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        unwrap(model).to(dtype).save_pretrained(staged)
        processor.save_pretrained(staged)
        changed = compare(base_folder(base), staged)
        if changed == 0 or (expected is not None and changed != expected):
            raise ValueError(
                f"{changed} tensors differ from the base, {expected or 'some'} should; nothing was "
                f"written"
            )
        (staged / "README.md").write_text(
            card(run, mask, base, "LoRA, folded" if adapter else "full fine-tuning")
        )
        staged.chmod(0o755)
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    print(f"wrote {out}: {changed} tensors differ from {base}; mask {mask}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m fmtrain.export", __doc__)
    parser.add_argument("run", help="output folder of a run, or one of its checkpoints")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    options = parser.parse_args(arguments)
    return guarded(lambda: export(options.run, options.out, options.backend))


if __name__ == "__main__":
    sys.exit(main())
