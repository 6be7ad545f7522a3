"""What goes with the weights of an export: the card, its picture, the key that vLLM reads, and the
way to the hub."""

import json
import shutil

import families
import hub_server
import pytest
import training
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from fmtrain import Mask, export, servers, sft
from fmtrain.card import write_card
from fmtrain.masks import POLICIES

TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run under `image` that evaluates twice."""
    folder = tmp_path_factory.mktemp("card")
    recipe = training.workplace(folder, rows=8)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    evaluation["eval_dataset_name"] = str(folder / "data" / "rows.jsonl")
    training.write_recipe(folder, mask="image", **evaluation)
    assert sft.main([str(recipe)]) == 0
    return folder / "out"


def card(run, folder, mask="image", model_type="llava", **how) -> str:
    folder.mkdir()
    write_card(folder, run, Mask.parse(mask), "owner/base", "LoRA, folded", model_type, **how)
    return (folder / "README.md").read_text()


def logged(run, folder, change, **state):
    """A copy of the run in which `change` made its log another one."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    before = json.loads((copy / "trainer_state.json").read_text())
    for entry in before["log_history"]:
        change(entry)
    (copy / "trainer_state.json").write_text(json.dumps(before | state))
    return copy


def test_the_card_says_what_the_run_was(run, tmp_path):
    text = card(run, tmp_path / "export")
    head = ModelCard(text).data
    assert head.base_model == "owner/base" and head.tags[-1] == "image"
    [result] = head.eval_results
    state = json.loads((run / "trainer_state.json").read_text())
    last = [entry for entry in state["log_history"] if "eval_loss" in entry][-1]
    assert result.metric_value == last["eval_exact_match"] and last["step"] == 4
    assert "| evaluation | step 4, these weights |" in text
    assert f"| `eval_loss` | {last['eval_loss']:.4g} |" in text and "eval_runtime" not in text
    record = json.loads((run / "run.json").read_text())
    assert f"`{record['data']}`" in text and "- rows: 8, 0 more dropped" in text
    assert f"`{run.parent / 'data' / 'rows.jsonl'}`" in text
    with Image.open(tmp_path / "export" / "mask.png") as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 600
    assert "![the mask image](mask.png)" in text and "Each image sees all of itself" in text
    assert 'fmtrain.attach(model, "image")' in text and "trust_remote_code" not in text


def test_a_token_in_a_recipe_is_not_shown(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    resolved |= {"hub_token": TOKEN, "model_init_kwargs": {"token": TOKEN}, "eos_token": "</s>"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    text = card(folder, tmp_path / "export")
    assert TOKEN not in text and "eos_token: </s>" in text


def test_what_causal_attention_costs_where_it_was_measured(run, tmp_path):
    assert "What that costs: not measured" in card(run, tmp_path / "unmeasured")

    def measured(entry):
        if "eval_loss" in entry:
            entry |= {"eval_exact_match": 0.75, "eval_causal_exact_match": 0.25 * entry["step"] / 4}

    text = card(logged(run, tmp_path, measured), tmp_path / "measured")
    assert "`exact_match` is 0.75 under `image` and 0.25 under `causal` (evaluation at" in text
    assert len(ModelCard(text).data.eval_results) == 2


def test_the_best_evaluation_beside_that_of_the_weights(run, tmp_path):
    best = logged(run, tmp_path, lambda entry: None, best_global_step=2)
    head = "| evaluation | step 4, these weights | step 2, the best of the run |"
    assert head in card(best, tmp_path / "last")
    recipe = yaml.safe_load((best / "recipe.yaml").read_text())
    (best / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"load_best_model_at_end": True}))
    assert "| evaluation | step 2, these weights |\n" in card(best, tmp_path / "best")
    (best / "recipe.yaml").unlink()  # a run of one's own script: nobody knows which it ended with
    text = card(best, tmp_path / "script")
    assert "| evaluation | step 4, the last | step 2, the best of the run |" in text
    assert "- sets: not recorded" in text and "```yaml" not in text


def test_a_checkpoint_of_a_run_has_its_own_figures(run, tmp_path):
    text = card(run / "checkpoint-2", tmp_path / "export")
    assert "step 2, these weights" in text and "- rows: 8" in text and "mask: image" in text


