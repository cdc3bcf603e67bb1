"""Trigger words that other programs keep beside a LoRA file, each in a file and a form of its own.

Anybody may have written these: they are read as JSON of a bounded size, and nothing but words is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from .files import Stamp, noted, stamp_of

MOST_BYTES = 2**20


class Beside(NamedTuple):
    """What stands beside a LoRA file.

    texts    words as they are written, one or several in each
    file     the name of the file that has them; empty: none has any
    unread   what could not be read and why, a clause; empty: nothing
    """

    texts: tuple[str, ...] = ()
    file: str = ""
    unread: str = ""


def paths_beside(path: str) -> tuple[str, ...]:
    """Where such files of a LoRA would be, in the order in which they are asked."""
    stem = os.path.splitext(path)[0]
    return tuple(f"{path if whole else stem}{end}" for whole, end, _ in _KINDS)


def read_beside(path: str) -> Beside:
    """The words of the first file beside a LoRA that names any. Where they change, this counts as a change of the LoRA;
    what else programs write there does not."""
    return noted(path, _look)


def _look(path: str) -> Beside:
    return _read(tuple((each, stamp_of(each)) for each in paths_beside(path)))


@lru_cache(maxsize=64)
def _read(files: tuple[tuple[str, Stamp], ...]) -> Beside:
    unread = []
    for (path, there), (_, _, words) in zip(files, _KINDS, strict=True):
        if there is None or not os.path.isfile(path):
            continue
        name = os.path.basename(path)
        try:
            with open(path, "rb") as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ValueError("it is larger than 1 MB")
            table = json.loads(content)
        except (OSError, ValueError, RecursionError) as error:
            unread.append(f"'{name}' beside it cannot be read ({error})")
            continue
        texts = tuple(words(table)) if isinstance(table, dict) else ()
        if texts:
            return Beside(texts, name, "; ".join(unread))
    return Beside(unread="; ".join(unread))


def _texts(value: object) -> list[str]:
    """The texts in an entry: it, or what it lists."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]


def _lora_manager(table: dict) -> Iterable[str]:
    civitai = table.get("civitai")
    named = civitai.get("trainedWords") if isinstance(civitai, dict) else None
    return _texts(named) or _texts(table.get("trainedWords"))


def _rgthree(table: dict) -> Iterable[str]:
    """Without the tags of the training, which it lists beside the words and marks as such."""
    words = table.get("trainedWords")
    for word in words if isinstance(words, list) else ():
        if isinstance(word, dict) and (not word.get("metadata") or word.get("civitai") or word.get("user")):
            yield from _texts(word.get("word"))


_KINDS: tuple[tuple[bool, str, Callable[[dict], Iterable[str]]], ...] = (
    (False, ".metadata.json", _lora_manager),  # ComfyUI-Lora-Manager
    (True, ".rgthree-info.json", _rgthree),
    (False, ".civitai.info", lambda table: _texts(table.get("trainedWords"))),  # Civitai Helper
    (False, ".json", lambda table: _texts(table.get("activation text"))),  # Stable Diffusion web UI
)
"""(whether its name begins with the LoRA's whole name or with that without extension, how it ends, its words)"""
