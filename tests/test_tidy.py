"""The tool that lays workflows out: order, groups and rooms kept, nothing over anything, and the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lora_ensemble.tools.tidy import (
    FILLED,
    FOLDER,
    LIVE,
    LIVE_ROW,
    READABLE,
    TEXT,
    TITLE,
    Room,
    grows,
    inside,
    is_sampler,
    rows,
    tidy,
)


def node(key: int, x: float, y: float, kind: str = "LoRAEnsembleLoRA", width: float = 340, height: float = 200) -> dict:
    return {"id": key, "type": kind, "pos": [x, y], "size": [width, height], "outputs": []}


def group(title: str, *bounding: float) -> dict:
    return {"title": title, "bounding": list(bounding)}


@pytest.fixture
def untidy() -> dict:
    """Three LoRAs over one another, a note between two groups, a picture."""
    return {
        "nodes": [node(3, 400, 300), node(1, 0, 40, "CheckpointLoaderSimple"), node(2, 400, 40), node(4, 400, 320),
                  node(5, 800, 40, "MarkdownNote"), node(6, 1200, 40, "SaveImage", 900, 700)],
        "groups": [group("Model", -20, -40, 380, 800), group("LoRAs", 380, -40, 380, 800),
                   group("Picture", 1180, -40, 1000, 900)],
        "extra": {"ds": {}},
    }


ROOMS = {key: Room(250, 250, 300, False) for key in range(1, 7)} | {5: Room(90, 400, 280, False)}


def boxes(graph: dict) -> dict[int, tuple[float, ...]]:
    return {entry["id"]: (*entry["pos"], *entry["size"]) for entry in graph["nodes"]}


def test_nothing_is_over_anything_and_every_node_has_its_room(untidy):
    graph, _ = tidy(untidy, ROOMS)
    placed = boxes(graph)
    for key, (x, y, width, height) in placed.items():
        assert height >= (ROOMS[key].text if key == 5 else ROOMS[key].least) and width >= ROOMS[key].width
        for other, (ox, oy, owidth, oheight) in placed.items():
            apart = x + width <= ox or ox + owidth <= x or y + height + TITLE <= oy or oy + oheight + TITLE <= y
            assert key == other or apart


def test_nodes_keep_their_groups_and_their_order(untidy):
    graph, _ = tidy(untidy, ROOMS)
    members = {group["title"]: [key for key, (x, y, *_) in boxes(graph).items() if inside(group["bounding"], x, y)]
               for group in graph["groups"]}
    assert {title: set(keys) for title, keys in members.items()} == {"Model": {1}, "LoRAs": {2, 3, 4}, "Picture": {6}}
    placed = boxes(graph)
    assert placed[2][:2] < placed[3][:2] < placed[4][:2]


def test_what_is_tidy_stays_as_it_is(untidy):
    graph, zoom = tidy(untidy, ROOMS)
    assert zoom >= READABLE
    assert tidy(graph, ROOMS) == (graph, zoom)


def test_a_picture_gives_way_where_the_whole_would_be_too_small_to_read(untidy):
    rooms = {key: Room(700, 700, 400, False) for key in ROOMS}
    graph, _ = tidy(untidy, rooms)
    assert boxes(graph)[6][2] < 900


def test_the_workflow_that_is_handed_in_is_left_alone(untidy):
    before = boxes(untidy)
    tidy(untidy, ROOMS)
    assert boxes(untidy) == before


def test_below_a_node_that_composes_there_is_room_for_its_panel(untidy):
    untidy["nodes"][2] |= {"inputs": [{"type": "LORA_ENSEMBLE"}], "outputs": [{"type": "MODEL"}]}
    untidy["nodes"].append(node(7, 400, 600, "MarkdownNote"))
    placed = boxes(tidy(untidy, ROOMS | {7: Room(90, 150, 280, False)})[0])
    (x, y, _, height), below = placed[2], LIVE + 3 * LIVE_ROW
    assert placed[7][0] == x and placed[7][1] < y, "the note stands above it"
    assert all(other[1] - TITLE >= y + height + below for other in placed.values() if other[0] == x and other[1] > y)


def test_a_sampler_has_room_for_its_text_below_or_within(untidy):
    """That of one is as high as it needs to be, the other has height to spare."""
    for key, height in ((7, 250), (8, 250 + TEXT)):
        untidy["nodes"].append(node(key, 2400 + 500 * key, 40, "KSampler", height=height)
                               | {"outputs": [{"type": "LATENT"}]})
        untidy["nodes"].append(node(key + 10, 2400 + 500 * key, 400, "VAEDecode"))
    rooms = ROOMS | {key: Room(250, 250, 300, False) for key in (7, 8, 17, 18)}
    placed = boxes(tidy(untidy, rooms)[0])
    for key in (7, 8):
        (x, y, _, height), (below_x, below_y, *_) = placed[key], placed[key + 10]
        assert x == below_x and below_y - TITLE - (y + 250) >= TEXT and height == {7: 250, 8: 250 + TEXT}[key]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_an_example_shows_of_a_run_has_its_room(path: Path):
    """Panels, texts and pictures grow over nothing, and stay in their groups. A sampler may have height to spare."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    after = {}
    for entry in graph["nodes"]:
        (x, y), (width, height) = entry["pos"], entry["size"]
        height += 0 if is_sampler(entry) else grows(entry, rows(graph["nodes"]))
        after[entry["id"]] = x, y - TITLE, x + width, y + max(height, FILLED.get(entry["type"], 0))
    for key, (left, top, right, bottom) in after.items():
        over = [other for other, (x, y, end, _) in after.items() if x < right and left < end and top < y < bottom]
        out = [group["title"] for group in graph["groups"] if inside(group["bounding"], left + 1, top + TITLE + 1)
               and bottom > group["bounding"][1] + group["bounding"][3]]
        assert (key, over, out) == (key, [], [])
