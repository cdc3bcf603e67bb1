"""Colours of the pictures that this pack draws, on light paper and on dark."""

from __future__ import annotations

from dataclasses import dataclass

ORANGE, BLUE, GREEN, PINK, SKY, RED, YELLOW = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
                                               "#F0E442")
"""Of Okabe and Ito (2008): colour-blind eyes tell them apart."""


@dataclass(frozen=True)
class Theme:
    """The colours of a sheet.

    paper, panel   of the sheet, and behind a chart
    ink, faint     of text, and of what is less important
    grid           of lines
    neutral        of what is no LoRA's: the base model, what was left out
    colours        of the LoRAs, in order
    """

    paper: str
    panel: str
    ink: str
    faint: str
    grid: str
    neutral: str
    colours: tuple[str, ...]

    def colour(self, i: int) -> str:
        """Of LoRA i. After a round of the palette come its colours mixed with ink, then with paper."""
        turn, k = divmod(i, len(self.colours))
        return self.colours[k] if not turn else mixed(self.colours[k], (self.paper, self.ink)[turn % 2], 0.45)


LIGHT = Theme("#FFFFFF", "#F6F6F4", "#222222", "#666666", "#D8D8D4", "#9A9A9A",
              (ORANGE, BLUE, GREEN, PINK, SKY, RED, "#000000"))
DARK = Theme("#1C1D20", "#26282C", "#ECECEA", "#ABADB2", "#42454B", "#7D8087",
             (ORANGE, SKY, GREEN, PINK, BLUE, RED, YELLOW))
THEMES = {"light": LIGHT, "dark": DARK}


def rgb(colour: str) -> tuple[int, int, int]:
    """"#E69F00" -> (230, 159, 0)"""
    return tuple(bytes.fromhex(colour[1:]))


def mixed(one: str, other: str, share: float) -> str:
    """A colour with a share of another one in it."""
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(rgb(one), rgb(other), strict=True))


def contrasting(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return "#000000" if brightness(colour) > 0.18 else "#FFFFFF"


def brightness(colour: str) -> float:
    """Relative luminance as WCAG 2 has it, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb(colour))]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
