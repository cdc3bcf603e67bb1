"""LoRAs that change the text encoder for their own words alone, against stock CLIPs that are patched by hand."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_merging import CLIPMergeSimple
from lora_ensemble.host.compose.prompts import search
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.look.report import Placed, _words
from lora_ensemble.host.words import own as own_words
from lora_ensemble.host.words.marked import PROBE, PROMPT, WITHOUT, marked
from lora_ensemble.host.words.own import OWN, OwnDelta, OwnTold, add_patches, mixed
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses
from lora_ensemble.nodes.prompt import LoRAEnsemblePrompt
from lora_ensemble.nodes.routed import LoRAEnsembleRouted

import nodes

from .builders import file_of, lora, shapes
from .models import base
from .text_encoders import NO_LOOK_AROUND, clip, encoded, numbers

WORDS = (LoRAWords("x", "ohwx"), LoRAWords("y", "dog"), LoRAWords("z", "house"))
TEXT = "a red ohwx woman, blue dog, the old sofa"
ENCODERS = pytest.mark.parametrize("name", ["SD1", "SDXL"])
kept: dict[str, comfy.sd.CLIP] = {}


def made(name: str = "SD1") -> comfy.sd.CLIP:
    """A small text encoder whose tokens see each other."""
    if name not in kept:
        kept[name], generator = clip(name), torch.Generator().manual_seed(2)
        for key, parameter in kept[name].cond_stage_model.named_parameters():
            if any(f"{part}." in key for part in NO_LOOK_AROUND):
                numbers(parameter.data, generator)
    return kept[name]


def change(name: str, seed: int) -> dict:
    """Patches of every matrix of the transformers' layers."""
    generator = torch.Generator().manual_seed(seed)
    return {key: ("diff", (torch.randn(value.shape, generator=generator) * 0.1,))
            for key, value in made(name).cond_stage_model.state_dict().items()
            if ".layers." in key and value.ndim == 2}


def patched(name: str, *which: int, layer: int | None = None) -> comfy.sd.CLIP:
    """A stock CLIP with some of the changes."""
    stock = made(name).clone()
    for seed in which:
        stock.add_patches(change(name, seed), STRENGTHS.get(seed, 1.0))
    stock.layer_idx = layer
    return stock


STRENGTHS = {1: 0.8, 2: 0.5, 3: -0.7}


def owning(name: str = "SD1", which=(1, 2, 3), contrast: bool = False, words=WORDS):
    """A CLIP with all changes merged, of which each is for the words of its own LoRA."""
    merged, own = made(name).clone(), []
    for seed in which:
        own.append(OwnDelta(words, seed - 1, add_patches(merged, change(name, seed), STRENGTHS[seed])))
    return marked(merged, words, contrast, own)


def by_hand(name: str, text: str, parts: dict[int, tuple[int, ...]], rest: tuple[int, ...] = (), **options
            ) -> torch.Tensor:
    """The encoding by a stock CLIP of the rest, at each LoRA's tokens that by a stock CLIP with its change as well."""
    out = encoded(patched(name, *rest, **options), text)[0].clone()
    for lora_, tokens in parts.items():
        out[:, list(tokens)] = encoded(patched(name, *sorted({*rest, lora_}), **options), text)[0][:, list(tokens)]
    return out


def tokens(entry: list, words=WORDS) -> dict[int, tuple[int, ...]]:
    return {at + 1: own.tokens for at, own in enumerate(find_clauses(entry[1][PROMPT], words).loras) if own.tokens}


def test_a_change_is_what_was_added_for_it():
    """In layers that another has changed before, and in none but its own; clones hold the same."""
    merged, (key, patch) = made().clone(), next(iter(change("SD1", 2).items()))
    merged.add_patches(change("SD1", 1), 1.0)
    (own,) = add_patches(merged, {key: patch}, 0.5)
    assert own[0] == 0.5 and own[1] is patch and merged.clone().patcher.patches[key][1] is own


@ENCODERS
def test_each_lora_s_words_have_its_change_alone(name):
    """The third LoRA has no words here, and changes nothing. The pooled output has all."""
    entry = encoded(owning(name), TEXT)
    own = tokens(entry)
    assert own.keys() == {1, 2} and all(own.values())
    merged = encoded(patched(name, 1, 2, 3), TEXT)
    assert torch.equal(entry[0], by_hand(name, TEXT, own))
    assert not torch.allclose(entry[0], merged[0], atol=1e-3)
    assert torch.equal(entry[1]["pooled_output"], merged[1]["pooled_output"])
    assert entry[1][OWN] == OwnTold(("x", "y"), left_out=("z",))


