"""What stands in for a prompt: the prompt as nodes behind the text encoder have left it, with another text."""

from __future__ import annotations

from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
from lora_ensemble.host.compose.variants import in_call, own_conds, variant_of, with_variants
from lora_ensemble.host.words.marked import PROBE, PROMPT, WITHOUT
from lora_ensemble.methods.prompt import PromptTokens

MARKS = PromptTokens("ohwx cat", 3, ((0, 4, (0,)), (5, 8, (1, 2))))


def cond(**more) -> dict:
    return {"cross_attn": torch.randn(1, 3, 4), "uuid": uuid4(), "model_conds": {"c": 1}, PROMPT: MARKS, **more}


def other(tokens: int = 3, **options) -> list:
    return [torch.randn(1, tokens, 4), options]


def alone(entry: dict) -> dict:
    """What stands in for a cond with a PROBE."""
    conds = {"positive": [entry]}
    (name,) = with_variants(conds)
    return conds[name][0]


def test_every_cond_of_a_guider_has_its_own():
    clauses = (((0, 4), other()), ((5, 8), other()))
    first, second, third = cond(**{PROBE: other()}), cond(**{PROBE: other(), WITHOUT: clauses}), cond()
    fourth = cond(**{PROBE: other()})
    conds = {"positive": [first, second], "negative": [third], "middle": [fourth]}
    names = with_variants(conds)
    assert len(set(names)) == 5 and set(conds) == {"positive", "negative", "middle", *names}
    for entry, key, text in (*((each, PROBE, each[PROBE]) for each in (first, second, fourth)),
                             *((second, span, text) for span, text in clauses)):
        (found,) = conds[variant_of(entry, key)]
        assert torch.equal(found["cross_attn"], text[0])
    assert variant_of(third, PROBE) not in conds and own_conds(conds).keys() == {"positive", "negative", "middle"}


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_text_that_was_put_behind_a_prompt_stays_there(tokens):
    """Conditioning Concat: behind the last token of the prompt, however long the text is that stands in for it."""
    entry = cond(cross_attn=torch.randn(1, 7, 4).double(), **{PROBE: other(tokens)})
    found = alone(entry)["cross_attn"]
    assert torch.equal(found, torch.cat([entry[PROBE][0], entry["cross_attn"][:, 3:].float()], dim=1))
    assert found.dtype is torch.float32


def test_a_prompt_whose_words_are_not_known_has_nothing_behind_it():
    entry = cond(cross_attn=torch.randn(1, 7, 4), **{PROBE: other(), PROMPT: PromptTokens("", 3, reason="no text")})
    assert torch.equal(alone(entry)["cross_attn"], entry[PROBE][0])


def test_what_other_nodes_have_left_stays_and_what_is_of_the_text_does_not():
    entry = cond(area=(4, 4, 0, 0), control="net", mask=None, pooled_output=1, guidance=3.5, attention_mask=2,
                 **{PROBE: other(guidance=4.0, pooled_output=None), WITHOUT: ()})
    found = alone(entry)
    assert {key: found[key] for key in ("area", "control", "mask", "guidance")} == {
        "area": (4, 4, 0, 0), "control": "net", "mask": None, "guidance": 4.0}
    assert found.keys() == {"area", "control", "mask", "guidance", "cross_attn", "model_conds", "uuid", PROMPT}
    assert found["model_conds"] == {} and found["uuid"] != entry["uuid"] and entry["model_conds"] == {"c": 1}


def held(*shape: int) -> SimpleNamespace:
    """As the host holds a tensor that a model takes."""
    return SimpleNamespace(cond=torch.randn(*shape))


def test_it_is_cut_as_the_prompt_is():
    """To a context window, or without what a node has taken away; its text stays its own, as does what is of another
    shape than the prompt's."""
    text, film, more, gone, longer = held(1, 3, 4), held(1, 4, 8), held(1, 4, 8), held(1, 4), held(1, 2)
    stands = {"model_conds": {"text": held(1, 5, 4), "film": held(1, 4, 8), "more": held(1, 4, 8), "gone": gone,
                              "longer": held(1, 3), "own": held(1)}, "area": "all"}
    before = {"text": text, "film": film, "more": more, "gone": gone, "longer": longer}
    whole, now = cond(model_conds=before), {"text": text, "film": held(1, 2, 8), "more": more, "longer": held(1, 1)}
    cut = {"uuid": whole["uuid"], "model_conds": now, "area": "part", "control": "net"}
    found = in_call(stands, cut, {"negative": None, "positive": [cond(), whole]})
    own = stands["model_conds"]
    assert found["model_conds"] == {"text": own["text"], "film": now["film"], "more": own["more"],
                                    "longer": own["longer"], "own": own["own"]}
    assert (found["area"], found["control"], "mask" in found) == ("part", "net", False)


def test_a_prompt_that_is_whole_in_a_call_has_what_stands_in_for_it_as_it_is():
    stands, whole = {"model_conds": {"text": held(1)}}, cond()
    assert in_call(stands, dict(whole, area="part"), {"positive": [whole]}) is stands
    assert in_call(stands, whole, {}) is stands
