"""Files of guidance coefficients: their names, how they are written and what is believed of them."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import replace
from unicodedata import normalize

import comfy.model_management
import folder_paths
import pytest
import torch
from lora_ensemble.host.guidance import files
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.host.guidance.calibrate import calibrate
from lora_ensemble.host.guidance.coeffs import GuidanceCoeffs
from lora_ensemble.methods.guidance import calibration
from lora_ensemble.methods.guidance.calibration import CALLS, Calibration, NormalEquations
from lora_ensemble.nodes.calibration import LoRAEnsembleLoadCoeffs, LoRAEnsembleSaveCoeffs
from lora_ensemble.tests.fuzz_coeffs import Fuzz
from safetensors.torch import save_file
from torch import Tensor

from .builders import composite, schedule, stock, three
from .guidance_tools import SD15, sample
from .models import base
from .test_calibration import STEPS, guide, paths

COUNT = 150
SHARE = 50


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.FOLDER, ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="module")
def found() -> GuidanceCoeffs:
    return calibrate(base("SD15"), paths(seeds=1, positive=SD15.cond(11)))


def equal(a, b) -> bool:
    tensors = lambda c: [c.found.coefficients, c.found.r2, *c.found.gamma.values()]  # noqa: E731
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# --- what is saved is loaded ---


def test_what_is_saved_is_loaded(found, folder):
    name = files.save(found, "sd15/mine")
    assert name == "sd15/mine.safetensors" and name in folder_paths.get_filename_list(files.FOLDER)
    again = files.load(name)
    assert equal(again, found) and again.found.steps == found.found.steps
    assert (again.model, again.kind, again.sampler, again.cfg) == (found.model, found.kind, found.sampler, found.cfg)
    out: list[Tensor] = [sample(guide(base("SD15"), coeffs), steps=STEPS) for coeffs in (found, again)]
    assert torch.equal(*out)
    assert files.save(found, "sd15/mine.safetensors") == "sd15/mine_2.safetensors"
    assert files.save(found, "sd15\\mine") == "sd15/mine_3.safetensors"


def test_a_workflow_of_another_system_finds_its_file(found, folder):
    """Windows lists folders with backslashes, macOS may write accents apart from their letters."""
    files.save(found, "sd15/Größe")
    for written in ("sd15\\Größe.safetensors", normalize("NFD", "sd15/Größe.safetensors")):
        assert LoRAEnsembleLoadCoeffs.validate_inputs(coeffs_name=written) is True
        assert equal(LoRAEnsembleLoadCoeffs.execute(written).args[0], found)


def test_files_of_version_one_know_no_kind(found, folder):
    """They are loaded, and fit the very model that they name."""
    name = files.save(replace(found, kind=""), "old")
    again = files.load(name)
    assert again.kind == "" and not again.other_strengths(base("SD15"))
    sample(guide(base("SD15"), again), steps=STEPS)


# --- names ---


@pytest.mark.parametrize("name", [
    "", "../outside", "/etc/passwd", "a/../../b", "..\\b", "..", "a/..", "a/./b", "a" * 300, "sd15/" + "ä" * 120,
    "a\nb", "a\0b", "x/", "/x", "x//y", "sub/.safetensors", ".safetensors", ".hidden", "sub/.hidden",
    "a.safetensors/inner",
    "A.SAFETENSORS/inner", "/".join("abcdefghij"), "/".join(["d"] * 50), "c:x", "c:\\x", "CON", "con.txt", "sub/NUL/x",
    "com1", "LPT9.safetensors", "COM¹", "CONIN$", "x|y", "x?", "x*", 'x"y', "x<y", "x>y", "x:stream", "x.", "x. ",
    "dir./x", "dir /x", " /x", "x.safetensors.", "a/ b", "\ud800"])  # fmt: skip
def test_names_that_no_system_or_not_every_one_takes(found, folder, name):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match="not a name for a file") as refused:
        files.save(found, name)
    assert len(str(refused.value)) < 500 and sorted(folder.parent.rglob("*")) == before
    said = "half of a character" if name == "\ud800" else "not a name for a file"
    assert said in LoRAEnsembleSaveCoeffs.validate_inputs(filename=name)


@pytest.mark.parametrize("name", ["x", " x ", "sd15_dpmpp_2m_karras_20_cfg7.5", "v1.5/Größe 20", "a/b/c/d/e/f/g/h/i",
                                  "console", "com", "com10", "x.safetensors", "模型/步", "a.b.c", "x (2)"])
def test_names_that_every_system_takes(found, folder, name):
    saved = files.save(found, name)
    assert saved in folder_paths.get_filename_list(files.FOLDER) and equal(files.load(saved), found)


def test_a_place_that_cannot_be_written_is_refused_before_the_run(found, folder):
    (folder / "taken").write_text("a file")
    answer = LoRAEnsembleSaveCoeffs.validate_inputs(filename="taken/inner")
    assert "a file, and a folder of that name is needed" in answer
    with pytest.raises(ValueError, match="a folder of that name is needed"):
        files.save(found, "taken/inner")
    assert LoRAEnsembleSaveCoeffs.validate_inputs(filename="new/inner") is True
    assert LoRAEnsembleSaveCoeffs.validate_inputs(filename=None) is True
    assert not (folder / "new").exists()


def test_a_folder_without_rights_is_refused_before_the_run(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "nothing may be written into" in LoRAEnsembleSaveCoeffs.validate_inputs(filename="x")


# --- writing ---


def test_two_that_save_one_name_at_one_moment_both_keep_theirs(found, folder):
    """Guard: both saw that the name was free, and the later one wrote over the other's file."""
    many = [replace(found, cfg=float(k + 2)) for k in range(12)]
    start, names = threading.Barrier(len(many)), {}

    def run(k: int) -> None:
        start.wait()
        names[k] = files.save(many[k], "same")

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(many))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names.values())) == len(many)
    assert {k: files.load(name).cfg for k, name in names.items()} == {k: each.cfg for k, each in enumerate(many)}
    assert sorted(path.name for path in folder.iterdir()) == sorted(names.values())


