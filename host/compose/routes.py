"""LoRAs that act where their words are: the places of one method in one run, found by the model that is sampled."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from uuid import UUID

import torch
from torch import Tensor, nn

from ...engine.positions import Places
from ...engine.reach import Reach
from ...engine.transfer import on_device
from ...kernels.branch import Branch, Step, without
from ...methods.prompt import LoRAWords
from ...methods.prompt_text import Range
from ...methods.routed import Routes, loosened
from ...methods.session import RunContext
from .attention import RowsToRead
from .places import ContextWindow, MaskedLoRAs, crop, of_film, of_window, on_grid, resized
from .placing import Routed
from .prompts import BESIDE, Prompt, fitted, search
from .trust import Trust

TRUST = "trust"


class RoutedLoRAs(MaskedLoRAs):
    """The maps of one method's LoRAs, per positive cond by its own words; for all other conds the union of those of the
    positive ones that act at the same noise level.

    A LoRA with a mask by hand acts in its mask, whatever its words say of places. One without words in any prompt acts
    everywhere; with words in another prompt of the run alone, nowhere in this one.

    shape    of the latent, [pictures, channels, (frames,) height, width]
    device   where predictions are mixed
    film     `RunContext.film`: maps are the film's alone, and LoRAs act everywhere in what guides it
    ahead    `RunContext.ahead`
    """

    def __init__(self, routed: Routed, masks: Sequence[Tensor | None], shape: Sequence[int], device: torch.device,
                 tell: Callable[[str], None], first: int = 0, film: int | None = None, ahead: int = 0):
        count = len(routed.active)
        self._whole = torch.ones(shape[0], count, *shape[2:], device=device)
        maps = of_film(self._whole, film)
        grid = tuple(maps.shape[2:])
        super().__init__([maps[:, i:i + 1] for i in range(count)], tell, first)
        self.maps = maps  # a view, of which `masks` are the whole
        self.routed, self.routes, self.ahead = routed, Routes(routed.routing), ahead
        self._masks = [None if mask is None else on_grid(of_film(mask, film).to(device), grid)[:, 0] for mask in masks]
        self._prompts: dict[UUID, Prompt] = {}
        self._instead: dict[UUID, tuple[UUID, Prompt]] = {}
        self._pending: dict[UUID, Tensor] = {}
        self._looked: set[tuple[UUID, ContextWindow]] = set()  # seen in this evaluation
        self._frames: set[int] = set()  # whose places are known
        self._branches: dict[tuple, Branch] = {}
        self.rows_to_read = RowsToRead()
        self._members: dict[tuple, Tensor] = {}
        self._shown: dict[UUID, Tensor] = {}  # the maps of each cond as they are used
        self.trust = Trust(tell)
        self._acted: bool | None = None
        self._evaluation: object = None
        self._anywhere = [False] * count  # per LoRA whether some prompt has its words
        self._acting: set[UUID] = set()  # the prompts that act at the noise level of this evaluation, and whether
        self._seen = False  # one was met in it
        self.calls: dict[nn.Module, int] = {}  # how many of its calls of attention join text and picture
        self.found: list[dict] = []
        self.known: Mapping[Hashable, Tensor] = {}  # from the run before, of the same picture
        self.taken = False  # whether places were taken from there
        self._show()

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Per LoRA where it acts, as `RunContext.masks`; they follow what is found."""
        return tuple(self._whole[:, i:i + 1] for i in range(self._whole.shape[1]))

    @property
    def contrasts(self) -> bool:
        return self.routes.routing.mode == "contrast"

    @property
    def idle(self) -> bool:
        """Whether there is nothing to look for: no LoRA without a mask of its own has words in any prompt, or gamma is
        0, with which each acts everywhere."""
        return not self.routes.routing.gamma or not any(map(self._has_words, self._prompts.values()))

    def meet(self, entries: Sequence[dict], acting: Sequence[dict]) -> None:
        """Positive conds of a call, and those of them that act at its noise level. New ones are searched for the LoRAs'
        words; of one that comes to act, places are looked for."""
        new = [entry for entry in entries if entry.get("uuid") not in self._prompts]
        for entry in new:
            self._prompts[entry["uuid"]] = self._searched(entry)
        if new:
            self.texts += 1
            own = [[clause is not None for clause in prompt.clauses.own] for prompt in self._prompts.values()]
            self._anywhere = anywhere = [any(column) for column in zip(*own, strict=True)]
            for prompt, here in zip(self._prompts.values(), own, strict=True):
                prompt.elsewhere = tuple(a and not h and mask is None
                                         for a, h, mask in zip(anywhere, here, self._masks, strict=True))
            for index, known, wide in zip(self.routed.active, anywhere, self.routed.everywhere, strict=True):
                if not known and not wide:
                    self._say_missing(self.routed.words[index])
            for prompt in self._prompts.values():
                prompt.maps = self._known(prompt) if prompt.maps is None else prompt.maps
            asked = [prompt.maps for prompt in self._prompts.values() if any(prompt.asked)]
            if asked and all(maps is not None for maps in asked):
                self._need_no_look()
        names = {entry["uuid"] for entry in acting}
        names |= self._acting if self._seen or not names else set()
        self._seen |= bool(acting)
        come = [self._prompts[name] for name in names - self._acting]
        if any(prompt.maps is None and self._has_words(prompt) for prompt in come):
            self.routes.found = False
            self._frames.clear()
        if new or names != self._acting:
            self._acting = names
            self._show()

    def begin(self, step: Step) -> None:
        """A call of this step begins."""
        if self._acted is not (acts := self.routes.acts(step)):
            self._acted = acts
            self._show()

    def evaluate(self, evaluation: object) -> None:
        """A call of this evaluation begins: the first one takes what was seen in the evaluation before, further passes
        (perturbed attention, skipped layers) have the same places."""
        if evaluation is not self._evaluation:
            self._evaluation, self._seen = evaluation, False
            self.commit()

    def probes(self, step: Step) -> bool:
        """Whether the base model has to be evaluated before this call, to find places."""
        unseen = self.window is not None and self.routes.acts(step) and not self._frames.issuperset(
            self.window[1])
        return not self.idle and (self.routes.probes(step) or unseen)

    def reads(self, step: Step) -> bool:
        """Whether attention is to be read in this call."""
        return not self.idle and self.routes.reads(step)

    def await_stand_in(self, uuid: UUID) -> None:
        """The places of a cond will be those of another, yet to be evaluated: its own attention is not read."""
        if not self._prompts[uuid].fixed:
            self._prompts[uuid].fixed = True
            self.routes.found &= self._prompts[uuid].maps is not None

    def stand_in(self, uuid: UUID, other: dict) -> None:
        """The places of a cond are those of another, whose prompt has stand-in words."""
        self._instead[other["uuid"]] = uuid, self._searched(other)

    def members(self, uuid: UUID, root: nn.Module, tokens: int) -> Tensor | None:
        """[clauses, tokens of the text as the model gets it] of a cond, on the CPU; None where its attention says
        nothing, and in further passes of an evaluation."""
        name, prompt = self._instead.get(uuid) or (uuid, self._prompts.get(uuid))
        if prompt is None or prompt.fixed or (name, self.window) in self._looked:
            return None
        if (uuid, root, tokens) not in self._members:
            self._members[uuid, root, tokens] = fitted(prompt.clauses.members, prompt.length, root, tokens, 0.0)
        return self._members[uuid, root, tokens]

    def see(self, uuid: UUID, attention: Tensor) -> None:
        """Attention to a cond's clauses [pictures, clauses or more, frames, height, width], used from `commit` on."""
        uuid, prompt = self._instead.get(uuid) or (uuid, self._prompts[uuid])
        found = self._compete(prompt, attention)
        part = of_window(self.maps, self.window)
        grid = tuple(crop(part, prompt.area).shape[2:])
        found = found[:, :, 0] if len(grid) == 2 else found
        found = resized(found.to(self.maps.device), grid)
        if found.shape != part.shape:
            whole = torch.zeros_like(part)
            crop(whole, prompt.area).copy_(found)
            found = whole
        if self.window is not None:
            dim, index, before = self.window
            known = self._pending.get(uuid, self._prompts[uuid].maps)
            whole, own = torch.ones_like(self.maps) if known is None else known.clone(), index[before:]
            found = found.narrow(dim, before, len(own))
            found = whole.index_copy_(dim, on_device(own, whole.device, torch.int64), found)
            self._frames.update(own)
        self._pending[uuid] = found
        self._looked.add((uuid, self.window))

    def _compete(self, prompt: Prompt, attention: Tensor) -> Tensor:
        """Where the LoRAs act, [pictures, LoRAs, frames, height, width]. References ahead of a film are pictures of
        their own: what is most attended to in one of them is no measure of the film."""
        gamma, (dim, index, _) = self.routes.routing.gamma, self.window or (2, range(attention.shape[2]), 0)
        sides = [[k for k, frame in enumerate(index) if (frame < self.ahead) == ahead] for ahead in (True, False)]
        if dim != 2 or not all(sides) or len(index) != attention.shape[2]:
            return prompt.clauses.places(attention, gamma)
        frames = [on_device(each, attention.device, torch.int64) for each in sides]
        found = [prompt.clauses.places(attention.index_select(2, each), gamma) for each in frames]
        whole = found[0].new_empty(*found[0].shape[:2], *attention.shape[2:])
        return whole.index_copy_(2, frames[0], found[0]).index_copy_(2, frames[1], found[1])

    def listen(self, uuids: Sequence[UUID | None], places: Places, pictures: int, adapters: range) -> Reach | None:
        """What hears, in an evaluation of these conds without the LoRAs, what each would do there, so that `commit`
        learns how far it may leave its place. None where that is known, or nobody asks."""
        prompts = [self._prompts.get((self._instead.get(uuid) or (uuid,))[0]) for uuid in uuids]
        trusts = self.routed.routing.trust
        return self.trust.listen(prompts, places, pictures, adapters, self.window) if trusts else None

    def spans(self, uuid: UUID) -> tuple[Range, ...]:
        """`Prompt.spans` of a cond."""
        return self._prompts[uuid].spans

    def compare(self, uuid: UUID, whole: Tensor, without: Sequence[Tensor]) -> None:
        """Predictions [pictures, C, ...] for a cond, and without each of its `spans`."""
        frames = of_window(self.maps, self.window).shape[2] if whole.ndim == 5 else None
        self.see(uuid, self._prompts[uuid].lost(of_film(whole, frames), [of_film(each, frames) for each in without]))

    def commit(self) -> None:
        """What was seen holds from now on."""
        self._looked.clear()
        if not self._pending:
            self.trust.forget()
            return
        for uuid, maps in self._pending.items():
            self._prompts[uuid].maps = maps
        self._pending.clear()
        self.trust.learn()
        self.routes.found = all(prompt.maps is not None for prompt in self._prompts.values() if prompt.fixed)
        self._show()

    def give_up(self, reason: str, nowhere: bool = False) -> None:
        """Places cannot be found: LoRAs act everywhere, on their own words. nowhere: the model's layers have none."""
        self.nowhere = nowhere and all(mask is None for mask in self._masks)
        self.tell(f"{reason}; the LoRAs act everywhere")
        self._need_no_look()

    def _need_no_look(self) -> None:
        self.routes.found = True
        self._frames.update(range(max(self.maps.shape)))

    def confined(self, uuid: UUID | None, branch: Branch) -> Branch:
        """The branch of a cond's rows: without the LoRAs that act nowhere in it."""
        prompt = self._prompts.get(uuid)
        none = (True,) * len(branch.gains) if self._acted is False else getattr(prompt, "elsewhere", ())
        if not any(none) or branch.is_base:
            return branch
        if (none, branch) not in self._branches:
            self._branches[none, branch] = without(branch, [i for i, gone in enumerate(none) if gone])
        return self._branches[none, branch]

    def kind(self, uuid: UUID | None) -> Hashable:
        return uuid if uuid in self._prompts else None

    def of(self, kind: Hashable) -> Tensor:
        prompt = self._prompts.get(kind)
        return self.maps if prompt is None else self._shown[kind]

    def text(self, kind: Hashable, root: nn.Module, tokens: int, source: str = "") -> Tensor | None:
        prompt = self._prompts.get(kind)
        if prompt is None:  # a negative: words that are a LoRA's are not in it
            return (~torch.tensor(self._anywhere)).float()[:, None].expand(-1, tokens)
        if not source:
            return fitted(prompt.clauses.words, prompt.length, root, tokens, None)
        words = prompt.beside.get(BESIDE.get(source, ""))
        return None if words is None else fitted(words, words.shape[1], root, tokens, None)

    def answers(self) -> dict[Hashable, Tensor]:
        """What was found, by what it is the answer to (`Prompt.asked`): for a run that goes on with the picture. How
        far a LoRA may leave its place has the same name with TRUST before it."""
        self.commit()
        found = [(prompt, i, asked) for prompt in self._prompts.values() if prompt.maps is not None
                 for i, asked in enumerate(prompt.asked) if asked is not None]
        return {asked: prompt.maps[:, i] for prompt, i, asked in found} | {
            (TRUST, asked): prompt.free[:, i] for prompt, i, asked in found if prompt.free is not None}

    def _known(self, prompt: Prompt) -> Tensor | None:
        """The maps of a prompt, where the run before has found all of them."""
        asked = prompt.asked
        if not any(asked) or any(each is not None and each not in self.known for each in asked):
            return None
        maps, self.taken = torch.ones_like(self.maps), True
        free = maps.new_zeros(maps.shape[:2])
        for i, each in enumerate(asked):
            if each is not None:
                maps[:, i] = self.known[each].to(maps)
                free[:, i] = self.known.get((TRUST, each), free[:, i]).to(maps)
        if self.routed.routing.trust:
            self.trust.give(prompt, free)
        return maps

    def notes(self) -> dict[str, object]:
        """places: per LoRA the share of the picture that it acts on; trust: how far it may leave its place."""
        found, free = {"places": self.maps.flatten(2).mean(dim=(0, 2))}, self.trust.mean(self._prompts.values())
        return found if free is None else found | {"trust": free}

    def _has_words(self, prompt: Prompt) -> bool:
        """Of a LoRA without a mask of its own, which acts where they are."""
        return any(clause is not None and not wide and mask is None for clause, wide, mask in zip(
            prompt.clauses.own, prompt.clauses.everywhere, self._masks, strict=True))

    def _searched(self, entry: Mapping[str, object]) -> Prompt:
        prompt, told = search(entry, self.routed.words, self.routed.active, self.routed.everywhere)
        self.found += prompt.found
        for line in told:
            self.tell(line)
        return prompt

    def _say_missing(self, words: LoRAWords) -> None:
        why = next((each["why"] for each in self.found if each["lora"] == words.name and each["why"]), "")
        if why:
            self.tell(f"LoRA '{words.name}': {why}; it acts everywhere")

    def _show(self) -> None:
        """Bring the maps of all other conds up to date."""
        self._shown = {uuid: self._used(prompt) for uuid, prompt in self._prompts.items()}
        shown = [self._shown[name] for name in self._acting]
        union = shown[0] if len(shown) == 1 else torch.stack(shown).amax(dim=0) if shown else \
            self._masked(torch.ones_like(self.maps)) if self._acted is not False else torch.zeros_like(self.maps)
        self.maps.copy_(union)
        self.version += 1

    def _used(self, prompt: Prompt) -> Tensor:
        """The maps of a cond as they are used."""
        if self._acted is False:
            return torch.zeros_like(self.maps)
        maps = torch.ones_like(self.maps) if prompt.maps is None else loosened(prompt.maps, prompt.free)
        if any(prompt.elsewhere):
            maps = maps.clone()
            for i, gone in enumerate(prompt.elsewhere):
                if gone:
                    maps[:, i] = 0
        return self._masked(maps)

    def _masked(self, maps: Tensor) -> Tensor:
        maps = maps if all(mask is None for mask in self._masks) else maps.clone()
        for i, mask in enumerate(self._masks):
            if mask is not None:
                maps[:, i] = mask
        return maps


def regions_of(applied, context: RunContext, device: torch.device, tell: Callable[[str], None]) -> MaskedLoRAs | None:
    """Where the LoRAs of an applied method may act in a run, if anything says so."""
    if not context.masks:  # no LoRA acts
        return None
    if applied.routed is not None and len(context.shape) > 3:
        start = applied.routed.routing.start
        if start and not applied.routed.routing.first(context.total):
            part = f"less than half a step of {context.total}" if start * context.total < 0.5 else \
                "and the run has one step alone"
            tell(f"start is {start:g}, {part}: the LoRAs act from the first one on")
        return RoutedLoRAs(applied.routed, context.masks, context.shape, device, tell, applied.first, context.film,
                           context.ahead)
    if applied.routed is not None:
        tell("this latent has no height and width, so LoRAs act everywhere")
    if any(mask is not None for mask in context.masks) and getattr(applied.method, "masks", "") == "layers":
        masks = [mask if mask is None else of_film(mask, context.film) for mask in context.masks]
        return MaskedLoRAs(masks, tell, applied.first)
    return None
