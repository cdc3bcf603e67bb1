"""Sizes of an ensemble's LoRAs on a model: measured once, with progress, and kept for the next change of a setting."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import comfy.model_management
import comfy.utils

from ...engine.bank import Bank
from ...engine.sizes import ROOM, measure
from ...methods.counted import counted
from ...methods.selection import Sizes, sides
from ..files.files import fingerprint
from .apply import Active
from .memory import is_lack_of_memory, to_spare
from .read_weight import read_weight

KEPT = 8
LEAST, MOST = 2**20, 2**25
"""Entries of a layer that a GPU has to have room for at a time, 40 MiB, and those that are enough, 1.3 GiB."""
log = logging.getLogger("lora_ensemble")
_kept: OrderedDict[tuple, Sizes] = OrderedDict()


def subjects_of(active: Active, node: str) -> tuple[bool, ...]:
    """Which LoRAs are subjects, and a line in the log that says so; in the record, that all are of one side."""
    subjects = sides(active.roles)
    names = {side: ", ".join(spec.name for spec, subject in zip(active.specs, subjects, strict=True) if subject == side)
             for side in (True, False)}
    by_order = " (roles 'auto' decided by order)" if "auto" in active.roles else ""
    log.info("%s: subject: %s; style: %s%s", node, names[True] or "none", names[False] or "none", by_order)
    if len(subjects) > 1 and len({*subjects}) == 1:
        active.problems.append(f"no LoRA is a {'style' if subjects[0] else 'subject'}: each layer uses the LoRA that "
                               "is largest there in every step, and the balance does nothing; give each LoRA its role")
    return subjects


def sizes_of(active: Active, subjects: Sequence[bool], k: int = 0, raw: bool = False, top: bool = True) -> Sizes:
    """`engine.sizes.measure` for LoRAs on their model, with a progress bar; stops when the user cancels.

    On the GPU that the model is loaded to, in memory that the host has to spare there; on the processor where there is
    none, and where its memory is short, which is said. What was measured is kept, by the files and the layers they act
    on, wherever it was; not where it depends on the model's weights.
    """
    bank, first = active.bank, active.first
    layers = tuple((site.name, *(i for i in range(len(active.specs)) if site.all_ops(first + i)))
                   for site in bank.sites_of(first))
    key = (tuple(fingerprint(spec.name) for spec in active.specs), layers, bank.dtype, tuple(subjects), k, raw, top)
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    bar = comfy.utils.ProgressBar(len(layers))

    def visit(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    told: dict[tuple[str, str], list[str]] = {}

    def report(name: str, layer: str, reason: str) -> None:
        where = told.setdefault((name, reason), [])
        if layer not in where:  # on the processor once more
            where.append(layer)

    sizes = _measured(active, partial(measure, _in_main_memory(bank), subjects, k, raw, top,
                                      partial(read_weight, active.model), visit, report,
                                      None if raw else active.strengths, first=first))
    for (name, reason), layers in told.items():
        active.problems.append(f"LoRA '{name}': {counted(len(layers), 'layer')} such as {layers[0]}: {reason}")
    if bank.additive(first):
        _kept[key] = sizes
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return sizes


def _measured(active: Active, measured: Callable[..., Sizes]) -> Sizes:
    """Measured on the model's GPU, or on the processor."""
    device = active.model.load_device
    if device.type != "cuda":  # others may lack float64
        return measured()
    if room := to_spare(device, LEAST * ROOM):
        try:
            return measured(device=device, most=min(room // ROOM, MOST))
        except comfy.model_management.OOM_EXCEPTION as error:
            if not is_lack_of_memory(error):
                raise
    active.problems.append(f"{device}: no memory to measure the LoRAs there; they were measured on the processor, "
                           "which takes longer")
    return measured()


def _in_main_memory(bank: Bank) -> Bank:
    """The bank where its kinds can be put together for being measured; a run may have left it on an accelerator."""
    if all(factor.device.type == "cpu" for factor in bank.parameters()):
        return bank
    return copy.deepcopy(bank, {id(factor): factor.cpu() for factor in bank.parameters()})
