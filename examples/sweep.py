#!/usr/bin/env python3
"""Draw a grid of pictures from one workflow, on several ComfyUI servers at once.

    python3 sweep.py workflow.json --servers 127.0.0.1:8188 192.168.1.5:8188 --vary KSampler.seed=1..8
    python3 sweep.py workflow.json --comfyui ~/ComfyUI --vary "3.strength_model+4.strength_model=0.6,0.8" \
        --vary 6.class_type=LoRAEnsembleMerge,LoRAEnsembleComposite --vary KSampler.seed=1..4

The workflow is a file in API format (in ComfyUI: Workflow, Export (API)). Every combination of the values is a cell;
the last `--vary` makes the columns. Into `--out` go `pictures/`, `grid.png` and `table.csv`. What is there is not drawn
again: the same command goes on where an earlier one ended, and tries again what failed.

With `--comfyui`, Ray (pip install ray) starts a headless server for each GPU, or `--workers` of them, on this machine
or on the cluster that `--address` names, gives each the next cell when it is done with one, starts a lost one anew and
has its cell drawn again. `--servers` takes servers that already run, and needs no Ray: the cell of one that is lost is
drawn by another. Needs Pillow.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy
    import types

    pack = sys.modules["lora_ensemble"] = types.ModuleType("lora_ensemble")
    pack.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    try:
        runpy.run_module("lora_ensemble.examples.sweep", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as missing:
        if missing.name != "PIL":
            raise
        sys.exit(f"This draws its sheets with Pillow, which is not there: {sys.executable} -m pip install pillow")
    sys.exit()

import argparse
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from queue import SimpleQueue
from threading import Condition

from . import kept_pictures, queue_prompt, server_nodes, sweep_grid, sweep_work
from .queue_prompt import Problem, Unreachable, load_workflow
from .sweep_grid import Book, Cell, axis_of, cells_of
from .sweep_work import Headless, Outcome, Worker, drawn

LOST = "its server was lost {} times while it was drawn"
Found = Iterator[tuple[str, Outcome]]
"""(key of a cell, what became of it), as they come."""
Draw = Callable[[str, Cell], Outcome]
"""Draws a cell on a server; raises Unreachable where that is lost."""


# --- servers that run ------------------------------------------------------------------------------------------------


class Cells:
    """The cells of a sweep, for several threads: none is lost with the one that has taken it."""

    def __init__(self, cells: Sequence[Cell]):
        self._left, self._open, self._changed = deque(cells), len(cells), Condition()

    def take(self) -> Cell | None:
        """The next one. While others are being drawn it waits, since they may come back; None when all are settled."""
        with self._changed:
            while not self._left and self._open > 0:
                self._changed.wait()
            return self._left.popleft() if self._left else None

    def give_back(self, cell: Cell) -> None:
        with self._changed:
            self._left.appendleft(cell)
            self._changed.notify_all()

    def settle(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out no more."""
        with self._changed:
            self._left.clear()
            self._open = 0
            self._changed.notify_all()


def on_servers(cells: Sequence[Cell], servers: Sequence[str], draw: Draw, tries: int) -> Found:
    """Each server draws the next cell when it is done with one. One that is lost draws no more, and its cell goes to
    another; a cell that has cost `tries` servers is given up. Cells that no server was left for are not among them."""
    shared, out, lost = Cells(cells), SimpleQueue(), Counter()

    def work(server: str) -> None:
        try:
            while (cell := shared.take()) is not None:
                try:
                    found = draw(server, cell)
                except Unreachable as problem:
                    print(f"{server} is lost: {problem}", flush=True)
                    lost[cell.key] += 1
                    if lost[cell.key] < tries:
                        shared.give_back(cell)
                    else:
                        out.put((cell.key, {"problem": LOST.format(tries)}))
                        shared.settle()
                    return
                out.put((cell.key, found))
                shared.settle()
        except BaseException:
            shared.stop()
            raise
        finally:
            out.put(None)

    with ThreadPoolExecutor(len(servers)) as pool:
        hands = [pool.submit(work, server) for server in servers]
        try:
            for _ in hands:
                while (found := out.get()) is not None:
                    yield found
        finally:
            shared.stop()
    for hand in hands:
        hand.result()


# --- a cluster -------------------------------------------------------------------------------------------------------


