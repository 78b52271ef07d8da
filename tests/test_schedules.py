"""Schedules: their values at the first, last and middle events, and what they refuse."""

from __future__ import annotations

import pickle
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune._targets import Threshold
from lightning_prune.schedules import (
    CallableSchedule,
    ConstantRateSchedule,
    CubicSchedule,
    EpochSchedule,
    ExponentialSchedule,
    LinearSchedule,
    OneShotSchedule,
    Schedule,
    as_schedule,
    planned_targets,
)


def test_epochs_written_out_come_back_in_order_and_in_plain_types() -> None:
    schedule = EpochSchedule({np.int64(4): np.float32(0.75), 2: 0, 3: Threshold(1e-3)})
    assert planned_targets(schedule, range(10)) == {2: 0.0, 3: Threshold(1e-3), 4: 0.75}
    assert [type(target) for target in schedule.targets.values()] == [float, Threshold, float]
    assert schedule.last_epoch == 4
    assert schedule(5) is None


def test_an_empty_mapping_is_a_schedule_without_events() -> None:
    assert planned_targets(as_schedule({}), range(10)) == {}
    assert as_schedule({}).last_epoch == -1  # over before the first epoch


def test_cubic_follows_zhu_and_gupta() -> None:
    schedule = CubicSchedule(
        0.9, start_epoch=2, end_epoch=10, every_n_epochs=2, initial_sparsity=0.1
    )
    for epoch in (2, 4, 6, 8, 10):
        expected = 0.9 + (0.1 - 0.9) * (1 - (epoch - 2) / 8) ** 3
        assert schedule(epoch) == pytest.approx(expected, abs=1e-12)
    assert [epoch for epoch in range(14) if schedule(epoch) is not None] == [2, 4, 6, 8, 10]
    assert schedule(10) == 0.9  # exactly


def test_linear_takes_equal_steps() -> None:
    planned = planned_targets(LinearSchedule(0.8, start_epoch=0, end_epoch=4), range(9))
    assert planned == pytest.approx({1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8})


def test_a_ramp_ends_at_its_end_also_between_two_regular_events() -> None:
    planned = planned_targets(CubicSchedule(0.5, 0, 5, every_n_epochs=3), range(9))
    assert list(planned) == [3, 5]
    assert planned[5] == 0.5


def test_a_ramp_of_one_epoch_is_one_shot() -> None:
    ramp, one_shot = LinearSchedule(0.5, 3, 3), OneShotSchedule(0.5, 3)
    assert planned_targets(ramp, range(9)) == planned_targets(one_shot, range(9)) == {3: 0.5}


def test_constant_rate_leaves_the_same_share_each_round() -> None:
    planned = planned_targets(ConstantRateSchedule(0.2, 4, 1, every_n_epochs=3), range(20))
    assert list(planned) == [1, 4, 7, 10]
    left = [1 - target for target in planned.values() if isinstance(target, float)]
    assert left == pytest.approx([0.8, 0.64, 0.512, 0.4096])


@given(
    kind=st.sampled_from([LinearSchedule, CubicSchedule]),
    start=st.integers(0, 20),
    length=st.integers(0, 20),
    every=st.integers(1, 7),
    ends=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
)
def test_ramps_never_decrease_nor_leave_their_range(kind, start, length, every, ends) -> None:
    schedule = kind(ends[1], start, start + length, every, ends[0])
    planned = planned_targets(schedule, range(start + length + 3))  # raises if one decreases
    assert all(ends[0] - 1e-12 <= target <= ends[1] + 1e-12 for target in planned.values())
    assert all(start <= epoch <= schedule.last_epoch for epoch in planned)


@pytest.mark.parametrize(
    ("make", "faults"),
    [
        (lambda: EpochSchedule({2: 1.0, -1: 0.5, 4: True}), ["epoch 2", "-1", "epoch 4", "True"]),
        (lambda: EpochSchedule({2: 50}), ["epoch 2", "50", "0.5"]),
        (lambda: EpochSchedule({2: 1}), ["epoch 2", "got 1"]),
        (lambda: EpochSchedule({2: -0.1, 3: float("nan")}), ["epoch 2", "epoch 3", "nan"]),
        (lambda: EpochSchedule({2: 0.8, 4: 0.5, 6: 0.7}), ["epoch 4", "epoch 6", "decrease"]),
        (lambda: EpochSchedule({"2": 0.5, 3.0: 0.5, True: 0.5}), ["'2'", "3.0", "True"]),
        (lambda: EpochSchedule({2: "half"}), ["epoch 2", "'half'"]),
        (lambda: OneShotSchedule(1.5, -2), ["target", "1.5", "epoch", "-2"]),
        (lambda: CubicSchedule(0.9, 5, 2, every_n_epochs=0), ["end_epoch", "every_n_epochs"]),
        (lambda: CubicSchedule(0.2, 0, 2, initial_sparsity=0.5), ["sparsity", "decrease"]),
        (lambda: LinearSchedule(Threshold(1.0), 0, 2), ["sparsity", "Threshold"]),
        (lambda: ConstantRateSchedule(0.0, 0, 1.5), ["rate", "rounds", "start_epoch"]),
    ],
)
def test_every_fault_is_in_one_message(make, faults) -> None:
    with pytest.raises(ValueError, match="schedule cannot be used") as caught:
        make()
    for fault in faults:
        assert fault in str(caught.value)


def test_decreasing_thresholds_are_allowed() -> None:
    schedule = EpochSchedule({1: Threshold(1e-2), 2: Threshold(1e-4)})
    assert schedule(2) == Threshold(1e-4)


