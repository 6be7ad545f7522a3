"""The model card of an export: the mask and its picture, data, figures of the run, how to load it,
and what it is without fmtrain."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fmtrain import servers
from fmtrain.command_line import one_line
from fmtrain.hub import names_hub
from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, Mask, picture
from fmtrain.preview.drawing import draw_row, in_words
from fmtrain.provenance import versions
from fmtrain.training.run_folder import RECIPE, RECORD, STATE, record_of_folder

PICTURE = "mask.png"
# Of an evaluation, what says how it ran and not how good the model is.
UNSHOWN = re.compile(r"seconds$|runtime$|per_second$|num_tokens$|preparation_time$")
SECRET = re.compile(
    r"(^|hub_|auth_|access_)token$|api_key$|password$"
)  # keys of a recipe that are shown nowhere
LOADING = """\
```python
import fmtrain

model, processor = fmtrain.load("{place}")  # the mask is attached, generate() as usual
```
"""
WITHOUT = """\
Where fmtrain is not installed, the code in this repository does the same:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{place}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{place}")
```

The code was written for transformers {transformers}. Without `trust_remote_code=True`, and as
`AutoModel`, the same weights run **causally**.
"""
PLAIN = """\
`AutoModelForImageTextToText.from_pretrained` loads the same weights **causally**; then
`fmtrain.attach(model, "{mask}"{merge})`.
"""
CARD = """\
---
{head}
---
# {name}

{base} fine-tuned with the attention mask **`{mask}`** ({source}). Run it under the same one.

## The mask

{words}
{drawn}
On `{example}` (`T` text, `I J K` tokens of three images, `A` answer, `/` next turn), rows look
at columns: `#` causal, `+` revealed by the mask{pooled}, `.` closed.

```
{picture}
```

## Load it

{loading}
## Served without fmtrain

{served}

What that costs: {cost}

## Data

{data}

## Figures of the run

{figures}

## Trained by

