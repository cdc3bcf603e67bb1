"""A sampler without ComfyUI: Euler steps along the flow with classifier-free guidance, many pictures in one batch.

The rows of a batch may belong to any branch of the bank, so pictures with different LoRAs and different methods, their
branches, and the two sides of guidance are all evaluated together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from ..engine.adapters import LowRank
from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..engine.yielding import yield_to
from ..kernels.branch import Branch, Step
from ..methods import Method
from ..methods.merge import Merge
from ..methods.session import POSITIVE, UNCONDITIONAL, Call, RunContext, begin
from .body import Body
from .loras import PREFIX
from .model import decode
from .routing import Placed, Routed, Seen

STEPS, GUIDANCE, ROWS = 20, 2.0, 96

Guide = Callable[[Step, Tensor, Tensor, Tensor], Tensor]
"""(step, noisy latent, positive, negative denoised prediction, [1, ...] each) -> the negative to guide with."""


def low_rank(tensors: Mapping[str, Tensor]) -> dict[str, list[LowRank]]:
    """The tensors of one of the testbed's LoRA files -> module name: its op."""
    suffix = ".lora_A.weight"
    ops = {}
    for key, down in tensors.items():
        if key.endswith(suffix):
            stem = key[: -len(suffix)]
            up, alpha = tensors[f"{stem}.lora_B.weight"], float(tensors[f"{stem}.alpha"])
            ops[stem.removeprefix(PREFIX)] = [LowRank(up.flatten(1).float(), down.float(), alpha / down.shape[0])]
    return ops


@dataclass(frozen=True)
class Picture:
    """What to draw. `loras` are indexes into the sampler's bank; the method's gains are one per entry of it.

    method    None: the base model alone
    placed    where the LoRAs act; None: everywhere
    yields    (a LoRA, those that it yields to) as positions in `loras` (engine/yielding.py)
    """

    prompt: str
    seed: int
    loras: tuple[int, ...] = ()
    method: Method | None = None
    placed: Placed | None = None
    yields: tuple[tuple[int, tuple[int, ...]], ...] = ()


