"""How pictures are counted: shares, intervals, leaks, and what each method costs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_ensemble.benchmarks import cached, guidance, quality
from lora_ensemble.benchmarks.cuts import cut_of
from lora_ensemble.engine.yielding import yield_to
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.routed import Routing, trusted
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.session import RunContext, begin
from lora_ensemble.testbed import evaluate, protocol, routing, scene, worlds
from lora_ensemble.testbed.beds import BEDS
from lora_ensemble.testbed.loras import PREFIX
from lora_ensemble.testbed.sampler import Sampler, low_rank

AS_FILES = "Routed as the files are"


@pytest.fixture(scope="module")
def task():
    return next(s for s in protocol.all_sets((2,)) if [c.name for c in s.concepts] == ["vexa", "drosh"])


def reading(task, shown: int) -> dict[str, int]:
    """What a judge says of a picture that follows the prompt and shows the first `shown` concepts of the set."""
    return dict(task.asked) | {c.category: scene.number(c) if i < shown else 0 for i, c in enumerate(task.concepts)}


def test_score_counts_concepts_and_leaks(task):
    assert evaluate.score(task, reading(task, 2)) == ([True, True], False)
    assert evaluate.score(task, reading(task, 1)) == ([True, False], False)
    leaking = reading(task, 1) | {"object.colour": worlds.WORLDS["vexa"]["object.colour"]}
    assert evaluate.score(task, leaking) == ([True, False], True)


def test_interval_covers_the_mean_and_shrinks():
    rng = np.random.default_rng(0)
    few, many = rng.random(20) < 0.3, rng.random(2000) < 0.3
    narrow, wide = evaluate.interval(many.astype(float)), evaluate.interval(few.astype(float))
    assert narrow[0] < many.mean() < narrow[1] and narrow[1] - narrow[0] < wide[1] - wide[0]
    assert evaluate.interval(np.ones(5)) == (1.0, 1.0)


def test_sample_of_sets_is_fixed_and_balanced():
    first, again = protocol.some_sets(16), protocol.some_sets(16)
    assert [s.index for s in first] == [s.index for s in again]
    assert [len([s for s in first if len(s.concepts) == n]) for n in (2, 3, 4, 5)] == [4, 4, 4, 4]
    assert len(protocol.some_sets(None)) == 480


def test_rows_of_a_run(task):
    """Costs in branches are exact: 20 steps, N branches for Composite, one for the others."""
    base, judge, loras = BEDS["unet"].load_base(), BEDS["unet"].load_judge(), BEDS["unet"].load_loras("narrow")
    rows = {name: list(evaluate.evaluate("narrow", name, make, [task], base, judge, loras, 1.0))
            for name, make in {"Alone": None, **{n: evaluate.RECIPES[n] for n in evaluate.METHODS}}.items()}
    assert {name: row[0].branches for name, row in rows.items()} == {
        "Alone": 20, "Merge": 20, "Switch": 20, "Composite": 40, "KLoRA": 20, "ESTLoRA": 20,
        "CMLoRA": 40, "LoRAtorio": 60}
    for two, total in rows.values():
        assert (two.n, total.n) == (2, None) and 0 <= two.shown <= 1 and total.shown == two.shown
    assert len(evaluate.summary([row for pair in rows.values() for row in pair]).splitlines()) == 2 + 2 * len(rows)
    with Sampler(base, loras) as sampler:
        assert sampler.routed.current is None
    assert "forward" not in base.unet.down_res1.conv1.__dict__


def test_lines_of_either_layout_are_those_that_are_drawn_alone(capsys):
    """From one drawing of all sets; a column says which is which."""
    def lines(layout: str) -> list[dict]:
        assert quality.main(["--sets", "8", "--sizes", "2", "--steps", "2", "--regime", "narrow", "--methods", "Merge",
                             "--layout", layout]) == 0
        *rows, table = capsys.readouterr().out.split("\n\n")
        assert (" layout |" in table) == (layout == "each")
        return [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in rows[0].splitlines()]

    each = lines("each")
    assert {(row["n"], row["layout"]): row["sets"] for row in each} == {
        (n, layout): count for n in (2, None) for layout, count in (("both", 2), ("said", 1), ("unsaid", 1))}
    for layout in evaluate.LAYOUTS:
        assert lines(layout) == [row for row in each if row["layout"] == layout]


def test_few_steps_with_the_lora_for_them(task):
    """The rows are those of a sampler with that LoRA always on, at guidance 1, which costs half a guided branch."""
    told = []
    rows = quality.run([task], ["narrow"], ["Merge", "Routed"], 1.0, "cpu", told.append, steps=4, guidance=1.0,
                       turbo=True)
    assert rows == told and [(row.method, row.n) for row in rows] == [
        ("Merge", 2), ("Merge", None), ("Routed", 2), ("Routed", None)]
    assert [row.branches for row in rows[::2]] == [4, 5]


@pytest.mark.parametrize("body", BEDS)
@pytest.mark.parametrize("name", ["Routed", "Routed once", "Routed contrast", "start"])
def test_clean_loras_leave_their_places_and_narrow_ones_do_not(body, name, monkeypatch):
    """In every mode, and where the base model draws alone at first."""
    seen = []
    monkeypatch.setattr(routing, "trusted", lambda share: seen.append(trusted(share)) or seen[-1])
    late = evaluate.Recipe(evaluate.METHODS["Merge"], "words", Routing(start=0.5, trust=True))
    recipe = evaluate.RECIPES.get(name, late)
    tasks = [task for task in BEDS[body].all_sets((3,), 101) if {c.category for c in task.concepts} == {
        "character", "clothing", "object"} and task.laid_out][:2]
    free = {}
    for regime in worlds.REGIMES:
        with Sampler(BEDS[body].load_base(), BEDS[body].load_loras(regime)) as sampler:
            sampler.draw([recipe.picture(task, sampler.bank) for task in tasks], 2)
        free[regime] = torch.stack(seen)
        seen.clear()
    assert free["clean"].shape == free["narrow"].shape == (2, 3)
    assert free["clean"].mean() > 0.5 and free["narrow"].mean() < 0.2


def test_a_style_that_yields_is_drawn_as_a_lora_of_its_own():
    """Beside pictures in which nobody yields, or another style to another background."""
    bed = BEDS["unet"]
    loras, tasks = bed.load_loras("narrow"), [task for task in bed.all_sets((3,), 101) if {
        c.category for c in task.concepts} == {"character", "style", "background"}]
    tasks = [tasks[0], next(t for t in tasks if set(t.loras).isdisjoint(tasks[0].loras)), bed.all_sets((2,), 101)[0]]
    assert [[c.category for c in t.concepts].count("style") for t in tasks] == [1, 1, 0]
    with Sampler(bed.load_base(), loras) as sampler:
        found, plain = (sampler.draw([evaluate.RECIPES[name].picture(task, sampler.bank) for task in tasks], 2)
                        for name in ("Routed", AS_FILES))
    for k, task in enumerate(tasks[:2]):
        place = {c.category: lora for c, lora in zip(task.concepts, task.loras, strict=True)}
        freed = yield_to([low_rank(tensors) for tensors in loras], [place["style"]], [place["background"]])[0]
        instead = dict(loras[place["style"]])
        for layer, (op,) in freed[place["style"]].items():
            instead[f"{PREFIX}{layer}.lora_A.weight"] = op.down
            instead[f"{PREFIX}{layer}.lora_B.weight"] = op.up.view_as(instead[f"{PREFIX}{layer}.lora_B.weight"])
        files = [instead if lora == place["style"] else tensors for lora, tensors in enumerate(loras)]
        with Sampler(bed.load_base(), files) as sampler:
            wanted = sampler.draw([evaluate.RECIPES[AS_FILES].picture(task, sampler.bank)], 2)
        assert torch.allclose(found[k], wanted[0], atol=1e-4) and not torch.allclose(found[k], plain[k], atol=1e-3)
    assert torch.allclose(found[2], plain[2], atol=1e-5)


@pytest.mark.parametrize(("arguments", "turbo", "practised", "guidance"), [
    ([], False, False, 2.0), (["--turbo"], True, False, 1.0), (["--turbo", "--guidance", "1.5"], True, False, 1.5),
    (["--practised"], False, True, 1.0), (["--turbo", "--guided", "2"], True, False, (1.0, 2.0, 1.0, 1.0)),
    (["--guidance", "3", "--guided", "1", "4"], False, False, (3.0, 1.0, 1.0, 3.0))], ids=str)
def test_the_lora_for_few_steps_goes_without_guidance(monkeypatch, arguments, turbo, practised, guidance):
    seen = []
    monkeypatch.setattr(quality, "turbo_path", lambda folder, practised: folder / "base.safetensors")
    monkeypatch.setattr(quality, "run", lambda *given: (seen.append(given), [])[1])
    assert quality.main(["--sets", "4", "--steps", "4", *arguments]) == 0
    assert seen[0][-4:] == (4, guidance, turbo, practised)


@pytest.mark.parametrize("step", ["0", "5"])
def test_a_guided_step_that_is_not_there(step, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--sets", "4", "--steps", "4", "--guided", step])
    assert "steps from 1 to 4" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--turbo", "--practised"])
def test_a_body_without_a_lora_for_few_steps_says_so(option, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--body", "joint", option])
    assert "'joint' has no LoRA for few steps" in capsys.readouterr().err


@pytest.mark.parametrize("body", BEDS)
def test_a_cache_that_never_stands_in_changes_nothing(body):
    bed = BEDS[body]
    base, loras, task = bed.load_base(), bed.load_loras("narrow"), bed.all_sets((2,))[0]
    with Sampler(base, loras) as sampler:
        picture = evaluate.RECIPES["Composite"].picture(task, sampler.bank)
        whole = sampler.draw([picture], 4)
    for interval in (1, 2):
        with cached.CachedSampler(base, loras, Uniform(interval)) as sampler:
            assert torch.allclose(sampler.draw([picture], 4), whole, atol=1e-4) is (interval == 1)
            assert (sampler.whole, sampler.rows) == (16 // interval, 16)


@pytest.mark.parametrize(("body", "depth"), [("unet", 1), ("joint", 1), ("joint", 2)])
def test_a_cut_that_is_given_what_it_caught_changes_nothing(body, depth):
    """Two calls of other rows; the deep layers are not called, and their features do matter."""
    base = BEDS[body].load_base()
    cut, contexts = cut_of(base, depth), base.contexts(["a red fox", "a blue house", "snow"])
    x, sigma = torch.randn(3, *base.latent), torch.full((3,), 0.5)
    deep = base.net.mid_attn.norm1 if body == "unet" else base.net.single_blocks[0].linear1
    called: list = []

    def calls() -> list[torch.Tensor]:
        return [base.velocity(x[rows], sigma[rows], contexts[rows]) for rows in (slice(0, 1), slice(1, 3))]

    handle = deep.register_forward_hook(lambda *_: called.append(1))
    with torch.inference_mode():
        found: list = []
        with cut.catch(found):
            whole = calls()
        assert len(found) == len(called) == 2
        with cut.recall(iter(found)):
            again = calls()
        assert len(called) == 2
        with cut.recall(iter([{name: 2 * value for name, value in each.items()} for each in found])):
            other = calls()
        handle.remove()
        for one, two, three, four in zip(whole, again, other, calls(), strict=True):
            assert torch.allclose(one, two, atol=1e-4) and torch.equal(one, four)
            assert (one - three).norm() > 1e-2 * one.norm()
    with pytest.raises(ValueError):
        cut_of(base, 3)


def test_rows_run_whole_when_their_methods_ask():
    """CMLoRA's own schedule on the testbed: as many whole rows as its session names, both sides of guidance."""
    bed = BEDS["unet"]
    base, loras, task = bed.load_base(), bed.load_loras("narrow"), bed.all_sets((3,))[0]
    with cached.CachedSampler(base, loras, None, forecast=True) as sampler:
        picture = evaluate.RECIPES["CMLoRA"].picture(task, sampler.bank)
        sampler.draw([replace(picture, method=replace(picture.method, cache_age=3))], 8)
    session, whole = begin(replace(picture.method, cache_age=3), RunContext(tuple(1 - j / 8 for j in range(9)))), 0
    for j in range(8):
        session.observe(Step(j, 8, 1 - j / 8), torch.zeros(1, *base.latent))
        whole += 2 * sum(session.refresh(Step(j, 8, 1 - j / 8)))
    assert (sampler.whole, sampler.rows) == (whole, 2 * 3 * 8) and whole < sampler.rows


