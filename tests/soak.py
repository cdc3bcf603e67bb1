"""A long night: hundreds of prompts in one server, in each of ComfyUI's cache modes, and what grows meanwhile.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.soak --count 1000

Two servers take turns, prompt by prompt: one with this pack, whose prompts go through its methods, and one without it,
whose prompts are chains of ComfyUI's own LoRA loaders. Strengths and seeds change with every prompt, one in 24 is
interrupted in the middle and one in 24 is refused. After each prompt stand the server's own memory, its open handles,
its memory maps, and the time that the prompt took (as the server tells it). ComfyUI keeps the last 10 000 prompts as
they were sent, 14 KB for a short one; that history is deleted, for it grows with how long a prompt is.

What still differs is theirs as well. Caches of what was least recently used (the default one, --cache-lru) keep the key
of every node that a prompt did not come to: 71 KB of an interrupted prompt with two loaders, 76 KB of one of ours that
is a node longer, and 95 KB of the one in 120 that a node of ours refuses in the run, since its file comes over a link
(ComfyUI's loaders are refused before). That is 2.9 and 4.0 KB per prompt. A map more is one MiB of Python's allocator
that found no neighbour to be joined with; which server comes to it is chance.

The figures are slopes per prompt after the first fifth: least squares over the means of 16 equal blocks, with the 95 %
interval of that fit. What grows is a defect where all of ours lies above all of the stock loaders' and above a FLOOR.
Memory, handles and maps can be seen on Linux; elsewhere only the time is. At last a prompt is drawn as at first.
"""

from __future__ import annotations

import copy
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..tools.results import Found, Results, TimeOver, options, say
from .fuzz_api import give_loras
from .server import PromptFailed, PromptRefused, Server
from .workflows import ROOT, TESTBED, Prompt, load

DEPENDS = ("soak.py", "fuzz_api.py", "server.py", "workflows.py", "comfy_testbed/*.py")
MODES = {"the default cache": (), "--cache-classic": ("--cache-classic",), "--cache-lru 20": ("--cache-lru", "20"),
         "--cache-none": ("--cache-none",), "--high-ram": ("--high-ram",)}
OURS = ("composite", "merge", "switch", "merge_baked", "merge_stack")
ODD = 24
BLOCKS = 16
LEAST = 200
"""Prompts below which a soak that has to end says nothing: a server's first hundred grow."""
LAST = 15.0
"""Seconds for the picture at last."""
T95 = 2.145
"""Of Student's distribution at 95 % with 14 degrees of freedom: 16 blocks, two parameters."""
UNITS = {"memory": "KB", "handles": "handles", "maps": "maps", "time": "ms"}
FLOOR = {"memory": 8.0, "handles": 0.02, "maps": 0.02, "time": 0.1}
"""Per prompt; 8 KB are 8 MB in a night of 1 000 prompts."""


