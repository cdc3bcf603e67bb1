#!/usr/bin/env python3
"""Pictures of what methods.py has measured and counted: `python3 benchmarks/plots.py RESULTS.jsonl ... [--out FOLDER]`.

How the time of a step grows with the number of LoRAs, their rank and the size of the picture, that of a run with its
steps, and what a run computes with either, for docs/scaling.md; each picture on light paper and on dark. Of several
machines or days the one with most results counts. Needs torch, numpy and Pillow, no ComfyUI.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.plots", *sys.argv[1:]]))

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from PIL import Image

from ..host.look.chart import Lines, Series
from ..host.look.sheet import Beside, Text, sheet
from ..host.look.theme import THEMES, Theme
from .table import RUN, place, read, sized, whole

OUT = Path(__file__).resolve().parents[1] / "docs" / "scaling"
WAYS = ("Merge", "Composite", "LoRAtorio", "Routed", "CMLoRA", "ComfyUI's hooks", "plain model")
"""In the order of their colours; the plain model is grey."""
SAVINGS = {"none": "every evaluation", "guidance": "extrapolated guidance", "cache": "forecast cache",
           "both": "guidance and cache"}
Value = Callable[[dict], float]


def of_one_place(records: Sequence[dict], bench: str = "method") -> list[dict]:
    """The results of methods.py from the machine and day that gave most; of one that is there twice the later."""
    found: dict[str, dict[tuple, dict]] = {}
    for r in records:
        if r["bench"] == bench:
            found.setdefault(place(r), {})[tuple(r.get(key) for key in RUN)] = r
    return list(max(found.values(), key=len, default={}).values())


def step_ms(record: dict) -> float:
    return 1000 * record["seconds"] / (record["steps"] - 1)


def gigabytes(record: dict) -> float:
    """Of a run beyond the model: its peak, and the LoRAs."""
    return (record["bytes"] + record["bank_bytes"]) / 1e9


def tera(record: dict) -> float:
    return record["operations"] / 1e12


def along(records: Sequence[dict], axis: str) -> list[dict]:
    """The results of one model that differ in `axis` (n, rank, size, steps) alone; [] where it was not varied."""
    base, varied = ([r for r in records if r["sweep"] == sweep] for sweep in ("", axis))
    if axis == "n":
        return base + varied if len({r["n"] for r in base + varied}) > 1 else []
    return [r for r in base if r["n"] == varied[0]["n"]] + varied if varied else []


def curves(records: Sequence[dict], axis: str, name: Callable[[dict], str], value: Value
           ) -> tuple[list[int], dict[str, list[float | None]]]:
    """(places, name of a curve -> its values there, None where nothing was measured)."""
    found: dict[str, dict[int, float]] = {}
    for r in records:
        found.setdefault(name(r), {})[r[axis]] = value(r)
    xs = sorted({x for one in found.values() for x in one})
    return xs, {name: [one.get(x) for x in xs] for name, one in found.items()}


def chart(head: str, across: str, xs: Sequence[int], series: Sequence[Series], tall: int = 210) -> Lines:
    """Curves over numbers at their true distances, from zero."""
    wide = max(xs[-1] - xs[0], 1)
    places = [0.04 + 0.92 * (x - xs[0]) / wide for x in xs]
    marked = [(at, str(x)) for at, x in zip(places, xs, strict=True)]
    return Lines(head, series, tall=tall, across=(across, marked), places=places)


def over(records: Sequence[dict], axis: str, across: str, head: str, theme: Theme, value: Value = step_ms,
         ways: Sequence[str] = WAYS) -> Lines | None:
    """A chart of the ways over `axis`; None where there are no two places."""
    found = [r for r in along(records, axis) if r["saving"] == "none" and r["way"] in ways]
    xs, named = curves(found, axis, lambda r: r["way"], value)
    if axis != "n":  # what was not varied has one value
        named = {way: values for way, values in named.items() if sum(one is not None for one in values) > 1}
    if len(xs) < 2:
        return None
    colours = {way: theme.neutral if way == "plain model" else theme.colour(i) for i, way in enumerate(WAYS)}
    return chart(head, across, xs, [Series(way, named[way], colours[way]) for way in ways if way in named])


def runs(records: Sequence[dict], way: str, theme: Theme, unit: str = "s", value: Value = whole) -> Lines | None:
    """A chart of whole runs over their steps, a curve per way of saving; None where that was not measured."""
    found = [r for r in along(records, "steps") if r["way"] == way and r["saving"] in SAVINGS]
    xs, named = curves(found, "steps", lambda r: SAVINGS[r["saving"]], value)
    if len(xs) < 2:
        return None
    head = f"{found[0]['model']}, {way} of {found[0]['n']}: a run, {unit}"
    return chart(head, "steps of a run", xs, [Series(name, named[name], theme.colour(i))
                                              for i, name in enumerate(SAVINGS.values()) if name in named])


Charts = dict[str, tuple[str, list[Lines | None]]]
"""Name of a picture -> (title, charts)."""


def times(by_model: Mapping[str, Sequence[dict]], theme: Theme) -> Charts:
    def each(make: Callable[[Sequence[dict]], Lines | None]) -> list[Lines | None]:
        return [make(records) for records in by_model.values()]

    return {
        "number": ("More LoRAs", each(lambda found: over(
            found, "n", "LoRAs", f"{sized(found[0])}: a step, ms", theme))),
        "memory": ("More LoRAs: memory beyond the model", each(lambda found: over(
            found, "n", "LoRAs", f"{sized(found[0])}: GB", theme, gigabytes, WAYS[:-1]))),
        "rank-and-size": ("LoRAs of larger rank, larger pictures", [
            *each(lambda found: over(found, "rank", "rank", f"{sized(found[0])}: a step, ms", theme)),
            *each(lambda found: over(found, "size", "side in pixels", f"{found[0]['model']}: a step, ms", theme))]),
        "steps": ("More steps", [runs(found, way, theme) for found in by_model.values()
                                 for way in ("Merge", "Composite")]),
    }


def counts(by_model: Mapping[str, Sequence[dict]], theme: Theme) -> Charts:
    found = by_model.values()
    return {
        "operations": ("More LoRAs: operations", [
            over(each, "n", "LoRAs", f"{sized(each[0])}: a run, 10^12", theme, tera) for each in found]),
        "operations-steps": ("More steps: operations", [
            runs(each, "Composite", theme, "10^12", tera) for each in found]),
    }


def picture(title: str, charts: Sequence[Lines], note: str, theme: Theme) -> Image.Image:
    """Charts in pairs under a title; one alone takes the whole width."""
    if len(charts) == 1:
        return sheet(charts, title, note, theme)
    pairs = zip_longest(charts[::2], charts[1::2], fillvalue=Text(""))
    return sheet([Beside(pair) for pair in pairs], title, note, theme)


def draw(records: Sequence[dict], out: Path) -> list[Path]:
    """The pictures that some results give, written."""
    written = []
    for bench, make in (("method", times), ("operations", counts)):
        found = of_one_place(records, bench)
        by_model: dict[str, list[dict]] = {}
        for record in found:
            by_model.setdefault(record["model"], []).append(record)
        for paper, theme in THEMES.items():
            for name, (title, charts) in make(by_model, theme).items():
                charts = [one for one in charts if one is not None]
                if charts:
                    out.mkdir(parents=True, exist_ok=True)
                    written.append(out / f"{name}-{paper}.png")
                    picture(title, charts, place(found[-1]), theme).save(written[-1], optimize=True)
    return written


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="plots", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="what methods.py has printed")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pictures; default: docs/scaling")
    options = parser.parse_args(arguments)
    written = draw(read(options.results), options.out)
    if not written:
        raise SystemExit("no result of methods.py that was varied in " + ", ".join(map(str, options.results)))
    sys.stdout.write("\n".join(map(str, written)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
