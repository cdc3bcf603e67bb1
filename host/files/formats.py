"""Which format a file is in, told by the names of its tensors: for messages, and for names that ComfyUI's own key map
lacks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import comfy.lora
import comfy.model_base
import comfy.utils
from torch import Tensor, nn


class Kind(NamedTuple):
    """A kind of file that no LoRA loader can use.

    what    with its article
    remedy  what to do with it
    """

    what: str
    remedy: str


_LORA = r"lora|hada_|lokr_|oft_|dora_scale|\.diff(_b)?$|\.set_weight$|\.alpha$|_norm$|\.[ab][12]\.weight$"
_OTHERS: tuple[tuple[str, Kind], ...] = (
    (r"\.on_input$|\.ia3_l(\.|$)", Kind("an IA3 file", "ComfyUI cannot load this kind; use a version that is a LoRA")),
    (r"\.oft_blocks\.\d+$|\.oft_[rR](\.|$)",
     Kind("a list of OFT blocks", "ComfyUI cannot load OFT in this form; use a version that is a LoRA")),
    (r"^oft_(unet|te\d*)_", Kind("an OFT file of kohya's scripts",
                                "ComfyUI cannot load OFT in this form; use a version that is a LoRA")),
    (r"\.vera_lambda_[bd]|\.boft_[Rs](\.|$)|\.hra_u(\.|$)",
     Kind("a PEFT file of a kind other than LoRA", "ComfyUI cannot load this kind; use a version that is a LoRA")),
    (r"^(single_)?transformer_blocks\.\d+\.(qkv_proj|mlp_fc[12])\.lora_(down|up)$",
     Kind("a LoRA that was converted for Nunchaku", "use the version before its conversion")),
    (rf"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.(?!.*({_LORA}))",
     Kind("a whole checkpoint", "load it with 'Load Checkpoint'")),
    (r"^(control_model\.|controlnet_|lora_controlnet$|input_hint_block\.|zero_convs\.)|\.input_hint_block\.",
     Kind("a ControlNet", "load it with 'Load ControlNet Model'")),
    (r"^(ip_adapter|image_proj)\.", Kind("an IP-Adapter", "load it with the nodes of an IP-Adapter pack")),
    (r"^(emb_params|clip_[lg]|string_to_param.*|<[^>]*>)$",
     Kind("a textual-inversion embedding", "put it into models/embeddings and name it in the prompt")),
    (r"^(blk\.\d+|token_embd|output_norm)\.",
     Kind("a text model with GGUF names", "load it as a text encoder of the pack that it was made for")),
    (r"^(vae\.)?(post_)?quant_conv\.|^(vae\.)?(en|de)coder\.(conv_in|mid|down|up|mid_block|down_blocks|up_blocks)\b",
     Kind("a VAE", "load it with 'Load VAE'")),
)

_PREFIXES = (("base_model.model.", "a PEFT file"), ("unet.base_model.model.", "a PEFT file"),
             ("lora_unet_", "a kohya file"), ("lora_te", "a kohya file"), ("lora_prior_", "a Stable Cascade file"),
             ("lycoris_", "a LyCORIS file"), ("lora_transformer_", "a OneTrainer file"),
             ("unet.", "a diffusers or OneTrainer file"), ("transformer.", "a diffusers file"),
             ("text_encoder", "a diffusers file"), ("diffusion_model.", "a file in ComfyUI's own names"))

_DOTTED = ("base_model.model.", "unet.base_model.model.", "unet.", "transformer.", "diffusion_model.",
           "model.diffusion_model.", "pipe.dit.", "conditional_transformer.")
"""What PEFT, diffusers, ai-toolkit, DiffSynth, Ideogram's trainers and extractors put before names with dots."""
_JOINED = ("lora_unet_", "lycoris_", "lora_transformer_")
"""What kohya and musubi-tuner, LyCORIS and SimpleTuner, and OneTrainer put before names with underscores."""
_OWN = ("unet.", "transformer.", "text_encoder.", "diffusion_model.")

