"""What a file is that has the name of a safetensors file and is none, by its first bytes: what downloads leave behind,
and files of other kinds."""

from __future__ import annotations

import codecs
import os

LOOKED_AT = 512
"""How many of the first bytes say it."""
_ARCHIVE = "an archive with another name. Unpack it, and choose the file in it."
_BEGINNINGS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer, a short text in the place of the file: its folder was cloned "
     "without Git LFS. Run git lfs pull there, or download the file from its page."),
    ((b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b"), _ARCHIVE),
    ((b"GGUF",), "a GGUF file with another name. LoRAs are read from safetensors files: download it as one."),
    ((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8"), "a picture, such as one that shows what a LoRA does. "
     "Download the LoRA itself."),
)
_CHECKPOINT = ("a PyTorch file (.ckpt, .pt) with another name. Such a file can run code when it is opened, and is not "
               "read; download it as safetensors, or convert it first.")


def instead(start: bytes, size: int) -> str:
    """What is there instead of a safetensors file, and what to do: a sentence whose subject is the file.

    start   its first `LOOKED_AT` bytes
    size    of the whole file, in bytes
    """
    if not size:
        return "is empty, 0 bytes: its download was cut short or is not over, or the disk was full. Download it again."
    if not any(start):
        return ("begins with zeros, as a download does that was cut short after its place on the disk had been kept. "
                "Download it again.")
    if start.startswith(b"PK\x03\x04"):
        kind = _CHECKPOINT if b"data.pkl" in start else _ARCHIVE
    elif start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = _CHECKPOINT
    else:
        kind = next((kind for beginnings, kind in _BEGINNINGS if start.startswith(beginnings)), None) or _text(start)
    return f"is not a safetensors file, but {kind}" if kind else ("is not a safetensors file, whatever its name says. "
                                                                  "Download it again.")


def _text(start: bytes) -> str | None:
    """What a text is that stands in the place of a file; None where the file is no text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start).strip()  # the last letter may be cut
    except UnicodeDecodeError:
        return None
    if text.startswith("<"):
        return "a web page: the download needed a login, or its link led to a page. Log in, and download it again."
    if not text or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    return ("a text, such as a site sends in the place of a file that it does not give: "
            f"{text.splitlines()[0][:80].rstrip('.')}. Download it again.")


def unfinished(path: str) -> str | None:
    """The file that aria2 keeps beside one until all of it is there; from the start that one has its full size, with
    zeros where nothing is yet. None: there is no such."""
    beside = f"{path}.aria2"
    return os.path.basename(beside) if os.path.exists(beside) else None
