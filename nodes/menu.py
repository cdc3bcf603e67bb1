"""Where each node stands in the menu, and which of its inputs wait behind "advanced"."""

from __future__ import annotations

ROOT = "LoRA Ensemble"
SHELVES = {
    "load": ("LoRA", "Stack", "FromStack", "NoiseLevels", "Prompt", "Info"),
    "compose": ("Routed", "Merge", "Switch", "Composite", "CMLoRA", "LoRAtorio", "KLoRA", "ESTLoRA", "BranchCache"),
    "guide": ("AdaptiveGuidance", "AdaptiveGuider", "KSampler", "CalibrateGuidance", "SaveCoeffs", "LoadCoeffs"),
    "look": ("Report", "LeaveOneOut", "Spectrum", "LayerMap", "StyleDiscrepancy"),
}
"""Shelf of the menu -> the nodes on it, by their ids without `LoRAEnsemble`."""

_GUIDANCE = {"space", "decision", "min_guided_steps", "ramp_steps", "read_back", "if_different", "tolerance"}
_ADVANCED = {
    "LoRA": {"start", "end", "fade"},
    "Routed": {"start", "blocks", "trust", "style_yields", "text"},
    "Switch": {"turns", "ending", "lengths"},
    "CMLoRA": {"boundary", "threshold", "dominance", "decay", "c1", "c2", "dominant_full", "steps_per_lora", "features",
               "cache_age"},
    "LoRAtorio": {"temperature_unit", "upsampling", "similarity", "selection", "recheck_every", "reweigh_every"},
    "KLoRA": {"beta", "gamma", "k", "deltas"},
    "ESTLoRA": {"balance"},
    "AdaptiveGuidance": _GUIDANCE,
    "AdaptiveGuider": _GUIDANCE,
    "KSampler": _GUIDANCE,
    "CalibrateGuidance": {"batch_size", "second_round", "intercept"},
}
"""What compares a paper with its released code, and what a first picture does not need."""

_SHELF_OF = {name: shelf for shelf, names in SHELVES.items() for name in names}


def category(node_id: str) -> str:
    """The place of a node in the menu."""
    shelf = _SHELF_OF.get(node_id.removeprefix("LoRAEnsemble"))
    return f"{ROOT}/{shelf}" if shelf else ROOT


def advanced(node_id: str) -> set[str]:
    """The inputs of a node that the front end shows on demand."""
    return _ADVANCED.get(node_id.removeprefix("LoRAEnsemble"), set())
