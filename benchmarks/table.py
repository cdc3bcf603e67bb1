#!/usr/bin/env python3
"""Tables of results: `python3 benchmarks/table.py RESULTS.jsonl ... [--write]`.

Reads the lines of JSON that the benchmarks print (others are passed over) and prints Markdown: the goals, the host's
time, the price of adapter kinds, each under the machine, the date and the commit that it was measured on.
--write puts that between the markers in benchmarks/README.md instead, and what methods.py printed into RESULTS.md. Of a
result that is there several times for one machine and date the last one counts; the commits of a table are those of the
results that it shows. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor, log10
from pathlib import Path

README, RESULTS = (Path(__file__).with_name(name) for name in ("README.md", "RESULTS.md"))
BEGIN, END = "<!-- measured: written by table.py -->", "<!-- end of measured -->"


def number(value: float) -> str:
    """Three significant digits, without an exponent; whole numbers from a hundred on."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - floor(log10(abs(value))))}f}"


def signed(value: float) -> str:
    return number(value) if value < 0 else f"+{number(value)}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goal_table(records: Iterable[dict]) -> str:
    """What goals.py made of the results: one line per goal, those of speed (G), of Routed (R), of the engine (E)."""
    records = sorted(records, key=lambda r: ("GRE".index(r["goal"][0]), int(r["goal"][1:])))
    return markdown(["goal", "what", "target", "measured", "verdict"],
                    [[r["goal"], r["what"], r["target"], r["measured"], r["verdict"]] for r in records])


def host_table(records: Iterable[dict]) -> str:
    """Host time of layers and steps: what is added to the plain one, the quartiles in brackets."""
    rows = []
    for r in records:
        low, high = r["quartiles"]
        beside = signed(r["floor"]) if "floor" in r else f"{100 * r['share']:+.0f} %"
        rows.append([f"{r.get('model', 'layer')}, {r['layer'] if 'layer' in r else r['layers']}", r["case"],
                     f"{number(r['plain'])} {r['unit']}", beside, f"{signed(r['added'])} {r['unit']}",
                     f"{number(low)} to {number(high)}"])
    return markdown(["of", "case", "plain", "two bare products, or share of a step", "added", "quartiles"], rows)


def kind_table(records: Iterable[dict]) -> str:
    """What a layer with one adapter takes, in times of the layer alone."""
    return markdown(["kind", "layer", "layer with it, over the layer", "quartiles"],
                    [[r["kind"], f"{r['layer']}, {r['tokens']} tokens", f"x {r['ratio']:.2f}",
                      f"{r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f}"] for r in records])


def int8_table(records: Iterable[dict]) -> str:
    """What LoRAs add to a step of an int8 model."""
    return markdown(["model", "format", "LoRAs", "step without, s", "step with them", "quartiles"],
                    [[f"{r['model']}, {r['blocks']} blocks, {r['tokens']} tokens, {r['dtype']}", r["format"], r["case"],
                      number(r["plain_seconds"]), f"{100 * r['tax']:+.1f} %",
                      f"{100 * r['quartiles'][0]:+.1f} to {100 * r['quartiles'][1]:+.1f}"] for r in records])


def compiled_table(records: Iterable[dict]) -> str:
    """A row per way: its step as it is, then with each backend, over the plain model with that."""
    ways: dict[tuple[str, str], dict[str, dict]] = {}
    for r in records:
        model = f"{r['model']}, {r['size']} x {r['size']}, {r['dtype']}, {'by block' if r['by_block'] else 'whole'}"
        way = r["way"] if r["way"] == "plain model" else f"{r['way']} of {r['n']}"
        ways.setdefault((model, way), {})[r["backend"]] = r
    backends = list(dict.fromkeys(backend for way in ways.values() for backend in way if backend != "none"))

    def step(r: dict | None) -> str:
        return "" if r is None else number(r["seconds"]) + (f" (x {r['ratio']:.2f})" if r.get("ratio") else "")

    def started(r: dict | None) -> str:
        return "" if r is None else f"{number(r['compile_seconds'])}, {r['graphs']}"

    return markdown(["model", "way", "step, s (over the plain model)", *(f"with {name}" for name in backends),
                     *(f"{name}: first run beyond the next, s, graphs" for name in backends)],
                    [[model, way, step(found.get("none")), *(step(found.get(name)) for name in backends),
                      *(started(found.get(name)) for name in backends)] for (model, way), found in ways.items()])


