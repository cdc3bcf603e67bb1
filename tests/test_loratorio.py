"""LoRAtorio as a method: schedule, re-centring, passes without a positive side, masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.session import OTHER, POSITIVE, UNCONDITIONAL, Call, RunContext, Sent
from lora_ensemble.tests.operations import Operations
from lora_ensemble.tests.test_patches import reference_cosine, reference_softmin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOTAL = 10
SHAPE = (2, 4, 9, 8)
SIGMA = torch.tensor([1.0, 1.0])
FACTS = RunContext(tuple(float(TOTAL - i) for i in range(TOTAL + 1)), tuple(1 - i / TOTAL for i in range(TOTAL)), SHAPE)


def step(index: int) -> Step:
    return Step(index, TOTAL, float(TOTAL - index))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


class World:
    """A fake model: every branch has predictions of its own, one per side."""

    def __init__(self, count: int, shape: tuple[int, ...] = SHAPE, strength: float = 1.0):
        self.base = {side: random(*shape, seed=i) for i, side in enumerate((POSITIVE, UNCONDITIONAL, OTHER))}
        self.turns = {(i, side): strength * random(*shape, seed=10 + 10 * i + j) for i in range(count)
                      for j, side in enumerate(self.base)}

    def predict(self, branch: Branch, side: str) -> Tensor:
        return self.base[side] + sum(g * self.turns[i, side] for i, g in enumerate(branch.gains))

    def call(self, session, at: Step, x: Tensor, *sides: str | None, sigma: Tensor = SIGMA) -> list[Tensor | None]:
        session.observe(at, x)
        branches = session.branches(at)
        predictions = [None if side is None else torch.stack([self.predict(b, side) for b in branches])
                       for side in sides]
        return session.mix(at, Call(x, sigma, branches, predictions, [side or UNCONDITIONAL for side in sides]))


def reference(world: World, count: int, x: Tensor, inverse_temperature: float, space: str = "noise",
              patch: int = 2) -> np.ndarray:
    """Weights per pixel [N, B, 1, h, w] by the formulas, in float64."""
    out = []
    for b in range(x.shape[0]):
        def vectors(prediction, b=b):
            value = x[b] - prediction[b] if space == "noise" else prediction[b]
            return value.double().numpy()

        base = vectors(world.base[POSITIVE])
        loras = np.stack([vectors(world.base[POSITIVE] + world.turns[i, POSITIVE]) for i in range(count)])
        weights = reference_softmin(reference_cosine(base, loras, patch), inverse_temperature)
        full = weights.repeat(patch, axis=1).repeat(patch, axis=2)[:, None, :x.shape[-2], :x.shape[-1]]
        out.append(full)
    return np.stack(out, axis=1)


@pytest.mark.parametrize("space", ["noise", "x0"])
@pytest.mark.parametrize("index", [0, 1, 4])
def test_both_sides_follow_the_formulas(index, space):
    world, x = World(3), random(*SHAPE, seed=99)
    session = LoRAtorio((1.0,) * 3, kappa=0.7, space=space, recenter_lambda=0.25).begin(FACTS)
    positive, negative = world.call(session, step(index), x, POSITIVE, UNCONDITIONAL)
    w = reference(world, 3, x, 0.7 * index, space)
    c = sum(w[i] * (world.base[POSITIVE] + world.turns[i, POSITIVE]).numpy() for i in range(3))
    u = sum(w[i] * (world.base[UNCONDITIONAL] + world.turns[i, UNCONDITIONAL]).numpy() for i in range(3))
    np.testing.assert_allclose(positive.numpy(), c, atol=2e-4)
    np.testing.assert_allclose(negative.numpy(), 0.25 * u + 0.75 * world.base[UNCONDITIONAL].numpy(), atol=2e-4)


def test_the_first_step_is_composite_with_re_centring():
    world, x = World(3), random(*SHAPE, seed=99)
    positive, negative = world.call(LoRAtorio((1.0,) * 3).begin(FACTS), step(0), x, POSITIVE, UNCONDITIONAL)
    mean = {side: sum(world.predict(Branch(tuple(float(i == k) for i in range(3))), side) for k in range(3)) / 3
            for side in world.base}
    torch.testing.assert_close(positive, mean[POSITIVE])
    torch.testing.assert_close(negative, (mean[UNCONDITIONAL] + world.base[UNCONDITIONAL]) / 2)


def test_temperature_grows_with_what_has_passed():
    def inverse(unit: str, index: int) -> float:
        return LoRAtorio((1.0,), unit=unit).inverse_temperature(step(index), FACTS.times)

    assert [inverse("steps", j) for j in (0, 1, 9)] == [0, 10, 90]
    assert [inverse("progress", j) for j in (0, 9)] == [0, 10]
    assert [inverse("timesteps", j) for j in (0, 5)] == [0, pytest.approx(5000)]
    back = LoRAtorio((1.0,), unit="timesteps").inverse_temperature(step(5), tuple(reversed(FACTS.times)))
    assert back == pytest.approx(5000)  # from a picture to its noise: not to what is like the base model


def test_identical_loras_are_the_single_lora():
    world, x = World(1), random(*SHAPE, seed=99)
    for i in (1, 2):
        world.turns |= {(i, side): world.turns[0, side] for side in world.base}
    single = world.predict(Branch((1.0,)), POSITIVE)
    for index in range(TOTAL):
        session = LoRAtorio((1.0,) * 3, recenter_lambda=1.0).begin(FACTS)
        positive, negative = world.call(session, step(index), x, POSITIVE, UNCONDITIONAL)
        torch.testing.assert_close(positive, single)
        torch.testing.assert_close(negative, world.predict(Branch((1.0,)), UNCONDITIONAL))
    half = LoRAtorio((1.0,)).begin(FACTS)
    negative = world.call(half, step(3), x, POSITIVE, UNCONDITIONAL)[1]
    torch.testing.assert_close(negative, world.base[UNCONDITIONAL] + world.turns[0, UNCONDITIONAL] / 2)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 1, "scope": "patch"}, {"upsampling": "bilinear"}])
def test_strength_zero_is_the_base_exactly(options):
    world, x = World(3), random(*SHAPE, seed=99)
    session = LoRAtorio((0.0,) * 3, **options).begin(FACTS)
    for index in range(3):
        mixed = world.call(session, step(index), x, POSITIVE, UNCONDITIONAL)
        assert torch.equal(mixed[0], world.base[POSITIVE]) and torch.equal(mixed[1], world.base[UNCONDITIONAL])


def test_no_lora_is_the_base():
    session = LoRAtorio(()).begin(FACTS)
    assert session.branches(step(0)) == (Branch(()),)
    prediction = random(1, *SHAPE, seed=1)
    call = Call(prediction[0], SIGMA, (Branch(()),), [prediction, None], (POSITIVE, UNCONDITIONAL))
    assert torch.equal(session.mix(step(0), call)[0], prediction[0]) and session.mix(step(0), call)[1] is None


def test_all_of_the_pool_is_static():
    world, x = World(3), random(*SHAPE, seed=99)
    static, dynamic = LoRAtorio((1.0,) * 3), LoRAtorio((1.0,) * 3, top_k=3, recheck_every=4)
    for index in range(TOTAL):
        a, b = (world.call(m.begin(FACTS), step(index), x, POSITIVE, UNCONDITIONAL) for m in (static, dynamic))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_one_per_image_is_one_lora_for_all_pixels():
    world, x = World(3), random(*SHAPE, seed=99)
    positive, _ = world.call(LoRAtorio((1.0,) * 3, top_k=1).begin(FACTS), step(4), x, POSITIVE, UNCONDITIONAL)
    for b in range(2):
        cosine = reference_cosine((x - world.base[POSITIVE])[b].double().numpy(), np.stack(
            [(x - world.base[POSITIVE] - world.turns[i, POSITIVE])[b].double().numpy() for i in range(3)]), 2)
        chosen = int(cosine.mean(axis=(1, 2)).argmin())
        torch.testing.assert_close(positive[b], (world.base[POSITIVE] + world.turns[chosen, POSITIVE])[b])


def test_order_of_the_loras_does_not_matter():
    world, x = World(3), random(*SHAPE, seed=99)
    want = world.call(LoRAtorio((1.0,) * 3, top_k=2).begin(FACTS), step(4), x, POSITIVE, UNCONDITIONAL)
    other = World(3)
    other.turns = {(i, side): world.turns[(2, 0, 1)[i], side] for i in range(3) for side in world.base}
    got = other.call(LoRAtorio((1.0,) * 3, top_k=2).begin(FACTS), step(4), x, POSITIVE, UNCONDITIONAL)
    torch.testing.assert_close(got, want)


def test_sides_in_any_order_and_other_conds_are_not_re_centred():
    """DualCFG asks for negative, middle, positive."""
    world, x = World(2), random(*SHAPE, seed=99)
    c, u = world.call(LoRAtorio((1.0, 1.0)).begin(FACTS), step(3), x, POSITIVE, UNCONDITIONAL)
    session = LoRAtorio((1.0, 1.0)).begin(FACTS)
    negative, middle, positive = world.call(session, step(3), x, UNCONDITIONAL, OTHER, POSITIVE)
    assert torch.equal(positive, c) and torch.equal(negative, u)
    w = torch.from_numpy(reference(world, 2, x, 30.0)).float()
    want = sum(w[i] * (world.base[OTHER] + world.turns[i, OTHER]) for i in range(2))
    torch.testing.assert_close(middle, want, atol=2e-3, rtol=0)


def test_a_perturbed_pass_keeps_the_weights_of_its_evaluation():
    """PAG and SLG evaluate the positive again on the same latent: what they perturb must not move the weights."""
    world, x = World(2), random(*SHAPE, seed=99)
    session = LoRAtorio((1.0, 1.0)).begin(FACTS)
    world.call(session, step(3), x, POSITIVE, UNCONDITIONAL)
    w = torch.from_numpy(reference(world, 2, x, 30.0)).float()
    perturbed = World(2)
    perturbed.turns = {key: -value for key, value in world.turns.items()}
    (got,) = perturbed.call(session, step(3), x, POSITIVE)
    want = sum(w[i] * (world.base[POSITIVE] - world.turns[i, POSITIVE]) for i in range(2))
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    fresh = perturbed.call(LoRAtorio((1.0, 1.0)).begin(FACTS), step(3), x, POSITIVE)[0]
    assert (fresh - got).abs().max() > 0.1, "on a latent of its own it does define them"
    again = perturbed.call(session, step(3), x.clone(), POSITIVE, UNCONDITIONAL)[0]
    torch.testing.assert_close(again, fresh)


def test_weights_hold_between_weighings():
    """With reweigh_every 3: those of step 3 in steps 4 and 5, at their own predictions, and new ones in step 6. With
    1, the paper, each step has its own."""
    world, x = World(2), random(*SHAPE, seed=99)
    for every, found_at in ((3, {3: 3, 4: 3, 5: 3, 6: 6}), (1, {3: 3, 4: 4, 5: 5, 6: 6})):
        session = LoRAtorio((1.0, 1.0), kappa=0.4, reweigh_every=every).begin(FACTS)
        for index, of in found_at.items():
            got = world.call(session, step(index), x + index, POSITIVE, UNCONDITIONAL)[0]
            w = torch.from_numpy(reference(world, 2, x + of, 0.4 * of)).float()
            want = sum(w[i] * (world.base[POSITIVE] + world.turns[i, POSITIVE]) for i in range(2))
            torch.testing.assert_close(got, want, atol=2e-3, rtol=0)


def test_other_members_are_weighed_at_once():
    """Weights of two LoRAs say nothing of a third that a re-check brings in."""
    world, x = World(3), random(*SHAPE, seed=99)
    session = LoRAtorio((1.0,) * 3, kappa=0.4, top_k=2, recheck_every=4, reweigh_every=8).begin(FACTS)
    for index in range(8):
        world.call(session, step(index), x, POSITIVE)
        assert session._weighed == session._active and len(session._weights) == len(session._active)


def test_an_unconditional_pass_alone_uses_the_weights_found_last():
    """SAG evaluates the negative alone, on a latent of its own."""
    world, x = World(2), random(*SHAPE, seed=99)
    session = LoRAtorio((1.0, 1.0)).begin(FACTS)
    _, want = world.call(session, step(3), x, POSITIVE, UNCONDITIONAL)
    assert torch.equal(world.call(session, step(3), x + 1, UNCONDITIONAL)[0], want)
    alone = LoRAtorio((1.0, 1.0)).begin(FACTS)
    got = world.call(alone, step(3), x, UNCONDITIONAL)[0]
    mean = sum(world.turns[i, UNCONDITIONAL] for i in range(2)) / 2
    torch.testing.assert_close(got, world.base[UNCONDITIONAL] + mean / 2)
    assert "uniform" in alone.notes()


def test_without_a_negative_there_is_no_re_centring_and_the_notes_say_so():
    world, x = World(2), random(*SHAPE, seed=99)
    session = LoRAtorio((1.0, 1.0)).begin(FACTS)
    assert world.call(session, step(0), x, POSITIVE, None)[1] is None
    assert session.notes()["recentred"] is False
    world.call(session, step(1), x, POSITIVE, UNCONDITIONAL)
    notes = session.notes()
    assert notes["recentred"] is True and notes["active"] == [0, 1]
    assert sum(notes["weights"].tolist()) == pytest.approx(1)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_confine_loras_and_leave_the_base_where_none_may_act():
    left, right = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8)
    left[..., :4], right[..., 4:7] = 1, 1
    world, x = World(2), random(*SHAPE, seed=99)
    facts = RunContext(FACTS.sigmas, FACTS.times, SHAPE, (left, right))
    positive, _ = world.call(LoRAtorio((1.0, 1.0)).begin(facts), step(3), x, POSITIVE, UNCONDITIONAL)
    first, second = (world.base[POSITIVE] + world.turns[i, POSITIVE] for i in range(2))
    torch.testing.assert_close(positive[..., :4], first[..., :4])
    torch.testing.assert_close(positive[..., 4:7], second[..., 4:7])
    assert torch.equal(positive[..., 7:], world.base[POSITIVE][..., 7:])


@pytest.mark.parametrize(("share", "sides", "said"), [
    (0.5, (POSITIVE,), 0), (0.2, (POSITIVE,), 1), (1.0, (POSITIVE,), 1), (0.2, (POSITIVE, UNCONDITIONAL), 0)])
def test_a_share_of_the_base_that_is_set_in_vain(share, sides, said):
    """At cfg 1 there is no prediction that could be re-centred; what nobody has set is not named."""
    world, x = World(2), random(*SHAPE, seed=9)
    session = LoRAtorio((1.0, 1.0), recenter_lambda=share).begin(FACTS)
    branches = session.branches(step(0))
    session.mix(step(0), Call(x, SIGMA, branches,
                              [torch.stack([world.predict(b, side) for b in branches]) for side in sides], sides))
    assert [f"recenter_lambda {share:g} did nothing" in line for line in session.missed(["a", "b"])] == [True] * said


def test_masks_of_white_and_masks_on_video():
    world, x = World(2), random(*SHAPE, seed=99)
    white = RunContext(FACTS.sigmas, FACTS.times, SHAPE, (torch.ones(1, 1, 9, 8), None))
    a, b = (world.call(LoRAtorio((1.0, 1.0)).begin(f), step(3), x, POSITIVE)[0] for f in (FACTS, white))
    torch.testing.assert_close(a, b)
    shape = (1, 4, 3, 8, 8)
    film, mask = World(2, shape), torch.zeros(1, 1, 8, 8)
    mask[..., :4, :] = 1
    facts = RunContext(FACTS.sigmas, FACTS.times, shape, (mask, 1 - mask))
    (got,) = film.call(LoRAtorio((1.0, 1.0)).begin(facts), step(3), random(*shape, seed=99), POSITIVE)
    for rows, i in ((slice(0, 4), 0), (slice(4, 8), 1)):
        want = film.base[POSITIVE] + film.turns[i, POSITIVE]
        torch.testing.assert_close(got[..., rows, :], want[..., rows, :])


@pytest.mark.parametrize(("options", "masks", "most"), [
    ({}, (), 23), ({"upsampling": "bilinear"}, (), 23), ({"space": "x0"}, (), 22), ({"top_k": 2}, (), 30),
    ({"top_k": 2, "recheck_every": 3}, (), 30), ({}, (torch.ones(1, 1, 8, 8), None, None), 33)])
def test_operations_of_a_step(options, masks, most):
    """On a fast GPU the weights take as long as the host needs to ask for their operations, some 15 us each. Eight of
    them mix the two sides, one is for the record; once a re-check has arrived none chooses among those left."""
    world, x, facts = World(3, (1, 4, 8, 8)), random(1, 4, 8, 8, seed=99), replace(FACTS, masks=masks)
    session, counts = LoRAtorio((1.0,) * 3, **options).begin(facts), []
    for index in range(6):
        at = step(index)
        branches = session.branches(at)
        predictions = [torch.stack([world.predict(b, side) for b in branches]) for side in (POSITIVE, UNCONDITIONAL)]
        with torch.no_grad(), Operations() as asked:
            session.observe(at, x)
            session.mix(at, Call(x, SIGMA, branches, predictions, (POSITIVE, UNCONDITIONAL)))
        counts.append(len(asked.names))
        assert counts[-1] <= most, asked.names
    assert "recheck_every" not in options or counts[4] == counts[5] <= 23


class Reads(TorchDispatchMode):
    """Counts the operations that hand a device's numbers to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(name in str(op) for name in ("local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")):
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


