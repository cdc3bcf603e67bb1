"""Which cases of a test run on a release, and in what order files of tests are given to processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

import pytest

EVERY_CASE = dict.fromkeys(("test_ensembles", "test_example_workflows", "test_nodes",
                            "test_server::test_example_misses_only_its_models"), 1)
"""Files and tests with a case for each node or example; none stands for another."""
SHOWN_ELSEWHERE = {
    # More of the same, by other seeds: thousands of them are runs of their own in `--all`.
    "test_fuzz_files::test_damaged_files": 4,
    "test_fuzz_api::test_damaged_workflows": 2,
    "test_guidance_files::test_damaged_files": 3,
    # Twice the pictures of the same concepts and prompts.
    "test_testbed::test_a_narrow_lora_alone_shows_its_concept_and_the_base_does_not": 2,
    "test_testbed::test_base_draws_what_is_asked": 2,
    "test_testbed::test_the_lora_for_few_steps_stands_for_guidance_and_for_many": 2,
    "test_testbed_joint::test_a_narrow_lora_alone_shows_its_concept_and_the_base_does_not": 2,
    "test_testbed_joint::test_base_draws_what_is_asked": 2,
    # Words are where they are said to be in every text encoder: test_words. That every example can be queued:
    # test_server::test_example_misses_only_its_models.
    "test_server_routed::test_words_reach_the_sampler": 3,
    # Neighbours, one half each. All without a server: test_guidance_interop, test_guidance_extrapolated_nodes,
    # test_neighbours.
    "test_interop_server::test_neighbour_before_and_after": 2,
    "test_interop_server::test_neighbour_of_extrapolated_guidance": 2,
    "test_neighbours::test_it_is_what_the_node_makes_of_the_loaders": 2,
    # Methods and kinds, each against its formula or the host's own way: test_parity, test_selection, test_kinds,
    # test_cache_methods, test_accelerator. Here it is what they all go through.
    "test_cache_budget::test_a_run_takes_what_was_expected": 3,
    "test_cache_forecast::test_with_extrapolated_guidance": 2,
    "test_dtypes::test_files_in_fp8": 2,
    "test_guidance_methods::test_a_finished_picture_saves_its_negative": 2,
    "test_lasting::test_blocks_leave_nothing_behind_that_was_made_unseen": 2,
    "test_multigpu::test_every_method_before_and_behind_the_hosts_node": 4,
    "test_multigpu::test_no_operation_is_across_cards": 3,
    "test_leave_one_out::test_shares_are_those_of_the_definition": 2,
    "test_marked::test_pictures_in_a_prompt_take_their_place": 4,
    "test_neighbours::test_a_region_step_by_step": 3,
    "test_report::test_what_was_saved_is_told_against_the_plain_way": 2,
    "test_server::test_server_draws_what_the_standalone_sampler_draws": 2,
    "test_server_stack::test_four_loras_in_one_node_are_the_chain": 2,
    "test_server_two_runs::test_two_samplers_draw_what_one_does": 2,
    "test_two_runs::test_by_the_noise_level_where_the_first_run_is_not_known": 3,
    "test_two_runs::test_windows_in_time_hold_over_both_runs": 3,
    "test_unused::test_what_is_named_changes_no_picture": 2,
    "test_windows_told::test_a_window_between_two_steps_is_named": 2,
    # What a step is to samplers and schedulers: test_samplers, test_steps.
    "test_two_runs::test_the_last_run_ramps_as_one_run_does": 3,
    "test_windows::test_comfyuis_own_keyframes": 2,
    # Node caches of others, each in one or the other of three tests of what they leave out.
    "test_neighbours_skipping::test_one_branch_is_left_out_as_with_the_loaders": 3,
    "test_neighbours_skipping::test_another_lora_is_computed_anew": 3,
    "test_neighbours_skipping::test_several_branches": 3,
    # The same graphs: test_always, test_compiled, each place and family in the one or the other.
    "test_compile::test_compiled_model": 2,
    "test_compile::test_no_more_graphs_than_the_plain_model_has": 2,
    "test_compile_cached::test_the_cache_behind_a_compiled_model": 3,
    # The same weights, made in other ways.
    "test_weights::test_a_merge_is_in_what_is_made_of_its_weights": 2,
    # Other numbers of LoRAs and pictures on the same sheet, other depths in the same table.
    "test_leave_one_out::test_sheets_of_many_loras": 2,
    "test_report::test_sheets_are_legible_and_end": 2,
    "test_split_points::test_a_full_flux_saves": 2,
    "test_split_points::test_full_unets_save": 2,
    # Both canvases show the panel of a template that is queued, and one opens every workflow of the first version:
    # test_front_end, test_golden_pages. Each blueprint agrees with the schemas.
    "test_panel::test_the_panel_is_on_the_node_inside_its_subgraph": 2,
    "test_panel::test_the_panel_speaks_the_language_of_the_page": 2,
    "test_panel::test_what_could_not_be_done_stays_on_the_node": 2,
    "test_help::test_the_panel_shows_the_page_of_the_language": 2,
    "test_rows_pages::test_rows_are_saved_reloaded_muted_and_bypassed_whole": 2,
    "test_blueprints::test_blueprints_are_queued_from_the_page": 4,
    # The host's own dialog, the same over either canvas.
    "test_front_end::test_the_template_browser_shows_the_thumbnails": 2,
    # That they still agree with the schemas is looked at for each.
    "test_golden::test_they_draw_what_they_drew": 2,
    # Either part of the benchmark, run alike.
    "test_benchmarks::test_the_goals_in_quick_mode": 2,
}
"""Tests of which the normal run takes one of so many cases, since what the others would show is shown by what the line
above them names; `--all` takes all."""
OURS = frozenset((
    "test_always", "test_auto", "test_banks", "test_by_steps", "test_cache_budget", "test_compile", "test_control",
    "test_fused",
    "test_guidance", "test_guidance_extrapolated", "test_guidance_extrapolated_nodes", "test_guidance_guiders",
    "test_guided_step", "test_hazards", "test_kept", "test_kept_guard", "test_lasting", "test_leave_one_out",
    "test_leave_one_out_batches", "test_live", "test_marked",
    "test_masks", "test_multigpu", "test_muted", "test_neighbours", "test_neighbours_routed",
    "test_neighbours_skipping", "test_nested", "test_prepared_texts", "test_prompt_node", "test_routed",
    "test_routed_probes", "test_routed_texts", "test_row_order", "test_scenarios", "test_server_routed",
    "test_server_stack", "test_server_two_runs", "test_sessions", "test_spectrum_node", "test_split_points",
    "test_stack", "test_started_films", "test_steps", "test_token_order", "test_two_runs", "test_two_runs_guidance",
    "test_uncalled", "test_weights", "test_windows", "test_windows_told"))
"""Files of the API whose tests ask ComfyUI through the same few doors: one test of `DOORS`, others on each, shows on an
older release that they are there; the newest release runs them all."""
DOORS = 6


def places(cases: Sequence[pytest.Item]) -> list[tuple[int, ...]]:
    """Where each of the cases of one test stands on each of its axes: its `parametrize` marks, and its fixtures with
    parameters."""
    seen: dict[int, list[tuple]] = defaultdict(list)
    found = []
    for item in cases:
        values = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        names = [mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
                 for mark in item.iter_markers("parametrize")]
        together = [tuple(id(values.pop(name.strip())) for name in some) for some in names]
        together += [(id(value),) for value in values.values()]
        for axis, value in enumerate(together):
            if value not in seen[axis]:
                seen[axis].append(value)
        found.append(tuple(seen[axis].index(value) for axis, value in enumerate(together)))
    return found


def one_of(items: Sequence[pytest.Item], share: int, which: int = 0, least: int = 1,
           own: Mapping[str, int] = MappingProxyType({})) -> list[pytest.Item]:
    """Of every test's cases one of `share`, at least one: those on diagonals, where the places on all axes add up to a
    multiple of it. So every value of an axis keeps a case where another axis is as long as `share`.

    which   another number chooses other cases
    least   tests with fewer axes stay as they are; where it is 2 or more, of the others so many cases stay that every
            value of each axis keeps one: `share` is at most the length of the second longest axis
    own     files and tests, "test_a", "test_a::test_of_it", with a share of their own; with 1 they stay as they are.
            Tests of one file that stand in it take other cases in turn
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept: set[int] = set()
    turns: dict[str, int] = defaultdict(int)
    for name, same in cases.items():
        stem, found = same[0].path.stem, places(same)
        of, turn = own.get(f"{stem}::{name.rpartition('::')[2]}", own.get(stem, 0)), 0
        if of > 1:
            turn, turns[stem] = turns[stem], turns[stem] + 1
        if not of:
            lengths = sorted((1 + max(axis) for axis in zip(*found, strict=True)), reverse=True)
            of = 1 if len(lengths) < least else share if least < 2 else min(share, lengths[1])
        chosen = [item for item, where in zip(same, found, strict=True) if (sum(where) + which + turn) % of == 0]
        kept |= {id(item) for item in chosen or same[:1]}
    return [item for item in items if id(item) in kept]


