"""Policies that imitate, on the same frozen features as the world model: what its planner is compared with.

Goals are taken in hindsight: what an episode came to is what it was after (GCSL, arXiv 1912.06088). With goals up to
an episode's end this is goal-conditioned behaviour cloning; with goals a step or three ahead, an inverse dynamics model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.checkpoint import fill, load_tensors, save_tensors
from worldmodel.data import Dataset, Frames
from worldmodel.interface import Encoder, Features, Obs, to_tensor
from worldmodel.peers import build
from worldmodel.probe import AttentiveProbe
from worldmodel.train import identify, placed_features
from worldmodel.training import Run, Stepper, gather, optimizer_for, set_rate

GRIPPER = torch.tensor([-1.0, 0.0, 1.0])  # close, hold, open: a choice, as the planner's


@dataclass(frozen=True)
class ImitationConfig:
    """A training recipe; its fields, the encoder and the data decide the weights."""

    reach: int = 30  # goals are 1 to so many steps ahead, as far as the episode goes
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
        if self.rate <= 0:
            raise ValueError(f"rate is {self.rate}, expected more than 0")


class GoalPolicy(nn.Module):
    """Frozen encoder, and a map from what it sees now and in a goal picture to an action."""

    def __init__(self, encoder: Encoder, proprio_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.encoder, self.sizes = encoder, {"proprio_dim": proprio_dim, "action_dim": action_dim, "width": width}
        self.look = AttentiveProbe(encoder.config.patches, encoder.config.embed_dim, width)
        self.act = nn.Sequential(
            nn.LayerNorm(2 * width + proprio_dim), nn.Linear(2 * width + proprio_dim, 2 * width), nn.GELU(),
            nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, action_dim - 1 + len(GRIPPER)),
        )  # fmt: skip
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.register_buffer("gripper", GRIPPER, persistent=False)

    @property
    def action_dim(self) -> int:
        """A."""
        return self.sizes["action_dim"]

    def forward(self, now: Features, goal: Tensor) -> tuple[Tensor, Tensor]:
        """now and goal patches [B, P, D] -> motion [B, A - 1], and logits [B, 3] of close, hold, open."""
        proprio = (now.proprio - self.proprio_mean) / self.proprio_std
        out = self.act(torch.cat((self.look(now.patches), self.look(goal), proprio), 1))
        return out[:, : -len(GRIPPER)], out[:, -len(GRIPPER) :]

    def loss(self, now: Features, goal: Tensor, actions: Tensor) -> Tensor:
        """L1 of the motion plus cross-entropy of the gripper's choice, for actions [B, A]."""
        motion, logits = self(now, goal)
        choice = (actions[:, -1:] - self.gripper).abs().argmin(1)
        return (motion - actions[:, :-1]).abs().mean() + F.cross_entropy(logits, choice)

    @torch.no_grad()
    def encode(self, obs: Obs) -> Features:
        """Patches of obs["pixels"], and obs["proprio"] where it is there."""
        proprio = obs.get("proprio")
        patches = self.encoder.encode(to_tensor(np.asarray(obs["pixels"])))
        return Features(patches, None if proprio is None else to_tensor(proprio, torch.float32))

    @torch.no_grad()
    def choose(self, now: Features, goal: Tensor, generator: torch.Generator) -> Tensor:
        """An action [A] towards a goal's patches [P, D]; the gripper's choice is drawn."""
        motion, logits = self(Features(*(x[None] for x in now)), goal[None])
        drawn = torch.multinomial(logits[0].softmax(0), 1, generator=generator)
        return torch.cat((motion[0], self.gripper[drawn])).clamp(-1, 1)

    def save(self, path: Path, about: dict) -> None:
        """Write encoder and policy as one safetensors file."""
        save_tensors(path, "policy", self.state_dict(), {"encoder": asdict(self.encoder.config), "policy": self.sizes}, about)


def load(path: str | Path) -> GoalPolicy:
    """A policy from a file. FileNotFoundError or ValueError where it is missing, damaged, or something else."""
    tensors, config, _ = load_tensors(path, "policy")
    try:
        policy = GoalPolicy(build(config["encoder"]), **config["policy"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is of another architecture: {error}") from error
    fill(policy, tensors, path)
    return policy.requires_grad_(False).eval()


def hindsight(frames: Frames, batch: int, reach: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames [batch] and goals [batch] of the same episodes, 1 to `reach` steps later."""
    now = frames.clip_index(batch, 2, 1, rng)[:, 0]
    left = frames.offsets[frames.episode_of[now] + 1] - 1 - now  # steps to the episode's end
    return now, now + rng.integers(1, np.minimum(left, reach) + 1)


def imitate(
    config: ImitationConfig, encoder: Encoder, data: Dataset, out: Path, cache: Path, minutes: float | None = None,
    resume: bool = False, device: str = "cpu",
) -> Path | None:  # fmt: skip
    """Train a policy and write `out/policy.safetensors`; None when `minutes` ended first (resume to go on)."""
    train, held = data.split(0.03)
    frames, kept = (part.load(keys=("proprio", "actions")) for part in (train, held))
    features, kept_features = placed_features(encoder, (train, held), cache, device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        policy = GoalPolicy(encoder, frames.proprio.shape[1], frames.actions.shape[1], config.width)
    some = gather(features, slice(None, None, max(1, len(features) // 2000)), "cpu").flatten(0, 1)
    policy.look.centre.copy_(some.mean(0))
    policy.look.scale.copy_(some.std(0).clamp_min(1e-3))
    policy.proprio_mean.copy_(torch.from_numpy(frames.proprio.mean(0)))
    policy.proprio_std.copy_(torch.from_numpy(frames.proprio.std(0)).clamp_min(1e-2))
    policy.to(device)

    def drawn(frames: Frames, features: np.ndarray | Tensor, batch: int, rng: np.random.Generator) -> list[Tensor]:
        now, goal = hindsight(frames, batch, config.reach, rng)
        pairs = (features, now), (frames.proprio, now), (features, goal), (frames.actions, now)
        return [gather(*pair, device) for pair in pairs]

    def loss(patches: Tensor, proprio: Tensor, goal: Tensor, actions: Tensor) -> dict[str, Tensor]:
        return {"loss": policy.loss(Features(patches, proprio), goal, actions)}

    @torch.no_grad()
    def held_out() -> float:
        return float(loss(*drawn(kept, kept_features, 1024, np.random.default_rng(config.seed)))["loss"])

    optimizer = optimizer_for(policy, config.weight_decay)
    recipe = asdict(config) | {"data": data.fingerprint, "encoder": identify(encoder)}
    run = Run(out, "imitation", recipe, policy, optimizer, config.steps, minutes, resume)
    advance = Stepper(loss, policy, optimizer, 1.0)
    for step in run:
        rate = set_rate(optimizer, config.rate, step, config.steps)
        losses = advance(*drawn(frames, features, config.batch, np.random.default_rng([config.seed, step])))
        if step % 20 == 0:
            run.log(rate=rate, loss=float(losses["loss"]))
        if step % 500 == 499:
            run.log(held_out=held_out())
    if not run.done:
        return None
    about = {"recipe": recipe, "minutes": round(run.seconds / 60, 1), "held_out": held_out()}
    policy.cpu().save(out / "policy.safetensors", about)
    return out / "policy.safetensors"
