"""What the engine promises where it takes another process to see: over the Hub, at the end of memory, by its hash."""

import os
from contextlib import contextmanager, nullcontext
from http.server import ThreadingHTTPServer

import pytest
from engine_server import Client, candidates
from loopback_hub import LoopbackHub
from peft import PeftModel
from tiny_models import save_adapter, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from t2s_pref import TransformersEngine


@pytest.fixture(scope="module")
def hub(tiny_model, tiny_adapter):
    with LoopbackHub() as hub:
        hub.add("model", "user/base", tiny_model)
        hub.add("model", "user/adapter", tiny_adapter)
        hub.add("model", "user/no-adapter", {"README.md": "nothing here"})
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home):
    with Client({**hub.environment(home), "PYTHONHASHSEED": "1"}, home) as client:
        yield client


@pytest.fixture(scope="module")
def offline(hub, home):
    with Client({**hub.environment(home), "HF_HUB_OFFLINE": "1"}, home) as client:
        yield client


@pytest.fixture(autouse=True)
def healthy(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").heal()


@pytest.fixture(scope="module")
def from_the_hub(online):
    """The answers of base and adapter from the Hub, which are cached from then on."""
    return online.ask("candidates", base_model="user/base", adapter_path="user/adapter", device="cpu")


def test_base_and_adapter_load_from_the_hub_by_their_ids(hub, from_the_hub, tiny_model, tiny_adapter, tmp_path):
    commit = hub.repositories["model", "user/base"].branches["main"]
    result = from_the_hub["result"]
    assert result["candidates"] == candidates(
        TransformersEngine(tiny_model, adapter_path=str(tiny_adapter), device="cpu"), tmp_path / "memo.json"
    )
    assert result["described"] == f"user/base at {commit[:12]}, adapter user/adapter"
    assert result["identity"]["base_model"] == commit
    adapter = hub.repositories["model", "user/adapter"].branches["main"]
    assert result["identity"]["adapter"] == adapter
    assert result["origin"]["model"] == {"name": "user/base", "revision": commit}
    assert result["origin"]["adapter"] == {"name": "user/adapter", "revision": adapter}
    assert from_the_hub["warnings"] == []


def test_what_is_loaded_is_the_commit_that_was_found_even_if_the_branch_moves_on(
    hub, online, tiny_model, tmp_path, base_answers
):
    commit = hub.add("model", "user/moving", tiny_model)
    first = online.ask("prepare", base_model="user/moving", device="cpu")["result"]["identity"]
    assert first["base_model"] == commit
    newer = hub.add("model", "user/moving", save_model(tmp_path / "newer", seed=5))
    before = len(hub.requests)
    assert "refused" not in online.ask("load")
    weights = [path for _, path in hub.requests[before:] if path.endswith("model.safetensors")]
    assert weights
    assert all(f"/resolve/{commit}/" in path for path in weights)
    second = online.ask("candidates", base_model="user/moving", device="cpu")["result"]
    assert second["identity"]["base_model"] == newer
    assert second["candidates"] != base_answers
    third = online.ask("candidates", base_model="user/moving", revision=commit, device="cpu")["result"]
    assert third["identity"] == first
    assert third["candidates"] == base_answers


def test_an_adapter_that_is_not_on_the_hub_is_warned_of_and_the_base_goes_on_alone(online, base_answers):
    answer = online.ask("candidates", base_model="user/base", adapter_path="user/nothing", device="cpu")
    assert answer["result"]["candidates"] == base_answers
    assert answer["result"]["described"].endswith("no adapter: user/nothing was absent")
    assert "ADAPTER NOT FOUND: 'user/nothing'" in answer["warnings"][0]
    strict = online.ask("prepare", base_model="user/base", adapter_path="user/nothing", strict_adapter=True)
    assert "'user/nothing' does not exist" in strict["refused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_model": "user/nothing"}, "was not found on the Hub"),
        ({"base_model": "user/no-adapter"}, "was not found on the Hub as a model"),
        ({"base_model": "user/base", "revision": "v9"}, "Revision 'v9' of 'user/base' was not found"),
        ({"base_model": "user/base", "adapter_path": "user/no-adapter"}, "has no adapter_config.json"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_in_one_line(online, arguments, message):
    refused = online.ask("prepare", **arguments)["refused"]
    assert message in refused
    assert "\n" not in refused


@contextmanager
def switched_off(hub):
    """Nothing listens at the Hub's address for a while."""
    address, handler = hub.server.server_address, hub.server.RequestHandlerClass
    hub.__exit__()
    yield
    hub.server = ThreadingHTTPServer(address, handler)
    hub.server.hub = hub
    hub.__enter__()


TROUBLES = {
    "503": lambda hub: nullcontext(hub.fail(503, match="not-cached")),
    "500": lambda hub: nullcontext(hub.fail(500, match="not-cached")),
    "connections cut": lambda hub: nullcontext(hub.drop(match="not-cached")),
    "nobody listening": switched_off,
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_hub_that_fails_is_an_error_and_not_an_absent_adapter(hub, online, tiny_model, trouble):
    hub.add("model", "user/not-cached", {"adapter_config.json": "{}"})
    with TROUBLES[trouble](hub):
        hub_fails(online, tiny_model)


def hub_fails(online, tiny_model):
    for arguments in (
        {"base_model": "user/not-cached"},
        {"base_model": str(tiny_model), "adapter_path": "user/not-cached"},
    ):
        answer = online.ask("prepare", **arguments)
        assert "could not be reached" in answer["refused"]
        assert "\n" not in answer["refused"]
        assert answer["warnings"] == []


def test_weights_that_break_off_on_their_way_are_an_error_and_load_when_asked_again(
    hub, online, tiny_model, base_answers
):
    hub.add("model", "user/broken-off", tiny_model)
    hub.fail(503, match="broken-off.*safetensors")
    answer = online.ask("candidates", base_model="user/broken-off", device="cpu")
    assert "cannot be loaded" in answer["refused"]
    assert "\n" not in answer["refused"]
    hub.heal()
    answer = online.ask("candidates", base_model="user/broken-off", device="cpu")
    assert answer["result"]["candidates"] == base_answers


def test_offline_what_is_cached_loads_and_what_is_not_is_refused_in_one_line(hub, offline, from_the_hub):
    hub.fail(503)
    before = len(hub.requests)
    answer = offline.ask("candidates", base_model="user/base", adapter_path="user/adapter", device="cpu")
    assert answer["result"] == from_the_hub["result"]
    for arguments in ({"base_model": "user/unknown"}, {"base_model": "user/base", "adapter_path": "user/unknown"}):
        refused = offline.ask("prepare", **arguments)["refused"]
        assert "'user/unknown' is neither a folder here nor in the Hub cache, and HF_HUB_OFFLINE is set" in refused
        assert "\n" not in refused
    assert len(hub.requests) == before


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A process that has done nothing yet: what memory an older one has to spare is hard to tell."""
    with Client({**os.environ, "PYTHONHASHSEED": "2"}, tmp_path_factory.mktemp("apart")) as client:
        yield client


def test_where_memory_ends_batches_are_halved_and_the_candidates_stay_the_same(apart, tiny_model):
    apart.ask("prepare", base_model=str(tiny_model), device="cpu")
    batch = {"rows": 24, "length": 400, "numbers": 8}
    free = apart.ask("sample", **batch, spare=None)
    assert free["warnings"] == []
    tight = apart.ask("sample", **batch, spare=6_000_000)
    assert tight["result"] == free["result"]
    assert tight["warnings"]
    assert all("Out of memory with" in warning and "going on with" in warning for warning in tight["warnings"])
    # a batch as large as one that has failed is not tried again
    again = apart.ask("sample", **batch, spare=6_000_000)
    assert again["result"] == free["result"]
    assert not set(again["warnings"]) & set(tight["warnings"])


def test_a_single_candidate_that_does_not_fit_the_memory_is_an_error_with_the_setting_to_turn(apart, tiny_model):
    apart.ask("prepare", base_model=str(tiny_model), device="cpu")
    answer = apart.ask("sample", rows=1, length=20_000, numbers=2, spare=4_000_000)
    assert (
        "Out of memory with a single candidate on a prompt of 20000 tokens; lower --max-new-tokens"
        in (answer["refused"])
    )
    assert "\n" not in answer["refused"]


def test_a_model_in_hand_is_the_same_in_every_process(apart, online, tiny_model, tmp_path):
    # peft keeps module names in sets, whose order changes from process to process
    adapter = save_adapter(tmp_path / "adapter", tiny_model, target_modules="all-linear")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    engine = TransformersEngine(model, tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    here = engine.identity(tmp_path / "memo.json")["in_hand"]
    for client in (apart, online):
        assert client.ask("in_hand", base=str(tiny_model), adapter=str(adapter))["result"] == here
