"""Asking in the terminal: the answers of the one decoding loop, in dialogues of several turns and
pictures, a mask's own answers under each mask."""

import io
import json
import re

import families
import pytest
from families import IMAGE, assistant, photo, user

from fmtrain import Mask, Merge, attach, chat, encode
from fmtrain.__main__ import main
from fmtrain.command_line import printable
from fmtrain.data.render import markers

MASKS = ["causal", "v2v", "prefix_lm+merge"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model, processor = families.model("llava"), families.processor("llava")
    with attach(model, "v2v", markers=markers(processor)):
        model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for seed in range(3):
        photo(seed).save(folder / f"{seed}.png")
    return folder


def asked(monkeypatch, checkpoint, text: str, *words: str, typed: bool = False) -> int:
    """`fmtrain chat` with these lines piped in, or typed."""
    lines = io.StringIO(text)
    monkeypatch.setattr("sys.stdin", lines)
    if typed:
        lines.isatty = lambda: True
        given = iter(text.splitlines())

        def line(prompt):
            try:
                return next(given)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", line)
    return main(["chat", str(checkpoint / "model"), "--max_new_tokens", "6", *words])


def answer(mask: str, messages: list[dict], images: list, tokens: int = 6) -> str:
    """What plain `generate` says under a mask."""
    model, processor = families.model("llava"), families.processor("llava")
    encoded = encode(processor, messages, images, True)
    with attach(model, mask):
        out = model.generate(
            **encoded.kwargs(),
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=[model.config.image_token_id],
        )
    ids = out[0, encoded.layout.shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_several_turns_and_pictures_under_masks_side_by_side(checkpoint, monkeypatch, capsys):
    folder = checkpoint
    pictures = ["--image", str(folder / "0.png"), "--image", str(folder / "1.png")]
    text = f"which digit?\n\n/image {folder / '2.png'}\nand now?\n"
    assert asked(monkeypatch, folder, text, *pictures, "--masks", *MASKS) == 0
    lines, answers = capsys.readouterr().out.splitlines(), set()
    expected = [[], []]
    for mask in MASKS:
        first = user(IMAGE, IMAGE, "which digit?")
        one = answer(mask, [first], [photo(0), photo(1)])
        again = [first, assistant(one), user(IMAGE, "and now?")]
        two = answer(mask, again, [photo(0), photo(1), photo(2)])
        expected[0].append(f"{mask:15}  {printable(one)}")
        expected[1].append(f"{mask:15}  {printable(two)}")
        answers.add((one, two))
    assert [line.rstrip() for line in lines] == [
        line.rstrip() for line in [*expected[0], *expected[1]]
    ]
    assert len(answers) == len(MASKS)


def test_without_masks_it_is_the_recorded_one_and_new_begins_again(checkpoint, monkeypatch, capsys):
    picture = f"/image {checkpoint / '0.png'}\n"
    assert asked(monkeypatch, checkpoint, f"{picture}which?\n/new\n{picture}which?\n") == 0
    lines = capsys.readouterr().out.splitlines()
    expected = printable(answer("v2v", [user(IMAGE, "which?")], [photo(0)]))
    assert [line.rstrip() for line in lines] == [expected] * 2


def test_a_light_form_by_name_pools_as_the_checkpoint_does(checkpoint, monkeypatch, capsys):
    path = checkpoint / "model" / "config.json"
    before, config = path.read_text(), json.loads(path.read_text())
    pooling = Merge(prefix=4, kernel_size=5)
    config["fmtrain"] |= Mask.of("v2v", pooling).record()
    path.write_text(json.dumps(config))
    try:
        seen = []
        monkeypatch.setattr(chat.Chat, "line", lambda talk, line: seen.extend(talk.masks))
        for words in ((), ("--masks", "causal", "v2v+merge")):
            assert asked(monkeypatch, checkpoint, "which?\n", *words) == 0
    finally:
        path.write_text(before)
    assert [mask.merge for mask in seen] == [pooling, None, pooling]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("/image nowhere.png", "'nowhere.png' does not exist"),
        ("/image https://example.org/a.png", "does not exist|URL"),
        ("/imag a.png", "unknown command '/imag'; known are /image FILE, /new"),
        ("/image", "unknown command '/image'"),
        ("what is <image>?", "under v2v: .*image.*; /new begins another dialogue"),
    ],
)
@pytest.mark.parametrize("typed", [False, True])
def test_an_error_is_one_line(checkpoint, monkeypatch, capsys, line, match, typed):
    """Typed, the next question is asked all the same; piped, nobody is there to ask it."""
    code = asked(monkeypatch, checkpoint, f"{line}\nwhich?\n", typed=typed)
    streams = capsys.readouterr()
    [error] = [each for each in streams.err.splitlines() if "error" in each]
    assert re.search(rf"^error: .*({match})", error), error
    expected = printable(answer("v2v", [user("which?")], []))
    assert code == (0 if typed else 2)
    assert [each.rstrip() for each in streams.out.splitlines() if each] == [expected] * typed


def test_what_cannot_begin(checkpoint, monkeypatch, capsys):
    for words, match in (
        (["--masks", "v2w"], "unknown policy 'v2w'"),
        (["--image", str(checkpoint / "model" / "config.json")], "config.json"),
    ):
        assert asked(monkeypatch, checkpoint, "which?\n", *words) == 2
        assert match in [e for e in capsys.readouterr().err.splitlines() if "error" in e][-1]
    assert main(["chat", str(checkpoint / "none")]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


def test_an_error_leaves_the_dialogue_as_it_was(checkpoint):
    model, processor = families.model("llava"), families.processor("llava")
    attach(model, "v2v", "sdpa")
    talk = chat.Chat(chat.Decoder(model, processor), chat.parse_masks(["v2v"]), 4)
    talk.show(str(checkpoint / "0.png"))
    with pytest.raises(ValueError):
        talk.ask("what is <image>?")
    assert len(talk.waiting) == 1 and talk.dialogues == [[]] and talk.images == []
    [text] = talk.ask("which?")
    assert text == answer("v2v", [user(IMAGE, "which?")], [photo(0)], 4)
    assert talk.waiting == [] and len(talk.images) == 1