MIXING = {
    "static": LoRAtorio((1.0,) * 3), "bilinear": LoRAtorio((1.0,) * 3, upsampling="bilinear", space="x0"),
    "pool": LoRAtorio((1.0,) * 3, top_k=2), "patches": LoRAtorio((1.0,) * 3, top_k=1, scope="patch"),
    "re-checked": LoRAtorio((1.0,) * 3, top_k=1, recheck_every=3),
    "offline": CMLoRA((1.0,) * 3, decay="halving"), "online": CMLoRA((1.0,) * 3, (True, False, True), order="online"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_no_step_makes_the_host_wait_for_the_device(name, monkeypatch):
    """Nothing is read back but what was sent at an earlier step."""
    now, sent = [0], []

    def read(self):
        sent.append((self.step, now[0]))
        with torch.utils._python_dispatch._disable_current_modes():
            return self.value.tolist()

    monkeypatch.setattr(Sent, "read", read)
    masks = (torch.ones(1, 1, 9, 8), None, None)
    session = MIXING[name].begin(RunContext(FACTS.sigmas, FACTS.times, SHAPE, masks))
    world, x = World(3), random(*SHAPE, seed=99)
    with Reads() as reads:
        for index in range(TOTAL):
            now[0] = index
            mixed = world.call(session, step(index), x + index, POSITIVE, UNCONDITIONAL)
    assert reads.found == [] and all(at < then for at, then in sent) and mixed[0].shape == SHAPE
    assert bool(sent) == (name in ("re-checked", "online"))


@pytest.mark.parametrize("options", [{"patch": 0}, {"kappa": -1}, {"top_k": -1}, {"recheck_every": 0},
                                     {"recenter_lambda": 1.5}], ids=str)
def test_wrong_numbers_are_named(options):
    with pytest.raises(ValueError, match=f"LoRAtorio: {next(iter(options))}"):
        LoRAtorio((1.0,), **options)
