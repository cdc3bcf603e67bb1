"""Prompts as they come to the sampler: whose words are where among the tokens that a model gets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.routing import contrast
from ...methods.counted import counted, verb
from ...methods.prompt import LoRAClauses, LoRAWords, PromptTokens, find_clauses
from ...methods.prompt_text import Range
from ...methods.routed import Clauses, clauses_of
from ..words.marked import PROMPT, WITHOUT
from ..words.own import told_of
from .places import Area, crop

BESIDE = {"encoder_hidden_states_llama3": "conditioning_llama3", "encoder_hidden_states_t5": "conditioning_mt5xl"}
"""Further texts of a prompt: what models are called with -> what a conditioning calls it."""
_LEFT_OUT = ", so that its change of the text encoder is left out"


@dataclass
class Prompt:
    """A positive cond of a run: its clauses, which LoRAs have words in other prompts alone, and its own maps.

    length   tokens of the conditioning
    parts    per row of the clauses, which clauses of the prompt it is made of, by their places in its text
    beside   for each further text that the model gets, by its name in the conditioning: which tokens each LoRA acts on
             [LoRAs, tokens]
    found    per LoRA what was found of its words, for the report
    fixed    whether its places are those of a prompt with stand-in words: its own attention says nothing of them
    text     as it was written
    free     how far each LoRA may leave its place [pictures, LoRAs]; None as long as that is not known
    """

    clauses: Clauses
    length: int
    area: Area
    parts: tuple[tuple[Range, ...], ...] = ()
    beside: dict[str, Tensor] = field(default_factory=dict)
    found: list[dict] = field(default_factory=list)
    fixed: bool = False
    elsewhere: tuple[bool, ...] = ()
    maps: Tensor | None = None
    text: str = ""
    free: Tensor | None = None

    @property
    def asked(self) -> tuple[Hashable, ...]:
        """Per LoRA, what its place in the picture is the answer to: a part of a prompt for a part of the picture. None
        where it has no place of its own."""
        return tuple(None if clause is None or wide else
                     (self.text, self.area, tuple(self.clauses.members[clause].nonzero().flatten().tolist()))
                     for clause, wide in zip(self.clauses.own, self.clauses.everywhere, strict=True))

    @property
    def spans(self) -> tuple[Range, ...]:
        """The places of all clauses in the text, each once."""
        return tuple(dict.fromkeys(span for part in self.parts for span in part))

    def lost(self, whole: Tensor, without: Sequence[Tensor]) -> Tensor:
        """[pictures, rows of the clauses, frames, height, width]: what a prediction [pictures, C, ...] for the whole
        latent loses without each of `spans`, in the area."""
        lost, spans = contrast(crop(whole, self.area), crop(torch.stack(list(without)), self.area, 3)), self.spans
        lost = torch.stack([lost[:, [spans.index(span) for span in part]].sum(dim=1) for part in self.parts], dim=1)
        return lost if lost.ndim == 5 else lost.unsqueeze(2)


def search(entry: Mapping[str, object], words: Sequence[LoRAWords], active: Sequence[int],
           everywhere: Sequence[bool]) -> tuple[Prompt, list[str]]:
    """(the prompt of a cond as the host processed it, what the user should know).

    words        of every LoRA of the ensemble, whose rows a prompt counts
    active       which of them take part
    everywhere   per LoRA that takes part whether it acts at all places
    """
    marks, area = entry.get(PROMPT), entry.get("area")
    shape, own_words = getattr(entry.get("cross_attn"), "shape", None), told_of(entry)
    texts = [own_words.why] if own_words.why else []
    if not isinstance(marks, PromptTokens) or not marks.words:
        reason, remedy = (marks.reason or "it has none", "") if isinstance(marks, PromptTokens) else (
            "it was encoded neither with the CLIP that the method node gives nor by Ensemble Prompt, or another node "
            "has dropped what these add", ". Connect clip to the method node, and its CLIP to the prompts")
        length = shape[1] if shape is not None else 1
        return (Prompt(clauses_of(length, [()] * len(active), [], everywhere), length, area),
                [f"a prompt does not say where its words are: {reason}; LoRAs act everywhere for it{remedy}",
                 *texts])
    found, told = find_clauses(marks, words), texts
    length = marks.length if shape is None else shape[1]
    if length > marks.length:
        more = length - marks.length
        told.append(f"{counted(more, 'token')} {verb(more, 'were')} added to a prompt after it was encoded "
                    "(Conditioning Concat): no LoRA acts there, and nothing there competes for a place")
    ours = [found.loras[index] for index in active]
    # The words of LoRAs that take no part compete as those of no LoRA do.
    rest = [own.clauses for index, own in enumerate(found.loras) if own.clauses and index not in active]
    rest += [(clause,) for clause in found.others]
    clauses = clauses_of(length, [own.tokens for own in ours],
                         [sorted({token for clause in each for token in clause.tokens}) for each in rest], everywhere)
    rows = (*(own.clauses for own in ours if own.clauses), *rest)
    return Prompt(clauses, length, area, tuple(tuple(clause.span for clause in row) for row in rows),
                  {name: _words(other, ours) for name, other in marks.beside},
                  [{"lora": own.name, "words": [clause.text for clause in own.clauses], "tokens": len(own.tokens),
                    "why": own.reason + _LEFT_OUT * (own.name in own_words.left_out),
                    "sought_as": [other for _, other in own.instead],
                    **({"text_encoder": "own words"} if own.name in own_words.names and own.clauses else {})}
                   for own in ours],
                  text=marks.text), [*told, *found.notes]


@dataclass(frozen=True)
class Asked:
    """LoRAs whose share in the prompts is asked for: the words of every LoRA of the ensemble, whose rows a prompt
    counts, and which of them take part."""

    words: tuple[LoRAWords, ...]
    active: tuple[int, ...]


def shares_of(conds: Mapping[str, Sequence[Mapping]], asked: Asked | None) -> tuple[float, ...]:
    """`RunContext.shares` of the LoRAs asked for, from a guider's conds; () where these do not bring along what they
    would be without their clauses. E is the mean over the tokens of a conditioning. Of a LoRA's clauses those without
    count together, of several prompts the one that says most by it."""
    found: list[list[float]] = []
    for entry in conds.get("positive", ()) if asked is not None else ():
        marks, rests = entry.get(PROMPT), dict(entry.get(WITHOUT) or ())
        if isinstance(marks, PromptTokens) and marks.words and rests and entry.get("cross_attn") is not None:
            loras, whole = find_clauses(marks, asked.words).loras, _mean(entry["cross_attn"])
            own = [[clause.span for clause in loras[index].clauses] for index in asked.active]
            if all(span in rests for each in own for span in each):
                found.append([sum(1 - float(F.cosine_similarity(whole, _mean(rests[span][0]), dim=0)) for span in each)
                              for each in own])
    return tuple(max(column) for column in zip(*found, strict=True))


def _mean(cond: Tensor) -> Tensor:
    return cond.cpu()[0].double().mean(dim=0)  # not every accelerator has float64


def _words(text: PromptTokens, loras: Sequence[LoRAClauses]) -> Tensor:
    """[LoRAs, tokens]: which tokens of another tensor of the prompt each LoRA acts on."""
    out = torch.zeros(len(loras), text.length)
    for row, own in zip(out, loras, strict=True):
        tokens = {token for clause in own.clauses for token in text.tokens(clause.start, clause.end)}
        row[sorted(tokens)] = 1.0
        if not own.clauses:
            row[:] = 1.0
    return out


def fitted(tokens: Tensor, length: int, root: nn.Module, count: int, padding: float | None) -> Tensor:
    """[rows, length] for a text that the host has brought to `count` tokens: repeated, or padded.

    padding   value of tokens that were added; None: 1 where a row is 1 everywhere, else 0
    """
    front = bool(getattr(getattr(root, "params", None), "global_modulation", False))  # Flux 2 pads in front
    if count % length == 0 and not front:
        return tokens.repeat(1, count // length)
    more = max(count - length, 0)
    if padding is None:
        added = tokens.amin(dim=1, keepdim=True).expand(-1, more)
    else:
        added = tokens.new_full((len(tokens), more), padding)
    return torch.cat([added, tokens] if front else [tokens, added], dim=1)[:, :count]
