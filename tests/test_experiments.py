"""Every figure of docs/experiments.md is that of a file in eval/results."""

import json
import re
from collections import defaultdict
from dataclasses import asdict

import numpy as np
import pytest
from documents import (
    RESULTS,
    TEXTS,
    comparisons_of,
    on_one_line,
    results_of,
    rounded,
    scores_of,
    seeds_of,
    shows,
    signed,
    table,
)
from scipy.stats import ttest_1samp

from eval.matrix import answers
from eval.paired import QuestionsOfTask, compare, holm

LOOKING = ("v2v", "future", "prefix_lm")  # from picture to picture
SEEDS = range(10, 15)  # of experiments 17 to 20


def own_mask(comparison: dict) -> bool:
    """Whether it is of a row under the mask that it was trained with."""
    return comparison["row"] == comparison["mask"]


def told_of_experiment(number: int) -> str:
    """Its section, on one line."""
    section = TEXTS["docs/experiments.md"].split(f"\n## {number}. ")[1].split("\n## ")[0]
    return " ".join(section.split())


def student(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval over five, seven or nine values; Student's t from a table."""
    half = {5: 2.776, 7: 2.447, 9: 2.306}[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - half, values.mean() + half


def with_interval(values: np.ndarray) -> str:
    """The same of differences in points, as the documents write it."""
    return "{:+.1f} [{:.1f}, {:.1f}]".format(*student(values))


def more_area(matrix: str) -> dict:
    """Of the one mask that a matrix trains beside `causal`."""
    lines = results_of(matrix)["curves"]["exact"]
    [more] = [line["more_area"] for line in lines if line["more_area"]]
    return more


def gain_of(matrix: str, task: str, mask: str) -> dict:
    """A mask, trained and run with, against causal training run causally."""
    found = comparisons_of(matrix, task)
    [gain] = [each for each in found if own_mask(each) and each["row"] == mask]
    return gain


def lost_without(matrix: str, task: str, mask: str) -> str:
    """What models of a mask lose when they are run causally: points, with their interval."""
    asked = ("diagonal", mask, "causal", task)
    [lost] = [
        each
        for each in results_of(matrix)["comparisons"]
        if (each["kind"], each["row"], each["mask"], each["task"]) == asked
    ]
    return "{:.1f} points [{:.1f}, {:.1f}]".format(
        *(-100 * lost[key] for key in ("difference", "high", "low"))
    )


def test_figures_of_learning_to_compare():
    results = results_of("learning")
    scores = scores_of("learning", "changed")
    section = TEXTS["docs/results.md"].split("## Learning to compare two pictures")[1]
    section = section.split("\n## ")[0]
    shown = table(section, r"trained with \ run under")
    assert [row[0] for row in shown] == ["base, not fine-tuned", *results["masks"]]
    for name, *cells in shown:
        row = "base" if name.startswith("base") else name
        for mask, cell in zip(results["masks"], cells, strict=True):
            assert shows(cell.strip("*"), 100 * scores[row, mask]), (name, mask)
    text, gains = " ".join(section.split()), {}
    rest = apart_afterwards("learning", "changed", ("v2v", "v2v"), ("causal", "causal"), (2, 3, 4))
    assert f"without those two `v2v` is ahead by {rest}" in told_of_experiment(1)
    for one in results["comparisons"]:
        if one["kind"] == "causal-causal":
            points = (rounded(100 * one[key], 1) for key in ("difference", "low", "high"))
            gains[one["row"], one["mask"]] = "{} [{}, {}]".format(*points).replace("-0.0 ", "0.0 ")
    for mask in ("future", "prefix_lm"):
        assert f"`{mask}` {gains[mask, mask]}" in text
    value, interval = gains["v2v", "v2v"].split(" ", 1)
    assert f"`v2v` gains {value} points over causal training run causally {interval}" in text
    value, interval = gains["mma_interleaved", "mma_interleaved"].removeprefix("-").split(" ", 1)
    assert f"`mma_interleaved` is {value} points below it {interval}" in text
    assert f"changes nothing ({gains['causal', 'v2v']})" in text
    digits = json.loads((RESULTS / "learning" / "digits.json").read_text())["digits"]
    share = {(one["row"], one["digit"]): rounded(100 * one["share"], 1) for one in digits}
    assert f"(causal {share['causal', 'new']}, `v2v` {share['v2v', 'new']})" in text
    assert f"right in {share['causal', 'old']} % of the answers" in text
    assert f"and in {share['v2v', 'old']} % with `v2v`" in text


@pytest.mark.parametrize("name, p", [("learning_longer", 0.16), ("learning_confirmed", 0.008)])
def test_figures_of_more_steps(name, p):
    results = results_of(name)
    said = on_one_line("docs/results.md")
    scores = scores_of(name, "changed", count=6)
    v2v, causal = (100 * scores[mask, mask] for mask in ("v2v", "causal"))
    assert f"{rounded(v2v, 1)} against {rounded(causal, 1)}" in said
    [primary] = [
        each
        for each in results["comparisons"]
        if (each["row"], each["family"], each["kind"]) == ("v2v", "primary", "causal-causal")
    ]
    assert shows(str(p), primary["p"])
    if name == "learning_confirmed":
        assert f"{signed(primary, 'difference')}, p {p}" in said
        readme = on_one_line("README.md")
        assert f"in 900 `v2v` reaches {v2v / 100:.3f}, causal {causal / 100:.3f}." in readme


def test_figures_of_the_curves():
    """Of the confirmed comparison: the mean loss over all steps, and when it has fallen."""
    raw = json.loads((RESULTS / "learning_confirmed" / "curves.json").read_text(encoding="utf-8"))
    apart = {}
    for mask in ("causal", "v2v"):
        losses = [dict(raw[f"{mask}-seed{seed}"]["loss"]) for seed in range(3, 8)]
        apart[mask] = np.array([np.trapezoid([*one.values()], [*one]) / 875 for one in losses])
        low = [[step for step, loss in one.items() if loss < 0.1] for one in losses]
        apart[mask, "low"] = sorted(steps[0] for steps in low if steps)
    less = apart["causal"] - apart["v2v"]
    mean, low, high = student(less)
    assert (apart["v2v", "low"][0], apart["v2v", "low"][-1]) == (325, 500)
    assert len(apart["v2v", "low"]) == 5 and len(apart["causal", "low"]) == 1
    for name in ("docs/results.md", "docs/experiments.md"):
        said = on_one_line(name)
        assert re.search(rf"{mean:.3f} nats a token lower[^.]*\[{low:.3f}, {high:.3f}", said)


def test_figures_of_two_hops():
    matrix, task = "learning_precedes_first", "precedes_asked_first"
    said, scores = told_of_experiment(5), scores_of(matrix, task, count=5 * 4)
    for mask in ("causal", "v2v", "future", "v2t"):
        assert f"`{mask}` {rounded(100 * scores[mask, mask], 1)} %" in said, mask
    for each in comparisons_of(matrix, task):
        own = own_mask(each) and each["mask"] != "causal"
        if own or each["row"] == "causal":
            assert f"`{each['mask']}` {signed(each, 'difference')}" in said, each
    for line in results_of(matrix)["curves"]["exact"]:
        if line["more_area"]:
            assert signed(line["more_area"]) in said
        assert set(line["half"]) == {None}  # no run gets to half


@pytest.mark.parametrize(
    ("number", "matrix"),
    [
        (6, "learning_pick"),
        (8, "learning_ahead"),
        (8, "learning_question"),
        (11, "learning_dual"),
        (14, "learning_scratch"),
        (16, "learning_dialogue"),
        (18, "learning_order"),
        (18, "learning_order_back"),
        (19, "learning_total"),
        (20, "learning_odd"),
    ],
)
def test_areas_under_the_curves_are_those_of_the_files(number, matrix):
    """Each mask's more area than causal training, and the areas themselves."""
    results = results_of(matrix)
    said, lines = told_of_experiment(number), results["curves"]["exact"]
    assert lines[0]["row"] == "causal" and len(lines) > 1
    for line in lines:
        assert f"`{line['row']}` {100 * line['area']['value']:.1f}" in said
        assert len(line["area"]["by_run"]) == 5
        if line["row"] != "causal":
            assert signed(line["more_area"]) in said


def test_figures_of_two_hops_with_enough_steps():
    """Ends, and steps to half of the questions; those of README too."""
    said, readme = told_of_experiment(8), on_one_line("README.md")
    results = on_one_line("docs/results.md")
    ahead = scores_of("learning_ahead", "precedes_asked_first", count=4 * 3)
    question = scores_of("learning_question", "follows", count=5 * 4)
    ends = {mask: ahead[mask, mask] for mask in ("causal", "v2v", "future")}
    assert (
        "| {:.1f} | **{:.1f}** | **{:.1f}** | |".format(*(100 * x for x in ends.values()))
        in results
    )
    assert f"at the end {100 * ends['v2v']:.1f} against {100 * ends['causal']:.1f} %" in said
    behind = {mask: question[mask, mask] for mask in ("causal", "v2v", "future", "v2t")}
    assert (
        "| {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(*(100 * x for x in behind.values()))
        in results
    )
    assert f"at the end {100 * behind['v2t']:.1f} against {100 * behind['causal']:.1f} %" in said
    assert f"({ends['v2v']:.3f}, causal {ends['causal']:.3f})" in readme
    assert f"({behind['v2v']:.3f}, causal {behind['causal']:.3f})" in readme
    for scores, masks in ((ahead, ("v2v", "future")), (question, ("v2t", "future", "v2v"))):
        for mask in masks:  # switched on
            apart = 100 * (scores["causal", mask] - scores["causal", "causal"])
            assert f"`{mask}` {apart:.1f}" in said
    lines = results_of("learning_ahead")["curves"]["exact"]
    half = {line["row"]: line["half"] for line in lines}
    assert all(v2v < causal for v2v, causal in zip(half["v2v"], half["causal"], strict=True))
    of_all = [f"{end(half[row]):.0f}" for row in ("v2v", "causal") for end in (min, max)]
    assert "after {} to {} steps with `v2v` and after {} to {} causally".format(*of_all) in said


def test_figures_of_questions_before_and_behind():
    said, told = told_of_experiment(11), on_one_line("docs/results.md")
    ends = {}
    for task in ("follows", "follows_asked_first", "overall"):
        scores = scores_of("learning_dual", task, 3 * 2)
        ends[task] = {pair: 100 * score for pair, score in scores.items()}
    own = {task: (x["v2t", "v2t"], x["causal", "causal"]) for task, x in ends.items()}
    assert "has {:.1f} % of `follows` and causal training {:.1f}".format(*own["follows"]) in said
    assert "of `follows_asked_first` {:.1f} and {:.1f}".format(*own["follows_asked_first"]) in said
    assert "ends at {:.1f} of 100, causal training at {:.1f}".format(*own["overall"]) in told
    lost = [ends[task]["v2t", "v2t"] - ends[task]["v2t", "causal"] for task in list(ends)[:2]]
    pair = f"lose {lost[0]:.1f} points on `follows`, and {lost[1]:.1f} on `follows_asked_first`"
    assert pair in said
    for task in ("follows", "follows_asked_first"):
        assert signed(gain_of("learning_dual", task, "v2t"), "difference") in said
    more = more_area("learning_dual")
    assert [each > 0 for each in more["by_run"]].count(True) == 2
    value = "{:.1f} more [{:.1f}, {:.1f}]".format(
        *(100 * more[k] for k in ("value", "low", "high"))
    )
    assert f"`v2t` has {value}" in told and f"p {more['p']:.2f}" in said


def test_what_the_choice_of_a_mask_is_told_from():
    """The figures of docs/masks.md, in whole points."""
    said = TEXTS["docs/masks.md"]
    learnt, question = (
        scores_of("learning", "changed"),
        scores_of("learning_question", "follows", 20),
    )
    light = scores_of("learning_light", "changed", 6 * 5)
    gain = 100 * (learnt["v2v", "v2v"] - learnt["causal", "causal"])
    assert f"with +{gain:.0f} points and with none" in said
    assert f"it gained nothing where `v2v` gained {gain:.0f} points" in said
    assert abs(light["v2v+merge", "v2v+merge"] - light["causal", "causal"]) < 0.01
    cost = 100 * (question["causal", "causal"] - question["v2v", "v2v"])
    assert f"the look [cost](results.md) {cost:.0f} points" in said
    lines = results_of("learning_question")["curves"]["exact"]
    [more] = [line["more_area"] for line in lines if line["row"] == "v2t"]
    value, low, high = (100 * more[key] for key in ("value", "low", "high"))
    assert f"undecided](results.md): {value:+.0f} points, {low:.0f} to {high:.0f}" in said


def apart_afterwards(
    matrix: str, task: str, one: tuple[str, str], other: tuple[str, str], seeds=range(5)
) -> str:
    """A difference that no report has, of (row, mask in inference), from the stored answers."""
    found = answers.read(RESULTS / matrix)
    of_task = [question.task == task for question in found.questions]
    values = []
    for seed in seeds:
        pair = (found.scores[f"{row}-seed{seed}", mask] for row, mask in (one, other))
        values.append(np.subtract(*(np.array(scores, float)[of_task] for scores in pair)))
    questions = QuestionsOfTask(task, np.arange(sum(of_task)))
    found = compare([questions], {task: np.array(values)})
    return signed(asdict(found), "difference")


def test_figures_of_pictures_drawn_anew():
    said, told = told_of_experiment(12), on_one_line("docs/results.md")
    shares = {}
    for task in ("changed", "redrawn"):
        scores = scores_of("learning_redrawn", task, count=3 * 2)
        shares[task] = {mask: f"{100 * scores[mask, mask]:.1f}" for mask in ("causal", "v2v")}
    first, then = shares["changed"], shares["redrawn"]
    assert f"`v2v` falls from {first['v2v']} to {then['v2v']} %" in said
    assert f"causal training from {first['causal']} to {then['causal']} (" in said
    for mask in ("v2v", "causal"):
        of_runs = [seeds_of("learning_redrawn", task)[mask, mask] for task in shares]
        lost = student(100 * np.subtract(*of_runs))
        assert "(by {:.1f} [{:.1f}, {:.1f}])".format(*lost) in said
    assert f"answer {then['v2v']} % with `v2v` and {then['causal']} % causally" in told
    [found] = [each for each in comparisons_of("learning_redrawn", "redrawn") if own_mask(each)]
    assert signed(found, "difference") in said and signed(found, "difference") in told
    assert round(found["p"], 3) == 0.002


def test_figures_of_two_masks_in_one_model():
    said, told = told_of_experiment(10), on_one_line("docs/results.md")
    scores = scores_of("learning_several", "changed", count=5 * 2)
    shares = {pair: f"{100 * score:.1f}" for pair, score in scores.items()}
    both, alone = ("both_600", "v2v"), ("v2v", "v2v")
    assert apart_afterwards("learning_several", "changed", both, alone) in said
    first, then = ([shares[f"both_{n}", mask] for mask in ("v2v", "causal")] for n in (300, 600))
    assert "{} % under `v2v` and {} % under `causal`".format(*first) in told
    assert "600 steps {} and {}.".format(*then) in told
    assert f"{then[1]} % under `causal`, and {then[0]} % under `v2v`" in said
    assert f"`v2v` alone {shares['v2v', 'v2v']} %" in said
    asked = {("both_300", "v2v"), ("both_300", "causal"), ("both_600", "causal")}
    for each in comparisons_of("learning_several", "changed"):
        if (each["row"], each["mask"]) in asked:
            assert signed(each, "difference") in said
    # the same runs once more
    again, first = (seeds_of(name, "changed") for name in ("learning", "learning_several"))
    for pair in (("causal", "causal"), ("causal", "v2v"), ("v2v", "causal"), ("v2v", "v2v")):
        assert first[pair] == again[pair]


def test_figures_of_the_control():
    said = told_of_experiment(6)
    scores = {pair: f"{100 * x:.1f}" for pair, x in scores_of("learning_pick", "pick4", 12).items()}
    assert f"({scores['v2v', 'causal']} against {scores['v2v', 'v2v']} %)" in said
    assert f"({scores['causal', 'causal']} and {scores['causal', 'v2v']} %)" in said


def test_figures_of_depth():
    found = json.loads((RESULTS / "learning_depth" / "depth.json").read_text(encoding="utf-8"))
    said, told = told_of_experiment(7), on_one_line("docs/results.md")
    bases = found["bases"]
    for base in bases:
        keys = ("causal", "trained", "causal_end", "trained_end")
        shares = " | ".join(f"{100 * base[key]:.1f}" for key in keys)
        assert f"| {base['layers']} | {base['seed']} | {shares} |" in said
    assert len(bases) == 9 and found["without"] == ["l2-s2"]
    for key, who in (("trained_end", "`v2v` ends at"), ("causal_end", "causal training at")):
        ends = [100 * base[key] for base in bases]
        assert f"{who} {min(ends):.1f} to {max(ends):.1f}" in told
    gains = np.array([100 * (base["trained"] - base["causal"]) for base in bases])
    own = {path.parent.name: path for path in (RESULTS / "learning_depth").glob("*/results.json")}
    own = {name: scores_of(f"learning_depth/{name}", "changed", 6) for name in own}
    ends = {m: sorted(each[m, m] for each in own.values()) for m in ("v2v", "causal")}
    assert "`v2v` ends at {:.2f} to {:.2f}, causal training at {:.2f} to {:.2f}.".format(
        *(ends[mask][at] for mask in ends for at in (0, -1))
    ) in on_one_line("README.md")
    best = sorted(own.values(), key=lambda each: each["causal", "causal"])[-2:]
    for text in (said, told):
        for mask, words in (("causal", "{:.1f} and {:.1f} %"), ("v2v", "`v2v` {:.1f} and {:.1f}")):
            assert words.format(*(100 * each[mask, mask] for each in best)) in text
    known = [(4, 0), (4, 1)]  # layers, seed
    new = [g for g, base in zip(gains, bases) if (base["layers"], base["seed"]) not in known]
    mean, low, high = student(np.array(new))
    assert f"gain {mean:.1f} points [{low:.1f}, {high:.1f}]" in said
    assert f"gain {mean:.1f} points [{low:.1f}, {high:.1f}]" in told
    assert gains.min() > 0 and bases[2]["seed"] == 2 and f"gains as much ({gains[2]:.1f})" in said
    mean, low, high = student(gains)
    interval = f"[{low:.1f}, {high:.1f}]"
    assert f"{mean:.1f} points more area on average {interval}" in said
    assert f"from every base, by {mean:.1f} points {interval}" in told
    slope = [100 * found["slope"][key] for key in ("value", "low", "high")]
    assert (
        "{:+.1f} points of gain a layer [{:.1f}, {:.1f}], p {:.2f}".format(
            *slope, found["slope"]["p"]
        )
        in said
    )
    assert "{:+.1f} points a layer [{:.1f}, {:.1f}]".format(*slope) in told
    few, many = (
        [base["causal_end"] < 0.5 for base in bases if base["layers"] == n] for n in (2, 6)
    )
    assert (sum(few), sum(many)) == (2, 1)
    causally = {}
    for base in bases:
        name = f"l{base['layers']}-s{base['seed']}"
        scores = scores_of(f"learning_depth/{name}", "changed", 6)
        causally[name] = 100 * scores["v2v", "causal"]
    unlike = 100 * scores_of("learning_depth/l2-s2", "changed", 6)["v2v", "v2v"]
    odd = [causally.pop("l2-s2"), unlike]
    assert "answers {:.1f} % run causally and {:.1f} under `v2v`".format(*odd) in said
    assert f"fall to {min(causally.values()):.0f} to {max(causally.values()):.0f} %" in said


def test_figures_of_bases_that_have_learnt_otherwise():
    said, told = told_of_experiment(13), on_one_line("docs/results.md")
    areas, gains = {}, {}
    names = [(kind, seed) for kind in ("list", "long", "l4") for seed in (0, 1)]
    for kind, seed in names:
        folder = "learning_depth" if kind == "l4" else "learning_bases"
        lines = results_of(f"{folder}/{kind}-s{seed}")["curves"]["exact"]
        causal, v2v = sorted(lines, key=lambda line: line["row"])
        area = [100 * line["area"]["value"] for line in (causal, v2v)]
        ends = [100 * line["mean"][-1] for line in (causal, v2v)]
        shown = " | ".join(f"{x:.1f}" for x in (*area, *ends))
        assert kind == "l4" or f"| `{kind}`, seed {seed} | {shown} |" in said
        areas[kind, seed] = [f"{x:.1f}" for x in area]
        gains[kind, seed] = f"{area[1] - area[0]:.1f}"
    assert "+{}, +{}, +{} and +{} points of area".format(*list(gains.values())[:4]) in said
    long, short = ([gains[kind, seed] for seed in (0, 1)] for kind in ("long", "l4"))
    assert "+{} and +{}, against +{} and +{}".format(*long, *short) in said
    assert "({} and {} points, in place of {} and {})".format(*long, *short) in told
    assert f"all digits, {gains['list', 0]} and {gains['list', 1]}." in told
    for k, how in enumerate(("areas {} and {}", "set `v2v` back ({} and {}")):
        pairs = [[areas[kind, seed][k] for seed in (0, 1)] for kind in ("long", "l4")]
        assert f"{how}, with 600 steps {{}} and {{}})".format(*pairs[0], *pairs[1]) in said
    scores = scores_of("learning_bases/list-s1", "changed", 6)
    pair = (100 * scores["v2v", "causal"], 100 * scores["v2v", "v2v"])
    assert "model answers {:.1f} %, under `v2v` {:.1f}".format(*pair) in said


def test_figures_from_random_weights():
    said, told = told_of_experiment(14), on_one_line("docs/results.md")
    area = more_area("learning_scratch")
    assert f"{signed(area)}, p {area['p']:.4f} |" in said
    assert (
        "{:.1f} points larger [{:.1f}, {:.1f}]".format(
            *(100 * area[key] for key in ("value", "low", "high"))
        )
        in told
    )
    read, changed = (scores_of("learning_scratch", task, 3 * 2) for task in ("read", "changed"))
    ends = [100 * read[mask, mask] for mask in ("v2v", "causal")]
    assert "`read` ends at {:.1f} with `v2v` and at {:.1f} causally".format(*ends) in said
    ends = [100 * changed[mask, mask] for mask in ("v2v", "causal")]
    assert "{:.1f} against {:.1f} % at the end".format(*ends) in said
    assert "`changed` ends at {:.1f} with `v2v` and at {:.1f} causally".format(*ends) in told
    assert f"ends {ends[0] - ends[1]:.0f} points higher" in on_one_line("docs/experiments.md")
    apart = gain_of("learning_scratch", "changed", "v2v")
    assert signed(apart, "difference") in said and signed(apart, "difference") in told
    assert f"p {apart['p']:.4f})" in said
    lost = lost_without("learning_scratch", "changed", "v2v").replace(" points", "")
    assert f"lose {lost} of `changed`" in said
    assert f"fall to {100 * changed['v2v', 'causal']:.1f} %" in said


def test_figures_of_all_weights():
    said, told = told_of_experiment(7), on_one_line("docs/results.md")
    scores = scores_of("learning_full", "changed", 6 * 5)
    own = [f"{100 * scores[mask, mask]:.1f}" for mask in ("v2v", "future", "causal")]
    assert "{}, {} and {} %".format(*own) in said
    assert "`v2v` {}, `future` {}, causal {}".format(*own) in told
    found = comparisons_of("learning_full", "changed")
    apart = {each["row"]: each for each in found if own_mask(each)}
    for mask in ("v2v", "future", "v2t", "image"):
        assert signed(apart[mask], "difference") in said
        assert signed(apart[mask], "difference") in told
    assert 4 * max(apart[mask]["p"] for mask in ("v2v", "future")) < 1e-4
    [switched] = [each for each in found if (each["row"], each["mask"]) == ("causal", "v2v")]
    assert f"(`v2v` {signed(switched, 'difference')})" in said
    assert f"`v2v` models fall to {100 * scores['v2v', 'causal']:.1f} %" in said
    lora = scores_of("learning", "changed")
    readme = on_one_line("README.md")
    pair = (scores["v2v", "v2v"], scores["causal", "causal"])
    assert "with all weights `v2v` {:.3f}, causal {:.3f}".format(*pair) in readme
    with_lora = [f"{100 * lora[mask, mask]:.1f}" for mask in ("v2v", "future", "causal")]
    assert "{}, {} and {} % (experiment 1)".format(*with_lora) in said


def questions_of_dialogues(matrix: str) -> dict[tuple[str, str, str], float]:
    """Exact answers in percent by (run, mask in inference, "first" or "second" question)."""
    asked, found = defaultdict(list), answers.read(RESULTS / matrix)
    for (run, mask), scores in found.scores.items():
        for question, score in zip(found.questions, scores, strict=True):
            if question.task == "dialogue":
                turn = "second" if question.text == "Which digit changed?" else "first"
                asked[run, mask, turn].append(score)
    return {key: 100 * np.mean(scores) for key, scores in asked.items()}


def test_figures_of_pictures_in_two_turns():
    said, share = told_of_experiment(15), questions_of_dialogues("learning_turns")
    ends = []
    for row in ("causal", "v2v"):
        ends.append(np.mean([share[f"{row}-seed{seed}", row, "second"] for seed in range(3, 8)]))
    assert "second question, {:.1f} % causally trained, {:.1f} with `v2v`".format(*ends) in said
    base = share["tiny_single_pictures-causal-s1", "causal", "first"]
    assert f"the base answers {base:.1f} % of the first questions" in said
    tuned = ("causal", "v2v")
    first = [
        x
        for (run, mask, turn), x in share.items()
        if run.partition("-")[0] == mask and turn == "first"
    ]
    assert len(first) == 5 * len(tuned)
    assert f"after the tuning {min(first):.1f} to {max(first):.1f} are right" in said
    scores = scores_of("learning_turns", "dialogue", 3 * 2)
    for mask in tuned:
        assert f"{100 * scores['v2v', mask]:.1f}" == "0.2"
    assert max(scores_of("learning_turns", "order", 3 * 2).values()) == 0


def test_figures_of_dialogues_that_were_trained():
    said, told = told_of_experiment(16), on_one_line("docs/results.md")
    share, results = questions_of_dialogues("learning_dialogue"), results_of("learning_dialogue")
    causal, v2v = (
        np.array([share[f"{row}-seed{seed}", row, "second"] for seed in range(1, 6)])
        for row in ("causal", "v2v")
    )
    assert f"{with_interval(v2v - causal)}; {v2v.mean():.1f} against {causal.mean():.1f} %" in said
    few = sorted(v2v)[:4]
    ranges = [f"{x:.0f}" for x in (min(few), max(few), min(causal), max(causal))]
    assert (
        "end at {} to {} % of the second questions, causal ones at {} to {}".format(*ranges) in said
    )
    assert f"({max(v2v):.1f})" in said
    assert f"model answers {share['v2v-seed2', 'causal', 'second']:.1f} %" in said
    lost = lost_without("learning_dialogue", "dialogue", "v2v")
    assert f"lose {lost.replace('points', 'points of `dialogue`')}" in said
    assert f"lose {lost}" in told
    more = more_area("learning_dialogue")
    areas = [100 * line["area"]["value"] for line in results["curves"]["exact"]]
    assert "{1:.1f} % with `v2v` and {0:.1f} causally".format(*areas) in told
    assert f"({signed(more)})" in told and f"p {more['p']:.2f}" in said


def test_figures_of_the_light_forms():
    results = results_of("learning_light")
    cells = {(cell["row"], cell["mask"]): 100 * cell["score"] for cell in results["cells"]}
    light = ("v2v+merge", "future+merge", "prefix_lm+merge")
    said = on_one_line("docs/results.md")
    apart = {}
    for each in results["comparisons"]:
        if each["kind"] == "causal-causal":
            apart[each["row"], each["mask"]] = signed(each, "difference")
    first, *others = (rounded(cells[name, name], 1) for name in light)
    causal = rounded(cells["causal", "causal"], 1)
    assert f"`v2v+merge` {first} against causal {causal} ({apart[light[0], light[0]]})" in said
    assert f"`future+merge` {others[0]}, `prefix_lm+merge` {others[1]}" in said
    costs = [cells["causal", "causal"] - cells["causal", name] for name in light]
    assert f"they cost {min(costs):.1f} to {max(costs):.1f} points" in said
    verdicts = on_one_line("docs/experiments.md")
    for name in light:
        assert apart["causal", name] in verdicts


@pytest.mark.parametrize(
    "matrix, start", [("learning_curves", "first"), ("learning_curves_1", "second")]
)
def test_figures_of_all_curves(matrix, start):
    """A line for each mask: areas, held-out loss, steps to half, ends."""
    section = TEXTS["docs/experiments.md"].split("\n## 17. ")[1].split("\n## ")[0]
    results, scores = results_of(matrix), seeds_of(matrix, "changed")
    shown = {line[0].strip("`"): line[1:] for line in table(section, f"from the {start} base")}
    held_out = {line["row"]: line["more_area"] for line in results["curves"]["held_out"]}
    assert list(shown) == [line["row"] for line in results["curves"]["exact"]]
    for line in results["curves"]["exact"]:
        row, steps = line["row"], [step for step in line["half"] if step is not None]
        ends = sorted({f"{end(steps):.0f}" for end in (min, max)}) if steps else ["never"]
        reached = " to ".join(ends)
        never = f", {5 - len(steps)} never" if 0 < len(steps) < 5 else ""
        expected = [f"{100 * line['area']['value']:.1f}", "–", "–", reached + never]
        if row != "causal":
            loss = "{:+.3f} [{:.3f}, {:.3f}]".format(
                *(held_out[row][key] for key in ("value", "low", "high"))
            )
            expected[1:3] = [signed(line["more_area"]), loss]
        assert shown[row] == [*expected, f"{100 * np.mean(scores[row, row]):.1f}"], row


def test_verdicts_of_all_curves():
    said, told = told_of_experiment(17), on_one_line("docs/results.md")
    lines = {
        (base, kind, line["row"]): line
        for base in ("learning_curves", "learning_curves_1")
        for kind, of_kind in results_of(base)["curves"].items()
        for line in of_kind
    }
    more = {key: line["more_area"] for key, line in lines.items() if line["more_area"]}
    asked = [(b, m) for b in ("learning_curves", "learning_curves_1") for m in LOOKING]
    ps = holm([more[base, "exact", mask]["p"] for base, mask in asked])
    corrected = {pair: f"{p:.2g}" for pair, p in zip(asked, ps, strict=True)}
    assert corrected == {
        ("learning_curves", "v2v"): "0.0015",
        ("learning_curves", "future"): "0.0057",
        ("learning_curves", "prefix_lm"): "0.0096",
        ("learning_curves_1", "v2v"): "0.099",
        ("learning_curves_1", "future"): "0.0057",
        ("learning_curves_1", "prefix_lm"): "0.099",
    }
    for base, mask in asked:
        value = signed(more[base, "exact", mask])
        assert value.removeprefix("+") in told
    for (base, kind, row), each in more.items():
        if kind == "exact" and row not in LOOKING:
            sure = base == "learning_curves" or row == "image"
            assert (each["high"] < 0.05) == sure, (base, row)
    half = [lines[base, "exact", "v2v"]["half"] for base, _ in asked[::3]]
    assert sum(step is not None for each in half for step in each) == 9
    assert all(lines[base, "exact", "causal"]["half"] == [None] * 5 for base, _ in asked)
    switched = {
        each["mask"]: each["high"]
        for each in comparisons_of("learning_curves", "changed")
        if each["row"] == "causal" and each["mask"].endswith("+merge")
    }
    shown = [f"{100 * high + 0:.1f}".replace("-0.0", "0.0") for high in switched.values()]
    assert "end at {}, {}, {}, {}, {} and {} |".format(*shown) in said
    losses = [more[base, "held_out", mask] for base, mask in (*asked[:3], asked[4])]
    assert all(loss["high"] < 0 for loss in losses)
    assert (
        "{:.3f}, {:.3f} and {:.3f} from the first base, {:.3f} (`future`)".format(
            *(loss["value"] for loss in losses)
        )
        in said
    )
    gain = gain_of("learning_curves", "changed", "v2v")
    assert signed(gain, "difference") in said


def test_figures_of_counts_over_three_pictures():
    said, told = told_of_experiment(19), on_one_line("docs/results.md")
    results = results_of("learning_total")
    scores = scores_of("learning_total", "total", count=5 * 4)
    apart = {
        (each["row"], each["mask"]): each for each in comparisons_of("learning_total", "total")
    }
    for mask in ("v2v", "v2t", "future"):
        switched = signed(apart["causal", mask], "difference")
        assert f"`{mask}` {switched}" in said and apart["causal", mask]["high"] < 0.05
        assert scores[mask, mask] - scores[mask, "causal"] < 0.005
    for mask in ("v2t", "future"):
        assert f"`{mask}` {signed(apart[mask, mask], 'difference')}" in said
        assert apart[mask, mask]["low"] < 0
    assert f"causal training is at {100 * scores['causal', 'causal']:.1f} %" in said
    first = [line["half"] for line in results["curves"]["exact"]]
    assert first == [[30.0] * 5] * 4
    more = [line["more_area"] for line in results["curves"]["exact"] if line["more_area"]]
    assert all(each["high"] < 0.05 and each["low"] < 0 for each in more)
    assert f"({signed(more[1])} of area" in told


def apart_by_seed(matrix: str, kind: str) -> np.ndarray:
    """The areas of a curve with `v2v` less those causally, seed by seed."""
    lines = results_of(matrix)["curves"][kind]
    areas = {line["row"]: np.array(line["area"]["by_run"]) for line in lines}
    return areas["v2v"] - areas["causal"]


def test_figures_of_the_order_of_three_pictures():
    said, told = told_of_experiment(18), on_one_line("docs/results.md")
    lost, tasks = {}, {"order": "learning_order", "order_back": "learning_order_back"}
    for task, matrix in tasks.items():
        more = more_area(matrix)
        assert signed(more) in told and more["high"] < 0.05 and more["low"] < 0
        runs = seeds_of(matrix, task)
        lost[task] = 100 * np.subtract(runs["v2v", "v2v"], runs["v2v", "causal"])
    means = [f"{each.mean():.1f}".replace("-0.0", "0.0") for each in lost.values()]
    more = with_interval(lost["order_back"] - lost["order"])
    assert "{} points lost of `order`, {} of `order_back`; ".format(*means) + f"{more} more" in said
    assert f"loses {max(lost['order_back']):.1f} points of `order_back`" in said
    gains = [100 * apart_by_seed(matrix, "exact") for matrix in tasks.values()]
    assert f"differ by {with_interval(gains[1] - gains[0])}" in said
    forth, back = (student(apart_by_seed(matrix, "loss")) for matrix in tasks.values())
    assert "{:.3f} nats a token higher for `order` [{:.3f}, {:.3f}]".format(*forth) in said
    figures = [-back[k] for k in (0, 2, 1)]
    assert "{:.3f} lower for `order_back` [{:.3f}, {:.3f}]".format(*figures) in said
    ends = []
    for task, matrix in tasks.items():
        scores = scores_of(matrix, task, count=3 * 2)
        ends += [f"{100 * scores[mask, mask]:.1f}" for mask in ("causal", "v2v")]
    assert "At the end {} and {} % of `order` are right, {} and {} of".format(*ends) in said
    half = [
        step
        for matrix in tasks.values()
        for line in results_of(matrix)["curves"]["exact"]
        for step in line["half"]
    ]
    assert f"after {int(min(half))} to {int(np.ceil(max(half)))} steps" in said


def shares_of_odd(row: str) -> np.ndarray:
    """Exact answers in percent of a row's runs under its own mask [5 seeds, 4 pictures, of which
    one is the odd one], and in a last column of all but the first."""
    found = answers.read(RESULTS / "learning_odd")
    odd = np.array([int(question.reference) for question in found.questions])
    scores = 100 * np.array([found.scores[f"{row}-seed{seed}", row] for seed in SEEDS])
    asked = [*(odd == picture for picture in (1, 2, 3, 4)), odd > 1]
    return np.stack([scores[:, which].mean(1) for which in asked], axis=1)


def test_figures_of_the_odd_one_of_four():
    said, told = told_of_experiment(20), on_one_line("docs/results.md")
    lines = results_of("learning_odd")["curves"]["exact"]
    more = {line["row"]: line["more_area"] for line in lines if line["more_area"]}
    for mask, each in more.items():
        assert each["low"] < 0 and each["high"] > 0.05  # undecided
        value = signed(each)
        assert f"`{mask}` {value.replace(' [', ' of area [' if mask == 'v2v' else ' [')}" in told
    assert f"p {more['v2v']['p']:.2f}: no gain is shown" in said
    shares = {row: shares_of_odd(row) for row in ("causal", "v2v", "future")}
    hard = {row: each[:, 0] - each[:, 4] for row, each in shares.items()}
    first, gained = hard["causal"], hard["v2v"] - hard["causal"]
    assert with_interval(first) in said and student(first)[2] < 0
    assert with_interval(gained) in said and student(gained)[1] < 0
    ps = [ttest_1samp(each, 0).pvalue for each in (first, gained)]
    assert f"(p {holm(ps)[0]:.3f}, Holm)" in said
    lost = lost_without("learning_odd", "odd4", "v2v")
    assert f"lose {lost}" in said
    scores = scores_of("learning_odd", "odd4", count=4 * 3)
    ends = [100 * scores[mask, mask] for mask in ("causal", "v2v", "future")]
    assert (
        "causal training ends at {:.1f}, `v2v` at {:.1f} and `future` at {:.1f}".format(*ends)
        in said
    )
    of_seeds = seeds_of("learning_odd", "odd4")
    runs = 100 * np.array([of_seeds[mask, mask] for mask in shares])
    at_chance, learnt = runs[:, 1], np.delete(runs, 1, axis=1)
    assert f"({at_chance.min():.1f} to {at_chance.max():.1f} %)" in said
    assert f"end at {learnt.min():.0f} to {learnt.max():.0f} %" in said
    turned = shares["v2v"][3]
    assert f"in {turned[0]:.1f} % and a third in {turned[2]:.1f}" in said
    assert all(shares["v2v"][k, :4].argmax() == 2 for k in (0, 2, 4))
