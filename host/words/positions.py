"""From the tokens of a text encoder to positions in the conditioning.

The host's own code of the text encoder runs once more, with nothing behind it: in the place of each transformer stands
one that hands on, for every token, a number that says which token it is. What the code cuts off, joins, stacks and
pads can then be read in the result. No family is known here, but for two tables of exceptions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
from numbers import Integral
from typing import Any

import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor, nn

from ...methods.counted import counted
from .spelling import Place

LEFT_CUT = {"LTXAVTEModel"}  # projects all layers into one tensor; of its tokens the padding on the left is cut off
NUMBERS = {"t5xxl_ids": "t5xxl", "text_input_ids": "hidream_o1"}  # tensors of token numbers: tensor -> its encoder

Sections = Sequence[Sequence[tuple]]
Positions = dict[Place, tuple[int, ...]]
Read = dict[str | None, tuple[int, Positions]]
"""{tensor: (how many tokens it holds, the positions of each token of one encoder)}; None is the conditioning, further
tensors go by their key in its dict."""


class Unknown(Exception):
    """Positions cannot be known; the message is a sentence for the user."""


class _Numbered(int):
    """The number of a token that carries its tag, from 1, through the host's code."""

    tag: int = 0


class _Tags:
    """Stands for the table of embeddings: gives each token its tag in every channel."""

    def __init__(self, width: int):
        self.width = width
        self.weight = torch.empty(0)
        self.sections: list[tuple[list[int], list[int]]] = []

    def __call__(self, numbers: Tensor, **_: Any) -> Tensor:
        tags = [0] * numbers.shape[-1]
        if self.sections and self.sections[0][0] == numbers[0].tolist():
            tags = self.sections.pop(0)[1]
        return torch.tensor([tags], dtype=torch.float32)[..., None].expand(-1, -1, self.width)


