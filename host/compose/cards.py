"""Several cards at once: ComfyUI's "MultiGPU CFG Split" gives each a copy of the model and spreads the conds of a call
over them, and branches are conds."""

from __future__ import annotations

from collections.abc import Iterator

from ...engine.layout import NotRows
from ...engine.record import RunRecord

POOL, CARDS = "multigpu_thread_pool", "multigpu_clones"
"""In model options: the host's threads, one per card, and the copies of the model by their cards."""


def same_banks(model, copy, key: str) -> None:
    """Called by the host when it has matched a card's copy of a model to the model, to give the copy's banks the
    model's order. A copy that it takes from an earlier run brings banks of its own, and the host puts new ones behind
    these, while methods know their bank by its place."""
    banks = {bank.clone_base_uuid: bank for bank in copy.get_additional_models_with_key(key)}
    copy.set_additional_models(key, [banks[bank.clone_base_uuid] for bank in model.get_additional_models_with_key(key)])


def settle(options: dict) -> None:
    """After a call in which one card raised NotRows: wait until the others are done with it, and let go of what they
    found. The host leaves that in its threads' queues, where the next call would take it for its own. Raises what
    went wrong there otherwise."""
    pool = options.get(POOL)
    for card in pool.devices if pool is not None else ():
        last, found = object(), None
        pool.submit(card, lambda last=last: last)
        while found is not last:
            found, error = pool.get_result(card)
            if error is not None and not isinstance(error, NotRows):
                raise error


def note_cards(record: RunRecord, options: dict) -> None:
    """Which cards a call may use, if it is not one alone."""
    for card in options.get(CARDS, ()):
        record.devices.setdefault(str(card), 0)


def unused(record: RunRecord) -> Iterator[str]:
    """Cards that evaluated nothing in a finished run."""
    idle = [card for card, rows in record.devices.items() if not rows]
    if idle and record.finished and any(record.devices.values()):
        yield (f"{', '.join(idle)} had nothing to do: ComfyUI spreads predictions over cards, and no step of this run "
               "had one for each; all pictures of a batch are one together. A method with several branches, or CFG "
               "above 1, has more")
