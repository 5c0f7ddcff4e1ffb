"""The list of jobs: what is accepted is kept, merged and ended exactly once, whoever writes beside it; and labels."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.database import Database, Transaction
from celestial_backend.errors import BusyError, StateError
from celestial_backend.jobs import ledger as ledger_module
from celestial_backend.jobs.ledger import (
    ENDED_MAX,
    FAILED,
    KEPT,
    LEASE_S,
    MERGED,
    PUBLISHED,
    RUNNING,
    STATES,
    WAITING,
    WAITING_MAX,
    Ending,
    Job,
    Known,
    Ledger,
)
from celestial_backend.models.manifest import Manifest
from celestial_backend.services import build
from celestial_backend.settings import Settings

BETTER, WORSE = Ending(PUBLISHED, "better", Manifest(tag="a:b")), Ending(KEPT, "worse")


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return replace(Settings.from_environ({"MODEL_DIR": str(tmp_path / "state")}), database_url=database_url)


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger(Database(settings))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock by which leases are told on by so many seconds, or back."""
    moved = 0.0

    def move(seconds: float) -> None:
        nonlocal moved
        moved += seconds

    for owner in (Database, Transaction):
        monkeypatch.setattr(owner, "now", lambda self, now=owner.now: now(self) + moved)
    return move


def begun(ledger: Ledger, project: str = "3", worker: str = "one") -> Job:
    """The job of a project, which runs from now on."""
    job = ledger.start(worker, project)
    assert job is not None
    return job


def now(ledger: Ledger, job: Job) -> Job:
    """A job as it stands by now."""
    found = ledger.job(job.id)
    assert found is not None
    return found


def known(ledger: Ledger, project: str = "3") -> Known:
    """What is known of a project, but for the moment of its last event."""
    found = ledger.known(project)
    assert found is not None
    return replace(found, event_at=None)


def test_a_request_waits_and_the_next_ones_are_merged_into_it(ledger: Ledger) -> None:
    """Pressing the button three times trains once; another project has its own job."""
    first, second, third = (ledger.request("3") for _ in range(3))
    assert first.id == second.id == third.id
    assert (first.state, third.requests) == (WAITING, 3)
    assert ledger.request("4").id != first.id
    assert [job.project for job in ledger.jobs()] == ["4", "3"]


def test_a_request_while_one_runs_waits_for_its_turn(ledger: Ledger) -> None:
    """Labels that came after a training began are learned by the next one."""
    first = ledger.request("3")
    started = begun(ledger)
    assert (started.id, started.state, started.attempts, started.worker) == (first.id, RUNNING, 1, "one")
    second = ledger.request("3")
    assert second.id != first.id
    assert ledger.start("two") is None, "one training at a time for a project"
    assert ledger.end(started, BETTER) == BETTER
    assert begun(ledger).id == second.id


def test_a_job_ends_once(ledger: Ledger) -> None:
    """Whoever is second to say how a job ended is told so, and changes nothing."""
    waiting = ledger.request("3")
    assert ledger.end(waiting, Ending(FAILED, "it never ran")) is None
    job, manifest = begun(ledger), Manifest(tag="a:b", tried=None)
    assert ledger.end(job, replace(WORSE, manifest=manifest)) is not None
    assert ledger.end(job, BETTER) is None
    assert not ledger.give_back(job)
    ended = now(ledger, job)
    assert (ended.state, ended.reason, ended.ended) == (KEPT, "worse", True)
    assert ended.outcome == {"tag": "a:b", "tried": None}
    assert (ended.manifest, ended.gone, ended.merged_into) == (manifest, False, None)
    assert ended.requested_at <= (ended.started_at or 0) <= (ended.ended_at or 0) <= time.time()


def test_a_project_that_is_gone_is_told_with_the_end(ledger: Ledger) -> None:
    """So that whoever has run the training can forget the project."""
    ledger.request("3")
    ledger.end(begun(ledger), Ending(FAILED, "Label Studio has no project 3.", gone=True))
    (ended,) = ledger.jobs("3")
    assert (ended.gone, ended.outcome, ended.manifest) == (True, {"gone": True}, Manifest())


