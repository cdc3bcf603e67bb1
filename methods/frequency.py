"""Whether a LoRA changes high frequencies of the latent or low ones: the two classes of CMLoRA (Zou et al. 2025, arXiv
2502.04923)."""

from __future__ import annotations

LOW_FREQUENCY = ("background",)
"""Roles whose LoRAs change low frequencies; all others count as high, as in the paper."""
MARGIN = 0.1
"""A LoRA that alone changes the latent's high-frequency share by less than this, relative to the base model and over
the second half of a run, says nothing about its class. Ours: on the testbed's clean LoRAs backgrounds lower it by a
third or more, and so do styles, which the paper counts as high (benchmarks/spectrum.py)."""


def frequency_class(change: float, error: float = 0.0) -> str:
    """"low", "high" or "unsure", from a LoRA's change of the high-frequency share and its standard error: beyond both
    MARGIN and two errors it counts."""
    if abs(change) <= max(MARGIN, 2 * error):
        return "unsure"
    return "low" if change < 0 else "high"
