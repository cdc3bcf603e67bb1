"""One run with guidance: what happens at each model call.

Two wrappers, put in place for the run alone. The PREDICT_NOISE one is the innermost, so that it sees the cfg that other
nodes have set, and decides whether the guider runs at all or only its conditional side. The CALC_COND_BATCH one is the
outermost, around the composition's: it sees mixed predictions, and a negative that it leaves out leaves out all of its
branches. Where a negative was not evaluated, its place is taken by what the rule has for it, the conditional prediction
say: guidance between two equal predictions is none, and every node further down the line finds the valid pair that it
expects. What a call needs, and what stands in, is the affair of the rule's session; this file asks it and evaluates.
"""

from __future__ import annotations

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...engine.transfer import on_device
from ...kernels.branch import Step
from ...methods.guidance.record import GuidanceRecord, GuidanceStep
from ...methods.guidance.session import GuidanceSession, Tell
from ...methods.schedule import Schedule
from ..compose.composition import KEY as COMPOSITION
from ..compose.rows import narrowed, sides_together, whole_only
from ..compose.steps import StepTracker
from ..compose.variants import own_conds
from .call import UNGUIDED, GuidedCall, added, completed, faded, guarded, put_in


class GuidedRun:
    """Guidance in one sampling run: fresh at its start, gone at its end."""

    def __init__(self, guider, session: GuidanceSession, tracker: StepTracker, record: GuidanceRecord, tell: Tell):
        self.guider, self.session, self.tracker, self.record, self.tell = guider, session, tracker, record, tell
        self.own_math = type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise
        self.composition = guider.model_patcher.get_attachment(COMPOSITION)
        self.roles: dict | None = None
        self.call: GuidedCall | None = None

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
        step, session = self.tracker.step(timestep), self.session
        windowed = options.get("context_handler") is not None
        # A guider of the host's own formula shows it whole predictions, whatever windows they came from.
        shown_whole = windowed and session.tracks and not self.own_math
        session.whole = self._runs_whole()
        need = session.begin(step, len(x), windowed and not shown_whole)
        self.call = call = GuidedCall(need, need.rows, x, shown_whole=shown_whole)
        self._open_step(step)
        try:
            if not need.guided and "positive" in self.guider.conds:
                return self._conditional(executor, x, timestep, options, seed)
            fading, by_formula = session.fades, session.fades and self.own_math and not windowed
            with (put_in(options, guarded(options, call, session) if fading and not self.own_math else {}),
                  put_in(options, added(options, call, session) if by_formula else {}),
                  put_in(options, completed(options, call, session) if shown_whole else {})):
                out = executor(x, timestep, options, seed)
            session.end()
            if by_formula and call.c is not None:
                out = faded(call.c if call.added_to is None else call.added_to, out, session.weigh(out))
            return out
        finally:
            self.call = None

    def _runs_whole(self) -> Schedule | None:
        """The schedule of a branch cache; None without one, and where each method has its own."""
        runs = self.composition.runs if self.composition is not None else ()
        return runs[-1].cache.spec.schedule if runs and runs[-1].cache is not None else None

    def _conditional(self, executor, x, timestep, options: dict, seed):
        """What the same chain of nodes predicts at cfg 1, those that shape guidance left out."""
        guider = self.guider
        with put_in(options, UNGUIDED):
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
        positive, negatives = self._places(conds)
        if not negatives:
            if positive is None and self._is_own_negative(x):
                return self._own_negative(executor, model, conds, x, timestep, options)
            return self._without_negatives(executor, model, conds, x, timestep, options, positive)
        extra = positive is None and (call.c is None or call.has_negative)
        if extra:  # a node's own pass with the negative alone
            return executor(model, conds, x, timestep, options)
        call.has_negative = True
        self._widen(conds, options, negatives, call.x if call.shown_whole else x)
        whole = call.need.watch or call.rows is None
        outs = executor(model, conds if whole else [c if i == positive else None for i, c in enumerate(conds)],
                        x, timestep, options) if whole or positive is not None else [None] * len(conds)
        if positive is not None:
            call.c = outs[positive].clone() if self.session.fades else outs[positive]  # nodes write into predictions
        asked, full = x.shape[0] * (positive is not None), x.shape[0] * len(negatives)
        self._count(asked, full, full if whole else len(call.rows) * len(negatives))
        if call.need.guided:
            self._guide(outs, negatives, executor, model, conds, x, timestep, options)
        else:
            for i in negatives:
                outs[i] = call.c.clone()
        return outs

    def _widen(self, conds, options, negatives: dict[int, str], x: Tensor) -> None:
        """Evaluate all negatives where a part of them, or none, will not do."""
        call, session, reason = self.call, self.session, None
        if call.rows is None or not call.need.guided:
            return
        if call.rows and (reason := whole_only(conds, options, self.composition)) is not None:
            self.tell(f"Adaptive Guidance: {reason}; the negative is evaluated for the whole batch until every picture "
                      "is done with it" if session.fades else f"Guidance: {reason}; the negative is evaluated for the "
                      "whole batch when it is one picture's turn")
        elif session.tracks and (reason := sides_together(options)) is not None:
            self.tell(f"Extrapolated guidance: {reason}; the negative is evaluated in every step")
        if reason is not None or not session.ready(negatives.values(), x):
            call.rows = None
            session.widen()

    def _guide(self, outs: list, negatives: dict[int, str], executor, model, conds, x, timestep, options) -> None:
        """Complete `outs`, of which the negatives are there if the whole batch of them was evaluated: let the session
        see those that it asked for, put in what it has for the others, and let guidance fade as it says."""
        call, session = self.call, self.session
        c = call.c
        if call.shown_whole:  # parts are completed when they have become whole ones
            for i in negatives if call.rows == () else ():
                outs[i] = c.clone()
                self.record.steps[-1].predicted += x.shape[0]
            return
        if call.rows:
            places = {i: session.replace(name, x, c, timestep) for i, name in negatives.items()}
            for i, out in self._in_part(executor, model, conds, places, x, timestep, options).items():
                outs[i] = out
        if call.rows != () or call.need.watch:
            session.keep(x, c, {name: outs[i] for i, name in negatives.items()}, timestep)
            if call.rows != ():
                for i, name in negatives.items():
                    outs[i] = session.settle(name, x, c, outs[i], timestep)
        if call.rows == ():
            for i, name in negatives.items():
                outs[i] = session.replace(name, x, c, timestep)
        if session.fades and not self.own_math:
            weight = session.weigh(c)
            for i in negatives:
                outs[i] = torch.lerp(c, outs[i], weight)
        if call.rows is not None and not session.fades:
            self.record.steps[-1].predicted += (x.shape[0] - len(call.rows)) * len(negatives)

    def _in_part(self, executor, model, conds, places: dict[int, Tensor], x, timestep, options) -> dict[int, Tensor]:
        """The conds at some places for the rows of this call alone; for its other rows what is given."""
        call = self.call
        index = on_device(call.rows, x.device)
        some = [narrowed(cond, call.rows, len(x)) if i in places else None for i, cond in enumerate(conds)]
        parts = executor(model, some, x[index], timestep[:len(call.rows)], options)
        return {i: given.index_put((index,), parts[i]) for i, given in places.items()}

    def _is_own_negative(self, x: Tensor) -> bool:
        """Whether a pass with conds that the guider does not know is a side of guidance that a node has of its own: on
        the latent of this call, once its conditional prediction is known."""
        call = self.call
        return self.session.fades and not self.own_math and call.need.guided and call.c is not None and x is call.x

    def _own_negative(self, executor, model, conds, x, timestep, options) -> list:
        """The empty prompt of the deprecated Perp-Neg node: evaluated for the pictures that are still guided, and
        fading with their negative."""
        call, weight = self.call, self.session.weigh(self.call.c)
        if call.rows:
            places = {i: call.c for i, cond in enumerate(conds) if cond is not None}
            found = self._in_part(executor, model, conds, places, x, timestep, options)
            outs = [found.get(i, call.c) for i in range(len(conds))]
        else:
            outs = executor(model, conds, x, timestep, options)
        return [torch.lerp(call.c, out, weight) for out in outs]

    def _without_negatives(self, executor, model, conds, x, timestep, options, positive: int | None) -> list:
        """A pass without any negative of the guider's; in a call that is not guided, its missing negatives count as
        saved and come out conditional."""
        call = self.call
        outs = executor(model, conds, x, timestep, options)
        if positive is not None and call.c is None:
            call.c = outs[positive]
            left_out = 0 if call.need.guided else len(own_conds(self.guider.conds)) - 1
            self._count(x.shape[0], x.shape[0] * left_out, 0)
            if not call.need.guided:
                outs = [out if cond is not None else call.c.clone() for cond, out in zip(conds, outs, strict=True)]
        return outs

    def _places(self, conds: list) -> tuple[int | None, dict[int, str]]:
        """Where the caller has its positive, and where which negatives. Identities survive what else is done to conds.
        """
        if self.roles is None:
            # First entries first: behind its own ones a cond may have the other sides' areas, copied with their names.
            entries = [(k, name, entry) for name, cond in own_conds(self.guider.conds).items()
                       for k, entry in enumerate(cond)]
            self.roles = {}
            for _, name, entry in sorted(entries, key=lambda each: each[0] > 0):
                self.roles.setdefault(entry.get("uuid"), name)
            if "positive" not in self.guider.conds:
                self.tell(f"Adaptive Guidance: {type(self.guider).__name__} has no positive prompt, so nothing is "
                          "saved")
        names = [self.roles.get(cond[0].get("uuid")) if cond else None for cond in conds]
        positive = names.index("positive") if "positive" in names else None
        return positive, {i: name for i, name in enumerate(names) if name not in (None, "positive")}

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
