"""Finds the places of LoRAs while a model is sampled: in evaluations that are made anyway, and in the first one that is
made for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from torch import Tensor, nn

from ...engine.positions import Places
from ...engine.reach import Reach
from ...kernels.branch import Branch
from ...kernels.nested import unpack
from ...methods.merge import Merge
from ...methods.session import POSITIVE
from ..families.attention import chosen
from ..families.token_order import token_order
from ..words.marked import PROBE, WITHOUT
from .attention import AttentionReader
from .cache import Combo
from .combos import Joined
from .context import parts_of
from .kept import one_history
from .places import call_tokens
from .routes import RoutedLoRAs
from .rows import in_range
from .run import Run
from .variants import in_call, of_its_area, variant_of

OTHER_WORDS = ("a prompt was encoded with the words of other LoRAs than this method's, so contrast has not all that it "
               "compares, and the LoRAs act everywhere in it. Encode it with the CLIP of this method node; connect the "
               "same ensemble to Ensemble Prompt, or none")


@dataclass
class AttentionReading:
    """The attention of one method's LoRAs in one evaluation: conds of the batch that are read, by their own names."""

    regions: RoutedLoRAs
    root: nn.Module
    reader: AttentionReader
    uuids: list[UUID]
    pictures: int

    def done(self) -> None:
        """The evaluation is over: what was read goes to the method's places. Of one that left blocks out (a cache)
        nothing is taken."""
        regions, count = self.regions, self.reader.count
        whole = regions.calls.setdefault(self.root, count)
        if not count or count < whole:
            return
        wanted = None if len(self.reader.found) < count else chosen(self.root, count, regions.routed.blocks)
        found = self.reader.mean(wanted)
        if found is None:
            return
        for uuid, attention in zip(self.uuids, found.split(self.pictures), strict=True):
            regions.see(uuid, attention)


def readings(regions: Sequence[RoutedLoRAs], root: nn.Module, x: Tensor, conds: Mapping[str, object],
             uuids: Sequence[UUID | None]) -> list[AttentionReading]:
    """What is to be read of a batch in which `uuids` names the conds to read, None those to pass over."""
    context = conds.get("context")
    if not isinstance(context, Tensor) or not any(uuids):
        return []
    tokens = call_tokens(root, x, conds)
    if tokens is None:
        return []
    pictures, out = len(x) // len(uuids), []
    for each in regions:
        found = [(k, uuid, each.members(uuid, root, context.shape[1])) for k, uuid in enumerate(uuids)]
        found = [(k, uuid, members) for k, uuid, members in found if members is not None]
        if not found:
            continue
        known = each.calls.get(root)
        wanted = None if known is None else chosen(root, known, each.routed.blocks)
        rows, members, made = each.rows_to_read(found, pictures, x.device)
        reader = AttentionReader(root, tokens.streams, rows, members, wanted, made)
        out.append(AttentionReading(each, root, reader, [uuid for _, uuid, _ in found], pictures))
    return out


def listening(run: Run, joined: Joined, conds: Sequence[tuple[Combo, UUID | None]], places: Places | None,
              pictures: int) -> Reach | None:
    """What hears, in an evaluation in which no LoRA of a bank's method acts, what each would do there; None where
    nobody asks."""
    k = joined.methods[-1]
    regions = run.regions[k]
    if regions not in run.routes or places is None or not all(run.confined(k, combo[k], uuid).is_base
                                                              for combo, uuid in conds):
        return None
    return regions.listen([run.origins.get(uuid, uuid) for _, uuid in conds], places, pictures, joined.adapters[-1])


