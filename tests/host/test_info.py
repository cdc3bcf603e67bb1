"""LoRA Info: what it says of files, what of them acts, and sizes against weights that ComfyUI's own loader changes."""

from __future__ import annotations

import comfy.lora
import pytest
import torch
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.host.files.metadata import wording_of
from lora_ensemble.host.look.info import block_of, draw, infos, told
from lora_ensemble.host.look.sheet import WIDTH
from lora_ensemble.host.look.theme import DARK, LIGHT, rgb
from lora_ensemble.nodes.info import LoRAEnsembleInfo

from .builders import kohya, lora, shapes, stock, text_layers
from .models import base, small_clip

NODE = "LoRA Info"


def made(loras, family: str = "SD15", wanted=lambda layer: True, seed: int = 1, name: str = "a.safetensors",
         metadata=None, **more) -> str:
    return loras({**lora(shapes(base(family), wanted), seed), **more}, name, metadata=metadata)


def weights(model) -> dict[str, torch.Tensor]:
    """Layer -> weight with the patches of the stock loader on it."""
    out = {}
    for key, value in model.model.state_dict().items():
        if key.startswith("diffusion_model.") and key.endswith(".weight"):
            weight = value.float().clone()
            patched = comfy.lora.calculate_weight(model.patches.get(key, []), weight, key)
            out[key.removeprefix("diffusion_model.").removesuffix(".weight")] = patched
    return out


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_sizes_are_those_of_the_stock_loader(family, loras):
    """Two LoRAs on different layers: blocks are compared over all layers that either of them changes."""
    model = base(family)
    names = [made(loras, family, seed=1, name="a.safetensors"),
             made(loras, family, lambda layer: "attn" in layer, 2, "b.safetensors")]
    ensemble = (LoRASpec(names[0], 0.8, 1.0), LoRASpec(names[1], -0.5, 0.0))
    found, plain = infos(model, None, ensemble, NODE), weights(model)
    touched = set(shapes(model))
    for info, spec in zip(found, ensemble, strict=True):
        changed = weights(stock(model, (spec,)))
        blocks: dict[str, list[str]] = {}
        for layer in touched:
            blocks.setdefault(block_of(layer), []).append(layer)
        for block, layers in blocks.items():
            change = sum((changed[layer] - plain[layer]).double().square().sum().item() for layer in layers)
            size = sum(plain[layer].double().square().sum().item() for layer in layers)
            assert info.changes[block] == pytest.approx((change / size) ** 0.5, rel=1e-4, abs=1e-9)
        assert set(info.changes) == set(blocks)
        change = sum((changed[layer] - plain[layer]).double().square().sum().item() for layer in touched)
        assert info.whole == pytest.approx((change / sum(plain[layer].double().square().sum().item()
                                                         for layer in touched)) ** 0.5, rel=1e-4)
    assert [info.layers for info in found] == [len(touched), sum("attn" in layer for layer in touched)]


def test_blocks_come_in_the_order_of_the_model(loras):
    (info,) = infos(base("SD15"), None, (LoRASpec(made(loras), 1.0, 1.0),), NODE)
    blocks = list(dict.fromkeys(block_of(name) for name, _ in base("SD15").model.diffusion_model.named_modules()
                                if name in shapes(base("SD15"))))
    assert list(info.changes) == blocks and any(block.startswith("input_blocks.") for block in blocks)


@pytest.mark.parametrize(("layer", "block"), [
    ("input_blocks.4.1.proj_in", "input_blocks.4"), ("double_blocks.0.img_attn.qkv", "double_blocks.0"),
    ("time_embed.0", "time_embed.0"), ("final_layer.linear", "final_layer"), ("img_in", "img_in"),
])  # fmt: skip
def test_blocks(layer, block):
    assert block_of(layer) == block


