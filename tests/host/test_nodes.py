"""Schemas and help pages of the nodes; what the small converters accept and refuse."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import lora_ensemble
import pytest
from comfy_api.latest import io
from comfy_execution.caching import CacheKeySetInputSignature
from comfy_execution.graph import DynamicPrompt
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.nodes.baselines import LoRAEnsembleComposite, LoRAEnsembleMerge, LoRAEnsembleSwitch
from lora_ensemble.nodes.ensembles import LoRAEnsembleFromStack, LoRAEnsembleLoRA
from lora_ensemble.nodes.menu import SHELVES, advanced
from lora_ensemble.nodes.order import turns_of

import nodes as host_nodes

from .models import base
from .test_ensembles import two  # noqa: F401  (a fixture)

ROOT = Path(lora_ensemble.__file__).parent
NODES = asyncio.run(asyncio.run(lora_ensemble.comfy_entrypoint()).get_node_list())
IDS = {
    "LoRAEnsembleLoRA": "LoRA (Ensemble)",
    "LoRAEnsembleFromStack": "LoRA Stack to Ensemble",
    "LoRAEnsembleNoiseLevels": "Two Noise Levels (Ensemble)",
    "LoRAEnsembleMerge": "Merge LoRAs",
    "LoRAEnsembleSwitch": "Switch LoRAs",
    "LoRAEnsembleComposite": "Composite LoRAs",
    "LoRAEnsembleRouted": "Routed LoRAs",
    "LoRAEnsembleReport": "Ensemble Report",
    "LoRAEnsembleLeaveOneOut": "What did each LoRA do?",
    "LoRAEnsembleLoRAtorio": "LoRAtorio",
    "LoRAEnsembleCMLoRA": "CMLoRA (Cached Multi-LoRA)",
    "LoRAEnsembleSpectrum": "LoRA Spectrum",
    "LoRAEnsembleBranchCache": "Branch Cache",
    "LoRAEnsembleKLoRA": "K-LoRA",
    "LoRAEnsembleESTLoRA": "EST-LoRA",
    "LoRAEnsembleLayerMap": "LoRA Layer Map",
    "LoRAEnsembleStyleDiscrepancy": "Style Discrepancy",
    "LoRAEnsembleAdaptiveGuidance": "Adaptive Guidance (Skip CFG)",
    "LoRAEnsembleAdaptiveGuider": "CFG Guider (Adaptive Guidance)",
    "LoRAEnsembleKSampler": "KSampler (Adaptive Guidance)",
    "LoRAEnsembleCalibrateGuidance": "Calibrate Guidance",
    "LoRAEnsembleSaveCoeffs": "Save Guidance Coefficients",
    "LoRAEnsembleLoadCoeffs": "Load Guidance Coefficients",
    "LoRAEnsemblePrompt": "Ensemble Prompt",
    "LoRAEnsembleInfo": "LoRA Info",
}
if hasattr(io, "DynamicCombo"):  # older releases cannot show rows
    IDS["LoRAEnsembleStack"] = "LoRA Ensemble"
PAGES = {*IDS, "LoRAEnsembleStack"}
WITHOUT_A_PAPER = {"LoRAEnsembleLoRA", "LoRAEnsembleFromStack", "LoRAEnsembleNoiseLevels", "LoRAEnsemblePrompt",
                   "LoRAEnsembleStack", "LoRAEnsembleInfo"}

each_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)


# --- schemas and help ---


def test_ids_and_display_names_are_those_that_workflows_in_the_wild_use():
    assert {node.GET_SCHEMA().node_id: node.GET_SCHEMA().display_name for node in NODES} == IDS


def test_the_pack_offers_the_v3_entry_point_alone():
    """The host looks at NODE_CLASS_MAPPINGS first, and never at the entry point where there is one."""
    assert not hasattr(lora_ensemble, "NODE_CLASS_MAPPINGS")
    assert (ROOT / lora_ensemble.WEB_DIRECTORY / "docs").is_dir()


@each_node
def test_everything_on_a_node_is_explained(node):
    schema = node.GET_SCHEMA()
    assert schema.description
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip and part.tooltip.endswith("."), f"{schema.node_id}: {part.id or part.display_name}"


def tooltip(node: type[io.ComfyNode], name: str) -> str:
    return next((part.tooltip for part in node.GET_SCHEMA().inputs if part.id == name), "")


@each_node
def test_a_clip_is_asked_for_where_words_are_and_the_model_that_is_sampled_where_it_is_meant(node):
    """Guard: the tooltip of clip said to leave it unconnected for LoRAs of the model alone, with which Routed finds no
    place; guidance, its calibration and the cache asked for a model straight from its loader."""
    name, model = node.GET_SCHEMA().node_id.removeprefix("LoRAEnsemble"), tooltip(node, "model")
    if tooltip(node, "place") or name in ("Routed", "Stack"):
        assert "where their words are" in tooltip(node, "clip") and "straight from its loader" in model
    elif name in ("AdaptiveGuidance", "AdaptiveGuider", "KSampler", "CalibrateGuidance", "BranchCache"):
        assert "that you sample with" in model and "loader" not in model


def test_the_menu_has_every_node_on_a_shelf_and_no_other():
    listed = [f"LoRAEnsemble{name}" for names in SHELVES.values() for name in names]
    assert len(listed) == len(set(listed)) and set(IDS) <= set(listed)
    for node in NODES:
        schema = node.GET_SCHEMA()
        assert schema.category in {f"LoRA Ensemble/{shelf}" for shelf in SHELVES}, schema.node_id


@each_node
def test_what_beginners_need_not_see_waits_behind_advanced(node):
    """Only widgets that are there: a socket would go on showing. Some widget of every node stays in sight."""
    schema = node.GET_SCHEMA()
    later = advanced(schema.node_id)
    shown = node.INPUT_TYPES()
    options = {name: spec[1] for part in ("required", "optional") for name, spec in shown.get(part, {}).items()}
    widgets = {part.id for part in schema.inputs if isinstance(part, io.WidgetInput)}
    assert later <= widgets and (not later or later < widgets)
    knows = "advanced" in inspect.signature(io.Combo.Input).parameters
    assert {name for name in options if options[name].get("advanced")} == (later if knows else set())


COMPARES = re.compile("released code: |as the released code|raw factors|authors' program|only to compare|an older node")


@each_node
def test_what_compares_a_paper_with_its_released_code_waits_behind_advanced(node):
    schema = node.GET_SCHEMA()
    compares = {part.id for part in schema.inputs if COMPARES.search(part.tooltip or "")}
    assert compares <= advanced(schema.node_id)


def test_the_words_of_such_comparisons_are_known():
    """Each method that has one is found by them."""
    found = {node.GET_SCHEMA().node_id for node in NODES
             for part in node.GET_SCHEMA().inputs if COMPARES.search(part.tooltip or "")}
    assert found >= {"LoRAEnsembleSwitch", "LoRAEnsembleCMLoRA", "LoRAEnsembleKLoRA", "LoRAEnsembleESTLoRA",
                     "LoRAEnsembleAdaptiveGuidance"}


@each_node
def test_no_node_meets_a_beginner_with_a_wall_of_widgets(node):
    schema = node.GET_SCHEMA()
    own = [part.id for part in schema.inputs if isinstance(part, io.WidgetInput)]
    stock = {"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"}
    assert len(set(own) - advanced(schema.node_id) - stock) <= 6


@each_node
def test_search_aliases_reach_the_releases_that_know_them(node):
    schema = node.GET_SCHEMA()
    assert getattr(schema, "search_aliases", ["unknown to this release"])


@each_node
def test_execute_takes_exactly_the_inputs_of_the_schema(node):
    """One more or one less and the host fails only when the node runs."""
    code, inputs = inspect.unwrap(node.execute.__func__).__code__, {part.id for part in node.GET_SCHEMA().inputs}
    taken = set(code.co_varnames[1 : code.co_argcount])
    if code.co_flags & inspect.CO_VARKEYWORDS:
        from lora_ensemble.nodes.rows import row_inputs  # not on older releases

        assert node.__name__ == "LoRAEnsembleStack"
        inputs -= {part.id for part in row_inputs([])}
    assert taken == inputs


@each_node
def test_a_node_that_composes_is_not_taken_for_an_equal_one(node, monkeypatch):
    """What it does while a model samples is told on it, not on an equal node whose output the host has kept."""
    schema = node.GET_SCHEMA()
    composes = "LORA_ENSEMBLE" in {part.io_type for part in schema.inputs} \
        and "MODEL" in {part.io_type for part in schema.outputs}
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, schema.node_id, node)
    prompt = DynamicPrompt({name: {"class_type": schema.node_id, "inputs": {}} for name in "ab"})
    keys = CacheKeySetInputSignature(prompt, "ab", Unchanged())
    asyncio.run(keys.add_keys("ab"))
    assert (keys.get_data_key("a") != keys.get_data_key("b")) == composes


class Unchanged:
    async def get(self, node_id: str) -> str:
        return ""


@each_node
def test_help_page_names_every_input(node):
    text = (ROOT / "web" / "docs" / f"{node.GET_SCHEMA().node_id}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {node.GET_SCHEMA().display_name}\n")
    (inputs,) = re.findall(r"^## Inputs\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (\w+) \|", inputs, flags=re.MULTILINE)
    assert set(rows) - {"input"} == {part.id for part in node.GET_SCHEMA().inputs}
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text) or node.__name__ in WITHOUT_A_PAPER


def test_no_help_page_without_a_node():
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == PAGES


# --- what comes in ---


def test_a_choice_that_is_none_is_refused_by_every_release(two):  # noqa: F811
    """Older ones do not check V3 combos, and none checks a linked one."""
    ensemble = (LoRASpec(two[0], 1.0, 1.0),)
    for run, name in ((lambda: LoRAEnsembleLoRA.execute(two[0], 1.0, 1.0, "villain"), "villain"),
                      (lambda: LoRAEnsembleMerge.execute(None, ensemble, "sideways"), "sideways"),
                      (lambda: LoRAEnsembleSwitch.execute(None, ensemble, 5, "", "later"), "later")):  # fmt: skip
        with pytest.raises(ValueError, match=f"'{name}'. Choose one of: "):
            run()


def own_numbers(node) -> list[io.Input]:
    """Those that are not handed over to the host's sampling."""
    return [part for part in node.GET_SCHEMA().inputs if isinstance(part, (io.Float.Input, io.Int.Input))
            and part.id not in ("seed", "steps", "cfg", "denoise")]


