"""What LoRAs do to prompts that have words of theirs: tokens, prompts without them, and texts of several parts."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods.prompt import PromptTokens
from torch import Tensor

from .builders import same, sample, stock
from .models import FAMILIES, base
from .test_routed import CLAUSES, MARKS, TEXT, bare, prompt, rests, routed, specs


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_words_have_the_lora_alone_in_layers_of_the_text(family, loras):
    """y[t] = W x[t] + sum_i s_i [t in phrase_i] B_i A_i x[t], and nothing on the negative's words."""
    names = {"SD15": r".attn2.to_k", "Flux": "txt_in"}
    model = base(family)
    ensemble = specs(model, loras, wanted=lambda name: names[family] in name)
    plus = [stock(model, [spec]).patches for spec in bare(ensemble)]
    layers = {key.removeprefix("diffusion_model.").removesuffix(".weight") for key in plus[0]}
    root, handles = model.model.diffusion_model, []
    deltas = [{name: delta(model, spec, name) for name in layers} for spec in ensemble]

    def hook(name):
        def add(module, args, out):
            (x,), text = args[:1], CLAUSES[:2].to(out)
            rows = x.shape[0] // 2 if x.shape[0] > 1 else 1
            for i in range(2):
                own = out.new_zeros(x.shape[0], x.shape[1], 1)
                own[x.shape[0] - rows:, :, 0] = text[i]
                out = out + own * (x @ deltas[i][name].T)
            return out
        return add

    for name in layers:
        handles.append(root.get_submodule(name).register_forward_hook(hook(name)))
    try:
        want = sample(model, family, prompt(family), steps=2)
    finally:
        for handle in handles:
            handle.remove()
    same(sample(routed(model, ensemble), family, prompt(family), steps=2), want,
         sample(model, family, prompt(family), steps=2), 1e-4)


def delta(model, spec: LoRASpec, layer: str) -> Tensor:
    """What a LoRA adds to a layer's weight, by the host's own loader."""
    key = f"diffusion_model.{layer}.weight"
    patched = stock(model, [LoRASpec(spec.name, spec.strength_model, 0)])
    import comfy.lora

    weight = model.model.get_parameter(key).detach().clone()
    return comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key) - weight


@pytest.mark.parametrize("family", FAMILIES)
def test_without_words_it_is_merge(family, loras):
    """No marks, or no words that are there: said, and one evaluation per step as ever."""
    model = base(family)
    ensemble = specs(model, loras)
    want, without = sample(stock(model, bare(ensemble)), family, steps=2), sample(model, family, steps=2)
    for conds, told in ((prompt(family, None), "does not say where its words are"),
                        (prompt(family, PromptTokens("a cat", 5, ((0, 1, (0,)), (2, 5, (1,))))), "not in the prompt")):
        ours = routed(model, ensemble)
        same(sample(ours, family, conds, steps=2), want, without, 1e-4)
        record = record_of(ours)
        assert any(told in problem for problem in record.problems), record.problems
        assert [step.rows for step in record.steps] == [2, 2]


def test_a_prompt_of_its_own_for_each_lora(loras):
    """Two conds that are combined: in each, the other's LoRA does nothing; the negative has both."""
    model = base("SD15")
    ensemble = specs(model, loras)
    one, two = (PromptTokens(text, 5, ((0, 4, (0, 1)), (6, 9, (2, 3)))) for text in ("ohwx, cat", "sks,  dog"))
    areas = [*prompt("SD15", one, 5, area=(8, 4, 0, 0)), *prompt("SD15", two, 6, area=(8, 4, 0, 4))]
    ours = routed(model, ensemble)
    found = sample(ours, "SD15", areas, steps=1, cfg=1.0)
    for k, half in enumerate((slice(0, 4), slice(4, 8))):
        alone = routed(model, [ensemble[k]])
        same(found[..., half], sample(alone, "SD15", areas, steps=1, cfg=1.0)[..., half],
             sample(model, "SD15", areas, steps=1, cfg=1.0)[..., half], 1e-4)
    maps = places_of(ours)[0].maps[0]
    assert (maps[0, :, 4:] == 0).all() and (maps[1, :, :4] == 0).all() and maps[0, :, :4].max() == 1
    assert record_of(ours).problems == [], "of no LoRA are words missing"


