"""Lays the example workflows out: no node over another, nothing cut off, in both canvases, at a zoom one can read.

    python3 run.py _with - lora_ensemble.tools.tidy             every example workflow
    python3 run.py _with - lora_ensemble.tools.tidy NAME ...    some of them
    python3 run.py _with - lora_ensemble.tools.tidy --front-end FOLDER ...    for other front ends as well

It asks the real front end in a headless Chromium how much room each node takes, in the classic canvas and in Nodes 2.0.
Run it in the environment of a ComfyUI, with COMFYUI_UNDER_TEST naming its folder. Of other releases of the front end,
FOLDER is that with the index.html; in 1.45.21 the nodes of Nodes 2.0 are taller. Nodes keep their groups and their
order; what changes is `pos` and `size`, the boxes of the groups and the view.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
WINDOW = (1920, 1080)
FILL = 0.75  # the part of the window that the front end fits a workflow into
READABLE = 0.6  # below 0.57 the classic canvas draws no text at all
TITLE, FOOTER, GAP = 30, 8, 24
"""The title bar above a node, what hangs below it in Nodes 2.0, and the space that stays free: the classic canvas has
the name of the pack in it."""
HEAD, MARGIN = 40, 20  # of a group: the room for its name, and the frame around its nodes
SHRUNK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
LIVE, LIVE_ROW, ROWS, TEXT = 130, 20, 4, 50
"""What grows below a node that composes while it samples: the text and the panel, and of the panel a row per LoRA; the
rows where the LoRAs are in the node itself; the text alone, below a sampler."""
SAYS = {"LoRAEnsembleSpectrum": 80, "LoRAEnsembleInfo": 230, "LoRAEnsembleSaveCoeffs": 50}
"""What other nodes grow by with what they say."""
SMALLEST, NARROW, SWITCHES = 240, 280, 370
"""Side of a picture, width of other nodes, width in which two switches of Nodes 2.0 stand side by side."""
FILLED = {"SaveImage": 310, "PreviewImage": 270, "SaveWEBM": 450}
"""The least heights of nodes that show what they are given, once they have it."""
WIDER, WIDEST = 20, 460
"""By how much a node of Nodes 2.0 is made wider until its texts fit, and where that ends."""
STARTS = (0, 40)
Graph = dict[str, Any]


@dataclass(frozen=True)
class Room:
    """What a node needs."""

    least: float
    """Its smallest height."""
    text: float
    """The height that shows all its text."""
    width: float
    """The width that shows all its text."""
    writable: bool
    """Whether there is a box to write into."""

    def __or__(self, other: Room) -> Room:
        """Enough for both."""
        return Room(max(self.least, other.least), max(self.text, other.text), max(self.width, other.width),
                    self.writable or other.writable)


@dataclass
class Block:
    """Nodes that stay together: a group, or neighbours without one."""

    group: dict[str, Any] | None
    nodes: list[dict[str, Any]]


def is_picture(node: dict[str, Any]) -> bool:
    return node["type"].startswith(("Save", "Preview", "LoadImage"))


def is_sampler(node: dict[str, Any]) -> bool:
    """Grows by a preview while it samples."""
    return "Sampler" in node["type"] and any(output["type"] == "LATENT" for output in node["outputs"])


def composes(node: dict[str, Any]) -> bool:
    """Puts LoRAs on a model."""
    takes, gives = ({entry["type"] for entry in node.get(slots, ())} for slots in ("inputs", "outputs"))
    return node["type"].startswith("LoRAEnsemble") and "LORA_ENSEMBLE" in takes and "MODEL" in gives


def is_note(node: dict[str, Any]) -> bool:
    return node["type"] in ("MarkdownNote", "Note")


def rows(nodes: Iterable[dict[str, Any]]) -> int:
    """How many LoRAs a panel may have."""
    return sum(node["type"] == "LoRAEnsembleLoRA" for node in nodes) or ROWS


def grows(node: dict[str, Any], loras: int) -> int:
    """What a node takes more of a run than it needs before it."""
    if composes(node):
        return LIVE + LIVE_ROW * loras
    return TEXT if is_sampler(node) else SAYS.get(node["type"], 0)


def taken(node: dict[str, Any], room: Room, shrink: float, loras: int) -> tuple[float, float, float]:
    """The width and height that a node gets, and the height that it takes with what is around it."""
    width, height = size(node, room, shrink)
    return width, height, TITLE + max(height, room.least + grows(node, loras)) + FOOTER + GAP


def size(node: dict[str, Any], room: Room, shrink: float) -> tuple[float, float]:
    """The width and height that a node gets: as saved, and where that is too much together, less for pictures, for the
    preview below a sampler and for the width of the others; never less than it needs."""
    width, height = node["size"]
    if is_picture(node):
        least = SMALLEST if node["type"] != "PreviewAny" else SWITCHES
        return (max(least, room.width, round(width * shrink, -1)),
                max(FILLED.get(node["type"], SMALLEST), room.least, round(height * shrink, -1)))
    width = max(room.width, NARROW if shrink < 0.8 else width)
    if is_note(node):
        return width, room.text
    if is_sampler(node) and shrink < 0.8 or not is_sampler(node) and not room.writable:
        return width, room.least
    return width, max(height, room.text)


def blocks(graph: Graph) -> list[Block]:
    """The groups with their nodes, and nodes without one between them, from left to right, then downwards. Notes stand
    above nodes that grow."""
    found = [Block(group, []) for group in graph["groups"]]
    order = sorted(graph["nodes"], key=lambda node: (*node["pos"], node["id"]))
    for node in order:
        x, y = node["pos"][0] + 1, node["pos"][1] + 1
        home = next((block for block in found if block.group and inside(block.group["bounding"], x, y)), None)
        if home is None:
            home = next((block for block in found if block.group is None and block.nodes[-1]["pos"][0] == x - 1), None)
        if home is None:
            found.append(home := Block(None, []))
        home.nodes.append(node)
    for block in found:
        if any(map(composes, block.nodes)):
            block.nodes.sort(key=is_note, reverse=True)
    return sorted((block for block in found if block.nodes), key=place)


def inside(box: Sequence[float], x: float, y: float) -> bool:
    return box[0] <= x < box[0] + box[2] and box[1] <= y < box[1] + box[3]


def place(block: Block) -> tuple[float, float]:
    if block.group is not None:
        return tuple(block.group["bounding"][:2])
    return block.nodes[0]["pos"][0], block.nodes[0]["pos"][1] - HEAD - TITLE


def columns(sizes: Iterable[tuple[float, float, float]], height: float) -> list[list[int]]:
    """The indexes of a block's nodes in columns of at most `height`, in order."""
    filled: list[list[int]] = [[]]
    used = 0.0
    for i, (_, _, tall) in enumerate(sizes):
        if filled[-1] and used + tall > height:
            filled.append([])
            used = 0.0
        filled[-1].append(i)
        used += tall
    return filled