_DIFFUSERS: dict[str, tuple[tuple[str, str], ...]] = {
    "diffusion_model.blocks.0.self_attn.q": (  # Wan
        (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."), (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
        (r"\.(attn\d)\.([qkv])$", r".\1.to_\2"), (r"\.(attn\d)\.o$", r".\1.to_out.0"),
        (r"\.(attn\d)\.([kv])_img$", r".\1.add_\2_proj"),
        (r"^(blocks\.\d+)\.ffn\.0$", r"\1.ffn.net.0.proj"), (r"^(blocks\.\d+)\.ffn\.2$", r"\1.ffn.net.2"),
        (r"^(text|time)_embedding\.0$", r"condition_embedder.\1_embedder.linear_1"),
        (r"^(text|time)_embedding\.2$", r"condition_embedder.\1_embedder.linear_2"),
        (r"^time_projection\.1$", "condition_embedder.time_proj"), (r"^head\.head$", "proj_out"),
        (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2")),
    "diffusion_model.blocks.0.self_attn.q_proj": (  # Cosmos Predict 2, Anima
        (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."), (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
        (r"\.(attn\d)\.([qkv])_proj$", r".\1.to_\2"), (r"\.(attn\d)\.output_proj$", r".\1.to_out.0"),
        (r"^(blocks\.\d+)\.mlp\.layer1$", r"\1.ff.net.0.proj"), (r"^(blocks\.\d+)\.mlp\.layer2$", r"\1.ff.net.2"),
        (r"\.adaln_modulation_self_attn\.(\d)$", r".norm1.linear_\1"),
        (r"\.adaln_modulation_cross_attn\.(\d)$", r".norm2.linear_\1"),
        (r"\.adaln_modulation_mlp\.(\d)$", r".norm3.linear_\1"),
        (r"^final_layer\.adaln_modulation\.(\d)$", r"norm_out.linear_\1"), (r"^final_layer\.linear$", "proj_out"),
        (r"^x_embedder\.proj\.1$", "patch_embed.proj"), (r"^t_embedder\.1\.", "time_embed.t_embedder."),
        (r"^blocks\.", "transformer_blocks."))}
"""A name in ComfyUI's key map by which a family is known -> what diffusers calls its layers, which are the same ones,
layer for layer, and which ComfyUI does not know by these names."""
_APART = ((r"^transformer\.transformer_blocks\.(\d+)\.attn\.to_([qkv])$", r"transformer.double_blocks.\1.img_attn_\2"),
          (r"^transformer\.transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj$",
           r"transformer.double_blocks.\1.txt_attn_\2"))
"""q, k and v of HunyuanVideo in diffusers' names -> in those of musubi-tuner."""

_BY_HEAD = re.compile(r"^(token_refiner\.)?blocks\.\d+\.attn\.qkv_proj$")
"""Layers of MiniMax H3 whose rows DiffSynth has as they lie in the original checkpoint, q, k and v of one head after
those of another. ComfyUI, as all others, has q of all heads, then k, then v."""
_DIFFSYNTH = ".attn.qkv_proj.lora_B.default.weight"
HEAD = "diffusion_model.blocks.0.attn.q_norm.weight"
"""A weight of MiniMax H3 that is as long as one head is wide."""


def other_kind(keys: Collection[str]) -> Kind | None:
    """What a file is that is no LoRA, or of a kind that ComfyUI cannot load; None for all that may be a LoRA."""
    if keys and all(key.startswith("bundle_emb.") for key in keys):  # beside the layers of a LoRA, or alone
        return Kind("an embedding that came with a LoRA",
                    "put a copy of the file into models/embeddings, too, and name it in the prompt")
    for pattern, kind in _OTHERS:
        if any(re.search(pattern, key) for key in keys):
            return kind
    if len(keys) > 8 and any(key.endswith(".weight") for key in keys) and not any(
            re.search(_LORA, key) for key in keys):
        return Kind("a whole model or a part of one", "load it with 'Load Diffusion Model' or the loader of its kind")
    return None


def lora_format(keys: Collection[str]) -> tuple[str, str] | None:
    """(what, prefix) of the format that most keys are in; None for one that is not known here."""
    count, what, prefix = max((sum(key.startswith(prefix) for key in keys), what, prefix) for prefix, what in _PREFIXES)
    return (what, prefix) if 2 * count >= len(keys) else None


def host_names(model: nn.Module) -> dict:
    """The host's key map of a model (its base model), and for HunyuanVideo the names of diffusers, which are those of
    Flux, as its blocks are made of the same layers, and musubi-tuner's for q, k and v, which it has apart."""
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    if isinstance(model, comfy.model_base.HunyuanVideo):
        names = comfy.utils.flux_to_diffusers(model.model_config.unet_config, output_prefix="diffusion_model.")
        there = model.state_dict().keys()
        theirs = {f"transformer.{name.removesuffix('.weight')}": target for name, target in names.items()
                  if name.endswith(".weight") and (target if isinstance(target, str) else target[0]) in there}
        apart = {re.sub(own, name, layer): target for layer, target in theirs.items() for own, name in _APART}
        return {**theirs, **apart, **key_map}
    return key_map


def with_aliases(key_map: Mapping, keys: Collection[str], head: int = 0) -> Mapping:
    """The host's key map, with names of formats that it lacks where a file uses them: with another tool's prefix before
    the model's or diffusers' names, without any, diffusers' of today, without `processor`, and diffusers' of families
    that the host knows by their own names alone. The host's names win. Of a prefix with which most is foreign there are
    none.

    head   how wide a head of MiniMax H3 is; 0 for other models
    """
    bare = [""] if lora_format(keys) is None else []
    dotted = bare + [prefix for prefix in _DOTTED if any(key.startswith(prefix) for key in keys)]
    joined = [prefix for prefix in _JOINED if any(key.startswith(prefix) for key in keys)]
    renames = [table for layer, table in _DIFFUSERS.items() if layer in key_map]
    by_head = head and bare and any(key.endswith(_DIFFSYNTH) for key in keys)
    aliases = {}
    for name, target in key_map.items() if dotted or joined else ():
        own = next((own for own in (*_OWN, *_JOINED) if str(name).startswith(own)), None)
        if own in _JOINED:
            aliases |= {prefix + name.removeprefix(own): target for prefix in joined}
        elif own is not None:
            plain = re.sub(r"\.processor\.(to_out$)?", lambda found: ".to_out.0" if found[1] else ".",
                           name.removeprefix(own))
            for part in (plain, *(_renamed(plain, table) for table in renames)):
                aliases |= {prefix + part: target for prefix in dotted}
                aliases |= {prefix + part.replace(".", "_"): target for prefix in joined}
            aliases |= {prefix + own + plain: target for prefix in dotted}
            if by_head and _BY_HEAD.match(plain):
                aliases[plain] = (target, None, partial(_rows_by_kind, head))
    names = {**aliases, **key_map}
    foreign = tuple(prefix for prefix in (*dotted, *joined) if not _at_home(prefix, keys, names))
    return {**{name: target for name, target in aliases.items() if not name.startswith(foreign)}, **key_map}


def _at_home(prefix: str, keys: Iterable[str], names: Collection[str]) -> bool:
    """Whether at least a third of the keys with a prefix are of a layer that is here: families have names in common,
    and a file for another one would change some layers (Qwen-Image's attention is as large as that of Flux)."""
    mine = [key for key in keys if key.startswith(prefix)]
    return 3 * sum(any(layer in names for layer in _layers_of(key)) for key in mine) >= len(mine)


def _layers_of(key: str) -> Iterator[str]:
    """The names of which a key may be a tensor."""
    while key := key.rpartition(".")[0]:
        yield key.removesuffix("_lora")


def _renamed(layer: str, table: Iterable[tuple[str, str]]) -> str:
    """What diffusers calls a layer."""
    for own, theirs in table:
        layer = re.sub(own, theirs, layer)
    return layer


def _rows_by_kind(head: int, rows: Tensor) -> Tensor:
    """[heads * 3 * head, ...], q, k and v of one head after the other -> all q, then all k, then all v."""
    return rows.unflatten(0, (-1, 3, head)).transpose(0, 1).flatten(0, 2)
