"""The text of a prompt: marks, `<lora:...>`, ComfyUI's weights, and what is left without some words."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_MARK = re.compile(r"\[[ \t]*(0|[1-9]\d*)[ \t]*:(?!\d\d(?!\w)|\s*\d+\s*\])\s*")  # [00:05] and [16:9] are none
_LORA = re.compile(r"<lora\b[^<>]*>?", re.IGNORECASE)
_EMPTY = re.compile(r"(?<!\\)\((?:\s*|\s*:\s*[-+\d.eE]+\s*)(?<!\\)\)")
_WEIGHTED = re.compile(r"(?<!\\)\(([^()]*):\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*(?<!\\)\)")
_EAST = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts that put no spaces between words
TOUCHING = f"{_EAST}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\uac00-\ud7a3"
"""Letters, for a pattern's brackets, that may stand at a Latin word with no space between: of scripts that put none,
and Korean, which puts particles at the ends of words."""

_PIECE = re.compile(rf"(?<!\S)embedding:[^\s<\[,]+|[^\W{_EAST}]+|\S")

Range = tuple[int, int]


class Letter(NamedTuple):
    """A character that is encoded and its place in the text; `plain` where a backslash has taken its meaning."""

    char: str
    at: int
    plain: bool = False


def parse_marks(text: str) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """(the text without its marks, what they marked): `[2: ohwx woman]` gives these words to the LoRA of row 2.

    What was marked is (start, end, row), as places in the text without marks; rows count from 1. Marks may stand in
    each other and hold other brackets. Brackets that do not begin with a number and a colon are ordinary text, and so
    are times and ratios: prompts of films are scripts.
    Raises ValueError for a mark that is not closed, is empty or names row 0.
    """
    out: list[str] = []
    open_: list[tuple[int, int, int] | None] = []  # (row, start, where it stands), None for an ordinary bracket
    rows = []
    at = 0
    while at < len(text):
        found = _MARK.match(text, at)
        if found:
            if not int(found[1]):
                raise ValueError(f"The mark '{text[at:at + 40]}' in the prompt names row 0. Rows count from 1: "
                                 "[1: ...] is for the first LoRA of the ensemble.")
            open_.append((int(found[1]), len(out), at))
            at = found.end()
            continue
        if text[at] == "[":
            open_.append(None)
        elif text[at] == "]" and open_:
            mark = open_.pop()
            if mark is not None:
                row, start, since = mark
                while len(out) > start and out[-1].isspace():
                    out.pop()
                if len(out) == start:
                    raise ValueError(f"The mark '{text[since:at + 1]}' in the prompt is empty. Write the LoRA's words "
                                     f"into it, as in [{row}: ohwx woman], or remove it.")
                rows.append((start, len(out), row))
                at += 1
                continue
        out.append(text[at])
        at += 1
    for mark in filter(None, open_):
        raise ValueError(f"The mark '{text[mark[2]:mark[2] + 40]}' in the prompt is not closed. End it with ']', as in "
                         f"[{mark[0]}: ohwx woman].")
    return "".join(out), tuple(sorted(rows))


def parse_loras(text: str) -> tuple[str, tuple[tuple[str, float, float], ...]]:
    """(the text without `<lora:name:0.8:0.5>`, what these named): (name, strength_model, strength_clip) in order.

    The second strength is the first where it is missing, the first 1. Raises ValueError for a malformed one.
    """
    loras = []
    while found := _LORA.search(text):
        loras.append(_lora(found[0]))
        text = joined(text[:found.start()], text[found.end():])
    return text, tuple(loras)


def _lora(piece: str) -> tuple[str, float, float]:
    def wrong(what: str) -> ValueError:
        return ValueError(f"'{piece[:80]}' in the prompt {what}. Write <lora:name>, <lora:name:0.8> or "
                          "<lora:name:0.8:0.5>: the file, the strength for the model and the one for the text encoder.")

    if not piece.endswith(">"):
        raise wrong("has no '>'")
    first, *parts = piece[1:-1].split(":")
    if first.lower() != "lora" or not parts or not parts[0].strip():
        raise wrong("names no file")
    if len(parts) > 3:
        raise wrong("has more than two numbers")
    strengths = []
    for part in parts[1:]:
        try:
            strengths.append(float(part))
        except ValueError:
            raise wrong(f"has '{part.strip()}' where a number belongs") from None
        if not abs(strengths[-1]) <= 100:  # as in ComfyUI's own loader; a NaN is not, either
            raise wrong(f"has '{part.strip()[:20]}' for a strength, which goes from -100 to 100")
    model = strengths[0] if strengths else 1.0
    return parts[0].strip(), model, strengths[1] if len(strengths) > 1 else model


def joined(left: str, right: str) -> str:
    """Two halves of a text whose middle was taken out, without a doubled comma or space where it was."""
    left, right = left.rstrip(" \t"), right.lstrip(" \t")
    if not left or left[-1] in ",\n(":
        while right.startswith(","):
            right = right[1:].lstrip(" \t")
    if not right.strip() or right[0] in ":)":
        left = left.rstrip(", \t")
    tight = not left or not right or left[-1] in "\n([" or right[0] in ",.;:!?\n)]"
    return left + right if tight else f"{left} {right}"


def letters(text: str, weights: bool = True) -> list[list[Letter]]:
    """What ComfyUI encodes of a text, segment by segment: all but its weights, `(red hair:1.2)`, if it reads them.

    A segment ends where a weight begins or ends. A backslash before a parenthesis is dropped in any case.
    """
    read = []
    at = 0
    while at < len(text):
        plain = text[at] == "\\" and text[at + 1:at + 2] in ("(", ")")
        at += plain
        read.append(Letter(text[at], at, plain))
        at += 1
    return _segments(read) if weights else [read]


def _segments(read: list[Letter]) -> list[list[Letter]]:
    out = []
    for item in _parentheses(read):
        if len(item) >= 2 and _is(item[0], "(") and _is(item[-1], ")"):
            inner = item[1:-1]
            colon = max((at for at, letter in enumerate(inner) if letter.char == ":"), default=0)
            if colon > 0 and _is_number("".join(letter.char for letter in inner[colon + 1:])):
                inner = inner[:colon]
            out += _segments(inner)
        else:
            out.append(item)
    return out


def _parentheses(read: list[Letter]) -> list[list[Letter]]:
    """As ComfyUI splits: a pair on the outer level is an item; what has no partner is ordinary text."""
    out: list[list[Letter]] = []
    item: list[Letter] = []
    depth = 0
    for letter in read:
        if _is(letter, "("):
            if not depth and item:
                out.append(item)
                item = []
            depth += 1
        elif _is(letter, ")"):
            depth -= 1
            if not depth:
                out.append([*item, letter])
                item = []
                continue
        item.append(letter)
    return [*out, item] if item else out


def _is(letter: Letter, char: str) -> bool:
    return letter.char == char and not letter.plain


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=16)  # each clause of a prompt asks for that of the whole text
def blanked(text: str) -> str:
    """The text with blanks for what only says weights: as long as before, so that places stay where they are."""
    out = [" "] * len(text)
    for segment in letters(text):
        for letter in segment:
            out[letter.at] = letter.char
    return "".join(out)


def unweighted(text: str) -> str:
    """A list of words without weights written out, `(ohwx woman:1.20)`, as trigger words are handed on by some nodes.
    Parentheses without a number may be part of a tag and stay."""
    while (bare := _WEIGHTED.sub(r"\1", text)) != text:
        text = bare
    return text


def spoken(text: str, start: int, end: int) -> str:
    """A range of a text for people: without what says weights, on one line."""
    chars = zip(text[start:end], blanked(text)[start:end], strict=True)
    return " ".join("".join(char for was, char in chars if was != "\\" or char == was).split())


def pieces(text: str) -> list[Range]:
    """Where the words of a text stand, and all else that is no blank, each sign by itself."""
    return [found.span() for found in _PIECE.finditer(text)]


def replaced(text: str, start: int, end: int, by: str) -> str:
    """The text with other words in a range; weights that begin or end inside it stay around them."""
    kept = {letter.at for segment in letters(text) for letter in segment}
    # Of what is not kept, a backslash goes with the parenthesis that it makes a word.
    signs = [text[at] for at in range(start, end) if at not in kept and not text[at].isspace() and text[at] != "\\"]
    opening = "".join(sign for sign in signs if sign == "(")
    return text[:start] + opening + by + "".join(sign for sign in signs if sign != "(") + text[end:]


def without(text: str, start: int, end: int) -> str:
    """The text without the words of a range, and without weights and commas that are left around nothing."""
    marker = "\x00"
    rest = replaced(text, start, end, marker)
    at = rest.index(marker)
    left, right = rest[:at], rest[at + 1:]
    while left.rstrip().endswith("(") and (closed := _EMPTY.match("(" + right)):
        left, right = left.rstrip()[:-1], right[closed.end() - 1:]
    return joined(left, right)
