"""Pictures of the benchmarks of methods, from made-up results."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from lora_ensemble.benchmarks import plots
from lora_ensemble.host.look.chart import Lines, Series
from lora_ensemble.host.look.theme import LIGHT, THEMES, rgb
from PIL import Image

STAMP = {"date": "2026-01-02", "commit": "abc1234", "torch": "2.11.0", "device": "cpu", "cpu": "a processor",
         "comfyui": "0.33.0"}


def line(way: str = "Merge", saving: str = "none", seconds: float = 7.0, model: str = "SDXL", **more) -> dict:
    return {"bench": "method", "way": way, "saving": saving, "model": model, "size": 1024, "frames": 1, "n": 5,
            "rank": 16, "steps": 8, "sweep": "", "seconds": seconds, "first_seconds": 1.0, "bytes": 2e9,
            "bank_bytes": 5e8, **STAMP, **more}


LINES = [line("plain model"), line(), line("Composite", seconds=35.0), line(n=2), line("Composite", seconds=14.0, n=2),
         line("ComfyUI's hooks", seconds=70.0, n=2), line(n=1, sweep="n", seconds=7.7),
         line(rank=64, sweep="rank", seconds=8.4), line("Composite", rank=64, sweep="rank", seconds=42.0),
         line(size=512, sweep="size", seconds=2.1), *(line(saving=how, seconds=5.0) for how in ("guidance", "cache")),
         *(line(saving=how, seconds=9.0, steps=20, sweep="steps") for how in plots.SAVINGS)]


COUNTED = [{**line(way, n=n, **more), "bench": "operations", "operations": 1e12 * n * steps, "steps": steps}
           for way in ("Merge", "Composite") for n in (2, 5)
           for steps, more in ((8, {}), (20, {"sweep": "steps"})) if n == 5 or steps == 8]


def test_what_is_drawn(tmp_path):
    """A picture on either paper for all that was varied, and none for what was not."""
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES + COUNTED)), encoding="utf-8")
    plots.main([str(file), "--out", str(tmp_path / "out")])
    names = {f"{name}-{paper}.png" for paper in THEMES for name in (
        "number", "memory", "rank-and-size", "steps", "operations", "operations-steps")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(Image.open(tmp_path / "out" / name).width == 1024 for name in names)
    file.write_text(json.dumps(line()), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"no result of methods\.py that was varied"):
        plots.main([str(file), "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_chart_holds_what_was_measured():
    number = plots.over(LINES, "n", "LoRAs", "head", LIGHT)
    assert [(one.name, one.values) for one in number.series] == [
        ("Merge", [pytest.approx(1100), 1000, 1000]), ("Composite", [None, 2000, 5000]),
        ("ComfyUI's hooks", [None, 10000, None]), ("plain model", [None, None, 1000])]
    assert [text for _, text in number.across[1]] == ["1", "2", "5"]
    rank = plots.over(LINES, "rank", "rank", "head", LIGHT)
    assert {one.name: one.values for one in rank.series} == {
        "Merge": [1000, pytest.approx(1200)], "Composite": [5000, 6000]}
    run = plots.runs(LINES, "Merge", LIGHT)
    assert {one.name: one.values for one in run.series} == {
        "every evaluation": [8, 10], "extrapolated guidance": [6, 10], "forecast cache": [6, 10],
        "guidance and cache": [None, 10]}
    run = plots.runs(COUNTED, "Composite", LIGHT, "10^12", plots.tera)
    assert run.head == "SDXL, Composite of 5: a run, 10^12" and [one.values for one in run.series] == [[40, 100]]
    assert plots.runs(LINES, "Composite", LIGHT) is None and plots.over([line()], "n", "", "", LIGHT) is None


def test_the_machine_and_day_with_most_results_counts_and_of_one_result_the_later():
    old, other = line(seconds=1.0, date="2026-01-01"), line(seconds=2.0, cpu="another")
    found = plots.of_one_place([old, line(seconds=3.0), {"bench": "goal"}, line(seconds=4.0), line(n=2), other])
    assert [(r["n"], r["seconds"]) for r in found] == [(5, 4.0), (2, 7.0)]


def test_values_stand_where_their_numbers_are():
    """The middle value at a fifth of the way, not at a half."""
    chart = plots.chart("head", "LoRAs", [1, 2, 6], [Series("one", [1.0, 1.0, 1.0], "#123456")])
    assert isinstance(chart, Lines) and chart.places == pytest.approx([0.04, 0.224, 0.96])
    on = Image.new("RGB", (500, chart.height(500)), LIGHT.paper)
    chart.draw(on, LIGHT, (0, 0), 500)
    panel = np.asarray(on)[26 + 20 + 8:26 + 28 + chart.tall, chart.LEFT:]
    thick = (panel == rgb("#123456")).all(axis=-1).sum(axis=0)
    dots = [k for k in range(len(thick)) if thick[k] >= thick.max()]
    assert [any(abs(k - place * 447) < 3 for k in dots) for place in chart.places] == [True] * 3
    assert not any(abs(k - 223) < 10 for k in dots)


def test_the_page_shows_what_is_there():
    """Every picture on both papers, and no picture that no page shows."""
    page = (plots.OUT.parent / "scaling.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"scaling/([\w-]+)\.png", page))
    assert shown == {path.stem for path in plots.OUT.glob("*.png")}
    assert {f"{name.rsplit('-', 1)[0]}-{paper}" for name in shown for paper in THEMES} == shown
