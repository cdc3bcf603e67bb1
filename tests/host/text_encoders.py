"""Small random models of the host's own text encoders, in which a token's output depends on that token alone.

Their classes, tokenizers and code are the host's; only sizes are small. The output projections of all attention are
zero, so that no token sees another: what changes with a word is where that word is.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders
import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FOLDER = Path(comfy.sd1_clip.__file__).parent / "text_encoders"
LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
T5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
CLIP = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
BERT = {**CLIP, "num_hidden_layers": 1}
SMALL = {"CLIPTextModel": CLIP, "T5": T5, "BertModel": BERT, "XLMRobertaModel": BERT}
read: dict[tuple, PreTrainedTokenizerBase] = {}
"""Tokenizers by class, folder and options: many encoders have the same, and none is changed."""
NO_LOOK_AROUND = ("out_proj", "o_proj", "SelfAttention.o", "attention.output.dense")

# name -> (tokenizer, model, what a function that makes the model's class is given, tensors of its own)
ENCODERS: dict[str, tuple[str, str, dict[str, Any] | None, str]] = {
    "SD1": ("comfy.sd1_clip.SD1Tokenizer", "comfy.sd1_clip.SD1ClipModel", None, ""),
    "SD2": ("sd2_clip.SD2Tokenizer", "sd2_clip.SD2ClipModel", None, ""),
    "SDXL": ("comfy.sdxl_clip.SDXLTokenizer", "comfy.sdxl_clip.SDXLClipModel", None, ""),
    "SDXL refiner": ("comfy.sdxl_clip.SDXLTokenizer", "comfy.sdxl_clip.SDXLRefinerClipModel", None, ""),
    "Stable Cascade": ("comfy.sdxl_clip.StableCascadeTokenizer", "comfy.sdxl_clip.StableCascadeClipModel", None, ""),
    "SD3": ("sd3_clip.SD3Tokenizer", "sd3_clip.sd3_clip", {}, "wide"),
    "SD3 without T5": ("sd3_clip.SD3Tokenizer", "sd3_clip.sd3_clip", {"t5": False}, ""),
    "SD3, T5 alone": ("sd3_clip.SD3Tokenizer", "sd3_clip.sd3_clip", {"clip_l": False, "clip_g": False}, ""),
    "Flux": ("flux.FluxTokenizer", "flux.flux_clip", {}, ""),
    "Flux2": ("flux.Flux2Tokenizer", "flux.flux2_te", {}, "tekken"),
    "Flux2 Klein": ("flux.KleinTokenizer", "flux.klein_te", {}, ""),
    "HiDream": ("hidream.HiDreamTokenizer", "hidream.hidream_clip", {}, "llama"),
    "HiDream-O1": ("hidream_o1.HiDreamO1Tokenizer", "hidream_o1.HiDreamO1TE", None, ""),
    "HunyuanVideo": ("hunyuan_video.HunyuanVideoTokenizer", "hunyuan_video.hunyuan_video_clip", {}, "llama"),
    "HunyuanVideo 1.5": ("hunyuan_video.HunyuanVideo15Tokenizer", "hunyuan_image.te", {"byt5": False}, ""),
    "HunyuanImage": ("hunyuan_image.HunyuanImageTokenizer", "hunyuan_image.te", {"byt5": True}, ""),
    "HunyuanDiT": ("hydit.HyditTokenizer", "hydit.HyditModel", None, "spiece"),
    "Qwen-Image": ("qwen_image.QwenImageTokenizer", "qwen_image.te", {}, ""),
    "LongCat-Image": ("longcat_image.LongCatImageTokenizer", "longcat_image.te", {}, ""),
    "Kandinsky 5": ("kandinsky5.Kandinsky5Tokenizer", "kandinsky5.te", {}, ""),
    "Krea 2": ("krea2.Krea2Tokenizer", "krea2.te", {}, ""),
    "Ideogram 4": ("ideogram4.Ideogram4Tokenizer", "ideogram4.te", {}, ""),
    "Boogu": ("boogu.BooguTokenizer", "boogu.te", {}, ""),
    "JoyImage": ("joyimage.JoyImageTokenizer", "joyimage.te", {}, ""),
    "Mage-Flow": ("mage_flow.MageFlowTokenizer", "mage_flow.te", {}, ""),
    "Lumina2": ("lumina2.LuminaTokenizer", "lumina2.te", {}, "spiece"),
    "Lumina2, Gemma 3": ("lumina2.NTokenizer", "lumina2.te", {"model_type": "gemma3_4b"}, "spiece"),
    "NewBie": ("newbie.NewBieTokenizer", "newbie.te", {}, "spiece"),
    "PixelDiT": ("pixeldit.PixelDiTGemma2Tokenizer", "pixeldit.pixeldit_te", {}, "spiece"),
    "Z-Image": ("z_image.ZImageTokenizer", "z_image.te", {}, ""),
    "OmniGen2": ("omnigen2.Omnigen2Tokenizer", "omnigen2.te", {}, ""),
    "Ovis": ("ovis.OvisTokenizer", "ovis.te", {}, ""),
    "Wan": ("wan.WanT5Tokenizer", "wan.te", {}, "spiece"),
    "LTX": ("lt.LTXVT5Tokenizer", "lt.ltxv_te", {}, ""),
    "LTX-2": ("lt.LTXAVGemmaTokenizer", "lt.ltxav_te", {
        "text_projection_type": "dual_linear", "video_projection_dim": 48, "audio_projection_dim": 24}, "spiece"),
    "MiniMax H3": ("minimax.MiniMaxH3Tokenizer", "minimax.te", {}, ""),
    "Mochi": ("genmo.MochiT5Tokenizer", "genmo.mochi_te", {}, ""),
    "CogVideoX": ("cogvideo.CogVideoXTokenizer", "cogvideo.cogvideo_te", {}, ""),
    "Cosmos": ("cosmos.CosmosT5Tokenizer", "cosmos.te", {}, ""),
    "Anima": ("anima.AnimaTokenizer", "anima.te", {}, ""),
    "AuraFlow": ("aura_t5.AuraT5Tokenizer", "aura_t5.AuraT5Model", None, ""),
    "PixArt, Chroma": ("pixart_t5.PixArtTokenizer", "pixart_t5.pixart_te", {}, ""),
    "Stable Audio": ("sa_t5.SAT5Tokenizer", "sa_t5.SAT5Model", None, ""),
    "ACE-Step": ("ace.AceT5Tokenizer", "ace.AceT5Model", None, "spiece"),
    "Ernie-Image": ("ernie.ErnieTokenizer", "ernie.te", {}, "tekken"),
}


def named(path: str) -> Any:
    """The class or function, or a skip where this release has none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module if module.startswith("comfy.") else f"comfy.text_encoders.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this release has no {path}")


