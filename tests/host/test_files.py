"""Files that cannot be used, and the cache of those that can."""

from __future__ import annotations

import gc
import json
import os
import struct
import weakref
from functools import partial
from unicodedata import normalize

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from lora_ensemble.host.compose import loading
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files import files
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.files import check_file, fingerprint
from lora_ensemble.host.files.names import resolved
from lora_ensemble.methods.merge import Merge
from lora_ensemble.nodes.ensembles import LoRAEnsembleFromStack, LoRAEnsembleLoRA
from lora_ensemble.nodes.levels import LoRAEnsembleNoiseLevels
from safetensors.torch import save

from .builders import composite, file_of, kohya, lora, merge, plain, same, sample, shapes, stock, text_layers
from .models import base, small_clip


def small() -> dict:
    return lora(dict(list(shapes(base("SD15")).items())[:2]), 1)


def read(name: str) -> files.LoRAFile:
    return files.read(name, base("SD15").model)


def refused(name: str, *words: str) -> None:
    """Every way to apply it fails with these words and names the file."""
    for use in (lambda n: merge(base("SD15"), [LoRASpec(n, 1.0, 1.0)]),
                lambda n: composite(base("SD15"), [LoRASpec(n, 1.0, 1.0)]),
                lambda n: bake(base("SD15"), None, (LoRASpec(n, 1.0, 1.0),), "Merge LoRAs")):
        with pytest.raises(ValueError) as caught:
            use(name)
        text = str(caught.value)
        assert f"'{name}'" in text and all(word in text for word in words), text


def refused_by_header(name: str, *words: str) -> None:
    """The cheap check of a node's validation says the same."""
    with pytest.raises(ValueError, match=words[0]):
        check_file(name)
    refused(name, *words)


def test_a_missing_file():
    refused_by_header("nowhere.safetensors", "not in any of the 'loras' folders", "Put the file there")


def test_a_folder_with_the_name_of_a_file(lora_folder):
    folder = lora_folder / "unpacked.safetensors"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(small()))
    folder_paths.filename_list_cache.clear()
    try:
        refused_by_header(folder.name, "is a folder", f"'{os.path.join(folder.name, 'model.safetensors')}'")
        refused_by_header("unpacked", "not in any of the 'loras' folders")
    finally:
        (folder / "model.safetensors").unlink()
        folder.rmdir()
        folder_paths.filename_list_cache.clear()


@pytest.mark.skipif(os.sep == "\\", reason="links need rights there")
def test_a_link_that_leads_nowhere_is_in_the_list(lora_folder):
    link = lora_folder / "moved away.safetensors"
    link.symlink_to(lora_folder / "nowhere.safetensors")
    folder_paths.filename_list_cache.clear()
    try:
        assert link.name in folder_paths.get_filename_list("loras")
        refused_by_header(link.name, "a link that leads nowhere", "Mend the link")
    finally:
        link.unlink()
        folder_paths.filename_list_cache.clear()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_values_that_are_not_numbers(value, dtype, loras):
    if dtype == torch.float8_e4m3fn and value == float("inf"):
        pytest.skip("this format has no infinity")
    tensors = {key: tensor.to(dtype) for key, tensor in small().items()}
    worst = sorted(tensors)[1]
    tensors[worst] = tensors[worst].clone()
    tensors[worst].view(-1)[3] = value
    refused(loras(tensors), "not numbers", worst, "use another version")


def test_values_that_nothing_uses_are_not_read(loras):
    """Strength 0 on the text encoder is what helps where that part of a file is damaged."""
    model, clip = base("SD15"), small_clip()
    text = lora(text_layers(clip), 1, name=lambda layer: "lora_te_text_model_" + layer.replace(".", "_"))
    broken = {key: torch.full_like(value, float("nan")) for key, value in text.items()}
    good = lora(shapes(model), 1)
    name = loras(good | broken)
    ours = apply_method(model, clip, (LoRASpec(name, 0.8, 0),), plain(Merge), "Merge LoRAs")[0]
    assert not any(key.startswith("lora_te") for key in read(name)._peaks)
    same(sample(ours), sample(stock(model, [LoRASpec(loras(good), 0.8, 0)])), sample(model))
    for strengths in ((0.8, 0.5), (0.0, 0.5)):
        with pytest.raises(ValueError, match="not numbers .*lora_te"):
            apply_method(model, clip, (LoRASpec(name, *strengths),), plain(Merge), "Merge LoRAs")


