"""Beside nodes that people have installed: what comes out is what the node makes of ComfyUI's own LoRA loaders,
whatever the order in the graph, or the record says what is not done.

docs/neighbours.md is the table of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.switch import Switch
from torch import Tensor

from .builders import composite, hooked, lora, merge, method, same, sample, shapes, stock, three
from .models import FAMILIES, alive, base
from .neighbour_packs import REAL, attention_couple, gguf, pack
from .neighbours import FIRST_OF_A_SIDE, STAND_INS
from .runs import STEPS as RUN
from .runs import part
from .test_routed import prompt, routed, specs

NEUTRAL = {"KJNodes: torch settings", "KJNodes: compiled blocks", "KJNodes: chunked feed-forward"}
"""Those that change nothing but time and memory."""


@pytest.fixture(autouse=True)
def unloaded():
    """What others patch into a loaded model goes when it is unloaded; ComfyUI puts back a forward that was the class's
    as one of the instance."""
    yield
    comfy.model_management.unload_all_models()
    for module in (module for model in alive() for module in model.modules()):
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    torch.compiler.reset()


def said(model, *words: str) -> bool:
    return any(all(word in line for word in words) for line in record_of(model).problems)


def anew(make):
    """A node as it changes a MODEL that is not loaded: some read its weights."""
    comfy.model_management.unload_all_models()
    return make


@pytest.mark.parametrize("name", STAND_INS | REAL)
def test_it_is_what_the_node_makes_of_the_loaders(name, loras):
    neighbour = (STAND_INS | REAL)[name]
    family, make = neighbour.family, neighbour.make
    kind, model = FAMILIES[family], base(family)
    ensemble = three(model, loras)

    def drawn(model, *conds):
        return sample(model, family, *conds, cfg=neighbour.cfg)

    plain = drawn(anew(make)(model))
    assert name in NEUTRAL or not torch.equal(plain, drawn(model)), "it does nothing"
    merged = drawn(anew(make)(stock(model, ensemble)))
    mixed = drawn(anew(make)(model), hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    for ours, wanted, tolerance in ((merge, merged, 1e-3), (composite, mixed, neighbour.tolerance)):
        same(drawn(anew(make)(ours(model, ensemble))), wanted, plain, tolerance)
        same(drawn(ours(anew(make)(model), ensemble)), wanted, plain, tolerance)


@pytest.mark.parametrize("name", FIRST_OF_A_SIDE)
def test_nodes_that_patch_the_first_prompt_of_a_side(name, loras):
    """Guard: `takes_the_first`. In one batch with all branches, they patch one of them alone. NAG joins the sides
    within the model, so several LoRAs are the mean of runs with one each; SAG is as with ComfyUI's hooks."""
    neighbour = FIRST_OF_A_SIDE[name]
    family, make = neighbour.family, neighbour.make
    kind, model = FAMILIES[family], base(family)
    ensemble, patched = three(model, loras), make(model)
    plain = sample(patched, family)
    assert not torch.equal(plain, sample(model, family)), "it does nothing"
    same(sample(make(merge(model, ensemble)), family), sample(make(stock(model, ensemble)), family), plain)
    if name.startswith("NAG"):
        wanted = sum(sample(make(stock(model, [spec])), family, steps=1) for spec in ensemble) / 3
    else:
        conds = (hooked(kind.cond(seed), ensemble) for seed in (11, 12))
        wanted = sample(patched, family, *conds, steps=1)
    for ours in (make(composite(model, ensemble)), composite(patched, ensemble)):
        same(sample(ours, family, steps=1), wanted, sample(patched, family, steps=1))
        assert said(ours, name.partition(",")[0], "batch of its own")


def brush_net(model, real: bool):
    """What a branch beside the model adds in its first layer: to the first row what is the positive's, to the second
    the negative's, to any other the positive's again. Its wrappers stand in the place of all others."""
    def forward(unet, x, t, options, control):
        sides = torch.full((len(x), 32, 8, 8), 1.0)
        sides[1:2] = -0.5
        unet.input_blocks[0][0].add_sample_after = sides

    model = model.clone()
    if real:
        pack("ComfyUI-BrushNet", "model_patch").patch_model_function_wrapper(model, forward)
        return model

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        layer = executor.class_obj.diffusion_model.input_blocks[0][0]
        forward(executor.class_obj.diffusion_model, x, t, transformer_options, control)
        with layer.register_forward_hook(lambda module, given, out: out + module.add_sample_after):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model.model_options["transformer_options"]["brush_model_patch"] = {"forward": [forward]}
    model.wrappers.update({WrappersMP.APPLY_MODEL: {None: [wrapper]}, WrappersMP.OUTER_SAMPLE: {}})
    return model