def test_progress_is_of_running_jobs_alone(ledger: Ledger) -> None:
    """Where a training is can be read while it runs, and starts anew with the next attempt."""
    ledger.request("3")
    job = begun(ledger)
    ledger.progress(job, stage="reading pictures", pictures=2)
    assert now(ledger, job).progress == {"stage": "reading pictures", "pictures": 2}
    ledger.give_back(job)
    ledger.progress(job, stage="saving")
    again = begun(ledger)
    assert (again.id, again.attempts, again.progress) == (job.id, 2, {})


def test_an_interrupted_job_waits_again(ledger: Ledger) -> None:
    """A death counts as an attempt, a stop that was asked for does not."""
    ledger.request("3")
    job = begun(ledger)
    assert ledger.give_back(job, begun=False)
    waiting = now(ledger, job)
    assert (waiting.state, waiting.attempts, waiting.started_at) == (WAITING, 0, None)
    assert not ledger.give_back(job), "it does not run"
    assert now(ledger, job) == waiting


def test_an_interrupted_job_is_merged_into_one_that_waits(ledger: Ledger) -> None:
    """No request is lost: the later job stands for both, and for the deaths so far."""
    ledger.request("3")
    first = begun(ledger)
    second = ledger.request("3")
    ledger.give_back(first)
    merged, waiting = now(ledger, first), now(ledger, second)
    assert ledger.doing(first.id) == ledger.doing(second.id) == waiting
    assert (merged.state, merged.merged_into, merged.manifest) == (MERGED, second.id, Manifest())
    assert second.id in merged.reason
    assert (waiting.requests, waiting.attempts) == (2, 1)


def fifth(known: Known) -> bool:
    """A rule by which five labels want a look."""
    return known.labels >= 5


def test_labels_are_counted_for_each_project(ledger: Ledger) -> None:
    """The fifth label of one project wants a look, however many came at once."""
    for project in ("3", "4"):
        ledger.know(project)
        ledger.look(project)  # a new one wants the first
    assert not ledger.note_labels("3", 4, fifth)
    assert not ledger.note_labels("4", 4, fifth)
    assert ledger.looks(wanted=True) == []
    assert ledger.note_labels("3", 3, fifth)
    assert ledger.looks(wanted=True) == ["3"]
    assert (known(ledger, "3").labels, known(ledger, "4").labels) == (7, 4)


def test_a_training_sets_the_count_back(ledger: Ledger) -> None:
    """Labels that a training will read do not bring about another one; what the last one found is of no use."""
    ledger.note_labels("3", 4, fifth)
    ledger.trained("3", 20, "2026-11-23T01:02:03Z")
    ledger.request("3")
    assert (known(ledger).labels, known(ledger).trained_labels) == (4, 20)
    begun(ledger)
    assert known(ledger) == Known("3")
    ledger.trained("3", 24, "2026-11-23T02:02:03Z")
    assert (known(ledger).trained_labels, known(ledger).trained_at) == (24, "2026-11-23T02:02:03Z")


def test_a_look_is_wanted_once(ledger: Ledger) -> None:
    """Many events before it are one look; one that comes after it has begun is the next."""
    for _ in range(3):
        ledger.note_labels("3", 9, fifth)
    begun = ledger.look("3")
    assert begun is not None
    assert (begun.labels, ledger.looks(wanted=True)) == (27, [])
    ledger.note_labels("3", 1, fifth)
    ledger.looked("3", labels=9, missing="Two more.", brought="")
    assert ledger.looks(wanted=True) == ["3"]
    assert known(ledger) == Known("3", 9, missing="Two more.")
    assert ledger.look("4") is None, "it is not known"


