"""Two noise levels: which file is for which model, what belongs together, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.host.files.levels import divided, level_of, side_by_side
from lora_ensemble.nodes.levels import LoRAEnsembleNoiseLevels

PAIRS = [
    ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise"),
    ("Wan2.2-T2V-A14B-4steps-lora-rank64/high_noise_model", "Wan2.2-T2V-A14B-4steps-lora-rank64/low_noise_model"),
    ("Wan22_A14B_T2V_HIGH_Lightning_4steps", "Wan22_A14B_T2V_LOW_Lightning_4steps"),
    ("styleHighNoise", "styleLowNoise"), ("highnoise-cat", "lownoise-cat"), ("cat-high", "cat-low"),
    ("catHigh", "catLow"), ("cat_H_e20", "cat_L_e20"), ("cat-HN", "cat-LN"), ("high/cat", "low/cat"),
    ("cat_h_e20", "cat_l_e20"), ("cat-hn", "cat-Ln"), ("catHN", "catLN"), ("catHIGH", "catLOW"),
    ("catHighV2", "catLowV2"), ("catHIGHNOISE", "catLOWNOISE"),
    ("hIgH_cat", "LoW_cat"), ("wan_l_cat_HIGH", "wan_l_cat_LOW"), ("clip_l_high", "clip_l_low"),
    ("high\\cat_high_noise", "low\\cat_low_noise"),
]


def spec(name: str, strength: float = 1.0, **options) -> LoRASpec:
    return LoRASpec(f"{name}.safetensors", strength, 0.0, **options)


def names(ensemble) -> list[str]:
    return [each.name.removesuffix(".safetensors") for each in ensemble if each.strength_model]


@pytest.mark.parametrize(("high", "low"), PAIRS, ids=[high for high, _ in PAIRS])
@pytest.mark.parametrize("turned", [False, True])
def test_spellings(high, low, turned):
    """From the chain, in either order, and from the folder."""
    chain = [spec(high, 0.8), spec("other"), spec(low, 0.5)]
    found = divided(chain[::-1] if turned else chain, ())
    assert set(names(found.high)) == {high, "other"} and set(names(found.low)) == {low, "other"}
    assert [each.strength_model for each in found.high if each.name.startswith(high)] == [0.8]
    assert found.problems == () and any(line.endswith(": a pair") for line in found.lines)
    given = spec(low if turned else high, 0.8, words="ohwx", role="character")
    found = divided([given], [spec(each).name for each in ("other", "x_high_noise", high, low)])
    assert (names(found.high), names(found.low)) == ([high], [low])
    assert {(each.strength_model, each.words, each.role) for each in (*found.high, *found.low)} == {
        (0.8, "ohwx", "character")}
    assert "found in the folder" in found.lines[0]


@pytest.mark.parametrize("name", ["highlander", "slow_motion", "flowers", "hellow", "low_high_merge", "HL_style",
                                  "shallow noise", "Hello", "loha_L2"])
def test_names_that_say_no_level(name):
    assert level_of(name) is None


@pytest.mark.parametrize(("name", "sure"), [("high_quality", False), ("low-poly", False), ("cat_high_noise", True),
                                            ("cat_HIGH_v2", True)])
def test_what_may_mean_something_else_takes_a_partner(name, sure):
    says = level_of(name)
    assert says.sure is sure
    found = divided([spec(name)], ["poly.safetensors", "quality.safetensors"])
    both = names(found.high) + names(found.low)
    assert both == ([name] if sure else [name] * 2) and len(found.problems) == 1
    # Its place in the other ensemble stays, as prompts count LoRAs.
    assert len(found.high) == len(found.low) == 1 and found.high[0].name == found.low[0].name


def test_pairs_of_unequal_ends():
    """Epochs differ: by how their names begin, where there is but one such."""
    found = divided([spec("cat_high_noise_e20"), spec("dog_high_noise"), spec("cat_low_noise_e15")], ())
    assert names(found.high) == ["cat_high_noise_e20", "dog_high_noise"] and names(found.low) == ["cat_low_noise_e15"]
    assert "by how their names begin" in found.lines[0]
    assert found.problems[0].startswith("'dog_high_noise.safetensors': acts at high noise alone")
    three = [spec("cat_high_noise_e20"), spec("cat_low_noise_e15"), spec("cat_low_noise_e10")]
    assert len(divided(three, ()).problems) == 3


def test_the_order_of_the_chain_stays():
    chain = [spec(name) for name in ("b_low_noise", "a", "c_high_noise", "b_high_noise", "c_low_noise")]
    found = divided(chain, ())
    assert names(found.high) == ["b_high_noise", "a", "c_high_noise"]
    assert names(found.low) == ["b_low_noise", "a", "c_low_noise"]


@pytest.mark.parametrize(("unnamed", "high", "low"), [("both", ["a"], ["a"]), ("high noise", ["a"], []),
                                                      ("low noise", [], ["a"])])
def test_where_unnamed_loras_act(unnamed, high, low):
    found = divided([spec("a")], (), unnamed)
    assert (names(found.high), names(found.low)) == (high, low) and found.problems == ()
    assert found.lines[0].endswith("both" if unnamed == "both" else f"{unnamed} alone")


def test_two_chains_stay_as_they_are():
    high, low = (spec("a_high_noise"), spec("b1"), spec("c_low_noise")), (spec("b2"), spec("a_low_noise"))
    found = side_by_side(high, low)
    assert found.high is high and found.low is low
    assert found.lines[:2] == ("'a_high_noise.safetensors' and 'a_low_noise.safetensors': a pair",
                               "'b1.safetensors' and 'b2.safetensors': by their places; their names do not say that "
                               "they belong together")
    assert found.problems == ("'c_low_noise.safetensors': acts at high noise alone",
                              "'c_low_noise.safetensors' is in the chain for high noise, and its name says low")


def test_the_node(loras, caplog):
    files = [loras({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, f"{name}.safetensors")
             for name in ("cat_high_noise", "cat_low_noise", "dog_HIGH", "old")]
    chain = (spec("cat_high_noise", 0.7, role=ALWAYS), spec("dog_HIGH"), spec("old"))
    before = LoRAEnsembleNoiseLevels.fingerprint_inputs()
    high, low, text = LoRAEnsembleNoiseLevels.execute(chain, "both").args
    assert [each.name for each in high] == [files[0], files[2], files[3]]
    assert [(each.name, each.strength_model) for each in low] == [(files[1], 0.7), (files[2], 0.0), (files[3], 1.0)]
    assert low[0].role == ALWAYS and len(text.splitlines()) == 3
    assert [line.message for line in caplog.records] == [
        "Two Noise Levels (Ensemble): 'dog_HIGH.safetensors': acts at high noise alone, since no file is named like it "
        "for the other level"]
    loras({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, "dog_LOW.safetensors")
    assert LoRAEnsembleNoiseLevels.fingerprint_inputs() != before
    assert LoRAEnsembleNoiseLevels.execute(chain, "both").args[1][1].name == "dog_LOW.safetensors"
    with pytest.raises(ValueError, match="unnamed is 'all'. Choose one of"):
        LoRAEnsembleNoiseLevels.execute(chain, "all")
    with pytest.raises(ValueError, match="gone.safetensors"):
        LoRAEnsembleNoiseLevels.execute((spec("gone"),), "both")
    off = LoRASpec("gone.safetensors", 0.0, 0.0)  # as a row that is off, whose file is not looked at
    assert LoRAEnsembleNoiseLevels.execute((off, *chain), "both").args[0][0] == off
