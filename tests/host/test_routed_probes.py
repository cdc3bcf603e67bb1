"""Places that do not come from the prompt's own attention: contrast, and stand-in words."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.compose.probe import OTHER_WORDS
from lora_ensemble.host.words.marked import PROBE, PROMPT, Marked
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses
from node_helpers import conditioning_set_values
from torch.nn import functional as F

import nodes

from .builders import guided, same, sample, schedule
from .models import FAMILIES, base
from .test_masks import LAST
from .test_routed import MARKS, prompt, rests, routed, specs

FLUX = FAMILIES["Flux"]


@pytest.mark.parametrize("family", ["SD15", "Wan"])
def test_contrast(family, loras):
    """Places from what a prediction loses without a clause; a clause of two parts is both."""
    model = base(family)
    marks = PromptTokens("ohwx cat, sks dog, a field, ohwx hat", 5,
                         ((0, 8, (0,)), (10, 17, (1,)), (19, 26, (2,)), (28, 36, (3, 4))))
    # in the order of `rests`: two of the first LoRA, one, and the field
    others = [prompt(family, None, 20 + k)[0] for k in range(4)]
    conds = prompt(family, marks, lora_ensemble_without=rests(marks, others))
    ensemble = specs(model, loras, wanted=lambda name: name == LAST[family])
    ours = routed(model, ensemble, mode="contrast")
    found = sample(ours, family, conds, steps=2, cfg=1.0, batch=2)
    assert record_of(ours).problems == [] and [step.rows for step in record_of(ours).steps] == [2 * 5 + 2, 2]

    def predicted(cond):
        seen = []
        sample(model, family, [cond], steps=2, cfg=1.0, batch=2, callback=lambda i, x0, x, n: seen.append(x0.clone()))
        return seen[0]

    whole, without = predicted(conds[0]), torch.stack([predicted(other) for other in others])
    apart = (without - whole).square().mean(2).sqrt().transpose(0, 1)
    flat = F.avg_pool2d(apart.flatten(0, -3)[:, None], 3, 1, 1, count_include_pad=False).reshape(apart.shape)
    clauses = torch.stack([flat[:, 0] + flat[:, 1], flat[:, 2], flat[:, 3]], dim=1)
    relative = clauses / clauses.flatten(2).amax(-1).reshape(2, 3, *[1] * (clauses.ndim - 2))
    maps = (relative / relative.amax(1, keepdim=True))[:, :2] ** 2
    assert torch.allclose(places_of(ours)[0].maps, maps, atol=1e-4) and torch.isfinite(found).all()


def test_contrast_in_an_area(loras):
    """Predictions are of the whole latent, and nothing outside the area: places are those inside it. Guard: `crop` in
    `Prompt.lost`, without which the whole is squeezed into the area."""
    model, area = base("SD15"), (8, 4, 0, 4)
    others = [prompt("SD15", None, 20 + k)[0] for k in range(3)]
    conds = prompt("SD15", MARKS, lora_ensemble_without=rests(MARKS, others), area=area)
    ours = routed(model, specs(model, loras), mode="contrast")
    sample(ours, "SD15", conds, steps=1, cfg=1.0)

    def predicted(text, options) -> torch.Tensor:
        seen = []
        sample(model, "SD15", [[text, {**options, "area": area}]], steps=1, cfg=1.0,
               callback=lambda i, x0, x, n: seen.append(x0[..., 4:].clone()))
        return seen[0]

    apart = torch.stack([predicted(*other) for other in others]) - predicted(*conds[0])
    apart = F.avg_pool2d(apart.square().mean(2).sqrt(), 3, 1, 1, count_include_pad=False).transpose(0, 1)
    relative = apart / apart.flatten(2).amax(-1)[..., None, None]
    maps = (relative / relative.amax(1, keepdim=True))[:, :2] ** 2
    found = places_of(ours)[0].maps
    assert torch.allclose(found[..., 4:], maps, atol=1e-4) and not found[..., :4].any()


@pytest.mark.parametrize("words", [(), ("sks", "ohwx")], ids=["of none", "in another order"])
def test_contrast_knows_clauses_by_their_places(words, loras):
    """Whatever LoRAs the CLIP knew that encoded the prompt, as in Ensemble Prompt without an ensemble. Guard: WITHOUT
    had their numbers before, which are other ones."""
    model = base("SD15")
    by_text = {MARKS.text.index(each): prompt("SD15", None, 20 + k)[0] for k, each in enumerate(("ohwx", "sks", "a f"))}
    spans = find_clauses(MARKS, [LoRAWords(each, each) for each in words]).spans
    ours = routed(model, specs(model, loras), mode="contrast")
    found = sample(ours, "SD15", prompt("SD15", lora_ensemble_without=tuple((s, by_text[s[0]]) for s in spans)))
    assert record_of(ours).problems == []
    usual = sample(ours, "SD15", prompt("SD15", lora_ensemble_without=rests(MARKS, list(by_text.values()))))
    same(found, usual, sample(model, "SD15", prompt()), 1e-5)


def test_contrast_with_clauses_of_other_loras(loras):
    """Words that end elsewhere, or that are another LoRA's: said, and the LoRAs act everywhere."""
    model = base("SD15")
    ours = routed(model, specs(model, loras), mode="contrast")
    others = (((0, 4), prompt("SD15", None, 20)[0]), ((10, 17), prompt("SD15", None, 21)[0]))
    sample(ours, "SD15", prompt("SD15", lora_ensemble_without=others))
    problems = record_of(ours).problems
    assert problems[0] == OTHER_WORDS and "act everywhere" in problems[1] and len(problems) == 2
    assert (places_of(ours)[0].maps == 1).all()