@pytest.mark.parametrize("node", [*filter(own_numbers, NODES)], ids=lambda node: node.__name__)
def test_a_number_that_is_none_is_refused_by_name(node, two):  # noqa: F811
    """The host does not check linked numbers, and for it NaN is within any range."""
    given = {part.id: getattr(part, "default", None) for part in node.GET_SCHEMA().inputs if not part.optional}
    given |= {part.id: part.options[0] for part in node.GET_SCHEMA().inputs
              if isinstance(part, io.Combo.Input) and given.get(part.id, "") is None and part.options}
    given |= {"lora_name": two[0]} if "lora_name" in given else {}
    rows = node.__name__ == "LoRAEnsembleStack"  # the host writes None for fields of its rows that are left out
    given |= {"lora_1": two[0]} if rows else {}
    for part in own_numbers(node):
        for value in (float("nan"), float("inf"), "many", *([] if rows else [None]), part.min - 1, part.max + 1):
            with pytest.raises(ValueError, match=f"{part.id} is {value!r}. It must be a (whole )?number from"):
                node.execute(**given | {part.id: value})


# --- the order of turns ---

THREE = tuple(LoRASpec(f"{name}.safetensors", 1.0, 1.0) for name in "abc")
MUTED = (THREE[0], LoRASpec("b.safetensors", 0.0, 1.0), THREE[2])


