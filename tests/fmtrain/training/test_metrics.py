"""What an answer scores, against the papers' definitions worked out by hand, and the intervals."""

import pytest
from statsmodels.stats.proportion import proportion_confint

from fmtrain.training.interval import mean_with_interval
from fmtrain.training.metrics import METRICS, check_reference, metric_of, parse_metrics


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("Blue  car", "blue car", 1),
        ("blue cars", "blue car", 0),
    ],
)
def test_exact_match_but_for_case_and_blanks(answer, reference, score):
    assert METRICS["exact_match"](answer, reference) == score


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("Kitten", "kitten", 1),  # case apart
        ("sitting", "kitten", 1 - 3 / 7),  # the textbook's distance of 3, of 7 letters
        ("abcd", "abxy", 0),  # NL = 2 / 4, which is not below the threshold of 0.5
        ("abcde", "abcxy", 1 - 2 / 5),
        ("", "abc", 0),
        ("a  b ", "a b", 1),  # blanks apart
    ],
)
def test_anls_is_one_less_the_normalised_distance_below_a_half(answer, reference, score):
    assert METRICS["anls"](answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("105", "100", 1),  # 5 % off
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("-100", "100", 0),
        ("0.19", "20%", 1),  # a percentage is its fraction
        ("21%", "20%", 1),
        ("20", "20%", 0),
        ("0", "0", 1),
        ("0.0", "0", 1),
        ("0.01", "0", 0),  # 5 % of nothing
        ("Yes", "yes", 1),
        ("yes it is", "yes", 0),
        ("many", "100", 0),
        ("100", "many", 0),
        ("nan", "nan", 1),  # a word
        ("inf", "100", 0),
    ],
)
def test_relaxed_accuracy_leaves_numbers_five_percent(answer, reference, score):
    assert METRICS["relaxed_accuracy"](answer, reference) == score


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("B", "B", 1),
        ("b", "B", 1),
        ("B.", "(B) a cat", 1),
        ("(B)", "B", 1),
        ("B: a cat", "B", 1),
        ("B) a cat", "B", 1),
        ("The answer is B.", "B", 1),
        ("Answer: (b)", "B", 1),
        ("C", "B", 0),
        ("The answer is C, not B", "B", 0),
        ("a cat", "A", 0),  # an article is no option
        ("A cat", "A", 0),
        ("I see two cats", "I", 0),
        ("The answer is a cat", "A", 0),
        ("My answer: a dog", "A", 0),
        ("The answer is I do not know", "I", 0),
        ("The answer is A because it is red", "A", 1),
        ("the answer is b since it is red", "B", 1),
        ("The answer is a", "A", 1),
        ("A, B or C", "A", 0),  # no choice
        ("A, because it is red", "A", 1),
        ("Because", "B", 0),
        ("", "B", 0),
    ],
)
def test_option_letter_is_the_one_that_is_said(answer, reference, score):
    assert METRICS["option_letter"](answer, reference) == score


def test_references_that_a_metric_cannot_score():
    check_reference("exact_match", "a cat")
    check_reference("option_letter", "(C) a cat")
    with pytest.raises(ValueError, match="'a cat' names no option"):
        check_reference("option_letter", "a cat")


def test_the_metric_of_a_source_is_that_of_the_longest_beginning():
    metrics = parse_metrics('{"docvqa": "anls", "docvqa/yes": "exact_match", "ai2d": "anls"}')
    assert (
        metric_of("docvqa/val", metrics) == metric_of("evaluation_only/docvqa", metrics) == "anls"
    )
    assert metric_of("docvqa/yes/no", metrics) == "exact_match"
    assert metric_of("other", metrics) == metric_of(None, metrics) == "exact_match"
    assert metric_of(None, parse_metrics("anls")) == "anls"
    assert parse_metrics(None) == {} and parse_metrics({"a": "anls"}) == {"a": "anls"}


@pytest.mark.parametrize(
    "given, reason",
    [
        ("bleu", "eval_metrics names 'bleu'; known are exact_match, anls, "),
        ('{"a": "anl"}', "eval_metrics names 'anl'; known are"),
        ('{"a": ', "eval_metrics is no mapping of sources to metrics"),
        ('["anls"]', "eval_metrics is no mapping of sources to metrics"),
    ],
)
def test_metrics_that_do_not_exist(given, reason):
    with pytest.raises(ValueError, match=reason):
        parse_metrics(given)


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("right, count", [(0, 7), (3, 7), (7, 7), (140, 200)])
def test_of_rows_with_one_question_it_is_wilsons(right, count):
    scores = [1] * right + [0] * (count - right)
    mean, low, high = mean_with_interval(scores, range(count))
    assert mean == right / count
    assert (low, high) == pytest.approx(proportion_confint(right, count, method="wilson"))


def test_questions_of_a_row_that_fare_alike_count_as_one():
    """Three turns a row, all right or all wrong: as many questions as there are rows."""
    rows = [1, 0, 0, 1, 1, 0, 1]
    scores = [score for score in rows for _ in range(3)]
    clusters = [k for k in range(7) for _ in range(3)]
    _, low, high = mean_with_interval(scores, clusters)
    assert (low, high) == pytest.approx(proportion_confint(4, 7, method="wilson"))
    none = mean_with_interval([0] * 21, clusters)
    assert none == pytest.approx((0, *proportion_confint(0, 7, method="wilson")))


def test_questions_of_rows_of_several_lengths():
    """By hand: p = 4/6; the rows' residuals 1 - 2/3 (one question), 3 - 2 and 0 - 4/3 (of 3 and 2)
    have the squares 1/9, 1, 16/9, their sum over 36 is 26/324, and p (1 - p) over it 2.769."""
    _, low, high = mean_with_interval([1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 2, 2])
    count = (2 / 9) / (26 / 324)
    expected = proportion_confint(count * 2 / 3, count, method="wilson")
    assert (low, high) == pytest.approx(expected)


def test_rows_that_vary_less_than_by_chance_count_no_more_than_their_questions():
    _, low, high = mean_with_interval([1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2])
    assert (low, high) == pytest.approx(proportion_confint(3, 6, method="wilson"))
