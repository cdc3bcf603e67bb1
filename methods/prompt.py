"""Which words of a prompt are which LoRA's: `find_clauses`.

A prompt is a list of tags or sentences. What belongs to a LoRA is, in this order, what the user marked in the prompt
(`[2: ohwx woman]`), the words typed on the LoRA, the trigger words in its file or beside it. Words that were not marked
grow to the whole clause that holds them: a trigger alone rarely means anything to the base model.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from .prompt_search import Mention, Search
from .prompt_text import Range, blanked, pieces, replaced, spoken, unweighted


@dataclass(frozen=True)
class PromptTokens:
    """A text as it was encoded, and where each of its words is in the conditioning.

    text     without marks; weights are still in it, and all places are places in this text
    length   tokens of the conditioning
    words    (start, end, tokens), in the order of the text: a word or sign, and the positions of its tokens, none where
             it was cut off
    rows     (start, end, row): what the user marked, row 1 being the first LoRA
    reason   why the positions are not known, a sentence; then there are no words
    beside   the same for other tensors of the conditioning that hold tokens, by their key in its dict
    """

    text: str
    length: int
    words: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    rows: tuple[tuple[int, int, int], ...] = ()
    reason: str = ""
    beside: tuple[tuple[str, PromptTokens], ...] = ()

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """The sorted positions of all words that a range touches."""
        touched = range(bisect_right(self.words, start, key=lambda word: word[1]),
                        bisect_left(self.words, end, key=lambda word: word[0]))
        return tuple(sorted({token for at in touched for token in self.words[at][2]}))


@dataclass(frozen=True)
class LoRAWords:
    """What is known of one LoRA's words.

    name      as messages call it
    typed     the user's words, separated by commas; `ohwx = woman with red hair` gives ohwx a stand-in (`stand_in`)
    trigger   the trigger words that are known of it
    where     what names these
    usual     ordinary words for what it depicts, which stand in for a trigger that stands alone in its clause; none if
              nothing is known of it
    """

    name: str
    typed: str = ""
    trigger: tuple[str, ...] = ()
    usual: str = ""
    where: str = "its file"

    @property
    def phrases(self) -> tuple[tuple[str, str], ...]:
        """(phrase, its stand-in or nothing) for each part of the typed words."""
        parts = [part.partition("=") for part in unweighted(self.typed).split(",")]
        return tuple((phrase.strip(), other.strip()) for phrase, _, other in parts if phrase.strip())

    @property
    def triggers(self) -> tuple[str, ...]:
        """Each part of the trigger words."""
        return tuple(part.strip() for phrase in self.trigger for part in unweighted(phrase).split(",") if part.strip())

    @property
    def known(self) -> bool:
        """Whether anybody knows them, in a prompt or not."""
        return bool(self.phrases or self.trigger)


@dataclass(frozen=True)
class Clause:
    """Words of a prompt that belong together: `text` without weights, the sorted `tokens`, `start` and `end`."""

    text: str
    tokens: tuple[int, ...]
    start: int
    end: int

    @property
    def span(self) -> Range:
        """Its place in the text, by which it is known whoever else's clauses are looked for."""
        return self.start, self.end


@dataclass(frozen=True)
class LoRAClauses:
    """The clauses of one LoRA and their source, "marked", "typed" or "trigger"; without clauses the reason.

    instead   (trigger, the ordinary words that stand in for it where its place is sought): see `stand_in`
    where     what names its trigger words
    """

    name: str
    clauses: tuple[Clause, ...] = ()
    source: str = ""
    reason: str = ""
    instead: tuple[tuple[str, str], ...] = ()
    where: str = "its file"

    @property
    def tokens(self) -> tuple[int, ...]:
        """The sorted positions of all clauses."""
        return tuple(sorted({token for clause in self.clauses for token in clause.tokens}))


