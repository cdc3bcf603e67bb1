"""LoRA files with every kind of damage, made from seeds, and what must become of each.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.fuzz_files --count 2000

Either a file works and does what ComfyUI's own loader makes of it, without the layers that are left out by name, or one
ValueError names it. Nothing crashes, is half applied, leaves forwards on the model, or gives a picture that is not
finite; and a good LoRA beside it in a method of several branches acts as if it were alone.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .host import conftest  # noqa: F401  (before `comfy`, whose command line it prepares)

# isort: split
import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save
from torch import Tensor

from ..host.compose.apply import apply_method, bake
from ..host.compose.loading import LoadedEnsemble, load_ensemble
from ..host.files.ensemble import LoRASpec
from ..host.files.fit import plain_magnitude
from ..methods.composite import Composite
from ..methods.merge import Merge
from ..methods.switch import Switch
from ..tools.results import Found, Results, options, seeds
from .host.builders import Rand, kohya, lora, plain, sample, shapes, text_layers
from .host.kinds import CONVOLUTIONS, EVERYWHERE, low_rank
from .host.models import FAMILIES, alive, base, build, patcher, small_clip

DEPENDS = ("fuzz_files.py", "host/builders.py", "host/kinds.py", "host/models.py")
Tensors = dict[str, Tensor]
STRENGTH = 0.8
KINDS = {**EVERYWHERE, **CONVOLUTIONS}
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int32, torch.bool,
          torch.complex64, torch.uint8)
EXTREMES = (0.0, 1e38, 1e-38, 3e4, -1.0, float("nan"), float("inf"))


# --- files ----------------------------------------------------------------------------------------------------------


def whole(dice: random.Random, layers: Tensors, text: Tensors) -> Tensors:
    """A good file: a few kinds over a few layers each, text-encoder layers now and then."""
    rand, tensors, free = Rand(dice.randrange(2**31)), {}, set(layers)
    for kind in dice.sample(sorted(KINDS), dice.randint(1, 3)):
        fitting = [name for name in sorted(free) if kind in EVERYWHERE or layers[name][0, 0].numel() > 1]
        for name in dice.sample(fitting, min(4, len(fitting))):
            free.remove(name)
            tensors |= {f"{kohya(name)}.{end}": value for end, value in KINDS[kind](layers[name], rand).items()}
    for name in dice.sample(sorted(free), 4):
        tensors |= {f"{kohya(name)}.{end}": value for end, value in low_rank(layers[name], rand, 2.0).items()}
    if dice.random() < 0.2:
        make = KINDS[dice.choice(["LoRA alpha", "LoHa", "LoKr w1a w2a", "DoRA", "diff"])]
        for name in dice.sample(sorted(text), 3):
            stem = "lora_te_text_model_" + name.replace(".", "_")
            tensors |= {f"{stem}.{end}": value for end, value in make(text[name], rand).items()}
    return tensors


def _another_size(dice: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape)
    if not shape:
        return tensor.repeat(dice.choice([0, 2, 3]))
    dim = dice.randrange(len(shape))
    shape[dim] = dice.choice([0, 1, shape[dim] + 1, 2 * shape[dim], max(shape[dim] - 1, 0), shape[dim] // 2])
    return torch.randn(shape) * 0.1


def _other_dimensions(dice: random.Random, tensor: Tensor) -> Tensor:
    change = dice.choice(["0-d", "flat", "more", "turned"])
    if change == "0-d":
        return tensor.flatten()[:1].sum()
    if change == "turned" and tensor.ndim > 1:
        return tensor.transpose(0, 1).contiguous()
    return tensor.flatten() if change == "flat" else tensor[..., None]


def _other_values(dice: random.Random, tensor: Tensor) -> Tensor:
    value, tensor = dice.choice(EXTREMES), tensor.clone()
    if dice.random() < 0.5:
        return torch.full_like(tensor, value)
    tensor.view(-1)[:1] = value
    return tensor


def _alpha(dice: random.Random) -> Tensor:
    return dice.choice([torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor(1 + 1j), torch.tensor(4),
                        torch.tensor([[3.0]]), torch.tensor(1e300, dtype=torch.float64), torch.tensor(0.0),
                        torch.tensor(-2.0), torch.tensor(True), *(torch.tensor(value) for value in EXTREMES)])


def damage(dice: random.Random, tensors: Tensors) -> str:
    """One damage, in place; returns its name."""
    key = dice.choice(sorted(tensors))
    stem, end = key.split(".", 1)
    what = dice.choice(["missing", "size", "dimensions", "values", "dtype", "alpha", "swapped", "unbalanced", "more",
                        "unknown", "rank"])
    if what == "missing":
        del tensors[key]
    elif what == "size":
        tensors[key] = _another_size(dice, tensors[key])
    elif what == "dimensions":
        tensors[key] = _other_dimensions(dice, tensors[key])
    elif what == "values":
        tensors[key] = _other_values(dice, tensors[key])
    elif what == "dtype":
        tensors[key] = (tensors[key] * 4).to(dice.choice(DTYPES))
    elif what == "alpha":
        tensors[f"{stem}.alpha"] = _alpha(dice)
    elif what == "swapped":
        other = dice.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other], tensors[key]
    elif what == "unbalanced":
        factor = dice.choice([1e3, 1e6, 1e20, 1e37])
        for end, times in (("lora_down.weight", factor), ("lora_up.weight", 1 / factor)):
            if f"{stem}.{end}" in tensors:
                tensors[f"{stem}.{end}"] = tensors[f"{stem}.{end}"] * times
    elif what == "more":
        sizes = [dice.choice([1, 2, 4, 8, 32, 64]) for _ in range(dice.randint(0, 4))]
        end = dice.choice(["dora_scale", "reshape_weight", "rescale", "lora_mid.weight", "hada_t1", "lokr_w1", "diff_b",
                           "diff", "lokr_t2", "oft_blocks", "set_weight", "lora_up.weight", "hada_w1_a", "a1.weight"])
        tensors[f"{stem}.{end}"] = torch.tensor(sizes) if end == "reshape_weight" else torch.randn(sizes)
        what = f"more {end}"
    elif what == "unknown":
        tensors[dice.choice(["strange.weight", f"{stem}.strange", "lora_unet_no_such_layer.lora_up.weight",
                             f"{stem}.on_input"])] = torch.randn(3, 3)
    else:
        for end, dim in (("lora_down.weight", 0), ("lora_up.weight", 1)):
            if f"{stem}.{end}" in tensors and tensors[f"{stem}.{end}"].ndim > 1 and dice.random() < 0.7:
                tensor = tensors[f"{stem}.{end}"]
                tensors[f"{stem}.{end}"] = torch.cat([tensor, tensor], dim) if dice.random() < 0.5 else \
                    tensor.narrow(dim, 0, dice.randrange(tensor.shape[dim] + 1)).contiguous()
    return f"{what} {end}" if what in ("missing", "size", "dimensions", "values", "dtype") else what


def tear(dice: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damage of the bytes: cut short, or single bytes changed, in the header or behind it."""
    how = dice.choice(["cut", "header", "anywhere", "length"])
    torn, length = bytearray(content), int.from_bytes(content[:8], "little")
    if how == "cut":
        return bytes(torn[:dice.randrange(len(torn))]), how
    if how == "length":
        torn[dice.randrange(8)] ^= 1 << dice.randrange(8)
        return bytes(torn), how
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(8, 8 + length) if how == "header" else dice.randrange(len(torn))
        torn[at] = dice.randrange(256) if dice.random() < 0.5 else dice.choice(b'0123456789{}[],:"')
    return bytes(torn), how


