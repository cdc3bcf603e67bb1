"""The benchmarks run in a real ComfyUI. What they measure is not looked at: nothing here is timed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import pytest
import torch
from lora_ensemble.benchmarks import counted, int8, methods, models, packed, speed
from lora_ensemble.benchmarks import weightless as counting
from lora_ensemble.benchmarks.measure import Results, Seconds
from lora_ensemble.benchmarks.weightless import weightless
from lora_ensemble.host.compose import fused
from lora_ensemble.methods.schedule import Uniform, within
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def told(out: str) -> list[dict]:
    """The results among what a benchmark has printed."""
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"bench"')]


@pytest.fixture
def loras(monkeypatch):
    """ComfyUI does not keep a folder of LoRAs that a test names."""
    import folder_paths

    folders, kinds = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([*folders], kinds))


@pytest.fixture
def results(capsys, monkeypatch, loras):
    """`results(module, *arguments)`: what a benchmark tells, run in this process, whose ComfyUI is there already."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(module: str, *arguments: str) -> list[dict]:
        capsys.readouterr()
        importlib.import_module(f"lora_ensemble.benchmarks.{module}").main([*arguments])
        return told(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(("only", "goal", "what", "benches"), [
    ("kinds", "E3", "layer with a LoKr over the layer", ["kind", "kind"]),
    ("rank 128", "G5", "SD1.5, tax of LoRAs of rank 128", ["tax"])])
def test_the_goals_in_quick_mode(only, goal, what, benches):
    """In processes of their own, as they are meant to be run: two parts of very different kind. The goals of the others
    are there and say that they were not asked for."""
    command = [sys.executable, str(ROOT / "run.py"), "_module", "benchmarks.goals", "--quick", "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = told(done.stdout)
    assert [r["bench"] for r in found if r["bench"] in ("kind", "tax")] == benches
    assert {r["kind"] for r in found if r["bench"] == "kind"} == ({"LoRA", "LoKr"} if only == "kinds" else set())
    verdicts = {(r["goal"], r["what"]): r["verdict"] for r in found if r["bench"] == "goal"}
    assert verdicts[goal, what] in ("met", "missed")
    assert sum(verdict == "not asked for" for verdict in verdicts.values()) == len(verdicts) - 1
    assert all(r["comfyui"] and r["date"] for r in found)


@pytest.mark.parametrize(("model", "layers"), [("SD1.5", 160), ("SDXL", 722), ("Flux", 228), ("Wan", 400),
                                               ("Qwen-Image", 720)])
def test_narrow_models_have_all_layers(model, layers):
    narrow = models.build(model, 0.05, torch.float32, CPU)
    assert sum(1 for _ in models.targets(model, narrow, "linear")) == layers


@pytest.mark.parametrize("name", ["SD1.5", "Flux"])
def test_what_is_written_of_budgets_is_what_is_counted(name):
    """In the help page and beside the benchmark."""
    _, rests = counted.shares(name)
    column = list(counted.SIZES).index(name) + 1
    page, readme = (ROOT.joinpath(*path).read_text(encoding="utf-8").splitlines() for path in (
        ("web", "docs", "LoRAEnsembleBranchCache.md"), ("benchmarks", "README.md")))
    for budget in (0.7, 0.6, 0.5, 0.4):
        told = counted.budgets_table({name: rests}, 20, [budget]).splitlines()[-1].split(" | ")[1].removesuffix(" |")
        for text in (page, readme):
            row = next(line for line in text if line.startswith(f"| {budget} |"))
            assert row.split(" | ")[column].strip(" |") == told
    told = counted.intervals_table({name: rests}, 20).splitlines()[2:]
    rows = [line.split(" | ") for line in readme if line.startswith(tuple(f"| {k} | {d} | " for k in (2, 3, 4, 5)
                                                                          for d in (1, 2, 3)))]
    assert [row[column + 1].strip(" |") for row in rows] == [line.split(" | ")[2].strip(" |") for line in told]


def test_composite_gives_the_picture_of_the_hooks(results):
    """The benchmark stops where it does not."""
    small = ["--model", "SD1.5", "--scale", "0.05", "--size", "64", "--steps", "2", "--n", "2", "--ranks", "4", "8"]
    found = results("speed", *small, "--base", "--only", "composite")
    assert [r["bench"] for r in found] == ["composite", "start", "memory"]
    assert found[0]["difference"] < 1e-3 < found[0]["effect"] and "equal_seconds" in found[0]


def test_nodes(results):
    found = results("nodes", "--quick", "--runs", "1", "--n", "2")
    assert [r["bench"] for r in found] == ["node", "sizes", "sizes"] and {r["layers"] for r in found} == {722}


def test_every_method(results):
    found = results("methods", "--scale", "0.05", "--size", "64", "--steps", "4", "2", "--n", "2", "--methods",
                    "Routed", "Composite", "--savings", "none", "both", "always on", "--sweep-methods", "Merge",
                    "--rank", "4", "2")
    varied = [(r["sweep"], r["rank"], r["steps"], r["way"], r["saving"]) for r in found if r["sweep"]]
    assert varied == [("rank", 2, 4, "plain model", "none"), ("rank", 2, 4, "Merge", "none"),
                      ("steps", 4, 2, "plain model", "none"),
                      *(("steps", 4, 2, "Merge", how) for how in ("none", "guidance", "cache", "both"))]
    found = [r for r in found if not r["sweep"]]
    assert all(r["bank_bytes"] > 0 for r in found if r["way"] in ("Routed", "Composite"))
    rows = {(r["way"], r["saving"]): r["rows"] for r in found}
    assert rows["plain model", "none"] == rows["ComfyUI's loaders", "none"] == 8
    assert rows["ComfyUI's hooks", "none"] == rows["Composite", "none"] == rows["Composite", "always on"] == 16
    assert rows["Routed", "none"] == 9 and len(rows) == 9


def counted_runs(folder: Path, model: str, *more: str, blocks: int | None = None) -> dict[tuple[str, str], float]:
    """(way, saving) -> operations of a run of narrow models, counted."""
    options = methods.parse(["--comfyui", "x", "--device", "meta", "--model", model, "--n", "2", "--rank", "1", *more])
    built, found = models.build(model, 0.05, torch.float32, torch.device("meta"), blocks), {}
    models.settle(built)

    def tell(bench: str, **record) -> None:
        assert bench == "operations"
        found[record["way"], record["saving"]] = record["operations"]

    with weightless(built) as remembered:
        bench = methods.Bench(built, folder, options, tell, remembered)
        assert not [words for case, cells in methods.plan(options) for words in bench.measure(case, cells, bool)]
    return found


def test_operations_of_runs_are_those_of_their_parts(tmp_path, loras):
    """Held against a step that torch itself counts on a model with weights, and what each LoRA computes for each of its
    layers' tokens: 2 rank (inputs + outputs)."""
    model, steps = models.build("SD1.5", 0.05, torch.float32, CPU), 6
    noise, conds = models.inputs("SD1.5", model, 512)
    lora = 0
    with ExitStack() as hooks:
        for name, weight in models.targets("SD1.5", model, "linear"):
            def add(layer, args, ends=weight.shape):
                nonlocal lora
                lora += 2 * sum(ends) * args[0].numel() // args[0].shape[-1]

            hooks.callback(model.model.diffusion_model.get_submodule(name).register_forward_pre_hook(add).remove)
        with FlopCounterMode(display=False) as counter:
            models.sampled(model, *conds, noise, 1)
    step = counter.get_total_flops()
    found = counted_runs(tmp_path, "SD1.5", "--size", "512", "--steps", str(steps), "--saved-methods", "Merge",
                         "--methods", "Merge", "Routed", "Composite", "LoRAtorio",
                         "--savings", "cache", "both", "always on")
    assert found["plain model", "none"] == steps * step
    assert found["Merge", "none"] == steps * (step + 2 * lora)
    assert found["Merge", "always on"] == steps * (step + 3 * lora)
    assert found["Composite", "none"] == steps * 2 * (step + lora)
    assert found["LoRAtorio", "none"] == steps * (3 * step + 2 * lora), "no product compares patches"
    assert 0.5 * step < found["Routed", "none"] - found["Merge", "none"] < 1.5 * step, "one side of a step, and reading"
    _, rests = counted.shares("SD1.5", 0.05)
    cached = within(1.0, steps, {2: rests[2]}, [Uniform(3, 2)]).share
    both = counted.with_guidance(steps, Uniform(3, 2), rests[2])
    assert found["Merge", "cache"] / found["Merge", "none"] == pytest.approx(cached, rel=0.01)
    assert found["Merge", "both"] / found["Merge", "none"] == pytest.approx(both, rel=0.01)


def test_blocks_are_remembered_as_they_are(tmp_path, loras, monkeypatch):
    """What is counted of a run is the same without: also where blocks are cached, read, and asked what LoRAs do."""
    asked = ("--size", "64", "--steps", "10", "--methods", "Routed", "CMLoRA", "--savings", "none", "cache")
    found = []
    for part in ("as it is", "without"):
        (tmp_path / part).mkdir()
        found.append(counted_runs(tmp_path / part, "Flux", *asked, blocks=3))
        monkeypatch.setattr(counting, "split_point_of", lambda root, depth: SimpleNamespace(deep=[]))
    assert found[0] == found[1] and len(found[0]) == 4
    assert found[0]["CMLoRA", "none"] < 2 * found[0]["plain model", "none"] < 4 * found[0]["Routed", "cache"]


def test_compiled_models(results):
    """With LoRAs there are no more graphs than without, and the picture is that of the model as it is."""
    pytest.importorskip("comfy_api.torch_helpers", reason="this ComfyUI has no torch.compile wrapper")
    found = results("compiled", "--model", "Flux", "--scale", "0.05", "--size", "64", "--steps", "2", "--n", "2",
                    "--methods", "Merge", "--backends", "eager", "--by-block", "--blocks", "1")
    assert [(r["way"], r["backend"]) for r in found] == [(way, backend) for way in ("plain model", "Merge")
                                                         for backend in ("none", "eager")]
    as_it_is, plain, _, merged = found
    assert merged["graphs"] == plain["graphs"] > 0 == as_it_is["graphs"] and merged["difference"] < 1e-5


def test_a_model_that_is_there_already_draws_what_a_loaded_one_does(tmp_path, loras):
    """Also after LoRAs were in its weights."""
    pictures = []
    for settle in (models.settle, lambda model: None):
        model = models.build("SD1.5", 0.05, torch.float32, CPU)
        settle(model)
        file, = models.write_loras(tmp_path, "SD1.5", model, [4])
        noise, conds = models.inputs("SD1.5", model, 64)
        pictures.append([models.sampled(each, *conds, noise, 2)[0] for each in (
            model, models.stock(model, [file]), model)])
    torch.testing.assert_close(*pictures)
    plain, lora, again = pictures[0]
    assert not torch.allclose(plain, lora, rtol=1e-3, atol=1e-3) and torch.equal(plain, again)


def test_methods_leave_out_what_no_longer_fits(monkeypatch):
    """What fails for want of memory, and what is late, is named; the rest is measured."""
    options = methods.parse(["--comfyui", "x", "--rounds", "2", "--size", "64", "--steps", "2"])
    bench, told, made = methods.Bench(None, ROOT, options, lambda bench, **found: told.append(found)), [], []

    def way(case, name, how, conds):
        def run(*args):
            if name == "Composite":
                raise torch.OutOfMemoryError("no room")

        made.append(name)
        return SimpleNamespace(first=[Seconds(1, 1, 1)], later=[Seconds(2, 2, 2)], rows=1, bytes=1, bank=0, run=run)

    monkeypatch.setattr(bench, "way", way)
    monkeypatch.setattr(models, "inputs", lambda *args, **kwargs: (None, None))
    case, late = methods.plan(options)[0][0], iter([False, False, False, True])
    left = bench.measure(case, [(methods.PLAIN, "none"), ("Merge", "none"), ("Composite", "none"), ("Routed", "none")],
                         lambda: next(late))
    assert [r["way"] for r in told] == [methods.PLAIN, "Merge"] and told[1]["ratio"] == 1
    assert [words.rsplit(": ", 1)[1] for words in left] == ["no room", "late"] and "Routed" not in made


def test_the_most_telling_of_methods_comes_first():
    options = methods.parse(["--comfyui", "x", "--n", "5", "2", "--rank", "16", "4", "--hooks", "2", "--loaders",
                             "--saved-n", "5", "--saved-methods", "Merge", "CMLoRA"])
    found = [(case.n, case.sweep, [way for way, _ in cells], {how for _, how in cells})
             for case, cells in methods.plan(options)]
    first = [methods.PLAIN, *methods.METHODS]
    assert found == [(5, "", first, {"none"}), (2, "", [methods.PLAIN, methods.HOOKS], {"none"}),
                     (5, "", ["Merge"] * 4 + ["CMLoRA"] * 2, {*methods.SAVINGS} - {"none"}),
                     (2, "", first[1:], {"none"}), (5, "rank", [methods.PLAIN, "Merge", "Composite"], {"none"})]
    assert methods.savings_of("Merge", methods.SAVINGS, guided=False) == ["none", "cache", "always on"]


def test_a_picture_that_is_another_is_not_timed(monkeypatch):
    """Guard: what rounding may do is no leave to be wrong."""
    bench = object.__new__(speed.Bench)
    bench.options = SimpleNamespace(dtype=torch.float16, base=False)
    bench.model, bench.conds, bench.files = None, [], []
    hooks, noise = torch.ones(100), torch.linspace(-1, 1, 100)
    monkeypatch.setattr(models, "hooked", lambda *args: [])
    bench.sampling = lambda *args: SimpleNamespace(latent=hooks + 0.01 * noise)
    assert bench._parity(hooks + 0.005 * noise, hooks, 2)["difference"] < 1e-2
    assert bench._parity(hooks + 0.025 * noise, hooks, 2).keys() == {"difference", "rounding"}
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench._parity(hooks + 0.04 * noise, hooks, 2)


def test_what_is_told_of_a_run(results):
    found = results("host_time", "--quick", "--rounds", "2", "--only", "live")
    assert [r["bench"] for r in found] == ["live"] * 3 and all(0 < r["share"] < 1 for r in found)


def test_steps_of_the_whole_model(results):
    found = results("host_time", "--quick", "--rounds", "1", "--only", "step", "--models", "SD1.5")
    bypass = hasattr(comfy.sd, "load_bypass_lora_for_models")
    assert len(found) == 7 + bypass and {r["layers"] for r in found} == {160}


def narrow(quick: list[str]):
    """Options of the int8 benchmark as its command line gives them."""
    if "int8" not in packed.formats():
        pytest.skip("this ComfyUI has no int8 layers")
    options = int8.parse(["--comfyui", os.environ["COMFYUI_UNDER_TEST"], "--quick", *quick])
    return Results(CPU), options, CPU, options.formats[0]


@pytest.mark.parametrize("model", ["Wan", "Flux"])
def test_loras_on_int8_weights(model, capsys):
    """Its own check of every layer comes first: it stops where one does not give what it should."""
    found = int8.bench(*narrow(["--model", model]))
    assert [r["case"] for r in found][:1] == ["Merge of 4"] and all(r["format"] == "int8 convrot" for r in found)
    assert found[0]["layers"] == {"Wan": 10, "Flux": 12}[model] and capsys.readouterr().out.count("{") == len(found)


def test_int8_layers_on_which_loras_do_not_act_are_not_timed(monkeypatch):
    monkeypatch.setattr(fused, "call_routed_layers", lambda: None)
    with pytest.raises(SystemExit, match=r"ffn\.2: off by 1"):
        int8.bench(*narrow([]))
