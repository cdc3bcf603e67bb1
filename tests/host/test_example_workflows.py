"""Example workflows: what the front end would send for each is its API file, and both agree with the schemas."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib.util
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from lora_ensemble.tests.workflows import newer

from .test_nodes import IDS, NODES, ROOT

PLACEHOLDERS = {"ckpt_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name",
                "coeffs_name", "text_encoder"}  # files that a user chooses
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}  # each with a widget of the front end's own behind it
VIRTUAL = {"MarkdownNote", "Note"}  # known to the front end alone
LATER = {"Routed": {"trust", "style_yields", "text"}, "LoRA": {"words", "start", "end", "fade"},
         "LoRAtorio": {"place", "reweigh_every"},
         "Switch": {"place", "ending", "lengths"},
         "CMLoRA": {"place", "features", "cache_age"}, "BranchCache": {"budget"},
         **{node: {"place"} for node in ("Merge", "Composite", "KLoRA", "ESTLoRA")},
         **{node: {"theme"} for node in ("Report", "LayerMap", "Spectrum", "CalibrateGuidance")},
         **{node: {"tolerance"} for node in ("AdaptiveGuidance", "AdaptiveGuider", "KSampler")}}
"""Widgets that workflows saved with earlier versions lack, per node: the front end fills in their defaults."""
BYPASSED = 4
ANY = "*"
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def host_inputs(class_type: str) -> dict[str, tuple[Any, dict]]:
    """Input name -> (type, options) of a node of this pack or of the host, in the schema's order."""
    types = node_classes()[class_type].INPUT_TYPES()
    specs = {**types.get("required", {}), **types.get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}


@functools.cache
def node_classes() -> dict[str, Any]:
    import nodes as host_nodes

    known = dict(host_nodes.NODE_CLASS_MAPPINGS)
    v3 = list(NODES)
    for name in ("audio", "custom_sampler", "flux", "hunyuan", "images", "lt", "lt_audio", "mask", "minimax_h3",
                 "model_advanced", "preview_any", "sd3", "video"):
        if importlib.util.find_spec(f"comfy_extras.nodes_{name}") is None:
            continue  # of later releases
        module = importlib.import_module(f"comfy_extras.nodes_{name}")
        known.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        if hasattr(module, "comfy_entrypoint"):
            v3 += asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return {**known, **{node.GET_SCHEMA().node_id: node for node in v3}}


def later(class_type: str) -> set[str]:
    _, ours, name = class_type.partition("LoRAEnsemble")
    return LATER.get(name, set()) if ours else set()


def is_widget(kind: Any) -> bool:
    return isinstance(kind, (list, tuple)) or main(kind) in WIDGETS


def main(kind: Any) -> str:
    """The type of an input, the first of several that it takes."""
    return str(kind).partition(",")[0]


def problem_of(name: str, value: Any, kind: Any, options: dict) -> str | None:
    """Why a widget value would not pass the host's validation, or None."""
    if name in PLACEHOLDERS or name.rpartition(".")[2].startswith("lora_"):
        return None if str(value).endswith(".safetensors") else "no file name"
    choices = kind if isinstance(kind, (list, tuple)) else options.get("options")
    if kind == DYNAMIC:
        choices = [option["key"] for option in choices]
    if choices is not None:
        return None if value in choices else f"{value!r} is not one of {choices}"
    wanted = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[main(kind)]
    if not isinstance(value, wanted):
        return f"{value!r} is no {kind}"
    if main(kind) in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return f"{value!r} is out of range"
    return None