def test_another_architecture(loras):
    name = loras(lora(shapes(base("Flux")), 1))
    refused(name, "matches no layer of this model", "another architecture", "remove it from the ensemble")


def test_another_architecture_of_the_same_names(loras):
    """SD1.5 and SDXL share names of layers: a file for the other one is known by the shapes, and refused too."""
    layers = shapes(base("SD15"))
    odd = {name: torch.Size((2 * shape[0], *shape[1:])) for name, shape in list(layers.items())[::2]}
    strange = {f"strange_{i}": torch.Size((8, 8)) for i in range(len(layers) // 2)}
    refused(loras(lora(odd, 1)), "does not fit this model", f"{len(odd)} of its layers have another shape here",
            "another architecture", "remove it from the ensemble")
    refused(loras(lora({**layers, **odd, **strange}, 1)), "does not fit this model", "keys have no place")
    composite(base("SD15"), [LoRASpec(loras(lora({**layers, **strange}, 1)), 1.0, 1.0)])  # nothing has another shape
    few = dict(list(odd.items())[:3])
    composite(base("SD15"), [LoRASpec(loras(lora({**layers, **few}, 1)), 1.0, 1.0)])  # most of it is in its place


@pytest.mark.parametrize("make", [partial(merge, rest_on_weights=True), composite], ids=["merge", "composite"])
def test_a_delta_on_its_side_is_left_out(make, loras):
    """Guard: as many entries as the weight in another shape are no delta of this layer, and not merged instead."""
    layers = shapes(base("SD15"))
    name = next(name for name, shape in layers.items() if len(shape) == 2 and shape[0] != shape[1])
    fits = lora({key: shape for key, shape in layers.items() if key != name}, 1)
    model, good = base("SD15"), LoRASpec(loras(fits), 0.8, 0)
    sideways = LoRASpec(loras({**fits, **lora({name: torch.Size(reversed(layers[name]))}, 2)}), 0.8, 0)
    ours = make(model, [sideways])
    (problem,) = ours.get_attachment(KEY).applied[0].problems
    assert name in problem and problem.endswith("left out")
    assert torch.equal(sample(ours), sample(make(model, [good])))


def test_a_text_encoder_file_without_a_text_encoder(loras):
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 4)}
    refused(loras(text), "changes the text encoder alone", "Connect a CLIP")


def test_no_lora_at_all(loras):
    refused_by_header(loras({}), "empty", "Download it again")
    refused(loras({"some.weight": torch.ones(3)}), "matches no layer of this model", "some.weight")


def test_an_empty_ensemble():
    for use in (lambda: apply_method(base("SD15"), None, (), plain(Merge), "Merge LoRAs"),
                lambda: bake(base("SD15"), None, (), "Merge LoRAs")):
        with pytest.raises(ValueError, match="(?s)Merge LoRAs: the ensemble is empty.*Connect at least one"):
            use()


def test_the_model_is_fine_after_a_refusal(loras, raw):
    model, good = base("SD15"), LoRASpec(loras(lora(shapes(base("SD15")), 1)), 0.8, 0)
    with pytest.raises(ValueError):
        merge(model, [good, LoRASpec(raw(b"no"), 1.0, 1.0)])
    same(sample(merge(model, [good])), sample(stock(model, [good])), sample(model))


