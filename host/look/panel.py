"""What the panel on a method's node shows of a run (web/panel.js): per LoRA its part in the picture and its strength,
and what was evaluated. Names and numbers that the host knows: no tensor is read."""

from __future__ import annotations

from collections.abc import Sequence

from ...engine.record import RunRecord
from .letters import short_names
from .story import HEADS, Costs, now, places, says
from .theme import DARK, LIGHT

Words = tuple[str, dict[str, str | int]]
"""An English text and what stands in its {places}. The text is the key of its translation, below `loraEnsemble` in
locales/<language>/main.json, which the host serves to web/panel.js."""
OF = {kind: f"{{method}}: {of[0].lower()}{of[1:]}" for kind, of in HEADS.items()}
STRENGTH, SHARE = "{method}: strength of each LoRA", "{method}: share of the picture of each LoRA"
WHOLE = "whole run"
STEPS, EVALUATIONS = "{done} of {total} steps", "{count} evaluations"
CACHED, SAVED = "{percent} % on cached features", "{percent} % saved"
MORE = "{count} more: see Ensemble Report"
SAID = (*dict.fromkeys(OF.values()), STRENGTH, SHARE, WHOLE, STEPS, EVALUATIONS, CACHED, SAVED, MORE)
"""Every text that a panel may be sent, but for notes, which name files and numbers and are in English."""
NOTED = 3
"""So many of a run's notes are on a panel."""


def shown(record: RunRecord, called: Sequence[str], nodes: Sequence[str], costs: Costs, total: int,
          over: bool = False, notes: Sequence[str] = ()) -> list[dict]:
    """One entry for each method that a node has applied; `called` are their titles, `nodes` the ids of the nodes, ""
    for a method that none applied.

    node   the id
    head   what the parts are of
    rows   per LoRA its name, its part of the say from 0 to 1 (of the whole run when it is over; None: not known yet),
           its strength at this step, and its colours on light and on dark ground
    foot   how far the run is, what was evaluated and saved
    notes  the first of `notes`: why a method was taken, and what could not be done as asked
    more   how many others there are

    Head, foot and `more` are lists of `Words`, which the panel puts into the language of the page.
    """
    foot, left = _foot(record, costs, total), len(notes) - NOTED
    below = {"foot": foot, "notes": list(notes[:NOTED]), "more": [(MORE, {"count": left})] if left > 0 else []}
    return [{"node": node, "rows": _rows(record, k, parts), "head": head, **below}
            for k, node in enumerate(nodes) if node for head, parts in (_parts(record, k, called[k], over),)]


def _parts(record: RunRecord, k: int, name: str, over: bool) -> tuple[list[Words], list[float] | None]:
    """(what they are of, the part of each LoRA)"""
    head = [(OF.get(record.methods[k], STRENGTH), {"method": name})]
    if not over:
        return head, now(record, k)[0]
    if (acted := [each for each in places(record, k) if each]):
        return [(SHARE, {"method": name})], _mean(acted)
    return [*head, (WHOLE, {})], _mean(list(zip(*says(record, k), strict=True)))


def _mean(steps: Sequence[Sequence[float]]) -> list[float]:
    return [sum(each) / len(each) for each in zip(*steps, strict=True)]


def _rows(record: RunRecord, k: int, parts: Sequence[float] | None) -> list[dict]:
    branches = record.steps[-1].branches
    strengths = [max((branch[k][i] for branch in branches), key=abs, default=0.0)
                 for i in range(len(record.adapters[k]))]
    return [{"name": name, "part": None if parts is None else round(parts[i], 4), "strength": round(strengths[i], 2),
             "light": LIGHT.colour(i), "dark": DARK.colour(i)}
            for i, name in enumerate(short_names(record.adapters[k]))]


def _foot(record: RunRecord, costs: Costs, total: int) -> list[Words]:
    done = {"done": record.done, "total": record.whole or total}
    parts = [(STEPS, done), (EVALUATIONS, {"count": round(sum(costs.whole))})]
    if costs.plain and (cached := sum(costs.cached)):
        parts.append((CACHED, {"percent": round(100 * cached / costs.plain)}))
    if costs.saved > 0.005:
        parts.append((SAVED, {"percent": round(100 * costs.saved)}))
    return parts