class Sampler:
    """The base with a bank of LoRAs installed; use as a context manager, which takes the bank off again.

    always   LoRAs that belong to the model while it is in use: at strength 1 in every row, the base model's included.
             No picture, method or place knows of them
    """

    def __init__(self, base: Body, loras: Sequence[Mapping[str, Tensor]], always: Sequence[Mapping[str, Tensor]] = ()):
        self.base, self.count = base, len(loras)
        self.device = next(base.parameters()).device
        self._adapters = [low_rank(tensors) for tensors in loras]
        self._yielded: dict[tuple[int, tuple[int, ...]], dict] = {}
        self.bank = Bank(self._adapters).to(self.device)
        self.routed = RoutedForwards(base.net, self.bank)
        self.always = RoutedForwards(base.net, Bank([low_rank(tensors) for tensors in always]).to(self.device))
        self._in_use = ExitStack()
        self.evaluations = 0  # branches evaluated since the start, each with all sides of its guidance

    def __enter__(self) -> Sampler:
        self.always.install()
        self._in_use.callback(self.always.remove)
        self._in_use.enter_context(self.always.rows([Branch((1.0,) * self.always.bank.count)]))
        self.routed.install()
        self._in_use.callback(self.routed.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._in_use.close()

    @contextmanager
    def _with_yielded(self, pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
        """These pictures with LoRAs that yield in place of those that are to, which the bank holds while it is open."""
        before, new, out = (self.bank, self.routed, self.count), {}, []
        for picture in pictures:
            loras = list(picture.loras)
            for who, to in picture.yields:
                key = picture.loras[who], tuple(picture.loras[other] for other in to)
                if key not in self._yielded:
                    self._yielded[key] = yield_to(self._adapters, key[:1], key[1])[0][key[0]]
                loras[who] = new.setdefault(key, self.count + len(new))
            out.append(replace(picture, yields=(), loras=tuple(loras)))
        self.routed.remove()
        self.bank = Bank([*self._adapters, *(self._yielded[key] for key in new)]).to(self.device)
        self.routed, self.count = RoutedForwards(self.base.net, self.bank), self.bank.count
        self.routed.install()
        try:
            yield out
        finally:
            self.routed.remove()
            self.bank, self.routed, self.count = before
            self.routed.install()

    def _spread(self, branch: Branch, loras: tuple[int, ...]) -> Branch:
        """Gains of a picture's own LoRAs -> gains over the whole bank."""
        def over_bank(gains: tuple[float, ...]) -> tuple[float, ...]:
            wide = [0.0] * self.count
            for lora, gain in zip(loras, gains, strict=True):
                wide[lora] += gain
            return tuple(wide)

        return Branch(over_bank(branch.gains), tuple((m, over_bank(gains)) for m, gains in branch.per_module))

    def _predict(self, x: Tensor, step: Step, contexts: Tensor, pictures: Tensor, branches: list[Branch],
                 routed: Routed | None = None, read: Sequence[int] = (), sides: int = 1) -> Tensor:
        """Velocities of many rows: row r evaluates x[pictures[r]] with contexts[r] and branches[r]. Of two sides, the
        first half of the rows are positive, the second negative. With `routed`, the attention of the rows in `read` is
        kept."""
        order = sorted(range(len(branches)), key=lambda r: branches[r].gains)
        out = torch.empty(len(order), *x.shape[1:], device=x.device)
        for start in range(0, len(order), ROWS):
            numbers = order[start:start + ROWS]
            rows = torch.tensor(numbers, device=x.device)
            sigmas = torch.full((len(rows),), step.sigma, device=x.device)
            owners = pictures[rows].tolist()
            places, see, reach = None, None, None
            if routed is not None:
                side = len(branches) // sides
                texts = [i + len(x) * (r // side) for r, i in zip(numbers, owners, strict=True)]
                places = routed.places(owners, texts)
                reach = routed.reach(owners, step)
                seen = [k for k, r in enumerate(numbers) if r in read]
                see = Seen(seen, routed.members[[owners[k] for k in seen]], self.base.grid) if seen else None
            with self.routed.rows([branches[r] for r in numbers], places, reach):
                out[rows] = self.base.velocity(x[pictures[rows]], sigmas, contexts[rows], see)
            if see is not None:
                for k, each in zip(seen, see.mean(), strict=True):
                    routed.found(owners[k], each)
            if reach is not None:
                routed.reached(owners, reach, routed.places(owners, texts))
        return out

    def _probe(self, step: Step, x: Tensor, routed: Routed, sides: int) -> None:
        """Find the places that are needed before the step, from evaluations of the base model, each a side of a
        branch."""
        by_contrast, base = routed.contrasting(step), Branch((0.0,) * self.count)
        for i in by_contrast:
            texts = self.base.contexts([routed.probes[i], *routed.without(i)])
            sigmas = torch.full((len(texts),), step.sigma, device=self.device)
            rows, reach = [i] * len(texts), routed.reach([i], step)
            with self.routed.rows([base] * len(texts), routed.places(rows, rows), reach):
                whole, *parts = self.base.velocity(x[i:i + 1].expand(len(texts), -1, -1, -1), sigmas, texts)
            routed.contrasted(i, whole, torch.stack(parts))
            if reach is not None:
                routed.reached([i], reach, routed.places(rows, rows))
            self.evaluations += len(texts) / sides
        others = [i for i in routed.probing(step) if i not in by_contrast]
        if others:
            texts = self.base.contexts([routed.probes[i] for i in others])
            self._predict(x, step, texts, torch.tensor(others, device=self.device), [base] * len(others), routed,
                          range(len(others)))
            self.evaluations += len(others) / sides

    @torch.inference_mode()
    def draw(self, pictures: Sequence[Picture], steps: int = STEPS, guidance: float | Sequence[float] = GUIDANCE,
             guides: Sequence[Guide] | None = None) -> Tensor:
        """float32 [n, 3, height, width] in [0, 1]. The same picture comes out whatever it is batched with, up to
        rounding.

        guidance   of all steps, or one of each; at 1 the negative side weighs nothing, and is not evaluated unless
                   `guides` look at it
        guides     one per picture: what takes the negative prediction's place in each step
        """
        if any(picture.yields for picture in pictures):
            with self._with_yielded(pictures) as own:
                return self.draw(own, steps, guidance, guides)
        scales = [guidance] * steps if isinstance(guidance, int | float) else list(guidance)
        noise = [torch.randn(self.base.latent, generator=torch.Generator().manual_seed(p.seed)) for p in pictures]
        x = torch.stack(noise).to(self.device)
        context = self.base.contexts(["", *(p.prompt for p in pictures)])
        sigmas = torch.linspace(1, 0, steps + 1).tolist()
        run = RunContext(tuple(sigmas), tuple(sigmas[:-1]), (1, *self.base.latent))
        routed = None
        if any(picture.placed is not None for picture in pictures):
            routed = Routed([p.placed for p in pictures], [p.prompt for p in pictures], [p.loras for p in pictures],
                            self.count, self.base)
        sessions = [begin(picture.method or Merge((0.0,) * len(picture.loras)),
                          run if routed is None else replace(run, masks=routed.masks(i)))
                    for i, picture in enumerate(pictures)]
        for index, scale in zip(range(steps), scales, strict=True):
            labels = (POSITIVE,) if scale == 1 and guides is None else (POSITIVE, UNCONDITIONAL)
            step = Step(index, steps, sigmas[index])
            owner, branches, spans = [], [], []
            if routed is not None:
                self._probe(step, x, routed, len(labels))
            for i, (picture, session) in enumerate(zip(pictures, sessions, strict=True)):
                session.observe(step, x[i:i + 1])
                chosen = session.branches(step)
                spans.append((slice(len(owner), len(owner) + len(chosen)), chosen))
                owner += [i] * len(chosen)
                if routed is not None and not routed.acts(i, step):
                    chosen = [Branch((0.0,) * len(picture.loras)) for _ in chosen]
                branches += [self._spread(branch, picture.loras) for branch in chosen]
            self.evaluations += len(owner)
            rows = torch.tensor(owner, device=self.device)
            texts = torch.cat([context[rows + 1], context[:1].expand(len(rows), -1, -1)][:len(labels)])
            read = routed.reading(step) if routed is not None else ()
            velocity = self._predict(x, step, texts, rows.repeat(len(labels)), branches * len(labels), routed,
                                     [_says_where(owner, branches, i) for i in read], len(labels))
            predicted = [x[rows] - step.sigma * v for v in velocity.chunk(len(labels))]
            denoised, noise_level = [], torch.full((1,), step.sigma, device=self.device)
            for i, (span, chosen) in enumerate(spans):
                call = Call(x[i:i + 1], noise_level, chosen, [side[span, None] for side in predicted], labels)
                positive, *others = sessions[i].mix(step, call)
                negative = others[0] if others else positive
                if guides is not None:
                    negative = guides[i](step, x[i:i + 1], positive, negative)
                denoised.append(negative + scale * (positive - negative))
            x = x + (sigmas[index + 1] - step.sigma) * (x - torch.cat(denoised)) / step.sigma
        return decode(x)


def _says_where(owner: list[int], branches: list[Branch], picture: int) -> int:
    """The row of a picture whose attention says where words are: the base's where there is one, else the first."""
    rows = [row for row, of in enumerate(owner) if of == picture]
    return next((row for row in rows if branches[row].is_base), rows[0])
