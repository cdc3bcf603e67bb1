"""A style's share by depth, against LoRAs whose files are changed by hand."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from lora_ensemble.benchmarks import depth
from lora_ensemble.testbed.beds import BEDS
from lora_ensemble.testbed.evaluate import RECIPES
from lora_ensemble.testbed.loras import PREFIX
from lora_ensemble.testbed.sampler import Sampler

LAYERS = {"unet": {"down_res1.conv1": 1.3, "up_res1.conv2": 1.3, "mid_attn.attn1.to_v": 0.7, "up_attn.attn2.to_q": 0.7,
                   "up_attn.attn2.to_k": 1.0, "mid_res.conv1": 1.0, "downsample": 1.0},
          "joint": {"double_blocks.1.img_mlp.0": 0.7, "double_blocks.0.txt_attn.qkv": 1.0,
                    "single_blocks.2.linear1": 1.2}}
ARMS = {"unet": "attention 0.7, fine 1.3", "joint": "first 0.7, last 1.2"}


def task_of(bed):
    return depth.sets_of(bed, 101, 5)[0]


def changed(loras, style: int, of) -> list[dict]:
    """The LoRAs, the style's deltas each times what `of` says of its layer."""
    out = [dict(tensors) for tensors in loras]
    for key in [key for key in out[style] if key.endswith(".lora_B.weight")]:
        layer = key.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        out[style][key] = out[style][key].float() * of(layer)
    return out


@pytest.mark.parametrize("body", BEDS)
def test_a_style_has_its_share_of_each_layer(body):
    bed = BEDS[body]
    base, loras, task = bed.load_base(), bed.load_loras("narrow"), task_of(bed)
    style = task.loras[[concept.category for concept in task.concepts].index("style")]
    arm = depth.ARMS[ARMS[body]]
    assert {layer: arm(depth.part_of(layer), 1.0) for layer in LAYERS[body]} == LAYERS[body]
    with Sampler(base, loras) as sampler:
        assert set(LAYERS[body]) <= set(sampler.bank.sites)
        plain, none, shared = (sampler.draw([picture], 2) for picture in (
            RECIPES["Routed as the files are"].picture(task, sampler.bank),
            depth.with_depth(task, sampler, depth.ARMS["routed"]),
            depth.with_depth(task, sampler, arm)))
    by_hand = changed(loras, style, lambda layer: arm(depth.part_of(layer), 1.0))
    with Sampler(base, by_hand) as sampler:
        wanted = sampler.draw([RECIPES["Routed as the files are"].picture(task, sampler.bank)], 2)
    assert torch.equal(none, plain) and not torch.allclose(shared, plain, atol=1e-3)
    assert torch.allclose(shared, wanted, atol=1e-4)


def test_by_energy_is_by_that_of_the_deltas():
    bed = BEDS["unet"]
    loras, task = bed.load_loras("narrow"), task_of(bed)
    roles, seen = [concept.category for concept in task.concepts], {}
    with Sampler(bed.load_base(), loras) as sampler:
        depth.with_depth(task, sampler, lambda part, ratio: seen.setdefault((part, round(ratio, 6)), 1.0))
    wanted = set()
    for key in (key for key in loras[0] if key.endswith(".lora_A.weight")):
        stem = key.removesuffix(".lora_A.weight")
        sizes = []
        for role in ("style", "background"):
            file = loras[task.loras[roles.index(role)]]
            down, up = (file[f"{stem}.lora_{side}.weight"].double().flatten(1) for side in "AB")
            sizes.append(float((up @ down * float(file[f"{stem}.alpha"]) / len(down)).square().sum()))
        wanted.add((depth.part_of(stem.removeprefix(PREFIX)), round(sizes[0] / sizes[1], 6)))
    assert {part for part, _ in wanted} == {"words", "attention", "convolution", "fine"} and set(seen) == wanted


def test_a_line_per_arm(capsys, monkeypatch):
    monkeypatch.setattr(depth, "Sampler", Short)
    arms = ["routed", "all 0.85"]
    assert depth.main(["--seeds", "101", "102", "--sets", "1", "--arms", *arms]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["arm"], line["sets"]) for line in lines] == list(product(arms, (2,)))
    assert [line["more"] for line in lines] == pytest.approx([0, lines[1]["shown"] - lines[0]["shown"]], abs=1e-4)
    assert lines[0]["more_95"] == [0, 0]
    for line in lines:
        assert line["shown"] == pytest.approx(sum(line[role] for role in (
            "character", "clothing", "object", "background", "style")) / 5, abs=1e-3)


class Short(Sampler):
    def draw(self, pictures, steps=2, **more):
        return super().draw(pictures, steps, **more)
