"""What is said of a run: what is known when it begins, and when it is over LoRAs that had no turn and for how many
layers a problem is true."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ...engine.forwards import RoutedForwards
from ...engine.record import RunRecord
from ...kernels.branch import Branch
from ...methods import method_title
from ...methods.counted import any_step, counted, verb
from ...methods.schedule import BySteps
from ...methods.session import RunContext, Session
from ...methods.windows import InTime
from .cache import CacheSpec
from .cards import unused
from .earlier import Earlier

BY_ITSELF = ("another node evaluated the model by itself in this run, not as the sampler does it (AutomaticCFG's "
             "attention patches, for one), and no LoRA had an effect on that: leave that node out, or load the LoRAs "
             "with ComfyUI's own loader beneath it")
NOISE = 0.05
"""Where a run over all noise levels begins by the latest (`RunContext.span`); behind that one goes over a picture."""
IN_PARTS = "give it LoRAs without masks, or with words in Routed, which looks for them in each"
FORM = 0.06
"""How far width to height of a mask may be from the latent's, as a logarithm: latents are rounded to whole patches."""


def begun(applied: Sequence, contexts: Sequence[RunContext]) -> RunRecord:
    """The record of a run that begins, with what was to be said at load."""
    return RunRecord([type(each.method).__name__ for each in applied], [list(each.names) for each in applied],
                     problems=[problem for each in applied for problem in each.problems],
                     reasons=[each.reason for each in applied if each.reason],
                     before=contexts[0].before if contexts else 0, whole=contexts[0].whole if contexts else 0)


def note_acting(acted: Sequence[set[int]], branches: Sequence[Sequence[Branch]]) -> None:
    """Add the LoRAs that act in these branches, per method, to those that have acted."""
    for known, own in zip(acted, branches, strict=True):
        if len(known) < len(own[0].gains):
            known |= {i for branch in own for gains in (branch.gains, *(g for _, g in branch.per_module))
                      for i, gain in enumerate(gains) if gain}


def unplaced(applied: Sequence, contexts: Sequence[RunContext]) -> Iterator[str]:
    """LoRAs whose masks have no place in this latent, or not its form, of methods that go by masks."""
    stretched: dict[str, str] = {}
    for each, context in zip(applied, contexts, strict=True):
        for name, mask, placed in zip(each.names, each.masks, context.masks, strict=False):
            if mask is None or not hasattr(each.method, "masks"):
                continue
            if placed is None:
                yield f"the mask of LoRA '{name}' is not used: this latent has no height and width"
                continue
            if mask.ndim > 2 and len(mask) > context.shape[0] and len(context.shape) == 4:
                yield (f"LoRA '{name}' has {len(mask)} masks for {counted(context.shape[0], 'picture')}: those behind "
                       "are not used")
            (high, wide), (rows, columns) = mask.shape[-2:], context.shape[-2:]
            other = abs(math.log(wide * rows / high / columns)) > FORM
            if other and bool(mask.min() < mask.max()):  # one that is the same everywhere has no form
                stretched[name] = f"{wide} wide and {high} high, is stretched to another form, {columns} to {rows}"
    if stretched:
        names, how = ", ".join(f"'{name}'" for name in stretched), next(iter(stretched.values()))
        yield (f"the mask of LoRA {names}, {how}. A node that draws a part of a picture (a detailer, tiles) does not "
               f"say where it is: {IN_PARTS}")


def in_parts(applied: Sequence, contexts: Sequence[RunContext]) -> Iterator[str]:
    """What may be wrong where one node goes over several latents of one size with a MODEL: they may be parts of one
    picture."""
    over = bool(contexts) and contexts[0].span[0] > NOISE and not contexts[0].before
    masked = [(f"'{name}'", mask) for each in applied if over and hasattr(each.method, "masks")
              for name, mask in zip(each.names, each.masks, strict=False) if mask is not None]
    if names := ", ".join(name for name, mask in masked if mask.min() < mask.max()):
        yield (f"this node has gone over several latents of one size with this MODEL. If they are parts of a picture "
               f"(tiles), the mask of LoRA {names} is stretched to each of them, since such a node does not say where "
               f"they are: {IN_PARTS}")


