"""What each LoRA of a MODEL does: pictures from one seed with all LoRAs, without each of them in turn, and with none;
and how much of the model's prediction is each LoRA's own, and where.

    own_A(x) = p(x) - p_-A(x)           of the positive prompt, x the latents of the picture with all LoRAs
    share_A  = |own_A| / |x - p|        x - p is the predicted noise, or velocity, times a positive number
    part_A   = |own_A| / |p - p_0|      p_0: without any of them. Parts add up to 1 only where LoRAs neither help nor
                                        hinder each other
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...engine.layout import NotRows
from ...kernels.nested import unpack
from ...methods.composite import Composite
from ...methods.merge import Merge
from ...methods.session import POSITIVE
from ...methods.switch import Switch
from ..compose.composition import KEY, Composition
from ..compose.context import parts_of
from ..compose.memory import is_lack_of_memory
from ..compose.sampled import unwrapped
from ..compose.without import AnotherBatch, Silenced, Without, beside
from ..guidance.apply import KEY as GUIDANCE
from .letters import labels
from .spectrum import Sampling

NODE = "What did each LoRA do?"
MEASURED = 8
"""Steps, at most, at which the shares are measured, the first and the last of them among these."""
NOTHING = 1e-5
"""A LoRA whose share is below this at every step does nothing: it is what rounding makes of equal predictions."""
NO_NUMBERS = ("the model predicted values that are no numbers (NaN or infinite), and steps in which it did count for "
              "nothing: compare the pictures to see which LoRAs make it so")
log = logging.getLogger("lora_ensemble")


@dataclass
class Found:
    """What was sampled and measured.

    names     of the LoRAs, in order
    titles    of the pictures: all LoRAs, without each of them, none
    latents   of the pictures
    steps     those at which was measured, from 0
    shares    per LoRA the share of the prediction that is its own, at each of these steps
    parts     per LoRA how much that is of what all of them do, likewise
    maps      per LoRA where that is: [height, width], 1 being all that the LoRAs do, on average over picture and steps
    batches   of how many pictures, one after the other, and why they are no single batch, if they are none
    """

    names: tuple[str, ...]
    titles: tuple[str, ...]
    latents: list[Tensor]
    steps: list[int]
    shares: list[list[float]]
    parts: list[list[float]]
    maps: Tensor
    batches: list[int]
    why: str = ""
    methods: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def does_nothing(self, i: int) -> bool:
        """Whether leaving a LoRA out changes no prediction that was measured."""
        return bool(self.steps) and all(share < NOTHING for share in self.shares[i])

    def as_json(self, changed: Sequence[float] = ()) -> str:
        """All but the tensors; `changed`: how far each picture is from that with all LoRAs, 0 to 1."""
        loras = [{"name": name, "share": _mean(self.shares[i]), "part": _mean(self.parts[i]), "shares": self.shares[i],
                  "does_nothing": self.does_nothing(i)} for i, name in enumerate(self.names)]
        pictures = [{"title": title} for title in self.titles]
        for picture, value in zip(pictures, changed, strict=False):
            picture["changed"] = value
        return json.dumps({"methods": self.methods, "loras": loras, "pictures": pictures,
                           "measured_at": [step + 1 for step in self.steps], "batches": self.batches, "why": self.why,
                           "seconds": round(self.seconds, 3), "problems": self.problems}, ensure_ascii=False, indent=1)


def leave_one_out(model, how: Sampling, progress: Callable[[int, int], None] = lambda done, total: None) -> Found:
    """Sample and measure.

    progress   called after every sampling step: (done, of how many)
    Raises ValueError for a MODEL without LoRAs of this pack, where nothing is to be sampled, and whatever stops
    sampling.
    """
    if how.denoise <= 0:
        raise ValueError(f"{NODE}: at denoise 0 nothing is sampled, so there is nothing to compare. Set denoise to the "
                         "value that you sample with.")
    since, composition = time.perf_counter(), model.get_attachment(KEY)
    loras = [] if composition is None else [(k, i) for k, each in enumerate(composition.applied) if not each.always
                                            for i in range(len(each.names))]
    if not loras:
        raise ValueError(f"{NODE}: this MODEL has no LoRAs that can be left out. Connect the MODEL output of a method "
                         "node (Merge LoRAs in mode 'runtime', Routed LoRAs, Switch and so on), not one whose LoRAs "
                         "are in the weights or always on.")
    names = tuple(composition.applied[k].names[i] for k, i in loras)
    every = frozenset(loras)
    variants: list[Silenced] = [frozenset(), *(frozenset({each}) for each in loras if len(loras) > 1), every]
    called = labels(names)
    titles = ("all LoRAs", *(f"without {name}" for name in called if len(loras) > 1), "without LoRAs")
    study = _Study(loras, every)
    room, why = _room(model, composition, how, len(variants))
    log.info("%s: %d pictures of %d steps, %d at a time", NODE, len(variants), how.steps, min(room, len(variants)))
    latents: list[Tensor] = []
    batches: list[int] = []
    problems: list[str] = []
    while len(latents) < len(variants):
        chunk = variants[len(latents):len(latents) + room]
        try:
            found, told = _sampled(model, composition, how, chunk, study if not latents else None,
                                   _part_of(progress, how.steps, len(latents), len(chunk), len(variants)))
        except (AnotherBatch, NotRows) as reason:
            if len(chunk) == 1:
                raise
            room, why = 1, str(reason)
            continue
        except comfy.model_management.OOM_EXCEPTION as error:
            if len(chunk) == 1 or not is_lack_of_memory(error):
                raise
            room, why = (len(chunk) + 1) // 2, "memory is short"
            log.info("%s: no memory for %d pictures at a time; going on with %d", NODE, len(chunk), room)
            continue
        latents += found
        batches.append(len(chunk))
        problems += [line for line in told if line not in problems]
    if study.without_numbers():
        problems.append(NO_NUMBERS)
    return Found(names, titles, latents, study.steps, *study.numbers(), study.map_of_each(), batches,
                 why if len(batches) > 1 else "", tuple(type(each.method).__name__ for each in composition.applied),
                 problems, time.perf_counter() - since)


class _Study:
    """Measures in one run, beside it: what the prediction for its first picture is without each of the LoRAs."""

    def __init__(self, loras: Sequence[tuple[int, int]], every: Silenced):
        self.lefts = [frozenset({each}) for each in loras]
        self.lefts += [every] if len(loras) > 1 else []
        self.count = len(loras)
        self.forget()

    def forget(self) -> None:
        """A run begins: what was measured in one before it that came to no end is of no use."""
        self.steps: list[int] = []
        self.own: list[Tensor] = []  # per step: mean squares over all but the place, [LoRAs + all, height, width]
        self.whole: list[Tensor] = []  # per step: the mean square of x - p

    def calc_cond_batch(self, executor, model, conds, x, timestep, options):
        """The call as it is, and beside it those without the LoRAs, once at each of the steps to measure."""
        run, root = model.current_patcher.get_attachment(KEY).run, unwrapped(model.diffusion_model)
        if len(x) > 1 and run.one_row_only(root, conds):
            raise AnotherBatch(f"{type(root).__name__} takes one picture at a time with such a prompt")
        out = executor(model, conds, x, timestep, options)
        sides = run.sides(conds)
        step = run.step
        if POSITIVE not in sides or conds[sides.index(POSITIVE)] is None or step.index in self.steps \
                or step.index not in measured_steps(step.total):
            return out
        place, pictures = sides.index(POSITIVE), len(x)
        first = x if pictures == 1 else x[:1].expand_as(x).contiguous()
        found = []
        for start in range(0, len(self.lefts), pictures):
            group = self.lefts[start:start + pictures]
            padded = group + [frozenset()] * (pictures - len(group))
            with beside(run, Without(tuple(padded))):
                found += executor(model, [conds[place]], first, timestep, options)[0][:len(group)]
        parts, whole = parts_of(conds), out[place][0]
        self.steps.append(step.index)
        self.own.append(torch.stack([_square(unpack(whole - one, parts)[0]) for one in found]))
        self.whole.append(_square(unpack(x[0] - whole, parts)[0]).mean())
        return out

    def without_numbers(self) -> bool:
        """Drop the steps in which a prediction was none; whether there were such."""
        kept = [k for k, (own, whole) in enumerate(zip(self.own, self.whole, strict=True))
                if bool(own.isfinite().all() and whole.isfinite())]
        lost = len(kept) < len(self.steps)
        self.steps, self.own, self.whole = ([each[k] for k in kept] for each in (self.steps, self.own, self.whole))
        return lost

    def numbers(self) -> tuple[list[list[float]], list[list[float]]]:
        """(shares, parts), per LoRA and step."""
        if not self.steps:
            return [[] for _ in range(self.count)], [[] for _ in range(self.count)]
        own, whole = torch.stack(self.own).mean(dim=(-2, -1)).cpu(), torch.stack(self.whole).cpu()
        shares = (own / whole[:, None]).sqrt().nan_to_num(0.0)
        parts = (own / own[:, -1:]).sqrt().nan_to_num(0.0, 0.0, 0.0)
        return tuple(each[:, :self.count].T.double().tolist() for each in (shares, parts))

    def map_of_each(self) -> Tensor:
        """`Found.maps`"""
        if not self.steps:
            return torch.zeros(self.count, 1, 1)
        own = torch.stack(self.own).cpu()
        typical = own[:, -1:].mean(dim=(-2, -1), keepdim=True)
        return (own / typical).sqrt().nan_to_num(0.0, 0.0, 0.0).mean(dim=0)[:self.count]


def measured_steps(total: int) -> set[int]:
    """Steps at equal distances, from the first to the last."""
    count = min(total, MEASURED)
    return {round(k * (total - 1) / max(count - 1, 1)) for k in range(count)}


def _square(difference: Tensor) -> Tensor:
    """[C, (frames,) height, width] -> mean squares [height, width]; of latents without height and width [1, length]."""
    difference = difference.float().square()
    if difference.ndim < 3:
        return difference.mean(dim=0).reshape(1, -1)
    return difference.mean(dim=tuple(range(difference.ndim - 2)))


def _part_of(progress: Callable[[int, int], None], steps: int, before: int, now: int, of: int
             ) -> Callable[[int], None]:
    """What tells of a step of some pictures, by how much of all work is done."""
    return lambda step: progress(steps * before + step * now, steps * of)


def _sampled(model, composition: Composition, how: Sampling, chunk: Sequence[Silenced], study: _Study | None,
             progress: Callable[[int], None]) -> tuple[list[Tensor], list[str]]:
    """(latents of some of the pictures in one run, what the run could not do as asked)"""
    comfy.model_management.throw_exception_if_processing_interrupted()
    own = model.clone()
    own.set_attachments(KEY, Composition(composition.applied, composition.cache, without=Without(tuple(chunk))))
    if study is not None:
        study.forget()
        kind = WrappersMP.CALC_COND_BATCH  # around the composition's
        own.wrappers[kind] = {f"{KEY}_study": [study.calc_cond_batch], **own.wrappers.get(kind, {})}
    latent, noise = how.latent, comfy.sample.prepare_noise(how.latent, how.seed, how.numbers)
    if not latent.is_nested:  # drawn for the whole batch: what the first has may depend on how many there are
        latent, noise = latent[:1], noise[:1]
    mask = how.mask if how.mask is None or latent.is_nested else how.mask[:1]
    if len(chunk) > 1:
        latent, noise = (each.repeat(len(chunk), *[1] * (each.ndim - 1)) for each in (latent, noise))

    def after(step, *_) -> None:
        progress(step + 1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    out = comfy.sample.sample(own, noise, how.steps, how.cfg, how.sampler, how.scheduler, how.positive, how.negative,
                              latent, denoise=how.denoise, noise_mask=mask, seed=how.seed, disable_pbar=True,
                              callback=after)
    record = own.get_attachment(KEY).record
    return [out] if len(chunk) == 1 else list(out.split(1)), [] if record is None else record.problems


def _room(model, composition: Composition, how: Sampling, pictures: int) -> tuple[int, str]:
    """(how many pictures may be in one batch, why not all of them)"""
    latent = how.latent
    reasons = [
        (latent.is_nested, "the latent has several parts"),
        (how.mask is not None, "the latent has a mask"),
        (hasattr(model.model.diffusion_model, "preprocess_text_embeds"), "prompts are prepared before the run"),
        (_stochastic(how.sampler), f"{how.sampler} draws noise for the whole batch, or goes by it"),
        (model.get_attachment(GUIDANCE) is not None, "Adaptive Guidance takes pictures out of the batch"),
        (any(not isinstance(each.method, (Merge, Switch, Composite)) for each in composition.applied),
         "the method goes by what it finds in its pictures"),
        (any(each.routed is not None for each in composition.applied), "each picture has its own places"),
        (any(mask is not None and (mask.ndim > 2 and mask.shape[0] > 1 or isinstance(each.method, Composite))
             for each in composition.applied for mask in each.masks), "the masks are those of single pictures"),
        (any(_several(entry) for entry in (*how.positive, *how.negative)), "a prompt has entries for several pictures"),
    ]
    if why := next((reason for holds, reason in reasons if holds), ""):
        return 1, why
    free = comfy.model_management.get_total_memory(model.load_device) - model.model_size()
    room = pictures
    while room > 1 and 1.5 * model.model.memory_required([2 * room, *latent.shape[1:]]) > 0.9 * free:
        room -= 1
    return room, "" if room == pictures else "memory is short"


def _stochastic(sampler: str) -> bool:
    """Whether the rows of a batch may differ from what they would be alone: by noise that is drawn for all of them
    together, or by steps that depend on all. Only the host's own samplers are known not to."""
    function = comfy.samplers.sampler_object(sampler).sampler_function
    known = getattr(function, "__module__", "").startswith(("comfy.k_diffusion.", "comfy.extra_samplers."))
    return not known or "noise_sampler" in inspect.signature(function).parameters


def _several(entry: Sequence) -> bool:
    cross, options = entry
    control = options.get("control")
    hint = getattr(control, "cond_hint_original", None)
    return isinstance(cross, Tensor) and len(cross) > 1 or isinstance(hint, Tensor) and len(hint) > 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

