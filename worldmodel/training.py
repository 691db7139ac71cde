"""What every training run needs: a folder, resumable checkpoints, curves and a progress bar."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from worldmodel.checkpoint import fill, load_tensors, save_tensors
from worldmodel.data import replacing

logger = logging.getLogger(__name__)
SAVE_EVERY = 180.0  # seconds between checkpoints
MODULE = "module."  # begins the names of the modules' tensors in a checkpoint


class Run:
    """A training run in a folder: `for step in run:` trains from the last checkpoint to the last step.

    The folder holds `checkpoint.safetensors` (modules, optimiser, step, seconds, config), `metrics.jsonl` and
    TensorBoard curves. All randomness of a step must derive from (seed, step): then a resumed run is bit-equal.
    `minutes` ends the call early, with a checkpoint to resume from; it does not touch the schedule.

    Raises FileExistsError when the folder holds a run and `resume` is False, ValueError when it holds one of
    another config.
    """

    def __init__(
        self, out: Path, kind: str, config: dict, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: int,
        minutes: float | None, resume: bool,
    ) -> None:  # fmt: skip
        self.out, self.kind, self.config, self.modules, self.optimizer = out, kind, config, modules, optimizer
        self.steps, self.minutes, self.step, self.seconds = steps, minutes, 0, 0.0
        self.file = out / "checkpoint.safetensors"
        if self.file.exists():
            if not resume:
                raise FileExistsError(f"{out} holds a run already; add --resume to go on with it or choose another --out")
            self._restore()
        elif out.exists() and any(out.iterdir()) and not (resume and (out / "metrics.jsonl").exists()):
            raise FileExistsError(f"{out} is not empty and holds no checkpoint; choose another --out")

    @property
    def done(self) -> bool:
        """Whether the last step has been trained."""
        return self.step >= self.steps

    def __iter__(self) -> Iterator[int]:
        from torch.utils.tensorboard import SummaryWriter

        self.out.mkdir(parents=True, exist_ok=True)
        if not self.step:
            self._forget()  # of a run that was killed before its first checkpoint
        self._writer = SummaryWriter(self.out / "curves", purge_step=self.step)
        start = saved = time.monotonic()
        before = self.seconds
        bar = tqdm(total=self.steps, initial=self.step, desc=self.kind, unit="step", dynamic_ncols=True)
        while not self.done:
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - start
            bar.update()
            if now - saved > SAVE_EVERY:
                self.save()
                saved = now
            if self.minutes is not None and now - start > 60 * self.minutes:
                break
        self.save()
        self._writer.close()
        bar.close()

    def log(self, **values: float) -> None:
        """Record scalars of this step in metrics.jsonl and TensorBoard."""
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "minutes": round(self.seconds / 60, 3), **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, self.step)

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {MODULE + k: v for k, v in self.modules.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        save_tensors(self.file, self.kind, tensors, self.config, {"step": self.step, "seconds": self.seconds})

    def _forget(self) -> None:
        """Drop the lines of metrics.jsonl that will be trained, and so written, again."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with replacing(path) as file:
            file.write("".join(line for line in lines if json.loads(line)["step"] < self.step).encode())

    def _restore(self) -> None:
        tensors, config, about = load_tensors(self.file, self.kind)
        plain = json.loads(json.dumps(self.config))
        for name in sorted(config.keys() | plain.keys()):
            if config.get(name) != plain.get(name):
                raise ValueError(
                    f"{self.out} holds a run with {name} = {config.get(name)}, not {plain.get(name)}; "
                    "give the same settings to resume it, or choose another --out"
                )
        fill(self.modules, {k[len(MODULE) :]: v for k, v in tensors.items() if k.startswith(MODULE)}, self.file)
        state: dict[int, dict] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.seconds = about["step"], about["seconds"]
        self._forget()
        logger.info("resuming %s at step %d of %d", self.out, self.step, self.steps)


def optimizer_for(modules: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; the learning rate is set per step by `set_rate`."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> float:
    """Warm-up over 5 % of the steps, constant, linear cool-down to 2 % of peak over the last 35 %."""
    rate = peak * min((step + 1) / (0.05 * steps + 1), 1.0, max((steps - step) / (0.35 * steps + 1), 0.02))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def effective_rank(features: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of features [M, D] (RankMe, arXiv 2210.02885)."""
    values = torch.linalg.svdvals(features.float() - features.float().mean(0))
    share = values / values.sum().clamp_min(1e-12) + 1e-12
    return float(torch.exp(-(share * share.log()).sum()))


def seeded(*seeds: int) -> torch.Generator:
    """A generator that depends on all of the seeds."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(mixed)
