"""What sampling from any OpenAI-compatible server promises, against a real `transformers serve`."""

import asyncio
import email.utils
import html
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from transformers_serve import Proxy, TransformersServe

from t2s_pref import (
    SamplingSettings,
    UserError,
    chat,
    commands,
    completions,
    demo_files,
    generate_rejected,
    patience,
    replies,
    wire,
)
from t2s_pref.chat import ChatEngine
from t2s_pref.cli import build_parser, main
from t2s_pref.prompts import PROMPT_COLUMNS, messages
from t2s_pref.protocol import Request
from t2s_pref.store import SampleStore

SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=32, temperature=1.5, top_p=0.95)
CAP = 2  # tokens of an answer, where it does not matter what it says


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with TransformersServe(demo_files().model, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def server(served, monkeypatch):
    """A proxy before the server, and a client that waits a tenth of a second for the third try."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.1)
    monkeypatch.delenv(completions.KEY, raising=False)
    with Proxy(served.port) as proxy:
        yield proxy


@pytest.fixture
def engine_at(server, served):
    """Makes an engine that asks the server through the proxy."""

    def make(**arguments):
        return ChatEngine(server.url, served.model, **arguments)

    return make


@pytest.fixture
def requests(rows):
    """Three prompts with three candidates each."""
    chats = [messages({name: row[name] for name in PROMPT_COLUMNS if name in row}) for row in rows.select(range(3))]
    prompts = ChatEngine("http://127.0.0.1", "any").encode_chats(chats, False)
    return [Request(prompt, SETTINGS.row_seed(row), range(3), CAP) for row, prompt in enumerate(prompts)]


def one_of(requests):
    return [Request(requests[0].prompt, requests[0].row_seed, range(1), CAP)]


def found(engine, requests, settings=SETTINGS):
    """The answers by place and candidate's number; each of them once, and none of what failed."""
    answers = {}
    for place, candidate, answer in engine.sample(requests, settings):
        assert (place, candidate) not in answers
        answers[place, candidate] = answer
    return {of: answer for of, answer in answers.items() if answer is not None}


def first_seed(requests):
    """The seed of the first candidate of all."""
    return completions._seed(requests[0].row_seed, 0)


def has_seed(seed):
    return lambda body: body.get("seed") == seed


def refusal(act):
    """The message of the error that `act` ends in, which is always one line."""
    with pytest.raises(UserError) as refused:
        act()
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "t2s_pref.completions"]