class Vision(torch.nn.Module):
    """Stands for the part that sees: some tokens per picture, as many as the real one would give."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, picture: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return torch.ones(int(grid.prod()) // 4, 16)


class DeepVision(Vision):
    """Of Qwen3-VL: with features for deeper layers, here none."""

    def forward(self, picture: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return super().forward(picture, grid), []


@contextmanager
def small(wide: bool = False) -> Iterator[None]:
    """Text encoders made here are small. `wide`: with the widths that the code of SD3 takes for granted."""
    init = comfy.sd1_clip.SDClipModel.__init__
    signature = inspect.signature(init)

    def smaller(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        config, kind = given.arguments["textmodel_json_config"], given.arguments["model_class"].__name__
        if config is None:
            config = str(Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json")
        if not isinstance(config, dict):
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        width = {"d_model": 4096} if wide and kind == "T5" else {}
        given.arguments["textmodel_json_config"] = {**config, **SMALL.get(kind, LLAMA), **width}
        init(*given.args, **given.kwargs)

    from_pretrained = PreTrainedTokenizerBase.from_pretrained.__func__

    def once(kind: type, folder: str, **options: Any) -> PreTrainedTokenizerBase:
        key = kind, str(folder), repr(sorted(options.items()))
        if key not in read:
            read[key] = from_pretrained(kind, folder, **options)
        return read[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sd1_clip.SDClipModel, "__init__", smaller)
        patch.setattr(PreTrainedTokenizerBase, "from_pretrained", classmethod(once))
        for module, name, vision in (("qwen_vl", "Qwen2VLVisionTransformer", Vision),
                                     ("qwen3vl", "Qwen3VLVisionModel", DeepVision)):
            if (FOLDER / f"{module}.py").is_file():
                patch.setattr(f"comfy.text_encoders.{module}.{name}", vision)
        yield


def clip(name: str, embeddings: Path | None = None) -> comfy.sd.CLIP:
    """A CLIP of one of ENCODERS as the host makes it."""
    tokenizer, model, options, needs = ENCODERS[name]
    tokenizer, model = named(tokenizer), named(model)
    if needs == "tekken" and not (FOLDER / "bpe_tokenizer.py").is_file():
        pytest.skip("this release reads Mistral's tokenizer by a converter that the installed transformers lacks")
    if name == "LTX-2" and "text_encoder_model" not in inspect.signature(model).parameters:
        pytest.skip("LTX-2 of this release has fixed widths")
    data = tokenizer_data(needs)
    if options is not None:
        model = model(**options)
    with small(wide=needs == "wide"), llama3() if needs == "llama" else nullcontext():
        made = comfy.sd.CLIP(SimpleNamespace(params={}, clip=model, tokenizer=tokenizer), tokenizer_data=data,
                             embedding_directory=str(embeddings) if embeddings else None,
                             model_options={"dtype": torch.float16 if needs == "wide" else torch.float32})
    for tokenizer in vars(made.tokenizer).values():
        if (getattr(tokenizer, "min_length", None) or 0) >= 512:  # so much padding only takes time
            tokenizer.min_length = 64
    generator = torch.Generator().manual_seed(1)
    for key, parameter in made.cond_stage_model.named_parameters():
        numbers(parameter.data, generator)
        if any(f"{part}." in key for part in NO_LOOK_AROUND):
            parameter.data.zero_()
    return made


def numbers(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Normal ones. Along the rows of a matrix as large as SD3's words of full width they repeat themselves: so many
    would take seconds."""
    if parameter.numel() < 2**24:
        parameter.normal_(std=0.3, generator=generator)
        return
    few = torch.empty(len(parameter), 64).normal_(std=0.3, generator=generator)
    parameter.copy_(few.repeat(1, -(-parameter.shape[1] // 64))[:, :parameter.shape[1]])


@contextmanager
def llama3() -> Iterator[None]:
    """A tokenizer in the place of Llama 3's, whose file the host does not ship: bytes, few merges, and the numbers that
    the host's code asks for."""
    letters = bytes_to_letters()
    vocabulary = {letter: 1000 + code for code, letter in letters.items()}
    merges = []
    for word, number in (("us", 500), ("er", 501), ("user", 882), ("\n\n", 271), ("ed", 503),
                         *((f" {letter}", 600 + at) for at, letter in enumerate("abcdefghijklmnopqrstuvwxyz")),
                         (" red", 504), ("og", 506), (" dog", 507)):
        spelled = "".join(letters[code] for code in word.encode())
        parts = next((spelled[:at], spelled[at:]) for at in range(1, len(spelled))
                     if spelled[:at] in vocabulary and spelled[at:] in vocabulary)
        merges.append(" ".join(parts))
        vocabulary[spelled] = number
    special = {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
               "<|eot_id|>": 128009, "<image>": 128257}
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None,
        "added_tokens": [{"id": number, "content": text, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for text, number in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                           "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                                      {"Sequence": {"id": "A", "type_id": 0}}],
                           "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [128000],
                                                                    "tokens": ["<|begin_of_text|>"]}}},
        "model": {"type": "BPE", "vocab": vocabulary | special, "merges": merges, "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False},
    }
    module = import_module("comfy.text_encoders.hunyuan_video")
    own = module.LlamaTokenizerFast
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(content), encoding="utf-8")

        def loaded(_: str, **arguments: Any) -> Any:
            if own.__module__.startswith("transformers"):
                return PreTrainedTokenizerFast(tokenizer_file=str(path))
            return own.from_pretrained(folder, **arguments)

        patch.setattr(module, "LlamaTokenizerFast", SimpleNamespace(from_pretrained=loaded))
        yield


def bytes_to_letters() -> dict[int, str]:
    """The letter for each byte in byte-level vocabularies: itself where it prints, else one from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [code for code in range(256) if code not in printing]
    return {code: chr(code) for code in printing} | {code: chr(256 + at) for at, code in enumerate(rest)}


def tokenizer_data(needs: str) -> dict[str, Any]:
    """Models of tokenizers that come with checkpoints: the one that the host ships, or one made here."""
    if needs == "spiece":
        model = torch.tensor(list((FOLDER / "t5_pile_tokenizer" / "tokenizer.model").read_bytes()), dtype=torch.uint8)
        return dict.fromkeys(("spiece_model", "mt5xl.spiece_model", "gemma_spiece_model", "jina_spiece_model"), model)
    if needs == "tekken":
        words = [bytes([code]) for code in range(256)]
        for word in (" red", " woman", " dog", " blue", " a", " cat", " house", ", ", "red", "hair", " hair"):
            words += [word[:end].encode() for end in range(2, len(word) + 1) if word[:end].encode() not in words]
        vocabulary = [{"rank": at, "token_bytes": base64.b64encode(word).decode()} for at, word in enumerate(words)]
        special = [{"rank": at, "token_str": text} for at, text in enumerate(
            ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<{at}>" for at in range(12)), "[SYSTEM_PROMPT]",
             "[/SYSTEM_PROMPT]"])]
        tekken = {"config": {"default_num_special_tokens": 1000, "default_vocab_size": 131072, "pattern": ""},
                  "vocab": vocabulary, "special_tokens": special}
        return {"tekken_model": torch.tensor(list(json.dumps(tekken).encode()), dtype=torch.uint8)}
    return {}


def encoded(clip: comfy.sd.CLIP, text: str, tokenize: Callable[..., Any] | None = None, **arguments: Any) -> list:
    """[tensor, dict] of a text, as a node encodes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text, **arguments))[0]
