"""
Exactly one run for each `create_run`: the real sender and the real bodies over a store that is only a list of runs, on
both event loops, with a clock that jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from runqueue.errors import NotFoundError, StoreError, UnavailableError, UnexpectedAnswerError
from runqueue.queueing import RejectedError, Scope
from runqueue.queueing.batches._batch import STATUS, record_of
from runqueue.stores._protocol import CREATE_RUN, SEARCH_RUNS, UPDATE_RUN, Endpoint
from runqueue.wire._answer import error_of
from runqueue.wire._records import PARENT_TAG, TOKEN_TAG
from support.list_store import (
    BOUNDS,
    DOUBTFUL,
    ETERNITY,
    Bench,
    ListStore,
    Outcome,
    assert_searched_before_creating_again,
    bench,
)
from support.virtual_time import VirtualTimeLoop

BACKENDS: dict[str, Callable[[], dict[str, Any]]] = {
    "asyncio": lambda: {"loop_factory": VirtualTimeLoop},
    "trio": lambda: {"clock": trio.testing.MockClock(autojump_threshold=0)},
}


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A loop of the test's own, with a clock that jumps instead of waiting."""
    return request.param, BACKENDS[request.param]()


# -- every interleaving ----------------------------------------------------------------------------------------------

LOST = UnavailableError("no answer", ambiguous=True)
SEARCH_FAULTS = st.sampled_from([None, LOST, error_of(503, None, "later"), UnexpectedAnswerError("a login page")])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=3 * settings().max_examples // 2)
@given(
    creates=st.lists(st.sampled_from(Outcome), max_size=8),
    searches=st.lists(SEARCH_FAULTS, max_size=6),
    deletes=st.lists(SEARCH_FAULTS, max_size=3),
    lateness=st.integers(1, 8),
    timeout=st.sampled_from([0.0, 1.0, 300.0]),
)
def test_there_is_exactly_one_run_whatever_happens_to_its_requests(
    backend: str,
    creates: list[Outcome],
    searches: list[StoreError | None],
    deletes: list[StoreError | None],
    lateness: int,
    timeout: float,
) -> None:
    """A parent and its child, in any order of lost, late and wrong answers: one run each, with all its tags."""

    async def scenario() -> None:
        async with bench(store, timeout=timeout) as b:
            parent = b.create_run({"own": "1"})
            child = b.create_run(parent=parent)
            b.set_tags(parent, {"riding": "2"})
            for _ in range(40):
                await b.flush()
                if parent.run_id and child.run_id and not store.deletes:
                    break
            b.set_tags(parent, {"later": "3"})
            store.commit_late()
            store.searches.clear()
            await b.flush()
        assert sorted(store.active()) == sorted([str(parent.run_id), str(child.run_id)])
        wanted = {TOKEN_TAG: parent._token, "own": "1", "riding": "2", "later": "3"}
        assert store.run(parent.run_id).tags == wanted
        assert store.run(child.run_id).tags == {TOKEN_TAG: child._token, PARENT_TAG: parent.run_id}
        assert_searched_before_creating_again(store.calls)

    store = ListStore([*creates], [*searches], [*deletes], lateness)
    anyio.run(scenario, backend=backend, backend_options=BACKENDS[backend]())


# -- one by one ------------------------------------------------------------------------------------------------------

ROWS = {
    Outcome.STORED: ["create"],
    Outcome.ANSWER_LOST: ["create", "search", "search"],
    Outcome.ANSWERED_500: ["create", "search", "search"],
    Outcome.REQUEST_LOST: ["create", "search", "create", "search"],
    Outcome.FAILED_500: ["create", "search", "create", "search"],
    Outcome.BUSY: ["create", "create"],
    Outcome.LATE: ["create", "search", "search"],
}


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", ROWS, ids=lambda outcome: outcome.name)
async def test_an_unknown_outcome_costs_one_search_before_and_one_after(outcome: Outcome) -> None:
    """And where the outcome is known, nothing is searched for."""
    async with bench(ListStore([outcome])) as b:
        run = b.create_run()
        assert not (await b.flush()).failures
        assert b.store.names() == ROWS[outcome]
        assert b.store.active() == [run.run_id]


