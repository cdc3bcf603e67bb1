"""Files that are wrong inside: every layer is applied, left out by name, or reason to refuse the file by name."""

from __future__ import annotations

import comfy.lora
import pytest
import torch
from lora_ensemble.host.compose.apply import bake
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.fit import Misfit, check
from lora_ensemble.methods.switch import Switch

from .builders import Rand, composite, file_of, kohya, lora, merge, method, same, sample, shapes, stock
from .kinds import EVERYWHERE, dora, low_rank, tucker_lora
from .models import base
from .test_kinds import diffusers_targets
from .test_shapes import NAME, flux_lora

LAYERS = ("attn1.to_q", "attn2.to_k", "ff.net.0.proj", "proj_in", "in_layers.2", "time_embed.0", "emb_layers.1")


def weights(ends: tuple[str, ...] = LAYERS) -> dict[str, torch.Tensor]:
    state = base("SD15").model.state_dict()
    return {name: state[f"diffusion_model.{name}.weight"] for name in shapes(base("SD15"), lambda n: n.endswith(ends))}


def a_file(make=low_rank, layers=None, seed: int = 1) -> dict[str, torch.Tensor]:
    rand = Rand(seed)
    return {f"{kohya(name)}.{end}": value for name, weight in (layers or weights()).items()
            for end, value in make(weight, rand).items()}


def without(tensors: dict, layer: str) -> dict:
    return {key: value for key, value in tensors.items() if not key.startswith(f"{kohya(layer)}.")}


def uses(name: str) -> list:
    """Every way to a picture with one file: merged at run time, into the weights, and as a branch beside a good one."""
    spec, model = LoRASpec(name, 0.8, 1.0), base("SD15")
    return [lambda: merge(model, [spec], rest_on_weights=True), lambda: composite(model, [spec]),
            lambda: bake(model, None, (spec,), "Merge LoRAs")[0]]


def refused(name: str, *words: str) -> None:
    for use in uses(name):
        with pytest.raises(ValueError) as caught:
            use()
        text = str(caught.value)
        assert type(caught.value) is ValueError and f"'{name}'" in text and "remove it from the ensemble" in text, text
        assert all(word in text for word in words), text


def left_out(name: str, layer: str, *words: str) -> None:
    """The layer is named, and the rest acts as in the stock loader, which leaves it out as well."""
    spec, model = LoRASpec(name, 0.8, 0), base("SD15")
    reference, before = sample(stock(model, [spec])), sample(model)
    for use in uses(name):
        ours = use()
        same(sample(ours), reference, before)
        if ours.get_attachment(KEY) is not None:
            (problem,) = ours.get_attachment(KEY).applied[0].problems
            assert name in problem and layer in problem and problem.endswith("left out"), problem
            assert all(word in problem for word in words), problem


# --- factors of unequal rank ----------------------------------------------------------------------------------------


