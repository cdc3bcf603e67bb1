"""Makes the second body's weights from nothing: `python3 testbed/joint/train.py [--stages base judge loras report]`.

As testbed/train.py, whose weights and code it leaves alone. One CPU core needs about an hour and a half.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[2] / "run.py"))
    sys.exit(run["main"](["_module", "testbed.joint.train", *sys.argv[1:]]))

import torch

from ..base import train_base
from ..train import say
from ..weights import save_module
from .base import JointBase

WEIGHTS = Path(__file__).resolve().parent / "weights"
STEPS = 4600


def main(arguments: list[str] | None = None) -> int:
    torch.manual_seed(0)

    def keep(base):
        save_module(base, WEIGHTS / "base.safetensors")

    keep(train_base(JointBase(), STEPS, log=say, keep=keep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
