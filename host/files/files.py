"""LoRA files: found through ComfyUI's folder lists, checked, read once.

A file that was read is kept for the base model that it was read for, until ComfyUI lets go of that model: as it does
when memory is to be freed (`/free`), under the pressure of memory, or where it keeps nothing between prompts.

All errors are ValueErrors that name the file and say what to do.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar
from unicodedata import normalize
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.lora_convert
import comfy.utils
import folder_paths
from safetensors import SafetensorError
from torch import Tensor, nn

from .broken import LOOKED_AT, instead, unfinished

FOLDER = "loras"
KEPT_BYTES = 2**30
"""Of all files that are kept, for all models together; the last one is kept whatever its size."""
_OBJECT_BYTES = 1024  # what a tensor costs beside its data: files of very many small ones are not small
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
          "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}

Seen = TypeVar("Seen", bound=Hashable)
Stamp = tuple[int, int] | None
"""Size and time of change of a file, or None where there is none."""


class LoRAFile(dict[str, Tensor]):
    """The tensors of one file under ComfyUI's own names. They stay on disk until something reads their values.

    stamp   of the file when it was read
    """

    def __init__(self, tensors: Mapping[str, Tensor], stamp: Stamp = None):
        super().__init__(tensors)
        self.stamp = stamp
        self._peaks: dict[str, float] = {}

    def peak(self, key: str) -> float:
        """The largest magnitude in a tensor: NaN or infinite where it holds such a value. Read once."""
        if key not in self._peaks:
            tensor = self[key].float() if self[key].element_size() == 1 else self[key]  # 8-bit ones know no reductions
            low, high = map(float, tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
            self._peaks[key] = max(-low, high)  # both are NaN where one entry is
        return self._peaks[key]


_known: WeakValueDictionary[str, LoRAFile] = WeakValueDictionary()
_held: WeakKeyDictionary[nn.Module, OrderedDict[str, LoRAFile]] = WeakKeyDictionary()
_seen: dict[tuple[str, Callable], Hashable] = {}
_changes = 0


def known(name: str) -> bool:
    """Whether a name is in one of the `loras` folders."""
    return path_in(FOLDER, name) is not None


def listed(name: str) -> str:
    """The spelling of a name that ComfyUI itself finds, for nodes of other packs."""
    return next((spelling for spelling in _spellings(name) if folder_paths.get_full_path(FOLDER, spelling)), name)


def path_of(name: str) -> str:
    """Full path of a LoRA by its name in the `loras` folders, as `path_in` finds it."""
    path = path_in(FOLDER, name)
    if path is not None:
        return path
    names = folder_paths.get_filename_list(FOLDER)
    if name in names:
        raise ValueError(f"LoRA '{name}' is in the list, but no file is behind the name: it is a link that leads "
                         "nowhere. Mend the link, or choose another one.")
    within = name.replace("\\", "/") + "/"
    if inside := next((each for each in names if each.replace("\\", "/").startswith(within)), None):
        raise ValueError(f"LoRA '{name}' is a folder, such as some programs unpack a download into. Choose the file in "
                         f"it: '{inside}'.")
    raise ValueError(f"LoRA '{name}' is not in any of the 'loras' folders. Put the file there and refresh the list "
                     "(R), or choose another one.")


def path_in(folder: str, name: str) -> str | None:
    """Full path of a file in one of ComfyUI's kinds of folders, None where there is none. A name as another system
    writes it is understood: Windows has backslashes between folders, and macOS may keep accents apart from letters."""
    paths = (folder_paths.get_full_path(folder, spelling) for spelling in _spellings(name))
    return next((path for path in paths if path is not None), None)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys(change(each) for each in (name, name.replace("\\", "/"))
                              for change in (str, partial(normalize, "NFC"), partial(normalize, "NFD"))))


def fingerprint(name: str) -> str:
    """Changes whenever the file does, so that a replaced file is read again."""
    path = path_of(name)
    return repr((path, stamp_of(path)))


def changes() -> int:
    """How often what was seen of a file has changed on disk: the fingerprint of a node whose files come over a link,
    which it does not know before it runs."""
    for path, look in list(_seen):
        noted(path, look)
    return _changes


def check_file(name: str) -> None:
    """Refuse what can be known to be wrong from the header alone; cheap enough for every validation.

    Raises ValueError for a missing file, another format, a damaged header or a file that is not whole.
    """
    path = path_of(name)
    if not name.lower().endswith((".safetensors", ".sft")):
        raise ValueError(f"LoRA '{name}' is not a .safetensors file. Other formats can run code when they are opened "
                         "and are not read; convert it to safetensors first.")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(LOOKED_AT)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = file.read(length) if 2 <= length <= min(size - 8, 100_000_000) else b""
    except OSError as error:
        raise ValueError(f"LoRA '{name}' cannot be opened ({error}). Check its rights and its disk.") from error
    if (beside := unfinished(path)) is not None:
        raise ValueError(f"LoRA '{name}' is not downloaded as a whole: beside it is '{beside}', which aria2 keeps "
                         "until it is. Let the download end; if it has, delete that file.")
    if size < 8 or length < 2 or length > 100_000_000:
        raise ValueError(f"LoRA '{name}' {instead(start, size)}")
    if length > size - 8:
        raise ValueError(_truncated(name, size, length + 8))
    try:
        end = _end_of_data(json.loads(header))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"LoRA '{name}' has a damaged header ({error}). Download it again.") from None
    if end is None:
        raise ValueError(f"LoRA '{name}' is empty: a header without a single tensor. Download it again, or use another "
                         "version.")
    if size < 8 + length + end:
        raise ValueError(_truncated(name, size, 8 + length + end))


def read(name: str, base: nn.Module) -> LoRAFile:
    """The tensors of a LoRA file in ComfyUI's own naming; read once per path, size and time of change.

    base   the model that it is read for, with which it is let go; the last ones used are kept
    Raises ValueError as `check_file` does, and for what the host's reader refuses.
    """
    check_file(name)
    path = path_of(name)
    stamp = noted(path)
    file = _known.get(path)
    if file is None or file.stamp != stamp:
        file = _known[path] = _load(name, path, stamp)
    held = _held.setdefault(base, OrderedDict())
    held[path] = file
    held.move_to_end(path)
    while len(held) > 1 and kept_bytes() > KEPT_BYTES:
        held.popitem(last=False)
    return file


def forget() -> None:
    """Keep no file."""
    _held.clear()
    _known.clear()


def kept_bytes() -> int:
    """Of all files that are kept; one that is kept for several models counts once."""
    files = {id(file): file for held in _held.values() for file in held.values()}
    return sum(map(_nbytes, files.values()))


def _load(name: str, path: str, stamp: Stamp) -> LoRAFile:
    try:
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
    # The host's reader looks for a text in the error's first argument: it ends in TypeError where that is a number.
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if os.strerror(errno.ENOMEM) in str(error):
            raise  # the file may be whole: no word about it
        raise ValueError(f"LoRA '{name}' cannot be read ({error}). Unless memory or the disk ran short, download it "
                         "again.") from error
    try:
        return LoRAFile(_in_host_names(tensors), stamp)
    except (KeyError, IndexError) as error:
        raise ValueError(f"LoRA '{name}' looks like a control LoRA of Flux, but its first layer is incomplete "
                         f"({error}). Download it again, or use another version.") from error


def _in_host_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the host's loader renames them before it looks for layers, and XLabs' files for Flux whatever blocks they
    have: the host knows those with all blocks alone."""
    if any(key.startswith("double_blocks.0.processor.") for key in tensors):
        return comfy.lora_convert.convert_uso_lora(tensors)
    return comfy.lora_convert.convert_lora(tensors)


