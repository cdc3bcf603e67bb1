"""Which tensors fit together and fit a layer, by their sizes alone."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from lora_ensemble.host.files.fit import (
    Broken,
    Misfit,
    Torn,
    check,
    check_alpha,
    check_result,
    check_values,
    enlarged_shape,
    is_old_glora,
    plain_magnitude,
    scales,
)

FITS = None
LINEAR, CONV, NORM = (4, 6), (4, 6, 3, 3), (4,)


def made(values) -> list:
    return [torch.ones(value) if isinstance(value, tuple) else value for value in values]


def patch(kind: str, *values):
    """A patch of the host's: sizes become tensors of ones."""
    values = made(values)
    return (kind, tuple(values)) if kind in ("diff", "set") else SimpleNamespace(name=kind, weights=values)


def lora(up, down, alpha=None, mid=None, magnitude=None, reshape=None):
    return patch("lora", up, down, alpha, mid, magnitude, reshape)


def loha(a, b, c, d, alpha=None, t1=None, t2=None, magnitude=None):
    return patch("loha", a, b, alpha, c, d, t1, t2, magnitude)


def lokr(w1=None, w2=None, a1=None, b1=None, a2=None, b2=None, alpha=None, t2=None, magnitude=None):
    return patch("lokr", w1, w2, alpha, a1, b1, a2, b2, t2, magnitude)