@ENCODERS
def test_a_lora_of_which_nobody_knows_the_words_is_merged(name):
    """In prompts with words of others and without; as the only one, too."""
    words = (*WORDS[:2], LoRAWords("z"))
    entry, negative = (encoded(owning(name, words=words), text) for text in (TEXT, "blurry"))
    assert torch.equal(entry[0], by_hand(name, TEXT, tokens(entry, words), rest=(3,)))
    assert torch.equal(negative[0], encoded(patched(name, 3), "blurry")[0])
    assert not entry[1][OWN].left_out and negative[1][OWN].left_out == ("x", "y")
    alone = encoded(owning(name, (3,), words=words), TEXT)
    assert torch.equal(alone[0], encoded(patched(name, 3), TEXT)[0]) and OWN not in alone[1]
    marks = encoded(owning(name, words=words), "[3: a red] woman")
    assert torch.equal(marks[0], by_hand(name, "a red woman", tokens(marks, words)))


@ENCODERS
def test_one_lora_and_two_mentions(name):
    """The others change nothing, or are not there: then one encoding is that of the CLIP itself."""
    text = "a red ohwx woman, the old sofa, an ohwx hat"
    for which in ((1, 2, 3), (1,)):
        entry = encoded(owning(name, which), text)
        own = tokens(entry)
        assert own.keys() == {1} and len(find_clauses(entry[1][PROMPT], WORDS).loras[0].clauses) == 2
        assert torch.equal(entry[0], by_hand(name, text, own))


def test_marks_count_and_a_token_of_two_loras_is_their_mean():
    entry = encoded(owning(), "[1: a red woman] and [2: red dog], sofa")
    assert torch.equal(entry[0], by_hand("SD1", "a red woman and red dog, sofa", tokens(entry)))
    rest, one, two = (torch.full((1, 4, 2), value) for value in (1.0, 2.0, 4.0))
    found = mixed(rest, [((1, 2), one), ((2,), two)])
    assert found[0, :, 0].tolist() == [1.0, 2.0, 3.0, 1.0]


@ENCODERS
@pytest.mark.parametrize("text", ["", "a red woman", "blurry, bad hands"])
def test_a_prompt_without_words_has_no_change(name, text):
    """But the pooled output, as that of the prompts with words. Of one LoRA alone as of several."""
    for which in ((1, 2, 3), (1,)):
        entry, merged = encoded(owning(name, which), text), encoded(patched(name, *which), text)
        assert torch.equal(entry[0], encoded(patched(name), text)[0]) and not torch.equal(entry[0], merged[0])
        assert torch.equal(entry[1]["pooled_output"], merged[1]["pooled_output"])
        assert entry[1][OWN] == OwnTold(left_out=tuple("xyz"[seed - 1] for seed in which))


def test_unknown_tokens_and_schedules_of_hooks_are_merged_and_told():
    one, merged = owning(), patched("SD1", 1, 2, 3)
    entry, = one.encode_from_tokens_scheduled(made().tokenize(TEXT))
    assert torch.equal(entry[0], encoded(merged, TEXT)[0])
    assert "merged" in entry[1][OWN].why and not entry[1][OWN].names
    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    one.patcher.forced_hooks, one.use_clip_schedule, one.apply_hooks_to_conds = hooks, True, hooks
    entries = one.encode_from_tokens_scheduled(one.tokenize(TEXT))
    assert entries and all("schedule of hooks" in extra[OWN].why for _, extra in entries)
    assert torch.equal(entries[0][0], encoded(merged, TEXT)[0])
    _, told = search({"cross_attn": entries[0][0], **entries[0][1]}, WORDS, (0, 1), (False, False))
    assert told == [entries[0][1][OWN].why]


def test_without_a_dict_it_is_merged():
    """Such a conditioning brings no words along, so that no LoRA has a place of its own either."""
    one = owning()
    assert torch.equal(one.encode_from_tokens(one.tokenize(TEXT)), encoded(patched("SD1", 1, 2, 3), TEXT)[0])


