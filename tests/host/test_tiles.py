"""Beside nodes that hand parts of the picture to the model, several in a batch (Tiled Diffusion): each LoRA acts in the
rows that are its own, and in its place of the whole picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.controlnet
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from lora_ensemble.host.compose import tiles
from lora_ensemble.host.compose.composition import places_of, record_of
from torch import Tensor

from .builders import composite, hooked, merge, same, sample, stock, three
from .caches import cached, steps_of
from .models import CPU, FAMILIES, base
from .neighbour_packs import pack
from .test_masks import LAST, pair
from .test_neighbours_routed import masked
from .test_routed import bare, prompt, routed, specs
from .test_scenarios import control_model  # noqa: F401  (a fixture)


def halves(model, roll: int = 0):
    """The left and the right half of the picture, side by side in a batch; rolled, none of them is a part of it."""
    def wrapper(apply: Callable, args: dict) -> Tensor:
        x = args["input"].roll(roll, -1)
        wide, rows = x.shape[-1] // 2, len(x)
        conds = {name: value.repeat(2, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and len(value) == rows
                 else value for name, value in args["c"].items()}
        out = apply(torch.cat([x[..., :wide], x[..., wide:]]), args["timestep"].repeat(2), **conds)
        return torch.cat(out.split(rows), -1).roll(-roll, -1)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def tiled_diffusion(model, method: str, count: int = 4):
    """Four tiles of six by six that lie over one another, so many of them in a batch."""
    node = pack("ComfyUI-TiledDiffusion", "tiled_diffusion").TiledDiffusion()
    return node.apply(model, method, 48, 48, 32, count)[0]


TILES = {"halves": halves, **{name: partial(tiled_diffusion, method=name) for name in (
    "MultiDiffusion", "Mixture of Diffusers")}}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TILES)
def test_several_branches_are_the_mean_of_runs_with_one(name, batch, loras):
    """Guard: `apply_model` knows of parts. Rows of a part lie beside each other, not those of a cond."""
    tiles, kind, model = TILES[name], FAMILIES["SD15"], base("SD15")
    ensemble, plain = three(model, loras), sample(tiles(model), batch=batch)
    assert not torch.equal(plain, sample(model, batch=batch)), "it cuts nothing"
    wanted = sample(tiles(model), "SD15", *(hooked(kind.cond(seed), ensemble) for seed in (11, 12)), batch=batch)
    for ours in (tiles(composite(model, ensemble)), composite(tiles(model), ensemble)):
        same(sample(ours, batch=batch), wanted, plain)
        assert record_of(ours).problems == []


@pytest.mark.parametrize("family", ["SD15", "Flux"])
@pytest.mark.parametrize("name", TILES)
def test_masks_are_of_the_whole_picture(name, family, loras):
    """Guard: `with_tiles` finds them. In each tile the mask would be one of the tile. `halves` do not overlap, so that
    the picture of each LoRA alone can be put together."""
    tiles, model = TILES[name], base(family)
    ensemble, where = pair(model, loras, LAST[family]), torch.zeros(1, 1, 8, 8)
    where[..., :4] = 1
    first, second = (sample(tiles(stock(model, [spec])), family, steps=1) for spec in bare(ensemble))
    ours = tiles(merge(model, ensemble))
    wanted = where * first + (1 - where) * second
    same(sample(ours, family, steps=1), wanted, sample(tiles(model), family, steps=1))
    assert record_of(ours).problems == []


@pytest.mark.parametrize("family", ["SD15", "Flux"])
@pytest.mark.parametrize("name", TILES)
def test_words_are_found_in_the_whole_picture(name, family, loras):
    tiles, model = TILES[name], base(family)
    ensemble = specs(model, loras, wanted=lambda layer: layer == LAST[family])
    alone, ours = (make(routed(model, ensemble, mode="once", trust=False)) for make in (lambda each: each, tiles))
    sample(alone, family, prompt(family), steps=1)
    found = sample(ours, family, prompt(family))
    maps = places_of(ours)[0].maps
    assert record_of(ours).problems == [] and torch.equal(maps, places_of(alone)[0].maps) and 0 < maps.mean() < 1
    known = tiles(routed(model, masked(ensemble, maps[0]), mode="once", trust=False))
    same(found, sample(known, family, prompt(family)), sample(tiles(model), family, prompt(family)))


@pytest.mark.parametrize("count", [1, 4])
def test_controls_of_tiles(count, control_model, loras):  # noqa: F811
    """Guard: `OWN_CONTROLS`. Tiled Diffusion cuts the hint into tiles, and puts that on the control itself."""
    model = base("SD15")
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))

    def drawn(model):
        net = comfy.controlnet.ControlNet(control_model, load_device=CPU).set_cond_hint(hint, 0.5)
        conds = (FAMILIES["SD15"].cond(seed, control=net, control_apply_to_uncond=False) for seed in (11, 12))
        return sample(tiled_diffusion(model, "MultiDiffusion", count), "SD15", *conds, steps=1)

    ensemble = three(model, loras)
    same(drawn(composite(model, ensemble)), sum(drawn(stock(model, [spec])) for spec in ensemble) / 3, drawn(model))


def test_nothing_waits_for_the_device_where_no_lora_has_a_place(monkeypatch, loras):
    """Guard: parts are looked for where places are. To find one reads the latent."""
    model, searched = base("SD15"), []
    monkeypatch.setattr(tiles, "_area", lambda part, picture: searched.append(part))
    sample(halves(composite(model, three(model, loras))))
    assert not searched
    sample(halves(merge(model, pair(model, loras))))
    assert searched


def test_parts_that_are_in_no_place_of_the_picture(loras):
    model = base("SD15")
    ours = halves(merge(model, pair(model, loras)), roll=1)
    sample(ours)
    (line,) = record_of(ours).problems
    assert "where they are in it cannot be told" in line


def test_features_are_those_of_a_part(loras):
    """Guard: in Branch Cache's keys, where it is: tiles may come in another order, or move (SpotDiffusion)."""
    def turning(model):
        """The halves, the right one first in every second step."""
        seen: list[float] = []

        def wrapper(apply: Callable, args: dict) -> Tensor:
            seen.extend({float(args["timestep"][0])} - {*seen})
            order = 1 if len(seen) % 2 else -1
            parts = [apply(x, args["timestep"], **args["c"]) for x in args["input"].chunk(2, -1)[::order]]
            return torch.cat(parts[::order], -1)

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    model = base("SD15")
    still, turned, moved = halves(cached(model)), turning(cached(model)), halves(cached(model), roll=1)
    same(sample(turned, steps=3), sample(still, steps=3), sample(halves(model), steps=3), 1e-4)
    sample(moved, steps=3)
    assert [[step["reused"] for step in steps_of(each)] for each in (still, turned, moved)] == [
        [0, 4, 4], [0, 4, 4], [0, 0, 0]]
    (line,) = record_of(moved).problems
    assert "Branch Cache: a node hands parts of the picture" in line and record_of(turned).problems == []