def test_shares_of_the_sets_make_one_table(monkeypatch, tmp_path, capsys):
    """Two processes' halves, one of which was cut off while it wrote, and the whole in one. Runs of four steps."""
    monkeypatch.setattr(cached, "STEPS", 4)

    def drawn(*more: str) -> str:
        cached.main(["--regime", "narrow", "--sets", "3", "--methods", "Merge", "--intervals", "2", "--kinds", "held",
                     *more])
        return capsys.readouterr().out

    def tabled(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    halves = [tmp_path / f"{k}.jsonl" for k in (1, 2)]
    for k, path in enumerate(halves, 1):
        path.write_text(drawn("--share", f"{k}/2"))
    cached.main(["--join", *map(str, halves)])
    together = tabled(capsys.readouterr().out)
    assert "| 3 | 2 |" in together[-1], together
    assert together == tabled(drawn())
    lines = [line for line in halves[0].read_text().splitlines() if line.startswith("{")]
    assert len(lines) == 4 and lines[-1].count('"held"') == 1
    halves[0].write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    cached.main(["--join", *map(str, halves)])
    every, held = tabled(capsys.readouterr().out)[-2:]
    assert "| 3 | 4 |" in every and "| 2 | 2 |" in held
    for wrong in ("0/2", "3/2", "2"):
        with pytest.raises(SystemExit):
            cached.main(["--share", wrong])


def test_cache_and_guidance_together_save_both():
    """Guidance takes its turns where the cache has them, on the testbed as in a run."""
    bed = BEDS["unet"]
    base, loras, task = bed.load_base(), bed.load_loras("narrow"), bed.all_sets((2,))[0]
    (arm,) = [each for each in cached.arms("Merge", [3]) if each.kind == "both"]
    with cached.CachedSampler(base, loras, arm.schedule, arm.forecast) as sampler:
        (guide,) = arm.guides(1)
        sampler.draw([evaluate.RECIPES["Merge"].picture(task, sampler.bank)], cached.STEPS, guides=[guide])
    assert (sampler.whole, sampler.rows, guide.evaluations) == (2 * 8, 2 * 20, 20 + 9)
    assert all(each.guides(1) is None for each in cached.arms("Merge", [3]) if each.kind not in ("guidance", "both"))


def test_true_terms_between_steps():
    """On straight lines through those of a run with full guidance, beyond the last two, too."""
    step, x, c = [Step(j, 4, 1 - j / 4) for j in range(4)], torch.zeros(2), torch.full((2,), 5.0)
    full, terms = guidance.Full(), [3.0, 7.0, 1.0, 0.0]
    for each, term in zip(step, terms, strict=True):
        full(each, x, c, c + each.sigma * term)
    between = guidance.Between(full, (0, 2))
    found = [(between(each, x, c, x) - c)[0].item() / each.sigma for each in step]
    assert found == pytest.approx([3.0, 2.0, 1.0, 0.0]) and (full.evaluations, between.evaluations) == (8, 6)


def test_what_has_not_been_made_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quality, "turbo_path", lambda folder, practised: tmp_path / "none.safetensors")
    with pytest.raises(SystemExit):
        quality.main(["--practised"])
    assert "testbed/train.py --stages practised" in capsys.readouterr().err


@torch.inference_mode()
@pytest.mark.parametrize("body", ["unet", "joint"])
def test_places_on_an_accelerator(body, accelerator):
    """Guards: places that stayed on the processor beside a model that is not there."""
    bed, drawn = BEDS[body], {}
    task = bed.all_sets(seed=3)[0] if body == "joint" else protocol.all_sets((3,), seed=3)[0]
    for device in ("cpu", "cuda"):
        with Sampler(bed.load_base().to(device), bed.load_loras("narrow")) as sampler:
            drawn[device] = sampler.draw([evaluate.RECIPES["Routed"].picture(task, sampler.bank)], steps=3)[0].cpu()
    torch.testing.assert_close(drawn["cuda"], drawn["cpu"], rtol=0, atol=1e-4)