def test_it_says_when_and_where_a_lora_is_to_act(loras):
    """What is set on it and not in its file; nothing of one that is as it comes."""
    name, mask = made(loras), torch.zeros(1, 8, 8)
    mask[..., :2] = 1
    spec = LoRASpec(name, 0.8, 1.0, role="style", mask=Mask(mask), words="ohwx", start=0.25, end=0.75, fade=0.125)
    text = told(infos(base("SD15"), None, (spec, LoRASpec(name, 0.8, 1.0)), NODE), "SD15")
    assert [line.strip() for line in text.splitlines() if "set on it" in line] == [
        "set on it: role style; words ohwx; acts from 0.25 to 0.75 of the run, fading over 0.125; "
        "a mask of 25 % of the picture"]


def test_it_says_what_a_file_says_of_itself(loras):
    name = made(loras, metadata={"modelspec.trigger_phrase": "ohwx woman", "ss_base_model_version": "sd_v1"})
    model = base("SD15")
    text = told(infos(model, None, (LoRASpec(name, 0.8, 1.0),), NODE), "SD15")
    assert "1  a.safetensors\n   LoRA of rank 4, on " in text
    assert "trained on: sd_v1" in text and "trigger words: ohwx woman" in text
    assert "at strength 0.8 it changes these weights by " in text and "left out" not in text


def test_a_file_that_says_nothing(loras):
    text = told(infos(base("SD15"), None, (LoRASpec(made(loras), 0.0, 0.0),), NODE), "SD15")
    assert "(off)" in text and "trained on: not said in the file" in text and "trigger words: not said" in text
    assert "at strength 1 it changes" in text


def test_what_a_file_was_trained_on():
    assert wording_of({"ss_sd_model_name": "x.safetensors", "modelspec.architecture": "flux-1-dev/lora"}).base == (
        "flux-1-dev/lora")
    assert wording_of({"ss_base_model_version": ["", 3, "sdxl_v1"]}).base == "sdxl_v1" and wording_of({}).base == ""


def test_a_file_for_another_model_does_nothing_and_stops_nothing(loras):
    names = [made(loras, "Flux", name="flux.safetensors"), made(loras, seed=2, name="b.safetensors")]
    model = base("SD15")
    found = infos(model, None, tuple(LoRASpec(name, 1.0, 1.0) for name in names), NODE)
    text = told(found, "SD15")
    assert "1  flux.safetensors\n   does nothing on this model: it matches no layer of this model" in text
    assert "made for another architecture" in text and "remove it from the ensemble" not in text
    assert found[0].changes == {} and found[1].whole > 0 and not found[1].nothing


def test_a_lora_that_is_off_needs_no_file(loras):
    """As in a row of LoRA Ensemble that is off; one that is on is refused."""
    there, off = LoRASpec(made(loras), 1.0, 1.0), LoRASpec("gone.safetensors", 0.0, 0.0)
    text = told(infos(base("SD15"), None, (off, there), NODE), "SD15")
    assert "1  gone.safetensors (off)\n   does nothing on this model: it is in none of the 'loras' folders." in text
    assert f"2  {there.name}\n   LoRA of rank" in text
    with pytest.raises(ValueError, match="gone.safetensors"):
        infos(base("SD15"), None, (LoRASpec("gone.safetensors", 1.0, 0.0),), NODE)


def test_a_file_that_cannot_be_read_is_told_in_one_sentence(raw):
    name = raw(b"<html>sign in</html>", "page.safetensors")
    text = told(infos(base("SD15"), None, (LoRASpec(name, 1.0, 1.0),), NODE), "SD15")
    assert "does nothing on this model: it is not a safetensors file" in text and "it again.\n" in text


