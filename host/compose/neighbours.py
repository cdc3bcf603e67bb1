"""Nodes of others that leave out model calls, and know which cond a result is of but not which LoRAs acted in it
(EasyCache, TeaCache, MagCache, First Block Cache), and hooks that patch the model for one prompt.

Where other LoRAs act than in the result that such a node keeps, the call is computed anew. Those that keep one result
for each side of guidance keep none where several branches are evaluated. The record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any
from uuid import UUID

import comfy.hooks
from torch import nn

from ...methods.counted import counted

Renew = Callable[[dict, Sequence["UUID | None"]], dict]
"""(transformer options, conds of a call) -> options under which nothing earlier is used in the call."""
SWITCHES = {"TeaCache": ("rel_l1_thresh", "enable_teacache"), "MagCache": ("magcache_thresh", "enable_magcache")}
"""Nodes that are told by transformer options -> the one by which they are known, and the one that turns them off."""
PAIRS = {"brush_model_patch": "BrushNet", "model_patch": "BrushNet"}
"""What transformer options have of nodes that count on a batch of the two sides alone -> their names."""
APART = "every branch is evaluated in a batch of its own, which takes longer and changes nothing else"
BLOCKS = ("transformer_blocks", "double_blocks", "joint_blocks")
"""Lists of blocks that First Block Cache puts one of its own in the place of."""


@dataclass(frozen=True)
class Skipping:
    """A node that leaves out model calls.

    renew     None: it decides before any call of the model is made
    aside     transformer options -> those under which it uses and keeps nothing of a call; None: there are none
    forget    lets go of all that it keeps, where it took a call aside for one of the sampler's
    by_conds  whether it tells conds apart, and so the branches; else it tells the sides of guidance
    """

    name: str
    renew: Renew | None
    aside: Callable[[dict], dict] | None = None
    forget: Callable[[], None] = lambda: None
    by_conds: bool = True


class Neighbours:
    """The guard of one run; `tell` is called with a sentence for the record.

    kept_aside   nodes that have kept what they saw of a call aside, since the sampler's last one
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._acted: dict[UUID | None, Hashable] = {}
        self._anew: dict[str, tuple[Skipping, int]] = {}
        self.kept_aside: list[str] = []

    def aside(self, root: nn.Module, options: dict, uuids: Sequence[UUID | None]) -> dict:
        """Transformer options for a call that is none of the sampler's own, such as the one in which words are found:
        nothing earlier is used in it, and no later one is to use what it has found."""
        for each in skipping_of(root, options):
            if each.aside is not None:
                options = each.aside(options)
            elif each.renew is not None:
                if each.name not in self.kept_aside:
                    self.kept_aside.append(each.name)
                options = each.renew(options, uuids)
        return options

    def arrange(self, root: nn.Module, options: dict, uuids: Sequence[UUID | None], rows: Sequence[Hashable],
                branches: int) -> dict:
        """Transformer options for a call of these conds, in each of which this acts.

        branches   combinations of branches of this step
        """
        found = list(skipping_of(root, options))
        if not found:
            return options
        changed = any(self._acted.get(uuid, row) != row for uuid, row in zip(uuids, rows, strict=True))
        self._acted.update(zip(uuids, rows, strict=True))
        for each in found:
            several = branches > 1 and not each.by_conds
            if several:
                self._tell(f"{each.name}: not used in this run, since it keeps one result for each side of guidance "
                           f"and {branches} branches are evaluated; Branch Cache keeps one for each")
            elif changed:
                self._anew[each.name] = each, self._anew.get(each.name, (each, 0))[1] + 1
            if each.name in self.kept_aside:
                each.forget()
            if (several or changed or each.name in self.kept_aside) and each.renew is not None:
                options = each.renew(options, uuids)
        self.kept_aside.clear()
        return options

    def patched(self, conds: Sequence[list[dict] | None], options: Mapping, one_side: bool = False) -> bool:
        """Whether the model is patched in a way that counts on one cond of each side in a batch, so that every branch
        needs a batch of its own: by a hook on one of the conds, as Attention Couple's do, or for all of them. Conds
        that are all of one side are left alone by patches that look for both."""
        hooks = [hook for cond in conds for entry in cond or () if entry.get("hooks") is not None
                 for hook in entry["hooks"].hooks]
        found = next((hook for hook in hooks if isinstance(hook, comfy.hooks.TransformerOptionsHook)), None)
        if found is not None:
            self._tell(f"{type(found).__name__}: patches the model for one prompt at a time; {APART}")
        one = None if one_side else next(filter(takes_the_first, patches_of(options)), None)
        if one is not None:
            name = one.__qualname__.partition(".")[0]
            self._tell(f"{name}: patches the first prompt of each side in a batch; {APART}")
        pair = next((name for mark, name in PAIRS.items() if "forward" in (options.get(mark) or ())), None)
        if pair is not None:
            self._tell(f"{pair}: counts on one prompt of each side in a batch; {APART}")
        return any(each is not None for each in (found, one, pair))

    def close(self) -> None:
        for each, count in self._anew.values():
            self._tell(f"{each.name}: {counted(count, 'call')} of the model computed anew, since other LoRAs "
                       "acted than in what it keeps" if each.renew is not None else
                       f"{each.name}: leaves out whole steps, whatever LoRAs were to act in them; EasyCache heeds them")
        self._acted.clear()