@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_a_disk_that_is_full_leaves_nothing_behind(found, folder, monkeypatch, where):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((files, "save_file", full) if where == "save_file" else (os, "replace", full)))
    with pytest.raises(ValueError, match=r"'x.safetensors' cannot be written .*No space left"):
        files.save(found, "x")
    assert not list(folder.iterdir())


# --- reading ---


def test_files_that_cannot_be_used(found, folder):
    name = files.save(found, "good")
    whole = (folder / name).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-10])
    (folder / "page.safetensors").write_bytes(b"<html>" * 20)
    (folder / "empty.safetensors").write_bytes(b"")
    save_file({"x": torch.zeros(1)}, folder / "lora.safetensors")
    for bad, words in (("cut", "cannot be read"), ("page", "cannot be read"), ("empty", "cannot be read"),
                       ("lora", "does not hold"), ("gone", "not in any of the 'guidance_coeffs' folders")):  # fmt: skip
        with pytest.raises(ValueError, match=words) as refused:
            files.load(f"{bad}.safetensors")
        assert f"{bad}.safetensors" in str(refused.value)


def changed(found: GuidanceCoeffs, **parts) -> GuidanceCoeffs:
    """Coefficients that a calibration cannot find, as they would come out of a file."""
    own = {key: parts.pop(key) for key in ("cfg", "sigmas", "model", "sampler") if key in parts}
    return replace(found, found=replace(found.found, **parts), **own)


