"""What every training run needs: a folder, resumable checkpoints, curves and a progress bar."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.checkpoint import fill, load_tensors, save_tensors
from worldmodel.encoder import autocast, keep_memory
from worldmodel.files import is_leftover, owned, remove_leftovers, replacing

logger = logging.getLogger(__name__)
SAVE_EVERY = 180.0  # seconds between checkpoints
MODULE = "module."  # begins the names of the modules' tensors in a checkpoint
SEEN_BEFORE = 3  # steps with inputs of the same shapes, before one is recorded on a GPU
RECORDED = 200  # of which there are at most so many


class Run:
    """A training run in a folder: `for step in run:` trains from the last checkpoint to the last step.

    The folder holds `checkpoint.safetensors` (modules, optimiser, step, seconds, config), `metrics.jsonl` and
    TensorBoard curves. All randomness of a step must derive from (seed, step): then a resumed run is bit-equal.
    `minutes` ends the call early, with a checkpoint to resume from; it does not touch the schedule.

    Raises FileExistsError when the folder holds a run and `resume` is False, or, once it begins, where another process
    trains there; ValueError when it holds one of another config; RuntimeError where a loss that is logged is no number.
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
        elif out.exists() and (found := {path.name for path in out.iterdir() if not is_leftover(path)}):
            begun = "metrics.jsonl" in found
            if not (begun and resume):
                remedy = "add --resume to begin it anew" if begun else "choose another --out"
                raise FileExistsError(f"{out} is not empty and holds no checkpoint; {remedy}")

    @property
    def done(self) -> bool:
        """Whether the last step has been trained."""
        return self.step >= self.steps

    @property
    def tells(self) -> bool:
        """Whether the present step's losses are to be logged: every 20th's, and the last one's."""
        return self.step % 20 == 0 or self.step == self.steps - 1

    def __iter__(self) -> Iterator[int]:
        with owned(self.out, self.kind) as folder:
            if not self.step and self.file.exists():
                raise FileExistsError(f"another process has trained in {folder} meanwhile; choose another --out")
            remove_leftovers(folder)
            yield from self._trained()

    def _trained(self) -> Iterator[int]:
        from torch.utils.tensorboard import SummaryWriter

        keep_memory()
        if not self.step:
            self._forget()  # of a run that was killed before its first checkpoint
        self._writer = SummaryWriter(self.out / "curves", purge_step=self.step)
        start = saved = time.monotonic()
        before = self.seconds
        bar = tqdm(total=self.steps, initial=self.step, desc=self.kind, unit="step", dynamic_ncols=True)
        with _told_to_stop() as told:
            while not self.done:
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.seconds = before + now - start
                bar.update()
                if now - saved > SAVE_EVERY:
                    self.save()
                    saved = now
                if told or self.minutes is not None and now - start > 60 * self.minutes:
                    break
            self.save()
        self._writer.close()
        bar.close()
        if told:
            raise KeyboardInterrupt(f"after step {self.step} of {self.steps}, which is kept: the same command with --resume goes on")

    def log(self, **values: float) -> None:
        """Record scalars of this step in metrics.jsonl and TensorBoard; those named loss, or .../loss, must be numbers."""
        if wrong := [name for name, value in values.items() if name.rpartition("/")[2] == "loss" and not math.isfinite(value)]:
            raise RuntimeError(f"the {self.kind} diverged: {wrong[0]} is {values[wrong[0]]} at step {self.step}; use a lower rate, or look at the data")
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
        if lines and not lines[-1].endswith("\n"):  # torn
            lines.pop()
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


@contextlib.contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """Becomes true with the first Ctrl-C, so that a step can be ended; the second one interrupts as ever."""
    told: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):  # who alone is told; who is to ignore it
        yield told
        return

    def note(number: int, frame: object) -> None:
        told.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield told
    finally:
        signal.signal(signal.SIGINT, before)