class _Echo(nn.Module):
    """Stands for a transformer: its hidden states are what went in."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.num_layers = like.num_layers
        self.tags = _Tags(like.get_input_embeddings().weight.shape[-1])

    def get_input_embeddings(self) -> _Tags:
        return self.tags

    def forward(self, tokens: Any, *args: Any, embeds: Tensor, intermediate_output: Any = None, **kwargs: Any) -> tuple:
        layers = embeds
        if intermediate_output == "all":  # every layer is alike, and nobody looks at more than two
            layers = embeds[:, None].expand(-1, 2, -1, -1)
        elif isinstance(intermediate_output, list):
            layers = embeds[:, None].expand(-1, len(intermediate_output), -1, -1)
        return embeds, layers, embeds[:, 0]


def _echoing(model: nn.Module) -> nn.Module:
    """A copy of a text encoder without its transformers. Nothing of the original changes."""
    copied = copy.copy(model)
    copied.__dict__["_modules"] = dict(model._modules)
    if not isinstance(model, SDClipModel):
        for name, child in model._modules.items():
            if isinstance(child, SDClipModel):
                copied._modules[name] = _echoing(child)
        return copied
    echo = copied._modules["transformer"] = _Echo(model.transformer)
    copied.execution_device = torch.device("cpu")

    def encode(pairs: Sections) -> Any:
        echo.tags.sections = [([int(entry[0]) for entry in section if isinstance(entry[0], Integral)],
                               [getattr(entry[0], "tag", 0) for entry in section if isinstance(entry[0], Integral)])
                              for section in pairs]
        return type(model).encode_token_weights(copied, pairs)

    copied.encode_token_weights = encode
    return copied


def positions(model: nn.Module, tokens: Any, key: str | None, length: int) -> Read:
    """Where the tokens of one encoder are in a conditioning of this length. Raises Unknown, saying why."""
    if LEFT_CUT & {kind.__name__ for kind in type(model).__mro__}:
        return {None: (length, _left_cut((tokens if key is None else tokens[key])[0], length))}
    if not isinstance(model, SDClipModel) and not any(isinstance(child, SDClipModel) for child in model.children()):
        return _straight(tokens, key, length)
    return _echoed(model, tokens, key, length)


def _left_cut(entries: Sequence[tuple], length: int) -> Positions:
    """For tokens whose padding, numbers 0 on the left, is cut off; what follows them, if anything, is no text."""
    if not all(isinstance(entry[0], Integral) for entry in entries):
        raise Unknown("the sizes of the pictures in the prompt are not known")
    cut = len(list(takewhile(lambda entry: entry[0] == 0, entries)))
    if len(entries) - cut > length:
        raise Unknown(f"the conditioning has {counted(length, 'token')}, and the prompt {len(entries) - cut}")
    return {(0, at): (at - cut,) for at in range(cut, len(entries))}


def _straight(tokens: Any, key: str | None, length: int) -> Read:
    """For text encoders that only hand on the numbers of their tokens."""
    sections = tokens if key is None else tokens[key]
    if len(sections) != 1 or len(sections[0]) != length:
        raise Unknown("this text encoder is not built of ComfyUI's parts")
    own = {(0, at): (at,) for at in range(length)}
    return dict.fromkeys([None, *(name for name, of in NUMBERS.items() if of == key)], (length, own))


def _echoed(model: nn.Module, tokens: Any, key: str | None, length: int) -> Read:
    sizes = _Sizes(tokens)
    out = _run(model, tokens, key, sizes)
    missing = length - out[0].shape[-2]
    if missing:
        if not sizes.unknown:
            raise Unknown(f"the conditioning has {counted(length, 'token')}, and its text encoder would give "
                          f"{out[0].shape[-2]}")
        sizes.grow(missing)
        out = _run(model, tokens, key, sizes)
        if out[0].shape[-2] != length:
            raise Unknown("the sizes of the pictures in the prompt are not known")
    found = {None: (length, _read(out[0], sizes))}
    for name, value in (out[2] if len(out) > 2 else {}).items():
        if torch.is_tensor(value) and value.is_floating_point() and value.ndim > 2:
            found[name] = (value.shape[-2], _read(value, sizes))
        elif NUMBERS.get(name) == key and torch.is_tensor(value):
            size = value.shape[-1]
            found[name] = (size, {(0, at): (at,) for at in range(size)})
    return found


class _Sizes:
    """How many tokens each picture in the prompt takes: only its text encoder knows, so it is worked out."""

    def __init__(self, tokens: Any):
        named = tokens.items() if isinstance(tokens, dict) else [(None, tokens)]
        self.unknown = [(key, (section, index)) for key, sections in named if isinstance(sections, list)
                        for section, entries in enumerate(sections) for index, entry in enumerate(entries)
                        if isinstance(entry[0], dict) and entry[0].get("type") != "embedding"]
        shapes = {getattr(_at(tokens, *place)[0].get("data"), "shape", None) for place in self.unknown}
        self.alike = len(shapes) < 2
        self.of = dict.fromkeys(self.unknown, 1)
        self.places: dict[int, Place] = {}  # tag -> token

    def grow(self, missing: int) -> None:
        """Share out what is missing: evenly among pictures of one size, else wherever: only what stands before the
        first and after the last of them is read then."""
        share, rest = divmod(missing, len(self.unknown))
        if self.alike and not rest:
            self.of = dict.fromkeys(self.unknown, 1 + share)
        else:
            self.alike = False
            self.of[self.unknown[0]] = 1 + missing

    def readable(self, key: str | None, place: Place) -> bool:
        own = [at for name, at in self.unknown if name == key]
        return self.alike or not own or place < min(own) or place > max(own)


def _at(tokens: Any, key: str | None, place: Place) -> tuple:
    return (tokens if key is None else tokens[key])[place[0]][place[1]]


def _run(model: nn.Module, tokens: Any, key: str | None, sizes: _Sizes) -> Any:
    """The text encoder's code on tokens that carry tags where they are `key`'s, without weights."""
    echo = _echoing(model)
    parts = [echo] if isinstance(echo, SDClipModel) else [part for part in echo.children()
                                                          if isinstance(part, SDClipModel)]
    width = max(part.transformer.tags.width for part in parts)
    sizes.places = {}

    def tagged(name: str | None, section: int, index: int, token: Any) -> Any:
        place, tag = (section, index), 0
        if name == key and sizes.readable(name, place):
            tag = len(sizes.places) + 1
            sizes.places[tag] = place
        if isinstance(token, Integral):
            token = _Numbered(token)
            token.tag = tag
        elif torch.is_tensor(token):
            token = torch.full(token.shape, float(tag))
        elif (name, place) in sizes.of:  # a picture: as many rows as it takes, which are no token of the text
            token = {**token, "type": "embedding", "data": torch.zeros(sizes.of[name, place], width)}
        elif isinstance(token, dict):
            token = {**token, "data": torch.zeros(token["data"].shape)}
        return token

    def pairs(name: str | None, sections: Any) -> Any:
        if not isinstance(sections, list) or not all(isinstance(section, list) for section in sections):
            return sections
        return [[(tagged(name, at, index, entry[0]), 1.0) for index, entry in enumerate(section)]
                for at, section in enumerate(sections)]

    if not isinstance(tokens, dict):
        return echo.encode_token_weights(pairs(None, tokens))
    return echo.encode_token_weights({name: pairs(name, value) for name, value in tokens.items()})


def _read(tensor: Tensor, sizes: _Sizes) -> Positions:
    """{token: positions} of a tensor [..., tokens, channels] whose values are tags; 0 is no token."""
    tags = tensor.detach().movedim(-2, 0).flatten(1).amax(1).round().int().tolist()
    found: dict[Place, list[int]] = {}
    for at, tag in enumerate(tags):
        if tag in sizes.places:
            found.setdefault(sizes.places[tag], []).append(at)
    return {place: tuple(at) for place, at in found.items()}
