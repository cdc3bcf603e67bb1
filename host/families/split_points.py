"""Where a model can be cut: its outermost layers are computed in every call, what lies between may come from a cache.

A split point has two ways to run a model, both through ComfyUI's own forward:

    capture(options, caught)                    transformer options for a whole call that puts its deep features into
                                                `caught`, by name, [entries, ...]
    reuse(features, control, options)           context: (control, transformer options) for a call that computes the
                                                outer layers alone and takes the rest from `features`

A U-Net has a third way, for a batch of which some conds run whole and others reuse (`UNetSplit.mix`).

What other nodes put between blocks keeps its place: patches and replaced blocks are called as before where the block
runs, and are part of the cached features where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import SpatialVideoTransformer, UNetModel, VideoResBlock
from torch import Tensor, nn

from ...methods.counted import counted
from .lasting import lasting

Options = dict
Caught = dict
"""name -> Tensor"""


class SplitPoint(Protocol):
    """Also: `deep`, the modules whose forward is not called on reuse, none within another."""

    @property
    def deep(self) -> list[nn.Module]: ...

    def capture(self, options: Options, caught: Caught) -> Options: ...

    def reuse(self, features: Mapping, control: dict | None, options: Options): ...

    def complete(self, caught: Mapping) -> bool:
        """Whether a call caught all that `reuse` needs."""
        ...


def split_point_of(root: nn.Module, depth: int) -> SplitPoint | str:
    """The split point of a diffusion model with `depth` blocks computed at either end, or why there is none."""
    if isinstance(root, UNetModel):
        count = len(root.output_blocks)
        return UNetSplit(root, depth) if depth < count else _shallow(count, depth)
    blocks = [(kind, i, block) for name, kind in BLOCK_LISTS for i, block in enumerate(_blocks(root, name))]
    if not blocks:
        return "this model family offers no place to cut it"
    if any(getattr(block, "to_local_embed", None) is not None for *_, block in blocks):
        return "blocks of Stable Audio 3 lose a part of their input where they are replaced"
    deep = blocks[depth:-depth]
    if not deep:
        return _shallow(len(blocks) // 2, depth)
    kinds = dict.fromkeys(kind for kind, *_ in deep)
    members = {kind: [i for other, i, _ in deep if other == kind] for kind in kinds}
    return BlockSplit(tuple(BlockRange(kind, ids[0], ids[-1] + 1) for kind, ids in members.items()),
                      [block for *_, block in deep])


def _shallow(blocks: int, depth: int) -> str:
    return f"the model has {counted(blocks, 'block')} at either end, and depth {depth} computes them all"


def _blocks(root: nn.Module, name: str) -> nn.ModuleList | tuple:
    found = reduce(lambda module, part: getattr(module, part, None), name.split("."), root)
    return found if isinstance(found, nn.ModuleList) else ()


# --- U-Nets ---


@dataclass(frozen=True)
class UNetSplit:
    """Stable Diffusion 1, 2, XL and their relatives, cut as DeepCache does (arXiv 2312.00858): the first `depth` input
    blocks and the last `depth` output blocks are computed; the input of the first of those output blocks is cached.

    On reuse the layers between answer with tensors that have no channels, so that the host's own forward runs through
    all its blocks, indexes and skip connections, and nothing in them costs anything.
    """

    root: UNetModel
    depth: int

    @property
    def cut(self) -> int:
        """Index of the output block whose input is cached."""
        return len(self.root.output_blocks) - self.depth

    def complete(self, caught: Mapping) -> bool:
        return "h" in caught

    def capture(self, options: Options, caught: Caught) -> Options:
        patches = _patches(options, "output_block_patch")

        def grab(h: Tensor, skip: Tensor, now: Options) -> tuple[Tensor, Tensor]:
            if now["block"][1] == self.cut:
                caught["h"] = h.clone() if patches else h  # patches such as FreeU's write into h
            return h, skip

        return _with_patches(options, output_block_patch=[grab, *patches])

    @contextmanager
    def reuse(self, features: Mapping, control: dict | None, options: Options) -> Iterator[tuple]:
        patches = _patches(options, "output_block_patch")

        def recall(h: Tensor, skip: Tensor, now: Options) -> tuple[Tensor, Tensor]:
            index = now["block"][1]
            if index < self.cut:
                return h, skip
            h = features["h"] if index == self.cut else h
            for patch in patches:
                h, skip = patch(h, skip, now)
            return h, skip

        inputs = {name: [self._outer(patch) for patch in _patches(options, name)]
                  for name in ("input_block_patch", "input_block_patch_after_skip")}
        options = _with_patches(options, output_block_patch=[recall], middle_block_after_patch=[], **inputs)
        with _other_forwards(self.deep, lambda layer: _no_channels):
            yield self._outer_control(control), options

    @property
    def mixes(self) -> bool:
        """Whether the rows of a batch may part ways in the deep layers. Frames of a video look at each other there."""
        return not any(isinstance(layer, (VideoResBlock, SpatialVideoTransformer)) for layer in self.deep)

    @contextmanager
    def mix(self, features: Sequence[Mapping | None], rows: int, options: Options, caught: Caught,
            among: Callable[[Sequence[int]], AbstractContextManager]) -> Iterator[Options]:
        """Transformer options for a call in which the outer layers are computed for all conds at once, and the deep
        ones for those without features, whose own go into `caught`. Nobody else may look at rows or blocks meanwhile.

        features   per cond of the batch what it reuses, or None
        rows       of a cond
        among      the numbers of the conds that go on -> a context for the deep layers
        """
        total, whole = rows * len(features), [k for k, kept in enumerate(features) if kept is None]
        stretches: list[list[int]] = []
        for k in whole:
            if stretches and stretches[-1][1] == k * rows:
                stretches[-1][1] += rows
            else:
                stretches.append([k * rows, (k + 1) * rows])
        taken: dict[int, tuple[Tensor, Tensor]] = {}  # what all layers get alike, held so that no other has its name

        def some(value):
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != total:
                return value
            parts = [value[start:stop] for start, stop in stretches]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        def known(value):
            if id(value) not in taken:
                taken[id(value)] = value, some(value)
            return taken[id(value)][1]

        with ExitStack() as inside:
            def narrowed(layer: nn.Module) -> Callable:
                before = layer.forward

                def forward(x: Tensor, *args, **kwargs) -> Tensor:
                    if x.shape[0] == total:  # the first of them
                        inside.enter_context(among(whole))
                        x = some(x)
                    return before(x, *map(known, args), **kwargs)

                return forward

            def join(h: Tensor, skip: Tensor, now: Options) -> tuple[Tensor, Tensor]:
                if now["block"][1] != self.cut:
                    return h, skip
                inside.close()
                caught["h"], own = h, iter(h.split(rows))
                return torch.cat([next(own) if kept is None else kept["h"] for kept in features]), skip

            with _other_forwards(self.deep, narrowed):
                yield _with_patches(options, output_block_patch=[join])

    def _outer(self, patch: Callable) -> Callable:
        return lambda h, now: patch(h, now) if now["block"][1] < self.depth else h

    def _outer_control(self, control: dict | None) -> dict | None:
        """The residuals of the outer blocks. Block i takes the i-th from the end of the list that is its own."""
        if control is None:
            return None
        count = len(self.root.output_blocks)
        outer = {"input": range(self.depth), "middle": (), "output": range(self.cut, count)}
        return {name: [value if len(values) - 1 - i in outer[name] else None for i, value in enumerate(values)]
                if name in outer else values for name, values in control.items()}

    @property
    def deep(self) -> list[nn.Module]:
        blocks = [*self.root.input_blocks[self.depth:], self.root.middle_block, *self.root.output_blocks[:self.cut]]
        return [layer for block in blocks if block is not None for layer in block]


@contextmanager
def _other_forwards(layers: Sequence[nn.Module], make: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """While open, layers have the forward that is made for each."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = make(layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _no_channels(x: Tensor, *args, **kwargs) -> Tensor:
    return x[:, :0]