def test_weights_that_are_saved_and_merged_into_another_text_encoder_have_all_changes():
    merged, other = patched("SD1", 1, 2, 3), patched("SD1", 4)
    owns, whole = (encoded(CLIPMergeSimple().merge(other, each, 0.3)[0], TEXT) for each in (owning(), merged))
    assert torch.equal(owns[0], whole[0]) and OWN not in owns[1]
    assert not torch.equal(whole[0], encoded(CLIPMergeSimple().merge(other, made(), 0.3)[0], TEXT)[0])
    saved = []
    for one in (owning(), merged, made()):  # as CLIPSave does
        comfy.model_management.load_models_gpu([one.load_model()], force_patch_weights=True)
        saved.append({key: value.clone() for key, value in one.get_sd().items()})
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[1])
    assert any(not torch.equal(saved[2][key], saved[1][key]) for key in saved[1])


@pytest.mark.host_api
def test_clip_skip_and_a_later_loader_act_in_all_encodings():
    one = nodes.CLIPSetLastLayer().set_last_layer(owning(), -2)[0]
    one = one.clone()
    one.add_patches(change("SD1", 4), 0.9)  # as a LoRA loader behind the node does
    entry = encoded(one, TEXT)
    stock = {which: patched("SD1", *which, layer=-2) for which in ((), (1,), (2,))}
    for each in stock.values():
        each.add_patches(change("SD1", 4), 0.9)
    wanted = encoded(stock[()], TEXT)[0].clone()
    for at, rows in tokens(entry).items():
        wanted[:, list(rows)] = encoded(stock[at,], TEXT)[0][:, list(rows)]
    assert torch.equal(entry[0], wanted)
    assert not torch.allclose(wanted, by_hand("SD1", TEXT, tokens(entry)), atol=1e-3)


@pytest.mark.host_api
@ENCODERS
def test_the_host_keeps_its_books(name):
    """The weights that are loaded are those of the CLIP that is handed on, and come back to what they were."""
    plain, one = made(name), owning(name)
    before = {key: value.clone() for key, value in plain.cond_stage_model.state_dict().items()}
    first = encoded(one, TEXT)
    assert plain.cond_stage_model.current_weight_patches_uuid == one.patcher.patches_uuid
    again, merged = encoded(one, TEXT), encoded(patched(name, 1, 2, 3), TEXT)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], merged[0])
    bare = encoded(plain, TEXT)[0]
    comfy.model_management.unload_all_models()
    after = plain.cond_stage_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(encoded(plain, TEXT)[0], bare) and not plain.patcher.patches
    held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    assert sum(other is not None and other.model is plain.cond_stage_model for other in held) <= 1


def test_what_a_prompt_brings_along_is_encoded_likewise():
    words = (LoRAWords("x", "ohwx = green cat"), *WORDS[1:])
    one = marked(owning(contrast=True), words, True)
    entry = encoded(one, TEXT)
    for index, (cond, extra) in entry[1][WITHOUT]:
        text, own = extra[PROMPT].text, tokens([cond, extra])
        assert torch.equal(cond, by_hand("SD1", text, own)), index
        assert set(extra[OWN].names) == {WORDS[at - 1].name for at in own}
    cond, extra = entry[1][PROBE]
    own = tokens([cond, extra])
    assert extra[PROMPT].text == "a red green cat woman, blue dog, the old sofa" and own.keys() == {1, 2}
    assert torch.equal(cond, by_hand("SD1", extra[PROMPT].text, own))


def test_ensemble_prompt_and_a_second_node_keep_it():
    """Both hand a CLIP through; the words are those of the node that merged the LoRAs."""
    wanted = encoded(owning(), TEXT)[0]
    found = LoRAEnsemblePrompt.execute(owning(), TEXT).args[0][0]
    assert torch.equal(found[0], wanted) and found[1][OWN].names == ("x", "y")
    assert torch.equal(encoded(marked(owning().clone()), TEXT)[0], wanted)


