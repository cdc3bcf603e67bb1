"""Adaptive Guidance beside the host's own guidance nodes, before and after them in the chain; and what the only other
node of its kind gets wrong (asagi4's AdaptiveGuidance, six defects)."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.guidance.apply import guidance_record_of as record_of

from .builders import guided, schedule
from .guidance_tools import SD15, Spy, ag, gammas, middle, node, patched, reference, same, sample
from .models import FAMILIES, base

SHAPING = {
    "RescaleCFG": ("nodes_model_advanced", {"multiplier": 0.7}),
    "APG": ("nodes_apg", {"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.0}),
    "APG with momentum": ("nodes_apg", {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.5}),
    "TCFG": ("nodes_tcfg", {}),
    "CFGZeroStar": ("nodes_cfg", {}),
    "CFGNorm": ("nodes_cfg", {"strength": 1.0}),
    "Mahiro": ("nodes_mahiro", {}),
    "FreSca": ("nodes_fresca", {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 2}),
}
"""Nodes that shape the difference of the two predictions: nothing of them is left where there is none."""

LASTING = {
    "PerturbedAttentionGuidance": ("nodes_pag", {"scale": 3.0}),
    "FreeU_V2": ("nodes_freelunch", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
}
"""Nodes that act on the conditional prediction alone as well: what remains is the same chain at cfg 1."""

NAG = {"NAGuidance": ("nodes_nag", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5})}
"""Acts where both sides are in one batch: while guidance is on, and not without the negative."""

both = pytest.mark.parametrize("ours_first", [False, True], ids=["after it", "before it"])


def neighbour(name: str, model):
    module, options = {**SHAPING, **LASTING, **NAG}[name]
    return patched(module, name.split(" ")[0], model, **options)


def chain(name: str, threshold: float, ours_first: bool, model=None, **options):
    model = base("SD15") if model is None else model
    if ours_first:
        return neighbour(name, ag(model, threshold, **options))
    return ag(neighbour(name, model), threshold, **options)


@both
@pytest.mark.parametrize("name", [*SHAPING, *LASTING, *NAG])
def test_identical_while_guidance_is_on(name, ours_first):
    """Bit for bit; the peer's first defect is that such nodes are silently off until its threshold is reached."""
    plain = sample(neighbour(name, base("SD15")), steps=4, batch=2)
    assert torch.equal(sample(chain(name, 1.5, ours_first), steps=4, batch=2), plain)
    if name != "FreeU_V2":
        assert not torch.equal(plain, sample(base("SD15"), steps=4, batch=2)), "the neighbour does nothing"


@both
@pytest.mark.parametrize("name", SHAPING)
def test_nothing_is_left_to_shape(name, ours_first):
    """The plain conditional prediction, not twice it as APG makes at cfg 1, and no memory of earlier steps."""
    spy = Spy(base("SD15"))
    out = sample(chain(name, -1.0, ours_first, spy.model), steps=4, batch=2)
    same(out, sample(base("SD15"), steps=4, batch=2, cfg=1.0), sample(neighbour(name, base("SD15")), steps=4, batch=2))
    assert spy.rows(SD15.cond(12)) == 2


@both
@pytest.mark.parametrize("name", LASTING)
def test_what_acts_on_the_prompt_goes_on(name, ours_first):
    spy = Spy(base("SD15"))
    out = sample(chain(name, -1.0, ours_first, spy.model), steps=4)
    same(out, sample(neighbour(name, base("SD15")), steps=4, cfg=1.0), sample(neighbour(name, base("SD15")), steps=4))
    assert spy.rows(SD15.cond(12)) == 1


@pytest.mark.parametrize("name", SHAPING)
def test_a_batch_in_part(name):
    """Pictures that are done are conditional; the others are shaped as ever. Neighbours that treat pictures alone."""
    threshold = middle(gammas(neighbour(name, base("SD15")), steps=5, batch=3))
    model = chain(name, threshold, False)
    assert sample(model, steps=5, batch=3).isfinite().all()
    negative = [step.negative for step in record_of(model).steps]
    assert negative == sorted(negative, reverse=True) and 3 < sum(negative) < 15


