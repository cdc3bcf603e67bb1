"""What the last run of a MODEL did: where each LoRA acted, as a picture, and the record as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from ...engine.record import RunRecord
from ...methods import method_title
from ...methods.counted import counted, verb
from ...methods.guidance.record import GuidanceRecord
from ..compose.composition import KEY, TOLD, Placed, outcome_of
from ..guidance.apply import KEY as GUIDANCE
from ..guidance.apply import guidance_record_of
from .heat import overlay
from .letters import labels
from .sheet import Block, Cell, Pictures, Text, as_image, sheet
from .story import charts, costs_of
from .theme import LIGHT, Theme

COLUMNS, CELLS, PROBLEMS, SIDE = 4, 24, 8, 480
"""Maps side by side, and at most on one sheet; lines of what a run could not do as asked; a map's longer side before it
is fitted into its cell."""
NEVER = ("This MODEL has not been sampled yet. Connect the MODEL that the sampler got, and the LATENT that came out of "
         "that sampler.")
WITHOUT = ("No method of this pack is on this MODEL, so there is nothing to report. Connect the MODEL that the sampler "
           "got, behind the method node. What Merge writes into the weights in mode 'baked' leaves no record.")
NOWHERE = ("No LoRA was confined to a place in this run: each acted on the whole picture whenever its method let it. "
           "Routed LoRAs, the input 'place' of the other methods, and masks confine LoRAs.")
LAST = (f"This MODEL was sampled several times, and no run of it is known to have left this latent: the last {TOLD} "
        "are known. What is shown here is of the last one. Connect what came out of the sampler itself.")


@dataclass(frozen=True)
class Map:
    """One map of the sheet.

    lora    its number, from 0
    title   its name, and the picture and frame where there are several
    words   what was found of its words
    share   of the picture that it acts on, in [0, 1]
    map     [height, width] in [0, 1]
    under   the picture below it [height, width, 3] in [0, 1], if there is one
    """

    lora: int
    title: str
    words: str
    share: float
    map: np.ndarray
    under: np.ndarray | None = None


def report(model, latent: Tensor, images: Tensor | None = None, theme: Theme = LIGHT) -> tuple[Tensor, str]:
    """(a sheet [1, height, width, 3] in [0, 1], JSON) of the run of a MODEL that made a latent; of its last run where
    none is known to have.

    images   [pictures or all of their frames, height, width, 3], to lay maps over

    The text is `RunRecord.as_dict`, with `words`: per method that confines its LoRAs and has looked for words, what was
    found of each LoRA's in each prompt; with `evaluations`, of which some were saved (`Costs.as_dict`); and with
    `guidance`, what adaptive guidance did. Where there was no run, both say so.
    """
    outcome, guidance = outcome_of(model, latent), guidance_record_of(model, latent)
    record, places = outcome.record, outcome.places
    if record is None and guidance is None:
        reason = NEVER if model.get_attachment(KEY) is not None else WITHOUT
        return as_image(draw(None, [], reason, theme)), json.dumps({"problems": [reason]})
    sections = [(f"Where the LoRAs acted at the end of the run ({counted(len(placed.names), 'LoRA')})",
                 maps_of(placed, images)) for placed in places]
    said = [LAST] * _unknown(model, latent) + [NOWHERE] * (not sections and record is not None)
    return (as_image(draw(record, sections, "\n".join(said), theme, guidance)),
            as_json(record, places, guidance, said[:1] if LAST in said else ()))


def _unknown(model, latent: Tensor) -> bool:
    """Whether a MODEL was sampled several times, and none of these runs is known to have left a latent."""
    kept = [each.told for each in (model.get_attachment(KEY), model.get_attachment(GUIDANCE)) if each is not None]
    return any(len(told.values()) > 1 for told in kept) and all(told.before(latent) is None for told in kept)


def as_json(record: RunRecord | None, places: Sequence[Placed], guidance: GuidanceRecord | None = None,
            more_problems: Sequence[str] = ()) -> str:
    """The record and the words that were found, one step per line and names in their own letters."""
    found = record.as_dict() if record is not None else {"steps": []}
    found["problems"] = [*more_problems, *found.get("problems", ())]
    steps = ",\n  ".join(json.dumps(step) for step in found.pop("steps"))
    more = {"words": [list(placed.found) for placed in places], "evaluations": costs_of(record, guidance).as_dict(),
            "guidance": guidance.as_dict() if guidance is not None else None}
    rest = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                       for key, value in {**found, **more}.items())
    return f'{{{rest},\n "steps": [\n  {steps}\n]}}'


def maps_of(placed: Placed, images: Tensor | None = None) -> list[Map]:
    """The maps of one method's LoRAs: picture by picture, LoRA by LoRA; of films the first frame and the middle one."""
    maps = placed.maps.nan_to_num(0.0)
    maps = maps if maps.ndim == 5 else maps.unsqueeze(2)
    pictures, loras, frames = maps.shape[:3]
    shown = sorted({0, frames // 2})
    called, cells = labels(placed.names), []
    for picture in range(pictures):
        for frame in shown:
            under = None if images is None else _picture(images, picture, pictures, frame, frames)
            where = [f"picture {picture + 1}"] if pictures > 1 else []
            where += [f"frame {frame + 1} of {frames}"] if frames > 1 else []
            for i in range(loras):
                whole, here = maps[picture, i], maps[picture, i, frame].float().numpy()
                title = ", ".join([called[i], *where])
                cells.append(Map(i, title, _words(placed, i, whole), float(whole.float().mean()), here, under))
    return cells


def draw(record: RunRecord | None, sections: Sequence[tuple[str, Sequence[Map]]], message: str = "",
         theme: Theme = LIGHT, guidance: GuidanceRecord | None = None) -> Image.Image:
    """The sheet: what was run and how it went, a section of maps per method, what was chosen for it, and what could not
    be done as asked. At most CELLS maps are drawn, and it says how many are not."""
    left, blocks = CELLS, [] if record is None and guidance is None else charts(record, guidance, theme)
    blocks += [Text(message)] if message else []
    for title, maps in sections:
        shown = list(maps[:left])
        left -= len(shown)
        cut = "" if len(shown) == len(maps) else f"; {len(maps) - len(shown)} of {counted(len(maps), 'map')} " \
            f"{verb(len(maps) - len(shown), 'are')} not shown"
        blocks += _pictures(title + cut, shown)
    if record is not None and record.chosen:
        blocks.append(Text("\n".join(f"- {line}" for line in record.chosen), "Chosen by the number of steps", most=2))
    carried = [*(record.carried if record is not None else ()), *(guidance.carried if guidance is not None else ())]
    if carried:
        blocks.append(Text("\n".join(f"- {line}" for line in carried), "From the earlier run of this picture", most=2))
    told = [*(record.problems if record is not None else ()), *(guidance.problems if guidance is not None else ())]
    notes = [f"- {problem}" for problem in told[:PROBLEMS]]
    notes += [f"- and {len(told) - PROBLEMS} more in the text"] if len(told) > PROBLEMS else []
    blocks += [Text("\n".join(notes), "What was not done as asked", most=2)] if notes else []
    why = record.reasons if record is not None else []
    blocks += [Text("\n".join(f"- {line}" for line in why), "Why this method", most=2)] if why else []
    about = [_run(record)] if record is not None else []
    about += [guidance.policy] if guidance is not None else []
    return sheet(blocks, "Ensemble Report", "; ".join(about), theme)


def _pictures(title: str, maps: Sequence[Map]) -> list[Block]:
    """Equal pictures; the LoRAs of one picture are not parted where a row has room for them."""
    if not maps:
        return [Text("", title)]
    each = 1 + max(one.lora for one in maps)
    columns = each * min(COLUMNS // each, -(-len(maps) // each)) if each <= COLUMNS else COLUMNS
    groups = [maps] if each <= COLUMNS else [maps[k:k + each] for k in range(0, len(maps), each)]
    return [Pictures([_cell(one) for one in group], max(columns, 2), "" if k else title,
                     None if k else ("not here", "in full")) for k, group in enumerate(groups)]


def _cell(one: Map) -> Cell:
    height, width = one.map.shape
    scale = SIDE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return Cell(one.title, overlay(one.map, size, one.under), [f"{100 * one.share:.0f} % of the picture", one.words])


def _run(record: RunRecord) -> str:
    """One line about the whole run."""
    calls, rows = (sum(getattr(step, name) for step in record.steps) for name in ("calls", "rows"))
    methods = ", ".join(map(method_title, record.methods)) or "no method"
    ended = "" if record.finished else "; the run did not finish"
    count = counted(len(record.steps), "step") if not record.whole else \
        f"steps {record.before + 1} to {record.done} of {record.whole}"
    cards = [f"{each} on {card}" for card, each in record.devices.items()]
    where = f" ({', '.join(cards)})" if len(cards) > 1 else ""
    return f"{methods}: {count}, {counted(rows, 'evaluation')} in {counted(calls, 'call')} of the model{where}{ended}"


def _words(placed: Placed, i: int, maps: Tensor) -> str:
    """What was found of a LoRA's words in all prompts. `found` has the LoRAs in order, prompt by prompt."""
    own = placed.found[i::len(placed.names)]
    words = ", ".join(dict.fromkeys(f'"{text}"' for each in own for text in each["words"]))
    words += "; encoded with its own change of the text encoder" * any("text_encoder" in each for each in own)
    if any(placed.masked[i:i + 1]):
        return f"in its mask; its words: {words}" if words else "in its mask"
    if words:
        return words
    why = next((each["why"] for each in own if each["why"]), "")
    everywhere = "everywhere" if (maps == 1).all() else ""
    return ": ".join(part for part in (everywhere, why) if part)


def _picture(images: Tensor, picture: int, pictures: int, frame: int, frames: int) -> np.ndarray:
    """The picture below a map: of films, the frame at the same share of the film. Fewer pictures serve for all."""
    each = max(len(images) // pictures, 1)
    first = min(picture * each, len(images) - each)
    at = first + (round(frame * (each - 1) / (frames - 1)) if frames > 1 else 0)
    return images[at].float().cpu().numpy()

