"""Which attention joins text and picture, and what is read of it, in every family that can be built small."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose import attention
from lora_ensemble.host.compose.attention import OVERRIDE, AttentionReader
from lora_ensemble.host.families.attention import MOST, Joint, chosen, joint
from lora_ensemble.host.families.token_order import token_order
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Transformer
from .disturbed import newest, skipped_where_older
from .moved import WITHOUT, Seen, apart, at_place, changed, plain, size_of  # noqa: F401
from .small_video import SMALL, built, forgotten, nothing_left  # noqa: F401

pytestmark = pytest.mark.usefixtures("forgotten")
UNREAD = {"HunyuanDiT", "Ernie-Image", "PixArt", "PixArt Alpha", "Ideogram 4", "Anima"}
"""Families whose attention is called without the options, or whose text has a length that no input tells."""
UNETS = {"SD15", "SDXL", "x4 upscaler"}
known = pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT | UNREAD])


def joining(seen: Seen):
    """(what it joins, q, k) of each attention that joins text and picture."""
    found = [(joint(seen.model, seen.tokens.streams, q.shape[2], k.shape[2]), q, k) for q, k in seen.attention]
    return [each for each in found if each[0] is not None]


def moved(before: Tensor, after: Tensor) -> set[int]:
    """Tokens of q or k that are not what they were."""
    return set((before != after).any(-1).any(1).any(0).nonzero().flatten().tolist())


@pytest.mark.usefixtures("apart")
@known
def test_keys_of_words(name):
    """Of every attention that joins text and picture: a word of the prompt has the key that we take for its own."""
    (kind, model, before), word = plain(name), 3

    def change(x, conds):
        context = conds["context"].clone()
        context[:, word] += 1
        return x, {**conds, "context": context}

    calls = joining(before)
    if not calls and not newest():
        pytest.skip("older releases call it without the options")
    assert calls
    for (where, _, old), (_, _, new) in zip(calls, joining(Seen(kind, model, change)), strict=True):
        found = {token for token in moved(old, new) if where.text[0] <= token < where.text[1]}
        assert found == {where.text[0] + word}, f"{name}: {sorted(moved(old, new))} for {where}"


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT | UNREAD | UNETS])
def test_queries_of_places(name):
    kind, model, before = plain(name)
    *frames, height, width = size = size_of(before.x)
    place = (*[min(1, n - 1) for n in frames], height // 2, width // 2)

    def change(x, conds):
        return [changed(x[0], place), *x[1:]] if isinstance(x, list) else changed(x, place), conds

    for (where, old, _), (_, new, _) in zip(joining(before), joining(Seen(kind, model, change)), strict=True):
        segment = next(s for tokens in before.tokens.streams.values() for each in tokens for s in each
                       if s.kind == "picture" and s.grid == where.grid)
        expected = {where.picture[0] + at_place(size, place, name)(segment)}
        found = {token for token in moved(old, new) if where.picture[0] <= token < where.picture[1]}
        assert found == expected, f"{name}: {sorted(moved(old, new))} instead of {sorted(expected)} for {where}"


class Read:
    """What a reader sees of a call, and q and k of its joining attention as an override before it saw them."""

    def __init__(self, kind: Transformer, model: nn.Module, rows: int = 2):
        order, seen = token_order(model), []
        self.members = torch.tensor([[[1.0, 0, 0, 1, 0], [0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]])

        def earlier(func, q, k, v, heads, *args, **kwargs):
            split = kwargs.get("skip_reshape", False)
            seen.append([t if split else t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k)])
            self.scale, self.mask = kwargs.get("scale"), kwargs.get("mask", args[0] if args else None)
            return func(q, k, v, heads, *args, **kwargs)

        def begin(_, args, kwargs):
            streams = order.begin(args[0], kwargs).streams
            self.reader = AttentionReader(model, streams, slice(0, 2), self.members)
            kwargs["transformer_options"] = self.reader.options({**kwargs["transformer_options"], OVERRIDE: earlier})
            return args, kwargs

        with model.register_forward_pre_hook(begin, with_kwargs=True):
            self.out = kind.call(model, {}, rows=rows)
        self.calls = [(where, q, k) for q, k in seen
                      if (where := joint(model, self.reader.streams, q.shape[2], k.shape[2])) is not None]


@pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT | UNREAD])
def test_reads_the_shares_of_clauses(name):
    """The softmax over the text's keys, summed over a clause's tokens, as it comes from q and k by hand; the model's
    answer and an override of another node are what they were."""
    kind, model, _ = plain(name)
    if token_order(model).axis == 0 or name in ("MiniMax H3", "MiniMax H3 references"):
        pytest.skip("takes one row")
    with skipped_where_older(name):
        read, bare = Read(kind, model), kind.call(model, {}, rows=2)
        assert read.calls
    assert torch.equal(read.out, bare) and len(read.reader.found) == len(read.calls) == read.reader.count > 0
    for (where, q, k), found in zip(read.calls, read.reader.found, strict=True):
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        if read.mask is not None:
            continue
        q, k = q.double()[:, :, slice(*where.picture)], k.double()[:, :, slice(*where.text)]
        text = (q @ k.mT * (read.scale or q.shape[-1]**-0.5)).softmax(-1).mean(1)[..., :5]
        want = torch.einsum("rpt,rct->rcp", text, read.members.double()).unflatten(-1, where.grid)
        assert torch.allclose(found.double(), want, atol=1e-5), name


def test_rows_that_do_not_follow_each_other():
    """Of a batch with the negative between: a tensor of rows is read as a slice is."""
    kind, model, _ = plain("SD15")
    seen = []
    for rows in (torch.tensor([0, 2]), slice(0, 3)):
        members = torch.ones(2 if isinstance(rows, torch.Tensor) else 3, 1, 5)

        def begin(_, args, kwargs, rows=rows, members=members):
            streams = token_order(model).begin(args[0], kwargs).streams
            seen.append(AttentionReader(model, streams, rows, members))
            kwargs["transformer_options"] = seen[-1].options(kwargs["transformer_options"])
            return args, kwargs

        with model.register_forward_pre_hook(begin, with_kwargs=True):
            kind.call(model, {}, rows=3)
    assert torch.equal(seen[0].mean(), seen[1].mean()[[0, 2]])


@pytest.mark.parametrize("held", [0, attention.HELD])
def test_calls_of_one_size_are_summed_together(held, monkeypatch):
    """As the mean of the means of each, whenever what is held has to be summed before the model has run."""
    monkeypatch.setattr(attention, "HELD", held)
    kind, model, _ = plain("SD15")
    readers, most = [], []
    settle = AttentionReader._settle
    monkeypatch.setattr(AttentionReader, "_settle",
                        lambda self: most.append(max(map(len, self._held.values()), default=0)) or settle(self))
    for wanted in (None, range(99), (1, 2)):
        def begin(_, args, kwargs, wanted=wanted):
            streams = token_order(model).begin(args[0], kwargs).streams
            members = torch.tensor([[[1.0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]] * 2)
            readers.append(AttentionReader(model, streams, slice(0, 2), members, wanted))
            kwargs["transformer_options"] = readers[-1].options(kwargs["transformer_options"])
            return args, kwargs

        with model.register_forward_pre_hook(begin, with_kwargs=True):
            kind.call(model, {}, rows=2)
    each, together, some = readers
    assert len(each.found) == each.count > 2 and not together.found
    grids = {found.shape[2:] for found in each.found}
    assert torch.allclose(together.mean(), each.mean(), atol=1e-6)
    assert torch.allclose(some.mean(), each.mean((1, 2)), atol=1e-6) and some.mean().shape == each.mean((1, 2)).shape
    assert max(most) == 1 if not held else len(most) == 6 and len(grids) < each.count and max(most) > 1


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_words_that_no_attention_tells(name):
    """Guard: should a release call it with the options, these families can be read as well."""
    kind, model, seen = plain(name)
    sizes = []

    def override(func, q, k, v, heads, *args, **kwargs):
        sizes.append((q.shape[-2], k.shape[-2]))
        return func(q, k, v, heads, *args, **kwargs)

    kind.call(model, {OVERRIDE: override}, rows=1)
    assert not [size for size in sizes if joint(model, seen.tokens.streams, *size)]


@pytest.mark.parametrize("film", [False, True])
def test_calls_of_several_sizes_count_alike(film):
    """On the finest grid, whichever came first; as one by one, so summed by their size."""
    grids = [(2 * film + 1, n, n) for n in (4, 8, 2)]
    calls = [torch.rand(2, 3, *grids[k], generator=torch.Generator().manual_seed(seed))
             for seed, k in enumerate((0, 1, 1, 2, 0, 0, 2))]
    wide = [F.interpolate(call, grids[1], mode="trilinear") for call in calls]
    reader = AttentionReader(nn.Module(), None, slice(0, 2), torch.zeros(2, 3, 5))
    assert reader.mean() is None
    reader.found = list(calls)
    for some in (range(7), (0, 1), (3, 1), (6, 3, 0, 2)):
        assert torch.allclose(reader.mean(some), torch.stack([wide[k] for k in some]).mean(0), atol=1e-6), some
    reader.found = []
    for some in ((0, 4, 5), (3, 6), (1, 2)):
        reader._means.append((len(some), torch.stack([calls[k] for k in some]).mean(0)))
    assert torch.allclose(reader.mean(), torch.stack(wide).mean(0), atol=1e-6)


def test_calls_that_lack_rows_are_passed_over_and_few_are_held(monkeypatch):
    """Sums are made when so many bytes are held, and then anew from none."""
    q, k = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 5, 8)
    monkeypatch.setattr(attention, "joint", lambda *_: Joint((0, 16), (0, 5), (1, 4, 4)))
    monkeypatch.setattr(attention, "HELD", int(2.5 * q.nbytes))
    reader = AttentionReader(nn.Module(), None, slice(0, 2), torch.ones(2, 1, 5), range(99))
    override = reader.options({})[OVERRIDE]
    for rows in (2, 2, 2, 1, 2, 2, 2, 2):
        override(lambda *_, **__: None, q[:rows], k[:rows], k[:rows], 2, skip_reshape=True)
    assert [calls for calls, _ in reader._means] == [3, 3] and reader.count == 8
    assert torch.allclose(reader.mean(), torch.ones(2, 1, 1, 4, 4)) and [n for n, _ in reader._means] == [3, 3, 1]


def test_which_calls_are_read():
    model = built("SD15")
    assert chosen(model, 7) == tuple(range(7))
    assert len(chosen(model, 70)) == MOST and chosen(model, 70)[0] >= 0 and chosen(model, 70)[-1] < 70
    assert chosen(model, 10, (0.5, 0.8)) == (5, 6, 7) and chosen(model, 3, (0.9, 1.0)) == (2,)
    assert chosen(model, 1, (0.0, 0.1)) == (0,) and chosen(built("Flux"), 10) == (2, 3, 4, 5)
