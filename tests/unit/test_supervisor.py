"""The supervisor's policy of restarts; what it does with real processes stands in `tests/faults/test_workers.py`."""

import pytest

from doorward_server.supervisor import RestartPolicy

POLICY = RestartPolicy(pauses=(0.0, 1.0, 5.0))


@pytest.mark.parametrize(
    ("failures", "pause", "enough"),
    [
        pytest.param(1, 0.0, False, id="the first failure: at once"),
        pytest.param(2, 1.0, False, id="the second"),
        pytest.param(3, 5.0, False, id="the last pause"),
        pytest.param(4, 5.0, True, id="one more than there are pauses"),
        pytest.param(1000, 5.0, True, id="for ever"),
    ],
)
def test_pauses_grow_to_an_end(failures: int, pause: float, enough: bool) -> None:
    assert (POLICY.pause(failures), POLICY.has_had_enough(failures)) == (pause, enough)


def test_the_usual_pauses_only_grow() -> None:
    pauses = RestartPolicy().pauses
    assert list(pauses) == sorted(set(pauses))
    assert pauses[0] == 0  # a worker that crashed once is missed at once
