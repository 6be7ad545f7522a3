"""The documents say what is there: links, commands, files, options, figures, tables, pictures."""

import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fmtrain
from eval import coverage, held_out
from fmtrain import policies
from fmtrain.layout import Role
from fmtrain.training.recipe import parser

ROOT = Path(__file__).parent.parent
DOCS = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
COMMANDS = ("train", "audit", "export", "chat", "preview", "policies")  # of `fmtrain`
RESULTS = ROOT / "eval" / "results"


def without_history(name: str) -> str:
    """The text of a document; of the changelog without its column of what was before."""
    text = TEXTS[name]
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.M) if name == "CHANGELOG.md" else text


def blocks(name: str, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of these languages ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[name], flags=re.M | re.S)
    return [body for language, body in fenced if language in languages]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, blanks as dashes, other marks dropped."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(file: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.M)}


def table(text: str, first_header: str) -> list[list[str]]:
    """The body of the Markdown table whose first column is headed so, cell by cell."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first_header} |"):
            next(lines)
            break
    else:
        raise AssertionError(f"no table with a first column {first_header!r}")
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def rounded(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def shows(figure: str, value: float) -> bool:
    """Whether a figure is the value, rounded to the figure's digits; of a half to either side."""
    digits = len(figure.partition(".")[2])
    return abs(float(figure) - value) <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    relative = [link for link in links if not link.startswith(("http://", "https://"))]
    assert relative or name == "CHANGELOG.md"
    for link in relative:
        target, _, fragment = link.partition("#")
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), f"{name}: {link}"
        if fragment:
            assert fragment in anchors(file), f"{name}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_are_named_exist(name):
    text = without_history(name)
    run = set(re.findall(r"python -m ([\w.]+)", text)) - {"pytest"}
    spelt = set(re.findall(r"`((?:fmtrain|eval|data_prep)(?:\.\w+)+)[`(]", text))
    for module in sorted(run):
        assert importlib.util.find_spec(module), f"{name}: python -m {module}"
    for dotted in sorted(spelt):
        assert module_or_attribute(dotted), f"{name}: {dotted}"


def module_or_attribute(dotted: str) -> bool:
    """Whether a dotted name is a module, or something that the module before its last dot has."""
    home, _, attribute = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:  # what stands before the last dot is a module, not a package
        pass
    return hasattr(importlib.import_module(home), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    folders = "recipes|docs|eval|fmtrain|data_prep|tests"
    paths = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w/?)", without_history(name))
    for path in sorted(set(paths)):
        written = ROOT / path.replace("NAME.", "vsr.").replace("NAME", "vsr")
        assert written.exists(), f"{name}: {path}"


def test_the_command_has_its_parts_and_no_document_names_another(capsys):
    for name in NAMES:
        for block in blocks(name, "bash"):
            for part in re.findall(r"(?:^|&& )fmtrain (\w+)", block, flags=re.M):
                assert part in COMMANDS, f"{name}: fmtrain {part}"
    assert importlib.import_module("fmtrain.__main__").main(["--help"]) == 0
    shown = capsys.readouterr().out
    for part in COMMANDS:
        assert re.search(rf"^ *fmtrain {part}\b", shown, flags=re.M), shown


def command_lines() -> list[tuple[str, str]]:
    """(module, option) of every `python -m MODULE ... --option` in a block of commands."""
    pairs = set()
    for name in NAMES:
        for block in blocks(name, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[1:2] == ["-m"] and words[2] != "pytest":
                    options = [word.partition("=")[0] for word in words if word.startswith("--")]
                    pairs |= {(words[2], option) for option in options}
    return sorted(pairs)


@pytest.mark.parametrize(("module", "option"), command_lines())
def test_options_that_are_shown_exist(module, option, capsys, monkeypatch):
    if module == "eval.several_masks" and option not in ("--masks", "--seeds", "--out"):
        keys = {action.dest for action in parser()._actions}
        assert option.removeprefix("--") in keys  # an override of its recipe
        return
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    assert exit.value.code == 0
    assert re.search(rf"(?<![\w-]){option}(?![\w-])", capsys.readouterr().out)


def test_the_readme_is_short_and_documents_are_not_wide():
    assert len(TEXTS["README.md"].splitlines()) <= 125
    for name in NAMES:
        for number, line in enumerate(TEXTS[name].splitlines(), start=1):
            wide = 180 if line.startswith("|") else 120  # a table's line cannot be broken
            assert len(line) <= wide, f"{name}:{number} has {len(line)} characters"


def test_every_line_of_what_could_be_lost_has_its_test():
    lines = [line for line in TEXTS["docs/nothing_silent.md"].splitlines() if line[:2] == "| "]
    rows = [line for line in lines if "`test_" in line]
    assert len(rows) == len(lines) - len([line for line in lines if line.endswith("| test |")])
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for line in rows:
        [name] = re.findall(r"`(test_\w+)`", line)
        assert any(f"def {name}(" in source for source in sources), name


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    [code] = blocks("README.md", "python")
    (tmp_path / "llava7b-v2v").symlink_to(ROOT / "fmtrain" / "tiny_llava")
    noise = np.random.default_rng(0)
    for picture in re.findall(r"[\w-]+\.png", code):
        pixels = noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / picture)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    prompt = names["encoded"].inputs["input_ids"].shape[1]
    assert names["tokens"].shape[1] > prompt


