"""CUDA graphs repeat one call's kernels: routed layers must never be in one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lora_ensemble.engine import opaque


def test_inductor_keeps_the_operator_out_of_cuda_graphs():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no tag for it")
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    graph = torch.fx.Graph()
    y, x = graph.placeholder("y"), graph.placeholder("x")
    node = graph.call_function(torch.ops.lora_ensemble.route_.default, (y, x, 0))
    graph.output(y)
    assert get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, graph)) is node


def test_what_records_it_all_the_same_is_stopped(monkeypatch):
    """The backend 'cudagraphs' sees mutating operators wrapped in another, whose tags it does not read."""
    routed = []
    opaque.connect(-1, lambda y, x: routed.append(y))
    y = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="choose backend 'inductor'"):
        opaque.run(y, None, -1)
    assert not routed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    opaque.run(y, None, -1)
    assert routed == [y]
    opaque._routes.pop(-1)