def test_who_was_looked_at_longest_ago_comes_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each has its turn where there is no time for all."""
    for moment, project in enumerate(("3", "4", "5")):
        ledger.know(project)
        monkeypatch.setattr(time, "time", lambda moment=moment: 100.0 - moment)
        ledger.look(project)
    assert ledger.looks(wanted=False) == ["5", "4", "3"]
    assert ledger.looks(wanted=True) == []


def test_that_somebody_asked_is_remembered(ledger: Ledger) -> None:
    """With it a model that was brought may be replaced; a training that comes by itself changes nothing."""
    ledger.know("3")
    ledger.looked("3", labels=0, missing="", brought="It was brought.")
    ledger.request("3")
    assert known(ledger).brought == "It was brought."
    assert not known(ledger).pressed
    ledger.request("3", pressed=True)
    ledger.request("3")
    assert (known(ledger).pressed, known(ledger).brought) == (True, "")


def test_projects_that_do_not_train_by_themselves(ledger: Ledger) -> None:
    """By their number, with the reason; not while a training waits or runs, and not where nobody has looked."""
    for project in ("12", "3", "4", "5", "6"):
        ledger.know(project)
    ledger.looked("12", labels=1, missing="Two more.", brought="")
    ledger.looked("3", labels=1, missing="", brought="It was brought.")
    ledger.looked("4", labels=1, missing="", brought="")
    ledger.looked("5", labels=1, missing="Three more.", brought="")
    ledger.request("5")
    assert [(each.project, each.hindrance) for each in ledger.hindered()] == [
        ("3", "It was brought."),
        ("12", "Two more."),
    ]
    assert [each.project for each in ledger.hindered("12")] == ["12"]
    assert [each.project for each in ledger.hindered(limit=1)] == ["3"]
    ledger.end(begun(ledger, "5"), Ending(FAILED, "too few"))
    assert [each.project for each in ledger.hindered()] == ["3", "5", "12"]


def test_projects_and_what_was_read_of_them(ledger: Ledger) -> None:
    """A project is known from its first sign on; the newest label read is remembered."""
    ledger.know("3")
    ledger.read_until("4", "2026-11-23T01:02:03Z")
    ledger.know("4")
    assert ledger.projects() == {"3": None, "4": "2026-11-23T01:02:03Z"}


def test_many_at_once_make_one_job(ledger: Ledger) -> None:
    """Forty requests from eight threads and as many connections stand in one waiting job."""
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.extend(ledger.request("3").id for _ in range(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40
    assert len(set(seen)) == 1
    assert ledger.jobs()[0].requests == 40


def test_jobs_can_be_narrowed(ledger: Ledger) -> None:
    """By project, by state, and to the newest few."""
    for project in ("3", "4", "5"):
        ledger.request(project)
    begun(ledger, "4")
    assert [job.project for job in ledger.jobs("4")] == ["4"]
    assert [job.project for job in ledger.jobs(states=(WAITING,))] == ["5", "3"]
    assert [job.project for job in ledger.jobs(limit=1)] == ["5"]


def test_the_newest_job_is_the_last_that_was_asked_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock was moved back in between."""
    jobs, real = [], time.time
    for hours in (0, 1, 3):
        monkeypatch.setattr(time, "time", lambda back=hours * 3600: real() - back)
        jobs.append(ledger.request("3").id)
        ledger.end(begun(ledger), WORSE)
    assert [job.id for job in ledger.jobs("3")] == jobs[::-1]


def ended(ledger: Ledger, project: str, state: str = KEPT) -> str:
    """A job that has been run and has ended."""
    ledger.request(project)
    job = begun(ledger, project)
    ledger.end(job, Ending(state, "as it was"))
    return job.id


def test_so_many_projects_wait_and_no_more(ledger: Ledger) -> None:
    """One more is refused with a sentence, and nothing is written; those that wait take every request."""
    for number in range(1, WAITING_MAX + 1):
        ledger.request(str(number))
    with pytest.raises(BusyError, match=f"^{WAITING_MAX} projects wait for a training.*celestial_backend jobs"):
        ledger.request("1000")
    assert (len(ledger.jobs()), ledger.knows("1000")) == (WAITING_MAX, False)
    assert ledger.request("7").requests == 2
    begun(ledger, "7")
    assert ledger.request("1000").state == WAITING
    with pytest.raises(BusyError):
        ledger.request("7")


