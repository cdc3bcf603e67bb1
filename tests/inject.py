"""Faults in a run: what goes wrong around this pack or in it, at every place, and whether anything of it stays.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.inject

A job is something that a node does: a picture with each method, a calibration, a spectrum, a map, a measurement. Into
each job come, one at a time:

* out of memory at every line of this pack that makes a tensor, and an error of the device at those that compute;
* an exception of a neighbour, before and after its own work, at every place where ComfyUI lets others in;
* an interrupt at every moment at which ComfyUI or this pack asks for one;

and on the disk a full one, a read-only one, and a process that is killed while it saves or samples (inject_disk.py).

Afterwards: the exception that came out is the one that went in, or the job went on and its result is the same to the
last bit (as with less memory from the beginning, where it goes on with less); no forward is left on the model, no run
is open; and the next job without a fault gives the same result to the last bit.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from .host import conftest  # noqa: F401  (before `comfy`, whose command line it prepares)

# isort: split
import comfy.model_management
import folder_paths
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..host.compose import banks, measure
from ..host.compose.apply import with_cache
from ..host.compose.cache import CacheSpec
from ..host.compose.composition import KEY
from ..host.files import files
from ..host.guidance.calibrate import Paths, calibrate
from ..host.look import leave_one_out as looking
from ..host.look.info import infos
from ..host.look.spectrum import Sampling
from ..methods.cmlora import CMLoRA
from ..methods.loratorio import LoRAtorio
from ..methods.schedule import Uniform
from ..methods.switch import Switch
from ..nodes.klora import LoRAEnsembleESTLoRA, LoRAEnsembleKLoRA
from ..nodes.selection import LoRAEnsembleLayerMap
from ..nodes.spectrum import LoRAEnsembleSpectrum
from ..tools.results import Found, Results, options
from .host.builders import composite, merge, method, sample, three, written_once
from .host.guidance_tools import ag, extrapolated
from .host.models import FAMILIES, alive, base
from .host.test_lasting import half, unlike
from .host.test_routed import prompt, routed, specs
from .inject_disk import DISK
from .inject_faults import EVERY, OF_UNETS, OURS, Moments, Neighbour, Ops, Trouble

DEPENDS = ("inject.py", "inject_disk.py", "inject_faults.py", "server.py", "host/builders.py", "host/guidance_tools.py",
           "host/models.py", "host/test_lasting.py", "host/test_routed.py")
COMPUTES = ("kernels/", "engine/")
STEPS = 3
MOMENTS = 12
"""Moments of a job at which it is interrupted, at most, spread from the first to the last."""
Interrupted = comfy.model_management.InterruptProcessingException
Around = Callable[[object], object]
"""(MODEL with everything on it) -> the MODEL that is sampled"""


class Failure(AssertionError):
    """A fault that is hidden, turned into another one, or that stays."""


# --- jobs -----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """Something that a node does, from the files on.

    make     () -> the MODEL that is sampled, for pictures
    look     () -> what another node gives: tensors, texts and numbers
    family   of the model
    less     () -> the same with the memory that it goes on with when memory is short: its result in other batches,
             whose rounding is another one on some processors
    """

    make: Callable[[], object] | None = None
    look: Callable[[], object] | None = None
    family: str = "SD15"
    less: Callable[[], object] | None = None
    made: list = field(default_factory=list)

    def run(self, around: Around = lambda model: model) -> list:
        """What comes out, with nothing kept of earlier jobs."""
        banks._recent.clear()
        banks._known.clear()
        measure._kept.clear()
        files.forget()
        if self.look is not None:
            return flat(self.look())
        self.made[:] = [self.make()]
        return flat(sample(around(self.made[0]), self.family, prompt(self.family), steps=STEPS, cfg=3.0,
                           callback=lambda *_: comfy.model_management.throw_exception_if_processing_interrupted()))


def flat(found: object) -> list:
    """The values of a result, those of numbers and texts by what they print."""
    values = tree_leaves(getattr(found, "args", found))
    return [value.clone() if isinstance(value, Tensor) else repr(value) for value in values]


def equal(a: list, b: list) -> bool:
    """To the last bit."""
    return len(a) == len(b) and all(
        (x.shape == y.shape and bool(torch.isclose(x, y, rtol=0, atol=0, equal_nan=True).all()))
        if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(a, b, strict=True))


def jobs(folder: Path) -> dict[str, Job]:
    """All of them, over LoRA files that are written into a folder of ComfyUI's."""
    loras = written_once(folder, "inject")
    sd15, flux = base("SD15"), base("Flux")
    few, flux_few, kinds = three(sd15, loras), three(flux, loras), unlike(sd15, loras)
    pair, words, flux_words = few[:2], specs(sd15, loras), specs(flux, loras)
    masked = half(sd15, loras)
    kind = FAMILIES["SD15"]
    how = Sampling(kind.cond(11), kind.cond(12), torch.zeros_like(kind.noise()), 5, STEPS, 3.0, "euler", "normal")
    paths = Paths(positive=kind.cond(11), negative=kind.cond(12), latent=torch.zeros_like(kind.noise()), steps=STEPS,
                  cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0, seed=1, seeds=2, batch=2)

    def tick() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def calibration() -> object:
        found = calibrate(composite(sd15, few), paths, progress=lambda: None).found
        return [found.coefficients, found.r2, found.steps]

    def in_pairs() -> list[Tensor]:
        with patch.object(looking, "_room", lambda *_: (2, "")):
            return looking.leave_one_out(composite(sd15, pair), how).latents

    def levers(model, node, *values) -> object:
        return node.execute(model, pair, *values).args[0]

    return {
        "Merge": Job(lambda: merge(sd15, kinds)),
        "Composite": Job(lambda: composite(sd15, few)),
        "Composite of six kinds": Job(lambda: composite(sd15, kinds)),
        "Composite on Flux": Job(lambda: composite(flux, flux_few), family="Flux"),
        "Switch with masks": Job(lambda: method(sd15, masked, lambda strengths: Switch(strengths, 1))),
        "CMLoRA with a cache": Job(lambda: with_cache(method(sd15, few, CMLoRA), CacheSpec(Uniform(2), depth=1))),
        "LoRAtorio": Job(lambda: method(sd15, few, LoRAtorio)),
        "Routed by words": Job(lambda: routed(sd15, words)),
        "Routed by words on Flux": Job(lambda: routed(flux, flux_words), family="Flux"),
        "K-LoRA": Job(lambda: levers(sd15, LoRAEnsembleKLoRA, 1.5, -1.0, "s", "paper", 0, "as applied")),
        "EST-LoRA": Job(lambda: levers(sd15, LoRAEnsembleESTLoRA, 1.5, 0.5, "energy")),
        "Adaptive Guidance": Job(lambda: ag(composite(sd15, few), 0.5, min_steps=2)),
        "extrapolated guidance": Job(lambda: extrapolated(composite(sd15, few))),
        "Calibrate Guidance": Job(look=calibration),
        "LoRA Spectrum": Job(look=lambda: LoRAEnsembleSpectrum.execute(
            sd15, few, how.positive, how.negative, {"samples": how.latent}, 1, STEPS, 3.0, "euler", "normal")),
        "LoRA Layer Map": Job(look=lambda: LoRAEnsembleLayerMap.execute(sd15, pair)),
        "What did each LoRA do": Job(look=lambda: looking.leave_one_out(composite(sd15, pair), how).latents,
                                     less=in_pairs),
        "LoRA Info": Job(look=lambda: [sorted(info.changes.items())
                                       for info in infos(sd15, None, few, "LoRA Info", tick)]),
    }


