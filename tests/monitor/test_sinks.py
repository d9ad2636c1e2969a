"""Each sink, read back."""

import io
import os
import shutil
import subprocess

import matplotlib.image
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastmoe
from fastmoe.monitor.sinks.html import Curve, HtmlReport
from fastmoe.monitor.sinks.jsonl import JsonLines, read_jsonl
from fastmoe.monitor.sinks.png import HeatMapPng
from fastmoe.monitor.sinks.tensorboard import TensorBoardLoad
from fastmoe.monitor.sinks.terminal import Terminal

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def load(counts, dropped=0):
    dead = tuple(expert for expert, count in enumerate(counts) if not count)
    rows = sum(counts)
    losses = {"balance": 0.01}
    return fastmoe.LayerLoad(tuple(counts), tuple(counts), 1, rows, 0, dropped, dead, 0.5, 1.2, losses)


@pytest.fixture
def records():
    """Two layers of different size; the first goes from even to uneven."""
    return [
        (
            step,
            fastmoe.LoadSnapshot({"h.0": load([100, 100 + step, 100 - step, 100]), "h.1": load([5, 0, 3], dropped=2)}),
        )
        for step in range(10, 101, 10)
    ]


def feed(sink, records):
    for step, snapshot in records:
        sink.write(step, snapshot)
    sink.close()


def test_terminal(records):
    text = io.StringIO()
    feed(Terminal(Console(file=text, width=140)), records[-1:])
    printed = text.getvalue()
    assert "step 100" in printed
    row = next(line for line in printed.splitlines() if "h.1" in line)
    assert "20.0%" in row
    assert "x" in row.rpartition("│")[0].rpartition("│")[2]


def test_tensorboard(records, tmp_path):
    feed(TensorBoardLoad(tmp_path), records)
    events = EventAccumulator(str(tmp_path)).Reload()
    points = events.Scalars("load/h.0/max_over_mean")
    assert [point.step for point in points] == [step for step, _ in records]
    assert points[-1].value == pytest.approx(2)
    assert events.Scalars("load/h.1/loss/balance")[0].value == pytest.approx(0.01)
    image = events.Images("load/heat_map")[-1]
    assert (image.height, image.width) == (2 * 16, 4 * 16)


def test_jsonl_is_read_back(records, tmp_path):
    feed(JsonLines(tmp_path / "load.jsonl"), records)
    assert read_jsonl(tmp_path / "load.jsonl") == records


def test_jsonl_goes_on_after_a_kill(records, tmp_path):
    path = tmp_path / "load.jsonl"
    feed(JsonLines(path), records)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert read_jsonl(path) == records[:-1]
    feed(JsonLines(path, truncate_after=50), records[5:])
    assert path.read_bytes() == whole
    feed(JsonLines(path, truncate_after=0), records[:1])
    assert read_jsonl(path) == records[:1]


def test_jsonl_that_is_none(tmp_path):
    path = tmp_path / "load.jsonl"
    assert read_jsonl(path) == []
    for text in ("not json\n", '{"step": 1}\n', "[1]\n", '{"step": 1, "layers": {"a": {"counts": [1]}}}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"load\.jsonl"):
            read_jsonl(path)


def test_png(records, tmp_path):
    feed(HeatMapPng(tmp_path / "load.png"), records)
    pixels = matplotlib.image.imread(tmp_path / "load.png")
    assert pixels.shape[0] > 200
    assert pixels[..., :3].std() > 0.1
    feed(HeatMapPng(tmp_path / "none.png"), [])
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def report(records, tmp_path):
    steps = list(range(1, 101))
    curves = {"MoE, held-out": Curve(steps, [5 / step**0.2 for step in steps]), "<b>": Curve([1], [2.0], faint=True)}
    feed(HtmlReport(tmp_path / "report.html", "A <run>", curves), records)
    return tmp_path / "report.html"


def test_html_is_one_file(report):
    text = report.read_text(encoding="utf-8")
    assert "<title>A &lt;run&gt;</title>" in text
    assert "20.00%" in text
    assert "<script src=" not in text
    assert "<link" not in text.partition("</style>")[0]
    assert text.count('class="plotly-graph-div"') == 3


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_html_is_drawn_by_a_browser(report, tmp_path):
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    size = ["--window-size=1200,1700", "--virtual-time-budget=10000"]
    command = [CHROMIUM, *flags, *size, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run([*command, report.as_uri()], check=True, timeout=120, capture_output=True, env=environment)
    pixels = matplotlib.image.imread(shot)[..., :3]
    for part in (pixels[150:500], pixels[700:1100], pixels[1200:1500]):  # loss curves, heat maps, lines
        colourful = part.max(2) - part.min(2) > 0.3
        assert colourful.mean() > 0.002
