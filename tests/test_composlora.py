"""ComposLoRA on a running ComfyUI: its sets, its prompts, and what is said of names that are wrong."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from lora_ensemble.benchmarks import composlora
from lora_ensemble.benchmarks.composlora import Cell, choices, defaults, measured, methods_of, plan_of, rows_of
from lora_ensemble.benchmarks.composlora_sets import CATEGORIES, Lora, all_sets, example, read_loras, some_of
from lora_ensemble.examples.picture_grid import save_grids
from lora_ensemble.examples.queue_prompt import Problem
from lora_ensemble.testbed.protocol import ORDER, chosen
from lora_ensemble.testbed.scene import CONCEPTS
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "composlora.py"
ELEVEN = [Lora(f"{concept.name}.safetensors", concept.category, (concept.name,)) for concept in CONCEPTS]
METHOD = {"input": {"required": {"model": ["MODEL"], "ensemble": ["LORA_ENSEMBLE"],
                                 "mode": ["COMBO", {"options": ["runtime", "baked"], "default": "runtime"}]},
                    "optional": {"clip": ["CLIP"], "place": ["COMBO", {"options": ["masks", "words"]}]}},
          "output": ["MODEL", "CLIP"]}
INFO = {
    "LoRAEnsembleLoRA": {"input": {
        "required": {"lora_name": ["COMBO", {"options": ["people\\scarlett_v2.safetensors", "film.safetensors",
                                                         "reality/object_1.safetensors"]}],
                     "strength_model": ["FLOAT", {"default": 1.0}], "role": [["auto", "style"], {"default": "auto"}]},
        "optional": {"ensemble": ["LORA_ENSEMBLE"], "mask": ["MASK"], "words": ["STRING", {"default": ""}]}},
        "output": ["LORA_ENSEMBLE"]},
    "LoRAEnsembleMerge": METHOD, "LoRAEnsembleKLoRA": METHOD,
    "LoRAEnsembleSpectrum": METHOD | {"output": ["IMAGE", "STRING"]},
    "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["SD15/realisticVision_v51.safetensors"], {}]}}},
    "KSampler": {"input": {"required": {
        "steps": ["INT", {"default": 20}], "denoise": ["FLOAT", {"default": 1.0}],
        "sampler_name": [["euler", "dpmpp_2m"], {}], "scheduler": [["simple", "karras"], {}]}}},
    "EmptyLatentImage": {"input": {"required": {"width": ["INT", {"default": 512}], "batch_size": ["INT", {}]}}},
    **{name: {"input": {"required": {}}} for name in ("CLIPTextEncode", "VAEDecode", "PreviewImage")},
}
GOOD = [Lora("people/scarlett_v2.safetensors", "character", ("scarlett = woman", "short red hair")),
        Lora("film.safetensors", "style", (), 0.5), Lora("object_1.safetensors", "object", ("umbrella",))]


def options(**changes: object) -> argparse.Namespace:
    asked = dict(server="here:8188", loader="CheckpointLoaderSimple", style="realistic", head=None, negative=None,
                 checkpoint="realisticVision_v51.safetensors", methods=["Merge"], steps=None, cfg=None, sampler=None,
                 scheduler=None, width=None, height=None)
    return argparse.Namespace(**asked | changes)


def refusal(loras: list[Lora] = GOOD, info: dict = INFO, **changes: object) -> str:
    with pytest.raises(Problem) as problem:
        plan_of(info, options(**changes), loras)
    return str(problem.value)


# --- the sets --------------------------------------------------------------------------------------------------------


def test_the_sets_are_those_of_the_testbed():
    """One family of three characters and two of each other category: the same sets in the same order."""
    assert CATEGORIES == ORDER
    expected = [tuple(concept.name for concept in concepts) for family, concepts in chosen() if family == 0]
    assert [tuple(lora.title for lora in task.loras) for task in all_sets(ELEVEN)] == expected
    assert Counter(len(task.loras) for task in all_sets(ELEVEN)) == {2: 24, 3: 72, 4: 96, 5: 48}
    both = Counter(len(concepts) for _, concepts in chosen())
    assert both == {2: 48, 3: 144, 4: 192, 5: 96} == {n: 2 * k for n, k in
                                                      Counter(len(t.loras) for t in all_sets(ELEVEN)).items()}


def test_a_set_keeps_its_number():
    """Whatever sizes are asked for: its noise depends on it."""
    assert [task.number for task in all_sets(ELEVEN, (3,))] == list(range(24, 96))


@pytest.mark.parametrize(("count", "sizes"), [(2, {2: 1, 3: 1}), (8, {2: 2, 3: 2, 4: 2, 5: 2}),
                                              (0, {2: 24, 3: 72, 4: 96, 5: 48}), (999, {2: 24, 3: 72, 4: 96, 5: 48})])
def test_a_sample_is_of_equal_parts(count: int, sizes: dict[int, int]):
    found = some_of(all_sets(ELEVEN), count)
    assert Counter(len(task.loras) for task in found) == sizes and found == some_of(all_sets(ELEVEN), count)
    assert found == sorted(found, key=lambda task: task.number)
    assert not count or {task.number for task in found} <= {task.number for task in some_of(all_sets(ELEVEN), 20)} \
        or count > 20


def test_no_set_without_a_character():
    assert all_sets(ELEVEN[:0]) == [] == all_sets([lora for lora in ELEVEN if lora.category != "character"])


# --- the user's file -------------------------------------------------------------------------------------------------


def test_json_csv_and_composloras_own_file_say_the_same(tmp_path: Path):
    entries = [{"file": "character_1.safetensors", "category": "character", "words": ["iu1", "hazel  eyes"]},
               {"file": "style_1.safetensors", "category": "style", "words": "film grain", "strength": 0.8}]
    table = 'file;category;words;strength\ncharacter_1.safetensors;character;"iu1, hazel eyes";\n' \
            "style_1.safetensors;style;film grain;0.8\n"
    theirs = {"character": [{"id": "character_1", "name": "a name", "trigger": ["iu1", "hazel eyes"]}],
              "style": [{"id": "style_1", "trigger": ["film grain"]}]}
    files = {"a.json": json.dumps(entries), "a.csv": table, "b.csv": "\ufeff" + table.replace(";", ","),
             "lora_info.json": json.dumps(theirs)}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_loras(tmp_path / name) == [Lora("character_1.safetensors", "character", ("iu1", "hazel eyes")),
                                               Lora("style_1.safetensors", "style", ("film grain",))], name


def test_all_that_is_wrong_in_a_file_is_said(tmp_path: Path):
    path = tmp_path / "loras.json"
    path.write_text(json.dumps([
        {"file": "a", "category": "charcter", "words": "x"}, {"file": "b", "category": "object"},
        {"category": "style"}, {"file": "c", "category": "style", "strength": "strong"},
        {"file": "d", "category": "style"}, {"file": "d", "category": "style", "strength": float("nan")},
        {"file": "e", "category": "style"}, {"file": "e", "category": "style"}]))
    with pytest.raises(Problem) as problem:
        read_loras(path)
    lines = str(problem.value).splitlines()
    expected = ["LoRA 1: 'a' has the category 'charcter'. Did you mean 'character'?", "LoRA 2: 'b' has no words",
                "LoRA 3: it names no file", "LoRA 4: 'c' has the strength 'strong'", "LoRA 6: 'd' has the strength",
                "'e' is there more than once"]
    assert len(lines) == 7 and all(text in line for text, line in zip(expected, lines[1:], strict=True)), lines


@pytest.mark.parametrize("text", ["{", "3", "[3]", '{"character": 5}', '{"character": [{"name": "x"}]}'])
def test_a_file_that_is_none(tmp_path: Path, text: str):
    path = tmp_path / "loras.json"
    path.write_text(text)
    for wrong in (path, tmp_path / "missing.json"):
        with pytest.raises(Problem, match="cannot be read.*--example prints such a file"):
            read_loras(wrong)


# --- what the server has ---------------------------------------------------------------------------------------------


def test_names_as_the_server_lists_them():
    """Its slashes, and the folder of a file where that is clear; methods in any case."""
    plan, loras = plan_of(INFO, options(methods=["merge", "Merge", "klora"], sampler="dpmpp_2m", steps=4), GOOD)
    assert plan.checkpoint == "SD15/realisticVision_v51.safetensors" and plan.methods == ("Merge", "KLoRA")
    assert [lora.file for lora in loras] == ["people\\scarlett_v2.safetensors", "film.safetensors",
                                             "reality/object_1.safetensors"]
    assert plan.sampling == {"steps": 4, "sampler_name": "dpmpp_2m"} and plan.size == {}
    assert set(methods_of(INFO)) == {"Merge", "KLoRA"}


def test_every_wrong_name_is_refused_at_once():
    wrong = [*GOOD, Lora("scarlet.safetensors", "character", ("x",)), Lora("nothing.pt", "object", ("x",))]
    text = refusal(wrong, checkpoint="realistic_vision_v51.safetensors", methods=["Merg"], sampler="dpmpp2m",
                   scheduler="zzz")
    assert text.splitlines() == [
        "The server has no checkpoint 'realistic_vision_v51.safetensors'. "
        "Did you mean 'SD15/realisticVision_v51.safetensors'?",
        "The server has no LoRA 'scarlet.safetensors'. Did you mean 'people\\scarlett_v2.safetensors'?",
        "The server has no LoRA 'nothing.pt'. There are: people\\scarlett_v2.safetensors, film.safetensors, "
        "reality/object_1.safetensors.",
        "The server has no method 'Merg'. Did you mean 'Merge'?",
        "The server has no sampler 'dpmpp2m'. Did you mean 'dpmpp_2m'?",
        "The server has no scheduler 'zzz'. There are: simple, karras."]
    assert "no node 'CheckpointLoader'. Did you mean 'CheckpointLoaderSimple'?" in refusal(loader="CheckpointLoader")
    assert "LoRA Ensemble is not installed there" in refusal(info={"KSampler": INFO["KSampler"]})


def test_a_file_name_in_two_folders_is_not_guessed():
    info = json.loads(json.dumps(INFO))
    choices(info["LoRAEnsembleLoRA"]["input"]["required"]["lora_name"]).append("anime/object_1.safetensors")
    assert "Did you mean 'reality/object_1.safetensors' or 'anime/object_1.safetensors'?" in refusal(info=info)


# --- the workflow and what comes back --------------------------------------------------------------------------------


def test_the_workflow(tmp_path: Path):
    plan, loras = plan_of(INFO, options(head="RAW photo", negative="blurry", methods=["KLoRA"]), GOOD)
    task = all_sets(loras, (3,))[0]
    graph = plan.graph(task, "KLoRA", 5)
    assert task.prompt(plan.head) == graph["positive"]["inputs"]["text"] == \
        "RAW photo, scarlett, short red hair, umbrella"
    assert graph["lora1"]["inputs"] == {
        "lora_name": "people\\scarlett_v2.safetensors", "strength_model": 0.8, "strength_clip": 0.8,
        "role": "character", "words": "scarlett = woman, short red hair"}
    assert graph["lora2"]["inputs"]["ensemble"] == ["lora1", 0] and graph["lora2"]["inputs"]["strength_model"] == 0.5
    assert graph["method"] == {"class_type": "LoRAEnsembleKLoRA", "inputs": {
        "mode": "runtime", "place": "masks", "model": ["loader", 0], "clip": ["loader", 1], "ensemble": ["lora3", 0]}}
    assert graph["sampler"]["inputs"]["steps"] == 20 and graph["sampler"]["inputs"]["scheduler"] == "simple"
    assert "report" not in graph and defaults(INFO, "EmptyLatentImage") == {"width": 512}
    (row, workflow), = rows_of(plan, [task], 100, tmp_path)
    assert row["seed"] == 100 + task.number == workflow["sampler"]["inputs"]["seed"]
    other, _ = plan_of(INFO, options(head="RAW photo", negative="blurry", methods=["KLoRA"], steps=21), GOOD)
    assert rows_of(plan, [task], 100, tmp_path)[0][0]["file"] == row["file"]
    assert rows_of(other, [task], 100, tmp_path)[0][0]["file"] != row["file"], "other settings, another picture"


def test_what_a_run_says():
    report = {"problems": ["one."], "words": [[{"words": ["ohwx woman", "ohwx"]}, {"words": []}]],
              "steps": [{"rows": 4}, {"rows": 2}]}
    entry = {"outputs": {"text": {"text": [json.dumps(report)]}, "picture": {}},
             "status": {"messages": [["execution_start", {"timestamp": 1000}], ["execution_cached", {}],
                                     ["execution_success", {"timestamp": 3500}]]}}
    assert measured(entry) == {"seconds": 2.5, "evaluations": 6, "words_found": "ohwx woman, ohwx | -",
                               "problems": "one."}
    assert measured({"outputs": {}}) == {}


def test_sheets_of_a_longer_run_do_not_stay(tmp_path: Path):
    Image.new("RGB", (64, 128), "#123456").save(tmp_path / "a.png")
    row = [Cell(tmp_path / "a.png"), Cell(tmp_path / "none.png", "The run was interrupted on the server. " * 9)]
    assert len(save_grids(["Merge", "Routed"], [["set 1"]] * 50, [row] * 50, tmp_path)) == 3
    assert save_grids(["Merge", "Routed"], [["set 1"]], [row], tmp_path) == [tmp_path / "grid.png"]
    assert not list(tmp_path.glob("grid_*.png"))
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width > 2 * 160 and sheet.height > 320 and sheet.getpixel((300, 200)) == (0x12, 0x34, 0x56)


def test_example_and_errors_on_the_command_line(tmp_path: Path):
    def started(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)

    printed = started("--example", "reality")
    assert printed.returncode == 0 and json.loads(printed.stdout) == example("reality")
    assert Counter(entry["category"] for entry in example("anime")) == Counter(lora.category for lora in ELEVEN)
    path = tmp_path / "loras.json"
    path.write_text(printed.stdout)
    assert "--checkpoint needed" in started("--loras", path).stderr
    assert "has no words" in started("--loras", path, "--checkpoint", "x").stderr
    path.write_text(json.dumps([entry | {"words": "x"} for entry in example("reality")]))
    silent = started("--loras", path, "--checkpoint", "x", "--server", "127.0.0.1:9", "--out", tmp_path / "out")
    assert silent.returncode == 1 and silent.stderr.startswith("No ComfyUI reachable at 127.0.0.1:9")
    assert not (tmp_path / "out").exists()


def test_interrupted_and_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """What was interrupted is skipped; when the server is gone, or Ctrl-C is pressed, the table is there all the same.
    Later the rest alone is drawn."""
    listed, out, picture = tmp_path / "loras.json", tmp_path / "out", io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    listed.write_text(json.dumps([lora.__dict__ for lora in GOOD]))
    done = {"outputs": {"picture": {"images": [{}]}}, "status": {"messages": [["execution_start", {"timestamp": 0}]]}}
    monkeypatch.setattr(composlora, "call", lambda *_: json.dumps(INFO).encode())
    monkeypatch.setattr(composlora, "fetched", lambda *_: picture.getvalue())
    asked = options(loras=listed, out=out, sizes=(2, 3), sets=0, methods=["Merge"], seed=1, timeout=1)
    everything = [done, Problem("The run was interrupted on the server."), ConnectionError("gone")]
    for answers, error, rows in [(everything, "No ComfyUI reachable", 2), ([KeyboardInterrupt()], "", 1),
                                 ([done, Problem("No.")], "1 of 3 pictures were not drawn", 3), ([done], None, 3)]:
        left = iter(answers)

        def finished(*_: object, left=left, **__: object) -> dict:
            answer = next(left)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(composlora, "finished", finished)
        if error is None:
            composlora.run_all(asked)
        else:
            with pytest.raises((Problem, KeyboardInterrupt), match=error or None):
                composlora.run_all(asked)
        assert len((out / "table.csv").read_text().splitlines()) == 1 + rows and (out / "grid.png").is_file()
    said = capsys.readouterr().out
    assert "2 of 3: Merge, scarlett_v2, object_1: skipped. The run was interrupted on the server." in said
    assert len(list((out / "pictures").glob("*.png"))) == 3 and not list((out / "pictures").glob("*.part"))
