"""The contract of an environment, as functions that raise AssertionError with a line that says what is broken.

Gymnasium's own `gymnasium.utils.env_checker.check_env` comes first; these add what a planner on top relies on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from envs.base import EnvConfig, PandaEnv
from envs.tasks import HOLD_STEPS


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Return where two nested values differ, to the bit, or None."""
    if is_dataclass(a) and type(a) is type(b):
        pairs = [(f".{f.name}", getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        if set(a) != set(b):
            return f"{path}: keys {sorted(a)} and {sorted(b)}"
        pairs = [(f"[{key!r}]", a[key], b[key]) for key in a]
    elif isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        if len(a) != len(b):
            return f"{path}: lengths {len(a)} and {len(b)}"
        pairs = [(f"[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        same = np.array_equal(np.asarray(a), np.asarray(b)) and np.asarray(a).dtype == np.asarray(b).dtype
        return None if same else f"{path}: {a} and {b}"
    found = (difference(x, y, path + name) for name, x, y in pairs)
    return next((d for d in found if d is not None), None)


def _actions(env: PandaEnv, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, env.config.action_dim)).astype(np.float32)


def _same(a: Any, b: Any, what: str) -> None:
    found = difference(a, b)
    assert found is None, f"{what}{found}"


def check_determinism(one: PandaEnv, other: PandaEnv, seed: int = 0, steps: int = 50) -> None:
    """Two instances with the same seed and actions give the same bits: observations, goals, infos.

    Run it with `one` used before and `other` fresh, and it also shows that reset leaves nothing behind.
    """
    _same(one.reset(seed=seed), other.reset(seed=seed), "reset ")
    for i, action in enumerate(_actions(one, steps, seed)):
        _same(one.step(action), other.step(action), f"step {i} ")


def check_state(env: PandaEnv, seed: int = 0, steps: int = 10) -> None:
    """set_state(get_state()) is exact: at once, and for all that follows."""
    env.reset(seed=seed)
    actions = _actions(env, 2 * steps, seed)
    for action in actions[:steps]:
        env.step(action)
    state = env.get_state()
    seen = env.observe()
    future = [env.step(action) for action in actions[steps:]]
    env.reset(seed=seed + 1)
    env.set_state(state)
    _same(env.get_state(), state, "state ")
    _same(env.observe(), seen, "observation ")
    for i, action in enumerate(actions[steps:]):
        _same(env.step(action), future[i], f"step {i} ")


def check_goal(env: PandaEnv, seed: int = 0) -> None:
    """The start is no success; the goal's state is one (after it is held for 1 s, for Grasp), and looks like the goal."""
    _, info = env.reset(seed=seed)
    assert not info["success"], "the start counts as success"
    goal = env.episode.goal
    env.put(goal)
    seen = env.observe()
    off = np.abs(seen["proprio"] - info["goal"]["proprio"]).max()
    assert off < 0.003, f"proprio in the goal's state is off by {off}"
    changed = (np.abs(seen["pixels"].astype(int) - info["goal"]["pixels"]).max(-1) > 24).mean()
    assert changed < 0.01, f"{changed:.1%} of the goal picture differ from the goal's state"
    for _ in range(HOLD_STEPS):
        info = env.step(np.zeros(env.config.action_dim))[-1]
        if info["success"]:
            return
    raise AssertionError("the goal's state does not count as success")


def check_alive(env: PandaEnv, seed: int = 0, steps: int = 20) -> None:
    """Nothing is constant: every axis of the action moves the hand, pictures change, seeds differ."""
    first, _ = env.reset(seed=seed)
    second, _ = env.reset(seed=seed + 1)
    assert difference(first["pixels"], second["pixels"]) is not None, "two seeds give one picture"
    start = env.get_state()
    for axis in range(env.config.action_dim):
        ends = []
        for sign in (-0.8, 0.8):
            env.set_state(start)
            ends.append(env.step(sign * np.eye(env.config.action_dim)[axis])[0])
        moved = np.abs(ends[0]["proprio"] - ends[1]["proprio"]).max()
        assert moved > 0.01, f"axis {axis} of the action moves proprio by {moved} only"
        assert difference(ends[0]["pixels"], ends[1]["pixels"]) is not None, f"axis {axis} of the action is not to be seen"


def check_apart(env: PandaEnv, other: PandaEnv, seed: int = 0) -> None:
    """Nothing is shared: what one instance does, the other does not feel."""
    env.reset(seed=seed)
    before = env.get_state()
    other.reset(seed=seed + 1)
    for action in _actions(other, 5, seed):
        other.step(action)
    _same(env.get_state(), before, "shared state ")


def check(config: EnvConfig) -> None:
    """Run the whole contract on the environment of a config."""
    one, other = PandaEnv(config), PandaEnv(config)
    try:
        check_alive(one)
        check_state(one)
        check_goal(one)
        check_determinism(one, other)
        check_apart(one, other)
    finally:
        one.close()
        other.close()


def _check_seen(seen: Any, what: str, like: Mapping[str, Any] | None = None, feels: bool = True) -> None:
    """An observation, or a goal, which need not have proprio; of the shapes of another one."""
    assert isinstance(seen, Mapping) and "pixels" in seen, f"the {what} has no 'pixels'; expected a dict of pixels and proprio"
    pixels = np.asarray(seen["pixels"])
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (
        f"pixels of the {what} are {pixels.dtype} {list(pixels.shape)}: expected uint8 [h, w, 3]"
    )
    if feels:
        assert "proprio" in seen and np.ndim(seen["proprio"]) == 1, f"the {what} has no 'proprio' [S]; give zeros [1] where there is none"
    for key in ("pixels", "proprio"):
        if like is not None and key in seen:
            own, others = np.shape(seen[key]), np.shape(like[key])
            assert own == others, f"{key} of the {what} is {list(own)}: expected {list(others)}, as of the first observation"


def _check_told(info: Any) -> None:
    """What every info says, beside the goals of a reset's."""
    assert isinstance(info, Mapping), f"info is {type(info).__name__}: expected a dict"
    for key, kind in (("success", bool), ("unsafe", Mapping), ("cost", float)):
        assert isinstance(info.get(key), kind), f"info[{key!r}] is {info.get(key)!r}: expected {kind.__name__}"


def check_goal_env(env: gym.Env, seed: int = 0, steps: int = 5, simulated: bool = True) -> None:
    """What the agent and the benchmark need of anyone's environment: see `envs.adapt`, which makes one so.

    Resets twice, and plays random actions of the whole range; of a real robot say `simulated=False`: it resets once, sends `steps`
    actions of 0, which are to hold, and asks for no equal bits. Raises AssertionError that says what is missing, and how to mend it.
    """
    box = env.action_space
    assert isinstance(box, gym.spaces.Box) and len(box.shape) == 1, f"action_space is {box}: expected a Box [A]; use envs.adapt"
    assert (box.low == -1).all() and (box.high == 1).all(), f"actions are in {box.low}..{box.high}: expected -1..1; use envs.adapt"
    began = env.reset(seed=seed)
    assert isinstance(began, tuple) and len(began) == 2, f"reset(...) returned {type(began).__name__}: expected observation and info"
    obs, info = began
    _check_seen(obs, "observation")
    _check_told(info)
    goals = info.get("subgoals")
    assert isinstance(goals, Sequence) and goals, f"info['subgoals'] is {goals!r}: expected a sequence of at least the goal"
    for what, goal in (("info['goal']", info.get("goal")), *((f"info['subgoals'][{i}]", one) for i, one in enumerate(goals))):
        _check_seen(goal, what, obs, feels=False)
    assert not info["success"], "the start counts as success; draw goals that are further away"

    def step(action: np.ndarray) -> Mapping[str, np.ndarray]:
        after = env.step(action)
        assert isinstance(after, tuple) and len(after) == 5, (
            f"step(...) returned {len(after) if isinstance(after, tuple) else type(after).__name__}: expected observation, reward, terminated, truncated, info"
        )
        _check_seen(after[0], "observation after a step", obs)
        _check_told(after[4])
        return after[0]

    if not simulated:
        for _ in range(steps):
            step(np.zeros(box.shape, np.float32))
        return
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, *box.shape)).astype(np.float32)
    first = [obs, *(step(action) for action in actions)]
    again, info2 = env.reset(seed=seed)
    _same(info2["goal"], dict(info["goal"]), "reset with the same seed gives another goal: ")
    for i, seen in enumerate([again, *(step(action) for action in actions)]):
        _same(seen, first[i], f"the same seed and actions give another observation {i}: ")
    assert difference(first[0]["pixels"], first[-1]["pixels"]) is not None, "actions change no pixel; is anything rendered?"