class Slope(NamedTuple):
    """Growth per prompt, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def slope(values: Sequence[float]) -> Slope:
    """Of values per prompt: least squares over the means of blocks, and the interval of that fit."""
    size = len(values) // BLOCKS
    if size < 1:
        raise ValueError(f"{len(values)} prompts are too few for {BLOCKS} blocks")
    means = [statistics.fmean(values[len(values) - (BLOCKS - k) * size:][:size]) for k in range(BLOCKS)]
    x = [(k + 0.5) * size for k in range(BLOCKS)]
    fit = statistics.linear_regression(x, means)
    left = sum((y - fit.slope * at - fit.intercept) ** 2 for at, y in zip(x, means, strict=True))
    spread = sum((at - statistics.fmean(x)) ** 2 for at in x)
    error = T95 * (left / (BLOCKS - 2) / spread) ** 0.5
    return Slope(fit.slope, fit.slope - error, fit.slope + error)


def grows(ours: Slope, stock: Slope, floor: float) -> bool:
    return ours.low > max(stock.high, floor)


@dataclass
class Worker:
    """One server and what was seen of it, by prompt."""

    server: Server
    prompts: list[Prompt]
    seen: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in UNITS})

    def prepare(self) -> None:
        give_loras(self.server)

    def one(self, number: int) -> None:
        """A prompt with strengths and seed of its own; then a look at the server."""
        dice = random.Random(number)
        prompt = copy.deepcopy(self.prompts[number % len(self.prompts)])
        for node in prompt.values():
            for name in ("strength_model", "strength_clip"):
                if name in node["inputs"]:
                    node["inputs"][name] = round(dice.uniform(0.2, 1.2), 2)
        prompt["sampler"]["inputs"].update(seed=dice.randrange(2**32), steps=2)
        if number % ODD == 7:
            self.interrupted(prompt)
        elif number % ODD == 19:
            self.refused(prompt)
        else:
            entry = self.server.run(prompt)
            told = {name: details["timestamp"] for name, details in entry["status"]["messages"]}
            self.seen["time"].append(told["execution_success"] - told["execution_start"])
        self.server.post("/history", clear=True)
        for name, value in looked_at(self.server.process.pid).items():
            self.seen[name].append(value)

    def interrupted(self, prompt: Prompt) -> None:
        prompt["sampler"]["inputs"]["steps"] = 2000
        prompt_id = self.server.queue(prompt)
        while not self.server.json("/queue")["queue_running"]:
            time.sleep(0.01)
        time.sleep(0.1)
        while not (entry := self.server.json(f"/history/{prompt_id}")):
            self.server.post("/interrupt")
            time.sleep(0.05)
        if "execution_interrupted" not in dict(entry[prompt_id]["status"]["messages"]):
            raise AssertionError("an interrupt is lost")

    def refused(self, prompt: Prompt) -> None:
        for name, value in (("lora_name", "gone.safetensors"), ("first", "gone.safetensors")):
            for node in prompt.values():
                if name in node["inputs"]:
                    node["inputs"][name] = value
        try:
            self.server.run(prompt)
        except (PromptRefused, PromptFailed):
            return
        raise AssertionError("a prompt whose file is not there was drawn")

    def picture(self) -> bytes:
        """What the first prompt draws, with nothing kept."""
        self.server.post("/free", free_memory=True)
        time.sleep(0.5)
        prompt = copy.deepcopy(self.prompts[0])
        prompt["sampler"]["inputs"].update(seed=1, steps=2)
        return self.server.images(self.server.run(prompt))[0]


def looked_at(pid: int) -> dict[str, float]:
    """Memory of a process that no file stands for in KB, its open handles and its maps; nothing but on Linux."""
    folder = Path("/proc", str(pid))
    if not (folder / "maps").is_file():
        return {}
    lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    with (folder / "maps").open() as maps:
        return {"memory": float(lines["RssAnon"].split()[0]), "handles": len(os.listdir(folder / "fd")),
                "maps": sum(1 for _ in maps)}


def soak(comfyui: Path, mode: Sequence[str], count: int, told: Callable[[str], None] = say,
         left: Callable[[], float] = lambda: math.inf) -> tuple[str, bool]:
    """The figures of one cache mode, and whether nothing grows.

    left   seconds until it has to end, with the prompts that there have been
    """
    beds = {path.stem: load(path) for path in TESTBED}
    pack = ROOT / "tests" / "comfy_testbed"
    with ExitStack() as stack:
        def begun(packs: list[Path], names: Sequence[str]) -> Worker:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            worker = Worker(Server(comfyui, folder, packs, arguments=mode), [beds[name] for name in names])
            worker.prepare()
            stack.enter_context(worker.server)
            return worker

        workers = {"ours": begun([ROOT, pack], OURS), "stock": begun([pack], ("stock_chain",))}
        first = workers["ours"].picture()
        made = 0
        for number in range(count):
            if left() < LAST:
                break
            for worker in workers.values():
                worker.one(number)
            made += 1
            if number % 100 == 99:
                told(f"{number + 1} of {count} prompts")
        if workers["ours"].picture() != first:
            raise AssertionError("a prompt is drawn differently at last")
    if made < LEAST:
        raise TimeOver
    figures, good = [], True
    for name, unit in UNITS.items():
        ours, stock = ([] if len(seen) < 2 * BLOCKS else [slope(seen[len(seen) // 5:])]
                       for seen in (worker.seen[name] for worker in workers.values()))
        if ours and stock:
            good &= not grows(ours[0], stock[0], FLOOR[name])
            figures.append(f"{name} {ours[0]} / {stock[0]} {unit}")
    cut = "" if made == count else f"{made} prompts in the time there was; "
    return f"{cut}per prompt, ours / stock: {'; '.join(figures)}", good


def known(comfyui: Path) -> dict[str, Sequence[str]]:
    """The cache modes of this release."""
    text = (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    return {name: mode for name, mode in MODES.items() if not mode or f'"{mode[0]}"' in text}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--count", type=int, default=200, help="prompts per cache mode and server")
    chosen = parser.parse_args()
    comfyui = Path(os.environ["COMFYUI_UNDER_TEST"])
    cases = {f"{name}, {chosen.count} prompts": mode for name, mode in known(comfyui).items()}

    results = Results.asked("soak", DEPENDS, chosen)

    def check(case: str) -> Found:
        text, good = soak(comfyui, cases[case], chosen.count, left=results.left)
        if not good:
            raise AssertionError(text)
        return text, {}

    return results.judge(cases, check)


if __name__ == "__main__":
    sys.exit(main())
