"""What a sampling run is about to do, as far as calibrated guidance must know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunInfo:
    """
    model       the MODEL that samples
    sampler     name of the sampler's function, with its options where it has any
    sigmas      the schedule, noisiest first, with the final 0
    cfg         scale of guidance, None where a guider has no single one
    negatives   conds besides the positive
    """

    model: object
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float | None
    negatives: int


def run_info(guider, sampler, sigmas) -> RunInfo:
    cfg = getattr(guider, "cfg", None)
    return RunInfo(guider.model_patcher, sampler_name(sampler), tuple(sigmas.detach().float().cpu().tolist()),
                   None if cfg is None else float(cfg), len(guider.conds) - 1)


def sampler_name(sampler) -> str:
    """The sampler's function by name, with its options where it has any."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    options = getattr(sampler, "extra_options", None) or {}
    return name + "".join(f" {key}={options[key]}" for key in sorted(options))
