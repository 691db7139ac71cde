"""Steps that are tried several times over, each time with another draw of what no picture tells: mass and grip.

A step branches where that decides how it ends: how far apart the object then is says whether it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from envs import run
from envs.base import PandaEnv
from envs.randomize import Variation

AGREES = 0.01  # m, that a try may put the object beside where it came


@dataclass(frozen=True)
class Fork:
    """The n ends of one step: what is seen and what is said of each, as `step` returns it; the first is what came."""

    obs: Sequence[Mapping[str, np.ndarray]]
    infos: Sequence[Mapping[str, Any]]

    @property
    def places(self) -> np.ndarray:
        """Where the object is, [n, 3] m."""
        return np.array([info["privileged/object_pos"] for info in self.infos])

    @property
    def apart(self) -> float:
        """Deviation of the object's place over the ends, m."""
        return float(np.sqrt(self.places.var(0).sum()))


def forked(env: PandaEnv, policy, seed: int, tries: int) -> tuple[run.Record, list[Fork]]:
    """The episode of a seed, and what each of its steps might have come to.

    `tries` draws of mass and grip, the episode's own first, are made at its start, as its level of randomisation has them; of
    those go on from step to step that agree with what came, so that the ends are possible ones for who has seen all before.
    """
    rng, draws, forks = np.random.default_rng((seed, 2)), [], []

    def act(obs, info):
        action = policy(info)
        if not draws:
            own = env.get_state().variation
            draws[:] = [own, *(env.randomizer.redraw_physics(own, env.config.randomization, rng) for _ in range(tries - 1))]
        forks.append(tried(env, action, draws))
        places = forks[-1].places
        draws[:] = [draw for draw, place in zip(draws, places) if np.linalg.norm(place - places[0]) < AGREES]
        return action

    return run.rollout(env, act, seed), forks


def tried(env: PandaEnv, action: np.ndarray, draws: Sequence[Variation]) -> Fork:
    """The ends of an action with each of the draws; the environment is left as it was."""
    state, ends = env.get_state(), []
    for draw in draws:
        env.set_state(replace(state, variation=draw))
        obs, *_, info = env.step(action)
        ends.append((obs, run.slim(info)))
    env.set_state(state)
    return Fork(*zip(*ends))


def outcome(episode: run.Record, forks: Sequence[Fork], which: int, before: int) -> run.Record:
    """The step that branches most, of those with `before` steps before it: these steps, and end `which` of that one.

    Of fewer ends than `which`, those that there are come by turns. Raises ValueError where the episode is no longer than `before`.
    """
    if len(forks) <= before:
        raise ValueError(f"an episode of {len(forks)} steps has none with {before} before it; expected a longer one")
    at = before + int(np.argmax([fork.apart for fork in forks[before:]]))
    fork, first = forks[at], at - before
    which %= len(fork.infos)
    obs = {key: np.concatenate((value[first : at + 1], fork.obs[which][key][None])) for key, value in episode.obs.items()}
    infos = [*episode.infos[first : at + 1], fork.infos[which]]
    success = any(info["success"] for info in infos)
    return replace(episode, obs=obs, actions=episode.actions[first : at + 1], infos=infos, success=success)
