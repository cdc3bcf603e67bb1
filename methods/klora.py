"""K-LoRA: per layer and step, the subject or the style LoRA, by their largest entries (arXiv 2502.18461, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .selection import Contest, Selection, Sizes, at_strengths, mean_sizes, released_gamma

BETA, BETA_STAR = 0.5, 1.3


@dataclass(frozen=True)
class KLoRA(Selection):
    """The subject acts at layer l while S_c,l >= gamma S(u) S_s,l, S_i,l the sum of the K largest |entries| of DW_i,l
    with K = rank_c rank_s, gamma the quotient of the two LoRAs' sums of all |entries|, and

        S(u)  = alpha u + beta                  pattern s, paper: 1.5 u + 0.5
        S*(u) = (alpha u + beta) mod alpha      pattern s*, paper: (1.5 u + 1.3) mod 1.5; style at the very start, then
                                                subject, then style again
    """

    alpha: float = 1.5
    beta: float = BETA
    star: bool = False

    def __post_init__(self) -> None:
        if self.star and self.alpha <= 0:
            raise ValueError(f"K-LoRA: alpha is {self.alpha:g}, and pattern s* needs one above 0. Raise alpha (the "
                             "paper's is 1.5), or choose pattern s.")

    @property
    def rule(self) -> str:
        return f"({super().rule}) mod {self.alpha:g}" if self.star else super().rule

    def scale(self, progress: float) -> float:
        scale = super().scale(progress)
        return scale % self.alpha if self.star else scale

    @classmethod
    def of(cls, sizes: Sizes, strengths: Sequence[float], subjects: Sequence[bool], alpha: float = 1.5,
           beta: float | None = None, star: bool = False, released: bool = False, raw: bool = False) -> KLoRA:
        """K-LoRA over LoRAs of given sizes at strength 1.

        beta       None: the paper's for the pattern
        released   the rule of the released code: gamma as the mean over layers, without outliers, and the style where
                   both are equal
        raw        compare the sizes as they are given, at strength 1
        """
        if not raw:
            sizes = at_strengths(sizes, strengths)
        if released:
            units = released_gamma(sizes, subjects, "K-LoRA")
        else:
            units = mean_sizes(sizes, len(strengths), lambda size: size.total)
        contest = Contest.between(sizes, strengths, subjects, lambda size: size.top, units, not released)
        return cls(contest, alpha, (BETA_STAR if star else BETA) if beta is None else beta, star)
