"""What the pictures of a method show, counted over the sets of the protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from torch import Tensor

from ..engine.bank import Bank
from ..engine.sizes import measure
from ..methods import Method
from ..methods.cmlora import CMLoRA
from ..methods.composite import Composite
from ..methods.est import ESTLoRA
from ..methods.frequency import LOW_FREQUENCY
from ..methods.klora import KLoRA
from ..methods.loratorio import LoRAtorio
from ..methods.merge import Merge
from ..methods.routed import Routing
from ..methods.selection import Sizes, sides
from ..methods.switch import Switch
from .body import Body
from .judge import Judge
from .loras import RANK
from .protocol import LoraSet
from .routing import Placed
from .sampler import GUIDANCE, STEPS, Picture, Sampler


@dataclass(frozen=True)
class Lineup:
    """The LoRAs of one picture, what a method is made from: a strength and a role each, and `loras`, where they are in
    the bank."""

    strengths: tuple[float, ...]
    roles: tuple[str, ...]
    loras: tuple[int, ...]
    bank: Bank


def lineup(task: LoraSet, strength: float, bank: Bank) -> Lineup:
    """The LoRAs of a set, all at one strength; a concept's category is its role."""
    roles = tuple(concept.category for concept in task.concepts)
    return Lineup((strength,) * len(roles), roles, task.loras, bank)


@lru_cache(maxsize=4)
def _bank_sizes(bank: Bank) -> Sizes:
    return measure(bank, (True,) * bank.count, k=RANK**2)


def sizes(of: Lineup) -> Sizes:
    """The sizes of the deltas of a lineup's LoRAs. All have one rank, so that K is the same for any of them."""
    return {layer: {n: here[lora] for n, lora in enumerate(of.loras) if lora in here}
            for layer, here in _bank_sizes(of.bank).items()}


Factory = Callable[[Lineup], Method]
METHODS: dict[str, Factory] = {
    "Merge": lambda of: Merge(of.strengths),
    "Switch": lambda of: Switch(of.strengths),
    "Composite": lambda of: Composite(of.strengths),
    "CMLoRA": lambda of: CMLoRA(of.strengths, tuple(role not in LOW_FREQUENCY for role in of.roles)),
    "LoRAtorio": lambda of: LoRAtorio(of.strengths, unit="auto"),
    "KLoRA": lambda of: KLoRA.of(sizes(of), of.strengths, sides(of.roles)),
    "ESTLoRA": lambda of: ESTLoRA.of(sizes(of), of.strengths, sides(of.roles)),
}


@dataclass(frozen=True)
class Recipe:
    """One line of the tables: a method, at a strength, its LoRAs confined to places or not.

    place      "everywhere", "masks" (those of the renderer, and words for keys and values), or "words"
    routing    how words are found
    bare       the prompt names the concepts by their rare words alone
    stand_in   ordinary words stand for the rare ones where places are looked for
    yields     a style yields to a background
    """

    make: Factory
    place: str = "everywhere"
    routing: Routing = Routing()
    strength: float = 1.0
    bare: bool = False
    stand_in: bool = False
    yields: bool = False

    def picture(self, task: LoraSet, bank: Bank, strength: float = 1.0) -> Picture:
        """A picture of a set."""
        method = self.make(lineup(task, self.strength * strength, bank))
        prompt = (task.said_bare() if self.bare else task).prompt()
        grounds, styles = (tuple(k for k, concept in enumerate(task.concepts) if concept.category == category)
                           for category in ("background", "style"))
        yields = tuple((style, grounds) for style in styles if grounds) if self.yields else ()
        return Picture(prompt, task.seed, task.loras, method, self._placed(task, method), yields)

    def _placed(self, task: LoraSet, method: Method) -> Placed | None:
        if self.place == "everywhere":
            return None
        words = tuple(f"{concept.name} = {concept.name} {task.ordinary(concept)}" if self.stand_in else concept.name
                      for concept in task.concepts)
        wide = tuple(concept.category == "style" for concept in task.concepts)
        masks = task.masks() if self.place == "masks" else ()
        return Placed(self.routing, words, wide, masks, getattr(method, "masks", "") == "layers")


