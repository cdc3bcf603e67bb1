"""LoRAs on what a model makes of its prompts before sampling begins: `preprocess_text_embeds` of LTX-2, Anima and
MiniMax H3. Its layers run once for all steps, while the host prepares the conds of a run, and in no evaluation."""

from __future__ import annotations

from ...engine.forwards import RoutedForwards
from ...kernels.branch import Branch, scaled
from ...methods.merge import Merge
from .run import Run
from .sampled import routed_on, unwrapped
from .summary import without_prompt


def act_on_prompts(run: Run, patcher) -> None:
    """Until the first evaluation (`Run.texts`) layers do what methods ask that have one branch at all times and places.
    """
    if not hasattr(unwrapped(patcher.model.diffusion_model), "preprocess_text_embeds") \
            or getattr(patcher, "is_multigpu_base_clone", False):  # of several devices one prepares for all
        return
    forwards = routed_on(run, patcher, {"wrappers": patcher.wrappers})
    for joined, routed in zip(run.banked, forwards, strict=True):
        row = tuple(_lasting(run, k, routed) for k in joined.methods)
        run.texts.enter_context(routed.rows([joined.branch(row, routed.bank.count)]))


def _lasting(run: Run, k: int, routed: RoutedForwards) -> Branch:
    """What a method asks for at all times and places: nothing, unless it has one branch."""
    applied = run.applied[k]
    if not isinstance(applied.method, Merge) or run.regions[k] is not None:
        return Branch((0.0,) * len(applied.names))
    run.texts.callback(lambda: run.tell(without_prompt(applied, routed)))
    branch = Branch(applied.method.strengths)
    if applied.windows:  # what is prepared serves all steps
        branch = scaled(branch, tuple(float(window.whole) for window in applied.windows))
    return run.without.rows(k, [branch], 1)[0]
