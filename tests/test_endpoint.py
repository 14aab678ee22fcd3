"""What sampling from a vLLM server promises, against a stand-in for one that answers with the bundled model."""

import logging
import shutil
import socket
import threading
import time
from contextlib import closing

import pytest
from vllm_server import LEAKS, VllmServer

from t2s_pref import SamplingSettings, TransformersEngine, UserError, demo_files, endpoint, generate_rejected, wire
from t2s_pref.endpoint import EndpointEngine
from t2s_pref.prompts import PROMPT_COLUMNS, messages
from t2s_pref.protocol import Request

MODEL = demo_files().model
SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=48, temperature=1.2, top_p=0.95)


@pytest.fixture(scope="module")
def started():
    with VllmServer(MODEL) as server:
        yield server


@pytest.fixture
def server(started, monkeypatch):
    """The server as it was at its start, and a client that waits a tenth of a second for the third try."""
    monkeypatch.setattr(wire, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(wire, "LONGEST_PAUSE", 0.1)
    fresh = VllmServer.__dataclass_fields__
    for name in ("loras", "root", "api_key", "owned_by", "context", "limit", "connections", "most", "abandoned"):
        setattr(started, name, fresh[name].default)
    for list_ in (started.faults, started.bodies, started.paths):
        list_.clear()
    return started


@pytest.fixture
def memo(tmp_path):
    return tmp_path / "weights.json"


@pytest.fixture
def chats(rows):
    return [messages({name: row[name] for name in PROMPT_COLUMNS if name in row}) for row in rows]


@pytest.fixture
def requests(server, chats):
    """Three prompts with three candidates each."""
    prompts = EndpointEngine(server.url).encode_chats(chats[:3], False)
    return [Request(ids, SETTINGS.row_seed(row), range(3), 24) for row, ids in enumerate(prompts)]


def texts(sampled, requests):
    """The answers by row seed and candidate's number; each of them once."""
    found = {}
    for place, candidate, answer in sampled:
        key = requests[place].row_seed, candidate
        assert key not in found
        found[key] = answer
    return found


def refusal(act):
    """The message of the error that `act` ends in, which is always one line."""
    with pytest.raises(UserError) as refused:
        act()
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def seed_of(body):
    return body["seed"]


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_prompts_have_the_same_ids_as_with_transformers(server, chats, memo):
    local = TransformersEngine(MODEL, device="cpu")
    local.identity(memo)
    engine = EndpointEngine(server.url)
    for thinking in (False, True):
        assert engine.encode_chats(chats, thinking) == local.encode_chats(chats, thinking)
    assert engine.count_tokens(["SELECT name FROM singer", ""]) == local.count_tokens(["SELECT name FROM singer", ""])


def test_a_prompt_goes_to_the_server_as_its_token_ids(server, requests):
    list(EndpointEngine(server.url).sample(requests, SETTINGS))
    assert {tuple(body["prompt"]) for body in server.bodies} == {tuple(request.prompt) for request in requests}


def test_every_sampling_parameter_is_sent_so_that_no_default_of_the_server_takes_effect(server, requests):
    settings = SamplingSettings(temperature=0.8, top_p=0.9, top_k=7, repetition_penalty=1.1, stop=("\n\n", ";"))
    list(EndpointEngine(server.url).sample(requests[:1], settings))
    body = server.bodies[0]
    assert set(LEAKS) <= set(body)
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.8, 0.9, 7, 1.1)
    assert (body["min_p"], body["presence_penalty"], body["frequency_penalty"]) == (0, 0, 0)
    assert (body["stop"], body["max_tokens"], body["model"]) == (["\n\n", ";"], 24, "demo")


def test_what_is_off_is_sent_as_off(server, requests):
    list(EndpointEngine(server.url).sample(requests[:1], SETTINGS))
    body = server.bodies[0]
    assert (body["top_k"], body["repetition_penalty"], body["stop"]) == (-1, 1.0, [])


