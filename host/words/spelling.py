"""From the characters of a text to its tokens.

The tokenizer of a text encoder is asked to do its work once more, on copies that remember what they were asked: which
pieces of text went to the tokenizer underneath, and which of its tokens ended where. Templates, weights, chunks,
padding, embeddings and pictures are then the host's own doing, whatever the text encoder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from ...methods.prompt_text import Letter, Range, letters, pieces
from .beginnings import spans_of_beginnings

_STAND_IN = "qzxjkv"  # stands for the user's text, to see what a template puts around it
_NEWLINE = re.compile(r"\n\s*")
_UNKNOWN = "the text encoder changes the prompt before it is tokenized"

Place = tuple[int, int]
"""(section, index) of a token among those of one encoder."""


@dataclass(eq=False)
class _Asked:
    """One text that a tokenizer was given, or the name of an embedding; `at` counts them."""

    text: str
    at: int
    by: object
    ids: Sequence[int] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    embedding: bool = False

    def spans(self) -> list[Range]:
        """Where the characters of each token stand in the text."""
        if self.embedding:
            return [(0, len(self.text))]
        if getattr(self.by, "is_fast", False):
            offsets = self.by(self.text, **self.arguments, return_offsets_mapping=True)["offset_mapping"]
            if len(offsets) == len(self.ids):
                return [(start, end) for start, end in offsets]
        edges = {end for _, end in pieces(self.text)} | {found.end() for found in _NEWLINE.finditer(self.text)}
        return spans_of_beginnings(lambda text: self.by(text, **self.arguments)["input_ids"], self.text, self.ids,
                                   sorted(edges))


class _Token(int):
    """The number of a token that knows where it comes from."""

    asked: _Asked
    index: int

    @classmethod
    def of(cls, number: int, asked: _Asked, index: int) -> _Token:
        token = cls(number)
        token.asked, token.index = asked, index
        return token


class _Embedding:
    """Stands for the tensor of an embedding, and for each of its rows."""

    index = 0

    def __init__(self, asked: _Asked, shape: Sequence[int]):
        self.asked, self.shape = asked, shape

    def __getitem__(self, _: int) -> _Embedding:
        return self


class _Listener:
    """A tokenizer of the library underneath that notes what it is asked."""

    def __init__(self, tokenizer: Any, log: list[_Asked]):
        self._tokenizer, self._log = tokenizer, log

    def __call__(self, text: str, **arguments: Any) -> dict[str, list[_Token]]:
        ids = [int(number) for number in self._tokenizer(text, **arguments)["input_ids"]]
        asked = _Asked(text, len(self._log), self._tokenizer, ids, arguments)
        self._log.append(asked)
        return {"input_ids": [_Token.of(number, asked, at) for at, number in enumerate(ids)]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def listening(tokenizer: Any, log: list[_Asked]) -> Any:
    """A copy of a text encoder's tokenizer whose work is noted in `log`; the original does not change."""
    copied = copy.copy(tokenizer)
    for name, value in vars(tokenizer).items():
        if hasattr(value, "tokenize_with_weights"):
            setattr(copied, name, listening(value, log))
        elif name == "tokenizer" and callable(value):
            copied.tokenizer = _Listener(value, log)
    find = getattr(tokenizer, "_try_get_embedding", None)
    if find is not None:
        def found(text: str) -> tuple:
            """As the host's: (embedding or None, ..., what of the text is left)."""
            out = find(text)
            name, rest = ("".join(part.split()) for part in (text, out[-1]))  # it may change the blanks of the rest
            asked = _Asked(f"embedding:{name[:len(name) - len(rest)]}", len(log), copied.tokenizer._tokenizer,
                           embedding=True)
            log.append(asked)
            return out if out[0] is None else (_Embedding(asked, out[0].shape), *out[1:])

        copied._try_get_embedding = found
    return copied


@dataclass(frozen=True)
class Spelled:
    """The tokens of one encoder: `numbers` by section, None for what is no number; `ranges` of the text by place."""

    numbers: list[list[int | None]]
    ranges: dict[Place, Range]
    reason: str = ""

    def is_of(self, tokens: Sequence[Sequence[tuple]]) -> bool:
        """Whether these are the same tokens; further sections, as some nodes append, do not matter."""
        return [[_number(entry) for entry in section] for section in tokens[:len(self.numbers)]] == self.numbers


