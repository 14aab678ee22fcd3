"""What the settings promise: nothing impossible gets past them, and one setting is one key."""

import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2s_pref import SamplingSettings, UserError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_rejects", 0, "1 or more"),
        ("num_rejects", -3, "1 or more"),
        ("num_rejects", 3.0, "an integer"),
        ("num_rejects", True, "an integer"),
        ("num_rejects", "3", "an integer"),
        ("num_rejects", None, "an integer"),
        ("seed", 1.5, "an integer"),
        ("seed", False, "an integer"),
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", 256.0, "an integer"),
        ("max_new_tokens", True, "an integer"),
        ("temperature", -0.1, "0 (greedy) or a positive number"),
        ("temperature", math.nan, "0 (greedy) or a positive number"),
        ("temperature", math.inf, "0 (greedy) or a positive number"),
        ("temperature", True, "a number"),
        ("temperature", "0.7", "a number"),
        ("temperature", None, "a number"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.0001, "above 0 and at most 1"),
        ("top_p", -1, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("top_p", math.inf, "above 0 and at most 1"),
        ("top_p", True, "a number"),
        ("top_k", -1, "0 (off) or more"),
        ("top_k", 1.5, "an integer"),
        ("repetition_penalty", 0, "from 0.01 to 100 (1 = off)"),
        ("repetition_penalty", math.nan, "from 0.01 to 100 (1 = off)"),
        ("repetition_penalty", "1", "a number"),
        ("stop", ("",), "texts of one character or more"),
        ("stop", ("\udcff",), "in Unicode"),
        ("stop", (3,), "texts of one character or more"),
        ("stop", 3, "texts of one character or more"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_name_and_what_is_allowed(name, value, expected):
    with pytest.raises(UserError) as refused:
        SamplingSettings(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} is {value if isinstance(value, float) else repr(value)}"[:12])
    assert expected in message
    assert "\n" not in message


def test_values_at_the_edge_of_what_is_allowed_are_taken():
    edge = SamplingSettings(num_rejects=1, seed=-(2**80), max_new_tokens=1, temperature=0, top_p=1)
    assert (edge.temperature, edge.top_p) == (0.0, 1.0)
    assert SamplingSettings(temperature=1e-9, top_p=1e-9).candidates == 3


def test_greedy_decoding_has_one_candidate_a_row():
    assert SamplingSettings(num_rejects=5, temperature=0).candidates == 1
    assert SamplingSettings(num_rejects=5).candidates == 5


@given(st.integers(), st.integers(0, 10**12))
def test_a_rows_seed_is_the_base_seed_plus_a_thousand_times_its_position(seed, position):
    assert SamplingSettings(seed=seed).row_seed(position) == seed + 1000 * position


def test_the_defaults_are_those_of_the_source_recipe():
    assert asdict(SamplingSettings()) == {
        "num_rejects": 3,
        "seed": 1234,
        "max_new_tokens": 4096,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "stop": (),
        "enable_thinking": False,
        "answer_format": "sql",
        "round": None,
    }


def test_an_integer_and_the_equal_float_are_one_setting_and_one_key():
    one, other = SamplingSettings(temperature=1, top_p=1), SamplingSettings(temperature=1.0, top_p=1.0)
    assert one == other
    assert hash(one) == hash(other)
    assert json.dumps(asdict(one)) == json.dumps(asdict(other))


def test_settings_cannot_be_changed_once_made():
    settings = SamplingSettings()
    with pytest.raises(FrozenInstanceError):
        settings.seed = 5
    assert len({settings, SamplingSettings(), SamplingSettings(seed=5)}) == 2


def test_the_number_of_rejects_and_the_seed_do_not_decide_which_store_the_samples_are_in():
    assert SamplingSettings(num_rejects=3, seed=1).drawing() == SamplingSettings(num_rejects=9, seed=2).drawing()
    for name, value in (("temperature", 0.8), ("top_p", 0.8), ("max_new_tokens", 9), ("enable_thinking", True)):
        assert SamplingSettings(**{name: value}).drawing() != SamplingSettings().drawing()
