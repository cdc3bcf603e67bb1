"""The example workflows for Flux and SDXL that the other tests draw on the testbed's own model: on small models of
their families, with the host's text encoders, on a real server."""

from __future__ import annotations

import pytest
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import ON_TESTBED, SAMPLERS, find, load, on_small
from safetensors.torch import save_file

from .builders import lora, shapes
from .small_checkpoints import model

FAMILIES = {"flux": "Flux", "sdxl": "SDXL"}
CASES = [path for path in ON_TESTBED if path.stem.partition("_")[0] in FAMILIES]


@pytest.fixture(scope="module")
def files(server: Server):
    """`files(family)` -> names of LoRAs for its small model, where the server looks for them."""
    made: dict[str, list[str]] = {}

    def write(family: str) -> list[str]:
        if family not in made:
            made[family] = [f"example_{family}_{seed}.safetensors" for seed in range(4)]
            for seed, name in enumerate(made[family]):
                save_file({key: value.contiguous() for key, value in lora(shapes(model(family)), seed).items()},
                          server.base / "models" / "loras" / name)
        return made[family]

    return write


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_example_on_its_family(server: Server, files, path):
    family = FAMILIES[path.stem.partition("_")[0]]
    prompt = on_small(load(path), family, files(family))
    for node in prompt.values():
        if node["class_type"] == "CLIPVisionLoader":
            node["class_type"], node["inputs"] = "LoRAEnsembleTestbedVision", {}
        if node["class_type"] in (*SAMPLERS, "KSamplerAdvanced"):
            node["inputs"]["steps"] = 6
    entry = server.run(prompt)
    saved = [node for node in find(prompt, "SaveImage") if server.images(entry, node)]
    assert saved and saved == find(prompt, "SaveImage")


def test_every_example_has_a_stand_in_of_its_family():
    """These, those of SMALL, and those for SD 1.5, whose stand-in is the testbed's U-Net."""
    left = {path.stem.partition("_")[0] for path in ON_TESTBED if path not in CASES}
    assert left == {"sd15"} and {path.stem.partition("_")[0] for path in CASES} == set(FAMILIES)