def as_api(graph: dict) -> dict:
    """What the front end sends for a graph: widget values by name, links past bypassed nodes, no notes."""
    by_id = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}

    def source(link: int) -> list:
        _, origin, slot, *_ = links[link]
        node = by_id[origin]
        if node["mode"] != BYPASSED:
            return [str(origin), slot]
        kind = node["outputs"][slot]["type"]
        return source(next(entry["link"] for entry in node["inputs"] if entry["type"] == kind))

    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in VIRTUAL or node["mode"] == BYPASSED:
            continue
        values = iter(node["widgets_values"])
        inputs = values_of(host_inputs(node["type"]), values, later(node["type"]))
        assert not list(values), f"{node['type']} has more widget values than widgets"
        inputs |= {entry["name"]: source(entry["link"]) for entry in node["inputs"] if entry["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def defaults_of_later(class_type: str) -> dict[str, Any]:
    """What the host takes for the optional inputs that a prompt need not hold."""
    return {name: spec[1]["default"] for name, spec in host_inputs(class_type).items() if name in later(class_type)}


def values_of(specs: dict[str, tuple[Any, dict]], values: Iterator, added: Collection[str] = (),
              within: str = "") -> dict[str, Any]:
    """The values of widgets by their names, in the schema's order; what a DynamicCombo opens comes behind it."""
    inputs = {}
    for own, (kind, options) in specs.items():
        name = within + own
        if options.get("hidden"):  # what the host also takes by the name of an earlier release, which prompts use
            inputs[name] = inputs.pop(next(key for key in inputs if key.endswith(f".{name}")))
        elif kind == DYNAMIC:
            inputs[name] = next(values)
            inputs |= values_of(opened(options, inputs[name]), values, within=f"{name}.")
        elif is_widget(kind):
            inputs[name] = next(values, options["default"]) if own in added else next(values)
            if own in SEEDS:
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
    return inputs


def opened(options: dict, key: str) -> dict[str, tuple[Any, dict]]:
    """The inputs that a choice of a DynamicCombo opens."""
    (parts,) = [option["inputs"] for option in options["options"] if option["key"] == key]
    return {name: spec for part in parts.values() for name, spec in part.items()}


def spec_of(class_type: str, name: str) -> tuple[Any, dict]:
    """(type, options) of an input by its name in API format."""
    specs, (*outer, own) = host_inputs(class_type), name.split(".")
    for each in outer:
        specs = opened(specs[each][1], "yes")
    return specs[own]


def check_graph(graph: dict) -> None:
    """Links agree with both ends, types with the schemas."""
    by_id = {node["id"]: node for node in graph["nodes"]}
    assert graph["last_node_id"] == max(by_id) and graph["last_link_id"] == len(graph["links"])
    for number, origin, out, target, slot, kind in graph["links"]:
        sender, receiver = by_id[origin], by_id[target]
        assert number in sender["outputs"][out]["links"] and receiver["inputs"][slot]["link"] == number
        assert str(node_classes()[sender["type"]].RETURN_TYPES[out]) == kind
        assert str(host_inputs(receiver["type"])[receiver["inputs"][slot]["name"]][0]) in (kind, ANY)


def check_prompt(prompt: dict) -> None:
    """What the host's validation would say, except for the files that a user chooses."""
    for key, node in prompt.items():
        required = node_classes()[node["class_type"]].INPUT_TYPES()["required"]
        assert set(required) <= set(node["inputs"]), f"{key}: inputs missing"
        for name, value in node["inputs"].items():
            kind, options = spec_of(node["class_type"], name)
            if isinstance(value, list):
                sender = node_classes()[prompt[value[0]]["class_type"]]
                assert str(kind) in (str(sender.RETURN_TYPES[value[1]]), ANY), f"{key}: {name}"
            else:
                assert problem_of(name, value, kind, options) is None, f"{key}: {name}"


def unknown_encoders(prompt: dict) -> list[str]:
    """Kinds of text encoders that the running release cannot load."""
    return [node["inputs"]["type"] for node in prompt.values() if "CLIPLoader" in node["class_type"]
            and problem_of("type", node["inputs"]["type"], *host_inputs(node["class_type"])["type"])]


def skip_unknown(prompt: dict) -> None:
    if unknown := newer(prompt, node_classes()):
        pytest.skip(f"this release has no {', '.join(unknown)}")
    if unknown := unknown_encoders(prompt):
        pytest.skip(f"this release has no text encoder of type {', '.join(unknown)}")


def overlaps(graph: dict) -> list[tuple[str, str]]:
    title = 30  # height of the title bar, which lies above a node's position
    boxes = [(node["type"], *node["pos"], *node["size"]) for node in graph["nodes"]]
    return [
        (a, b)
        for i, (a, ax, ay, aw, ah) in enumerate(boxes)
        for b, bx, by, bw, bh in boxes[:i]
        if ax < bx + bw and bx < ax + aw and ay - title < by + bh and by - title < ay + ah
    ]


@each_workflow
def test_example_workflows_agree_with_the_schemas(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    prompt = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    skip_unknown(prompt)
    if any(node["class_type"] == "LoRAEnsembleStack" for node in prompt.values()) and "LoRAEnsembleStack" not in IDS:
        pytest.skip("this release cannot show rows")
    check_graph(graph)
    check_prompt(prompt)
    assert {key: {"class_type": node["class_type"], "inputs": defaults_of_later(node["class_type"]) | node["inputs"]}
            for key, node in prompt.items()} == as_api(graph)
    assert not overlaps(graph)


COLOURS = {"Positive prompt": "#232", "Negative prompt": "#322", "Files": "#432", "About": "#432"}


@each_workflow
def test_examples_look_alike(path):
    """Numbered groups, and the same colours for prompts and notes."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    assert [group["title"][:3] for group in graph["groups"] if group["title"][0].isdigit()][0] == "1. "
    assert {node["title"]: node.get("color") for node in graph["nodes"] if node.get("title") in COLOURS
            } == {node["title"]: COLOURS[node["title"]] for node in graph["nodes"] if node.get("title") in COLOURS}


@each_workflow
def test_a_node_has_a_title_of_its_own_or_none(path):
    """One that says its node's name would stay English on a page in another language."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    assert [node["title"] for node in graph["nodes"] if node.get("title") == IDS.get(node["type"], "")] == []


def test_every_example_is_a_workflow_of_its_own():
    """By its id the page tells which of several open workflows a run belongs to."""
    ids = [json.loads(path.read_text(encoding="utf-8"))["id"] for path in WORKFLOWS]
    assert len(set(ids)) == len(ids)


FOLDERS = {"CheckpointLoaderSimple": "checkpoints", "LTXVAudioVAELoader": "checkpoints",
           "UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "DualCLIPLoader": "text_encoders",
           "VAELoader": "vae", "CLIPVisionLoader": "clip_vision", "LoRAEnsembleLoRA": "loras"}
LTX_ENCODER = {"gemma_3_12B_it_fp4_mixed.safetensors": "text_encoders",
               "ltx-2.3-22b-dev-fp8.safetensors": "checkpoints"}
"""What LTXAVTextEncoderLoader reads, and from where."""
RENAMED = {"dinov2_large.safetensors": "model.safetensors"}
"""Files whose name where they come from is another; notes say so."""
OWN = re.compile(r"(other_)?(character|clothing|object|style|background)(_high_noise|_low_noise)?\.safetensors")
"""LoRAs that a user brings; all other files can be had by the page's button."""


@each_workflow
def test_every_file_but_the_users_own_can_be_downloaded(path):
    """The front end offers what a node's `models` name; of a LoRA with a file per noise level, both. A note
    of files says the same addresses."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    notes = "".join(node["widgets_values"][0] for node in graph["nodes"] if node.get("title") == "Files")
    for node in graph["nodes"]:
        offered = {model["name"]: model for model in node["properties"].get("models", ())}
        files = {value for value in node.get("widgets_values", ()) if str(value).endswith(".safetensors")}
        if node["type"] not in (*FOLDERS, "LTXAVTextEncoderLoader"):
            assert not offered
            continue
        needed = {file for file in files if not OWN.fullmatch(file)}
        needed |= {file.replace("_high_noise", "_low_noise") for file in needed if node["type"] == "LoRAEnsembleLoRA"}
        assert offered.keys() == needed
        for name, model in offered.items():
            assert model["directory"] == FOLDERS.get(node["type"], LTX_ENCODER.get(name))
            there = re.escape(RENAMED.get(name, name))
            assert re.fullmatch(rf"https://huggingface\.co/[^ ?]+/{there}(\?download=true)?", model["url"])
            assert f"({model['url']})" in notes or not notes


@each_workflow
def test_the_note_of_files_names_the_placeholders_that_are_there(path):
    """Guard: two named another file than the graph has, and a LoRA was left without a word on what belongs there."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    notes = "".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] in VIRTUAL)
    named = {found[0] for found in OWN.finditer(notes)}
    used = {value for node in graph["nodes"] for value in node.get("widgets_values", ()) if OWN.fullmatch(str(value))}
    found = {file.replace("_high_noise", "_low_noise") for file in used}  # by Two Noise Levels
    assert not named or used <= named <= used | found


@each_workflow
def test_workflows_of_the_first_version_open(path):
    """What came later stands last on its node: every value that was saved is still that of its widget."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    skip_unknown(json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8")))
    if any(node["type"] == "LoRAEnsembleStack" for node in graph["nodes"]):
        pytest.skip("the first version has no rows")
    new = as_api(graph)
    for node in graph["nodes"]:
        if added := later(node["type"]):
            widgets = [name for name, (kind, _) in host_inputs(node["type"]).items() if is_widget(kind)]
            assert set(widgets[-len(added):]) == added
            earlier = len(widgets) + sum(name in SEEDS for name in widgets) - len(added)
            node["widgets_values"] = node["widgets_values"][:earlier]
    old = as_api(graph)
    for key, node in new.items():
        assert node | {"inputs": node["inputs"] | defaults_of_later(node["class_type"])} == old[key]


def test_the_checks_notice_what_is_wrong():
    graph = json.loads((ROOT / "example_workflows" / "flux_merge.json").read_text(encoding="utf-8"))
    prompt = as_api(graph)
    method = next(key for key, node in prompt.items() if node["class_type"] == "LoRAEnsembleMerge")
    for name, value in (("mode", "sideways"), ("model", prompt[method]["inputs"]["clip"])):
        broken = copy.deepcopy(prompt)
        broken[method]["inputs"][name] = value
        with pytest.raises(AssertionError, match=name):
            check_prompt(broken)
    graph["links"][0][5] = "LATENT"
    with pytest.raises(AssertionError):
        check_graph(graph)


@pytest.mark.skipif("LoRAEnsembleStack" not in IDS, reason="this release cannot show rows")
def test_four_loras_cost_one_node_and_two_wires():
    """More than the plain graph, which is what is left when the node is bypassed."""
    graph = json.loads((ROOT / "example_workflows" / "sdxl_four_loras.json").read_text(encoding="utf-8"))
    full = as_api(graph)
    (ours,) = [node for node in graph["nodes"] if node["type"].startswith("LoRAEnsemble")]
    ours["mode"] = BYPASSED
    plain = as_api(graph)

    def wires(prompt: dict) -> int:
        return sum(isinstance(value, list) for node in prompt.values() for value in node["inputs"].values())

    assert sum(name.rpartition(".")[2].startswith("lora_") for name in full[str(ours["id"])]["inputs"]) == 4
    assert (len(full) - len(plain), wires(full) - wires(plain)) == (1, 2)
    assert {node["class_type"] for node in plain.values()} == {
        "CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode", "SaveImage"}


def test_every_node_and_every_model_family_has_an_example():
    graphs = [json.loads(path.read_text(encoding="utf-8"))["nodes"] for path in WORKFLOWS]
    assert {node["type"] for nodes in graphs for node in nodes} >= set(IDS)
    checkpoints = {node["widgets_values"][0] for nodes in graphs for node in nodes
                   if node["type"] in ("CheckpointLoaderSimple", "UNETLoader")}
    assert checkpoints == {
        "v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors", "flux1-dev-fp8.safetensors",
        "flux1-dev.safetensors", "flux-2-klein-4b.safetensors", "qwen_image_fp8_e4m3fn.safetensors",
        "z_image_turbo_bf16.safetensors", "krea2_turbo_fp8_scaled.safetensors",
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "ltx-2.3-22b-dev-fp8.safetensors", "minimax_h3_fl2va_pruned_int8_convrot.safetensors",
    }  # fmt: skip
    assert {path.name for path in (ROOT / "example_workflows" / "api").iterdir()} == {path.name for path in WORKFLOWS}