def spell(tokenizer: Any, text: str, arguments: Mapping[str, Any]) -> dict[str | None, Spelled]:
    """The tokens of a text by encoder, as `tokenize_with_weights` names them; None where there is only one unnamed."""
    tokens, log = _tokenized(tokenizer, text, arguments)
    around, around_log = _tokenized(tokenizer, _STAND_IN, arguments)
    out = {}
    for key, sections in tokens.items():
        asked = _asked_for(sections, log)
        numbers = [[_number(entry) for entry in section] for section in sections]
        before, after, there = _template(_asked_for(around.get(key, []), around_log))
        places = _placed(asked, before, after, text) if there else {}
        if places is None:
            out[key] = Spelled(numbers, {}, _UNKNOWN)
        else:
            out[key] = Spelled(numbers, dict(_ranges(sections, places)))
    return out


def _tokenized(tokenizer: Any, text: str, arguments: Mapping[str, Any]) -> tuple[dict[str | None, list], list[_Asked]]:
    log: list[_Asked] = []
    return by_encoder(listening(tokenizer, log).tokenize_with_weights(text, **arguments)), log


def by_encoder(tokens: Any) -> dict[str | None, list]:
    """{encoder: its sections of tokens} of what a tokenizer returns, without what is not that."""
    named = tokens if isinstance(tokens, dict) else {None: tokens}
    return {key: sections for key, sections in named.items() if isinstance(sections, list) and all(
        isinstance(section, list) and all(isinstance(entry, tuple) for entry in section) for section in sections)}


def _number(entry: tuple) -> int | None:
    return int(entry[0]) if isinstance(entry[0], Integral) else None


def _asked_for(sections: Sequence[Sequence[tuple]], log: Sequence[_Asked]) -> list[_Asked]:
    """What was asked for these tokens, what gave no token in between included."""
    seen = [entry[0].asked for section in sections for entry in section if isinstance(entry[0], (_Token, _Embedding))]
    if not seen:
        return []
    first, last, by = min(asked.at for asked in seen), max(asked.at for asked in seen), seen[0].by
    return [asked for asked in log[first:last + 1] if asked.by is by]


def _template(around: Sequence[_Asked]) -> tuple[str, str, bool]:
    """(what stands before the user's text, what after it, whether it is in there at all)."""
    parts = "".join(asked.text for asked in around).split(_STAND_IN)
    return (parts[0], parts[1], True) if len(parts) == 2 else ("", "", False)


def _placed(asked: Sequence[_Asked], before: str, after: str, text: str) -> dict[tuple[int, int], int] | None:
    """{(number of what was asked, character of it): place in the text}, or None where they cannot be brought together.

    The text is read with weights, without them, and as it is: what fits is what the text encoder did.
    """
    characters = [(one.at, at) for one in asked for at in range(len(one.text))]
    whole = "".join(one.text for one in asked)
    for head in (before, before.rstrip()):  # older releases take the blank before an embedding for a part of its name
        if len(whole) >= len(head) + len(after) and whole.startswith(head) and whole.endswith(after):
            end = len(whole) - len(after)
            characters, whole = characters[len(head):end], whole[len(head):end]
            break
    readings = (lambda: [letter for segment in letters(text) for letter in segment],
                lambda: letters(text, weights=False)[0], lambda: [Letter(char, at) for at, char in enumerate(text)])
    for reading in readings:
        places = _matched(whole, reading())
        if places is not None:
            return {characters[at]: place for at, place in places}
    return None


def _matched(whole: str, reading: Sequence[Letter]) -> list[tuple[int, int]] | None:
    """[(place in `whole`, place in the text)]; only blanks may be on one side alone."""
    out = []
    at = next_ = 0
    while at < len(whole) or next_ < len(reading):
        if at < len(whole) and next_ < len(reading) and whole[at] == reading[next_].char:
            out.append((at, reading[next_].at))
            at, next_ = at + 1, next_ + 1
        elif at < len(whole) and whole[at].isspace():
            at += 1
        elif next_ < len(reading) and reading[next_].char.isspace():
            next_ += 1
        else:
            return None
    return out


def _ranges(sections: Sequence[Sequence[tuple]], places: Mapping[tuple[int, int], int]
            ) -> Iterator[tuple[Place, Range]]:
    spans: dict[int, list[Range]] = {}
    found: dict[tuple[int, int, int], Range | None] = {}  # thousands of tokens may stand for one stretch of blanks
    for section, entries in enumerate(sections):
        for index, (token, *_) in enumerate(entries):
            if isinstance(token, (_Token, _Embedding)):
                asked = token.asked
                if asked.at not in spans:
                    spans[asked.at] = asked.spans()
                stretch = (asked.at, *spans[asked.at][token.index])
                if stretch not in found:
                    at = [places[asked.at, at] for at in range(*stretch[1:]) if (asked.at, at) in places]
                    found[stretch] = (min(at), max(at) + 1) if at else None
                if found[stretch] is not None:
                    yield (section, index), found[stretch]
