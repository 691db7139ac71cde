"""What an agent has seen of its episode: the context that a model imagines from, and what tells that a camera stands still."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from planners.interface import by_camera
from worldmodel.interface import Context, Features, Obs, WorldModel, held_after

STOPPED = 1e-4  # of proprioception: what a robot that is held up still trembles by
MOVES = 0.1  # of an action: a robot that is told more shows in a picture


class Past:
    """The last pictures of an episode as features, and what ran between them.

    `now` are the last one's features, `pixels` itself, `unlike` its proprioception [S] less what the model reads off it; `still` counts pictures that stayed the same to the bit, of one of its
    `views`, although the robot was told to move. `readings` is how many of the last pictures tell what `model.read` is off.
    """

    now: Features
    pixels: np.ndarray | None = None
    unlike: Tensor | None = None

    def __init__(self, model: WorldModel, readings: int) -> None:
        self._model, self._readings = model, readings
        self.views = getattr(model, "views", 1)
        self._still, self._felt = [0] * self.views, None
        self._features: deque[Features] = deque(maxlen=model.max_context)  # each patches [P, D], proprio [S]
        self._actions: deque[Tensor] = deque(maxlen=model.max_context)
        self._held: Tensor | None = None
        self._off: deque[Tensor] = deque(maxlen=readings)  # each [S]

    def take_in(self, obs: Obs, ran: np.ndarray) -> None:
        """An observation as `checked`, and the action [A] that ran before it, which of the first one counts for nothing."""
        self._notice(obs, ran)
        if self._features:
            self._actions.append(torch.from_numpy(ran))
            before = self.now.proprio
            if before is not None:
                self._held = held_after(self._held, before[None], self._actions[-1][None].to(before))
        self.now = self._model.encode(obs)
        self._features.append(self.now)
        read = self._model.read(self.now.patches) if "proprio" in obs and hasattr(self._model, "read") else None
        self.unlike = None if read is None else self.now.proprio - read
        if self._readings and self.unlike is not None and torch.isfinite(self.unlike).all():
            self._off.append(self.unlike)

    @property
    def still(self) -> int:
        """How many pictures before the last one were the same."""
        return max(self._still)

    @property
    def off(self) -> Tensor | None:
        """What readings of proprioception [S] are off now, where the truth is known; None where none is."""
        return torch.stack(list(self._off)).median(0).values if self._off else None

    def context(self, under_way: Sequence[np.ndarray] = ()) -> Context:
        """The context of one problem; it ends where actions under way, each [A], will have led, as imagined."""
        patches = torch.stack([f.patches for f in self._features])[None]  # [1, T, P, D]
        known = all(f.proprio is not None for f in self._features)
        proprio = torch.stack([f.proprio for f in self._features])[None] if known else None
        past = list(self._actions)[-(len(self._features) - 1) :] if len(self._features) > 1 else []
        actions = torch.stack(past)[None] if past else torch.zeros(1, 0, self._model.action_dim)
        context = Context(Features(patches, proprio), actions.to(patches), self._held)
        return self._ahead_of(context, torch.from_numpy(np.stack(under_way))[None].to(patches)) if under_way else context

    def _ahead_of(self, context: Context, actions: Tensor) -> Context:
        """A context that ends where actions [1, n, A] will have led."""
        n = actions.shape[1]
        imagined = self._model.rollout(context, actions[:, None], self._model.sample_z((1, 1, 1, n), None))
        pairs = zip(context.features, imagined)
        features = Features(*(None if now is None or later is None else torch.cat((now, later[:, 0, 0].to(now)), 1) for now, later in pairs))
        held, places = context.held, () if features.proprio is None else features.proprio[:, -1 - n :].unbind(1)
        for place, action in zip(places, actions.unbind(1)):
            held = held_after(held, place, action)
        return Context(features, torch.cat((context.actions, actions), 1), held)

    def _notice(self, obs: Obs, ran: np.ndarray) -> None:
        """Count pictures of each camera that stay the same; a hold tells nothing, nor does a robot that feels itself all but stopped.

        Where not even what it feels changes by a bit, it may be the observation that is stale.
        """
        pixels, felt = obs["pixels"], obs.get("proprio")
        blocked = felt is not None and self._felt is not None and 0 < np.abs(felt - self._felt).max() < STOPPED
        self._felt = felt
        if self.pixels is not None:
            for i, (new, old) in enumerate(zip(by_camera(pixels, self.views), by_camera(self.pixels, self.views))):
                if not np.array_equal(new, old):
                    self._still[i] = 0
                elif np.abs(ran).max() > MOVES and not blocked:
                    self._still[i] += 1
        self.pixels = pixels.copy()


def checked(obs: Obs, what: str, shape: tuple[int, ...] | None) -> dict[str, np.ndarray]:
    """What a model may see of an observation; raises ValueError where that is not as expected."""
    if not hasattr(obs, "keys") or "pixels" not in obs:
        raise ValueError(f"expected a {what} with 'pixels' uint8 [h, w, 3], got {type(obs).__name__}; render it")
    pixels = np.asarray(obs["pixels"])
    if pixels.dtype != np.uint8:
        raise ValueError(f"expected pixels of the {what} as uint8 in 0..255, got {pixels.dtype}; convert them")
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.shape != (shape or pixels.shape):
        wanted = "[h, w, 3]" if shape is None else f"{list(shape)} as of the first goal"
        raise ValueError(f"expected pixels of the {what} of shape {wanted}, got {list(pixels.shape)}; render all at one size")
    if obs.get("proprio") is None:
        return {"pixels": pixels}
    proprio = np.asarray(obs["proprio"], np.float32)
    if proprio.ndim != 1 or not np.isfinite(proprio).all():
        raise ValueError(f"expected proprio of the {what} as finite numbers [S], got {proprio}; leave it out if unknown")
    return {"pixels": pixels, "proprio": proprio}
