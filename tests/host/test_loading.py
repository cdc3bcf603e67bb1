"""What is read of an ensemble's files, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from lora_ensemble.host.compose import loading as module
from lora_ensemble.host.compose.loading import (
    LoadedEnsemble,
    facts_of,
    left_out,
    load_ensemble,
    on_its_weights,
    without_effect,
)
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.host.files.fit import Broken, Misfit, Torn
from lora_ensemble.host.files.parse import ParsedLoRA
from lora_ensemble.host.files.patches import Patches
from safetensors.torch import load, save

from .builders import kohya, lora, shapes, text_layers
from .models import base, small_clip
from .test_apply import with_text

NAN = float("nan")


@pytest.fixture(scope="module")
def clip():
    return small_clip()


def shape() -> dict:
    weight = base("SD15").model.diffusion_model.out[2].weight
    return {"out.2": weight.shape}


def read(model, clip, *specs: LoRASpec, on_weights: bool = False) -> LoadedEnsemble:
    return load_ensemble(model, clip, specs, "Merge LoRAs", on_weights)


def spoiled(file: dict, start: str) -> dict:
    return {key: value * NAN if key.startswith(start) else value for key, value in file.items()}


def test_of_what_is_off_nothing_is_read(clip, loras):
    """No file, and of a file no value of the part without a strength."""
    model, whole = base("SD15"), with_text(clip, shape(), 1)
    on = LoRASpec(loras(whole), 0.5, 0.5)
    assert len(read(model, clip, on, LoRASpec("nowhere.safetensors", 0.0, 0.0)).loras) == 1
    text = read(model, clip, LoRASpec(loras(spoiled(whole, "lora_unet")), 0.0, 0.5))
    assert not text.loras and len(text.texts) == 1 and text.problems == []
    picture = read(model, clip, LoRASpec(loras(spoiled(whole, "lora_te")), 0.5, 0.0))
    assert len(picture.loras) == 1 and picture.texts == [] and picture.problems == []
    for strengths in ((0.5, 0.0), (0.0, 0.5)):
        with pytest.raises(ValueError, match="not numbers"):
            read(model, clip, LoRASpec(loras(spoiled(whole, "lora_unet" if strengths[0] else "lora_te")), *strengths))


def test_what_does_not_fit_is_said_of_the_parts_that_act(clip, loras):
    model, whole = base("SD15"), with_text(clip, shape(), 1)
    narrow = {key: value[:1] if ".lora_up" in key and "layers_0_mlp_fc1" in key else value
              for key, value in whole.items()}
    name = loras(narrow)
    assert len(read(model, clip, LoRASpec(name, 0.5, 0.5)).problems) == 1
    assert read(model, clip, LoRASpec(name, 0.5, 0.0)).problems == []


def test_the_user_can_interrupt_between_files(loras, monkeypatch):
    asked = []
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: asked.append(1))
    read(base("SD15"), None, *(LoRASpec(loras(lora(shape(), seed)), 0.5, 0.0) for seed in (1, 2)))
    assert len(asked) == 2


@pytest.mark.parametrize(("role", "end", "on_weights", "there"), [
    ("auto", 1.0, True, True), ("auto", 1.0, False, False), (ALWAYS, 1.0, False, True), (ALWAYS, 0.5, True, False),
    ("auto", 0.5, True, False)])
def test_what_may_be_on_the_weights(role, end, on_weights, there):
    """Nothing that has a window in time: weights follow none."""
    assert on_its_weights(LoRASpec("x", 1.0, 1.0, role, end=end), on_weights) is there


def test_what_a_reading_goes_by(clip, loras, monkeypatch):
    """All but how strong a LoRA is, as long as it is on."""
    model, name = base("SD15"), loras(lora(shape(), 1))
    one, routed, earlier = LoRASpec(name, 0.5, 0.5), set(), {}
    monkeypatch.setattr(module, "fingerprint", lambda name: prints.get(name, name))
    monkeypatch.setattr(module, "_routed", lambda model: routed)
    monkeypatch.setattr(module, "_enlarged_before", lambda model: earlier)
    prints: dict = {}

    def facts(clip=clip, specs=(one,), on_weights=False):
        return facts_of(model, clip, specs, on_weights)

    same = [facts(), facts(specs=(replace(one, strength_model=-1.0, strength_clip=0.1),))]
    other = [facts(specs=(replace(one, strength_model=0.0),)), facts(specs=(replace(one, strength_clip=0.0),)),
             facts(specs=(replace(one, role=ALWAYS),)), facts(specs=(one, one)), facts(clip=None),
             facts(on_weights=True)]
    prints[name] = "another"
    other.append(facts())
    prints.clear()
    earlier["diffusion_model.img_in.weight"] = (4, 4)
    other.append(facts())
    earlier.clear()
    routed.add("diffusion_model.img_in.weight")
    other.append(facts())
    routed |= {"diffusion_model.other.weight"}
    assert facts() == other[-1], "what nobody enlarges is no matter"
    assert same[0] == same[1] and not any(a == b for a, b in combinations([same[0], *other], 2))
    hash(same[0])
    assert facts(clip=None, on_weights=True) != facts(clip=None)


def test_layers_of_zeros_are_said_as_a_download_leaves_them(raw):
    """One that had kept its place on the disk: the file has its size and its header, and zeros from some byte on."""
    model = base("SD15")
    content = save(lora(shapes(model), 1))
    begin = 8 + int.from_bytes(content[:8], "little")
    half = (begin + len(content)) // 2
    cut = content[:half] + bytes(len(content) - half)
    tensors = {key: value for key, value in load(cut).items() if key.startswith("lora_unet")}
    gone = [name for name in {key.split(".")[0] for key in tensors}
            if not any(tensors[f"{name}.lora_{part}.weight"].any() for part in ("up", "down"))]
    assert 10 < len(gone) < len(shapes(model)) - 10
    (line,) = read(model, None, LoRASpec(raw(cut, "cut.safetensors"), 1.0, 0.0)).problems
    assert f"'cut.safetensors': {len(gone)} keys such as diffusion_model." in line and "they do nothing" in line
    assert not read(model, None, LoRASpec(raw(cut, "cut.safetensors"), 0.0, 0.0)).problems


def test_an_untrained_layer_and_a_difference_of_nothing_are_no_damage(loras):
    model = base("SD15")
    untrained = {key: value * ("down" in key) for key, value in lora(shapes(model), 1, alpha=2.0).items()}
    even = {"lora_unet_out_2.diff": torch.zeros(shape()["out.2"]), "lora_unet_out_2.diff_b": torch.zeros(4)}
    for tensors in (untrained, even):
        assert not read(model, None, LoRASpec(loras(tensors), 1.0, 0.0)).problems


def test_what_does_nothing_is_said():
    acts, text = LoRASpec("a", 1.0, 1.0), LoRASpec("b", 1.0, 0.5)
    reading = LoadedEnsemble([SimpleNamespace(spec=acts)], [], [])

    def lines(*specs: LoRASpec, merged: bool = False) -> list[str]:
        return without_effect(reading, specs, merged)

    assert lines(acts) == lines(replace(text, strength_model=0.0)) == lines(text, merged=True) == []
    assert lines(replace(text, role=ALWAYS)) == []
    assert ["takes no part in the composition" in line for line in lines(text)] == [True]
    for merged in (True, False):
        assert ["'b' does nothing" in line for line in lines(replace(text, strength_clip=0.0), merged=merged)] == [True]
    twin = replace(acts)  # another row of the same file that changes nothing
    assert len(lines(acts, twin)) == 1


def test_reasons_are_counted_and_say_what_is_done():
    spec = LoRASpec("a", 1.0, 1.0)
    part = SimpleNamespace(spec=spec, parsed=ParsedLoRA(left_out=[("x", "why"), ("y", "other"), ("z", "why")]))
    done = "left out (Merge in mode 'baked' can apply it)"
    assert left_out(part, False) == [f"LoRA 'a': 2 keys such as x: why; {done}",
                                     f"LoRA 'a': 1 key such as y: other; {done}"]
    assert left_out(part, True)[0].endswith("merged into the weight instead")
    part.spec = replace(spec, end=0.5)
    assert left_out(part, False)[0].endswith("left out, since it could not follow this LoRA's window in time")


def wrong(fits: int, misfits: int, unused: int, kind=Misfit, text: int = 0, has_clip: bool = False) -> str | None:
    """What is said of a file of which so many layers fit and so many do not; each layer is a key."""
    found = {f"x{k}": None for k in range(fits)}
    patches = Patches(found, [(f"y{k}", kind("reason")) for k in range(misfits)])
    keys = [*found, *(f"y{k}" for k in range(misfits)), *(f"z{k}" for k in range(unused)),
            *(f"lora_te_{k}" for k in range(text))]
    texts = Patches({key: None for key in keys if key.startswith("lora_te")} if has_clip else {})
    return module._wrong_kind(dict.fromkeys(keys), patches, texts, [f"z{k}" for k in range(unused)],
                              SimpleNamespace(model_config=SimpleNamespace()), has_clip)


def test_when_a_file_is_for_another_model():
    """Where layers have another shape and less than half of it fits."""
    assert wrong(2, 2, 0) is wrong(1, 0, 9) is wrong(3, 1, 0) is None
    for fits, misfits, unused in ((2, 3, 0), (3, 1, 3), (2, 2, 1)):
        assert "another architecture" in wrong(fits, misfits, unused)
    assert "is damaged in 3 of its 5 layers, such as y0: reason" in wrong(2, 3, 0, Torn)
    mixed = Patches({}, [("y0", Torn("torn")), ("y1", Misfit("wide"))])
    assert "another architecture" in module._wrong_kind(dict.fromkeys(["y0", "y1"]), mixed, Patches(), [],
                                                       SimpleNamespace(model_config=SimpleNamespace()), False)


def test_a_file_for_the_text_encoder_alone():
    assert wrong(0, 0, 0, text=2, has_clip=True) is None
    assert "changes the text encoder alone, and none is connected" in wrong(0, 0, 0, text=2)
    assert "matches no layer" in wrong(0, 0, 1, text=0)
    other = module._wrong_kind(dict.fromkeys(["clip_l", "clip_g"]), Patches(), Patches(), [],
                               SimpleNamespace(model_config=SimpleNamespace()), False)
    assert "textual-inversion embedding" in other and "Connect a CLIP" not in other, "no LoRA at all"


def test_a_text_encoders_layers_in_a_kind_that_nobody_can_load(clip, loras):
    names = [f"lora_te_text_model_{layer.replace('.', '_')}.fourierft_spectrum" for layer in text_layers(clip)]
    with pytest.raises(ValueError, match="for layers of this model .* kind or named in a way"):
        read(base("SD15"), clip, LoRASpec(loras({name: torch.ones(4) for name in names}), 0.5, 0.5))


def test_keys_of_a_text_encoder_are_missed_where_there_is_one(clip, loras):
    model, whole = base("SD15"), with_text(clip, shape(), 1)
    odd = {**whole, "lora_te_nowhere.lora_up.weight": torch.ones(2, 2)}
    (line,) = read(model, None, LoRASpec(loras(odd), 0.5, 0.5)).problems
    assert "keys for the text encoder have no effect, since no clip is connected" in line
    assert read(model, None, LoRASpec(loras(odd), 0.5, 0.0)).problems == []
    (line,) = read(model, clip, LoRASpec(loras(odd), 0.5, 0.5)).problems
    assert f"1 of its {len(odd)} keys has no place" in line and "lora_te_nowhere" in line


@pytest.mark.parametrize("on_weights", [False, True])
def test_a_lora_enlarges_a_layer_for_those_behind_it_where_it_is_on_the_weight(on_weights, loras):
    model = base("Flux")
    weight = model.model.diffusion_model.img_in.weight
    wide = torch.Size((weight.shape[0], 2 * weight.shape[1]))
    key = f"{kohya('img_in')}.reshape_weight"
    first = LoRASpec(loras({**lora({"img_in": wide}, 1), key: torch.tensor(list(wide))}), 0.5, 0.0)
    other = LoRASpec(loras(lora({"img_in": wide}, 2)), 0.5, 0.0)
    if on_weights:
        assert len(read(model, None, first, other, on_weights=True).loras) == 2
    else:
        with pytest.raises(ValueError, match="does not fit this model"):
            read(model, None, first, other)


IMAGE, FILM = "diffusion_model.img_in.weight", "diffusion_model.patch_embedding.weight"


@pytest.mark.parametrize(("family", "key", "times", "fine"), [
    ("Flux", IMAGE, (1, 2), True), ("Flux", IMAGE, (1, 6), True), ("Flux", IMAGE, (1, 3), False),
    ("Flux", IMAGE, (2, 2), False), ("Flux", "diffusion_model.final_layer.linear.weight", (1, 2), False),
    ("Wan", FILM, (1, 2, 1, 1, 1), True), ("Wan", FILM, (1, 3, 1, 1, 1), True), ("Wan", FILM, (1, 2, 2, 1, 1), False)])
def test_which_layers_may_be_enlarged(family, key, times, fine, monkeypatch):
    """Those that take the picture, by inputs for what else models are given beside it: where nothing acts beside the
    weight that is enlarged."""
    model = base(family)
    old = model.model.get_parameter(key).shape
    patches = Patches(enlarged={key: tuple(size * n for size, n in zip(old, times, strict=True))})
    routed: set[str] = set()
    monkeypatch.setattr(module, "_routed", lambda model: routed)

    def check(on_weights: bool) -> None:
        module._check_enlarged(model, patches, Patches(), on_weights)

    if not fine:
        for on_weights in (False, True):
            with pytest.raises(Broken, match="for which this model has no input"):
                check(on_weights)
        return
    check(True)
    routed.add(key)
    check(False)
    with pytest.raises(Broken, match="beside the weight"):
        check(True)
    with pytest.raises(Broken, match="of the text encoder"):
        module._check_enlarged(model, Patches(), patches, False)


def test_slices_enlarge_nothing():
    """Patches of other nodes, as the host holds them."""
    large = ("diff", (torch.ones(6, 4), {"pad_weight": True}))
    patches = {"a": [(1.0, large, 1.0, None, None)], "b": [(1.0, large, 1.0, (0, 0, 2), None)],
               "c": [(1.0, ("diff", (torch.ones(2, 2),)), 1.0, None, None)]}
    assert module._enlarged_before(SimpleNamespace(patches=patches)) == {"a": (6, 4)}


def test_what_is_unknown_keeps_its_names():
    assert module._capital("use it with ComfyUI's loader") == "Use it with ComfyUI's loader"
