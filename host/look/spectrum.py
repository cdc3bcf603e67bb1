"""What each LoRA alone does to the spectrum of the latent while it is denoised, and the class that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import comfy.sample
import torch
from torch import Tensor

from ...kernels.nested import unpack
from ...kernels.spectrum import high_share, late_change, radial_amplitude, radial_bins
from ...methods.frequency import LOW_FREQUENCY, frequency_class
from ...methods.merge import Merge
from ..compose.apply import apply_method
from ..files.ensemble import ALWAYS, Ensemble, on_the_model, told_apart
from .chart import Lines, Series
from .letters import labels
from .sheet import as_image, sheet
from .theme import LIGHT, Theme

log = logging.getLogger("lora_ensemble")


@dataclass(frozen=True)
class Sampling:
    """How the pictures are sampled: what a KSampler is given; `latent` as `latent_of` has it, `mask` and `numbers` of
    the pictures as in a LATENT of inpainting, and in one out of a batch."""

    positive: list
    negative: list
    latent: Tensor
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float = 1.0
    mask: Tensor | None = None
    numbers: Sequence[int] | None = None


@dataclass(frozen=True)
class Profile:
    """The high-frequency share H_0.2 of the noisy latent at every step, for one LoRA alone or for the base model.

    change     of the mean share over the second half of the run, relative to the base model's
    error      of the change: its standard error over the pictures of the batch, 0 where there is one
    pictures   of the batch
    """

    name: str
    role: str
    shares: tuple[float, ...]
    change: float = 0.0
    error: float = 0.0
    pictures: int = 1

    @property
    def low(self) -> bool:
        return frequency_class(self.change, self.error) == "low"

    @property
    def unsure(self) -> bool:
        """The change may be chance, or is too small to matter: the LoRA keeps the class of its role."""
        return frequency_class(self.change, self.error) == "unsure"


def profiles(model, ensemble: Ensemble, how: Sampling, progress: Callable[[], None] = lambda: None) -> list[Profile]:
    """The base model first, then every LoRA with a model strength, each in a run of its own on the same noise. LoRAs
    that are always on belong to the base model.

    progress   called after every sampling step
    Raises ValueError for an empty ensemble, and for files that cannot be used with this model, before anything is
    sampled; and for a model that predicts no numbers.
    """
    if not ensemble:
        raise ValueError("LoRA Spectrum: the ensemble is empty. Connect at least one 'LoRA (Ensemble)' node to it.")
    ensemble = told_apart(on_the_model(ensemble))
    active, always = [spec for spec in ensemble if spec.composed], tuple(s for s in ensemble if s.role == ALWAYS)
    if always:
        model = apply_method(model, None, always, lambda all_: Merge(all_.strengths), node="LoRA Spectrum")[0]
    models = [apply_method(model, None, (replace(spec, mask=None),), lambda one: Merge(one.strengths),
                           node="LoRA Spectrum")[0] for spec in active]
    log.info("LoRA Spectrum: %d pictures of %d steps, one after the other", 1 + len(models), how.steps)
    base = _shares(model, how, progress, "the base model")
    return [_profile("base model", "", base, base),
            *(_profile(spec.called, spec.role, _shares(alone, how, progress, f"LoRA '{spec.called}'"), base)
              for spec, alone in zip(active, models, strict=True))]


def with_measured_roles(ensemble: Ensemble, found: Sequence[Profile]) -> Ensemble:
    """The ensemble in which LoRAs of role `auto` that were measured as low-frequency ones are backgrounds.

    found   of `profiles`: the base model, and each LoRA that is composed, in order
    """
    measured = iter(found[1:])
    low = [spec.composed and next(measured).low for spec in ensemble]
    return tuple(replace(spec, role=LOW_FREQUENCY[0]) if spec.role == "auto" and is_low else spec
                 for spec, is_low in zip(ensemble, low, strict=True))


def plot(found: Sequence[Profile], theme: Theme = LIGHT) -> Tensor:
    """The shares over the progress of the run, a line each, as an IMAGE [1, height, width, 3]."""
    base, *loras = found
    lines = [Series(base.name, base.shares, theme.neutral)]
    lines += [Series(name, profile.shares, theme.colour(i)) for i, (name, profile) in
              enumerate(zip(labels([profile.name for profile in loras]), loras, strict=True))]
    chart = Lines("High-frequency share of the latent (H_0.2) while each LoRA acts alone", lines, tall=420, ends=True,
                  across=("progress of the run", ((0, "0 %"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"),
                                                  (1, "100 %"))))
    return as_image(sheet([chart], "LoRA Spectrum", theme=theme))


def report(found: Sequence[Profile]) -> str:
    """A table: the shares at five points of the run, the change against the base model with its standard error, role
    and measured class."""
    steps = len(found[0].shares)
    marks = sorted({round(share * (steps - 1)) for share in (0, 0.25, 0.5, 0.75, 1)})
    lines = ["High-frequency share of the latent (H_0.2) while each LoRA acts alone", "",
             "progress " + "".join(f"{mark / max(steps - 1, 1):8.2f}" for mark in marks) + "  change"]
    for profile in found:
        line = " " * 9 + "".join(f"{profile.shares[mark]:8.3f}" for mark in marks)
        error = f" (error {100 * profile.error:.0f})" if profile.error else ""
        lines.append(f"{line}  {100 * profile.change:+5.0f} %{error}  {profile.name}{_verdict(profile)}")
    if found[0].pictures == 1:
        lines += ["", "One picture only: pictures differ. With a batch of 4 or more the error of each change is known."]
    return "\n".join(lines)


def _verdict(profile: Profile) -> str:
    """What was measured beside what the user said."""
    if not profile.role:
        return ""
    if profile.unsure:
        return f" (role {profile.role}): unsure, goes by its role"
    measured = "low frequencies: leads late" if profile.low else "high frequencies: leads early"
    said = profile.role in LOW_FREQUENCY
    agrees = "" if profile.role == "auto" else (", agrees" if said == profile.low else ", does not agree")
    return f" (role {profile.role}{agrees}): {measured}"


def _profile(name: str, role: str, own: Tensor, base: Tensor) -> Profile:
    """From shares [steps, pictures]."""
    return Profile(name, role, tuple(own.mean(dim=1).tolist()), *late_change(own, base), own.shape[1])


def _shares(model, how: Sampling, progress: Callable[[], None], who: str) -> Tensor:
    """[steps, pictures] in float64, on the CPU. `who` is sampled alone, for messages."""
    latent = how.latent
    noise = comfy.sample.prepare_noise(latent, how.seed, how.numbers)
    found: list[Tensor] = []
    bins: dict[torch.device, Tensor] = {}
    parts = tuple(tuple(part.shape[1:]) for part in latent.unbind()) if latent.is_nested else ()

    def measure(step, x0, x, total) -> None:
        x = x.unbind()[0] if x.is_nested else unpack(x, parts)[0]  # newer releases unpack it
        if x.device not in bins:
            bins[x.device] = radial_bins(*(1, *x.shape[2:])[-2:], x.device)
        found.append(high_share(radial_amplitude(x, bins[x.device])))
        progress()

    comfy.sample.sample(model, noise, how.steps, how.cfg, how.sampler, how.scheduler, how.positive, how.negative,
                        latent, seed=how.seed, callback=measure)
    shares = torch.stack(found).cpu().double()
    if not shares.isfinite().all():
        raise ValueError(f"LoRA Spectrum: with {who} the model predicts values that are no numbers (NaN or infinite). "
                         "Sample a picture with it and these settings; lower its strength, or leave it out.")
    return shares
