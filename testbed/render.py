"""Draws scenes by signed distances with one-pixel soft edges; everything random is in the scene's jitter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .scene import ATTRIBUTES, Scenes

SIZE = 32
# hue, saturation, value of each of scene.COLOURS; white and black have no hue
_HSV = ((0.0, 0.85, 0.92), (0.145, 0.85, 0.97), (0.36, 0.8, 0.68), (0.5, 0.75, 0.9), (0.64, 0.8, 0.88),
        (0.88, 0.5, 0.98), (0.0, 0.0, 0.97), (0.0, 0.0, 0.1))


def _colour(index: Tensor, jitter: Tensor) -> Tensor:
    """[n] colour indices, [n, 2] jitter -> [n, 3, 1, 1] RGB."""
    h, s, v = torch.tensor(_HSV)[index].unbind(1)
    h, v = h + 0.015 * jitter[:, 0], (v + 0.04 * jitter[:, 1]).clamp(0, 1)
    channel = [(h + offset) % 1.0 for offset in (0.0, 2 / 3, 1 / 3)]
    rgb = [v * (1 - s + s * ((c * 6 - 3).abs() - 1).clamp(0, 1)) for c in channel]
    return torch.stack(rgb, 1)[:, :, None, None]


def _over(image: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return image + (colour - image) * alpha[:, None]


def _ellipse(x: Tensor, y: Tensor, rx: float, ry: float) -> Tensor:
    """An approximate distance in pixels, negative inside."""
    return (((x / rx) ** 2 + (y / ry) ** 2).sqrt() - 1) * min(rx, ry)


def _box(x: Tensor, y: Tensor, rx: float, ry: float) -> Tensor:
    return torch.maximum(x.abs() - rx, y.abs() - ry)


def _cover(distance: Tensor) -> Tensor:
    return (0.5 - distance).clamp(0, 1)


def _pick(choice: Tensor, options: list[Tensor]) -> Tensor:
    """[n] choices among a list of [n, height, width] maps."""
    maps = torch.stack(torch.broadcast_tensors(*options), 1).expand(len(choice), -1, -1, -1)
    return maps[torch.arange(len(choice)), choice]


def _paint(image: Tensor, shape: Tensor, colour: Tensor, mark: Tensor, mark_colour: Tensor) -> Tensor:
    """A shape with a dark rim, and its mark inside it."""
    image = _over(image, colour * 0.25, _cover(shape - 0.8))
    image = _over(image, colour, _cover(shape))
    return _over(image, mark_colour, _cover(torch.maximum(mark, shape + 0.3)))


def background(v: dict[str, Tensor], j: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x, y: pixels from the middle of the picture."""
    first, second = _colour(v["background.colour"], j[:, 0:2]), _colour(v["background.mark_colour"], j[:, 2:4])
    angle = (v["background.mark"] * (np.pi / 4) + 0.03 * j[:, 4])[:, None, None]
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    shift = 0.6 * j[:, 5, None, None]
    # a quarter turn means nothing to checks and dots: there the third and fourth marks are a coarser grid
    grids = v["background.kind"] % 3 > 0
    period = (8.5 + 2.0 * grids + 5.0 * grids * (v["background.mark"] >= 2) + 0.1 * j[:, 6])[:, None, None]
    u, w = (along + shift) * (2 * np.pi / period), (across + shift) * (2 * np.pi / period)
    grid = torch.minimum
    maps = [torch.sin(w) - 0.15, torch.sin(u) * torch.sin(w) * 1.5, grid(torch.sin(u), torch.sin(w)) * 1.3 - 0.1,
            torch.sin(w + 1.5 * torch.sin(u * 0.7)) - 0.15]
    alpha = (0.5 + 1.2 * _pick(v["background.kind"], maps)).clamp(0, 1)
    return _over(first.expand(len(j), 3, *alpha.shape[1:]), second, 0.75 * alpha)


