"""Medians of turns: what is slower is found slower, by how much, whatever the machine does."""

from __future__ import annotations

import gc
import time

import pytest

from lightning_prune.removal import latency
from lightning_prune.removal.latency import Latency, interleaved


class Clock:
    """A clock that only the calls move."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def call(self, *seconds, log=None, name=""):
        steps = iter(seconds)
        last = seconds[-1]

        def run() -> None:
            if log is not None:
                log.append(name)
            self.now += next(steps, last)

        return run


def test_seconds_of_one_call_in_turned_order(monkeypatch) -> None:
    clock, log = Clock(monkeypatch), []
    calls = {n: clock.call(s, log=log, name=n) for n, s in (("a", 0.5), ("b", 0.25))}
    found = interleaved(calls, rounds=4, warm_up=1)
    assert found["a"].seconds == (0.5,) * 4
    assert found["b"].seconds == (0.25,) * 4
    assert log == ["a", "b", *"ab", *"ba", *"ab", *"ba"]


def test_short_calls_are_repeated(monkeypatch) -> None:
    clock, log = Clock(monkeypatch), []
    found = interleaved({"a": clock.call(1e-5, log=log)}, rounds=2, warm_up=2)
    assert found["a"].median == pytest.approx(1e-5)
    assert len(log) in (2 + 2 * 100, 2 + 2 * 101)


def test_a_machine_that_slows_down_slows_both(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    slowing = [1.0 + i for i in range(6)]
    a = clock.call(1.0, *slowing)
    b = clock.call(0.5, *[0.5 * s for s in slowing])
    found = interleaved({"a": a, "b": b}, rounds=6, warm_up=1)
    assert found["b"].ratio(found["a"]) == 0.5


def test_one_bad_round_changes_nothing() -> None:
    assert Latency((1.0, 1.0, 1.0, 1.0, 99.0)).median == 1.0
    assert Latency((1.0, 1.0, 1.0, 1.0, 99.0)).quartiles == (1.0, 1.0)
    assert Latency((2.0,)).quartiles == (2.0, 2.0)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        Latency((1.0,)).ratio(Latency((1.0, 2.0)))


def test_the_real_clock() -> None:
    calls = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}
    found = interleaved(calls, rounds=5, warm_up=1)
    assert found["long"].ratio(found["short"]) > 1.5
    assert found["short"].median >= 0.001


def test_the_garbage_collector_runs_again_after_an_error() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleaved({"a": fail})
    assert gc.isenabled()


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"warm_up": 0}])
def test_wrong_arguments(arguments) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({}, **arguments)
