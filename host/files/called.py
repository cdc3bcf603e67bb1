"""What a LoRA is called where its file acts in several rows. Charts need it, and so does `examples/sweep.py`, which
serves without torch.
"""

from __future__ import annotations

import re


def in_row(name: str, row: int) -> str:
    """The name of a file, and the row."""
    return f"{name} (row {row})"


def file_of(called: str) -> str:
    """The file of a LoRA by what it is called."""
    return re.sub(r" \(row \d+\)$", "", called)
