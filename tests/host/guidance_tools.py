"""What the tests of guidance share: the node's own policies on small models, references, a spy, guiders, neighbours."""

from __future__ import annotations

import gc
import importlib
import inspect
from collections import Counter

import comfy_extras.nodes_custom_sampler as extras
import comfy_extras.nodes_perpneg as nodes_perpneg
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.guidance.apply import Guidance, apply_guidance, guidance_record_of
from lora_ensemble.host.guidance.options import GuidanceOptions, guidance_of
from lora_ensemble.host.guidance.run import GuidedRun
from lora_ensemble.methods.guidance import adaptive
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance, AdaptiveSession
from lora_ensemble.tests.devices import Far
from torch import Tensor

from .builders import sample as sample_at
from .models import FAMILIES, base

SD15 = FAMILIES["SD15"]


def sample(model, family: str = "SD15", cfg: float = 12.0, **options) -> Tensor:
    """With a cfg at which the negative matters in these small models."""
    return sample_at(model, family, cfg=cfg, **options)


def same(ours: Tensor, wanted: Tensor, plain: Tensor, tolerance: float = 2e-3) -> None:
    """Off by no more than a small part of what guidance changes at all."""
    effect = (wanted - plain).abs().max()
    assert effect > 1e-3 * plain.abs().max(), "nothing to compare"
    assert (ours - wanted).abs().max() <= tolerance * effect


def ag(model, threshold: float = 0.9, exact: bool = True, **options):
    policy = AdaptiveGuidance(threshold, **options)
    return apply_guidance(model, Guidance("test", lambda model, context, tell: AdaptiveSession(policy, exact, tell)))


def extrapolated(model, saving: float = 0.3, tolerance: float = 0.0, first: int = 0):
    """As the node has it."""
    policy = AdaptiveGuidance(min_steps=first)
    return apply_guidance(model, guidance_of(GuidanceOptions("extrapolate", policy, saving, tolerance=tolerance)))


def runs() -> list[GuidedRun]:
    """The runs that are still alive."""
    return [each for each in gc.get_objects() if type(each) is GuidedRun]


class Spy:
    """Rows that the diffusion model evaluates, by the token that its cond carries."""

    def __init__(self, model):
        self.model = model.clone()
        self.calls: list[Counter] = []
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", self.apply)

    def apply(self, executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        self.calls.append(Counter(tokens.sum().item() for tokens in c_crossattn.float().cpu()))
        return executor(x, t, c_concat, c_crossattn, *args, **kwargs)

    def __deepcopy__(self, memo):
        return self

    def rows(self, cond: list) -> int:
        """How many rows had this CONDITIONING's text."""
        wanted = cond[0][0].sum().item()
        return sum(count for call in self.calls for token, count in call.items() if abs(token - wanted) < 1e-3)


def reference(model, threshold: float, space: str = "noise", per_sample: bool = True, min_steps: int = 0,
              sigmas: list[float] | None = None):
    """Adaptive Guidance written down again, on the host's cfg function: both sides are always evaluated, in float64.
    `sigmas`: the schedule, for samplers that call several times per step; decisions are taken when a new one begins."""
    model, state = model.clone(), {"done": None, "step": -1}

    def step_of(sigma: float) -> int:
        return max((i for i, level in enumerate(sigmas) if level >= sigma * (1 - 1e-4)), default=0)

    def cfg(args):
        c, u, x = (args[name].double() for name in ("cond_denoised", "uncond_denoised", "input"))
        a, b = (c, u) if space == "x0" else (x - c, x - u)
        gamma = (a * b).flatten(1).sum(1) / (a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1))
        done = state["done"] if state["done"] is not None else torch.zeros(len(gamma), dtype=torch.bool)
        step = state["step"] + 1 if sigmas is None else step_of(float(args["sigma"][0]))
        if step != state["step"] and step >= min_steps:
            done = done | ((gamma if per_sample else gamma.min().expand_as(gamma)) >= threshold)
        state.update(done=done, step=step)
        denoised = torch.where(done.view(-1, 1, 1, 1), c, u + args["cond_scale"] * (c - u))
        return (x - denoised).to(args["input"])

    model.set_model_sampler_cfg_function(cfg)
    return model


