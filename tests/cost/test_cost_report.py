"""The report page: complete, inert, offline, and there for partial runs; the tables beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects
import pytest
from rich.console import Console

from tael.cost import charts
from tael.cost.ledger import Ledger
from tael.cost.report import write_report
from tael.cost.rundata import read_run
from tael.cost.tables import cost_rows, cost_table
from tael.errors import TaelError


class Page(HTMLParser):
    """Tags with their attributes, figures, and the text outside scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.blocks: dict[str, str] = {}
        self._block: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._block = dict(attrs).get("id") or tag

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._block = None

    def handle_data(self, data):
        if self._block:
            self.blocks[self._block] = self.blocks.get(self._block, "") + data
        else:
            self.text += data

    def figures(self) -> dict[str, dict]:
        return {key: json.loads(value) for key, value in self.blocks.items() if key.startswith("figure-")}


def test_finished_run_shows_all(finished_run, ledger):
    page = Page(write_report(finished_run, ledger))
    assert "text: 1.70 bits per byte; reasoning: 31% after SFT → 89% after RL; total $0.012, 9.3 min" in page.text
    assert "unfinished" not in page.text
    for word in ("5.21M", "2.10M active", "7.7× smaller", "2 sittings", "What is 47 + 38?", "✓ right", "✗ wrong"):
        assert word in page.text
    assert set(page.figures()) == {
        f"figure-{name}-data"
        for name in ("reward-rl", "accuracy", "loss-pretrain", "loss-sft", "balance", "imbalance")
    }


def test_figures_are_valid_plotly_and_have_words(finished_run, ledger):
    page = Page(write_report(finished_run, ledger))
    for figure in page.figures().values():
        data = [{k: v for k, v in trace.items() if k != "choices"} for trace in figure["data"]]
        plotly.graph_objects.Figure(data, figure["layout"])  # raises for an unknown property
    plots = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class") == "plot"]
    assert plots and all(plot["role"] == "img" and len(plot["aria-label"] or "") > 20 for plot in plots)
    headings = [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags)


def test_accuracy_plot_has_wilson_bands(finished_run):
    figure = charts.accuracy_figure(read_run(finished_run))
    assert figure is not None
    low, high, line = figure["data"][:3]
    assert all(a < b < c for a, b, c in zip(low["y"], line["y"], high["y"], strict=True))
    assert line["y"][-1] == pytest.approx(0.89, abs=0.01) and line["x"] == sorted(line["x"])


