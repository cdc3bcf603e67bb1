"""What a run did, step by step, in numbers and as charts: who led, how old cached features were, what guidance saw, and
what was evaluated and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.record import RunRecord, StepRecord
from ...methods import method_title
from ...methods.counted import counted
from ...methods.guidance.record import GuidanceRecord
from .chart import HeatRows, Lines, Series, Stack
from .letters import labels, short_names
from .sheet import Beside, Block, Figures
from .theme import BLUE, LIGHT, SKY, Theme

CURVES = 6
"""Pictures that have a curve of their own; of more there are mean and range."""
HEADS = {"Switch": "Whose turn it was", "CMLoRA": "Say of each LoRA",
         "LoRAtorio": "Weight of each LoRA, averaged over the picture", "KLoRA": "Layers of each LoRA",
         "ESTLoRA": "Layers of each LoRA"}
BY_STRENGTH = ("Merge", "Switch", "Composite")
"""Methods that go by the strengths alone: what these are is known as soon as a step begins."""


@dataclass(frozen=True)
class Costs:
    """Evaluations (of one picture on one side of guidance under one branch) per step.

    whole      made in whole
    cached     made on cached features of their deep layers
    left_out   negatives that guidance did without
    """

    whole: list[float]
    cached: list[float]
    left_out: list[float]

    @property
    def plain(self) -> float:
        """What the same method takes without cache and with guidance at every step."""
        return sum(self.whole) + sum(self.cached) + sum(self.left_out)

    @property
    def saved(self) -> float:
        """The share of these that were not made at all, 0 to 1; those on cached features cost a part of a whole one."""
        return sum(self.left_out) / self.plain if self.plain else 0.0

    def as_dict(self) -> dict[str, float]:
        return {"whole": round(sum(self.whole)), "cached": round(sum(self.cached)),
                "left_out": round(sum(self.left_out)), "plain": round(self.plain), "saved": round(self.saved, 4)}


def costs_of(record: RunRecord | None, guidance: GuidanceRecord | None) -> Costs:
    """From the record of methods, of guidance, or of both of one run."""
    guided = {step.index: step for step in guidance.steps} if guidance is not None else {}
    conditional = sum(step.rows for step in guided.values())
    negatives = (guidance.full - conditional) / conditional if conditional else 0.0  # of a picture
    if record is None:
        return Costs([step.rows + step.negative for step in guided.values()], [0] * len(guided),
                     [step.rows * negatives - step.negative for step in guided.values()])
    whole, cached, left_out = [], [], []
    for step in record.steps:
        reused = _cache(step).get("reused", 0)
        whole.append(step.rows - reused)
        cached.append(reused)
        seen = guided.get(step.index)
        each = step.rows / max(seen.rows + seen.negative, 1) if seen is not None else 0.0  # branches
        left_out.append(max(each * (seen.rows * negatives - seen.negative), 0.0) if seen is not None else 0.0)
    return Costs(whole, cached, left_out)


def says(record: RunRecord, k: int) -> list[list[float]]:
    """Per LoRA of the k-th method the share of the say that it had in each step: its weight, its layers, or its part of
    the strengths, whichever the method goes by. Of all LoRAs together 1 or, where none acted, 0."""
    count = len(record.adapters[k])
    steps = [_say(step, k, count, step.notes.get(record.note_key(k)) or {}) for step in record.steps]
    return [[step[i] for step in steps] for i in range(count)]


def _say(step: StepRecord, k: int, count: int, notes: dict) -> list[float]:
    acting = [[abs(gain) for gain in branch[k]] for branch in step.branches]
    if "layers" in notes:
        return _normal(notes["layers"])
    if notes.get("weights"):
        weights = notes["weights"][0] if isinstance(notes["weights"][0], list) else notes["weights"]
        found = dict(zip(notes["active"], weights, strict=False))
        return _normal([found.get(i) or 0.0 for i in range(count)])
    if "led" in notes:
        open_ = [any(branch[i] for branch in acting) for i in range(count)]
        rest = (1 - notes["weight"]) / max(sum(open_) - 1, 1)
        return _normal([(notes["weight"] if i == notes["led"] else rest) * open_[i] for i in range(count)])
    parts = [_normal(branch) for branch in acting]
    return _normal([sum(part[i] for part in parts) for i in range(count)])


def _normal(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


def charts(record: RunRecord | None, guidance: GuidanceRecord | None, theme: Theme = LIGHT) -> list[Block]:
    """The story of a run, as far as there is something to tell."""
    costs = costs_of(record, guidance)
    blocks: list[Block] = [_figures(record, guidance, costs)]
    for k, kind in enumerate(record.methods if record is not None else ()):
        blocks += _leaders(record, k, kind)
    pair = [*_guidance(guidance), *_costs(costs, theme)]
    blocks += [Beside(pair)] if len(pair) > 1 else pair
    return [*blocks, *_places(record), *_ages(record)]


def _figures(record: RunRecord | None, guidance: GuidanceRecord | None, costs: Costs) -> Block:
    steps = len(record.steps if record is not None else guidance.steps)
    figures = [(str(steps), "steps"), (f"{sum(costs.whole):.0f}", "evaluations in whole")]
    if sum(costs.cached):
        figures.append((f"{sum(costs.cached):.0f}", "more on cached features"))
    if costs.saved > 0.0005:
        figures.append((f"{100 * costs.saved:.0f} %", f"left out of {costs.plain:.0f} in the plain way"))
    if record is not None:
        seconds = sum(step.seconds for step in record.steps)
        figures.append((f"{seconds:.1f} s", f"{seconds / max(steps, 1):.2f} s per step"))
    return Figures(figures)


def _leaders(record: RunRecord, k: int, kind: str) -> list[Block]:
    """Nothing for a method that gives all LoRAs the same in every step."""
    shares = says(record, k)
    if all(len(set(each)) <= 1 for each in shares) and kind not in HEADS:
        return []
    name = method_title(kind)
    return [Stack(f"{HEADS.get(kind, 'Strength of each LoRA')} ({name})",
                  [Series(one, each) for one, each in zip(labels(record.adapters[k]), shares, strict=True)],
                  tall=90 if kind == "Switch" else 150)]


def _guidance(guidance: GuidanceRecord | None) -> list[Block]:
    if guidance is None or not guidance.steps:
        return []
    pictures = max(len(step.gamma) for step in guidance.steps)
    curves = [[step.gamma[i] if i < len(step.gamma) else None for step in guidance.steps] for i in range(pictures)]
    known = [[value for value in column if value is not None] for column in zip(*curves, strict=True)]
    if not any(known):
        return []
    if pictures > CURVES:
        lines = [Series(f"mean of {pictures} pictures", [sum(each) / len(each) if each else None for each in known])]
    else:
        lines = [Series(f"picture {i + 1}" if pictures > 1 else "similarity", curve) for i, curve in enumerate(curves)]
    negative = [step.negative / step.rows if step.rows else 0.0 for step in guidance.steps]
    off = switch_of(guidance)
    switch = "" if off is None else f"; the negative is off from step {off + 1}"
    return [Lines(f"Similarity of the two sides of guidance{switch}", lines, lowest=None,
                  behind=Series("negatives that were evaluated", negative))]


def switch_of(guidance: GuidanceRecord) -> int | None:
    """The step from which on no picture had a negative, neither evaluated nor predicted; None: there is none."""
    guided = [step.index for step in guidance.steps if step.negative or step.predicted]
    rest = [step.index for step in guidance.steps if not guided or step.index > guided[-1]]
    return min(rest, default=None)


def _costs(costs: Costs, theme: Theme) -> list[Block]:
    """Nothing where every evaluation was whole."""
    if not sum(costs.cached) and sum(costs.left_out) < 0.5:
        return []
    layers = [Series("in whole", costs.whole, BLUE), Series("on cached features", costs.cached, SKY),
              Series("left out by guidance", costs.left_out, theme.grid)]
    return [Stack("Evaluations", [each for each in layers if sum(each.values)], highest=None, marks=None)]


def _places(record: RunRecord | None) -> list[Block]:
    """How much of the picture LoRAs had that are confined by their words."""
    out = []
    for k in range(len(record.methods) if record is not None else 0):
        found = places(record, k)
        if any(found):
            called = labels(record.adapters[k])
            lines = [Series(one, [None if each is None else each[i] for each in found])
                     for i, one in enumerate(called)]
            out.append(Lines("Share of the picture that each LoRA acts on", lines, highest=1.0, tall=120,
                             marks=((0, "0 %"), (0.5, "50 %"), (1, "100 %"))))
    return out


def places(record: RunRecord, k: int) -> list[list[float] | None]:
    """Per step the share of the picture that each LoRA of the k-th method acts on, where their words confine them and
    it is known."""
    found = [(step.notes.get(record.note_key(k)) or {}).get("places") for step in record.steps]
    return [None if each is None or None in each else each for each in found]


def _ages(record: RunRecord | None) -> list[Block]:
    ages = [_cache(step).get("ages") or [] for step in record.steps] if record is not None else []
    if not any(any(each) for each in ages):
        return []
    branches: dict[str, list[int | None]] = {}
    for number, (step, each) in enumerate(zip(record.steps, ages, strict=True)):
        for k, age in enumerate(each):
            name = _branch(record, step.branches[k]) if len(each) == len(step.branches) else f"branch {k + 1}"
            branches.setdefault(name, [None] * len(ages))[number] = age
    oldest = max(max(each, default=0) for each in ages)
    return [HeatRows("Age of the deep features that were used", [Series(*each) for each in branches.items()],
                     highest=oldest, ends=("made anew", f"{counted(oldest, 'step')} old"))]


def _branch(record: RunRecord, gains: Sequence[Sequence[float]]) -> str:
    """A branch by the LoRAs that act in it."""
    acting = [name for names, each in zip(record.adapters, gains, strict=True)
              for name, gain in zip(labels(names), each, strict=True) if gain]
    every = sum(map(len, record.adapters))
    return "base model" if not acting else "all LoRAs" if len(acting) == every > 1 else " + ".join(acting)


def _cache(step: StepRecord) -> dict:
    return step.notes.get("cache") or {}


def titles(record: RunRecord, routed: Sequence[bool]) -> list[str]:
    """The methods as users call them; `routed` are those whose LoRAs act where their words are."""
    return list(map(method_title, record.methods, routed))


def line(record: RunRecord, called: Sequence[str], costs: Costs, total: int, guidance: GuidanceRecord | None = None,
         over: bool = False) -> str:
    """A run in a line or two while it goes on, or when it is over, from what the host knows: no tensor is read, since
    that would wait for the device. What methods note of a step is known when the next one begins.

    called   the methods, as `titles` has them
    """
    if not record.steps:
        return ""
    step = record.steps[-1]
    seconds = sum(each.seconds for each in record.steps)
    lines = [f"{record.done} of {counted(record.whole or total, 'step')}"
             + (f" in {seconds:.1f} s" if over else "")]
    lines += [_leader(record, k, name) if not over else name for k, name in enumerate(called)]
    parts = _evaluated(costs)
    told = len(record.problems) + (len(guidance.problems) if guidance is not None else 0)
    if told:
        parts.append(f"{counted(told, 'note')}: see Ensemble Report")
    return "\n".join([f"{lines[0]}: {'; '.join(lines[1:])}", ", ".join(parts)]) if step.calls or over else ""


def _evaluated(costs: Costs) -> list[str]:
    parts = [counted(round(sum(costs.whole)), "evaluation")]
    parts += [f"{sum(costs.cached):.0f} on cached features"] * bool(sum(costs.cached))
    return parts + [f"{sum(costs.left_out):.0f} left out by guidance"] * (sum(costs.left_out) >= 0.5)


def saved(record: RunRecord | None, guidance: GuidanceRecord | None, total: int) -> str:
    """A finished run of a Branch Cache (`record`) or guidance or both without LoRAs, and what could not be done as
    asked; empty where nothing was sampled."""
    records = [each for each in (record, guidance) if each is not None]
    done = max((len(each.steps) for each in records), default=0)
    rules = [*["Branch Cache"] * (record is not None), *([guidance.policy] if guidance is not None else [])]
    return "\n".join([f"{done} of {counted(total, 'step')}: {'; '.join(rules)}",
                      ", ".join(_evaluated(costs_of(record, guidance))),
                      *(problem for each in records for problem in each.problems)]) if done else ""


def now(record: RunRecord, k: int) -> tuple[list[float] | None, dict]:
    """(the share of the say that each LoRA of the k-th method has while the run goes on, what the method noted of that
    step), as far as the host knows. None: the method's weights are on the device until the run is over."""
    if record.methods[k] in BY_STRENGTH:
        return _say(record.steps[-1], k, len(record.adapters[k]), {}), {}
    latest = [step for step in record.steps[-2:] if step.notes.get(record.note_key(k))]
    noted = [step for step in latest if _numbers(step.notes[record.note_key(k)])]
    if latest and not noted:
        return None, {}
    step = (noted or record.steps)[-1]
    notes = step.notes[record.note_key(k)] if noted else {}
    return _say(step, k, len(record.adapters[k]), notes), notes


def _leader(record: RunRecord, k: int, name: str) -> str:
    """Who has the most say at this step, if one has, behind the name of the method."""
    called, (shares, notes) = short_names(record.adapters[k]), now(record, k)
    top = max(shares or (), default=0.0)
    if "led" in notes and top:
        return f"{name}, {called[notes['led']]} leads"
    if shares is None:
        return name
    if not top:
        return f"{name}, no LoRA acts"
    if sum(share > top - 1e-6 for share in shares) > 1 or len(shares) == 1:
        return name
    leader = called[shares.index(top)]
    return f"{name}, {leader} acts" if top > 1 - 1e-6 else f"{name}, {leader} leads with {100 * top:.0f} %"


def _numbers(notes: object) -> bool:
    """Whether notes are there, and none of them is still on a device."""
    return isinstance(notes, dict) and bool(notes) and not any(hasattr(value, "device") for value in notes.values())