@pytest.mark.parametrize("mode", ["once", "every step", "contrast"])
def test_an_area_that_one_side_has_is_no_other_prompt_on_the_other(mode, loras):
    """The host gives the other side the area, too, under the name of the cond that has it. Guard: `with_own_names`,
    without which the negative has LoRAs at the places of the positive's words there, and the positive lacks those that
    the negative does not speak of."""
    model, negative, left = base("SD15"), FAMILIES["SD15"].cond(12), dict(area=(8, 4, 0, 0))
    ours, of_text = (routed(model, specs(model, loras, wanted=lambda name, part=part: part in name), mode=mode,
                            trust=False) for part in (".attn2.to_", ".attn2.to_k"))
    other = [prompt(marks=None, seed=20 + k)[0] for k in range(4)]
    brings = dict(lora_ensemble_without=rests(MARKS, other[:3]), lora_ensemble_probe=other[3])

    def sides(model, positive: list, negative: list) -> Tensor:
        found, model = [], model.clone()
        model.set_model_sampler_pre_cfg_function(lambda args: found.append(args["conds_out"]) or args["conds_out"])
        sample(model, "SD15", positive, negative, steps=2)
        return torch.stack([torch.stack(each) for each in found], dim=1)

    another = [*negative, *FAMILIES["SD15"].cond(13, lora_ensemble_prompt=PromptTokens("", 5), **left)]
    found, given = prompt(**brings), [*prompt(**brings), *prompt(**brings, **left)]
    assert torch.equal(sides(ours, found, another), sides(ours, given, another))
    regions = [*prompt(**brings, **left), *prompt(seed=31, **brings)]
    assert torch.equal(sides(of_text, regions, negative)[1, 0], sides(model, regions, negative)[1, 0])
    assert record_of(ours).problems == record_of(of_text).problems == []


def test_negative_prompts_and_empty_ones(loras):
    """A negative may have marks of its own; an empty prompt has no words, which is said."""
    model, kind = base("SD15"), FAMILIES["SD15"]
    ours = routed(model, specs(model, loras))
    negative = kind.cond(12, lora_ensemble_prompt=MARKS)
    found = sample(ours, "SD15", prompt(), negative, steps=2)
    assert torch.equal(found, sample(ours, "SD15", prompt(), kind.cond(12), steps=2))
    sample(ours, "SD15", prompt("SD15", PromptTokens("", 5)), steps=1)
    assert any("does not say where its words are: it has none" in problem for problem in record_of(ours).problems)


def test_text_that_was_added_is_nobodys(loras):
    """Conditioning Concat: the marks are of the first part, what is behind it is not taken for a repetition."""
    model = base("SD15")
    ours = routed(model, specs(model, loras))
    (tensor, options), = prompt()
    joined = [[torch.cat([tensor, FAMILIES["SD15"].cond(40)[0][0]], dim=1), options]]
    found = sample(ours, "SD15", joined, steps=2)
    assert torch.isfinite(found).all() and any("5 tokens were added" in line for line in record_of(ours).problems)
    wide = PromptTokens(TEXT, 10, MARKS.words)
    other = routed(model, specs(model, loras))
    assert torch.equal(found, sample(other, "SD15", [[joined[0][0], {"lora_ensemble_prompt": wide}]], steps=2))


@pytest.mark.parametrize(("marks", "tokens", "lead", "root"), [
    ([[1, 0, 0], [1, 1, 1]], 6, [1, 0, 0, 1, 0, 0], None), ([[1, 0, 0], [1, 1, 1]], 5, [1, 0, 0, 0, 0], None),
    ([[1, 0, 0], [1, 1, 1]], 6, [0, 0, 0, 1, 0, 0], "front"), ([[1, 0, 0], [1, 1, 1]], 2, [1, 0], None)])
def test_texts_that_the_host_repeats_or_fills_up(marks, tokens, lead, root):
    """In front for Flux 2, behind or over and over elsewhere. A LoRA without words acts on what was added, too."""
    from types import SimpleNamespace

    from lora_ensemble.host.compose.prompts import fitted

    model = torch.nn.Module()
    model.params = SimpleNamespace(global_modulation=root == "front")
    found = fitted(torch.tensor(marks).float(), 3, model, tokens, None)
    assert found.tolist() == [lead, [1] * tokens]
    assert fitted(torch.tensor(marks).float(), 3, model, 5, 0.0)[1].sum() == 3


def test_further_texts_have_words_of_their_own(loras):
    """HiDream's Llama reads the prompt in tokens of its own, so the words stand elsewhere there."""
    from lora_ensemble.engine.positions import Places, Segment
    from lora_ensemble.host.compose.prompts import search

    beside = PromptTokens(TEXT, 7, ((0, 4, (2,)), (5, 8, (3, 4)), (10, 13, (5,)), (14, 17, (6,))))
    marks = PromptTokens(TEXT, 5, MARKS.words, beside=(("conditioning_llama3", beside),))
    model = base("SD15")
    ensemble = routed(model, specs(model, loras)).get_attachment("lora_ensemble").applied[0].routed
    found, told = search({"lora_ensemble_prompt": marks, "cross_attn": torch.zeros(1, 5, 8)}, ensemble.words,
                         ensemble.active, ensemble.everywhere)
    assert told == [] and found.clauses.words.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    words = found.beside["conditioning_llama3"]
    assert words.tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    places = Places(torch.ones(1, 2, 2, 2), (0,), found.clauses.words[None], (0,), more={"llama": words[None]})
    segments = (Segment("text", 5), Segment("text", 7, source="llama"), Segment("text", 2, source="other"))
    assert torch.equal(places.on_tokens(segments, (0,))[0].T,
                       torch.cat([found.clauses.words, words, torch.ones(2, 2)], dim=1))
