"""Several cards at once: ComfyUI's own "MultiGPU CFG Split" before or behind the methods. Two names of the CPU stand in
for the cards, or two pretended ones, on which operations across cards fail: the host's node, its scheduler, its
threads, its copies of models and the second set of modules are the real ones."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from lora_ensemble.engine.layout import NotRows
from lora_ensemble.engine.program import Programs
from lora_ensemble.host.compose.cards import settle
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.look.report import report
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.tests.accelerator import DEVICE, Accelerator
from lora_ensemble.tests.accelerator import SECOND as SECOND_CARD
from lora_ensemble.tests.on_gpu import REAL

from .builders import composite, merge, method, sample, stock, three
from .caches import cached
from .guidance_tools import ag
from .kinds import EVERYWHERE
from .models import CPU, FAMILIES, base, build, patcher
from .test_accelerator import transfers  # noqa: F401  (a fixture)
from .test_kinds import LINEAR, file_of, weights
from .test_routed import prompt, routed, specs
from .test_selection import klora

if not hasattr(comfy.model_patcher.ModelPatcher, "match_multigpu_clones"):
    pytest.skip("this ComfyUI has no multi-GPU scheduler", allow_module_level=True)

from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode, SelectModelDeviceNode

SECOND = torch.device("cpu", 0)


def two_devices():
    """The small SD1.5 on the CPU, with a copy of its own on the second device."""
    first = base("SD15")
    twin = build(FAMILIES["SD15"])
    twin.load_state_dict(first.model.state_dict())
    second = comfy.model_patcher.ModelPatcher(twin, load_device=SECOND, offload_device=torch.device("cpu"))
    second.is_multigpu_base_clone = True
    model = first.clone()
    model.set_additional_models("multigpu", [second])
    return model, second


def loaded(family: str = "SD15", device: torch.device = CPU):
    """The small model of a family as a loader gives it: it can be loaded once more."""
    state = {name: value.clone() for name, value in base(family).model.state_dict().items()}

    def load():
        model = build(FAMILIES[family])
        model.load_state_dict(state)
        return patcher(model, device)

    model = load()
    model.cached_patcher_init = (load, ())
    return model


def split(model):
    return MultiGPUCFGSplitNode.execute(model, 2).args[0]


@pytest.fixture
def cards(monkeypatch):
    """The host finds two."""
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: [CPU, SECOND])


@pytest.fixture
def pretended(transfers, monkeypatch):  # noqa: F811
    """The host finds two accelerators, which it may use from threads of its own."""
    if REAL:
        pytest.skip("a second card is a pretended one")
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices",
                        lambda exclude_current=False: [DEVICE, SECOND_CARD])
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda device: Accelerator.here())
    return transfers


def near(got, want, tolerance: float = 1e-4) -> None:
    """Another batch size is another matrix product: equal to rounding, not bit for bit."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def rows(model) -> list[int]:
    """What each card evaluated in the last run."""
    record = record_of(model)
    assert sum(record.devices.values()) == sum(step.rows for step in record.steps)
    return list(record.devices.values())


METHODS: dict[str, tuple[Callable, list[int]]] = {
    "Merge": (merge, [4, 4]),
    "Composite": (composite, [12, 12]),
    "LoRAtorio": (lambda model, ensemble: method(model, ensemble, LoRAtorio), [16, 16]),
    "CMLoRA": (lambda model, ensemble: method(model, ensemble, CMLoRA), [12, 12]),
    "K-LoRA": (lambda model, ensemble: klora(model, ensemble[:2]), [4, 4]),
    "Composite, cached": (lambda model, ensemble: cached(composite(model, ensemble)), [12, 12]),
    "Merge, Composite": (lambda model, ensemble: composite(merge(model, ensemble[:1]), ensemble[1:]), [8, 8]),
}
"""A method, and what each of two cards evaluates in four steps with guidance."""


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize(("name", "family"), [*((name, "SD15") for name in METHODS), ("Composite", "Flux"),
                                             ("LoRAtorio", "Wan")])
