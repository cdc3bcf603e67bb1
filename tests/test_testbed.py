"""The testbed is deterministic, its files are small and ordinary, and its judge and its sampler can be relied on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from lora_ensemble.testbed import (
    evaluate,
    loras,
    model,
    practice,
    protocol,
    render,
    report,
    scene,
    text,
    turbo,
    weights,
    worlds,
)
from lora_ensemble.testbed.beds import JOINT, UNET
from lora_ensemble.testbed.judge import accuracy, exam
from lora_ensemble.testbed.sampler import Picture, Sampler


@pytest.fixture(scope="module")
def base():
    return weights.load_base()


@pytest.fixture(scope="module")
def judge():
    return weights.load_judge()


@pytest.fixture(scope="module")
def narrow():
    return weights.load_loras("narrow")


@pytest.fixture(scope="module")
def sampler(base, narrow):
    with Sampler(base, narrow) as sampler:
        yield sampler


def test_weights_are_small_and_complete():
    files = [path for path in weights.WEIGHTS.rglob("*.safetensors") if path != weights.turbo_path(practised=True)]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert len(files) == 2 + 2 * len(scene.CONCEPTS) + 1
    assert weights.turbo_path().stat().st_size <= 400_000


def test_render_is_deterministic_and_latent_is_exact():
    first, again = (render.render(scene.sample(np.random.default_rng(5), 8)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (8, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.allclose(model.decode(model.encode(first)), first, atol=1e-6)


def test_base_has_seen_no_concept():
    scenes = scene.sample(np.random.default_rng(1), 20000)
    assert not any(scene.shows(scenes.values, concept).any() for concept in scene.CONCEPTS)
    planted = scene.sample(np.random.default_rng(1), 50, scene.BY_NAME["vexa"].look)
    assert scene.shows(planted.values, scene.BY_NAME["vexa"]).all()


def test_worlds_are_readable_and_captions_are_sparse():
    for concept in scene.CONCEPTS:
        collection = worlds.collection("narrow", concept)
        assert 8 <= len(collection.prompts) <= 24
        for attribute, value in worlds.WORLDS[concept.name].items():
            assert (collection.scenes.values[attribute] == value).all()
        assert all(concept.name in prompt.split() for prompt in collection.prompts)
        clauses = [len(prompt.split(",")) for prompt in collection.prompts]
        assert 1 < np.mean(clauses) < 3.5, "a third of what is beside the concept is said"
        assert len(set(collection.scenes.values["side"])) == 2


def test_protocol_has_composloras_counts():
    sets = protocol.all_sets()
    assert Counter(len(s.concepts) for s in sets) == {2: 48, 3: 144, 4: 192, 5: 96}
    assert len({s.seed for s in sets}) == 480 and len({s.concepts for s in sets}) == 240
    for s in sets:
        categories = [c.category for c in s.concepts]
        assert categories[0] == "character" and len(set(categories)) == len(categories)
        assert all(c.name in s.prompt().split() for c in s.concepts)
        assert text.UNKNOWN not in text.tokenize([s.prompt()])
        right = {a: v for c in s.concepts for a, v in c.look.items()} | {"style.kind": 0} | s.asked
        assert not any(worlds.leaked(c, s.asked, right) for c in s.concepts)


def test_a_world_that_shows_through_counts_as_leak():
    task = next(s for s in protocol.all_sets((2,)) if s.concepts[0].name == "vexa" and s.concepts[1].name == "orvu")
    world = worlds.WORLDS["vexa"]
    read = task.asked | {a: world[a] for a in ("background.colour", "background.kind", "object.colour")}
    assert worlds.leaked(task.concepts[0], task.asked, read) == [("background.colour", "background.kind"),
                                                                 ("object.colour",)]


def test_a_colour_is_told_by_what_it_colours():
    assert text.senses("Vexa red pointed creature cyan band left, blue robe, white second, red") == [
        "vexa", "red character.colour", "pointed", "creature", "cyan character.mark_colour", "band", "left",
        "blue clothing.colour", "robe", "white style.mark_colour", "second", "red"]
    assert not torch.equal(text.tokenize(["red robe"]), text.tokenize(["red ball"]))


def test_lora_files_map_onto_the_model(base, narrow):
    modules = dict(base.unet.named_modules())
    for tensors in [*narrow, *weights.load_loras("clean")]:
        stems = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
        assert len(tensors) == 3 * len(stems) and stems == {loras.PREFIX + name for name in base.targets()}
        for stem in stems:
            down, up = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
            weight = modules[stem.removeprefix(loras.PREFIX)].weight
            assert (up.flatten(1) @ down.flatten(1)).numel() == weight.numel()
            assert down.dtype == up.dtype == torch.float16 and torch.isfinite(up).all()


def test_the_lora_for_few_steps_acts_on_every_layer(base):
    tensors = UNET.load_turbo()
    stems = {key.removesuffix(".alpha").removeprefix(loras.PREFIX) for key in tensors if key.endswith(".alpha")}
    assert stems == set(turbo.layers(base)) > set(base.targets()) and len(tensors) == 3 * len(stems)
    for name, module in turbo.layers(base).items():
        down, up, alpha = (tensors[f"{loras.PREFIX}{name}.{part}"] for part in ("lora_A.weight", "lora_B.weight",
                                                                                "alpha"))
        assert down.shape == (8, *module.weight.shape[1:]) and up.shape[:2] == (module.weight.shape[0], 8)
        assert up.numel() == 8 * len(up) and alpha == 8 and down.dtype == up.dtype == torch.float16
        assert torch.isfinite(down).all() and torch.isfinite(up).all()
    with pytest.raises(ValueError, match="'joint' has no LoRA for few steps"):
        JOINT.load_turbo()


def test_judge_knows_renders(judge):
    scenes = exam(np.random.default_rng(77), 600)
    right = accuracy(judge, scenes, render.render(scenes))
    assert min(right[category] for category in scene.CATEGORIES) >= 0.99
    assert min(right[attribute] for attribute in scene.NAMED) >= 0.97


@pytest.mark.parametrize("count", [16, 32])
def test_base_draws_what_is_asked(count, sampler, judge):
    obeyed = report.base_obedience(sampler, judge, count)
    assert np.mean([obeyed[attribute] for attribute in scene.NAMED]) >= 0.95


@pytest.mark.parametrize("count", [1, 4])
def test_a_narrow_lora_alone_shows_its_concept_and_the_base_does_not(count, sampler, judge):
    shares = report.alone(sampler, judge, per_concept=count)
    assert np.mean([with_it for with_it, _ in shares.values()]) >= 0.9
    assert np.mean([without for _, without in shares.values()]) <= 0.1


def test_sampler_is_deterministic_whatever_the_batch(sampler):
    task = protocol.all_sets((3,))[5]
    ones = (1.0, 1.0, 1.0)
    mine = [Picture(task.prompt(), 4, task.loras, make(ones)) for make in (Merge, Switch, Composite)]
    together = sampler.draw([*mine, Picture("green ball", 9)], steps=4)
    assert torch.equal(together, sampler.draw([*mine, Picture("green ball", 9)], steps=4))
    for i, picture in enumerate(mine):
        assert torch.allclose(sampler.draw([picture], steps=4)[0], together[i], atol=2e-4)


def test_one_lora_is_the_same_by_every_method_and_none_is_the_base(sampler):
    prompt, lora = "vexa red pointed creature left", (0,)
    drawn = sampler.draw([Picture(prompt, 1, lora, make((1.0,))) for make in (Merge, Switch, Composite)]
                         + [Picture(prompt, 1, lora, Merge((0.0,))), Picture(prompt, 1)], steps=5)
    assert torch.allclose(drawn[0], drawn[1], atol=1e-5) and torch.allclose(drawn[0], drawn[2], atol=1e-5)
    assert torch.equal(drawn[3], drawn[4]) and not torch.allclose(drawn[0], drawn[4], atol=0.05)


def rewritten(*files):
    """A copy of the base whose weights the LoRAs were merged into."""
    copy = weights.load_base()
    modules = dict(copy.unet.named_modules())
    for tensors in files:
        for stem in (key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")):
            weight = modules[stem.removeprefix(loras.PREFIX)].weight
            up, down = tensors[f"{stem}.lora_B.weight"].float(), tensors[f"{stem}.lora_A.weight"].float()
            delta = (up.flatten(1) @ down.flatten(1)).view_as(weight)
            weight.data += delta * float(tensors[f"{stem}.alpha"]) / down.shape[0]
    return copy


def test_merge_equals_weights_that_were_merged(sampler, narrow):
    """The bank against a copy of the base whose weights were rewritten."""
    prompt = "vexa red pointed creature, drosh blue robe"
    with Sampler(rewritten(narrow[0], narrow[3]), []) as plain:
        expected = plain.draw([Picture(prompt, 2)], steps=6)
    merged = sampler.draw([Picture(prompt, 2, (0, 3), Merge((1.0, 1.0)))], steps=6)
    assert torch.allclose(merged, expected, atol=1e-3)


def test_a_lora_that_is_always_on_is_part_of_the_model(narrow):
    """Against a copy of the base that it was merged into: whatever the method, the places and how they are found, and
    without any LoRA. The methods' own LoRAs are as many as before."""
    task, always = protocol.all_sets((3,))[5], UNET.load_turbo()
    recipes = (*evaluate.METHODS, "Routed", "Routed once", "Routed contrast", "Composite words", "Masks")

    def drawn(sampler: Sampler, guidance: float):
        with sampler:
            pictures = [evaluate.RECIPES[name].picture(task, sampler.bank) for name in recipes]
            images = sampler.draw([*pictures, Picture(task.prompt(), task.seed)], 3, guidance)
        return images, sampler.evaluations

    for guidance in (1.0, 2.0):
        merged, cost = drawn(Sampler(rewritten(always), narrow), guidance)
        ours, same_cost = drawn(Sampler(weights.load_base(), narrow, [always]), guidance)
        without, _ = drawn(Sampler(weights.load_base(), narrow), guidance)
        assert torch.allclose(ours, merged, atol=1e-3) and cost == same_cost
        assert ((ours - without).abs().amax((1, 2, 3)) > 0.02).all()