def results_of(matrix: str) -> dict:
    """What a matrix found, as shipped."""
    return json.loads((RESULTS / matrix / "results.json").read_text(encoding="utf-8"))


def scores_of(matrix: str, task: str, count: int = 8 * 7) -> dict[tuple[str, str], float]:
    """Exact answers by (mask in training, mask in inference), as shipped: so many."""
    results = results_of(matrix)
    cells = [cell for cell in results["cells"] if cell["task"] == task]
    assert len(cells) == count
    return {(cell["row"], cell["mask"]): cell["score"] for cell in cells}


def seeds_of(matrix: str) -> dict[tuple[str, str], list[float]]:
    results = results_of(matrix)
    return {(cell["row"], cell["mask"]): cell["by_run"] for cell in results["cells"]}


def comparisons_of(matrix: str, task: str) -> list[dict]:
    """With the cell that was trained and run causally."""
    results = results_of(matrix)
    kind = "causal-causal"
    return [x for x in results["comparisons"] if (x["kind"], x["task"]) == (kind, task)]


def own_mask(comparison: dict) -> bool:
    """Whether it is of a row under the mask that it was trained with."""
    return comparison["row"] == comparison["mask"]


def told_of_experiment(number: int) -> str:
    """Its section, on one line."""
    section = TEXTS["docs/experiments.md"].split(f"\n## {number}. ")[1].split("\n## ")[0]
    return " ".join(section.split())


def signed(found: dict, mean: str = "value") -> str:
    """A difference of shares in points, with its interval."""
    return "{:+.1f} [{:.1f}, {:.1f}]".format(*(100 * found[key] for key in (mean, "low", "high")))


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
    scores, text = overall(), " ".join(TEXTS["README.md"].split())
    masks = ("v2v", "future", "prefix_lm", "v2t", "mma_interleaved", "image")
    costs = [scores["base", "causal"] - scores["base", mask] for mask in masks]
    said = re.search(r"at inference only costs (\d+) to (\d+) points", text)
    assert said.groups() == (rounded(100 * min(costs), 0), rounded(100 * max(costs), 0))
    trained, causal = re.search(
        r"over causal training \((0\.\d+) against (0\.\d+)\)", text
    ).groups()
    assert shows(trained, scores["v2v", "v2v"]) and shows(causal, scores["causal", "causal"])
    [later] = re.findall(r"causal training gets there too \((0\.\d+)\)", text)
    assert shows(later, scores_of("tiny", "changed")["base", "causal"])
    gains = scores_of("learning", "changed")
    for mask in ("image", "v2t", "mma_interleaved"):
        assert gains[mask, mask] - gains["causal", "causal"] < 0.005


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
    said = " ".join(TEXTS["docs/results.md"].split())
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


@pytest.mark.parametrize("name, p", [("learning_longer", 0.16), ("learning_confirmed", 0.008)])
def test_figures_of_more_steps(name, p):
    results = results_of(name)
    said = " ".join(TEXTS["docs/results.md"].split())
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
        interval = "{:.1f} [{:.1f}, {:.1f}]"
        points = [100 * primary[key] for key in ("difference", "low", "high")]
        assert f"+{interval.format(*points)}, p {p}" in said
        readme = " ".join(TEXTS["README.md"].split())
        assert f"`v2v` reaches {v2v / 100:.3f}, causal {causal / 100:.3f} (five seeds, p" in readme


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
    mean, half = less.mean(), 2.776 * less.std(ddof=1) / 5**0.5  # Student's t, 4 degrees of freedom
    assert (apart["v2v", "low"][0], apart["v2v", "low"][-1]) == (325, 500)
    assert len(apart["v2v", "low"]) == 5 and len(apart["causal", "low"]) == 1
    for name in ("docs/results.md", "docs/experiments.md"):
        said = " ".join(TEXTS[name].split())
        assert re.search(
            rf"{mean:.3f} nats a token lower[^.]*\[{mean - half:.3f}, {mean + half:.3f}", said
        )


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
    ("number", "matrix"), [(6, "learning_pick"), (8, "learning_ahead"), (8, "learning_question")]
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
    said, readme = told_of_experiment(8), " ".join(TEXTS["README.md"].split())
    results = " ".join(TEXTS["docs/results.md"].split())
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