def test_the_oldest_jobs_that_have_ended_go(ledger: Ledger) -> None:
    """The newest of a project stay, and all of another one; how many there were is still known."""
    other = ended(ledger, "4", FAILED)
    jobs = [ended(ledger, "3") for _ in range(ENDED_MAX + 7)]
    assert [job.id for job in ledger.jobs("3")] == jobs[: -ENDED_MAX - 1 : -1]
    assert [job.id for job in ledger.jobs("4")] == [other]
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {KEPT: ENDED_MAX + 7, FAILED: 1}


def test_the_jobs_of_many_projects_are_bounded_together(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits and what runs stays, however old it is, and so does the job that has ended last."""
    monkeypatch.setattr(ledger_module, "ENDED_MAX_OF_ALL", 5)
    ledger.request("1")
    oldest, waiting = begun(ledger, "1"), ledger.request("2")
    jobs = [ended(ledger, str(number)) for number in range(3, 15)]
    assert {job.id for job in ledger.jobs()} == {oldest.id, waiting.id, *jobs[-5:]}
    ledger.end(oldest, BETTER)
    assert now(ledger, oldest).state == PUBLISHED, "whoever waits for its end sees it"
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {KEPT: 12, PUBLISHED: 1, WAITING: 1}


def test_so_many_projects_are_known_and_no_more(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond are not written down, and their trainings run all the same."""
    monkeypatch.setattr(ledger_module, "KNOWN_MAX", 2)
    assert [ledger.know(project) for project in ("1", "2", "3", "1")] == [True, True, False, True]
    assert not ledger.note_labels("4", 9, fifth)
    ledger.read_until("4", "2026-11-23T01:02:03Z")
    assert list(ledger.projects()) == ["1", "2"]
    ended(ledger, "5")
    assert (ledger.knows("5"), ledger.knows("4")) == (True, False), "a job is known too"
    ledger.forget("1")
    assert ledger.know("3")
    assert list(ledger.projects()) == ["2", "3"]


def test_an_event_is_noted_for_a_project_that_is_known(ledger: Ledger) -> None:
    """And has its labels looked at, if it may have brought some of which nothing else tells."""
    assert not ledger.note_event("3", look=True)
    ledger.know("3")
    ledger.look("3")
    assert ledger.note_event("3", look=False)
    assert ledger.looks(wanted=True) == []
    assert ledger.note_event("3", look=True)
    assert ledger.looks(wanted=True) == ["3"]
    found = ledger.known("3")
    assert found is not None
    assert 0 <= time.time() - (found.event_at or 0) < 60


# Leases


def test_who_shows_life_keeps_his_job(ledger: Ledger, later: Callable[[float], None]) -> None:
    """However long a training takes; to be taken for lost it must be lost still when that is written."""
    ledger.request("3")
    job = begun(ledger)
    for _ in range(3):
        later(LEASE_S - 1)
        assert ledger.lost() == []
        assert ledger.show_life("one", [job]) == []
    assert not ledger.give_back(job, lost=True)
    assert ledger.end(job, Ending(FAILED, "lost"), lost=True) is None
    assert now(ledger, job) == job
    assert ledger.end(job, BETTER) == BETTER


@pytest.mark.parametrize("seconds", [LEASE_S + 1, -3 * LEASE_S], ids=["run out", "of a clock that was moved back"])
def test_a_lease_that_does_not_last_makes_the_job_lost(
    ledger: Ledger, later: Callable[[float], None], seconds: float
) -> None:
    """One that would last far into the future is of a machine that was started anew since."""
    ledger.request("3")
    job = begun(ledger)
    later(seconds)
    assert ledger.lost() == [job]
    assert ledger.give_back(job, lost=True)
    assert (now(ledger, job).state, now(ledger, job).attempts, ledger.lost()) == (WAITING, 1, [])


def test_a_worker_that_comes_back_late_changes_nothing(ledger: Ledger, later: Callable[[float], None]) -> None:
    """Another one runs its job by then, under a token of its own; it is told so at its next sign of life."""
    ledger.request("3")
    late = begun(ledger)
    later(LEASE_S + 1)
    ledger.give_back(late, lost=True)
    assert ledger.show_life("one", [late]) == [late], "also before somebody else has begun it"
    job = begun(ledger, worker="two")
    assert (job.id, job.attempts) == (late.id, 2)
    assert ledger.end(late, BETTER) is None
    assert not ledger.give_back(late)
    ledger.progress(late, stage="saving")
    assert ledger.show_life("one", [late]) == [late]
    assert now(ledger, job) == job
    assert ledger.show_life("two", [job]) == []
    assert ledger.end(job, WORSE) == WORSE
    assert ledger.show_life("two", [job]) == [job], "it has ended"


def test_a_training_that_is_lost_again_and_again_fails(settings: Settings, later: Callable[[float], None]) -> None:
    """What its worker was killed by twice may be the training itself."""
    states = []
    for worker in ("one", "two", "three"):
        jobs = build(settings).jobs
        if not states:
            jobs.ledger.request("3")
        begun(jobs.ledger, worker=worker)
        later(LEASE_S + 1)
        jobs.look_after()
        (job,) = jobs.ledger.jobs("3")
        states.append(job.state)
    assert states == [WAITING, WAITING, FAILED]
    assert job.reason == "Its worker was ended while it ran. It was begun 3 times. The worker's log tells more."


def test_workers_are_those_that_show_life(ledger: Ledger, later: Callable[[float], None]) -> None:
    """Until they leave, or are silent for as long as a lease lasts."""
    assert ledger.workers() == 0
    for worker in ("one", "two", "one"):
        ledger.show_life(worker)
    assert ledger.workers() == 2
    ledger.leave("one")
    assert ledger.workers() == 1
    later(LEASE_S + 1)
    assert ledger.workers() == 0


def test_what_goes_with_an_end_is_written_with_it_or_not_at_all(ledger: Ledger) -> None:
    """A model becomes live as its job ends; where either cannot be written, neither is."""
    ledger.request("3")
    job = begun(ledger)

    def publish(work: Transaction) -> Ending:
        work.run("INSERT INTO live (project, tag, job) VALUES ('3', 'a:b', 'c')")
        return BETTER

    def fail(work: Transaction) -> Ending:
        publish(work)
        raise ValueError("Oh.")

    def live() -> int:
        return len(ledger._database.rows("SELECT * FROM live"))

    with pytest.raises(ValueError, match="Oh"):
        ledger.end(job, WORSE, fail)
    assert (now(ledger, job), live()) == (job, 0)
    assert ledger.end(job, WORSE, publish) == BETTER
    assert (now(ledger, job).state, live()) == (PUBLISHED, 1)
    assert ledger.end(job, WORSE, publish) is None, "and nothing was tried"


def test_label_studio_is_told_of_what_was_published_once(ledger: Ledger, later: Callable[[float], None]) -> None:
    """By the training itself; where it was killed before, by whoever finds it after a while."""
    kept = ended(ledger, "4")
    ledger.request("3")
    job = begun(ledger)
    ledger.end(job, BETTER)
    assert ledger.untold() == []
    later(LEASE_S + 1)
    assert [each.id for each in ledger.untold()] == [job.id]
    ledger.told(job, "Label Studio was told.")
    ledger.told(job, "Label Studio was told.")
    assert ledger.untold() == []
    assert now(ledger, job).reason == "better Label Studio was told."
    assert [each.reason for each in ledger.jobs("4")] == ["as it was"], kept


# Many at once


def test_one_of_two_looks(ledger: Ledger, later: Callable[[float], None]) -> None:
    """At the labels of a project; the next one as soon as it has ended, or is taken for dead."""
    ledger.know("3")
    both = threading.Barrier(2)

    def look(_: int) -> Known | None:
        both.wait(10)
        return ledger.look("3")

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(look, range(2)))
    assert sorted(each is None for each in found) == [False, True]
    assert ledger.look("3") is None
    ledger.let_look("3")
    assert ledger.look("3") is not None
    later(LEASE_S + 1)
    assert ledger.look("3") is not None


