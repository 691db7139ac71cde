"""Clips that end in steps that branch, a few ends of each step: what z is to tell.

Of whole episodes few steps branch, and show it in few patches: beside all that a predictor has yet to learn, a z that tells of it
is worth nothing. Here the ends of one step stand side by side, and patches count by how
far apart they are there.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from worldmodel.data import Frames
from worldmodel.training import gather

LABEL = "privileged/fork"  # which step an episode is an end of
ENDS = 4  # of a step, at a go


class Forks:
    """The forks that `collect --forks` made: frames of F, by steps, and what tells their ends apart."""

    def __init__(self, features: np.ndarray | Tensor, frames: Frames, transitions: int, weight: float) -> None:
        """features [F, P, D]; a patch counts 1, and `weight` more where ends are as far apart as in the mean over patches and steps.

        Raises ValueError where an episode has fewer transitions, or no step has several ends.
        """
        self.features, self.frames, self.transitions = features, frames, transitions
        length = int(np.diff(frames.offsets).min()) - 1
        if length < transitions:
            raise ValueError(f"forks have {length} transitions each, fewer than a clip's {transitions}; give fewer --transitions")
        of = defaultdict(list)  # steps of other folders may have the same labels
        for episode, last in zip(frames.episodes, frames.offsets[1:] - 1):
            of[episode.path.parent, int(frames.arrays[LABEL][last])].append(last)
        self.ends = [np.array(ends) for ends in of.values() if len(ends) > 1]  # [steps], frames
        if not self.ends:
            raise ValueError("no step of the forks has several ends; collect them with --forks 4 or more, none left out")
        apart = torch.stack([gather(features, ends).std(0, correction=0).mean(-1) for ends in self.ends])  # [steps, P]
        self.counts = 1 + weight * apart / apart.mean().clamp_min(1e-6)

    def draw(self, clips: int, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """Frames [clips, T + 1] and how much patches count in the transitions between them [clips, T, P]."""
        steps = rng.integers(len(self.ends), size=-(-clips // ENDS))
        last = np.concatenate([np.resize(rng.permutation(self.ends[step]), ENDS) for step in steps])[:clips]
        counts = torch.ones(clips, self.transitions, self.counts.shape[1], device=self.counts.device)
        counts[:, -1] = gather(self.counts, steps.repeat(ENDS)[:clips])
        return last[:, None] + np.arange(-self.transitions, 1), counts