def test_contrast_without_what_it_compares(loras):
    model = base("SD15")
    ensemble = specs(model, loras)
    ours = routed(model, ensemble, mode="contrast")
    sample(ours, "SD15", prompt(), steps=2)
    assert ["CLIP of this method node" in problem for problem in record_of(ours).problems] == [True]
    assert (places_of(ours)[0].maps == 1).all()


@pytest.mark.parametrize(("start", "rows"), [(0.0, [3, 2, 2]), (0.3, [2, 3, 2])])
@pytest.mark.parametrize("mode", ["every step", "once"])
def test_stand_in_words_say_where(mode, start, rows, loras):
    """The places are those of the prompt with ordinary words, also where a step of the base model could be read; the
    picture is drawn by the prompt as it is."""
    model = base("SD15")
    ensemble = specs(model, loras)
    other = prompt("SD15", MARKS, 30)[0]
    ours, likewise = routed(model, ensemble, mode=mode, start=start), routed(model, ensemble, mode="once", start=start)
    bare_marks = PromptTokens("ohwx, sks dog, a field", 5, MARKS.words)
    sample(ours, "SD15", prompt("SD15", bare_marks, lora_ensemble_probe=other), steps=3)
    sample(likewise, "SD15", [other], steps=3)
    if not start:  # later, the pictures are different ones by then
        assert torch.equal(places_of(ours)[0].maps, places_of(likewise)[0].maps)
    assert not (places_of(ours)[0].maps == 1).all()
    assert [step.rows for step in record_of(ours).steps] == rows and record_of(ours).problems == []


@pytest.mark.parametrize("mode", ["every step", "once"])
def test_a_prompt_that_comes_later_has_places_of_its_own(mode, loras):
    """A guider that goes on with another prompt, whose places are those of stand-in words: they are looked for when it
    comes. Guard: `RoutedLoRAs.await_stand_in`."""
    model = base("SD15")

    class Travel(comfy.samplers.CFGGuider):
        calls = 0

        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (as the host has it)
            positive, self.calls = [self.conds["positive"][self.calls > 0]], self.calls + 1
            return comfy.samplers.calc_cond_batch(self.inner_model, [positive], x, timestep, model_options)[0]

    ours = routed(model, specs(model, loras), mode=mode)
    guider = Travel(ours)
    guider.set_conds([*prompt(), *prompt("SD15", MARKS, 14, lora_ensemble_probe=prompt("SD15", MARKS, 30)[0])],
                     FAMILIES["SD15"].cond(12))
    assert torch.isfinite(guided(guider, schedule(ours, 3))).all()
    assert [step.rows for step in record_of(ours).steps] == [2, 2, 1] and record_of(ours).problems == []