def find_places(run: Run, positive: list[list[dict]], evaluate: Callable[[list[list[dict]], Combo], list[Tensor]],
                root: nn.Module, compiled: bool, history: bool = False) -> None:
    """Look for the places of all methods that lack them, before the branches of a call are evaluated.

    positive   the positive conds of the call; without one that acts at its noise level nothing is looked for
    evaluate   predictions for conds under one combination of branches, [pictures, C, ...] each
    compiled   whether torch.compile sees the model
    history    whether whatever is evaluated becomes a part of the film, so that nothing can be looked for
    """
    entries, variants = [entry for cond in positive for entry in cond], run.conds()
    positive = [acting for cond in positive if (acting := [each for each in cond if in_range(each, run.step.sigma)])]
    here = [entry for cond in positive for entry in cond]
    for regions in run.routes:
        regions.meet(entries, here)
        for entry in () if regions.contrasts else here:
            if variant_of(entry, PROBE) in variants:
                regions.await_stand_in(entry["uuid"])
    due = [] if not positive else [regions for regions in run.routes if regions.probes(run.step)]
    base = tuple(_base(regions, branches, applied) for regions, branches, applied
                 in zip(run.regions, run.branches, run.applied, strict=True))
    run.probing, placed = True, token_order(root) is not None
    try:
        for regions in due:
            if regions.contrasts and not history:
                _compare(regions, positive, lambda conds: evaluate(conds, base), variants)
        rest = [regions for regions in due if not regions.contrasts and placed]
        if rest and not compiled and not history:
            instead = [[_with_stand_ins(entry, rest, variants) for entry in cond] for cond in positive]
            with run.reading(rest):
                evaluate(instead, base)
    finally:
        run.probing = False
    for regions in due:
        regions.commit()
        if not regions.routes.found:
            why = _why_not(regions, root, placed, compiled, history, run.kept.neighbours.kept_aside)
            regions.give_up(why, not placed)


def _base(regions: object, branches: Sequence[Branch], applied) -> Branch:
    """The branch of a method in which words are looked for: without its LoRAs, where it confines them or takes turns;
    as it is where it has one branch at all times, as LoRAs have that are always on."""
    constant = isinstance(applied.method, Merge) and not isinstance(regions, RoutedLoRAs)
    return branches[0] if constant else Branch((0.0,) * len(applied.names))


def _with_stand_ins(entry: dict, regions: Sequence[RoutedLoRAs], variants: Mapping[str, list[dict]]) -> dict:
    """The cond that says where the words of a cond are: itself, or the one with stand-in words in its prompt."""
    if variant_of(entry, PROBE) not in variants:
        return entry
    other = in_call(of_its_area(variants[variant_of(entry, PROBE)], entry), entry, variants)
    for each in regions:
        each.stand_in(entry["uuid"], other)
    return other


def _why_not(regions: RoutedLoRAs, root: nn.Module, placed: bool, compiled: bool, history: bool, others: Sequence[str]
             ) -> str:
    if history:
        return f"{one_history(root)}, so that nothing is evaluated to find the places of words"
    if regions.contrasts:
        return "the prompts come without what contrast compares: encode them with the CLIP of this method node"
    if not placed:
        return (f"{type(root).__name__}: where its tokens lie in the picture is not known, so that words have no place "
                "in its layers. Composite and LoRAtorio confine LoRAs by masks there")
    if compiled:
        reason = "torch.compile hides the attention of this model"
    elif others:
        reason = (f"{' and '.join(others)}: computes the blocks of the model in its own way, so that their attention "
                  "cannot be read")
    else:
        reason = f"{type(root).__name__}: the attention of this kind of model cannot be read"
    return f"{reason}. Mode 'contrast' finds places without it"


def _compare(regions: RoutedLoRAs, positive: list[list[dict]], evaluate: Callable[[list[list[dict]]], list[Tensor]],
             variants: Mapping[str, list[dict]]) -> None:
    for entry in (entry for cond in positive for entry in cond):
        held = {span: variants.get(variant_of(entry, span)) for span, _ in entry.get(WITHOUT) or ()}
        rests = [held.get(span) for span in regions.spans(entry["uuid"])]
        if held and None in rests:
            regions.tell(OTHER_WORDS)
        elif held and rests:
            shapes = parts_of([[entry]])  # places are of the picture, which other parts are packed behind
            whole, *without = (unpack(each, shapes)[0] for each in evaluate(
                [[entry], *([in_call(of_its_area(rest, entry), entry, variants)] for rest in rests)]))
            regions.compare(entry["uuid"], whole, without)


def positives(conds: Sequence[list[dict] | None], sides: Sequence[str]) -> list[list[dict]]:
    """The positive conds of a call."""
    return [cond for cond, side in zip(conds, sides, strict=True) if cond and side == POSITIVE]
