"""Routed layers under torch.compile: how many graphs, what they read, and that they compute what eager layers do."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lora_ensemble.engine import compiled
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.layout import NotRows
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import close, expected, make_ops
from lora_ensemble.tests.test_engine_ops import spanned
from torch import Tensor, nn

STRENGTHS = (0.7, 0.9, 1.1)
ALONE = [one_hot(STRENGTHS, i) for i in range(3)]
ALL = Branch(STRENGTHS)
LAYOUTS = {
    "composite": [ALONE[0], ALONE[0], ALONE[1], ALONE[1], ALONE[2], ALONE[2]],
    "scattered": [ALONE[0], ALONE[2], Branch((0.0, 0.0, 0.0)), ALONE[1], ALONE[0], ALL],
    "merged": [ALL] * 6,
    "a turn": [ALONE[1]] * 6,
    "per layer": [Branch(STRENGTHS, (("blocks.1.inner", (0.0, 0.5, 0.0)), ("blocks.3.outer", (0.0, 0.0, 0.0))))] * 6,
}
LORAS = ("lora", "lora wide", "lora")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def bank_of(net: Net, kinds=LORAS, seed: int = 0) -> tuple[Bank, list[dict]]:
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    built = [{name: make_ops(kind, net.get_submodule(name).weight.shape, seed + 100 * i + k)
              for k, name in enumerate(names)} for i, kind in enumerate(kinds)]
    return (Bank([{name: ops for name, (ops, _) in adapter.items()} for adapter in built]),
            [{name: change for name, (_, change) in adapter.items()} for adapter in built])


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs):
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> list[str]:
        return [str(node.target) for graph in self.graphs for node in graph.graph.nodes if "route_" in str(node.target)]


def agrees(call, routed: RoutedForwards, net: Net, changes: list[dict], x: Tensor) -> None:
    """In every layout the compiled model is the one whose weights are really changed."""
    for branches in LAYOUTS.values():
        with routed.rows(branches):
            y = call(x)
        assert close(y, expected(fresh(net), changes, branches, x))


def compile_(net: Net, backend, whole: bool):
    if whole:
        return torch.compile(net, backend=backend)
    blocks = [torch.compile(block, backend=backend) for block in net.blocks]

    def call(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    return call


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "block by block"])
def test_no_more_graphs_than_the_plain_model_has(net, whole):
    """And none anew when LoRAs change turns, strengths or rows, nor in a second run; one set for LoRAs, one without."""
    backend = Counted()
    call = compile_(net, backend, whole)
    x = torch.randn(6, 5, 16)
    with torch.no_grad():
        call(x)
        plain, made = len(backend.graphs), []
        for seed in (0, 7):
            bank, changes = bank_of(net, seed=seed)
            for _ in range(2):
                routed = RoutedForwards(net, bank, compiled=True)
                routed.install()
                for branches in LAYOUTS.values():
                    with routed.rows(branches):
                        y = call(x)
                    made.append((y, changes, branches))
                routed.remove()
        call(x)
    assert len(backend.graphs) == 2 * plain and not backend.operators()
    for y, changes, branches in made:
        assert close(y, expected(net, changes, branches, x))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "block by block"])
def test_slices_of_one_weight_share_what_they_need_of_the_input(net, whole):
    """Of two slices and three LoRAs: one product of inputs and one for the outputs of both; nothing opaque."""
    spans = [(0, 0, 16), (0, 16, 16)]
    files = [{f"blocks.{k}.inner": [make_ops(kind, (16, 16), 100 * seed + 10 * k + s) for s in range(2)]
              for k in range(5)} for seed, kind in enumerate(LORAS)]

    def changed(w: Tensor, b: Tensor, g: float, made: list) -> tuple[Tensor, Tensor]:
        return torch.cat([change(w.narrow(*span), b, g)[0] for span, (_, change) in zip(spans, made, strict=True)]), b

    changes = [{name: partial(changed, made=made) for name, made in file.items()} for file in files]
    bank = Bank([{name: [spanned(op, span) for span, ((op,), _) in zip(spans, made, strict=True)]
                  for name, made in file.items()} for file in files])
    routed, backend = RoutedForwards(net, bank, compiled=True), Counted()
    routed.install()
    call, x = compile_(net, backend, whole), torch.randn(6, 5, 16)
    with torch.no_grad():
        agrees(call, routed, net, changes, x)
    routed.remove()
    assert not backend.operators()
    names = [str(node.target) for node in backend.graphs[0].graph.nodes]
    layers = 5 if whole else 1
    assert sum("linear" in name for name in names) == 2 * layers, "inner and outer"
    # One product of inputs and one for the outputs of both slices.
    assert sum("bmm" in name for name in names) == 2 * layers
    assert sum("baddbmm" in name for name in names) == layers


@pytest.mark.parametrize("kinds", [("lora", "dora out", "lora"), ("boft", "lora", "dense")], ids="-".join)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "block by block"])
def test_other_kinds_are_one_operator_that_is_the_same_in_every_block(net, whole, kinds):
    backend = Counted()
    call = compile_(net, backend, whole)
    bank, changes = bank_of(net, kinds)
    x = torch.randn(6, 5, 16)
    with torch.no_grad():
        call(x)
        plain = len(backend.graphs)
        routed = RoutedForwards(net, bank, compiled=True)
        routed.install()
        agrees(call, routed, net, changes, x)
        routed.remove()
    assert len(backend.graphs) == 2 * plain and backend.operators()


@pytest.mark.parametrize("told", [True, False])
def test_compiled_without_being_told(net, told):
    """Where nobody says that the compiler sees the model, all that LoRAs add is the operator: no LoRA is lost."""
    backend = Counted()
    call = compile_(net, backend, True)
    bank, changes = bank_of(net)
    x = torch.randn(6, 5, 16)
    routed = RoutedForwards(net, bank, compiled=told)
    routed.install()
    with torch.no_grad():
        agrees(call, routed, net, changes, x)
        assert torch.equal(call(x), fresh(net)(x))
    routed.remove()
    assert bool(backend.operators()) != told


def test_places_go_through_the_operator(net):
    backend = Counted()
    call = compile_(net, backend, True)
    bank, _ = bank_of(net)
    x = torch.randn(6, 4, 16)
    places = Places(torch.rand(1, 3, 2, 2), (0,) * 6, locate=lambda layer, tokens: (Segment("picture", 4, (1, 2, 2)),))
    routed = RoutedForwards(net, bank, compiled=True)
    routed.install()
    with torch.no_grad(), routed.rows(LAYOUTS["scattered"], places):
        assert torch.allclose(call(x), net(x), atol=1e-6)
    routed.remove()
    assert backend.operators()


class Recorded:
    """What CUDA graphs are, on a CPU: a call is recorded, and later ones run it again on the memory that it read then.
    Inputs that stay where they are are read there, one recording for each place (blocks of a model share a graph);
    others are copied to where they were."""

    def __init__(self):
        self.recordings: list[list[Tensor]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs):
        recorded: dict[tuple, list[Tensor]] = {}

        def call(*now):
            key = tuple(t.data_ptr() for t in now if fixed(t))
            if key not in recorded:
                recorded[key] = [t if fixed(t) else t.clone() for t in now]
                self.recordings.append(recorded[key])
            for then, t in zip(recorded[key], now, strict=True):
                if not fixed(t):
                    then.copy_(t)
            return graph.forward(*recorded[key])

        return call


def fixed(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, "_dynamo_static_input_type")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "block by block"])
def test_a_recorded_graph_is_right_for_every_later_batch(net, whole):
    """CUDA graphs: LoRAs take turns, change strength and rows, and the same recording serves."""
    backend = Recorded()
    call = compile_(net, backend, whole)
    bank, changes = bank_of(net)
    x = torch.randn(6, 5, 16)
    routed = RoutedForwards(net, bank, compiled=True)
    routed.install()
    with torch.no_grad():
        for _ in range(2):
            agrees(call, routed, net, changes, x)
    routed.remove()
    # Recorded once, however many runs and layouts; of what it reads only the activations come from elsewhere.
    assert len(backend.recordings) == (1 if whole else 5)
    assert all(sum(not fixed(t) for t in recorded) == 1 for recorded in backend.recordings)


@pytest.mark.parametrize("order", ["repeat", "tile"])
def test_entries_that_are_folded_into_the_batch(net, order):
    """They are part of the graph as well, and of a recording of it."""
    backend, counted = Recorded(), Counted()
    bank, changes = bank_of(net)
    x = torch.randn(6, 3, 5, 16)
    if order == "tile":
        into, back = (lambda t: t.transpose(0, 1).flatten(0, 1)), (lambda t: t.unflatten(0, (3, 6)).transpose(0, 1))
    else:
        into, back = (lambda t: t.flatten(0, 1)), (lambda t: t.unflatten(0, (6, 3)))
    routed = RoutedForwards(net, bank, compiled=True,
                            order=lambda layer, entries, rows: "rows" if entries == rows else order)
    routed.install()
    with torch.no_grad():
        for each in (backend, counted):
            call = compile_(net, each, True)
            for branches in LAYOUTS.values():
                with routed.rows(branches):
                    y = back(call(into(x)))
                assert close(y.flatten(0, 1), expected(fresh(net), changes, branches, x.flatten(0, 1)))
    routed.remove()
    assert len(backend.recordings) == len(counted.graphs) == 1 and not counted.operators()


@pytest.mark.parametrize("rows", [6, 16])
def test_without_a_batch(net, rows):
    """A vector, in a run of one branch, as many rows as it is long or not."""
    bank, changes = bank_of(net)
    x, routed = torch.randn(16), RoutedForwards(net, bank, compiled=True)
    routed.install()
    with torch.no_grad(), routed.rows([ALL] * rows):
        y = compile_(net, Counted(), True)(x)
    routed.remove()
    assert close(y, expected(net, changes, [ALL], x[None])[0])


def fresh(net: Net) -> Net:
    """The same weights in a model that nothing was ever installed on."""
    copy = Net()
    copy.load_state_dict(net.state_dict())
    return copy


def test_inductor_keeps_the_operator_out_of_cuda_graphs():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no tag for it")
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    graph = torch.fx.Graph()
    y, x, handle = graph.placeholder("y"), graph.placeholder("x"), graph.placeholder("handle")
    node = graph.call_function(torch.ops.lora_ensemble.route_.default, (y, x, handle))
    graph.output(y)
    assert get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, graph)) is node


def test_what_records_it_all_the_same_is_stopped(monkeypatch):
    """The backend 'cudagraphs' sees mutating operators wrapped in another, whose tags it does not read."""
    routed, handle = [], torch.tensor(-1)
    compiled.connect(handle, lambda y, x: routed.append(y))
    y = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="choose backend 'inductor'"):
        compiled.run(y, None, handle)
    assert not routed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    compiled.run(y, None, handle)
    assert routed == [y]
    compiled._routes.pop(-1)


def test_layers_whose_entries_are_not_rows_are_not_taken_for_rows(net):
    """Guard: as many entries as rows, in another order: only one branch for all may be part of the graph there."""
    backend = Counted()
    call = compile_(net, backend, True)
    bank, changes = bank_of(net)
    x = torch.randn(6, 5, 16)
    routed = RoutedForwards(net, bank, compiled=True, order=lambda layer, entries, rows: None)
    routed.install()
    with torch.no_grad():
        with routed.rows(LAYOUTS["merged"]):
            assert close(call(x), expected(fresh(net), changes, LAYOUTS["merged"], x))
        assert not backend.operators()
        with pytest.raises(NotRows), routed.rows(LAYOUTS["composite"]):
            call(x)
    routed.remove()


class Gives(nn.Linear):
    """A layer whose outputs are of a dtype of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


def test_outputs_of_another_dtype_than_inputs():
    torch.manual_seed(0)
    root, x = nn.Sequential(Gives(16, 16)).requires_grad_(False), torch.randn(2, 5, 16)
    bank, rows = Bank([{"0": make_ops("lora", (16, 16), 0)[0]}]), [Branch((0.5,))] * 2
    found = []
    for whether in (False, True):
        routed = RoutedForwards(root, bank, compiled=whether)
        routed.install()
        with torch.no_grad(), routed.rows(rows):
            found.append((torch.compile(root, backend="eager") if whether else root)(x))
        routed.remove()
    assert torch.equal(*found) and not torch.equal(found[0], root(x))
