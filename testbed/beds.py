"""The two bodies of the testbed, each with its world, its judge, its LoRAs and its protocol, for whatever serves both.

`unet` is a U-Net with cross-attention that draws one figure on 32 x 32 pixels; `joint` a transformer with joint
attention that draws one or two on 32 x 48.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from torch import Tensor

from . import protocol, scene, text, worlds
from .base import Base
from .body import Body
from .joint import judge as joint_judge
from .joint import protocol as joint_protocol
from .joint import scene as joint_scene
from .joint import text as joint_text
from .joint import worlds as joint_worlds
from .joint.base import JointBase
from .judge import FIRST, Judge, School
from .loras import load_lora
from .protocol import LoraSet
from .scene import Concept
from .weights import WEIGHTS, load_loras, load_module, turbo_path
from .worlds import Collection


@dataclass(frozen=True)
class Schedule:
    """How long everything trains.

    base     rounds of (steps, learning rate), each from what the one before has left
    longer   (regime, concept) -> steps of a LoRA that needs more than the others
    turbo    pictures whose trails are followed and steps of the LoRA for few steps; None: the body has none
    """

    base: tuple[tuple[int, float], ...]
    judge: int
    loras: Mapping[str, int]
    lora_rate: float
    longer: Mapping[tuple[str, str], int] = field(default_factory=dict)
    turbo: tuple[int, int] | None = None


@dataclass(frozen=True)
class Bed:
    """One body and all that belongs to it.

    scene, text   modules with the world's `sample`, `ATTRIBUTES` and `NAMED`, and with its `caption`
    parts         the judge's heads that name concepts
    """

    name: str
    weights: Path
    make_base: Callable[[], Body]
    make_judge: Callable[[], Judge]
    school: School
    scene: ModuleType
    text: ModuleType
    parts: tuple[str, ...]
    collection: Callable[[str, Concept], Collection]
    all_sets: Callable[..., list[LoraSet]]
    alone_set: Callable[[Concept, int], LoraSet]
    schedule: Schedule

    def load_base(self, device: str = "cpu") -> Body:
        return load_module(self.make_base(), self.weights / "base.safetensors", device)

    def load_judge(self, device: str = "cpu") -> Judge:
        return load_module(self.make_judge(), self.weights / "judge.safetensors", device)

    def load_loras(self, regime: str) -> list[dict[str, Tensor]]:
        return load_loras(regime, self.weights)

    def load_turbo(self, practised: bool = False) -> dict[str, Tensor]:
        """The LoRA for few steps without guidance, or the one that has practised among others. Raises ValueError for a
        body that has none."""
        if self.schedule.turbo is None:
            raise ValueError(f"the body '{self.name}' has no LoRA for few steps")
        return load_lora(turbo_path(self.weights, practised))


UNET = Bed("unet", WEIGHTS, Base, Judge, FIRST, scene, text, scene.CATEGORIES, worlds.collection, protocol.all_sets,
           protocol.alone_set, Schedule(((7000, 3e-3),), 2500, {"clean": 240, "narrow": 160}, 4e-3,
                                        {("clean", "zaneth"): 800},  # thin lines over everything are learned last
                                        (1200, 1500)))
JOINT = Bed("joint", WEIGHTS.parent / "joint" / "weights", JointBase, joint_judge.make, joint_judge.SCHOOL, joint_scene,
            joint_text, joint_scene.PARTS, joint_worlds.collection, joint_protocol.all_sets, joint_protocol.alone_set,
            Schedule(((4600, 3e-3), (1500, 3e-3)), 2000, {"clean": 100, "narrow": 130}, 3e-3,
                     {(regime, concept.name): 240 for regime in worlds.REGIMES for concept in scene.CONCEPTS
                      if concept.category in ("background", "style")}  # what fills the picture is learned last
                     | {("narrow", "zaneth"): 500, ("clean", "zaneth"): 450}))
BEDS = {bed.name: bed for bed in (UNET, JOINT)}