def test_some_layers_do_not_fit(loras, caplog):
    """A LoRA of a variant with other widths: what fits is applied, the rest is named once, in log and record."""
    layers = shapes(base("SD15"))
    odd = next(name for name in layers if name.endswith("attn2.to_k"))
    ensemble = [LoRASpec(loras(lora({**layers, odd: torch.Size((64, 48))}, 1)), 0.8, 0)]
    ours = merge(base("SD15"), ensemble)
    assert sum(ensemble[0].name in message and odd in message for message in caplog.messages) == 1
    good = LoRASpec(loras({key: value for key, value in file_of(ensemble[0]).items()
                           if not key.startswith(f"{kohya(odd)}.")}), 0.8, 0)
    same(sample(ours), sample(stock(base("SD15"), [good])), sample(base("SD15")))
    problems = ours.get_attachment(KEY).record.problems
    assert len(problems) == 1 and ensemble[0].name in problems[0]


def test_a_file_is_read_once(loras, lora_folder, monkeypatch):
    """Once per path, size and time of change, however many nodes use it."""
    calls, load = [], comfy.utils.load_torch_file
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *a, **k: calls.append(a[0]) or load(*a, **k))
    tensors = small()
    name = loras(tensors)
    before, print_before = read(name), fingerprint(name)
    for make in (merge, composite):
        make(base("SD15"), [LoRASpec(name, 0.5, 0)])
    assert read(name) is before and len(calls) == 1

    loras({key: value * 2 for key, value in tensors.items()}, name)
    os.utime(lora_folder / name, ns=(1, 1))
    after = read(name)
    key = next(key for key in tensors if "lora_up" in key)
    assert len(calls) == 2 and torch.equal(after[key], 2 * before[key])
    assert fingerprint(name) != print_before
    os.utime(lora_folder / name, ns=(2, 2))
    assert torch.equal(read(name)[key], after[key]) and len(calls) == 3


def test_reading_many_files_can_be_interrupted(loras, monkeypatch):
    """Guard: `load_ensemble`. The next node is as ever."""
    model, found = base("SD15"), []

    def reads(name, holder):
        found.append(name)
        comfy.model_management.interrupt_current_processing()
        return files.read(name, holder)

    ensemble = [LoRASpec(loras(lora(shapes(model), seed)), 0.8, 0) for seed in (1, 2, 3)]
    with monkeypatch.context() as patched:
        patched.setattr(loading, "read", reads)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            merge(model, ensemble)
    assert found == [ensemble[0].name]
    same(sample(merge(model, ensemble)), sample(stock(model, ensemble)), sample(model))


def test_what_is_kept_is_bounded(loras, monkeypatch):
    """Guard: KEPT_BYTES, of all models together. The file in use always stays, and one for two models counts once."""
    names, first, second = [loras(small()) for _ in range(3)], torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    monkeypatch.setattr(files, "_held", weakref.WeakKeyDictionary())
    kept = [files.read(name, model) for name in names[:2] for model in (first, second)]
    assert files.kept_bytes() == files._nbytes(kept[0]) + files._nbytes(kept[2])
    assert kept[0] is kept[1] and kept[2] is kept[3]
    monkeypatch.setattr(files, "KEPT_BYTES", 1)
    last = files.read(names[2], second)
    assert list(files._held[second]) == [files.path_of(names[2])] and files.read(names[2], second) is last
    assert len(files._held[first]) == 2, "each model lets go of its own"


def test_what_is_kept_goes_with_its_model(loras):
    """As ComfyUI lets go of a model: then the file is, too, and is read again for another one."""
    model, name = torch.nn.Linear(1, 1), loras(small())
    file = weakref.ref(files.read(name, model))
    assert file() is not None and model in files._held
    del model
    gc.collect()
    assert file() is None and read(name) is not None


def test_an_old_version_of_a_file_is_let_go(loras, lora_folder):
    name = loras(small())
    before = weakref.ref(read(name))
    loras({key: value * 2 for key, value in small().items()}, name)
    os.utime(lora_folder / name, ns=(1, 1))
    assert read(name) is not None
    gc.collect()
    assert before() is None


def test_the_cache_counts_what_many_small_tensors_cost():
    many = files.LoRAFile({str(k): torch.ones(1) for k in range(1000)})
    assert files._nbytes(many) > 100 * 1000


