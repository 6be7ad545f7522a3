"""Every figure of README and docs/results.md is that of a file in eval/results."""

import json
import re
from itertools import product

import pytest
from documents import (
    RESULTS,
    TEXTS,
    on_one_line,
    results_of,
    rounded,
    scores_of,
    shows,
    table,
)

from eval import coverage, held_out


def overall() -> dict[tuple[str, str], float]:
    return scores_of("tiny", "overall")


def test_figures_of_the_readmes_table():
    scores = scores_of("learning", "changed")
    masks = ("causal", "v2v", "future", "prefix_lm")
    expected = [
        [scores["causal", mask] for mask in masks],
        [scores[mask, mask] for mask in masks],
    ]
    shown = table(TEXTS["README.md"], "exact answers: which digit changed in two pictures?")
    for row, values in zip(shown, expected, strict=True):
        for cell, value in zip(row[1:], values, strict=True):
            assert re.fullmatch(r"0\.\d{3}", cell.strip("*")) and shows(cell.strip("*"), value), row
    header = re.search(r"^\| exact answers.*$", TEXTS["README.md"], flags=re.M).group()
    assert tuple(re.findall(r"under `(\w+)`", header)) == masks


def test_what_the_readme_says_of_its_table():
    scores, text = overall(), on_one_line("README.md")
    masks = ("v2v", "future", "prefix_lm", "v2t", "mma_interleaved", "image")
    costs = [scores["causal", "causal"] - scores["causal", mask] for mask in masks]
    said = re.search(r"switching one on there costs (\d+) to (\d+) points", text)
    assert said.groups() == (rounded(100 * min(costs), 0), rounded(100 * max(costs), 0))
    trained, causal = re.search(
        r"where a base knows its tasks \((0\.\d+), causal (0\.\d+)\)", text
    ).groups()
    assert shows(trained, scores["v2v", "v2v"]) and shows(causal, scores["causal", "causal"])
    chosen = TEXTS["docs/masks.md"]
    assert f"cost {said[1]} to {said[2]} points. So compare" in chosen
    gains = scores_of("learning", "changed")
    for mask in ("image", "v2t", "mma_interleaved"):
        assert gains[mask, mask] - gains["causal", "causal"] < 0.005


def test_figures_of_the_matrix():
    scores = overall()
    shown = table(TEXTS["docs/results.md"], r"in training \ in inference")
    masks = ["causal", "future", "v2v", "v2t", "mma_interleaved", "image", "prefix_lm"]
    assert [row[0] for row in shown] == ["base, not fine-tuned", *masks]
    for name, *cells in shown:
        row = "base" if name.startswith("base") else name
        for mask, cell in zip(masks, cells, strict=True):
            figure = cell.strip("*")
            assert re.fullmatch(r"\d\d\.\d", figure), (name, mask)
            assert shows(figure, 100 * scores[row, mask]), (name, mask)


def test_figures_of_training_against_switching_on():
    results = results_of("tiny")
    primary = [item for item in results["comparisons"] if item["family"] == "primary"]
    found = {(item["row"], item["kind"]): item for item in primary}
    shown = table(TEXTS["docs/results.md"], "mask")
    assert len(primary) == len(found) == 2 * len(shown)
    for name, *figures in shown:
        for kind, (difference, interval, p) in {
            "inference-only": figures[:3],
            "causal-causal": figures[3:],
        }.items():
            item = found[name.strip("`"), kind]
            assert difference == f"{100 * item['difference']:+.1f}"
            low, high = rounded(100 * item["low"], 1), rounded(100 * item["high"], 1)
            assert interval == f"[{low}, {high}]"
            if p.startswith("<"):
                assert item["p_holm"] < float(p.removeprefix("< "))
            else:
                assert float(p) == pytest.approx(item["p_holm"], rel=0.06, abs=6e-4)


def test_figures_of_the_embedded_model():
    results = results_of("tiny")
    own = [cell for cell in results["cells"] if (cell["row"], cell["mask"]) == ("base", "causal")]
    scores = {cell["task"]: cell["score"] for cell in own if cell["task"] != "overall"}
    chances = held_out.chance("digits", scores)
    shown = {row[0].split("`")[1]: row[1:] for row in table(TEXTS["docs/results.md"], "task")}
    assert shown.keys() == scores.keys() == chances.keys()
    for task, figures in shown.items():
        assert figures == [rounded(scores[task], 3), rounded(chances[task], 3)]


def test_figures_of_coverage():
    cases = json.loads((RESULTS / "coverage.json").read_text(encoding="utf-8"))["coverage"]
    assert {(case["seeds"], case["rows"]) for case in cases} == {*product((3, 5), (200, 500))}
    assert {case["spread"] for case in cases} == {0.0, 0.02, 0.1}
    shown = table(TEXTS["docs/results.md"], "interval")
    for method, (_, least, most) in zip(coverage.METHODS, shown, strict=True):
        shares = [100 * case[method] for case in cases]
        assert shows(least.removesuffix(" %"), min(shares))
        assert shows(most.removesuffix(" %"), max(shares))


