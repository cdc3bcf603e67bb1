"""Which entries of a layer belong to which row: what the table says, against what happens when they are disturbed."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.families.row_order import FAMILIES, one_row_only, row_order
from torch import Tensor, nn

from .blocks import Transformer, noise
from .disturbed import exists, skipped_where_older, watching
from .small import FLUX_2, UNET, like, references
from .small_video import HUNYUAN, SMALL, built, forgotten, nothing_left  # noqa: F401

pytestmark = pytest.mark.usefixtures("forgotten")

APART = {"SVD", "Cosmos", "MiniMax H3", "MiniMax H3 references", "Wan Animate 2", "ACE-Step 1.5", "Hunyuan3D 2.1",
         "Trellis 2", "Trellis 2 shape", "SeedVR2"}
"""Families that are built small and are not in the table."""

in_the_table = pytest.mark.parametrize("name", [name for name in SMALL if name not in {*APART, "HunyuanVideo I2V"}])


def predicted(kind: Transformer, model: nn.Module, rows: int) -> Tensor:
    """The prediction for so many rows. An older release may not make such a call, or mix rows on its own in it; the
    newest that the tests know does neither."""
    with skipped_where_older(kind.name):
        plain = kind.call(model, {}, rows=rows)
        with model.register_forward_pre_hook(lambda _, args: (changed(args[0]), *args[1:])):
            moved = kind.call(model, {}, rows=rows)
        assert plain.shape[0] == rows and torch.equal(plain[1:], moved[1:]) and not torch.equal(plain[0], moved[0])
    return plain


def changed(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """A latent whose first row is another."""
    if isinstance(x, list):
        return [changed(part) for part in x]
    return torch.cat([x[:1] + noise(*x[:1].shape, seed=9), x[1:]])


def calls(kind: Transformer, model: nn.Module, rows: int) -> dict[tuple[str, int], None]:
    """(layer, entries) of all layers in a call."""
    seen: dict = {}
    with watching(model, lambda layer, geometry, x, out: seen.setdefault((layer, x.shape[0]))):
        kind.call(model, {}, rows=rows)
    return seen


def of_row(order: str, entries: int, rows: int, row: int) -> list[int]:
    """The entries of one row, written out."""
    return [e for e in range(entries) if row == (e % rows if order == "tile" else e * rows // entries)]


def reached(kind: Transformer, model: nn.Module, plain: Tensor, row: int, order, only: str | None = None) -> set[int]:
    """The rows of the prediction that change where in all layers, or one, what `order` gives to a row is disturbed."""

    rows = plain.shape[0]

    def disturb(layer, geometry, x, out):
        found = order(layer, x.shape[0], rows) if only in (None, layer) else None
        if found is None:
            return None
        mine, out = of_row(found, x.shape[0], rows, row), out.clone()
        out[mine] += 0.1 * noise(*out[mine].shape, seed=3)
        return out

    with watching(model, disturb):
        changed = kind.call(model, {}, rows=rows)
    return {r for r in range(rows) if not torch.equal(changed[r], plain[r])}


@in_the_table
@pytest.mark.parametrize("rows", [2, 3])
def test_rows_keep_apart(name, rows):
    """Disturbing all that the table gives to one row, in every layer at once, changes that row and no other."""
    kind, model = SMALL[name], built(name)
    plain = predicted(kind, model, rows)
    assert not one_row_only(model, kind.more(rows))
    for row in range(rows):
        assert reached(kind, model, plain, row, row_order(model)) == {row}


@in_the_table
def test_no_other_order_is_right(name):
    """What the table calls "repeat" is not "tile" and the other way round; what it leaves open is neither."""
    kind, model, orders, uneven = SMALL[name], built(name), {}, set()
    plain = [predicted(kind, model, rows) for rows in (2, 3)]
    for rows in (2, 3):
        for layer, entries in calls(kind, model, rows):
            found = row_order(model)(layer, entries, rows)
            if found != "rows":
                orders.setdefault(layer, set()).add(found)
            if entries % rows:
                uneven.add(layer)
    for layer, found in orders.items():
        assert len(found) == 1, f"{layer}: {found}"
        for other in {"repeat", "tile"} - found:
            assert layer in uneven or mixes(kind, model, plain, layer, other), f"{layer} is also {other}"


def mixes(kind: Transformer, model: nn.Module, plain: list[Tensor], layer: str, order: str) -> bool:
    """Whether a layer's entries are not those of its rows in that order, in a call of two rows or of three."""
    return any(reached(kind, model, out, 0, lambda *_: order, layer) != {0} for out in plain)


@pytest.mark.parametrize("name", sorted(APART))
def test_families_apart(name):
    assert row_order(built(name)) is None


def test_the_table_is_tried():
    """Every family of the table that this ComfyUI has is built here."""
    tried = set()
    for name in SMALL:
        try:
            cls = type(built(name))
        except pytest.skip.Exception:
            continue
        tried.add(f"{cls.__module__.removeprefix('comfy.ldm.')}.{cls.__name__}")
    assert {name for name in FAMILIES if exists(name)} <= tried


def test_derived_classes():
    """A class that changes nothing of the forward counts as its parent; one that does, or a namesake, does not."""
    model = built("SD15")
    parent = type(model)
    for body, known in (({}, True), ({"forward": parent.forward}, False), ({"_forward_part": None}, False)):
        model.__class__ = type("Derived", (parent,), body)
        try:
            assert (row_order(model) is not None) == known
        finally:
            model.__class__ = parent
    assert row_order(type("UNetModel", (nn.Module,), {})()) is None


ZERO = references((16, 4, 4), method="index_timestep_zero")


@pytest.mark.parametrize("kind", [
    like(FLUX_2, "guided", lambda rows: {**ZERO(rows), "guidance": torch.ones(rows)}, guidance_embed=True),
    like(HUNYUAN, "first frame", lambda rows: {"guiding_frame_index": torch.zeros(rows)}),
    like(HUNYUAN, "reference", lambda rows: {"ref_latent": noise(rows, 16, 1, 8, 8)}),
], ids=lambda kind: kind.name)
def test_calls_of_one_row(kind):
    """With several rows the host's own forward fails there, or mixes them; with one it does not."""
    model = kind.build()
    assert one_row_only(model, kind.more(1))
    kind.call(model, {}, rows=1)
    try:
        mixed = reached(kind, model, kind.call(model, {}, rows=2), 0, row_order(model)) != {0}
    except RuntimeError:
        mixed = True
    assert mixed
    assert not one_row_only(UNET.build(), {"ref_latent": noise(1, 4)})
