"""The node Ensemble Prompt, and LoRAs named in its text."""

from __future__ import annotations

import json

import pytest
import torch
from comfy.sd import load_lora_for_models
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.names import resolved
from lora_ensemble.host.words.known import lora_words
from lora_ensemble.host.words.marked import PROBE, PROMPT, WITHOUT, marked
from lora_ensemble.methods.prompt import LoRAWords
from lora_ensemble.nodes.baselines import LoRAEnsembleMerge
from lora_ensemble.nodes.ensembles import LoRAEnsembleLoRA
from lora_ensemble.nodes.prompt import LoRAEnsemblePrompt
from safetensors.torch import save

from .builders import lora, shapes, text_layers
from .models import base
from .text_encoders import clip, encoded

TENSORS = {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def small():
    return clip("SD1")


@pytest.fixture
def files(lora_folder, raw):
    """Three files, one of them in a folder, with and without trigger words."""
    (lora_folder / "styles").mkdir(exist_ok=True)
    names = []
    for name, trigger in (("person.v2.safetensors", "ohwx"), ("Dog.safetensors", None),
                          ("styles/ghibli.safetensors", "ghibli style")):
        metadata = {"modelspec.trigger_phrase": trigger} if trigger else None
        names.append(raw(save(TENSORS, metadata), name))
    return names


def test_a_prompt_with_everything(small, files):
    person, dog, style = files
    ensemble = (LoRASpec(person, 1.0, 1.0), LoRASpec(dog, 0.5, 0.0, words="sks"))
    text = "ohwx woman with red hair beside a sks dog, in ghibli style <lora:ghibli:0.7:0.2>"
    conditioning, loras, told = LoRAEnsemblePrompt.execute(small, text, ensemble).args
    assert loras == (*ensemble, LoRASpec(style, 0.7, 0.2))
    assert told.splitlines() == [
        f'1  {person}: "ohwx woman with red hair" 5 tokens (trigger words of its file)',
        f'2  {dog}: "a sks dog" 3 tokens (its words)',
        f'3  {style}: "ghibli style" 2 tokens (trigger words of its file)']
    plain = encoded(small, "ohwx woman with red hair beside a sks dog, in ghibli style")
    assert torch.equal(conditioning[0][0], plain[0])
    assert conditioning[0][1][PROMPT].text == "ohwx woman with red hair beside a sks dog, in ghibli style"


def test_what_is_not_found_is_told(small, files):
    ensemble = (LoRASpec(files[1], 1, 1), LoRASpec(files[0], 1, 1))
    told = LoRAEnsemblePrompt.execute(small, "[2: a woman], [4: a cat]", ensemble).args[2]
    first, second, others, note = told.splitlines()
    assert first == f"1  {files[1]}: none, because no words were typed on it, nothing is marked for it, and its file " \
                    "names no trigger words"
    assert second == f'2  {files[0]}: "a woman" 2 tokens (marked in the prompt)'
    assert others == 'of no LoRA: "a cat" 2 tokens' and "names row 4, and the ensemble has 2" in note
    assert "no LoRAs" in LoRAEnsemblePrompt.execute(small, "").args[2]


def test_a_clip_that_asks_for_contrast_keeps_asking(small, files):
    ensemble = LoRAEnsembleLoRA.execute(files[1], 1.0, 1.0, "auto", words=" sks =\n the dog ").args[0]
    assert ensemble[0].words == "sks = the dog"
    conditioning = LoRAEnsemblePrompt.execute(marked(small, (), contrast=True), "sks, house", ensemble).args[0]
    assert len(conditioning[0][1][WITHOUT]) == 2 and conditioning[0][1][PROBE][1][PROMPT].text == "the dog, house"


def test_without_loras_of_its_own_it_looks_for_those_of_the_method_node(small, files):
    words = [LoRAWords("x", "sks = the dog")]
    conditioning, ensemble, told = LoRAEnsemblePrompt.execute(marked(small, words, contrast=True), "house, sks").args
    assert ensemble == () and told.splitlines()[0] == '1  x: "sks" 1 token (its words)'
    assert [span for span, _ in conditioning[0][1][WITHOUT]] == [(7, 10), (0, 5)]
    assert conditioning[0][1][PROBE][1][PROMPT].text == "house, the dog"


def test_names_may_lack_folder_and_extension(files):
    for written in ("person.v2", "person.v2.safetensors", "Person.V2"):
        assert resolved(written) == files[0]
    for written in ("styles/ghibli", "styles\\ghibli.safetensors", "ghibli", "ghibli.safetensors"):
        assert resolved(written).replace("\\", "/") == files[2]


def test_a_name_that_is_not_there_comes_with_those_that_are_close(files):
    with pytest.raises(ValueError, match="<lora:gibli> in the prompt is not in any .*Close to it: 'styles.ghibli"):
        resolved("gibli")
    with pytest.raises(ValueError, match="No name in the list is close"):
        resolved("zzzzzzzzzzzzzzzzzz")


def test_a_name_that_may_be_several_is_refused(files, raw):
    raw(save(TENSORS), "ghibli.safetensors")
    assert resolved("ghibli") == "ghibli.safetensors"
    (dog := raw(save(TENSORS), "styles/dog.safetensors"))
    assert resolved("styles/dog").replace("\\", "/") == dog
    raw(save(TENSORS), "styles/person.safetensors")
    raw(save(TENSORS), "person.sft")
    raw(save(TENSORS), "person.safetensors")
    with pytest.raises(ValueError, match="may be .*Write the folder"):
        resolved("PERSON")


@pytest.mark.parametrize(("text", "message"), [
    ("<lora:Dog:x>", "where a number belongs"), ("<lora:nowhere>", "not in any of the \u201cloras\u201d folders"),
    ("[1: ", "not closed"),
])
def test_what_is_wrong_is_said_before_the_run(files, text, message):
    assert message in LoRAEnsemblePrompt.validate_inputs(text=text)
    assert LoRAEnsemblePrompt.validate_inputs(text=None) is True
    assert LoRAEnsemblePrompt.validate_inputs(text="a <lora:Dog:1>") is True


def test_loras_of_the_text_that_change_the_text_encoder(small, loras, caplog):
    """Guard: CONDITIONING was without their change, since their method's CLIP comes behind the node that names them; a
    second node of the same text encodes with it."""
    layers = text_layers(small)
    file = {key.replace("lora_unet_", "lora_te_text_model_"): value for key, value in lora(layers, 3).items()}
    name = loras(file | lora(shapes(base("SD15")), 1), "both.safetensors")
    text = "a cat, ohwx <lora:both:0.8>"
    first, ensemble, told = LoRAEnsemblePrompt.execute(small, text).args
    assert f"CONDITIONING is without what '{name}' changes" in told and told.splitlines()[-1] in caplog.text
    _, clip_of_method = LoRAEnsembleMerge.execute(base("SD15"), ensemble, "runtime", small).args
    second, _, told = LoRAEnsemblePrompt.execute(clip_of_method, text).args
    assert "CONDITIONING" not in told and not torch.allclose(first[0][0], second[0][0], atol=1e-2)
    merged, _ = load_lora_for_models(None, small, file, 0, 0.8)[::-1]
    assert torch.allclose(second[0][0], encoded(merged, "a cat, ohwx")[0], atol=1e-4)
    assert "CONDITIONING" not in LoRAEnsemblePrompt.execute(small, "a cat <lora:both:0.8:0>").args[2]
    words = (LoRAWords("chained", "cat"), *lora_words(ensemble))
    told = LoRAEnsemblePrompt.execute(marked(clip_of_method, words), text).args[2]  # it has the LoRAs of the chain, too
    assert [line[:2] for line in told.splitlines() if "both.s" in line or "chained" in line] == ["1 ", "2 "]
    told = LoRAEnsemblePrompt.execute(marked(clip_of_method, words[:1]), text).args[2]
    assert told.startswith(f"1  {name}") and "chained" not in told


def test_without_a_text_encoder_it_says_so(files):
    with pytest.raises(ValueError, match="there is no text encoder"):
        LoRAEnsemblePrompt.execute(None, "a woman")


def test_what_is_known_of_an_ensemble(files):
    assert lora_words((LoRASpec(files[0], 1, 1, words="red"), LoRASpec(files[1], 1, 1))) == (
        LoRAWords(files[0], "red", ("ohwx",)), LoRAWords(files[1]))
    assert json.dumps([lora.phrases for lora in lora_words((LoRASpec(files[0], 1, 1, words="a = b, c"),))])
