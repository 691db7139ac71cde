"""How likely a step is to go wrong: a head on what is imagined after it, trained on what the environment called unsafe.

The encoder and the predictor stay as they are. The head sees the features and the proprioception after a step, and the
action that led there: pressing on a table shows as a low hand that was told to go lower. It is trained on what followed
and on what the predictor imagines of it, by turns: a planner asks it about the latter.
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
from worldmodel.encoder import autocast
from worldmodel.interface import Features
from worldmodel.training import gather, set_rate

LABEL = "privileged/unsafe"  # of a dataset: how many unsafe events there were in the step before a frame


class Outcomes(NamedTuple):
    """All frames of a dataset as what follows the steps before them, seen or imagined."""

    patches: np.ndarray | Tensor  # float16 [F, P, D]; a tensor is on the device where heads are trained
    proprio: np.ndarray  # float32 [F, S]


class Hazard(nn.Module):
    """The probability of an unsafe event in a step, from what follows it."""

    def __init__(self, features: int, patches: int, proprio: int, action: int, hidden: int = 192) -> None:
        super().__init__()
        self.squeeze = nn.Linear(features, 8)
        self.hidden = nn.Linear(8 * patches + proprio + action, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)
        self.register_buffer("proprio_mean", torch.zeros(proprio))
        self.register_buffer("proprio_std", torch.ones(proprio))

    def log_odds(self, after: Features, actions: Tensor) -> Tensor:
        """Log odds [...] of an event: after with patches [..., P, D] and proprio [..., S], actions [..., A]."""
        proprio = (after.proprio - self.proprio_mean) / self.proprio_std
        x = torch.cat((self.squeeze(after.patches).flatten(-2), proprio, actions), -1)
        return self.out(F.gelu(self.mix(F.gelu(self.hidden(x)))))[..., 0].float()

    @torch.no_grad()
    def forward(self, imagined: Features, actions: Tensor) -> Tensor:
        """Probabilities [B, N, K, H] for futures with patches [B, N, K, H, P, D], under actions [B, N, H, A]."""
        k = imagined.patches.shape[2]
        return self.log_odds(imagined, actions[:, :, None].expand(-1, -1, k, -1, -1)).sigmoid()


def fit_hazard(
    sources: Sequence[Outcomes], frames: Frames, unsafe: np.ndarray, epochs: int = 6, batch: int = 256, rate: float = 1e-3, seed: int = 0,
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
    rng = np.random.default_rng(seed)
    for step in tqdm(range(steps), desc="hazard", unit="step", delay=2):
        set_rate(optimizer, rate, step, steps)
        pick = np.sort(rng.integers(len(after), size=batch))
        with autocast(device):
            logits = head.log_odds(*_after(sources[step % len(sources)], frames, after[pick]))
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(logits, gather(targets, pick)).backward()
        optimizer.step()
    return head.requires_grad_(False).eval()


def judge_hazard(head: Hazard, outcomes: Outcomes, frames: Frames, unsafe: np.ndarray) -> dict[str, float]:
    """How well the head ranks and how honest it is on other steps: area under the ROC curve, expected calibration error."""
    after = np.setdiff1d(np.arange(len(frames)), frames.offsets[:-1])
    parts = np.array_split(after, max(1, len(after) // 512))
    told = np.concatenate([head.log_odds(*_after(outcomes, frames, part)).sigmoid().numpy(force=True) for part in parts])
    return {"hazard_auroc": auroc(told, unsafe[after] > 0), "hazard_ece": calibration_error(told, unsafe[after] > 0),
            "hazard_rate": float((unsafe[after] > 0).mean())}  # fmt: skip


def _after(outcomes: Outcomes, frames: Frames, index: np.ndarray) -> tuple[Features, Tensor]:
    device = _device_of(outcomes)
    return Features(*(gather(x, index, device) for x in outcomes)), gather(frames.actions, index - 1, device)


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
