"""What a diffusion model or a node on it keeps from one call to the next: keys and values of prompts, reference
pictures and poses. The host knows them by the prompt and the pictures, and not by the LoRAs they were computed with.

So they belong to what acts in the rows of a batch: where that changes they are let go and made anew. Where they would
be made anew in every call, or where their use would leave tokens out that the places of LoRAs or the Branch Cache count
on, they are not used at all. The record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from torch import Tensor, nn

from ...methods.counted import counted
from .neighbours import Neighbours

HISTORY = "ar_state"
"""What transformer options have of a sampler that draws a film frame by frame, with what the model keeps of it."""
IN_VAIN = 2
"""So many times in a row something was kept that nothing was read of, and it is kept no longer."""


@dataclass(frozen=True)
class Keeper:
    """One thing that is kept.

    name     for messages
    forget   lets it go; it is made anew in the next call
    off      transformer options -> those under which nothing is kept; None: there are none
    """

    name: str
    forget: Callable[[], None]
    off: Callable[[dict], dict] | None = None


@dataclass
class _Kept:
    """What a run knows of one diffusion model.

    rows       what acts in the rows that something is kept of
    uses       calls since it is kept
    changes    how often it was let go, not counting the first time
    in_vain    how often in a row without a call that made use of it
    off        why it is not used, once it is not
    """

    rows: Hashable = None
    uses: int = 0
    changes: int = 0
    in_vain: int = 0
    off: str = ""
    keepers: dict[str, Keeper] = field(default_factory=dict)


class KeptBetweenCalls:
    """The guard of one run.

    tell     called with a sentence for the record
    without  why nothing is to be kept in this run at all, in words that go on after "since"; empty: it may be
    """

    def __init__(self, tell: Callable[[str], None], without: str = ""):
        self._tell, self._without = tell, without
        self._found: dict[nn.Module, _Kept] = {}
        self.neighbours = Neighbours(tell)

    def arrange(self, root: nn.Module, options: dict, rows: tuple[Hashable, ...], branches: int,
                uuids: Sequence[UUID | None], aside: bool = False) -> dict:
        """Transformer options for a call in whose rows this acts, an entry per cond.

        branches   combinations of branches of this step
        uuids      the conds
        aside      the call is none of the sampler's own

        Raises ValueError where a sampler keeps the history of one film and there are several branches.
        """
        if branches > 1 and has_history(options):
            raise ValueError(f"{one_history(root)}, so it cannot be evaluated with several branches. Use Merge, "
                             "Switch, K-LoRA, EST-LoRA or Routed with it, which have one.")
        options = self.neighbours.aside(root, options, uuids) if aside else self.neighbours.arrange(
            root, options, uuids, rows, branches)
        keepers = {keeper.name: keeper for keeper in keepers_of(root, options)}
        if not keepers:
            return options
        kept = self._found.setdefault(root, _Kept())
        kept.keepers |= keepers
        self._note(kept, rows[0] if len(set(rows)) == 1 else rows)
        for keeper in keepers.values():
            if kept.off and keeper.off is not None:
                options = keeper.off(options)
        return options

    def close(self) -> None:
        """Nothing stays of what a run's LoRAs have computed, and nothing leads back to its models."""
        self.neighbours.close()
        for kept in self._found.values():
            for keeper in kept.keepers.values():
                keeper.forget()
                if kept.changes and not (kept.off and keeper.off is not None):
                    self._tell(f"{keeper.name}: made anew {counted(kept.changes, 'time')} in this run, "
                               "since other LoRAs acted; it holds for one combination of LoRAs")
        self._found.clear()

    def _note(self, kept: _Kept, rows: Hashable) -> None:
        if kept.rows == rows:
            kept.uses += 1
        else:
            kept.in_vain = kept.in_vain + 1 if kept.uses == 1 else 0
            kept.changes += bool(kept.uses)
            kept.rows, kept.uses = rows, 1
            for keeper in kept.keepers.values():
                keeper.forget()
        reason = self._without or ("other LoRAs act from call to call" if kept.in_vain >= IN_VAIN else "")
        if reason and not kept.off:
            kept.off = reason  # in a call before which all was let go
            for keeper in kept.keepers.values():
                if keeper.off is not None:
                    self._tell(f"{keeper.name}: not used in this run, since {reason}; that takes longer and changes "
                               "nothing else")


def has_history(options: Mapping) -> bool:
    """Whether each evaluation of the model goes into what it keeps of a film."""
    return options.get(HISTORY) is not None


def one_history(root: nn.Module) -> str:
    return f"{type(root).__name__} draws a film frame by frame and keeps one history of it"


def keepers_of(root: nn.Module, options: Mapping) -> Iterator[Keeper]:
    """What a diffusion model keeps by itself, and what the options of a call let it keep."""
    if hasattr(root, "clear_kv_cache"):  # HiDream-O1
        yield Keeper(f"{type(root).__name__}'s keys and values of the prompt", root.clear_kv_cache)
    if getattr(root, "prefix_cache_enabled", False) and hasattr(root, "reset_prefix_cache"):  # Qwen-Image 2.1
        yield Keeper(f"{type(root).__name__}'s keys and values of prompt and reference pictures",
                     lambda: root.reset_prefix_cache(True), _without_prefix)
    if has_history(options) and hasattr(root, "reset_crossattn_caches"):  # Wan's autoregressive form
        yield Keeper(f"{type(root).__name__}'s keys and values of the prompt",
                     partial(root.reset_crossattn_caches, options[HISTORY]["crossattn_caches"]))
    for name, value in options.items():
        if _stores(value, "free", "slots"):  # WanAnimate2Cache
            yield Keeper(f"the {type(value).__name__} of '{name}'", value.free, lambda known, name=name: {
                key: other for key, other in known.items() if key != name})
    for name, patches in options.get("patches", {}).items():
        for patch in patches:
            if _stores(patch, "cleanup", "cache"):  # FluxKVCache
                yield Keeper(f"the {type(patch).__name__} of '{name}'", patch.cleanup,
                             lambda known, name=name, patch=patch: _without_patch(known, name, patch))


def _stores(value: object, end: str, inside: str) -> bool:
    """Whether an object holds something `inside` that its method `end` lets go, as the host calls it after a run."""
    return not isinstance(value, (Tensor, nn.Module, type)) and callable(getattr(value, end, None)) and isinstance(
        getattr(value, inside, None), (dict, list))


def _without_prefix(options: dict) -> dict:
    return {**options, "qwen_image21_cache": {**options.get("qwen_image21_cache", {}), "device": "off"}}


def _without_patch(options: dict, name: str, patch: object) -> dict:
    patches = options["patches"]
    return {**options, "patches": {**patches, name: [each for each in patches[name] if each is not patch]}}