def idle(applied: Sequence, acted: Sequence[set[int]], in_time: Sequence[InTime], record: RunRecord) -> Iterator[str]:
    """LoRAs that never acted in a finished run: their windows were shut, or of those that take turns there are more
    than steps. `acted` holds the indexes of the others, per method."""
    steps = len(record.steps) if record.finished else 0
    if steps == 1 < record.whole:  # a node that has a run for each step
        return
    part = f" that this model takes of {record.whole}" if record.whole else ""
    when = f"did not act in {any_step(steps)}{part}"
    for each, known, windows in zip(applied, acted, in_time, strict=True):
        rest = [i for i in range(len(each.names)) if steps and i not in known]
        for i in filter(windows.shut, rest):
            yield (f"LoRA '{each.names[i]}' {when}: none of them is in its window from {each.windows[i].start:g} to "
                   f"{each.windows[i].end:g}")
        if left := [f"'{each.names[i]}'" for i in rest if not windows.shut(i)]:
            yield (f"LoRA {', '.join(left)} {when}: {each.title} gave "
                   f"{'it' if len(left) == 1 else 'them'} no turn")


def without_prompt(applied, routed: RoutedForwards) -> Iterator[str]:
    """LoRAs with a window in time that have layers among those called so far, with which the host prepares conds: that
    is done once for all steps."""
    for i, window in enumerate(applied.windows if not routed.compiled else ()):
        count = 0 if window.whole else sum(applied.first + i in routed.bank.sites[name].adapters
                                           for name in routed.seen)
        if count:
            yield (f"LoRA '{applied.names[i]}': {counted(count, 'layer')} that {verb(count, 'prepare')} the prompt "
                   "once for all steps did without it, since it has a window in time")


def missed(record: RunRecord, sessions: Sequence[Session]) -> Iterator[str]:
    """What a method would have had happen in a finished run and did not: there were too few steps, or other ones; and
    what had no part in it."""
    for name, adapters, session in zip(record.methods, record.adapters, sessions, strict=True):
        yield from (f"{method_title(name)}: {line}" for line in (session.missed(adapters) if record.finished else ()))
    yield from unused(record)


def chosen(record: RunRecord, sessions: Sequence[Session], cache: CacheSpec | None, total: int) -> Iterator[str]:
    """What was left to the number of steps, and what came of it."""
    for name, adapters, session in zip(record.methods, record.adapters, sessions, strict=True):
        yield from (f"{method_title(name)}: {line}" for line in session.chosen(adapters))
    if cache is not None and cache.schedule is not None and cache != cache.at(total) and not any(whole(cache, total)):
        yield f"Branch Cache: {counted(total, 'step')}: {cache.at(total).schedule.words}"


def whole(cache: CacheSpec | None, total: int) -> Iterator[str]:
    """A Branch Cache that reuses nothing in a run of so few steps, where that was left to their number."""
    if cache is not None and isinstance(cache.schedule, BySteps) and cache.at(total).schedule.max_age == 1:
        kept = f", whatever the budget of {cache.budget:g}" if cache.budget else ""
        yield (f"Branch Cache: {counted(total, 'step')}: so few differ too much, and nothing is reused{kept}. Set an "
               "interval and no budget to have it all the same")


def carried(record: RunRecord, contexts: Sequence[RunContext], earlier: Earlier | None, known: Sequence[bool],
            cache: CacheSpec | None) -> Iterator[str]:
    """What goes on from the runs before, and what begins anew; nothing in a run that begins a picture.

    known   per method whose LoRAs are confined by their words, whether it has taken their places from there
    """
    if not record.before:
        return
    steps = f"{counted(record.before, 'step')} of this picture {verb(record.before, 'were')} taken before"
    yield f"{steps}: turns, leaders, windows and ramps go on" + (
        "" if earlier is not None else "; counted by the noise level, since that run is not known")
    for name, context in zip(record.methods, contexts, strict=True):
        if context.left is not None:
            yield f"{method_title(name)}: what was measured of the picture is known"
    if known:
        yield "places: " + ("those that words were found at are known" if all(known) else
                            "looked for anew, since " + ("that run is not known" if earlier is None else
                                                         "the earlier run had none for these words"))
    if cache is not None:
        yield (f"{cache.whose}: features are those of one run, and the first step is computed whole; kept for a second "
               "run they would hold up to half of the free memory, and save a step")


def uncalled(layers: Sequence[str]) -> str:
    """What is said of layers with LoRAs that a run has not called."""
    return (f"{counted(len(layers), 'layer')}, {layers[0]} for one, {verb(len(layers), 'were')} never called in this "
            "run: what LoRAs change there had no effect")


def sum_up(layers: Mapping[tuple[str, str], Sequence[str]], problems: list[str]) -> None:
    """Say in each line of a (LoRA, reason) how many layers it is true of besides the first, which it names."""
    for (adapter, reason), (first, *others) in layers.items():
        line = f"{adapter}: {first}: {reason}"
        if others and line in problems:
            count = counted(len(others), "more layer")
            problems[problems.index(line)] = f"{adapter}: {first} and {count}: {reason}"
