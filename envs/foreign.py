"""Anyone's Gymnasium environment with pixels, made like ours.

Observations become {"pixels", "proprio"}, actions [-1, 1], and `info` gets `goal`, `subgoals`, `success`, `unsafe` and `cost`.
A goal is what the user, or the environment in its info or observation, says it is; without, a place that random actions lead to
from the very start of the episode, so that it can be reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import gymnasium as gym
import numpy as np

from envs.peers import READY, Ready

_PIXELS, _PROPRIO = ("pixels", "image", "rgb"), ("proprio", "observation", "state", "agent_pos")  # keys of a dict, by turns
_SUCCESS = ("success", "is_success")  # what an environment may call it in info
_GOALS = ("goal", "goal_image", "goal_pixels", "desired_goal")  # what it may call a picture of its goal, in info or a dict of observations
_IN_ADAPT = ", in envs.adapt; for the command line in a module of yours, that --env.id module:Name-v0 names"
_TRIES = 20  # goals that are drawn until one is far enough

Obs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Foreign:
    """An environment of others, as commands and presets name it."""

    id: str = ""
    """of a Gymnasium environment, as gym.make takes it (module:Name-v0 imports the module); empty: this project's robot"""
    kwargs: tuple[str, ...] = ()
    """for gym.make, each name=value with a JSON value; with render_mode rgb_array, where it takes that"""
    frame_skip: int = 1
    """steps of the environment in one of ours"""
    proprio: tuple[int, ...] = ()
    """entries of its flat observation that are the robot's own state (none: all of them)"""
    goal_steps: int = 20
    """random steps from the start of an episode to its goal"""
    judged: tuple[int, ...] = ()
    """entries of proprio by whose distance to the goal's success is judged (none: all of them)"""
    tolerance: float = 0.0
    """distance that counts as success; needed to play for a goal, unless a function tells"""
    least: float = 0.0
    """distance between the start and a goal, at least"""

    @property
    def ready(self) -> Ready | None:
        """What `envs.peers` knows of it."""
        return READY.get(self.id.rpartition(":")[2])

    @property
    def players(self) -> tuple[str, ...]:
        """Who can act there without a model."""
        return ("play", "random", "nothing") if self.ready is None else ("mixture", "expert", "noisy", "play", "random", "nothing")

    def __post_init__(self) -> None:
        if self.ready is not None:
            for field in fields(self):
                if field.name not in ("id", "kwargs", *self.ready.heeds) and getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name} means nothing in {self.id}, whose goals and success are its own; leave it out")
        if self.frame_skip < 1 or self.goal_steps < 1:
            raise ValueError(f"frame_skip is {self.frame_skip} and goal_steps {self.goal_steps}: expected at least 1")
        if min(self.tolerance, self.least) < 0 or min((*self.proprio, *self.judged), default=0) < 0:
            raise ValueError(f"expected distances and indices of at least 0, got {self}")


def make(config: Foreign, image_size: int = 96, max_steps: int = 50, stop_on_success: bool = True, goals: bool = True) -> Adapted:
    """The environment that a config names, with goals as `envs.peers` has them, where that knows it.

    Raises ValueError where there is none, or it does not fit.
    """
    words, ready = dict(_word(word) for word in config.kwargs), config.ready
    if ready is None:
        id, kwargs = config.id, {"render_mode": "rgb_array", "max_episode_steps": -1, **words}
    else:
        extra = {} if goals else ready.to_collect or {}
        id, kwargs = f"{ready.module}:{config.id.rpartition(':')[2]}", {**ready.kwargs, **extra, **words}
    try:
        try:
            env = gym.make(id, **kwargs)
        except TypeError as error:
            if "render_mode" not in str(error) or "render_mode" in words:
                raise
            env = gym.make(id, **{name: value for name, value in kwargs.items() if name != "render_mode"})  # it may have pixels of its own
    except ModuleNotFoundError as error:
        remedy = "if it is yours, put its folder on PYTHONPATH; if it is of the extra peers: .venv/bin/pip install -c constraints.txt -e '.[peers]'"
        raise ValueError(f"cannot make {config.id!r} ({error}); {remedy}") from error
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"cannot make {config.id!r} ({type(error).__name__}: {error}); give an id and kwargs that gym.make takes") from error
    own: dict[str, Any] = {"stop_on_success": stop_on_success, "goals": goals}
    try:
        if isinstance(env.unwrapped, Adapted):
            return _bare(env, config.id).again(config, image_size, max_steps, **own)
        if ready is not None:
            env, own["proprio"], own["goal"] = ready.wrap(env, config.least), ready.proprio, lambda env, obs, info: env.goals(info)
        return adapt(env, config, image_size, max_steps, **own)
    except BaseException:
        env.close()
        raise