def some_tests(items: Sequence[pytest.Item], files: Set[str], share: int, which: int = 0) -> list[pytest.Item]:
    """Of the tests in each of these files (stems) one of `share`, at least one, each with all its cases; `which` as in
    `one_of`. All of the others."""
    tests: dict[str, dict[str, None]] = defaultdict(dict)
    for item in items:
        tests[item.path.stem][item.nodeid.partition("[")[0]] = None
    kept = {name for stem, names in tests.items() for place, name in enumerate(names)
            if stem not in files or (place + which) % min(share, len(names)) == 0}
    return [item for item in items if item.nodeid.partition("[")[0] in kept]


def taken(items: Sequence[pytest.Item], crossed: int, share: int, which: int) -> list[pytest.Item]:
    """The cases that a run takes: with `crossed` above 1 those of the normal run on the newest release and without any,
    with `share` above 1 those on an older one. Without ComfyUI tests are so short that they keep their combinations."""
    if crossed > 1:
        whole = {item.path.stem: 1 for item in items if item.path.parent.name != "host"}
        items = one_of(items, crossed, which, 2, whole | EVERY_CASE | SHOWN_ELSEWHERE)
    if share > 1:
        items = some_tests(items, OURS, DOORS, which)
        return one_of(items, share, which, 1, EVERY_CASE | {"test_parity_families": 2 * share})
    return list(items)


def longest_first(items: Sequence[pytest.Item], long: Sequence[str]) -> list[pytest.Item]:
    """The items with those of the files (stems) in `long` ahead, in the order of `long`; a file's own order stays."""
    ahead = {name: place for place, name in enumerate(long)}
    return sorted(items, key=lambda item: ahead.get(item.path.stem, len(ahead)))
