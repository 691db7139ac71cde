"""The true dynamics behind the world model's interface: what a planner would do if its model made no mistake.

With the same rendered and encoded energy as for a learned model, it separates errors of the planner and the energy from
errors of the model. A model's policy, where there is one, still looks ahead in what the model imagines: where the search begins,
and what it looks for, are the learned model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import mujoco
import numpy as np
import torch
from torch import Tensor

import envs
from envs.foreign import Adapted
from worldmodel.interface import Context, Encoder, Features, Obs, Suggestion, WorldModel, to_tensor


class SimulatorModel:
    """Tries every candidate from an environment's present state, and encodes what is to be seen then.

    `env` is the one that is being controlled. Ours is read, never touched: what is tried, a copy does. One of others that
    `envs.peers` knows does it itself, and undoes it. With frames "last" only the last frame of each
    candidate is drawn and encoded, the others are NaN: for an energy that looks at nothing else. z is ignored.
    """

    latent_dim = 1
    max_context = 2  # which a hazard head looks at; the dynamics need none

    def __init__(
        self, encoder: Encoder, env: envs.PandaEnv | Adapted, frames: Literal["all", "last"] = "all", model: WorldModel | None = None
    ) -> None:
        self.encoder, self.env, self.frames, self.model = encoder, env, frames, model
        self.action_dim = env.action_space.shape[0]
        self.copy = None if isinstance(env, Adapted) else envs.make(replace(env.config, render_goals=False))

    @property
    def views(self) -> int:
        """Cameras side by side in a picture."""
        return self.encoder.config.views

    def encode(self, obs: Obs) -> Features:
        """As `model` does, if there is one; else patch features of obs["pixels"], and obs["proprio"] where it is there."""
        if self.model is not None:
            return self.model.encode(obs)
        proprio = obs.get("proprio")
        patches = self.encoder.encode(to_tensor(np.asarray(obs["pixels"])))
        return Features(patches, None if proprio is None else to_tensor(np.asarray(proprio), torch.float32))

    def sample_z(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Zeros [*shape, 1]: the simulator is deterministic."""
        return torch.zeros(*shape, self.latent_dim)

    def suggest(self, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        """As `model` does, if there is one that does."""
        return self.model.suggest(now, goals, horizon) if hasattr(self.model, "suggest") else None

    def detour(self, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        """As `model` does, if there is one that does."""
        return self.model.detour(now, goals, horizon) if hasattr(self.model, "detour") else None

    def read(self, patches: Tensor) -> Tensor | None:
        """As `model` does, if there is one that does."""
        return self.model.read(patches) if hasattr(self.model, "read") else None

    @torch.no_grad()
    def rollout(self, context: Context, actions: Tensor, z: Tensor) -> Features:
        """What follows from the environment's present state; of the context only B = 1 is read.

        actions [1, N, H, A], z [1, N, K, H, 1] -> patches [1, N, K, H, P, D], proprio [1, N, K, H, S]; all K are equal.
        Raises ValueError for more than one problem: there is one environment.
        """
        if actions.dim() != 4 or len(actions) != 1 or actions.shape[-1] != self.action_dim:
            raise ValueError(f"expected actions [1, N, H, {self.action_dim}] of one problem, got {list(actions.shape)}")
        (_, n, horizon, _), k = actions.shape, z.shape[2]
        drawn = range(horizon) if self.frames == "all" else range(horizon - 1, horizon)
        pixels, proprio = self._try(actions[0].double().numpy(force=True), drawn)
        seen = self.encoder.encode(torch.from_numpy(pixels))  # [N, H drawn, P, D]
        patches = seen.new_full((n, horizon, *seen.shape[2:]), torch.nan)
        patches[:, drawn.start :] = seen
        features = Features(patches, torch.from_numpy(proprio))
        return Features(*(x[None, :, None].expand(1, n, k, *x.shape[1:]) for x in features))

    def close(self) -> None:
        """Free the copy's GL context."""
        if self.copy is not None:
            self.copy.close()

    def _try(self, plans: np.ndarray, drawn: range) -> tuple[np.ndarray, np.ndarray]:
        """Run plans [N, H, A]: the pixels [N, len(drawn), h, w, 3] of the steps to draw, and proprio [N, H, S]."""
        if self.copy is None:
            seen = [self.env.attempt(plan, drawn) for plan in plans]
            return np.array([[one[h]["pixels"] for h in drawn] for one in seen]), np.array([[frame["proprio"] for frame in one] for one in seen])
        copy, state = self.copy, self.env.get_state()
        pixels, proprio = [], []
        for plan in plans:
            copy.set_state(state)
            for h, action in enumerate(plan):
                for _ in copy.controller.step(np.clip(action, -1, 1)):
                    pass
                mujoco.mj_forward(copy.scene.model, copy.scene.data)
                proprio.append(copy.proprio())
                if h in drawn:
                    pixels.append(copy.scene.render().copy())
        shape = (len(plans), len(drawn), *pixels[0].shape)
        return np.stack(pixels).reshape(shape), np.stack(proprio).reshape(*plans.shape[:2], -1)
