"""Files of guidance coefficients with every kind of damage, made from seeds, and what must become of each.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.fuzz_coeffs --count 1500

Either a file is refused by a ValueError that names it, or what it holds is whole: a picture that is guided by it, in
either mode and with any number of steps, is made of numbers.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from .host import conftest  # noqa: F401  (before `comfy`, whose command line it prepares)

# isort: split
import folder_paths
import torch
from safetensors.torch import save
from torch import Tensor

from ..host.guidance import files
from ..host.guidance.apply import apply_guidance
from ..host.guidance.coeffs import GuidanceCoeffs
from ..host.guidance.options import CALIBRATED, GuidanceOptions, guidance_of
from ..host.look.calibration import plot, summary
from ..methods.guidance.adaptive import SPACES, AdaptiveGuidance
from ..tools.results import Results, options, seeds
from .host.builders import sample, schedule
from .host.models import base

DEPENDS = ("fuzz_coeffs.py", "host/builders.py", "host/models.py")
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int32, torch.bool,
          torch.complex64, torch.uint8)
EXTREMES = (0.0, 1.0, -1.0, 2.0, 1e5, 1e7, 1e38, -1e38, 1e-38, float("nan"), float("inf"), -float("inf"))
TEXTS = ("", "NaN", "Infinity", "-1", "1e400", "7.5.1", "null", "[" * 5000, "{}", "true", "12", "ä" * 300, "\0",
         "x" * 200_000)


def whole(dice: random.Random, sigmas: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a good file for a schedule; its numbers are of no particular model."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    per_step = dice.choice([1, 1, 2])
    steps = [step for step in range(len(sigmas) - 1) for _ in range(per_step)]
    calls, paths = len(steps), dice.randint(1, 3)
    rows = torch.randn(calls, 2 * calls + 1, generator=generator, dtype=torch.float64) / calls
    for n, row in enumerate(rows):
        row[2 * n + 1:] = 0
    curves = 1 - torch.rand(paths, calls, generator=generator).cumsum(1).flip(1) / calls / 10
    tensors = {"coefficients": rows, "r2": torch.rand(calls, generator=generator, dtype=torch.float64),
               "sigmas": sigmas.clone(), "steps": torch.tensor(steps),
               **{f"gamma.{space}": curves.clone() for space in SPACES}}
    return tensors, {"format": files.FORMAT, "model": "a model", "kind": "a kind", "sampler": "sample_euler",
                     "cfg": "7.5"}


def damage(dice: random.Random, tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """One damage, in place; returns its name."""
    key = dice.choice(sorted(tensors))
    what = dice.choice(["missing", "size", "dimensions", "value", "value", "values", "dtype", "swapped", "header",
                        "header", "more"])
    tensor = tensors[key]
    if what == "missing":
        del tensors[key]
    elif what == "size":
        shape = list(tensor.shape)
        if not shape:
            return what
        dim = dice.randrange(len(shape))
        shape[dim] = dice.choice([0, 1, shape[dim] + 1, max(shape[dim] - 1, 0), 2 * shape[dim]])
        tensors[key] = torch.zeros(shape, dtype=tensor.dtype)
    elif what == "dimensions":
        tensors[key] = dice.choice([tensor.flatten(), tensor[..., None], tensor.flatten()[:1].sum(),
                                    tensor.transpose(0, -1).contiguous()])
    elif what in ("value", "values"):
        value = dice.choice(EXTREMES)
        value = value if tensor.is_floating_point() else dice.choice([-1, 0, 5, 10**6, 2**62, -2**62])
        if not tensor.numel() or tensor.element_size() == 1:
            return what
        tensors[key] = changed = tensor.clone()
        value = torch.tensor(value, dtype=torch.float64).to(tensor.dtype) if tensor.is_floating_point() else value
        if what == "values":
            changed.fill_(value)
        else:
            changed.view(-1)[dice.randrange(changed.numel())] = value
    elif what == "dtype":
        tensors[key] = tensor.to(dice.choice(DTYPES))
    elif what == "swapped":
        other = dice.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other], tensors[key]
    elif what == "more":
        tensors["more"] = torch.zeros(3)
    else:
        name = dice.choice(sorted(header))
        if dice.random() < 0.3:
            del header[name]
        else:
            header[name] = dice.choice(TEXTS)
    return what


def damage_bytes(dice: random.Random, content: bytes) -> bytes:
    """Bytes changed in the header or the data, the end cut off, or another length of the header."""
    content, length = bytearray(content), int.from_bytes(content[:8], "little")
    what = dice.choice(["header", "data", "cut", "length", "json"])
    if what in ("header", "data"):
        first, last = (8, 8 + length) if what == "header" else (8 + length, len(content))
        for _ in range(dice.choice([1, 1, 4, 20])):
            content[dice.randrange(first, last)] = dice.randrange(256)
    elif what == "cut":
        del content[dice.randrange(len(content)):]
    elif what == "length":
        content[:8] = dice.choice([0, 1, length - 1, length + 1, 2**40, 2**63]).to_bytes(8, "little")
    else:
        table = json.loads(content[8:8 + length])
        key = dice.choice(sorted(set(table) - {"__metadata__"}))
        table[key][dice.choice(["shape", "data_offsets", "dtype"])] = dice.choice(
            [[], [2**40], [-1, 3], "F64", "F8_E4M3", None, 7, [0, 2**50], [[1]]])
        text = json.dumps(table).encode()
        content[:8 + length] = len(text).to_bytes(8, "little") + text
    return bytes(content)


class Failure(Exception):
    """What a damaged file should not have become."""


class Fuzz:
    """Damaged files, written into a folder that ComfyUI lists as `guidance_coeffs`, and the judge of what becomes of
    them."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, base("SD15")
        self.sigmas = schedule(self.model, 4)

    def check(self, seed: int) -> str:
        """Make the file of a seed and judge it; returns what became of it. Raises whatever goes wrong."""
        dice = random.Random(seed)
        tensors, header = whole(dice, self.sigmas)
        if dice.random() < 0.7:
            for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
                damage(dice, tensors, header)
            content = save({key: value.contiguous() for key, value in tensors.items()}, header)
        else:
            content = damage_bytes(dice, save(tensors, header))
        name = f"fuzz_{seed}.safetensors"
        (self.folder / name).write_bytes(content)
        folder_paths.filename_list_cache.clear()
        try:
            coeffs = files.load(name)
        except ValueError as error:
            if type(error) is not ValueError or name not in str(error) or len(str(error)) > 1000:
                raise
            return "refused"
        finally:
            (self.folder / name).unlink()
        self.use(coeffs, dice)
        return "works"

    def use(self, coeffs: GuidanceCoeffs, dice: random.Random) -> None:
        """Everything that a file is for."""
        if not torch.isfinite(plot(coeffs)).all() or "nan" in summary(coeffs):
            raise Failure("its plot or its text holds values that are not numbers")
        mode, steps = dice.choice(CALIBRATED), dice.choice([4, 4, 3, 5])
        policy = AdaptiveGuidance(space=dice.choice(SPACES))
        guidance = guidance_of(GuidanceOptions(mode, policy, 0.25, True, coeffs, nearest=True))
        try:
            picture = sample(apply_guidance(self.model, guidance), steps=steps)
        except ValueError as error:
            if "several times in a step" not in str(error):
                raise
            return
        if not torch.isfinite(picture).all():
            raise Failure(f"{mode}: the picture is not made of numbers")


def main() -> int:
    chosen = options(__doc__, 1500).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path(files.FOLDER, folder, is_default=True)
        fuzz = Fuzz(Path(folder))
        return Results.asked("fuzz_coeffs", DEPENDS, chosen).judge(
            seeds(chosen), lambda case: (fuzz.check(int(case)), {}))


if __name__ == "__main__":
    sys.exit(main())
