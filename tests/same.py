"""The same picture again: after a restart, in another order of prompts, cut into two runs, in a batch, by other LoRAs'
order in the list.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.same

Every example workflow and the testbed's own are drawn by a server in one order, and by another one, started anew, in
the reverse order: to the last bit the same pictures. Then with ComfyUI's own small models, for each method: a run that
is cut in two at each step, a batch of which each picture is drawn alone, and the LoRAs in another order where the
method has none. These add numbers in another order, so they agree to ROUNDING of what the LoRAs change.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from .host import conftest  # noqa: F401  (before `comfy`, whose command line it prepares)

# isort: split
import comfy.sample
import folder_paths
import torch
from PIL import Image

from ..methods.composite import Composite
from ..methods.merge import Merge
from ..tools.results import Found, Results, options
from .fuzz_api import give_loras, workflows
from .host.builders import method, sample, three, written_once
from .host.models import FAMILIES, base
from .host.runs import MAKES, STEPS, k_lora, part
from .server import Server
from .workflows import ROOT, find

DEPENDS = ("same.py", "fuzz_api.py", "server.py", "workflows.py", "host/builders.py", "host/models.py",
           "host/runs.py", "comfy_testbed/*.py")
ROUNDING = 1e-3
RESTARTS = "restart and order"
EVEN = {"K-LoRA": {"scheduler": "normal"}}
"""Settings of cut runs: K-LoRA's progress goes by the noise level, and the first of two runs cannot know a schedule
that does not divide it evenly."""

TIMED = {"sd15_leave_one_out": 100}
"""Pictures that say how long they took, in so many rows at their top: those are not compared."""


class Restarts:
    """The pictures of all workflows, by two servers, the second of which draws them in the reverse order."""

    def __init__(self, comfyui: Path):
        self.comfyui, self.prompts = comfyui, workflows()
        self._drawn: list[dict[str, list[bytes] | str]] = []

    def cases(self) -> list[str]:
        return [f"{RESTARTS}: {name}" for name in self.prompts]

    def check(self, name: str) -> str:
        while len(self._drawn) < 2:
            self._drawn.append(self._all(backwards=bool(self._drawn)))
        first, second = (drawn[name] for drawn in self._drawn)
        if isinstance(first, str) or isinstance(second, str):
            raise AssertionError(f"it cannot be drawn: {first if isinstance(first, str) else second}")
        assert first == second, "another picture"
        return "the same to the last bit" if first else "it has no picture, and runs"

    def _all(self, backwards: bool) -> dict[str, list[bytes] | str]:
        out: dict[str, list[bytes] | str] = {}
        with tempfile.TemporaryDirectory() as folder, \
                Server(self.comfyui, Path(folder), [ROOT, ROOT / "tests" / "comfy_testbed"]) as server:
            give_loras(server)
            for name in sorted(self.prompts, reverse=backwards):
                prompt = copy.deepcopy(self.prompts[name])
                try:
                    entry = server.run(prompt)
                    out[name] = [pixels(file, TIMED.get(name, 0)) for node in sorted(find(prompt, "SaveImage"))
                                 for file in server.images(entry, node)]
                except RuntimeError as error:
                    out[name] = str(error)[:300]
        return out


def pixels(file: bytes, top: int = 0) -> bytes:
    """Without what the file says of the prompt, and without so many rows."""
    picture = Image.open(io.BytesIO(file))
    return picture.crop((0, top, *picture.size)).tobytes()


class Parts:
    """Runs cut in two, batches, and lists in another order, on small models."""

    def __init__(self, folder: Path):
        self.model, self.loras = base("SD15"), written_once(folder, "same")
        self.makes = {name: partial(self._with, make) for name, make in {**MAKES, "Merge": Merge}.items()}
        self.makes["K-LoRA"] = lambda ensemble: k_lora(self.model, self.loras)
        self.ensemble = three(self.model, self.loras)

    def _with(self, make, ensemble):
        return method(self.model, ensemble, make)

    def cases(self) -> list[str]:
        cuts = [f"cut at {cut}: {name}" for name in self.makes for cut in range(1, STEPS)]
        orders = [f"LoRAs in order {''.join(map(str, order))}: {make.__name__}" for make in (Merge, Composite)
                  for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
        return [*cuts, *(f"batch of 3: {name}" for name in self.makes), *orders]

    def check(self, case: str) -> str:
        what, _, name = case.partition(": ")
        if what.startswith("cut at"):
            cut, make, even = int(what.removeprefix("cut at ")), self.makes[name], EVEN.get(name, {})
            half = part(make(self.ensemble), 0, cut, **even)
            return self.same(part(make(self.ensemble), cut, STEPS, half, **even),
                             part(make(self.ensemble), 0, STEPS, **even), part(self.model, 0, STEPS, **even))
        if what.startswith("batch"):
            ours = self.makes[name](self.ensemble)
            noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(1))
            together = self.drawn(ours, noise)
            alone = torch.cat([self.drawn(ours, each[None]) for each in noise])
            return self.same(together, alone, self.drawn(self.model, noise))
        make = {"Merge": Merge, "Composite": Composite}[name]
        order = [int(digit) for digit in what.rpartition(" ")[2]]
        other = method(self.model, [self.ensemble[i] for i in order], make)
        return self.same(sample(other), sample(method(self.model, self.ensemble, make)), sample(self.model))

    @staticmethod
    def drawn(model, noise: torch.Tensor) -> torch.Tensor:
        """From latents that are the noise itself, at a denoise at which what is added to them is the same for all."""
        kind = FAMILIES["SD15"]
        with torch.inference_mode():
            return comfy.sample.sample(model, noise, 3, 3.0, "euler", "normal", kind.cond(11), kind.cond(12),
                                       torch.zeros_like(noise), disable_pbar=True, seed=1)

    @staticmethod
    def same(ours: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor) -> str:
        if torch.equal(ours, wanted):
            return "the same to the last bit"
        effect = (wanted - plain).abs().max()
        gap = float((ours - wanted).abs().max() / effect)
        assert gap < ROUNDING, f"differs by {gap:.1e} of what the LoRAs change"
        return f"the same to {ROUNDING:g} of what the LoRAs change"


def main() -> int:
    chosen = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("loras", folder, is_default=True)
        restarts, parts = Restarts(Path(os.environ["COMFYUI_UNDER_TEST"])), Parts(Path(folder))

        def check(case: str) -> Found:
            head, _, rest = case.partition(": ")
            return (restarts.check(rest) if head == RESTARTS else parts.check(case)), {}

        def together(case: str) -> str:
            return RESTARTS if case.startswith(RESTARTS) else case  # one pair of servers draws all

        cases = [*restarts.cases(), *parts.cases()]
        return Results.asked("same", DEPENDS, chosen).judge(cases, check, together=together)


if __name__ == "__main__":
    sys.exit(main())