class Standing:
    """Extrapolated guidance written down again, in float64: both sides are always evaluated, and in all steps but
    `turns` the negative is replaced by the prompt's prediction less the term on the line through the first calls of the
    last two turns. A turn after such steps goes by its term and three quarters of what these went astray by, each the
    mean of its calls: the term between two turns is on the line through both."""

    def __init__(self, turns, flow: bool = False):
        self.turns, self.flow = turns, flow
        self.points, self.stood, self.owed = {}, {}, {}

    def time(self, sigma: float) -> float:
        return sigma if self.flow else sigma / (1 + sigma)

    def __call__(self, name, c: Tensor, u: Tensor, sigma: float, options: dict) -> Tensor:
        sigmas = options["transformer_options"]["sample_sigmas"].tolist()
        step = max((i for i, level in enumerate(sigmas[:-1]) if level >= sigma * (1 - 1e-4)), default=0)
        points, stood, t = self.points.setdefault(name, []), self.stood.setdefault(name, {}), self.time(sigma)
        if step in self.turns:
            if not points or points[-1][0] != step:
                points.append((step, t, (u.double() - c.double()) / t))
                self.owed[name] = self.astray(points, stood, [self.time(level) for level in sigmas]) if stood else 0.0
                stood.clear()
            return (u.double() + t * self.owed[name]).to(u)
        (_, t0, d0), (_, t1, d1) = points[-2:]
        d = d1 + (d1 - d0) * (t - t1) / (t1 - t0)
        stood.setdefault(step, []).append((t, d))
        return (c.double() + t * d).to(c)

    def astray(self, points: list, stood: dict, times: list[float]) -> Tensor:
        (_, t1, d1), (now, t2, d2) = points[-2:]
        total = 0.0
        for step, calls in stood.items():
            length = (times[step] - times[step + 1]) / len(calls)
            for t, d in calls:
                total = total + (d1 + (d2 - d1) * (t - t1) / (t2 - t1) - d) * length
        mean = sum(times[step] - times[step + 1] for step in stood) / len(stood)
        return 0.75 * total / max(times[now] - times[now + 1], mean / 2)


def standing(model, turns, flow: bool = False):
    """The rule before all nodes that shape guidance."""
    model, rule = model.clone(), Standing(turns, flow)

    def pre_cfg(args):
        c, u = args["conds_out"]
        if args["cond_scale"] == 1:  # no guidance, so nothing stands in
            rule.stood.clear()
            return [c, u]
        return [c, rule("negative", c, u, float(args["sigma"][0]), args["model_options"])]

    options = model.model_options
    options["sampler_pre_cfg_function"] = [pre_cfg, *options.get("sampler_pre_cfg_function", [])]
    return model


def stood_in(model, turns, positive: int):
    """The rule on predictions as they come, for guiders that have their positive at this place of their conds."""
    model, rule = model.clone(), Standing(turns)

    def calc(executor, inner, conds, x, timestep, options):
        outs = executor(inner, conds, x, timestep, options)
        return [out if i == positive else rule(i, outs[positive], out, float(timestep[0]), options)
                for i, out in enumerate(outs)]

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "rule", calc)
    return model


def gammas(model, **options) -> list[list[float]]:
    """Similarities of each step under full guidance."""
    watched = ag(model, 1.5)
    sample(watched, **options)
    return [step.gamma for step in guidance_record_of(watched).steps]


def middle(curve: list[list[float]], share: float = 0.5) -> float:
    """A threshold between two similarities that were seen."""
    seen = sorted(g for step in curve for g in step)
    k = int(share * len(seen))
    return (seen[k - 1] + seen[k]) / 2


def late(monkeypatch) -> None:
    """As on an accelerator: where `exact` is off, a similarity is looked at two steps after it was sent."""
    monkeypatch.setattr(adaptive, "Sent", Far)


# --- guiders ---


def basic(model):
    guider = extras.Guider_Basic(model)
    guider.set_conds(SD15.cond(11))
    return guider


def dual(model, nested=False):
    guider = extras.Guider_DualCFG(model)
    guider.set_conds(SD15.cond(11), SD15.cond(13), SD15.cond(12))
    guider.set_cfg(12.0, 2.0, nested) if nested else guider.set_cfg(12.0, 2.0)
    return guider


def perp_neg(model):
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(SD15.cond(11), SD15.cond(12), SD15.cond(13))
    guider.set_cfg(12.0, 1.0)
    return guider


def dual_model(model, cfg: float = 12.0):
    if not hasattr(extras, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    guider = extras.Guider_DualModel(model, base("SD15"))
    guider.set_conds(SD15.cond(11), SD15.cond(12))
    guider.set_cfg(cfg)
    return guider


# --- neighbours ---


def node(module: str, name: str):
    """A node class of the host, or a skip where this release has none."""
    try:
        found = importlib.import_module(f"comfy_extras.{module}")
    except ImportError:
        pytest.skip(f"this ComfyUI has no {module}")
    if not hasattr(found, name):
        pytest.skip(f"this ComfyUI has no {name}")
    return getattr(found, name)


def patched(module: str, name: str, model, **options):
    """The model with that node on it, however the release defines nodes."""
    cls = node(module, name)
    if hasattr(cls, "define_schema"):
        known = inspect.signature(cls.execute).parameters
        return cls.execute(model, **{k: v for k, v in options.items() if k in known}).args[0]
    function = getattr(cls(), cls.FUNCTION)
    return function(model, **{k: v for k, v in options.items() if k in inspect.signature(function).parameters})[0]
