"""Nodes of others, as they change a MODEL: small ones of the same contract, which are always there, and ComfyUI's own.
`neighbour_packs` has the packs themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import nn

OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class Neighbour:
    """A node.

    make       MODEL -> MODEL, as its node does
    family     of the model that it is for
    tolerance  of several branches in one batch, where it takes a mean over all rows of it
    cfg        that it is meant for
    """

    make: Callable
    family: str = "SD15"
    tolerance: float = 1e-3
    cfg: float = 3.0


def sparse(model):
    """Attention to every second token alone, as sparse kernels come: an override that looks at nothing else."""
    model = model.clone()

    def override(func, q, k, v, heads, *args, **kwargs):
        return func(q, k[..., ::2, :], v[..., ::2, :], heads, *args, **{**kwargs, "mask": None})

    model.model_options["transformer_options"][OVERRIDE] = override
    return model


def coarse(model):
    """Attention with coarse queries and keys, as quantizing kernels (SageAttention) compute it."""
    model = model.clone()

    def override(func, q, k, v, heads, *args, **kwargs):
        return func(*((t * 4).round() / 4 for t in (q, k)), v, heads, *args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = override
    return model


def cross_attentions(model) -> dict[tuple, nn.Module]:
    """Where the small U-Net's cross attentions are, as patches name the place."""
    root, found = model.model.diffusion_model, {}
    for part, blocks in (("input", root.input_blocks), ("middle", [root.middle_block]), ("output", root.output_blocks)):
        for number, block in enumerate(blocks):
            for layer in block:
                if hasattr(layer, "transformer_blocks"):
                    found[part, 1 if part == "middle" else number] = layer.transformer_blocks[0].attn2
    return found


def picture_prompt(model, replaces: Callable[[nn.Module], Callable]):
    """A second cross attention beside the first one, for the tokens of a picture, as IP-Adapter adds it."""
    attentions, model = cross_attentions(model), model.clone()
    for place, attention in attentions.items():
        model.set_model_attn2_replace(replaces(attention), *place)
    return model


