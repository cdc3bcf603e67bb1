"""Files of guidance coefficients: names that every system can have, written whole or not at all, read with distrust.

All errors are ValueErrors that name the file and say what to do.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from uuid import uuid4

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...methods.guidance.adaptive import SPACES
from ...methods.guidance.calibration import CALLS, Calibration
from ..files.files import path_in
from .coeffs import GuidanceCoeffs

FOLDER, FORMAT, ENDING = "guidance_coeffs", "lora-ensemble-guidance-1", ".safetensors"
folder_paths.folder_names_and_paths.setdefault(
    FOLDER, ([os.path.join(folder_paths.models_dir, FOLDER)], {ENDING}))

DEEPEST, LONGEST = 8, 180  # folders of a name, and its bytes: some systems take 260 letters of a whole path
TEXT, STEPS, CURVES = 20_000, 10_000, 2**26  # letters of an entry of the header, steps, numbers of a curve, at most
LARGEST = 2**30
"""Bytes of a file, at most."""
_UNSAFE = re.compile(r'[<>:"|?*]')
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_GAMMA = {f"gamma.{space}": space for space in SPACES}
_NEEDED = {"coefficients", "r2", "sigmas", "steps", *_GAMMA}
_WHOLE = {"I64", "I32"}


# --- names ---


def check_name(name: str) -> str:
    """The name with its ending and / between its folders, if files of every system can have it. Raises ValueError."""
    name = name.strip().replace("\\", "/")
    name = name if name.endswith(ENDING) else name + ENDING
    parts = name.split("/")
    if len(parts) > DEEPEST + 1 or not name.isprintable() or len(name.encode()) > LONGEST \
            or not all(map(_is_part, parts)) or any(folder.lower().endswith(ENDING) for folder in parts[:-1]):
        shown = name if len(name) <= LONGEST else name[:60] + " ..."
        raise ValueError(f"Guidance coefficients: '{shown}' is not a name for a file in models/{FOLDER}. Use letters, "
                         f"digits and up to {DEEPEST} folders below it, such as sd15/dpmpp_2m_20.")
    return name


def _is_part(part: str) -> bool:
    """Whether a file or folder can be called this: no hidden one, none that a system keeps for a device or trims."""
    stem = part.removesuffix(ENDING)
    return bool(stem) and stem == stem.strip() and stem[0] != "." and stem[-1] != "." and part[-1] != "." \
        and not _UNSAFE.search(part) and not _DEVICES.fullmatch(part)


def check_place(name: str) -> str:
    """As `check_name`, if a file of this name can be written as things are on the disk. Raises ValueError."""
    name = check_name(name)
    place = Path(folder_paths.get_folder_paths(FOLDER)[0], name).parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"Guidance coefficients '{name}': {place.name} is a file, and a folder of that name is "
                         "needed. Choose another name.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"Guidance coefficients '{name}': nothing may be written into the folder {place}. Change its "
                         "rights, or name another folder.")
    return name


def path_of(name: str) -> str:
    """Full path of a file of coefficients, as `path_in` finds it. Raises ValueError where there is none."""
    path = path_in(FOLDER, name)
    if path is None:
        raise ValueError(f"Guidance coefficients '{name}' are not in any of the '{FOLDER}' folders. Make them with "
                         "Calibrate Guidance and Save Guidance Coefficients, or choose another file.")
    return path


def fingerprint(name: str) -> str:
    """Changes whenever the file does."""
    stat = os.stat(path_of(name))
    return f"{stat.st_size} {stat.st_mtime_ns}"


# --- writing ---


def save(coeffs: GuidanceCoeffs, name: str) -> str:
    """Write a file into the first `guidance_coeffs` folder and return its name there; a number is added where the name
    is taken, by another process at the same moment, too. What is under the name is whole or, where writing failed,
    nothing."""
    name = check_place(name)
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    found = coeffs.found
    tensors = {"coefficients": found.coefficients, "r2": found.r2, "sigmas": torch.tensor(coeffs.sigmas),
               "steps": torch.tensor(found.steps), **{key: found.gamma[space] for key, space in _GAMMA.items()}}
    metadata = {"format": FORMAT, "model": coeffs.model, "kind": coeffs.kind, "sampler": coeffs.sampler,
                "cfg": json.dumps(coeffs.cfg)}
    written = taken = None
    try:
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        # Under a name that no list shows, and that nobody else has; the system then changes names in one step.
        written = os.path.join(folder, os.path.dirname(name), f".{uuid4().hex}.part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, written, metadata)
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        name = _reserved(folder, name)
        taken = os.path.join(folder, name)
        os.replace(written, taken)
        written = taken = None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Guidance coefficients '{name}' cannot be written ({error}). Check the disk and the rights "
                         f"of {folder}, or choose another name.") from None
    finally:
        for left in (written, taken):
            if left is not None and os.path.exists(left):
                os.remove(left)
    folder_paths.filename_list_cache.pop(FOLDER, None)
    return name


def _reserved(folder: str, name: str) -> str:
    """The name, or the first one with a number, under which an empty file could be made: of several who ask, one."""
    stem, number = name.removesuffix(ENDING), 1
    while True:
        try:
            os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return name
        except FileExistsError:
            number += 1
            name = f"{stem}_{number}{ENDING}"


# --- reading ---


def load(name: str) -> GuidanceCoeffs:
    """Read a file of coefficients. Raises ValueError for a missing, damaged or foreign file."""
    path = path_of(name)
    try:
        if os.path.getsize(path) > LARGEST:
            raise ValueError(f"Guidance coefficients '{name}': no file of them is larger than {LARGEST:,} bytes. "
                             "Choose one that Save Guidance Coefficients has written.")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or _NEEDED - set(file.keys()):
                raise ValueError(f"Guidance coefficients '{name}': this file does not hold any. Choose one that Save "
                                 "Guidance Coefficients has written.")
            damage = _damage(metadata, {key: file.get_slice(key) for key in _NEEDED})
            tensors = {} if damage else {key: file.get_tensor(key) for key in _NEEDED}
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise ValueError(f"Guidance coefficients '{name}' cannot be read ({error}). Calibrate again.") from None
    try:
        if damage:
            raise ValueError(damage)
        found = Calibration(tensors["coefficients"].double(), tuple(tensors["steps"].tolist()), tensors["r2"].double(),
                            {space: tensors[key].float() for key, space in _GAMMA.items()})
        coeffs = GuidanceCoeffs(metadata["model"], metadata["sampler"], tuple(tensors["sigmas"].double().tolist()),
                                float(metadata["cfg"]), found, metadata.get("kind", ""))
        coeffs.check_whole()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"Guidance coefficients '{name}' are damaged: {error}. Calibrate again, or choose another "
                         "file.") from None
    return coeffs


def _damage(metadata: dict[str, str], slices: dict) -> str | None:
    """What can be known to be wrong before any tensor is read; their sizes are bounded here."""
    for key in ("model", "sampler", "cfg"):
        if not metadata.get(key):
            return f"the header does not name its {key}"
    if len(metadata["cfg"]) > 40 or any(len(text) > TEXT or not text.isprintable() for text in metadata.values()):
        return "an entry of the header is too long, or no text"
    for key, part in slices.items():
        shape, dtype = part.get_shape(), part.get_dtype()
        if (dtype in _WHOLE) != (key == "steps") or not (dtype in _WHOLE or dtype in ("F64", "F32", "F16", "BF16")):
            return f"{key} is of type {dtype}"
        if len(shape) != (2 if key == "coefficients" or key in _GAMMA else 1):
            return f"{key} has the shape {shape}"
        most = {"coefficients": CALLS * (2 * CALLS + 1), "sigmas": STEPS + 1, "r2": CALLS, "steps": CALLS}
        if math.prod(shape) > most.get(key, CURVES):
            return f"{key} has the shape {shape}, which is too large"
    return None
