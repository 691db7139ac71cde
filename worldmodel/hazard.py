"""How likely a step is to go wrong: a head on what is imagined after it, trained on what the environment called unsafe.

The encoder and the predictor stay as they are. The head knows where the hand is, where it has just come from and what it was told, where it
closed, and sees what is imagined to follow: pressing on a table shows as a low hand that is told to go lower, by as much as what it holds
reaches below it. It is trained on what followed and on what the predictor imagines of it, by turns: a planner asks it about the latter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.data import Frames
from worldmodel.interface import Context, Features, held_after
from worldmodel.training import gather, set_rate

STEPS = 4.0  # a step's changes of proprioception are small beside the data's deviation; they count so many times
LABEL = "privileged/unsafe"  # of a dataset: how many unsafe events there were in the step before a frame


class Outcomes(NamedTuple):
    """All frames of a dataset as what follows the steps before them, seen or imagined."""

    patches: np.ndarray | Tensor  # float16 [F, P, D]; a tensor is on the device where heads are trained
    proprio: np.ndarray  # float32 [F, S]


class Moment(NamedTuple):
    """A step, what led to it, and what follows, seen or imagined; leading axes alike."""

    before: Tensor  # proprioception, [..., S]
    change: Tensor  # of it, in the step before, [..., S]
    ran: Tensor  # action before, [..., A]
    held: Tensor  # as `Context.held`, [..., S]
    action: Tensor  # [..., A]
    after: Features  # patches [..., P, D], proprio [..., S]


class Hazard(nn.Module):
    """The probability of an unsafe event in a step.

    What is felt, by millimetres, and what is seen speak for themselves: the sum of their log odds. Where the hand is in
    relation to where it closed tells how high it carries a thing, of which no picture of 96 pixels tells millimetres.
    """

    def __init__(self, features: int, patches: int, proprio: int, action: int, hidden: int = 256) -> None:
        super().__init__()
        self.squeeze = nn.Linear(features, 8)
        self.see = nn.Sequential(nn.Linear(8 * patches, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.feel = nn.Sequential(
            nn.Linear(4 * proprio + 1 + 2 * action, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1),
        )  # fmt: skip
        self.register_buffer("proprio_mean", torch.zeros(proprio))
        self.register_buffer("proprio_std", torch.ones(proprio))

    def log_odds(self, moment: Moment) -> Tensor:
        """Log odds [...] of an event in a step."""
        before, _, ran, held, action, after = moment
        moved = STEPS * torch.cat((moment.change, (before - held).nan_to_num(), after.proprio - before), -1).unflatten(-1, (3, -1)) / self.proprio_std
        place = (before - self.proprio_mean) / self.proprio_std
        felt = self.feel(torch.cat((place, moved.flatten(-2), (~held.isnan().any(-1, keepdim=True)).to(place), ran, action), -1))
        return (felt + self.see(self.squeeze(after.patches).flatten(-2)))[..., 0].float()

    @torch.no_grad()
    def forward(self, context: Context, imagined: Features, actions: Tensor) -> Tensor:
        """Probabilities [B, N, K, H] for futures with patches [B, N, K, H, P, D], under actions [B, N, H, A]."""
        return self.log_odds(moments(context, imagined, actions)).sigmoid()


def moments(context: Context, imagined: Features, actions: Tensor) -> Moment:
    """The steps of futures, leading axes [B, N, K, H]. Raises ValueError for a context without proprioception."""
    if context.features.proprio is None or imagined.proprio is None:
        raise ValueError("a hazard head needs proprioception, of the context and of what is imagined; give obs['proprio']")
    axes = imagined.proprio.shape[:3]
    spread = lambda x: x[:, None, None].expand(*axes, -1)  # noqa: E731  [B, ...] -> [B, N, K, ...]
    past, count = context.features.proprio.to(imagined.proprio), context.features.proprio.shape[1]
    actions = actions[:, :, None].expand(*axes, -1, -1).to(past)
    ran = context.actions[:, -1].to(past) if count > 1 else torch.zeros_like(actions[:, 0, 0, 0])
    before = torch.cat((spread(past[:, -1])[..., None, :], imagined.proprio[..., :-1, :]), -2)
    earlier = torch.cat((spread(past[:, max(count - 2, 0)])[..., None, :], before[..., :-1, :]), -2)
    held = [torch.full_like(before[..., 0, :], torch.nan) if context.held is None else spread(context.held.to(past))]
    for h in range(actions.shape[-2] - 1):
        held.append(held_after(held[-1], before[..., h, :], actions[..., h, :]))
    ran = torch.cat((spread(ran)[..., None, :], actions[..., :-1, :]), -2)
    return Moment(before, before - earlier, ran, torch.stack(held, -2), actions, imagined)


def held_in(frames: Frames) -> np.ndarray:
    """`Context.held` at every frame of a dataset: float32 [F, S]."""
    held = torch.full((len(frames), frames.proprio.shape[1]), torch.nan)
    starts, lengths = frames.offsets[:-1], np.diff(frames.offsets)
    for t in range(lengths.max() - 1):
        now = torch.from_numpy(starts[lengths > t + 1] + t)
        held[now + 1] = held_after(held[now], *(torch.from_numpy(x)[now] for x in (frames.proprio, frames.actions)))
    return held.numpy()


def fit_hazard(
    sources: Sequence[Outcomes], frames: Frames, unsafe: np.ndarray, epochs: int = 6, batch: int = 512, rate: float = 2e-3, seed: int = 0,
    start: Hazard | None = None,
) -> Hazard:  # fmt: skip
    """A head trained on all steps of frames, with outcomes of each source by turns; unsafe [F] events in the step before a frame.

    It begins as `start`, which stays as it is, or with random weights, and is on the device of the outcomes' patches.
    """
    after = np.setdiff1d(np.arange(len(frames)), frames.offsets[:-1])  # all frames but the first of each episode
    targets = torch.from_numpy((unsafe[after] > 0).astype(np.float32))
    if start is not None:
        head = copy.deepcopy(start).requires_grad_(True).train()
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = Hazard(*sources[0].patches.shape[:0:-1], frames.proprio.shape[1], frames.actions.shape[1])
        head.proprio_mean.copy_(torch.from_numpy(frames.proprio.mean(0)))
        head.proprio_std.copy_(torch.from_numpy(frames.proprio.std(0)).clamp_min(1e-2))
    device = _device_of(sources[0])
    head, targets = head.to(device), targets.to(device)
    steps = max(10, epochs * len(after) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.05, fused=True)
    rng, held = np.random.default_rng(seed), held_in(frames)
    for step in tqdm(range(steps), desc="hazard", unit="step", delay=2):
        set_rate(optimizer, rate, step, steps)
        pick = np.sort(rng.integers(len(after), size=batch))
        logits = head.log_odds(moments_before(sources[step % len(sources)], frames, held, after[pick]))
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(logits, gather(targets, pick)).backward()
        optimizer.step()
    return head.requires_grad_(False).eval()


def judge_hazard(head: Hazard, outcomes: Outcomes, frames: Frames, unsafe: np.ndarray) -> dict[str, float]:
    """How well the head ranks and how honest it is on other steps: area under the ROC curve, expected calibration error."""
    after = np.setdiff1d(np.arange(len(frames)), frames.offsets[:-1])
    parts, held = np.array_split(after, max(1, len(after) // 512)), held_in(frames)
    told = np.concatenate([head.log_odds(moments_before(outcomes, frames, held, part)).sigmoid().numpy(force=True) for part in parts])
    return {"hazard_auroc": auroc(told, unsafe[after] > 0), "hazard_ece": calibration_error(told, unsafe[after] > 0),
            "hazard_rate": float((unsafe[after] > 0).mean())}  # fmt: skip


def moments_before(outcomes: Outcomes, frames: Frames, held: np.ndarray, index: np.ndarray) -> Moment:
    """The steps that led to frames [B], none of them an episode's first."""
    device, begins = _device_of(outcomes), frames.offsets[frames.episode_of[index]]
    take = lambda x, i: gather(x, i, device)  # noqa: E731
    before, earlier = take(frames.proprio, index - 1), take(frames.proprio, np.maximum(index - 2, begins))
    ran = take(frames.actions, np.maximum(index - 2, begins)) * torch.from_numpy(index - 2 >= begins).to(device)[:, None]
    after = Features(*(take(x, index) for x in outcomes))
    return Moment(before, before - earlier, ran, take(held, index - 1), take(frames.actions, index - 1), after)


def _device_of(outcomes: Outcomes) -> torch.device:
    return outcomes.patches.device if isinstance(outcomes.patches, Tensor) else torch.device("cpu")


def auroc(scores: np.ndarray, events: np.ndarray) -> float:
    """Area under the ROC curve of scores [M] for events bool [M]; NaN where all or none are events."""
    ranks = np.empty(len(scores))
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    first = np.searchsorted(ordered, ordered, "left")
    last = np.searchsorted(ordered, ordered, "right")
    ranks[order] = (first + last + 1) / 2  # ties share their mean rank
    yes, no = int(events.sum()), int((~events).sum())
    return float((ranks[events].sum() - yes * (yes + 1) / 2) / (yes * no)) if yes and no else float("nan")


def calibration_error(probabilities: np.ndarray, events: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: mean distance of probability and rate over bins of equal width, weighted by their size."""
    which = (probabilities * bins).astype(int).clip(0, bins - 1)
    inside = [which == b for b in range(bins) if (which == b).any()]
    return float(sum(abs(probabilities[i].mean() - events[i].mean()) * i.mean() for i in inside))
