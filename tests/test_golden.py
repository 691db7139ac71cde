"""Golden values: a trajectory of every task, a plan of every method, a model's output.

`python tests/golden/regenerate.py` makes them anew.
"""

from pathlib import Path

import mujoco
import numpy as np
import pytest
from golden import regenerate


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(regenerate.FOLDER / f"{name}.npz") as file:
        return dict(file)


PINNED = f"mujoco=={mujoco.__version__}" in (Path(__file__).parent.parent / "constraints.txt").read_text().split()
TOLERANCES = {"tcp": 5e-5, "object": 5e-5, "quat": 2e-4, "proprio": 2e-4, "goal_proprio": 1e-5}  # m, rad


@pytest.mark.parametrize("task", regenerate.TASKS)
def test_trajectory(task):
    """Changing the last bits of a start, as another processor may, moves an object at rest by up to 2e-5 m."""
    want = stored(task)
    have = regenerate.trajectory(task, want["actions"])
    for name, tolerance in TOLERANCES.items():
        tolerance *= 1 if PINNED else 20  # contacts of another MuJoCo move an object by up to a millimetre
        np.testing.assert_allclose(have[name], want[name], rtol=0, atol=tolerance, err_msg=name)
    error = np.abs(have["pictures"].astype(int) - want["pictures"])
    assert error.mean() < 1.5 and (error > 16).mean() < 0.01, "drivers differ in edges and the last bits, not in this"


def test_trajectories_do_something():
    """The object is carried in all tasks but Reach, so that a change of contacts shows."""
    moved = {task: np.ptp(stored(task)["object"], axis=0).max() for task in regenerate.TASKS}
    assert moved.pop("reach") < 1e-3 and min(moved.values()) > 0.02, moved


def test_plans():
    want, have = stored("plans"), regenerate.plans()
    for name in want:
        np.testing.assert_allclose(have[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_model_output():
    """Within what bfloat16 leaves of it: processors that lack it compute in float32."""
    want, have = stored("imagined"), regenerate.imagined()
    for name in regenerate.LEARNED:
        error = np.abs(have[name] - want[name])
        assert error.max() < 0.15 * want[name].std() and error.mean() < 0.02 * want[name].std(), name