def test_a_card_without_a_record_or_matplotlib(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    text = card(tmp_path / "run", tmp_path / "export", "future+merge", embedded=True)
    assert "rows: not recorded" in text and "None were recorded" in text and "`o` pooled" in text
    assert "mask.png" not in text and not (tmp_path / "export" / "mask.png").exists()
    assert "the model card has no mask.png: a picture needs matplotlib" in capsys.readouterr().err
    assert "trust_remote_code=True" in text and "and as `AutoModel`" in " ".join(text.split())


# servers


MASKS = [*POLICIES, *(f"{name}+merge" for name in POLICIES if name != "causal")]


@pytest.mark.parametrize("name", MASKS)
def test_only_image_with_one_run_of_tokens_is_flagged_for_vllm(family, name, tmp_path):
    mask, flagged = Mask.parse(name), (name, family) == ("image", "llava")
    stale = {"is_mm_prefix_lm": True, "auto_map": {}, "model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(stale))  # of a base under another mask
    export.finish_config(tmp_path, mask, family)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": family} | ({"is_mm_prefix_lm": True} if flagged else {})
    words = servers.in_words(mask, family)
    assert ("disable-chunked-mm-input" in words) == flagged
    assert ("causally" in words) == (name != "causal")
    assert ("tiles" in words) == (name == "image" and not flagged)


def test_a_picture_is_one_run_of_tokens_even_in_tiles(family):
    """Of which the flag makes use for LLaVA-1.5 alone: nobody has seen a server keep tiles
    together."""
    import fmtrain

    image = families.photo(1, 32, 16)
    inputs, layout = fmtrain.encode(
        families.processor(family), [families.user(families.IMAGE, "which?")], [image], True
    )
    visual = layout.visual[0].int()
    assert int((visual[1:] > visual[:-1]).sum()) == 1
    tiles = inputs["pixel_values"].flatten(0, -4).shape[0]
    assert (tiles == 1) == (family in servers.ONE_RUN)


# the hub


def test_an_export_goes_to_the_hub_and_its_token_nowhere(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server.hub(monkeypatch, TOKEN) as hub:
        words = [str(run), "--out", str(tmp_path / "out"), "--embed_code"]
        assert export.main([*words, "--push_to_hub", "owner/model"]) == 0
    assert "pushed to https://huggingface.co/owner/model/commit/1" in capsys.readouterr().out
    assert hub.tokens - {""} == {TOKEN}  # some things are asked without one
    pushed, written = hub.repositories["owner/model"], {}
    for file in (tmp_path / "out").iterdir():
        written[file.name] = file.read_bytes()
    assert pushed == written
    assert {"README.md", "mask.png", "modeling_fmtrain.py", "model.safetensors"} < pushed.keys()
    for name, content in pushed.items():
        assert TOKEN.encode() not in content, name
    card = ModelCard(pushed["README.md"].decode())
    assert 'from_pretrained("owner/model", trust_remote_code=True)' in card.text
    assert json.loads(pushed["config.json"])["is_mm_prefix_lm"] is True


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    run, tmp_path, monkeypatch, capsys
):
    def refused(repository, match):
        words = [str(run), "--out", str(tmp_path / "out"), "--push_to_hub", repository]
        assert export.main(words) == 2 and not (tmp_path / "out").exists()
        [line] = capsys.readouterr().err.splitlines()
        assert match in line and TOKEN not in line

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused("model", "a name on the hub is OWNER/NAME")
    refused("owner/model", "offline mode is enabled")
    with hub_server.hub(monkeypatch, "another"):
        refused("owner/model", "push_to_hub owner/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("owner/model", "no token here")


def test_a_push_that_fails_says_how_to_go_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = tmp_path / "out"
    with hub_server.hub(monkeypatch, TOKEN):
        assert export.main([str(run), "--out", str(out), "--push_to_hub", "closed/model"]) == 2
    assert (out / "model.safetensors").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out} is written, but not pushed to closed/model" in error
    assert f"`hf upload closed/model {out}`" in error and TOKEN not in error
