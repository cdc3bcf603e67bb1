"""The token streams of the host's families of pictures, and which of their layers see which: see `token_order`.

Read out of the host's forwards, and held against small models by tests that move one place of the picture, one token of
the text or a reference, and look which tokens of every layer move with it.
"""

from __future__ import annotations

from torch import nn

from ...engine.positions import Segment
from .token_streams import ANY_SIZE, ROW, Family, ModelInputs, Streams, Tokens, joined, other, padded, picture

# --- U-Nets -----------------------------------------------------------------------------------------------------------


def _unet(root: nn.Module, call: ModelInputs) -> Streams:
    """A level is half as large as the one above, rounded up. In the x4 upscaler some layers for the picture's attention
    to itself see the text."""
    sizes, size = [], call.shape()
    for _ in root.channel_mult:
        sizes.append(size)
        size = tuple(-(-n // 2) for n in size)
    img = tuple((picture(size, 1),) for size in sizes)
    text = (call.text(),)
    seen = (text,) if any(getattr(each, "disable_self_attn", False) for each in root.modules()) else ()
    return {"img": img + seen, "txt": (text,), ANY_SIZE: img[:1]}


UNET = Family(_unet, ((ROW, r"time_embed\..*|label_emb\..*|.*\.emb_layers\..*"), ("txt", r".*\.attn2\.to_[kv]"),
                      ("img", r"(input_blocks|middle_block|output_blocks|out)\..*")))


# --- text and picture in streams of their own, then in one ------------------------------------------------------------


def _flux(root: nn.Module, call: ModelInputs) -> Streams:
    patch = root.patch_size
    target = picture(call.shape(), patch)
    streams = joined((call.text(),), (target, *call.others("ref_latents", patch)))
    return {**streams, "target": ((target,),)}


FLUX = Family(_flux, (
    (ROW, r"(time|vector|guidance)_in\..*|.*mod(ulation\w*)?\.(lin|1)|distilled_guidance_layer\..*"),
    ("img", r"img_in|double_blocks\.\d+\.img_.*|final_layer\..*"), ("target", r"img_in_patch"),
    ("txt", r"txt_in|txt_norm|double_blocks\.\d+\.txt_.*"), ("joint", r"single_blocks\..*")))


def _qwen(root: nn.Module, call: ModelInputs) -> Streams:
    patch = getattr(root, "patch_size", 1)
    return joined((call.text(),), (picture(call.shape(), patch), *call.others("ref_latents", patch)))


QWEN = Family(_qwen, (
    (ROW, r"time_text_embed\..*|.*_mod\.1|norm_out\.linear"),
    ("txt", r"txt_(norm|in).*|.*\.(txt_(norm\d|mlp|qkv).*|add_\w_proj|norm_added_\w|to_add_out)"),
    ("img", r"img_in|norm_out\.norm|proj_out|transformer_blocks\..*")))


def _joy(root: nn.Module, call: ModelInputs) -> Streams:
    target, refs = picture(call.shape(), root.patch_size), call.others("ref_latents", root.patch_size)
    return {**joined((call.text(),), (target, *refs)), "target": ((target,),),
            "parts": ((target,), *((ref,) for ref in refs))}


JOY = Family(_joy, ((ROW, r"condition_embedder\.time_.*"), ("parts", r"img_in"), ("target", r"norm_out|proj_out"),
                    ("txt", r"condition_embedder\.text_.*|double_blocks\.\d+\.(attn\.)?txt_.*"),
                    ("img", r"double_blocks\..*")))


def _sd3(root: nn.Module, call: ModelInputs) -> Streams:
    text = other(getattr(root, "register_length", 0)) + (call.text(),)
    return {**joined(text, (picture(call.shape(), root.patch_size),)), "prompt": ((call.text(),),)}


SD3 = Family(_sd3, ((ROW, r"[ty]_embedder\..*|.*adaLN_modulation\..*"), ("prompt", r"context_embedder"),
                    ("txt", r"joint_blocks\.\d+\.context_block\..*"),
                    ("img", r"x_embedder\.proj|joint_blocks\.\d+\.x_block\..*|final_layer\..*")))


def _aura(root: nn.Module, call: ModelInputs) -> Streams:
    text = other(root.register_tokens.shape[1]) + (call.text(),)
    return {**joined(text, (picture(call.shape(), root.patch_size),)), "prompt": ((call.text(),),)}


AURA = Family(_aura, ((ROW, r"t_embedder\..*|.*\.mod(C|X|CX)\.1|modF\.1"), ("prompt", r"cond_seq_linear"),
                      ("txt", r"double_layers\.\d+\.(attn\.(w1.|[qk]_norm1)|normC\d|mlpC\..*)"),
                      ("img", r"init_x_linear|final_linear|double_layers\..*"), ("joint", r"single_layers\..*")))


def _hunyuan_dit(root: nn.Module, call: ModelInputs) -> Streams:
    text = call.text(), call.text("encoder_hidden_states_t5")
    return joined(text, (picture(call.shape(), root.patch_size),))


HUNYUAN_DIT = Family(_hunyuan_dit, (
    (ROW, r"(t|extra)_embedder\..*|pooler\..*|.*\.default_modulation\.1|.*adaLN_modulation\.1"),
    ("txt", r"blocks\.\d+\.attn2\.(kv_proj|k_norm)"), ("img", r"x_embedder\.proj|blocks\..*|final_layer\..*")))


LLAMA = "encoder_hidden_states_llama3"


def _hidream(root: nn.Module, call: ModelInputs) -> Streams:
    """The picture stands first; the text three times, once by T5 and twice by Llama."""
    target, t5 = picture(call.shape(), root.patch_size), call.text()
    llama = Segment("text", call.conds[LLAMA].shape[2], source=LLAMA)
    text = (t5, llama, llama)
    return {"img": ((target,),), "txt": (text,), "joint": ((target, *text),), "parts": ((t5,), (llama,))}


HIDREAM = Family(_hidream, (
    (ROW, r"[tp]_embedder\..*|.*adaLN_modulation\..*"), ("parts", r"caption_projection\..*"),
    ("open", r".*\.experts\..*"), ("txt", r"double_stream_blocks\.\d+\.block\.(attn1\.\w+_t|norm\d_t|ff_t\..*)"),
    ("img", r"x_embedder\.proj|double_stream_blocks\..*|final_layer\..*"), ("joint", r"single_stream_blocks\..*")))


def _pixeldit(root: nn.Module, call: ModelInputs) -> Streams:
    text = Segment("text", min(call.length("context"), root.txt_max_length))
    patch = root.patch_size
    return {**joined((text,), (picture(call.shape(), patch),)),
            "pixels": ((picture(padded(call.shape(), patch), 1),),)}


PIXELDIT = Family(_pixeldit, (
    (ROW, r"t_embedder\..*|patch_blocks\.\d+\.adaLN_.*"), ("pixels", r"pixel_embedder\.proj"),
    ("txt", r"y_embedder\..*|patch_blocks\.\d+\.(attn\.)?(norm|mlp|qkv|proj|[qk]_norm)_y.*"),
    ("img", r"s_embedder\..*|patch_blocks\..*|pixel_blocks\.\d+\.attn\..*|lq_proj\.gate_modules\..*")))


# --- one stream -------------------------------------------------------------------------------------------------------


def _lumina(root: nn.Module, call: ModelInputs) -> Streams:
    """Prompts of references and the prompt, then their vision tokens, then references and the picture, all padded."""
    pad = getattr(root, "pad_tokens_multiple", None) or 1

    def whole(segment: Segment) -> Tokens:
        return (segment, *other(-segment.count % pad))

    target, refs = picture(call.shape(), root.patch_size), call.others("ref_latents", root.patch_size)
    prompts = [Segment("other", prompt.shape[1]) for prompt in call.conds.get("ref_contexts") or []]
    seen = [Segment("other", feats.shape[1] * feats.shape[2]) for feats in call.conds.get("siglip_feats") or []]
    ahead, behind = prompts[:len(refs)], prompts[len(refs):]
    if len(ahead) < len(refs):  # a reference without a prompt has one of padding alone
        ahead += [Segment("other", pad)] * (len(refs) - len(ahead))
    text = sum(map(whole, (*ahead, call.text(), *behind)), ())
    img = sum(map(whole, (*refs, target)), ())
    vision = sum(map(whole, seen), ())
    if refs and getattr(root, "siglip_pad_token", None) is not None:  # and one of padding for each that was not seen
        vision += other(pad * (len(refs) + 1 - len(seen)))
    return {"txt": (text,), "img": (img,), "joint": (text + vision + img,),
            "prompt": ((call.text(),), *((prompt,) for prompt in prompts)),
            "parts": ((target,), *((ref,) for ref in refs)), "seen": tuple((s,) for s in seen), "vision": (vision,)}


LUMINA = Family(_lumina, (
    (ROW, r"t_embedder\..*|time_text_embed\..*|clip_text_pooled_proj\..*|.*adaLN_modulation\..*"),
    ("prompt", r"cap_embedder\..*"), ("parts", r"x_embedder"), ("seen", r"siglip_embedder\..*"),
    ("vision", r"siglip_refiner\..*"), ("txt", r"context_refiner\..*"),
    ("img", r"noise_refiner\..*"), ("joint", r"layers\..*|final_layer\..*")))


def _krea(root: nn.Module, call: ModelInputs) -> Streams:
    target, refs = picture(call.shape(), root.patch), ()
    if call.conds.get("ref_latents_method", root.default_ref_method) is not None:
        refs = call.others("ref_latents", root.patch)
    return joined((call.text(),), (target, *refs))


KREA = Family(_krea, ((ROW, r"tmlp\..*|tproj\..*"), ("img", r"first"), ("joint", r"blocks\..*|last\.linear"),
                      ("txt", r"txtfusion\.refiner_blocks\..*|txtmlp\..*")))


def _ernie(root: nn.Module, call: ModelInputs) -> Streams:
    target = picture(call.shape(), root.patch_size)
    return {"img": ((target,),), "txt": ((call.text(),),), "joint": ((target, call.text()),)}


ERNIE = Family(_ernie, ((ROW, r"time_embedding\..*|adaLN_modulation\.1|final_norm\.linear"), ("txt", r"text_proj"),
                        ("img", r"x_embedder\.proj"), ("joint", r"layers\..*|final_norm\.norm|final_linear")))


def _ideogram(root: nn.Module, call: ModelInputs) -> Streams:
    """The first layer sees nothing where the text stands."""
    text, target = (call.text(),) if call.length("context") else (), picture(call.shape(), 1)
    return {**joined(text, (target,)), "input": ((*other(call.length("context")), target),)}


IDEOGRAM = Family(_ideogram, ((ROW, r"t_embedding\..*|.*adaln_(proj|modulation)"), ("txt", r"llm_cond_.*"),
                              ("input", r"input_proj"),
                              ("joint", r"layers\..*|final_layer\..*")))


def _omnigen(root: nn.Module, call: ModelInputs) -> Streams:
    """References stand between text and picture."""
    target, refs = picture(call.shape(), root.patch_size), call.others("ref_latents", root.patch_size)
    return {**joined((call.text(),), (*refs, target)), "target": ((target,),), "refs": (refs,)}


OMNIGEN = Family(_omnigen, (
    (ROW, r"time_caption_embed\.timestep_.*|.*norm\d\.linear|norm_out\.linear_1"),
    ("txt", r"time_caption_embed\..*|context_refiner\..*|double_stream_layers\.\d+\.(\w+\.processor\.)?instruct_.*"),
    ("target", r"x_embedder|noise_refiner\..*"), ("refs", r"ref_image_.*"),
    ("joint", r"(single_stream_)?layers\..*|norm_out\..*|double_stream_layers\.\d+\.img_instruct_attn\.to_out\..*"),
    ("img", r"double_stream_layers\.\d+\.img_.*")))


def _pixart(root: nn.Module, call: ModelInputs) -> Streams:
    return joined((call.text(),), (picture(call.shape(), root.patch_size),))


PIXART = Family(_pixart, ((ROW, r"(t|csize|ar)_embedder\..*|t_block\.1"), ("txt", r"y_embedder\..*"),
                          ("open", r".*\.kv_linear"), ("img", r"x_embedder\.proj|blocks\..*|final_layer\..*")))


PICTURES = {
    "modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "flux.model.Flux": FLUX,
    "chroma.model.Chroma": FLUX,
    "chroma_radiance.model.ChromaRadiance": FLUX,
    "qwen_image.model.QwenImageTransformer2DModel": QWEN,
    "mage_flow.model.MageFlowTransformer2DModel": QWEN,
    "lens.model.LensTransformer2DModel": QWEN,
    "joyimage.model.JoyImageTransformer3DModel": JOY,
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": SD3,
    "aura.mmdit.MMDiT": AURA,
    "hydit.models.HunYuanDiT": HUNYUAN_DIT,
    "hidream.model.HiDreamImageTransformer2DModel": HIDREAM,
    "pixeldit.model.PixDiT_T2I": PIXELDIT,
    "pixeldit.pid.PidNet": PIXELDIT,
    "lumina.model.NextDiT": LUMINA,
    "lumina.model.NextDiTPixelSpace": LUMINA,
    "krea2.model.SingleStreamDiT": KREA,
    "ernie.model.ErnieImageModel": ERNIE,
    "ideogram4.model.Ideogram4Transformer2DModel": IDEOGRAM,
    "omnigen.omnigen2.OmniGen2Transformer2DModel": OMNIGEN,
    "boogu.model.BooguTransformer2DModel": OMNIGEN,
    "pixart.pixartms.PixArtMS": PIXART,
}
"""Module below comfy.ldm and class -> family."""
