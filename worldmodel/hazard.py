"""How likely a step is to go wrong: a head on what is seen and imagined, trained on what the environment called unsafe.

The encoder and the predictor stay as they are. The head sees the moment before a step, and knows where the hand is, where it has
just come from, what it was told, where it closed, and where it is imagined to come: pressing on a table shows as a low hand that is
told to go lower, by as much as what it holds reaches below it. It is trained on what the predictor imagines, not on what followed: a
hand that did not get where it was told has met something, but that is not known beforehand.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.data import Frames
from worldmodel.interface import Context, Features, held_after
from worldmodel.probe import AttentiveProbe
from worldmodel.training import gather, set_rate

STEPS = 4.0  # a step's changes of proprioception are small beside the data's deviation; they count so many times
LOOK = 64  # numbers that a head which learns to look keeps of a picture
LOOKED = 0.5  # deviation of the numbers of a look that others have learned: there are many
DROPOUT = 0.3
LABEL = "privileged/unsafe"  # of a dataset: how many unsafe events there were in the step before a frame


class Moment(NamedTuple):
    """A step, what led to it, and where it is imagined to lead; leading axes alike."""

    before: Tensor  # proprioception, [..., S]
    change: Tensor  # of it, in the step before, [..., S]
    ran: Tensor  # action before, [..., A]
    held: Tensor  # as `Context.held`, [..., S]
    action: Tensor  # [..., A]
    after: Tensor  # proprioception, [..., S]


class Hazard(nn.Module):
    """The probability of an unsafe event in a step.

    Where the hand is in relation to where it closed tells how high it carries a thing, of which no picture of 96 pixels tells
    millimetres; `look` tells where things are.
    """

    def __init__(self, look: AttentiveProbe, proprio: int, action: int, hidden: int = 384) -> None:
        super().__init__()
        self.look = look
        self.feel = nn.Sequential(
            nn.Linear(len(look.mean) + 4 * proprio + 1 + 2 * action, hidden), nn.GELU(), nn.Dropout(DROPOUT),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(DROPOUT),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, 1),
        )  # fmt: skip
        self.register_buffer("proprio_mean", torch.zeros(proprio))
        self.register_buffer("proprio_std", torch.ones(proprio))

    def log_odds(self, looked: Tensor, moment: Moment) -> Tensor:
        """Log odds [...] of an event in a step; looked [..., W] at what is seen before it."""
        before, _, ran, held, action, after = moment
        moved = STEPS * torch.cat((moment.change, (before - held).nan_to_num(), after - before), -1).unflatten(-1, (3, -1)) / self.proprio_std
        place = (before - self.proprio_mean) / self.proprio_std
        holds = (~held.isnan().any(-1, keepdim=True)).to(place)
        return self.feel(torch.cat((looked.to(place), place, moved.flatten(-2), holds, ran, action), -1))[..., 0].float()

    @torch.no_grad()
    def forward(self, context: Context, imagined: Features, actions: Tensor) -> Tensor:
        """Probabilities [B, N, K, H] for futures with patches [B, N, K, H, P, D], under actions [B, N, H, A]."""
        moment, own = moments(context, imagined, actions), self.proprio_mean.dtype
        axes = imagined.patches.shape[:4]
        now = self.look(context.features.patches[:, -1].to(own))[:, None, None, None].expand(*axes[:3], 1, -1)
        later = imagined.patches[..., : axes[3] - 1, :, :]
        looked = torch.cat((now, self.look(later.flatten(0, 3).to(own)).view(*later.shape[:4], -1)), 3) if axes[3] > 1 else now
        return self.log_odds(looked, moment).sigmoid()


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
    return Moment(before, before - earlier, ran, torch.stack(held, -2), actions, imagined.proprio)


def held_in(frames: Frames) -> np.ndarray:
    """`Context.held` at every frame of a dataset: float32 [F, S]."""
    held = torch.full((len(frames), frames.proprio.shape[1]), torch.nan)
    starts, lengths = frames.offsets[:-1], np.diff(frames.offsets)
    for t in range(lengths.max() - 1):
        now = torch.from_numpy(starts[lengths > t + 1] + t)
        held[now + 1] = held_after(held[now], *(torch.from_numpy(x)[now] for x in (frames.proprio, frames.actions)))
    return held.numpy()


def fit_hazard(
    features: np.ndarray | Tensor, told: np.ndarray, frames: Frames, unsafe: np.ndarray, epochs: int = 6, batch: int = 512,
    rate: float = 2e-3, seed: int = 0, look: AttentiveProbe | None = None,
) -> Hazard:  # fmt: skip
    """A head trained on all steps of frames with features float16 [F, P, D], and unsafe [F] events in the step before a frame.

    told [F, S]: the proprioception that is imagined to follow. The head sees by `look`, which stays as it is but for the size of its
    numbers, or learns to look. It is on the device of a tensor of features.
    """
    after = np.setdiff1d(np.arange(len(frames)), frames.offsets[:-1])  # all frames but the first of each episode
    targets = torch.from_numpy((unsafe[after] > 0).astype(np.float32))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = AttentiveProbe(*features.shape[1:], LOOK).fitted(features) if look is None else copy.deepcopy(look)
        head = Hazard(own.requires_grad_(look is None), frames.proprio.shape[1], frames.actions.shape[1])
        head.proprio_mean.copy_(torch.from_numpy(frames.proprio.mean(0)))
        head.proprio_std.copy_(torch.from_numpy(frames.proprio.std(0)).clamp_min(1e-2))
        device = features.device if isinstance(features, Tensor) else torch.device("cpu")
        head, targets = head.to(device), targets.to(device)
        looked = None
        if look is not None:
            looked = looks(head, features)
            mean, std = looked.mean(0), looked.std(0).clamp_min(1e-3) / LOOKED
            looked, own.mean, own.std = ((looked - mean) / std).half(), (own.mean - mean) / std, own.std / std
        steps = max(10, epochs * len(after) // batch)
        optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=rate, weight_decay=0.05, fused=True)
        rng, held = np.random.default_rng(seed), held_in(frames)
        for step in tqdm(range(steps), desc="hazard", unit="step", delay=2):
            set_rate(optimizer, rate, step, steps)
            pick = np.sort(rng.integers(len(after), size=batch))
            index = after[pick]
            seen = head.look(gather(features, index - 1)) if looked is None else gather(looked, index - 1)
            logits = head.log_odds(seen, moments_before(told, frames, held, index, device))
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(logits, gather(targets, pick)).backward()
            optimizer.step()
    return head.requires_grad_(False).eval()


@torch.no_grad()
def looks(head: Hazard, features: np.ndarray | Tensor) -> Tensor:
    """What a head keeps [F, W] of pictures' features [F, P, D]."""
    parts = np.array_split(np.arange(len(features)), len(features) // 1024 + 1)
    return torch.cat([head.look(gather(features, slice(part[0], part[-1] + 1))) for part in tqdm(parts, desc="look", delay=2)])


def judge_hazard(head: Hazard, features: np.ndarray | Tensor, told: np.ndarray, frames: Frames, unsafe: np.ndarray) -> dict[str, float]:
    """How well the head ranks and how honest it is on other steps, given as to `fit_hazard`: area under the ROC curve, expected calibration error."""
    after = np.setdiff1d(np.arange(len(frames)), frames.offsets[:-1])
    looked, held = looks(head, features), held_in(frames)
    odds = head.log_odds(gather(looked, after - 1), moments_before(told, frames, held, after, looked.device))
    probabilities = odds.sigmoid().numpy(force=True)
    return {"hazard_auroc": auroc(probabilities, unsafe[after] > 0), "hazard_ece": calibration_error(probabilities, unsafe[after] > 0),
            "hazard_rate": float((unsafe[after] > 0).mean())}  # fmt: skip


def moments_before(told: np.ndarray, frames: Frames, held: np.ndarray, index: np.ndarray, device: torch.device | str = "cpu") -> Moment:
    """The steps that led to frames [B], none of them an episode's first, and what was told [F, S] to follow."""
    begins = frames.offsets[frames.episode_of[index]]
    take = lambda x, i: gather(x, i, device)  # noqa: E731
    before, earlier = take(frames.proprio, index - 1), take(frames.proprio, np.maximum(index - 2, begins))
    ran = take(frames.actions, np.maximum(index - 2, begins)) * torch.from_numpy(index - 2 >= begins).to(device)[:, None]
    return Moment(before, before - earlier, ran, take(held, index - 1), take(frames.actions, index - 1), take(told, index))


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