def test_only_tensors_with_a_place_in_the_model_are_read(raw):
    """A key that nothing knows declares 1.5 GB, in a file that has holes instead; its values do not matter either."""
    resource = pytest.importorskip("resource")
    size, tensors = 1_500_000_000, small()
    content = save(tensors)
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    header["strange.weight"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
    packed = json.dumps(header).encode()
    name = raw(struct.pack("<Q", len(packed)) + packed + data)
    path = files.path_of(name)
    os.truncate(path, os.path.getsize(path) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = composite(base("SD15"), [LoRASpec(name, 0.8, 0)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "in KB"
    (problem,) = ours.get_attachment(KEY).applied[0].problems
    assert "strange.weight" in problem
    nan = {**tensors, "strange.weight": torch.full((4,), float("nan"))}
    good, odd = (LoRASpec(raw(save(file), f"{k}.safetensors"), 0.8, 0) for k, file in enumerate((tensors, nan)))
    assert torch.equal(sample(composite(base("SD15"), [odd])), sample(composite(base("SD15"), [good])))


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"),
                                   RuntimeError("unable to mmap 99 bytes: Cannot allocate memory (12)")])
def test_a_lack_of_memory_is_not_a_damaged_file(error, loras, monkeypatch):
    name = loras(small())
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        read(name)


def test_a_file_that_may_not_be_read(loras, monkeypatch):
    def closed(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    name = loras(small())
    monkeypatch.setattr(files, "open", closed, raising=False)
    with pytest.raises(ValueError, match=f"'{name}' cannot be opened .*Permission denied"):
        check_file(name)


@pytest.mark.skipif(os.sep == "\\", reason="a backslash is a separator there")
def test_a_name_that_was_written_on_windows(raw, lora_folder):
    (lora_folder / "styles").mkdir(exist_ok=True)
    raw(save(small()), "styles/ink.safetensors")
    model = base("SD15")
    ours, reference = (merge(model, [LoRASpec(f"styles{end}ink.safetensors", 0.8, 0)]) for end in ("\\", "/"))
    assert torch.equal(sample(ours), sample(reference)) and not torch.equal(sample(ours), sample(model))
    assert fingerprint("styles\\ink.safetensors") == fingerprint("styles/ink.safetensors")


@pytest.mark.parametrize(("there", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_whose_accents_another_system_writes_otherwise(there, written, raw, lora_folder):
    """macOS keeps them apart from their letters in many places, other systems do not."""
    name = "Élégance.safetensors"
    raw(save(small()), normalize(there, name))
    if (lora_folder / normalize(written, name)).exists():
        pytest.skip("this system takes both for one")
    assert fingerprint(normalize(written, name)) == fingerprint(normalize(there, name))
    check_file(normalize(written, name))
    assert LoRAEnsembleLoRA.validate_inputs(lora_name=normalize(written, name)) is True
    assert resolved(normalize(written, "élégance")) == normalize(there, name)


@pytest.mark.parametrize("how", ["link", "stack", "partner"])
def test_a_changed_file_is_found_whichever_way_it_was_named(how, loras, lora_folder):
    """A node whose names come over a link cannot ask for their files before it runs, nor Two Noise Levels for a
    file that is named by no node: they look at all that were read."""
    def mark() -> str:
        node = {"link": LoRAEnsembleLoRA, "stack": LoRAEnsembleFromStack, "partner": LoRAEnsembleNoiseLevels}[how]
        return node.fingerprint_inputs(**({"lora_name": None, "strength_model": 0.8} if how == "link" else
                                          {"lora_stack": None, "ensemble": None}))

    name = loras(small())
    first = mark()
    assert mark() == first
    merge(base("SD15"), [LoRASpec(name, 0.8, 0)])
    assert mark() == first, "a file that was read for the first time has not changed"
    os.utime(lora_folder / name, ns=(1, 1))
    second = mark()
    assert second != first and mark() == second
    os.utime(lora_folder / name, ns=(2, 2))
    read(name)  # by another graph, before this one is asked again
    assert mark() not in (first, second)
