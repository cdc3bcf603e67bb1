"""Places that do not come from the prompt's own attention: contrast, and stand-in words."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.compose.probe import OTHER_WORDS
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses
from torch.nn import functional as F

from .builders import guided, same, sample, schedule
from .models import FAMILIES, base
from .test_masks import LAST
from .test_routed import MARKS, prompt, rests, routed, specs


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
