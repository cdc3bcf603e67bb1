"""The CLIP that tells where words are: what it hands on, through which nodes, and what it leaves as it was."""

from __future__ import annotations

import json

import comfy.hooks
import comfy.sd
import comfy_extras.nodes_clip_sdxl
import comfy_extras.nodes_flux
import comfy_extras.nodes_sd3
import pytest
import torch
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.words.known import lora_words, report
from lora_ensemble.host.words.marked import PROBE, PROMPT, WITHOUT, Marked, NotedTokens, marked
from lora_ensemble.methods.prompt import LoRAWords, find_clauses
from safetensors.torch import save_file

import nodes

from .test_words import changed, check
from .text_encoders import clip, encoded

kept: dict[str, comfy.sd.CLIP] = {}


def made(name: str) -> comfy.sd.CLIP:
    if name not in kept:
        kept[name] = clip(name)
    return kept[name]


def run(node, **inputs):
    """What a node of the host gives, of the old kind or the new."""
    if hasattr(node, "execute"):
        return node.execute(**inputs).args[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def words(prompt, *texts: str) -> list:
    return [prompt.tokens(prompt.text.index(text), prompt.text.index(text) + len(text)) for text in texts]


@pytest.mark.parametrize("name", ["SD1", "SDXL", "Flux", "Qwen-Image", "HunyuanDiT"])
@pytest.mark.parametrize("text", ["a (red:1.2) woman, ohwx", "", "a [woman] [cat:dog:0.5]"])
def test_pictures_are_unchanged(name, text):
    plain = made(name)
    one, two = encoded(plain, text), encoded(marked(plain), text)
    assert torch.equal(one[0], two[0]) and not any(changed(one, two).values())
    assert two[1].keys() - one[1].keys() == {PROMPT}
    for key, value in one[1].items():
        assert torch.equal(value, two[1][key]) if torch.is_tensor(value) else value == two[1][key]


def test_marks_are_not_encoded():
    plain = made("SD1")
    entry = encoded(marked(plain), "a [2: red woman] and [1:blue dog]")
    assert torch.equal(entry[0], encoded(plain, "a red woman and blue dog")[0])
    assert entry[1][PROMPT].rows == ((2, 11, 2), (16, 24, 1))
    with pytest.raises(ValueError, match="not closed"):
        marked(plain).tokenize("a [2: red woman")


def test_clones_stay_marked_and_the_clip_does_not_change():
    plain = made("SD1")
    before = dict(vars(plain))
    one = marked(plain, [LoRAWords("x", "ohwx")], contrast=True)
    assert isinstance(one, Marked) and isinstance(one, comfy.sd.CLIP)
    two = run(nodes.CLIPSetLastLayer, clip=one, stop_at_clip_layer=-2)
    assert isinstance(two, Marked) and two.layer_idx == -2 and one.layer_idx is None
    assert two.lora_ensemble_words == one.lora_ensemble_words and two.lora_ensemble_contrast
    assert isinstance(marked(two), Marked) and not marked(two).lora_ensemble_contrast
    assert two.lora_ensemble_contrast and marked(two).layer_idx == -2
    assert type(plain) is comfy.sd.CLIP and vars(plain) == before
    assert one.cond_stage_model is plain.cond_stage_model and one.tokenizer is plain.tokenizer
    assert one.patcher is not plain.patcher and one.patcher.model is plain.patcher.model


def test_the_host_s_encoder_nodes_hand_words_on():
    entry = run(nodes.CLIPTextEncode, clip=marked(made("SD1")), text="a red woman")[0]
    assert words(entry[1][PROMPT], "red", "woman") == [(2,), (3,)]


def test_two_texts_of_sdxl_are_one_prompt():
    node = comfy_extras.nodes_clip_sdxl.CLIPTextEncodeSDXL
    size = {"width": 8, "height": 8, "crop_w": 0, "crop_h": 0, "target_width": 8, "target_height": 8}
    long = ", ".join(["red house"] * 40)
    for one, two in (("a red woman", "blue dog"), (f"{long}, a woman", "blue dog"), ("a woman", f"{long}, a blue dog")):
        entry = run(node, clip=marked(made("SDXL")), text_g=one, text_l=two, **size)[0]
        prompt = entry[1][PROMPT]
        assert not prompt.reason and prompt.length == entry[0].shape[1]
        assert one in prompt.text and two in prompt.text
        for other in ("woman", "dog"):
            texts = {"text_g": one.replace(other, "cat"), "text_l": two.replace(other, "cat")}
            new = run(node, clip=made("SDXL"), **texts, **size)[0]
            assert changed(entry, new)[None] == set(*words(prompt, other)), (one, two, other)


def broken(clip, *texts: str):
    """What prompt-control makes of BREAK: the tokens of all texts, one behind the other."""
    tokens, *others = [clip.tokenize(text) for text in texts]
    for other in others:
        for key in tokens:
            tokens[key].extend(other[key])
    return clip.encode_from_tokens_scheduled(tokens)[0]


@pytest.mark.parametrize("name", ["SD1", "SDXL"])
def test_texts_behind_each_other(name):
    """Guard: the notes of `NotedTokens.extend`. Words are where the conditioning changes with them."""
    texts = "a red woman", "[2: blue dog], house", "bird, cat"
    entry = broken(marked(made(name)), *texts)
    prompt = entry[1][PROMPT]
    assert not prompt.reason and prompt.length == entry[0].shape[1] == 3 * 77
    assert [prompt.text[start:end] for start, end, row in prompt.rows] == ["blue dog"] and prompt.rows[0][2] == 2
    for word in ("woman", "dog", "house", "cat"):
        other = broken(made(name), *(text.replace("[2: ", "").replace("]", "").replace(word, "car") for text in texts))
        assert changed(entry, [other[0], {}])[None] == set(*words(prompt, word)) != set(), word


def test_texts_behind_each_other_without_one_of_their_clauses():
    lora = LoRAWords("x", "dog = the wolf")
    entry = broken(marked(made("SD1"), [lora], contrast=True), "a red woman", "blue dog, house")
    (first, second) = [[cond for span, cond in entry[1][WITHOUT] if entry[1][PROMPT].text[slice(*span)] == text]
                       for text in ("a red woman", "blue dog")]
    assert torch.equal(first[0][0], broken(made("SD1"), "", "blue dog, house")[0])
    assert torch.equal(second[0][0], broken(made("SD1"), "a red woman", "house")[0])
    assert torch.equal(entry[1][PROBE][0], broken(made("SD1"), "a red woman", "blue the wolf, house")[0])


def test_two_texts_of_flux_and_three_of_sd3():
    flux = run(comfy_extras.nodes_flux.CLIPTextEncodeFlux, clip=marked(made("Flux")), clip_l="a red woman",
               t5xxl="the blue dog", guidance=3.5)[0]
    assert words(flux[1][PROMPT], "red", "blue dog") == [(), (1, 2)]
    for padding in ("none", "empty_prompt"):
        sd3 = run(comfy_extras.nodes_sd3.CLIPTextEncodeSD3, clip=marked(made("SD3 without T5")), clip_l="a red woman",
                  clip_g="", t5xxl="", empty_padding=padding)[0]
        assert words(sd3[1][PROMPT], "red") == [(2,)]


def test_conditioning_nodes_keep_the_key():
    entry = run(nodes.CLIPTextEncode, clip=marked(made("SD1")), text="a red woman")
    area = run(nodes.ConditioningSetArea, conditioning=entry, width=8, height=8, x=0, y=0, strength=1.0)
    both = run(nodes.ConditioningCombine, conditioning_1=area, conditioning_2=entry)
    assert all(cond[1][PROMPT] is entry[0][1][PROMPT] for cond in both)
    other = run(nodes.ConditioningConcat, conditioning_to=entry, conditioning_from=entry)
    assert other[0][1][PROMPT].length < other[0][0].shape[1]  # so that whoever reads it can tell


def test_plain_tokens_work_and_the_reason_is_told():
    one = marked(made("SD1"))
    entry = one.encode_from_tokens_scheduled(made("SD1").tokenize("a red woman"))[0]
    assert torch.equal(entry[0], encoded(made("SD1"), "a red woman")[0])
    assert "did not reach the text encoder" in entry[1][PROMPT].reason and not entry[1][PROMPT].words
    tokens = one.tokenize("a red woman")
    tokens["l"][0][2] = (320, 1.0)
    assert "another node changed the tokens" in one.encode_from_tokens_scheduled(tokens)[0][1][PROMPT].reason
    assert isinstance(tokens["l"], NotedTokens)


def test_what_is_asked_for_without_a_dict_stays_as_it_was():
    one = marked(made("SD1"))
    tokens = one.tokenize("a red woman")
    assert torch.is_tensor(one.encode_from_tokens(tokens))
    cond, pooled = one.encode_from_tokens(tokens, return_pooled=True)
    assert torch.equal(cond, made("SD1").encode_from_tokens(tokens)) and pooled is not None
    assert [len(entry) for entry in one.tokenize("a", return_word_ids=True)["l"][0][:2]] == [3, 3]
    assert torch.is_tensor(one.encode("a red woman"))


def test_a_text_encoder_that_is_built_otherwise_only_loses_the_words(monkeypatch):
    one = marked(clip("SD1"))
    inner = type(one.cond_stage_model).encode_token_weights

    def strange(self, pairs):
        out = inner(self, pairs)
        return out[0][:, ::2] * self.clip_l.transformer.text_model.embeddings.token_embedding.weight.mean(), out[1]

    monkeypatch.setattr(type(one.cond_stage_model), "encode_token_weights", strange)
    entry = encoded(one, "a red woman")
    assert "not built as ComfyUI's own" in entry[1][PROMPT].reason and entry[0].shape[1] == 39


def test_a_schedule_of_hooks_has_the_words_in_every_part():
    one = marked(made("SD1"))
    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    one.patcher.forced_hooks = hooks
    one.use_clip_schedule = True
    one.apply_hooks_to_conds = hooks
    entries = one.encode_from_tokens_scheduled(one.tokenize("a red woman"))
    assert entries and all(words(entry[1][PROMPT], "red") == [(2,)] for entry in entries)


def test_embeddings_are_words(tmp_path):
    save_file({"clip_l": torch.randn(3, 16)}, tmp_path / "thing.safetensors")
    plain = clip("SD1", tmp_path)
    text = "a red embedding:thing, blue (embedding:thing:1.2) dog embedding:gone cat"
    prompt = encoded(marked(plain), text)[1][PROMPT]
    assert not prompt.reason
    assert words(prompt, "red", "embedding:thing,", "blue", "dog", "cat") == [(2,), (3, 4, 5, 6), (7,), (11,), (12,)]
    assert words(prompt, "embedding:gone") == [()]


@pytest.mark.parametrize("name", ["Qwen-Image", "Krea 2", "Boogu", "LongCat-Image"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_pictures_in_a_prompt_take_their_place(name, pictures):
    images = [torch.rand(1, 56, 56 * (at + 1), 3) for at in range(pictures)]
    if name == "LongCat-Image":
        images = images[:1]
    arguments = {"images": images}
    if name == "Qwen-Image":  # as TextEncodeQwenImageEditPlus does
        tokenizer = made(name).tokenizer
        arguments["llama_template"] = tokenizer.llama_template_images.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>" * pictures)
    assert check(made(name), "the red woman, ohwx dog", **arguments) >= 4


WORDS = [LoRAWords("x", "ohwx = the blue cat"), LoRAWords("y", "dog")]


def test_each_clause_has_a_conditioning_without_it():
    one, text = marked(made("SD1"), WORDS, contrast=True), "ohwx woman, (dog:1.2), old house"
    entry = encoded(one, text)
    places = [span for span, _ in entry[1][WITHOUT]]
    assert [text[start:end] for start, end in places] == ["ohwx woman", "dog", "old house"]
    assert tuple(places) == find_clauses(entry[1][PROMPT], WORDS).spans
    rests = ["(dog:1.2), old house", "ohwx woman, old house", "ohwx woman, (dog:1.2)"]
    for (_, (cond, extra)), rest in zip(entry[1][WITHOUT], rests, strict=True):
        plain = encoded(made("SD1"), rest)
        assert torch.equal(cond, plain[0]) and torch.equal(extra["pooled_output"], plain[1]["pooled_output"])
        assert extra[PROMPT].text == rest and WITHOUT not in extra
    assert WITHOUT not in encoded(marked(made("SD1"), WORDS), text)[1]


def test_stand_ins_have_a_conditioning_of_their_own():
    entry = encoded(marked(made("SD1"), WORDS), "ohwx beside the dog")
    cond, extra = entry[1][PROBE]
    assert torch.equal(cond, encoded(made("SD1"), "the blue cat beside the dog")[0])
    found = find_clauses(extra[PROMPT], WORDS)
    assert [lora.clauses[0].text for lora in found.loras] == ["the blue cat", "the dog"]
    assert [lora.tokens for lora in found.loras] == [(1, 2, 3), (5, 6)]
    assert PROBE not in encoded(marked(made("SD1"), WORDS), "a red woman")[1]


def test_tags_of_a_file_stand_in_for_its_trigger(lora_folder):
    """From the file's header to the conditioning that is read for places."""
    metadata = {"modelspec.trigger_phrase": "ohwx", "ss_tag_frequency": json.dumps({"a": {"ohwx": 9, "blue cat": 9}})}
    save_file({"x": torch.zeros(1)}, lora_folder / "tagged.safetensors", metadata)
    known = lora_words([LoRASpec("tagged.safetensors", 1.0, 1.0)])
    entry = encoded(marked(made("SD1"), known), "ohwx beside the dog")
    assert torch.equal(entry[1][PROBE][0], encoded(made("SD1"), "blue cat beside the dog")[0])
    assert torch.equal(entry[0], encoded(made("SD1"), "ohwx beside the dog")[0])
    assert '"blue cat" for "ohwx"' in report(find_clauses(entry[1][PROMPT], known))
    assert PROBE not in encoded(marked(made("SD1"), known), "ohwx cat beside the dog")[1]


def test_what_a_node_adds_is_in_all_of_them():
    one = marked(made("Flux"), WORDS, contrast=True)
    entry = run(comfy_extras.nodes_flux.CLIPTextEncodeFlux, clip=one, clip_l="ohwx", t5xxl="ohwx, dog", guidance=2.5)[0]
    others = [entry[1][PROBE], *(other for _, other in entry[1][WITHOUT])]
    assert len(others) == 3 and all(other[1]["guidance"] == entry[1]["guidance"] == 2.5 for other in others)


def test_texts_of_several_encoders_lose_a_clause_each_in_its_own():
    one = marked(made("SDXL"), [LoRAWords("x", "woman")], contrast=True)
    tokens = {**one.tokenize("red woman, house"), "l": one.tokenize("blue dog, woman")["l"]}
    entry = one.encode_from_tokens_scheduled(tokens)[0]
    assert [tuple(extra[PROMPT].text.split("\n\x1f\n")) for _, (_, extra) in entry[1][WITHOUT]] == [
        ("house", "blue dog, woman"), ("red woman, house", "blue dog")]


def test_the_text_encoder_is_not_touched():
    model = made("SD3 without T5").cond_stage_model
    encoded(made("SD3 without T5"), "a red woman")
    before = {name: (module, vars(module).keys()) for name, module in model.named_modules()}
    encoded(marked(made("SD3 without T5")), "a red woman")
    after = {name: (module, vars(module).keys()) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    for name, (module, fields) in before.items():
        assert after[name][0] is module and after[name][1] == fields, name


def test_the_testbed_s_own_tokenizer_tells_its_words():
    """One that is none of the host's, but asks another one as those do."""
    from lora_ensemble.testbed.base import Base
    from lora_ensemble.tests.comfy_testbed.wrap import wrap_clip

    text = "red pointed creature, blue robe, vexa"
    plain = wrap_clip(Base())
    entry = encoded(marked(plain), text)
    assert not entry[1][PROMPT].reason
    assert words(entry[1][PROMPT], "red pointed creature", "blue", "robe", "vexa") == [(0, 1, 2), (3,), (4,), (5,)]
    assert torch.equal(entry[0], encoded(plain, text)[0])
