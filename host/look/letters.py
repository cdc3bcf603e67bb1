"""Text on pictures, in the font that comes with Pillow."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from unicodedata import combining, normalize

from PIL import Image, ImageDraw, ImageFont

from ..files.called import file_of


def font(size: int) -> ImageFont.ImageFont:
    """The font in a size; Pillow before 10.1 has one size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


@cache
def measure() -> ImageDraw.ImageDraw:
    """A pen to measure text with."""
    return ImageDraw.Draw(Image.new("RGB", (1, 1)))


def short_names(names: Sequence[str]) -> list[str]:
    """LoRAs by their files without folder and ending, as far as that tells them apart."""
    short = [_stem(file_of(name)) + name.removeprefix(file_of(name)) for name in names]
    return [one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True)]


def _stem(name: str) -> str:
    return PurePath(name.replace("\\", "/")).stem


def labels(names: Sequence[str]) -> list[str]:
    """LoRAs as charts call them: their short names without the accents that the font lacks. What it has no letters for,
    and what is still alike, is called by its number."""
    found = short_names([name if has_letters(name) else plain(name) for name in names])
    return [name if has_letters(name) and found.count(name) == 1 else f"LoRA {i + 1}" for i, name in enumerate(found)]


def plain(text: str) -> str:
    """Letters without their accents, where they have any."""
    return "".join(letter for letter in normalize("NFKD", text) if not combining(letter))


def has_letters(text: str) -> bool:
    """Whether the font can write a text, in one line; it draws the same box for all that it cannot."""
    return all(letter.isprintable() if letter.isascii() else _drawn(letter) != _drawn("\uffff") for letter in set(text))


@cache
def _drawn(letter: str) -> bytes:
    return bytes(font(15).getmask(letter))


def fitted(pen: ImageDraw.ImageDraw, name: str, room: float, size: int) -> str:
    """A name, in one line, with as much of its middle left out as it takes to fit."""
    name = name.replace("\n", " ")  # which names of files may have
    if pen.textlength(name, font(size)) <= room:
        return name

    def cut(kept: int) -> str:
        return f"{name[:(kept + 1) // 2]} ... {name[len(name) - kept // 2:]}"

    most = bisect_left(range(3, len(name)), True, key=lambda kept: pen.textlength(cut(kept), font(size)) > room)
    return cut(max(most + 2, min(len(name), 2)))


def wrapped(pen: ImageDraw.ImageDraw, text: str, room: float, size: int, most: int) -> list[str]:
    """A text in at most so many lines, each of which fits; what is left of it is fitted into the last one."""
    lines, words = [], text.split()
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and pen.textlength(" ".join(words[:count + 1]), font(size)) <= room:
            count += 1
        lines.append(fitted(pen, " ".join(words[:count]), room, size))
        words = words[count:]
    return [*lines, fitted(pen, " ".join(words), room, size)] if words else lines