def test_greedy_decoding_is_that_of_transformers(server, requests, memo):
    settings = SamplingSettings(temperature=0, max_new_tokens=48)
    local = TransformersEngine(MODEL, device="cpu")
    local.identity(memo)
    asked = [Request(request.prompt, request.row_seed, range(1), 48) for request in requests]
    here = texts(local.sample(asked, settings, 1 << 15), asked)
    there = texts(EndpointEngine(server.url).sample(asked, settings), asked)
    assert {key: (answer.text, answer.ended) for key, answer in here.items()} == {
        key: (answer.text, answer.ended) for key, answer in there.items()
    }


# -- what comes back -------------------------------------------------------------------------------------------------


def test_every_candidate_comes_once_under_its_own_number(server, requests):
    asked = [Request(request.prompt, request.row_seed, range(4, 9, 2), 12) for request in requests]
    found = texts(EndpointEngine(server.url, parallel=4).sample(asked, SETTINGS), asked)
    assert set(found) == {(request.row_seed, number) for request in asked for number in (4, 6, 8)}


def test_an_answer_depends_on_its_seed_alone_not_on_order_or_parallel_requests(server, requests):
    one = texts(EndpointEngine(server.url, parallel=1).sample(requests, SETTINGS), requests)
    shuffled = [Request(r.prompt, r.row_seed, r.candidates[::-1], r.cap) for r in requests[::-1]]
    many = texts(EndpointEngine(server.url, parallel=9).sample(shuffled, SETTINGS), shuffled)
    assert one == many
    assert len({answer.text for answer in one.values()}) > 3


def test_seeds_are_distinct_and_within_what_vllm_takes(server, requests):
    far = [Request([5, 6], 2**80 + row, range(3), 1) for row in range(3)]
    list(EndpointEngine(server.url).sample(requests + far, SETTINGS))
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_answer_that_reaches_the_cap_has_not_ended(server, requests):
    caps = zip(requests, (3, 48, 48), strict=True)
    asked = [Request(request.prompt, request.row_seed, range(1), cap) for request, cap in caps]
    found = list(texts(EndpointEngine(server.url, parallel=1).sample(asked, SETTINGS), asked).values())
    assert [answer.ended for answer in found] == [False, True, True]
    assert found[0].tokens == 3


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(server, requests):
    settings = SamplingSettings(temperature=0, stop=(" FROM",))
    (sampled,) = EndpointEngine(server.url).sample([Request(requests[0].prompt, 1, range(1), 48)], settings)
    assert sampled.answer.ended
    assert sampled.answer.text.startswith("SELECT")
    assert "FROM" not in sampled.answer.text


def test_work_counts_what_the_server_had_in_its_cache(server, requests):
    engine = EndpointEngine(server.url, parallel=1)
    server.cached.clear()
    found = texts(engine.sample(requests, SETTINGS), requests)
    lengths = [len(request.prompt) for request in requests]
    assert engine.work.prompt_asked == 3 * sum(lengths)
    assert engine.work.prompt_computed == sum(lengths) + 2 * sum(length % 16 for length in lengths)
    assert engine.work.generated == sum(answer.tokens for answer in found.values())


def test_no_more_requests_are_under_way_than_asked_for_and_their_connections_are_kept(server, requests):
    server.slow(0.05)
    list(EndpointEngine(server.url, parallel=4).sample(requests, SETTINGS))
    assert server.most == 4
    assert server.connections <= 4 + 2  # one for the tokenizer's name, one for the model's


def test_answers_come_in_the_order_in_which_they_end(server, requests):
    first = endpoint._seed(requests[0].row_seed, 0)
    server.slow(1.5, where=lambda body: body["seed"] == first)
    asked = [Request(request.prompt, request.row_seed, range(3), 4) for request in requests]
    sampled = list(EndpointEngine(server.url, parallel=4).sample(asked, SETTINGS))
    assert (sampled[-1].place, sampled[-1].candidate) == (0, 0)
    assert len(sampled) == 9


