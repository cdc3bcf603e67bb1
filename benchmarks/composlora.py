"""ComposLoRA's kind of prompts on a running ComfyUI, with the LoRAs you have: pictures side by side, and a table.

    python3 benchmarks/composlora.py --example reality > loras.json
    python3 benchmarks/composlora.py --checkpoint realistic.safetensors --loras loras.json --sets 12 --steps 30

Every set has one character and at most one LoRA of each other category (Zhong et al. 2024, arXiv 2402.16843). It is
drawn by each method with the same seed; the prompt is a head and the LoRAs' trigger words. Into the folder `--out` go
`pictures/`, `grid.png` and `table.csv`: nothing is judged. What was drawn with the same settings is not drawn again.

`--loras` is a JSON list of objects or a CSV table with the columns

    file       as ComfyUI lists it
    category   character, clothing, style, background or object
    words      its trigger words, separated by commas; a style may have none
    strength   0.8 where there is none, as ComposLoRA has it

or the `lora_info.json` of ComposLoRA itself. Needs Pillow.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.composlora", *sys.argv[1:]]))

import argparse
import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..examples.kept_pictures import keep, kept, measured
from ..examples.picture_grid import Cell, save_grids
from ..examples.queue_prompt import Problem, Unreachable, call, fetched, finished, speaking_to
from ..examples.server_nodes import Info, choices, defaults, inputs_of
from .composlora_sets import SIZES, Lora, Task, all_sets, example, hint, read_loras, some_of

HEADS = {
    "realistic": ("RAW photo, subject, 8k uhd, dslr, high quality, Fujifilm XT3, half-length portrait from knees up",
                  "cgi, 3d, render, cartoon, drawing, anime, worst quality, low quality, jpeg artifacts, blurry, text, "
                  "cropped, deformed, bad anatomy, extra heads, extra limbs, missing limbs, mutated hands, nsfw"),
    "anime": ("masterpiece, best quality",
              "worst quality, low quality, jpeg artifacts, blurry, greyscale, lowres, text, signature, watermark, "
              "cropped, extra fingers, extra limbs, multiple girls, multiple views, nsfw"),
}
"""Style -> what a prompt begins with, and the negative prompt."""
COLUMNS = ("set", "loras", "method", "seed", "file", "seconds", "evaluations", "words_found", "problems")
PACK = "LoRAEnsemble"


# --- what the server has ---------------------------------------------------------------------------------------------


def listed(name: str, known: Sequence[str], what: str) -> str:
    """`name` as the server lists it: with its own slashes, and the folder of a file of which there is one.
    Raises Problem."""
    slashes = {each.replace("\\", "/"): each for each in known}
    plain = name.replace("\\", "/")
    inside = [each for path, each in slashes.items() if path.endswith(f"/{plain}")]
    if plain in slashes or len(inside) == 1:
        return slashes.get(plain) or inside[0]
    raise Problem(f"The server has no {what} '{name}'. {hint(name, known)}")


def methods_of(info: Info) -> dict[str, str]:
    """The methods that the server has, by their short names -> node ids."""
    return {name[len(PACK):]: name for name, node in info.items() if name.startswith(PACK)
            and {"model", "ensemble"} <= set(node["input"].get("required", {}))
            and list(node.get("output", ()))[:2] == ["MODEL", "CLIP"]}


def loader_widget(info: Info, node: str) -> str:
    """The input of a loader that names its file: its first choice."""
    return next((name for name, spec in inputs_of(info, node).items() if choices(spec)), "")


@dataclass(frozen=True)
class Plan:
    """What all pictures share, in the server's own names, and the methods."""

    info: Info
    loader: str
    checkpoint: str
    methods: tuple[str, ...]
    sampling: dict[str, Any]
    size: dict[str, int]
    head: str
    negative: str

    def graph(self, task: Task, method: str, seed: int) -> dict[str, Any]:
        """A workflow in API format: the set's LoRAs through one method, its picture and its report."""
        def node(kind: str, **inputs: object) -> dict[str, Any]:
            return {"class_type": kind, "inputs": defaults(self.info, kind) | inputs}

        loras = {}
        for i, lora in enumerate(task.loras, 1):
            earlier = {"ensemble": [f"lora{i - 1}", 0]} if i > 1 else {}
            loras[f"lora{i}"] = node(f"{PACK}LoRA", lora_name=lora.file, strength_model=lora.strength,
                                     strength_clip=lora.strength, role=lora.category, words=", ".join(lora.words),
                                     **earlier)
        graph = {
            "loader": node(self.loader, **{loader_widget(self.info, self.loader): self.checkpoint}), **loras,
            "method": node(PACK + method, model=["loader", 0], clip=["loader", 1],
                           ensemble=[f"lora{len(task.loras)}", 0]),
            "positive": node("CLIPTextEncode", text=task.prompt(self.head), clip=["method", 1]),
            "negative": node("CLIPTextEncode", text=self.negative, clip=["method", 1]),
            "latent": node("EmptyLatentImage", **self.size),
            "sampler": node("KSampler", **self.sampling, seed=seed, model=["method", 0], positive=["positive", 0],
                            negative=["negative", 0], latent_image=["latent", 0]),
            "decode": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
            "picture": node("PreviewImage", images=["decode", 0]),  # the server keeps it until it ends, not for good
        }
        if {f"{PACK}Report", "PreviewAny"} <= set(self.info):
            graph["report"] = node(f"{PACK}Report", model=["method", 0], latent=["sampler", 0])
            graph["text"] = node("PreviewAny", source=["report", 2])
        return graph