def patches_of(options: Mapping) -> Iterator[Callable]:
    """What nodes have put into the blocks of a model, by its transformer options."""
    for patches in options.get("patches", {}).values():
        yield from patches
    for places in options.get("patches_replace", {}).values():
        yield from places.values()


def identity_of_pass(options: Mapping) -> Hashable:
    """What tells the passes of an evaluation apart: what nodes have patched into the model for them, and what they have
    switched on or off (LTX's guidances)."""
    lists, places = options.get("patches", {}), options.get("patches_replace", {})
    return (tuple((name, *map(_which, found)) for name, found in sorted(lists.items())),
            tuple((name, str(place), _which(patch)) for name, found in sorted(places.items())
                  for place, patch in found.items()),
            frozenset((name, value) for name, value in options.items() if isinstance(value, bool | frozenset)))


def _which(patch: Callable) -> Hashable:
    """What tells a patch from others: whose method it is, its code, and the numbers and words that it was made with. It
    itself may be made for one call alone, as the host makes those of GLIGEN."""
    function = getattr(patch, "__func__", patch)
    if not isinstance(function, FunctionType):
        return id(patch)
    made = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # which is an empty one
    return id(getattr(patch, "__self__", None)), function.__code__, tuple(
        each for each in made if isinstance(each, int | float | str))


def takes_the_first(patch: Callable) -> bool:
    """Whether a patch asks where in a batch a side of guidance is, as if it were in one place: ComfyUI's own NAG and
    Self-Attention Guidance do."""
    code = getattr(patch, "__code__", None)
    return code is not None and "cond_or_uncond" in code.co_consts and "index" in code.co_names


def skipping_of(root: nn.Module, options: Mapping) -> Iterator[Skipping]:
    """The nodes that leave their marks in the options of a call, or on the diffusion model during it."""
    holder = options.get("easycache")
    if hasattr(holder, "can_apply_cache_diff"):
        yield Skipping("EasyCache", _without_differences, _with_another)
    elif hasattr(holder, "uuid_cache_diffs"):  # as it was at first: it mixes up what it keeps of the conds of a batch
        yield Skipping("EasyCache", _begun_anew, _with_another, by_conds=False)
    elif hasattr(holder, "cache_diff"):
        yield Skipping("LazyCache", None)
    for name, (mark, switch) in SWITCHES.items():
        if mark in options:
            yield Skipping(name, lambda known, uuids, switch=switch: {**known, switch: False}, by_conds=False)
    if (kept := _by_first_block(root)) is not None:
        yield Skipping("First Block Cache", lambda known, uuids: _without_place(kept, known), forget=kept.clear_buffers,
                       by_conds=False)


def _by_first_block(root: nn.Module) -> Any | None:
    """What First Block Cache (Comfy-WaveSpeed) keeps, while it has put a forward or a list of blocks of its own into
    the model: for each call of a step, by its place among them, in `buffers`."""
    lists = (getattr(root, name, None) for name in BLOCKS)
    ours = [vars(root).get("_forward"), vars(root).get("forward_orig"),
            *(type(blocks[0]).forward for blocks in lists if isinstance(blocks, nn.ModuleList) and len(blocks) == 1)]
    for forward in ours:
        current = getattr(forward, "__globals__", {}).get("get_current_cache_context")
        if current is not None:
            return current()
    return None


def _without_place(kept: Any, options: dict) -> dict:
    """What this call would look at goes."""
    for values in kept.buffers.values():
        values[kept.sequence_num:kept.sequence_num + 1] = [None]
    return options


def _with_another(options: dict) -> dict:
    return {**options, "easycache": options["easycache"].clone()}


def _without_differences(options: dict, uuids: Sequence[UUID | None]) -> dict:
    for uuid in uuids:
        for name in ("uuid_cache_diffs", "uuid_cache_diffs_audio"):
            getattr(options["easycache"], name, {}).pop(uuid, None)
    return options


def _begun_anew(options: dict, uuids: Sequence[UUID | None]) -> dict:
    options["easycache"].reset()
    return options