def test_each_job_of_many_is_run_once(settings: Settings) -> None:
    """Three hundred requests of sixty projects by eight threads, and four workers; what ran is counted."""
    asking, ran, running = 8, [], set()
    web, *workers = [Ledger(Database(settings), wait_s=60) for _ in range(5)]
    asked = [str(number % 60 + 1) for number in range(300)]
    random.Random(1).shuffle(asked)  # noqa: S311 - an order, not a secret
    over = threading.Event()

    def ask(number: int) -> None:
        for project in asked[number::asking]:
            web.request(project, pressed=True)

    def work(worker: Ledger) -> None:
        while True:
            last = over.is_set()
            job = worker.start("worker")
            if job is not None:
                assert job.project not in running
                running.add(job.project)
                ran.append(job.id)
                running.remove(job.project)
                assert worker.end(job, WORSE) == WORSE
            elif last and not worker.jobs(states=(WAITING,)):
                return

    with ThreadPoolExecutor(asking + len(workers)) as threads:
        working = [threads.submit(work, each) for each in workers]
        try:
            for each in [threads.submit(ask, number) for number in range(asking)]:
                each.result()
        finally:
            over.set()
        for each in working:
            each.result()
    jobs = web.jobs()
    assert sorted(ran) == sorted(job.id for job in jobs)
    assert {(job.state, job.attempts) for job in jobs} == {(KEPT, 1)}
    assert sum(job.requests for job in jobs) == len(asked)


