"""One LoRA per layer and step, a subject or a style: what K-LoRA and EST-LoRA have in common.

Both papers know two LoRAs, a subject (content) c and a style s, and compare at each layer score_c / score_s with a
scale that depends on the progress alone. That ratio is worked out once; a step then looks up who acts. More LoRAs make
two sides: at each layer the subject and the style of the highest score compete as the two LoRAs of the papers do.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf

from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot
from ..kernels.size import Size
from .session import Call, RunContext, Session

STYLES = ("style", "background")

Sizes = Mapping[str, Mapping[int, Size]]
"""Layer -> the LoRAs that act on it, by number -> their sizes there."""


def sides(roles: Sequence[str]) -> tuple[bool, ...]:
    """Which LoRAs are subjects, all others being styles.

    Character, clothing and object are subjects, style and background are styles. LoRAs without a role (`auto`) are
    taken in order: a subject as long as there is none, a style from then on.
    """
    found: list[bool] = []
    have = any(role != "auto" and role not in STYLES for role in roles)
    for role in roles:
        found.append(not have if role == "auto" else role not in STYLES)
        have = have or found[-1]
    return tuple(found)


def main_subject(roles: Sequence[str], order: Sequence[int] | None = None) -> int | None:
    """The LoRA that a picture is about: the first character, else the first clothing or object, else the first LoRA; in
    this order of theirs, None: as listed. None where there is no LoRA."""
    listed = order or range(len(roles))
    for wanted in (("character",), ("clothing", "object"), tuple(roles)):
        found = next((i for i in listed if roles[i] in wanted), None)
        if found is not None:
            return found
    return None


def at_strengths(sizes: Sizes, strengths: Sequence[float]) -> Sizes:
    """The sizes of the deltas that act, each at its LoRA's strength."""
    return {name: {i: size.at(strengths[i]) for i, size in layer.items()} for name, layer in sizes.items()}


def contested(sizes: Sizes) -> list[Mapping[int, Size]]:
    """The layers on which several LoRAs act."""
    return [layer for layer in sizes.values() if len(layer) > 1]


def mean_sizes(sizes: Sizes, count: int, what: Callable[[Size], float]) -> tuple[float, ...]:
    """What balances LoRAs of unequal size: each one's mean size over the contested layers that it acts on.

    For two LoRAs the quotient of theirs is gamma = sum_l size_c,l / sum_l size_s,l. A mean, so that of several LoRAs
    one that covers fewer layers has no advantage. 1 for a LoRA that has no such layer.
    """
    found = [[what(layer[i]) for layer in contested(sizes) if i in layer] for i in range(count)]
    return tuple(sum(each) / len(each) if any(each) else 1.0 for each in found)


def released_gamma(sizes: Sizes, subjects: Sequence[bool], node: str) -> tuple[float, ...]:
    """The balance of the released code: the mean over layers of L1_c / L1_s, without ratios of 3 times the mean of all
    or more. Raises ValueError, in the name of a node, for anything but one subject and one style, between which alone
    it is defined."""
    if sorted(subjects) != [False, True]:
        have = sum(subjects)
        raise ValueError(f"{node}: the balance of the released code is for one subject and one style alone, and these "
                         f"LoRAs are subjects: {have}, styles: {len(subjects) - have}. Change their roles, or choose "
                         "the balance of the paper (gamma 'paper' of K-LoRA, balance 'energy' of EST-LoRA).")
    c, s = subjects.index(True), subjects.index(False)
    ratios = [layer[c].total / layer[s].total for layer in contested(sizes) if layer[s].total]
    mean = sum(ratios) / len(ratios) if ratios else 1.0
    kept = [ratio for ratio in ratios if ratio < 3 * mean]
    gamma = sum(kept) / len(kept) if any(kept) else 1.0
    return tuple(gamma if subject else 1.0 for subject in subjects)


