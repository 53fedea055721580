"""The queue of one run: windows, write-once params, tags inside create-run, counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runqueue.queueing import (
    Accumulator,
    Batch,
    Lane,
    Ledger,
    RejectedError,
    Scope,
    StoreError,
)
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, RUN, STATUS, TAG
from support.engine import (
    Entry,
    Fault,
    bounds,
    check_lane,
    datasets,
    drain,
    encode,
    fill,
    flat,
    inside,
    lane_of,
    ledger_of,
    metrics,
    named,
    params,
    points,
    run,
    status,
    tags,
)


def keys(batches: list[Batch]) -> list[list[str]]:
    return [[key for _, key, _, _ in inside(batch)] for batch in batches]


def kinds(batches: list[Batch]) -> list[set[int]]:
    return [{kind for kind, _, _, _ in inside(batch)} for batch in batches]


# -- windows ---------------------------------------------------------------------------------------------------------


def test_a_window_is_sent_in_the_order_create_data_inputs_status() -> None:
    """In whatever order the calls came: the creation goes first, the final status last."""
    lane = lane_of(
        status(), datasets("d"), metrics(0, m=1), params(p=1), tags({"t": 1}, False), run(), run_exists=False
    )
    lane.close_window()
    assert kinds(drain(lane)) == [{RUN}, {PARAM, TAG, METRIC}, {DATASET}, {STATUS}]


def test_windows_are_sent_one_after_the_other() -> None:
    """A later window never overtakes an earlier one, even if the earlier one still holds a final status."""
    lane = lane_of(metrics(0, a=0), status())
    lane.close_window()
    fill(lane, [metrics(1, b=1), datasets("d"), status("FAILED")])
    lane.close_window()
    batches = drain(lane)
    assert keys(batches) == [["a"], ["status"], ["b"], ["dataset"], ["status"]]
    assert [batch.serial for batch in batches] == [1, 1, 2, 2, 2]


def test_the_last_final_status_of_a_window_is_the_one_that_is_sent() -> None:
    """A run has one final status, so one request is enough."""
    lane = lane_of(status("RUNNING"), status("FAILED"), status("FINISHED"))
    lane.close_window()
    assert [inside(batch)[0][2] for batch in drain(lane)] == ["FINISHED"]


def test_a_window_closes_over_the_records_of_the_inbox() -> None:
    """Later records belong to the next window; `most` bounds the records of one window."""
    lane = lane_of(*points(5))
    lane.close_window(most=2)
    fill(lane, points(1, 5))
    assert keys(drain(lane)) == [["loss"] * 2]
    assert (lane.last_closed, lane.last_emptied, len(lane.inbox)) == (1, 1, 4)
    lane.close_window()
    lane.close_window()
    assert (lane.last_closed, len(drain(lane)[0].groups[METRIC])) == (2, 4)


def test_a_given_back_batch_comes_first_again_unchanged() -> None:
    """An outage leads to no second encoding, no other order and no refilled batch."""
    lane = lane_of(*points(20), status())
    lane.close_window()
    first = lane.take(bounds(metrics=10))
    lane.give_back()
    check_lane(lane)
    fill(lane, points(5, 100))
    lane.close_window()
    assert lane.take(bounds(metrics=10)) is first
    lane.store()
    assert [batch.count for batch in drain(lane, bounds(metrics=10))] == [10, 1, 5]


# -- write-once params -----------------------------------------------------------------------------------------------


def test_an_equal_repeat_of_a_param_costs_no_request() -> None:
    """The reason: autologging logs the same params again and again."""
    lane = lane_of(params(a=1, b=2))
    lane.close_window()
    drain(lane)
    fill(lane, [params(b=2, a=1), params(a=1)])
    lane.close_window()
    assert drain(lane) == []
    assert (ledger_of(lane).stored, lane.take_unreported(2), lane.is_settled) == (5, [], True)


def test_another_value_of_a_stored_param_fails_without_a_request() -> None:
    """The server would refuse the whole batch because of that param."""
    lane = lane_of(params(a=1))
    lane.close_window()
    drain(lane)
    fill(lane, [params(a=2, b=3), metrics(0, m=1)])
    lane.close_window()
    assert keys(drain(lane)) == [["b", "m"]]
    (failure,) = lane.take_unreported(2)
    assert named([failure]) == [(PARAM, "a", 2, None)]
    assert isinstance(failure.error, RejectedError)
    assert "'a' is stored with another value" in str(failure.error)


def test_a_param_goes_into_a_batch_once_and_its_repeat_waits_for_the_next() -> None:
    """Servers refuse a batch that names a param twice, even with the same value."""
    lane = lane_of(params(a=1), params(a=2, b=1), params(a=1), params(b=1))
    lane.close_window()
    assert keys(drain(lane)) == [["a", "b"]]
    assert named(lane.take_unreported(1)) == [(PARAM, "a", 2, None)]
    assert ledger_of(lane).stored == 4


def test_a_repeat_is_sent_when_the_first_was_refused() -> None:
    """A repeat needs no request only if the first value was stored."""
    lane = lane_of(params(a=1), params(a=2))
    lane.close_window()
    batches = drain(lane, judge=lambda entries: RejectedError("no") if entries[0][2] == 1 else None)
    assert [inside(batch)[0][2] for batch in batches] == [1, 2]
    assert named(lane.take_unreported(1)) == [(PARAM, "a", 1, None)]


@given(
    st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2), min_size=1), max_size=12), st.integers(1, 4)
)
def test_params_end_as_a_server_would_have_them(calls: list[dict[str, int]], cap: int) -> None:
    """
    The first value of a key is stored, equal values count as stored, other values are refused, in batches of any size.
    """
    lane = lane_of(*(params(**call) for call in calls))
    lane.close_window()
    batches = drain(lane, bounds(params=cap))
    first: dict[str, int] = {}
    refused: list[Entry] = []
    for call in calls:
        for key, value in call.items():
            if first.setdefault(key, value) != value:
                refused.append((PARAM, key, value, None))
    sent = [(key, value) for batch in batches for _, key, value, _ in inside(batch)]
    assert len(sent) == len(first) and dict(sent) == first
    assert sorted(named(lane.take_unreported(1))) == sorted(refused)
    for batch in batches:
        assert len({key for _, key, _, _ in inside(batch)}) == batch.count


# -- tags inside create-run ------------------------------------------------------------------------------------------


def test_tags_travel_inside_the_request_that_creates_the_run() -> None:
    """A run with five full metric batches and a status costs seven requests."""
    lane = lane_of(run(), tags({f"t{n}": n for n in range(120)}), *points(5_000), status(), run_exists=False)
    lane.close_window()
    batches = drain(lane)
    assert [batch.count for batch in batches] == [121, 1_000, 1_000, 1_000, 1_000, 1_000, 1]
    assert batches[0].creates_run
    assert lane.run_exists


def test_tags_of_create_run_are_bounded_in_number_and_the_others_follow() -> None:
    """The tags that do not fit into create-run go by log-batch, in order."""
    lane = lane_of(run(), tags({"a": 1, "b": 2}), tags({"c": 3, "d": 4}), run_exists=False)
    lane.close_window()
    assert keys(drain(lane, bounds(create_tags=3))) == [["run", "a", "b", "c"], ["d"]]


def test_tags_that_create_run_holds_anyway_count_for_its_bound() -> None:
    """The bound counts all tags of the request, not only those that the engine adds."""
    lane = lane_of(run(2), tags({"a": 1, "b": 2}), run_exists=False)
    lane.close_window()
    assert keys(drain(lane, bounds(create_tags=3))) == [["run", "a"], ["b"]]


def test_tags_of_create_run_are_bounded_in_bytes_as_the_answer_will_escape_them() -> None:
    """
    The answer escapes tags as ASCII, which makes three bytes of one; the bytes of the run's own entry count as well.
    """
    lane = lane_of(run(), tags({"a": "x", "é": "x", "b": "x"}), run_exists=False)
    own, plain, escaped = len("0:run=run") + 1, len("2:a=x") + 1, 3 * len("2:é=x".encode()) + 1
    lane.close_window()
    batches = drain(lane, bounds(create_tag_bytes=own + plain + escaped - 1))
    assert keys(batches) == [["run", "a", "b"], ["é"]]


def test_tags_that_may_not_travel_inside_create_run_go_by_log_batch() -> None:
    """Some tags may go by log-batch only."""
    lane = lane_of(run(), tags({"a": 1}, False), tags({"b": 2}), run_exists=False)
    lane.close_window()
    assert keys(drain(lane)) == [["run", "b"], ["a"]]


def test_a_later_value_of_a_tag_does_not_overtake_inside_create_run() -> None:
    """The last value of a tag has to win."""
    lane = lane_of(run(), tags({"a": 1}, False), tags({"a": 2, "b": 1}), tags({"b": 2}), run_exists=False)
    lane.close_window()
    batches = drain(lane)
    assert [[entry[1:3] for entry in inside(batch)] for batch in batches] == [
        [("run", "run"), ("b", 1)],
        [("a", 1), ("a", 2), ("b", 2)],
    ]


def test_leftovers_of_create_run_go_first() -> None:
    """They were set before all other entries of the lane."""
    lane = lane_of(run(), tags({"a": 1}, False), run_exists=False)
    lane.close_window()
    lane.take(bounds())
    lane.store([tags({"x": 0}, False), tags({"a": 0}, False)])
    check_lane(lane)
    assert keys(drain(lane)) == [["x", "a", "a"]]
    assert repr(lane) == "<Lane run=r pending=0 in_flight=0 settled=4>"


# -- counts ----------------------------------------------------------------------------------------------------------


def test_the_repr_of_a_lane_tells_its_state() -> None:
    """The repr counts entries: pending, in flight, settled."""
    lane = lane_of(metrics(0, a=1, b=2, c=3), metrics(1, a=1), run="ab12")
    assert repr(lane) == "<Lane run=ab12 pending=4 in_flight=0 settled=0>"
    lane.close_window()
    lane.take(bounds(metrics=3))
    assert repr(lane) == "<Lane run=ab12 pending=1 in_flight=3 settled=0>"
    lane.store()
    assert repr(lane) == "<Lane run=ab12 pending=1 in_flight=0 settled=3>"


def test_the_reprs_of_accumulator_and_ledger_tell_their_state() -> None:
    """Their reprs help to debug a program that hangs."""
    accumulator = Accumulator(encode)
    lane = accumulator.open("r", run_exists=True)
    fill(lane, [metrics(0, a=1, b=2)])
    assert repr(accumulator) == "<Accumulator lanes=1 pending=2>"
    lane.close_window()
    lane.take(bounds())
    assert repr(accumulator.ledger) == "<Ledger drawn=2 in_flight=2 stored=0 failed=0>"


def test_outstanding_yields_entries_in_flight_returned_and_queued_up_to_a_window() -> None:
    """It yields each entry once, in the order of sending."""
    lane = lane_of(*points(8))
    lane.close_window()
    fill(lane, points(4, 100))
    lane.close_window()
    fill(lane, points(2, 200))
    lane.take(bounds(metrics=4))
    lane.reject(RejectedError("halve it"))
    lane.take(bounds(metrics=4))
    why = StoreError("why")
    left = list(lane.outstanding(1, why))
    assert named(left) == flat(points(8))
    assert all(failure.error is why and not failure.final for failure in left)
    assert named(lane.outstanding(2, why)) == [*flat(points(8)), *flat(points(4, 100))]
    assert (lane.reportable, lane.is_settled) == (12, False)


def test_abandoned_entries_are_counted_and_forgotten() -> None:
    """With `failed` they count as failed, otherwise as dropped."""
    accumulator = Accumulator(encode)
    lane = accumulator.open("r", run_exists=True)
    fill(lane, points(6))
    lane.close_window(most=4)
    lane.take(bounds(metrics=2))
    lane.give_back()
    assert accumulator.abandon(failed=False) == 6
    assert accumulator.counts() == {
        "accepted": 6, "pending": 0, "in_flight": 0, "stored": 0, "failed": 0, "dropped": 6,
    }  # fmt: skip
    fill(lane, points(3))
    assert accumulator.abandon(failed=True) == 3
    assert (accumulator.ledger.failed, lane.is_settled, lane.take(bounds())) == (3, True, None)


def test_a_lane_found_by_two_names_is_one_lane() -> None:
    """A placeholder and the real id lead to the same lane; a name that another lane has stays with that lane."""
    accumulator = Accumulator(encode)
    pending, real = accumulator.open("pending", run_exists=False), accumulator.open("taken", run_exists=True)
    accumulator.alias("id", pending)
    accumulator.alias("taken", pending)
    assert accumulator.open("id", run_exists=True) is pending
    assert accumulator.open("taken", run_exists=True) is real
    assert accumulator.all() == [pending, real]


answers = st.sampled_from(
    [None, None, None, RejectedError("no"), RejectedError("name", bars_key=True), StoreError("batch"), "give back",
     StoreError("lane", scope=Scope.LANE), StoreError("store", scope=Scope.STORE), "close", "log"]
)  # fmt: skip


@given(st.lists(answers, max_size=40), st.integers(1, 9), st.booleans())
def test_the_counts_add_up_after_every_step(script: list[StoreError | str | None], cap: int, run_exists: bool) -> None:
    """drawn = pending + in flight + stored + failed, whatever the store answers in whatever order."""
    lane = Lane("r", encode, Ledger(), run_exists=run_exists)
    faulty = Fault(TypeError("no"))
    sample = [tags({"a": 1, "b": 2}), params(p=1, q=2), params(p=2), metrics(0, m=1, n=faulty), datasets("d", faulty)]
    fill(lane, ([] if run_exists else [run()]) + sample)
    for answer in script:
        if answer == "log":
            fill(lane, [*sample, status()])
        lane.close_window()
        batch = lane.take(bounds(entities=cap, params=2))
        check_lane(lane)
        if batch is None:
            continue
        if answer == "give back":
            lane.give_back()
        elif isinstance(answer, StoreError):
            alone = batch.count == 1 and not batch.creates_run and STATUS not in batch.groups
            lane.reject(answer if alone or not answer.bars_key else RejectedError("no"))
        else:
            lane.store()
        check_lane(lane)
    lane.close_window()
    drain(lane, bounds(entities=cap))
    assert lane.is_settled
