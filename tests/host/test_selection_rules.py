"""The rules of K-LoRA and EST-LoRA from file to choice: nodes on a real model against the formulas on the tensors of
the files, for every setting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_ensemble.host.compose import measure as host_measure
from lora_ensemble.host.files.ensemble import LoRASpec

from .builders import Rand, file_of, kohya, lora, shapes
from .models import base
from .test_selection import est, klora, method_of

STRENGTHS = (0.8, -0.7)
TIMES = (0.0, 0.08, 0.14, 0.3, 0.5, 0.7, 0.9, 1.0)


def uneven(model, loras) -> tuple[LoRASpec, LoRASpec]:
    """A subject and a style of unequal rank, on all layers, convolutions included; an alpha and a size per layer, one
    of them far from the others."""
    rand, specs = Rand(5), []
    for seed, rank, strength, role in ((1, 4, STRENGTHS[0], "object"), (2, 8, STRENGTHS[1], "style")):
        file = lora(shapes(model), seed, rank, alpha=float(rank))
        for number, layer in enumerate(shapes(model)):
            file[f"{kohya(layer)}.alpha"] = torch.tensor(rank * (0.5 + abs(rand(1).item())))
            file[f"{kohya(layer)}.lora_up.weight"] *= torch.exp(0.5 * rand(1)) * (40 if (number, seed) == (3, 1) else 1)
        specs.append(LoRASpec(loras(file), strength, 0.0, role))
    return tuple(specs)


def deltas(spec: LoRASpec, layers, raw: bool) -> dict[str, np.ndarray]:
    """|DW| of all layers from the file, flat and sorted; raw: neither alpha/rank nor the strength."""
    file, out = file_of(spec), {}
    for layer in layers:
        up, down = (file[f"{kohya(layer)}.lora_{end}.weight"].double().flatten(1).numpy() for end in ("up", "down"))
        scale = 1.0 if raw else spec.strength_model * file[f"{kohya(layer)}.alpha"].item() / len(down)
        out[layer] = np.sort(np.abs(scale * up @ down).reshape(-1))
    return out


def filtered_mean(ratios: np.ndarray) -> float:
    return float(ratios[ratios < 3 * ratios.mean()].mean())


def klora_rule(c: dict, s: dict, u: float, alpha=1.5, beta=-1.0, pattern="s", gamma="paper", k=0, **_) -> list[int]:
    k = k or 4 * 8
    beta = {"s": 0.5, "s*": 1.3}[pattern] if beta < 0 else beta
    scale = alpha * u + beta if pattern == "s" else np.fmod(alpha * u + beta, alpha)
    if gamma == "paper":
        balance = sum(x.sum() for x in c.values()) / sum(x.sum() for x in s.values())
    else:
        balance = filtered_mean(np.array([c[layer].sum() / s[layer].sum() for layer in c]))
    return [0 if c[layer][-k:].sum() >= balance * scale * s[layer][-k:].sum() else 1 for layer in c]


def est_rule(c: dict, s: dict, u: float, alpha=1.5, style_discrepancy=0.5, balance="energy") -> list[int]:
    energy = [{layer: (x**2).sum() for layer, x in of.items()} for of in (c, s)]
    gamma = {"energy": sum(energy[0].values()) / sum(energy[1].values()), "none": 1.0,
             "l1": filtered_mean(np.array([c[layer].sum() / s[layer].sum() for layer in c]))}[balance]
    scale = alpha * u + 1 - style_discrepancy
    return [0 if energy[0][layer] / gamma > energy[1][layer] * scale else 1 for layer in c]


@pytest.mark.parametrize(("make", "rule", "options"), [
    (klora, klora_rule, dict()),
    (klora, klora_rule, dict(pattern="s*")),
    (klora, klora_rule, dict(alpha=1.1, beta=0.0)),
    (klora, klora_rule, dict(k=3)),
    (klora, klora_rule, dict(k=10**9)),
    (klora, klora_rule, dict(deltas="raw factors")),
    (klora, klora_rule, dict(gamma="released code")),
    (klora, klora_rule, dict(gamma="released code", deltas="raw factors", pattern="s*", beta=0.85 * 1.5)),
    (est, est_rule, dict(alpha=1.2, style_discrepancy=0.3)),
    (est, est_rule, dict(balance="l1")),
    (est, est_rule, dict(balance="none", style_discrepancy=-0.2)),
], ids=lambda value: " ".join(map(str, value.values())) or "paper" if isinstance(value, dict) else value.__name__)
def test_a_nodes_choice_is_its_formula_on_the_file(make, rule, options, loras):
    model = base("SD15")
    ensemble = uneven(model, loras)
    method, layers = method_of(make(model, ensemble, **options)), list(shapes(model))
    raw = options.get("deltas") == "raw factors"
    c, s = (deltas(spec, layers, raw) for spec in ensemble)
    want = [rule(c, s, u, **options) for u in TIMES]
    alone = [(STRENGTHS[0], 0.0), (0.0, STRENGTHS[1])]
    assert [[alone.index(method.at(u).at(layer)) for layer in layers] for u in TIMES] == want
    assert 0 < np.mean(want) < 1, "both must act for this to show anything"


def test_what_is_kept_of_one_setting_does_not_serve_another(loras):
    """Sizes of other roles, of raw factors, or without sums are other sizes."""
    model = base("SD15")
    a, b = uneven(model, loras)
    third = LoRASpec(loras(lora(shapes(model), 3, 16)), 1.0, 0.0, "object")
    styles = (a, b, replace(third, role="style"))
    settings = [lambda: est(model, (a, b)), lambda: klora(model, (a, b)),
                lambda: klora(model, (a, b), deltas="raw factors"), lambda: klora(model, (a, b), k=5),
                lambda: klora(model, (a, b, third)), lambda: klora(model, styles)]
    fresh = []
    for setting in settings:
        host_measure._kept.clear()
        fresh.append(method_of(setting()).contest)
    host_measure._kept.clear()
    assert [method_of(setting()).contest for setting in settings] == fresh
    assert len(host_measure._kept) == len(settings)
