"""The prefill law: what training sees is what inference sees, on the four families, and nothing
leaks through the layers.

Everything here runs in float32 on models of four layers. 1e-4 is the tolerance of DESIGN 2 for
logits of about 1: one pass and many short ones sum in other orders, about 1e-6 a layer, grown by
sharp attention.
"""

import contextlib

import families
import oracle
import pytest
import torch
from families import IMAGE, assistant, photo, user

from fmtrain import POLICIES, Layout, Merge, Role, attach
from fmtrain.attention import BACKENDS
from fmtrain.data.collator import batch
from fmtrain.data.encode import encode

NEAR = dict(rtol=0, atol=1e-4)
PAPER = ["causal", "future", "v2v", "v2t", "future+merge", "v2v+merge", "v2t+merge"]
VARIANTS = [*POLICIES, *(f"{name}+merge" for name in POLICIES if name != "causal")]


# What attends is the same in all families, so `flash` runs in two of them, one with grouped heads.
HOSTS = [*((name, "sdpa") for name in families.FAMILIES), ("llava", "flash"), ("internvl", "flash")]


@pytest.fixture(params=HOSTS, ids="-".join)
def host(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def family(host) -> str:
    return host[0]


@pytest.fixture
def backend(host) -> str:
    return host[1]


def parts(variant: str, backend: str) -> dict:
    merge = Merge(prefix=2) if variant.endswith("+merge") else None
    return {"mask": variant, "merge": merge, "backend": backend}


def forward(model, inputs: dict, layout: Layout | None = None, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **(layout.model_inputs() if layout else {}), **options).logits


def pixels(inputs: dict) -> dict:
    return {
        name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")
    }


def served(model, processor, messages: list[dict], images: list) -> torch.Tensor:
    """Logits [1, T, V] of a dialogue as a server computes them, in one growing cache: for each
    turn, one prefill with the images of that turn alone, then the answer token by token."""
    cache, logits, seen, known, used = None, [], 0, {}, 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            used += sum(part["type"] == "image" for part in message["content"])
            continue
        prompt, layout = encode(processor, messages[:k], images[:used], add_generation_prompt=True)
        new = {name: value[len(known.get(name, ())) :] for name, value in pixels(prompt).items()}
        known, length = pixels(prompt), prompt["input_ids"].shape[1]
        whole, _ = encode(processor, messages[: k + 1], images[:used])
        ids = whole["input_ids"]
        chunk = {name: value for name, value in new.items() if len(value)}
        for begin, end in [(seen, length), *((t, t + 1) for t in range(length, ids.shape[1]))]:
            answering = begin >= length
            out = model(
                input_ids=ids[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                **({} if answering else {**chunk, **layout.model_inputs()}),
            )
            cache = out.past_key_values
            logits.append(out.logits)
        seen = ids.shape[1]
    return torch.cat(logits, 1)


@pytest.fixture
def rows(family):
    """Dialogues with 0, 1, 2 and 3 images, of one turn and of two, encoded for training."""
    return {
        name: encode(families.processor(family), *dialogue)
        for name, dialogue in families.dialogues().items()
    }


@pytest.mark.parametrize(
    "variant, lora", [*((v, False) for v in VARIANTS), *((v, True) for v in PAPER)]
)
def test_teacher_forced_is_prefill_and_decoding(family, backend, variant, lora, model_of, rows):
    model, moved = model_of(family, lora), False
    for name, (messages, images) in families.dialogues().items():
        with attach(model, **parts(variant, backend)), torch.no_grad():
            taught = forward(model, *rows[name])
            decoded = served(model, families.processor(family), messages, images)
            assert taught.shape == decoded.shape
            torch.testing.assert_close(taught, decoded, **NEAR)
        moved |= images != [] and not torch.allclose(taught, forward(model, rows[name][0]), **NEAR)
    assert moved == (variant != "causal")  # otherwise the test has not seen the policy at all


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_is_its_single_rows(family, backend, variant, side, model_of, rows):
    model = model_of(family)
    inputs, layout = batch(families.processor(family), list(rows.values()), side)
    assert len(inputs["input_ids"]) == 4 and (inputs["attention_mask"] == 0).any()
    with attach(model, **parts(variant, backend)):
        together = forward(model, inputs, layout)
        for row, (single, its) in enumerate(rows.values()):
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(
                together[row, real][None], forward(model, single, its), **NEAR
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_left_padded_batch_decodes_as_its_single_rows_were_taught(
    family, backend, variant, model_of
):
    """Prompts of 0, 1 and 3 images in one batch, prefilled together, each fed its own answer."""
    model, processor = model_of(family), families.processor(family)
    chosen = [families.dialogues()[name] for name in ("text", "single", "three")]
    prompts = [
        encode(processor, messages[:1], images, add_generation_prompt=True)
        for messages, images in chosen
    ]
    taught = [encode(processor, messages[:2], images) for messages, images in chosen]
    inputs, layout = batch(processor, prompts, "left")
    answers = [
        row[0]["input_ids"][0, prompt[0]["input_ids"].shape[1] :]
        for row, prompt in zip(taught, prompts)
    ]
    with attach(model, **parts(variant, backend)), torch.no_grad():
        out = model(**inputs, **layout.model_inputs(), use_cache=True)
        logits, mask = [out.logits[:, -1]], inputs["attention_mask"]
        for t in range(max(map(len, answers))):
            ids = torch.stack([answer[min(t, len(answer) - 1)] for answer in answers])[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            out = model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            logits.append(out.logits[:, -1])
        for row, (single, answer) in enumerate(zip(taught, answers)):
            expected = forward(model, *single)[0, -len(answer) - 1 :]
            torch.testing.assert_close(
                torch.stack(logits)[: len(answer) + 1, row], expected, **NEAR
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dialogue_prefilled_again_is_the_dialogue_continued(family, backend, variant, model_of):
    """The other way of serving: for its second answer the whole dialogue is fed again, in one
    forward with its layout."""
    model, processor = model_of(family), families.processor(family)
    messages, images = families.dialogues()["two_turns"]
    again = encode(processor, messages[:-1], images, add_generation_prompt=True)
    whole = encode(processor, messages, images)
    with attach(model, **parts(variant, backend)):
        expected = forward(model, *whole)
        length = again[0]["input_ids"].shape[1]
        torch.testing.assert_close(forward(model, *again), expected[:, :length], **NEAR)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
@pytest.mark.parametrize("variant", ["causal", "v2v", "future+merge"])
def test_training_mode_with_gradient_checkpointing(
    family, backend, variant, reentrant, lora, model_of, rows
):
    """Logits in training mode, with checkpointing off and on, are those of evaluation, and the
    gradients are the same."""
    model = model_of(family, lora)
    inputs, layout = batch(families.processor(family), list(rows.values()), "right")
    results = []
    with attach(model, **parts(variant, backend)):
        evaluated = forward(model, inputs, layout)
        for checkpointing in (False, True):
            with training(model, checkpointing, reentrant):
                logits = model(**inputs, **layout.model_inputs()).logits
                logits[inputs["attention_mask"].bool()].square().mean().backward()
                gradients = {
                    name: p.grad.clone()
                    for name, p in model.named_parameters()
                    if p.grad is not None
                }
                results.append((logits.detach(), gradients))
    real = inputs["attention_mask"].bool()
    for logits, _ in results:
        torch.testing.assert_close(logits[real], evaluated[real], **NEAR)
    (_, plain), (_, checkpointed) = results
    assert plain.keys() == checkpointed.keys() and any(
        "language_model" in name and "q_proj" in name for name in plain
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


@contextlib.contextmanager
def training(model, checkpointing: bool, reentrant: bool):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # As trainers do: frozen inputs would hide LoRA from a reentrant checkpoint
        model.enable_input_require_grads()
    try:
        yield
    finally:
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.eval()


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_attached_is_the_unpatched_model_exactly(family, side, backend, model_of, rows):
    model = model_of(family)
    inputs, layout = batch(families.processor(family), list(rows.values()), side)
    real = inputs["attention_mask"].bool()
    single, its = rows["two_turns"]
    prompts = [
        encode(families.processor(family), messages[:1], images, True)
        for messages, images in prompts_of("single", "three")
    ]
    prompt, prompt_layout = batch(families.processor(family), prompts, "left")
    unpatched = forward(model, inputs), forward(model, single), generate(model, prompt)
    with attach(model, "causal", backend):
        assert torch.equal(forward(model, inputs, layout)[real], unpatched[0][real])
        assert torch.equal(forward(model, single, its), unpatched[1])
        for kwargs in ({}, prompt_layout.model_inputs()):
            found = generate(model, {**prompt, **kwargs})
            assert torch.equal(found.sequences, unpatched[2].sequences)
            for ours, theirs in zip(found.logits, unpatched[2].logits, strict=True):
                # on padded decoding steps transformers repeats the grouped keys and our sdpa
                # backend does not
                torch.testing.assert_close(
                    ours, theirs, rtol=0, atol=0 if backend == "auto" else 1e-4
                )
    if backend == "auto":
        with attach(model, "causal"):
            assert torch.equal(forward(model, inputs, layout), unpatched[0])  # padding included


def prompts_of(*names: str):
    return [families.dialogues()[name] for name in names]


def generate(model, inputs: dict, **options):
    return model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_backend_is_the_reference_in_the_model(variant, model_of):
    model, processor = model_of("llava"), families.processor("llava")
    inputs, layout = batch(
        processor,
        [encode(processor, *dialogue) for dialogue in families.dialogues().values()],
        "left",
    )
    found = []
    for backend in BACKENDS:
        with attach(model, **parts(variant, backend)):
            found.append(forward(model, inputs, layout)[inputs["attention_mask"].bool()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **NEAR)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_are_the_samples_alone(family, backend, variant, model_of, rows):
    model = model_of(family)
    chosen = [rows[name] for name in ("single", "text", "two_turns")]
    layouts = [
        Layout(its.role, its.image, its.prefill, its.sample + n)
        for n, (_, its) in enumerate(chosen)
    ]
    layout = Layout.cat(layouts, dim=1)
    stacked, _ = batch(
        families.processor(family), chosen, "right"
    )  # for its pixels, which are those of all rows in order
    ids = torch.cat([inputs["input_ids"] for inputs, _ in chosen], 1)
    with attach(model, **parts(variant, backend)):
        packed = forward(model, {"input_ids": ids, **pixels(stacked)}, layout)
        begin = 0
        for inputs, its in chosen:
            end = begin + its.shape[1]
            torch.testing.assert_close(packed[:, begin:end], forward(model, inputs, its), **NEAR)
            begin = end


# leaks: two turns with an image in each, four layers


LEAK = (
    [
        user(IMAGE, "what?"),
        assistant("red cube"),
        user("then", IMAGE, "now?"),
        assistant("two"),
        user("so?"),
        assistant("3"),
    ],
    [photo(7), photo(8)],
)


@pytest.fixture
def leak(family):
    return encode(families.processor(family), *LEAK)


def changed(inputs: dict, layout: Layout, token: int) -> dict:
    """The inputs with the text token at `token`, or the image that it belongs to, replaced by
    another."""
    image = int(layout.image[0, token])
    if image >= 0:
        size = len(inputs["pixel_values"]) // 2  # two images of one size: as many tiles each
        values = inputs["pixel_values"].clone()
        values[image * size : (image + 1) * size] = values[image * size : (image + 1) * size].flip(
            -1
        )
        return {**inputs, "pixel_values": values}
    ids = inputs["input_ids"].clone()
    ids[0, token] = 270 if ids[0, token] != 270 else 271  # an ordinary token of all four tokenizers
    return {**inputs, "input_ids": ids}


def moved_by(model, inputs: dict, layout: Layout, token: int, before: torch.Tensor) -> torch.Tensor:
    """bool [T]: the positions whose logits are not bit-identical after the change."""
    return (forward(model, changed(inputs, layout, token), layout) != before).any(-1)[0]


@pytest.mark.parametrize(
    "host, variant",
    [(host, variant) for host in HOSTS for variant in (VARIANTS if host[0] == "llava" else PAPER)],
    indirect=["host"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_no_logit_moves_but_those_that_the_policy_lets_move(
    family, backend, variant, model_of, leak
):
    """Each token (and image) in turn is changed: exactly bit-identical wherever four layers of the
    mask cannot reach, and moved wherever one look reaches from the query's own prefill."""
    model, (inputs, layout) = model_of(family), leak
    name = variant.removesuffix("+merge")
    assert model.config.get_text_config().num_hidden_layers >= 4
    reach, direct = oracle.reach(name, layout, 4)[0], oracle.allowed(name, layout)[0]
    size, seen_ahead = layout.shape[1], set()
    with attach(model, **parts(variant, backend)):
        before = forward(model, inputs, layout)
        for token in range(size):
            same = (
                (layout.image[0] == layout.image[0, token])
                if layout.image[0, token] >= 0
                else torch.arange(size) == token
            )
            if token > 0 and same[token - 1]:
                continue  # the image was changed at its first token
            moved = moved_by(model, inputs, layout, token, before)
            assert not (moved & ~reach[:, same].any(1)).any(), (
                f"a change at {token} moved {moved.nonzero().flatten().tolist()}"
            )
            assert moved[same].any()
            ahead = direct[:, same].any(1) & (torch.arange(size) < token)
            letters = oracle.rows(layout)[0][0]
            seen_ahead |= {
                letters[q] + letters[token] for q in range(size) if moved[q] and ahead[q]
            }
    pairs = {
        "".join(letters[t] for t in pair)
        for pair in (direct & ~torch.tril(torch.ones_like(direct))).nonzero().tolist()
    }
    pairs -= {"VV"}  # one image in each turn here; two in one turn are the next test
    assert seen_ahead == pairs


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_one_prefill_see_each_other_as_the_policy_says(
    family, backend, variant, model_of
):
    model, processor = model_of(family), families.processor(family)
    inputs, layout = encode(
        processor, [user(IMAGE, "a", IMAGE, "which?"), assistant("red")], [photo(1), photo(2)]
    )
    first = layout.image[0] == 0
    with attach(model, **parts(variant, backend)):
        moved = moved_by(
            model,
            inputs,
            layout,
            int((layout.image[0] == 1).nonzero()[0]),
            forward(model, inputs, layout),
        )
    name = variant.removesuffix("+merge")
    reach = oracle.reach(name, layout, 4)[0][:, layout.image[0] == 1].any(1)
    assert moved[first].any() == reach[first].any()
    assert name in ("causal", "image", "v2t", "mma", "text_future") or reach[first].any()
    assert moved[layout.role[0] == Role.ANSWER].all() and not (moved & ~reach).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_turns_and_answers_move_no_earlier_logit(family, backend, variant, model_of, leak):
    """All later tokens changed at once, and cut off: whatever an earlier turn predicts stays, bit
    for bit (cut off: to rounding)."""
    model, (inputs, layout) = model_of(family), leak
    answers = (layout.role[0] == Role.ANSWER).nonzero().flatten().tolist()
    with attach(model, **parts(variant, backend)):
        before = forward(model, inputs, layout)
        for cut in answers:
            other = inputs
            for token in range(cut, layout.shape[1]):
                other = (
                    changed(other, layout, token)
                    if layout.image[0, token] != layout.image[0, token - 1] or token == cut
                    else other
                )
            moved = (forward(model, other, layout) != before).any(-1)[0]
            assert not moved[:cut].any() and moved[cut:].any()


def unbounded(layout: Layout, name: str) -> Layout:
    """What the law forbids: the whole row as one prefill; for policies that open text, its answers
    as text."""
    role = (
        layout.role
        if name == "v2v"
        else torch.where(layout.role == Role.ANSWER, int(Role.TEXT), layout.role)
    )
    return Layout(role, layout.image, torch.where(role == Role.ANSWER, -1, 0), layout.sample)


@pytest.mark.parametrize(
    "variant", ["v2v", "future", "v2t", "prefix_lm", "v2v+merge", "future+merge", "v2t+merge"]
)
def test_the_unbounded_form_does_leak_so_the_tests_can_see(
    family, backend, variant, model_of, leak
):
    """Changing the last token of answer 1 moves the logits that predict answer 1: through image 1
    that has seen image 2 (v2v), or the answer itself (the others)."""
    model, (inputs, layout) = model_of(family), leak
    answers = (layout.role[0] == Role.ANSWER).nonzero().flatten()
    last = next(int(t) for t in answers if layout.role[0, t + 1] != Role.ANSWER)
    predicting = torch.arange(int(answers[0]) - 1, last)
    free = unbounded(layout, variant.removesuffix("+merge"))
    with attach(model, **parts(variant, backend)):
        before = forward(model, inputs, free)
        assert moved_by(model, inputs, free, last, before)[predicting].any()
        assert not moved_by(model, inputs, layout, last, forward(model, inputs, layout))[
            predicting
        ].any()
