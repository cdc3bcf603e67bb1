"""What a LoRA file says of itself: its trigger words, the tags that it was trained with, and the model it is for. Where
it names no trigger words, those that a file beside it names.

Anybody may have written it, so it is read as text and numbers alone, in bounded sizes; what is of another kind is left
out. Only the header of the file is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...methods.prompt_text import unweighted
from .beside import Beside, read_beside
from .files import fingerprint, path_of

HEADER_BYTES = 100_000_000  # as `check_file` allows
TABLE_BYTES = 20_000_000  # of one entry: large sets of training pictures have large tables of tags
WORDS, LETTERS, TAGS = 32, 200, 32  # no more trigger words, letters of one, and tags than this
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "trigger",
            "activation text", "instance_prompt", "ss_instance_prompt", "trainedWords")
FEW_STEPS = re.compile(r"lightning|lightx2v|turbo|(?<![a-z])lcm(?![a-z])|hyper[-_ ]?(sd|flux|\d)|causvid"
                       r"|(?<![a-z])(dmd2?|tcd|pcm|accvid(eo)?)(?![a-z])|distill?(ed|ation)?(?![a-z])"
                       r"|(?<!\d)[1248][-_ ]?steps?(?![a-z])|self[-_ ]?forcing", re.IGNORECASE)
NEARLY_ALL = 0.8
"""A tag that is so often there as the most frequent one describes what all pictures of the training show. A LoRA learns
such a thing with its trigger, and its base knows it by the tag."""
BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "baseModel")
TITLES = ("modelspec.title", "ss_output_name", "name")
_NAMED = re.compile(r"<[^<>]*>")  # a LoRA by name, as prompts of other programs call it
_KEPT = 64


@dataclass(frozen=True)
class Wording:
    """The words of a file: `trigger` as its author named them, `tags` of its training with the most frequent first,
    `usual`, those of them that nearly all of its pictures have, the `titles` that it gives itself, and `base`, what it
    says it was trained on; empty: nothing. `where`: which file names the trigger words; `unread`: what beside it could
    not be read and why, a clause."""

    trigger: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    base: str = ""
    where: str = "its file"
    unread: str = ""


_read: OrderedDict[str, Wording] = OrderedDict()


def wording(name: str) -> Wording:
    """The words of a LoRA file by its name in the `loras` folders, or of a file beside it; none where these name none,
    or are none.

    Raises ValueError for a name that is in none of the folders.
    """
    key = fingerprint(name)
    if key not in _read:
        header = header_of(path_of(name))
        _read[key] = wording_of(header.get("__metadata__") if isinstance(header, dict) else None)
        while len(_read) > _KEPT:
            _read.popitem(last=False)
    _read.move_to_end(key)
    own = _read[key]
    return own if own.trigger else _with(own, read_beside(path_of(name)))


def fingerprint_with_words(name: str) -> str:
    """Changes whenever the file does, or its words beside it do."""
    words = wording(name)
    return repr((fingerprint(name), words.trigger, words.where))


def unread_beside(name: str) -> str:
    """What to say of files beside a LoRA that could not be read; empty: nothing."""
    try:
        return wording(name).unread if name else ""
    except ValueError:  # whoever reads the file says that it is missing
        return ""


def _with(own: Wording, beside: Beside) -> Wording:
    """Words from beside it, each part between commas or in a line of its own, as words that are typed on a LoRA."""
    parts = (part for text in beside.texts for part in re.split(r"[,\n]", _NAMED.sub(",", unweighted(text))))
    trigger = tuple(dict.fromkeys(phrase for part in parts for phrase in _phrases(part)))[:WORDS]
    return replace(own, trigger=trigger, where=beside.file if trigger else own.where, unread=beside.unread)


def for_few_steps(name: str) -> bool:
    """Whether a file is, by its name or by what its header calls it, a LoRA that lets a model draw in few steps."""
    return any(FEW_STEPS.search(title) for title in (name, *wording(name).titles))


def is_proposed(name: str, role: str) -> bool:
    """Whether a file looks like one for few steps and its role was left open. Whoever reads the file says where it is
    missing."""
    try:
        return bool(name) and role == "auto" and for_few_steps(name)
    except ValueError:
        return False


def proposal(name: str, role: str) -> str:
    """What to say of such a file; empty: nothing."""
    return (f"'{name}' looks like a LoRA for few steps (Lightning, Turbo, LCM and their like): with the role 'always' "
            "it is part of the model and takes no turn") if is_proposed(name, role) else ""


def wording_of(metadata: object) -> Wording:
    """The words in the metadata of a safetensors header, whatever it holds."""
    if not isinstance(metadata, dict):
        return Wording()
    trigger = dict.fromkeys(phrase for key in TRIGGERS for phrase in _phrases(metadata.get(key)))
    titles = tuple(phrase for key in TITLES for phrase in _phrases(metadata.get(key)))[:len(TITLES)]
    tags = _tags(metadata.get("ss_tag_frequency"))
    usual = [tag for tag, count in tags if count >= NEARLY_ALL * tags[0][1]]
    base = next((phrase for key in BASES for phrase in _phrases(metadata.get(key))), "")
    return Wording(tuple(trigger)[:WORDS], tuple(tag for tag, _ in tags), titles, tuple(usual), base)


def header_of(path: str) -> object:
    """The header of a safetensors file, as far as it is JSON; None for what is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return parsed(file.read(length)) if 2 <= length <= HEADER_BYTES else None
    except OSError:  # whoever loads the file says what is wrong with it
        return None


def parsed(text: object) -> object:
    """JSON of a bounded size, or None for what is none."""
    try:
        read = isinstance(text, bytes) or (isinstance(text, str) and len(text) <= TABLE_BYTES)
        return json.loads(text) if read else None
    except (ValueError, RecursionError):
        return None


def _phrases(value: object) -> Iterator[str]:
    """The phrases of an entry: text, a list, or either of them as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", '"'):
        inside = parsed(value)
        value = inside if isinstance(inside, (list, str)) else value
    for phrase in value if isinstance(value, list) else [value]:
        if isinstance(phrase, str):
            clean = " ".join(phrase.split()).strip(" ,")
            if clean and len(clean) <= LETTERS and clean.isprintable() and clean.lower() not in ("none", "null"):
                yield clean


def _tags(value: object) -> list[tuple[str, int]]:
    """The tags of `ss_tag_frequency`, {folder: {tag: count}}, most frequent first, and how often they are there."""
    if isinstance(value, str):
        value = parsed(value)
    counts: Counter[str] = Counter()
    for table in value.values() if isinstance(value, dict) else ():
        for tag, count in table.items() if isinstance(table, dict) else ():
            if isinstance(count, int) and count > 0:
                for phrase in _phrases(tag):
                    counts[phrase] += min(count, 2**31)
    return counts.most_common(TAGS)
