"""The token streams of the host's families of film and sound: see `token_order` and `token_pictures`."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...engine.positions import Segment
from .token_streams import ROW, Family, ModelInputs, Streams, Tokens, joined, other, picture

# --- text beside the film, seen by cross-attention --------------------------------------------------------------------


def _wan(root: nn.Module, call: ModelInputs) -> Streams:
    """In the film's stream: a reference picture, the film, further frames, further references."""
    patch, target = root.patch_size, picture(call.shape(), root.patch_size)
    more = call.others("time_dim_concat", patch)
    ahead = call.others("reference_latent", patch) if getattr(root, "ref_conv", None) is not None else ()
    behind = call.others("context_latents", patch)
    return {**_wan_text(call), "img": ((*ahead, target, *more, *behind),), "film": ((target,),),
            "parts": ((target, *more), *((latent,) for latent in behind)), "ahead": (ahead,)}


def _wan_text(call: ModelInputs) -> Streams:
    """The attention to a picture's CLIP tokens, where there are none, is one more to the text."""
    return {"txt": ((call.text(),),), "clip": (other(call.length("clip_fea")) or (call.text(),),)}


def _wan_behind(root: nn.Module, call: ModelInputs) -> Streams:
    """Wan with sound: the reference picture comes after the film, and then what goes before it in time, in few tokens.
    """
    target, refs = picture(call.shape(), root.patch_size), call.others("reference_latent", root.patch_size)
    return {**_wan_text(call), "film": ((target,),), "parts": ((target,), refs),
            "img": ((target, *refs, *_packed(root, call.conds.get("reference_motion"))),)}