def method_table(records: Iterable[dict]) -> str:
    """What each way of drawing costs, a line per model, number of LoRAs and way; savings as shares of the time of a
    whole run without. What was measured to be varied is in the pictures."""
    runs: dict[tuple, dict[str, dict]] = {}
    for r in map(processor_time, records):
        if r.get("sweep"):
            continue
        model = f"{sized(r)}, {r['dtype']}, {r['steps']} steps"
        runs.setdefault((model, r["n"], r["way"]), {})[r["saving"]] = r
    rows, order = [], {model: i for i, model in enumerate(dict.fromkeys(model for model, _, _ in runs))}
    for (model, n, way), here in sorted(runs.items(), key=lambda run: (order[run[0][0]], run[0][1])):
        if "none" not in here:
            continue
        plain = here["none"]
        savings = [f"x {whole(here[how]) / whole(plain):.2f}" if how in here else ""
                   for how in ("guidance", "cache", "both", "always on")]
        steps = plain["steps"] - 1
        start = number(max(plain["first_seconds"] - plain["seconds"] / steps, 0)) if "first_seconds" in plain else ""
        rows.append([model, str(n), way, number(plain["seconds"] / steps), f"x {plain['ratio']:.2f}",
                     number(1000 * plain["host"] / steps), start, str(plain["rows"]),
                     f"{(plain['bytes'] + plain['bank_bytes']) / 1e9:.2f}", *savings])
    return markdown(["model", "LoRAs", "way", "step, s", "over the plain model", "host, ms", "start, s",
                     "samples in a run", "memory, GB", "extrapolated guidance", "forecast cache", "both",
                     "one more LoRA, always on"], rows)


def processor_time(r: dict) -> dict:
    """A result on a CPU, its times those of the processor, where it has them."""
    if r["device"] != "cpu" or "cpu_ratio" not in r:
        return r
    return r | {name: r[f"cpu_{name}"] for name in ("seconds", "first_seconds", "ratio")}


def whole(run: dict) -> float:
    """Seconds of a run of methods.py, its first step with it."""
    return run["first_seconds"] + run["seconds"]


def operations_table(records: Iterable[dict]) -> str:
    """What whole runs compute, a line per model and way; savings as shares of a run of as many LoRAs without: one where
    all numbers of LoRAs have the same."""
    runs: dict[tuple[str, str], dict[tuple[int, str], dict]] = {}
    for r in records:
        if not r.get("sweep"):
            runs.setdefault((f"{sized(r)}, {r['steps']} steps", r["way"]), {})[r["n"], r["saving"]] = r
    numbers = sorted({n for found in runs.values() for n, _ in found})
    rows, order = [], {model: i for i, model in enumerate(dict.fromkeys(model for model, _ in runs))}
    for (model, way), found in sorted(runs.items(), key=lambda run: order[run[0][0]]):
        plain = {n: found[n, "none"] for n in numbers if (n, "none") in found}
        costs = [f"{number(plain[n]['operations'] / 1e12)} (x {plain[n]['ratio']:.2f})" if n in plain else ""
                 for n in numbers]

        def saved(how: str, found: dict = found, plain: dict = plain) -> str:
            shares = [f"{found[n, how]['operations'] / plain[n]['operations']:.2f}" for n in plain if (n, how) in found]
            return f"x {' / '.join(shares if len(set(shares)) > 1 else shares[:1])}" if shares else ""

        rows.append([model, way, *costs, *(saved(how) for how in ("guidance", "cache", "both", "always on"))])
    return markdown(["model", "way", *(f"{n} LoRAs" for n in numbers), "extrapolated guidance", "forecast cache",
                     "both", "one more LoRA, always on"], rows)