def test_think_tags_stay_where_a_tokenizer_counts_them_among_its_special_tokens(server, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert endpoint._hidden(tokenizer) == set()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(tmp_path / "thinking")
    engine = EndpointEngine(server.url, tokenizer=str(tmp_path / "thinking"))
    list(engine.sample([Request([5, 6], 1, range(1), 4)], SETTINGS))
    assert server.bodies[0]["skip_special_tokens"] is False
    hidden = endpoint._hidden(engine._tokenizer)
    text = "<think>hm</think>SELECT 1<|im_end|>"
    answered = {
        "choices": [{"text": text, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 9},
    }
    assert (
        endpoint._read(Request([5, 6], 1, [0], 9), hidden, False, True, answered)[0].text == "<think>hm</think>SELECT 1"
    )


def test_a_server_that_cuts_answers_shorter_is_warned_about_once(server, requests, caplog):
    server.limit = 4
    with caplog.at_level(logging.WARNING, "t2s_pref.endpoint"):
        sampled = list(EndpointEngine(server.url).sample(requests, SETTINGS))
    assert not any(one.answer.ended for one in sampled)
    assert [record.getMessage() for record in caplog.records] == [
        f"{server.url} cuts answers after 4 tokens where 24 were asked for; start vLLM with --generation-config vllm."
    ]


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 200])
def test_what_passes_is_tried_again(server, requests, status):
    expected = texts(EndpointEngine(server.url).sample(requests, SETTINGS), requests)
    server.fail(status, times=4)  # of 200: an answer that was aborted
    assert texts(EndpointEngine(server.url).sample(requests, SETTINGS), requests) == expected
    assert len(server.bodies) == 9 + 9 + 4


@pytest.mark.parametrize("after_headers", [False, True])
def test_a_connection_that_breaks_off_is_tried_again(server, requests, after_headers):
    expected = texts(EndpointEngine(server.url).sample(requests, SETTINGS), requests)
    server.cut(times=4, after_headers=after_headers)
    assert texts(EndpointEngine(server.url, parallel=3).sample(requests, SETTINGS), requests) == expected


def test_what_does_not_pass_is_given_up_with_one_line(server, requests):
    server.fail(503, text="no engine\nleft")
    message = refusal(lambda: list(EndpointEngine(server.url, parallel=1).sample(requests, SETTINGS)))
    assert message == (
        f"{server.url}/v1/completions answered 503: no engine left at try 8 of 8; see that the server runs, then run "
        "again: what was sampled is kept."
    )
    assert len(server.bodies) == 8


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_the_server_refuses_is_an_error_at_once_in_its_own_words(server, requests, status):
    server.fail(status, text="This will\nnot do.")
    message = refusal(lambda: list(EndpointEngine(server.url, parallel=1).sample(requests, SETTINGS)))
    assert f"{server.url}/v1/completions answered {status}: This will not do; " in message
    assert len(server.bodies) == 1


def test_a_failing_request_loses_none_of_those_that_were_answered(server, requests):
    bad = endpoint._seed(requests[0].row_seed, 2)
    server.slow(0.3, where=lambda body: body["seed"] != bad and len(server.bodies) > 4)
    server.fail(400, where=lambda body: body["seed"] == bad)
    found = []
    message = refusal(lambda: found.extend(EndpointEngine(server.url, parallel=4).sample(requests, SETTINGS)))
    assert "answered 400" in message
    answered = {endpoint._seed(requests[one.place].row_seed, one.candidate) for one in found}
    # all that was under way, and nothing was begun after it
    assert answered == {body["seed"] for body in server.bodies} - {bad}
    assert 3 <= len(answered) < 8


def test_a_caller_who_has_enough_ends_what_is_under_way_at_once(server, requests):
    first = endpoint._seed(requests[0].row_seed, 0)
    server.slow(60, where=lambda body: body["seed"] != first)
    start = time.perf_counter()
    with closing(EndpointEngine(server.url, parallel=4).sample(requests, SETTINGS)) as sampled:
        assert next(sampled).candidate == 0
        assert server.wait_until(lambda: server.under_way == 4)
    assert server.wait_until(lambda: server.abandoned >= 3 and server.under_way == 0)
    assert time.perf_counter() - start < 30
    assert len(server.bodies) <= 6  # one more may have begun before the caller had enough
    for thread in threading.enumerate():
        if thread.name == "endpoint":
            thread.join(5)
            assert not thread.is_alive()


