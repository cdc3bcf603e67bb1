"""What each LoRA of an ensemble is and would do on a model, before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from math import isfinite, sqrt

import torch
from PIL import Image
from torch import nn

from ...engine.adapters import Decomposed, Op
from ...engine.bank import Bank
from ...engine.sizes import measure
from ...methods.counted import counted
from ..compose.loading import TEXT_ENCODER, LoadedEnsemble, LoadedLoRA, left_out, load_ensemble, otherwise
from ..compose.read_weight import read_weight
from ..files.ensemble import Ensemble, LoRASpec
from ..files.files import known, read
from ..files.header_alphas import passed_over
from ..files.metadata import Wording, wording
from .chart import Lines, Series
from .letters import labels
from .sheet import Block, Text, sheet
from .theme import LIGHT, Theme

KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT",
         "diff": "plain difference", "set": "replaced weight"}
"""The host's names of adapters and patches -> how they are called."""
MOST_WORDS, MOST_BLOCKS = 8, 3
NARROW = 0.09  # of the chart's width: a part of the model that is narrower has no room for its name
Tick = Callable[[], None]


@dataclass
class Info:
    """What is known of one LoRA on one model.

    number    in the ensemble, from 1
    kinds     what it is made of, most frequent first
    ranks     of its low-rank layers, smallest first, each once
    layers    of the model that it changes
    encoder   keys for the text encoder, and whether a text encoder takes them; None: none is connected
    changes   block of the model -> by how much of their size it changes the weights there, at its strength (1 for one
              that is off), as ||change|| / ||weights|| over all layers of the block that any of the LoRAs changes
    whole     the same over all blocks; None where no weight can be read
    out       why something of it is left out, a line each
    other     what it does otherwise than by ComfyUI's loader, a line each
    nothing   why it does nothing at all; empty: it does something
    """

    number: int
    spec: LoRASpec
    words: Wording = Wording()
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    layers: int = 0
    encoder: tuple[int, bool | None] = (0, None)
    changes: dict[str, float] = field(default_factory=dict)
    whole: float | None = None
    out: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    nothing: str = ""


def infos(model, clip, ensemble: Ensemble, node: str, tick: Tick = lambda: None) -> list[Info]:
    """What is known of each LoRA of an ensemble, in its order.

    node   display name of the node, which messages begin with
    tick   called after each layer that was measured; may raise to stop
    Raises ValueError for a name that is in none of the `loras` folders, unless the LoRA is off. What is wrong inside a
    file is told.
    """
    found, loras = [], {}
    for number, spec in enumerate(ensemble, 1):
        if not (spec.acts or known(spec.name)):
            found.append(Info(number, spec, nothing="is in none of the 'loras' folders."))
            continue
        info = Info(number, spec, wording(spec.name))
        found.append(info)
        try:
            alone = replace(spec, strength_model=1.0, strength_clip=float(clip is not None))
            loaded = load_ensemble(model, clip, (alone,), node, False)
        except ValueError as error:
            said = str(error).removeprefix(f"{node}: ").removeprefix(f"LoRA '{spec.name}' ")
            info.nothing = said.removesuffix(", or remove it from the ensemble.").removesuffix(".") + "."
            continue
        _read_facts(info, loaded, model.model, clip is not None)
        if loaded.loras:
            loras[number] = loaded.loras[0]
    _measure(found, loras, model, tick)
    return found


def _read_facts(info: Info, loaded: LoadedEnsemble, base: nn.Module, has_clip: bool) -> None:
    start = f"LoRA '{info.spec.name}': "
    info.out = [*filter(None, [passed_over(info.spec.name)]), *(line.removeprefix(start) for line in loaded.problems)]
    keys = sum(key.startswith(TEXT_ENCODER) for key in read(info.spec.name, base))
    texts = sum(len(patches.found) for _, patches in loaded.texts)
    info.encoder = (keys, bool(texts) if has_clip else None)
    for lora in loaded.loras:
        info.out += [line.removeprefix(start) for line in left_out(lora, False)]
        info.other += [line.removeprefix(start) for line in otherwise(lora)]
        info.layers = len(lora.parsed.layers)
        info.kinds = _kinds(lora)
        info.ranks = tuple(sorted({rank for ops in lora.parsed.layers.values() for op in ops if (rank := _rank(op))}))
    if not info.layers and not texts:
        info.nothing = "none of what it holds can act beside the weights of this model."


def _kinds(lora: LoadedLoRA) -> tuple[str, ...]:
    names = [patch[0] if isinstance(patch, tuple) else patch.name for patch in lora.patches.found.values()]
    kinds = [KINDS.get(name, name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))]
    dora = any(isinstance(op, Decomposed) for ops in lora.parsed.layers.values() for op in ops)
    return (*kinds, *(["DoRA"] if dora else []))


def _rank(op: Op) -> int:
    return op.direction.rank if isinstance(op, Decomposed) else op.rank


# --- sizes ---


@torch.inference_mode()
def _measure(found: Sequence[Info], loras: Mapping[int, LoadedLoRA], model, tick: Tick) -> None:
    """Fill in `changes` and `whole`."""
    touched = {layer for lora in loras.values() for layer in lora.parsed.layers}
    order = [name for name, _ in model.model.diffusion_model.named_modules() if name in touched]
    weights = {}
    for layer in order:
        weight = read_weight(model, f"{layer}.weight")
        weights[layer] = None if weight is None else torch.linalg.vector_norm(weight).item() ** 2
        tick()
    for info in found:
        if info.number in loras:
            strength = info.spec.strength_model or 1.0
            energies = _energies(info, loras[info.number], model, strength, tick)
            squares: dict[str, tuple[float, float]] = {}
            for layer in order:
                if weights[layer]:
                    change, size = squares.get(block_of(layer), (0.0, 0.0))
                    squares[block_of(layer)] = (change + energies.get(layer, 0.0), size + weights[layer])
            info.changes = {block: abs(strength) * sqrt(change / size) for block, (change, size) in squares.items()}
            size = sum(size for _, size in squares.values())
            info.whole = abs(strength) * sqrt(sum(change for change, _ in squares.values()) / size) if size else None