def test_what_the_results_say_of_a_mismatch():
    scores = overall()
    narrow = ("causal", "v2v", "image")
    text = [
        100 * (scores[row, row] - scores[row, mask])
        for row in narrow
        for mask in ("future", "v2t", "mma_interleaved")
    ]
    everything = [100 * (scores[row, row] - scores[row, "prefix_lm"]) for row in narrow]
    said = on_one_line("docs/results.md")
    assert f"loses {rounded(min(text), 0)} to {rounded(max(text), 0)} points" in said
    assert f"{rounded(min(everything), 0)} to {rounded(max(everything), 0)} points under" in said


@pytest.mark.parametrize(("label", "name"), [("embedded", "tiny"), ("137 M", "100m")])
def test_figures_of_latency(label, name):
    result = json.loads((RESULTS / f"latency_{name}.json").read_text(encoding="utf-8"))
    [model] = result["models"]
    ratios = {item["variant"]: item for item in model["variants"]}

    def span(key: str, masks: list[str]) -> str:
        values = [rounded(ratios[mask][key]["median"], 2) for mask in masks]
        return f"{min(values)}-{max(values)}"

    plain, merged = ["future", "v2v", "v2t"], ["future+merge", "v2v+merge", "v2t+merge"]
    [row] = [row for row in table(TEXTS["docs/results.md"], "model") if row[0].startswith(label)]
    assert f"{model['visual_tokens']} image tokens" in row[0]
    decoded = span("decode_ratio", plain + merged)
    assert row[1:4] == [decoded, span("prefill_ratio", plain), span("prefill_ratio", merged)]


def test_figures_of_attention_alone():
    rows = json.loads((RESULTS / "attention_cpu.json").read_text(encoding="utf-8"))["rows"]
    shown = table(TEXTS["docs/results.md"], "row")
    for row, (name, *figures) in zip(rows, shown, strict=True):
        cases = {(case["mask"], case["backend"]): case for case in row["cases"]}
        assert name.startswith(f"{row['tokens']:,} tokens")
        expected = []
        for mask in ("v2v", "v2v+merge, kernel 3"):
            expected.append(rounded(cases[mask, "flash"]["bound"], 2))
            for backend in ("flash", "sdpa"):
                case = cases.get((mask, backend))
                expected.append("-" if case is None else rounded(case["ratio"]["median"], 2))
        assert figures == expected
    said = on_one_line("docs/results.md")
    flash = [case for row in rows for case in row["cases"] if case["backend"] == "flash"]
    policies = [case["of_bound"] for case in flash if "+merge" not in case["mask"]]
    light = [case["of_bound"] for case in flash if "kernel 3" in case["mask"]]
    assert f"within {rounded(max(policies), 2)} of its bound" in said
    assert f"within {rounded(min(light), 2)} to {rounded(max(light), 2)} of its own" in said


def test_figures_of_memory_in_a_packed_row():
    found = json.loads((RESULTS / "attention_reference.json").read_text(encoding="utf-8"))["rows"]
    [row] = [row for row in found if row["samples"] > 1]
    peaks = {case["mask"]: round(case["peak_mib"]) for case in row["cases"]}
    said = on_one_line("docs/results.md")
    assert f"`v2v` over {row['tokens']:,} packed tokens needs {peaks['v2v']} MiB" in said
    assert f"where causal flash attention alone needs {peaks['causal']};" in said


def test_figures_of_whole_runs():
    names = ("tiny", "25m", "packed")
    shown = {row[0]: row[1:] for row in table(TEXTS["docs/results.md"], "run")}
    for column, name in enumerate(names):
        results = json.loads((RESULTS / f"throughput_{name}.json").read_text(encoding="utf-8"))
        for variant in results["runs"][0]["variants"][1:]:  # the first is stock TRL
            ratio = [rounded(variant["speed_ratio"][key], 2) for key in ("median", "low", "high")]
            assert shown[variant["run"]][column] == "{} [{}, {}]".format(*ratio)


def test_figures_of_the_merge_study():
    path = RESULTS / "merge_study_tiny" / "merge_study.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    loss, text = result["loss"], on_one_line("docs/results.md")
    rows = table(TEXTS["docs/results.md"].replace("| | loss", "| treatment | loss"), "treatment")
    keys = ("causal", "merge", "direct", "control")
    for key, row in zip(keys, rows, strict=True):
        low, high = rounded(loss[key]["low"], 3), rounded(loss[key]["high"], 3)
        assert row[1:] == [rounded(loss[key]["mean"], 3), f"[{low}, {high}]"]
    difference = result["merge_minus_control"]
    assert f"by {rounded(-difference['mean'], 3)} nats" in text
    worse = loss["merge"]["mean"] - loss["causal"]["mean"]
    assert f"by {rounded(worse, 3)} nats" in text