def test_a_caller_who_has_enough_waits_for_no_further_try(server, requests, monkeypatch):
    monkeypatch.setattr(wire, "FIRST_PAUSE", 60)
    monkeypatch.setattr(wire, "LONGEST_PAUSE", 60)
    first = endpoint._seed(requests[0].row_seed, 0)
    server.fail(503, where=lambda body: body["seed"] != first)
    with closing(EndpointEngine(server.url, parallel=4).sample(requests, SETTINGS)) as sampled:
        next(sampled)
    for thread in threading.enumerate():
        if thread.name == "endpoint":
            thread.join(5)
            assert not thread.is_alive()


def test_an_unreachable_server_is_one_line(memo, monkeypatch):
    monkeypatch.setattr(wire, "FIRST_PAUSE", 0.02)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    message = refusal(lambda: EndpointEngine(url).identity(memo))
    assert message.startswith(f"{url}/v1/models failed (ConnectionRefusedError: ")
    assert "see that the server runs" in message


def test_what_is_no_such_server_is_one_line(server, memo):
    assert "answered 404" in refusal(lambda: EndpointEngine(f"{server.url}/elsewhere").identity(memo))
    server.owned_by = "another"
    server.cards, cards = lambda: "none", server.cards
    try:
        assert "does not answer as vLLM does" in refusal(lambda: EndpointEngine(server.url).identity(memo))
    finally:
        server.cards = cards


def test_a_server_that_reads_another_prompt_than_was_sent_is_refused(server, requests, monkeypatch):
    complete = server.complete

    def with_a_start_token(body):
        answered = complete(body)
        answered["usage"]["prompt_tokens"] += 1
        return answered

    monkeypatch.setattr(server, "complete", with_a_start_token)
    length = len(requests[0].prompt)
    message = refusal(lambda: list(EndpointEngine(server.url).sample(requests[:1], SETTINGS)))
    assert f"read {length + 1} tokens where a prompt of {length} was sent" in message


def test_the_key_is_sent_and_stands_in_no_message(server, requests, memo):
    server.api_key = "sesame-37"
    assert len(list(EndpointEngine(server.url, api_key="sesame-37\n").sample(requests[:1], SETTINGS))) == 3
    for wrong in (None, "sesame-38"):
        message = refusal(lambda key=wrong: EndpointEngine(server.url, api_key=key).identity(memo))
        assert "answered 401: Unauthorized; check VLLM_API_KEY" in message
        assert "sesame" not in message
    assert "sesame" not in refusal(lambda: EndpointEngine(server.url, api_key="sesame\n37"))
    assert "sesame" not in refusal(lambda: EndpointEngine("http://me:sesame@127.0.0.1"))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", ""])
def test_a_url_that_is_none_is_refused_with_an_example(url):
    assert "it must be like http://localhost:8000/v1" in refusal(lambda: EndpointEngine(url))


@pytest.mark.parametrize("parallel", [0, -1, True, 1.5])
def test_the_number_of_requests_is_a_positive_integer(parallel):
    assert "1 or more" in refusal(lambda: EndpointEngine("http://127.0.0.1", parallel=parallel))


# -- which model -----------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_served_is_refused_with_the_names_of_those_that_are(server, memo):
    server.loras = ["sql", "chat"]
    message = refusal(lambda: EndpointEngine(server.url, model="demo2").identity(memo))
    assert (
        message
        == f"{server.url} does not serve 'demo2'; pass one of these as model= (--served-model): demo, sql, chat."
    )
    assert "serves 3 models; pass one of these" in refusal(lambda: EndpointEngine(server.url).identity(memo))


def test_a_lora_is_sampled_under_its_name_with_the_tokenizer_of_its_base(server, requests, memo):
    server.loras = ["sql"]
    engine = EndpointEngine(server.url, model="sql")
    identity = engine.identity(memo)
    assert (identity["endpoint_model"], identity["root"], identity["parent"]) == ("sql", "/loras/sql", "demo")
    assert identity != EndpointEngine(server.url, model="demo").identity(memo)
    assert engine.context_length == 2048
    assert engine.describe() == f"sql on demo at {server.url}"
    list(engine.sample(requests[:1], SETTINGS))
    assert {body["model"] for body in server.bodies} == {"sql"}