def plan_of(info: Info, options: argparse.Namespace, loras: Sequence[Lora]) -> tuple[Plan, list[Lora]]:
    """The plan, and the LoRAs as the server lists them. Raises Problem with every name that the server does not
    have."""
    if f"{PACK}LoRA" not in info:
        raise Problem(f"The ComfyUI at {options.server} has no node {PACK}LoRA: LoRA Ensemble is not installed there.")
    wrong: list[str] = []

    def ask(name: str, known: Sequence[str], what: str) -> str:
        try:
            return listed(name, known, what)
        except Problem as problem:
            wrong.append(str(problem))
            return name

    loader, checkpoint = ask(options.loader, list(info), "node"), options.checkpoint
    if loader in info:
        checkpoint = ask(checkpoint, choices(inputs_of(info, loader).get(loader_widget(info, loader), [""])),
                         "checkpoint")
    files = choices(inputs_of(info, f"{PACK}LoRA")["lora_name"])
    found = [Lora(ask(lora.file, files, "LoRA"), lora.category, lora.words, lora.strength) for lora in loras]
    methods = {name.lower(): name for name in methods_of(info)}
    names = [methods.get(name.lower(), name) for name in options.methods]
    names = [ask(name, list(methods.values()), "method") for name in dict.fromkeys(names)]
    sampling = {"steps": options.steps, "cfg": options.cfg}
    for widget, name in (("sampler_name", options.sampler), ("scheduler", options.scheduler)):
        if name is not None:
            sampling[widget] = ask(name, choices(inputs_of(info, "KSampler")[widget]), widget.partition("_")[0])
    if wrong:
        raise Problem("\n".join(wrong))
    size = {"width": options.width, "height": options.height}
    head, negative = HEADS[options.style]
    return Plan(info, loader, checkpoint, tuple(names), given(sampling), given(size),
                head if options.head is None else options.head,
                negative if options.negative is None else options.negative), found


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were asked for; the node's own defaults stand for the others."""
    return {name: value for name, value in options.items() if value is not None}


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(server: str, workflow: dict[str, Any], path: Path, timeout: float) -> None:
    """Run a workflow and keep its picture as `path`, beside a JSON file of what was measured. Raises Problem."""
    with speaking_to(server, timeout):
        entry = finished(server, workflow, timeout, tell=lambda _: None)
        images = entry["outputs"].get("picture", {}).get("images", ())
        if not images:
            raise Problem("The server ran the workflow and has no picture of it.")
        picture = fetched(server, images[0])
    keep(path, picture, measured(entry))


