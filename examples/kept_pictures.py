"""Pictures of a run of many prompts, each beside a JSON file of what was measured: what is there is not drawn again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def measured(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry of /history says of its run: seconds on the server, and what the Ensemble Report adds."""
    times = [details["timestamp"] for _, details in entry.get("status", {}).get("messages", ())
             if "timestamp" in details]
    found: dict[str, Any] = {"seconds": round((max(times) - min(times)) / 1000, 2)} if times else {}
    for report in reports(entry):
        if "steps" in report:
            found["evaluations"] = sum(step["rows"] for step in report["steps"])
        found["words_found"] = " | ".join(", ".join(each["words"]) or "-" for group in report.get("words", ())[:1]
                                          for each in group)
        found["problems"] = " ".join(report["problems"])
    return found


def reports(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The texts of a run that are an Ensemble Report's."""
    for output in entry["outputs"].values():
        for text in output.get("text", ()):
            try:
                report = json.loads(text)
            except ValueError:
                continue
            if isinstance(report, dict) and "problems" in report:
                yield report


def keep(path: Path, picture: bytes, facts: dict[str, Any]) -> None:
    """Write a picture and what was measured of it."""
    path.with_suffix(".json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    part = path.with_suffix(".part")  # what is there under its own name is whole
    part.write_bytes(picture)
    part.replace(path)


def kept(path: Path) -> dict[str, Any]:
    """What was measured of a picture that is there; nothing where that file was lost."""
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
