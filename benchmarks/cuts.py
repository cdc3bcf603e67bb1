"""Where the testbed's two bodies are cut, as ComfyUI's models of their kind are (host/families/split_points.py): the
outer layers run in every step, what the deep ones give may come from an earlier one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Protocol

from torch import Tensor, nn

from ..testbed.body import Body
from ..testbed.joint.model import Flux

Caught = Mapping[str, Tensor]
"""Deep features of one call of the net, by name, [rows, ...]."""


class Cut(Protocol):
    def catch(self, found: list[Caught]):
        """Context: calls run whole, and each adds its deep features to `found`."""

    def recall(self, features: Iterator[Caught]):
        """Context: each call computes the outer layers alone and takes the next of `features`."""


def cut_of(base: Body, depth: int = 1) -> Cut:
    """The cut of a body, of the transformer with `depth` blocks computed at either end.

    Raises ValueError where that leaves nothing between them; the U-Net has one place alone.
    """
    if isinstance(base.net, Flux):
        return BlockCut(base.net, depth)
    if depth != 1:
        raise ValueError(f"the U-Net has two levels, so its depth is 1, not {depth}")
    return LevelCut(base.net)


class LevelCut:
    """The U-Net's inner level, with all attention, may come from a cache: what leaves it is one map."""

    inner = ("downsample", "down_res2", "down_attn", "mid_res", "mid_attn", "up_res2", "up_attn")

    def __init__(self, net: nn.Module):
        self.net = net

    @contextmanager
    def catch(self, found: list[Caught]) -> Iterator[None]:
        handle = self.net.upsample.register_forward_hook(lambda _, __, out: found.append({"h": out}))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def recall(self, features: Iterator[Caught]) -> Iterator[None]:
        first, *rest = (getattr(self.net, name) for name in self.inner)
        with ExitStack() as stack:
            # What is added to the first needs the right places; without channels nothing costs anything.
            stack.enter_context(_instead(first, lambda x: x[:, :1, ::2, ::2]))
            for layer in rest:
                stack.enter_context(_instead(layer, lambda x, *_: x[:, :0]))
            stack.enter_context(_instead(self.net.upsample, lambda x: next(features)["h"]))
            yield


class BlockCut:
    """The transformer's blocks but the first and the last `depth` may come from a cache: what those of a kind add to
    the streams that flow through them."""

    def __init__(self, net: Flux, depth: int):
        blocks = [*(("double", block) for block in net.double_blocks), *(("single", b) for b in net.single_blocks)]
        deep = blocks[depth:-depth] if depth > 0 else []
        if not deep:
            raise ValueError(f"depth {depth} leaves nothing of {len(blocks)} blocks")
        self.kinds = {kind: [block for _, block in own] for kind, own in groupby(deep, key=lambda each: each[0])}

    @contextmanager
    def catch(self, found: list[Caught]) -> Iterator[None]:
        entered: dict[str, tuple[Tensor, ...]] = {}
        first = next(iter(self.kinds))

        def enter(kind: str, arguments: tuple) -> None:
            entered[kind] = arguments[:2] if kind == "double" else arguments[:1]
            if kind == first:
                found.append({})

        def leave(kind: str, out: Tensor | tuple[Tensor, ...]) -> None:
            out = out if isinstance(out, tuple) else (out,)
            found[-1].update({f"{kind} {k}": b - a for k, (a, b) in enumerate(zip(entered[kind], out, strict=True))})

        handles = []
        for kind, own in self.kinds.items():
            handles += [own[0].register_forward_pre_hook(lambda _, arguments, kind=kind: enter(kind, arguments)),
                        own[-1].register_forward_hook(lambda _, __, out, kind=kind: leave(kind, out))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recall(self, features: Iterator[Caught]) -> Iterator[None]:
        now: list[Caught] = []
        first = next(iter(self.kinds))

        def double(added: bool):
            def block(img: Tensor, txt: Tensor, *_: object) -> tuple[Tensor, Tensor]:
                if not added:
                    return img, txt
                take("double")
                return img + now[0]["double 0"], txt + now[0]["double 1"]

            return block

        def single(added: bool):
            def block(x: Tensor, *_: object) -> Tensor:
                if not added:
                    return x
                take("single")
                return x + now[0]["single 0"]

            return block

        def take(kind: str) -> None:
            if kind == first:
                now[:] = [next(features)]

        with ExitStack() as stack:
            for kind, own in self.kinds.items():
                for block in own:
                    stack.enter_context(_instead(block, (double if kind == "double" else single)(block is own[0])))
            yield


@contextmanager
def _instead(layer: nn.Module, forward) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