@pytest.mark.anyio
async def test_a_search_that_fails_never_leads_to_a_second_create() -> None:
    """No answer, a login page, refused credentials, an answer without a list."""
    faults = [LOST, UnexpectedAnswerError("a login page"), error_of(401, None, "who?"), error_of(403, None, "no")]
    async with bench(ListStore([Outcome.ANSWER_LOST], [*faults])) as b:
        run = b.create_run()
        for _ in range(3):
            report = await b.flush()
            assert [failure.final for failure in report.failures] == [False]
            assert run.run_id is None
        assert not (await b.flush()).failures
        assert b.store.count(CREATE_RUN) == 1
        assert b.store.active() == [run.run_id]


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [{"runs": None}, {"runs": {"a": 1}}, {"runs": "none"}], ids=str)
async def test_a_search_that_is_not_answered_with_a_list_proves_nothing(
    answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may exist, so it is not created again."""
    async with bench(ListStore([Outcome.ANSWER_LOST])) as b:
        b.create_run()
        with monkeypatch.context() as patch:
            patch.setattr(ListStore, "_handle", _instead(SEARCH_RUNS, answer))
            report = await b.flush()
        assert [failure.final for failure in report.failures] == [False]
        assert b.store.count(CREATE_RUN) == 1
        assert not (await b.flush()).failures
        assert len(b.store.runs) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer", [{}, {"run": None}, {"run": {"info": {}}}, {"run": {"info": {"run_id": ""}}}], ids=str
)
async def test_an_answer_without_a_run_id_is_in_doubt(answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not count as created, and the next flush searches before it creates."""
    async with bench(ListStore()) as b:
        run = b.create_run()
        with monkeypatch.context() as patch:
            patch.setattr(ListStore, "_handle", _instead(CREATE_RUN, answer))
            assert len((await b.flush()).failures) == 1
        assert run.run_id is None
        await b.flush()
        assert b.store.names() == ["create", "search", "create", "search"]
        assert b.store.active() == [run.run_id]


def _instead(endpoint: Endpoint, answer: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    handle = ListStore._handle

    def answering(store: ListStore, asked: Endpoint, data: dict[str, Any]) -> dict[str, Any]:
        return answer if asked is endpoint else handle(store, asked, data)

    return answering


@pytest.mark.anyio
async def test_a_create_that_was_cancelled_is_in_doubt() -> None:
    """The store may have received the request, so the next attempt searches first."""
    store = ListStore()
    made = Bench(store, ETERNITY, ETERNITY)
    run = made.create_run()
    lane = made.lane(run)
    lane.close_window()
    batch = lane.take(BOUNDS)
    assert batch is not None
    with anyio.move_on_after(0.001) as scope:
        await made.creation.create(run, batch)
    assert scope.cancelled_caught
    await made.creation.create(run, batch)
    assert store.names() == ["search", "create"]
    assert store.active() == [run.run_id]


# -- the last look ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_duplicates_are_deleted_and_the_known_run_stays(caplog: pytest.LogCaptureFixture) -> None:
    """Two late commits of one run: both are deleted and logged, and the run that was used stays."""
    async with bench(ListStore([Outcome.LATE, Outcome.LATE], lateness=100)) as b:
        run = b.create_run()
        await b.flush()
        b.store.commit_late()
        assert len(b.store.active()) == 3
        await b.flush()
        assert b.store.active() == [run.run_id]
        surplus = [each.run_id for each in b.store.runs if not each.active]
        assert len(surplus) == 2 and all(run_id in caplog.text for run_id in surplus)


@pytest.mark.anyio
async def test_flushes_search_until_the_attempt_is_older_than_a_request_may_last() -> None:
    """Each flush searches once, until then."""
    async with bench(ListStore([Outcome.ANSWER_LOST]), patience=60) as b:
        b.create_run()
        await b.flush()
        before = b.store.count(SEARCH_RUNS)
        for seconds in (20, 30, 30, 30):
            await anyio.sleep(seconds)
            await b.flush()
        assert b.store.count(SEARCH_RUNS) == before + 3


@pytest.mark.anyio
@pytest.mark.parametrize("at", ["searches", "deletes"])
async def test_a_search_for_duplicates_that_fails_is_warned_of_and_repeated(
    at: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The flush succeeds, as everything is stored; the next one deletes the duplicate."""
    async with bench(ListStore([Outcome.LATE], lateness=100)) as b:
        run = b.create_run()
        await b.flush()
        b.store.commit_late()
        getattr(b.store, at).append(error_of(503, None, "later"))
        assert not (await b.flush()).failures
        assert f"cannot tell whether the run {run.run_id} exists twice" in caplog.text
        assert len(b.store.active()) == 2
        await b.flush()
        assert b.store.active() == [run.run_id]


@pytest.mark.anyio
@pytest.mark.parametrize("patience", [0.0, ETERNITY], ids=["an old doubt", "a young doubt"])
async def test_two_flushes_may_search_at_the_same_time(patience: float, caplog: pytest.LogCaptureFixture) -> None:
    """Neither fails, and the duplicate is deleted once."""
    async with bench(ListStore([Outcome.LATE], lateness=100), patience=ETERNITY) as b:
        run = b.create_run()
        await b.flush()
        b.creation._patience = patience
        b.store.commit_late()
        await anyio.sleep(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush)
            tasks.start_soon(b.flush)
        assert b.store.active() == [run.run_id]
        assert "cannot tell" not in caplog.text


# -- without a flush -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watched(store: ListStore, patience: float = 60, healthy: Callable[[], bool] = lambda: True) -> Any:
    """A bench whose store is watched as by a client that streams."""
    async with bench(store, patience=patience) as b, anyio.create_task_group() as tasks:
        tasks.start_soon(b.creation.watch, healthy)
        yield b
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_duplicate_is_deleted_without_a_flush(caplog: pytest.LogCaptureFixture) -> None:
    """By one search, when the doubtful request may not be carried out any more; nothing is sent before."""
    async with watched(ListStore([Outcome.LATE], lateness=100)) as b:
        run = b.create_run()
        await b.sender.flush()
        b.store.commit_late()
        before = len(b.store.calls)
        await anyio.sleep(50)
        assert len(b.store.calls) == before and len(b.store.active()) == 2
        await anyio.sleep(20)
        assert b.store.active() == [run.run_id]
        assert "a duplicate of" in caplog.text
        await anyio.sleep(1_000)
        assert b.store.names()[before:] == ["search", "delete"]


@pytest.mark.anyio
async def test_doubtful_runs_are_searched_for_one_after_the_other() -> None:
    """Each at its own time, and later ones too."""
    async with watched(ListStore([Outcome.LATE, Outcome.STORED] * 3, lateness=1_000)) as b:
        for pause in (30, 500, 0):
            b.create_run()
            await b.sender.flush()
            b.store.commit_late()
            await anyio.sleep(pause)
        assert len(b.store.active()) == 4
        await anyio.sleep(200)
        assert len(b.store.active()) == 3 and not b.creation._doubtful


@pytest.mark.anyio
async def test_without_a_doubtful_run_nothing_is_searched_for() -> None:
    """However long."""
    async with watched(ListStore()) as b:
        b.create_run()
        await b.flush()
        await anyio.sleep(10_000)
        assert b.store.names() == ["create"]


@pytest.mark.anyio
async def test_nothing_is_searched_for_in_an_outage() -> None:
    """The search follows after the outage."""
    up = False
    async with watched(ListStore([Outcome.LATE], lateness=100), healthy=lambda: up) as b:
        run = b.create_run()
        await b.sender.flush()
        b.store.commit_late()
        before = len(b.store.calls)
        await anyio.sleep(1_000)
        assert len(b.store.calls) == before
        up = True
        await anyio.sleep(100)
        assert b.store.active() == [run.run_id]


@pytest.mark.anyio
async def test_a_search_that_fails_is_repeated_after_growing_pauses(caplog: pytest.LogCaptureFixture) -> None:
    """Each of them logs a warning."""
    async with watched(ListStore([Outcome.LATE], lateness=1_000)) as b:
        run = b.create_run()
        await b.sender.flush()
        b.store.commit_late()
        b.store.searches += [error_of(503, None, "later")] * 100
        await anyio.sleep(86_400)
        said = caplog.text.count("cannot tell whether the run")
        assert 24 < said < 40
        b.store.searches.clear()
        await anyio.sleep(4_000)
        assert b.store.active() == [run.run_id]


@pytest.mark.anyio
async def test_a_flush_searches_independently_of_the_background_search(caplog: pytest.LogCaptureFixture) -> None:
    """Before, after and during it; the duplicate is deleted once."""
    async with watched(ListStore([Outcome.LATE], lateness=1_000)) as b:
        run = b.create_run()
        await b.flush()
        began = anyio.current_time()
        b.store.commit_late()
        async with anyio.create_task_group() as tasks:
            for at in (60.99, 61.0, 61.005, 61.02):

                async def flush(at: float = at) -> None:
                    await anyio.sleep(began + at - anyio.current_time())
                    await b.flush()

                tasks.start_soon(flush)
        await anyio.sleep(100)
        assert b.store.active() == [run.run_id]
        assert caplog.text.count("deleted the run") == 1 and "cannot tell" not in caplog.text


# -- what travels inside ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_all_that_is_known_of_a_run_is_sent_with_its_creation() -> None:
    """Name, start, user, parent, first tags and tags that are set later: one request."""
    async with bench(ListStore()) as b:
        run = b.create_run({"own": "1", "mlflow.user": "ada"}, parent="f" * 32, run_name="name")
        b.set_tags(run, {"riding": "2"})
        await b.flush()
        assert b.store.names() == ["create"]
        stored = b.store.run(run.run_id)
        assert (stored.body["run_name"], stored.body["start_time"], stored.body["user_id"]) == ("name", 1, "ada")
        system = {TOKEN_TAG: run._token, PARENT_TAG: "f" * 32}
        assert stored.tags == system | {"own": "1", "mlflow.user": "ada", "riding": "2"}


@pytest.mark.anyio
async def test_a_run_without_a_name_or_a_user_leaves_both_to_the_server() -> None:
    """Neither is in the request."""
    async with bench(ListStore()) as b:
        run = b.create_run()
        await b.flush()
        assert set(b.store.run(run.run_id).body) == {"experiment_id", "start_time", "tags"}


OWN = {"good": "1", "bad": "2", "fine": "3"}


@pytest.mark.anyio
@pytest.mark.parametrize("own", [True, False], ids=["its own", "set later"])
async def test_a_tag_that_the_creation_is_refused_for_costs_only_itself(own: bool) -> None:
    """The run is created without its tags; they follow as entries of log batches, and the bad one is named."""
    async with bench(ListStore(refused_tag="bad")) as b:
        run = b.create_run(OWN if own else None)
        if not own:
            b.set_tags(run, OWN)
        report = await b.flush()
        assert [(failure.weight, failure.final) for failure in report.failures] == [(1, True)]
        assert b.store.run(run.run_id).tags == {TOKEN_TAG: run._token, "good": "1", "fine": "3"}
        assert len(b.store.runs) == 1
        counts = b.accumulator.counts()
        assert (counts["accepted"], counts["stored"], counts["failed"]) == (4, 3, 1)


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", DOUBTFUL, ids=lambda outcome: outcome.name)
@pytest.mark.parametrize("own", [True, False], ids=["its own", "set later"])
async def test_tags_that_were_left_out_are_stored_although_the_answer_was_lost(own: bool, outcome: Outcome) -> None:
    """The run is found by its token, without its tags: they are sent by a log-batch."""
    async with bench(ListStore([outcome], refused_tag="bad")) as b:
        run = b.create_run(OWN if own else None)
        if not own:
            b.set_tags(run, OWN)
        for _ in range(3):
            await b.flush()
        assert b.store.active() == [run.run_id]
        assert b.store.run(run.run_id).tags == {TOKEN_TAG: run._token, "good": "1", "fine": "3"}
        counts = b.accumulator.counts()
        assert (counts["accepted"], counts["stored"], counts["failed"]) == (4, 3, 1)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("no such experiment", code="RESOURCE_DOES_NOT_EXIST"),
        RejectedError("experiments want a number", code="INVALID_PARAMETER_VALUE"),
        RejectedError("deleted", scope=Scope.LANE),
        error_of(403, "PERMISSION_DENIED", "no"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_creation_that_is_refused_keeps_everything_queued(
    error: StoreError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tags and its final status too; the next flush stores all of it, once."""
    handle = ListStore._handle

    def refusing(store: ListStore, asked: Endpoint, data: dict[str, Any]) -> dict[str, Any]:
        if asked is CREATE_RUN:
            raise error
        return handle(store, asked, data)

    async with bench(ListStore()) as b:
        run = b.create_run({"own": "1"})
        child = b.create_run(parent=run)
        b.set_tags(run, {"riding": "2"})
        b.lane(run).push(record_of(STATUS, (), "FINISHED", 9))
        with monkeypatch.context() as patch:
            patch.setattr(ListStore, "_handle", refusing)
            report = await b.flush()
        assert (report.total, report.not_stored) == (3, 3)
        assert not any(failure.final for failure in report.failures)
        assert {failure.run for failure in report.failures} == {run, child}
        assert not (await b.flush()).failures
        assert b.store.active() == [run.run_id, child.run_id]
        assert b.store.run(run.run_id).tags == {TOKEN_TAG: run._token, "own": "1", "riding": "2"}
        assert b.store.calls[-1].endpoint in (CREATE_RUN, UPDATE_RUN)
        assert b.accumulator.counts()["stored"] == b.accumulator.counts()["accepted"] == 3