# --- what must become of them ---------------------------------------------------------------------------------------


class Faults:
    """Makes and judges faults. `folder` is one of ComfyUI's `loras` folders; `only` names some of the jobs."""

    def __init__(self, folder: Path, only: Collection[str] = ()):
        self.jobs = {name: job for name, job in jobs(folder).items() if name in only or not only}
        self._wanted: dict[str, list] = {}
        self._less: dict[str, list] = {}

    def cases(self) -> list[str]:
        """All faults, one of each job in turn, so that a part of them is a part of everything."""
        every = [[f"{job}: {fault}" for fault in self._of(job)] for job in self.jobs]
        longest = max(map(len, every))
        return [*(faults[k] for k in range(longest) for faults in every if k < len(faults)),
                *(f"disk: {name}" for name in DISK)]

    def _of(self, name: str) -> list[str]:
        """The faults of a job, found by doing it once; which time a line fails is drawn."""
        job, dice, ops, moments = self.jobs[name], random.Random(name), Ops(), Moments()
        with ops, moments.open():
            job.run()
        found = []
        for site, count in sorted(ops.counts.items()):
            found.append(f"out of memory at {site}, {dice.randint(1, count)}")
            if site.startswith(COMPUTES):
                found.append(f"device error at {site}, {dice.randint(1, count)}")
        count = min(MOMENTS, moments.count)
        found += [f"interrupt {1 + k * (moments.count - 1) // max(count - 1, 1)}" for k in range(count)]
        if job.make is not None:
            found += [f"neighbour {when} {place}" for place in EVERY for when in ("before", "after")
                      if job.family == "SD15" or place not in OF_UNETS]
        dice.shuffle(found)
        return list(dict.fromkeys(found))

    def wanted(self, name: str) -> list:
        if name not in self._wanted:
            first, again = self.jobs[name].run(), self.jobs[name].run()
            if not equal(first, again):
                raise Failure("the job is not the same twice")
            self._wanted[name] = first
        return self._wanted[name]

    def less(self, name: str) -> list:
        if name not in self._less:
            self._less[name] = flat(self.jobs[name].less())
        return self._less[name]

    def check(self, case: str) -> Found:
        """What became of a fault. Raises Failure."""
        name, _, fault = case.partition(": ")
        if name == "disk":
            return DISK[fault](), {}
        job, wanted = self.jobs[name], self.wanted(name)
        what, open_, around, error = self._made(fault)
        found = None
        try:
            with open_:
                found = job.run(around)
        except BaseException as came:
            became = self._came(came, error)
        if not what.happened:
            raise Failure("it did not happen")
        if found is not None:
            if isinstance(what, Moments):
                raise Failure("an interrupt is lost")
            if not equal(found, wanted) and not (job.less is not None and equal(found, self.less(name))):
                raise Failure("the error is hidden, and the result is another one")
            became = "the job goes on, its result is the same"
        self._unharmed(job, wanted)
        return became, {}

    @staticmethod
    def _made(fault: str) -> tuple[Ops | Moments | Neighbour, AbstractContextManager, Around, type[BaseException]]:
        kind, _, rest = fault.partition(" ")
        if kind == "interrupt":
            moments = Moments(int(rest))
            return moments, moments.open(), lambda model: model, Interrupted
        if kind == "neighbour":
            when, _, place = rest.partition(" ")
            neighbour = Neighbour(place, when == "after")
            return neighbour, nullcontext(), neighbour.around, Trouble
        site, _, number = rest.partition(" at ")[2].partition(", ")
        error = torch.OutOfMemoryError("no memory left") if kind == "out" else RuntimeError("CUDA error: unspecified")
        ops = Ops((site, int(number)), error)
        return ops, ops, lambda model: model, type(error)

    @staticmethod
    def _came(came: BaseException, error: type[BaseException]) -> str:
        if type(came) is error:
            return "it comes out as it went in"
        raise Failure(f"it comes out as {type(came).__name__}: {came}") from came

    def _unharmed(self, job: Job, wanted: list) -> None:
        left = []
        for name, module in ((name, module) for root in alive() for name, module in root.named_modules()):
            forward = module.__dict__.pop("forward", None)  # gone: what comes next is to be judged for itself
            code = getattr(forward, "__code__", None)  # a neighbour's, or what the host puts back, is none of ours
            left += [name] if code is not None and code.co_filename.startswith(OURS) else []
        if left:
            raise Failure(f"forwards left on {left[:3]}")
        for model in job.made:
            composition = model.get_attachment(KEY)
            if composition is not None and composition.runs:
                raise Failure("a run is still open")
        if comfy.model_management.processing_interrupted():
            comfy.model_management.interrupt_current_processing(False)
            raise Failure("the interrupt is still set")
        if not equal(job.run(), wanted):
            raise Failure("the next job gives another result")


def main() -> int:
    chosen = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("loras", folder, is_default=True)
        faults = Faults(Path(folder))
        return Results.asked("inject", DEPENDS, chosen).judge(faults.cases(), faults.check)


if __name__ == "__main__":
    sys.exit(main())