# --- what must become of them ---------------------------------------------------------------------------------------


class Failure(AssertionError):
    """A file that neither works as it should nor is refused as it should."""


class Fuzz:
    """Makes and judges files. `folder` is one of ComfyUI's `loras` folders."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.clip = folder, base("SD15"), small_clip()
        self.state = {key: value.clone() for key, value in self.model.model.state_dict().items()}
        self.text = {key: value.clone() for key, value in self.clip.cond_stage_model.state_dict().items()}
        twin = build(FAMILIES["SD15"])
        twin.load_state_dict(self.state)
        self.twin = patcher(twin)
        self.layers = {name: self.state[f"diffusion_model.{name}.weight"] for name in shapes(self.model)}
        self.text_layers = {name: self.text[f"clip_l.transformer.text_model.{name}.weight"]
                            for name in text_layers(self.clip)}
        self.key_map = comfy.lora.model_lora_keys_unet(self.model.model, {})
        good = lora({name: self.layers[name].shape for name in list(self.layers)[::5]}, 7)
        self.good = LoRASpec("good.safetensors", 0.6, 0.6)
        (folder / self.good.name).write_bytes(save(good))
        self.base = self.sampled(self.model)
        self.good_alone = self.picture(self.stock(good, self.good.strength_model)[0])

    def check(self, seed: int) -> tuple[str, str]:
        """(what was done to the file, what became of it). Raises Failure, or whatever escapes."""
        dice = random.Random(seed)
        torch.manual_seed(seed)
        tensors = whole(dice, self.layers, self.text_layers)
        done = [damage(dice, tensors) for _ in range(dice.choice([0, 1, 1, 1, 2, 3]))]
        content = save(tensors)
        if dice.random() < 0.1:
            content, how = tear(dice, content)
            done.append(how)
        spec = LoRASpec(f"fuzz_{seed}.safetensors", STRENGTH, STRENGTH)
        path = self.folder / spec.name
        path.write_bytes(content)
        folder_paths.filename_list_cache.clear()
        try:
            return ", ".join(done) or "nothing", self.judge(spec, path, bool(done))
        finally:
            path.unlink()

    def judge(self, spec: LoRASpec, path: Path, damaged: bool) -> str:
        pair = (self.good, spec)
        uses: list[Callable] = [
            lambda: apply_method(self.model, self.clip, (spec,), plain(Merge), "Merge LoRAs", rest_on_weights=True),
            lambda: bake(self.model, self.clip, (spec,), "Merge LoRAs"),
            lambda: apply_method(self.model, self.clip, pair, plain(Composite), "Composite LoRAs"),
            lambda: apply_method(self.model, self.clip, pair, plain(Switch), "Switch LoRAs"),
        ]
        made, refusals = [], []
        for use in uses:
            try:
                made.append(use())
            except ValueError as error:
                refusals.append(error)
                if type(error) is not ValueError or f"'{spec.name}'" not in str(error):
                    raise Failure(f"the error does not name the file: {error!r}") from error
        if refusals and (made or not damaged):
            raise Failure(f"refused by {len(refusals)} of {len(uses)} uses: {refusals[0]}")
        if refusals:
            return self.refused(path)
        return self.compare(spec, comfy.utils.load_torch_file(str(path), safe_load=True), made)

    def refused(self, path: Path) -> str:
        """How the host's loader fares with what is refused."""
        try:
            weights, texts = self.stock(comfy.utils.load_torch_file(str(path), safe_load=True), STRENGTH)
        except Exception:  # whatever it is
            return "refused: unreadable"
        if weights is None:
            return "refused: the host stops"
        finite = all(value.isfinite().all() for value in (*weights.values(), *texts.values()))
        return "refused: the host applies or leaves out" if finite else "refused: the host's weights are not finite"

    def compare(self, spec: LoRASpec, tensors: Tensors, made: list) -> str:
        """Pictures and text encoders against those of the host's loader."""
        loaded = load_ensemble(self.model, self.clip, (spec,), "LoRAs", on_weights=True)
        named = [key for key, _ in loaded.loras[0].patches.misfits] if loaded.loras else []
        named += [key for _, patches in loaded.texts for key, _ in patches.misfits]
        if named and not loaded.problems:
            raise Failure(f"left out without a word: {named}")
        (merged, merged_clip), (baked, baked_clip, _), (composed, _), (switched, _) = made
        unexpressed = [key for lora in loaded.loras for key, _ in lora.parsed.left_out]
        kept = self.without(tensors, loaded)
        whole = self.stock(tensors, STRENGTH)
        rest = self.stock(kept, STRENGTH) if kept.keys() != tensors.keys() else whole
        if rest[0] is None:
            raise Failure("the host's loader stops at this file, and so it does without what is named as left out")
        found = self.patched(baked, self.state)
        if differ(found, whole[0], self.state) and differ(found, rest[0], self.state):
            raise Failure("baked: the weights differ from the stock ones")
        first = self.picture(rest[0])
        others = [self.picture(whole[0])] if whole[0] and differ(rest[0], whole[0], self.state) else []
        self.same("merged", self.sampled(merged), first, *others)
        self.same("good beside it, in turns", self.sampled(switched), self.good_alone)
        if unexpressed:
            first = self.picture(self.stock(self.without(tensors, loaded, unexpressed), STRENGTH)[0])
        mean = (self.good_alone + first) / 2 if loaded.loras else self.good_alone
        self.same("composed with a good one", self.sampled(composed), mean)
        for clip in (merged_clip, baked_clip):
            found = self.patched(clip.patcher, self.text)
            if differ(found, whole[1], self.text) and differ(found, rest[1], self.text):
                raise Failure("the text encoder differs from the stock one")
        return "left out by name" if loaded.problems else "works"

    def sampled(self, model) -> Tensor:
        picture = sample(model, steps=1, cfg=1.0)
        left = [type(root).__name__ for root in alive() for module in root.modules() if "forward" in module.__dict__]
        if left:
            raise Failure(f"forwards left on {left[:3]}")
        return picture

    def same(self, what: str, ours: Tensor, *references: Tensor) -> None:
        """`ours` is one of these pictures, to 1e-3 of what the LoRA changes."""
        if not torch.isfinite(ours).all():
            raise Failure(f"{what}: the picture is not finite")
        gaps = [((ours - reference).abs().max() / ((reference - self.base).abs().max() + 1e-3 * self.base.abs().max()))
                for reference in references]
        if not min(gaps) < 1e-3:
            raise Failure(f"{what}: differs from the stock picture by {[f'{float(gap):.1e}' for gap in gaps]}")

    def stock(self, tensors: Tensors, strength: float) -> tuple[Tensors, Tensors] | tuple[None, None]:
        """The weights of the model and of the text encoder as the host's own loader and patches make them, DoRA's
        magnitudes read as `fit.plain_magnitude` says; None where it stops with an exception."""
        straight = dict(tensors)
        for key, value in tensors.items():
            target = self.key_map.get(key.removesuffix(".dora_scale")) if key.endswith(".dora_scale") else None
            if target in self.state:
                straight[key] = plain_magnitude(value, tuple(self.state[target].shape))
        try:
            model, clip = comfy.sd.load_lora_for_models(self.model, self.clip, straight, strength, strength)
            made = self.patched(model, self.state), self.patched(clip.patcher, self.text)
            larger = [key for weights, state in zip(made, (self.state, self.text), strict=True) for key in weights
                      if weights[key].shape != state[key].shape]
            return (None, None) if larger else made  # the sampler would stop at these
        except Exception:  # whatever it is: the file is one that the host stops at
            return None, None

    def patched(self, patcher_, state: Tensors) -> Tensors:
        return {key: comfy.lora.calculate_weight(patches, state[key].float().clone(), key)
                for key, patches in patcher_.patches.items()}

    def picture(self, weights: Tensors) -> Tensor:
        """What the model draws with these weights in place of its own."""
        twin = self.twin.model
        with torch.no_grad():
            for key, value in weights.items():
                twin.get_parameter(key).copy_(value)
            found = self.sampled(self.twin)
            for key in weights:
                twin.get_parameter(key).copy_(self.state[key])
        return found

    def without(self, tensors: Tensors, loaded: LoadedEnsemble, further: list | None = None) -> Tensors:
        """The file without the layers that are named as left out."""
        named = {key for lora in loaded.loras for key, _ in lora.patches.misfits} | {*(further or [])}
        kept = {key: value for key, value in tensors.items() if not self.belongs(key, self.key_map, named)}
        text = {key for _, patches in loaded.texts for key, _ in patches.misfits}
        text_map = comfy.lora.model_lora_keys_clip(self.clip.cond_stage_model, {})
        return {key: value for key, value in kept.items() if not self.belongs(key, text_map, text)
                and not self.cut_to_nothing(key, kept)}

    @staticmethod
    def belongs(key: str, key_map: dict, named: set) -> bool:
        stem, _, end = key.partition(".")
        target = key_map.get(stem)
        if target is None:
            return False
        bias = end in ("diff_b", "b_norm")
        return (target.removesuffix("weight") + "bias" if bias else target) in named

    @staticmethod
    def cut_to_nothing(key: str, tensors: Tensors) -> bool:
        """Of a layer of rank 0, which changes nothing, and at which the host stops if it has an alpha."""
        stem = key.partition(".")[0]
        down = tensors.get(f"{stem}.lora_down.weight")
        return down is not None and not down.numel() and f"{stem}.dora_scale" not in tensors


def differ(ours: Tensors, others: Tensors | None, state: Tensors) -> bool:
    """Whether weights differ, where those that are not given are as in `state`."""
    return others is None or any(
        not torch.allclose(ours.get(key, state[key]), others.get(key, state[key]), rtol=1e-4, atol=1e-5)
        for key in ours.keys() | others.keys())


def main() -> int:
    chosen = options(__doc__, 2000).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("loras", folder, is_default=True)
        fuzz = Fuzz(Path(folder))

        def check(case: str) -> Found:
            done, became = fuzz.check(int(case))
            return became, {"done": done}

        return Results.asked("fuzz_files", DEPENDS, chosen).judge(seeds(chosen), check)


if __name__ == "__main__":
    sys.exit(main())
