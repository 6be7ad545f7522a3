"""Exports: folded weights answer like the adapter, keep the base's names, load plainly, and nothing
is written if not."""

import json
import shutil
import subprocess

import pytest
import torch
import training
import warm
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import fmtrain
from fmtrain import export as exporting
from fmtrain import sft
from fmtrain.data.collator import encode_row
from fmtrain.export import export
from fmtrain.patch import unwrap


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    training.workplace(folder, rows=8)
    assert sft.main([str(folder / "recipe.yaml")]) == 0
    assert (
        sft.main(
            [
                str(folder / "recipe.yaml"),
                "--use_peft",
                "false",
                "--output_dir",
                str(folder / "full"),
                "--mask",
                "future",
            ]
        )
        == 0
    )
    return folder


def logits(model, processor, folder):
    row = training.read_rows(folder)[1]
    inputs, layout = encode_row(processor, row, folder / "data")
    with torch.no_grad():
        return model(**inputs, **layout.model_inputs()).logits


def test_folded_equals_adapter_and_loads_everywhere(trained, tmp_path):
    out = tmp_path / "exported"
    export(trained / "out", out)
    adapter, processor = fmtrain.load(str(trained / "out"))
    folded, again = fmtrain.load(str(out))
    expected = logits(adapter, processor, trained)
    # float32 rounding of W + BA against W x + B (A x), through four layers
    torch.testing.assert_close(logits(folded, again, trained), expected, atol=1e-4, rtol=1e-4)
    assert str(fmtrain.attached(folded).mask) == "v2v"
    plain = AutoModelForImageTextToText.from_pretrained(out)
    causal, loaded = logits(plain, again, trained), logits(folded, again, trained)
    assert not torch.allclose(causal, loaded, atol=1e-3)
    with fmtrain.attach(plain, "v2v"):
        assert torch.equal(logits(plain, again, trained), loaded)
    base = load_file(trained / "base" / "model.safetensors")
    mine = load_file(out / "model.safetensors")
    assert base.keys() == mine.keys() and {t.dtype for t in base.values()} == {
        t.dtype for t in mine.values()
    }
    changed = {name for name in base if not torch.equal(base[name], mine[name])}
    assert len(changed) == 4 * 7 and all(
        "language_model" in name and "proj" in name for name in changed
    )
    assert json.loads((out / "config.json").read_text())["fmtrain"] == {
        "policy": "v2v",
        "reveals": [["VISUAL", "VISUAL"]],
        "within_image": False,
        "merge": None,
        "version": 1,
        "markers": fmtrain.markers(training.families.processor("llava")).record(),
    }
    assert not list(out.glob("*.bin")) and "`v2v`" in (out / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_weights_are_w_plus_ba_in_the_dtype_of_the_base(trained, tmp_path, dtype):
    """Summed in float32 and rounded once. Modules that learn whole, beside LoRA, are what they
    learnt."""
    plain, base, run = AutoModelForImageTextToText, tmp_path / "base", tmp_path / "run"
    plain.from_pretrained(trained / "base", dtype=dtype).save_pretrained(base)
    shutil.copytree(trained / "out", run)
    settings = LoraConfig.from_pretrained(str(run))
    settings.inference_mode, settings.modules_to_save = False, ["multi_modal_projector"]
    adapted = get_peft_model(plain.from_pretrained(base), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, adapted.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(run)
    export(run, tmp_path / "exported")
    before, after = (
        plain.from_pretrained(path).state_dict() for path in (base, run.with_name("exported"))
    )
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    learnt, folded, whole = adapted.state_dict(), 0, 0
    for name, tensor in before.items():
        own = f"base_model.model.{name}"
        a, b = (own.replace(".weight", f".lora_{letter}.default.weight") for letter in "AB")
        if own not in learnt and a in learnt:
            added = learnt[b].float() @ learnt[a].float() * settings.lora_alpha / settings.r
            tensor, folded = tensor.float() + added, folded + 1
        elif own not in learnt:
            saved = own.replace("projector.", "projector.modules_to_save.default.")
            tensor, whole = learnt[saved], whole + 1
        assert torch.equal(after[name], tensor.to(dtype)), name
    assert (folded, whole) == (4 * 7, 4)


def test_a_full_run_is_exported_as_it_is(trained, tmp_path):
    export(trained / "full", tmp_path / "exported")
    run, exported = (
        load_file(trained / "full" / "model.safetensors"),
        load_file(tmp_path / "exported" / "model.safetensors"),
    )
    assert run.keys() == exported.keys() and all(
        torch.equal(run[name], exported[name]) for name in run
    )
    model, _ = fmtrain.load(str(tmp_path / "exported"))
    assert str(fmtrain.attached(model).mask) == "future"


def test_merge_options_come_back(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "out", run)
    merge = {"prefix": 0.1, "kernel_size": 5, "normalize": False}
    config = json.loads((run / "config.json").read_text())
    config["fmtrain"]["merge"] = merge
    (run / "config.json").write_text(json.dumps(config))
    refused(run, tmp_path / "exported", r"config.json .* 'v2v\+merge'.* run.json .* 'v2v'")
    nested = run / "checkpoint-4"
    (nested / "config.json").write_text(json.dumps(config))
    refused(nested, tmp_path / "exported", r"config.json .* run.json")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"merge": merge}))
    export(run, tmp_path / "exported")
    model, _ = fmtrain.load(str(tmp_path / "exported"))
    assert fmtrain.attached(model).mask.merge == fmtrain.Merge(
        prefix=0.1, kernel_size=5, normalize=False
    )