def _end_of_data(header: object) -> int | None:
    """Where the last tensor ends, from the start of the data; None without any. Raises ValueError for what no
    safetensors file says."""
    if not isinstance(header, dict):
        raise ValueError("it is not a table of tensors")
    ends = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"'{key}' is not a tensor")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"'{key}' has no shape or no place")
        size = _SIZES.get(entry.get("dtype")) if isinstance(entry.get("dtype"), str) else 0
        if size is not None and math.prod(shape) * size != offsets[1] - offsets[0]:
            raise ValueError(f"'{key}' has another size than its shape and type")
        ends.append(offsets[1])
    return max(ends, default=None)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def stamp_of(path: str) -> Stamp:
    """By which a file is known to be the same as before."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def noted(path: str, look: Callable[[str], Seen] = stamp_of) -> Seen:
    """What is seen of a path, the stamp of its file if nothing else is asked for; counts a change where it was another
    before."""
    global _changes
    seen = look(path)
    _changes += _seen.get((path, look), seen) != seen
    _seen[path, look] = seen
    return seen


def _truncated(name: str, size: int, expected: int) -> str:
    return (f"LoRA '{name}' is truncated: {size:,} bytes of at least {expected:,}. The download or copy was cut short; "
            "fetch the file again.")


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() + _OBJECT_BYTES for t in tensors.values())
