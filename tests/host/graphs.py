"""Graphs in API format, grown node by node on a small model of a real family, and what a server makes of them."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import Prompt, widgets
from safetensors.torch import load
from torch import Tensor

STEPS, CFG, SEED = 6, 12.0, 7
Link = list  # [node id, output]


class Graph:
    """A prompt for the server. Inputs that are not named are the node's own defaults.

    model, positive, negative, other   a small model with random weights, and three prompts for it
    """

    def __init__(self, info: dict, family: str = "SD15") -> None:
        self.info, self.prompt = info, Prompt()
        self.pictures: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        base, _ = self.add("LoRAEnsembleTestbedFamily", family=family)
        self.model, self.positive, self.negative, self.other = ([base, i] for i in range(4))
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        self.sampler = self.add("KSamplerSelect", sampler_name="euler")
        self.sigmas = self.add("BasicScheduler", model=self.model, scheduler="normal", steps=STEPS)

    def add(self, kind: str, **inputs: Any) -> Link:
        key = str(len(self.prompt) + 1)
        self.prompt[key] = {"class_type": kind, "inputs": widgets(self.info[kind]) | inputs}
        return [key, 0]

    def ours(self, model: Link, threshold: float) -> Link:
        return self.add("LoRAEnsembleAdaptiveGuidance", model=model, mode="threshold", threshold=threshold)

    def extrapolated(self, model: Link, saving: float) -> Link:
        """Ours as a new node is, but for the saving."""
        return self.add("LoRAEnsembleAdaptiveGuidance", model=model, saving=saving)

    # --- sampling ---

    def ksampler(self, model: Link, kind: str = "KSampler", **inputs: Any) -> Link:
        """KSampler, KSamplerAdvanced or the pack's own."""
        return self.add(kind, model=model, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="normal",
                        positive=self.positive, negative=self.negative, latent_image=self.latent,
                        **{"noise_seed" if kind == "KSamplerAdvanced" else "seed": SEED}, **inputs)

    def custom(self, model: Link) -> Link:
        return self.add("SamplerCustom", model=model, noise_seed=SEED, cfg=CFG, positive=self.positive,
                        negative=self.negative, sampler=self.sampler, sigmas=self.sigmas, latent_image=self.latent)

    def guider(self, model: Link, kind: str = "CFGGuider", **inputs: Any) -> Link:
        given = {
            "model": model, "positive": self.positive, "negative": self.negative, "cfg": CFG,
            "cond1": self.positive, "cond2": self.other, "cfg_conds": CFG, "cfg_cond2_negative": 2.0,
            "conditioning": self.positive, "empty_conditioning": self.other, "model_negative": self.model,
        } | inputs  # fmt: skip
        known = {name for group in self.info[kind]["input"].values() for name in group}
        return self.add(kind, **{name: value for name, value in given.items() if name in known})

    def guided(self, guider: Link, noise: Link | None = None, sigmas: Link | None = None,
               latent: Link | None = None) -> Link:
        return self.add("SamplerCustomAdvanced", noise=noise or self.add("RandomNoise", noise_seed=SEED), guider=guider,
                        sampler=self.sampler, sigmas=sigmas or self.sigmas, latent_image=latent or self.latent)

    def relay(self, *legs: tuple[Link, int]) -> Link:
        """One guider after the other, each up to a step: by the host's own means."""
        sigmas, latent, done = self.sigmas, self.latent, 0
        for i, (guider, until) in enumerate(legs):
            key, _ = self.add("SplitSigmas", sigmas=sigmas, step=until - done)
            latent = self.guided(guider, self.add("DisableNoise") if i else None, [key, 0], latent)
            sigmas, done = [key, 1], until
        return latent

    def prompt_alone(self, model: Link) -> Link:
        return self.guider(model, "BasicGuider")

    # --- results ---

    def save(self, name: str, latent: Link, model: Link | None = None, text: Link | None = None) -> None:
        """Keep a latent under a name, and what guidance did in its run: the record of a MODEL with ours, or a text."""
        prefix = f"interop/{uuid4().hex}"
        self.pictures[name], _ = self.add("SaveLatent", samples=latent, filename_prefix=prefix)
        if model is not None:
            self.texts[name], _ = self.add("LoRAEnsembleTestbedRecord", model=model, latent=latent)
        if text is not None:
            self.texts[name], _ = self.add("PreviewAny", source=text)

    def run(self, server: Server) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Latents and records by name; a text as it is."""
        outputs = server.run(self.prompt)["outputs"]

        def latent(node: str) -> Tensor:
            (file,) = outputs[node]["latents"]
            content = server.get("/view", **{key: file[key] for key in ("filename", "subfolder", "type")})
            return load(content)["latent_tensor"]

        def record(text: str) -> Any:
            return json.loads(text) if text.startswith("{") else text

        return ({name: latent(node) for name, node in self.pictures.items()},
                {name: record(*outputs[node]["text"]) for name, node in self.texts.items()})


def switch(record: dict) -> tuple[float, int]:
    """A threshold that the similarities of a record pass, and the step where they do: the one that stands out most from
    all guided ones before it, neither the first step nor the last."""
    (curve,) = zip(*(step["gamma"] for step in record["steps"]), strict=True)
    before = {step: max(curve[1:step], default=-1.0) for step in range(1, len(curve) - 1)}
    margins = {step: curve[step] - before[step] for step in before if step > 1}
    step = max(margins, key=margins.get)
    if margins[step] < 1e-3:  # they only fall
        return curve[1] - 1e-3, 1
    return (curve[step] + before[step]) / 2, step