@pytest.mark.parametrize("real", [False, True])
def test_nodes_that_count_on_a_pair_and_take_all_wrappers_off(real, loras):
    """Guards: `PAIRS`, and `pre_run`."""
    model = base("SD15")
    ensemble = three(model, loras)
    try:
        plain = sample(brush_net(model, real), steps=1)
    except TypeError as error:
        pytest.skip(f"ComfyUI-BrushNet does not run on this ComfyUI: {error}")
    assert not torch.equal(plain, sample(model, steps=1)), "it does nothing"
    alone = [sample(brush_net(stock(model, [spec]), real), steps=1) for spec in ensemble]
    same(sample(composed := composite(brush_net(model, real), ensemble), steps=1), sum(alone) / 3, plain)
    assert said(composed, "BrushNet", "batch of its own")
    ours = merge(brush_net(model, real), ensemble)
    same(sample(ours), sample(brush_net(stock(model, ensemble), real)), sample(brush_net(model, real)))
    assert not record_of(ours).problems
    with pytest.raises(ValueError, match="BrushNet .* behind that node"):
        sample(brush_net(merge(model, ensemble), real))


def test_gguf(loras, tmp_path):
    """Beside the packed weights, and as the pack's own loader of LoRAs would have it."""
    packed, ordinary = gguf("Flux", tmp_path)
    kind, ensemble = FAMILIES["Flux"], three(ordinary, loras)
    plain = sample(ordinary, "Flux")
    assert (sample(packed, "Flux") - plain).abs().max() < 1e-4
    mixed = sample(ordinary, "Flux", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    for ours, wanted in ((merge, sample(stock(ordinary, ensemble), "Flux")), (composite, mixed)):
        made = ours(packed, ensemble)
        same(sample(made, "Flux"), wanted, plain)


def with_options(own: bool):
    """A node that evaluates the prompt once more and goes by what comes out: with the run's options, or with a copy
    that it has made before, which no run has put anything in (AutomaticCFG's attention patches)."""
    def make(model):
        copied = copy.deepcopy(model.model_options)

        def again(args: dict) -> Tensor:
            return comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"],
                                                  copied if own else args["model_options"])[0]

        model = model.clone()
        model.set_model_sampler_post_cfg_function(again)
        return model

    return make


@pytest.mark.parametrize("ours", [merge, composite])
def test_a_node_that_evaluates_the_model_by_itself(ours, loras):
    """Guard: `RoutedForwards.bare`. LoRAs have no effect there, which is told."""
    model = base("SD15")
    ensemble = three(model, loras)
    for own in (True, False):
        make = with_options(own)
        plain = sample(make(model))
        for made in (make(ours(model, ensemble)), ours(make(model), ensemble)):
            assert torch.equal(sample(made), plain) is own
            assert said(made, "evaluated the model by itself", "no LoRA had an effect") is own


class Wrapping:
    """What FreeFuse puts on a layer for its LoRAs: it wraps what it finds there, and takes itself off where it is still
    what is there."""

    def __init__(self, module):
        self.module, self.before = module, None

    def put_on(self, _) -> None:
        if getattr(self.module.forward, "__self__", None) is not self:
            self.before, self.module.forward = self.module.forward, self.forward

    def take_off(self, _) -> None:
        if getattr(self.module.forward, "__self__", None) is self:
            self.module.forward = self.before
        self.before = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.before(x, *args, **kwargs) + 0.5


@pytest.mark.parametrize("ours", [merge, composite])
def test_others_forwards_are_put_on_again(ours, loras):
    """Guard: `sampler_sample`. The host takes them off and puts them on again before a run is over for its wrappers:
    one that wraps ours then, as ours wraps it, calls itself for ever."""
    plain, model = base("SD15"), base("SD15").clone()
    layers = [Wrapping(plain.model.diffusion_model.get_submodule(name)) for name in ("input_blocks.0.0", "out.2")]
    model.set_injections("neighbour", [PatcherInjection(each.put_on, each.take_off) for each in layers])
    ensemble = three(plain, loras)
    alone = sample(model)
    assert not torch.equal(alone, sample(plain)), "it does nothing"
    wanted = sample(stock(model, ensemble)) if ours is merge else sample(
        model, "SD15", *(hooked(FAMILIES["SD15"].cond(seed), ensemble) for seed in (11, 12)))
    made = ours(model, ensemble)
    for _ in range(2):
        same(sample(made), wanted, alone)
        assert torch.equal(sample(model), alone)
    assert not record_of(made).problems


