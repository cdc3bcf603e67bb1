"""What sees to what models and nodes keep from call to call, by itself: what it takes for such, and when it lets go."""

from __future__ import annotations

from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from lora_ensemble.host.compose.kept import KeptBetweenCalls, keepers_of
from torch import nn


def test_nothing_is_kept_for_a_film_with_one_history():
    guard, state = KeptBetweenCalls(pytest.fail), {"ar_state": {"kv_caches": []}}
    assert guard.arrange(nn.Linear(1, 1), state, (1,), 1, (None,)) is state
    with pytest.raises(ValueError, match="one history"):
        guard.arrange(nn.Linear(1, 1), state, (1, 2), 2, (None, None))


class Layer(nn.Module):
    """A module with a store of its own, which it may need."""

    cache: list = []

    def cleanup(self):
        pytest.fail("not ours")


def test_what_is_no_store_of_a_run_is_left_alone():
    """Modules, their classes, tensors and objects that only end in some way: none of them is let go between calls, or
    left out with one that is."""
    other = SimpleNamespace(cleanup=lambda: pytest.fail("not ours"), free=lambda: pytest.fail("not ours"))
    patches = {"attn1_patch": [other, Layer(), Layer, print], "attn2_patch": [print]}
    options = {"easycache": other, "tensor": torch.ones(1), "patches": patches}
    assert list(keepers_of(nn.Linear(1, 1), options)) == []
    store = SimpleNamespace(cleanup=print, cache={})
    more = {**options, "patches": {**patches, "attn1_patch": [store, *patches["attn1_patch"]]}}
    (keeper,) = keepers_of(nn.Linear(1, 1), more)
    assert keeper.off(more) == options


def test_only_a_few_calls_are_in_vain():
    """Rows that come back after others are worth keeping while calls in between make use of what is kept."""
    told, forgot = [], []
    store = SimpleNamespace(free=lambda: forgot.append(1), slots=[])
    root, options = nn.Linear(1, 1), {"store": store, "other": 1}
    for sequence, used in (("aabbaabb", True), ("abbbbbbb", True), ("ababab", False)):
        guard = KeptBetweenCalls(told.append)
        outs = [guard.arrange(root, options, (row,), 1, (None,)) for row in sequence]
        assert outs[-1] == (options if used else {"other": 1})
        guard.close()
    first, second, third = told
    assert "made anew 3 times" in first and "made anew 1 time " in second and "not used" in third


class Keeps(nn.Module):
    """A stand-in for what ComfyUI's HiDream-O1 and later Qwen-Image 2.1 let go by themselves."""

    prefix_cache_enabled = True

    def __init__(self, forgot: list):
        super().__init__()
        self.clear_kv_cache, self.reset_prefix_cache = lambda: forgot.append("kv"), forgot.append


def test_all_that_was_kept_in_a_run_is_let_go_at_its_end():
    """Of models, and of nodes that were there in one call alone. What is not used leaves other options as they are."""
    forgot: list = []
    root = Keeps(forgot)
    stores = {name: SimpleNamespace(free=lambda name=name: forgot.append(name), slots=[]) for name in "ab"}
    guard = KeptBetweenCalls(lambda line: None)
    for name, store in stores.items():
        guard.arrange(root, {name: store}, ("row",), 1, (None,))
    forgot.clear()
    guard.close()
    assert sorted(map(str, forgot)) == ["True", "a", "b", "kv"]
    (off,) = [keeper.off for keeper in keepers_of(root, {}) if keeper.off is not None]
    assert off({"qwen_image21_cache": {"device": "cpu", "more": 1}, "x": 2}) == {
        "qwen_image21_cache": {"device": "off", "more": 1}, "x": 2}


def test_rows_that_all_have_the_same_are_one_whatever_their_number():
    """A guider evaluates its sides in one call or in two, as memory allows. Nothing leads back to the model at the end.
    """
    forgot, guard, root = [], KeptBetweenCalls(pytest.fail), nn.Linear(1, 1)
    store = SimpleNamespace(free=lambda: forgot.append(1), slots=[])
    for rows in (("a",), ("a", "a"), ("a",)):
        guard.arrange(root, {"store": store}, rows, 1, (None,) * len(rows))
    assert len(forgot) == 1, "before the first call alone"
    guard.close()
    known = ref(root)
    del root
    assert len(forgot) == 2 and known() is None
