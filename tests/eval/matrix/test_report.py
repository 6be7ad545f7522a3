"""The report of a made-up matrix: complete, self-contained, and safe with what models say."""

import csv
import gzip
import io
import json
import re
import time
from html.parser import HTMLParser
from itertools import chain, product

import numpy as np
import pytest
from PIL import Image
from wandb_files import wandb_records

from eval import provenance
from eval.held_out import HeldOut, Question
from eval.matrix import analysis, charts, curves, numbers, published, report, showcase, tracking
from eval.matrix import answers as raw_answers
from eval.matrix.analysis import MatrixRow
from eval.matrix.answers import Answers
from eval.matrix.findings import findings
from eval.tables import Table
from fmtrain.decoding import right
from fmtrain.layout import Layout
from fmtrain.masks import EXAMPLE, allowed
from fmtrain.policies import POLICIES

EVIL = (
    "<script>alert(1)</script><img src=https://example.org/x.png onerror=alert(2)>"
    '" onmouseover="alert(3)\' {{ 7*7 }}'
)
ROWS = [
    MatrixRow("base", "causal", ("tiny",)),
    MatrixRow("causal", "causal", ("c0", "c1")),
    MatrixRow("mma_interleaved", "mma_interleaved", ("m0", "m1")),
]
MASKS = ["causal", "mma_interleaved", "v2v+merge"]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    )


@pytest.fixture(scope="module")
def data() -> HeldOut:
    rows = []
    for task in ("TQA", "count"):
        for k in range(12):
            user = {
                "role": "user",
                "content": [
                    {"type": "image", "text": None},
                    {"type": "text", "text": f"what {EVIL}?"},
                ],
            }
            turns = [user, {"role": "assistant", "content": [{"type": "text", "text": str(k)}]}] * 2
            rows.append(
                {
                    "id": f"{task}-{k}",
                    "source": task,
                    "messages": turns,
                    "images": [noise(k), noise(k + 50)],
                }
            )
    return HeldOut(rows, ".")


@pytest.fixture(scope="module")
def raw(data) -> Answers:
    questions = data.questions
    assert [question.reference for question in questions[:4]] == ["0", "0", "1", "1"]
    rng = np.random.default_rng(0)
    runs = list(chain.from_iterable(row.runs for row in ROWS))
    cells = list(product(runs, MASKS))
    scores = {cell: rng.integers(0, 2, len(questions)).tolist() for cell in cells}
    texts = {}
    for cell in cells:
        pairs = zip(questions, scores[cell])
        texts[cell] = [question.reference if right else EVIL for question, right in pairs]
    return Answers(questions, scores, texts)


