"""Code in a checkpoint, by which transformers alone runs it under its mask.

One file, `modeling_fmtrain.py`, holds the modules of fmtrain that a mask needs in inference, each
as the body of a function that returns its names; they are read from this package when a checkpoint
is exported, so that there is no second definition of any mask. `auto_map` in `config.json` names
the class in it, which `AutoModelForImageTextToText.from_pretrained(.., trust_remote_code=True)`
takes.
"""

import ast
import hashlib
import json
import textwrap
from pathlib import Path

from transformers import PreTrainedModel

from fmtrain.command_line import write_whole
from fmtrain.patch import SECTION
from fmtrain.provenance import revision, versions

FILE = "modeling_fmtrain.py"
AUTO_MAP = "auto_map"  # the key of config.json that names it
# Which classes of transformers load it; `AutoModel` gives a model without a head, and no mask.
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# Each may import from those before it.
MODULES = (
    "command_line",
    "layout",
    "policies",
    "merge",
    "masks",
    "attention.reference",
    "attention.sdpa",
    "attention",
    "infer",
    "kv_cache",
    "host",
    "patch",
)
HEADER = '''\
"""{name} under the attention mask that config.json records under `{section}`.

    AutoModelForImageTextToText.from_pretrained(PATH, trust_remote_code=True)

Written by fmtrain {version} (revision {revision}) from its own sources, for transformers
{transformers} and torch {torch}. Each function below is a module of fmtrain; what it returns are
the names of the module.
"""

# ruff: noqa
from types import SimpleNamespace

import transformers
from transformers import GenerationMixin


def _module(body):
    return SimpleNamespace(**body())
'''
# fmtrain itself looks a backend up by its name; the masks of inference need no other one.
MODEL = '''\
fmtrain_attention.get_backend = lambda name: fmtrain_attention_sdpa


class {name}(transformers.{name}, GenerationMixin):
    """Carries its mask from the start: no way to build it gives causal attention instead."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        mask = fmtrain_patch.recorded(config)
        if mask is None:
            raise ValueError("config.json records no mask under `{section}`")
        fmtrain_patch.attach(self, mask)

    @classmethod
    def is_custom_code(cls):
        """Its weights have the names of transformers' own class, and are to be read as those."""
        return False
'''


def embed(checkpoint: Path, model: PreTrainedModel) -> None:
    """Put the code for a model of this class into a checkpoint folder, and `auto_map` into its
    `config.json`."""
    name = type(model).__name__
    (checkpoint / FILE).write_text(code(name), encoding="utf-8")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    reference = f"{Path(FILE).stem}.{name}"
    config[AUTO_MAP] = dict.fromkeys(AUTO_CLASSES, reference)
    write_whole(checkpoint / "config.json", json.dumps(config, indent=2) + "\n")


def code(name: str) -> str:
    """The file for a model whose class in transformers has this name."""
    modules = "\n\n".join(map(_function, MODULES))
    # An attention function is registered by its name, and another version's must not replace it.
    registered = f'ATTENTION = "fmtrain_{hashlib.sha256(modules.encode()).hexdigest()[:12]}"'
    assert modules.count('ATTENTION = "fmtrain"') == 1
    modules = modules.replace('ATTENTION = "fmtrain"', registered)
    known = versions()
    header = HEADER.format(
        name=name,
        section=SECTION,
        version=known.get("fmtrain", "from a checkout"),
        revision=revision(),
        transformers=known["transformers"],
        torch=known["torch"],
    )
    return f"{header}\n\n{modules}\n\n{MODEL.format(name=name, section=SECTION)}"


def _function(module: str) -> str:
    """A module of fmtrain as a function that returns its names."""
    text = textwrap.indent(_source(module), "    ")
    return f"@_module\ndef {_name(module)}():\n{text}\n    return locals()\n"


def _name(module: str) -> str:
    return f"fmtrain_{module.replace('.', '_')}"


def _source(module: str) -> str:
    """The text of a module, its imports from fmtrain made names of the functions."""
    path = Path(__file__).parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text("utf-8")
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fmtrain":
            start, stop = node.lineno - 1, node.end_lineno
            lines[start:stop] = [_assigned(module, node, alias) for alias in node.names]
    return "\n".join(lines)


def _assigned(module: str, node: ast.ImportFrom, alias: ast.alias) -> str:
    """`from fmtrain.layout import Layout` as `Layout = fmtrain_layout.Layout`."""
    before = MODULES[: MODULES.index(module)]
    package = (node.module or "").removeprefix("fmtrain").removeprefix(".")
    whole = f"{package}.{alias.name}".removeprefix(".")
    local = alias.asname or alias.name
    if whole in before:
        return f"{local} = {_name(whole)}"
    assert package in before, f"{module} imports {whole}, which is not embedded before it"
    return f"{local} = {_name(package)}.{alias.name}"
