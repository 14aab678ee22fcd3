"""What a server does not answer is counted, is no part of a whole result, and is what the next run asks for."""

import pytest
from datasets import DatasetDict

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    evaluate,
    explode_rejected,
    generate_rejected,
    load_sft,
    summary,
    verify_rejected,
)

FILES = demo_files()
SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=64, temperature=1.0)


class Failing(TransformersEngine):
    """The bundled model behind a line that loses some of its answers, as a server that is too busy does."""

    def __init__(self, lost=()):
        super().__init__(FILES.model, device="cpu")
        self.lost, self.asked = set(lost), []

    def sample(self, requests, settings, budget):
        for one in super().sample(requests, settings, budget):
            key = requests[one.place].row_seed, one.candidate
            self.asked.append(key)
            yield one._replace(answer=None) if key in self.lost else one


@pytest.fixture(scope="module")
def rows():
    return load_sft(FILES.train).select(range(12))


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    return generate_rejected(rows, FILES.model, SETTINGS, cache_dir=tmp_path_factory.mktemp("whole"))


LOST = [(SETTINGS.row_seed(row), candidate) for row, candidate in ((0, 0), (0, 1), (0, 2), (3, 1), (11, 2))]


def test_lost_answers_are_counted_and_all_others_are_there(rows, whole, cache_dir):
    part = generate_rejected(rows, Failing(LOST), SETTINGS, cache_dir=cache_dir)
    assert [len(statuses) for statuses in part["candidate_status"]] == [3] * 12
    assert [each.count("failed") for each in part["candidate_status"]] == [3, 0, 0, 1, *[0] * 7, 1]
    assert part["rejected"][1:3] == whole["rejected"][1:3]
    told = summary(part, cache_dir=cache_dir)
    assert told.drops["failed"] == 5
    assert told.pairs + sum(told.drops.values()) == told.candidates == 36
    assert "run the same command again" in str(told)


def test_the_next_run_asks_for_what_was_lost_and_for_nothing_else(rows, whole, cache_dir):
    first = Failing(LOST)
    part = generate_rejected(rows, first, SETTINGS, cache_dir=cache_dir)
    assert len(first.asked) == 36  # each once, the lost ones too
    second = Failing(LOST[:1])
    rest = generate_rejected(rows, second, SETTINGS, cache_dir=cache_dir)
    assert sorted(second.asked) == sorted(LOST)
    third = Failing()
    assert generate_rejected(rows, third, SETTINGS, cache_dir=cache_dir)["rejected"][:] == whole["rejected"][:]
    assert third.asked == LOST[:1]
    fourth = Failing()
    done = generate_rejected(rows, fourth, SETTINGS, cache_dir=cache_dir)
    assert fourth.asked == []
    # what follows from a part is never taken for what follows from the whole
    assert len({part._fingerprint, rest._fingerprint, done._fingerprint}) == 3


def test_what_was_made_of_a_part_is_made_anew_of_the_whole(rows, cache_dir):
    def pairs(engine):
        sampled = generate_rejected(rows, engine, SETTINGS, cache_dir=cache_dir)
        judged = verify_rejected(sampled, FILES.databases, cache_dir=cache_dir)
        return len(judged["verdict"][0]), len(explode_rejected(judged, dedup="normalized", cache_dir=cache_dir))

    (few, first), (all_, second) = pairs(Failing(LOST)), pairs(Failing())
    assert (few, all_) == (0, 3)
    assert first <= second


def test_what_fails_again_and_again_never_keeps_the_rest_from_being_written(rows, whole, cache_dir, caplog):
    """A server that takes too many failures in a row for its end, as in a run where only those are left to ask for."""

    class GivesUp(Failing):
        def sample(self, requests, settings, budget):
            some = False
            for one in super().sample(requests, settings, budget):
                some |= one.answer is not None
                yield one
            if not some:
                raise UserError("http://server answered 503; see that it runs.")

    generate_rejected(rows, Failing(LOST), SETTINGS, cache_dir=cache_dir)
    again = GivesUp(LOST)
    part = generate_rejected(rows, again, SETTINGS, cache_dir=cache_dir)
    assert sum(statuses.count("failed") for statuses in part["candidate_status"]) == 5
    assert part["rejected"][1:3] == whole["rejected"][1:3]
    assert sorted(again.asked) == sorted(LOST)
    assert "What failed before is left out for now." in caplog.text
    # but what was never asked for is not given up silently
    more = SamplingSettings(**{**vars(SETTINGS), "num_rejects": 4})
    lost = [*LOST, *((SETTINGS.row_seed(row), 3) for row in range(12))]
    with pytest.raises(UserError, match="see that it runs"):
        generate_rejected(rows, GivesUp(lost), more, cache_dir=cache_dir)


def test_an_answer_that_never_comes_counts_as_failed(rows, cache_dir):
    class Silent(Failing):
        def sample(self, requests, settings, budget):
            yield from (one for one in super().sample(requests, settings, budget) if one.answer is not None)

    part = generate_rejected(rows, Silent(LOST), SETTINGS, cache_dir=cache_dir)
    assert sum(statuses.count("failed") for statuses in part["candidate_status"]) == 5
    again = Failing()
    whole = generate_rejected(rows, again, SETTINGS, cache_dir=cache_dir)
    assert not any("failed" in statuses for statuses in whole["candidate_status"])
    assert sorted(again.asked) == sorted(LOST)


def test_sampling_until_proven_goes_on_with_other_candidates(rows, cache_dir):
    lost = [(SETTINGS.row_seed(row), 0) for row in range(12)]
    arguments = {"databases": FILES.databases, "max_candidates": 6, "cache_dir": cache_dir}
    part = generate_rejected(rows, Failing(lost), SETTINGS, **arguments)
    assert all(statuses[0] == "failed" and len(statuses) > 3 for statuses in part["candidate_status"])
    again = Failing()
    whole = generate_rejected(rows, again, SETTINGS, **arguments)
    assert set(lost) <= set(again.asked)
    assert not any("failed" in statuses for statuses in whole["candidate_status"])


def test_where_all_is_lost_there_is_a_result_without_rejects_and_the_next_run_has_all(rows, whole, cache_dir):
    every = [(SETTINGS.row_seed(row), candidate) for row in range(12) for candidate in range(3)]
    none = generate_rejected(DatasetDict(train=rows), Failing(every), SETTINGS, cache_dir=cache_dir)["train"]
    assert none["rejected"][:] == [[]] * 12
    assert generate_rejected(rows, Failing(), SETTINGS, cache_dir=cache_dir)["rejected"][:] == whole["rejected"][:]


def test_accuracy_is_not_measured_on_a_part(rows, cache_dir):
    with pytest.raises(UserError, match="5 of the answers failed and would count as wrong; run again"):
        evaluate(
            rows,
            Failing([(SETTINGS.row_seed(row), 0) for row in range(5)]),
            FILES.databases,
            SETTINGS,
            cache_dir=cache_dir,
        )