def test_figures_of_pictures_drawn_anew():
    said, told = told_of_experiment(12), " ".join(TEXTS["docs/results.md"].split())
    shares = {}
    for task in ("changed", "redrawn"):
        scores = scores_of("learning_redrawn", task, count=3 * 2)
        shares[task] = {mask: f"{100 * scores[mask, mask]:.1f}" for mask in ("causal", "v2v")}
    first, then = shares["changed"], shares["redrawn"]
    assert f"`v2v` falls from {first['v2v']} to {then['v2v']} %" in said
    assert f"causal training from {first['causal']} to {then['causal']} %" in said
    assert f"answer {then['v2v']} % with `v2v` and {then['causal']} % causally" in told
    [found] = [each for each in comparisons_of("learning_redrawn", "redrawn") if own_mask(each)]
    assert signed(found, "difference") in said and signed(found, "difference") in told
    assert round(found["p"], 3) == 0.002


def test_figures_of_two_masks_in_one_model():
    said, told = told_of_experiment(10), " ".join(TEXTS["docs/results.md"].split())
    scores = scores_of("learning_several", "changed", count=5 * 2)
    shares = {pair: f"{100 * score:.1f}" for pair, score in scores.items()}
    first, then = ([shares[f"both_{n}", mask] for mask in ("v2v", "causal")] for n in (300, 600))
    assert "{} % under `v2v` and {} % under `causal`".format(*first) in told
    assert "600 steps {} and {}.".format(*then) in told
    assert f"{then[1]} % under `causal`, and {then[0]} % under `v2v`" in said
    assert f"`v2v` alone {shares['v2v', 'v2v']} %" in said
    asked = {("both_300", "v2v"), ("both_300", "causal"), ("both_600", "causal")}
    for each in comparisons_of("learning_several", "changed"):
        if (each["row"], each["mask"]) in asked:
            assert signed(each, "difference") in said
    again, first = seeds_of("learning"), seeds_of("learning_several")  # the same runs once more
    for pair in (("causal", "causal"), ("causal", "v2v"), ("v2v", "causal"), ("v2v", "v2v")):
        assert first[pair] == again[pair]


def test_figures_of_the_control():
    said = told_of_experiment(6)
    scores = {pair: f"{100 * x:.1f}" for pair, x in scores_of("learning_pick", "pick4", 12).items()}
    assert f"({scores['v2v', 'causal']} against {scores['v2v', 'v2v']} %)" in said
    assert f"({scores['causal', 'causal']} and {scores['causal', 'v2v']} %)" in said


def test_figures_of_depth():
    found = json.loads((RESULTS / "learning_depth" / "depth.json").read_text(encoding="utf-8"))
    said, told = told_of_experiment(7), " ".join(TEXTS["docs/results.md"].split())
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
    assert gains.min() > 0 and bases[2]["seed"] == 2 and f"gains as much ({gains[2]:.1f})" in said
    mean, half = gains.mean(), 2.306 * gains.std(ddof=1) / 3  # Student's t, 8 degrees
    interval = f"[{mean - half:.1f}, {mean + half:.1f}]"
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