@dataclass(frozen=True)
class Found:
    """The clauses of each LoRA, in the order of the ensemble, those of no LoRA, and what the user should know."""

    loras: tuple[LoRAClauses, ...]
    others: tuple[Clause, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def spans(self) -> tuple[Range, ...]:
        """The places of all clauses in the text, each once."""
        clauses = (*(clause for lora in self.loras for clause in lora.clauses), *self.others)
        return tuple(dict.fromkeys(clause.span for clause in clauses))


def find_clauses(prompt: PromptTokens, loras: Sequence[LoRAWords]) -> Found:
    """The clauses of a prompt: whose they are, and those of no LoRA, which compete for places in the picture.

    A LoRA that was marked in the prompt has what was marked, exactly. Else every mention of the words typed on it
    counts, else every mention of its file's trigger words, each grown to its clause: up to the next comma, full stop,
    line break, preposition of place, "and" before another LoRA's words, or another LoRA's words. No token belongs to
    two LoRAs unless both were marked.
    """
    search = Search(blanked(prompt.text))
    sources: dict[int, str] = {}
    reasons: dict[int, str] = {}
    notes = []
    for start, end, row in prompt.rows:
        if row <= len(loras):
            sources[row - 1] = "marked"
            search.mentions.append(Mention(start, end, row - 1, exact=True))
        else:
            notes.append(f"[{row}: {spoken(prompt.text, start, end)}] names row {row}, and the ensemble has "
                         f"{len(loras)}: the mark belongs to no LoRA.")
    wanted = []  # longer phrases first: "red hair" must not take the words of "woman with red hair"
    for index, lora in enumerate(loras):
        if index not in sources:
            source, spans, reason = _mentions(search, lora)
            reasons[index] = reason
            sources[index] = source
            wanted += [(start - end, index, start, end) for start, end in spans]
    for _, index, start, end in sorted(wanted):
        other = search.taken(start, end)
        if other is None:
            search.mentions.append(Mention(start, end, index))
        elif other.lora != index:
            reasons[index] = (f"its words \"{spoken(prompt.text, start, end)}\" belong to {loras[other.lora].name}: "
                              f"mark in the prompt what is whose, as in [{index + 1}: ...]")
    own, rest = search.grown()
    return _resolved(prompt, search, loras, own, rest, sources, reasons, notes)


def _mentions(search: Search, lora: LoRAWords) -> tuple[str, list[Range], str]:
    """(source, mentions, the reason if there are none)."""
    typed = [phrase for phrase, _ in lora.phrases]
    for source, phrases in (("typed", typed), ("trigger", lora.triggers)):
        spans = [span for phrase in phrases for span in search.spans(phrase)]
        if spans:
            return source, spans, ""
    if typed:
        return "", [], f"its words \"{', '.join(typed)}\" are not in the prompt"
    if lora.triggers:
        return "", [], f"the trigger words of {lora.where}, \"{', '.join(lora.triggers)}\", are not in the prompt"
    return "", [], "no words were typed on it, nothing is marked for it, and its file names no trigger words"


def _resolved(prompt: PromptTokens, search: Search, loras: Sequence[LoRAWords], own: dict[int, list[Range]],
              rest: list[Range], sources: dict[int, str], reasons: dict[int, str], notes: list[str]) -> Found:
    """Ranges become clauses with tokens, each token one LoRA's."""
    owner: dict[int, int] = {}
    found: dict[int, LoRAClauses] = {}
    for index in sorted(range(len(loras)), key=lambda index: (sources[index] != "marked", index)):
        clauses = []
        for start, end in own.get(index, []):
            tokens = prompt.tokens(start, end)
            if sources[index] != "marked":
                tokens = tuple(token for token in tokens if owner.get(token, index) == index)
            owner |= dict.fromkeys(tokens, index)
            if tokens:
                clauses.append(Clause(spoken(prompt.text, start, end), tokens, start, end))
        reason = ""
        if not clauses:
            reason = prompt.reason or reasons.get(index, "")
            if own.get(index):
                shared = any(prompt.tokens(start, end) for start, end in own[index])
                reason = reason or ("its words share their tokens with another LoRA's" if shared else
                                    "the text encoder does not read as far as its words")
        found[index] = LoRAClauses(loras[index].name, tuple(clauses), sources[index] if clauses else "", reason,
                                   _instead(search, loras, index, clauses), loras[index].where)
    others = []
    for start, end in rest:
        tokens = tuple(token for token in prompt.tokens(start, end) if token not in owner)
        if tokens:
            others.append(Clause(spoken(prompt.text, start, end), tokens, start, end))
    return Found(tuple(found[index] for index in range(len(loras))), tuple(others), tuple(notes))


def _instead(search: Search, loras: Sequence[LoRAWords], index: int,
             clauses: Sequence[Clause]) -> tuple[tuple[str, str], ...]:
    """(phrase, what stands in for it) of a LoRA: as typed; else its usual words for a trigger of one word, if its
    clauses say nothing else and no other LoRA has the same usual words, which could not be told apart."""
    lora = loras[index]
    typed = tuple((phrase, other) for phrase, other in lora.phrases if other)
    if typed or not clauses or not lora.usual:
        return typed
    if any(other.usual.lower() == lora.usual.lower() for at, other in enumerate(loras) if at != index):
        return ()
    triggers = [part for part in lora.triggers if len(part.split()) == 1]
    spans = [span for trigger in triggers for span in search.spans(trigger)]
    if any(search.says_something(clause.start, clause.end, spans) for clause in clauses):
        return ()
    return tuple((trigger, lora.usual) for trigger in triggers)


def stand_in(prompt: PromptTokens, loras: Sequence[LoRAWords]) -> tuple[str, tuple[tuple[int, int, int], ...]] | None:
    """(the text with stand-in words in place of triggers, the LoRAs' clauses in it as rows), or None without any.

    A trigger that means nothing to the base model says nothing about a place; ordinary words in its stead do. In the
    prompt `ohwx beside a dog`, with `ohwx = woman with red hair` typed on the first LoRA, the clause of row 1 becomes
    `woman with red hair`. Without typed ones a LoRA's usual words stand in for a trigger that is all its clause says.
    """
    found = find_clauses(prompt, loras)
    search = Search(blanked(prompt.text))
    changes = []
    for lora in found.loras:
        for phrase, other in lora.instead:
            changes += [(start, end, other) for start, end in search.spans(phrase)
                        if any(clause.start < end and clause.end > start for clause in lora.clauses)]
    text = prompt.text
    edges = [[clause.start, clause.end, row + 1] for row, lora in enumerate(found.loras) for clause in lora.clauses]
    done = len(text)
    for start, end, other in sorted(changes, key=lambda change: (-change[0], change[0] - change[1])):
        if end > done:  # a longer phrase that begins later has been replaced already
            continue
        new = replaced(text, start, end, other)
        grown, text, done = len(new) - len(text), new, start
        for edge in edges:
            edge[0] += grown * (edge[0] >= end)
            edge[1] += grown * (edge[1] >= end)
    return (text, tuple(tuple(edge) for edge in sorted(edges))) if changes else None


def words_of(text: str) -> list[Range]:
    """The words and signs of a text, for whoever places its tokens; what says weights is none."""
    return pieces(blanked(text))
