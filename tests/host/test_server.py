"""The pack on a real headless server, over HTTP: nodes with their help, and pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_ensemble.testbed.evaluate import METHODS, RECIPES
from lora_ensemble.testbed.model import UNet
from lora_ensemble.testbed.protocol import all_sets
from lora_ensemble.testbed.sampler import GUIDANCE, STEPS, Sampler
from lora_ensemble.testbed.weights import load_base, load_loras, lora_path
from lora_ensemble.tests.server import PACK, PromptFailed, PromptRefused, Server, link
from lora_ensemble.tests.workflows import (
    EXAMPLES,
    LOADERS,
    ON_TESTBED,
    ROOT,
    TESTBED,
    Prompt,
    compose,
    find,
    load,
    newer,
    on_testbed,
    widgets,
)
from PIL import Image
from safetensors.torch import save_file

JPEG = b"\xff\xd8\xff"
WORKFLOWS = {path.stem: load(path) for path in TESTBED}
GOOD = ("one.safetensors", "two.safetensors", "three.safetensors")
GREY_LEVEL = 1.01  # two roundings of one number may end up in neighbouring 8-bit values


def random_lora(seed: int, scale: float = 0.25, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA in kohya's naming on all attentions and 3x3 convolutions of the testbed; it visibly changes pictures."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in UNet().named_modules():
        if "attn" in name and isinstance(module, torch.nn.Linear) or name.endswith(("conv1", "conv2")):
            out, *rest = module.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            down = torch.randn(rank, *rest, generator=g) / np.sqrt(np.prod(rest))
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = scale * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=g)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


@pytest.fixture(scope="module", autouse=True)
def lora_files(server: Server) -> Path:
    """Good and bad LoRA files, where the server looks for them."""
    folder = server.base / "models" / "loras"
    for seed, name in enumerate(GOOD):
        save_file(random_lora(seed), folder / name)
    whole = (folder / GOOD[0]).read_bytes()
    (folder / "web_page.safetensors").write_bytes(b"<!DOCTYPE html><html><body>Log in to download</body></html>" * 9)
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty_file.safetensors").write_bytes(b"")
    broken = random_lora(0)
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, folder / "not_a_number.safetensors")
    other = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 3072),
             "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(9216, 4)}  # fmt: skip
    save_file(other, folder / "made_for_flux.safetensors")
    for name in {node["inputs"]["lora_name"] for w in map(load, EXAMPLES) for node in w.values()
                 if "lora_name" in node["inputs"]}:  # fmt: skip
        save_file(random_lora(9), folder / name)
    return folder


@pytest.fixture(scope="module")
def known(server: Server) -> dict:
    """What the server says of all its nodes: it takes it most of a second."""
    return server.json("/object_info")


@pytest.fixture(scope="module")
def node_info(known: dict) -> dict:
    return {name: info for name, info in known.items() if name.startswith("LoRAEnsemble") and "Testbed" not in name}


def changed(name: str, **inputs: object) -> Prompt:
    """A testbed workflow with inputs replaced on every node that has them."""
    prompt = json.loads(json.dumps(WORKFLOWS[name]))
    for node in prompt.values():
        node["inputs"].update({key: value for key, value in inputs.items() if key in node["inputs"]})
    return prompt


def pictures(server: Server, prompt: Prompt) -> np.ndarray:
    """What the prompt saves: [n, h, w, 3] in 0..255."""
    entry = server.run(prompt)
    files = [file for node in find(prompt, "SaveImage") for file in server.images(entry, node)]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64) for file in files])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def visible(info: dict) -> dict:
    """A node's inputs without those that the host fills in."""
    groups = (group for name, group in info["input"].items() if name != "hidden")
    return {key: spec for group in groups for key, spec in group.items()}


# --- what a user finds -----------------------------------------------------------------------------------------------


def test_imports_without_complaint(server: Server):
    assert server.failed_imports() == []