@dataclass(frozen=True)
class Plan:
    """Where everything goes: boxes (x, y, width, height) of nodes by id, and of groups by their place in `blocks`."""

    nodes: dict[int, tuple[float, float, float, float]]
    groups: list[tuple[float, float, float, float]]
    width: float
    height: float

    @property
    def zoom(self) -> float:
        """That at which the front end opens it."""
        return FILL * min(WINDOW[0] / self.width, WINDOW[1] / self.height)


def plan(found: Sequence[Block], rooms: dict[int, Room], height: float, shrink: float) -> Plan:
    """Blocks in columns of `height` at most, where their nodes allow it; blocks that fit below another stand there."""
    nodes, groups = {}, []
    left, top, widest, tallest = 0.0, 0.0, 0.0, 0.0
    loras = rows(node for block in found for node in block.nodes)
    for block in found:
        sizes = [taken(node, rooms[node["id"]], shrink, loras) for node in block.nodes]
        filled = columns(sizes, height - HEAD - MARGIN)
        spans = [max(sizes[i][0] for i in column) for column in filled]
        tall = HEAD + MARGIN + max(sum(sizes[i][2] for i in column) for column in filled)
        wide = sum(spans) + 2 * MARGIN * len(spans)
        if top and top + tall > height:
            left, top, widest = left + widest + GAP, 0.0, 0.0
        x = left + MARGIN
        for column, span in zip(filled, spans, strict=True):
            y = top + HEAD
            for i in column:
                wanted = sizes[i][0] if is_picture(block.nodes[i]) else span
                nodes[block.nodes[i]["id"]] = (x, y + TITLE, wanted, sizes[i][1])
                y += sizes[i][2]
            x += span + 2 * MARGIN
        groups.append((left, top, wide, tall))
        top, widest = top + tall + GAP, max(widest, wide)
        tallest = max(tallest, top - GAP)
    return Plan(nodes, groups, left + widest, tallest)