@dataclass(frozen=True)
class Contest:
    """Per layer, the best of either side and how they compare.

    strengths    one per LoRA
    layers       names of the model's layers
    subjects     per layer, the subject of the highest score, None where no subject acts
    styles       per layer, the style of the highest score, None where no style acts
    ratios       per layer, score of that subject / score of that style, each balanced; infinite where no style acts,
                 minus infinity where no subject does: what only one side has is that side's at any time
    sides        per LoRA, whether it is a subject
    subject_ties whether the subject acts where ratio and scale are equal
    scores       per layer, the balanced score of each LoRA that acts on it, by number
    """

    strengths: tuple[float, ...]
    layers: tuple[str, ...] = ()
    subjects: tuple[int | None, ...] = ()
    styles: tuple[int | None, ...] = ()
    ratios: tuple[float, ...] = ()
    sides: tuple[bool, ...] = ()
    subject_ties: bool = True
    scores: tuple[Mapping[int, float], ...] = field(default=(), repr=False)
    _branches: dict[int, Branch] = field(default_factory=dict, compare=False, repr=False)
    _among: dict[tuple[int, ...], Contest] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def between(cls, sizes: Sizes, strengths: Sequence[float], subjects: Sequence[bool],
                score: Callable[[Size], float], units: Sequence[float], subject_ties: bool = True) -> Contest:
        """The contest over `sizes` (at the strengths at which they are to be compared).

        subjects   per LoRA, whether it is a subject
        units      per LoRA, what its scores are divided by
        """
        scores = tuple({i: score(size) / units[i] for i, size in layer.items()} for layer in sizes.values())
        best = _best(scores, subjects)
        return cls(tuple(strengths), tuple(sizes), *best, tuple(subjects), subject_ties, scores)

    def among(self, loras: tuple[int, ...]) -> Contest:
        """The contest between some of the LoRAs, as balanced between all of them. The same object for the same ones."""
        if len(loras) == len(self.strengths):
            return self
        if loras not in self._among:
            scores = tuple({i: score for i, score in layer.items() if i in loras} for layer in self.scores)
            subjects, styles, ratios = _best(scores, self.sides)
            self._among[loras] = replace(self, subjects=subjects, styles=styles, ratios=ratios, scores=scores,
                                         _branches={}, _among={})
        return self._among[loras]

    def acting(self, scale: float) -> tuple[int | None, ...]:
        """Per layer, the LoRA that acts at a scale: the subject where ratio >= scale, else the style. None where none
        of those in the contest has the layer."""
        return tuple(subject if ratio > scale or (ratio == scale and self.subject_ties) else style
                     for subject, style, ratio in zip(self.subjects, self.styles, self.ratios, strict=True))

    def branch(self, scale: float) -> Branch:
        """The branch of a scale: the LoRA of most layers everywhere, with the other layers as exceptions.

        The same object for all scales between two ratios, so that what is kept per branch is found again.
        """
        place = (bisect_left if self.subject_ties else bisect_right)(self._thresholds, scale)
        if place not in self._branches:
            self._branches[place] = self._branch(self.acting(scale))
        return self._branches[place]

    @cached_property
    def _thresholds(self) -> list[float]:
        return sorted(set(self.ratios))

    @cached_property
    def _alone(self) -> tuple[tuple[float, ...], ...]:
        """Per LoRA, the gains that let it act alone."""
        return tuple(one_hot(self.strengths, i).gains for i in range(len(self.strengths)))

    def _branch(self, acting: Sequence[int | None]) -> Branch:
        counts = Counter(i for i in acting if i is not None)
        if not counts:
            return Branch((0.0,) * len(self.strengths))
        most = counts.most_common(1)[0][0]
        return Branch(self._alone[most], tuple((layer, self._alone[i]) for layer, i in
                                               zip(self.layers, acting, strict=True) if i not in (most, None)))


def _best(scores: Sequence[Mapping[int, float]], subjects: Sequence[bool]
          ) -> tuple[tuple[int | None, ...], tuple[int | None, ...], tuple[float, ...]]:
    """(subjects, styles, ratios) of `Contest`."""
    best: dict[bool, list[int | None]] = {True: [], False: []}
    ratios = []
    for layer in scores:
        for side, winners in best.items():
            winners.append(max((i for i in layer if subjects[i] == side), key=layer.__getitem__, default=None))
        ratios.append(_ratio(*(layer.get(best[side][-1]) for side in (True, False))))
    return tuple(best[True]), tuple(best[False]), tuple(ratios)


def _ratio(subject: float | None, style: float | None) -> float:
    if subject is None or style is None:
        return inf if style is None else -inf
    if style:
        return subject / style
    return inf if subject else 1.0


@dataclass(frozen=True)
class Selection:
    """A method that lets one LoRA act at each layer, by a contest and S(u) = alpha u + beta, u the progress of the run.

    S grows with u, so a layer changes hands at most once, from the subject to the style, at `flip`.
    """

    masks = "layers"

    contest: Contest
    alpha: float
    beta: float

    @property
    def strengths(self) -> tuple[float, ...]:
        """One per LoRA."""
        return self.contest.strengths

    @property
    def rule(self) -> str:
        """S(u) in figures."""
        return f"{self.alpha:g} u + {self.beta:g}"

    def scale(self, progress: float) -> float:
        """What a layer's ratio must reach for its subject to act."""
        return self.alpha * progress + self.beta

    def flip(self, ratio: float) -> float:
        """u* = (ratio - beta) / alpha, the progress up to which the subject acts at a layer of that ratio: never where
        it is below 0, always where it is above 1, and infinite either way for alpha = 0."""
        if self.alpha:
            return (ratio - self.beta) / self.alpha
        return inf if ratio >= self.beta else -inf

    def at(self, progress: float) -> Branch:
        """The one branch that a step at this progress evaluates."""
        return self.contest.branch(self.scale(progress))

    def begin(self, context: RunContext) -> SelectionSession:
        """A run begins, at the progress that its context tells."""
        return SelectionSession(self, context)


class SelectionSession(Session):
    """One run. Nothing is kept but where it stands: the choice depends on the progress alone."""

    whole_batch = False

    def __init__(self, method: Selection, context: RunContext):
        self.method, self.context, self._scale, self._contest = method, context, 0.0, method.contest

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The one branch of this progress, among the LoRAs whose windows are open."""
        self._scale = self.method.scale(self.context.progress(step))
        self._contest = self.method.contest.among(self.context.open(step.index, len(self.method.strengths)))
        return (self._contest.branch(self._scale),)

    def mix(self, step: Step, call: Call) -> list[Tensor | None]:
        """There is one prediction per cond, and that is it."""
        return [None if p is None else p[0] for p in call.predictions]

    def notes(self) -> dict[str, object]:
        """Per LoRA, the number of layers at which it acted."""
        acting = Counter(self._contest.acting(self._scale))
        return {"layers": [acting[i] for i in range(len(self.method.contest.strengths))]}