def character(image: Tensor, v: dict[str, Tensor], j: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x, y: pixels from the middle of the head."""
    colour, mark_colour = _colour(v["character.colour"], j[:, 0:2]), _colour(v["character.mark_colour"], j[:, 2:4])
    ax = x.abs()
    triangle = torch.maximum(ax - 3.6 - 0.45 * (y + 9.5), torch.maximum(y, torch.maximum(0.9 - ax, -y - 9.8)))
    ears = [triangle, _ellipse(ax - 4.6, y + 4.6, 2.7, 2.7), _ellipse(ax - 3.1, y + 7.6, 1.7, 4.2),
            torch.minimum(_box(x, y + 7, 0.8, 3), _ellipse(x, y + 9.2, 2.0, 2.0))]
    head = torch.minimum(_ellipse(x, y, 6.2, 5.8), _pick(v["character.kind"], ears))
    body = _ellipse(x, y - 11.5, 4.6, 6.5)
    marks = [_box(x, y - 0.1, 9, 1.9), y + 2.2, _ellipse(x, y - 3.6, 4.2, 2.6), x,
             _ellipse(ax - 4.0, y - 1.6, 2.1, 2.1)]
    mark = torch.maximum(_pick(v["character.mark"], marks), _ellipse(x, y, 6.2, 5.8))
    image = _paint(image, body, colour, body + 99, mark_colour)
    image = _paint(image, head, colour, mark, mark_colour)
    eyes = _ellipse(ax - 2.4, y + 0.2, 1.25, 1.25)
    image = _over(image, torch.full((1, 3, 1, 1), 0.97), _cover(eyes - 0.6))
    return _over(image, torch.full((1, 3, 1, 1), 0.05), _cover(eyes + 0.2))


def clothing(image: Tensor, v: dict[str, Tensor], j: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x, y: pixels from the middle of the body."""
    colour, mark_colour = _colour(v["clothing.colour"], j[:, 0:2]), _colour(v["clothing.mark_colour"], j[:, 2:4])
    ax = x.abs()
    shapes = [torch.maximum(ax - 5.0 - 0.3 * y, (y - 0.8).abs() - 6.0), _box(x, y - 0.3, 4.8, 5.5),
              torch.maximum((ax - 4.0 - 0.75 * (y + 4.5)) * 0.8, (y + 0.5).abs() - 5.0)]
    marks = [torch.minimum((y + 2.2).abs() - 1.1, (y - 2.4).abs() - 1.1), ax - 1.5, 2.6 - y,
             ((x - y) * 0.7071).abs() - 1.5, y + 2.2]
    return _paint(image, _pick(v["clothing.kind"], shapes), colour, _pick(v["clothing.mark"], marks), mark_colour)


def thing(image: Tensor, v: dict[str, Tensor], j: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x, y: pixels from the middle of the object."""
    colour, mark_colour = _colour(v["object.colour"], j[:, 0:2]), _colour(v["object.mark_colour"], j[:, 2:4])
    ax = x.abs()
    shapes = [_ellipse(x, y, 4.8, 4.8), _box(x, y, 4.3, 4.3), torch.maximum((ax - 0.55 * (y + 5.2)) * 0.85, y - 4.6),
              (ax + y.abs() - 5.8) * 0.7071]
    shape = _pick(v["object.kind"], shapes)
    plus = torch.minimum(_box(x, y, 1.1, 9), _box(x, y, 9, 1.1))
    marks = [plus, _ellipse(x, y - 0.6, 2.2, 2.2), y + 0.3, _box(x - 2.3, y, 1.3, 9), -shape - 1.9]
    return _paint(image, shape, colour, _pick(v["object.mark"], marks), mark_colour)


def style(image: Tensor, v: dict[str, Tensor], j: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x, y: pixels from the upper left corner, of the whole picture."""
    colour, mark = _colour(v["style.mark_colour"], j[:, 0:2]), v["style.mark"]
    angle = (mark * (np.pi / 4) + 0.03 * j[:, 2])[:, None, None]
    phase = (y * angle.cos() - x * angle.sin()) * (2 * np.pi / 8) + 0.5 * j[:, 3, None, None]
    lined = 0.6 * ((torch.sin(phase) - 0.35) * 2.5).clamp(0, 1)
    right, bottom = x.max() - x, y.max() - y
    edges = _pick(mark, [y, right, bottom, x])
    glowing = 0.95 * torch.exp(-edges / (5.0 + 0.5 * j[:, 4, None, None]))
    upright, level = torch.minimum(x, right), torch.minimum(y, bottom)
    frames = [torch.minimum(upright, level), level, upright, torch.maximum(upright, level) - 4.0]
    framed = _cover(_pick(mark, frames) - 2.2 - 0.3 * j[:, 4, None, None])
    return _over(image, colour, _pick(v["style.kind"], [torch.zeros_like(lined), lined, glowing, framed]))


def pixels(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x, y of every pixel, [1, height, width] each."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return x[None].float(), y[None].float()


def places(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixel positions [n, 1, 1]: head x, head y, object x, object y. The object stands on the other side."""
    j = torch.as_tensor(scenes.jitter, dtype=torch.float32)[:, -4:, None, None]
    left = torch.as_tensor(scenes.values["side"] == 0)[:, None, None]
    head_x = torch.where(left, 10.5, 20.5) + 0.9 * j[:, 0]
    object_x = torch.where(left, 25.0, 6.0) + 0.7 * j[:, 1]
    return head_x, 12.0 + 0.7 * j[:, 2], object_x, 23.0 + 0.8 * j[:, 3]


def render(scenes: Scenes, chunk: int = 256) -> Tensor:
    """float32 [n, 3, 32, 32] in [0, 1]."""
    if len(scenes) > chunk:
        parts = [render(scenes.take(slice(i, i + chunk))) for i in range(0, len(scenes), chunk)]
        return torch.cat(parts)
    v = {a: torch.as_tensor(scenes.values[a]) for a in ATTRIBUTES}
    j = torch.as_tensor(scenes.jitter, dtype=torch.float32)
    x, y = pixels(SIZE, SIZE)
    head_x, head_y, object_x, object_y = places(scenes)
    image = background(v, j[:, 0:7], x - 15.5, y - 15.5)
    image = character(image, v, j[:, 7:11], x - head_x, y - head_y)
    image = clothing(image, v, j[:, 11:15], x - head_x, y - head_y - 11.5)
    image = thing(image, v, j[:, 15:19], x - object_x, y - object_y)
    return style(image, v, j[:, 19:24], x, y).clamp(0, 1)
