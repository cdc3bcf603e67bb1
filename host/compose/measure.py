"""Sizes of an ensemble's LoRAs on a model: measured once, with progress, and kept for the next change of a setting."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import comfy.model_management
import comfy.utils

from ...engine.bank import Bank
from ...engine.sizes import measure
from ...methods.selection import Sizes, sides
from ..files.files import fingerprint
from .apply import Active
from .wrappers import read_weight

KEPT = 8
log = logging.getLogger("lora_ensemble")
_kept: OrderedDict[tuple, Sizes] = OrderedDict()


def subjects_of(active: Active, node: str) -> tuple[bool, ...]:
    """Which LoRAs are subjects, and a line in the log that says so."""
    subjects = sides(active.roles)
    names = {side: ", ".join(spec.name for spec, subject in zip(active.specs, subjects, strict=True) if subject == side)
             for side in (True, False)}
    by_order = " (roles 'auto' decided by order)" if "auto" in active.roles else ""
    log.info("%s: subject: %s; style: %s%s", node, names[True] or "none", names[False] or "none", by_order)
    return subjects


def sizes_of(active: Active, subjects: Sequence[bool], k: int = 0, raw: bool = False, top: bool = True) -> Sizes:
    """`engine.sizes.measure` for LoRAs on their model, with a progress bar; stops when the user cancels.

    What was measured is kept, by the files and the layers they act on; not where it depends on the model's weights.
    """
    bank = active.bank
    layers = tuple((site.name, *(i for i in range(bank.count) if site.all_ops(i))) for site in bank.sites.values())
    key = (tuple(fingerprint(spec.name) for spec in active.specs), layers, bank.dtype, tuple(subjects), k, raw, top)
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    bar = comfy.utils.ProgressBar(len(bank.sites))

    def visit(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    told: dict[tuple[str, str], list[str]] = {}
    sizes = measure(_in_main_memory(bank), subjects, k, raw, top, partial(read_weight, active.model), visit,
                    lambda name, layer, reason: told.setdefault((name, reason), []).append(layer),
                    None if raw else active.strengths)
    for (name, reason), layers in told.items():
        active.problems.append(f"LoRA '{name}': {len(layers)} layers such as {layers[0]}: {reason}")
    if bank.additive:
        _kept[key] = sizes
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return sizes


def _in_main_memory(bank: Bank) -> Bank:
    """The bank where it can be measured: some accelerators have no float64, and a run may have left it on one."""
    if all(factor.device.type == "cpu" for factor in bank.parameters()):
        return bank
    return copy.deepcopy(bank, {id(factor): factor.cpu() for factor in bank.parameters()})