def test_nothing_is_loaded_from_anywhere(finished_run, ledger):
    page = Page(write_report(finished_run, ledger))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "data", "background"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.blocks["style"] and "@import" not in page.blocks["style"]
    (policy,) = [a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy and policy.count("'sha256-") == 2
    script_policy = policy.split("script-src")[1].split(";")[0]
    assert "unsafe" not in script_policy


def test_hostile_text_stays_text(finished_run, ledger, hostile):
    summary = json.loads((finished_run / "summary.json").read_text())
    (finished_run / "summary.json").write_text(json.dumps(summary | {"name": hostile}))
    (finished_run / "environment.json").write_text(json.dumps({hostile: hostile}))
    (finished_run / "recipe.toml").write_text((finished_run / "recipe.toml").read_text() + f"# {hostile}\n")
    shutil.copytree(finished_run / "sft", finished_run / "<script>x<")
    path = write_report(finished_run, ledger)
    page = Page(path)
    assert sum(tag == "script" and "type" not in attributes for tag, attributes in page.tags) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert page.text.count(hostile) >= 6
    assert "<script>window.pwned" not in path.read_text()
    for figure in page.figures().values():
        assert "<script>" not in json.dumps(figure)


def test_partial_run(pretrain_only):
    page = Page(write_report(pretrain_only, None))
    assert "running / unfinished" in page.text and "so far" in page.text
    assert set(page.figures()) == {"figure-loss-pretrain-data", "figure-imbalance-data", "figure-balance-data"}
    figure = page.figures()["figure-loss-pretrain-data"]
    assert figure["data"][0]["choices"]["steps"][-1] == 150  # the half line is left out
    assert "78.0 s" in page.text and "$0.0017" in page.text


def test_empty_and_missing_directories(tmp_path):
    page = Page(write_report(tmp_path, None))
    assert "No stage has begun yet." in page.text and page.figures() == {}
    with pytest.raises(TaelError, match="no such run"):
        write_report(tmp_path / "absent", None)


def test_strange_lines_do_not_break_the_page(tmp_path, ledger):
    lines = [
        '{"kind":"step","step":1,"loss":NaN,"seconds":"x","reward":1e999}',
        '{"kind":"step","step":2,"loss":"3","tokens":null}',
        '{"kind":"step","step":3,"loss":2.5,"seconds":6.0,"reward":0.5}',
        '{"kind":"step","step":3,"loss":2.25,"seconds":7.0,"reward":0.5}',
        '{"kind":"load","step":3,"layers":[[0,0],["a"],7,[0.5,0.5]]}',
        '{"kind":"eval","step":3,"accuracy":{"free":{"correct":5,"total":3},"think":{"correct":true,"total":1},"direct":7}}',
        '{"kind":"eval","step":3,"accuracy":[1]}',
        "[1,2]",
        "\x00\xff",
        '{"kind":"step","step":true}',
    ]
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "rl" / "samples.jsonl").write_text(
        '{"prompt":5}\n{"answer":["x"],"label":"after"}\n{', encoding="utf-8"
    )
    (tmp_path / "summary.json").write_text('{"finished":"yes","model":[],"accuracy":4}')
    (tmp_path / "recipe.toml").write_text("stages = 3\nprice = 1\n")
    page = Page(write_report(tmp_path, ledger))
    assert "running / unfinished" in page.text
    assert read_run(tmp_path).stages[0].steps[-1]["loss"] == 2.25


def test_the_report_says_what_of_it_is_evaluation(finished_run, ledger, make_entry):
    assert "are evaluation" not in Page(write_report(finished_run, ledger)).text
    ledger.add(make_entry(kind="evaluation", seconds=30.0, dollars=0.5))
    assert "30.0 s and $0.50 of it are evaluation" in Page(write_report(finished_run, ledger)).text


def test_report_without_a_ledger_prices_by_the_recipe(finished_run):
    page = Page(write_report(finished_run, None))
    assert "$0.002" in page.text and "90.0 s" in page.text


def test_tables_fit_80_columns_and_rows_are_numbers(ledger, make_entry):
    ledger.add(
        make_entry(run="[bold]a-rather-long-run-name-[/]", flops=3e24, tokens=14_800_000_000_000, dollars=5.6e6)
    )
    console = Console(width=80, record=True)
    console.print(cost_table(ledger))
    console.print(cost_table(ledger, "demo"))
    text = console.export_text()
    assert "[bold]" in text.replace("\n", "") and "$5,600,000" in text and "14.8T" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    rows = cost_rows(ledger, "demo")
    assert [row["stage"] for row in rows] == ["pretrain", "sft", "rl"] and rows[1]["seconds"] == 120.0
    json.dumps(rows)
    with pytest.raises(TaelError, match="did you mean 'demo'"):
        cost_table(ledger, "dmeo")


def test_tables_of_an_empty_ledger(tmp_path):
    empty = Ledger(tmp_path / "none.sqlite")
    assert cost_rows(empty) == []
    Console(width=80, record=True).print(cost_table(empty))
    with pytest.raises(TaelError, match="empty"):
        cost_table(empty, "demo")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_figure_and_runs_no_hostile_script(finished_run, ledger, tmp_path):
    path = write_report(finished_run, ledger)
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync"
    more = ["--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]
    command = ["chromium", *flags.split(), *more, "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count('class="main-svg"') >= 2 * 6
    assert "<script>window.pwned" not in dom and "<img" not in dom
