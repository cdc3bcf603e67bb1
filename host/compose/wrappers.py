"""The wrappers that make a MODEL compose. They are plain functions without state: wrapper lists are copied, deeply in
some releases, with every clone; the state is found at run time on the model that samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from uuid import UUID

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...engine.layout import NotRows
from ...engine.tell import into
from ..families.work import work_of
from .banks import as_computed
from .cache import Combo
from .cards import note_cards, same_banks, settle
from .composition import KEY, Composition
from .context import is_flow, method_contexts, parts_of, run_context, sides_of, timed
from .control import CALLER_CONDS, OF_WEIGHTS, OWN_CONTROLS, caller_indexes, made_of_weights
from .earlier import RUNS, bare, mark_of, names_of
from .kept import has_history
from .places import window_of
from .prepared import act_on_prompts
from .probe import find_places, listening, positives, readings
from .rows import in_range
from .run import Plan, Run
from .sampled import free_of, is_compiled, routed_on, run_of, unwrapped
from .steps import tracked
from .summary import carried
from .tiles import TILES, with_tiles
from .variants import with_own_names, with_variants
from .watch import watching


def install_wrappers(model) -> None:
    """Add the wrappers to a MODEL; once, however many methods are chained."""
    for kind, wrapper in _wrappers().items():
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)
    if not model.get_callbacks(CallbacksMP.ON_PRE_RUN, KEY):
        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, pre_run)
    matched = getattr(CallbacksMP, "ON_MATCH_MULTIGPU_CLONES", None)
    if matched is not None and not model.get_callbacks(matched, KEY):
        model.add_callback_with_key(matched, KEY, matching)


def _wrappers() -> dict[str, Callable]:
    return {WrappersMP.OUTER_SAMPLE: outer_sample, WrappersMP.SAMPLER_SAMPLE: sampler_sample,
            WrappersMP.CALC_COND_BATCH: calc_cond_batch, WrappersMP.APPLY_MODEL: apply_model}


def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs):
    """One run: state begins here and ends here, however it ends."""
    composition: Composition | None = executor.class_obj.model_patcher.get_attachment(KEY)
    if composition is None:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
    guider = executor.class_obj
    context = run_context(sigmas, noise, kwargs.get("latent_shapes"))
    tracker, callback = tracked(context.sigmas, callback)
    noisy = bare(noise)
    earlier = RUNS.before(latent_image) if noisy else None
    context = timed(context, guider.model_patcher, earlier, noisy)
    contexts = method_contexts(context, guider.model_patcher, composition.applied, guider.conds, earlier)
    run = composition.begin(tracker, contexts, sides_of(guider.conds), free_of(guider.model_patcher),
                            guider.model_patcher.load_device)
    left, added, watchers = None, [], []
    try:
        for regions in run.routes if earlier is not None else ():
            regions.known = earlier.maps
        if run.cache is not None:
            run.cache.flow, run.cache.chosen = is_flow(guider.model_patcher), run.record.chosen.append
        watchers += watching(guider.model_patcher, run.record, tracker.total)
        callback.also += [partial(told, False) for told in watchers]
        if run.applied and made_of_weights(guider.conds):
            into(run.record.problems)(OF_WEIGHTS)
        added += with_variants(guider.conds) if run.routes else []
        run.conds = lambda: guider.conds
        with as_computed(guider.model_patcher, KEY):
            out = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
        left, known = mark_of(out), [each.taken for each in run.routes if not each.idle]
        run.record.carried += carried(run.record, contexts, earlier, known, composition.cache)
        if context.handed_on:
            sessions = zip(names_of([each.method for each in run.applied]), run.sessions, strict=True)
            RUNS.left(left, context, run.routes, earlier, dict(sessions))
        return out
    finally:
        for name in added:
            guider.conds.pop(name, None)
        composition.end(run, left)
        for told in watchers:
            told(True)


def sampler_sample(executor, guider, *args, **kwargs):
    """All evaluations of a run, of conds that the host has prepared. It ends the run with taking the forwards of other
    nodes off the layers and putting them on again (`use_ejected`): one that wraps what it finds there (FreeFuse's
    LoRAs) must not find ours."""
    composition: Composition | None = guider.model_patcher.get_attachment(KEY)
    running = composition is not None and bool(composition.runs)
    if running:
        with_own_names(guider.conds)
    try:
        return executor(guider, *args, **kwargs)
    finally:
        if running:
            composition.runs[-1].off()


def pre_run(patcher) -> None:
    """The host is about to prepare the conds of a run. A model of which no run began is told of (`Composition.run`).

    Raises ValueError where a node behind ours has put wrappers in the place of all that there were (BrushNet)."""
    composition: Composition | None = patcher.get_attachment(KEY)
    if composition is None:
        return
    if not all(patcher.get_wrappers(kind, KEY) for kind in _wrappers()):
        raise ValueError("A node has taken the LoRAs of LoRA Ensemble off this model, with all that other nodes had "
                         "put around it: BrushNet and PowerPaint do. Connect the LoRA Ensemble nodes behind that "
                         "node, between it and the sampler.")
    if (run := composition.run) is not None:
        act_on_prompts(run, patcher)


def matching(model, copy) -> None:
    """The host has matched a further card's copy of a model to it."""
    same_banks(model, copy, KEY)


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """Evaluate every branch of this step for every cond of the caller, in the host's own batches, and mix."""
    run = run_of(model)
    if run is None:
        return executor(model, conds, x_in, timestep, model_options)
    run.texts.close()
    # Before a node puts blocks of its own in the place of the model's while it runs (First Block Cache).
    routed_on(run, model.current_patcher, model_options.get("transformer_options", {}))
    note_cards(run.record, model_options)
    run.controls.as_they_are = OWN_CONTROLS in model_options
    if (wrapper := model_options.get("model_function_wrapper")) is not None:
        placed = run.cache is not None or any(regions is not None for regions in run.regions)
        wrapper = with_tiles(wrapper, lambda: run.probing, placed, run.cuts)
        model_options = {**model_options, "model_function_wrapper": wrapper}
    plan, sides = run.plan(x_in, timestep, parts_of(conds)), run.sides(conds)
    _in_window(run, model_options.get("transformer_options", {}))
    run.areas.update({entry.get("uuid"): entry.get("area") for cond in conds for entry in cond or ()})

    root = unwrapped(model.diffusion_model)

    def alone(conds, combo) -> list[Tensor]:
        """Predictions for conds that are all of the positive side."""
        run.controls.begin(conds, 1)
        options, wide = _caller_options(model_options, 1), [_branch_cond(run, cond, combo) for cond in conds]
        apart = len(conds) > 1 and (run.kept.neighbours.patched(conds, options["transformer_options"], one_side=True)
                                    or run.one_row_only(root, conds))
        return [out for some in ([[cond] for cond in wide] if apart else [wide])
                for out in executor(model, some, x_in, timestep, options)]

    if run.routes and not run.probing:
        options = model_options.get("transformer_options", {})
        compiled = run.compiled(root, partial(is_compiled, model.diffusion_model, options))
        for each in run.routes:
            each.evaluate(plan.own)
        find_places(run, positives(conds, sides), alone, root, compiled, has_history(options))
        with run.reading([] if compiled else [each for each in run.routes if each.reads(plan.step)],
                         _to_read(run, plan.combos)):
            return _evaluated(executor, model, run, plan, conds, sides, x_in, timestep, model_options)
    return _evaluated(executor, model, run, plan, conds, sides, x_in, timestep, model_options)


