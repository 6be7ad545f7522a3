"""lmms-eval with a checkpoint of fmtrain's, under its own mask: the harness's command.

    python -m eval.lmms --model fmtrain --model_args pretrained=CHECKPOINT[,mask=v2v+merge]
        --tasks pope,mme --batch_size 8
    accelerate launch --num_processes 8 -m eval.lmms --model fmtrain ...

Arguments and results are lmms-eval's. `--model_args` takes pretrained (an exported checkpoint or a
run with an adapter), mask, merge_prefix, merge_kernel_size, backend and dtype. Prompts go through
`fmtrain.data.encode`, as in training. Tasks that ask for likelihoods (output_type multiple_choice)
need the harness's `--force_simple`.

Written against lmms-eval 0.7.3.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.cli.dispatch import main as lmms_eval_main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from eval.milebench.fitting import joined
from fmtrain.checkpoint import check_folder, load, recorded_mask
from fmtrain.command_line import one_line
from fmtrain.data.encode import Encoded, encode
from fmtrain.data.images import open_image
from fmtrain.decoding import Decoder
from fmtrain.layout import Role
from fmtrain.masks import parse_masks

PLACE = "<image>"  # what the harness's tasks write into a text for an image
MAX_NEW_TOKENS = 1024  # of tasks that do not say; as the harness's LLaVA adapters have it
SEARCH = ("num_beams", "min_new_tokens", "repetition_penalty")
SAMPLING = ("temperature", "top_p", "top_k")

Dialogue = tuple[list[dict[str, Any]], list[Image.Image]]  # messages, images


@register_model("fmtrain")
class Fmtrain(lmms):
    """Tasks as text and images: images first, or where `<image>` stands, once for each."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        mask: str | None = None,
        merge_prefix: int | float | str = "1",
        merge_kernel_size: int = 3,
        backend: str = "sdpa",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if max_batch_size is not None:
            raise ValueError(
                "fmtrain has no automatic batch size: give --batch_size, not --max_batch_size"
            )
        check_folder(pretrained)
        merge = {"prefix": str(merge_prefix), "kernel_size": int(merge_kernel_size)}
        attached_mask = recorded_mask(pretrained)
        if mask is not None:
            [attached_mask] = parse_masks([mask], **merge)
        if attached_mask is None:
            raise ValueError(
                f"{pretrained}: its config.json records no mask; "
                "name one in --model_args, e.g. mask=causal"
            )
        model, processor = load(pretrained, attached_mask, backend=backend, dtype=dtype)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        if device and self._world_size == 1:
            self.device = torch.device(device)
        self.decoder, self.batch_size = Decoder(model.to(self.device), processor), int(batch_size)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "Fmtrain":
        """What the command calls.

        It would print a traceback and end with code 0 for an error in here; SystemExit passes.
        """
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except (ValueError, OSError, TypeError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise SystemExit(2) from error

    def clean(self) -> None:
        """Free the model's memory, for a judge that runs here."""
        del self.decoder
        super().clean()

    def dialogue(
        self, text: str, images_of: Callable, task: str, split: str, doc_id: int
    ) -> Dialogue:
        """One document as a user's turn."""
        images = images_of(self.task_dict[task][split][doc_id]) or []
        pieces = text.split(PLACE)
        if len(pieces) - 1 not in (0, len(images)):
            raise ValueError(
                f"task {task}, document {doc_id}: {len(pieces) - 1} places {PLACE} "
                f"for {len(images)} images"
            )
        image = {"type": "image"}
        parts: list[dict[str, str]] = [image] * len(images) if len(pieces) == 1 else []
        for k, piece in enumerate(pieces):
            if k:
                parts.append(image)
            if piece:
                parts.append({"type": "text", "text": piece})
        return [{"role": "user", "content": parts}], images

    def encoded(
        self, dialogue: Dialogue, where: str, add_generation_prompt: bool = True
    ) -> Encoded:
        """A dialogue encoded; `where` is what an error names."""
        messages, images = dialogue
        try:
            if not all(isinstance(image, Image.Image) for image in images):
                kinds = sorted({type(image).__name__ for image in images})
                raise ValueError(f"{kinds} among its visuals; fmtrain takes images only")
            upright = [open_image(image) for image in images]
            return encode(self.decoder.processor, joined(messages), upright, add_generation_prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def settings(self, request: Instance) -> dict[str, Any]:
        """The generation_kwargs of a generate_until request."""
        return request.args[1]

    def prompt(self, request: Instance) -> Encoded:
        """The encoded prompt of a generate_until request."""
        text, _, images_of, doc_id, task, split = request.args
        dialogue = self.dialogue(text, images_of, task, split, doc_id)
        return self.encoded(dialogue, f"task {task}, document {doc_id}")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests; batches hold requests with equal settings."""
        groups: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            key = json.dumps(self.settings(request), sort_keys=True, default=str)
            groups.setdefault(key, []).append(k)
        results: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), unit="document", disable=self.rank != 0) as bar:
            for group in groups.values():
                settings = self.settings(requests[group[0]])
                for indices in self._batches(group):
                    prompts = [self.prompt(requests[k]) for k in indices]
                    results |= zip(indices, self._answer(prompts, settings))
                    bar.update(len(indices))
        return [results[k] for k in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(loss, whether greedy decoding would give it) of each continuation.

        The end token is left out. The loss is the mean negative log-likelihood of a token: the
        harness takes the option with the *smallest* number, and its LLaVA adapters return just
        this. Wrapped, as lmms-eval 0.7.3 makes a string of a bare (float, bool).
        """
        results = []
        for batch in tqdm(self._batches(requests), disable=self.rank != 0):
            rows = [self._with_answer(request) for request in batch]
            whole = self.decoder.run_tower(rows, padding_side="right")
            ids, role = whole.inputs["input_ids"], whole.layout.role
            with torch.no_grad():
                logits = self.decoder.model(**whole.kwargs(), use_cache=False).logits
            for row in range(len(batch)):
                answer = (role[row] == Role.ANSWER).nonzero().flatten()
                positions = answer[:-1]  # the last one is the end token
                likely = logits[row, positions - 1].float().log_softmax(-1)
                loss = -likely.gather(1, ids[row, positions, None]).mean()
                greedy = (likely.argmax(-1) == ids[row, positions]).all()
                results.append(GenerationResult((float(loss), bool(greedy))))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("fmtrain's adapter answers in one round")

    def _batches(self, items: Sequence) -> list[Sequence]:
        size = self.batch_size
        return [items[begin : begin + size] for begin in range(0, len(items), size)]

    def _with_answer(self, request: Instance) -> Encoded:
        text, answer, images_of, doc_id, task, split = request.args
        if callable(answer):
            answer = answer(self.task_dict[task][split][doc_id])
        messages, images = self.dialogue(text, images_of, task, split, doc_id)
        part = {"type": "text", "text": str(answer).strip()}  # the template spaces it
        dialogue = [*messages, {"role": "assistant", "content": [part]}], images
        return self.encoded(dialogue, f"task {task}, document {doc_id}", False)

    def _answer(
        self, prompts: Sequence[Encoded], settings: dict[str, Any]
    ) -> list[GenerationResult]:
        """Answers of one batch, cut at the first of the task's stop strings."""
        batch = self.decoder.run_tower(prompts)
        length = batch.layout.shape[1]
        room = self.decoder.model.config.get_text_config().max_position_embeddings - length
        if room < 1:
            raise ValueError(
                f"a prompt of {length} tokens leaves no room for an answer "
                "among the model's positions"
            )
        results, stops = [], settings.get("until") or []
        answers = self.decoder.answers(batch, **generation(settings, room))
        for prompt, answer in zip(prompts, answers):
            text = self.decoder.text(answer)
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.partition(stop)[0]
            tokens = TokenCounts(input_tokens=prompt.layout.shape[1], output_tokens=len(answer))
            results.append(GenerationResult(text.strip(), tokens))
        return results


class FmtrainChat(Fmtrain):
    """Tasks as messages, images where the task puts them: what the harness prefers."""

    is_simple = False

    def settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def prompt(self, request: Instance) -> Encoded:
        _, messages_of, _, doc_id, task, split = request.args
        messages, images = [], []
        for message in messages_of(self.task_dict[task][split][doc_id]):
            parts = []
            for part in message["content"]:
                if part["type"] != "text":
                    images.append(part["url"])
                    part = {"type": "image"}
                parts.append(part)
            messages.append({"role": message["role"], "content": parts})
        return self.encoded((messages, images), f"task {task}, document {doc_id}")


def generation(settings: dict[str, Any], room: int) -> dict[str, Any]:
    """`GenerationConfig` settings of a task's generation_kwargs.

    Greedy unless a temperature above 0 asks for sampling. Keys meant for other adapters
    (image_aspect_ratio, ..) are left out; top_p and the like are for sampling only.
    """
    sample = bool(settings.get("do_sample", True)) and (settings.get("temperature") or 0) > 0
    names = (*SAMPLING, *SEARCH) if sample else SEARCH
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return {
        "max_new_tokens": min(settings.get("max_new_tokens", MAX_NEW_TOKENS), room),
        "do_sample": sample,
        "min_new_tokens": 1,
    } | given


def register() -> None:
    """Make `fmtrain` known to the harness."""
    paths = {"simple_class_path": "eval.lmms.Fmtrain", "chat_class_path": "eval.lmms.FmtrainChat"}
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("fmtrain", **paths), overwrite=True)


def main() -> None:
    """lmms-eval's own command, which now knows `--model fmtrain`."""
    if not torch.accelerator.is_available():
        # Or several processes on a CPU would not know of each other.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    register()
    lmms_eval_main()


if __name__ == "__main__":
    main()
