"""LoRA files: found through ComfyUI's folder lists, checked, read once."""

from __future__ import annotations

import json
import os
from collections import OrderedDict

import comfy.lora_convert
import comfy.utils
import folder_paths
import torch
from torch import Tensor

FOLDER = "loras"
CACHE_BYTES = 2**30


class LoRAFileError(ValueError):
    """A LoRA file that cannot be used. The message names the file and what to do."""


_cache: OrderedDict[tuple[str, int, int], dict[str, Tensor]] = OrderedDict()


def path_of(name: str) -> str:
    """Full path of a LoRA by its name in the `loras` folders."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise LoRAFileError(f"LoRA '{name}' is not in any of the 'loras' folders. Put the file there and refresh the "
                            "list (R), or choose another one.")
    return path


def fingerprint(name: str) -> str:
    """Changes whenever the file does, so that a replaced file is read again."""
    return repr(_key(path_of(name)))


def check_file(name: str) -> None:
    """Refuse what can be known to be wrong from the header alone; cheap enough for every validation.

    Raises LoRAFileError for a missing file, another format, a damaged header or a truncated file.
    """
    path = path_of(name)
    if not name.lower().endswith((".safetensors", ".sft")):
        raise LoRAFileError(f"LoRA '{name}' is not a .safetensors file. Other formats can run code when they are "
                            "opened and are not read; convert it to safetensors first.")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length < 2 or length > 100_000_000:
            raise LoRAFileError(f"LoRA '{name}' is not a safetensors file, whatever its name says (often a web page "
                                "saved by a download that needed a login). Download it again.")
        if length > size - 8:
            raise LoRAFileError(_truncated(name, size, length + 8))
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise LoRAFileError(f"LoRA '{name}' has a damaged header ({error}). Download it again.") from None
    if not ends:
        raise LoRAFileError(f"LoRA '{name}' is empty: a header without a single tensor. Download it again, or use "
                            "another version.")
    expected = 8 + length + max(ends)
    if size < expected:
        raise LoRAFileError(_truncated(name, size, expected))


def read(name: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file in ComfyUI's own naming; read once per path, size and time of change.

    Raises LoRAFileError as `check_file` does, and for values that are not finite.
    """
    check_file(name)
    path = path_of(name)
    key = _key(path)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    try:
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
    except Exception as error:
        raise LoRAFileError(f"LoRA '{name}' cannot be read ({error}). Download it again.") from error
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(_wide(v)).all()]
    if bad:
        raise LoRAFileError(f"LoRA '{name}' holds values that are not numbers (NaN or infinite) in {len(bad)} tensors, "
                            f"'{bad[0]}' for one. Its training went wrong or the file is damaged: use another version.")
    _cache[key] = comfy.lora_convert.convert_lora(tensors)
    while len(_cache) > 1 and sum(map(_nbytes, _cache.values())) > CACHE_BYTES:
        _cache.popitem(last=False)
    return _cache[key]


def _key(path: str) -> tuple[str, int, int]:
    stat = os.stat(path)
    return path, stat.st_size, stat.st_mtime_ns


def _truncated(name: str, size: int, expected: int) -> str:
    return (f"LoRA '{name}' is truncated: {size:,} bytes of at least {expected:,}. The download or copy was cut short; "
            "fetch the file again.")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() > 1 else tensor.float()


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