def free_url():
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def completion(content="SELECT 1", finish_reason="stop", usage=None, **fields):
    """The text of an answer that needs no model."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **fields},
    }
    return json.dumps({"choices": [choice], "usage": usage})


def no_thread_is_left():
    for thread in threading.enumerate():
        if thread.name == "chat":
            thread.join(5)
            assert not thread.is_alive()
    return True


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_a_row_gets_at_least_two_distinct_candidates(engine_at, requests):
    asked = [Request(request.prompt, request.row_seed, range(3), 32) for request in requests]
    answers = found(engine_at(parallel=1), asked)  # one after the other, so that the server's one seed is each's own
    assert len(answers) == 9
    for place in range(3):
        assert len({answers[place, number].text for number in range(3)}) >= 2


def test_every_candidate_is_a_request_with_a_seed_of_its_own(server, engine_at, requests):
    far = [Request(requests[0].prompt, 2**80, range(3), CAP)]
    found(engine_at(), [*requests, *far])
    seeds = [body["seed"] for body in server.asked]
    assert len(seeds) == len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert not any("n" in body for body in server.asked)


def test_a_prompt_goes_to_the_server_as_its_messages(server, engine_at):
    said = [{"role": "system", "content": 'Wörter "quoted"'}, {"role": "user", "content": "Wie\nviele? 🙂"}]
    (prompt,) = engine_at().encode_chats([said], False)
    assert (prompt,) == tuple(engine_at().encode_chats([said], True))
    found(engine_at(), [Request(prompt, 1, range(1), CAP)])
    assert server.asked[0]["messages"] == said


def test_only_what_is_set_is_sent_beside_what_every_server_knows(server, engine_at, requests):
    found(engine_at(), one_of(requests))
    always = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream", "chat_template_kwargs"}
    assert set(server.asked[0]) == always
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (server.asked[0]["temperature"], server.asked[0]["top_p"], server.asked[0]["max_tokens"]) == (1.5, 0.95, CAP)
    server.fail(503, times=None)  # this server would refuse the next
    settings = SamplingSettings(top_k=7, repetition_penalty=1.1, stop=("\n\n", ";"), enable_thinking=True)
    refusal(lambda: found(engine_at(), one_of(requests), settings))
    body = server.asked[-1]
    assert (body["top_k"], body["repetition_penalty"], body["stop"]) == (7, 1.1, ["\n\n", ";"])
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_is_taken_with_or_without_its_path(server, served, requests, suffix):
    assert len(found(ChatEngine(server.url + suffix, served.model), one_of(requests))) == 1
    assert server.paths == ["/v1/chat/completions"]


def test_an_address_with_another_path_keeps_it(server, served, requests):
    server.fail(404)
    refusal(lambda: found(ChatEngine(f"{server.url}/v1beta/openai/", served.model), one_of(requests)))
    assert server.paths == ["/v1beta/openai/chat/completions"]


@pytest.mark.parametrize(("parallel", "candidates"), [(1, 1), (4, 3), (23, 9)])
def test_no_more_requests_are_under_way_than_asked_for(server, engine_at, requests, parallel, candidates):
    server.hang(0.3)
    asked = [Request(request.prompt, request.row_seed, range(candidates), 1) for request in requests]
    assert len(found(engine_at(parallel=parallel), asked)) == 3 * candidates
    assert server.most == parallel


def test_a_notebook_whose_own_loop_is_running_can_sample(engine_at, requests):
    async def cell():
        return found(engine_at(), one_of(requests))

    assert len(asyncio.run(cell())) == 1
    assert no_thread_is_left()


def test_an_offline_hub_does_not_keep_the_server_from_being_asked(engine_at, requests):
    from huggingface_hub import constants

    assert constants.is_offline_mode()
    assert len(found(engine_at(), one_of(requests))) == 1


# -- what comes back -------------------------------------------------------------------------------------------------


def test_every_candidate_comes_once_under_its_own_number(engine_at, requests):
    asked = [Request(request.prompt, request.row_seed, range(4, 9, 2), CAP) for request in requests]
    assert set(found(engine_at(), asked)) == {(place, number) for place in range(3) for number in (4, 6, 8)}


def test_an_answer_comes_as_soon_as_it_is_there(server, engine_at, requests):
    server.hang(120, where=has_seed(first_seed(requests)))
    with closing(engine_at().sample(requests, SETTINGS)) as sampled:
        eight = {next(sampled)[:2] for _ in range(8)}
    assert eight == {(place, number) for place in range(3) for number in range(3)} - {(0, 0)}


def test_an_answer_that_reaches_the_cap_has_not_ended(server, engine_at, requests):
    settings = SamplingSettings(temperature=0)
    asked = [Request(requests[0].prompt, 1, range(1), cap) for cap in (3, 64)]
    answers = found(engine_at(), asked, settings)
    assert (answers[0, 0].ended, answers[0, 0].tokens) == (False, 3)
    assert answers[1, 0].ended
    assert answers[1, 0].text.startswith(answers[0, 0].text)


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it_though_this_server_leaves_it_there(
    server, engine_at, requests
):
    there = []
    server.change = lambda answer: there.append(answer["choices"][0]["message"]["content"]) or answer
    settings = SamplingSettings(temperature=0, stop=(" FROM", " WHERE"))
    answer = found(engine_at(), [Request(requests[0].prompt, 1, range(1), 64)], settings)[0, 0]
    assert there == [f"{answer.text} FROM"]
    assert answer.ended


def rewriting(**fields):
    """Changes the message and the finish_reason of an answer."""

    def change(answer):
        (choice,) = answer["choices"]
        choice["finish_reason"] = fields.get("finish_reason", "stop")
        choice["message"] |= {name: value for name, value in fields.items() if name != "finish_reason"}
        return answer

    return change


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_that_the_server_took_out_of_an_answer_are_put_back(server, engine_at, requests, name):
    server.change = rewriting(content="\n\nSELECT 1", **{name: "One; `SELECT 2;` is not it.\n"})
    answer = found(engine_at(), one_of(requests), SamplingSettings(enable_thinking=True))[0, 0]
    assert answer.text == "<think>\nOne; `SELECT 2;` is not it.\n</think>\n\nSELECT 1"
    assert answer.ended


def test_thoughts_without_an_answer_are_an_answer_that_was_cut(server, engine_at, requests):
    server.change = rewriting(content=None, reasoning_content="Let me", finish_reason="length")
    answer = found(engine_at(), one_of(requests))[0, 0]
    assert answer.text.startswith("<think>\nLet me")
    assert not answer.ended


@pytest.mark.parametrize(
    ("answer_format", "content", "kept"),
    [
        ("sql", "SELECT a FROM b; This returns a.", "SELECT a FROM b;"),
        ("sql", "```sql\nSELECT 1 FROM x\n```\nis a draft</think>SELECT a FROM b; x", None),
        ("fenced", "```sql\nSELECT a FROM b\n```\nNo:\n```sql\nSELECT c FROM b\n```\n", "all"),
    ],
)
def test_what_follows_complete_sql_is_cut_only_where_the_format_ends_there(
    server, engine_at, requests, answer_format, content, kept
):
    server.change = rewriting(content=content, finish_reason="length")
    answer = found(engine_at(), one_of(requests), SamplingSettings(answer_format=answer_format))[0, 0]
    kept = content.removesuffix(" x") if kept is None else kept
    assert answer.text == (content if kept == "all" else kept)
    assert answer.ended == (kept != "all")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("stop", ["\n\n", ";", "Think"])
def test_a_stop_string_is_not_searched_in_thoughts_that_the_server_took_out(server, engine_at, requests, name, stop):
    server.fail(200, completion("\n\nSELECT 1;\n\nDone", **{name: "Think: `SELECT 2;`?\n\nNo."}))
    answer = found(engine_at(), one_of(requests), SamplingSettings(stop=(stop,), answer_format="think"))[0, 0]
    kept = "SELECT 1" if stop == ";" else "SELECT 1;"
    assert answer.text == f"<think>\nThink: `SELECT 2;`?\n\nNo.\n</think>\n\n{kept}"


def test_a_text_in_parts_is_joined_and_thoughts_of_another_kind_are_none(server, engine_at, requests):
    parts = [{"type": "text", "text": "SELECT"}, {"type": "image"}, {"type": "text", "text": " 1"}]
    server.fail(200, completion(parts, reasoning_content=[{"type": "text", "text": "One."}]), times=1)
    assert found(engine_at(), one_of(requests))[0, 0].text == "<think>\nOne.\n</think>\n\nSELECT 1"
    for odd in ({"a": 1}, 3, [], [None], [{"type": "text", "text": 5}], True):
        server.fail(200, completion(parts, reasoning=odd), times=1)
        assert found(engine_at(), one_of(requests))[0, 0].text == "SELECT 1"


@pytest.mark.parametrize("reason", ["eos_token", "stop_sequence", "end_turn", "STOP", "End_Turn"])
def test_an_answer_has_ended_in_the_words_of_other_servers_too(server, engine_at, requests, reason):
    server.change = rewriting(finish_reason=reason)
    assert found(engine_at(), one_of(requests))[0, 0].ended


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_an_answer_was_cut_in_the_words_of_other_servers_too(server, engine_at, requests, reason):
    server.change = rewriting(finish_reason=reason)
    assert not found(engine_at(), one_of(requests))[0, 0].ended


@pytest.mark.parametrize("reason", [None, ""])
@pytest.mark.parametrize(("tokens", "ended"), [(CAP - 1, True), (CAP, False), (CAP + 5, False), (None, True)])
def test_an_answer_of_which_nobody_says_how_it_ended_was_cut_if_it_is_as_long_as_the_cap(
    server, engine_at, requests, reason, tokens, ended
):
    server.fail(200, completion(finish_reason=reason, usage={"completion_tokens": tokens}))
    assert found(engine_at(), one_of(requests))[0, 0].ended == ended


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "3"])
def test_an_answer_that_ended_in_another_way_is_none(server, engine_at, requests, caplog, reason):
    server.change = rewriting(finish_reason=reason)
    engine = engine_at()
    assert not found(engine, one_of(requests))
    assert engine.failed == 1
    assert f"ended an answer with {reason!r}" in warnings(caplog)[0]
    assert len(server.asked) == 1


def test_work_counts_what_the_server_says_and_estimates_where_it_says_nothing(server, engine_at, requests):
    usage = []

    def with_cache(answer):
        usage.append(answer["usage"])
        return {**answer, "usage": {**answer["usage"], "prompt_tokens_details": {"cached_tokens": 5}}}

    server.change = with_cache
    engine = engine_at()
    answers = found(engine, requests)
    prompts = sum(one["prompt_tokens"] for one in usage)
    assert (engine.work.prompt_asked, engine.work.prompt_computed) == (prompts, prompts - 9 * 5)
    assert engine.work.generated == sum(one["completion_tokens"] for one in usage)
    assert engine.work.generated == sum(answer.tokens for answer in answers.values())
    server.change = lambda answer: {name: value for name, value in answer.items() if name != "usage"}
    engine = engine_at()
    assert found(engine, one_of(requests))[0, 0].tokens > 0
    assert engine.work.prompt_asked > 0


def test_numbers_of_tokens_that_cannot_be_true_are_estimated(server, engine_at, requests):
    asked, text = one_of(requests), "SELECT 1"
    prompt, tokens = len(asked[0].prompt) // 4 + 1, len(text) // 4 + 1
    details = {"completion_tokens": 3, "prompt_tokens": 5}
    usages = [{"completion_tokens": odd, "prompt_tokens": odd} for odd in (3.5, 10**30, "3", -1, True, [3], 2**31)]
    usages += ["x", 7, [], {}]
    cases = [(usage, (tokens, prompt, 0)) for usage in usages]
    for odd in ({"cached_tokens": "4"}, {"cached_tokens": 1.5}, {"cached_tokens": -1}, [], [{"a": 1}], "x", 4):
        cases.append(({**details, "prompt_tokens_details": odd}, (3, 5, 0)))
    cases.append(({**details, "prompt_tokens_details": {"cached_tokens": 9}}, (3, 5, 5)))  # no more than there are
    for usage, (generated, of_prompt, cached) in cases:
        server.fail(200, completion(text, usage=usage), times=1)
        engine = engine_at()
        assert found(engine, asked)[0, 0].tokens == generated, usage
        assert engine.work.generated == generated
        assert (engine.work.prompt_asked, engine.work.prompt_computed) == (of_prompt, of_prompt - cached), usage
    assert len(server.asked) == len(cases)


def test_numbers_of_tokens_that_cannot_be_true_do_no_harm_to_the_cache(server, engine_at, rows, cache_dir):
    server.fail(200, completion(usage={"completion_tokens": 10**30, "prompt_tokens": 2.5}))
    few, settings = rows.select(range(2)), SamplingSettings(2, max_new_tokens=CAP)
    first = generate_rejected(few, engine_at(), settings, cache_dir=cache_dir)
    more = SamplingSettings(1, max_new_tokens=CAP)
    again = generate_rejected(few, engine_at(), more, cache_dir=cache_dir)
    assert len(server.asked) == 4
    assert [texts[:1] for texts in first["rejected"]] == again["rejected"]


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503, 504, 529])
def test_what_passes_is_tried_again(server, engine_at, requests, caplog, status):
    server.fail(status, times=4)
    engine = engine_at(parallel=4)
    assert len(found(engine, requests)) == 9
    assert (len(server.asked), engine.failed) == (9 + 4, 0)
    (warning,) = warnings(caplog)
    assert warning == f"{server.url}/v1 answered {status}: overloaded; trying again for about a minute."


@pytest.mark.parametrize(
    "text", ['["busy"]', '"busy"', '{"error": {"message": "busy"}}', '{"errors": 3}', "<html>", ""]
)
def test_an_error_is_known_by_its_status_whatever_its_body_is(server, engine_at, requests, text):
    server.fail(503, text, times=2, headers={"Content-Type": "application/json"})
    assert len(found(engine_at(), requests)) == 9
    server.fail(401, text, headers={"Content-Type": "application/json"})
    assert "answered 401" in refusal(lambda: found(engine_at(), requests))


@pytest.mark.parametrize("how", ["drop", "cut"])
def test_a_connection_that_breaks_off_is_tried_again(server, engine_at, requests, how):
    getattr(server, how)(times=4)
    assert len(found(engine_at(parallel=3), requests)) == 9
    assert len(server.asked) == 9 + 4


@pytest.mark.parametrize(
    "text",
    ["<html>Welcome</html>", "{}", '{"choices": []}', "[]", '{"choices": [{"message": 1, "finish_reason": "stop"}]}'],
)
def test_what_is_no_chat_completion_is_tried_again(server, engine_at, requests, text):
    server.fail(200, text, times=3)
    assert len(found(engine_at(), requests)) == 9
    server.fail(200, text)
    message = refusal(lambda: found(engine_at(), one_of(requests)))
    assert "answers, but with no chat completion" in message


@pytest.mark.parametrize("reason", ["abort", "error", "Error", "insufficient_system_resource"])
def test_an_answer_that_was_aborted_is_asked_for_again(server, engine_at, requests, reason):
    aborted = iter([True])
    server.change = lambda answer: rewriting(finish_reason=reason)(answer) if next(aborted, False) else answer
    assert len(found(engine_at(), one_of(requests))) == 1
    assert len(server.asked) == 2


def test_an_answer_that_does_not_come_is_asked_for_again(server, engine_at, requests, caplog, monkeypatch):
    monkeypatch.setattr(completions, "TIMEOUT", 2)
    server.hang(120, times=1)
    assert len(found(engine_at(), one_of(requests))) == 1
    assert "gave no answer within 2 s" in warnings(caplog)[0]
    assert server.wait_until(lambda: server.abandoned == 1)


def test_an_answer_may_wait_in_the_queue_of_a_server_with_one_slot_for_as_long_as_at_a_vllm_server():
    assert completions.TIMEOUT == wire.ANSWER == 3600


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_how_long_to_wait_and_the_warning_says_it_too(server, engine_at, requests, caplog, status):
    server.fail(status, times=1, headers={"Retry-After": "1"})
    assert len(found(engine_at(), one_of(requests))) == 1
    assert 1 <= server.times[1] - server.times[0] < 10
    assert warnings(caplog) == [f"{server.url}/v1 answered {status}: overloaded; trying again in 1 s."]


@pytest.mark.parametrize("status", [429, 503])
def test_where_the_server_wants_fewer_requests_all_of_them_wait(server, engine_at, requests, status):
    server.fail(status, times=1, headers={"Retry-After": "1"}, where=has_seed(first_seed(requests)))
    server.hang(0.1)
    assert len(found(engine_at(parallel=4), requests)) == 9
    since = [at - server.times[0] for at in server.times]
    assert not [at for at in since if 0.5 < at < 1]
    assert len([at for at in since if at >= 1]) >= 3


def test_a_limit_on_the_rate_costs_time_and_no_candidate(server, engine_at, requests, caplog):
    begun, passed, tries = time.monotonic(), [], {}

    def over(body):  # 50 a second
        tries[body["seed"]] = tries.get(body["seed"], 0) + 1
        if len(passed) >= (time.monotonic() - begun) * 50:
            return True
        passed.append(body)
        return False

    server.fail(429, "Rate limit", where=over)
    server.fail(200, completion())
    asked = [Request(request.prompt, request.row_seed, range(17), CAP) for request in requests]
    engine = engine_at(parallel=16)
    assert len(found(engine, asked)) == 51
    assert engine.failed == 0
    assert time.monotonic() - begun < 20
    assert len(warnings(caplog)) == 1
    assert sum(tries.values()) > 51


def test_a_limit_that_does_not_pass_ends_a_candidate_after_as_many_tries_as_any_failure(server, engine_at, requests):
    server.fail(429)
    message = refusal(lambda: found(engine_at(), one_of(requests)))
    assert f"answered 429: overloaded at try {completions.TRIES} of {completions.TRIES}" in message
    assert len(server.asked) == completions.TRIES


def test_one_candidate_that_alone_meets_a_limit_is_given_up_once_no_other_is_answered(server, engine_at, requests):
    server.fail(429, where=has_seed(first_seed(requests)))
    server.fail(200, completion())
    engine = engine_at(parallel=2)
    assert len(found(engine, requests)) == 8
    assert engine.failed == 1


def test_a_caller_who_has_enough_does_not_wait_for_the_end_of_a_limit(server, engine_at, requests):
    server.fail(429, headers={"Retry-After": "100"}, where=lambda body: len(server.asked) > 1)
    start = time.perf_counter()
    with closing(engine_at(parallel=4).sample(requests, SETTINGS)) as sampled:
        next(sampled)
        assert server.wait_until(lambda: len(server.asked) >= 4)
        time.sleep(0.2)  # the one that was answered waits for its turn
    assert no_thread_is_left()
    assert time.perf_counter() - start < 20


def test_a_wait_can_be_a_date_and_has_a_bound(monkeypatch):
    assert 20 < patience.retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) < 31
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0)
    assert patience.retry_after("86400") == patience.LONGEST_RETRY_AFTER
    assert patience.retry_after("1.5") == 1.5
    for header in (None, "", "soon", "-3", "nan", "inf", "0", email.utils.formatdate(0)):
        assert patience.retry_after(header) == 0


@pytest.mark.parametrize(
    "header",
    [
        "1e400",
        "Wed, 01 Jan 0001 00:00:00 +2300",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Wed, 01 Jan 10000 00:00:00 GMT",
        "Wed, 01 Jan 2025 00:00:00 +99999999999",
        "Wed, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 99 Foo 2020",
        ",,,,,",
        ":::::",
        "1 2 3 4 5 6 7",
        "5, 5",
        "9" * 400,
    ],
)
def test_a_wait_that_is_none_is_none_at_most(header):
    assert 0 <= patience.retry_after(header) <= patience.LONGEST_RETRY_AFTER + patience.FIRST_PAUSE


def test_pauses_grow_and_differ(server, engine_at, requests, monkeypatch):
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.3)
    server.fail(503)
    refusal(lambda: found(engine_at(), one_of(requests)))
    assert len(server.asked) == completions.TRIES
    pauses = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert sum(pauses[-3:]) > sum(pauses[:3])
    assert len({round(pause, 4) for pause in pauses}) > 3


def test_a_candidate_that_fails_is_left_out_and_counted_and_costs_no_other(server, engine_at, requests, caplog):
    server.fail(503, where=has_seed(first_seed(requests)))
    engine = engine_at(parallel=2)
    sampled = list(engine.sample(requests, SETTINGS))
    assert {one[:2] for one in sampled} == {(place, number) for place in range(3) for number in range(3)}
    assert [one[:2] for one in sampled if one.answer is None] == [(0, 0)]
    assert engine.failed == 1
    assert warnings(caplog)[-1] == (
        f"{server.url}/v1 answered 503: overloaded at try 8 of 8; such candidates are left out, and the next run asks "
        "for them again."
    )


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_candidate_that_is_refused_is_left_out_at_once(server, engine_at, requests, caplog, status):
    server.fail(status, '{"error": {"message": "Your prompt\\nis too long."}}', where=has_seed(first_seed(requests)))
    engine = engine_at()
    assert len(found(engine, requests)) == 8
    assert (engine.failed, len(server.asked)) == (1, 9)
    (warning,) = warnings(caplog)
    assert f"answered {status}: Your prompt is too long." in warning


def test_a_server_that_refuses_everything_ends_the_run_in_its_own_words(engine_at, requests, monkeypatch):
    monkeypatch.setattr(chat, "REFUSALS", 5)
    engine = engine_at(parallel=1)
    message = refusal(lambda: found(engine, requests, SamplingSettings(top_k=5)))
    assert "answered 422: Unexpected fields in the request: {'top_k'}; it has refused all of 5 requests." in message
    message = refusal(lambda: found(ChatEngine(engine._server.url, "another", parallel=1), requests))
    assert "requested 'another'" in message


def test_some_refusals_among_answers_never_end_a_run(server, engine_at, requests, monkeypatch):
    monkeypatch.setattr(chat, "REFUSALS", 2)
    engine = engine_at(parallel=1)
    server.fail(400, where=lambda body: len(server.answered) > 1)
    assert len(found(engine, requests)) == 2
    assert engine.failed == 7


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_wrong_key_or_address_ends_the_run_at_once_with_the_way_out(server, engine_at, requests, status):
    server.fail(status, '{"detail": "This will\\nnot do."}')
    message = refusal(lambda: found(engine_at(parallel=1), requests))
    assert message.startswith(f"{server.url}/v1 answered {status}: This will not do; ")
    assert ("--base-url" if status == 404 else "account" if status == 402 else "T2S_PREF_API_KEY") in message
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_a_candidate_that_may_not_be_asked_for_is_left_out_where_others_are_answered(
    server, engine_at, requests, caplog, status
):
    flagged = '{"error": {"message": "Your input was flagged", "code": 403}}'
    server.fail(status, flagged, where=lambda body: body["seed"] == first_seed(requests) and len(server.answered) > 0)
    asked = [*requests[1:], requests[0]]
    engine = engine_at(parallel=1)
    assert len(found(engine, asked)) == 8
    assert (engine.failed, len(server.asked)) == (1, 9)
    (warning,) = warnings(caplog)
    assert f"answered {status}: Your input was flagged; such candidates are left out" in warning


@pytest.mark.parametrize("status", [403, 404])
def test_the_first_that_may_not_be_asked_for_waits_for_what_the_others_get(server, engine_at, requests, status):
    server.fail(status, where=has_seed(first_seed(requests)))
    server.hang(0.1)
    engine = engine_at(parallel=4)
    assert len(found(engine, requests)) == 8
    assert engine.failed == 1
    server.faults.clear()
    server.fail(status)
    server.hang(120)
    assert f"answered {status}" in refusal(lambda: found(engine_at(parallel=4), requests))


@pytest.mark.parametrize("status", [401, 402])
def test_a_key_or_an_account_that_is_not_good_any_more_ends_the_run_whatever_was_answered(
    server, engine_at, requests, status
):
    server.fail(status, where=lambda body: len(server.answered) > 2)
    assert f"answered {status}" in refusal(lambda: found(engine_at(parallel=1), requests))
    assert len(server.asked) == 4


@pytest.mark.parametrize("code", [401, "402", 404])
def test_an_error_under_status_200_counts_as_the_status_that_it_names(server, engine_at, requests, code):
    server.fail(200, json.dumps({"error": {"code": code, "message": "No auth"}, "user_id": "u"}))
    message = refusal(lambda: found(engine_at(parallel=1), requests))
    assert message.startswith(f"{server.url}/v1 answered {code}: No auth; ")
    assert len(server.asked) == 1


def test_an_error_under_status_200_that_may_pass_is_tried_again_and_one_that_may_not_is_not(
    server, engine_at, requests, caplog
):
    server.fail(200, '{"error": {"code": 429, "message": "Slow down"}, "choices": []}', times=2)
    assert len(found(engine_at(), one_of(requests))) == 1
    assert "answered 429: Slow down; trying again" in warnings(caplog)[0]
    server.fail(200, '{"error": {"code": 400, "message": "Too long"}}', where=has_seed(first_seed(requests)))
    engine = engine_at(parallel=1)
    assert len(found(engine, requests)) == 8
    assert (engine.failed, len(server.asked)) == (1, 3 + 9)


@pytest.mark.parametrize(
    "error", ['"No slot"', '{"message": "No slot"}', '{"message": "No slot", "code": "busy"}', '{"No slot": 200}']
)
def test_an_error_under_status_200_that_names_no_status_is_tried_again(server, engine_at, requests, error):
    server.fail(200, f'{{"error": {error}}}')
    message = refusal(lambda: found(engine_at(), one_of(requests)))
    assert "answered with an error" in message
    assert "No slot" in message
    assert len(server.asked) == completions.TRIES


@pytest.mark.parametrize("charset", ["bogus", "undefined", "idna", "punycode", "hex", "utf-16"])
def test_an_error_is_read_whatever_it_says_its_characters_are(server, engine_at, requests, caplog, charset):
    headers = {"Content-Type": f"text/html; charset={charset}"}
    server.fail(503, "büsy..", times=1, headers=headers)
    server.fail(400, "nö", where=has_seed(first_seed(requests)), headers=headers)
    assert len(found(engine_at(parallel=1), requests)) == 8
    assert [warning.split("/v1 ")[1][:20] for warning in warnings(caplog)] == [
        "answered 503: büsy..",
        "answered 400: nö; su",
    ]


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_body_that_is_nested_too_deep_is_an_error_like_others(server, engine_at, requests, status):
    server.fail(status, "[" * 100_000, where=has_seed(first_seed(requests)))
    engine = engine_at()
    assert len(found(engine, requests)) == 8
    assert engine.failed == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/v2/chat/completions", "//me:sesame@127.0.0.1:PORT/v2?token=sesame#sesame"])
def test_a_redirect_is_not_followed_and_the_error_says_where_the_server_is_now(
    server, served, engine_at, requests, status, path
):
    with Proxy(served.port) as other:
        there = path.replace("PORT", other.url.rpartition(":")[2])
        server.fail(status, "", headers={"Location": there})
        message = refusal(lambda: found(engine_at(parallel=1), requests))
        assert not other.asked
    assert len(server.asked) == 1
    now = f"{server.url}/v2/chat/completions" if "//" not in path else f"{other.url}/v2"
    assert message == (
        f"{server.url}/v1 answered {status}: it is now at {now}; redirects are not followed, give that as base_url."
    )


@pytest.mark.parametrize("location", ["http://[bad", "http://host:port/a", "\u00e9 \u2028", "x" * 5000, ""])
def test_a_redirect_to_nowhere_is_one_line_too(server, engine_at, requests, location):
    server.fail(307, "", headers={"Location": location.encode().decode("latin-1")})
    assert "answered 307: it is now at " in refusal(lambda: found(engine_at(), one_of(requests)))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SSL_CERT_FILE", "/nonexistent/certificates.pem", "No such file"),
        ("ALL_PROXY", "ftp://me:sesame@127.0.0.1:1", "ftp"),
    ],
)
def test_an_environment_that_no_client_can_be_made_in_ends_the_run_at_once(
    server, engine_at, requests, monkeypatch, name, value, told
):
    monkeypatch.setenv(name, value)
    message = refusal(lambda: found(engine_at(), requests))
    assert message.startswith(f"{server.url}/v1 cannot be asked (")
    assert told in message
    assert name in message
    assert "sesame" not in message
    assert not server.asked


def test_a_proxy_whose_package_is_not_there_ends_the_run_at_once(engine_at, requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    message = refusal(lambda: found(engine_at(), requests))
    assert "ImportError" in message
    assert "ALL_PROXY" in message


def test_an_error_of_the_client_before_any_response_is_not_called_an_answer(engine_at, requests, monkeypatch):
    async def post(*_, **__):
        raise ValueError("no such thing")

    monkeypatch.setattr(completions.Client, "_inner_post", post)
    message = refusal(lambda: found(engine_at(), one_of(requests)))
    assert "failed (ValueError: no such thing)" in message
    assert "answers" not in message


def test_a_server_that_is_gone_ends_the_run_once_as_many_candidates_failed_as_are_asked_for_at_once(
    server, engine_at, requests
):
    server.fail(503, "no engine\nleft", where=lambda body: len(server.answered) >= 2)
    answers = []
    message = refusal(lambda: answers.extend(engine_at(parallel=2).sample(requests, SETTINGS)))
    assert message == (
        f"{server.url}/v1 answered 503: no engine left at try 8 of 8; see that the server runs, then run again: what "
        "was sampled is kept."
    )
    failed = [one for one in answers if one.answer is None]
    assert len(failed) == 2  # known to be so before the run ends
    assert len(answers) - 2 == len(server.answered)
    assert 2 <= len(server.answered) <= 3
    assert len(server.asked) <= len(answers) + 3 * completions.TRIES


def test_a_server_that_never_ran_is_one_line_however_few_candidates_there_are(served, server, requests):
    url = free_url()
    message = refusal(lambda: found(ChatEngine(url, served.model), one_of(requests)))
    assert message.startswith(f"{url}/v1 failed (ConnectError: ")
    assert "see that the server runs" in message


def test_only_failures_without_an_answer_between_them_end_a_run_and_the_next_begins_anew(server, engine_at, requests):
    server.fail(503, where=has_seed(first_seed(requests)))
    engine, bad, good = engine_at(parallel=2), one_of(requests), requests[1:2]
    for asked in (good, bad, good, bad):
        assert len(found(engine, asked)) == (3 if asked is good else 0)
    refusal(lambda: found(engine, bad))
    assert found(engine, bad) == {}
    assert engine.failed == 4


def test_a_field_that_the_server_refuses_by_name_is_left_out_from_then_on(server, engine_at, requests, caplog):
    for name in ("chat_template_kwargs", "seed"):
        server.fail(
            400, f"Unknown parameter: '{name}'.", where=lambda body, name=name: name in body and "messages" in body
        )
    engine = engine_at(parallel=1)
    assert len(found(engine, requests)) == 9
    assert len(server.asked) == 9 + 2
    assert not {"chat_template_kwargs", "seed"} & set(server.asked[-1])
    assert [warning.split("/v1 ")[1] for warning in warnings(caplog)] == [
        "refuses chat_template_kwargs: it is not sent any more, and the server decides whether the model thinks.",
        "refuses seed: it is not sent any more, and the server decides its seeds.",
    ]
    assert engine.failed == 0


def test_a_model_that_calls_the_length_cap_otherwise_gets_it_under_that_name(server, engine_at, requests, caplog):
    told = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server.fail(400, told, where=lambda body: "max_tokens" in body)
    engine = engine_at(parallel=1)
    assert len(found(engine, requests)) == 9
    assert len(server.asked) == 9 + 1
    assert {body.get("max_completion_tokens") for body in server.asked[1:]} == {requests[0].cap}
    assert warnings(caplog) == []


def test_a_refusal_that_only_repeats_the_request_leaves_no_field_out(server, engine_at, requests):
    server.fail(422, "bad: {'seed': 3, 'chat_template_kwargs': {}}", where=has_seed(first_seed(requests)))
    server.fail(422, "bad", where=lambda body: "seed" not in body)
    engine = engine_at(parallel=1)
    assert len(found(engine, requests)) == 8
    assert engine.failed == 1
    assert {"chat_template_kwargs", "seed"} <= set(server.asked[-1])


def test_thinking_that_cannot_be_asked_for_is_an_error_unless_the_answers_show_it(server, engine_at, requests):
    server.fail(400, "Unknown parameter: 'chat_template_kwargs'.", where=lambda body: "chat_template_kwargs" in body)
    asked = one_of(requests)
    message = refusal(lambda: found(engine_at(), asked, SamplingSettings(enable_thinking=True)))
    assert "refuses chat_template_kwargs, so enable_thinking" in message
    assert len(found(engine_at(), asked, SamplingSettings(answer_format="think"))) == 1


# -- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_stands_nowhere_else(server, engine_at, rows, cache_dir, caplog, monkeypatch):
    monkeypatch.setenv(completions.KEY, "sesame-37")
    caplog.set_level(logging.DEBUG)
    engine = engine_at()
    server.fail(429, "no more for sesame-37", times=1)
    server.fail(400, "sesame-37 may not", times=1)
    few = rows.select(range(2))
    sampled = generate_rejected(few, engine, SamplingSettings(2, max_new_tokens=CAP), cache_dir=cache_dir)
    server.fail(401, "Incorrect API key provided: sesame-37.")
    message = refusal(lambda: generate_rejected(rows, engine_at(), SETTINGS, cache_dir=cache_dir))
    assert "Incorrect API key provided: ***; check the key in T2S_PREF_API_KEY" in message
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sesame-37"}
    shown = [message, engine.describe(), str(engine.identity(cache_dir)), sampled.info.description, str(vars(engine))]
    shown += [record.getMessage() for record in caplog.records] + [caplog.text]
    assert not any("sesame" in text for text in shown)
    files = [path for path in cache_dir.rglob("*") if path.is_file()]
    assert files
    assert not any(b"sesame" in path.read_bytes() for path in files)


SECRET = 'sk-Or v1/9f+c"0=d\\8e'


PIECES = ("sk-or", "%6b%2d", "v1/9", "%252f", "v1%2f", "9f+c", "9f%2b", "0=d", "0%3d")


def escaped_whole(key):
    return "".join(f"%{ord(character):02x}" for character in key)


@pytest.mark.parametrize(
    "written",
    [str, quote, quote_plus, lambda key: quote(key, safe="").lower(), str.upper, escaped_whole, html.escape, repr]
    + [lambda key: quote(quote(key)), json.dumps, lambda key: json.dumps(json.dumps(key))],
)
def test_no_piece_of_the_key_is_left_wherever_a_text_is_cut_and_however_it_is_escaped(monkeypatch, written):
    monkeypatch.setenv(completions.KEY, SECRET)
    for before in range(260, 301):
        said = "x" * before + written(SECRET) + " was sent"
        escaped = "".join(f"\\u{ord(character):04x}" for character in said)
        for text in (said, json.dumps({"error": {"message": said}}), f'{{"error": "{escaped}"}}', json.dumps([said])):
            shown = replies.said(text)
            assert len(shown) <= 300
            assert not [piece for piece in PIECES if piece in shown.lower()]


def test_the_key_is_shown_in_no_error_and_no_warning(server, engine_at, requests, caplog, monkeypatch):
    monkeypatch.setenv(completions.KEY, SECRET)
    monkeypatch.setattr(completions, "TRIES", 2)
    said = "x" * 285 + SECRET
    shown = []
    for status in (200, 401, 503):
        server.faults.clear()
        server.fail(status, json.dumps({"error": {"message": said}}))
        shown.append(refusal(lambda: found(engine_at(), one_of(requests))))
    server.faults.clear()
    server.fail(307, headers={"Location": "/" + quote(SECRET, safe="/")})
    shown.append(refusal(lambda: found(engine_at(), one_of(requests))))
    reasons = [SECRET, "x" * 90 + SECRET, f"'{SECRET}", {"type": SECRET}, [said]]
    for text in [json.dumps({"detail": said}), *(completion(finish_reason=reason) for reason in reasons)]:
        server.faults.clear()
        server.fail(400 if "detail" in text else 200, text)
        assert not found(engine_at(), one_of(requests))
    shown += warnings(caplog)
    assert len(shown) == 4 + 4 + 6
    for text in shown:
        assert not [piece for piece in PIECES if piece in text.lower()]


def test_a_long_text_of_the_servers_is_masked_at_once_and_shown_in_part(monkeypatch):
    monkeypatch.setenv(completions.KEY, SECRET)
    start = time.perf_counter()
    for text in ("\\" * 1_000_000, "%25" * 300_000, " " * 1_000_000 + SECRET, "/" * 1_000_000):
        assert len(replies.masked(text)) <= replies.READ
        assert len(replies.said(text)) <= 300
        assert not [piece for piece in PIECES if piece in replies.said(text).lower()]
    assert time.perf_counter() - start < 5


def test_a_key_that_is_a_short_word_garbles_no_message(server, engine_at, requests, monkeypatch):
    for key, said, shown in (
        ("e", "bad key given here", "bad key given here"),
        ("e", "'e' is no key", "'***' is no key"),
        ("EMPTY", "Your prompt is empty, EMPTY!", "Your prompt is empty, ***!"),
        ("message", '{"error": {"message": "not message"}}', "not ***"),
    ):
        monkeypatch.setenv(completions.KEY, key)
        server.faults.clear()
        server.fail(401, said)
        assert shown in refusal(lambda: found(engine_at(), one_of(requests)))


def test_without_a_key_none_is_sent_and_not_the_one_for_the_hub_either(server, engine_at, requests, monkeypatch):
    from huggingface_hub import constants, get_token

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get_token() == "hf_secret"
    found(engine_at(), requests)
    monkeypatch.delenv("HF_TOKEN")
    stored = Path(constants.HF_TOKEN_PATH)
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text("hf_secret")
    try:
        assert get_token() == "hf_secret"
        found(engine_at(), requests)
        monkeypatch.setenv(completions.KEY, "sesame-37")
        found(engine_at(), one_of(requests))
    finally:
        stored.unlink()
    assert len(server.headers) == 19
    assert not any("authorization" in headers for headers in server.headers[:18])
    assert server.headers[18]["authorization"] == "Bearer sesame-37"
    assert "hf_secret" not in str(server.headers)


def test_a_key_that_is_none_is_refused_without_being_shown(engine_at, requests, monkeypatch):
    monkeypatch.setenv(completions.KEY, "sesame\x1b37")
    assert "sesame" not in refusal(lambda: found(engine_at(), requests))


# -- what it is ------------------------------------------------------------------------------------------------------


def test_the_identity_is_of_the_model_not_of_the_url_and_the_server_is_not_asked(tmp_path):
    engine = ChatEngine(free_url(), "org/model", model_version="step-900")
    identity = engine.identity(tmp_path)
    assert ChatEngine("https://elsewhere/api/v1", "org/model", model_version="step-900").identity(tmp_path) == identity
    others = [ChatEngine(free_url(), "org/model"), ChatEngine(free_url(), "another", model_version="step-900")]
    assert all(other.identity(tmp_path) != identity for other in others)
    assert ChatEngine("https://elsewhere/api/v1", "org/model").describe() == "org/model at elsewhere"
    assert "127.0.0.1" not in str(identity)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host", "http://", "http://host:port", "", None, "http://me:sesame@host", "http://a b"],
)
def test_a_url_that_is_none_is_refused_with_an_example(url):
    message = refusal(lambda: ChatEngine(url, "model"))
    assert "it must be like http://localhost:8000/v1" in message
    assert "sesame" not in message


@pytest.mark.parametrize("parallel", [0, -1, True, 1.5])
def test_the_number_of_requests_is_a_positive_integer(parallel):
    assert "1 or more" in refusal(lambda: ChatEngine("http://127.0.0.1", "model", parallel=parallel))


@pytest.mark.parametrize("model", ["", " ", None])
def test_a_model_has_a_name(model):
    assert "the name that the server knows" in refusal(lambda: ChatEngine("http://127.0.0.1", model))


# -- the end ---------------------------------------------------------------------------------------------------------


def test_a_caller_who_has_enough_ends_what_is_under_way_at_once(server, engine_at, requests):
    server.hang(120, where=lambda body: body["seed"] != first_seed(requests))
    start = time.perf_counter()
    with closing(engine_at(parallel=4).sample(requests, SETTINGS)) as sampled:
        assert next(sampled).candidate == 0
        assert server.wait_until(lambda: server.under_way == 4)
    assert server.wait_until(lambda: server.abandoned == 4 and server.under_way == 0)
    assert no_thread_is_left()
    assert time.perf_counter() - start < 30
    assert len(server.asked) == 5


def test_a_caller_who_has_enough_waits_for_no_further_try(server, engine_at, requests, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 60)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 60)
    server.fail(503, where=lambda body: body["seed"] != first_seed(requests))
    start = time.perf_counter()
    with closing(engine_at(parallel=4).sample(requests, SETTINGS)) as sampled:
        next(sampled)
    assert no_thread_is_left()
    assert time.perf_counter() - start < 20


# -- the whole way ---------------------------------------------------------------------------------------------------


def test_rows_get_their_rejects_and_a_second_run_asks_for_nothing_though_the_server_is_gone(
    server, engine_at, served, rows, cache_dir
):
    settings = SamplingSettings(num_rejects=2, max_new_tokens=32, temperature=1.2)
    some = rows.select(range(4))
    sampled = generate_rejected(some, engine_at(), settings, cache_dir=cache_dir)
    assert len(server.asked) == 8
    assert {len(statuses) for statuses in sampled["candidate_status"]} == {2}
    assert "at an endpoint, by messages" in sampled.info.description
    gone = ChatEngine(free_url(), served.model)
    assert generate_rejected(some, gone, settings, cache_dir=cache_dir).to_list() == sampled.to_list()
    more = SamplingSettings(num_rejects=3, max_new_tokens=32, temperature=1.2)
    generate_rejected(some, engine_at(), more, cache_dir=cache_dir)
    assert len(server.asked) == 12


def test_what_failed_is_marked_and_asked_for_again_by_the_next_run(server, engine_at, rows, cache_dir):
    settings = SamplingSettings(num_rejects=2, max_new_tokens=32, temperature=1.2)
    some = rows.select(range(4))
    failing = completions._seed(settings.row_seed(some["source_index"][1]), 1)
    server.fail(400, "not this one", where=has_seed(failing))
    partial = generate_rejected(some, engine_at(), settings, cache_dir=cache_dir)
    assert [statuses.count("failed") for statuses in partial["candidate_status"]] == [0, 1, 0, 0]
    assert partial["candidate_status"][1][1] == "failed"
    server.faults.clear()
    server.asked.clear()
    whole = generate_rejected(some, engine_at(), settings, cache_dir=cache_dir)
    assert [body["seed"] for body in server.asked] == [failing]
    assert not any("failed" in statuses for statuses in whole["candidate_status"])
    for name in ("rejected", "candidate_status"):
        assert [each for at, each in enumerate(whole[name]) if at != 1] == [
            each for at, each in enumerate(partial[name]) if at != 1
        ]
    assert generate_rejected(some, engine_at(), settings, cache_dir=cache_dir).to_list() == whole.to_list()
    assert len(server.asked) == 1


ROWS = 12
HURRIED = "patience.FIRST_PAUSE = patience.LONGEST_PAUSE = 0.05"
PATIENT = "completions.TRIES, patience.LONGEST_PAUSE = 100, 1"


def start(server, served, folder, how):
    """The command line in a process of its own, with other pauses."""
    arguments = ["reject", "--base-url", server.url, "--model", served.model, "--sft-data", demo_files().train]
    arguments += ["--max-samples", ROWS, "--max-new-tokens", 32, "--temperature", 1.2]
    arguments += ["--cache-dir", folder / "cache", "--output", folder / "dpo.json"]
    code = f"import sys; from t2s_pref import cli, completions, patience; {how}; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(folder):
    """The keys of all answers in the store, as often as they stand there; beside them is noted what failed."""
    kept = []
    for store in (folder / "cache" / "samples").iterdir():
        for segment in store.glob("segment-*.log"):
            kept += [json.loads(line.split(b" ", 1)[1]) for line in segment.read_bytes().splitlines()]
        with SampleStore(store) as opened:
            assert len(opened) == len({record["key"] for record in kept})
    return [record["key"] for record in kept if "failed" not in record["record"]]


def answered(server):
    return [(body["seed"], body["messages"][-1]["content"]) for body in server.answered]


def test_a_server_that_is_killed_and_started_again_in_the_middle_of_a_run_costs_no_candidate_and_none_twice(
    server, served, tmp_path
):
    process = start(server, served, tmp_path, PATIENT)
    assert server.wait_until(lambda: len(server.answered) >= 6, 120)
    served.kill()
    try:
        assert server.wait_until(lambda: server.unanswered >= 16)  # all that was under way was lost
        before = len(server.answered)
    finally:
        served.start()
    shown, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert 6 <= before < 3 * ROWS
    assert len(answered(server)) == len(set(answered(server))) == 3 * ROWS
    assert len(records(tmp_path)) == len(set(records(tmp_path))) == 3 * ROWS
    assert "trying again for about a minute" in errors
    assert (tmp_path / "dpo.json").exists()


def test_a_run_whose_server_stays_dead_ends_with_one_line_and_the_next_asks_only_for_what_is_missing(
    server, served, tmp_path
):
    process = start(server, served, tmp_path, HURRIED)
    assert server.wait_until(lambda: len(server.answered) >= 6, 120)
    served.kill()
    try:
        errors = process.communicate(timeout=200)[1]
    finally:
        served.start()
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith(f"t2s-pref: {server.url}/v1 failed (")
    assert last.endswith("at try 8 of 8; see that the server runs, then run again: what was sampled is kept.")
    assert "Traceback" not in errors
    kept = answered(server)
    assert 6 <= len(kept) < 3 * ROWS
    assert len(records(tmp_path)) == len(kept)
    server.asked.clear()
    again = start(server, served, tmp_path, HURRIED)
    errors = again.communicate(timeout=200)[1]
    assert again.returncode == 0, errors
    assert len(server.asked) == 3 * ROWS - len(kept)
    assert len(answered(server)) == len(set(answered(server))) == 3 * ROWS
    assert len(records(tmp_path)) == len(set(records(tmp_path))) == 3 * ROWS


def test_ctrl_c_ends_a_run_that_waits_for_answers(server, served, tmp_path):
    server.hang(120)
    process = start(server, served, tmp_path, PATIENT)
    assert server.wait_until(lambda: server.under_way == 16, 120)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 30
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert server.wait_until(lambda: server.abandoned == 16)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--base-url", "http://127.0.0.1:1"], "--base-url needs --model"),
        (["--model", "demo"], "--model needs --base-url"),
        (["--base-url", "http://127.0.0.1:1", "--model", "a", "--dtype", "float16"], "--dtype is for a model here"),
        (["--base-url", "http://127.0.0.1:1", "--model", "a", "--base-model", "b"], "--base-model is for a model here"),
        (
            ["--base-url", "http://127.0.0.1:1", "--model", "a", "--served-model", "b"],
            "--served-model needs --endpoint",
        ),
        (["--base-url", "http://127.0.0.1:1", "--endpoint", "http://127.0.0.1:1"], "--base-url is for another kind"),
        (["--model-version", "1"], "--model-version needs --endpoint or --base-url"),
        (["--parallel", "1"], "--parallel needs --endpoint or --base-url"),
        (["--base-url", "http://127.0.0.1:1", "--model", "a", "--parallel", "0"], "parallel is 0; it must be"),
        (["--endpoint", "http://127.0.0.1:1", "--parallel", "-1"], "parallel is -1; it must be"),
        (["--base-url", "127.0.0.1:1", "--model", "a"], "it must be like http://localhost:8000/v1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, tmp_path, arguments, told):
    data = ["--sft-data", demo_files().train, "--output", str(tmp_path / "dpo.json")]
    assert main(["reject", *data, *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "usual"), [(["--endpoint", "http://127.0.0.1:1"], 32), (["--base-url", "http://h", "--model", "a"], 16)]
)
def test_the_number_of_requests_at_a_time_is_an_option_and_otherwise_the_engines_own(where, usual):
    arguments = ["reject", "--sft-data", "a.json", "--output", "b.json", *where]
    assert commands._engine(build_parser().parse_args(arguments)).parallel == usual
    assert commands._engine(build_parser().parse_args([*arguments, "--parallel", "3"])).parallel == 3