@pytest.mark.parametrize(("text", "ensemble", "turns"), [
    ("", THREE, None), ("  ", THREE, None), ("2,1,3", THREE, (1, 0, 2)), (" 3 , 2,1 ", THREE, (2, 1, 0)),
    ("3 1 2", THREE, (2, 0, 1)), ("3,1", MUTED, (1, 0)), ("3,2,1", MUTED, (1, 0)), ("1,2,3", MUTED, (0, 1)),
])  # fmt: skip
def test_order_of_turns(text, ensemble, turns):
    assert turns_of(text, ensemble, tuple(lora for lora in ensemble if lora.strength_model != 0)) == turns


@pytest.mark.parametrize(("text", "message"), [
    ("1,2", "leaves out LoRA 3 .'c.safetensors'."), ("1,2,3,4", "names LoRA 4, but the ensemble has 3"),
    ("1,1,2,3", "twice"), ("0,1,2", "such as 2,1,3"), ("b,a,c", "such as 2,1,3"), ("1;2;3", "such as 2,1,3"),
    ("-1,2,3", "such as 2,1,3"), ("9" * 5000, "such as 2,1,3"),
])  # fmt: skip
def test_orders_that_cannot_be_followed(text, message):
    with pytest.raises(ValueError, match=message):
        turns_of(text, THREE, THREE)


def test_the_notation_is_checked_before_the_run():
    assert LoRAEnsembleSwitch.validate_inputs(order="2,1") is True
    assert LoRAEnsembleSwitch.validate_inputs(order=None) is True
    assert "2,1,3" in LoRAEnsembleSwitch.validate_inputs(order="first,second")


@pytest.mark.parametrize(("node", "options"), [
    (LoRAEnsembleMerge, ["runtime"]), (LoRAEnsembleMerge, ["baked"]), (LoRAEnsembleSwitch, [5, "2,1", "paper"]),
    (LoRAEnsembleComposite, []),
])  # fmt: skip
def test_an_empty_ensemble_is_refused_by_the_node_that_needs_one(node, options):
    with pytest.raises(ValueError, match=f"{node.GET_SCHEMA().display_name}: the ensemble is empty. Connect.*, or "
                       "switch on a LoRA of the stack"):
        node.execute(base("SD15"), (), *options)


def test_sockets_have_the_types_that_other_packs_use():
    outputs = [part for node in NODES for part in node.GET_SCHEMA().outputs]
    assert {str(part.io_type) for part in outputs} == {
        "LORA_ENSEMBLE", "MODEL", "CLIP", "GUIDER", "LATENT", "STRING", "IMAGE", "FLOAT", "GUIDANCE_COEFFS",
        "CONDITIONING", *(["LORA_STACK"] if "LoRAEnsembleStack" in IDS else []),
    }  # fmt: skip
    assert str(LoRAEnsembleFromStack.GET_SCHEMA().inputs[0].io_type) == "LORA_STACK"
    assert all(issubclass(node, io.ComfyNode) for node in NODES)
