"""LoRAs that act where their words are, in the host's own models: what is read, where it acts, and what it costs."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
from lora_ensemble.host.compose import attention
from lora_ensemble.host.compose.apply import apply_method
from lora_ensemble.host.compose.attention import OVERRIDE
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.compose.placing import Placing
from lora_ensemble.host.families.attention import chosen, joint
from lora_ensemble.host.families.token_order import token_order
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses
from lora_ensemble.methods.routed import Routing
from lora_ensemble.methods.switch import Switch
from lora_ensemble.tests.operations import Operations
from torch import Tensor
from torch.nn import functional as F

from .any_model import any_model, latent_of, prompt_of
from .builders import lora, plain, same, sample, shapes, stock
from .disturbed import skipped_where_older
from .models import FAMILIES, base
from .small_video import SMALL
from .test_masks import LAST
from .test_parity_families import NAME, layers_of

TEXT = "ohwx cat, sks dog, a field"
MARKS = PromptTokens(TEXT, 5, ((0, 4, (0,)), (5, 8, (1,)), (10, 13, (2,)), (14, 17, (3,)), (21, 26, (4,))))
CLAUSES = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
HALF = torch.zeros(1, 8, 8)
HALF[..., :4] = 1


def specs(model, loras, words=("ohwx", "sks"), wanted=lambda name: True, **options) -> list[LoRASpec]:
    layers = shapes(model, wanted)
    return [LoRASpec(loras(lora(layers, seed, 4)), strength, 0, words=typed, **options)
            for seed, strength, typed in zip((1, 2), (0.8, 0.6), words, strict=True)]


def routed(model, ensemble, make=Merge, **options):
    return apply_method(model, None, tuple(ensemble), plain(make), "Routed LoRAs",
                        placing=Placing("words", Routing(**options)))[0]


def prompt(family: str = "SD15", marks: PromptTokens | None = MARKS, seed: int = 11, **options) -> list:
    return FAMILIES[family].cond(seed, **({} if marks is None else {"lora_ensemble_prompt": marks}), **options)


def rests(marks: PromptTokens, conds: list, words=("ohwx", "sks")) -> tuple:
    """What a conditioning brings for contrast: conds for the prompt without each of its clauses, those of LoRAs with
    these words first."""
    spans = find_clauses(marks, [LoRAWords(each, each) for each in words]).spans
    return tuple(zip(spans, conds, strict=True))


def bare(ensemble: list[LoRASpec]) -> list[LoRASpec]:
    return [LoRASpec(spec.name, spec.strength_model, 0) for spec in ensemble]


def read_by_hand(model, family: str, conds: list, gamma: float = 2.0, batch: int = 1) -> Tensor:
    """Where the first two clauses are, [pictures, 2, height, width], from q and k of one evaluation of the base."""
    root, calls, options = model.model.diffusion_model, [], []

    def override(func, q, k, v, heads, *args, **kwargs):
        split = kwargs.get("skip_reshape", False)
        calls.append([t if split else t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k)])
        return func(q, k, v, heads, *args, **kwargs)

    def begin(_, args, kwargs):
        options.append(token_order(root).begin(args[0], kwargs).streams)

    seen = model.clone()
    seen.model_options["transformer_options"][OVERRIDE] = override
    with root.register_forward_pre_hook(begin, with_kwargs=True):
        sample(seen, family, conds, steps=1, cfg=1.0, batch=batch)
    found = [(where, q, k) for q, k in calls
             if (where := joint(root, options[0], q.shape[2], k.shape[2])) is not None]
    maps = []
    for where, q, k in [found[i] for i in chosen(root, len(found))]:
        q, k = q.double()[:, :, slice(*where.picture)], k.double()[:, :, slice(*where.text)]
        text = (q @ k.mT * q.shape[-1]**-0.5).softmax(-1).mean(1)
        maps.append(torch.einsum("rpt,ct->rcp", text, CLAUSES.double()).unflatten(-1, where.grid).float())
    grid = max((each.shape[2:] for each in maps), key=lambda size: size.numel())
    attention = torch.stack([F.interpolate(each, grid, mode="trilinear") for each in maps]).mean(0)
    relative = attention / attention.flatten(2).amax(-1)[..., None, None, None]
    shares = (relative / relative.amax(1, keepdim=True))[:, :2] ** gamma
    return F.interpolate(shares, (grid[0], 8, 8), mode="trilinear")


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("family", LAST)
def test_each_lora_acts_where_its_clause_is(family, cfg, loras):
    """In a layer behind all attention: base + sum of m_i times what LoRA i does there, for both sides of guidance."""
    model, kind = base(family), FAMILIES[family]
    ensemble = specs(model, loras, wanted=lambda name: name == LAST[family])
    ours = routed(model, ensemble)
    found = sample(ours, family, prompt(family), cfg=cfg, steps=1, batch=2)
    maps = read_by_hand(model, family, prompt(family), batch=2)
    alone = [sample(stock(model, [spec]), family, prompt(family), cfg=cfg, steps=1, batch=2) for spec in bare(ensemble)]
    without = sample(model, family, prompt(family), cfg=cfg, steps=1, batch=2)
    maps = maps if kind.frames else maps.squeeze(2)
    if family in ("Flux", "SD3", "Wan"):  # the layer is one of patches of two by two places
        patches = F.avg_pool3d(maps, (1, 2, 2)) if kind.frames else F.avg_pool2d(maps, 2)
        maps = patches.repeat_interleave(2, -1).repeat_interleave(2, -2)
    want = without + sum(maps[:, i:i + 1] * (picture - without) for i, picture in enumerate(alone))
    same(found, want, without, 1e-4)
    (placed,) = places_of(ours)
    assert record_of(ours).problems == [] and placed.names == tuple(spec.name for spec in ensemble)
    assert [(each["lora"], each["words"], each["tokens"]) for each in placed.found] == [
        (ensemble[0].name, ["ohwx cat"], 2), (ensemble[1].name, ["sks dog"], 2)]


@pytest.mark.parametrize("family", ["SD15", "Flux", "Wan"])
def test_maps_of_ones_are_the_chain_of_loaders(family, loras):
    """gamma 0, and a prompt that is one LoRA's words alone."""
    model = base(family)
    marks = PromptTokens("ohwx cat on a mat", 5, tuple((3 * k, 3 * k + 2, (k,)) for k in range(5)), ((0, 17, 1),))
    ensemble = specs(model, loras)[:1]
    ours = routed(model, ensemble, gamma=0.0)
    found = sample(ours, family, prompt(family, marks), cfg=1.0, steps=2)
    same(found, sample(stock(model, bare(ensemble)), family, prompt(family, marks), cfg=1.0, steps=2),
         sample(model, family, prompt(family, marks), cfg=1.0, steps=2), 1e-4)


