"""The files of a report: equal figures everywhere, a page that needs nothing, pictures that can be seen."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defaker_opt.benchmarks import Locator
from defaker_opt.drift.validate import Comparison, PairedRun
from defaker_opt.errors import DefakerError
from defaker_opt.limits import Limit
from defaker_opt.report.gallery import MOST_PICTURES, Picture, pick_pictures
from defaker_opt.report.html import report_as_html
from defaker_opt.report.judge import judge
from defaker_opt.report.markdown import report_as_markdown
from defaker_opt.report.plots import draw_plots
from defaker_opt.report.values import DriftReport, Refit
from defaker_opt.report.words import NAMES, answer_lines, points
from defaker_opt.report.write import write_report
from tests.drift_rows import HEIGHT, WIDTH, comparison_of, flip, paired, same, synthetic_rows

LIMITS = {"verdict_accuracy": Limit(0.005), "mask_iou": Limit(0.005)}
NASTY = "<script>alert(1)</script>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("pictures")
    rows = synthetic_rows(60, seed=2)
    random = np.random.default_rng(0)
    for row in rows:
        pixels = random.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{row.key}.png")
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:4] = 255
        Image.fromarray(mask).save(folder / f"{row.key}-mask.png")

    def run(every: int, perturbation: str = "none") -> PairedRun:
        made = paired(
            rows, lambda place, row: flip(row) if place % every == 0 else row, name=NASTY, perturbation=perturbation
        )
        items = tuple(
            dataclasses.replace(
                item,
                image=Locator(folder / f"{item.key}.png"),
                mask=Locator(folder / f"{item.key}-mask.png") if item.label else None,
            )
            for item in made.run.benchmark.items
        )
        benchmark = dataclasses.replace(made.run.benchmark, items=items, problems=(f"{NASTY}: unreadable",))
        sides = [
            dataclasses.replace(side, run=dataclasses.replace(side.run, benchmark=benchmark))
            for side in (made.reference, made.candidate)
        ]
        return PairedRun(*sides)

    return comparison_of([run(10), run(7, "jpeg-70"), run(9, "blur-1")], folder, [paired(rows[:40], same)])


@pytest.fixture(scope="module")
def report(comparison: Comparison) -> DriftReport:
    fit = Refit(NASTY, 128, 0.43, 0.5, 0.05, 0.09, 0.05, 1.25, "", "")
    return dataclasses.replace(judge(comparison, LIMITS), refit=fit)


@pytest.fixture(scope="module")
def pictures(comparison: Comparison) -> tuple[Picture, ...]:
    return pick_pictures(comparison.runs)


@pytest.fixture(scope="module")
def folder(
    report: DriftReport,
    comparison: Comparison,
    pictures: tuple[Picture, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    assert write_report(report, comparison, pictures, folder) == folder / "report.html"
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, and whether they are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_all_files_are_there_and_nothing_else(folder: Path, comparison: Comparison) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md", "rows.csv"]
    with (folder / "rows.csv").open(newline="") as stream:
        assert len(list(csv.reader(stream))) == 1 + 3 * 120


def test_json_markdown_and_page_have_equal_figures(folder: Path, report: DriftReport) -> None:
    data = json.loads((folder / "report.json").read_text())
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert data["decision"] == report.decision
    assert data["pooled"]["flips"]["flips"] == report.pooled.flips.flips == 12
    assert len(data["suites"][0]["figures"]) == len(NAMES)
    for figure in data["suites"][0]["figures"]:
        row = next(line for line in markdown.splitlines() if line.startswith(f"| {NAMES[figure['metric']]} | "))
        for value in (figure["reference"], figure["build"]):
            assert f"| {value:.4f} |" in row
            assert f"<td>{value:.4f}</td>" in page
        interval = f"{points(figure['low'])} … {points(figure['high'])}"
        assert interval in row
        assert f"<td>{interval}</td>" in page
    for text in (markdown, page):
        assert report.decision in text
        assert f"{report.slices[0].n:,}" in text
    assert data["worst"] == data["slices"][0]


def test_verdict_and_worst_slice_come_first(folder: Path, report: DriftReport) -> None:
    page = (folder / "report.html").read_text()
    body = page[page.index("<body>") :]
    order = [body.index(text) for text in (report.decision, "Worst slice", "<svg", "Images that flipped", "McNemar")]
    assert order == sorted(order)
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[0].startswith(f"# {report.decision}")
    assert any(line.startswith("Worst slice: ") for line in lines[:6])
    assert answer_lines(report)[0].startswith(report.decision)
    assert any(line.startswith("worst slice: ") for line in answer_lines(report))


def test_the_page_is_whole_and_fetches_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = {tag for tag, _ in tags.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in tags.tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, value
    assert not re.search(r"url\((?!#)|@import", page)
    assert NASTY not in page
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in tags.tags)
    ids = [attributes["id"] for _, attributes in tags.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_every_plot_has_title_caption_and_labels(report: DriftReport) -> None:
    plots = draw_plots(report)
    assert [plot.name for plot in plots] == ["forest", "slices", "reliability", "roc", "area", "robustness"]
    for plot in plots:
        assert plot.svg.startswith("<svg")
        assert plot.svg.rstrip().endswith("</svg>")
        assert len(plot.caption) > 30
        assert plot.svg.count("<text") > 6
    assert "percentage points" in plots[0].svg
    assert draw_plots(report) == plots


def test_the_gallery_shows_flips_first_then_what_moved(pictures: tuple[Picture, ...], comparison: Comparison) -> None:
    assert len(pictures) == MOST_PICTURES
    moved = [abs(picture.probabilities[0] - picture.probabilities[1]) for picture in pictures]
    assert all(picture.flipped for picture in pictures)
    assert moved == sorted(moved, reverse=True)
    assert any("(jpeg-70)" in picture.name for picture in pictures)
    for picture in pictures:
        for uri in picture.images:
            head, _, data = uri.partition(",")
            assert head == "data:image/jpeg;base64"
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                image.load()
                assert image.size == (WIDTH, HEIGHT)
    forged = next(picture for picture in pictures if picture.label and "jpeg" not in picture.name)
    with Image.open(io.BytesIO(base64.b64decode(forged.images[1].partition(",")[2]))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    redness = pixels[..., 0] - pixels[..., 1]
    assert redness[:3].mean() > 80
    assert abs(redness[6:].mean()) < 20


def test_masks_that_moved_are_shown_without_flips() -> None:
    rows = synthetic_rows(20)
    assert pick_pictures([paired(rows, same)]) == ()


def test_equal_reports_give_equal_pages(report: DriftReport, pictures: tuple[Picture, ...]) -> None:
    assert report_as_html(report, pictures) == report_as_html(report, pictures)
    assert report_as_markdown(report) == report_as_markdown(report)


def test_a_place_that_cannot_be_written_is_named(report: DriftReport, comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DefakerError, match="cannot be written"):
        write_report(report, comparison, (), tmp_path / "file")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page is then checked as text only")
def test_a_browser_shows_it_without_requests_or_errors(folder: Path, tmp_path: Path) -> None:
    assert CHROMIUM
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr",
            "--window-size=1366,768", f"--screenshot={tmp_path / 'shot.png'}", (folder / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    requested = set(re.findall(r'"url":"(https?://[^"]*)"', log.read_text()))
    # The browser itself may look for updates; the page must ask for nothing.
    own = {url for url in requested if "google" not in url and "gvt1" not in url}
    assert not own
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1366, 768)
        assert len(shot.convert("RGB").getcolors(1 << 24) or ()) > 100
