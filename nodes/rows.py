"""The rows of LoRA Ensemble, each of which opens the next one, and what they stand for.

Rows are DynamicCombos of the host, one inside the other: no code in the browser draws them, a row that is added leaves
those before it as they are, and the list of files is in the schema once per row. All fields are optional, so that a
workflow in API format names those that it sets, and in the order of the rows, since the front end shows required ones
first.

Later releases have `io.DynamicGroup`, rows of one template. They are not used where they are: a template takes plain
widgets alone, so that no row could keep its further settings closed, and a workflow that is saved with groups would not
open where there are none. Rows are the same on every release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io

from ..host.files.ensemble import ROLES, LoRASpec, Mask
from ..host.files.files import check_file
from .border import check
from .ensembles import check_window, checked_mask, several, window_inputs
from .sockets import MOST_ROWS, strength_input

EMPTY = "None"
CLOSED, OPEN = "no", "yes"
NODE = "LoRA Ensemble"
FIELDS = ("on", "lora", "strength", "words", "clip", "role", "mask", "start", "end", "fade")


@dataclass(frozen=True)
class Row:
    """A row that names a file: its number on the node, the LoRA, and which of the masks is its own, from 1; 0: none."""

    number: int
    spec: LoRASpec
    mask: int = 0


def row_inputs(names: Sequence[str], number: int = 1) -> list[io.Input]:
    """The widgets of a row and all below it; `names` are the files to choose from."""
    return [
        *_fields(names, number),
        _opening(f"more_{number}", _more(number), "Whether the row shows its further settings: words, strength for "
                 "CLIP, role, mask and when it acts. no: they have their defaults."),
        *([_opening(f"row_{number + 1}", row_inputs(names, number + 1), "Whether there is another row below. no: it "
                   "is taken away with all below it and what they hold.")]
          if number < MOST_ROWS else []),
    ]  # fmt: skip


def _fields(names: Sequence[str], number: int) -> list[io.Input]:
    return [
        io.Boolean.Input(f"on_{number}", default=True, optional=True,
                         tooltip="Whether the LoRA acts. One that is off keeps its number and its words."),
        io.Combo.Input(f"lora_{number}", options=[EMPTY, *names], default=EMPTY, optional=True,
                       tooltip="A file in ComfyUI's models/loras. None: an empty row."),
        strength_input(f"strength_{number}", "How strongly the LoRA acts. May be negative; 0 leaves it out.",
                       optional=True),
    ]  # fmt: skip


def _opening(name: str, inputs: list[io.Input], tooltip: str) -> io.Input:
    return io.DynamicCombo.Input(
        name, options=[io.DynamicCombo.Option(CLOSED, []), io.DynamicCombo.Option(OPEN, inputs)], optional=True,
        tooltip=tooltip, extra_dict={"default": CLOSED})  # else the page's reset takes the first option as a whole


def _more(number: int) -> list[io.Input]:
    window = window_inputs()
    for part in window:
        part.id = f"{part.id}_{number}"
    return [
        io.String.Input(
            f"words_{number}",
            default="",
            optional=True,
            tooltip="The LoRA's words in the prompt, separated by commas, so that it can act where they are. Empty: "
            "the trigger words that its file names, or else a file of a LoRA manager beside it. 'ohwx = woman with red "
            "hair' looks for ohwx and lets ordinary words stand in for it where its place in the picture is sought.",
        ),
        io.Float.Input(f"clip_{number}", default=1.0, min=-100.0, max=100.0, step=0.01, optional=True,
                       tooltip="How strongly it acts on the text encoder, in multiples of strength: 1 as much, 0 not "
                       "at all."),
        io.Combo.Input(
            f"role_{number}",
            options=list(ROLES),
            default=ROLES[0],
            optional=True,
            tooltip="What the LoRA depicts. For K-LoRA and EST-LoRA, characters, clothing and objects are subjects, "
            "styles and backgrounds styles. For CMLoRA, backgrounds lead late. With words, styles act everywhere. "
            "always: part of the model, in every step and at every place; for LoRAs that make few steps do (Lightning, "
            "Turbo, LCM).",
        ),
        io.Int.Input(f"mask_{number}", default=0, min=0, max=4096, optional=True,
                     tooltip="Which mask of the batch at the input masks says where the LoRA may act, the first being "
                     "1. It beats the words. 0: none."),
        *window,
    ]  # fmt: skip


def rows_of(fields: Mapping[str, Any]) -> tuple[Row, ...]:
    """The rows that name a file; one that is off has no strength, and its file is not looked at.

    fields   what the host makes of the widgets: the fields of the first row by their names, with what a DynamicCombo
             opens in a mapping of its own, under the name of the combo. What is missing has its default, and so has
             None, which the host writes for what is missing and, before a run, for what will come over a link
    Raises ValueError that names the row, with a line for each that is wrong.
    """
    rows, wrong = [], []
    for number, own in enumerate(_open_rows(fields), 1):
        try:
            rows.append(_row(own, number))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    return tuple(row for row in rows if row is not None)


def _open_rows(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    number, row = 1, fields
    while row:
        yield row
        number += 1
        row = _opened(row, f"row_{number}")


def _opened(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a combo opens; nothing where it is closed."""
    value = fields.get(name)
    return value if isinstance(value, Mapping) and value.get(name) == OPEN else {}


def check_openings(inputs: Mapping[str, Any]) -> None:
    """Refuse combos that open nothing though they are not closed: the host leaves them out with all that they hold.

    inputs   of the node, as they are in the prompt
    Raises ValueError.
    """
    for name, value in inputs.items():
        last = name.rpartition(".")[2]
        if last.startswith(("row_", "more_")) and value not in (CLOSED, OPEN):
            raise ValueError(f"{NODE}: {last} is {value!r}. It must be '{OPEN}' or '{CLOSED}', and no link.")


def _row(own: Mapping[str, Any], number: int) -> Row | None:
    parts = {part.id: part for part in (*_fields([], number), *_more(number))}
    given = {**own, **_opened(own, f"more_{number}")}

    def value(field: str) -> Any:
        part = parts[f"{field}_{number}"]
        found = given.get(part.id)
        return part.default if found is None else found

    where = f"{NODE}, row {number}"
    for field in FIELDS:
        check(where, parts[f"{field}_{number}"], value(field))
    name, words = value("lora"), " ".join(value("words").split())
    if name in (EMPTY, ""):
        return None
    if not value("on"):
        return Row(number, LoRASpec(name, 0.0, 0.0, words=words, row=number))
    try:
        check_file(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    spec = LoRASpec(name, value("strength"), value("strength") * value("clip"), value("role"), words=words,
                    start=value("start"), end=value("end"), fade=value("fade"), row=number)
    check_window(spec, where)
    return Row(number, spec, value("mask"))


def with_mask(row: Row, masks: torch.Tensor | None) -> LoRASpec:
    """The LoRA of a row with its own mask out of a batch [masks, height, width].

    Raises ValueError where there is no such mask, and for one that confines nothing.
    """
    if not row.mask:
        return row.spec
    masks = None if masks is None else several(masks)
    if masks is None or row.mask > len(masks):
        there = "nothing is connected to masks" if masks is None else f"masks has {len(masks)}"
        raise ValueError(f"{NODE}, row {row.number}: it asks for mask {row.mask}, and {there}. Connect a batch of "
                         f"masks, or set mask_{row.number} to 0.")
    return replace(row.spec, mask=Mask(checked_mask(masks[row.mask - 1:row.mask], row.spec.name,
                                                    f"{NODE}, row {row.number}")))