# --- prompts that carry hooks -----------------------------------------------------------------------------------------


def regions(*seeds: int) -> list:
    """Prompts, each in a part of the picture."""
    found = []
    for k, seed in enumerate(seeds):
        mask = torch.zeros(1, 64, 64)
        mask[..., 64 * k // len(seeds):64 * (k + 1) // len(seeds)] = 1
        found += FAMILIES["SD15"].cond(seed, mask=mask, mask_strength=1.0)
    return found


class Couple(comfy.hooks.TransformerOptionsHook):
    """A hook such as Attention Couple's: in cross attention its prompt stands for several, which are mixed again behind
    it. It counts on one positive in the batch."""

    def __init__(self, others: list):
        super().__init__(hook_scope=comfy.hooks.EnumHookScope.HookedOnly)
        self.others = others
        self.transformers_dict = {"patches": {"attn2_patch": [self.before], "attn2_output_patch": [self.behind]}}

    def clone(self):
        found = super().clone()
        found.others = self.others
        return found

    def before(self, q, k, v, options):
        texts = torch.cat([k, *self.others])
        return q.repeat(len(texts), 1, 1), texts, texts

    def behind(self, out, options):
        if len(out) != 1 + len(self.others):
            raise RuntimeError("more than one positive")
        return out.mean(0, keepdim=True)


def coupled(positive: list, others: list) -> list:
    group = comfy.hooks.HookGroup()
    group.add(Couple([text for text, _ in others]))
    return comfy.hooks.set_hooks_for_conditioning(positive, hooks=group)


@pytest.mark.parametrize("couple", [coupled, attention_couple], ids=["stand-in", "prompt-control"])
def test_prompts_that_patch_the_model(couple, loras):
    """Guard: `Neighbours.patched`. In one batch with all branches, such patches find several positives; LoRAs on other
    layers than theirs see nothing of it."""
    model, kind = base("SD15"), FAMILIES["SD15"]
    layers = shapes(model, lambda layer: "attn2" not in layer)
    ensemble = [LoRASpec(loras(lora(layers, seed, 4)), 0.8, 0) for seed in (1, 2, 3)]
    positive = couple(kind.cond(11), regions(21, 22))
    plain = sample(model, "SD15", positive)
    assert not torch.equal(plain, sample(model)), "it does nothing"
    same(sample(merge(model, ensemble), "SD15", positive), sample(stock(model, ensemble), "SD15", positive), plain)
    alone = [sample(stock(model, [spec]), "SD15", positive, steps=1) for spec in ensemble]
    ours = composite(model, ensemble)
    same(sample(ours, "SD15", positive, steps=1), sum(alone) / 3, sample(model, "SD15", positive, steps=1))
    assert said(ours, "one prompt at a time", "batch of its own")


def test_loras_that_prompts_bring(loras):
    """prompt-control's schedule of hooks, which come and go during the run, beside ours in the model."""
    hooks = pack("comfyui-prompt-control", "prompt_control.nodes_hooks")
    model, kind = base("SD15"), FAMILIES["SD15"]
    *ensemble, spec = three(model, loras)
    info = {"weight": spec.strength_model, "weight_clip": 0.0}
    group = hooks.lora_hooks_from_schedule([(0.5, {spec.name: info}), (1.0, {})], {})
    positive = comfy.hooks.set_hooks_for_conditioning(kind.cond(11), hooks=group)
    plain, wanted = sample(model, "SD15", positive), sample(stock(model, ensemble), "SD15", positive)
    assert not torch.equal(plain, sample(model))
    same(sample(merge(model, ensemble), "SD15", positive), wanted, plain)
    alone = [sample(stock(model, [each]), "SD15", positive, steps=1) for each in ensemble]
    same(sample(composite(model, ensemble), "SD15", positive, steps=1), sum(alone) / 2,
         sample(model, "SD15", positive, steps=1))


# --- nodes that draw a part of the picture, or a part of the run ------------------------------------------------------


def step_by_step(step: Callable[[int, Tensor | None], Tensor], outside, where: Tensor) -> Tensor:
    """What Impact Pack's RegionalSampler does: runs of one step each, in which a region's sampler takes turns with the
    one around it; their latents are joined by a mask, so that no run goes on with what another one left."""
    latent = None
    for k in range(RUN):
        latent = where * step(k, latent) + (1 - where) * part(outside, k, k + 1, latent)
    return latent


@pytest.mark.parametrize("name", ["Merge", "Switch", "Composite"])
def test_a_region_step_by_step(name, loras):
    model = base("SD15")
    ensemble, where = three(model, loras), torch.zeros(1, 1, 8, 8)
    where[..., :5] = 1
    alone = [stock(model, [spec]) for spec in ensemble]
    ours = {"Merge": merge, "Composite": composite,
            "Switch": partial(method, make=lambda strengths: Switch(strengths, 1))}[name](model, ensemble)

    def wanted(k: int, latent: Tensor | None) -> Tensor:
        acting = {"Merge": [stock(model, ensemble)], "Switch": [alone[k % 3]], "Composite": alone}[name]
        return sum(part(each, k, k + 1, latent) for each in acting) / len(acting)

    plain = step_by_step(lambda k, latent: part(model, k, k + 1, latent), model, where)
    same(step_by_step(lambda k, latent: part(ours, k, k + 1, latent), model, where),
         step_by_step(wanted, model, where), plain)
    assert not record_of(ours).problems


def detailed(model, family: str, whole: Tensor, positive: list | None = None, steps: int = 2) -> Tensor:
    """What a detailer does (Impact Pack's, with its soft mask): a part of the picture, larger than it is there and of
    another form, is drawn again below a mask."""
    crop = torch.nn.functional.interpolate(whole[..., 1:7, 2:5], size=(16, 8))
    mask = torch.linspace(0, 1, 16).expand(1, 1, 8, 16).mT.contiguous()
    model, kind = model.clone(), FAMILIES[family]
    model.set_model_denoise_mask_function(lambda sigma, mask, extra_options: (mask > 0.3).to(mask))
    with torch.inference_mode():
        return comfy.sample.sample(model, torch.randn(crop.shape, generator=torch.Generator().manual_seed(5)), steps,
                                   3.0, "euler", "normal", positive or kind.cond(11), kind.cond(12), crop, denoise=0.6,
                                   noise_mask=mask, disable_pbar=True, seed=5)


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_a_part_of_the_picture_is_drawn_again(family, loras):
    model = base(family)
    ensemble, whole = three(model, loras), sample(model, family)
    plain, ours = detailed(model, family, whole), merge(model, ensemble)
    sample(ours, family)
    same(detailed(ours, family, whole), detailed(stock(model, ensemble), family, whole), plain)
    alone = [detailed(stock(model, [spec]), family, whole, steps=1) for spec in ensemble]
    same(detailed(composite(model, ensemble), family, whole, steps=1), sum(alone) / 3,
         detailed(model, family, whole, steps=1))


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_words_are_found_in_the_part_itself(family, loras):
    """A mask by hand is one of the whole picture, and is stretched to the part: the record says so."""
    model, whole = base(family), sample(base(family), family)
    ours = routed(model, specs(model, loras))
    detailed(ours, family, whole, prompt(family))
    maps = places_of(ours)[0].maps
    assert maps.shape[-2:] == (16, 8) and 0 < maps.mean() < 1 and not record_of(ours).problems
    masked = [replace(spec, words="", mask=Mask(torch.eye(32)[None])) for spec in specs(model, loras)]
    ours = merge(model, masked)
    sample(ours, family)
    assert not record_of(ours).problems
    detailed(ours, family, whole)
    assert said(ours, "32 wide and 32 high", "to another form, 8 to 16", "detailer", "Routed", *(
        f"'{spec.name}'" for spec in masked))


def test_combinations_without_end_are_refused(loras):
    """Nodes in a row multiply their branches: eight small ones would make half a million."""
    model = base("SD15")
    (spec, *_) = three(model, loras)
    for _ in range(8):
        model = composite(model, [spec] * 5)
    with pytest.raises(ValueError, match=r"5 \(Composite\) x .* = 390,625 combinations .* into one ensemble"):
        sample(model)
