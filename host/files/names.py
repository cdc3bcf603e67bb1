"""LoRA files by the names that people write: without extension, without folder, in any case, with accents in one letter
or apart."""

from __future__ import annotations

from difflib import get_close_matches
from unicodedata import normalize

import folder_paths

from .files import FOLDER


def resolved(written: str) -> str:
    """The name in ComfyUI's list of LoRAs that is meant: the whole one, else without extension, else without folder.

    Raises ValueError where none is meant or several are, naming those that come close.
    """
    found = matching(written)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"<lora:{written}> in the prompt may be {_list(found)}. Write the folder, too.")
    names, wanted = folder_paths.get_filename_list(FOLDER), _stem(written)
    stems = {_file(_stem(name)): name for name in names} | {_stem(name): name for name in names}
    close = dict.fromkeys(stems[stem] for stem in get_close_matches(wanted or _plain(written), stems, 4, 0.5))
    known = f"Close to it: {_list(list(close))}." if close else "No name in the list is close to it."
    raise ValueError(f"<lora:{written}> in the prompt is not in any of the 'loras' folders. {known} Put the file there "
                     "and refresh the list (R), or correct the name.")


def matching(written: str) -> list[str]:
    """The names in ComfyUI's list of LoRAs that may be meant, of the first kind of match that there is: the whole name,
    without extension, without folder, without both. A match in the case as written goes before others."""
    names, wanted = folder_paths.get_filename_list(FOLDER), _plain(written)
    for form in (_plain, _stem, lambda name: _file(_plain(name)), lambda name: _file(_stem(name))):
        found = [name for name in names if form(name) == wanted]
        exact = [name for name in found if written in (name, name.rpartition(".")[0])]
        if found:
            return exact if len(exact) == 1 else found
    return []


def _plain(name: str) -> str:
    return normalize("NFC", name).replace("\\", "/").lower().strip()


def _stem(name: str) -> str:
    """Without an extension of model files; "style.v2" has none."""
    plain = _plain(name)
    stem, _, extension = plain.rpartition(".")
    return stem if extension in ("safetensors", "sft", "pt", "bin", "ckpt", "pth") else plain


def _file(plain: str) -> str:
    """Without folder."""
    return plain.rpartition("/")[2]


def _list(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:6]) + (" and others" if len(names) > 6 else "")