def _words(make: Factory, **options: object) -> Recipe:
    return Recipe(make, "words", **options)


RECIPES: dict[str, Recipe] = {
    **{name: Recipe(make) for name, make in METHODS.items()},
    "Merge 0.6": Recipe(METHODS["Merge"], strength=0.6),
    "Switch subject": Recipe(lambda of: Switch(of.strengths, last=of.roles.index("character"))),
    "LoRAtorio steps": Recipe(lambda of: LoRAtorio(of.strengths)),
    "Routed": _words(METHODS["Merge"], routing=Routing(trust=True), yields=True),
    "Routed as the files are": _words(METHODS["Merge"], routing=Routing(trust=True)),
    "Routed confined": _words(METHODS["Merge"]),
    "Routed start": _words(METHODS["Merge"], routing=Routing(start=0.05, trust=True), yields=True),
    "Routed once": _words(METHODS["Merge"], routing=Routing("once", trust=True), yields=True),
    "Routed once start": _words(METHODS["Merge"], routing=Routing("once", start=0.05, trust=True), yields=True),
    "Routed contrast": _words(METHODS["Merge"], routing=Routing("contrast", trust=True), yields=True),
    **{f"{name} words": _words(make) for name, make in METHODS.items() if name != "Merge"},
    "LoRAtorio every 3": Recipe(lambda of: LoRAtorio(of.strengths, reweigh_every=3)),
    "Masks": Recipe(METHODS["Merge"], "masks", Routing("once")),
    "Merge bare": Recipe(METHODS["Merge"], bare=True),
    "Routed bare": _words(METHODS["Merge"], routing=Routing(trust=True), yields=True, bare=True),
    "Routed stand-in": _words(METHODS["Merge"], routing=Routing(trust=True), yields=True, bare=True, stand_in=True),
}
"""What the tables may hold, by name: the methods as they are; routed, from the first step on or from a twentieth of the
run on, with styles that yield to backgrounds or as the files are; each method where its LoRAs' words are;
Switch that ends on the character; LoRAtorio with the paper's unit of temperature, and with weights renewed every third
step; the renderer's own masks; prompts that name concepts by their rare words alone."""

BATCH = 24  # pictures drawn together
LAYOUTS = ("both", "said", "unsaid")
"""Sets of a line: all, those whose prompt says on which side the character stands, those whose prompt does not."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Shares are in [0, 1], each with its 95 % interval; n = None: all sizes together; layout:
    one of LAYOUTS."""

    regime: str
    method: str
    n: int | None
    layout: str
    sets: int
    shown: float
    shown_95: tuple[float, float]
    all: float | None
    all_95: tuple[float, float] | None
    marks: float
    leaked: float
    leaked_95: tuple[float, float]
    branches: float
    seconds: float


@dataclass(frozen=True)
class Score:
    """One set: the share of its concepts shown, whether all are, the share of their marks alone that are right, the
    share of its pictures with a leak, and costs; whether its prompt says the layout."""

    size: int
    shown: float
    all: float
    marks: float
    leaked: float
    branches: float
    seconds: float
    laid_out: bool


def score(task: LoraSet, read: Mapping[str, int]) -> tuple[list[bool], bool]:
    """Of one picture: which concepts of its set it shows, and whether any of their worlds leaked into it."""
    return task.shown(read), bool(task.leaks(read))


def interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return round(float(low), 4), round(float(high), 4)


def _pictures(task: LoraSet, recipe: Recipe | None, strength: float, bank: Bank) -> list[Picture]:
    if recipe is not None:
        return [recipe.picture(task, bank, strength)]
    return [Picture(task.prompt((concept,)), task.seed, (lora,), Merge((strength,)))
            for concept, lora in zip(task.concepts, task.loras, strict=True)]


