"""Schedules: their values at the first, last and middle events, and what they refuse."""

from __future__ import annotations

import pickle

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
    assert as_schedule({}).last_epoch is None


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
    EpochSchedule({1: Threshold(1e-2), 2: Threshold(1e-4)})


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
        ConstantRateSchedule(0.2, 3),
    ],
)
def test_schedules_print_themselves_and_survive_a_pickle(schedule) -> None:
    namespace = {type(schedule).__name__: type(schedule), "Threshold": Threshold}
    assert eval(repr(schedule), namespace) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
