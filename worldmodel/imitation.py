"""Training of policies that imitate, on the same frozen features as the world model: where its planner's search begins.

Goals are taken in hindsight: what an episode came to is what it was after (GCSL, arXiv 1912.06088). With goals up to
an episode's end this is goal-conditioned behaviour cloning; with goals a step or three ahead, an inverse dynamics model.
A policy sees one picture: from an expert that waits it learns to stand still, since it cannot tell how long it has.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodel.data import Dataset, Frames
from worldmodel.interface import Features
from worldmodel.model import LatentModel
from worldmodel.policy import GRIPPER, Policy
from worldmodel.train import identify, placed_features
from worldmodel.training import Run, Stepper, check_run, gather, optimizer_for, set_rate


@dataclass(frozen=True)
class ImitationConfig:
    """A training recipe; its fields, the encoder and the data decide the weights."""

    reach: int = 30  # goals are 1 to so many steps ahead, as far as the episode goes
    ends: float = 0.0  # share of the goals that are an episode's last frame, however far ahead
    strangers: float = 0.0  # share of the goals of steps before a grasp that are what other episodes came to
    log_above: float = 0.0  # motion, as a share of the largest, above which it counts by its logarithm; 0: all counts alike
    width: int = 256
    batch: int = 256
    steps: int = 4000
    rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("reach", "width", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        check_run(self.rate, self.seed)
        for name in ("ends", "strangers", "log_above"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")


def hindsight(frames: Frames, batch: int, reach: int, rng: np.random.Generator, ends: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Frames [batch] and goals [batch] of the same episodes, 1 to `reach` steps later, or for a share of them their last frames."""
    now = frames.clip_index(batch, 2, 1, rng)[:, 0]
    left = frames.offsets[frames.episode_of[now] + 1] - 1 - now  # steps to the episode's end
    ahead = rng.integers(1, np.minimum(left, reach) + 1)
    if ends:  # else nothing is drawn: recipes without it give the weights that they gave
        ahead = np.where(rng.random(batch) < ends, left, ahead)
    return now, now + ahead


def aimless(frames: Frames) -> np.ndarray:
    """Steps bool [F] of episodes in which the gripper closes until it first does: the way to the object is that to any goal of it."""
    closes = frames.actions[:, -1] < (GRIPPER[0] + GRIPPER[1]).item() / 2
    free = np.zeros(len(closes), bool)
    for start, end in zip(frames.offsets[:-1], frames.offsets[1:]):
        if closes[start:end].any():
            free[start : start + closes[start:end].argmax() + 1] = True
    return free


def estranged(
    frames: Frames, now: np.ndarray, goal: np.ndarray, free: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Goals [batch], of which a share of those of free steps is exchanged for the last frames of any episodes; and which are, bool [batch].

    So what is done on the way to an object does not hang on where the few episodes that begin like this took it.
    """
    count, ends = len(now), frames.offsets[1:] - 1
    others = free[now] & (rng.random(count) < share)
    last = ends[rng.integers(len(ends), size=count)]
    return np.where(others, last, goal), others


def check_robot(frames: Frames, model: LatentModel) -> None:
    """Raise ValueError where the data is of another robot than a model's."""
    known = model.predictor.config
    for name, have, want in (("proprio", frames.proprio, known.proprio_dim), ("actions", frames.actions, known.action_dim)):
        if have.shape[1] != want:
            raise ValueError(f"{name} of the data have {have.shape[1]} numbers, the model's have {want}; give data of the model's robot")


def _check_gripper(actions: np.ndarray) -> None:
    """Raise ValueError where the last of the actions [F, A] is no gripper's, which closes, rests or opens."""
    rests = np.abs(actions[:, -1:] - GRIPPER.numpy()).min(1) < 0.1
    if actions.shape[1] < 2 or rests.mean() < 0.5:
        raise ValueError(
            f"the last of the data's {actions.shape[1]} actions is within 0.1 of -1, 0 or 1 at {rests.mean():.0%} of the steps; a policy "
            "takes it for a gripper that closes, rests or opens: expected at least half, and a motion before it"
        )


def fit_policy(
    config: ImitationConfig, model: LatentModel, data: Dataset, out: Path, cache: Path, minutes: float | None = None,
    resume: bool = False, device: str = "cpu",
) -> tuple[Policy, dict] | None:  # fmt: skip
    """Train a policy for a model in the folder `out`; None when `minutes` ended first (resume to go on). Also what it scores, held out."""
    train, held = data.split(0.03)
    frames, kept = (part.load(keys=("proprio", "actions")) for part in (train, held))
    encoder = model.encoder
    check_robot(frames, model)
    _check_gripper(frames.actions)
    features, kept_features = placed_features(encoder, (train, held), cache, device)
    sizes = encoder.config.patches, encoder.config.embed_dim, frames.proprio.shape[1], frames.actions.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        policy = Policy(*sizes, config.width)
    policy.look.fitted(features)
    policy.proprio_mean.copy_(torch.from_numpy(frames.proprio.mean(0)))
    policy.proprio_std.copy_(torch.from_numpy(frames.proprio.std(0)).clamp_min(1e-2))
    policy.to(device)

    free = aimless(frames)

    def drawn(frames: Frames, features: np.ndarray | Tensor, batch: int, rng: np.random.Generator, free: np.ndarray | None = None) -> list[Tensor]:
        now, goal = hindsight(frames, batch, config.reach, rng, config.ends)
        ahead = (goal - now).astype(np.float32)
        if free is not None and config.strangers:
            goal, others = estranged(frames, now, goal, free, config.strangers, rng)
            ahead[others] = np.nan
        pairs = (features, now), (frames.proprio, now), (features, goal), (frames.actions, now)
        return [*(gather(*pair, device) for pair in pairs), torch.from_numpy(ahead).to(device)]

    def loss(patches: Tensor, proprio: Tensor, goal: Tensor, actions: Tensor, steps: Tensor) -> dict[str, Tensor]:
        return {"loss": policy.loss(Features(patches, proprio), goal, actions, steps, config.log_above)}

    @torch.no_grad()
    def held_out() -> float:
        return float(loss(*drawn(kept, kept_features, 1024, np.random.default_rng(config.seed)))["loss"])

    optimizer = optimizer_for(policy, config.weight_decay)
    recipe = asdict(config) | {"data": data.fingerprint, "encoder": identify(encoder)}
    run = Run(out, "imitation", recipe, policy, optimizer, config.steps, minutes, resume)
    advance = Stepper(loss, policy, optimizer, 1.0)
    for step in run:
        rate = set_rate(optimizer, config.rate, step, config.steps)
        losses = advance(*drawn(frames, features, config.batch, np.random.default_rng([config.seed, step]), free))
        if run.tells:
            run.log(rate=rate, loss=float(losses["loss"]))
        if step % 500 == 499:
            run.log(held_out=held_out())
    if not run.done:
        return None
    about = {"recipe": recipe, "minutes": round(run.seconds / 60, 1), "held_out": held_out()}
    return policy.cpu().requires_grad_(False).eval(), about
