"""Whose words are where in a prompt as it comes to the sampler."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import torch
from lora_ensemble.host.compose.prompts import Asked, search, shares_of
from lora_ensemble.host.words.marked import PROMPT, WITHOUT
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses, words_of

WORDS = (LoRAWords("x", "ohwx"), LoRAWords("y", "sks"), LoRAWords("z", "zwx"))
TEXT = "ohwx cat, sks dog, field"  # tokens 0, 1 and a comma; 3, 4 and a comma; 6


def tokens(text: str, shift: int = 0) -> PromptTokens:
    words = tuple((*span, (token + shift,)) for token, span in enumerate(words_of(text)))
    return PromptTokens(text, len(words) + shift, words)


def cond(marks: PromptTokens, cross: torch.Tensor | None = None, **more) -> dict:
    cross = torch.zeros(1, marks.length, 4) if cross is None else cross
    return {"uuid": uuid4(), "cross_attn": cross, PROMPT: marks, **more}


def test_clauses_of_those_that_take_part_and_of_the_rest():
    """Words of LoRAs that take no part, and words of none, compete as well; a LoRA without words acts on every token of
    each text."""
    marks = replace(tokens(TEXT), beside=(("more", tokens(TEXT, 2)),))
    own = [set(clause.tokens) for lora in find_clauses(marks, WORDS).loras for clause in lora.clauses]
    prompt, told = search(cond(marks), WORDS, (0, 2), (False, False))
    assert prompt.clauses.own == (0, None) and prompt.clauses.rivals == (0, 1, 2) and told == []
    rows = [set(row.nonzero().flatten().tolist()) for row in prompt.clauses.members]
    assert rows[:2] == own and 6 in rows[2] and not rows[2] & (rows[0] | rows[1])
    beside = prompt.beside["more"]
    assert set(beside[0].nonzero().flatten().tolist()) == {token + 2 for token in own[0]} and beside[1].amin() == 1


def test_shares():
    """1 less the cosine of means; of a LoRA's clauses the sum, of several prompts the largest; none where one lacks."""
    def shown(x: float, y: float) -> dict:
        marks = tokens(TEXT)
        spans = [lora.clauses[0].span for lora in find_clauses(marks, WORDS).loras[:2]]
        whole, rests = torch.zeros(1, marks.length, 4), []
        whole[..., 0] = 1
        for span, angle in zip(spans, (x, y), strict=True):
            rest = torch.zeros_like(whole)
            rest[..., 0], rest[..., 1] = torch.tensor(angle).cos(), torch.tensor(angle).sin()
            rests.append((span, [rest, {}]))
        return cond(marks, whole, **{WITHOUT: tuple(rests)})

    def drop(entry: dict) -> dict:
        return {**entry, WITHOUT: entry[WITHOUT][:1]}

    asked = Asked(WORDS, (0, 1))
    one, other = shown(0.5, 1.0), shown(1.5, 0.2)
    want = [1 - float(torch.tensor(angle).cos()) for angle in (1.5, 1.0)]
    found = shares_of({"positive": [one, other], "negative": [shown(2.0, 2.0)]}, asked)
    assert torch.allclose(torch.tensor(found), torch.tensor(want), atol=1e-5)
    assert shares_of({"positive": [drop(one)]}, asked) == () == shares_of({"positive": [one]}, None)
    assert shares_of({"positive": [drop(one), one]}, asked) == shares_of({"positive": [one]}, asked)