def test_the_identity_is_of_the_model_not_of_the_url(server, memo):
    identity = EndpointEngine(server.url).identity(memo)
    with_path = EndpointEngine(f"{server.url.replace('127.0.0.1', 'localhost')}/v1/", parallel=3, api_key="x")
    assert with_path.identity(memo) == identity
    assert str(server.server.server_port) not in str(identity)
    versions = [EndpointEngine(server.url, model_version=version).identity(memo) for version in ("a", "b")]
    assert versions[0] != versions[1] != identity


def test_the_identity_changes_with_the_tokenizer_but_not_with_its_folder(server, memo, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(MODEL, first, ignore=shutil.ignore_patterns("*.safetensors"))
    engine = EndpointEngine(server.url, tokenizer=str(first))
    identity, prompt = engine.identity(memo), engine.encode_chats([[{"role": "user", "content": "Who?"}]], False)
    assert identity == EndpointEngine(server.url).identity(memo)  # weights beside it do not count
    shutil.copytree(first, second)
    assert EndpointEngine(server.url, tokenizer=str(second)).identity(memo) == identity
    template = first / "chat_template.jinja"
    template.write_text("Q: " + template.read_text())
    assert engine.identity(memo) != identity
    assert engine.encode_chats([[{"role": "user", "content": "Who?"}]], False) != prompt


def test_a_model_that_is_changed_on_the_server_is_seen_at_the_next_identity(server, memo):
    engine = EndpointEngine(server.url)
    before = engine.identity(memo)
    server.context = 1024
    assert engine.context_length == 2048
    assert engine.identity(memo) != before
    assert engine.context_length == 1024


def test_a_tokenizer_that_is_not_here_is_asked_for(server, memo, tmp_path):
    server.root = "/models/not/on/this/machine"
    message = refusal(lambda: EndpointEngine(server.url).identity(memo))
    assert "'/models/not/on/this/machine' is no folder with a tokenizer here; pass tokenizer=" in message
    assert EndpointEngine(server.url, tokenizer=MODEL).identity(memo)["root"] == "/models/not/on/this/machine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen3"}')
    engine = EndpointEngine(server.url, tokenizer=str(tmp_path / "empty"))
    assert str(tmp_path / "empty") in refusal(lambda: engine.encode_chats([[]], False))


def test_vllm_is_named_only_where_it_says_so(server):
    assert EndpointEngine(server.url).method() == "vLLM 0.32.0 at an endpoint"
    server.owned_by = "another"
    assert EndpointEngine(server.url).method() == "at an endpoint"


# -- the whole way ---------------------------------------------------------------------------------------------------


def test_rows_get_their_rejects_from_the_server_and_a_second_run_asks_for_none(server, rows, cache_dir):
    settings = SamplingSettings(num_rejects=2, max_new_tokens=48)
    some = rows.select(range(8))
    sampled = generate_rejected(some, EndpointEngine(server.url, parallel=4), settings, cache_dir=cache_dir)
    assert len(server.bodies) == 16
    assert all(status == ["sampled", "sampled"] for status in sampled["candidate_status"])
    assert all(len(rejected) == 2 for rejected in sampled["rejected"])
    assert "vLLM 0.32.0 at an endpoint" in sampled.info.description
    again = generate_rejected(some, EndpointEngine(f"{server.url}/v1"), settings, cache_dir=cache_dir)
    assert again.to_list() == sampled.to_list()
    more = generate_rejected(
        some, EndpointEngine(server.url), SamplingSettings(3, max_new_tokens=48), cache_dir=cache_dir
    )
    assert len(server.bodies) == 24
    assert [three[:2] for three in more["rejected"]] == sampled["rejected"][:]


def test_rejects_from_the_server_are_proven_wrong_as_any_others(server, rows, cache_dir):
    proven = generate_rejected(
        rows.select(range(8)),
        EndpointEngine(server.url, parallel=4),
        SamplingSettings(num_rejects=1, max_new_tokens=48, temperature=1.2),
        databases=demo_files().databases,
        max_candidates=2,
        cache_dir=cache_dir,
    )
    assert set(proven["gold_verdict"]) == {"ok"}
    assert 8 <= len(server.bodies) <= 16