@pytest.fixture(scope="module")
def results(data, raw) -> dict:
    made = {"matrix": published.FOLDER / "mma_table1.csv", "training": None}
    return {
        "title": f"Masks {EVIL}",
        **analysis.results(ROWS, MASKS, raw.questions, raw.scores),
        "chance": {"count": 0.2},
        "milebench": None,
        "samples": showcase.showcase(data, ROWS, MASKS, raw, 2),
        "made": provenance.made_with(f"python -m eval.matrix {EVIL}", made),
    }


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_nothing_is_loaded_and_no_script_runs(results):
    html = report.render(results)
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (
                tag,
                attributes,
            )
    assert "@import" not in html and "url(" not in html
    policy = next(
        a["content"]
        for tag, a in page.tags
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_what_models_say_is_shown_as_text(results):
    html = report.render(results)
    assert (
        "<script" not in html
        and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
        and "{{ 7*7 }}" in html
    )
    assert EVIL in Page(html).texts  # an answer, read back whole


def test_every_number_of_the_tables_is_on_the_page(results, tmp_path):
    report.write(tmp_path, results)
    cells_of_page = set(Page((tmp_path / "report.html").read_text()).texts)
    seen = 0
    for name in ("cells.csv", "comparisons.csv"):
        header, *lines = csv.reader(io.StringIO((tmp_path / name).read_text()))
        columns = [
            k
            for k, column in enumerate(header)
            if column
            in ("n", "score", "low", "high", "difference", "p", "p_holm", "better", "worse")
        ]
        for line in lines:
            assert {line[k] for k in columns} <= cells_of_page, line
            seen += len(columns)
    assert seen > 200
    for name in ("results.md", "results.tex"):
        text = (tmp_path / name).read_text()
        for cell in results["cells"]:
            assert f"{cell['score']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]" in text
        for one in results["comparisons"]:
            assert numbers.p_value(one["p_holm"]) in text
    again = json.loads((tmp_path / "results.json").read_text())
    assert report.render(again) == (tmp_path / "report.html").read_text()


def test_samples_show_the_pictures_of_their_turn(results):
    assert [sample["task"] for sample in results["samples"]] == ["TQA", "TQA", "count", "count"]
    for sample in results["samples"]:
        assert len(sample["images"]) == sample["turn"] + 1
        assert set(sample["answers"]) == {row.name for row in ROWS} and set(
            sample["answers"]["base"]
        ) == set(MASKS)
    html = report.render(results)
    for sample in results["samples"]:
        assert all(image in html for image in sample["images"])


def test_sections_follow_what_there_is(results):
    html = report.render(results)
    for text in (
        "Mask by mask",
        "Sample answers",
        "2 training runs a row",
        "from variance components",
        "n 48 × 2 runs",
        "trained with the mask",
    ):
        assert text in html, text
    one = {**results, "samples": []}
    assert "Sample answers" not in report.render(one)


def test_curves_are_on_the_page_where_runs_measured_some(results):
    raw = {}
    for k, run in enumerate(chain.from_iterable(row.runs for row in ROWS[1:])):
        raw[run] = {"exact": [[0, 0.0], [50, 0.1 * k], [100, 0.3 * k]], "loss": [[50, 2.0 - k / 4]]}
    found = curves.results(ROWS, raw)
    page = Page(report.render(results | found))
    titles = [text for text in page.texts if text.endswith(("exact answers, percent", "a token"))]
    assert len([text for text in titles if text.startswith("mma_interleaved: ")]) == 2
    for text in chain.from_iterable(curves.table(found["curves"])):
        assert text in page.texts, text
    assert ("section", {"id": "curves"}) in page.tags
    assert ("section", {"id": "curves"}) not in Page(report.render(results)).tags


def test_the_first_paragraph_is_the_primary_family_in_words(results):
    [brought, beside, rest] = findings(results)
    one = next(
        one
        for one in results["comparisons"]
        if one["family"] == "primary" and one["kind"] == "inference-only"
    )
    figure = f"{100 * one['difference']:+.1f}".replace("-", "\N{MINUS SIGN}")
    assert brought.endswith(f": no difference is shown for mma_interleaved ({figure}).")
    assert beside.startswith("Trained and run with the mask") and "2 comparisons" in rest
    assert "the 2 training runs of a row" in rest
    carried = [one | {"carried": True, "difference": -0.5} for one in results["comparisons"]]
    assert "worse for mma_interleaved (−50.0)" in findings({**results, "comparisons": carried})[0]
    page = report.render(results)
    assert brought.replace("+", "&#43;") in page and "−0.0" not in page
    [nothing] = findings({**results, "comparisons": []})
    assert nothing.startswith("No row was trained causally")


def rendered_alone(results: dict) -> str:
    """The page of results with nothing beside them."""
    nothing = {"title": "", "milebench": None, "chance": {}, "samples": []}
    return report.render({**nothing, "made": provenance.made_with("", {}), **results})


def test_one_run_a_row_is_said_to_take_the_seed_as_given(data, raw):
    rows = [MatrixRow(row.name, row.mask, row.runs[:1]) for row in ROWS]
    results = analysis.results(rows, MASKS, raw.questions, raw.scores)
    assert "nothing here says that another seed would agree" in findings(results)[-1]
    page = rendered_alone(results)
    assert "the seed is taken as given" in page and "each dot one training run" not in page


def test_every_run_is_a_dot(results):
    """Of the forest plot, and of every chart of scores: five masks and rows, two runs each."""
    for _, chart in report.forests(results):
        assert chart.count('class="run"') == 2 and chart.count('class="whisker"') == 1
    for name in ("overall", "TQA", "count"):
        chart = report.score_chart(results, name)
        assert chart.count('class="run"') == 3 * 1 + 4 * 2  # base; causal twice, itself
        assert chart.count('class="whisker"') == 7
        assert ('class="chance"' in chart) == (name == "count")


def test_a_single_task_is_on_the_page_once(data, raw):
    of_task = [k for k, question in enumerate(raw.questions) if question.task == "count"]
    scores = {cell: [values[k] for k in of_task] for cell, values in raw.scores.items()}
    results = analysis.results(ROWS, MASKS, [raw.questions[k] for k in of_task], scores)
    page = rendered_alone(results)
    assert page.count('class="heat"') == 2 and 'id="tasks"' not in page
    assert "overall" not in page.partition("</style>")[2].lower()


def test_differences_have_the_same_colour_in_all_maps(results):
    """Whatever the largest one in a map is; the larger, the further from the ground."""
    for name in numbers.names(results):
        rows, compared = (
            report.heat_map(results, name)["rows"],
            report.comparisons_of(results, name),
        )
        for row, mask in product(range(3), range(3)):
            one = compared.get(("causal-causal", ROWS[row].name, MASKS[mask]))
            difference = one["difference"] if one else 0.0
            assert rows[row]["changes"][mask]["style"] == charts.change(difference)
    shades = [charts.change(value / 100) for value in range(0, 51, 5)]
    grounds = [int(shade[5:7], 16) for shade in shades]  # red falls towards blue
    assert grounds == sorted(grounds, reverse=True) and len(set(grounds)) == 11
    assert charts.change(0.7) == shades[-1]


def test_axes_hold_their_values():
    for low, high in ((0.0, 0.93), (-0.004, 0.012), (0.0, 0.0), (-0.62, 0.1), (0.0, 1.0)):
        ticks = charts.ticks(low, high)
        assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
        assert 2 <= len(ticks) <= 7 and ticks == sorted(ticks)


def test_where_two_pictures_differ():
    before = Image.fromarray(np.zeros((24, 24, 3), np.uint8))
    after = before.copy()
    after.paste((255, 0, 0), (8, 16, 14, 24))
    assert showcase.changed_part([before, after]) == pytest.approx([1 / 3, 2 / 3, 1 / 4, 1 / 3])
    assert showcase.changed_part([before, before]) is None
    assert showcase.changed_part([before, after, after]) is None
    assert showcase.changed_part([noise(1), noise(2)]) is None  # all of it
    assert showcase.changed_part([before, after.resize((48, 48))]) is None


def test_masks_are_drawn_as_they_are():
    layout = Layout.parse(EXAMPLE)
    causal = int(allowed("causal", layout).sum())
    for name in POLICIES:
        drawn, pairs = charts.mask_picture(name), int(allowed(name, layout).sum())
        assert drawn.count('class="past"') == causal and "pooled" not in drawn
        assert drawn.count('class="past"') + drawn.count('class="revealed"') == pairs
        if name == "causal":
            continue
        light = charts.mask_picture(f"{name}+merge")  # attends as causal does, pools the others
        assert light.count('class="past"') == causal == int(allowed(f"{name}+merge", layout).sum())
        assert light.count('class="pooled"') == pairs - causal and "revealed" not in light


def test_the_legend_of_a_light_form_is_there_when_one_is_drawn(results):
    assert 'class="swatch pooled"' in report.render(results)
    without = {**results, "masks": ["causal", "mma_interleaved"]}
    without["cells"] = [cell for cell in results["cells"] if cell["mask"] != "v2v+merge"]
    without["comparisons"] = [one for one in results["comparisons"] if one["mask"] != "v2v+merge"]
    assert 'class="swatch pooled"' not in report.render({**without, "samples": []})


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


@pytest.mark.parametrize("part", np.linspace(-1, 1, 41))
def test_text_on_every_colour_can_be_read(part):
    for css in (charts.heat(abs(part)), charts.change(part)):
        for suffix in ("", "d"):
            colour = bytes.fromhex(re.search(rf"--b{suffix}:#(\w+)", css)[1])
            ink = 1.0 if f"--t{suffix}:#fff" in css else 0.0
            assert contrast(charts.luminance(tuple(colour)), ink) >= 4.5


def test_heat_maps_are_ordered_by_lightness():
    """What is told apart without colour vision."""
    for theme in (0, 1):
        lightness = [
            charts.luminance(charts.mix(charts.LOW[theme], charts.HIGH[theme], k / 20))
            for k in range(21)
        ]
        assert lightness in (sorted(lightness), sorted(lightness, reverse=True))


def test_latex_and_markdown_escape():
    table = Table("a_b", ["x|y", "n"], [["50 % & {c} \\ #_^~$", "1"]], bold={(0, 1)})
    assert (
        r"50 \% \& \{c\} \textbackslash{} \#\_\textasciicircum{}\textasciitilde{}\$ & \textbf{1} \\"
        in table.as_latex()
    )
    assert r"x\|y" in table.as_markdown() and "**1**" in table.as_markdown()


def test_published_tables_are_complete():
    tables = {table.name: table for table in published.tables()}
    assert {name: (len(t.rows), len(t.header) - t.keys) for name, t in tables.items()} == {
        "futuremask_table4": (14, 13),
        "futuremask_table6_latency": (3, 2),
        "mma_table1": (9, 12),
    }
    for table in tables.values():
        assert "arXiv" in table.source and all(len(row) == len(table.header) for row in table.rows)
        for row in table.rows:
            assert all(float(text) > 0 for text in row[table.keys :])


def test_numbers_of_the_user_stand_beside_published_ones(results, tmp_path):
    html = report.render(results)
    score = next(
        c["score"]
        for c in results["cells"]
        if (c["task"], c["row"], c["mask"]) == ("TQA", "causal", "causal")
    )
    assert (
        "causal / causal" in html and f"{score:.3f}" in html
    )  # TQA is a column of the paper's table
    (tmp_path / "mine.csv").write_text("configuration,MMB,POPE\nours,12.5,99.25\n")
    html = report.render(results, {"mma_table1": str(tmp_path / "mine.csv")})
    assert "yours: ours" in html and "99.25" in html
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv: has none of the columns MME_P"):
        report.render(results, {"mma_table1": str(tmp_path / "other.csv")})
    with pytest.raises(ValueError, match="unknown published table 'mma'"):
        report.render(results, {"mma": str(tmp_path / "mine.csv")})


def test_every_figure_is_computed_again_from_the_answers(results, raw, tmp_path, capsys):
    raw_answers.write(tmp_path, raw)
    poor = {**results, "cells": [], "comparisons": []}
    (tmp_path / "results.json").write_text(json.dumps(poor))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    again = tmp_path / "again"
    assert sorted(path.name for path in again.iterdir()) == [
        "cells.csv",
        "comparisons.csv",
        "report.html",
        "results.json",
        "results.md",
        "results.tex",
    ]
    assert json.loads((again / "results.json").read_text()) == json.loads(json.dumps(results))
    capsys.readouterr()
    assert report.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_stored_figures_are_those_of_the_stored_answers():
    for path in sorted((published.FOLDER.parent / "results").glob(f"*/{raw_answers.NAME}")):
        raw = raw_answers.read(path.parent)
        for cell, texts in raw.texts.items():
            pairs = zip(texts, raw.questions, strict=True)
            assert raw.scores[cell] == [right(text, one.reference) for text, one in pairs]
        again = json.dumps(report.compute_again(path.parent))
        again, stored = map(rounded, (again, (path.parent / "results.json").read_text()))
        assert again["cells"] == stored["cells"], path
        assert again["comparisons"] == stored["comparisons"], path


def rounded(text: str) -> dict:
    """Of JSON; the last digits of sums are the machine's."""
    return json.loads(text, parse_float=lambda figure: round(float(figure), 9))


def test_answers_come_back_and_their_file_is_the_same_every_time(raw, tmp_path):
    raw_answers.write(tmp_path / "one", raw)
    raw_answers.write(tmp_path / "two", raw)
    one, two = (tmp_path / name / raw_answers.NAME for name in ("one", "two"))
    assert raw_answers.read(tmp_path / "one") == raw and one.read_bytes() == two.read_bytes()
    lines = gzip.open(one, "rt").read().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == len(raw.questions) and first["reference"] == "0"
    assert first["answers"]["c1"]["v2v+merge"] == raw.texts["c1", "v2v+merge"][0]
    scored = Answers(raw.questions, raw.scores)  # of MileBench: no texts
    raw_answers.write(tmp_path / "scored", scored)
    assert raw_answers.read(tmp_path / "scored") == scored
    one.write_bytes(one.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"answers\.jsonl\.gz: cannot be read"):
        raw_answers.read(tmp_path / "one")
    lines[3] = json.dumps(json.loads(lines[3]) | {"answers": {}})
    two.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(ValueError, match="under causal has 47 of 48 questions"):
        raw_answers.read(tmp_path / "two")


def test_answers_with_any_end_of_line_come_back(tmp_path):
    """Unicode has more of them than JSON escapes."""
    [text] = texts = ["a\u2028b\x85c\u2029d\x0be\x1cf\r\ng"]
    raw = Answers([Question("count", "0", text, text)], {("c", "causal"): [1]})
    raw = Answers(raw.questions, raw.scores, {("c", "causal"): texts})
    raw_answers.write(tmp_path, raw)
    assert raw_answers.read(tmp_path) == raw


def _media(records) -> dict[str, str]:
    """Path of each logged file by its key."""
    paths = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                if item.nested_key[-1] == "path":
                    paths[item.nested_key[0]] = json.loads(item.value_json)
    return paths


def test_wandb_offline_without_a_key(results, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    report.write(tmp_path / "out", results)
    tracking.log(results, tmp_path / "out")
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged, deadline = {}, time.monotonic() + 30
    while (
        "report" not in logged or "cells" not in logged
    ):  # W&B's own process may still be writing the end of the file
        assert time.monotonic() < deadline, f"logged: {sorted(logged)}"
        logged |= _media(wandb_records(file))
    media = file.parent / "files"
    table = json.loads((media / logged["cells"]).read_text())
    scores = [row[table["columns"].index("score")] for row in table["data"]]
    assert scores == pytest.approx([cell["score"] for cell in results["cells"]])
    assert len(json.loads((media / logged["comparisons"]).read_text())["data"]) == len(
        results["comparisons"]
    )
    for task in ("overall", "TQA", "count"):
        assert Image.open(media / logged[f"heat_map/{task}"]).width > 300
    samples = json.loads((media / logged["samples"]).read_text())
    assert len(samples["data"]) == 4
    assert any(EVIL in row for row in samples["data"])
    assert (media / logged["report"]).read_text() == (tmp_path / "out" / "report.html").read_text()
