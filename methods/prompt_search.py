"""One look at a prompt: where it parts into clauses, and which of them grow around mentions of LoRAs' words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from unicodedata import normalize

from .prompt_text import TOUCHING, Range

_PLACES = (
    r"(?:to|on|at|in|from) the (?:far )?(?:left|right|top|bottom|side|back|front|middle|cent(?:er|re)|background"
    r"|foreground|distance|corner)(?: (?:side|corner|half))?(?: of)?",
    r"in front of|on top of|next to|close to|far from|left of|right of|from (?:behind|above|below|the side)",
    r"in|inside|within|into|on|onto|upon|at|by|beside|besides|near|behind|under|underneath|beneath|below|above|over"
    r"|atop|between|among|amongst|amid|against|around|across|along|alongside|through|outside|opposite|beyond",
)
_PLACE = "|".join(_PLACES).replace(" ", r"\s+")
_BOUNDARY = re.compile(r"[,;\n|!?，。；、！？：]|\.(?=\s|$)|:(?=\s|$)|(?<=\s)[-–—]+(?=\s)|[–—]|<[^<>\n]*>"
                       rf"|\b(?-i:BREAK|AND)\b|(?<![\w-])(?:{_PLACE})(?![\w-])", re.IGNORECASE)
_WORD = re.compile(r"[\w'’-]+|&")
_ARTICLES = (r"a|an|the|another|one|two|three|four|five|his|her|their|its|my|your|our|some|this|that|these|those|each"
             r"|several|many")
_ARTICLE = re.compile(_ARTICLES, re.IGNORECASE)
_LINK = re.compile(r"and|or|with|but|plus|of|&", re.IGNORECASE)
_EMPTY = re.compile(rf"{_ARTICLES}|{_LINK.pattern}|is|are|was|were|be|has|have|it|he|she|they|there|who|which|to|as",
                    re.IGNORECASE)

_SIDE = re.compile(r"left|right|middle|cent(?:er|re)", re.IGNORECASE)


def _either(char: str) -> str:
    """A pattern for a letter with an accent, in one character or two, as some systems write it; else for itself."""
    apart = normalize("NFD", char)
    return re.escape(char) if apart == char else f"(?:{re.escape(char)}|{re.escape(apart)})"


@dataclass
class Mention:
    """Words of a LoRA in a prompt, [start, end); `exact`: marked, and no more than that.

    lora   its number, from 0
    """

    start: int
    end: int
    lora: int
    exact: bool = False


@dataclass
class Search:
    """One look at a prompt: `text` has blanks for weights, `mentions` never overlap but for marks."""

    text: str
    mentions: list[Mention] = field(default_factory=list)

    def spans(self, phrase: str) -> Iterator[Range]:
        """Every mention of a phrase, whatever its case; blanks and underscores are one. It is no part of a longer word,
        but may touch letters of scripts that put no spaces between words, or particles at their ends. The parentheses
        of a tag, `a (b)`, may have backslashes or not: a prompt without them means weights, which are blanks here."""
        phrase = re.sub(r"\\([()])", r"\1", phrase)
        blank = r"\s_()" if any(map(str.isalnum, phrase)) else r"\s_"
        parts = re.split(rf"([{blank}]+)", phrase.strip(" _()" if "(" in blank else " _"))
        if any(parts):
            first, last, gaps = parts[0][0], parts[-1][-1], "".join(parts[1::2])
            edges = [rf"(?<![^\W_{TOUCHING}])" if first.isascii() else "",
                     rf"(?![^\W_{TOUCHING}]|[\u0300-\u036f])" if last.isascii() else ""]
            parts[::2] = ["".join(map(_either, normalize("NFC", part))) for part in parts[::2]]
            parts[1::2] = [rf"[{blank}]+" if {"(", ")"} & {*gap} else r"[\s_]+" for gap in parts[1::2]]
            pattern = edges[0] * first.isalnum() + "".join(parts) + edges[1] * last.isalnum()
            pattern += r"(?:\s?\))?" * ("(" in gaps)  # the blank is a backslash's
            yield from (found.span() for found in re.finditer(pattern, self.text, re.IGNORECASE))

    def taken(self, start: int, end: int) -> Mention | None:
        return next((other for other in self.mentions if other.start < end and other.end > start), None)

    def segments(self) -> Iterator[Range]:
        """The parts of the text between boundaries; a boundary inside a mention is none."""
        at = 0
        inner = [found.span() for found in _BOUNDARY.finditer(self.text) if not self.taken(*found.span())]
        for start, end in [*sorted(inner + list(self._ands(inner))), (len(self.text), len(self.text))]:
            if start > at:
                yield at, start
            at = end

    def _ands(self, boundaries: list[Range]) -> Iterator[Range]:
        """The last "and" between the words of two LoRAs that no boundary parts."""
        for one, other in pairwise(sorted(self.mentions, key=lambda mention: mention.start)):
            if one.lora != other.lora and not any(one.end <= start < other.start for start, _ in boundaries):
                between = [one.end + found.start() for found in
                           re.finditer(r"(?<![\w-])(?:and|&)(?![\w-])", self.text[one.end:other.start], re.IGNORECASE)]
                if between:
                    yield between[-1], between[-1] + (1 if self.text[between[-1]] == "&" else 3)

    def cut(self, one: Mention, other: Mention) -> int:
        """Where the clause of one LoRA, which is not marked, ends and another's begins: at the last article, else in
        the middle."""
        if other.exact:
            return other.start
        words = [found for found in _WORD.finditer(self.text, one.end, other.start)]
        articles = [word.start() for word in words if _ARTICLE.fullmatch(word[0])]
        if articles:
            return articles[-1]
        nearer = [word.start() for at, word in enumerate(words) if at > len(words) - 1 - at]
        return nearer[0] if nearer else other.start

    def trimmed(self, start: int, end: int) -> Range:
        """The range without blanks and linking words at its ends."""
        while True:
            while start < end and self.text[start].isspace():
                start += 1
            while start < end and self.text[end - 1].isspace():
                end -= 1
            words = list(_WORD.finditer(self.text, start, end))
            if words and words[0].start() == start and _LINK.fullmatch(words[0][0]):
                start = words[0].end()
            elif words and words[-1].end() == end and _LINK.fullmatch(words[-1][0]):
                end = words[-1].start()
            else:
                return start, end

    def grown(self) -> tuple[dict[int, list[Range]], list[Range]]:
        """({LoRA: its clauses}, the clauses of none)."""
        own: dict[int, list[Range]] = {}
        others = []
        for start, end in self.segments():
            inside = sorted((mention for mention in self.mentions if start <= mention.start < end),
                            key=lambda mention: mention.start)
            edge = start
            for at, mention in enumerate(inside):
                after = inside[at + 1] if at + 1 < len(inside) else None
                if mention.exact:
                    others.append((edge, mention.start))
                    own.setdefault(mention.lora, []).append((mention.start, mention.end))
                    edge = max(edge, mention.end)
                elif after is None or after.lora != mention.lora:
                    border = self.cut(mention, after) if after else end
                    own.setdefault(mention.lora, []).append(self.trimmed(edge, border))
                    edge = border
            others.append((edge, end))
        return own, [span for span in (self.trimmed(*span) for span in others) if self.says_something(*span)]

    def says_something(self, start: int, end: int, but: Sequence[Range] = ()) -> bool:
        """Whether a range holds a word that means something; with `but` one that says more than what is in those ranges
        and on which side it is."""
        words = _WORD.finditer(self.text, start, end)
        return any(not _EMPTY.fullmatch(word[0]) and any(map(str.isalnum, word[0]))
                   and not (but and _SIDE.fullmatch(word[0]))
                   and not any(first <= word.start() < last for first, last in but) for word in words)