def refused(run, out, match):
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=match) as error:
        export(run, out)
    assert "\n" not in str(error.value) and sorted(out.parent.iterdir()) == before


def test_nothing_is_written_when_something_is_off(trained, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    refused(trained / "out", tmp_path / "there", "exists already")
    refused(trained / "nothing", tmp_path / "exported", "not a finished run")
    untouched = tmp_path / "untouched"  # an adapter that changes nothing: B is zero
    shutil.copytree(trained / "out", untouched)
    weights = load_file(untouched / "adapter_model.safetensors")
    save_file(
        {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in weights.items()},
        untouched / "adapter_model.safetensors",
    )
    refused(untouched, tmp_path / "exported", "0 tensors differ from the base, 28 should")
    half = tmp_path / "half"
    shutil.copytree(trained / "out", half)
    save_file(
        {
            n: torch.zeros_like(t) if "lora_B" in n and "q_proj" in n else t
            for n, t in weights.items()
        },
        half / "adapter_model.safetensors",
    )
    refused(half, tmp_path / "exported", "24 tensors differ from the base, 28 should")
    broken = tmp_path / "broken"
    shutil.copytree(trained / "out", broken)
    save_file(
        {n: t * float("nan") if "lora_B" in n else t for n, t in weights.items()},
        broken / "adapter_model.safetensors",
    )
    refused(broken, tmp_path / "exported", "NaN|nan|folding")
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    refused(trained / "out", tmp_path / "exported", "folding moved the logits")


def test_a_checkpoint_without_a_policy_is_not_loaded_silently(trained):
    with pytest.raises(ValueError, match="records no mask"):
        fmtrain.load(str(trained / "base"))
    model, _ = fmtrain.load(str(trained / "base"), mask="v2v")
    assert str(fmtrain.attached(model).mask) == "v2v"
    with pytest.raises(ValueError, match="no such checkpoint"):
        fmtrain.load(str(trained / "nowhere"))


def hub_of(base, folder) -> dict:
    """A cache of the hub that holds `base` as owner/name, at the revision `tried` alone."""
    repository = folder / "models--owner--name"
    shutil.copytree(base, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "tried").write_text("a" * 40)
    return {"cache_dir": str(folder), "revision": "tried"}


def test_a_name_on_the_hub_loads_with_the_arguments_of_from_pretrained(
    trained, tmp_path, monkeypatch
):
    original, seen = AutoModelForImageTextToText.from_pretrained, []

    def watched(name, **kwargs):
        seen.append((name, kwargs.get("device_map"), kwargs.get("revision")))
        return original(name, **kwargs)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watched)
    hub = hub_of(trained / "base", tmp_path)
    options = {"dtype": torch.bfloat16, "device_map": "cpu"}
    model, processor = fmtrain.load("owner/name", mask="v2v", **hub, **options)
    assert str(fmtrain.attached(model).mask) == "v2v" and model.dtype == torch.bfloat16
    assert seen == [("owner/name", "cpu", "tried")] and processor.tokenizer.pad_token
    with pytest.raises(ValueError, match=r"owner/name: its config\.json records no mask"):
        fmtrain.load("owner/name", **hub)
    with pytest.raises(ValueError, match=r"^owner/name: ") as error:
        fmtrain.load("owner/name", mask="v2v", cache_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    adapted, _ = fmtrain.load(trained / "out", **options)
    assert unwrap(adapted).dtype == torch.bfloat16
    assert seen[-1] == (str(trained / "base"), "cpu", None)


@pytest.mark.parametrize("name", ["tiny", "fmtrain/tiny", "sft.py", "sft", "gpt2", "recipes/none"])
def test_what_is_no_name_of_the_hub_never_goes_there(name, monkeypatch):
    monkeypatch.chdir(training.ROOT / "docs")
    if name == "recipes/none":
        monkeypatch.chdir(training.ROOT)

    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", asked)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", asked)
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        fmtrain.load(name, mask="v2v")


@pytest.mark.parametrize(
    "section",
    [
        [],
        "v2v",
        {"version": 1},
        {"policy": "v2v", "version": 1, "merge": {"size": 3}},
        {"policy": "v2v", "reveals": [["VISUAL", "WORD"]], "within_image": False, "version": 1},
        {"policy": "v2v", "reveals": 3, "within_image": False, "version": 1},
    ],
)
def test_a_malformed_record_of_the_mask(trained, tmp_path, section):
    config = json.loads((trained / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"fmtrain": section}))
    with pytest.raises(ValueError, match=r"config\.json .*fmtrain") as error:
        fmtrain.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_add_positions_are_refused(trained, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(trained / "out", run)
    base = str(trained / "base")
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path=base)
    adapter.save_pretrained(run)
    with pytest.raises(ValueError, match=f"{adapter.peft_type.value}.* LoRA") as error:
        fmtrain.load(run)
    assert "\n" not in str(error.value)
    refused(run, tmp_path / "exported", "LoRA")


def test_the_command_line(trained, tmp_path):
    command = [warm.python(), "-m", "fmtrain.export", str(trained / "out"), "--out"]
    options = dict(env=training.environment(), cwd=training.ROOT, capture_output=True, text=True)
    done = subprocess.run([*command, str(tmp_path / "exported")], **options)
    assert done.returncode == 0 and "28 tensors differ" in done.stdout
    again = subprocess.run([*command, str(tmp_path / "exported")], **options)
    assert (
        again.returncode == 2
        and again.stderr.count("error:") == 1
        and "Traceback" not in again.stderr
    )