def at(tensor: Tensor, *index: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


DAMAGES = {
    "a coefficient that is none": (lambda c: changed(c, coefficients=at(c.found.coefficients, 3, 2, value=torch.nan)),
                                   "coefficients holds values that are not numbers"),
    "a huge coefficient": (lambda c: changed(c, coefficients=at(c.found.coefficients, 3, 2, value=1e7)),
                           "coefficients larger than"),
    "a coefficient of the future": (lambda c: changed(c, coefficients=at(c.found.coefficients, 3, 9, value=1.0)),
                                    "not yet made"),
    "too few columns": (lambda c: changed(c, coefficients=c.found.coefficients[:, :-1]), "has the shape"),
    "too few rows of r2": (lambda c: changed(c, r2=c.found.r2[:-1]), "r2 has the shape"),
    "no number in r2": (lambda c: changed(c, r2=at(c.found.r2, 0, value=torch.inf)), "r2 holds values"),
    "a similarity of 2": (lambda c: changed(c, gamma={k: at(v, 0, 1, value=2.0) for k, v in c.found.gamma.items()}),
                          "similarities beyond 1"),
    "no path": (lambda c: changed(c, gamma={k: v[:0] for k, v in c.found.gamma.items()}), "has no path"),
    "steps that go back": (lambda c: changed(c, steps=(*c.found.steps[:-1], 0)), "do not follow"),
    "a negative step": (lambda c: changed(c, steps=(-1, *c.found.steps[1:])), "do not follow"),
    "a step beyond the schedule": (lambda c: changed(c, steps=(*c.found.steps[:-1], 99)), "more steps than"),
    "a schedule that rises": (lambda c: changed(c, sigmas=(*c.sigmas[:3], 99.0, *c.sigmas[4:])), "schedule rises"),
    "a negative noise level": (lambda c: changed(c, sigmas=(*c.sigmas[:-1], -1.0)), "not noise levels"),
    "a schedule of one level": (lambda c: changed(c, sigmas=c.sigmas[:1]), "not noise levels"),
    "cfg that is no number": (lambda c: changed(c, cfg=float("nan")), "cfg is no number"),
    "no name of the model": (lambda c: changed(c, model=""), "does not name its model"),
    "no name of the sampler": (lambda c: changed(c, sampler=""), "does not name its sampler"),
    "a name that is no text": (lambda c: changed(c, sampler="euler\n" * 3), "no text"),
    "an endless name": (lambda c: changed(c, model="x" * 30_000), "too long"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_no_calibration_finds_is_refused_by_the_name_of_its_file(found, folder, what):
    make, words = DAMAGES[what]
    name = files.save(make(found), "damaged")
    with pytest.raises(ValueError, match=rf"'damaged.safetensors' are damaged: .*{words}.*Calibrate again"):
        files.load(name)


@pytest.mark.parametrize(("rows", "words"), [(2**27, r"gamma.noise has the shape .* too large"),
                                             (2**34, "no file of them is larger than")])
def test_a_small_file_that_declares_a_huge_tensor_takes_no_memory(found, folder, rows, words):
    """A sparse file may be larger than the memory: what it declares is looked at before anything is read."""
    content = (folder / files.save(found, "good")).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table, place = json.loads(content[8:8 + length]), 0
    table["gamma.noise"] |= {"shape": [rows, 1], "data_offsets": [0, 4 * rows]}
    for entry in (entry for key, entry in table.items() if key != "__metadata__"):  # one behind the other
        begin, end = entry["data_offsets"]
        entry["data_offsets"], place = [place, place + end - begin], place + end - begin
    text = json.dumps(table).encode()
    with open(folder / "huge.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    with pytest.raises(ValueError, match=words):
        files.load("huge.safetensors")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory) -> Fuzz:
    path = tmp_path_factory.mktemp("coeffs")
    folder_paths.add_model_folder_path(files.FOLDER, str(path), is_default=True)
    return Fuzz(path)


@pytest.mark.parametrize("first", range(0, COUNT, SHARE))
def test_damaged_files(first, fuzz, caplog):
    """Each is refused by its name, or a picture that is guided by it is made of numbers."""
    with caplog.at_level(logging.CRITICAL, "lora_ensemble"):
        assert {fuzz.check(seed) for seed in range(first, min(first + SHARE, COUNT))} == {"works", "refused"}


def test_the_judge_sees_files_that_nobody_checks(fuzz, monkeypatch):
    monkeypatch.setattr(files, "_damage", lambda *_: None)
    monkeypatch.setattr(GuidanceCoeffs, "check_whole", lambda self: None)
    failed = 0
    for seed in range(60):
        try:
            fuzz.check(seed)
        except Exception:
            failed += 1
    assert failed > 3


# --- strengths ---


def test_other_strengths_are_told_and_other_loras_stop(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    coeffs = calibrate(composite(model, ensemble), paths(seeds=1, positive=SD15.cond(11)))
    weaker = tuple(replace(spec, strength_model=spec.strength_model * 0.9) for spec in ensemble)
    ours = guide(composite(model, weaker), coeffs)
    sample(ours, steps=STEPS)
    (said,) = guidance_record_of(ours).problems
    assert "other strengths of the LoRAs" in said and f"{ensemble[0].name} 0.8" in said and "0.72" in said
    for other in (ensemble[:2], (*ensemble[:2], replace(ensemble[2], name=ensemble[0].name))):
        with pytest.raises(ValueError, match="calibrated for model"):
            sample(guide(composite(model, other), coeffs), steps=STEPS)


def test_other_strengths_of_stock_loras_are_told(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    coeffs = calibrate(stock(model, ensemble), paths(seeds=1, positive=SD15.cond(11)))
    weaker = tuple(replace(spec, strength_model=spec.strength_model * 0.9) for spec in ensemble)
    ours = guide(stock(model, weaker), coeffs)
    sample(ours, steps=STEPS)
    assert "other strengths of the LoRAs" in guidance_record_of(ours).problems[0]
    with pytest.raises(ValueError, match="calibrated for model"):
        sample(guide(stock(model, ensemble[:2]), coeffs), steps=STEPS)


# --- what it costs ---


def test_the_cost_is_said_before_anything_is_sampled(caplog):
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with caplog.at_level(logging.INFO, "lora_ensemble"), pytest.raises(Stop):
        calibrate(base("SD15"), paths(seeds=3), on_policy=True, progress=stop)
    assert "Calibrate Guidance: 6 paths of 8 steps, 192 evaluations of the model or more, 0.00 GB" in caplog.text


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": CALLS + 1}, "more than can be solved"), ({"seeds": 10_000, "steps": 500}, "more than can be solved"),
    ({"batch": 10_000, "seeds": 4000, "steps": 500, "latent": torch.zeros(1, 16, 1024, 1024)}, "this machine has"),
    ({"positive": []}, "there is no prompt")])
def test_more_than_can_be_is_refused_before_anything_is_sampled(options, words):
    with pytest.raises(ValueError, match=f"Calibrate Guidance: .*{words}"):
        calibrate(base("SD15"), paths(**options), progress=lambda: pytest.fail("sampled"))


def test_more_calls_than_steps_are_counted_while_sampling(monkeypatch):
    monkeypatch.setattr(calibration, "CALLS", 10)
    with pytest.raises(ValueError, match="calls the model more than 10 times on one path"):
        calibrate(base("SD15"), paths(sampler_name="heun", steps=8, seeds=1))


def test_the_solve_shows_how_far_it_is_and_can_be_stopped():
    seen = []

    def stop(done: int, calls: int) -> None:
        seen.append((done, calls))
        if done == 3:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(base("SD15"), paths(seeds=1, positive=SD15.cond(11)), solving=stop)
    assert seen == [(k, STEPS) for k in range(4)]
    comfy.model_management.interrupt_current_processing(False)


def test_predictions_that_are_no_numbers_are_named():
    equations = NormalEquations()
    x = torch.full((1, 4), torch.nan)
    equations.add([x, x], [x])
    with pytest.raises(ValueError, match="values that are not numbers"):
        equations.solve()
    zeros = NormalEquations()
    zeros.add([x.nan_to_num(0.0)] * 2, [x.nan_to_num(0.0)])
    coefficients, r2 = zeros.solve()
    assert not coefficients.any() and torch.equal(r2, torch.ones(1, dtype=torch.float64))


def test_seeds_count_on_past_the_last_one():
    assert isinstance(calibrate(base("SD15"), paths(seed=2**64 - 1, seeds=2, steps=2, positive=SD15.cond(11))).found,
                      Calibration)


def test_the_schedule_of_a_calibration_is_the_host_s(found):
    assert found.sigmas == pytest.approx(schedule(base("SD15"), STEPS).tolist())
