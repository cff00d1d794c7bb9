"""Turns, medians and ratios; no assertion on how long anything takes."""

import pytest
import torch

from pso import timing


def test_variants_take_turns_also_while_they_warm_up():
    calls = []
    found = timing.abab({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu", warmups=3)
    assert calls == ["a", "b"] * 5
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    assert all(second >= 0 for seconds in found.values() for second in seconds)


def test_there_are_three_warm_ups_unless_said_otherwise():
    calls = []
    timing.abab({"a": lambda: calls.append("a")}, 1, "cpu")
    assert len(calls) == 4


def test_the_seconds_are_those_of_the_call(monkeypatch):
    now = iter([10.0, 12.5, 20.0, 20.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    assert timing.abab({"a": lambda: None, "b": lambda: None}, 1, "cpu", warmups=0) == {"a": [2.5], "b": [0.5]}


def test_a_failing_call_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        timing.abab({"a": lambda: 1 / 0}, 1, "cpu")


def test_median_and_spread_are_not_moved_by_one_slow_turn():
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.0, "mad": 1.0, "n": 5}
    assert timing.summary([2.0]) == {"median": 2.0, "mad": 0.0, "n": 1}


def test_a_ratio_is_taken_within_a_round():
    """Medians of their own would say 1.0 here: the machine is three times as slow in two of the rounds."""
    assert timing.ratio([2.0, 6.0, 6.0], [1.0, 3.0, 3.0]) == 2.0
    assert timing.ratio([1.0, 10.0, 30.0], [10.0, 5.0, 10.0]) == 2.0  # of medians it would be 1.0
    with pytest.raises(ValueError):
        timing.ratio([1.0], [1.0, 2.0])


def test_a_cpu_has_no_peak_and_no_clock():
    with timing.peak("cpu") as found:
        torch.zeros(10)
    assert found.gib is None and timing.clocks("cpu") is None