@pytest.mark.parametrize(("options", "rows"), [
    ({"mode": "once"}, [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]), ({"mode": "every step"}, [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
    ({"mode": "every step", "start": 0.1}, [2] * 10), ({"mode": "once", "start": 0.1}, [2] * 10),
    ({"mode": "once", "gamma": 0.0}, [2] * 10)])  # there is nothing to look for
def test_evaluations(options, rows, loras):
    model = base("SD15")
    ours = routed(model, specs(model, loras), **options)
    sample(ours, conds := "SD15", prompt(conds), steps=10)
    assert [step.rows for step in record_of(ours).steps] == rows
    places = [tuple(step.notes["Merge"]["places"]) for step in record_of(ours).steps]
    if options.get("start"):
        assert places[0] == (0, 0)  # the base alone, whose attention says where
    assert (len(set(places[1:])) > 1) is (options["mode"] == "every step")


def test_before_the_start_the_base_draws(loras):
    model = base("SD15")
    ours = routed(model, specs(model, loras), start=0.5)
    seen, want = [], []
    sample(ours, "SD15", prompt(), steps=2, callback=lambda step, x0, x, total: seen.append(x0.clone()))
    sample(model, "SD15", prompt(), steps=2, callback=lambda step, x0, x, total: want.append(x0.clone()))
    assert torch.equal(seen[0], want[0]) and not torch.allclose(seen[1], want[1], atol=1e-3)


def test_a_start_that_is_no_step_is_said(loras):
    """0.04 of ten steps is none, and the LoRAs act from the first one on; of twenty it is one."""
    model = base("SD15")
    ours = routed(model, specs(model, loras), start=0.04)
    at_once = sample(ours, steps=10, positive=prompt())
    assert [line for line in record_of(ours).problems if "start is 0.04, less than half a step of 10" in line]
    assert torch.equal(at_once, sample(routed(model, specs(model, loras)), steps=10, positive=prompt()))
    sample(ours, steps=20, positive=prompt())
    assert record_of(ours).problems == []
    half = routed(model, specs(model, loras), start=0.5)
    sample(half, steps=1, positive=prompt())
    assert [line for line in record_of(half).problems if "start is 0.5, and the run has one step alone" in line]


@pytest.mark.parametrize("mode", ["every step", "once"])
def test_pictures_have_places_of_their_own(mode, loras):
    model = base("SD15")
    ours = routed(model, specs(model, loras), mode=mode)
    noise = FAMILIES["SD15"].noise(3, seed=1)
    both = sample(ours, "SD15", prompt(), batch=3, steps=3)
    maps = places_of(ours)[0].maps
    assert maps.shape == (3, 2, 8, 8) and not torch.allclose(maps[0], maps[1], atol=1e-3)
    for i in range(3):
        import comfy.sample

        with torch.inference_mode():
            alone = comfy.sample.sample(ours, noise[i:i + 1], 3, 3.0, "euler", "normal", prompt(),
                                        FAMILIES["SD15"].cond(12), torch.zeros_like(noise[:1]), disable_pbar=True,
                                        seed=1)
        same(both[i:i + 1], alone, sample(model, "SD15", prompt(), batch=3, steps=3)[i:i + 1], 1e-3)


def test_a_mask_by_hand_beats_the_words(loras):
    model = base("SD15")
    ensemble = specs(model, loras, wanted=lambda name: name == LAST["SD15"])
    masked = [LoRASpec(ensemble[0].name, 0.8, 0, words="ohwx", mask=Mask(HALF)), ensemble[1]]
    ours = routed(model, masked, mode="once")
    sample(ours, "SD15", prompt(), steps=1)
    first, second = places_of(ours)[0].maps[0]
    other = routed(model, ensemble, mode="once")
    sample(other, "SD15", prompt(), steps=1)
    assert torch.equal(first, HALF[0]) and torch.equal(second, places_of(other)[0].maps[0, 1])


def test_masks_for_all_need_no_looking(loras):
    model = base("SD15")
    ours = routed(model, [LoRASpec(spec.name, spec.strength_model, 0, words=spec.words, mask=Mask(mask))
                          for spec, mask in zip(specs(model, loras), (HALF, 1 - HALF), strict=True)])
    sample(ours, "SD15", prompt(), steps=2)
    assert [step.rows for step in record_of(ours).steps] == [2, 2] and record_of(ours).problems == []
    assert torch.equal(places_of(ours)[0].maps[0], torch.cat([HALF, 1 - HALF]))


def test_a_style_is_everywhere_and_does_not_compete(loras):
    model = base("SD15")
    ensemble = specs(model, loras)
    ensemble[1] = LoRASpec(ensemble[1].name, 0.6, 0, "style", words="sks")
    ours, one = (routed(model, each, mode="once") for each in (ensemble, ensemble[:1]))
    sample(ours, "SD15", prompt(), steps=1)
    sample(one, "SD15", prompt(), steps=1)
    first, second = places_of(ours)[0].maps[0]
    assert (second == 1).all()
    # Of the one LoRA alone "sks dog" is a clause without a LoRA, which competes.
    assert (first >= places_of(one)[0].maps[0, 0] - 1e-6).all() and not torch.equal(first, places_of(one)[0].maps[0, 0])


@pytest.mark.parametrize("make", [Switch, Composite, LoRAtorio], ids=lambda make: make.__name__)
def test_other_methods_are_confined_too(make, loras):
    model = base("SD15")
    ensemble = specs(model, loras)
    ours, wide = routed(model, ensemble, make), apply_method(model, None, tuple(ensemble), plain(make), "LoRAs")[0]
    found = sample(ours, "SD15", prompt(), steps=3)
    assert torch.isfinite(found).all() and record_of(ours).problems == []
    assert not torch.allclose(found, sample(wide, "SD15", prompt(), steps=3), atol=1e-3)
    maps = places_of(ours)[0].maps
    assert 0 < maps.mean() < 1


def test_a_picture_that_another_node_shrinks_for_a_while(loras):
    """Places are read and used at the smaller sizes, too."""
    shrinks = pytest.importorskip("comfy_extras.nodes_model_downscale").PatchModelAddDownscale
    options = (1, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")
    model = base("SD15")
    small = shrinks.execute(model, *options)[0] if hasattr(shrinks, "execute") else shrinks().patch(model, *options)[0]
    ensemble = specs(model, loras)
    ours = routed(small, ensemble)
    found = sample(ours, "SD15", prompt(), steps=4)
    (placed,) = places_of(ours)
    assert record_of(ours).problems == [] and placed.maps.std() > 0.01
    assert not torch.allclose(found, sample(routed(model, ensemble), "SD15", prompt(), steps=4), rtol=1e-2)


def test_an_override_of_another_node_still_runs(loras):
    model, calls = base("SD15"), []

    def doubled(func, q, k, v, heads, *args, **kwargs):
        calls.append(q.shape)
        return 0.5 * func(q, k, v, heads, *args, **kwargs)

    before = model.clone()
    before.model_options["transformer_options"][OVERRIDE] = doubled
    ours = routed(before, specs(model, loras))
    found = sample(ours, "SD15", prompt(), steps=2)
    assert calls and record_of(ours).problems == []
    after = routed(model, specs(model, loras))
    after.model_options["transformer_options"][OVERRIDE] = doubled
    assert torch.equal(sample(after, "SD15", prompt(), steps=2), found)
    assert OVERRIDE not in model.model_options["transformer_options"]


def test_where_attention_cannot_be_read(loras):
    """A model whose attention is called without the options: said, and merged."""
    model = base("SD15")
    ensemble = specs(model, loras)
    ours = routed(model, ensemble)
    ours.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)
    ours.model_options["transformer_options"]["patches_replace"]["attn2"] = {
        (*place, index): (lambda q, k, v, options: q)
        for place in (("input", 4), ("input", 3), ("middle", 0), ("output", 0), ("output", 1), ("output", 2),
                      ("output", 3)) for index in range(1)}
    sample(ours, "SD15", prompt(), steps=2)
    (problem,) = record_of(ours).problems
    assert "cannot be read" in problem and "contrast" in problem and (places_of(ours)[0].maps == 1).all()


def test_where_layers_have_no_places(loras):
    """A family whose order of tokens is not known: merged, without a look for places, and in one line."""
    with skipped_where_older("Cosmos"):
        model = any_model(SMALL["Cosmos"])
        layers = layers_of(model)
    ensemble = [LoRASpec(loras(lora(layers, seed, **NAME)), 0.8, 0, words=words)
                for seed, words in ((1, "ohwx"), (2, "sks"))]

    def drawn(one, **marks) -> Tensor:
        ((text, options),), start = prompt_of(model, 11), latent_of(model, 1)
        with torch.inference_mode():
            return comfy.sample.sample(one, start, 1, 3.0, "euler", "simple", [[text, options | marks]],
                                       prompt_of(model, 12), start * 0, seed=1, disable_pbar=True)

    ours = routed(model, ensemble)
    found = drawn(ours, lora_ensemble_prompt=MARKS)
    same(found, drawn(stock(model, bare(ensemble))), drawn(model), 1e-4)
    (problem,) = record_of(ours).problems
    assert "is not known" in problem and "masks" in problem and [step.rows for step in record_of(ours).steps] == [2]


def test_the_sides_in_batches_of_their_own(loras, monkeypatch):
    """As where memory is short: the negative's maps are of the step, not of the attention read in it."""
    import comfy.samplers

    model = base("SD15")
    ours = routed(model, specs(model, loras))
    want = sample(ours, "SD15", prompt(), steps=3)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e30, raising=False)
    same(sample(ours, "SD15", prompt(), steps=3), want, sample(model, "SD15", prompt(), steps=3), 1e-4)
    assert [step.calls for step in record_of(ours).steps] == [3, 2, 2] and comfy.samplers


@pytest.mark.parametrize("family", ["SDXL", "Flux"])
def test_operations_of_places_that_are_renewed(family, loras, monkeypatch):
    """On a fast GPU a step takes as long as the host needs to ask for its operations: reading where words are takes one
    per block that is read, and summing that, dividing the picture and bringing all layers up to date together no more
    than some blocks of the model have."""
    read, shares = [], attention.clause_shares
    monkeypatch.setattr(attention, "clause_shares", lambda *args: read.append(1) or shares(*args))

    def a_step(model) -> tuple[int, int]:
        counts = []
        for steps in (4, 5):
            read.clear()
            with torch.no_grad(), Operations() as asked:
                sample(model, family, positive=prompt(family), steps=steps)
            counts.append((len(asked.names), len(read)))
        return tuple(more - less for less, more in zip(*counts, strict=True))

    ensemble = specs(base(family), loras)
    every, once = (routed(base(family), ensemble, mode=mode) for mode in ("every step", "once"))
    sample(every, family, positive=prompt(family), steps=1)  # the model is loaded
    (with_it, blocks), (without, none) = a_step(every), a_step(once)
    assert blocks > 1 and none == 0
    assert blocks < with_it - without <= blocks + 24
