"""What demonstrations teach: the proposer of sub-goals, on a frozen encoder's features, and the way from one to the next.

Both learn from keyframes of episodes that are marked as successes, of features, proprioception and actions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel.data import Dataset, Frames, read_episode
from worldmodel.guide import Way
from worldmodel.interface import Encoder, Features
from worldmodel.probe import fit
from worldmodel.proposer import Proposer, ProposerConfig
from worldmodel.train import identify, placed_features
from worldmodel.training import Run, Stepper, gather, optimizer_for, seeded, set_rate

CLOSES, OPENS = -0.5, 0.5  # the gripper's action, beyond which it is told to close or open
RESTS = 5e-3  # m per step, change of its opening below which it is at rest
WAY_BATCH, WAY_NOISE = 512, 2e-3  # frames; m and rad of the goals, which planners read off pictures
WAY_DECAY = 0.01  # of weights
HINDSIGHT = 0.5  # share of goals that are a frame on the way to the keyframe


@dataclass(frozen=True)
class ProposalConfig:
    """A training recipe; its fields, the encoder and the data decide the weights."""

    merge: int = 2
    embed_dim: int = 192
    depth: int = 4
    num_heads: int = 3
    batch: int = 64  # pairs of a frame and a goal per step
    draws: int = 8  # pairs of each grasp that the hands are read from
    epochs: int = 20  # passes over them
    steps: int = 2000
    rate: float = 8e-4
    way_steps: int = 4000  # of the learned way, on WAY_BATCH frames each
    way_rate: float = 2e-3
    weight_decay: float = 0.04
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("merge", "embed_dim", "depth", "num_heads", "batch", "draws", "epochs", "steps", "way_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def keyframes(actions: np.ndarray, proprio: np.ndarray) -> tuple[int, int, int, int] | None:
    """Where an episode's last grasp begins, has closed, lets go and is over: frames, None where there is none.

    Of actions [T, A] and proprio [T + 1, S], whose last entries are the gripper's: the frame after the opening before it,
    that at which the closing gripper has come to rest, that at which it is told to open, and the last one before it is
    told to close again. A gripper that never lets go does so at the end.
    """
    command, opening = actions[:, -1], proprio[:, -1]
    closes, opens = (np.flatnonzero(told & ~np.append(False, told[:-1])) for told in (command < CLOSES, command > OPENS))
    if len(closes) and not (opens > closes[0]).any():
        opens = np.append(opens, len(actions))
    for last in opens[::-1]:
        if not (closes < last).any():
            return None
        start = closes[closes < last][-1]
        still = np.abs(np.diff(opening[start + 1 : last + 1])) < RESTS
        if still.any():
            earlier, later = opens[opens < start], closes[closes > last]
            first = int(earlier[-1]) + 1 if len(earlier) else 0
            return first, int(start + 1 + still.argmax()), int(last), int(later[0]) if len(later) else len(actions)
    return None


def lessons(frames: Frames) -> np.ndarray:
    """The `keyframes` of all successful episodes: int [M, 4], indices of frames. Raises ValueError where there are none."""
    rows = []
    for episode, start, end in zip(frames.episodes, frames.offsets, frames.offsets[1:]):
        if bool(read_episode(episode.path, ("success",))["success"]):
            found = keyframes(frames.actions[start : end - 1], frames.proprio[start:end])
            rows += [] if found is None else [start + np.array(found)]
    if not rows:
        raise ValueError("no episode is a success in which the gripper closes and comes to rest: collect experts' episodes")
    return np.array(rows)


def lesson(rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw for rows [B, 4] of `lessons` a frame up to the grasp, the keyframes [B, COUNT], and a goal after the release."""
    first, closed, opens, end = rows.T
    now, goal = rng.integers(first, closed + 1), rng.integers(np.minimum(opens + 3, end), end + 1)
    return now, np.stack((closed, opens), 1), goal