def _events(told: Any, who: str) -> dict[str, float]:
    """What went wrong, by name. Raises ValueError where it is something else."""
    try:
        events = {str(event): float(value) for event, value in told.items()}
        if all(map(np.isfinite, events.values())):
            return events
    except (AttributeError, TypeError, ValueError):
        pass
    raise ValueError(f"{who} {told!r}: expected events with their values, as in {{'collision': 12.0}}; {{}} where there are none")


def _own_events(info: Mapping[str, Any]) -> dict[str, float]:
    """What an environment itself calls unsafe, as a rule as flags, of which those that are down do not count."""
    told = info.get("unsafe")
    if not isinstance(told, Mapping):
        return {"unsafe": 1.0} if isinstance(told, (bool, np.bool_)) and told else {}
    return _events({event: value for event, value in told.items() if value}, "info['unsafe'] is")


def _bare(env: gym.Env, id: str) -> Adapted:
    """An adapted environment without the checks that gym.make puts around it. Raises ValueError where there is more, which would be lost."""
    while not isinstance(env, Adapted):
        if type(env).__name__ not in ("PassiveEnvChecker", "OrderEnforcing"):
            raise ValueError(f"{id} has {type(env).__name__} around what `adapt` made: put it around the environment that is adapted")
        env = env.env
    return env


def _word(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"expected kwargs as name=value, got {word!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def adapt(
    env: gym.Env,
    config: Foreign = Foreign(),
    image_size: int = 96,
    max_steps: int = 50,
    *,
    pixels: Callable[[Any], np.ndarray] | None = None,
    proprio: Callable[[Any], np.ndarray] | None = None,
    still: Sequence[float] | None = None,
    goal: Callable[[gym.Env, Any, dict], Obs | list[Obs]] | Obs | None = None,
    success: Callable[[Obs, Obs, dict], bool] | None = None,
    unsafe: Callable[[Any, dict], Mapping[str, float]] | None = None,
    stop_on_success: bool = True,
    goals: bool = True,
) -> Adapted:
    """Make an environment like ours.

    env: it gives pixels in its observation, or renders rgb_array. pixels: of its observation (default: an entry named pixels, image
    or rgb, an observation that is a picture, or what it renders). proprio: of its observation, float [S] (default: an entry named
    proprio, observation, state or agent_pos, or a flat observation, of which config.proprio names some). still: its action [A] that moves
    nothing, which ours of 0 becomes, the bounds being -1 and 1 as ever (default: the middle of its bounds). **An agent that holds, and a
    gate that refuses, send 0**: where no one action stays, as with targets of joints, wrap the environment so that one does. goal: an
    observation {"pixels"[, "proprio"]}, or a function of env, observation and info after a reset that returns one, or a list
    of sub-goals that ends with it (default: a picture, or {"pixels": picture}, under goal, goal_image, goal_pixels or desired_goal in info or
    a dict of observations; else where random actions lead, which every reset plays: never so on a real robot).
    success: of observation, goal and info (default: config.tolerance, else what its info tells). unsafe: of its observation and info,
    events with their measured values (default: what info["unsafe"] says, values that are not 0, or a flag); `cost` counts them. An episode ends where the
    environment ends it, at max_steps, and with `stop_on_success` at success. Without `goals`, goals are left out: for
    collecting. Raises ValueError for spaces that do not fit.
    """
    functions = Functions(pixels, proprio, goal, success, unsafe, None if still is None else np.asarray(still, float))
    return Adapted(env, config, image_size, max_steps, functions, stop_on_success, goals)