class Stepper:
    """Steps of an optimiser: a loss, its gradients, clipped to a norm, applied.

    On a GPU a small model waits for the launches of its thousand small kernels. There a step whose inputs have shapes that
    were seen before is recorded once, as a CUDA graph, and replayed. So the loss may copy nothing from or to a GPU, and what changes
    from step to step must be among its inputs.
    """

    def __init__(self, loss: Callable[..., dict[str, Tensor]], modules: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self._loss, self._modules, self._optimizer, self._clip = loss, modules, optimizer, clip
        self._device = next(modules.parameters()).device
        self._seen: Counter[tuple] = Counter()
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]] = {}
        if self._device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Take a step: what `loss`, a function of the inputs, returns, and the gradient's `norm`; good until the next step.

        `loss` is the entry to minimise.
        """
        if self._device.type != "cuda":
            return self._step(inputs)
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            losses = self._replay(inputs)
        outer.wait_stream(self._stream)
        return losses

    def _step(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        with autocast(self._device):
            losses = self._loss(*inputs)
        self._optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self._modules.parameters(), self._clip)
        self._optimizer.step()
        return {"norm": norm} | {name: value.detach() for name, value in losses.items()}

    def _replay(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recorded:
            self._seen[shapes] += 1
            if self._seen[shapes] <= SEEN_BEFORE or len(self._recorded) == RECORDED:
                return self._step(inputs)
            graph, own = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, self._pool, self._stream):
                losses = self._step(own)
            self._recorded[shapes] = graph, own, losses
        graph, own, losses = self._recorded[shapes]
        for mine, given in zip(own, inputs):
            mine.copy_(given)
        graph.replay()
        return losses


def optimizer_for(modules: nn.Module, weight_decay: float, faster: Sequence[nn.Parameter] = (), times: float = 1.0) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; the learning rate is set per step by `set_rate`, `times` as high for what is `faster`."""
    apart = {id(p) for p in faster} if times != 1 else set()
    trained = [p for p in modules.parameters() if p.requires_grad]
    device = trained[0].device
    groups = []
    for factor in (1.0, times) if apart else (1.0,):
        parameters = [p for p in trained if (id(p) in apart) == (factor != 1)]
        for matrices in (True, False):
            own = {"params": [p for p in parameters if (p.dim() > 1) == matrices], "weight_decay": weight_decay * matrices, "times": factor}
            groups.append(own | {"lr": torch.zeros((), device=device)} if device.type == "cuda" else own)  # a recorded step reads it anew each time
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda")


def check_run(rate: float, seed: int) -> None:
    """Raise ValueError for a learning rate or a seed that nothing can begin with."""
    if not rate > 0:
        raise ValueError(f"rate is {rate}, expected more than 0")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> float:
    """Warm-up over 5 % of the steps, constant, linear cool-down to 2 % of peak over the last 35 %."""
    rate = peak * min((step + 1) / (0.05 * steps + 1), 1.0, max((steps - step) / (0.35 * steps + 1), 0.02))
    for group in optimizer.param_groups:
        own = rate * group.get("times", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
    return rate


def placed(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[np.ndarray] | list[Tensor]:
    """Arrays where training reads them: on a GPU as tensors, if there is room for three times as much, else as they are."""
    if torch.device(device).type == "cpu" or 3 * sum(array.nbytes for array in arrays) > torch.cuda.mem_get_info()[0]:
        return list(arrays)
    there = [torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device) for array in arrays]
    for tensor, array in zip(there, arrays):
        for i in range(0, len(array), 4096):
            tensor[i : i + 4096] = torch.from_numpy(array[i : i + 4096].copy())
    return there


def gather(features: np.ndarray | Tensor, index: np.ndarray | slice, device: torch.device | str | None = None) -> Tensor:
    """Rows of a tensor, or of a memory-mapped array, as float32 on a device (None: where they are)."""
    if isinstance(features, Tensor):
        index = index if isinstance(index, slice) else torch.from_numpy(index).to(features.device)
        return features[index].float().to(device)
    return torch.from_numpy(features[index].astype(np.float32)).to(device)


def effective_rank(features: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of features [M, D] (RankMe, arXiv 2210.02885); NaN of what is not finite."""
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.float() - features.float().mean(0))
    share = values / values.sum().clamp_min(1e-12) + 1e-12
    return float(torch.exp(-(share * share.log()).sum()))


def seeded(*seeds: int) -> torch.Generator:
    """A generator that depends on all of the seeds."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(mixed)