READS: dict[str, Callable[[Ledger], Any]] = {
    "looks": lambda ledger: ledger.looks(wanted=True),
    "known": lambda ledger: ledger.known("3"),
    "hindered": lambda ledger: ledger.hindered(),
    "job": lambda ledger: ledger.job("0"),
    "jobs": lambda ledger: [job.project for job in ledger.jobs()],
    "counts": lambda ledger: ledger.counts()[WAITING],
    "knows": lambda ledger: ledger.knows("4"),
    "projects": lambda ledger: list(ledger.projects()),
    "lost": lambda ledger: ledger.lost(),
    "workers": lambda ledger: ledger.workers(),
}


def test_the_list_is_read_while_another_writes(ledger: Ledger, settings: Settings) -> None:
    """As it was before; only the end of a transaction is waited for. Who would write is refused within a second."""
    ledger.request("3")
    before = {name: read(ledger) for name, read in READS.items()}
    with Database(settings).writing("3") as other:
        other.run("INSERT INTO projects (project) VALUES ('4')")
        other.run("UPDATE work SET state = 'failed', project = '4'")
        assert {name: read(ledger) for name, read in READS.items()} == before
        started = time.monotonic()
        with pytest.raises(StateError, match=r"^The database.* cannot be written \(.*\)\. Nothing was accepted\. "):
            ledger.request("3")
        assert time.monotonic() - started < 4  # Label Studio gives a webhook one second


def test_a_job_of_a_project_that_began_anew_has_lost_its_lease(ledger: Ledger, later: Callable[[float], None]) -> None:
    """It may have read the other project's labels: it publishes nothing, and is begun again."""
    assert not ledger.confirm("3", "1")
    ledger.request("3")
    job = begun(ledger)
    assert not ledger.confirm("3", "1")
    assert ledger.confirm("3", "2", job.id), "the job itself has read nothing yet"
    assert ledger.show_life("one", [job]) == []
    assert ledger.confirm("3", "3")
    assert ledger.show_life("one", [job]) == [job]
    assert ledger.end(job, BETTER, publishing_of_nothing) is None
    later(LEASE_S + 1)
    (lost,) = ledger.lost()
    assert ledger.give_back(lost, lost=True)
    assert begun(ledger).attempts == 2


def publishing_of_nothing(_: Transaction) -> Ending:
    raise AssertionError("a model of another project's labels")