@dataclass(frozen=True)
class Functions:
    """What a user has said of an environment, as `adapt` takes it."""

    pixels: Callable | None = None
    proprio: Callable | None = None
    goal: Callable | Obs | None = None
    success: Callable | None = None
    unsafe: Callable | None = None
    still: np.ndarray | None = None


class Adapted(gym.Env):
    """An environment of others with our observations, actions and infos; see `adapt`."""

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(
        self, env: gym.Env, config: Foreign, image_size: int, max_steps: int, told: Functions, stop_on_success: bool, goals: bool
    ) -> None:
        self.env, self.config, self.image_size, self.max_steps, self._told = env, config, image_size, max_steps, told
        self._stops, self._goals = stop_on_success, goals
        self._subgoals: list[dict[str, np.ndarray]] = []
        self._steps: int | None = None  # of the episode
        space = env.action_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(
                f"the action space is {space}: expected a Box [A]; wrap the environment so that its actions are continuous"
            )
        if not np.isfinite([space.low, space.high]).all():
            raise ValueError(f"the action space {space} has no bounds; say which they are: gymnasium.wrappers.TransformAction(env, lambda a: a, Box(low, high, {list(space.shape)}))")
        self._low, self._high = space.low.astype(np.float64), space.high.astype(np.float64)
        if told.still is not None and (told.still.shape != space.shape or not ((self._low <= told.still) & (told.still <= self._high)).all()):
            raise ValueError(f"still is {told.still}: expected an action of {space}")
        self.action_space = gym.spaces.Box(-1.0, 1.0, space.shape, np.float32)
        self._draw_here()
        first, info = env.reset(seed=0)
        self._shows = goals and told.goal is None and _shown_goal(first, info) is not None
        seen = self._observe(first)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Box(0, 255, seen["pixels"].shape, np.uint8),
                "proprio": gym.spaces.Box(-np.inf, np.inf, seen["proprio"].shape, np.float32),
            }
        )
        size = len(seen["proprio"])
        if max(config.judged, default=0) >= size:
            raise ValueError(f"judged is {config.judged}, expected indices into proprio, which has {size} entries")
        drawn = told.goal is None and goals and not self._shows
        if drawn and told.success is None and not config.tolerance:
            raise ValueError(
                "the goal is where random actions lead, and nothing tells when it is reached: give a tolerance, or success and goal"
            )
        if drawn and not self._feels(first):
            raise ValueError(
                "the observation has no proprio, by which one tells how far a goal is that random actions lead to: give proprio, or success and goal"
            )

    def again(self, config: Foreign, image_size: int, max_steps: int, stop_on_success: bool, goals: bool) -> Adapted:
        """The same environment, as another config calls it. Raises ValueError where that says more than its id."""
        if more := [f.name for f in fields(config) if f.name not in ("id", "kwargs") and getattr(config, f.name) != f.default]:
            raise ValueError(f"{more[0]} means nothing in {config.id}, which is adapted already, and says so itself; leave it out")
        own = replace(self.config, id=config.id, kwargs=config.kwargs)
        return Adapted(self.env, own, image_size, max_steps, self._told, stop_on_success, goals)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start the episode of a seed, with its goal."""
        super().reset(seed=seed)
        self._draw_here()
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        goal = _shown_goal if self._shows else self._told.goal
        self._subgoals = [self._draw_goal(seed, options)] if self._goals and goal is None else []
        obs, info = self.env.reset(seed=seed, options=options)
        if self._goals and goal is not None:
            made = goal(obs, info) if self._shows else goal(self.env, obs, info) if callable(goal) else goal
            self._subgoals = [self._as_goal(one) for one in (made if isinstance(made, (list, tuple)) else [made])]
            if not self._subgoals:
                raise ValueError("the goal is an empty list: expected an observation, or sub-goals of which the last is the goal")
        self._steps = 0
        seen = self._observe(obs)
        return seen, self._info(seen, info, {})

    def step(self, action: np.ndarray):
        """Run an action [A] in [-1, 1] for frame_skip steps. Raises ValueError where it is not finite, or of another shape.

        RuntimeError before `reset`.
        """
        if self._steps is None:
            raise RuntimeError("the episode has not begun: call reset() before step()")
        action = np.asarray(action, float)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"action is {action}: expected {self.action_space.shape} finite numbers in [-1, 1]")
        self._draw_here()
        obs, reward, info, unsafe, (terminated, truncated) = self._repeat(action.clip(-1, 1), self._events_of)
        self._steps += 1
        seen = self._observe(obs)
        info = self._info(seen, info, unsafe)
        ends = terminated or self._stops and info["success"]
        return seen, reward, bool(ends), truncated or self._steps >= self.max_steps, info

    def attempt(self, plan: np.ndarray, drawn: Container[int]) -> list[dict[str, np.ndarray]]:
        """What would be seen after each action of a plan [H, A], with pixels where `drawn` says so; the present state stays as it was.

        Only where `envs.peers` knows how. Raises AttributeError elsewhere.
        """
        self._draw_here()
        seen = []
        with self.env.tried() as settle:
            for h, action in enumerate(plan):
                obs = self._repeat(action.clip(-1, 1))[0]
                settle()
                seen.append(self._observe(obs, h in drawn))
        return seen

    def render(self) -> np.ndarray:
        """The picture uint8 [image_size, image_size, 3]."""
        self._draw_here()
        return self._fit(self.env.render())

    def close(self) -> None:
        """Close the environment."""
        self._draw_here()  # a canvas that is freed later, while another one is drawn on, takes that one's pictures with it
        if hasattr(canvas := getattr(self._viewer, "con", None), "free"):
            canvas.free()
        self.env.close()

    def distance(self, seen: Obs, goal: Obs) -> float:
        """Between what is judged of two observations."""
        at = list(self.config.judged) or slice(None)
        return float(np.linalg.norm(seen["proprio"][at] - goal["proprio"][at]))

    def _events_of(self, obs: Any, info: Mapping[str, Any]) -> dict[str, float]:
        """What is unsafe, by the user's function, or else as the environment itself says."""
        return _own_events(info) if self._told.unsafe is None else _events(self._told.unsafe(obs, info), "unsafe returned")

    def _draw_here(self) -> None:
        """Have the environment draw on its own canvas: Gymnasium's MuJoCo renderer draws, and reads, where the last of this process did."""
        if hasattr(self._viewer, "make_context_current"):
            self._viewer.make_context_current()

    @property
    def _viewer(self) -> Any:
        """What Gymnasium's MuJoCo renderer draws with; None where there is none."""
        return getattr(getattr(self.env.unwrapped, "mujoco_renderer", None), "viewer", None)

    def _repeat(self, action: np.ndarray, events_of: Callable | None = None) -> tuple[Any, float, dict[str, Any], dict[str, float], tuple[bool, bool]]:
        """Run an action for frame_skip steps: the last observation, rewards, info, what was unsafe, terminated and truncated."""
        theirs = self._low + (action + 1) / 2 * (self._high - self._low)
        if (still := self._told.still) is not None:
            theirs = still + np.where(action < 0, action * (still - self._low), action * (self._high - still))
        theirs = theirs.clip(self._low, self._high)  # rounding may have led a bit beyond
        theirs = (np.rint(theirs) if self.env.action_space.dtype.kind in "iu" else theirs).astype(self.env.action_space.dtype)
        reward, success, unsafe = 0.0, False, {}
        for _ in range(self.config.frame_skip):
            obs, gain, terminated, truncated, info = self.env.step(theirs)
            reward += float(gain)
            success |= _succeeds(info)
            for event, value in (events_of(obs, info) if events_of else {}).items():
                unsafe[event] = max(unsafe.get(event, -np.inf), value)
            if terminated or truncated:
                break
        return obs, reward, {**info, "success": success}, unsafe, (bool(terminated), bool(truncated))

    def _draw_goal(self, seed: int, options: dict[str, Any] | None) -> dict[str, np.ndarray]:
        """An observation that random actions lead to from the start of an episode, far enough from it; none at which the episode would end."""
        far = max(self.config.least, self.config.tolerance)
        for attempt in range(_TRIES):
            obs, _ = self.env.reset(seed=seed, options=options)
            start = self._observe(obs, pixels=False)
            act = policy("play", self, np.random.default_rng((seed, 3, attempt)))
            for _ in range(self.config.goal_steps):
                obs, *_, over = self._repeat(act({}))
                if any(over):
                    break
            else:
                if self.distance(self._observe(obs, pixels=False), start) >= far:
                    return self._observe(obs)
        raise ValueError(
            f"no goal of {_TRIES} is {far} away from the start of seed {seed}, with the episode still going on after {self.config.goal_steps} random "
            "actions; give more goal_steps, or fewer where these end episodes, or a smaller least or tolerance"
        )

    def _info(self, seen: Obs, info: dict[str, Any], unsafe: dict[str, float]) -> dict[str, Any]:
        out = {**info, "unsafe": unsafe, "cost": float(len(unsafe)), "success": _succeeds(info)}
        if not self._subgoals:
            return out
        subgoals = [{key: value.copy() for key, value in one.items()} for one in self._subgoals]
        goal = subgoals[-1]
        out |= {"goal": goal, "subgoals": subgoals}
        if "proprio" in goal:
            out["distance"] = self.distance(seen, goal)
        if self._told.success is not None:
            out["success"] = bool(self._told.success(seen, goal, info))
        elif self.config.tolerance:
            if "distance" not in out:
                raise ValueError("the goal has no proprio, by whose distance a tolerance judges: give it with the goal, or a success function")
            out["success"] = out["distance"] <= self.config.tolerance
        return out

    def _as_goal(self, made: Obs) -> dict[str, np.ndarray]:
        """A goal that somebody gave, as one of our observations."""
        if not isinstance(made, Mapping) or "pixels" not in made:
            what = f"keys {', '.join(map(str, made))}" if isinstance(made, Mapping) else type(made).__name__
            raise ValueError(
                f"the goal is {what}: expected {{'pixels': [h, w, 3]}}, and where it is known 'proprio' [S], a list of these, or a function that returns it"
            )
        goal = {"pixels": self._fit(made["pixels"])}
        if made.get("proprio") is not None:
            goal["proprio"], own = np.asarray(made["proprio"], np.float32), self.observation_space["proprio"].shape
            if goal["proprio"].shape != own or not np.isfinite(goal["proprio"]).all():
                raise ValueError(f"the goal's proprio is {made['proprio']}: expected {list(own)} finite numbers, as observations have; or leave it out")
        return goal

    def _observe(self, obs: Any, pixels: bool = True) -> dict[str, np.ndarray]:
        seen = {"pixels": self._fit(self._picture(obs))} if pixels else {}
        proprio = self._state(obs)
        if proprio.ndim != 1 or not np.isfinite(proprio).all():
            raise ValueError(f"proprio of the observation is {proprio}: expected finite numbers [S]")
        return {**seen, "proprio": proprio}

    def _picture(self, obs: Any) -> np.ndarray:
        if self._told.pixels is not None:
            return self._told.pixels(obs)
        if isinstance(obs, Mapping):
            for key in _PIXELS:
                if key in obs:
                    return obs[key]
            if others := [key for key in obs if np.ndim(obs[key]) == 3]:
                names = ", ".join(map(str, others))
                raise ValueError(f"the observation has pictures under {names}: say which, pixels=lambda obs: obs[{others[0]!r}]{_IN_ADAPT}")
        elif np.ndim(obs) == 3:
            return obs
        picture = self.env.render()
        if picture is None or np.ndim(picture) != 3:
            raise ValueError(
                "the environment has no pixels: its observation holds none, and render() gives none; make it with "
                "render_mode='rgb_array', or wrap it in gymnasium.wrappers.AddRenderObservation"
            )
        return picture

    def _feels(self, obs: Any) -> bool:
        """Whether an observation tells more than what is seen."""
        if self._told.proprio is not None:
            return True
        return any(np.ndim(obs[key]) == 1 for key in _PROPRIO if key in obs) if isinstance(obs, Mapping) else np.ndim(obs) == 1

    def _state(self, obs: Any) -> np.ndarray:
        if self._told.proprio is not None:
            state = np.asarray(self._told.proprio(obs))
        elif self._feels(obs):
            state = np.asarray(next(obs[key] for key in _PROPRIO if key in obs and np.ndim(obs[key]) == 1) if isinstance(obs, Mapping) else obs)
        else:
            others = [key for key in obs if np.ndim(obs[key]) == 1 or key in _PROPRIO and np.ndim(obs[key]) in (0, 2)] if isinstance(obs, Mapping) else []
            if isinstance(obs, tuple):
                raise ValueError(f"the observation is a tuple of {len(obs)}: say what of it is the robot's own, proprio=lambda obs: obs[0]{_IN_ADAPT}")
            if others:
                names = ", ".join(map(str, others))
                raise ValueError(
                    f"the observation has numbers under {names}: say which are the robot's own, proprio=lambda obs: obs[{others[0]!r}]{_IN_ADAPT}"
                )
            state = np.zeros(1)
        if self.config.proprio and self._told.proprio is None:
            if max(self.config.proprio) >= len(state):
                raise ValueError(f"proprio is {self.config.proprio}, expected indices into an observation of {len(state)} entries")
            state = state[list(self.config.proprio)]
        return state.astype(np.float32)

    def _fit(self, picture: np.ndarray) -> np.ndarray:
        """A picture as uint8 [image_size, image_size, 3]: the middle square, resized."""
        picture = np.asarray(picture)
        if picture.ndim == 3 and picture.shape[0] in (3, 4) and picture.shape[2] not in (3, 4):
            picture = np.moveaxis(picture, 0, 2)  # channels came first
        if picture.ndim != 3 or picture.shape[2] not in (3, 4):
            raise ValueError(f"expected a picture [h, w, 3], got {list(picture.shape)}; give one in colour")
        picture = picture[..., :3]
        if picture.dtype != np.uint8:
            if picture.dtype.kind != "f" or not (picture.min() >= 0 and picture.max() <= 1):  # NaN is neither
                raise ValueError(
                    f"expected pixels uint8 in 0..255 or float in 0..1, got {picture.dtype} in {picture.min()}..{picture.max()}"
                )
            picture = np.rint(255 * picture).astype(np.uint8)
        import cv2  # it takes long, and a command line asks this module for its flags

        side = min(picture.shape[:2])
        top, left = ((n - side) // 2 for n in picture.shape[:2])
        picture = picture[top : top + side, left : left + side]
        size = (self.image_size, self.image_size)
        return picture.copy() if side == self.image_size else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _shown_goal(obs: Any, info: Mapping[str, Any]) -> Obs | None:
    """The picture of a goal that an environment itself shows, as an observation; None where it shows none."""
    for told in (info, obs if isinstance(obs, Mapping) else {}):
        for name in _GOALS:
            goal = told.get(name)
            if isinstance(goal, Mapping) and "pixels" in goal:
                return goal
            if not isinstance(goal, Mapping) and np.ndim(goal) == 3:
                return {"pixels": goal}
    return None


def _succeeds(info: Mapping[str, Any]) -> bool:
    """Whether an environment says so, under any of the usual names."""
    return any(bool(np.any(info.get(name, False))) for name in _SUCCESS)


def policy(name: str, env: gym.Env, rng: np.random.Generator) -> Callable[[dict], np.ndarray]:
    """Who acts: random (anew at each step), play (each action held for a while), or nothing; where it is ready, expert, noisy or mixture."""
    size = env.action_space.shape[0]
    if name in ("expert", "noisy", "mixture") and env.config.ready is not None:
        return env.config.ready.player(name, env.config.frame_skip, rng)
    if name == "nothing":
        return lambda info: np.zeros(size, np.float32)
    if name == "random":
        return lambda info: rng.uniform(-1, 1, size).astype(np.float32)
    if name != "play":
        raise ValueError(f"unknown policy {name!r}: of an environment of others play, random and nothing are known, and experts in {', '.join(READY)}")
    held = {"action": np.zeros(size, np.float32), "left": 0}

    def act(info: dict) -> np.ndarray:
        if not held["left"]:
            held["action"] = rng.uniform(-1, 1, size).astype(np.float32) * np.float32(rng.uniform(0.2, 1))
            held["left"] = int(rng.integers(1, 7))
        held["left"] -= 1
        return held["action"]

    return act
