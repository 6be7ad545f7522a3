"""The report of a made-up matrix: complete, self-contained, and safe with what models say."""

import csv
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
from eval.held_out import HeldOut
from eval.matrix import analysis, charts, published, report, showcase, tracking
from eval.matrix.analysis import MatrixRow
from eval.tables import Table
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
def results() -> dict:
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
    data = HeldOut(rows, ".")
    questions = data.questions
    assert [question.reference for question in questions[:4]] == ["0", "0", "1", "1"]
    rng = np.random.default_rng(0)
    runs = list(chain.from_iterable(row.runs for row in ROWS))
    cells = list(product(runs, MASKS))
    scores = {cell: rng.integers(0, 2, len(questions)).tolist() for cell in cells}
    answers = {
        cell: [
            question.reference if right else EVIL
            for question, right in zip(questions, scores[cell])
        ]
        for cell in cells
    }
    shown = showcase.showcase(data, ROWS, MASKS, scores, answers, 2)
    results = {
        "title": f"Masks {EVIL}",
        **analysis.results(ROWS, MASKS, questions, scores),
        "samples": shown,
    }
    return results | {
        "made": provenance.made_with(
            f"python -m eval.matrix {EVIL}",
            {"matrix": published.FOLDER / "mma_table1.csv", "training": None},
        )
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
            assert f"{one['p_holm']:.3g}" in text
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
        "with all runs of a question as one unit",
        "24 × 2",
        "trained with the mask",
    ):
        assert text in html, text
    one = {**results, "samples": []}
    assert "Sample answers" not in report.render(one)


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


def test_the_command_renders_again(results, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert report.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "again")]) == 0
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "cells.csv",
        "comparisons.csv",
        "report.html",
        "results.json",
        "results.md",
        "results.tex",
    ]
    capsys.readouterr()
    assert report.main([str(tmp_path / "none.json")]) == 2 and capsys.readouterr().err.startswith(
        "error: "
    )


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
    assert len(table["data"]) == len(results["cells"]) and table["data"][0][6] == pytest.approx(
        results["cells"][0]["score"], abs=5e-5
    )
    assert len(json.loads((media / logged["comparisons"]).read_text())["data"]) == len(
        results["comparisons"]
    )
    for task in ("overall", "TQA", "count"):
        assert Image.open(media / logged[f"heat_map/{task}"]).width > 300
    samples = json.loads((media / logged["samples"]).read_text())
    assert len(samples["data"]) == 4
    assert any(EVIL in row for row in samples["data"])
    assert (media / logged["report"]).read_text() == (tmp_path / "out" / "report.html").read_text()
