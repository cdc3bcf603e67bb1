"""EST-LoRA: per layer and step, the subject or the style LoRA, by energy, style discrepancy and time (arXiv
2508.02165; formulas from the released code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .selection import Contest, Selection, Sizes, at_strengths, mean_sizes, released_gamma

BALANCES = ("energy", "l1", "none")


@dataclass(frozen=True)
class ESTLoRA(Selection):
    """The subject acts at layer l while E_c,l / gamma > E_s,l (alpha u + (1 - S)), E_i,l = ||DW_i,l||_F^2, and S the
    cosine of the two LoRAs' probe pictures (beta = 1 - S): the less alike these are, the earlier the style takes over.
    """

    alpha: float = 1.5
    beta: float = 0.5

    @classmethod
    def of(cls, sizes: Sizes, strengths: Sequence[float], subjects: Sequence[bool], alpha: float = 1.5,
           style_discrepancy: float = 0.5, balance: str = "energy") -> ESTLoRA:
        """EST-LoRA over LoRAs of given sizes at strength 1.

        balance   gamma: `energy`, the quotient of the LoRAs' energies, which makes the choice independent of their
                  strengths; `l1`, the released code's, K-LoRA's mean ratio of L1 norms, which does not, since energy
                  is quadratic in the strength and it is linear; `none`, 1
        """
        if balance not in BALANCES:
            raise ValueError(f"EST-LoRA: balance is '{balance}', choose one of {', '.join(BALANCES)}")
        sizes = at_strengths(sizes, strengths)
        if balance == "energy":
            units = mean_sizes(sizes, len(strengths), lambda size: size.energy)
        else:
            units = released_gamma(sizes, subjects, "EST-LoRA") if balance == "l1" else (1.0,) * len(strengths)
        contest = Contest.between(sizes, strengths, subjects, lambda size: size.energy, units, subject_ties=False)
        return cls(contest, alpha, 1.0 - style_discrepancy)