def test_nodes_explain_themselves(node_info: dict):
    assert {"LoRAEnsembleLoRA", "LoRAEnsembleFromStack", "LoRAEnsembleMerge", "LoRAEnsembleSwitch",
            "LoRAEnsembleComposite"} <= set(node_info)  # fmt: skip
    for name, info in node_info.items():
        assert info["description"] and info["category"].startswith("LoRA Ensemble"), name
        inputs = visible(info)
        assert all(spec[1].get("tooltip") for spec in inputs.values()), name
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), name


def test_help_page_of_every_node(server: Server, node_info: dict):
    for name, info in node_info.items():
        page = server.get(f"/extensions/{PACK}/docs/{name}.md").decode()
        assert page.startswith(f"# {info['display_name']}"), name
        assert all(key in page for key in visible(info)), f"{name}: its help page does not name every input"


def test_example_workflows_are_templates(server: Server):
    listed = server.json("/api/workflow_templates")[PACK]
    assert set(listed) == {path.stem for path in (ROOT / "example_workflows").glob("*.json")} and listed
    for name in listed:
        workflow = json.loads(server.get(f"/api/workflow_templates/{PACK}/{name}.json"))
        assert workflow["nodes"], name
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.jpg").startswith(JPEG), name


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_misses_only_its_models(server: Server, known: dict, path: Path):
    if find(load(path), "LoRAEnsembleStack") and "LoRAEnsembleStack" not in known:
        pytest.skip("this release cannot show rows")
    if unknown := newer(load(path), known):
        pytest.skip(f"this release has no {', '.join(unknown)}")
    with pytest.raises(PromptRefused) as refused:
        server.queue(load(path))
    loaders = [key for kind in (*LOADERS, "CLIPVisionLoader") for key in find(load(path), kind)]
    assert set(refused.value.reasons) == set(loaders)


@pytest.mark.parametrize("path", ON_TESTBED, ids=lambda path: path.stem)
def test_example_on_the_testbed(server: Server, path: Path):
    prompt = on_testbed(load(path), GOOD, steps=6)
    saved = pictures(server, prompt)
    side_by_side = 1 + len(find(prompt, "ImageStitch"))
    if find(prompt, "LoRAEnsembleSpectrum"):
        assert saved.shape[0] == 1 and saved.shape[2] == 1024, "no plot"
        assert len(np.unique(saved.reshape(-1, 3), axis=0)) > 4, "an empty plot"
        return
    if find(prompt, "LoRAEnsembleLeaveOneOut"):
        assert saved.shape[0] == 1 and saved.shape[2] == 1024 and saved.shape[1] > 800, "no sheet"
        return
    assert saved.shape == (len(find(prompt, "SaveImage")), 32, 32 * side_by_side, 3)
    saved = np.concatenate(np.split(saved, side_by_side, axis=2))
    assert all(picture.std() > 5 for picture in saved)
    assert all(difference(a, b) > 20 for i, a in enumerate(saved) for b in saved[:i]), "methods give the same picture"


def test_pictures_hold_the_workflow_and_the_prompt(server: Server):
    """As from ComfyUI's own nodes: a picture that is dropped on the page opens its graph."""
    name = "sd15_composite.json"
    prompt, graph = on_testbed(load(ROOT / "example_workflows" / "api" / name), GOOD, steps=2), \
        load(ROOT / "example_workflows" / name)
    (file,) = server.images(server.run(prompt, workflow=graph))
    kept = {key: json.loads(text) for key, text in Image.open(io.BytesIO(file)).info.items()}
    assert kept["workflow"] == graph and set(kept["prompt"]) == set(prompt)
    for key, node in prompt.items():
        assert kept["prompt"][key].items() >= node.items()


def test_layer_map_is_previewed(server: Server):
    path = next(path for path in EXAMPLES if path.stem == "sdxl_k_lora")
    prompt = on_testbed(load(path), GOOD, steps=6)
    (preview,) = find(prompt, "PreviewImage")
    (shown,) = server.run(prompt)["outputs"][preview]["images"]
    file = server.get("/view", **{key: shown[key] for key in ("filename", "subfolder", "type")})
    picture = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    assert picture.shape[0] > 300 and picture.shape[1] > 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 4