fmtrain at revision {revision} ({versions}).
{recipe}"""


def write_card(
    folder: Path,
    run: Path,
    mask: Mask,
    base: str,
    source: str,
    model_type: str,
    embedded: bool = False,
    repository: str | None = None,
) -> None:
    """Write `README.md` and the picture of the mask into the folder of an export.

    base: the name of the base model. source: what was trained. embedded: whether the folder holds
    code. repository: its name on the hub, if it will have one.
    """
    record, recipe = _of_run(run)
    figures = _Figures.of(run, recipe)
    name = repository or run.name
    drawn = _drawn(folder / PICTURE, mask)
    head = ModelCardData(
        base_model=base if names_hub(base) else None,
        datasets=[name for name in _sets(recipe) if names_hub(name)] or None,
        eval_results=_results(figures.own, recipe) or None,
        library_name="transformers",
        model_name=name.split("/")[-1],
        pipeline_tag="image-text-to-text",
        tags=["fmtrain", "attention-mask", str(mask)],
    )
    packages = [f"{package} {number}" for package, number in record.get("versions", {}).items()]
    text = CARD.format(
        head=head.to_yaml(),
        name=name,
        base=f"`{base}`",
        mask=mask,
        source=source,
        words=_words(mask),
        drawn=drawn,
        example=EXAMPLE,
        pooled=", `o` pooled into the first positions, not attended to" if mask.merge else "",
        picture=picture(mask, Layout.parse(EXAMPLE)),
        loading=_loading(mask, repository or "THIS_FOLDER", embedded),
        served=servers.in_words(mask, model_type),
        cost=_cost(figures.own, mask),
        data=_data(record, recipe),
        figures=_table(figures),
        revision=record.get("git_revision"),
        versions=", ".join(packages) or "versions unknown",
        recipe=f"\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n" if recipe else "",
    )
    ModelCard(text).save(folder / "README.md")


def _of_run(run: Path) -> tuple[dict, dict]:
    """The record and the recipe of a run, or of the run that a checkpoint is in; of the recipe what
    may be shown."""
    folder = run if (run / RECIPE).is_file() else run.parent
    recipe = {}
    if (folder / RECIPE).is_file():
        recipe = yaml.safe_load((folder / RECIPE).read_text("utf-8"))
    return record_of_folder(run), _shown(recipe)


def _shown(value):
    """A recipe, or a part of it, without the keys that hold a secret."""
    if isinstance(value, list):
        return [_shown(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: _shown(each) for key, each in value.items() if not SECRET.search(str(key))}


@dataclass(frozen=True)
class _Figures:
    """What a trainer logged up to the weights of a folder.

    own: the evaluation of these weights, or the last one where only a recipe could tell (`name`
    says which). best: the best one of the run, where it knows one. Empty where there was none.
    """

    losses: list[dict]
    own: dict
    name: str
    best: dict

    @classmethod
    def of(cls, run: Path, recipe: dict) -> "_Figures":
        file = run / STATE
        state = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        history = state.get("log_history", [])
        entries = [entry for entry in history if "eval_loss" in entry]
        step = state.get("best_global_step")
        best = next((entry for entry in entries if entry["step"] == step), {})
        own = entries[-1] if entries else {}
        whole_run = (run / RECORD).is_file()  # which ends with the best weights, if asked to
        if whole_run and best and recipe.get("load_best_model_at_end"):
            own = best
        unsure = whole_run and best and not recipe  # a run of one's own script
        name = "the last" if unsure else "these weights"
        return cls([entry for entry in history if "loss" in entry], own, name, best)


def _words(mask: Mask) -> str:
    words = in_words(mask).capitalize()
    if not mask.looks_ahead:
        return f"{words}."
    return f"{words}, beside what came before; never beyond the turn, never an answer."


def _drawn(file: Path, mask: Mask) -> str:
    """The line that shows the picture, which is drawn; none where it cannot be, which is said."""
    try:
        draw_row(Layout.parse(EXAMPLE), mask, file, "two turns, three pictures")
    except ValueError as error:
        print(f"note: the model card has no {file.name}: {one_line(error)}", file=sys.stderr)
        return ""
    return f"\n![the mask {mask}]({file.name})\n"


def _loading(mask: Mask, place: str, embedded: bool) -> str:
    merge = f", merge=fmtrain.{mask.merge}" if mask.merge else ""
    otherwise = WITHOUT if embedded else PLAIN
    text = f"{LOADING}\n{otherwise}"
    known = versions()["transformers"]
    return text.format(place=place, mask=mask, merge=merge, transformers=known)


def _sets(recipe: dict) -> list[str]:
    """The sets of rows that a recipe names."""
    entries = recipe.get("datasets") or [recipe.get("dataset_name")]
    names = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    return [str(name) for name in names if name]


def _data(record: dict, recipe: dict) -> str:
    named = ", ".join(f"`{name}`" for name in _sets(recipe)) or "not recorded"
    if "rows" not in record:
        return f"- sets: {named}\n- rows: not recorded"
    rows = f"{record['rows']:,}" if isinstance(record["rows"], int) else record["rows"]
    return (
        f"- sets: {named}\n"
        f"- rows: {rows}, {record.get('rows_dropped', 0):,} more dropped\n"
        f"- fingerprint of all rows: `{record.get('data')}`"
    )


def _metrics(entry: dict) -> dict[str, float]:
    return {
        name: value
        for name, value in entry.items()
        if name.startswith("eval_") and not UNSHOWN.search(name)
    }


def _table(figures: _Figures) -> str:
    """The loss, and a table of the evaluation."""
    if not figures.losses:
        return "None were recorded."
    first, last = figures.losses[0], figures.losses[-1]
    loss = (
        f"Training loss: {first['loss']:.4g} at step {first['step']}, {last['loss']:.4g} at step "
        f"{last['step']}."
    )
    if not figures.own:
        return f"{loss} The run evaluated nothing."
    columns = {f"step {figures.own['step']}, {figures.name}": figures.own}
    if figures.best and figures.best is not figures.own:
        columns[f"step {figures.best['step']}, the best of the run"] = figures.best
    lines = [
        f"{loss}\n",
        f"| evaluation | {' | '.join(columns)} |",
        "|---" + "|---:" * len(columns),
    ]
    for name in _metrics(figures.own):
        values = [f"{entry[name]:.4g}" if name in entry else "" for entry in columns.values()]
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    lines[2] += "|"
    return "\n".join(lines)


def _results(evaluation: dict, recipe: dict) -> list[EvalResult]:
    """Shares of right answers, for the head of the card."""
    names = _sets({"dataset_name": recipe.get("eval_dataset_name")}) or _sets(recipe)
    results = []
    for name, value in _metrics(evaluation).items():
        if name.endswith("exact_match") and names:
            where = {"dataset_type": names[0], "dataset_name": Path(names[0]).name}
            metric = {"metric_type": "exact_match", "metric_name": name, "metric_value": value}
            results.append(EvalResult(task_type="image-text-to-text", **where, **metric))
    return results


def _cost(evaluation: dict, mask: Mask) -> str:
    """The same held-out questions under the mask and causally, where the run answered both."""
    if not mask.looks_ahead:
        return "nothing, the mask is causal."
    metrics, lines = _metrics(evaluation), []
    for name, value in metrics.items():
        causal = metrics.get(name.replace("eval_", "eval_causal_", 1))
        if causal is not None:
            short = name.removeprefix("eval_")
            lines.append(f"`{short}` is {value:.4g} under `{mask}` and {causal:.4g} under `causal`")
    if not lines:
        return "not measured; `eval_masks: [causal]` of a recipe measures it."
    return "; ".join(lines) + f" (evaluation at step {evaluation['step']})."