def momentum(args: dict, now: torch.Tensor) -> torch.Tensor:
    """What Momentum Guidance and Sliding Mode Control (sd-perturbed-attention) remember, and where: in the model
    options of the run, by a name of their own."""
    kept = args["model_options"].setdefault("a node's memory", {})
    before = kept.get("prediction", now)
    kept["prediction"] = 0.4 * now + 0.6 * before
    return now + 0.5 * (now - before)


def remembering(slot: str):
    """A node with such a memory, in one of the host's slots for guidance."""
    def node(model):
        model = model.clone()
        if slot == "pre":
            model.set_model_sampler_pre_cfg_function(lambda args: [momentum(args, args["conds_out"][0]),
                                                                   *args["conds_out"][1:]])
        elif slot == "cfg":
            model.set_model_sampler_cfg_function(lambda args: args["input"] - momentum(
                args, args["uncond_denoised"] + 7 * (args["cond_denoised"] - args["uncond_denoised"])))
        else:
            model.set_model_sampler_post_cfg_function(lambda args: momentum(args, args["denoised"]))
        return model

    return node


@both
@pytest.mark.parametrize("slot", ["pre", "cfg", "post"])
def test_nodes_that_remember_in_the_model_options(slot, ours_first):
    """Guard: `put_in`. In a copy for each call there is no memory."""
    node, other = remembering(slot), remembering("post")
    if slot == "post":  # the slots are taken by another node as well, and so changed for each call
        node = lambda model: remembering("post")(patched("nodes_apg", "APG", model, **SHAPING["APG"][1]))  # noqa: E731

    def ours(threshold, node):
        return node(ag(base("SD15"), threshold)) if ours_first else ag(node(base("SD15")), threshold)

    plain = sample(node(base("SD15")), steps=5)
    assert torch.equal(sample(ours(1.5, node), steps=5), plain)
    assert not torch.equal(plain, sample(base("SD15"), steps=5)), "it does nothing"
    whole = sample(other(base("SD15")), steps=5, cfg=1.0)
    same(sample(ours(-1.0, other), steps=5), whole, sample(base("SD15"), steps=5, cfg=1.0))


def writing(model):
    """A node that writes into the predictions, as Skimmed CFG and the Pre CFG nodes do."""
    def pre_cfg(args: dict) -> list:
        c, u, *others = args["conds_out"]
        c[:, 1] += 0.5 * (c[:, 1] - u[:, 1]) + 0.3 * c[:, 2]
        u *= 1.1
        return [c, u, *others]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(pre_cfg)
    return model


@both
@pytest.mark.parametrize("own", [False, True], ids=["the host's guider", "one of its own"])
def test_nodes_that_write_into_predictions(ours_first, own):
    """Guard: copies of the conditional prediction. A picture that is done is conditional, whoever is beside it in the
    batch; a guider of its own is ComfyUI-ppm's CFGLimiterGuider, which calls the host's formula."""
    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return comfy.samplers.sampling_function(self.inner_model, x, timestep, self.conds["negative"],
                                                    self.conds["positive"], self.cfg, model_options, seed)

    threshold = middle(gammas(writing(base("SD15")), steps=5, batch=3))
    noise = FAMILIES["SD15"].noise(3, seed=1)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), schedule(base("SD15"), 5)

    def run(rows) -> torch.Tensor:
        model = writing(ag(base("SD15"), threshold)) if ours_first else ag(writing(base("SD15")), threshold)
        guider = (Guider if own else comfy.samplers.CFGGuider)(model)
        guider.set_conds(SD15.cond(11), SD15.cond(12))
        guider.set_cfg(12.0)
        with torch.inference_mode():
            out = guider.sample(noise[rows], torch.zeros_like(noise[rows]), sampler, sigmas, disable_pbar=True)
        steps.append([step.negative for step in record_of(model).steps])
        return out

    steps: list[list[int]] = []
    together = run([0, 1, 2])
    assert {1, 2} & set(steps[0]), "no step with a picture that is done beside others"
    for row in range(3):
        same(together[row:row + 1], run([row]), torch.zeros(1))


