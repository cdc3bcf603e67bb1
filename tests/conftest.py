"""Makes the pack importable as `lora_ensemble`, and this folder as `lora_ensemble.tests`, wherever they lie."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if "lora_ensemble" not in sys.modules:
    spec = importlib.util.spec_from_file_location("lora_ensemble_run", ROOT / "run.py")
    sys.modules[spec.name] = run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.load_pack()