def test_latents_that_a_node_goes_over_one_by_one(loras):
    """Ultimate SD Upscale and others draw tiles as pictures of their own, square as a mask is. Nothing tells them from
    pictures but that one node draws several, each over what there is."""
    model = base("SD15")
    ensemble, found = pair(model, loras), []
    ours = merge(model, ensemble)

    def drawn(node: str, denoise: float = 0.3, size: int = 8, index: int | None = None) -> None:
        latent = FAMILIES["SD15"].noise(1, size, len(found))
        with CurrentNodeContext("prompt", node, index):
            sample(ours, latent=latent, denoise=denoise, size=size)
        found.append(record_of(ours).problems)

    for _ in range(3):
        drawn("tiles")
    assert found[0] == [] and found[1] == found[2] and len(found[1]) == 1
    assert "parts of a picture" in found[1][0] and all(f"'{spec.name}'" in found[1][0] for spec in ensemble)
    found.clear()
    for options in (dict(index=0), dict(index=1), {}, dict(size=16), dict(size=8, denoise=1.0), dict(denoise=1.0)):
        drawn("pictures", **options)
    assert found == [[]] * 6, "a list of latents, a larger one, new pictures"
    for _ in range(2):
        sample(ours, latent=FAMILIES["SD15"].noise(), denoise=0.3)
        assert record_of(ours).problems == [], "no node draws it"


PICTURE = torch.randint(3, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0)).float()  # no value is alone


def told(wrapper: Callable, aside: bool = False, placed: bool = True, known: dict | None = None,
         picture: Tensor = PICTURE) -> tuple[list, Tensor]:
    """What a model is told of the parts in each call that a function wrapper makes of it for a picture, whose
    prediction is its input; and what comes out."""
    calls = []

    def model(x: Tensor, timestep: Tensor, **conds) -> Tensor:
        calls.append(conds.get("transformer_options", {}).get(tiles.TILES))
        return x

    given = {"input": picture, "timestep": torch.ones(2), "c": {"transformer_options": {}}}
    known = {} if known is None else known
    return calls, tiles.with_tiles(wrapper, lambda: aside, placed, known)(model, given)


