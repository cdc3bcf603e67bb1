"""What each LoRA does, as a sheet: the pictures without it, its share of the prediction, and where that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .chart import Bar, Bars, Lines, Series
from .heat import overlay
from .leave_one_out import Found
from .letters import labels
from .sheet import Beside, Block, Cell, Pictures, Text, as_image, sheet
from .theme import LIGHT, Theme

COLUMNS, MAPS, SIDE = 5, 4, 480
LONGEST = 4096
"""A side of a rough preview is no longer, where the latent itself is not."""
ROUGH = "no VAE is connected: the pictures are rough previews of the latents"
SOUND = "the VAE makes sound of these latents: the pictures are the latents themselves, from left to right in time"


def pictures_of(found: Found, model, vae=None) -> tuple[Tensor, str]:
    """(one picture [height, width, 3] in [0, 1] per variant, what is to be said of them): decoded, of films the frame
    in the middle; without a VAE, and where it makes none, what the colours of the latent's channels are by the model's
    format, grey where it says nothing of them."""
    out, note = [], ROUGH if vae is None else ""
    for latent in found.latents:
        latent = latent.unbind()[0] if latent.is_nested else latent
        image = None if note else vae.decode(latent)
        if image is not None and image.ndim < 4:
            image, note = None, SOUND
        image = _rough(latent, model) if image is None else image
        image = image[:, image.shape[1] // 2] if image.ndim == 5 else image[len(image) // 2:len(image) // 2 + 1]
        out.append(image[0, ..., :3].float().cpu().nan_to_num(0.0).clamp(0, 1))
    return torch.stack(out), note


def changed(pictures: Tensor) -> list[float]:
    """How far each picture is from the first: the mean difference of its values, 0 to 1."""
    return (pictures - pictures[:1]).abs().mean(dim=(1, 2, 3)).double().tolist()


def draw(found: Found, pictures: Tensor, about: str, note: str = "", theme: Theme = LIGHT) -> Tensor:
    """The sheet, [1, height, width, 3] in [0, 1]. `note`: what is to be said of the pictures."""
    called, differences = labels(found.names), changed(pictures)
    cells = [Cell(title, _picture(one), [f"{100 * far:.1f} % away from the first" if k else "all from one seed"])
             for k, (title, one, far) in enumerate(zip(found.titles, pictures, differences, strict=True))]
    rows = -(-len(cells) // COLUMNS)
    blocks: list[Block] = [Pictures(cells, -(-len(cells) // rows))]
    nothing = [name for i, name in enumerate(called) if found.does_nothing(i)]
    if nothing:
        does = "does" if len(nothing) == 1 else "do"
        blocks.append(Text(f"{', '.join(nothing)} {does} nothing here: without it, no prediction is another one."))
    if found.steps:
        blocks += [_shares(found, called), _places(found, called, pictures[0])]
    notes = [*([note] if note else []), *found.problems]
    if notes:
        blocks.append(Text("\n".join(f"- {line}" for line in notes), "Notes", most=2))
    return as_image(sheet(blocks, "What did each LoRA do?", about, theme))


def _shares(found: Found, called: Sequence[str]) -> Block:
    means = [sum(each) / len(each) for each in found.shares]
    parts = [sum(each) / len(each) for each in found.parts]
    bars = [Bar(name, share, f"{100 * share:.1f} %  ({100 * part:.0f} % of what all do)") for name, share, part in
            zip(called, means, parts, strict=True)]
    places = [((k + 0.5) / len(found.steps), str(step + 1)) for k, step in enumerate(found.steps)]
    lines = [Series(name, [100 * share for share in each]) for name, each in zip(called, found.shares, strict=True)]
    return Beside((Bars("Share of the prediction that is its own", bars),
                   Lines("The same over the run, in %", lines, across=("step", places))))


def _places(found: Found, called: Sequence[str], under: Tensor) -> Block:
    """The maps over the picture with all LoRAs; in one scale, so that they can be compared."""
    top = float(found.maps.max()) or 1.0
    height, width = under.shape[:2]
    scale = SIDE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    cells = [Cell(name, overlay(one.numpy() / top, size, under.numpy()),
                  [f"half of it on {100 * _half(one):.0f} % of the picture"])
             for name, one in zip(called, found.maps, strict=True)]
    return Pictures(cells, max(min(MAPS, len(cells)), 2), "Where that is", ("nothing", "most"))


def _half(one: Tensor) -> float:
    """The smallest share of a map that holds half of its sum; 0.5 where it is even."""
    values = one.double().flatten().sort(descending=True).values
    return float((values.cumsum(0) < values.sum() / 2).sum() + 1) / len(values)


def _picture(one: Tensor) -> Image.Image:
    return Image.fromarray((one.numpy() * 255).round().astype(np.uint8))


def _rough(latent: Tensor, model) -> Tensor:
    """[1, C, (frames,) height, width] -> [frames or 1, 8 height, 8 width, 3], less enlarged where that is longer than
    LONGEST; of sound [1, C, length] a row for each channel."""
    shape = model.model.latent_format
    x = latent.float().cpu()
    x = x[0].transpose(0, 1) if x.ndim == 5 else x
    x = x if x.ndim == 4 else x.reshape(1, 1, -1, x.shape[-1])
    channels, known = x.shape[1], getattr(shape, "latent_rgb_factors", None) or ()
    factors = torch.as_tensor(known if len(known) == channels else [[1 / channels] * 3] * channels)
    bias = torch.as_tensor(getattr(shape, "latent_rgb_factors_bias", None) or [0.0] * 3)
    colours = ((x.movedim(1, -1) @ factors.float() + bias.float() + 1) / 2).clamp(0, 1)
    times = min(max(LONGEST // max(x.shape[-2:]), 1), 8)
    return colours.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