def scores(sampler: Sampler, judge: Judge, sets: Sequence[LoraSet], recipe: Recipe | None, strength: float,
           steps: int = STEPS, guidance: float | Sequence[float] = GUIDANCE) -> list[Score]:
    """recipe None: each LoRA alone, one picture per concept."""
    found = []
    for start in range(0, len(sets), BATCH):
        batch = sets[start:start + BATCH]
        drawn = [_pictures(task, recipe, strength, sampler.bank) for task in batch]
        before, begin = sampler.evaluations, time.perf_counter()
        images = sampler.draw([picture for pictures in drawn for picture in pictures], steps, guidance)
        seconds = (time.perf_counter() - begin) / len(images)
        branches = (sampler.evaluations - before) / len(images)
        read = iter([{h: int(v[i]) for h, v in answers.items()} for answers in [judge.read(images)]
                     for i in range(len(images))])
        for task in batch:
            parts = [task] if recipe is not None else [task.only(c) for c in task.concepts]
            answers = list(islice(read, len(parts)))
            each = [(*score(part, answer), part.marks_right(answer))
                    for part, answer in zip(parts, answers, strict=True)]
            shown = [one for concepts, *_ in each for one in concepts]
            leak, marks = (float(np.mean([one[k] for one in each])) for k in (1, 2))
            found.append(Score(len(task.concepts), float(np.mean(shown)), float(all(shown)), marks, leak, branches,
                               seconds, task.laid_out))
    return found


def evaluate(regime: str, name: str, recipe: Recipe | None, sets: Sequence[LoraSet], base: Body, judge: Judge,
             loras: Sequence[Mapping[str, Tensor]], strength: float, steps: int = STEPS,
             guidance: float | Sequence[float] = GUIDANCE, always: Sequence[Mapping[str, Tensor]] = (),
             layouts: Sequence[str] = ("both",)) -> Iterator[Row]:
    """One row per size of set, and one over all sizes, for each of the layouts of which there are sets."""
    with Sampler(base, loras, always) as sampler:
        found = []
        for size in sorted({len(task.concepts) for task in sets}):
            part = scores(sampler, judge, [t for t in sets if len(t.concepts) == size], recipe, strength, steps,
                          guidance)
            yield from _rows(regime, name, size, part, recipe is None, layouts)
            found += part
        yield from _rows(regime, name, None, found, recipe is None, layouts)


def _rows(regime: str, name: str, size: int | None, found: list[Score], alone: bool,
          layouts: Sequence[str]) -> Iterator[Row]:
    for layout in layouts:
        part = [one for one in found if layout == "both" or one.laid_out is (layout == "said")]
        if part:
            yield _row(regime, name, size, layout, part, alone)


def _row(regime: str, name: str, size: int | None, layout: str, found: list[Score], alone: bool) -> Row:
    column = {key: np.array([getattr(s, key) for s in found]) for key in Score.__dataclass_fields__}
    means = {key: round(float(values.mean()), 4) for key, values in column.items()}
    return Row(regime, name, size, layout, len(found), means["shown"], interval(column["shown"]),
               None if alone else means["all"], None if alone else interval(column["all"]),
               means["marks"], means["leaked"], interval(column["leaked"]), round(means["branches"], 2),
               means["seconds"])


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table, which names layouts where there are several."""
    def share(value: float | None, spread: tuple[float, float] | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} [{100 * spread[0]:.0f}, {100 * spread[1]:.0f}]"

    head = ("regime", "method", "N", "sets", "concepts shown %", "all shown %", "marks %", "leaked %", "branches",
            "seconds")
    several = len({r.layout for r in rows}) > 1
    head = (*head, "layout") if several else head
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for r in rows:
        cells = (r.regime, r.method, r.n or "2-5", r.sets, share(r.shown, r.shown_95), share(r.all, r.all_95),
                 f"{100 * r.marks:.1f}", share(r.leaked, r.leaked_95), f"{r.branches:.4g}", f"{r.seconds:.2f}",
                 *([r.layout] if several else []))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