def test_every_method_before_and_behind_the_hosts_node(name, family, behind, loras, cards):
    """Guards: forwards are installed on the modules that a call runs on, with the bank that the host copied for that
    card (`cached_patcher_init`), and none is left there."""
    make, counts = METHODS[name]
    ensemble = three(base(family), loras)
    want = sample(make(base(family), ensemble), family, steps=4)
    model = loaded(family)
    ours = split(make(model, ensemble)) if behind else make(split(model), ensemble)
    for _ in range(2):  # the copies are there when the second run begins
        near(sample(ours, family, steps=4), want, 1e-3 if "cached" in name else 1e-4)
        assert rows(ours) == counts and record_of(ours).problems == []
    (copy,) = ours.get_additional_models_with_key("multigpu")
    pairs = list(zip(ours.get_additional_models_with_key(KEY), copy.get_additional_models_with_key(KEY), strict=True))
    for bank, other in pairs:
        assert bank.model is not other.model and other.load_device == SECOND != bank.load_device
        assert all(map(torch.equal, bank.model.parameters(), other.model.parameters()))
    assert pairs and not [name for name, module in copy.model.named_modules() if "forward" in module.__dict__]


def test_every_kind_of_adapter_above_another_nodes_lora(loras, cards):
    """Some kinds read the weights that they act on: each card its own, as earlier nodes left them."""
    ensemble = [LoRASpec(loras(file_of(weights(LINEAR), kind)), 0.3, 0) for kind in EVERYWHERE.values()]
    below, model = three(base("SD15"), loras)[:1], loaded()  # before the other's weights are patched
    want = sample(composite(stock(base("SD15"), below), ensemble))
    ours = composite(split(stock(model, below)), ensemble)
    near(sample(ours), want)
    assert rows(ours) == [2 * len(ensemble)] * 2


@pytest.mark.parametrize("mode", ["every step", "once"])
def test_places_by_words(mode, loras, cards):
    """The card that has the positive reads its attention, for the LoRAs on both."""
    ensemble = specs(base("Flux"), loras)
    want = sample(routed(base("Flux"), ensemble, mode=mode), "Flux", prompt("Flux"), steps=4)
    ours = split(routed(loaded("Flux"), ensemble, mode=mode))
    near(sample(ours, "Flux", prompt("Flux"), steps=4), want)
    assert min(rows(ours)) == 4


def test_guidance_that_ends(loras, cards):
    """From then on the branches of the conditional side have both cards."""
    ensemble = three(base("SD15"), loras)
    want = sample(ag(composite(base("SD15"), ensemble), 0.5), cfg=4.0, steps=6)
    ours = split(ag(composite(loaded(), ensemble), 0.5))
    near(sample(ours, cfg=4.0, steps=6), want, 1e-3)
    assert [step.rows for step in record_of(ours).steps] == [6, 3, 3, 3, 3, 3] and rows(ours) == [13, 8]


def test_a_second_card_that_has_nothing_to_do(loras, cards):
    """One branch without guidance is one prediction, for all pictures of the batch."""
    ours = split(merge(loaded(), three(base("SD15"), loras)))
    want = sample(merge(base("SD15"), three(base("SD15"), loras)), cfg=1.0, batch=2)
    assert torch.equal(sample(ours, cfg=1.0, batch=2), want) and rows(ours) == [4, 0]
    (line,) = record_of(ours).problems
    assert line.startswith("cpu:0 had nothing to do: ")
    assert '"devices": {"cpu": 4, "cpu:0": 0}' in report(ours, torch.zeros(1))[1]


def test_a_run_on_one_card_names_none(loras):
    ours = merge(base("SD15"), three(base("SD15"), loras))
    sample(ours)
    assert record_of(ours).devices == {} and record_of(ours).problems == []


