"""LoRAs for models of two noise levels (Wan 2.2): which file is for which and which belong together, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .ensemble import Ensemble, LoRASpec

HIGH, LOW = "high", "low"
UNNAMED = ("both", "high noise", "low noise")
"""Where LoRAs act whose names say no level."""
_NOISE = re.compile(r"(?:(?<![A-Za-z])(?i:high|low)|(?<=[a-z])(?:High|Low|HIGH|LOW))[-_ .]?(?i:noise)")
_CAPITALS = re.compile(r"(?<![A-Za-z])(?:HIGH|LOW)(?![A-Za-z])")
_WORD = re.compile(r"(?<![A-Za-z])(?i:high|low)(?![A-Za-z])|(?<=[a-z])(?:High|Low)(?![a-z])"
                   r"|(?<=[a-z])(?:HIGH|LOW)(?![A-Za-z])|(?<![A-Za-z0-9])[HL]N?(?![A-Za-z0-9])")
_LETTERS = re.compile(r"(?<![A-Za-z0-9])(?i:[hl]n?)(?![A-Za-z0-9])|(?<=[a-z])[HL]N(?![A-Za-z0-9])")
_SURE = _NOISE, _CAPITALS
_WORDS = *_SURE, _WORD


@dataclass(frozen=True)
class Level:
    """What a file's name says of its noise level.

    level   HIGH or LOW
    sure    False where it may mean something else, as "high" of quality
    rest    the name without it, which the other file of a pair shares
    start   what stands before it
    """

    level: str
    sure: bool
    rest: str
    start: str


@dataclass(frozen=True)
class Divided:
    """An ensemble for each noise level, with the same LoRAs in the same order: those of the other level alone have no
    strength. `lines` say of every file what it was paired with, `problems` are those of them that need a look."""

    high: Ensemble
    low: Ensemble
    lines: tuple[str, ...]
    problems: tuple[str, ...]


def level_of(name: str) -> Level | None:
    """None where a name says no level, or both."""
    for pattern in (*_WORDS, _LETTERS):
        found = list(pattern.finditer(name))
        levels = {HIGH if match[0][0] in "hH" else LOW for match in found}
        if len(levels) == 1:
            level = levels.pop()
            rest = _without(name, level, (*_WORDS, _LETTERS) if pattern is _LETTERS else _WORDS)
            return Level(level, pattern in _SURE, rest, name[:found[0].start()].lower())
        if levels:
            return None
    return None


def _without(name: str, level: str, patterns: Sequence[re.Pattern]) -> str:
    """A name without any word of the level: a folder may say it too, in another way than the file."""
    for pattern in patterns:
        name = pattern.sub(lambda match: "\0" if match[0][0].lower() == level[0] else match[0], name)
    return name.replace("\\", "/").lower()


def divided(ensemble: Ensemble, names: Sequence[str], unnamed: str = "both") -> Divided:
    """One chain of LoRAs -> an ensemble for each level. The partner of a file is another of the chain, else one of
    `names`, the files that there are, with the strengths of the first.

    unnamed   one of UNNAMED
    """
    rows = list(_rows(ensemble, names, unnamed))
    return Divided(*(tuple(row[k] for row in rows) for k in range(3)), tuple(row[2] for row in rows if row[3]))


def side_by_side(high: Ensemble, low: Ensemble) -> Divided:
    """Two chains, one for each level: they stay as they are, and are compared by name, what is left by its place."""
    left, lines, problems = list(low), [], []
    pairs: list[tuple[LoRASpec, LoRASpec | None]] = []
    for spec in high:
        partner = next((other for other in left if _are_pair(level_of(spec.name), level_of(other.name))), None)
        left = [other for other in left if other is not partner]
        pairs.append((spec, partner))
    for spec, partner in pairs:
        if partner is None and left:
            partner = left.pop(0)
            lines.append(f"'{spec.name}' and '{partner.name}': by their places; their names do not say that they "
                         "belong together")
        elif partner is not None:
            lines.append(f"'{spec.name}' and '{partner.name}': a pair")
        else:
            problems.append(f"'{spec.name}': acts at high noise alone")
    problems += [f"'{other.name}': acts at low noise alone" for other in left]
    for chain, level in ((high, HIGH), (low, LOW)):
        for spec in chain:
            says = level_of(spec.name)
            if says is not None and says.sure and says.level != level:
                problems.append(f"'{spec.name}' is in the chain for {level} noise, and its name says {says.level}")
    return Divided(high, low, (*lines, *problems), tuple(problems))


def _rows(ensemble: Ensemble, names: Sequence[str], unnamed: str) -> Iterator[tuple[LoRASpec, LoRASpec, str, bool]]:
    """(for high noise, for low noise, what is said of it, whether that needs a look) per LoRA or pair."""
    left = list(ensemble)
    while left:
        spec = left.pop(0)
        says = level_of(spec.name)
        partner, how = (None, "") if says is None else _partner(spec, says, left, names)
        if partner is not None:
            left = [other for other in left if other is not partner]
            both = (spec, partner) if says.level == HIGH else (partner, spec)
            yield (*both, f"'{both[0].name}' and '{both[1].name}': {how}", False)
        elif says is not None and says.sure:
            yield (*_only(spec, says.level), f"'{spec.name}': acts at {says.level} noise alone, since no file is named "
                                             "like it for the other level", True)
        else:
            why = "its name says no noise level" if says is None else \
                f"no other file is named like it, so '{says.level}' is not taken for its noise level"
            level = "" if unnamed == "both" else unnamed.partition(" ")[0]
            yield (*((spec, spec) if not level else _only(spec, level)),
                   f"'{spec.name}': {why}; it acts at {f'{level} noise alone' if level else 'both'}", says is not None)


def _partner(spec: LoRASpec, says: Level, left: Sequence[LoRASpec], names: Sequence[str]
             ) -> tuple[LoRASpec | None, str]:
    """The other file of a pair and how it was found: in the chain, in the folder, in the chain by how names begin."""
    for other in left:
        if _are_pair(says, level_of(other.name)):
            return other, "a pair"
    for name in names:
        if _are_pair(says, level_of(name)):
            return replace(spec, name=name), "a pair, the second found in the folder"
    alike = [other for other in left if says.start and (own := level_of(other.name)) is not None
             and own.level != says.level and own.start == says.start]
    return (alike[0], "a pair by how their names begin") if len(alike) == 1 else (None, "")


def _are_pair(one: Level | None, other: Level | None) -> bool:
    return one is not None and other is not None and one.level != other.level and one.rest == other.rest


def _only(spec: LoRASpec, level: str) -> tuple[LoRASpec, LoRASpec]:
    """A LoRA of one level: in the other ensemble it keeps its place, as prompts count them."""
    none = replace(spec, strength_model=0.0, strength_clip=0.0)
    return (spec, none) if level == HIGH else (none, spec)