def _energies(info: Info, lora: LoadedLoRA, model, strength: float, tick: Tick) -> dict[str, float]:
    """Layer -> squared Frobenius norm of the LoRA's change of it, by its strength."""
    told: dict[str, list[str]] = {}
    try:
        sizes = measure(Bank([lora.parsed.layers], [info.spec.name]), (True,), top=False,
                        reader=partial(read_weight, model), visit=lambda done, count: tick(),
                        report=lambda name, layer, reason: told.setdefault(reason, []).append(layer),
                        strengths=(strength,), alone=True)
    except ValueError as error:
        info.out.append(f"its size is not known: {error}")
        return {}
    info.out += [f"{counted(len(layers), 'layer')} such as {layers[0]}: {reason}" for reason, layers in told.items()]
    return {layer: by[0].energy for layer, by in sizes.items() if isfinite(by[0].energy)}


def block_of(layer: str) -> str:
    """`input_blocks.4.1.proj_in` is of the block `input_blocks.4`; a layer outside numbered blocks is its own first
    name's."""
    names = layer.split(".")
    number = next((i for i, name in enumerate(names) if name.isdigit()), None)
    return names[0] if number is None else ".".join(names[:number + 1])


# --- text and picture ---


def told(found: Sequence[Info], kind: str) -> str:
    """The report, a paragraph per LoRA. `kind`: what the model is."""
    return "\n\n".join([f"On this model ({kind}):", *("\n".join(_lines(info)) for info in found)])


def _lines(info: Info) -> list[str]:
    spec, words = info.spec, info.words
    lines = [f"{info.number}  {spec.name}" + (" (off)" if not spec.acts else "")]
    if info.nothing:
        lines.append(f"   does nothing on this model: it {info.nothing}")
    else:
        what = " and ".join(info.kinds) or "nothing for the model itself"
        ranks = f" of rank {_range(info.ranks)}" if info.ranks else ""
        lines.append(f"   {what}{ranks}, on {counted(info.layers, 'layer')} of the model{_encoder(info)}")
    lines.append(f"   trained on: {words.base or 'not said in the file'}")
    said = ", ".join(words.trigger[:MOST_WORDS])
    tags = f"; tags of its training: {', '.join(words.tags[:MOST_WORDS])}" if words.tags and not said else ""
    where = f" (in {words.where})" if said and words.where != Wording.where else ""
    lines.append(f"   trigger words: {said or 'not said in the file'}{where}{tags}")
    lines += [f"   {words.unread}"] * bool(words.unread)
    lines += [f"   set on it: {given}" for given in (_given(spec),) if given]
    if info.whole is not None:
        most = sorted(info.changes.items(), key=lambda entry: -entry[1])[:MOST_BLOCKS]
        strongest = ", ".join(f"{block} {_percent(change)}" for block, change in most)
        lines.append(f"   at strength {spec.strength_model or 1:g} it changes these weights by {_percent(info.whole)} "
                     f"of their size, most in {strongest}")
    return lines + [f"   {line}" for line in info.other] + [f"   left out: {line}" for line in info.out]


def _given(spec: LoRASpec) -> str:
    """When and where a LoRA is to act, as far as that was said of it: what its file does not know."""
    parts = [f"role {spec.role}"] * (spec.role != "auto") + [f"words {spec.words}"] * bool(spec.words)
    if not spec.window.whole:
        fade = f", fading over {spec.fade:g}" * bool(spec.fade)
        parts.append(f"acts from {spec.start:g} to {spec.end:g} of the run{fade}")
    if spec.mask is not None:
        parts.append(f"a mask of {100 * float(spec.mask.tensor.float().mean()):.0f} % of the picture")
    return "; ".join(parts)


def _encoder(info: Info) -> str:
    keys, taken = info.encoder
    if not keys:
        return ""
    if taken is None:
        return ", and on the text encoder, which is not connected"
    return " and on the text encoder" if taken else ", and its part for a text encoder has no place in this one"


def _range(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def draw(found: Sequence[Info], kind: str, theme: Theme = LIGHT) -> Image.Image:
    """A curve per LoRA over the blocks of the model, and the text below."""
    names = labels([info.spec.name for info in found])
    measured = [(i, info) for i, info in enumerate(found) if info.changes]
    blocks: list[Block] = []
    if measured:
        order = list(measured[0][1].changes)
        series = [Series(names[i], [100 * info.changes[block] for block in order], theme.colour(i))
                  for i, info in measured]
        blocks.append(Lines("How much of their size the weights of each block change, in %, at the LoRA's strength",
                            series, tall=300, across=("blocks of the model, first to last", _parts(order))))
    blocks += [Text("\n".join(line.strip() for line in lines[1:]), lines[0], most=3)
               for lines in map(_lines, found)]
    return sheet(blocks, "LoRA Info", f"on {kind}", theme=theme)


def _parts(blocks: Sequence[str]) -> list[tuple[float, str]]:
    """Where the wider parts of a model are, by the first names of their blocks: (place from 0 to 1, name)."""
    out, start = [], 0
    for name, run in groupby(blocks, key=lambda block: block.partition(".")[0]):
        count = len(list(run))
        if count / len(blocks) >= NARROW:
            out.append(((start + count / 2) / len(blocks), name))
        start += count
    return out