CASES = [
    (lora((4, 2), (2, 6)), LINEAR, FITS),
    (lora((4, 2, 2), (4, 6)), LINEAR, FITS),  # the host takes it as a matrix
    (lora((4, 2, 1, 1), (2, 6, 3, 3)), CONV, FITS),
    (lora((4, 2, 1, 1), (2, 6, 1, 1), mid=(2, 2, 3, 3)), CONV, FITS),
    (lora((4, 2), (2, 7)), LINEAR, Misfit),
    (lora((3, 2), (2, 8)), LINEAR, Misfit),  # as many entries
    (lora((4, 2), (3, 6)), LINEAR, Torn),
    (lora((4, 2), (6,)), LINEAR, Torn),
    (lora((4, 2), ()), LINEAR, Torn),
    (lora((4, 2), (), alpha=1.0), LINEAR, Broken),
    (lora((4, 2, 1, 1), (2, 6, 2, 1), mid=(2, 2, 3, 3)), CONV, Broken),
    (lora((4, 2, 1, 1), (2, 6, 1, 1), mid=(2, 3, 3, 3)), CONV, Broken),
    (lora((4, 0), (0, 6), alpha=1.0, magnitude=(4, 1)), LINEAR, Broken),
    (lora((4, 0), (0, 6), magnitude=(4, 1)), LINEAR, FITS),
    (loha((4, 2), (2, 6), (4, 3), (3, 6), 1.0), LINEAR, FITS),
    (loha((2, 4), (2, 6), (2, 4), (2, 6), None, (2, 2, 3, 3), (2, 2, 3, 3)), CONV, FITS),
    (loha((2, 4), (2, 6), (2, 4), (2, 6), None, (2, 3, 3, 3), (2, 2, 3, 3)), CONV, Broken),
    (loha((4, 2), (3, 6), (4, 3), (3, 6)), LINEAR, Broken),
    (loha((4, 2), (2, 6), (4, 3), (3, 5)), LINEAR, Torn),
    (loha((4, 2), (2, 5), (4, 3), (3, 5)), LINEAR, Misfit),
    (loha((4, 0), (0, 6), (4, 3), (3, 6), 1.0), LINEAR, Broken),
    (loha((4, 0), (0, 6), (4, 3), (3, 6)), LINEAR, FITS),
    (lokr((2, 2), (2, 3)), LINEAR, FITS),
    (lokr((2, 2), (2, 3, 3)), (4, 6, 3), FITS),
    (lokr((2, 2), (2, 3, 3, 3)), CONV, FITS),
    (lokr((2, 2), (2, 1, 3)), LINEAR, Torn),
    (lokr((2, 2, 1), (2, 3)), LINEAR, Broken),
    (lokr((2, 2), (2, 2)), LINEAR, Misfit),
    (lokr((2, 2), a2=(2, 0), b2=(0, 3), alpha=1.0), LINEAR, Broken),
    (lokr(None, (2, 3), a1=(2, 0), b1=(0, 2), alpha=1.0), LINEAR, Broken),
    (lokr((2, 2), a2=(2, 2)), LINEAR, Broken),
    (patch("glora", (6, 2), (2, 6), (4, 2), (2, 6), None, None), LINEAR, FITS),
    (patch("glora", (2, 6), (6, 2), (2, 6), (4, 2), None, None), LINEAR, FITS),  # of the first releases
    (patch("glora", (6, 2, 1, 1), (2, 6, 1, 1), (4, 2, 1, 1), (2, 6, 3, 3), None, None), CONV, FITS),
    (patch("glora", (6, 2), (2, 6), (4, 2), (2, 5), None, None), LINEAR, Misfit),
    (patch("glora", (6, 2), (2, 6), (4, 2, 2), (2, 6), None, None), LINEAR, Torn),
    (patch("glora", (6, 2), (3, 6), (4, 2), (2, 6), None, None), LINEAR, Torn),
    (patch("glora", (6, 2), (3, 6), (4, 2), (2, 6), 1.0, None), LINEAR, Broken),
    (patch("glora", (6, 0), (0, 6), (4, 0), (0, 6), 1.0, None), LINEAR, Broken),
    (patch("oft", (2, 2, 2), None, None, (4, 1)), LINEAR, FITS),
    (patch("oft", (1, 2, 2), None, None, None), LINEAR, Misfit),
    (patch("oft", (3, 2, 2), None, None, None), LINEAR, Misfit),
    (patch("oft", (2, 2, 3), None, None, None), LINEAR, Torn),
    (patch("oft", (2, 2, 2), None, None, (6, 1)), LINEAR, Torn),
    (patch("boft", (2, 2, 2, 2), (4, 1), 1.0, None), LINEAR, FITS),
    (patch("boft", (2, 1, 4, 4), None, 1.0, None), LINEAR, Misfit),  # two stages turn eight channels together
    (patch("boft", (1, 4, 1, 1), None, 1.0, None), LINEAR, Misfit),
    (patch("boft", (2, 2, 2, 2), (1, 4), 1.0, None), LINEAR, Misfit),
    (patch("boft", (2, 2, 2, 2), None, None, None), LINEAR, Torn),
    (patch("diff", LINEAR), LINEAR, FITS), (patch("diff", (6, 4)), LINEAR, Misfit),
    (patch("diff", (5, 6), {"pad_weight": True}), LINEAR, FITS),
    (patch("diff", (5, 6), {"pad_weight": False}), LINEAR, Misfit),
    (patch("set", (6,)), (1, 6), FITS), (patch("set", (6,)), LINEAR, Broken), (patch("set", (4,)), (4, 1), Broken),
    *((lora((4, 2), (2, 6), magnitude=size), LINEAR, want) for size, want in (
        ((4, 1), FITS), ((1, 6), FITS), ((1,), FITS), ((1, 1), FITS), ((), Torn), ((4,), Torn), ((6, 1), Torn))),
    (lora((4, 2), (2, 1), magnitude=(4,)), NORM, FITS), (lora((4, 2), (2, 1), magnitude=(1,)), NORM, Torn),
]


@pytest.mark.parametrize(("one", "shape", "why"), CASES)
def test_what_fits(one, shape, why):
    if why is FITS:
        check(one, shape, None)
    else:
        with pytest.raises((Misfit, Broken)) as raised:
            check(one, shape, None)
        assert raised.type is why


def test_what_fits_a_slice():
    check(patch("diff", (2, 6)), (8, 6), (0, 6, 2))
    check(lora((2, 2), (2, 6), reshape=[2, 6]), (8, 6), (0, 6, 2))
    with pytest.raises(Misfit, match="a slice that ends at 9"):
        check(patch("diff", (2, 6)), (8, 6), (0, 7, 2))
    with pytest.raises(Misfit, match="enlarges a slice"):
        check(lora((3, 2), (2, 6), reshape=[3, 6]), (8, 6), (0, 6, 2))