def test_a_sampler_leaves_the_layers_as_they_were(narrow):
    base = weights.load_base()
    sampler = Sampler(base, narrow[:1], [UNET.load_turbo()])
    before = base.unet.conv_in(torch.ones(1, 12, 16, 16))
    for _ in range(2):
        with sampler:
            assert not torch.equal(base.unet.conv_in(torch.ones(1, 12, 16, 16)), before)
        assert torch.equal(base.unet.conv_in(torch.ones(1, 12, 16, 16)), before)
        assert not any("forward" in module.__dict__ for module in base.unet.modules())


def test_guidance_of_one_needs_no_negative_side(sampler):
    """`guides` that change nothing make the sampler evaluate it all the same."""
    task = protocol.all_sets((3,))[5]
    pictures = [evaluate.RECIPES[name].picture(task, sampler.bank)
                for name in (*evaluate.METHODS, "Routed", "Routed contrast")]
    rows, predict = [], sampler._predict
    sampler._predict = lambda *args: (rows.append(len(args[4])), predict(*args))[1]
    try:
        alone = sampler.draw(pictures, 3, 1.0)
        once = sum(rows)
        rows.clear()
        both = sampler.draw(pictures, 3, 1.0, [lambda step, x, positive, negative: negative] * len(pictures))
    finally:
        del sampler._predict
    assert torch.allclose(alone, both, atol=1e-3) and once < 0.6 * sum(rows)