def _patches(options: Options, name: str) -> list[Callable]:
    return options.get("patches", {}).get(name, [])


def _with_patches(options: Options, **patches: list[Callable]) -> Options:
    return {**options, "patches": {**options.get("patches", {}), **patches}}


# --- transformers ---

BLOCK_LISTS = (
    ("double_blocks", "double_block"),  # Flux, Chroma, HunyuanVideo, Hunyuan3D, JoyImage
    ("single_blocks", "single_block"),
    ("double_layers", "double_block"),  # AuraFlow
    ("single_layers", "single_block"),
    ("joint_blocks", "double_block"),  # SD3
    ("transformer_blocks", "double_block"),  # Qwen-Image, LTX-Video, Lens
    ("blocks", "double_block"),  # Wan, Mochi, HunyuanDiT
    ("transformer.layers", "double_block"),  # Stable Audio
)
"""Names of block lists, in the order that models run them, and the kind by which ComfyUI lets nodes replace them. Some
families have such a list and cannot be patched there; the first call tells (`complete`). Of ComfyUI 0.28.0's families
that name a place for replaced blocks these are missing: Kandinsky 5 (what it offers cannot be called), HiDream-O1
(replaced blocks switch off a cache of its own), Hunyuan3D 2.1 (skip connections run between its blocks) and SeedVR2
(made for one step)."""