def propose_losses(
    proposer: Proposer, patches: Tensor, proprio: Tensor, goal: Tensor, own: Tensor, true: Tensor
) -> dict[str, Tensor]:
    """Losses of keyframes filled in between a frame, patches [B, P, D] and proprio [B, S], and a goal [B, P, D].

    Those have proprioception own [B, COUNT, S], and are in truth [B, COUNT, P, D].
    """
    wrong = (proposer(Features(patches, proprio), goal, own) - true).abs().mean((0, 2, 3))
    return {"loss": wrong.mean(), "patches_closed": wrong[0], "patches_opens": wrong[1]}


def draw_lessons(
    features: np.ndarray | Tensor, proprio: np.ndarray, rows: np.ndarray, rng: np.random.Generator, device: torch.device | str
) -> list[Tensor]:
    """What `propose_losses` takes, drawn for rows [B, 4] of `lessons`; features [F, P, D] and proprio [F, S] of all frames."""
    now, between, goal = lesson(rows, rng)
    pairs = (features, now), (proprio, now), (features, goal), (proprio, between), (features, between)
    return [gather(*pair, device) for pair in pairs]


def fit_hands(
    proposer: Proposer, features: np.ndarray | Tensor, proprio: np.ndarray, rows: np.ndarray, config: ProposalConfig
) -> None:
    """Teach it to read off a frame up to the grasp where the hand will close, and off a goal where it opened."""
    rng = np.random.default_rng(config.seed)
    now, between, goal = lesson(rows.repeat(config.draws, 0), rng)
    for k, index in enumerate((now, goal)):
        told = torch.from_numpy(proprio[between[:, k]])
        seen = features[torch.from_numpy(index).to(features.device) if isinstance(features, Tensor) else index]
        proposer.hands[k] = fit(seen, told, torch.ones_like(told), config.epochs, config.seed + k).to(proposer.place.device)


