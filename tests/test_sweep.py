"""A sweep without any server: which cells it has, who draws them, and what is left when somebody is lost."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from lora_ensemble.examples import sweep
from lora_ensemble.examples.queue_prompt import Problem, Unreachable, follow, load_workflow
from lora_ensemble.examples.sweep import on_servers
from lora_ensemble.examples.sweep_grid import Book, Cell, axis_of, cells_of, values_of
from lora_ensemble.examples.sweep_work import Headless, Worker, alone, fitted, pictures_of
from PIL import Image

WORKFLOW = {
    "3": {"class_type": "LoRAEnsembleLoRA", "inputs": {"strength_model": 0.8, "lora_name": "a"},
          "_meta": {"title": "One"}},
    "4": {"class_type": "LoRAEnsembleLoRA", "inputs": {"strength_model": 0.8, "lora_name": "b"},
          "_meta": {"title": "2. Two"}},
    "6": {"class_type": "LoRAEnsembleComposite", "inputs": {"model": ["1", 0], "place": "words"}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "rows.strength_2": 1.0}},
    "11": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20}},
    "12": {"class_type": "SaveImage", "inputs": {"filename_prefix": "cat", "images": ["11", 0]}},
}


LACKING = """
import runpy, sys

class Lacking:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Lacking)
sys.argv = ["sweep.py", "--help"]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize("lacking", [("torch", "numpy", "safetensors", "comfy", "folder_paths", "ray"), ("PIL",)])
def test_it_needs_python_and_pillow_alone(lacking):
    """As the page says; where Pillow is missing, what to do."""
    code = LACKING.format(lacking=set(lacking), path=str(Path(sweep.__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if "PIL" in lacking:
        assert done.returncode == 1 and done.stderr.strip().endswith("-m pip install pillow")
    else:
        assert done.returncode == 0 and "--vary" in done.stdout, done.stderr


def test_messages_of_other_packs_are_passed_over():
    """They may hold anything, and so may those of other prompts."""
    lines, messages = [], [
        {"type": "pack.told", "data": [1, 2]}, {"type": "pack.told"}, {"type": "pack.told", "data": "text"},
        {"type": "executing", "data": {"node": "6", "prompt_id": "another"}},
        {"type": "executing", "data": {"node": "11", "prompt_id": "p"}},
        {"type": "executing", "data": {"node": None, "prompt_id": "p"}}]
    follow(SimpleNamespace(messages=lambda: iter(messages)), "p", WORKFLOW, lines.append)
    assert lines == ["  11: KSampler"]


def axes(*texts: str):
    return [axis_of(WORKFLOW, text) for text in texts]


def refused(*texts: str) -> str:
    with pytest.raises(Problem) as problem:
        cells_of(WORKFLOW, axes(*texts))
    return str(problem.value)


def png(colour: str = "#336699") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(out, "PNG")
    return out.getvalue()


def drawn(worker: str, colour: str = "#336699") -> dict:
    return {"picture": png(colour), "facts": {"seconds": 1.5, "worker": worker}}


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the grid --------------------------------------------------------------------------------------------------------


def test_every_combination_the_last_axis_fastest():
    cells = cells_of(WORKFLOW, axes("3.strength_model+2. Two.strength_model=0.6,0.8", "KSampler.seed=1..3"))
    assert [cell.values for cell in cells] == [(s, n) for s in (0.6, 0.8) for n in (1, 2, 3)]
    assert [(c.workflow["3"]["inputs"]["strength_model"], c.workflow["4"]["inputs"]["strength_model"],
             c.workflow["11"]["inputs"]["seed"]) for c in cells] == [(s, s, n) for s, n in (c.values for c in cells)]
    assert WORKFLOW["11"]["inputs"]["seed"] == 1 and len({cell.key for cell in cells}) == 6


def test_nodes_by_number_title_and_class():
    for place in ("8.text", "CLIPTextEncode.text"):
        (axis,) = axes(f'{place}=["a cat, sitting", "a dog"]')
        assert axis.places == (("8", "text"),) and axis.values == ("a cat, sitting", "a dog")
    (axis,) = axes("8.rows.strength_2=0.5,1")
    assert axis.places == (("8", "rows.strength_2"),) and axis.values == (0.5, 1)


def test_another_class_is_another_method():
    composite, merge = cells_of(WORKFLOW, axes("6.class_type=LoRAEnsembleComposite,LoRAEnsembleMerge"))
    assert composite.kinds == () and merge.kinds == ("6",) and merge.workflow["6"]["class_type"] == "LoRAEnsembleMerge"


def test_a_new_class_keeps_what_it_knows_and_gets_the_rest(monkeypatch):
    info = {"LoRAEnsembleMerge": {"input": {"required": {"model": ["MODEL"], "mode": [["runtime", "baked"]]},
                                            "optional": {"place": ["COMBO", {"options": ["masks", "words"]}]}}}}
    monkeypatch.setattr("lora_ensemble.examples.sweep_work.call", lambda server, path: json.dumps(
        info if path.endswith("Merge") else {}).encode())
    (cell,) = cells_of(WORKFLOW, axes("6.class_type=LoRAEnsembleMerge"))
    assert fitted("here", cell.workflow, cell.kinds)["6"]["inputs"] == {
        "model": ["1", 0], "place": "words", "mode": "runtime"}
    assert fitted("here", WORKFLOW, ()) == WORKFLOW
    (cell,) = cells_of(WORKFLOW, axes("6.class_type=Mergee"))
    with pytest.raises(Problem, match="no node 'Mergee'"):
        fitted("here", cell.workflow, cell.kinds)


@pytest.mark.parametrize(("text", "found"), [("1..3", (1, 2, 3)), ("0.6, 0.8", (0.6, 0.8)), ("euler,dpmpp_2m", (
    "euler", "dpmpp_2m")), ("true,false", (True, False)), ('["a, b"]', ("a, b",)), ("-1..1", (-1, 0, 1))])
def test_values(text, found):
    assert values_of(text) == found


def test_what_is_wrong_is_said():
    assert "--vary LoRAEnsembleLoRA.strength_model=1: several nodes are called so: 3, 4" in refused(
        "LoRAEnsembleLoRA.strength_model=1")
    assert "NODE.INPUT" in refused("11.sede=1") and "NODE.INPUT" in refused("11=1") and "expected" in refused("11.seed")
    assert "0.5 is there twice" in refused("3.strength_model=0.5,0.50")
    assert "a value is missing" in refused("3.strength_model=0.5,") and "no JSON list" in refused("8.text=[a")
    assert "two values are given for 11.seed" in refused("11.seed=1,2", "KSampler.seed=3")


def test_one_value_for_all_cells(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(WORKFLOW))
    changed = load_workflow(path, ["KSampler.steps=8", "2. Two.lora_name=c"])
    assert changed["11"]["inputs"]["steps"] == 8 and changed["4"]["inputs"]["lora_name"] == "c"
    with pytest.raises(Problem, match="--set KSampler.sede=1: expected NODE.INPUT"):
        load_workflow(path, ["KSampler.sede=1"])


def test_files_on_a_server_are_its_own():
    assert alone(WORKFLOW, "k")["12"]["inputs"] == {"filename_prefix": "cat_k", "images": ["11", 0]}
    assert alone(WORKFLOW, "k")["11"] == WORKFLOW["11"] and WORKFLOW["12"]["inputs"]["filename_prefix"] == "cat"


def test_saved_pictures_come_before_previews():
    entry = {"outputs": {"1": {"images": [{"type": "temp", "filename": "p"}]}, "2": {"text": ["x"]},
                         "3": {"images": [{"type": "output", "filename": "s"}]}}}
    assert [each["filename"] for each in pictures_of(entry, "")] == ["s", "p"]
    assert [each["filename"] for each in pictures_of(entry, "1")] == ["p"]


# --- who draws -------------------------------------------------------------------------------------------------------


class Servers:
    """Servers in this process: `drop` of them are lost, each with a cell in its hands."""

    def __init__(self, *drop: str, after: int = 1):
        self.drop, self.after, self.asked, self.lock = set(drop), after, Counter(), threading.Lock()
        self.cells: list[tuple[str, str]] = []

    def __call__(self, server: str, cell: Cell) -> dict:
        with self.lock:
            self.asked[server] += 1
            lost = server in self.drop and self.asked[server] > self.after
        threading.Event().wait(0.01)
        if lost:
            raise Unreachable("gone")
        with self.lock:
            self.cells.append((server, cell.key))
        return drawn(server)


def some(count: int) -> list[Cell]:
    return cells_of(WORKFLOW, axes(f"11.seed=1..{count}"))


def test_all_servers_draw_and_no_cell_is_drawn_twice():
    servers, cells = Servers(), some(12)
    found = list(on_servers(cells, ["a", "b"], servers, 3))
    assert sorted(key for key, _ in found) == sorted(cell.key for cell in cells)
    assert {server for server, _ in servers.cells} == {"a", "b"} and len(servers.cells) == 12


def test_the_cell_of_a_lost_server_goes_to_another(capsys):
    servers, cells = Servers("b", after=2), some(10)
    found = list(on_servers(cells, ["a", "b"], servers, 3))
    assert Counter(key for key, _ in found) == Counter(cell.key for cell in cells)
    assert all("facts" in outcome for _, outcome in found) and "b is lost: gone" in capsys.readouterr().out
    assert Counter(server for server, _ in servers.cells) == {"a": 8, "b": 2}


def test_a_cell_that_comes_back_last_is_not_forgotten():
    """The others have no cell left and wait for those that are being drawn."""
    last, ready = some(1), threading.Event()

    def draw(server: str, cell: Cell) -> dict:
        if server == "b" or ready.is_set():
            return drawn(server)
        ready.set()
        threading.Event().wait(0.1)
        raise Unreachable("gone")

    found = list(on_servers(last, ["a", "a2", "b"], draw, 3))
    assert [outcome["facts"]["worker"] for _, outcome in found] in (["a2"], ["b"], ["a"])


def test_when_all_are_lost_the_rest_is_left():
    cells = some(5)
    found = list(on_servers(cells, ["a", "b"], Servers("a", "b"), 9))
    assert len(found) == 2 and {key for key, _ in found} < {cell.key for cell in cells}


def test_a_cell_that_costs_servers_is_given_up():
    cells = some(4)

    def draw(server: str, cell: Cell) -> dict:
        if cell is cells[0]:
            raise Unreachable("killed")
        return drawn(server)

    found = dict(on_servers(cells, ["a", "b", "c"], draw, 2))
    assert found[cells[0].key] == {"problem": "its server was lost 2 times while it was drawn"}
    assert all("facts" in found[cell.key] for cell in cells[1:])


def test_a_fault_of_ours_stops_the_sweep():
    def draw(server: str, cell: Cell) -> dict:
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        list(on_servers(some(3), ["a", "b"], draw, 3))


def test_a_sweep_that_is_left_hands_out_no_more():
    servers = Servers()
    found = on_servers(some(50), ["a", "b"], servers, 3)
    next(found)
    found.close()
    assert len(servers.cells) < 10


def test_a_worker_starts_a_lost_server_anew(monkeypatch):
    """What a cluster calls again: the first call says that the server was lost, the second draws."""
    class Server:
        started, runs, address = 0, False, "here"

        def start(self):
            self.started, self.runs = self.started + 1, True

        def stop(self):
            self.runs = False

    answers = [Unreachable("gone"), {"problem": "broken"}, drawn("here")]

    def draw(*_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("lora_ensemble.examples.sweep_work.drawn", draw)
    worker, (cell,) = Worker(Server, 1, "", "worker 1"), some(1)
    assert worker.ready() == "here" and worker.server.started == 1
    with pytest.raises(Unreachable):
        worker.draw(cell)
    assert worker.draw(cell) == (cell.key, {"problem": "broken"}) and worker.server.started == 2
    assert worker.draw(cell)[1]["facts"]["worker"] == "worker 1"
    worker.stop()
    assert not worker.server.runs


def test_what_to_do_where_no_server_answers_names_no_other_program_s_option(tmp_path):
    """Guard: the hint named an option of queue_prompt.py, and here it is another."""
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    command = [sys.executable, sweep.__file__, "workflow.json", "--vary", "11.seed=1", "--servers", "127.0.0.1:9",
               "--tries", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "No ComfyUI reachable at 127.0.0.1:9" in done.stdout
    assert set(re.findall(r"--[a-z-]+", done.stdout + done.stderr)) <= {"--servers", "--comfyui"}


def test_a_comfyui_that_does_not_start(tmp_path):
    with pytest.raises(Problem, match="There is no ComfyUI in"):
        Headless(str(tmp_path), "", str(tmp_path / "w")).start()
    (tmp_path / "main.py").write_text("import sys; print('no module torch'); sys.exit(3)")
    server = Headless(str(tmp_path), sys.executable, str(tmp_path / "w"))
    with pytest.raises(Problem, match=r"exit code 3[\s\S]*no module torch"):
        server.start(timeout=60)
    assert not server.runs


# --- what it leaves --------------------------------------------------------------------------------------------------


def test_the_table_has_each_cell_once_and_says_what_failed(tmp_path):
    axis = axes("3.strength_model=0.6,0.8", "11.seed=1,2")
    cells = cells_of(WORKFLOW, axis)
    book = Book(tmp_path, axis, cells)
    assert book.left() == cells
    book.enter(cells[0].key, drawn("a"))
    book.enter(cells[0].key, drawn("b"))  # a server that was given up and answered after all
    book.enter(cells[1].key, {"problem": "Node 11 failed"})
    written = book.save()
    assert [(row["3.strength_model"], row["11.seed"], row["worker"], row["problems"]) for row in rows(tmp_path)] == [
        ("0.6", "1", "a", ""), ("0.6", "2", "", "Node 11 failed")]
    assert written == [tmp_path / "table.csv", tmp_path / "grid.png"]
    assert (tmp_path / rows(tmp_path)[0]["file"]).is_file()
    assert book.left() == cells[1:], "what failed is tried again"
    with Image.open(tmp_path / "grid.png") as sheet:
        assert (51, 102, 153) in {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    again = Book(tmp_path, axis, cells)  # another day
    again.enter(cells[1].key, drawn("c"))
    again.save()
    assert [row["worker"] for row in rows(tmp_path)] == ["a", "c"] and again.left() == cells[2:]
    wider = axes("3.strength_model=0.5,0.6", "11.seed=0..2")
    assert len(Book(tmp_path, wider, cells_of(WORKFLOW, wider)).left()) == 4, "a larger sweep has the two already"


def command(monkeypatch, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    return str(end.value)


def test_what_is_lacking_is_said(tmp_path, monkeypatch):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(WORKFLOW))
    assert "--comfyui FOLDER" in command(monkeypatch, path, "--vary", "11.seed=1", "--out", tmp_path / "out")
    for name in ("ray", "ray.util"):
        monkeypatch.setitem(sys.modules, name, None)
    said = command(monkeypatch, path, "--vary", "11.seed=1", "--comfyui", tmp_path, "--out", tmp_path / "out")
    assert said.startswith("Ray is not installed here: pip install ray.") and "--servers" in said
    said = command(monkeypatch, path, "--vary", "11.seed=1,2", "--servers", "127.0.0.1:9", "--out", tmp_path / "out")
    assert said == "2 of 2 cells were not drawn. The same command tries them again."
    assert rows(tmp_path / "out") == []