def rows_of(plan: Plan, tasks: Sequence[Task], seed: int, out: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(a row of the table, its workflow) of every picture, all methods of a set in a row."""
    rows = []
    for task in tasks:
        for method in plan.methods:
            workflow = plan.graph(task, method, seed + task.number)
            # Named after all that it was made with: other settings draw another picture, into the same folder.
            digest = hashlib.sha256(json.dumps(workflow, sort_keys=True).encode()).hexdigest()[:10]
            file = out / "pictures" / f"{task.number:03d}_{method}_{digest}.png"
            row = dict.fromkeys(COLUMNS, "") | {"set": task.number, "loras": task.title, "method": method,
                                                "seed": seed + task.number, "file": file.relative_to(out).as_posix()}
            rows.append((row, workflow))
    return rows


def draw_all(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], options: argparse.Namespace) -> int:
    """Draw what is not there and fill in the rows; what failed is said, skipped and counted."""
    failed = 0
    for number, (row, workflow) in enumerate(rows, 1):
        path, what = options.out / row["file"], f"{number} of {len(rows)}: {row['method']}, {row['loras']}"
        there = path.is_file()
        try:
            if not there:
                draw(options.server, workflow, path, options.timeout)
        except Unreachable:
            raise
        except Problem as problem:
            failed += 1
            row["problems"] = str(problem)
            print(f"{what}: skipped. {problem}", flush=True)
            continue
        row.update(kept(path))
        print(f"{what}: {'is there' if there else str(row['seconds']) + ' s'}", flush=True)
    return failed


def save_table(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The rows of what was drawn or tried."""
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows:
            there = (out / row["file"]).is_file()
            if there or row["problems"]:
                table.writerow(row | {"file": row["file"] if there else ""})


def save_all(rows: Sequence[dict[str, Any]], methods: Sequence[str], out: Path) -> None:
    """The table and the grid, as far as it came."""
    save_table(rows, out)
    lines = [rows[i:i + len(methods)] for i in range(0, len(rows), len(methods))]
    cells = [[Cell(out / row["file"], row["problems"]) for row in line] for line in lines]
    titles = [[f"set {line[0]['set']}, seed {line[0]['seed']}", *line[0]["loras"].split(", ")] for line in lines]
    for path in [out / "table.csv", *save_grids(methods, titles, cells, out)]:
        print(f"wrote {path}")


def run_all(options: argparse.Namespace) -> None:
    """All that the command line asks for. Raises Problem."""
    loras = read_loras(options.loras)
    with speaking_to(options.server, options.timeout):
        info = json.loads(call(options.server, "/object_info"))
    plan, loras = plan_of(info, options, loras)
    tasks = all_sets(loras, options.sizes)
    if not tasks:
        raise Problem(f"{options.loras} makes no set of {' or '.join(map(str, options.sizes))} LoRAs: that takes a "
                      "character and as many other categories as there are further LoRAs in it.")
    chosen = some_of(tasks, options.sets)
    print(f"{len(chosen)} of {len(tasks)} sets, {len(plan.methods)} methods", flush=True)
    pairs = rows_of(plan, chosen, options.seed, options.out)
    (options.out / "pictures").mkdir(parents=True, exist_ok=True)
    try:
        failed = draw_all(pairs, options)
    finally:
        save_all([row for row, _ in pairs], plan.methods, options.out)
    if failed:
        raise Problem(f"{failed} of {len(pairs)} pictures were not drawn. The same command tries them again.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="composlora.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=("reality", "anime"), help="print a file for --loras and end")
    parser.add_argument("--server", default="127.0.0.1:8188", help="HOST:PORT (default %(default)s)")
    parser.add_argument("--checkpoint", help="as ComfyUI lists it")
    parser.add_argument("--loader", default="CheckpointLoaderSimple", metavar="NODE",
                        help="the node that loads it and gives MODEL, CLIP and VAE (default %(default)s)")
    parser.add_argument("--loras", type=Path, metavar="FILE", help="JSON or CSV")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, choices=SIZES, help="LoRAs in a set")
    parser.add_argument("--sets", type=int, default=12, help="a sample of so many (default %(default)s); 0: all")
    parser.add_argument("--methods", nargs="+", default=["Merge", "Composite", "Routed"], metavar="METHOD",
                        help="of Merge, Switch, Composite, CMLoRA, LoRAtorio, KLoRA, ESTLoRA and Routed")
    parser.add_argument("--style", choices=list(HEADS), default="realistic", help="of the head and the negative")
    parser.add_argument("--head", help="what every prompt begins with, in place of the style's")
    parser.add_argument("--negative", help="the negative prompt, in place of the style's")
    for name, kind in (("steps", int), ("cfg", float), ("sampler", str), ("scheduler", str)):
        parser.add_argument(f"--{name}", type=kind, help="default: KSampler's")
    for name in ("width", "height"):
        parser.add_argument(f"--{name}", type=int, help="default: Empty Latent Image's")
    parser.add_argument("--seed", type=int, default=111, help="the number of a set is added (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("composlora"), help="folder (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of silence before giving up")
    options = parser.parse_args()
    if options.example:
        print(json.dumps(example(options.example), indent=1))
        print(f"Fill in the words: ComposLoRA has them as 'trigger' in {options.example}_lora_info.json, a file that "
              "--loras also takes as it is.", file=sys.stderr)
        return
    if missing := [f"--{name}" for name in ("checkpoint", "loras") if getattr(options, name) is None]:
        parser.error(f"{' and '.join(missing)} needed")
    if options.sets < 0:
        parser.error("--sets is a number of sets, or 0 for all")
    try:
        run_all(options)
    except Problem as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")


if __name__ == "__main__":
    main()