def test_what_is_enlarged_fits_the_layer_that_it_makes():
    check(lora((4, 2), (2, 8), reshape=[4, 8]), LINEAR, None)
    with pytest.raises(Misfit):
        check(lora((4, 2), (2, 6), reshape=[4, 8]), LINEAR, None)
    assert enlarged_shape(lora((4, 2), (2, 8), reshape=[4, 8]), LINEAR) == (4, 8)
    assert enlarged_shape(lora((4, 2), (2, 6), reshape=[4, 6]), LINEAR) == LINEAR
    assert enlarged_shape(patch("diff", (5, 6), {"pad_weight": True}), LINEAR) == (5, 6)
    for other in (lora((4, 2), (2, 6)), patch("diff", (5, 6)), patch("diff", (5, 6), {"pad_weight": False}),
                  patch("oft", (2, 2, 2), None, None, None)):
        assert enlarged_shape(other, LINEAR) is None
    for sizes in ([4, 5], [4, 6, 1], [4, 8.0], [4], 8):
        with pytest.raises(Broken, match="can only enlarge"):
            enlarged_shape(lora((4, 2), (2, 8), reshape=sizes), LINEAR)


class File(dict):
    def peak(self, key: str) -> float:
        return float(self[key].float().abs().max())


@pytest.mark.parametrize(("value", "fine"), [
    (torch.ones(2, 2), True), (torch.ones(2, 2, dtype=torch.bfloat16), True), (torch.ones(2, dtype=torch.int64), True),
    (torch.tensor(True), True), (torch.ones(2, 2, dtype=torch.int8), False), (torch.ones(2) * 1j, False),
    (torch.tensor([1.0, inf]), False), (torch.tensor([1.0, float("nan")]), False)])
def test_which_values_are_numbers(value, fine):
    if fine:
        check_values(File(x=value), "x")
    else:
        with pytest.raises(Broken, match="'x'"):
            check_values(File(x=value), "x")


def test_alpha_is_one_number():
    for alpha in (None, torch.tensor(2.0), torch.ones(1), torch.ones(1, 1)):
        check_alpha("x.alpha", alpha)
    for alpha in (torch.ones(2), torch.ones(0), torch.tensor(1j)):
        with pytest.raises(Broken, match=r"'x\.alpha' holds"):
            check_alpha("x.alpha", alpha)
    assert scales(lora((4, 2), (2, 6))) and scales(lokr((2, 2), a2=(2, 1), b2=(1, 3)))
    assert scales(lokr(None, (2, 3), (2, 1), (1, 2)))
    assert not scales(lokr((2, 2), (2, 3))) and not scales(patch("diff", LINEAR))


@pytest.mark.parametrize(("up", "down", "fine"), [
    ([[1e4, 1e4]], [[1e4], [1e4]], False), ([[1e30, -1e30]], [[1e30], [1e30]], False),
    ([[1e4, 1e4]], [[1e-4], [1e-4]], True), ([[1e7, 1e7]], [[1e-4], [1e-4]], True)])
def test_a_product_that_no_weight_can_take(up, down, fine):
    """Also where it is no number: infinity less infinity."""
    up, down = torch.tensor(up), torch.tensor(down)
    one = LoRAAdapter(set(), (up, down, None, None, None, None))
    peaks = [float(each.abs().max()) for each in (up, down)]
    if fine:
        check_result(one, (1, 1), None, peaks)
    else:
        with pytest.raises(Broken, match="more than weights can hold"):
            check_result(one, (1, 1), None, peaks)


@pytest.mark.parametrize(("given", "shape", "made"), [
    ((4,), LINEAR, (4, 1)), ((6,), LINEAR, (1, 6)), ((4,), (4, 4), (4, 1)), ((4,), CONV, (4, 1, 1, 1)),
    ((1, 6), LINEAR, (1, 6)), ((4, 1), LINEAR, (4, 1)), ((6, 1), LINEAR, (6, 1)), ((5,), LINEAR, (5,)),
    ((), LINEAR, ()), ((4,), NORM, (4,))])
def test_magnitudes_that_are_a_list(given, shape, made):
    assert plain_magnitude(torch.ones(given), shape).shape == made


def test_gloras_of_the_first_releases():
    """Where both orders are possible, the layer has to be as wide as the factors for the old one: it is the host's
    choice as well."""
    square = made([(2, 2)] * 4)
    assert is_old_glora(*square, (2, 2)) is True and is_old_glora(*square, (4, 2)) is False
    assert is_old_glora(*made([(2, 6), (6, 2), (2, 6), (4, 2)]), LINEAR) is True
    assert not is_old_glora(*made([(6, 2), (2, 6), (4, 2), (2, 6)]), LINEAR)
    assert is_old_glora(*made([(6, 2), (3, 6), (4, 2), (2, 6)]), LINEAR) is None