def _evaluated(executor, model, run: Run, plan: Plan, conds, sides, x_in, timestep, model_options) -> list[Tensor]:
    """The predictions of one call, every branch for every cond, mixed."""
    combos = plan.combos
    groups, root = [combos], unwrapped(model.diffusion_model)
    if run.cache is not None and not run.probing:
        together = len(combos) > 1 and _mixes(run, model, root, conds, model_options)
        groups = run.cache.parts(plan.own, combos, plan.fresh, timestep, partial(_identities, run, plan, conds),
                                 together)
    if len(combos) == 1:
        run.single = combos[0]
        outs = executor(model, conds, x_in, timestep, model_options)
        mixed = run.mix(plan, _present([out[None] for out in outs], conds), sides)
        return [out if one is None else one for out, one in zip(outs, mixed, strict=True)]
    run.single = None
    options = _caller_options(model_options, len(conds))

    def evaluated(groups) -> dict:
        outs = {}
        run.controls.begin(conds, len(combos))
        for group in groups:
            # The host takes conds from the end of its list: reversed here, rows come out with branches in order and the
            # conds of one branch side by side, which is the layout that the engine computes in the fewest products.
            wide = [_branch_cond(run, cond, combo) for combo in reversed(group) for cond in conds]
            found = executor(model, wide, x_in, timestep, options)
            outs.update({combo: found[k * len(conds):(k + 1) * len(conds)] for k, combo in enumerate(reversed(group))})
        return outs

    # The base model first: what a node keeps of the last batch (Self-Attention Guidance its attention) is a LoRA's.
    singles = [(combo,) for combo in sorted((combo for group in groups for combo in group), key=_acting)]
    try:
        outs = evaluated(singles if run.apart(root, conds, options["transformer_options"]) else groups)
    except NotRows as reason:
        settle(options)
        run.keep_apart(root, reason)
        if run.cache is not None:
            run.cache.again()
        outs = evaluated(singles)
    stacked = [torch.stack([outs[combo][i] for combo in combos]) for i in range(len(conds))]
    mixed = run.mix(plan, _present(stacked, conds), sides)
    return [out[0] if one is None else one for out, one in zip(stacked, mixed, strict=True)]


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Tell the routed forwards which branch each row belongs to, and inner code which cond its caller meant."""
    options = transformer_options if transformer_options is not None else {}
    model = executor.class_obj
    run = run_of(model)
    if run is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    tiles = options.get(TILES, ())
    uuids = (options.get("uuids") or [None]) * max(len(tiles), 1)
    combos, root = [run.combos.get(uuid, run.single) for uuid in uuids], unwrapped(model.diffusion_model)
    if None in combos:
        # A node called the model on its own while several branches are open: none of them is meant.
        return executor(x, t, c_concat, c_crossattn, control, run.keeping(root, options, combos, uuids), **kwargs)
    options = caller_indexes(run.keeping(root, options, combos, uuids))
    if "ad_params" in options:  # its windows may be cut further in
        _in_window(run, options)
    per_cond, rows = x.shape[0] // len(combos), list(zip(combos, uuids, strict=True))
    conds = {"context": c_crossattn, **kwargs}
    run.record.count(x.shape[0], str(model.current_patcher.load_device))
    forwards = list(zip(run.banked, routed_on(run, model.current_patcher, options), strict=True))

    def among(some: Sequence[int]) -> ExitStack:
        """While open, the rows of some of the conds are the batch."""
        own = ExitStack()
        for joined, routed in forwards:
            own.enter_context(routed.rows(run.rows(joined, routed.bank.count, [rows[k] for k in some], per_cond)))
        return own

    with ExitStack() as stack:
        for joined, routed in forwards:
            places = run.places(joined, root, x, conds, uuids, tiles)
            reach = listening(run, joined, rows, places, per_cond)
            stack.enter_context(routed.rows(run.rows(joined, routed.bank.count, rows, per_cond), places, reach))
        found = readings(run.readers, root, x, conds, run.to_read(uuids, combos)) if run.readers and not tiles else ()
        for reading in found:
            options = reading.reader.options(options)
        if run.cache is not None and not run.probing:
            work = partial(work_of, model, root, x, t, c_concat, c_crossattn, options, kwargs)
            control, options = stack.enter_context(run.cache.evaluate(
                root, uuids, combos, x, c_crossattn, control, options, work, among))
        out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    for reading in found:
        reading.done()
    return out


def _in_window(run: Run, options: dict) -> None:
    """Which frames the call has that goes on."""
    run.window = window = window_of(options)
    for regions in filter(None, run.regions):
        regions.window = window


def _acting(combo: Combo) -> int:
    """How many methods have LoRAs that act."""
    return sum(not branch.is_base for branch in combo)


def _mixes(run: Run, model, root, conds, model_options: dict) -> bool:
    """Whether rows that run whole may share a batch with rows on cached features: where nothing but the model's own
    layers and the LoRAs' deltas, which act everywhere, tells one row of the batch from another."""
    options = model_options.get("transformer_options", {})
    if model_options.get("context_handler") is not None or any(regions is not None for regions in run.regions):
        return False
    if any(entry.get(name) is not None for cond in conds for entry in cond or ()
           for name in ("control", "hooks", "gligen")):
        return False
    return run.cache.mixes(root, options) and not run.apart(root, conds, options) and not run.compiled(
        root, partial(is_compiled, model.diffusion_model, options))


