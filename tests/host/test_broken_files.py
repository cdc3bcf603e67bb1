"""Files that are no safetensors files, or damaged ones: what they are called, and that nothing opens them."""

from __future__ import annotations

import io
import struct
import zipfile

import comfy.utils
import pytest
import torch
from lora_ensemble.host.files.files import check_file
from safetensors.torch import save

from .test_files import refused, refused_by_header, small


def checkpoint(zipped: bool) -> bytes:
    made = io.BytesIO()
    torch.save(small(), made, _use_new_zipfile_serialization=zipped)
    return made.getvalue()


def zipped(content: bytes = b"x" * 900) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("lora.safetensors", content)
    return made.getvalue()


PAGE = "\ufeff\n<!DOCTYPE html><html lang='ja'>ログイン</html>".encode() * 9
GIT = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32"


@pytest.mark.parametrize(("content", "words"), [
    (b"", ("is empty, 0 bytes", "Download it again")),
    (bytes(9000), ("begins with zeros", "cut short", "Download it again")),
    (PAGE, ("a web page", "Log in")),
    (b"<html>", ("a web page", "Log in")),
    (b'{"error":"Unauthorized"}', ("a text, such as a site sends", '{"error":"Unauthorized"}. Download it again')),
    ("モデルは非公開です。\n".encode() * 90, ("a text, such as a site sends", "モデルは非公開です。. Download")),
    (GIT + b"\nsize 151108832\n", ("a Git LFS pointer", "git lfs pull")),
    (lambda: checkpoint(True), ("a PyTorch file", "convert it")),
    (lambda: checkpoint(False), ("a PyTorch file", "convert it")),
    (zipped, ("an archive", "Unpack it")),
    (b"7z\xbc\xaf\x27\x1c" * 9, ("an archive", "Unpack it")),
    (b"GGUF\3\0\0\0" * 9, ("a GGUF file", "download it as one")),
    (b"\x89PNG\r\n\x1a\n" * 9, ("a picture", "Download the LoRA itself")),
    (b"\x93\xff\x01\xfe" * 300, ("is not a safetensors file, whatever its name says", "Download it again")),
    (b"\1\0\2\0\3", ("is not a safetensors file, whatever its name says", "Download it again"))])
def test_what_is_there_instead_of_a_safetensors_file(content, words, raw, monkeypatch):
    """What downloads leave behind, and files of other kinds, which nothing opens."""
    content = content if isinstance(content, bytes) else content()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    refused_by_header(raw(content), *words)


def test_a_download_that_is_not_over(raw, lora_folder):
    """aria2 gives a file its full size from the start, and keeps one beside it until all of it is there."""
    name = raw(save(small()), "coming.safetensors")
    beside = lora_folder / f"{name}.aria2"
    beside.write_bytes(b"x")
    try:
        refused_by_header(name, "is not downloaded as a whole", f"'{beside.name}'", "Let the download end")
    finally:
        beside.unlink()
    check_file(name)


ENTRY = '{"a": {"dtype": %s, "shape": %s, "data_offsets": %s}}'


@pytest.mark.parametrize("header", [
    b"{]" * 20, b"[1,2]", b'{"a": 1}', b'{"a": {"data_offsets": "x"}}', b"\xff" * 40, b"[" * 100_000, b"null",
    *((ENTRY % entry).encode() for entry in [
        ('"F32"', "[2]", "[0, 4]"), ('"F32"', "[-2]", "[0, 8]"), ('"F32"', '["2"]', "[0, 8]"),
        ('"F32"', "null", "[0, 8]"), ('"F32"', "[2]", '["0", 8]'), ('"F32"', "[2]", "[8, 0]"),
        ('"F32"', "[2]", "[0, 8, 16]"), ('"F32"', "[2]", "{}"), ("[]", "[2]", "[0, 8]"),
        ('"F32"', "[4611686018427387904, 4]", "[0, 0]"), ('"F32"', "[2.0]", "[0, 8]"),
        ('"F32"', "[true]", "[0, 4]")])])
def test_a_damaged_header(header, raw):
    refused_by_header(raw(struct.pack("<Q", len(header)) + header), "damaged header", "Download it again")


def test_an_unknown_dtype(raw):
    """Guard: ComfyUI's own reader may stop with a KeyError."""
    header = (ENTRY % ('"F99"', "[2]", "[0, 8]")).encode()
    refused(raw(struct.pack("<Q", len(header)) + header + bytes(8)), "cannot be read")


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_truncated_file(part, loras, raw, lora_folder):
    content = (lora_folder / loras(small())).read_bytes()
    refused_by_header(raw(content[: int(len(content) * part)]), "truncated", "fetch the file again")


@pytest.mark.parametrize("name", ["old.pt", "old.ckpt", "old.bin"])
def test_pickles_are_never_opened(name, raw, monkeypatch):
    """Guard: the ending is refused before anything could unpickle it."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *_, **__: pytest.fail("opened"))
    refused_by_header(raw(b"\x80\x02}q\x00."  * 9, name), "not a .safetensors file", "convert it to safetensors")
