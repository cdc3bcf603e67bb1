"""ControlNets see the indexes their caller meant, and work once for all branches of a cond."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from uuid import UUID

import comfy.conds
import comfy.controlnet
import torch
from torch import Tensor

CALLER_CONDS = "lora_ensemble_conds"
"""In transformer options: how many conds the caller has, while the host evaluates several branches of each."""

OWN_CONTROLS = "tiled_diffusion"
"""The model option of a node that puts controls of its own making in the place of the conds' (Tiled Diffusion)."""

OF_WEIGHTS = ("a ControlLoRA is made of the model's own weights, and LoRAs that act beside these are not in it. Use "
              "Merge LoRAs in mode 'baked', or a ControlNet that is whole")

Residuals = dict[str, list[Tensor | None]]
"""What a control adds to a model, by the kind of block, [rows or 1, ...] each."""


def caller_indexes(options: dict) -> dict:
    """Transformer options with `cond_or_uncond` in the caller's meaning; inner code must never see branch numbers."""
    count = options.get(CALLER_CONDS)
    if count is None:
        return options
    options = {key: value for key, value in options.items() if key != CALLER_CONDS}
    options["cond_or_uncond"] = [index % count for index in options["cond_or_uncond"]]
    return options


def made_of_weights(conds: Mapping[str, list[dict]]) -> bool:
    """Whether a guider's conds bring a control that the host makes of the sampled model's weights."""
    controls = [entry.get("control") for entries in conds.values() for entry in entries or ()]
    while controls := [control for control in controls if control is not None]:
        if any(isinstance(control, comfy.controlnet.ControlLora) for control in controls):
            return True
        controls = [control.previous_controlnet for control in controls]
    return False


class Controls:
    """The controls of one run.

    The branches of a cond bring a control the same latent, noise level and cond, so what it says to one of them it
    says to all: it is asked for one and the answer is repeated, in this batch and in the next ones of the same model
    call. Which parts of a batch are the same is known by where they come from; nothing is compared. A control that is
    not the host's own may do more than answer (some change the model for the whole batch), and is asked for all.
    """

    def __init__(self) -> None:
        self._views: dict[int, ControlView] = {}
        self._sources: dict[UUID, UUID] = {}
        self._ambiguous: set[UUID | None] = {None}
        self._constants: set[str] = set()
        self._branches = 0
        self.as_they_are = False  # whether another node is to find the controls themselves
        self._answers: dict[tuple, tuple[Residuals | None, int]] = {}

    def begin(self, conds: Sequence[list[dict] | None], branches: int) -> None:
        """A model call of the sampler begins: these conds, each under so many branches."""
        entries = [entry for cond in conds for entry in cond or ()]
        times = Counter(entry.get("uuid") for entry in entries)
        self._ambiguous = {None, *(uuid for uuid, count in times.items() if count > 1)}
        self._constants = {name for entry in entries for name, value in entry.get("model_conds", {}).items()
                           if isinstance(value, comfy.conds.CONDConstant)}
        self._branches = branches
        self._sources.clear()
        self._answers.clear()

    def view(self, control, cond: UUID | None, identity: UUID) -> ControlView:
        """What stands for the control in a branch's copy of a cond; `identity` is the copy's own. One view per control:
        the host batches conds whose control is the same object."""
        if self.as_they_are:
            return control
        self._sources[identity] = cond
        return self._views.setdefault(id(control), ControlView(control, self))

    def sources(self, identities: Sequence[UUID] | None) -> list[UUID] | None:
        """Which cond each part of a batch is a copy of; None where that is not known of all."""
        found = [self._sources.get(identity) for identity in identities or ()]
        return None if not found or any(source in self._ambiguous for source in found) else found

    def narrowed(self, cond: dict, at: Sequence[int], count: int, rows: int) -> dict | None:
        """The parts `at` of a batch's conds; None where it is not known how one is made up."""
        out = {}
        for name, value in cond.items():
            if name not in self._constants and isinstance(value, Tensor | list):
                tensors = value if isinstance(value, list) else [value]
                if not all(isinstance(each, Tensor) and each.ndim and len(each) == rows for each in tensors):
                    return None
                taken = [_parts(each, at, count) for each in tensors]
                value = taken if isinstance(value, list) else taken[0]
            out[name] = value
        return out

    def knows(self, key: tuple) -> bool:
        return key in self._answers

    def learn(self, key: tuple, answer: Residuals | None) -> None:
        """Keep an answer until it was taken for every branch."""
        self._answers[key] = answer, self._branches

    def take(self, key: tuple, times: int) -> Residuals | None:
        """A known answer, for so many parts of a batch."""
        answer, left = self._answers.pop(key)
        if left > times:
            self._answers[key] = answer, left - times
        return answer