def test_what_each_lora_did(server: Server):
    """Its pictures are those that a KSampler draws without the LoRA; the numbers arrive as text."""
    path = next(path for path in EXAMPLES if path.stem == "sd15_leave_one_out")
    prompt = on_testbed(load(path), GOOD, steps=6)
    (node,), (text,), (merge,) = (find(prompt, kind) for kind in ("LoRAEnsembleLeaveOneOut", "PreviewAny",
                                                                 "LoRAEnsembleMerge"))
    (save,), given = find(prompt, "SaveImage"), prompt[node]["inputs"]
    prompt[save]["inputs"]["images"] = [node, 1]
    entry = server.run(prompt)
    told = json.loads(*entry["outputs"][text]["text"])
    titles = [f"without {name}" for name in (*(Path(file).stem for file in GOOD), "LoRAs")]
    assert [each["title"] for each in told["pictures"]] == ["all LoRAs", *titles]
    assert told["batches"] == [5] and all(0.001 < each["share"] < 10 for each in told["loras"])
    batch = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64)
             for file in server.images(entry, save)]
    first, second, third = find(prompt, "LoRAEnsembleLoRA")
    prompt[third]["inputs"]["ensemble"] = [first, 0]  # the second is muted
    sampled = {name: given[name] for name in given if name not in ("vae", "theme")}
    prompt["sampler"] = {"class_type": "KSampler", "inputs": {**sampled, "model": [merge, 0]}}
    prompt["decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": given["vae"]}}
    prompt[save]["inputs"]["images"] = ["decoded", 0]
    (muted,) = pictures(server, prompt)
    assert len(batch) == 5 and difference(batch[2], muted) <= GREY_LEVEL < 20 < difference(batch[0], muted)


def test_measured_discrepancy_is_kept_while_the_seed_changes(server: Server):
    """The probes and the number run once: a second picture executes only what depends on its seed."""
    path = next(path for path in EXAMPLES if path.stem == "sdxl_est_lora_measured")
    prompt = on_testbed(load(path), GOOD, steps=6)
    (discrepancy,) = find(prompt, "LoRAEnsembleStyleDiscrepancy")
    probes = {prompt[prompt[discrepancy]["inputs"][name][0]]["inputs"]["samples"][0]
              for name in ("subject_image", "style_image")}
    (final,) = set(find(prompt, "KSampler")) - probes
    for seed, cached in ((901, False), (902, True)):
        prompt[final]["inputs"]["seed"] = seed
        messages = dict(server.run(prompt)["status"]["messages"])
        assert ({*probes, discrepancy} <= set(messages["execution_cached"]["nodes"])) == cached
        assert final not in messages["execution_cached"]["nodes"]


def test_methods_differ(server: Server):
    by_method = {name: pictures(server, WORKFLOWS[name]) for name in ("base", "merge", "switch", "composite")}
    names = list(by_method)
    for i, a in enumerate(names):
        assert by_method[a].shape == (1, 32, 32, 3) and by_method[a].std() > 5
        assert all(difference(by_method[a], by_method[b]) > 20 for b in names[:i]), a


@pytest.mark.parametrize("name", ["merge", "merge_baked", "merge_stack"])
def test_merge_is_the_stock_chain(server: Server, name: str):
    assert difference(pictures(server, WORKFLOWS[name]), pictures(server, WORKFLOWS["stock_chain"])) <= GREY_LEVEL


