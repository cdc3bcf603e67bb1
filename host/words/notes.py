"""Tokens that remember the text they were made of, and what becomes of its words in the conditioning."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ...methods.prompt import PromptTokens, words_of
from ...methods.prompt_text import Range
from .positions import Unknown, positions
from .spelling import Spelled, spell

_BETWEEN = "\n\x1f\n"  # between the texts of several encoders, where they have several; no prompt holds it
_NO_TEXT = "the text of the prompt did not reach the text encoder with its tokens"
_OTHER_TOKENS = "another node changed the tokens of the prompt before they were encoded"
# What the code of a text encoder that is not built as ComfyUI's own may end in when it runs with nothing behind it.
_FOREIGN = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
            ValueError)


@dataclass(frozen=True, eq=False)
class Note:
    """What the tokens of one encoder were made of: the text without marks, the marks, how it was tokenized."""

    text: str
    rows: tuple[tuple[int, int, int], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


class NotedTokens(list):
    """The sections of one encoder's tokens, with notes of what they were made of.

    A list as any other: nodes may put those of two texts into one dict, and add sections to them, of another text too
    (BREAK, as prompt-control has it): then there are notes of both.

    notes   (the first of its sections, the note) of each text
    """

    notes: tuple[tuple[int, Note], ...] = ()

    @classmethod
    def of(cls, sections: list, note: Note) -> NotedTokens:
        tokens = cls(sections)
        tokens.notes = ((0, note),)
        return tokens

    def extend(self, sections: Iterable) -> None:
        if isinstance(sections, NotedTokens):
            self.notes = (*self.notes, *((len(self) + first, note) for first, note in sections.notes))
        super().extend(sections)

    def __iadd__(self, sections: Iterable) -> NotedTokens:
        self.extend(sections)
        return self

    def __add__(self, sections: list) -> NotedTokens:
        both = NotedTokens(self)
        both.notes = self.notes
        both.extend(sections)
        return both


class Noted(NamedTuple):
    """A note, the encoder that it is of, where its text begins in that of all encoders, and the first section of its
    tokens."""

    key: str | None
    note: Note
    start: int
    first: int


@dataclass(frozen=True)
class Texts:
    """The texts of all encoders as one, and where that of each begins."""

    text: str
    rows: tuple[tuple[int, int, int], ...]
    notes: tuple[Noted, ...]
    tokens: Any

    @classmethod
    def of(cls, tokens: Any) -> Texts:
        """Of what a CLIP was given to encode; without notes where nothing of it has one."""
        named = tokens if isinstance(tokens, dict) else {None: tokens}
        starts: dict[str, int] = {}
        rows: dict[tuple[int, int, int], None] = {}
        notes = []
        text = ""
        for key, sections in named.items():
            for at, note in sections.notes if isinstance(sections, NotedTokens) else ():
                if note.text not in starts:
                    text += _BETWEEN if starts else ""
                    starts[note.text] = len(text)
                    text += note.text
                start = starts[note.text]
                rows.update({(start + first, start + last, row): None for first, last, row in note.rows})
                notes.append(Noted(key, note, start, at))
        return cls(text, tuple(rows), tuple(notes), tokens)

    def retold(self, tokenize: Callable[[Note], Any], text: str, rows: Sequence[tuple[int, int, int]] = ()) -> Any:
        """The tokens of another text of the same make, with sections that a node has appended."""
        parts = text.split(_BETWEEN)
        old = sorted({each.start for each in self.notes})
        named = self.tokens if isinstance(self.tokens, dict) else {None: self.tokens}
        made: dict[str | None, list] = {}
        for key, note, start, at in self.notes:
            part = parts[old.index(start)]
            first = sum(len(before) + len(_BETWEEN) for before in parts[:old.index(start)])
            own = tuple((begin - first, end - first, row) for begin, end, row in rows
                        if first <= begin and end <= first + len(part))
            new, same = (_section(tokenize(each), key) for each in (Note(part, own, note.arguments), note))
            following = [each.first for each in self.notes if each.key == key and each.first > at]
            new.extend(named[key][at + len(same):min(following, default=None)])
            made[key] = made[key] + new if key in made else new
        return {**named, **made} if isinstance(self.tokens, dict) else made[None]


def _section(tokens: Any, key: str | None) -> NotedTokens:
    return tokens if key is None else tokens[key]


def prompt_tokens(clip: Any, texts: Texts, cond: Tensor) -> PromptTokens:
    """Where the words of the texts are in a conditioning that was encoded from their tokens, or why that is not known.

    clip    for its tokenizer and the code of its text encoder
    cond    [1, tokens, channels]
    """
    length = cond.shape[-2]

    def unknown(reason: str) -> PromptTokens:
        return PromptTokens(texts.text, length, rows=texts.rows, reason=reason)

    if not texts.notes:
        return unknown(_NO_TEXT)
    if not texts.text.strip():
        return PromptTokens(texts.text, length)
    spelled: dict[int, dict[str | None, Spelled]] = {}
    tensors: dict[str | None, tuple[int, list[tuple[Range, tuple[int, ...]]]]] = {None: (length, [])}
    try:
        for key, note, start, at in texts.notes:
            if id(note) not in spelled:
                spelled[id(note)] = spell(clip.tokenizer, note.text, note.arguments)
            own = spelled[id(note)][key]
            if own.reason:
                return unknown(own.reason)
            if not own.is_of(_section(texts.tokens, key)[at:]):
                return unknown(_OTHER_TOKENS)
            for name, (size, places) in positions(clip.cond_stage_model, texts.tokens, key, length).items():
                spans = tensors.setdefault(name, (size, []))[1]
                spans += [((start + first, start + last), places[at + section, index])
                          for (section, index), (first, last) in own.ranges.items() if (at + section, index) in places]
    except Unknown as error:
        return unknown(str(error))
    except _FOREIGN as error:
        return unknown(f"this text encoder is not built as ComfyUI's own are ({type(error).__name__}: {error})")
    words = {name: _words(texts.text, spans) for name, (_, spans) in tensors.items()}
    beside = tuple((name, PromptTokens(texts.text, size, words[name], texts.rows))
                   for name, (size, spans) in tensors.items() if name is not None and spans)
    if not tensors[None][1] and not beside:
        return unknown("no word of the prompt has a token in the conditioning")
    return PromptTokens(texts.text, length, words[None], texts.rows, beside=beside)


def _words(text: str, spans: Sequence[tuple[Range, tuple[int, ...]]]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Each word with the positions of all tokens that touch it. A blank that is a token of its own belongs to the word
    after it, unless a line ends between them."""
    words = words_of(text)
    starts, ends = [start for start, _ in words], [end for _, end in words]
    tokens: list[set[int]] = [set() for _ in words]
    for (first, last), places in spans:
        touched = range(bisect_right(ends, first), bisect_left(starts, last))
        if not touched and touched.start < len(words) and _is_blank(text[first:starts[touched.start]]):
            touched = range(touched.start, touched.start + 1)
        for word in touched:
            tokens[word].update(places)
    return tuple((start, end, tuple(sorted(own))) for (start, end), own in zip(words, tokens, strict=True))


def _is_blank(text: str) -> bool:
    return not text.strip() and "\n" not in text