def test_figures_of_the_light_forms():
    results = results_of("learning_light")
    cells = {(cell["row"], cell["mask"]): 100 * cell["score"] for cell in results["cells"]}
    light = ("v2v+merge", "future+merge", "prefix_lm+merge")
    said = " ".join(TEXTS["docs/results.md"].split())
    apart = {}
    for each in results["comparisons"]:
        if each["kind"] == "causal-causal":
            figures = [100 * each[key] for key in ("difference", "low", "high")]
            apart[each["row"], each["mask"]] = "{:+.1f} [{:.1f}, {:.1f}]".format(*figures)
    first, *others = (rounded(cells[name, name], 1) for name in light)
    causal = rounded(cells["causal", "causal"], 1)
    assert f"`v2v+merge` {first} against causal {causal} ({apart[light[0], light[0]]})" in said
    assert f"`future+merge` {others[0]}, `prefix_lm+merge` {others[1]}" in said
    costs = [cells["causal", "causal"] - cells["causal", name] for name in light]
    assert f"they cost {min(costs):.1f} to {max(costs):.1f} points" in said
    verdicts = " ".join(TEXTS["docs/experiments.md"].split())
    for name in light:
        assert apart["causal", name] in verdicts


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
    said = " ".join(TEXTS["docs/results.md"].split())
    flash = [case for row in rows for case in row["cases"] if case["backend"] == "flash"]
    policies = [case["of_bound"] for case in flash if "+merge" not in case["mask"]]
    light = [case["of_bound"] for case in flash if "kernel 3" in case["mask"]]
    assert f"within {rounded(max(policies), 2)} of its bound" in said
    assert f"within {rounded(min(light), 2)} to {rounded(max(light), 2)} of its own" in said


def test_figures_of_memory_in_a_packed_row():
    found = json.loads((RESULTS / "attention_reference.json").read_text(encoding="utf-8"))["rows"]
    [row] = [row for row in found if row["samples"] > 1]
    peaks = {case["mask"]: round(case["peak_mib"]) for case in row["cases"]}
    said = " ".join(TEXTS["docs/results.md"].split())
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
    loss, text = result["loss"], " ".join(TEXTS["docs/results.md"].split())
    rows = table(TEXTS["docs/results.md"].replace("| | loss", "| treatment | loss"), "treatment")
    keys = ("causal", "merge", "direct", "control")
    for key, row in zip(keys, rows, strict=True):
        low, high = rounded(loss[key]["low"], 3), rounded(loss[key]["high"], 3)
        assert row[1:] == [rounded(loss[key]["mean"], 3), f"[{low}, {high}]"]
    difference = result["merge_minus_control"]
    assert f"by {rounded(-difference['mean'], 3)} nats" in text
    worse = loss["merge"]["mean"] - loss["causal"]["mean"]
    assert f"by {rounded(worse, 3)} nats" in text


def sees(name: str, role: Role) -> str:
    """What a token of a role sees ahead under a policy, in README's words."""
    policy = fmtrain.POLICIES[name]
    keys = {key for query, key in policy.reveals if query == role}
    if policy.within_image and keys == {Role.VISUAL}:
        return "its own image"
    words = {Role.VISUAL: "images", Role.TEXT: "text"}
    return ", ".join(word for key, word in words.items() if key in keys)


def test_the_readmes_table_of_policies():
    shown = table(TEXTS["README.md"], "name")
    assert [row[0].strip("`") for row in shown] == list(fmtrain.POLICIES)
    for name, image, text, _ in shown:
        assert image == sees(name.strip("`"), Role.VISUAL), name
        assert text == sees(name.strip("`"), Role.TEXT), name


def test_the_designs_table_of_policies():
    shown = table(TEXTS["docs/design.md"], "name")
    assert [row[0].strip("`") for row in shown] == list(fmtrain.POLICIES)
    for name, pairs, _ in shown:
        policy = fmtrain.POLICIES[name.strip("`")]
        found = {f"{query.name[0]}->{key.name[0]}" for query, key in policy.reveals}
        assert set(re.findall(r"[TV]->[TV]", pairs)) == found
        assert ("inside one image" in pairs) == policy.within_image
        assert ("nothing" in pairs) == (not found)


def test_pictures_are_what_the_command_prints(capsys):
    from fmtrain.policies.__main__ import main

    shown = [block for block in blocks("docs/design.md", "") if block.startswith("$ ")]
    assert len(shown) == 2
    for block in shown:
        command, _, picture = block.partition("\n")
        words = shlex.split(command)
        assert words[:4] == ["$", "python", "-m", policies.__name__]
        assert main(words[4:]) == 0
        assert picture == capsys.readouterr().out


def test_the_record_is_what_a_checkpoint_carries():
    [record] = blocks("docs/design.md", "json")
    assert json.loads(record) == fmtrain.Mask.parse("v2v+merge").record()


def test_sections_of_the_design_that_code_and_tests_cite_exist():
    sections = set(re.findall(r"^## (\d+)\. ", TEXTS["docs/design.md"], flags=re.M))
    cited = set()
    for folder in ("fmtrain", "eval", "data_prep", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for numbers in re.findall(r"DESIGN (\d+(?:(?:, | and )\d+)*)", file.read_text()):
                cited |= set(re.findall(r"\d+", numbers))
    assert cited and cited <= sections