def _packed(root: nn.Module, motion: Tensor | None) -> Tokens:
    """The film before a film: the farther back, the more frames and places are in one token."""
    if motion is None:
        return ()
    packer, (height, width) = root.frame_packer, motion.shape[-2:]
    each = zip(packer.zip_frame_buckets, (packer.proj, packer.proj_2x, packer.proj_4x), strict=True)
    return other(sum((frames // t) * (height // h) * (width // w) for frames, layer in each
                     for t, h, w in [layer.kernel_size]))


def _wan_scail(root: nn.Module, call: ModelInputs) -> Streams:
    """Reference frames, the film, and a smaller film of poses."""
    target, patch = picture(call.shape(), root.patch_size), root.patch_size
    film = (*call.others("reference_latent", patch), target)
    poses = call.others("pose_latents", patch)
    return {**_wan_text(call), "film": (film, poses), "parts": (film,), "img": ((*film, *poses),)}


WAN_LAYERS = (
    (ROW, r"time_(embedding|projection)\..*"), ("ahead", r"ref_conv"), ("parts", r"patch_embedding(_global)?"),
    ("film", r"vace_patch_embedding|patch_embedding_mask|cond_encoder"), ("clip", r"img_emb\..*|.*\.(norm_)?[kv]_img"),
    ("txt", r"text_embedding\..*|(vace_)?blocks\.\d+\.cross_attn\.(norm_k|k|v)"),
    ("open", r".*\.audio_cross_attn\.(norm_k|k|v)"), ("img", r"blocks\..*|head\..*|head_global\..*"),
    ("film", r"vace_blocks\..*"))
WAN, WAN_BEHIND, WAN_SCAIL = (Family(streams, WAN_LAYERS) for streams in (_wan, _wan_behind, _wan_scail))


def _ltx(root: nn.Module, call: ModelInputs) -> Streams:
    """Guiding frames stand after the film; of those that are smaller than it, only the places that they have. These
    the host tells by their masks, and reads in every call itself."""
    size, guides = call.shape(), call.conds.get("keyframe_idxs")
    target = picture(size, 1)
    img: Tokens = (target,)
    if guides is not None and guides.shape[2]:
        frames = size[0] - guides.shape[2] // math.prod(size[1:])
        mask = call.conds.get("denoise_mask")
        own = guides.shape[2] if mask is None else int((mask[0] >= 0).all(0).flatten()[-guides.shape[2]:].sum())
        img = (picture((frames, *size[1:]), 1), *other(own))
    streams = {"img": (img,), "txt": ((call.text(),),)}
    if not isinstance(call.x, (list, tuple)) or len(call.x) < 2:
        return streams
    sound, spoken = other(call.shape(1)[0]), (call.conds.get("ref_audio") or {}).get("tokens")
    heard = sound if spoken is None else other(spoken.shape[1]) + sound
    return {**streams, "sound": (heard,), "out": (sound, heard)}


LTX = Family(_ltx, (
    (ROW, r"\w*adaln_single\..*"), ("open", r"\w+_connector\..*"),
    ("txt", r"(audio_)?caption_projection\..*|.*\.(audio_)?attn2\.(to_[kv]|k_norm)"), ("out", r"audio_(norm|proj)_out"),
    ("sound", r"audio_patchify_proj|.*\.audio_(attn\d|ff)\..*|.*\.video_to_audio_attn\.(to_(q|out|gate).*|q_norm)"
              r"|.*\.audio_to_video_attn\.(to_[kv]|k_norm)"),
    ("img", r"patchify_proj|norm_out|proj_out|transformer_blocks\..*")))


def _cosmos(root: nn.Module, call: ModelInputs) -> Streams:
    target = picture(call.shape(), (root.patch_temporal, root.patch_spatial, root.patch_spatial))
    streams = {"img": ((target,),)}  # Anima makes its text of ids where it gets any
    return streams if call.conds.get("t5xxl_ids") is not None else {**streams, "txt": ((call.text(),),)}


COSMOS = Family(_cosmos, (
    (ROW, r"t_embedder\..*|t_embedding_norm|.*adaln_modulation\w*\..*"), ("open", r"llm_adapter\..*"),
    ("txt", r".*\.cross_attn\.(k_proj|v_proj|k_norm)"), ("img", r"x_embedder\..*|blocks\..*|final_layer\..*")))


def _kandinsky(root: nn.Module, call: ModelInputs) -> Streams:
    return joined((call.text(),), (picture(call.shape(), root.patch_size),))


KANDINSKY = Family(_kandinsky, (
    (ROW, r"(time|pooled_text)_embeddings\..*|.*modulation\.out_layer"),
    ("txt", r"text_embeddings\..*|text_transformer_blocks\..*|.*\.cross_attention\.(to_key|to_value|key_norm)"),
    ("img", r"visual_embeddings\..*|visual_transformer_blocks\..*|out_layer\..*")))

# --- text and film in one attention -----------------------------------------------------------------------------------


def _hunyuan(root: nn.Module, call: ModelInputs) -> Streams:
    """Vision tokens first; signs (ByT5) before the prompt in version 1.5 and after it elsewhere; a reference before the
    film. Releases that tell patches where the film lies have the text before it, older ones behind."""
    prompt = call.text()
    signs = other(call.length("txt_byt5")) if root.byt5_in is not None else ()
    seen = other(call.length("clip_fea")) if getattr(root, "vision_in", None) is not None else ()
    first = getattr(root, "cond_type_embedding", None) is not None
    text = (*seen, *signs, prompt) if first else (*seen, prompt, *signs)
    target, refs = picture(call.shape(), tuple(root.patch_size)), call.others("ref_latent", tuple(root.patch_size))
    streams = joined(text, (*refs, target))
    if "img_slice" not in type(root).forward_orig.__code__.co_consts:
        streams["joint"] = ((*refs, target, *text),)
    return {**streams, "prompt": ((prompt,),), "signs": (signs,), "seen": (seen,), "target": ((target,),),
            "parts": ((target,), refs)}


HUNYUAN = Family(_hunyuan, (
    (ROW, r"(time|time_r|vector|guidance)_in\..*|txt_in\.[tc]_embedder\..*|.*(adaLN_modulation\.1|mod(ulation)?\.lin)"),
    ("parts", r"img_in\.proj"), ("signs", r"byt5_in\..*"), ("seen", r"vision_in\..*"), ("prompt", r"txt_in\..*"),
    ("txt", r"double_blocks\.\d+\.txt_.*"), ("img", r"double_blocks\.\d+\.img_.*"), ("joint", r"single_blocks\..*"),
    ("target", r"final_layer\..*")))


def _mochi(root: nn.Module, call: ModelInputs) -> Streams:
    return joined((call.text(),), (picture(call.shape(), root.patch_size),))


MOCHI = Family(_mochi, (
    (ROW, r"t_embedder\..*|t5_y_embedder\.to_(q|out)|blocks\.\d+\.mod_[xy]|final_layer\.mod"),
    ("open", r"t5_y_embedder\.to_kv|x_embedder\.proj"), ("txt", r"t5_yproj|blocks\.\d+\.(attn\.|mlp)\w*_y.*"),
    ("img", r"blocks\..*|final_layer\..*")))


def _cogvideo(root: nn.Module, call: ModelInputs) -> Streams:
    target = picture(call.shape(), (root.patch_size_t or 1, root.patch_size, root.patch_size))
    streams = joined((call.text(),), (target,))
    return {**streams, "parts": streams["txt"] + streams["img"]}


COGVIDEO = Family(_cogvideo, (
    (ROW, r"(time|ofs)_embedding_linear_\d|.*norm(\d|_out)\.linear"), ("txt", r"patch_embed\.text_proj"),
    ("parts", r"blocks\.\d+\.norm\d\.norm"), ("joint", r"blocks\..*"), ("img", r"norm_final|norm_out\.norm|proj_out")))


def _minimax(root: nn.Module, call: ModelInputs) -> Streams:
    """Text, references, sound and film in one run of tokens; the host works the order out once per sampling."""
    target = picture(call.shape(), tuple(root.patch_size))
    sound, text = 2 * call.shape(1)[-1], call.text()
    payload = call.conds.get("minimax_payload") or {}
    layout = payload.get("layout")
    if layout is None and (payload.get("refs") or payload.get("keyframes")):
        return {}
    kinds = [("text", text.count), ("audio", sound), ("video", target.count)]
    if layout is not None:
        kinds = [(kind, stop - start) for start, stop, kind in layout.segments]
    made = {"text": text, "video": target}
    joint = tuple(made.get(kind, Segment("other", count)) for kind, count in kinds)
    if any(segment.count != count for segment, (_, count) in zip(joint, kinds, strict=True)):
        return {}
    film = tuple(s for s, (kind, _) in zip(joint, kinds, strict=True) if kind in ("cond", "ref_img", "video"))
    heard = sum(count for kind, count in kinds if "audio" in kind)
    return {"joint": (joint,), "txt": ((text,),), "img": (film,), "sound": (other(heard),), "film": ((target,),),
            "made": ((target,), other(sound))}


MINIMAX = Family(_minimax, (
    (ROW, r"time_embedder\..*|.*adaln_proj\..*"), ("img", r"video_patch_proj"), ("sound", r"audio_patch_proj"),
    ("txt", r"condition_proj|token_refiner\..*"), ("joint", r"blocks\..*"), ("made", r"final_layer\.norm"),
    ("film", r"final_layer\.video_out"), ("made", r"final_layer\.audio_out")), axis=0)

FILMS = {
    "wan.model.WanModel": WAN,
    "wan.model.VaceWanModel": WAN,
    "wan.model.CameraWanModel": WAN,
    "wan.model_animate.AnimateWanModel": WAN,
    "wan.model_wandancer.WanDancerModel": WAN,
    "wan.model.HumoWanModel": WAN_BEHIND,
    "wan.model.WanModel_S2V": WAN_BEHIND,
    "wan.model.SCAILWanModel": WAN_SCAIL,
    "lightricks.model.LTXVModel": LTX,
    "lightricks.av_model.LTXAVModel": LTX,
    "cosmos.predict2.MiniTrainDIT": COSMOS,
    "anima.model.Anima": COSMOS,
    "kandinsky5.model.Kandinsky5": KANDINSKY,
    "hunyuan_video.model.HunyuanVideo": HUNYUAN,
    "genmo.joint_model.asymm_models_joint.AsymmDiTJoint": MOCHI,
    "cogvideo.model.CogVideoXTransformer3DModel": COGVIDEO,
    "minimax.model.MiniMaxH3Model": MINIMAX,
}
"""Module below comfy.ldm and class -> family."""