def tidy(graph: Graph, rooms: dict[int, Room]) -> tuple[Graph, float]:
    """The workflow, laid out so that doing it again changes nothing, and the zoom at which it opens.

    rooms   what each node needs, by its id
    """
    for _ in range(10):
        before, (graph, zoom) = graph, laid_out(graph, rooms)
        if graph == before:
            break
    return graph, zoom


def laid_out(graph: Graph, rooms: dict[int, Room]) -> tuple[Graph, float]:
    graph = copy.deepcopy(graph)
    found = blocks(graph)
    best = None
    for shrink in SHRUNK:
        plans = [plan(found, rooms, height, shrink) for height in range(500, 1700, 20)]
        best = max(plans, key=lambda option: min(option.zoom, 1.0))
        if best.zoom >= READABLE:
            break
    for node in graph["nodes"]:
        x, y, width, height = best.nodes[node["id"]]
        node["pos"], node["size"] = [round(x - MARGIN + STARTS[0]), round(y)], [round(width), round(height)]
    for block, (x, y, width, height) in zip(found, best.groups, strict=True):
        if block.group is not None:
            block.group["bounding"] = [round(x - MARGIN), round(y), round(width), round(height)]
    graph["extra"]["ds"] = {"scale": round(min(best.zoom, 1.0), 2), "offset": [160, 120]}
    return graph, best.zoom


def measure(page: Any, graph: Graph) -> dict[int, Room]:
    """What each node needs on one canvas: the workflow is opened with every node as small as it goes."""
    small = copy.deepcopy(graph)
    widths = widened(page, graph) if page.nodes_2 else {}
    for node in small["nodes"]:
        node["size"] = [max(node["size"][0], widths.get(node["id"], 0)), 10]
    asked = {node["id"]: node["size"][0] for node in small["nodes"]}
    page.open_graph(small, "measured")
    return {node.id: Room(node.height, node.height + node.hidden,
                          max(node.roomy, widths.get(node.id, 0), node.width if node.width > asked[node.id] else 0),
                          node.writable) for node in page.nodes()}


def widened(page: Any, graph: Graph) -> dict[int, float]:
    """Node id -> the width at which Nodes 2.0 shows its texts whole, for those that need more than NARROW."""
    widths: dict[int, float] = {}
    for _ in range(NARROW, WIDEST, WIDER):
        tried = copy.deepcopy(graph)
        for node in tried["nodes"]:
            node["size"][0] = widths.get(node["id"], NARROW)
        page.open_graph(tried, "measured")
        short = [node.id for node in page.nodes() if node.squeezed]
        if not short:
            break
        widths |= {key: widths.get(key, NARROW) + WIDER for key in short}
    return widths


def write(path: Path, graph: Graph) -> None:
    path.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    from lora_ensemble.tests.browser import Browser, find_chromium
    from lora_ensemble.tests.front_end import FrontEnd
    from lora_ensemble.tests.server import Server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="example workflows, without .json")
    parser.add_argument("--front-end", nargs="+", type=Path, default=[], help="folders of other front ends")
    options = parser.parse_args(arguments)
    paths = [FOLDER / f"{name}.json" for name in options.names] or sorted(FOLDER.glob("*.json"))
    comfyui, chromium = os.environ.get("COMFYUI_UNDER_TEST"), find_chromium()
    if not comfyui or not chromium:
        sys.stderr.write("Needs a ComfyUI (COMFYUI_UNDER_TEST) and a Chromium (on the PATH, or CHROMIUM).\n")
        return 1
    graphs = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    rooms: dict[Path, dict[int, Room]] = {path: {} for path in paths}
    for served in ((), *(("--front-end-root", str(front_end)) for front_end in options.front_end)):
        with tempfile.TemporaryDirectory() as folder, \
                Server(Path(comfyui), Path(folder, "comfyui"), arguments=served) as server, \
                Browser(Path(folder, "browser"), chromium) as browser:
            for nodes_2 in (True, False):
                page = FrontEnd(browser, server, nodes_2)
                for path, graph in graphs.items():
                    for key, room in measure(page, graph).items():
                        rooms[path][key] = rooms[path].get(key, room) | room
    for path, graph in graphs.items():
        changed, zoom = tidy(graph, rooms[path])
        if changed != graph:
            write(path, changed)
        sys.stdout.write(f"{zoom:5.0%}  {path.stem}{'' if changed == graph else '  changed'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