def test_further_texts_of_a_prompt_have_it_too(monkeypatch):
    """As HiDream's, of whose tokens there is one per layer; numbers of tokens (Anima's) stay numbers."""
    spans, numbers_ = ((0, 4), (5, 8), (10, 13)), torch.arange(6)[None]

    def at(length: int, *tokens: int) -> PromptTokens:
        return PromptTokens("ohwx cat, dog", length, tuple((*span, (token,)) for span, token in zip(
            spans, tokens, strict=True)))

    prompt = replace(at(4, 0, 1, 3), beside=(("layers", at(6, 2, 3, 5)), ("ids", at(6, 2, 3, 5))))
    deltas = [OwnDelta(WORDS, index, ()) for index in (0, 1)]
    monkeypatch.setattr(own_words, "without", lambda clip, gone: sum(3 - delta.index for delta in gone))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)

    def encode(gone: int) -> dict:
        return {"cond": torch.full((1, 4, 2), float(gone)), "layers": torch.full((1, 3, 6, 2), float(gone)),
                "ids": numbers_.clone()}

    found = own_words.on_own_words(made(), deltas, encode(0), prompt, encode)
    assert found["cond"][0, :, 0].tolist() == [2, 2, 5, 3]  # without the second, without both, without the first
    assert found["layers"][0, :, :, 1].tolist() == [[5, 5, 2, 2, 5, 3]] * 3
    assert torch.equal(found["ids"], numbers_) and found["ids"].dtype == numbers_.dtype


def test_the_report_says_whose_words_were_encoded_so():
    entry = encoded(owning(), TEXT)
    prompt, told = search({"cross_attn": entry[0], **entry[1]}, WORDS, (0, 1, 2), (False,) * 3)
    assert [each.get("text_encoder") for each in prompt.found] == ["own words", "own words", None] and not told
    assert ["the text encoder is left out" in each["why"] for each in prompt.found] == [False, False, True]
    placed = Placed(("x", "y", "z"), torch.ones(1, 3, 4, 4), tuple(prompt.found), (False,) * 3)
    assert "encoded with its own change" in _words(placed, 0, placed.maps[:, 0])
    assert "encoded with" not in _words(placed, 2, placed.maps[:, 2])


# --- the node -------------------------------------------------------------------------------------------------------


def file_for(seed: int) -> dict:
    layers = {key[len("clip_l.transformer.text_model."):-len(".weight")]: value.shape
              for key, value in made().cond_stage_model.state_dict().items()
              if ".layers." in key and value.ndim == 2}
    return {**lora(shapes(base("SD15")), seed),
            **lora(layers, seed, name=lambda layer: "lora_te_text_model_" + layer.replace(".", "_"))}


def ensemble_of(loras, roles=("auto", "auto", "always")) -> tuple[LoRASpec, ...]:
    return tuple(LoRASpec(loras(file_for(seed)), 0.6, STRENGTHS[seed], words=words, role=role)
                 for seed, words, role in zip((1, 2, 3), ("ohwx", "dog", "sofa"), roles, strict=True))


def stock(specs) -> comfy.sd.CLIP:
    """A chain of the host's loaders."""
    chain = made()
    for spec in specs:
        chain = comfy.sd.load_lora_for_models(base("SD15"), chain, file_of(spec), 0, spec.strength_clip)[1]
    return chain


@pytest.mark.host_api
def test_the_node_passes_it_on(loras):
    """A LoRA that is always on is merged for the whole prompt, whatever its words."""
    ensemble, model = ensemble_of(loras), base("SD15")
    x, y, always = ensemble
    clips = [LoRAEnsembleRouted.execute(model, ensemble, "once", 2.0, 0.0, "", made(), **options).args[1]
             for options in ({}, {"text": "merged"}, {"text": "own words"})]
    entries = [encoded(each, TEXT) for each in clips]
    merged = encoded(stock((always, x, y)), TEXT)
    assert all(torch.equal(entry[0], merged[0]) and OWN not in entry[1] for entry in entries[:2])
    own, wanted = entries[2], encoded(stock([always]), TEXT)[0].clone()
    found = find_clauses(own[1][PROMPT], [LoRAWords("a", "ohwx"), LoRAWords("b", "dog"), LoRAWords("c", "sofa")]).loras
    for spec, clauses in zip((x, y), found, strict=False):
        wanted[:, list(clauses.tokens)] = encoded(stock((always, spec)), TEXT)[0][:, list(clauses.tokens)]
    assert torch.equal(own[0], wanted) and own[1][OWN].names == (x.name, y.name)


def test_nothing_to_encode_so_is_told(loras):
    model = base("SD15")
    ensemble = (LoRASpec(loras(lora(shapes(model), 1)), 0.6, 1.0, words="ohwx"),)
    for clip_, lines in ((made(), 1), (None, 1)):
        ours = LoRAEnsembleRouted.execute(model, ensemble, "once", 2.0, 0.0, "", clip_, text="own words").args[0]
        told = [line for applied in ours.get_attachment("lora_ensemble").applied for line in applied.problems]
        assert len([line for line in told if "text is 'own words'" in line]) == lines
