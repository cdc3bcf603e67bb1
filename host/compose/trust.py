"""How far LoRAs that act where their words are may leave their places: as far as they do little there, by what they
would have done in an evaluation without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ...engine.positions import Places
from ...engine.reach import Reach
from ...methods.routed import trusted
from .places import ContextWindow, crop, of_window
from .prompts import Prompt


class Trust:
    """What is learned of one method's LoRAs in one run, prompt by prompt (`Prompt.free`).

    tell   called with a sentence where it cannot be measured
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._heard: list[tuple[Reach, Sequence[Prompt | None], int, ContextWindow]] = []
        self._mean: Tensor | None = None  # over all prompts

    def listen(self, prompts: Sequence[Prompt | None], places: Places, pictures: int, adapters: range,
               window: ContextWindow) -> Reach | None:
        """What hears, in an evaluation of the conds of these prompts without the LoRAs, what each would do there. None
        where nothing is left to learn, or it cannot be measured."""
        if not any(prompt is not None and prompt.free is None for prompt in prompts):
            return None
        if window is not None and window[0] == 0:
            self._tell("context windows over a batch: how far LoRAs may leave their places is not measured")
            return None
        self._heard.append((Reach(places.locate, adapters), prompts, pictures, window))
        return self._heard[-1][0]

    def learn(self) -> None:
        """The places of the prompts are known: what was heard says how far each LoRA may leave its own."""
        for heard in self._heard:
            self._learn(*heard)
        self._heard.clear()

    def forget(self) -> None:
        """What was heard is of no use."""
        self._heard.clear()

    def give(self, prompt: Prompt, free: Tensor) -> None:
        """How far each LoRA may leave its place in the pictures of a prompt."""
        prompt.free, self._mean = free, None

    def mean(self, prompts: Iterable[Prompt]) -> Tensor | None:
        """How far each LoRA may leave its place, over all prompts and pictures; None where that is not known."""
        if self._mean is None and (free := [prompt.free.mean(dim=0) for prompt in prompts if prompt.free is not None]):
            self._mean = torch.stack(free).mean(dim=0)
        return self._mean

    def _learn(self, reach: Reach, prompts: Sequence[Prompt | None], pictures: int, window: ContextWindow) -> None:
        maps = [None if prompt is None or prompt.maps is None else
                crop(of_window(prompt.maps[:pictures], window), prompt.area) for prompt in prompts]
        like = next((each for each in maps if each is not None), None)
        if like is None:
            return
        batch = torch.cat([torch.ones_like(like) if each is None else each for each in maps])
        share = reach.share(Places(batch, range(len(batch))))
        for prompt, each, own in zip(prompts, maps, share.split(pictures) if share is not None else (), strict=False):
            if each is not None and prompt.free is None:
                self.give(prompt, trusted(own).to(each))