def test_rows_that_cannot_be_told_apart(loras, cards, monkeypatch):
    """Guards: of a call that failed on one card the host keeps what the other found, and took it for the answer to the
    next call."""
    ensemble = three(base("SD15"), loras)
    want = sample(composite(base("SD15"), ensemble))
    owners, failed = Programs._owners, []

    def of(programs, layout, name, y, x):
        if not layout.uniform and name == "out.2":  # late, so that the other card is at work
            failed.append(name)
            raise NotRows(name, 1, 3)
        return owners(programs, layout, name, y, x)

    monkeypatch.setattr(Programs, "_owners", of)
    ours, until = composite(split(loaded()), ensemble), []
    near(sample(ours, steps=2, callback=lambda *_: until.append(len(failed))), want)
    (line,) = record_of(ours).problems
    assert failed and until == [len(failed)] * 2 and "in a batch of its own" in line
    failed.clear()
    near(sample(ours, steps=2), want)


def test_another_error_is_not_taken_for_that():
    class Pool:
        devices = (CPU,)

        def __init__(self, *found):
            self.found = list(found)

        def submit(self, card, function):
            self.found.append((function(), None))

        def get_result(self, card):
            return self.found.pop(0)

    settle({})
    pool = Pool((None, NotRows("layer", 1, 2)))
    settle({"multigpu_thread_pool": pool})
    assert pool.found == []
    with pytest.raises(MemoryError):
        settle({"multigpu_thread_pool": Pool((None, MemoryError()))})


def test_a_copy_from_an_earlier_run_takes_the_banks_in_their_order(loras, cards):
    """Guards: the host takes the copy that is still on the card, with the banks of that run, and put new ones behind
    them: LoRAs of one method acted as those of another."""
    model, ensemble = loaded(), three(base("SD15"), loras)
    first, second = ensemble[:1], ensemble[1:]
    sample(split(composite(model, second)))
    ours = split(composite(merge(model, first), second))
    want = sample(composite(merge(base("SD15"), first), second))
    near(sample(ours), want)
    (copy,) = ours.get_additional_models_with_key("multigpu")
    assert [bank.clone_base_uuid for bank in copy.get_additional_models_with_key(KEY)] == [
        bank.clone_base_uuid for bank in ours.get_additional_models_with_key(KEY)]


MIXED: dict[str, Callable] = {
    "Composite": composite,
    "LoRAtorio": lambda model, ensemble: method(model, ensemble, LoRAtorio),
    "Composite, cached": lambda model, ensemble: cached(composite(model, ensemble)),
}


@pytest.mark.parametrize("name", MIXED)
def test_no_operation_is_across_cards(name, loras, pretended):
    ensemble = three(base("SD15"), loras)
    want = sample(MIXED[name](base("SD15"), ensemble), steps=3)
    ours = split(MIXED[name](loaded(device=DEVICE), ensemble))
    pretended.clear()
    near(sample(ours, steps=3), want)
    record = record_of(ours)
    assert rows(ours) == [sum(step.rows for step in record.steps) / 2] * 2
    assert any(each.kind == "across" for each in pretended)


@pytest.mark.parametrize("mode", ["every step", "once"])
def test_no_places_are_across_cards(mode, loras, pretended):
    ensemble = specs(base("Flux"), loras)
    want = sample(routed(base("Flux"), ensemble, mode=mode), "Flux", prompt("Flux"), steps=3)
    ours = split(routed(loaded("Flux", DEVICE), ensemble, mode=mode))
    near(sample(ours, "Flux", prompt("Flux"), steps=3), want)
    assert min(rows(ours)) == 3


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_a_model_that_the_host_puts_on_another_card(behind, loras, pretended):
    """Select Model Device: the model and its LoRAs are there alone."""
    ensemble = three(base("SD15"), loras)
    want = sample(composite(base("SD15"), ensemble))

    def put(model):
        return SelectModelDeviceNode.execute(model, "gpu:1").args[0]

    model = loaded(device=DEVICE)
    ours = put(composite(model, ensemble)) if behind else composite(put(model), ensemble)
    near(sample(ours), want)
    (bank,) = ours.get_additional_models_with_key(KEY)
    assert ours.load_device == bank.load_device == SECOND_CARD and record_of(ours).problems == []
