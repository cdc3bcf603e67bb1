"""A CLIP that tells the sampler which words of a prompt are where in its conditioning.

It encodes what the CLIP that it was made of encodes, bit by bit (but for OWN), and adds keys to the dict of each
conditioning:

    PROMPT    a PromptTokens: the text, and the positions of its words
    WITHOUT   ((place of a clause in the text, conditioning without it), ...), where asked for
    PROBE     the conditioning of the prompt with stand-in words for triggers, where there are any
    OWN       an OwnTold, where LoRAs are to change the text encoder for their own words alone (own.py): then its
              tensors are those of own.py, in the conditionings of WITHOUT and PROBE too

A conditioning here is [tensor, dict], and its dict has a PROMPT of its own; None is what the encoder says of the whole
prompt and not of that text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import comfy.sd

from ...methods.prompt import LoRAWords, find_clauses, stand_in
from ...methods.prompt_text import parse_marks, without
from .notes import Note, NotedTokens, Texts, prompt_tokens
from .own import OWN, SCHEDULED, OwnDelta, on_own_words
from .spelling import by_encoder

PROMPT = "lora_ensemble_prompt"
WITHOUT = "lora_ensemble_without"
PROBE = "lora_ensemble_probe"


class Marked:
    """What `marked` adds to the class of a CLIP."""

    lora_ensemble_words: tuple[LoRAWords, ...] = ()
    lora_ensemble_contrast: bool = False
    lora_ensemble_own: tuple[OwnDelta, ...] = ()

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return _of(super().clone(*args, **kwargs), self.lora_ensemble_words, self.lora_ensemble_contrast,
                   self.lora_ensemble_own)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        """As the CLIP does, without the marks in the text. Raises ValueError for a malformed mark."""
        if not isinstance(text, str):
            return super().tokenize(text, return_word_ids, **kwargs)
        clean, rows = parse_marks(text)
        options = {**self.tokenizer_options, **kwargs.get("tokenizer_options", {})}
        return self._tokenized(Note(clean, rows, {**kwargs, "tokenizer_options": options} if options else kwargs),
                               return_word_ids)

    def _tokenized(self, note: Note, return_word_ids: bool = False) -> Any:
        tokens = super().tokenize(note.text, return_word_ids, **note.arguments)
        noted = {key: NotedTokens.of(sections, note) for key, sections in by_encoder(tokens).items()}
        if isinstance(tokens, dict):
            return {**tokens, **noted}
        return noted.get(None, tokens)

    def encode_from_tokens(self, tokens: Any, return_pooled: bool | str = False, return_dict: bool = False) -> Any:
        if not return_dict:
            return super().encode_from_tokens(tokens, return_pooled, return_dict)
        out = self._encoded(tokens, return_pooled)
        return out | self._told(tokens, out, return_pooled, self._encoded)

    def _bare(self, tokens: Any, pooled: bool | str) -> dict[str, Any]:
        return super().encode_from_tokens(tokens, pooled, True)

    def _plain(self, tokens: Any, pooled: bool | str) -> dict[str, Any]:
        """What the CLIP encodes, and where its words are."""
        out = self._bare(tokens, pooled)
        return {**out, PROMPT: prompt_tokens(self, Texts.of(tokens), out["cond"])}

    def _encoded(self, tokens: Any, pooled: bool | str) -> dict[str, Any]:
        """The same, with the LoRAs' own words encoded as was asked for."""
        out = self._plain(tokens, pooled)
        return on_own_words(self, self.lora_ensemble_own, out, out[PROMPT], lambda clip: clip._bare(tokens, pooled))

    def encode_from_tokens_scheduled(self, tokens: Any, unprojected: bool = False,
                                     add_dict: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        add_dict = dict(add_dict or {})
        entries = super().encode_from_tokens_scheduled(tokens, unprojected, add_dict, **kwargs)
        if any(PROMPT not in entry[1] for entry in entries):  # a schedule of hooks encodes without encode_from_tokens
            prompt = prompt_tokens(self, Texts.of(tokens), entries[0][0])
            told = self._told(tokens, {PROMPT: prompt}, "unprojected" if unprojected else True, self._plain)
            told |= {PROMPT: prompt, **({OWN: SCHEDULED} if self.lora_ensemble_own and prompt.words else {})}
            for entry in entries:
                entry[1].update(told)
        for _, extra in entries:  # what a node adds, as Flux's guidance, belongs to all of them
            for _, other in [*(one for _, one in extra.get(WITHOUT, ())), *([extra[PROBE]] if PROBE in extra else [])]:
                other.update(add_dict)
        return entries

    def _told(self, tokens: Any, encoded: Mapping[str, Any], pooled: bool | str,
              encode: Callable[[Any, bool | str], dict[str, Any]]) -> dict[str, Any]:
        """What a conditioning brings along besides its own words, `encoded`."""
        def entry(tokens: Any) -> list:
            out = dict.fromkeys(encoded.keys() - {"cond"}) | encode(tokens, pooled)  # None: what this text has none of
            return [out.pop("cond"), out]

        texts, prompt, told = Texts.of(tokens), encoded[PROMPT], {}
        if prompt.words and self.lora_ensemble_contrast:
            told[WITHOUT] = tuple((span, entry(texts.retold(self._tokenized, without(prompt.text, *span))))
                                  for span in find_clauses(prompt, self.lora_ensemble_words).spans)
        instead = stand_in(prompt, self.lora_ensemble_words) if prompt.words else None
        if instead:
            told[PROBE] = entry(texts.retold(self._tokenized, *instead))
        return told


@cache
def _marked(kind: type) -> type:
    return type("MarkedCLIP", (Marked, kind), {"__doc__": "A CLIP that tells where words are; see `marked`."})


def marked(clip: comfy.sd.CLIP, words: Sequence[LoRAWords] = (), contrast: bool = False,
           own: Sequence[OwnDelta] = ()) -> Any:
    """A clone of a CLIP that tells where words are, and so do its clones. The CLIP itself does not change.

    words      what is known of the LoRAs' words, in the order of the ensemble: for stand-ins and `contrast`
    contrast   whether each conditioning also brings those of the prompt without each of its clauses
    own        LoRAs that change the text encoder for their own words alone, besides those that the CLIP has already
    """
    return _of(clip.clone(), words, contrast, (*getattr(clip, "lora_ensemble_own", ()), *own))


def _of(clone: Any, words: Sequence[LoRAWords], contrast: bool, own: Sequence[OwnDelta]) -> Any:
    if not isinstance(clone, Marked):
        plain, clone = clone, object.__new__(_marked(type(clone)))
        clone.__dict__.update(plain.__dict__)
    clone.lora_ensemble_words, clone.lora_ensemble_contrast = tuple(words), contrast
    clone.lora_ensemble_own = tuple(own)
    return clone
