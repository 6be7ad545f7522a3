"""Layouts: literal fields of small pictures, padding, joining, positions, errors."""

import doctest
import random

import pytest
import torch
from oracle import random_layout

from fmtrain import Layout, Role, layout

P, T, V, A = Role.PAD, Role.TEXT, Role.VISUAL, Role.ANSWER


def fields(found: Layout) -> dict[str, list]:
    return {name: getattr(found, name).tolist() for name in ("role", "image", "prefill", "sample")}


def test_two_turns_with_several_images():
    # the letter I means another image in the next turn
    assert fields(Layout.parse("TIIJT AA / I T A")) == {
        "role": [[T, V, V, V, T, A, A, V, T, A]],
        "image": [[-1, 0, 0, 1, -1, -1, -1, 2, -1, -1]],
        "prefill": [[0, 0, 0, 0, 0, -1, -1, 1, 1, -1]],
        "sample": [[0] * 10],
    }


def test_padding_and_packed_samples():
    assert fields(Layout.parse(". TI A / T A | IT A ..")) == {
        "role": [[P, T, V, A, T, A, V, T, A, P, P]],
        "image": [[-1, -1, 0, -1, -1, -1, 0, -1, -1, -1, -1]],
        "prefill": [[-1, 0, 0, -1, 1, -1, 0, 0, -1, -1, -1]],
        "sample": [[-1, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1]],
    }


def test_the_same_letter_in_one_turn_is_the_same_image_wherever_it_stands():
    assert Layout.parse("IJTI T / JJ").image.tolist() == [[0, 1, -1, 0, -1, 2, 2]]


def test_blanks_mean_nothing():
    assert fields(Layout.parse("TIIT A/T A|T..")) == fields(
        Layout.parse("  T I IT\nA / T A | T . .")
    )


def test_four_letters_are_four_images():
    assert Layout.parse("IJKL").image.tolist() == [[0, 1, 2, 3]]


def test_integer_tensors_of_one_shape():
    parsed = Layout.parse("TIT A")
    assert parsed.shape == (1, 4)
    for tensor in parsed.model_inputs().values():
        assert (
            tensor.shape == (1, 4) and not tensor.is_floating_point() and tensor.dtype != torch.bool
        )


@pytest.mark.parametrize(
    "picture, named",
    [
        ("TIX A", "'X'"),
        ("tia", "'t'"),
        ("", "no token"),
        (" / | ", "no token"),
        ("TI A T", "/"),
        ("T A I A", "/"),
        ("T1", "'1'"),
    ],
)
def test_a_bad_picture_is_an_error_in_one_line_that_names_what_is_wrong(picture, named):
    with pytest.raises(ValueError) as error:
        Layout.parse(picture)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_pad_adds_padding_on_either_side():
    assert fields(Layout.parse("TIT A").pad(left=2, right=1)) == fields(Layout.parse("..TITA."))
    assert fields(Layout.parse("TIT A").pad()) == fields(Layout.parse("TITA"))


def test_cat_joins_rows():
    joined = Layout.cat([Layout.parse("TI A"), Layout.parse(".IA")])
    assert joined.shape == (2, 3)
    assert joined.role.tolist() == [[T, V, A], [P, V, A]]
    assert fields(joined[1:]) == fields(Layout.parse(".IA"))


@pytest.mark.parametrize(
    "picture, expected",
    [
        ("TIT A / T A", [0, 1, 2, 3, 4, 5]),
        ("..TI A", [0, 0, 0, 1, 2]),
        ("TI A..", [0, 1, 2, 0, 0]),
        (".TI A | IT A / T | T.", [0, 0, 1, 2, 0, 1, 2, 3, 0, 0]),
        ("T|T|T", [0, 0, 0]),
        ("..", [0, 0]),
        ("TI A .. / T | .T . A", [0, 1, 2, 0, 0, 3, 0, 0, 0, 1]),
    ],
)
def test_positions_count_in_each_sample_from_0(picture, expected):
    assert Layout.parse(picture).positions().tolist() == [expected]


def test_positions_of_rows_are_independent():
    rng = random.Random(0)
    for _ in range(20):
        rows = random_layout(rng, rows=3, samples=3)
        counted = []
        for samples in rows.sample.tolist():
            seen: dict[int, int] = {}
            counted.append([0 if sample < 0 else seen.setdefault(sample, 0) for sample in samples])
            for t, sample in enumerate(samples):
                if sample >= 0:
                    counted[-1][t], seen[sample] = seen[sample], seen[sample] + 1
        assert rows.positions().tolist() == counted


def test_a_layout_prints_as_the_picture_that_it_was_parsed_from():
    for picture in ("TIIJTAA/TKKTAA", "..TITA", "TITA..", "TITA/TA|TIITA.", "IJKL"):
        again = Layout.parse(str(Layout.parse(picture)))
        assert fields(again) == fields(Layout.parse(picture))


def test_packed_and_padded():
    assert Layout.parse("TA|TA").packed and not Layout.parse("TA/TA").packed
    assert Layout.parse(".TA").padded and not Layout.parse("TA|TA").padded


def test_model_inputs_lose_nothing():
    packed = Layout.parse(".TIT A / T A | I A")
    assert fields(Layout.from_model_inputs(dict(packed.model_inputs()))) == fields(packed)


def test_part_of_a_layout_is_an_error_that_names_what_is_missing():
    inputs = Layout.parse("TI A").model_inputs()
    name = next(key for key in inputs if "prefill" in key)
    del inputs[name]
    with pytest.raises(ValueError, match=name):
        Layout.from_model_inputs(inputs)


def test_pictures_in_the_docstrings_are_true():
    result = doctest.testmod(layout, extraglobs={"Layout": Layout})
    assert result.attempted > 0 and result.failed == 0