# --- what other nodes have put on a prompt --------------------------------------------------------------------------


def edited(conds: list) -> list:
    """A reference picture, another guidance, an area, a time, and a text behind the prompt's."""
    conds = conditioning_set_values(conds, {"reference_latents": [FLUX.noise(size=4, seed=7)], "guidance": 2.0})
    conds = nodes.ConditioningSetArea().append(conds, 48, 48, 8, 0, 1.0)[0]
    conds = nodes.ConditioningSetTimestepRange().set_range(conds, 0.0, 0.9)[0]
    return nodes.ConditioningConcat().concat(conds, FLUX.cond(40, tokens=3))[0]


def test_stand_in_words_stand_in_the_same_picture(loras):
    """Guard: an editing model without its picture, or a film without its start, attends elsewhere."""
    model = base("Flux")
    other = prompt("Flux", MARKS, 30)[0]
    ours, likewise, bare = (routed(model, specs(model, loras), mode="once") for _ in range(3))
    sample(ours, "Flux", edited(prompt("Flux", lora_ensemble_probe=other)), steps=1)
    sample(likewise, "Flux", edited([other]), steps=1)
    sample(bare, "Flux", [other], steps=1)
    (found,), (want,), (without,) = map(places_of, (ours, likewise, bare))
    assert torch.equal(found.maps, want.maps) and not torch.allclose(found.maps, without.maps, atol=1e-2)


def test_a_prompt_is_compared_with_itself_less_a_clause(loras):
    """What nodes put on it is on both sides, and is not what they differ by."""
    model, calls = base("Flux"), []
    others = rests(MARKS, [prompt("Flux", None, 20 + k)[0] for k in range(3)])
    ours = routed(model, specs(model, loras), mode="contrast")

    def see(_, args, kwargs):
        size, guidance = tuple(args[0].shape), set(kwargs["guidance"].tolist())
        calls.append((size, kwargs["context"].shape[1], len(kwargs["ref_latents"]), guidance))

    with model.model.diffusion_model.register_forward_pre_hook(see, with_kwargs=True):
        sample(ours, "Flux", edited(prompt("Flux", lora_ensemble_without=others)), steps=1, cfg=1.0)
    alike = (16, 6, 6), 5 + 3, 1, {2.0}
    assert [(size[0], (size[1:], *rest)) for size, *rest in calls] == [(4, alike), (1, alike)]


def test_what_a_text_has_none_of_is_not_anothers(loras):
    """Of what an encoder says of a text: signs in quotation marks (ByT5), a mask of its own tokens."""
    model, seen = base("SD15"), []
    other = prompt("SD15", MARKS, 30, conditioning_byt5small=None)[0]
    conds = prompt("SD15", MARKS, lora_ensemble_probe=other, conditioning_byt5small=torch.ones(1, 2, 3),
                   attention_mask=torch.ones(1, 5), concat_mask=torch.ones(1, 1, 8, 8))

    class See(comfy.samplers.CFGGuider):
        def inner_sample(self, *args, **kwargs):
            seen.extend(self.conds.values())
            return super().inner_sample(*args, **kwargs)

    guider = See(routed(model, specs(model, loras), mode="once"))
    guider.set_conds(conds, FAMILIES["SD15"].cond(12))
    guided(guider, schedule(guider.model_patcher, 1))
    (instead,) = seen[2]
    assert "concat_mask" in instead and {"conditioning_byt5small", "attention_mask"}.isdisjoint(instead)


def test_a_text_says_what_it_has_none_of():
    """What the encoder says of a prompt and not of the text that stands in for it is None there, so that it does not
    stay the prompt's."""
    words = (LoRAWords("x", "ohwx = green cat"),)
    clip = SimpleNamespace(lora_ensemble_contrast=False, lora_ensemble_words=words, _tokenized=None)
    encoded = {"cond": 0, "pooled_output": 1, "attention_mask": 2, PROMPT: MARKS}
    told = Marked._told(clip, {}, encoded, True, lambda tokens, pooled: {"cond": 3, "pooled_output": 4})
    assert told == {PROBE: [3, {"pooled_output": 4, "attention_mask": None, PROMPT: None}]}
