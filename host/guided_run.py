"""One run with guidance: what happens at each model call.

Two wrappers, put in place for the run alone. The PREDICT_NOISE one is the innermost, so that it sees the cfg that other
nodes have set, and decides whether the guider runs at all or only its conditional side. The CALC_COND_BATCH one is the
outermost, around the composition's: it sees mixed predictions, and a negative that it leaves out leaves out all of its
branches. Where a negative was not evaluated, its place is taken by the conditional prediction: guidance between two
equal predictions is none, and every node further down the line finds the valid pair that it expects.
"""

from __future__ import annotations

import logging

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..engine.guidance import AdaptiveState, LinearState, Rows
from ..engine.guidance_record import GuidanceRecord, GuidanceStep
from ..engine.transfer import on_device
from ..kernels.branch import Step
from ..kernels.guidance import cosine
from .clock import Clock
from .composition import KEY as COMPOSITION
from .guided_call import Call, guarded, unguided
from .rows import narrowed, whole_only

log = logging.getLogger("lora_ensemble")


class GuidedRun:
    """State of guidance in one sampling run: fresh at its start, gone at its end."""

    def __init__(self, guider, state: AdaptiveState | LinearState, sigmas: tuple[float, ...], policy: str):
        self.guider, self.state = guider, state
        self.clock = Clock(list(sigmas))
        self.record = GuidanceRecord(policy)
        self.own_math = type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise
        self.composition = guider.model_patcher.get_attachment(COMPOSITION)
        self.roles: dict | None = None
        self.call: Call | None = None

    def installed(self, options: dict, key: str) -> dict:
        """Model options of the run with both wrappers in place."""
        wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        calc, predict = WrappersMP.CALC_COND_BATCH, WrappersMP.PREDICT_NOISE
        wrappers[calc] = {key: [self.calc_cond_batch], **wrappers.get(calc, {})}
        wrappers[predict] = {**wrappers.get(predict, {}), key: [self.predict_noise]}
        return options

    def __deepcopy__(self, memo) -> GuidedRun:
        """Nodes that copy model options during a run must not copy the run."""
        return self

    # --- one model call ---

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """The guider's prediction at x: guided, or its conditional side alone."""
        options = model_options if model_options is not None else {}
        step = self.clock.step(timestep)
        windowed = options.get("context_handler") is not None
        kind, rows = self._plan(step, windowed)
        self.call = call = Call(step, kind, rows, x, windowed)
        self._open_step(step)
        try:
            if kind == "conditional":
                return self._conditional(executor, x, timestep, options, seed)
            if not self.own_math and isinstance(self.state, AdaptiveState):
                options = guarded(options, call, self.state)
            out = executor(x, timestep, options, seed)
            if call.windowed and call.terms and isinstance(self.state, AdaptiveState):
                self.state.decide(self._similarity(call))
            if self.own_math and not windowed and call.c is not None and isinstance(self.state, AdaptiveState):
                weight = self.state.weight(out)
                # Where, since a guider's own formula need not be finite between equal predictions.
                out = torch.where(weight > 0, torch.lerp(call.c.to(out), out, weight), call.c.to(out))
            return out
        finally:
            self.call = None

    def _plan(self, step: Step, windowed: bool) -> tuple[str, Rows | None]:
        begun = self.state.begin(step)
        if isinstance(self.state, LinearState):
            if windowed and begun == "predicted":
                begun = "guided"
                self.problem("LinearAG: context windows leave no whole predictions to foretell the negative from; "
                             "those steps were guided in full")
            if self.state.off_course:
                self.problem("LinearAG: another node left out or added model calls, the coefficients do not fit them; "
                              "those steps were guided in full")
            return begun, None
        return ("conditional", ()) if begun == () else ("guided", begun)

    def _conditional(self, executor, x, timestep, options: dict, seed):
        """What the same chain of nodes predicts at cfg 1, those that shape guidance left out."""
        options = unguided(options)
        guider = self.guider
        if self.own_math:
            return comfy.samplers.sampling_function(guider.inner_model, x, timestep, guider.conds.get("negative"),
                                                    guider.conds["positive"], 1.0, options, seed)
        cfg, guider.cfg = guider.cfg, 1.0
        try:
            return executor(x, timestep, options, seed)
        finally:
            guider.cfg = cfg

    # --- its predictions ---

    def calc_cond_batch(self, executor, model, conds, x, timestep, options):
        """Evaluate the conds that are needed, and fill in the others."""
        call = self.call
        if call is None:
            return executor(model, conds, x, timestep, options)
        positive, negatives = self._indexes(conds)
        if not negatives:
            if positive is None and self._is_own_negative(x):
                return self._own_negative(executor, model, conds, x, timestep, options)
            return self._without_negatives(executor, model, conds, x, timestep, options, positive)
        extra = positive is None and (call.c is None or call.has_negative)
        if extra:  # a node's own pass with the negative alone
            return executor(model, conds, x, timestep, options)
        call.has_negative = True
        if call.rows and (reason := whole_only(conds, options, self.composition)) is not None:
            call.rows = None
            self.problem(f"Adaptive Guidance: {reason}; the negative is evaluated for the whole batch until every "
                          "picture is done with it")
        watched = call.kind == "predicted" and self.state.watch
        together = watched or (call.kind == "guided" and call.rows is None)
        outs = executor(model, conds if together else [c if i == positive else None for i, c in enumerate(conds)],
                        x, timestep, options) if together or positive is not None else [None] * len(conds)
        c = call.c = outs[positive] if positive is not None else call.c
        asked, full = x.shape[0] * (positive is not None), x.shape[0] * len(negatives)
        self._count(asked, full, full if together else len(call.rows or ()) * len(negatives))
        if call.kind != "guided":
            self._fill(x, timestep, outs, negatives)
        elif not together:
            for i, out in self._in_part(executor, model, conds, negatives, x, timestep, options).items():
                outs[i] = out
        if isinstance(self.state, AdaptiveState):
            if call.kind == "guided":
                self._weigh(call, x, outs, negatives)
        elif call.kind == "guided" and not call.windowed:
            self.state.keep(x, c, outs[negatives[0]], timestep)
        return outs

    def _in_part(self, executor, model, conds, wanted: list[int], x, timestep, options) -> dict[int, Tensor]:
        """The wanted conds for the rows of this call alone; the conditional prediction for its other rows."""
        call = self.call
        index = on_device(call.rows, x.device)
        some = [narrowed(cond, call.rows, len(x)) if i in wanted else None for i, cond in enumerate(conds)]
        parts = executor(model, some, x[index], timestep[:len(call.rows)], options)
        return {i: call.c.index_put((index,), parts[i]) for i in wanted}

    def _is_own_negative(self, x: Tensor) -> bool:
        """Whether a pass with conds that the guider does not know is a side of guidance that a node has of its own: on
        the latent of this call, once its conditional prediction is known."""
        call, adaptive = self.call, isinstance(self.state, AdaptiveState) and not self.own_math
        return adaptive and call.kind == "guided" and call.c is not None and x is call.x

    def _own_negative(self, executor, model, conds, x, timestep, options) -> list:
        """The empty prompt of the deprecated Perp-Neg node: evaluated for the pictures that are still guided, and
        fading with their negative."""
        call, weight = self.call, self.state.weight(self.call.c)
        if call.rows:
            wanted = [i for i, cond in enumerate(conds) if cond is not None]
            found = self._in_part(executor, model, conds, wanted, x, timestep, options)
            outs = [found.get(i, call.c) for i in range(len(conds))]
        else:
            outs = executor(model, conds, x, timestep, options)
        return [torch.lerp(call.c, out, weight) for out in outs]

    def _without_negatives(self, executor, model, conds, x, timestep, options, positive: int | None):
        call = self.call
        outs = executor(model, conds, x, timestep, options)
        if positive is not None and call.c is None:
            call.c = outs[positive]
            left_out = len(self.guider.conds) - 1 if call.kind == "conditional" else 0
            self._count(x.shape[0], x.shape[0] * left_out, 0)
            if call.kind == "conditional":
                outs = [out if cond is not None else call.c.clone() for cond, out in zip(conds, outs, strict=True)]
        return outs

    def _fill(self, x: Tensor, timestep: Tensor, outs: list, negatives: list[int]) -> None:
        """Put a prediction in the place of each negative that guidance does without."""
        call = self.call
        if call.kind == "conditional":
            for i in negatives:
                outs[i] = call.c.clone()
            return
        (i,) = negatives
        true = outs[i] if self.state.watch else None
        outs[i] = self.state.foretell(x, call.c, timestep)
        self.state.keep(x, call.c, outs[i], timestep, true)
        self.record.steps[-1].predicted += x.shape[0]

    def _weigh(self, call: Call, x: Tensor, outs: list, negatives: list[int]) -> None:
        """Measure, decide, and let guidance fade: u' = c + w (u - c)."""
        state, c = self.state, call.c
        if state.fresh:
            for i in negatives:
                terms = state.terms(x, c, outs[i])
                if terms.shape[1] != len(call.x):  # windows over the batch: frames decide together
                    terms = terms.sum(1, keepdim=True).expand(-1, len(call.x))
                call.terms[i] = call.terms[i] + terms if i in call.terms else terms
            if not call.windowed:
                state.decide(self._similarity(call))
        if not self.own_math:
            weight = state.weight(c)
            for i in negatives:
                outs[i] = torch.lerp(c, outs[i], weight)

    @staticmethod
    def _similarity(call: Call) -> Tensor:
        """With several negatives (DualCFG, PerpNeg) all must agree with the conditional prediction."""
        return torch.stack([cosine(terms) for terms in call.terms.values()]).amin(0)

    def _indexes(self, conds: list) -> tuple[int | None, list[int]]:
        """Where the caller has its positive and its negatives. Identities survive what else is done to conds."""
        if self.roles is None:
            self.roles = {entry.get("uuid"): name for name, cond in self.guider.conds.items() for entry in cond}
            if "positive" not in self.guider.conds:
                self.problem(f"Adaptive Guidance: {type(self.guider).__name__} has no 'positive'; it is left alone")
        names = [self.roles.get(cond[0].get("uuid")) if cond else None for cond in conds]
        positive = names.index("positive") if "positive" in names else None
        return positive, [i for i, name in enumerate(names) if name not in (None, "positive")]

    # --- the record ---

    def _open_step(self, step: Step) -> None:
        if not self.record.steps or self.record.steps[-1].index != step.index:
            self.record.steps.append(GuidanceStep(step.index, step.sigma))
        self.record.steps[-1].calls += 1

    def _count(self, rows: int, negatives: int, evaluated: int) -> None:
        """Rows of the conditional side, those of the negatives at full guidance, and those of them evaluated."""
        self.record.steps[-1].rows += rows
        self.record.steps[-1].negative += evaluated
        self.record.full += rows + negatives

    def problem(self, text: str) -> None:
        if text not in self.record.problems:
            log.warning(text)
            self.record.problems.append(text)

    def close(self, finished: bool) -> None:
        self.record.finished = finished
        if isinstance(self.state, AdaptiveState):
            self.state.finish()
            for step in self.record.steps:
                step.gamma = self.state.gamma.get(step.index, [])
            self._too_early()
            self._never()

    def _too_early(self) -> None:
        policy, first = self.state.policy, self.state.gamma.get(self.state.policy.min_steps)
        if first and all(g is not None and g >= policy.threshold for g in first):
            self.problem(f"Adaptive Guidance: the similarity is above the threshold {policy.threshold:g} from the "
                          f"first step on that may be left out ({min(first):.6f}): this model, in the space "
                          f"'{policy.space}', needs a higher threshold. Calibrate Guidance finds it.")

    def _never(self) -> None:
        """Nothing was saved: how near it came. The similarity need not rise to the end; along a flow that of velocities
        may be highest in the middle."""
        policy = self.state.policy
        counts = max if policy.per_sample else min
        seen = {step.index: counts(step.gamma) for step in self.record.steps
                if step.index >= policy.min_steps and step.gamma and None not in step.gamma}
        if not seen or policy.threshold > 1 or not self.record.finished:
            return
        peak = max(seen, key=seen.get)
        if seen[peak] < policy.threshold:
            self.problem(f"Adaptive Guidance: the similarity never reached the threshold {policy.threshold:g}, so "
                          f"nothing was saved. It was highest in step {peak + 1} of {self.clock.total} "
                          f"({seen[peak]:.6f}). Take a lower threshold or the other space; Calibrate Guidance "
                          "finds it.")
