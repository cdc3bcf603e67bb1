"""The LoRAs of `composlora.py` as their user lists them, and ComposLoRA's sets of them."""

from __future__ import annotations

import csv
import difflib
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import combinations, product
from pathlib import Path
from typing import Any

from ..examples.queue_prompt import Problem

CATEGORIES = ("character", "clothing", "style", "background", "object")  # ComposLoRA's order, Switch follows it
SIZES = (2, 3, 4, 5)
STRENGTH = 0.8


@dataclass(frozen=True)
class Lora:
    """One line of the user's file."""

    file: str
    category: str
    words: tuple[str, ...]
    strength: float = STRENGTH

    @property
    def title(self) -> str:
        return self.file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] or self.file


@dataclass(frozen=True)
class Task:
    """One set; `number` is its place among all sets of the file, whichever of them are drawn."""

    number: int
    loras: tuple[Lora, ...]

    @property
    def title(self) -> str:
        return ", ".join(lora.title for lora in self.loras)

    def prompt(self, head: str) -> str:
        """The head and the words of each LoRA; of `ohwx = woman` what is said is the first part."""
        words = [word.partition("=")[0].strip() for lora in self.loras for word in lora.words]
        return ", ".join([*([head] if head else []), *words])


def example(family: str) -> list[dict[str, Any]]:
    """The files of one of ComposLoRA's two families, by the names they were published under."""
    return [{"file": f"{family}/{category}_{i}.safetensors", "category": category, "words": "", "strength": STRENGTH}
            for category in CATEGORIES for i in range(1, 4 if category == "character" else 3)]


def read_loras(path: Path) -> list[Lora]:
    """The user's LoRAs. Raises Problem with all that is wrong in the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            separator = ";" if ";" in text.partition("\n")[0] else ","
            entries = list(csv.DictReader(StringIO(text), delimiter=separator))
        else:
            entries = json.loads(text)
            if isinstance(entries, dict):  # ComposLoRA's own
                entries = [{"file": f"{each['id']}.safetensors", "category": category, "words": each["trigger"]}
                           for category, group in entries.items() for each in group]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it is not a list of objects with file, category, words and strength")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise Problem(f"{path} cannot be read: {error}. --example prints such a file.") from None
    loras, wrong = [], []
    for number, entry in enumerate(entries, 1):
        try:
            loras.append(lora_of(entry))
        except ValueError as error:
            wrong.append(f"  LoRA {number}: {error}")
    twice = sorted({lora.file for lora in loras if sum(lora.file == other.file for other in loras) > 1})
    wrong += [f"  '{file}' is there more than once" for file in twice]
    if wrong:
        raise Problem("\n".join([f"{path}:", *wrong]))
    return loras


def lora_of(entry: dict[str, Any]) -> Lora:
    """One entry of the file. Raises ValueError."""
    file, category, words, strength = (entry.get(key) for key in ("file", "category", "words", "strength"))
    if not isinstance(file, str) or not file.strip():
        raise ValueError("it names no file")
    if category not in CATEGORIES:
        raise ValueError(f"'{file}' has the category '{category}'. {hint(str(category), CATEGORIES)}")
    parts = words if isinstance(words, list) else str(words or "").split(",")
    said = tuple(part for part in (" ".join(str(part).split()) for part in parts) if part)
    if not said and category != "style":
        raise ValueError(f"'{file}' has no words: the prompt would not ask for it. Write its trigger words")
    try:
        number = STRENGTH if strength in (None, "") else float(strength)
    except (TypeError, ValueError):
        number = math.nan
    if not -100 <= number <= 100:
        raise ValueError(f"'{file}' has the strength '{strength}', which is no number from -100 to 100")
    return Lora(file.strip(), category, said, number)


def all_sets(loras: Sequence[Lora], sizes: Sequence[int] = SIZES) -> list[Task]:
    """Every set with one character and at most one LoRA of each other category, of these sizes."""
    groups = {category: [lora for lora in loras if lora.category == category] for category in CATEGORIES}
    found = [chosen for size in SIZES for others in combinations(CATEGORIES[1:], size - 1)
             for chosen in product(*(groups[category] for category in (CATEGORIES[0], *others)))]
    return [Task(i, chosen) for i, chosen in enumerate(found) if len(chosen) in sizes]


def some_of(tasks: Sequence[Task], count: int) -> list[Task]:
    """A random sample in equal parts per size, always the same, a larger one holds the smaller ones; 0: all."""
    rng, groups = random.Random(11), []
    for size in SIZES:
        group = [task for task in tasks if len(task.loras) == size]
        rng.shuffle(group)
        groups.append(group)
    turns = [group[k] for k in range(len(tasks)) for group in groups if k < len(group)]
    return sorted(turns[:count or None], key=lambda task: task.number)


def bare(name: str) -> str:
    """A file's name without folder, ending and capitals: what is alike in all names would make all of them close."""
    return re.sub(r"\.(safetensors|sft|ckpt|pth?|bin)$", "", name.replace("\\", "/").rpartition("/")[2].lower())


def hint(name: str, known: Iterable[str]) -> str:
    """A sentence that says which of the known names is meant, or which there are."""
    known, wanted = list(known), bare(name)
    same = [each for each in known if bare(each) == wanted]
    close = difflib.get_close_matches(wanted, [bare(each) for each in known], 3, 0.6)
    meant = same or [each for each in known if bare(each) in close or wanted and wanted in bare(each)]
    if meant:
        return "Did you mean " + " or ".join(f"'{each}'" for each in meant[:4]) + "?"
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f"There are: {', '.join(known[:8])}{more}." if known else "There are none."
