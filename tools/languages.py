"""The texts of all nodes in the languages of the front end: locales/<language>/nodeDefs.json, as ComfyUI reads them.

    python3 run.py _with - lora_ensemble.tools.languages                 writes locales/en from the schemas, takes stale
                                                                         translations out, lists what is missing
    python3 run.py _with - lora_ensemble.tools.languages --add ja FILE   puts translations in; FILE maps English to them

Run it in the environment of the newest ComfyUI, with COMFYUI_UNDER_TEST naming its folder. A translation belongs to an
English text: where that changes it is taken out, and where a text comes again it is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "locales"
LANGUAGES = ("ja", "zh")
Texts = dict[str, Any]
"""Node id -> its entry of nodeDefs.json; or any part of that."""


def english(schemas: Sequence[Any]) -> Texts:
    """The texts of nodes as ComfyUI's nodeDefs.json has them."""
    return {schema.node_id: {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": dict(inputs(schema.inputs)),
        "outputs": {str(i): texts(part.display_name, part.tooltip) for i, part in enumerate(schema.outputs)},
    } for schema in schemas}


def texts(name: str | None, tooltip: str | None) -> Texts:
    return {kind: text for kind, text in (("name", name), ("tooltip", tooltip)) if text}


def inputs(parts: Sequence[Any], above: str = "") -> Iterator[tuple[str, Texts]]:
    """The inputs of a node, and those that a choice opens: the front end knows them by the way to them, and shows the
    names that they have."""
    for part in parts:
        key = f"{above}{part.id}"
        yield key, texts(None if above else part.display_name or part.id, part.tooltip)
        for option in getattr(part, "options", None) or ():
            if hasattr(option, "inputs"):
                yield from inputs(option.inputs, f"{key}_")


def flat(entry: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Path -> text."""
    if isinstance(entry, str):
        return {path: entry}
    return {key: text for name, part in entry.items() for key, text in flat(part, (*path, name)).items()}


def nested(entries: Mapping[tuple[str, ...], str]) -> Texts:
    """The opposite of `flat`."""
    tree: Texts = {}
    for path, text in entries.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = text
    return tree


def translated(new: Texts, old: Texts, before: Texts, more: Mapping[str, str] | None = None) -> tuple[Texts, list[str]]:
    """A language's texts for the English `new`, and the English texts that it lacks.

    old     the English texts that `before`, the language's present ones, were made of
    more    English text -> its translation
    """
    was, known, more = flat(old), flat(before), more or {}
    memory = {was[path]: text for path, text in known.items() if path in was}
    now = {path: more.get(text) or (known.get(path) if was.get(path) == text else None) or memory.get(text)
           for path, text in flat(new).items()}
    missing = dict.fromkeys(text for path, text in flat(new).items() if now[path] is None)
    return nested({path: text for path, text in now.items() if text is not None}), list(missing)


def read(language: str) -> Texts:
    path = FOLDER / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(language: str, entries: Texts) -> None:
    path = FOLDER / language / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def schemas() -> list[Any]:
    """Those of all nodes of the pack, in the ComfyUI that COMFYUI_UNDER_TEST names."""
    import asyncio

    sys.path.insert(0, str(Path(os.environ["COMFYUI_UNDER_TEST"]).expanduser()))
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401
    import lora_ensemble
    import utils.extra_config  # noqa: F401  (as main.py: later `utils` would be found in comfy/)

    sys.argv = arguments
    extension = asyncio.run(lora_ensemble.comfy_entrypoint())
    return [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("LANGUAGE", "FILE"), action="append", default=[])
    more = {language: json.loads(Path(file).read_text(encoding="utf-8"))
            for language, file in parser.parse_args(arguments).add}
    new, old = english(schemas()), read("en")
    for language in LANGUAGES:
        entries, missing = translated(new, old or new, read(language), more.get(language))
        write(language, entries)
        for text in missing:
            sys.stdout.write(f"{language} lacks: {text}\n")
    write("en", new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