@both
def test_nag_keeps_the_batch_whole(ours_first):
    """It needs both sides of every picture in one batch; without the negative it is off, as at cfg 1."""
    threshold = middle(gammas(neighbour("NAGuidance", base("SD15")), steps=5, batch=3))
    model = chain("NAGuidance", threshold, ours_first)
    out = sample(model, steps=5, batch=3)
    assert {step.negative for step in record_of(model).steps} <= {0, 3}
    assert out.isfinite().all()


@both
def test_skip_layer_guidance(ours_first):
    """Its simple form has the host's only slot for evaluating conds, and evaluates both sides one after the other."""
    def slg(model):
        return patched("nodes_slg", "SkipLayerGuidanceDiTSimple", model, double_layers="0", single_layers="0",
                       start_percent=0.0, end_percent=1.0)

    def ours(threshold):
        return slg(ag(base("Flux"), threshold)) if ours_first else ag(slg(base("Flux")), threshold)

    plain = sample(slg(base("Flux")), "Flux", steps=4)
    assert torch.equal(sample(ours(1.5), "Flux", steps=4), plain)
    assert not torch.equal(plain, sample(base("Flux"), "Flux", steps=4))
    model = ours(-1.0)
    same(sample(model, "Flux", steps=4), sample(base("Flux"), "Flux", steps=4, cfg=1.0), plain)
    assert record_of(model).evaluations == 5 and record_of(model).full == 8


@both
def test_skip_layer_guidance_with_a_pass_of_its_own(ours_first):
    def slg(model):
        return patched("nodes_slg", "SkipLayerGuidanceDiT", model, double_layers="0", single_layers="0", scale=3.0,
                       start_percent=0.0, end_percent=1.0, rescaling_scale=0.0)

    def ours(threshold):
        return slg(ag(base("Flux"), threshold)) if ours_first else ag(slg(base("Flux")), threshold)

    plain = sample(slg(base("Flux")), "Flux", steps=4)
    assert torch.equal(sample(ours(1.5), "Flux", steps=4), plain)
    same(sample(ours(-1.0), "Flux", steps=4), sample(slg(base("Flux")), "Flux", steps=4, cfg=1.0), plain)


@both
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches(name, ours_first):
    """Identical until the switch; a batch stays whole for as long as EasyCache keeps whole outputs."""
    from comfy_extras.nodes_easycache import EasyCacheHolder

    # Where an older release's EasyCache skips a batch of several pictures with both sides, it fails by itself.
    skips = name == "LazyCache" or hasattr(EasyCacheHolder, "can_apply_cache_diff")

    def cached(model, reuse_threshold=0.2 if skips else 0.0):
        return patched("nodes_easycache", f"{name}Node", model, reuse_threshold=reuse_threshold, start_percent=0.1,
                       end_percent=0.95, verbose=False)

    if not skips:
        with pytest.raises(RuntimeError, match="must match the size"):
            sample(cached(base("SD15"), 50.0), steps=8, batch=3)

    def ours(threshold):
        return cached(ag(base("SD15"), threshold)) if ours_first else ag(cached(base("SD15")), threshold)

    plain = sample(cached(base("SD15")), steps=8, batch=3)
    assert torch.equal(sample(ours(1.5), steps=8, batch=3), plain)
    first = sorted(gammas(cached(base("SD15")), steps=8, batch=3)[0])
    model = ours((first[1] + first[2]) / 2)  # one picture is done after the first step
    assert sample(model, steps=8, batch=3).isfinite().all()
    record = record_of(model)
    if name == "EasyCache":
        assert {step.negative for step in record.steps} <= {0, 3}
        assert any(len(problem) > 0 and "EasyCache" in problem for problem in record.problems)
    else:
        assert record.steps[1].negative == 2


def test_cfg_override():
    """An outer node's cfg is obeyed; where it is 1 there is nothing to decide."""
    override = node("nodes_custom_sampler", "CFGOverride")
    model = override.execute(ag(base("SD15"), 1.5), 5.0, 0.0, 1.0).args[0]
    assert torch.equal(sample(model, steps=3), sample(base("SD15"), steps=3, cfg=5.0))
    model = override.execute(ag(base("SD15"), 1.5), 1.0, 0.0, 1.0).args[0]
    assert torch.equal(sample(model, steps=3), sample(base("SD15"), steps=3, cfg=1.0))
    assert not any(step.negative for step in record_of(model).steps)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "euler_ancestral_cfg_pp"])
