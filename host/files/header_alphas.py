"""Alphas that stand in a file's header instead of in tensors: diffusers writes PEFT's configuration there and goes by
it, and ComfyUI's LoRA loaders pass it over. So does this pack, whose LoRAs act as the loaders have them; it says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import sqrt

from .files import fingerprint, path_of
from .metadata import header_of, parsed

KEY = "lora_adapter_metadata"
ALPHA = "lora_alpha"
DOWN = tuple(f".{end}.weight" for end in ("lora_A", "lora_A.default", "lora_down", "lora.down"))
NEARLY = 1e-3


def passed_over(name: str) -> str:
    """What to say of a LoRA file by its name in the `loras` folders; empty: nothing."""
    try:
        found = _factors(fingerprint(name), path_of(name)) if name else ()
    except ValueError:  # whoever reads the file says that it is missing
        return ""
    if all(abs(factor - 1) < NEARLY for factor in found):
        return ""
    low, high = min(found), max(found)
    there = f"strength 1 there is strength {high:.3g} here" if high - low < NEARLY * high else \
        f"there its layers are multiplied by {low:.3g} to {high:.3g}"
    return f"its alpha is in its header alone, where diffusers looks and ComfyUI's LoRA loaders do not: {there}"


@lru_cache(maxsize=64)
def _factors(stamp: str, path: str) -> tuple[float, ...]:
    """By what diffusers multiplies the layers of a file (at this stamp) that have no alpha of their own."""
    header = header_of(path)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    config = parsed(metadata.get(KEY)) if isinstance(metadata, dict) else None
    return tuple(factors(header, config)) if isinstance(config, dict) else ()


def factors(header: Mapping, config: Mapping) -> Iterator[float]:
    """alpha / rank of PEFT (alpha / sqrt(rank) with rsLoRA), of each layer without a tensor for it.

    config   PEFT's names behind the name of a part of the pipeline ("transformer.lora_alpha"), or without one
    """
    parts = [key.removesuffix(ALPHA) for key in config if isinstance(key, str) and key.endswith(ALPHA)]
    for key, entry in header.items():
        layer = next((key.removesuffix(end) for end in DOWN if key.endswith(end)), None)
        if layer is None or f"{layer}.alpha" in header:
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        rank = shape[0] if isinstance(shape, list) and shape else None
        part = next((part for part in parts if layer.startswith(part)), parts[0] if len(parts) == 1 else None)
        alpha = None if part is None else _own(config.get(f"{part}alpha_pattern"), layer) or config[f"{part}{ALPHA}"]
        if _is_number(alpha) and _is_number(rank):
            yield alpha / (sqrt(rank) if config.get(f"{part}use_rslora") is True else rank)


def _own(pattern: object, layer: str) -> object:
    """The alpha of a layer in PEFT's table of exceptions. Its keys may be regular expressions; the host's user did not
    write them, so only those that are plain ends of names are understood."""
    table = pattern if isinstance(pattern, dict) else {}
    return next((alpha for end, alpha in table.items() if f".{layer}".endswith(f".{end}")), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
