"""The head of the language model runs where something is learnt, and what is learnt is that of
full logits.

The oracle takes the model's last hidden states through the head at every position, in float64, and
knows nothing of TRL's loss. How far float32 may be from it is what plain float32 logits are.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import training
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from fmtrain import attached, sft
from fmtrain.data.encode import IGNORED
from fmtrain.patch import unwrap
from fmtrain.training import recipe as recipes
from fmtrain.training.build import build_trainer
from fmtrain.training.model import load_model
from fmtrain.training.rows import evaluation_rows, training_rows

TIMES = 4  # plain float32's own distance from float64


class HeadRows(TorchDispatchMode):
    """How many rows each product with the head's weight gets, and the most rows of logits that
    anything holds."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.products, self.widest = head.weight, [], 0

    def _is_weight(self, tensor) -> bool:
        ours = self.weight.untyped_storage().data_ptr()
        return torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() == ours

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            if self._is_weight(right) and right.shape[1] == self.weight.shape[0]:
                self.products.append(len(left))
        logits = torch.is_tensor(out) and out.ndim > 1 and out.shape[-1] == len(self.weight)
        if logits and not self._is_weight(out):
            self.widest = max(self.widest, out.numel() // out.shape[-1])
        return out


def trainer_of(folder, *words: str):
    recipe = recipes.read(folder / "recipe.yaml", words)
    model, processor = load_model(recipe)
    rows, held_out = training_rows(recipe, processor), evaluation_rows(recipe, processor)
    return build_trainer(recipe, model, processor, rows, held_out)


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    training.workplace(folder, request.param, rows=8)
    return folder


@contextmanager
def gradients_of(trainer):
    """The gradient of each parameter that learns, by name."""
    gradients: dict[str, torch.Tensor] = {}
    trainer.model.zero_grad()
    yield gradients
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    trainer.model.zero_grad()


def plain(trainer, batch: dict, exact: torch.dtype) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and TRL's metrics from the logits of all positions."""
    inner = unwrap(trainer.model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state
    logits = hidden.to(exact) @ inner.get_output_embeddings().weight.to(exact).T
    logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    learnt = labels != IGNORED
    log_p = logits.log_softmax(-1)
    metrics = {
        "entropy": -(log_p.exp() * log_p).sum(-1)[learnt].mean().item(),
        "mean_token_accuracy": (logits.argmax(-1) == labels)[learnt].double().mean().item(),
        "num_tokens": batch["attention_mask"].sum().item(),
    }
    return F.cross_entropy(logits, labels), metrics


@pytest.mark.parametrize("lora", ["true", "false"])
@pytest.mark.parametrize("mask", ["causal", "v2v"])
def test_loss_gradients_and_metrics_are_those_of_full_logits(folder, tmp_path, mask, lora):
    words = ["--mask", mask, "--use_peft", lora, "--output_dir", str(tmp_path / "out")]
    trainer = trainer_of(folder, *words)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
    learnt = int((batch["labels"] != IGNORED).sum())
    assert 0 < learnt < batch["labels"].numel() / 2

    results = {}
    for exact in (torch.float32, torch.float64):
        with gradients_of(trainer) as gradients:
            loss, metrics = plain(trainer, batch, exact)
            loss.backward()
        results[exact] = (loss.item(), metrics, gradients)
    seen = HeadRows(unwrap(trainer.model).get_output_embeddings())
    with gradients_of(trainer) as gradients:
        with seen:
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
    ours = {name: values[0] for name, values in trainer._metrics["train"].items()}

    assert set(seen.products) == {learnt} and seen.widest == learnt
    rounded, exact = results[torch.float32], results[torch.float64]
    eps = torch.finfo(torch.float32).eps
    assert abs(loss.item() - exact[0]) <= TIMES * max(eps * exact[0], abs(rounded[0] - exact[0]))
    assert ours == pytest.approx(exact[1], rel=TIMES * 8 * eps)
    assert gradients.keys() == exact[2].keys()
    for name, gradient in gradients.items():
        noise = (rounded[2][name] - exact[2][name]).abs().max()
        allowed = TIMES * max(noise, eps * exact[2][name].abs().max())
        assert (gradient - exact[2][name]).abs().max() <= allowed, name


def test_neither_a_run_nor_its_evaluation_holds_the_logits_of_a_row(folder, tmp_path):
    rows = folder / "data" / "held_out.jsonl"
    rows.write_text((folder / "data" / "rows.jsonl").read_text())
    words = ["--eval_strategy", "steps", "--eval_dataset_name", str(rows), "--eval_steps", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--eval_answers", "0"]
    trainer = trainer_of(folder, *words)
    inner = unwrap(trainer.model)
    calls, loaded = [], []
    inner.get_output_embeddings().register_forward_hook(lambda *_: calls.append(len(loaded)))
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: loaded.append(len(rows)) or collate(rows)

    class Began(TrainerCallback):  # after the audit, which compares logits
        def on_train_begin(self, *args, **kwargs):
            calls.clear()

    trainer.add_callback(Began())
    trainer.train()
    assert len(loaded) >= 4 and calls == []
    assert trainer.state.log_history[-2]["eval_loss"] > 0


def test_a_batch_that_learns_nothing_has_a_loss_of_zero(folder, tmp_path):
    trainer = trainer_of(folder, "--output_dir", str(tmp_path / "out"))
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0


def test_logits_asked_for_are_those_of_every_position(folder, tmp_path):
    trainer = trainer_of(folder, "--output_dir", str(tmp_path / "out"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    labels = batch.pop("labels")
    model = trainer.model.eval()
    assert attached(model) is not None
    with torch.no_grad():
        before = model(**batch).logits
        model(**batch, labels=labels, fused_lm_head=True)
        assert torch.equal(model(**batch).logits, before)
    assert before.shape[1] == labels.shape[1]


def test_liger_is_refused(folder, tmp_path):
    words = ["--use_liger_kernel", "true", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"^[^\n]*recipe.yaml: use_liger_kernel true: [^\n]*$"):
        sft.main([str(folder / "recipe.yaml"), *words])
    assert not (tmp_path / "out").exists()