@pytest.mark.parametrize("method", [*METHODS, "Routed"])
def test_server_draws_what_the_standalone_sampler_draws(server: Server, lora_files: Path, node_info: dict, method: str):
    """Trained weights, three LoRAs, 20 steps: two programs that share nothing but the methods' formulas."""
    task = all_sets((3,))[0]
    with Sampler(load_base(), load_loras("narrow")) as sampler:
        picture = RECIPES[method].picture(task, sampler.bank)
        drawn = sampler.draw([picture])
    files = [lora_path("narrow", concept) for concept in task.concepts]
    for file in files:
        link(file, lora_files / file.name)
    node = f"LoRAEnsemble{method}"
    names = [file.name for file in files]
    roles = [concept.category for concept in task.concepts]
    words = picture.placed.words if picture.placed is not None else ()
    prompt = compose(node, widgets(node_info[node]), names, roles, task.prompt(), task.seed, STEPS, GUIDANCE, words)
    assert difference(pictures(server, prompt)[0], drawn[0].movedim(0, -1).numpy() * 255) <= 2.5


@pytest.mark.parametrize("name", ["merge", "merge_baked", "switch", "composite"])
def test_strength_zero_is_the_base(server: Server, name: str):
    prompt = changed(name, strength_model=0.0, strength_clip=0.0, order="")
    assert difference(pictures(server, prompt), pictures(server, WORKFLOWS["base"])) == 0


@pytest.mark.parametrize("name", ["merge", "switch", "composite"])
def test_runs_leave_nothing_behind(server: Server, name: str):
    first = pictures(server, changed(name, seed=1))
    assert difference(first, pictures(server, changed(name, seed=2))) > 20
    assert difference(first, pictures(server, changed(name, seed=1, filename_prefix="again"))) == 0
    assert difference(pictures(server, changed("base", seed=3)), first) > 20
    assert difference(pictures(server, changed(name, seed=1, filename_prefix="third")), first) == 0


def test_batch_of_three(server: Server):
    for name in ("merge", "switch", "composite"):
        one, three = pictures(server, WORKFLOWS[name]), pictures(server, changed(name, batch_size=3))
        assert three.shape == (3, 32, 32, 3)
        assert difference(three[:1], one) <= GREY_LEVEL  # the first picture has the same noise
        assert difference(three[0], three[1]) > 20


def test_branch_cache(server: Server, lora_files: Path):
    """On ComfyUI's own U-Net: interval 1 is the picture without it, interval 3 is near, and nothing is left behind."""
    prompt = changed("composite")
    for seed, key in enumerate(("lora1", "lora2")):
        g, name = torch.Generator().manual_seed(seed), f"for_unet_{seed}.safetensors"
        layer = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_v"
        save_file({f"{layer}.lora_down.weight": torch.randn(4, 64, generator=g) / 8,
                   f"{layer}.lora_up.weight": torch.randn(64, 4, generator=g)}, lora_files / name)  # fmt: skip
        prompt[key]["inputs"]["lora_name"] = name
    prompt["unet"] = {"class_type": "LoRAEnsembleTestbedUNet", "inputs": {}}
    prompt["method"]["inputs"]["model"] = ["unet", 0]
    whole, found = pictures(server, prompt), {}
    options = {"model": ["method", 0], "schedule": "uniform", "depth": 2}
    prompt["cache"] = {"class_type": "LoRAEnsembleBranchCache", "inputs": options}
    sampler = find(prompt, "KSampler")[0]
    prompt[sampler]["inputs"]["model"] = ["cache", 0]
    for interval in (3, 1, 2, 0):
        options["interval"] = interval
        found[interval] = pictures(server, prompt)
    options.update(schedule="forecast", interval=3)
    found["forecast"] = pictures(server, prompt)
    assert difference(found["forecast"], found[3]) > 0 and np.abs(found["forecast"] - whole).mean() < 25
    assert difference(found[1], whole) == 0 == difference(found[0], whole), "six steps are too few"
    assert all(difference(a, b) > 2 for a, b in ((found[3], whole), (found[2], whole), (found[3], found[2])))
    assert all(np.abs(found[n] - whole).mean() < 25 for n in (2, 3))
    # This model has no configuration to count its work by: a budget then leaves the node as it is without one.
    prompt[sampler]["inputs"]["steps"] = 10
    options.update(interval=0, budget=0.5)
    budget = pictures(server, prompt)
    options.update(interval=2, budget=0.0)
    assert difference(pictures(server, prompt), budget) == 0
    options["interval"] = 1
    assert difference(pictures(server, prompt), budget) > 0