def _present(predictions: list[Tensor], conds) -> list[Tensor | None]:
    """Predictions of the conds that there are; the host fills the others with zeros."""
    return [None if cond is None else p for p, cond in zip(predictions, conds, strict=True)]


def _to_read(run: Run, combos):
    """The combination whose rows say where words are: the one without the LoRAs that are confined where it is
    evaluated, else the first."""
    routed = [k for k, regions in enumerate(run.regions) if regions in run.routes]
    return next((combo for combo in combos if all(combo[k].is_base for k in routed)), combos[0])


def _identities(run: Run, plan: Plan, conds, combo) -> list[UUID | None]:
    """Those under which the conds are evaluated for one combination, the ones in their range at this noise level."""
    uuids = [entry.get("uuid") for cond in conds for entry in cond or () if in_range(entry, plan.step.sigma)]
    return uuids if len(plan.combos) == 1 else [run.tag(uuid, combo) for uuid in uuids]


def _branch_cond(run: Run, cond, combo):
    """The caller's cond list for one branch: the same conds under identities of their own."""
    if cond is None:
        return None
    out = []
    for entry in cond:
        control, copy = entry.get("control"), {**entry, "uuid": run.tag(entry.get("uuid"), combo)}
        run.areas[copy["uuid"]] = entry.get("area")
        if control is not None:
            copy["control"] = run.controls.view(control, entry.get("uuid"), copy["uuid"])
        out.append(copy)
    return out


def _caller_options(model_options: dict, caller_conds: int) -> dict:
    """Model options for the wide batch: they say how many conds the caller has, and show an outer function wrapper the
    caller's indexes."""
    options = {**model_options}
    options["transformer_options"] = {**options.get("transformer_options", {}), CALLER_CONDS: caller_conds}
    wrapper = options.get("model_function_wrapper")
    if wrapper is not None:
        def with_caller_indexes(apply, args):
            inner = caller_indexes(args["c"]["transformer_options"])
            return wrapper(apply, {**args, "c": {**args["c"], "transformer_options": inner},
                                   "cond_or_uncond": inner["cond_or_uncond"]})
        options["model_function_wrapper"] = with_caller_indexes
    return options
