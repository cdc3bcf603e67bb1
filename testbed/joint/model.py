"""The second body's model: a transformer with joint attention, Flux's architecture and names at a small size.

Text and picture go through blocks with layers of their own and one attention over both ("double"), then through blocks
that see them as one row of tokens ("single"), text first. The time of the flow and the mean of the text modulate every
block. Places are told by rotating queries and keys; tokens of the text all stand at the origin, so that what the
picture attends to in the text depends on the place. `CONFIG` is what ComfyUI's class Flux takes to load these weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT = (12, 16, 24)
CONFIG = dict(in_channels=12, out_channels=12, vec_in_dim=96, context_in_dim=96, hidden_size=128, mlp_ratio=4.0,
              num_heads=4, depth=2, depth_single_blocks=3, axes_dim=[4, 14, 14], theta=30, patch_size=2, qkv_bias=True,
              guidance_embed=False, txt_ids_dims=[])

Observer = Callable[[str, Tensor, Tensor], None]
"""(block, queries, keys), both [n, heads, text + picture tokens, width of a head] and rotated: what attention sees."""


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, observer: Observer | None, block: str) -> Tensor:
    """Attention of all tokens to all, [n, heads, tokens, d] -> [n, tokens, heads * d]."""
    q, k = rotate(q, pe), rotate(k, pe)
    if observer is not None:
        observer(block, q, k)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Each pair of channels turned by its token's angle; pe [2, tokens, d / 2]: cosines and sines."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = pe
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x)


def angles(height: int, width: int, text: int, axes: Sequence[int], theta: float) -> Tensor:
    """[2, text + height * width, sum(axes) / 2]: text at the origin, places by row and column; the first axis tells
    pictures apart, of which there is one."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
    places = torch.cat((places.new_zeros(text, 3), places)).double()
    turns = [places[:, i, None] * theta ** -(torch.arange(0, dim, 2).double() / dim) for i, dim in enumerate(axes)]
    turns = torch.cat(turns, dim=1)
    return torch.stack((turns.cos(), turns.sin())).float()


def times(t: Tensor, width: int = 256) -> Tensor:
    """[n] -> [n, width], slow and fast waves of the time in thousandths."""
    half = width // 2
    waves = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    return torch.cat((waves.cos(), waves.sin()), dim=-1)


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x without its mean and spread, with those that the modulation wants."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class _InHalves(torch.autograd.Function):
    """A linear layer whose three products are made in bfloat16, of numbers that are kept in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias.bfloat16()).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        half = grad.bfloat16()
        rows = half.flatten(0, -2)
        return (half @ weight).float(), (rows.T @ x.flatten(0, -2)).float(), rows.float().sum(0)


class Linear(nn.Linear):
    """In training, on the many tokens of a block, a sixth faster than the plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return _InHalves.apply(x, self.weight, self.bias) if self.training else super().forward(x)


class Embedder(nn.Module):
    def __init__(self, inner: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(inner, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shift, scale and gate from the time and the text, once or twice."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count, self.lin = 3 * count, nn.Linear(width, 3 * count * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)


class Norms(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)


def heads_of(qkv: Tensor, heads: int, norms: Norms) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norms.query_norm(q).to(v), norms.key_norm(k).to(v), v


class Projections(nn.Module):
    """One stream's layers of the joint attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.norm = Norms(width // heads)


class DoubleBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.heads = heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(width, 2))
            setattr(self, f"{stream}_attn", Projections(width, heads))
            setattr(self, f"{stream}_mlp", nn.Sequential(Linear(width, int(ratio * width)), nn.GELU("tanh"),
                                                         Linear(int(ratio * width), width)))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, observer: Observer | None,
                name: str) -> tuple[Tensor, Tensor]:
        streams = {"txt": txt, "img": img}
        mods = {s: getattr(self, f"{s}_mod")(vec) for s in streams}
        parts = []
        for s, x in streams.items():
            layers = getattr(self, f"{s}_attn")
            parts.append(heads_of(layers.qkv(shifted(x, *mods[s][:2])), self.heads, layers.norm))
        out = attend(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)), pe, observer, name)
        for s, attended in zip(streams, out.split((txt.shape[1], img.shape[1]), dim=1), strict=True):
            x = streams[s] + mods[s][2] * getattr(self, f"{s}_attn").proj(attended)
            streams[s] = x + mods[s][5] * getattr(self, f"{s}_mlp")(shifted(x, *mods[s][3:5]))
        return streams["img"], streams["txt"]


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, on text and picture as one."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.heads, self.width = heads, width
        self.hidden = hidden = int(ratio * width)
        self.linear1, self.linear2 = Linear(width, 3 * width + hidden), Linear(width + hidden, width)
        self.norm, self.modulation = Norms(width // heads), Modulation(width, 1)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, observer: Observer | None, name: str) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = self.linear1(shifted(x, shift, scale)).split((3 * self.width, self.hidden), dim=-1)
        attended = attend(*heads_of(qkv, self.heads, self.norm), pe, observer, name)
        return x + gate * self.linear2(torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1))


class Last(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(shifted(x, *self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)))


class Flux(nn.Module):
    """forward(x [n, 12, h, w], timestep [n], context [n, tokens, 96], y [n, 96]) -> velocity like x.

    `timestep` is sigma itself, in [0, 1], `y` the mean of the text. h and w are even. `observer` is shown the queries
    and keys of every block, which are named as modules are. Further arguments that a host passes are ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        c = CONFIG
        width, heads, self.patch = c["hidden_size"], c["num_heads"], c["patch_size"]
        inner = c["in_channels"] * self.patch**2
        self.img_in, self.txt_in = nn.Linear(inner, width), nn.Linear(c["context_in_dim"], width)
        self.time_in, self.vector_in = Embedder(256, width), Embedder(c["vec_in_dim"], width)
        self.double_blocks = nn.ModuleList([DoubleBlock(width, heads, c["mlp_ratio"]) for _ in range(c["depth"])])
        self.single_blocks = nn.ModuleList([SingleBlock(width, heads, c["mlp_ratio"])
                                            for _ in range(c["depth_single_blocks"])])
        self.final_layer = Last(width, inner)
        self._angles: dict[tuple[int, int, int], Tensor] = {}

    def pe(self, height: int, width: int, text: int, device: torch.device) -> Tensor:
        key = (height, width, text)
        if key not in self._angles:
            self._angles[key] = angles(height, width, text, CONFIG["axes_dim"], CONFIG["theta"])
        return self._angles[key].to(device)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, observer: Observer | None = None,
                **_: object) -> Tensor:
        height, width = (size // self.patch for size in x.shape[2:])
        # A token holds its patch channel by channel: what unshuffling pixels does too.
        img = self.img_in(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2))
        txt = self.txt_in(context.to(x.dtype))
        vec = self.time_in(times(timestep).to(x.dtype)) + self.vector_in(y.to(x.dtype))
        pe = self.pe(height, width, txt.shape[1], x.device)
        for i, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, vec, pe, observer, f"double_blocks.{i}")
        joint = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            joint = block(joint, vec, pe, observer, f"single_blocks.{i}")
        out = self.final_layer(joint[:, txt.shape[1]:], vec)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), self.patch)


def start(model: Flux) -> Flux:
    """Every block begins as one that changes nothing, and the output as nothing: what lets such a model learn fast."""
    for name, parameter in model.named_parameters():
        if ".lin." in name or name.startswith("final_layer."):
            nn.init.zeros_(parameter)
    return model