def test_left_to_the_number_of_steps(server: Server):
    """What a new node holds runs, and numbers say the same as what they stand for."""
    prompt = changed("switch", steps=8, steps_per_lora=0, order="")
    assert difference(pictures(server, prompt), pictures(server, changed("switch", steps=8, order=""))) == 0
    prompt["method"]["inputs"]["ending"] = "subject"
    ended = pictures(server, prompt)
    assert difference(ended, pictures(server, changed("switch", steps=8, order=""))) > 2
    prompt = changed("switch", steps=10, steps_per_lora=4, order="")
    equal = pictures(server, prompt)
    prompt["lora1"]["inputs"]["words"] = "red pointed creature"  # the prompt says nothing by the second LoRA
    prompt["method"]["inputs"]["lengths"] = "by the prompt"
    assert difference(pictures(server, prompt), equal) > 2
    prompt = changed("switch", steps=8, order="")
    shared = {key: prompt["method"]["inputs"][key] for key in ("model", "ensemble", "clip")}
    cmlora = {"order": "offline", "boundary": 0.6, "threshold": 0.4, "dominance": 0.0, "decay": "none", "c1": 0,
              "c2": 0, "dominant_full": "every_step", "steps_per_lora": 0, "cache_depth": 0}
    prompt["method"] = {"class_type": "LoRAEnsembleCMLoRA", "inputs": {**shared, **cmlora}}
    by_steps = pictures(server, prompt)
    prompt["method"]["inputs"] |= {"c1": 2, "c2": 3, "steps_per_lora": 5}
    assert difference(pictures(server, prompt), by_steps) == 0
    torio = {"patch_size": 2, "temperature": 10.0, "temperature_unit": "auto", "recenter_lambda": 0.5, "top_k": 0,
             "upsampling": "nearest", "similarity": "noise", "selection": "image", "recheck_every": 1}
    prompt["method"] = {"class_type": "LoRAEnsembleLoRAtorio", "inputs": {**shared, **torio}}
    by_steps = pictures(server, prompt)
    prompt["method"]["inputs"]["temperature_unit"] = "steps"
    assert difference(pictures(server, prompt), by_steps) == 0


@pytest.mark.parametrize("name", ["merge", "switch", "composite"])
def test_windows_in_time(server: Server, name: str):
    """One LoRA behind the other is another picture than both; a workflow without the inputs is as it was, and so is one
    whose windows are whole."""
    before = pictures(server, changed(name))
    whole = changed(name, filename_prefix="whole")
    apart = changed(name, filename_prefix="apart")
    for key, start, end in (("lora1", 0.0, 0.5), ("lora2", 0.5, 1.0)):
        whole[key]["inputs"] |= {"start": 0.0, "end": 1.0, "fade": 0.5}
        apart[key]["inputs"] |= {"start": start, "end": end, "fade": 0.0}
    assert difference(pictures(server, whole), before) == 0
    found = pictures(server, apart)
    assert difference(found, before) > 20
    apart["lora2"]["inputs"]["fade"] = 0.5
    assert difference(pictures(server, apart), found) > 2


def test_windows_that_cannot_be(server: Server):
    prompt = changed("merge")
    prompt["lora2"]["inputs"] |= {"start": 0.6, "end": 0.4}
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt)
    assert GOOD[1] in failed.value.message and "start is 0.6 and end is 0.4" in failed.value.message
    prompt["lora2"]["inputs"] |= {"start": 0.0}
    baked = changed("merge_baked")
    baked["lora2"]["inputs"] |= {"end": 0.4}
    with pytest.raises(PromptFailed) as failed:
        server.run(baked)
    assert GOOD[1] in failed.value.message and "runtime" in failed.value.message
    prompt["lora2"]["inputs"] |= {"end": 1.5}
    with pytest.raises(PromptRefused):
        server.run(prompt)