@torch.no_grad()
def judge_hands(proposer: Proposer, features: np.ndarray | Tensor, proprio: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """`place_closed` and `place_opens`: medians of how far the hands that it reads are off (m)."""
    now, between, goal = lesson(rows, np.random.default_rng(0))
    patches = [gather(features, index, proposer.place.device) for index in (now, goal)]
    wrong = proposer.hands_of(*patches).cpu() - torch.from_numpy(proprio[between])
    off = wrong[:, :, :3].norm(dim=-1).median(0)[0]
    return {"place_closed": float(off[0]), "place_opens": float(off[1])}


def ways(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """Frames of successful episodes, and for each that which its demonstration went to next: ints [N], [N].

    Those are the `keyframes`, and in episodes whose gripper never closes the last frame.
    """
    pairs = []
    for episode, start, end in zip(frames.episodes, frames.offsets, frames.offsets[1:]):
        if bool(read_episode(episode.path, ("success",))["success"]):
            actions = frames.actions[start : end - 1]
            found = keyframes(actions, frames.proprio[start:end])
            if found is None and not (actions[:, -1] < CLOSES).any():
                found = 0, len(actions)
            pairs += [] if found is None else [(start + a, start + b) for a, b in zip(found, found[1:])]
    index = [np.arange(a, b) for a, b in pairs]
    return np.concatenate(index), np.repeat([b for _, b in pairs], [len(i) for i in index])


def fit_way(frames: Frames, config: ProposalConfig) -> Way:
    """Clone what demonstrations did on their `ways`.

    Some of the goals are not the keyframe but a frame before it, in hindsight: goals of other tasks lie there. L1, since a
    demonstration's steps are at the limit or not, seldom between.
    """
    index, ahead = ways(frames)
    own, told = torch.from_numpy(frames.proprio), torch.from_numpy(frames.actions)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        way = Way(own.shape[1], told.shape[1])
    way.proprio_mean.copy_(own.mean(0))
    way.proprio_std.copy_(own.std(0).clamp_min(1e-2))
    optimizer = optimizer_for(way, WAY_DECAY)
    for step in tqdm(range(config.way_steps), desc="way", unit="step"):
        set_rate(optimizer, config.way_rate, step, config.way_steps)
        rng = np.random.default_rng([config.seed, step])
        some = rng.integers(len(index), size=WAY_BATCH)
        sooner = rng.integers(index[some] + 1, ahead[some] + 1)
        goal = own[np.where(rng.random(WAY_BATCH) < HINDSIGHT, sooner, ahead[some])]
        goal = goal + WAY_NOISE * torch.randn(goal.shape, generator=seeded(config.seed, step))
        loss = (way(own[index[some]], goal) - told[index[some]]).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return way.requires_grad_(False)


@torch.no_grad()
def judge_way(way: Way, frames: Frames) -> float:
    """L1 of its actions on other `ways`."""
    index, ahead = ways(frames)
    own = torch.from_numpy(frames.proprio)
    return float((way(own[index], own[ahead]) - torch.from_numpy(frames.actions[index])).abs().mean())


def fit_proposals(
    config: ProposalConfig, encoder: Encoder, data: Dataset, out: Path, cache: Path, minutes: float | None = None,
    resume: bool = False, way_data: Dataset | None = None, device: str = "cpu",
) -> tuple[Proposer, Way, dict] | None:  # fmt: skip
    """Train both in the folder `out`; None when `minutes` ended first (resume to go on). Also what they score, held out.

    `way_data`: the demonstrations that the way learns from, where those are others.
    """
    parts = data.split(0.03)
    frames, held = (part.load(keys=("proprio", "actions")) for part in parts)
    rows, others = lessons(frames), lessons(held)  # before what takes minutes: there may be none
    features, kept = placed_features(encoder, parts, cache, device)
    sizes = ProposerConfig(
        encoder.config.embed_dim, encoder.config.grid, frames.proprio.shape[1], config.merge, config.embed_dim, config.depth,
        config.num_heads,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        proposer = Proposer(sizes)
    proposer.proprio_mean.copy_(torch.from_numpy(frames.proprio.mean(0)))
    proposer.proprio_std.copy_(torch.from_numpy(frames.proprio.std(0)).clamp_min(1e-2))
    proposer.to(device)

    @torch.no_grad()
    def scores() -> dict[str, float]:
        losses = propose_losses(proposer, *draw_lessons(kept, held.proprio, others, np.random.default_rng(config.seed), device))
        return {f"held_out/{name}": float(value) for name, value in losses.items()}

    optimizer = optimizer_for(proposer, config.weight_decay)
    recipe = asdict(config) | {"data": data.fingerprint, "encoder": identify(encoder)}
    run = Run(out, "proposing", recipe, proposer, optimizer, config.steps, minutes, resume)
    advance = Stepper(partial(propose_losses, proposer), proposer, optimizer, 1.0)
    for step in run:
        rng = np.random.default_rng([config.seed, step])
        rate = set_rate(optimizer, config.rate, step, config.steps)
        some = rows[rng.integers(len(rows), size=config.batch)]
        losses = advance(*draw_lessons(features, frames.proprio, some, rng, device))
        if step % 20 == 0:
            run.log(rate=rate, **{k: float(v) for k, v in losses.items()})
        if step % 200 == 199:
            run.log(**scores())
    if not run.done:
        return None
    fit_hands(proposer, features, frames.proprio, rows, config)
    about = {"recipe": recipe, "minutes": round(run.seconds / 60, 1), "episodes": len(rows), **scores()}
    about |= {f"held_out/{name}": error for name, error in judge_hands(proposer, kept, held.proprio, others).items()}
    if way_data is not None:
        frames, held = (part.load(keys=("proprio", "actions")) for part in way_data.split(0.03))
        about["way_data"] = way_data.fingerprint
    way = fit_way(frames, config)
    about["held_out/way"] = judge_way(way, held)
    return proposer.cpu().requires_grad_(False).eval(), way, about
