"""Which entries of a layer's input belong to which row of a batch, for the model families of the host that keep rows
apart. Read out of the host's forwards, and held against small models by tests that disturb every layer's entries."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from torch import nn

Entry = TypeVar("Entry")
RowOrder = Callable[[str, int, int], "str | None"]
"""(layer, entries, rows) -> whose entry e is: "rows": row e's; "repeat": row e // (entries / rows)'s; "tile": row
e % rows's; None: nobody knows. `layer` is a name below the diffusion model, `entries` the size of dimension 0 of the
layer's input, `rows` (2 or more) that of the batch."""


@dataclass(frozen=True)
class Layers:
    """The layers of a family that do not see one entry per row, as regular expressions for their whole names.

    repeat  what belongs to a row stands together: frames, windows, patches or tokens are folded inside it
    tile    the whole batch comes several times, one after the other
    never   entries are no rows: tokens of several rows together, frames in front of rows, parts of a batch
    """

    repeat: str = ""
    tile: str = ""
    never: str = ""


PLAIN = Layers()
TIMES = r"time_embedding\..*"
"""Wan: a time for every frame."""
PIXELS = Layers(repeat=r"pixel_blocks\..*|final_layer\..*", never=r"pixel_blocks\.\d+\.mlp\..*")
"""Patches folded inside rows, and two halves of them one after the other."""
LUMINA_TIMES = r"t_embedder\..*|time_text_embed\..*|.*adaLN_modulation\..*"
LTX = Layers(repeat=r"\w*adaln_single\..*")
"""A time for every frame or token."""

FAMILIES = {
    "modules.diffusionmodules.openaimodel.UNetModel": PLAIN,
    "cascade.stage_c.StageC": PLAIN,
    "cascade.stage_b.StageB": PLAIN,
    # [t, t * 0]: times of the picture, and of reference pictures, which have none
    "flux.model.Flux": Layers(tile=r"time_in\..*"),
    "qwen_image.model.QwenImageTransformer2DModel": Layers(
        tile=r"time_text_embed\..*|transformer_blocks\.\d+\.img_mod\..*"),
    "lumina.model.NextDiT": Layers(tile=LUMINA_TIMES),
    "lumina.model.NextDiTPixelSpace": Layers(repeat=r"dec_net\..*", tile=LUMINA_TIMES),
    "krea2.model.SingleStreamDiT": Layers(repeat=r"txtfusion\.layerwise_blocks\..*"),
    "chroma.model.Chroma": PLAIN,
    "chroma_radiance.model.ChromaRadiance": Layers(never=r"nerf_(image_embedder|blocks)\..*"),  # tiles
    "mage_flow.model.MageFlowTransformer2DModel": PLAIN,
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": PLAIN,
    "aura.mmdit.MMDiT": PLAIN,
    "hydit.models.HunYuanDiT": Layers(repeat=r"mlp_t5\..*", never=r"pooler\..*"),
    "lens.model.LensTransformer2DModel": PLAIN,
    "joyimage.model.JoyImageTransformer3DModel": PLAIN,
    "hidream.model.HiDreamImageTransformer2DModel": Layers(never=r".*\.experts\..*"),
    "ernie.model.ErnieImageModel": PLAIN,
    "ideogram4.model.Ideogram4Transformer2DModel": PLAIN,
    "omnigen.omnigen2.OmniGen2Transformer2DModel": PLAIN,
    "boogu.model.BooguTransformer2DModel": PLAIN,
    "pixart.pixartms.PixArtMS": Layers(repeat=r"(csize|ar)_embedder\..*", never=r".*\.cross_attn\.kv_linear"),
    "pixeldit.model.PixDiT_T2I": PIXELS,
    "pixeldit.pid.PidNet": PIXELS,
    "wan.model.WanModel": Layers(repeat=TIMES),
    "wan.model.VaceWanModel": Layers(tile=r"vace_patch_embedding"),  # one control video after the other
    "wan.model.CameraWanModel": Layers(repeat=r"control_adapter\..*"),
    "wan.model.HumoWanModel": Layers(repeat=rf"{TIMES}|audio_proj\..*"),
    "wan.model.WanModel_S2V": Layers(repeat=rf"{TIMES}|casual_audio_encoder\..*|audio_injector\..*"),
    "wan.model.SCAILWanModel": Layers(repeat=TIMES),
    "wan.model_animate.AnimateWanModel": Layers(repeat=TIMES, never=r"(motion|face)_encoder\..*|face_adapter\..*"),
    "wan.model_wandancer.WanDancerModel": Layers(repeat=rf"{TIMES}|music_injector\..*"),
    "hunyuan_video.model.HunyuanVideo": PLAIN,
    "genmo.joint_model.asymm_models_joint.AsymmDiTJoint": Layers(repeat=r"x_embedder\.proj"),
    "lightricks.model.LTXVModel": LTX,
    "lightricks.av_model.LTXAVModel": LTX,
    "cosmos.predict2.MiniTrainDIT": PLAIN,
    "anima.model.Anima": PLAIN,
    "kandinsky5.model.Kandinsky5": PLAIN,
    "cogvideo.model.CogVideoXTransformer3DModel": Layers(repeat=r"patch_embed\.proj"),
    "audio.dit.AudioDiffusionTransformer": PLAIN,
    "ace.model.ACEStepTransformer2DModel": PLAIN,
    "hunyuan3d.model.Hunyuan3Dv2": PLAIN,
    "triposplat.model.LatentSeqMMFlowModel": PLAIN,
}
"""Module below comfy.ldm and class of a diffusion model -> its layers. What is not here mixes rows or was never tried:
SVD (time layers run over the frames of a batch), Cosmos 1 (time, height and width before rows), MiniMax H3 (no batch
at all), Wan-Animate 2 (keeps its pose branch for one row between calls), ACE-Step 1.5 (gathers all rows' timbres in
one), Hunyuan3D 2.1 and SeedVR2 (swap the halves of a batch), HiDream-O1 (keeps keys and values between calls), Wan's
autoregressive form (likewise), Trellis 2 (all rows' places in one), MiniMax Music."""