def test_a_lora_for_the_text_encoder_alone(loras):
    name = loras({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
                  "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}, "te.safetensors")
    text = told(infos(base("SD15"), None, (LoRASpec(name, 1.0, 1.0),), NODE), "SD15")
    assert "does nothing on this model: it changes the text encoder alone, and none is connected" in text


def test_what_is_left_out_has_its_reason(loras):
    layer = next(iter(shapes(base("SD15"))))
    more = {f"{kohya('no_such_layer')}.lora_up.weight": torch.ones(4, 2),
            f"{kohya('no_such_layer')}.lora_down.weight": torch.ones(2, 4),
            f"{kohya(layer)}.lora_up.weight": torch.ones(3, 2), f"{kohya(layer)}.lora_down.weight": torch.ones(2, 3)}
    (info,) = infos(base("SD15"), None, (LoRASpec(made(loras, **more), 1.0, 1.0),), NODE)
    assert len(info.out) == 2 and info.layers == len(shapes(base("SD15"))) - 1
    assert any("no place in this model" in line for line in info.out)
    text = told([info], "SD15")
    assert text.count("\n   left out: ") == 2 and "LoRA 'a.safetensors'" not in text


def test_kinds_and_ranks(loras):
    """A DoRA on some layers, of two ranks."""
    model = base("SD15")
    layers = list(shapes(model).items())
    file = lora(dict(layers[2:]), 1)
    for rank, (layer, shape) in zip((2, 6), layers[:2], strict=True):
        out, *rest = shape
        file |= {f"{kohya(layer)}.lora_up.weight": torch.randn(out, rank, *[1] * (len(rest) - 1)),
                 f"{kohya(layer)}.lora_down.weight": torch.randn(rank, *rest),
                 f"{kohya(layer)}.dora_scale": torch.rand(out, *[1] * len(rest)) + 0.5}
    (info,) = infos(model, None, (LoRASpec(loras(file, "a.safetensors"), 1.0, 1.0),), NODE)
    assert info.kinds == ("LoRA", "DoRA") and info.ranks == (2, 4, 6) and info.out == []
    assert "LoRA and DoRA of rank 2 to 6, on" in told([info], "SD15")


def test_the_text_encoder(loras):
    clip = small_clip()
    layers = text_layers(clip)
    file = {key.replace("lora_unet_", "lora_te_text_model_"): value for key, value in lora(layers, 3).items()}
    name = made(loras, **file)
    for given, words in ((None, "which is not connected"), (clip, " layers of the model and on the text encoder")):
        assert words in told(infos(base("SD15"), given, (LoRASpec(name, 1.0, 1.0),), NODE), "SD15")


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_picture(loras, theme):
    names = [made(loras, seed=seed, name=f"{seed}.safetensors") for seed in range(3)]
    ensemble = (*(LoRASpec(name, 1.0, 1.0) for name in names),
                LoRASpec(made(loras, "Flux", name="flux.safetensors"), 1.0, 1.0))
    found = infos(base("SD15"), None, ensemble, NODE)
    picture = draw(found, "SD15", theme)
    assert picture.width == WIDTH and picture.getpixel((2, 2)) == rgb(theme.paper)
    colours = {colour for _, colour in picture.getcolors(10**6)}
    assert all(rgb(theme.colour(i)) in colours for i in range(3))
    assert draw(found[3:], "SD15", theme).height < picture.height  # nothing to draw: the text alone


def test_the_node(loras):
    name = made(loras)
    out = LoRAEnsembleInfo.execute(base("SD15"), (LoRASpec(name, 1.0, 1.0),))
    image, text = out.args
    assert image.shape[0] == 1 and image.shape[2:] == (WIDTH, 3) and text.startswith("On this model (")
    assert out.ui.as_dict()["text"][0] == text
    with pytest.raises(ValueError, match="LoRA Info: the ensemble is empty"):
        LoRAEnsembleInfo.execute(base("SD15"), ())
    with pytest.raises(ValueError, match="gone.safetensors"):
        LoRAEnsembleInfo.execute(base("SD15"), (LoRASpec("gone.safetensors", 1.0, 1.0),))
    with pytest.raises(ValueError, match="LoRA Info: theme is 'blue'"):
        LoRAEnsembleInfo.execute(base("SD15"), (LoRASpec(name, 1.0, 1.0),), theme="blue")