STREAMS = ("img", "txt")
"""What flows from block to block, in the words of the block-replace patches; a pair where a model has picture and
sound."""


@dataclass(frozen=True)
class BlockRange:
    """The blocks [start, stop) of one kind."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class BlockSplit:
    """Transformers whose blocks can be replaced: the first and the last `depth` blocks are computed, and the sum of
    what the blocks between add to each stream is cached.

    The sum is taken block by block, so what the model adds between blocks (ControlNet residuals, VACE) is no part of
    it and is added anew on reuse. It is kept in fp32 while it grows.
    """

    spans: tuple[BlockRange, ...]
    deep: list[nn.Module] = field(default_factory=list, compare=False)

    def complete(self, caught: Mapping) -> bool:
        return {kind for kind, *_ in caught} == {span.kind for span in self.spans}

    def capture(self, options: Options, caught: Caught) -> Options:
        sums: dict[str, dict] = {span.kind: {} for span in self.spans}

        def summing(span: BlockRange, i: int, before: Callable | None) -> Callable:
            def block(args: dict, extra: dict) -> dict:
                total = sums[span.kind]
                for name, tensor in _streams(args):
                    if i == span.start:
                        with lasting():
                            total[name] = -tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                    elif name in total:
                        total[name].sub_(tensor)
                out = extra["original_block"](args) if before is None else before(args, extra)
                streams = {name: tensor for name, tensor in _streams(out)
                           if name in total and total[name].shape == tensor.shape}
                sums[span.kind] = {name: total[name].add_(tensor) for name, tensor in streams.items()}
                if i == span.stop - 1:
                    with lasting():
                        caught.update({(span.kind, *name): sums[span.kind][name].to(tensor.dtype)
                                       for name, tensor in streams.items()})
                return out

            return block

        return self._replace(options, summing)

    @contextmanager
    def reuse(self, features: Mapping, control: dict | None, options: Options) -> Iterator[tuple]:
        def skipping(span: BlockRange, i: int, before: Callable | None) -> Callable:
            def add(name: str, k: int, tensor):
                cached = features.get((span.kind, name, k)) if i == span.start else None
                return tensor if cached is None else tensor + cached

            def block(args: dict, extra: dict) -> dict:
                return {name: tuple(add(name, k, part) for k, part in enumerate(args[name]))
                        if isinstance(args[name], tuple) else add(name, 0, args[name])
                        for name in STREAMS if name in args}

            return block

        yield control, self._replace(options, skipping)

    def _replace(self, options: Options, make: Callable) -> Options:
        replace = options.get("patches_replace", {})
        blocks = dict(replace.get("dit", {}))
        for span in self.spans:
            for i in range(span.start, span.stop):
                blocks[span.kind, i] = make(span, i, blocks.get((span.kind, i)))
        return {**options, "patches_replace": {**replace, "dit": blocks}}


def _streams(state: dict) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for name in STREAMS:
        value = state.get(name)
        for k, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, Tensor):
                yield (name, k), part