class ControlView:
    """A control as inner code of one run sees it. Core hands the batch's cond indexes to a control before any wrapper
    around the model runs, so the view translates them here. Everything else is the control itself."""

    def __init__(self, control, controls: Controls):
        self._control, self._controls = control, controls

    def __getattr__(self, name):
        return getattr(self._control, name)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        options = caller_indexes(transformer_options)
        sources = self._controls.sources(transformer_options.get("uuids"))
        if sources is not None and len(sources) == batched_number and _is_the_hosts(self._control):
            keys = [(id(self._control), source, x_noisy.device) for source in sources]
            if self._asked(keys, x_noisy, t, cond, options):
                answers = {key: self._controls.take(key, times) for key, times in Counter(keys).items()}
                return _joined([answers[key] for key in keys], len(x_noisy) // len(keys))
        return self._control.get_control(x_noisy, t, cond, batched_number, options)

    def get_instance_for_device(self, device):
        return ControlView(self._control.get_instance_for_device(device), self._controls)

    def _asked(self, keys: list[tuple], x: Tensor, t: Tensor, cond: dict, options: dict) -> bool:
        """Ask the control for the parts of a batch whose answer is not known. False: they cannot be asked for alone."""
        controls, count = self._controls, len(keys)
        at = [k for k, key in enumerate(keys) if keys.index(key) == k and not controls.knows(key)]
        if not at:
            return True
        some = controls.narrowed(cond, at, count, len(x))
        if some is None or len(x) % count or len(t) != len(x):
            return False
        told = {**options, **{name: [options[name][k] for k in at] for name in ("cond_or_uncond", "uuids")}}
        if "transformer_options" in some:
            some["transformer_options"] = told
        found = self._control.get_control(_parts(x, at, count), _parts(t, at, count), some, len(at), told)
        answers = _split(found, len(at), len(x) // count)
        if answers is None:
            return False
        for k, answer in zip(at, answers, strict=True):
            controls.learn(keys[k], answer)
        return True


def _is_the_hosts(control) -> bool:
    """Whether a control and those before it are of the host's own classes, as they are."""
    while control is not None:
        if type(control).__module__ != comfy.controlnet.__name__ or "get_control" in vars(control):
            return False
        control = control.previous_controlnet
    return True


def _parts(tensor: Tensor, at: Sequence[int], count: int) -> Tensor:
    """Some of `count` equal parts of a batch."""
    chunks = tensor.chunk(count)
    return torch.cat([chunks[k] for k in at])


def _split(found: Residuals | None, count: int, rows: int) -> list[Residuals | None] | None:
    """One answer per part of a batch, of `rows` rows each. What has one entry for all rows stays as it is. None where a
    residual is neither."""
    if found is None:
        return [None] * count
    if any(len(value) not in (1, count * rows) for values in found.values() for value in values if value is not None):
        return None
    chunks = {id(value): value.chunk(count) if len(value) == count * rows else (value,) * count
              for values in found.values() for value in values if value is not None}
    return [{name: [None if value is None else chunks[id(value)][k] for value in values]
             for name, values in found.items()} for k in range(count)]


def _joined(answers: Sequence[Residuals | None], rows: int) -> Residuals | None:
    """The residuals of a batch, from those of its parts of `rows` rows each. A tensor that stands in several places (as
    one ControlNet block for many blocks of a model) is put together once."""
    if answers[0] is None:
        return None
    joined: dict[tuple, Tensor | None] = {}

    def join(parts: tuple) -> Tensor | None:
        key = tuple(map(id, parts))
        if key not in joined:
            alone = len(parts) == 1 or parts[0] is None or len(parts[0]) != rows
            joined[key] = parts[0] if alone else torch.cat(parts)
        return joined[key]

    return {name: [join(parts) for parts in zip(*(answer[name] for answer in answers), strict=True)]
            for name in answers[0]}
