import pytest

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.critic_schedule import CriticSchedule


def run(schedule, num_critic_steps, accuracy):
    """Return after how many critic steps each generator step came."""
    due = []
    for step in range(1, num_critic_steps + 1):
        if schedule.after_critic_step():
            schedule.before_generator_step(accuracy)
            due.append(step)
    return due


def test_one_rung_is_a_fixed_number_of_critic_steps():
    assert run(CriticSchedule(ladder=(3,), grace=1), 10, accuracy=0.0) == [3, 6, 9]


def test_a_critic_that_tells_fakes_stays_on_its_rung():
    schedule = CriticSchedule(ladder=(1, 2, 5), grace=2)
    assert run(schedule, 5, accuracy=0.9) == [1, 2, 3, 4, 5]
    assert schedule.critic_steps == 1


def test_a_critic_that_does_not_climbs_after_its_grace_on_each_rung():
    schedule = CriticSchedule(ladder=(1, 2, 5), grace=2, threshold=0.6)
    # Two generator steps a rung, then the next rung; the last one is kept.
    assert run(schedule, 26, accuracy=0.5) == [1, 2, 4, 6, 11, 16, 21, 26]
    assert schedule.critic_steps == 5


@pytest.mark.parametrize(
    ("accuracies", "decay", "expected"),
    [([0.4], 0.9, 0.4), ([0.4, 0.9], 0.9, 0.45), ([1.0, 0.0, 0.0], 0.5, 0.25)],
)
def test_the_average_starts_at_the_first_accuracy(accuracies, decay, expected):
    schedule = CriticSchedule(decay=decay)
    for accuracy in accuracies:
        schedule.before_generator_step(accuracy)
    assert schedule.fake_accuracy == pytest.approx(expected)


def test_the_average_is_not_reset_on_a_new_rung():
    schedule = CriticSchedule(ladder=(1, 2, 5), grace=1, decay=0.99, threshold=0.6)
    schedule.before_generator_step(0.0)
    assert schedule.critic_steps == 2
    schedule.before_generator_step(1.0)
    assert schedule.fake_accuracy == pytest.approx(0.01)
    assert schedule.critic_steps == 5


def test_the_state_survives_a_checkpoint():
    schedule, other = CriticSchedule(grace=2), CriticSchedule(grace=2)
    run(schedule, 7, accuracy=0.5)
    other.load_state_dict(schedule.state_dict())
    assert run(schedule, 30, accuracy=0.5) == run(other, 30, accuracy=0.5)


@pytest.mark.parametrize(
    "options",
    [{"ladder": ()}, {"ladder": (0, 1)}, {"ladder": (2, 2)}, {"threshold": 1.1}, {"grace": 0}, {"decay": 1.0}],
)
def test_bad_schedules_are_refused(options):
    with pytest.raises(ConfigurationError, match="Expected"):
        CriticSchedule(**options)