def on_ray(cells: Sequence[Cell], start: Callable[[str], Callable[[], Headless]], options: argparse.Namespace) -> Found:
    """A Ray actor for each worker, with a server of its own. Ray gives cells to those that are idle, starts a lost
    actor anew and calls it again; an actor whose server is lost starts that anew. Raises Problem."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise Problem("Ray is not installed here: pip install ray. Servers that already run need none: --servers "
                      "HOST:PORT HOST:PORT.") from None
    # A server must not outlive the actor that started it, however that ends: it holds a GPU.
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper", "true")
    ray.init(address=options.address, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        for module in (kept_pictures, queue_prompt, server_nodes, sweep_grid, sweep_work):
            ray.cloudpickle.register_pickle_by_value(module)  # machines of a cluster need not have this pack
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = min(options.workers or gpus or 1, len(cells))
        # On a GPU each where there are enough; a tried call is tried again, also by an actor that Ray has started anew.
        kind = ray.remote(num_cpus=0, num_gpus=1 if gpus >= count else 0, max_restarts=-1,
                          max_task_retries=options.tries - 1)(Worker)
        actors = [kind.remote(start(f"worker {k}"), options.timeout, options.picture, f"worker {k}")
                  for k in range(1, count + 1)]
        try:
            print(f"servers: {', '.join(ray.get([actor.ready.remote() for actor in actors]))}", flush=True)
        except ray.exceptions.RayError as error:
            raise Problem(f"A worker did not start: {cause(error)}") from None
        pool, asked = ActorPool(actors), set()
        for cell in cells:
            pool.submit(lambda actor, cell: actor.draw.options(retry_exceptions=True).remote(cell), cell)
            asked.add(cell.key)
        while pool.has_next():
            try:
                key, found = pool.get_next_unordered()
            except ray.exceptions.RayError as error:
                print(f"a cell was given up: {cause(error)}", flush=True)
                continue
            asked.discard(key)
            yield key, found
        for key in asked:
            yield key, {"problem": LOST.format(options.tries)}
        for actor in actors:
            actor.stop.remote()
        ray.wait([actor.ready.remote() for actor in actors], num_returns=count, timeout=30)
    finally:
        ray.shutdown()


def cause(error: Exception) -> str:
    """What went wrong, without the stack of the process that it went wrong in."""
    inner = getattr(error, "cause", None) or error
    return str(inner).strip().splitlines()[-1] if not isinstance(inner, Problem) else str(inner)


# --- the sweep -------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> None:
    """All that the command line asks for. Raises Problem."""
    if bool(options.comfyui) == bool(options.servers):
        raise Problem("Say where to draw: --comfyui FOLDER, to start servers, or --servers HOST:PORT ..., to use some.")
    workflow = load_workflow(options.workflow, options.changes)
    axes = [axis_of(workflow, text) for text in options.vary]
    cells = cells_of(workflow, axes)
    book = Book(options.out, axes, cells)
    left = book.left()
    print(f"{len(cells)} cells, {len(cells) - len(left)} are there", flush=True)
    try:
        if left:
            draw_all(book, left, options)
    finally:
        for path in book.save():
            print(f"wrote {path}")
    if missing := len(book.left()):
        raise Problem(f"{missing} of {len(cells)} cells were not drawn. The same command tries them again.")


def draw_all(book: Book, left: Sequence[Cell], options: argparse.Namespace) -> None:
    if options.servers:
        names = [server.removeprefix("http://").rstrip("/") for server in dict.fromkeys(options.servers)]
        found = on_servers(left, names, lambda server, cell: drawn(server, cell, options.timeout, options.picture),
                           options.tries)
    else:
        def start(name: str) -> Callable[[], Headless]:
            return partial(Headless, options.comfyui, options.python, str(options.out.absolute() / "servers" / name),
                           options.server_args)
        found = on_ray(left, start, options)
    values = {cell.key: cell.values for cell in left}
    with closing(found):
        for number, (key, outcome) in enumerate(found, 1):
            book.enter(key, outcome)
            facts = outcome.get("facts", {})
            said = f"failed. {outcome['problem']}" if "problem" in outcome else \
                f"{facts.get('seconds', '?')} s on {facts['worker']}"
            print(f"{number} of {len(left)}: {', '.join(map(str, values[key]))}: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--vary", metavar="NODE.INPUT=VALUES", action="append", required=True,
                        help="values separated by commas, 1..4, or a JSON list (for texts with commas); NODE is a "
                             "number, or a title or class that one node alone has; NODE.INPUT+NODE.INPUT sets several "
                             "alike; the input class_type is the node's class: another method")
    parser.add_argument("--set", dest="changes", metavar="NODE.INPUT=VALUE", action="append", default=[],
                        help="one value for all cells, as in queue_prompt.py")
    parser.add_argument("--servers", nargs="+", metavar="HOST:PORT", help="servers that already run")
    parser.add_argument("--comfyui", metavar="FOLDER", help="the ComfyUI to start, in this folder on every machine")
    parser.add_argument("--python", default="", help="its interpreter (default: the one that runs this)")
    parser.add_argument("--server-args", default="", metavar="ARGS", help='more for its command line, as "--lowvram"')
    parser.add_argument("--workers", type=int, help="servers to start (default: one for each GPU, else one)")
    parser.add_argument("--address", default="local", help="of a Ray cluster, or auto (default: one of its own)")
    parser.add_argument("--tries", type=int, default=3, help="servers that a cell may cost (default %(default)s)")
    parser.add_argument("--picture", default="", metavar="NODE", help="whose picture (default: the first saved)")
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of silence before a server is lost")
    options = parser.parse_args()
    try:
        run_all(options)
    except Problem as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here.")


if __name__ == "__main__":
    main()
