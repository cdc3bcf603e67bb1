"""The demo: a labelled grid of pictures and a table, from the testbed alone: `python3 testbed/demo.py [OUT]`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "testbed.demo", *sys.argv[1:]]))

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..engine.bank import Bank
from ..methods.merge import Merge
from .base import Base
from .evaluate import METHODS, RECIPES, evaluate, summary
from .judge import Judge
from .protocol import LoraSet, some_sets
from .sampler import Picture, Sampler
from .scene import number
from .weights import load_base, load_judge, load_loras

SHOWN = ("Merge", "Routed", *(name for name in METHODS if name != "Merge"))
"""What the demo draws: what everybody does today, what this pack is for, and the published methods."""
REGIME, ROWS_PER_SIZE, TABLE_SETS = "narrow", 1, 4
CELL, TEXT, MARGIN, LEFT = 128, 44, 8, 190


def chosen_sets() -> list[LoraSet]:
    """For each N the first sets of the fixed sample, whatever comes out of them."""
    sets = some_sets(32)
    return [task for size in (2, 3, 4, 5) for task in [s for s in sets if len(s.concepts) == size][:ROWS_PER_SIZE]]


def cells(tasks: list[LoraSet], bank: Bank, shown: Sequence[str] = SHOWN) -> list[list[Picture]]:
    """Per set: each LoRA alone, then every method."""
    rows = []
    for task in tasks:
        alone = [Picture(task.prompt((concept,)), task.seed, (lora,), Merge((1.0,)))
                 for concept, lora in zip(task.concepts, task.loras, strict=True)]
        rows.append(alone + [RECIPES[name].picture(task, bank) for name in shown])
    return rows


def verdict(task: LoraSet, answers: dict[str, np.ndarray], i: int, only: int | None) -> str:
    """What the judge sees of the requested concepts, as text under a picture."""
    concepts = task.concepts if only is None else task.concepts[only:only + 1]
    seen = [c.name for c in concepts if int(answers[c.category][i]) == number(c)]
    return f"shows {len(seen)} of {len(concepts)}" + (": " + " ".join(seen) if seen and only is None else "")


def grid(tasks: list[LoraSet], rows: list[list[Picture]], images: Tensor, answers: dict[str, np.ndarray],
         shown: Sequence[str] = SHOWN) -> Image.Image:
    """Rows: sets. Columns: each LoRA alone, then the methods. Under each picture, what the judge sees in it."""
    most = max(len(task.concepts) for task in tasks)
    columns = most + len(shown)
    font = ImageFont.load_default()
    height = TEXT + len(tasks) * (CELL + TEXT)
    sheet = Image.new("RGB", (LEFT + columns * (CELL + MARGIN), height), "white")
    pen = ImageDraw.Draw(sheet)
    titles = [f"LoRA {i + 1} alone" for i in range(most)] + list(shown)
    for column, title in enumerate(titles):
        pen.text((LEFT + column * (CELL + MARGIN), TEXT // 2), title, "black", font)
    pixels, i = (images.cpu().numpy() * 255).round().astype(np.uint8).transpose(0, 2, 3, 1), 0
    for row, task in enumerate(tasks):
        top, size = TEXT + row * (CELL + TEXT), len(task.concepts)
        said = "\n".join([f"N = {size}", "", *textwrap.wrap(task.prompt(), 28)])
        pen.multiline_text((MARGIN, top), said, "black", font)
        for k in range(len(rows[row])):
            column = k if k < size else most + k - size
            at = (LEFT + column * (CELL + MARGIN), top)
            sheet.paste(Image.fromarray(pixels[i]).resize((CELL, CELL), Image.Resampling.NEAREST), at)
            said = verdict(task, answers, i, k if k < size else None)
            said = f"{task.concepts[k].name}: {said}" if k < size else said
            pen.multiline_text((at[0], top + CELL + 2), "\n".join(textwrap.wrap(said, 22)), "black", font)
            i += 1
    return sheet


def pictures(base: Base, judge: Judge, tasks: list[LoraSet], shown: Sequence[str] = SHOWN) -> Image.Image:
    with Sampler(base, load_loras(REGIME)) as sampler:
        rows = cells(tasks, sampler.bank, shown)
        images = sampler.draw([picture for row in rows for picture in row])
    return grid(tasks, rows, images, judge.read(images), shown)


def main(out_dir: str | Path) -> None:
    """Writes grid.png, row.png (five LoRAs, merged and routed), table.md and table.json into out_dir."""
    out, start = Path(out_dir), time.time()
    out.mkdir(parents=True, exist_ok=True)
    base, judge = load_base(), load_judge()

    def done(what: str) -> None:
        sys.stdout.write(f"{time.time() - start:5.0f} s  {what}\n")
        sys.stdout.flush()

    tasks = chosen_sets()
    pictures(base, judge, tasks).save(out / "grid.png")
    pictures(base, judge, tasks[-1:], ("Merge", "Routed")).save(out / "row.png")
    done("grid.png, row.png")
    loras, sets, table = load_loras(REGIME), some_sets(TABLE_SETS), []
    for name, recipe in {"Alone": None, **{name: RECIPES[name] for name in SHOWN}}.items():
        table += evaluate(REGIME, name, recipe, sets, base, judge, loras, 1.0)
        done(f"table: {name}")
    text = f"{len(sets)} of the protocol's 480 sets; benchmarks/quality.py runs all of them.\n\n{summary(table)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.json").write_text(json.dumps([asdict(row) for row in table], indent=1), encoding="utf-8")
    sys.stdout.write(f"\n{text}\ngrid.png, table.md, table.json in {out} after {time.time() - start:.0f} s\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).resolve().parents[1] / "demo" / "out",
                        help="folder to write into (default: %(default)s)")
    main(parser.parse_args().out)