def torn(layer: str, up: int, down: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """A file of which one layer's factors have these ranks."""
    tensors, key, rand = a_file(seed=seed), kohya(layer), Rand(seed + 50)
    out, inputs = tensors[f"{key}.lora_up.weight"].shape[0], tensors[f"{key}.lora_down.weight"].shape[1]
    tensors[f"{key}.lora_up.weight"] = rand(out, up, size=0.2)
    tensors[f"{key}.lora_down.weight"] = rand(down, inputs) / inputs**0.5
    return tensors


LAYER = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(("up", "down"), [(4, 6), (8, 4), (4, 0)])
def test_factors_of_unequal_rank(up, down, loras):
    left_out(loras(torn(LAYER, up, down)), LAYER, f"rank {up}", f"rank {down}")


@pytest.mark.parametrize("broken", [0, 1])
def test_a_layer_under_two_names(broken, loras):
    """The later one of the host's names counts, and the layer is left out where it does not fit."""
    tensors = without(a_file(), LAYER)
    for k, name in enumerate((kohya, "diffusion_model.{}".format)):
        made = low_rank(weights()[LAYER], Rand(k))
        made["lora_up.weight"] = made["lora_up.weight"][:-1] if k == broken else made["lora_up.weight"]
        tensors |= {f"{name(LAYER)}.{end}": value for end, value in made.items()}
    name = loras(tensors)
    wanted, plain = sample(stock(base("SD15"), [LoRASpec(name, 0.8, 0)])), sample(base("SD15"))
    for use in uses(name):
        same(sample(use()), wanted, plain)


def test_two_mistakes_whose_sum_is_right_do_not_damage_neighbours(loras):
    """Ranks of 4 and 6 in one file, of 6 and 4 in another, and a good LoRA between them, which acts alone."""
    model, good = base("SD15"), LoRASpec(loras(a_file(seed=2)), 0.7, 0)
    first, last = (LoRASpec(loras(torn(LAYER, *ranks, seed)), 0.8, 0) for ranks, seed in (((4, 6), 3), ((6, 4), 4)))
    ours = method(model, (good, first, last), Switch)  # its turn ends after the steps that are sampled
    same(sample(ours), sample(stock(model, [good])), sample(model))
    ours = composite(model, (first, good, last))
    means = torch.stack([sample(stock(model, [spec]), steps=1, cfg=1.0) for spec in (first, good, last)]).mean(dim=0)
    same(sample(ours, steps=1, cfg=1.0), means, sample(model, steps=1, cfg=1.0))
    assert len(ours.get_attachment(KEY).applied[0].problems) == 2


# --- the other kinds ------------------------------------------------------------------------------------------------

QKV = "attn1.to_q"


def one_bad(kind: str, change, loras) -> str:
    """A file of one kind on one layer, changed, among good ones."""
    tensors, layer = a_file(seed=3), weights((QKV,))
    name = next(iter(layer))
    tensors = without(tensors, name)
    bad = EVERYWHERE[kind](layer[name], Rand(9)) if kind in EVERYWHERE else tucker_lora(layer[name], Rand(9))
    change(bad)
    return loras({**tensors, **{f"{kohya(name)}.{end}": value for end, value in bad.items()}})


def cut(*ends: str):
    def change(tensors: dict) -> None:
        for end in ends:
            tensors[end] = tensors[end][:, :-1].contiguous()
    return change


def drop(end: str):
    return lambda tensors: tensors.pop(end)


def put(end: str, value):
    return lambda tensors: tensors.update({end: value})


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("DoRA", put("dora_scale", torch.ones(7, 1)), ["dora_scale of 7x1"]),
    ("DoRA of LoHa", put("dora_scale", torch.ones(3)), ["dora_scale of 3"]),
    ("LoRA", cut("lora_down.weight"), ["delta"]),
    ("LoRA", put("lora_up.weight", torch.ones(5)), ["5"]),
    ("LoHa", cut("hada_w2_b"), ["halves of a LoHa"]),
    ("LoKr w1 w2", cut("lokr_w2"), ["entries"]),
    ("GLoRA", cut("b2.weight"), ["GLoRA"]),
    ("OFT", put("oft_blocks", torch.zeros(3, 4, 4)), ["rotations"]),
    ("OFT", put("oft_blocks", torch.zeros(8, 4, 8)), ["not square"]),
    ("BOFT", drop("alpha"), ["without alpha"]),
    ("BOFT", put("oft_blocks", torch.zeros(1, 64, 1, 1)), ["1 stages"]),
    ("diff", cut("diff"), ["difference"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_host_leaves_out(kind, change, words, loras):
    left_out(one_bad(kind, change, loras), next(iter(weights((QKV,)))), *words)


def test_a_lokr_with_a_dimension_too_many(loras):
    """The stock loader multiplies such factors in another order of dimensions, which no training meant."""
    name = one_bad("LoKr w1 w2", lambda tensors: tensors.update(lokr_w2=tensors["lokr_w2"][..., None]), loras)
    ours = composite(base("SD15"), [LoRASpec(name, 0.8, 0)])
    (problem,) = ours.get_attachment(KEY).applied[0].problems
    layer = next(iter(weights((QKV,))))
    assert layer in problem and "8x8x1; left out" in problem
    rest = LoRASpec(loras(without(file_of(LoRASpec(name, 1, 0)), layer)), 0.8, 0)
    same(sample(ours), sample(stock(base("SD15"), [rest])), sample(base("SD15")))


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("LoRA", drop("lora_down.weight"), ["lora_down.weight' is missing"]),
    ("LoRA alpha", put("alpha", torch.ones(2)), ["alpha", "2 values"]),
    ("LoRA alpha", put("alpha", torch.tensor([])), ["alpha", "0 values"]),
    ("LoRA alpha", put("alpha", torch.tensor(1 + 1j)), ["alpha", "complex64"]),
    ("LoRA alpha", put("alpha", torch.tensor(float("nan"))), ["not numbers"]),
    ("LoRA alpha", put("alpha", torch.tensor(1e38)), ["so large"]),
    ("LoRA", put("lora_up.weight", torch.full((64, 4), 1e38)), ["so large"]),
    ("LoRA", put("lora_up.weight", torch.ones(64, 4, dtype=torch.complex64)), ["complex64"]),
    ("LoRA", put("lora_up.weight", torch.ones(64, 4, dtype=torch.int8)), ["int8", "quantized"]),
    ("LoRA", put("lora_mid.weight", torch.ones(3, 3, 1, 1)), ["core of 3x3x1x1"]),
    ("LoRA", put("reshape_weight", torch.tensor([8, 8])), ["can only enlarge"]),
    ("LoHa", cut("hada_w1_a"), ["hada_w1_a is of rank 3"]),
    ("LoHa", drop("hada_w2_a"), ["hada_w2_a' is missing"]),
    ("LoKr w1 w2a", cut("lokr_w2_a"), ["lokr_w2_a is of rank 3"]),
    ("LoKr w1 w2a", drop("lokr_w2_b"), ["lokr_w2_a and lokr_w2_b"]),
    ("LoKr w1 w2", put("lokr_w1", torch.tensor(1.0)), ["LoKr are of one number"]),
    ("GLoRA", put("a1.weight", torch.ones(4)), ["no matrices"]),
    ("set_weight", cut("set_weight"), ["replaces a weight"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_host_stops_at(kind, change, words, loras):
    refused(one_bad(kind, change, loras), *words)


def test_damage_in_most_layers_is_damage_and_no_other_architecture(loras):
    tensors = {key: value[:3] if "lora_down" in key else value for key, value in a_file().items()}
    refused(loras(tensors), "damaged in", "lora_up is of rank 4")


def test_a_missing_factor_of_a_text_encoder(loras):
    from .builders import text_layers
    from .models import small_clip

    clip = small_clip()
    name = "lora_te_text_model_" + next(iter(text_layers(clip))).replace(".", "_")
    spec = LoRASpec(loras({**a_file(), f"{name}.lora_up.weight": torch.ones(32, 4)}), 0.8, 1.0)
    with pytest.raises(ValueError, match=f"{spec.name}.*{name}.lora_down.weight' is missing"):
        bake(base("SD15"), clip, (spec,), "Merge LoRAs")


# --- enlarged layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0), (1, 0, 1)])
def test_an_enlarged_layer_and_other_loras_on_it(order, loras, caplog):
    """Merge puts all of them into the weight, in their order: those behind the larger one do not fit any more, as in a
    chain of stock loaders."""
    model, names = base("Flux"), [loras(file) for file in (enlarged(), a_control_free_lora())]
    ensemble = [LoRASpec(names[k], 0.8 - 0.2 * place, 0) for place, k in enumerate(order)]
    reference, before = sample(stock(model, ensemble), "Flux"), sample(model, "Flux")
    ours = merge(model, ensemble, rest_on_weights=True)
    same(sample(ours, "Flux"), reference, before)
    problems = ours.get_attachment(KEY).record.problems
    assert any("enlarges the layer; merged into the weight instead" in problem for problem in problems)
    baked = bake(model, None, tuple(ensemble), "Merge LoRAs")[0]
    assert torch.equal(sample(baked, "Flux"), reference)
    behind = 1 in order[order.index(0):]
    assert behind == any("img_in" in text and "left out" in text and names[1] in text for text in caplog.messages)


def enlarged() -> dict:
    (out, wide), block = shapes(base("Flux"))["img_in"], "double_blocks.0.img_attn.proj"
    return flux_lora((out, 2 * wide), {"img_in": torch.Size((out, 2 * wide)), block: shapes(base("Flux"))[block]})


def a_control_free_lora() -> dict:
    return lora({f"diffusion_model.{name}": shape for name, shape in shapes(base("Flux")).items()}, 5, **NAME)


def test_branches_leave_the_enlarged_layer_out_and_keep_the_others(loras):
    model, (control, other) = base("Flux"), (LoRASpec(loras(f), 0.8, 0) for f in (enlarged(), a_control_free_lora()))
    ours = composite(model, [control, other])
    (problem,) = ours.get_attachment(KEY).applied[0].problems
    assert "it enlarges the layer; left out" in problem
    rest = LoRASpec(loras({key: value for key, value in enlarged().items() if "img_in" not in key}), 0.8, 0)
    assert torch.equal(sample(ours, "Flux"), sample(composite(model, [rest, other]), "Flux"))


def test_a_layer_that_a_loader_before_has_enlarged(loras):
    """What fits the larger layer goes into the weight, what does not is left out: nothing acts beside it."""
    model, (control, other) = base("Flux"), (LoRASpec(loras(f), 0.8, 0) for f in (enlarged(), a_control_free_lora()))
    before = stock(model, [control])
    ours = merge(before, [other], rest_on_weights=True)
    same(sample(ours, "Flux"), sample(stock(before, [other]), "Flux"), sample(model, "Flux"))
    assert any("img_in" in problem and "left out" in problem for problem in ours.get_attachment(KEY).record.problems)
    sample(composite(before, [control, other]), "Flux")


def test_no_layer_is_enlarged_under_loras_that_act_beside_it(loras):
    model, (control, other) = base("Flux"), (LoRASpec(loras(f), 0.8, 0) for f in (enlarged(), a_control_free_lora()))
    with pytest.raises(ValueError, match=f"{control.name}' enlarges diffusion_model.img_in.weight, on which LoRAs"):
        merge(merge(model, [other]), [control], rest_on_weights=True)


def test_only_first_layers_can_be_enlarged(loras):
    """Any other would get inputs of its old size, and the sampler would stop."""
    layer = next(iter(weights((QKV,))))
    tensors = a_file() | a_file(low_rank, {layer: torch.zeros(64, 128)})
    tensors[f"{kohya(layer)}.reshape_weight"] = torch.tensor([64, 128])
    refused(loras(tensors), "would enlarge", layer, "64x128")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e3, 1e5])
def test_unbalanced_factors_on_a_half_precision_base(factor, loras):
    """`down` is 1000 times too large and `up` as much too small: their product is what a weight takes."""
    model, tensors = base("SD15", torch.float16), a_file()
    odd = {key: value * (factor if "lora_down" in key else 1 / factor) for key, value in tensors.items()}
    spec, plain = (LoRASpec(loras(file), 0.8, 0) for file in (odd, tensors))
    exact = base("SD15")
    reference, before = sample(stock(exact, [plain])), sample(exact)
    for make in (merge, composite):
        same(sample(make(model, [spec])).float(), reference, before, 0.02)


def test_tucker_factors_in_fp8(loras):
    """Guard: the core is folded into the input factor in fp32, and not rounded to fp8 again."""
    layers = weights(("in_layers.2", "out_layers.3"))
    tensors = a_file(tucker_lora, layers)
    packed = {key: value.to(torch.float8_e4m3fn) if value.ndim else value for key, value in tensors.items()}
    spec, model = LoRASpec(loras(packed), 0.8, 0), base("SD15")
    same(sample(merge(model, [spec])), sample(stock(model, [spec])), sample(model))


@pytest.mark.parametrize("ends", [("attn1.to_q", "attn1.to_v"), ("ff.net.0.proj",), ("in_layers.2",)],
                         ids=["square", "not square", "3x3"])
def test_a_plain_list_of_magnitudes_is_one_per_output(ends, loras):
    """[o] means what [o, 1] means, as in PEFT, whatever follows in the file's shape. The stock loader's arithmetic lays
    the list along the inputs: half of the effect is wrong on a square layer, and the others it leaves out."""
    layers = weights(ends)
    tensors = a_file(dora, layers)
    flat = {key: value.flatten() if key.endswith("dora_scale") else value for key, value in tensors.items()}
    model, usual, listed = base("SD15"), LoRASpec(loras(tensors), 0.8, 0), LoRASpec(loras(flat), 0.8, 0)
    reference, before = sample(stock(model, [usual])), sample(model)
    for ours in (merge(model, [listed]), bake(model, None, (listed,), "Merge LoRAs")[0]):
        same(sample(ours), reference, before)
    assert (sample(stock(model, [listed])) - reference).abs().max() > 0.1 * (reference - before).abs().max()
    # The definition, for one layer: each row of W' has the direction of (W + D) and its magnitude over that of W.
    name, weight = next(iter(layers.items()))
    made = {key.removeprefix(f"{kohya(name)}."): value for key, value in file_of(listed).items()
            if key.startswith(f"{kohya(name)}.")}
    flat_weight = weight.flatten(1)
    delta = made["lora_up.weight"].flatten(1) @ made["lora_down.weight"].flatten(1)
    wanted = (flat_weight + delta) * (made["dora_scale"] / flat_weight.norm(dim=1))[:, None]
    key = f"diffusion_model.{name}.weight"
    patches = bake(model, None, (LoRASpec(listed.name, 1.0, 0),), "Merge LoRAs")[0].patches[key]
    patched = comfy.lora.calculate_weight(patches, weight.clone(), key)
    torch.testing.assert_close(patched.flatten(1), wanted, rtol=1e-4, atol=1e-5)


def test_a_plain_list_of_magnitudes_on_a_slice(loras):
    """q of Flux is a slice of a fused weight: its magnitudes are those of the slice's outputs."""
    model, rand, tensors = base("Flux"), Rand(1), {}
    for key, shape in diffusers_targets(model).items():
        if "to_q" in key:
            made = dora(rand(*shape) / shape[1] ** 0.5, rand)
            tensors |= {f"{key}.{end}": value for end, value in made.items()}
    flat = {key: value.flatten() if key.endswith("dora_scale") else value for key, value in tensors.items()}
    usual, listed = (LoRASpec(loras(file), 0.8, 0) for file in (tensors, flat))
    ours = merge(model, [listed])
    same(sample(ours, "Flux"), sample(stock(model, [usual]), "Flux"), sample(model, "Flux"))
    assert ours.get_attachment(KEY).applied[0].problems == ()


def test_a_bias_for_a_slice_is_named(loras):
    """The stock loader looks for a layer that is named by an empty pair of brackets, and says nothing."""
    model = base("Flux")
    key, shape = next((key, shape) for key, shape in diffusers_targets(model).items() if "to_q" in key)
    tensors = lora({key: shape}, 1, **NAME) | {f"{key}.diff_b": torch.ones(shape[0])}
    spec = LoRASpec(loras(tensors), 0.8, 0)
    ours = merge(model, [spec])
    (problem,) = ours.get_attachment(KEY).applied[0].problems
    assert "a bias for a slice of a layer; left out" in problem and "()" not in problem
    same(sample(ours, "Flux"), sample(stock(model, [spec]), "Flux"), sample(model, "Flux"))


@pytest.mark.parametrize("rows", [4, 6])
def test_a_slice_of_a_layer_is_not_enlarged(rows):
    """A slice has its neighbours: only a whole layer can grow."""
    patch = ("diff", (torch.zeros(rows, 8), {"pad_weight": True}))
    check(patch, (4, 8), None)
    if rows == 4:
        check(patch, (12, 8), (0, 4, 4))
    else:
        with pytest.raises(Misfit, match="enlarges a slice"):
            check(patch, (12, 8), (0, 4, 4))
