"""Where tokens stand in a text, of a tokenizer that does not say it itself."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from ...methods.prompt_text import Range

LONG = 256
"""Characters of a text that is looked at as a whole."""
_TRIES, _CONTEXT = 8, 4  # edges that may be cuts, and how many stand before one that its tokens depend on


def spans_of_beginnings(tokens: Callable[[str], Sequence[int]], text: str, ids: Sequence[int], edges: Sequence[int]
                        ) -> list[Range]:
    """The stretch of the text in which each token ends: the tokens of a text's beginning are the beginning of its
    tokens, as far as they agree.

    tokens   what the tokenizer makes of a text; `ids` of this one
    edges    where stretches may end, ascending
    A long text is cut where the tokens behind the cut are the same whether they follow all of the text or its last few
    words: asked of every beginning, the tokenizer would read it thousands of times. Where there is no such place,
    that is done.
    """
    none = list(tokens(""))
    first = _alike(none, ids)  # what begins every text; the rest ends it
    last = len(none) - first

    def within(start: int, end: int) -> list[int]:
        found = list(tokens(text[start:end]))
        return found[first:len(found) - last]

    spans: list[Range] = [(0, 0)] * first
    parts = [(0, 0, len(text), list(ids[first:len(ids) - last]))]  # (where its context begins, start, end, tokens)
    while parts:
        context, start, end, own = parts.pop()
        inner = edges[bisect_right(edges, start):bisect_left(edges, end)]
        before = within(context, start)
        if end - start > LONG and (cut := _cut(within, inner, context, before, end, own)) is not None:
            behind, at, count = cut
            parts += [(behind, at, end, own[count:]), (context, start, at, own[:count])]
            continue
        done, at = 0, start
        for edge in inner:
            agree = _alike(within(context, edge), before + own) - len(before)
            spans += [(at, edge)] * (agree - done)
            done, at = max(done, agree), edge
        spans += [(at, end)] * (len(own) - done)
    return spans + [(len(text), len(text))] * last


def _cut(within: Callable[[int, int], list[int]], edges: Sequence[int], context: int, before: list[int], end: int,
         own: list[int]) -> tuple[int, int, int] | None:
    """(where the context of the second part begins, where the cut is, how many tokens come before it), near the middle;
    None where none was found."""
    middle = len(edges) // 2
    for k in sorted(range(_CONTEXT, len(edges)), key=lambda k: abs(k - middle))[:_TRIES]:
        at, behind = edges[k], edges[k - _CONTEXT]
        left = within(context, at)
        count = len(left) - len(before)
        if left == before + own[:count] and within(behind, end) == within(behind, at) + own[count:]:
            return behind, at, count
    return None


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers at the beginning of both are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