def test_samplers_that_ask_for_the_negative(sampler):
    """CFG++ samplers switch the cfg 1 shortcut off and read the negative's prediction; they get the conditional one."""
    spy = Spy(base("SD15"))
    assert torch.equal(sample(ag(spy.model, 1.5), steps=4, sampler=sampler, cfg=2.0),
                       sample(base("SD15"), steps=4, sampler=sampler, cfg=2.0))
    spy.calls.clear()
    assert sample(ag(spy.model, -1.0), steps=4, sampler=sampler, cfg=2.0).isfinite().all()
    assert spy.rows(SD15.cond(12)) == 1


# --- the six defects of the peer ---


def test_defect_1_slots_of_other_nodes_work_before_the_switch():
    calls, model = [], base("SD15").clone()

    def calc(args):
        calls.append("calc")
        return comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"],
                                              args["model_options"])

    model.set_model_sampler_pre_cfg_function(lambda args: calls.append("pre") or args["conds_out"])
    model.set_model_sampler_calc_cond_batch_function(calc)
    sample(ag(model, 1.5), steps=3)
    assert calls == ["calc", "pre"] * 3


def test_defect_2_pictures_of_a_batch_decide_alone():
    """A picture's result does not depend on its neighbours in the batch."""
    kind, threshold = FAMILIES["SD15"], middle(gammas(base("SD15"), steps=5, batch=3))
    guider_of = lambda: comfy.samplers.CFGGuider(ag(base("SD15"), threshold))  # noqa: E731
    noise = kind.noise(3, seed=1)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), schedule(base("SD15"), 5)

    def run(rows) -> torch.Tensor:
        guider = guider_of()
        guider.set_conds(SD15.cond(11), SD15.cond(12))
        guider.set_cfg(12.0)
        with torch.inference_mode():
            return guider.sample(noise[rows], torch.zeros_like(noise[rows]), sampler, sigmas, disable_pbar=True)

    together = run([0, 1, 2])
    for row in range(3):
        same(together[row:row + 1], run([row]), torch.zeros(1))


def test_defect_3_the_space_is_a_choice():
    curves = []
    for space in ("noise", "x0"):
        model = ag(base("SD15"), 1.5, space=space)
        sample(model, steps=4)
        curves.append([step.gamma[0] for step in record_of(model).steps])
    assert curves[0] != pytest.approx(curves[1], abs=1e-3)


def test_defect_4_inputs_stay_as_they_are():
    seen, model = [], base("SD15").clone()

    def watch(executor, model_, conds, x, timestep, options):
        before = x.clone()
        out = executor(model_, conds, x, timestep, options)
        seen.append(torch.equal(x, before))
        return out

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "watch", watch)
    positive, negative = SD15.cond(11), SD15.cond(12)
    copies = [positive[0][0].clone(), negative[0][0].clone()]
    sample(ag(model, 0.5), positive=positive, negative=negative, steps=4, batch=2)
    assert all(seen) and torch.equal(positive[0][0], copies[0]) and torch.equal(negative[0][0], copies[1])


def test_defect_5_a_cached_guider_starts_afresh():
    threshold = middle(gammas(base("SD15"), steps=6))
    model = ag(base("SD15"), threshold)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(SD15.cond(11), SD15.cond(12))
    guider.set_cfg(12.0)
    sigmas = schedule(base("SD15"), 6)
    guided(guider, sigmas)
    guided(guider, sigmas[3:], latent=SD15.noise(seed=4))
    assert record_of(model).steps[0].negative == 1


def test_defect_6_the_ordinary_sampler_will_do():
    """No sampler node of its own is needed, and nothing is printed (test_architecture looks for that)."""
    threshold = middle(gammas(base("SD15"), steps=6))
    model = ag(base("SD15"), threshold)
    same(sample(model, steps=6), sample(reference(base("SD15"), threshold), steps=6), sample(base("SD15"), steps=6))
