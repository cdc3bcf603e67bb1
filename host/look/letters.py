"""Text on pictures, in the font that comes with Pillow."""

from __future__ import annotations

from PIL import ImageDraw, ImageFont


def font(size: int) -> ImageFont.ImageFont:
    """The font in a size; Pillow before 10.1 has one size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def fitted(pen: ImageDraw.ImageDraw, name: str, room: float, size: int) -> str:
    """A name with as much of its middle left out as it takes to fit."""
    kept, text = len(name), name
    while pen.textlength(text, font(size)) > room and kept > 2:
        kept -= 1
        text = f"{name[:(kept + 1) // 2]} ... {name[-(kept // 2):]}"
    return text


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
