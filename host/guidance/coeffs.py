"""Calibrated guidance: what it was fitted on, whether it fits a run, and its files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...methods.guidance.adaptive import SPACES
from ...methods.guidance.calibration import Calibration
from ...methods.guidance.linear import LinearAG
from ...methods.guidance.session import Tell
from ...methods.session import RunContext
from .identity import describe_model

FOLDER, FORMAT = "guidance_coeffs", "lora-ensemble-guidance-1"
folder_paths.folder_names_and_paths.setdefault(
    FOLDER, ([os.path.join(folder_paths.models_dir, FOLDER)], {".safetensors"}))


class CoeffsError(ValueError):
    """Coefficients that cannot be used. The message says why and what to do."""


@dataclass(frozen=True)
class GuidanceCoeffs:
    """What travels on a GUIDANCE_COEFFS socket.

    model     the model it was calibrated on, as `describe_model` names it
    sampler   name of the sampler's function with its options
    sigmas    the schedule, with the final 0
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float
    found: Calibration

    def differences(self, model: ModelPatcher, run: RunContext) -> list[str]:
        """How a run of a MODEL differs from what this was calibrated on, in words; empty where it does not."""
        out = []
        if (here := describe_model(model)) != self.model:
            out.append(f"model '{self.model}', here '{here}'")
        if run.sampler != self.sampler:
            out.append(f"sampler {self.sampler}, here {run.sampler}")
        if len(run.sigmas) != len(self.sigmas):
            out.append(f"{len(self.sigmas) - 1} steps, here {len(run.sigmas) - 1}")
        elif not torch.allclose(torch.tensor(run.sigmas), torch.tensor(self.sigmas), rtol=1e-3, atol=1e-6):
            out.append(f"a schedule from {self.sigmas[0]:.4g} to {self.sigmas[-2]:.4g}, here another one, from "
                       f"{run.sigmas[0]:.4g} to {run.sigmas[-2]:.4g}")
        if run.cfg is None or abs(run.cfg - self.cfg) > 1e-4:
            out.append(f"cfg {self.cfg:g}, here {'none' if run.cfg is None else format(run.cfg, 'g')}")
        return out

    def check(self, model: ModelPatcher, run: RunContext, nearest: bool, tell: Tell) -> None:
        """Raises CoeffsError where it does not fit a run of a MODEL; `nearest`: tells what differs and lets it pass."""
        differences = self.differences(model, run)
        if not differences:
            return
        text = "the guidance coefficients were calibrated for " + "; ".join(differences)
        if not nearest:
            raise CoeffsError(f"Adaptive Guidance: {text}. Calibrate with these settings (Calibrate Guidance), or set "
                              "if_different to 'nearest' to use them all the same.")
        tell(text)

    def linear(self, sigmas: tuple[float, ...]) -> LinearAG:
        """LinearAG's policy for a schedule: as calibrated where the number of steps agrees, else every call stands for
        the calibrated one nearest in noise level, and the weights of calls that fall together are added."""
        policy = self.found.policy()
        if len(sigmas) == len(self.sigmas):
            return policy
        if len(set(self.found.steps)) != len(self.found.steps):
            raise CoeffsError("Adaptive Guidance: coefficients of a sampler that calls the model several times in a "
                              "step cannot be used with another number of steps. Calibrate with this number.")
        here, there = sigmas[:-1], [self.sigmas[step] for step in self.found.steps]
        nearest_there = [min(range(len(there)), key=lambda k: abs(there[k] - sigma)) for sigma in here]
        rows = []
        for n, twin in enumerate(nearest_there):
            row = [0.0] * (2 * len(here) + 1)
            for k in range(twin + 1):
                near = min(range(n + 1), key=lambda i: abs(here[i] - there[k])) if k < twin else n
                row[2 * near] += policy.coefficients[twin][2 * k]
                if k < twin and n:
                    row[2 * min(near, n - 1) + 1] += policy.coefficients[twin][2 * k + 1]
            row[-1] = policy.coefficients[twin][-1]
            rows.append(tuple(row))
        return LinearAG(tuple(rows), tuple(range(len(here))))


# --- files ---


def check_name(name: str) -> str:
    """The name with its ending. Raises CoeffsError for one that leaves the folder or that no file can have."""
    name = name.strip()
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    parts = name.replace("\\", "/").split("/")
    # A file system takes 255 bytes, of which a number may need some.
    fits = name.isprintable() and all(len(part.encode()) <= 200 for part in parts)
    if name == ".safetensors" or os.path.isabs(name) or ".." in parts or not fits:
        raise CoeffsError(f"Guidance coefficients: '{name}' is not a name for a file in models/{FOLDER}. Use letters, "
                          "digits and folders below it, such as sd15/dpmpp_2m_20.")
    return name


def save(coeffs: GuidanceCoeffs, name: str) -> str:
    """Write a file into the first `guidance_coeffs` folder and return its name there; a number is added where the name
    is taken."""
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    stem, ending = os.path.splitext(check_name(name))
    free, number = stem + ending, 2
    while os.path.exists(os.path.join(folder, free)):
        free, number = f"{stem}_{number}{ending}", number + 1
    path = os.path.join(folder, free)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    found = coeffs.found
    tensors = {"coefficients": found.coefficients, "r2": found.r2, "sigmas": torch.tensor(coeffs.sigmas),
               "steps": torch.tensor(found.steps), **{f"gamma.{space}": found.gamma[space] for space in SPACES}}
    metadata = {"format": FORMAT, "model": coeffs.model, "sampler": coeffs.sampler, "cfg": json.dumps(coeffs.cfg)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    folder_paths.filename_list_cache.pop(FOLDER, None)
    return free


def path_of(name: str) -> str:
    """Full path of a file of coefficients. Raises CoeffsError where there is none."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise CoeffsError(f"Guidance coefficients '{name}' are not in any of the '{FOLDER}' folders. Make them with "
                          "Calibrate Guidance and Save Guidance Coefficients, or choose another file.")
    return path


def fingerprint(name: str) -> str:
    """Changes whenever the file does."""
    stat = os.stat(path_of(name))
    return f"{stat.st_size} {stat.st_mtime_ns}"


def load(name: str) -> GuidanceCoeffs:
    """Read a file of coefficients. Raises CoeffsError for a missing, damaged or foreign file."""
    try:
        with safe_open(path_of(name), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CoeffsError(f"Guidance coefficients '{name}' cannot be read ({error}). Calibrate again.") from None
    needed = {"coefficients", "r2", "sigmas", "steps", *(f"gamma.{space}" for space in SPACES)}
    if metadata.get("format") != FORMAT or needed - set(tensors):
        raise CoeffsError(f"'{name}' does not hold guidance coefficients of this pack. Choose a file that Save "
                          "Guidance Coefficients has written.")
    found = Calibration(tensors["coefficients"].double(), tuple(tensors["steps"].tolist()), tensors["r2"].double(),
                        {space: tensors[f"gamma.{space}"] for space in SPACES})
    return GuidanceCoeffs(metadata["model"], metadata["sampler"], tuple(tensors["sigmas"].tolist()),
                          json.loads(metadata["cfg"]), found)