def ip_adapter(model):
    """The positive sees a picture, the negative an empty one: known by `cond_or_uncond`."""
    from comfy.ldm.modules.attention import optimized_attention

    def replaces(attention: nn.Module) -> Callable:
        made = torch.Generator().manual_seed(attention.to_k.out_features)
        keys, values = (torch.randn(2, 4, attention.to_k.out_features, generator=made) for _ in range(2))

        def replaced(q, k, v, options):
            of = [index for index in options["cond_or_uncond"] for _ in range(len(q) // len(options["cond_or_uncond"]))]
            return optimized_attention(q, k, v, options["n_heads"]) + optimized_attention(
                q, keys[of].to(q), values[of].to(q), options["n_heads"])

        return replaced

    return picture_prompt(model, replaces)


def attention_forward(model):
    """An attention whose forward is an object patch, as KJNodes' NAG and Enhance-A-Video have it."""
    model, name = model.clone(), "middle_block.1.transformer_blocks.0.attn2"
    attention = model.model.diffusion_model.get_submodule(name)
    whole = type(attention).forward

    def forward(x, context=None, **kwargs):
        return whole(attention, x, context, **kwargs) + 0.5 * whole(attention, x, context.flip(1) * 1.5, **kwargs)

    model.add_object_patch(f"diffusion_model.{name}.forward", forward)
    return model


def output_blocks(model):
    """What FreeU and its like do."""
    model = model.clone()
    model.set_model_output_block_patch(lambda h, skip, options: (h * 1.1, skip * 0.8))
    return model


def by_sides(mark: str, switch: str, every: int = 3) -> Callable:
    """A node that leaves out model calls as TeaCache and MagCache do: it patches the model's forward while a function
    wrapper runs, and keeps on the model, for each side of guidance, what the forward added to its input."""
    def make(model):
        model = model.clone()
        root = model.model.diffusion_model
        whole = root.forward

        def forward(x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
            indexes = transformer_options["cond_or_uncond"]
            state = root.__dict__.setdefault("kept_by_sides", {})
            rows = len(x) // len(indexes)
            skip = transformer_options[switch] and all(state.get(k, (0, None))[0] % every for k in indexes)
            if skip:
                out = torch.cat([x[i * rows:(i + 1) * rows] + state[k][1] for i, k in enumerate(indexes)])
            else:
                out = whole(x, timesteps, context, y, control=control, transformer_options=transformer_options,
                            **kwargs)
            for i, k in enumerate(indexes):
                rest = (out - x)[i * rows:(i + 1) * rows]
                state[k] = (state[k][0] + 1, state[k][1]) if skip else (1, rest)
            return out

        def wrapper(apply, args):
            options = args["c"]["transformer_options"]
            options[switch] = True
            if args["timestep"][0] == options["sample_sigmas"][0]:
                root.__dict__.pop("kept_by_sides", None)  # a run begins
            with patch.multiple(root, forward=forward):
                return apply(args["input"], args["timestep"], **args["c"])

        model.model_options["transformer_options"][mark] = 0.1
        model.set_model_unet_function_wrapper(wrapper)
        return model

    return make


class Kept:
    """What First Block Cache keeps, for each call of a step by its place among them."""

    def __init__(self):
        self.buffers: dict[str, list] = {}
        self.sequence_num = 0
        self.use_cache = False

    def clear_buffers(self) -> None:
        self.sequence_num = 0
        self.buffers.clear()


_kept = Kept()


def get_current_cache_context() -> Kept:
    """By this name and these members First Block Cache (Comfy-WaveSpeed) has it."""
    return _kept


class FirstBlock(nn.Module):
    """All blocks in the place of the first: of three calls two add what the blocks behind the first added before,
    whatever they are."""

    def __init__(self, double: nn.ModuleList, single: nn.ModuleList):
        super().__init__()
        self.doubles, self.singles, self.hits = double, single, 0

    def forward(self, img, txt, **kwargs):
        img, txt = self.doubles[0](img=img, txt=txt, **kwargs)
        kept = get_current_cache_context()
        place, values = kept.sequence_num, kept.buffers.setdefault("rest", [])
        values += [None] * (place + 1 - len(values))
        like = values[place] is not None and values[place].shape == img.shape
        if place:
            kept.use_cache &= like
        elif like:
            kept.use_cache = self.hits < 2
            self.hits = self.hits + 1 if kept.use_cache else 0
        if like and kept.use_cache:
            return img + values[place], txt
        out, text = img, txt
        for block in self.doubles[1:]:
            out, text = block(img=out, txt=text, **kwargs)
        whole = torch.cat((text, out), 1)
        for block in self.singles:
            whole = block(whole, **kwargs)
        values[place] = whole[:, text.shape[1]:] - img
        return img + values[place], txt


def first_block(model):
    """First Block Cache, as it does it with models that it knows nothing of but the names of their lists of blocks."""
    model = model.clone()
    root, seen = model.model.diffusion_model, {"sigma": None}
    blocks, none = nn.ModuleList([FirstBlock(root.double_blocks, root.single_blocks)]), nn.ModuleList()

    def wrapper(apply, args):
        sigma, kept = float(args["timestep"][0]), get_current_cache_context()
        if seen["sigma"] is None or sigma > seen["sigma"]:
            kept.clear_buffers()
            blocks[0].hits = 0
        elif sigma == seen["sigma"]:
            kept.sequence_num += 1
        else:
            kept.sequence_num = 0
        seen["sigma"] = sigma
        with patch.object(root, "double_blocks", blocks), patch.object(root, "single_blocks", none):
            return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


def easy_cache(model, node: str = "EasyCacheNode"):
    """With a threshold at which it leaves out all steps that it can."""
    nodes = pytest.importorskip("comfy_extras.nodes_easycache")
    return getattr(nodes, node).execute(model, 3.0, 0.0, 1.0, False)[0]


def core(module: str, node: str, *arguments) -> Callable:
    """A node of ComfyUI's own, from one of its modules of extras."""
    def make(model):
        made = getattr(pytest.importorskip(f"comfy_extras.{module}"), node, None)
        if made is None:
            pytest.skip(f"this ComfyUI has no {node}")
        return (made.execute if hasattr(made, "execute") else getattr(made(), made.FUNCTION))(model, *arguments)[0]

    return make


STAND_INS = {
    "a sparse attention": Neighbour(sparse),
    "a sparse attention, Flux": Neighbour(sparse, "Flux"),
    "a coarse attention": Neighbour(coarse, "Wan"),
    "a picture prompt": Neighbour(ip_adapter),
    "another attention's forward": Neighbour(attention_forward),
    "output blocks": Neighbour(output_blocks),
}
"""Nodes that keep nothing from call to call."""

FIRST_OF_A_SIDE = {
    "NAGuidance": Neighbour(core("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5)),
    "NAGuidance, Flux": Neighbour(core("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5), "Flux"),
    "SelfAttentionGuidance": Neighbour(core("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0)),
}
"""ComfyUI's own nodes that patch the first cond of each side in a batch."""


SKIPPING = {
    "EasyCache": Neighbour(easy_cache, "Flux"),
    "TeaCache": Neighbour(by_sides("rel_l1_thresh", "enable_teacache")),
    "MagCache": Neighbour(by_sides("magcache_thresh", "enable_magcache")),
    "First Block Cache": Neighbour(first_block, "Flux"),
}
"""Nodes that leave out model calls. EasyCache is ComfyUI's own."""