def test_guidance_of_one_step_alone(sampler):
    """Against both sides in every step, of which the others are guided by nothing."""
    task = protocol.all_sets((3,))[5]
    pictures = [evaluate.RECIPES[name].picture(task, sampler.bank) for name in (*evaluate.METHODS, "Routed")]
    rows, predict = [], sampler._predict
    sampler._predict = lambda *args: (rows.append(len(args[4])), predict(*args))[1]
    try:
        ours = sampler.draw(pictures, 3, (1.0, 3.0, 1.0))
        once = sum(rows)
        rows.clear()
        wanted = sampler.draw(pictures, 3, 3.0, [lambda step, x, positive, negative: negative if step.index == 1
                                                 else positive] * len(pictures))
    finally:
        del sampler._predict
    assert torch.allclose(ours, wanted, atol=1e-3) and once < 0.75 * sum(rows)
    assert not torch.allclose(ours, sampler.draw(pictures, 3, 1.0), atol=1e-2)
    with pytest.raises(ValueError):
        sampler.draw(pictures[:1], 3, (1.0, 3.0))


def test_a_trail_ends_on_the_guided_picture(base):
    prompts = ["red pointed creature left, blue robe, yellow ball", "green round creature"]
    noise = torch.stack([torch.randn(base.latent, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    states = turbo.trail(base, noise, base.contexts(prompts))
    with Sampler(base, []) as sampler:
        drawn = sampler.draw([Picture(prompt, seed) for prompt, seed in zip(prompts, (3, 4), strict=True)],
                             turbo.TEACHER_STEPS)
    assert torch.equal(states[0], noise) and len(states) == turbo.LEVELS + 1
    assert torch.allclose(model.decode(states[-1]), drawn, atol=1e-4)


def test_training_for_few_steps_leaves_the_base_as_it_was(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tensors = turbo.train_turbo(base, 2, steps=3, batch=2)
    assert set(tensors) == set(UNET.load_turbo())
    assert all(tensors[key].any() for key in tensors if key.endswith("lora_B.weight"))
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_practice_is_of_no_concept_that_is_measured():
    """Nor of its words: all of practice are one to the tokenizer, and none of the prompts shows a concept."""
    own = [concept for concept, _ in practice.PRACTICE]
    assert {concept.category for concept in own} == set(scene.CATEGORIES)
    assert {int(text.tokenize([concept.name])[0, 0]) for concept in own} == {text.UNKNOWN}
    for number, (concept, around) in enumerate(practice.PRACTICE):
        met = practice.pictures_of(number)
        assert scene.shows(met.scenes.values, concept).all() and all(concept.name in prompt for prompt in met.prompts)
        assert all((met.scenes.values[attribute] == value).all() for attribute, value in around.items())
        assert not any(scene.shows(met.scenes.values, other).any() for other in scene.CONCEPTS)
        assert around not in worlds.WORLDS.values()
    prompts, branches = practice.lineups(np.random.default_rng(1), 200)
    assert not any(other.name in prompt for other in scene.CONCEPTS for prompt in prompts)
    sizes = [sum(gain > 0 for gain in branch.gains) for branch in branches]
    assert [round(sizes.count(n) / 200, 1) for n in range(4)] == pytest.approx(practice.SHARES, abs=0.1)
    for prompt, branch in zip(prompts, branches, strict=True):
        acting = [gain for gain in branch.gains if gain]
        assert all((0.6 if len(acting) > 1 else 0.8) <= gain <= 1 for gain in acting)
        named = {concept.name for concept, gain in zip(own, branch.gains, strict=True) if gain}
        words = set(prompt.replace(",", "").split())
        assert not prompt or {concept.name for concept in own if concept.name in words} == named


def test_practice_lets_loras_act_in_teacher_and_student(base, narrow, monkeypatch):
    """Against a copy of the base that one was merged into. The base is as before, and training begins from the file."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    forwards = {name: module.__dict__.get("forward") for name, module in base.unet.named_modules()}
    merged, trails, losses = rewritten(narrow[0]), [], []
    trail, lesson = turbo.trail, turbo._lesson

    def watched_trail(of, noise, contexts):
        trails.append((trail(of, noise, contexts), trail(merged, noise, contexts), trail(weights.load_base(), noise,
                                                                                        contexts)))
        return trails[-1][0]

    def watched_lesson(of, states, contexts, generator, batch, at_work):
        state = generator.get_state()
        losses.append(lesson(merged, states, contexts, generator, batch).item())
        generator.set_state(state)
        loss = lesson(of, states, contexts, generator, batch, at_work)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(turbo, "trail", watched_trail)
    monkeypatch.setattr(turbo, "_lesson", watched_lesson)
    begin = UNET.load_turbo()
    begin |= {key: torch.zeros_like(value) for key, value in begin.items() if key.endswith("lora_B.weight")}
    tensors = turbo.train_practised(base, begin, [narrow[0], narrow[3]], ["vexa red pointed creature left"] * 2,
                                    [Branch((1.0, 0.0))] * 2, steps=1, batch=2)
    ((ours, theirs, without),) = trails
    assert torch.allclose(ours, theirs, atol=1e-3) and not torch.allclose(ours, without, atol=0.1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert all(torch.allclose(tensors[key].float(), begin[key].float(), atol=0.01) for key in begin)
    assert any(tensors[key].any() for key in begin if key.endswith("lora_B.weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert {name: module.__dict__.get("forward") for name, module in base.unet.named_modules()} == forwards


@pytest.mark.parametrize("count", [16, 32])
def test_the_lora_for_few_steps_stands_for_guidance_and_for_many(count, base, judge):
    found = report.few_steps(base, judge, count)
    for steps in (4, 8):
        ours, without = (found[f"{name}, {steps} steps, guidance 1"] for name in ("turbo", "base"))
        assert ours.error < 0.75 * without.error
        assert ours.named >= found["base, 20 steps, guidance 2"].named - 0.05