def row_order(diffusion_model: nn.Module) -> RowOrder | None:
    """How the layers of a diffusion model order the rows of a batch. None: not known for this family, so that rows of
    different branches must not share a batch.

    A class derived from one in the table counts as that one as long as it defines no forward of its own.
    """
    layers = family_entry(diffusion_model, FAMILIES)
    if layers is None:
        return None
    repeat, tile, never = (re.compile(pattern) for pattern in (layers.repeat, layers.tile, layers.never))

    @cache
    def order(layer: str, entries: int, rows: int) -> str | None:
        if entries % rows or never.fullmatch(layer):
            return None
        if entries == rows:
            return "rows"
        return "repeat" if repeat.fullmatch(layer) else "tile" if tile.fullmatch(layer) else None

    return order


def family_entry(diffusion_model: nn.Module, table: Mapping[str, Entry]) -> Entry | None:
    """What a table, by module below comfy.ldm and class, has for a model of one of its classes or of one derived from
    them without a forward of its own; nothing for U-Nets of films, whose rows are frames."""
    if getattr(diffusion_model, "use_temporal_resblocks", False):
        return None
    for cls in type(diffusion_model).__mro__:
        if cls.__module__.startswith("comfy.ldm."):
            found = table.get(f"{cls.__module__.removeprefix('comfy.ldm.')}.{cls.__name__}")
            if found is not None:
                return found
        if any("forward" in name for name in vars(cls)):
            return None
    return None


def one_row_only(diffusion_model: nn.Module, conds: Mapping[str, object]) -> bool:
    """Whether a call with these conds (values by the names that the diffusion model takes them under) is one that the
    host's own forward makes for a single row: with more it raises, or adds one row's guidance to another's tokens."""
    kind = family_entry(diffusion_model, {"flux.model.Flux": "flux", "hunyuan_video.model.HunyuanVideo": "hunyuan"})
    if kind == "flux":
        params = diffusion_model.params
        method = conds.get("ref_latents_method", getattr(params, "default_ref_method", None))
        zero = bool(conds.get("ref_latents")) and method == "index_timestep_zero"
        return zero and params.guidance_embed and conds.get("guidance") is not None
    return kind == "hunyuan" and any(conds.get(name) is not None for name in ("ref_latent", "guiding_frame_index"))