def sized(record: dict) -> str:
    """The model of a result of methods.py, and what it drew."""
    frames = f" x {record['frames']} frames" if record.get("frames", 1) > 1 else ""
    return f"{record['model']}, {record['size']} x {record['size']}{frames}"


TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Iterable[dict]], str]]] = {
    "Goals": (("goal",), ("goal", "what"), goal_table),
    "Host time": (("layer", "step", "live"), ("bench", "case", "layer", "model"), host_table),
    "Adapter kinds": (("kind",), ("kind", "layer", "tokens"), kind_table),
    "LoRAs on int8 weights": (("int8",), ("model", "format", "case", "blocks", "tokens", "rank"), int8_table),
    "Compiled models": (("compiled",), ("model", "size", "by_block", "n", "way", "backend"), compiled_table),
}
"""Title -> (benchmarks it shows, what tells their results apart, how it is made)."""
RUN = "model", "size", "frames", "n", "rank", "steps", "sweep", "way", "saving"
OF_METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Iterable[dict]], str]]] = {
    "Operations of a run, in 10^12": (("operations",), RUN, operations_table),
    "Times": (("method",), RUN, method_table),
}
"""The same of what methods.py prints."""


def place(record: dict) -> str:
    """Machine and date of a result, in words."""
    machine = record["cpu"] if record["device"] == "cpu" else f"{record['device']}, driver {record['driver']}"
    host = f", ComfyUI {record['comfyui']}" if record.get("comfyui") else ""
    return f"{record['date']}, {machine}, torch {record['torch']}{host}"


def without_the_unasked(records: Iterable[dict]) -> list[dict]:
    """Without goals that one run has not measured and another has."""
    records = list(records)
    known = {(r["goal"], r["what"]) for r in records if r["bench"] == "goal" and r["measured"]}
    return [r for r in records if r["bench"] != "goal" or r["measured"] or (r["goal"], r["what"]) not in known]


def tables(records: Iterable[dict], chosen: Mapping[str, tuple] = TABLES) -> str:
    """All tables that the results give, by place."""
    parts, records = [], without_the_unasked(records)
    for title, (benches, keys, make) in chosen.items():
        found: dict[str, dict[tuple, dict]] = {}
        for record in records:
            if record["bench"] not in benches:
                continue
            found.setdefault(place(record), {})[tuple(record.get(key) for key in keys)] = record
        for where, here in found.items():
            commits = dict.fromkeys(record["commit"] or "unknown" for record in here.values())
            parts.append(f"### {title}\n\n{where}, commit {' and '.join(commits)}\n\n{make(here.values())}")
    return "\n\n".join(parts)


def result(line: str) -> dict | None:
    """The result that a line of a benchmark's output holds, if it is whole."""
    return json.loads(line) if line.startswith('{"bench": ') and line.rstrip().endswith("}") else None


def read(paths: Iterable[Path]) -> list[dict]:
    """The results in some files, in their order; a quick run measures nothing and gives none."""
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    return [found for found in map(result, lines) if found is not None and not found.get("quick")]


def written(page: str, text: str) -> str:
    """A page with `text` between its markers. Raises ValueError where they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"a page of benchmarks/ lacks the lines '{BEGIN}' and '{END}' that the tables go between")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="table", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="what the benchmarks have printed")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md and RESULTS.md")
    options = parser.parse_args(arguments)
    records = read(options.results)
    found = {page: text for page, text in ((README, tables(records)), (RESULTS, tables(records, OF_METHODS))) if text}
    if not found:
        raise SystemExit("no result in " + ", ".join(map(str, options.results)))
    for page, text in found.items():
        if options.write:
            page.write_text(written(page.read_text(encoding="utf-8"), text), encoding="utf-8")
        else:
            sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