def by(make: Callable[[Tensor], Tensor]) -> Callable:
    """A function wrapper that calls the model once, with what is made of the picture, and triples what comes out."""
    return lambda apply, args: 3 * apply(make(args["input"]), args["timestep"], **args["c"])


@pytest.mark.parametrize("make", [lambda x: x, lambda x: torch.cat([x, x[:, :1]], 1)[..., :4], lambda x: x[:1, ..., :4],
                                  lambda x: torch.cat([x, x[:1]])[..., :4], lambda x: x[:, :, None]],
                         ids=["whole", "other channels", "fewer rows", "more rows", "a film"])
@pytest.mark.parametrize("aside", [False, True])
def test_what_is_no_part_of_the_picture_is_left_to_the_wrapper(make, aside):
    calls, out = told(by(make), aside)
    assert calls == [None] and torch.equal(out, 3 * make(PICTURE))


def test_places_of_parts():
    """By all of their values, of each row of a batch the same, in each corner."""
    for y, x in ((0, 0), (0, 3), (2, 0), (2, 3), (1, 1)):
        calls, out = told(by(lambda picture, y=y, x=x: picture[..., y:y + 4, x:x + 3]))
        assert calls == [((4, 3, y, x),)] and torch.equal(out, 3 * PICTURE[..., y:y + 4, x:x + 3])
    two = by(lambda picture: torch.cat([picture[..., :3], picture[..., 3:]]))
    assert told(two)[0] == [((6, 3, 0, 0), (6, 3, 0, 3))] and told(two, placed=False)[0] == [(None, None)]
    assert told(by(lambda picture: picture[..., :4] + 1))[0] == [(None,)]


def test_places_of_parts_of_a_picture_that_has_become_smaller():
    known: dict = {}
    for picture, x in ((PICTURE, 3), (PICTURE[..., :4], 1)):
        both = by(lambda picture, x=x: torch.cat([picture[..., :3], picture[..., x:x + 3]]))
        assert told(both, known=known, picture=picture)[0] == [((6, 3, 0, 0), (6, 3, 0, x))]


def test_parts_are_sought_where_they_were(monkeypatch):
    """Guard: to seek one anywhere reads the device twice. Here all of a call are read at once, and those that have
    moved are sought again."""
    sought, known, equal, area = [], {}, torch.equal, tiles._area
    monkeypatch.setattr(torch, "equal", lambda *pair: sought.append("all of them") or equal(*pair))

    def seek(part, picture):
        sought.append("anywhere")
        return area(part, picture)

    monkeypatch.setattr(tiles, "_area", seek)

    def tiled(first: int) -> Callable:
        def wrapper(apply: Callable, args: dict) -> Tensor:
            for k in (first, first + 1):  # two calls of two tiles
                apply(torch.cat([args["input"][..., k:k + 3], args["input"][..., 3 - k:6 - k]]), args["timestep"])
            return args["input"]
        return wrapper

    def at(first: int) -> list:
        sought.clear()
        calls, _ = told(tiled(first), known=known)
        return [tuple(x for *_, x in call) for call in calls]

    assert at(0) == [(0, 3), (1, 2)] and sought.count("anywhere") == 4
    assert at(0) == [(0, 3), (1, 2)] and sought == ["all of them"] * 2
    assert at(1) == [(1, 2), (2, 1)] and sought.count("anywhere") == 4


def test_in_an_evaluation_aside_the_picture_is_evaluated_once_and_as_a_whole():
    calls, out = told(lambda apply, args: torch.cat([apply(args["input"][..., k:k + 3], args["timestep"], **args["c"])
                                                     for k in (0, 3)], -1), aside=True)
    assert calls == [None] and torch.equal(out, PICTURE)


def test_pictures_that_are_there_twice_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(tiles, "_area", None)
    assert told(by(lambda picture: picture.repeat(2, 1, 1, 1)))[0] == [((), ())]


def test_parts_of_areas():
    """Of each part all areas, wherever on the latent these lie."""
    areas, found = [None, (4, 4, 1, 2)] * 3, [(2, 2, 0, 0), (2, 2, 0, 2), (2, 2, 2, 1)]
    assert tiles.inside(areas, found) == [(2, 2, 0, 0), (2, 2, 1, 2), (2, 2, 0, 2), (2, 2, 1, 4), (2, 2, 2, 1),
                                          (2, 2, 3, 3)]
    assert tiles.inside(areas, [(), (), ()]) == areas
    assert tiles.inside(areas, []) == tiles.inside(areas, [(2, 2, 0, 0), None, None]) == areas
