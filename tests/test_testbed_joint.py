"""The testbed's second body: two figures in one picture, joint attention that can be read, LoRAs that can be placed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_ensemble.engine.positions import Places
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.kernels.routing import clause_attention, clause_shares, clause_values
from lora_ensemble.methods.merge import Merge
from lora_ensemble.testbed import loras, report
from lora_ensemble.testbed import model as first_model
from lora_ensemble.testbed.beds import JOINT
from lora_ensemble.testbed.joint import model, protocol, render, scene, text, worlds
from lora_ensemble.testbed.judge import accuracy
from lora_ensemble.testbed.sampler import Picture, Sampler
from lora_ensemble.testbed.scene import BY_NAME, CONCEPTS, number


@pytest.fixture(scope="module")
def base():
    return JOINT.load_base()


@pytest.fixture(scope="module")
def judge():
    return JOINT.load_judge()


@pytest.fixture(scope="module")
def sampler(base):
    with Sampler(base, JOINT.load_loras("narrow")) as sampler:
        yield sampler


def test_weights_are_small_and_complete():
    files = list(JOINT.weights.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert len(files) == 2 + 2 * len(CONCEPTS)


def test_render_is_deterministic_and_latent_is_exact():
    first, again = (render.render(scene.sample(np.random.default_rng(5), 8)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (8, 3, 32, 48) and first.min() >= 0 and first.max() <= 1
    assert first_model.encode(first).shape[1:] == model.LATENT
    assert torch.allclose(first_model.decode(first_model.encode(first)), first, atol=1e-6)


def test_a_figure_that_is_not_there_is_not_drawn():
    scenes = scene.sample(np.random.default_rng(5), 32, {"figures": 0, "style.kind": 0})
    other = scene.Scenes(scenes.values | {a: 0 * v for a, v in scenes.values.items() if a.startswith("right.")},
                         scenes.jitter)
    assert torch.equal(render.render(scenes), render.render(other))
    both = scene.Scenes(scenes.values | {"figures": scenes.values["figures"] + scene.BOTH}, scenes.jitter)
    changed = (render.render(scenes) != render.render(both)).any(1).any(0)
    assert changed[:, 26:].any() and not changed[:, :20].any()


def test_base_has_seen_no_concept_on_either_side():
    scenes = scene.sample(np.random.default_rng(1), 20000)
    assert Counter(scenes.values["figures"].tolist())[scene.BOTH] > 10000
    assert not any(scene.shows(scenes.values, c, part).any() for c in CONCEPTS for part in scene.parts_of(c.category))
    vexa = BY_NAME["vexa"]
    planted = scene.sample(np.random.default_rng(1), 50, {"figures": 1} | scene.look(vexa, "right.character"))
    assert scene.shows(planted.values, vexa, "right.character").all()
    assert not scene.shows(planted.values, vexa, "left.character").any()


def test_captions_tell_who_wears_what():
    words = scene.sample(np.random.default_rng(2), 1, {"figures": scene.BOTH}).words(0)
    said = text.caption(words, {"left.clothing": "drosh"}).split(", ")
    assert said[1].startswith("drosh ") and said[1].endswith(" left") and said[3].endswith(" right")
    red = [text.tokens(f"red robe {side}")[0] for side in scene.SIDES] + text.tokens("red robe")[:1]
    assert len(set(red)) == 3
    assert text.caption({"figures": "both"}) == "creature left, creature right"
    scenes = scene.sample(np.random.default_rng(3), 300)
    assert max(len(text.tokens(text.caption(scenes.words(i)))) for i in range(300)) <= text.LENGTH


def test_worlds_are_readable_and_some_captions_are_bare():
    for concept in CONCEPTS:
        collection = worlds.collection("narrow", concept)
        sides = collection.scenes.values["figures"]
        assert set(sides.tolist()) == {0, 1} and len(sides) == len(collection.prompts) == 24
        for row, prompt in enumerate(collection.prompts):
            part = worlds.part_of(concept, scene.SIDES[sides[row]])
            values = {a: v[row:row + 1] for a, v in collection.scenes.values.items()}
            assert scene.shows(values, concept, part).all()
            assert all(values[a][0] == v for a, v in worlds.world(concept, scene.SIDES[sides[row]]).items())
            assert concept.name in prompt.replace(",", "").split()
        clauses = [next(c for c in prompt.split(", ") if concept.name in c) for prompt in collection.prompts]
        bare = [len(clause.split()) <= 2 and "finish" not in clause for clause in clauses]
        assert 0 < sum(bare) < len(bare) / 2 + 2


def test_protocol_counts_and_what_its_prompts_say():
    sets, pairs = protocol.all_sets(), protocol.pairs()
    assert Counter(len(s.concepts) for s in sets) == {2: 48, 3: 144, 4: 192, 5: 96}
    assert Counter(len(s.concepts) for s in pairs) == {2: 12, 3: 48, 4: 24}
    assert len({s.seed for s in sets + pairs}) == len(sets + pairs)
    assert {s.asked["figures"] for s in sets} == {0, 1, 2} and {s.asked["figures"] for s in pairs} == {2}
    for s in sets + pairs:
        assert all(token % len(text.VOCABULARY) != text.UNKNOWN for token in text.tokens(s.prompt()))
        right = dict(s.asked)
        for part, concept in zip(s.parts, s.concepts, strict=True):
            right |= scene.look(concept, part)
        right |= {part: 0 for part in scene.PARTS} | {p: number(c) for p, c in zip(s.parts, s.concepts, strict=True)}
        assert all(s.shown(right)) and not s.leaks(right)
        said = s.said_bare().prompt().split(", ")
        for part, concept in zip(s.parts, s.concepts, strict=True):
            side = part.partition(".")[0]
            assert (f"{concept.name} {side}" if side in scene.SIDES else concept.name) in said


def test_what_leaks_between_two_figures_is_counted():
    task = next(s for s in protocol.pairs() if [c.name for c in s.concepts] == ["vexa", "momu"])
    read = task.asked | {part: 0 for part in scene.PARTS} | {"left.character": 1, "right.character": 2}
    assert task.shown(read) == [True, True] and not task.leaks(read)
    twins = read | {"right.character": 1, "left.clothing.colour": worlds.world(BY_NAME["vexa"], "left")[
        "left.clothing.colour"]}
    assert task.shown(twins) == [True, False]
    assert set(task.leaks(twins)) == {("left.clothing.colour",), ("right.character",)}


def test_lora_files_map_onto_the_model(base):
    modules = base.targets()
    for tensors in [*JOINT.load_loras("narrow"), *JOINT.load_loras("clean")]:
        stems = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
        assert len(tensors) == 3 * len(stems) and stems == {loras.PREFIX + name for name in modules}
        for stem in stems:
            down, up = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
            assert (up @ down).shape == modules[stem.removeprefix(loras.PREFIX)].weight.shape
            assert down.dtype == up.dtype == torch.float16 and torch.isfinite(up).all()


def test_attention_can_be_read(base):
    seen = []
    x = torch.randn(2, *model.LATENT, generator=torch.Generator().manual_seed(0))
    context = base.contexts(["red pointed creature left, blue ball", ""])
    with torch.inference_mode():
        plain = base.velocity(x, torch.tensor([0.9, 0.4]), context)
        watched = base.velocity(x, torch.tensor([0.9, 0.4]), context, lambda *seen_: seen.append(seen_))
    assert torch.equal(plain, watched) and len(seen) == 2
    places, tokens = 8 * 12, text.LENGTH + 8 * 12
    for q, k, where in seen:
        assert q.shape == (2, 4, places, 32) and k.shape == (2, 4, tokens, 32) and where == slice(0, text.LENGTH)
        values = clause_values(torch.eye(text.LENGTH)[None], tokens, where, q)
        attended = clause_attention([clause_shares(q, k, values, text.LENGTH)])
        assert attended.shape == (2, text.LENGTH, places)
        assert 0 < attended.sum(1).min() <= attended.sum(1).max() <= 1


def test_training_rounds_no_more_than_bfloat16_does():
    layer = model.Linear(64, 32)
    x = torch.randn(3, 5, 64, requires_grad=True)
    outputs = {}
    for training in (True, False):
        layer.train(training)
        x.grad = layer.weight.grad = layer.bias.grad = None
        y = layer(x)
        y.square().sum().backward()
        outputs[training] = (y, x.grad, layer.weight.grad, layer.bias.grad)
    for half, whole in zip(outputs[True], outputs[False], strict=True):
        assert (half - whole).abs().max() < 0.02 * whole.abs().max()


def test_deltas_act_where_they_are_placed(base, sampler):
    """Nowhere is the base; everywhere is the plain LoRA; on the left alone is neither."""
    x = torch.randn(1, *model.LATENT, generator=torch.Generator().manual_seed(0))
    context = base.contexts(["vexa red pointed creature left, blue box"])
    branch = Branch((1.0, *[0.0] * (sampler.count - 1)))

    def drawn(place: float | torch.Tensor, word: float) -> torch.Tensor:
        maps = torch.zeros(1, sampler.count, 8, 12) + place
        words = torch.full((1, sampler.count, text.LENGTH), word)
        with sampler.routed.rows([branch], Places(maps, [0], words, [0], base.locate)), torch.inference_mode():
            return base.velocity(x, torch.tensor([0.8]), context)

    with torch.inference_mode():
        bare = base.velocity(x, torch.tensor([0.8]), context)
        with sampler.routed.rows([branch]):
            whole = base.velocity(x, torch.tensor([0.8]), context)
    assert torch.allclose(drawn(0.0, 0.0), bare, atol=1e-5) and torch.allclose(drawn(1.0, 1.0), whole, atol=1e-4)
    assert (whole - bare).abs().max() > 0.05
    left = drawn((torch.arange(12) < 6).float(), 1.0)
    assert (left - bare).abs().max() > 0.05 and (left - whole).abs().max() > 0.01


def test_judge_knows_renders(judge):
    scenes = JOINT.school.exam(np.random.default_rng(77), 600)
    right = accuracy(judge, scenes, JOINT.school.render(scenes), JOINT.school)
    assert min(right[part] for part in scene.PARTS) >= 0.985
    assert min(right[attribute] for attribute in scene.NAMED) >= 0.97


@pytest.mark.parametrize("count", [16, 32])
def test_base_draws_what_is_asked(count, sampler, judge):
    obeyed = report.base_obedience(sampler, judge, count, bed=JOINT)
    assert np.mean([obeyed[attribute] for attribute in scene.NAMED]) >= 0.94


@pytest.mark.parametrize("count", [1, 4])
def test_a_narrow_lora_alone_shows_its_concept_and_the_base_does_not(count, sampler, judge):
    shares = report.alone(sampler, judge, per_concept=count, bed=JOINT)
    assert np.mean([with_it for with_it, _ in shares.values()]) >= 0.85
    assert np.mean([without for _, without in shares.values()]) <= 0.1


def test_merge_draws_two_characters(sampler, judge):
    """One of each kind is drawn together with the other; what the prompt says of sides holds."""
    task = replace(protocol.pairs()[0], seed=5)
    image = sampler.draw([Picture(task.prompt(), task.seed, task.loras, Merge((1.0,) * len(task.loras)))], steps=8)
    assert image.shape == (1, 3, 32, 48) and torch.isfinite(image).all()
    assert set(judge.read(image)) == {*scene.ATTRIBUTES, *scene.PARTS}