@pytest.mark.parametrize("other", [0.5, None, "cubic", [0.5], CubicSchedule])
def test_what_is_no_schedule_is_refused(other) -> None:
    with pytest.raises(TypeError, match="Expected argument `schedule`"):
        as_schedule(other)


def test_a_callable_is_checked_when_it_is_called_and_before() -> None:
    schedule = as_schedule(lambda epoch: 1.5 if epoch == 3 else None)
    assert isinstance(schedule, CallableSchedule)
    assert schedule(2) is None
    with pytest.raises(ValueError, match=r"epoch 3.*1\.5"):
        schedule(3)
    with pytest.raises(ValueError, match=r"epoch 3.*1\.5"):
        planned_targets(schedule, range(5))


def test_a_schedule_of_the_users_own_class_is_checked_too() -> None:
    class Backwards(Schedule):
        def __call__(self, epoch: int) -> float:
            return 0.9 - 0.1 * epoch

    with pytest.raises(ValueError, match=r"epoch 1.*\n.*epoch 2"):
        planned_targets(as_schedule(Backwards()), range(3))


@pytest.mark.parametrize(
    "schedule",
    [
        EpochSchedule({2: 0.5, 4: Threshold(1e-6)}),
        OneShotSchedule(0.5, 3),
        LinearSchedule(0.9, 1, 5),
        CubicSchedule(0.9, 1, 5, 2, 0.1),
        ExponentialSchedule(0.9, 1, 5),
        ConstantRateSchedule(0.2, 3),
    ],
)
def test_schedules_print_themselves_and_survive_a_pickle(schedule) -> None:
    namespace = {type(schedule).__name__: type(schedule), "Threshold": Threshold}
    assert eval(repr(schedule), namespace) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_exponential_keeps_the_same_share_at_every_event_and_ends_exactly() -> None:
    schedule = ExponentialSchedule(0.9, start_epoch=2, end_epoch=14, every_n_epochs=3)
    planned = planned_targets(schedule, range(30))
    assert list(planned) == [5, 8, 11, 14]
    assert planned[14] == 0.9
    kept = [1.0, *(1 - target for target in planned.values())]
    factors = [after / before for before, after in pairwise(kept)]
    assert factors == pytest.approx([0.1**0.25] * 4)


def test_exponential_is_constant_rate_with_the_end_given() -> None:
    given_rate = planned_targets(ConstantRateSchedule(0.2, rounds=5, start_epoch=1), range(10))
    end = given_rate[5]
    given_end = planned_targets(ExponentialSchedule(end, start_epoch=0, end_epoch=5), range(10))
    assert given_end == pytest.approx(given_rate)


@given(
    st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 5), st.integers(0, 20), st.integers(1, 4)
)
def test_exponential_never_falls(first, last, start, length, every) -> None:
    first, last = sorted((first, last))
    schedule = ExponentialSchedule(last, start, start + length, every, first)
    planned = planned_targets(schedule, range(40))  # raises if a share falls
    assert planned.get(start + length, 0.0) == last


def test_a_table_says_what_each_event_does() -> None:
    schedule = EpochSchedule({1: 0.5, 2: 0.5, 3: 0.8, 12: Threshold(1e-6), 13: 0.9})
    lines = schedule.table(epochs=20).splitlines()
    assert [line.split(" | ")[0].strip() for line in lines] == ["epoch", "1", "2", "3", "12", "13"]
    assert [line.split(" | ")[1].strip() for line in lines[1:]] == [
        "50.0 %",
        "50.0 %",
        "80.0 %",
        "> 1e-06",
        "90.0 %",
    ]
    assert "50.0 % of all weights" in lines[1]
    assert "nothing new" in lines[2]
    assert "30.0 % of all weights, 60.0 % of those left" in lines[3]
    assert "scores" in lines[4]
    assert "threshold" in lines[5]


def test_a_table_of_a_run_that_is_too_short_says_so() -> None:
    schedule = OneShotSchedule(0.5, epoch=7)
    short = schedule.table(epochs=7)
    assert "No event in 7 epochs" in short
    assert "goes on to epoch 7" in short
    assert "goes on" not in schedule.table(epochs=8)


@pytest.mark.parametrize("epochs", [0, -1, 2.5, None])
def test_a_run_to_show_has_a_number_of_epochs(epochs) -> None:
    for show in (OneShotSchedule(0.5, 3).table, OneShotSchedule(0.5, 3).plot):
        with pytest.raises(ValueError, match="epochs: expected a whole number >= 1"):
            show(epochs)


def test_a_table_of_a_faulty_function_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch 1: shares must not decrease"):
        as_schedule(lambda epoch: 0.5 - 0.1 * epoch).table(3)


def test_a_plot_is_a_staircase_with_thresholds_marked() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure  # noqa: PLC0415

    ax = Figure().subplots()
    schedule = EpochSchedule({2: 0.5, 4: 0.8, 6: Threshold(1e-6)})
    assert schedule.plot(10, ax) is ax
    stairs, dots, line = ax.get_lines()
    assert stairs.get_drawstyle() == "steps-post"
    assert stairs.get_xydata().tolist() == [[0, 0], [2, 50], [4, 80], [10, 80]]
    assert dots.get_xydata().tolist() == [[2, 50], [4, 80]]
    assert list(line.get_xdata()) == [6, 6]
    assert "1e-06" in line.get_label()


def test_a_plot_makes_axes_of_its_own() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    ax = CubicSchedule(0.9, 1, 5).plot(8)
    assert ax.get_xlim() == (0, 8)
    plt.close(ax.figure)


def test_a_plot_without_matplotlib_names_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        OneShotSchedule(0.5, 3).plot(5)
