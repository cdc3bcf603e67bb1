"""What is measured of the second body alone: pictures with two figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .scene import BOTH, SIDES


def two_figures(read: Mapping[str, np.ndarray], asked: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of the pictures that were asked for two figures: the share that has both, with both characters as asked (colour
    and kind), and with both in the clothes that were asked for, too."""
    both = asked["figures"] == BOTH
    found, right = {}, read["figures"] == BOTH
    for category in ("character", "clothing"):
        for key in ("colour", "kind"):
            for side in SIDES:
                name = f"{side}.{category}.{key}"
                right = right & (read[name] == asked[name])
        found[f"both {category}"] = float(right[both].mean())
    return {"both characters": found["both character"], "and both clothings": found["both clothing"]}
