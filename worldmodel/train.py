"""Training of the action-conditioned predictor on a frozen encoder's features.

The features of every frame are computed once and kept on disk. The loss is L1 of features (V-JEPA 2-AC, arXiv 2506.09985,
section 3.1) and smooth L1 of proprioception: teacher forcing over the clip, plus the same after imagining for more steps
from imagined frames.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from worldmodel import files
from worldmodel.data import Dataset, Frames, keys_of, read_episode
from worldmodel.encoder import autocast
from worldmodel.forks import LABEL as FORK
from worldmodel.forks import Forks
from worldmodel.guide import fit_guide
from worldmodel.hazard import LABEL, Hazard, fit_hazard, judge_hazard
from worldmodel.interface import Encoder, Features
from worldmodel.latent import information_loss
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig
from worldmodel.probe import AttentiveProbe, fit
from worldmodel.training import Run, Stepper, check_run, gather, optimizer_for, placed, seeded, set_rate

IMAGINED_AT_ONCE = 32  # frames of an episode, when all outcomes are imagined; bounds memory
EPISODES_AT_ONCE = 128  # of the same length, on a GPU
ENCODED_AT_ONCE = {"cpu": 2, "cuda": 32}  # episodes
READER_EPOCHS = 6  # passes of the proprioception reader over the frames


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; its fields, the encoder and the data decide the weights."""

    start: str = ""  # path of a model whose predictor to start from; empty: random
    merge: int = 2
    embed_dim: int = 256
    depth: int = 4
    num_heads: int = 4
    latent_dim: int = 8
    codes: bool = False
    window: int = 3
    hidden: int = 0
    gated: bool = False
    pooled: bool = False
    transitions: int = 4  # per clip
    rollout: int = 2  # steps of imagination from imagined frames that the loss covers, 1 = teacher forcing alone
    rollout_weight: float = 1.0
    proprio_weight: float = 0.1
    proprio_beta: float = 0.3  # deviations below which its loss is a square (smooth L1)
    free_nats: float = 0.5  # information of z per transition that costs nothing
    information_weight: float = 1e-3
    free_share: float = 0.0  # of the steps, in which no information costs anything; over as many more its weight rises
    spread_weight: float = 0.0  # of what a sample of the prior changes, in clips that have its mean: L1 hardly minds a little noise
    prior_share: float = 0.25  # of the clips have z at the prior's mean, as a planner has it: what follows from the action is not z's to tell
    fork_share: float = 0.25  # of the clips that are of forks, where there are any
    fork_weight: float = 8.0  # how much more a patch counts in which the ends of a step lie apart
    batch: int = 32  # clips per step
    steps: int = 4000
    rate: float = 6e-4
    latent_rate: float = 1.0  # that of what makes z and what hears it, in units of `rate`
    weight_decay: float = 0.04
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("transitions", "rollout", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        for name in ("hidden", "proprio_weight", "proprio_beta", "free_nats", "information_weight", "spread_weight", "fork_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        for name, most in (("prior_share", 1), ("free_share", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to {most}")
        if not 0 < self.fork_share <= 1:
            raise ValueError(f"fork_share is {self.fork_share}, expected above 0 and at most 1; to train without forks, give none")
        check_run(self.rate, self.seed)
        if not self.latent_rate > 0:
            raise ValueError(f"latent_rate is {self.latent_rate}, expected more than 0")
        if self.rollout > self.transitions:
            raise ValueError(f"rollout {self.rollout} is longer than the clip of {self.transitions} transitions")


def identify(encoder: Encoder) -> str:
    """Hash of an encoder's config and weights."""
    digest = hashlib.sha256(repr(encoder.config).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + value.reshape(-1).view(torch.uint8).numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


def cached_features(encoder: Encoder, data: Dataset, folder: Path) -> np.ndarray:
    """Features float16 [F, P, D] of all frames, memory-mapped from `folder`, where the first call puts them.

    Of the views that the encoder sees; episodes may have more, and not all the same.
    """
    batch = ENCODED_AT_ONCE[next(encoder.parameters()).device.type]
    path = folder / f"features-{identify(encoder)}-{data.fingerprint}.npy"
    shape = (data.frames, encoder.config.patches, encoder.config.embed_dim)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder, shared=True)
        part = folder / f".{path.stem}.{os.getpid()}.tmp"
        try:
            out = np.lib.format.open_memmap(part, "w+", np.float16, shape)
            done = 0
            for i in tqdm(range(0, len(data.episodes), batch), desc="encode", unit="batch"):
                pictures = (read_episode(episode.path, ("pixels",))["pixels"] for episode in data.episodes[i : i + batch])
                pixels = torch.from_numpy(np.concatenate([encoder.config.own(clip) for clip in pictures]))
                out[done : done + len(pixels)] = encoder.encode(pixels, len(pixels)).half().numpy(force=True)
                done += len(pixels)
            out.flush()
            del out
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def placed_features(encoder: Encoder, parts: Sequence[Dataset], folder: Path, device: str) -> list[np.ndarray] | list[Tensor]:
    """The `cached_features` of parts of a dataset, where training reads them: on a GPU, if there is room for three times as much."""
    files = [cached_features(encoder.to(device), part, folder) for part in parts]
    encoder.cpu()
    return placed(files, device)


def prediction_losses(
    predictor: Predictor, clip: Features, actions: Tensor, noise: Tensor, by_prior: Tensor, config: TrainConfig,
    price: float | Tensor = 1.0, counts: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Losses on clips: patches [B, T + 1, P, D], proprio [B, T + 1, S], actions [B, T, A], noise [B, T, Z].

    Round 1 predicts frame t + 1 from the true frame t. Round r feeds back what round r - 1 imagined, so its
    prediction of frame t + 1 starts from the true frame t + 1 - r; the first r - 1 transitions, which cannot have
    been imagined for so long, are left out. by_prior [B] bool: clips whose z is the prior's mean. None
    has the prior's sample: judged by the one outcome there was, it would teach that z says nothing. price: share of
    config.information_weight that counts. counts [B, T, P]: how much a patch does; None: 1.
    """
    now = Features(clip.patches[:, :-1], clip.proprio[:, :-1])  # frames 0 .. T - 1
    after = Features(clip.patches[:, 1:], clip.proprio[:, 1:])  # frames 1 .. T
    prior, posterior = predictor.prior_of(now, actions), predictor.posterior_of(now, actions, after.patches)
    z = torch.where(by_prior[:, None, None], prior.mean, posterior.sample(noise))
    information, nats = information_loss(posterior, prior, config.free_nats)
    out = {"information": information, "nats": nats}
    seen, total = now, price * config.information_weight * information
    for r in range(1, config.rollout + 1):
        guess, _ = predictor(seen, actions, z)  # row t is frame t + 1
        patches = (guess.patches[:, r - 1 :] - after.patches[:, r - 1 :]).abs().mean(-1)
        patches = (patches if counts is None else patches * counts[:, r - 1 :]).mean()
        # Not plain L1: the gripper stands still in nine steps of ten, and that kink holds its row at its start, zero.
        proprio, true = (x.proprio[:, r - 1 :] / predictor.proprio_std for x in (guess, after))
        proprio = F.smooth_l1_loss(proprio, true, beta=config.proprio_beta)
        if r == 1 and config.spread_weight:
            other, _ = predictor(now, actions, prior.sample(noise))
            out["spread"] = ((other.patches - guess.patches).abs().mean((1, 2, 3)) * by_prior).mean()
            total = total + config.spread_weight * out["spread"]
        out[f"patches_{r}"], out[f"proprio_{r}"] = patches, proprio
        weight = 1.0 if r == 1 else config.rollout_weight / (config.rollout - 1)
        total = total + weight * (patches + config.proprio_weight * out[f"proprio_{r}"])
        seen = Features(
            torch.cat((now.patches[:, :1], guess.patches[:, :-1]), 1),
            torch.cat((now.proprio[:, :1], guess.proprio[:, :-1]), 1),
        )
    out["loss"] = total
    return out


def price_of(step: int, config: TrainConfig) -> float:
    """Share of the weight of information that counts at a step.

    A z that costs from the start is never tried: what it could tell is rare, and the predictor has learned to do without by
    the time that it tells anything.
    """
    free = config.free_share * config.steps
    return min(1.0, max(0.0, (step - free) / free)) if free else 1.0


def _clip(
    features: np.ndarray | Tensor, frames: Frames, index: np.ndarray, device: torch.device | str
) -> tuple[Features, Tensor]:
    """The clips at frames index [B, T + 1] and the actions [B, T, A] inside."""
    own = gather(frames.proprio, index, device), gather(frames.actions, index[:, :-1], device)
    return Features(gather(features, index, device), own[0]), own[1]


@torch.no_grad()
def evaluate(predictor: Predictor, features: np.ndarray | Tensor, frames: Frames, clips: np.ndarray, horizon: int) -> dict[str, float]:
    """Open-loop L1 per horizon against copying the first frame, with z at the prior's mean; clips [M, horizon + 1]."""
    error, copy = np.zeros(horizon), np.zeros(horizon)
    for part in np.array_split(clips, max(1, len(clips) // 32)):
        clip, actions = _clip(features, frames, part, predictor.norm.weight.device)
        now, cache = Features(clip.patches[:, :1], clip.proprio[:, :1]), None
        for h in range(horizon):
            action = actions[:, h : h + 1]
            with autocast(actions.device):
                now, cache = predictor(now, action, predictor.prior_of(now, action).mean, cache, h)
            true = clip.patches[:, h + 1]
            error[h] += float((now.patches[:, 0] - true).abs().mean()) * len(part) / len(clips)
            copy[h] += float((clip.patches[:, 0] - true).abs().mean()) * len(part) / len(clips)
    out = {f"open_loop/{h + 1}": error[h] for h in range(horizon)}
    return out | {f"copy/{h + 1}": copy[h] for h in range(horizon)}


@torch.no_grad()
def imagined_proprio(predictor: Predictor, features: np.ndarray | Tensor, frames: Frames, seed: int) -> np.ndarray:
    """Proprioception [F, S] of every frame as imagined from those before it, under one sampled z; the first of an episode as it is."""
    device, proprio = predictor.norm.weight.device, frames.proprio.copy()
    pieces = defaultdict(list)  # by length and how many frames of it are only past: frames to begin at
    for begin, end in itertools.pairwise(frames.offsets):
        for first in range(begin, end - 1, IMAGINED_AT_ONCE):
            start, stop = max(begin, first - predictor.config.window + 1), min(first + IMAGINED_AT_ONCE, end - 1)
            pieces[stop - start, first - start].append(start)
    batch = EPISODES_AT_ONCE if isinstance(features, Tensor) else 1
    parts = [(n, past, np.array(starts[i : i + batch])) for (n, past), starts in pieces.items() for i in range(0, len(starts), batch)]
    generator = torch.Generator().manual_seed(seed)
    for length, past, starts in tqdm(parts, desc="imagine", delay=2):
        index = starts[:, None] + np.arange(length + 1)
        clip, actions = _clip(features, frames, index, device)
        now = Features(clip.patches[:, :-1], clip.proprio[:, :-1])
        noise = torch.randn(*actions.shape[:2], predictor.config.latent_dim, generator=generator).to(actions)
        with autocast(device):
            after, _ = predictor(now, actions, predictor.prior_of(now, actions).sample(noise))
        proprio[index[:, past + 1 :]] = after.proprio[:, past:].numpy(force=True)
    return proprio


def _new_predictor(config: TrainConfig, encoder: Encoder, frames: Frames) -> Predictor:
    """A predictor with random weights, which knows the mean and deviation of its data's proprioception."""
    sizes = PredictorConfig(
        feature_dim=encoder.config.embed_dim, grid=encoder.config.grid, proprio_dim=frames.proprio.shape[1],
        action_dim=frames.actions.shape[1], latent_dim=config.latent_dim, merge=config.merge, embed_dim=config.embed_dim,
        depth=config.depth, num_heads=config.num_heads, window=config.window, codes=config.codes, hidden=config.hidden,
        gated=config.gated, pooled=config.pooled,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        predictor = Predictor(sizes)
    predictor.proprio_mean.copy_(torch.from_numpy(frames.proprio.mean(0)))
    predictor.proprio_std.copy_(torch.from_numpy(frames.proprio.std(0)).clamp_min(1e-2))
    return predictor


def _start_from(predictor: Predictor, encoder: Encoder, model: LatentModel, path: str, anew: bool) -> None:
    """Take over the weights of a model's predictor, but z's where that is to begin `anew` or is of another kind.

    Raises ValueError when it knows other features or has other sizes.
    """
    if identify(model.encoder) != identify(encoder):
        raise ValueError(f"{path} holds another encoder; a predictor goes on with the features that it knows: give its encoder")
    known = model.predictor.config
    z_is = {"latent_dim": 1, "codes": False, "pooled": False}
    if not isinstance(known, PredictorConfig) or replace(known, **z_is) != replace(predictor.config, **z_is):
        raise ValueError(f"{path} is of another architecture: it holds {known}, expected {predictor.config}")
    tensors = model.predictor.state_dict()
    if anew or known != predictor.config:
        own, heads = predictor.state_dict(), ("prior.", "posterior.")
        tensors = {name: tensors[name] if not name.startswith(heads) else own[name] for name in own}
        first, told = "condition.0.weight", -predictor.config.latent_dim
        tensors[first] = torch.cat((tensors[first][:, : -known.latent_dim], own[first][:, told:]), 1)
    predictor.load_state_dict(tensors)


def train(
    config: TrainConfig, encoder: Encoder, data: Dataset, out: Path, cache: Path, minutes: float | None = None,
    resume: bool = False, device: str = "cpu", forks: Dataset | None = None,
) -> Path | None:  # fmt: skip
    """Train a predictor and write `out/model.safetensors`; None when `minutes` ended first (resume to go on).

    forks: what `collect --forks` made, of which a share of the clips is.
    """
    parts = {name: part for name, part in zip(("train", "held"), data.split(0.03))}
    frames = {name: part.load(keys=("proprio", "actions")) for name, part in parts.items()}
    first = frames["train"]
    start = load(config.start) if config.start else None
    predictor = _new_predictor(config, encoder, first)
    if start:
        _start_from(predictor, encoder, start, config.start, config.free_share > 0)
    features = dict(zip(parts, placed_features(encoder, list(parts.values()), cache, device)))
    branching, whole = None, config.batch  # clips of whole episodes in a batch
    if forks:
        if not has(forks, FORK):
            raise ValueError("--forks has whole episodes; it takes what collect --forks made, and whole ones belong to --data")
        ends = forks.load(keys=("proprio", "actions", FORK))
        branching = Forks(placed_features(encoder, [forks], cache, device)[0], ends, config.transitions, config.fork_weight)
        whole -= max(1, round(config.fork_share * config.batch))
    predictor.to(device)
    z_parts = [p for part in (predictor.prior, predictor.posterior, predictor.condition) for p in part.parameters()]
    optimizer = optimizer_for(predictor, config.weight_decay, z_parts, config.latent_rate)
    recipe = asdict(config) | {"data": data.fingerprint, "encoder": identify(encoder), "forks": forks.fingerprint if forks else None}
    run = Run(out, "training", recipe, predictor, optimizer, config.steps, minutes, resume)
    horizon = min(6, int(np.diff(frames["held"].offsets).max()) - 1)  # a recording that is held out may be short
    clips = frames["held"].clip_index(256, horizon + 1, 1, np.random.default_rng(config.seed))

    def loss(patches: Tensor, proprio: Tensor, *others: Tensor) -> dict[str, Tensor]:
        actions, noise, by_prior, price, *counts = others
        return prediction_losses(predictor, Features(patches, proprio), actions, noise, by_prior, config, price, *counts)

    advance = Stepper(loss, predictor, optimizer, 1.0)
    for step in run:
        rng = np.random.default_rng([config.seed, step])
        clip, actions = _clip(features["train"], first, first.clip_index(whole, config.transitions + 1, 1, rng), device)
        noise = torch.randn(config.batch, config.transitions, config.latent_dim, generator=seeded(config.seed, step)).to(device)
        by_prior = torch.from_numpy(rng.random(config.batch) < config.prior_share).to(device)
        inputs = [*clip, actions]
        if branching:
            index, counts = branching.draw(config.batch - whole, rng)
            more, taken = _clip(branching.features, branching.frames, index, device)
            inputs = [torch.cat(pair) for pair in zip(inputs, (*more, taken))]
            by_prior[whole:] = False  # there z is what is to be learned
            counts = torch.cat((counts.new_ones(whole, *counts.shape[1:]), counts)).to(device)
        inputs += [noise, by_prior, torch.tensor(price_of(step, config)).to(device)]
        rate = set_rate(optimizer, config.rate, step, config.steps)
        losses = advance(*inputs, *((counts,) if branching else ()))
        if run.tells:
            run.log(rate=rate, **{k: float(v) for k, v in losses.items()})
        if step % 500 == 499:
            run.log(**evaluate(predictor, features["held"], frames["held"], clips, horizon))
    if not run.done:
        return None
    scores = evaluate(predictor, features["held"], frames["held"], clips, horizon)
    reader, wrong = _reader_of(features, frames, config.seed)
    scores |= {f"reader_rmse/{i}": error for i, error in enumerate(wrong)}
    hazard = None
    if has(data, LABEL):
        hazard, told = learn_hazard(predictor, features, parts, frames, config.seed)
        scores |= told
    predictor.cpu()
    about = {"recipe": recipe, "minutes": round(run.seconds / 60, 1), "held_out": scores}
    model = LatentModel(encoder, predictor, reader, about, hazard=hazard, guide=fit_guide(first))
    if start:
        model.policy, model.careful = start.policy, start.careful  # which know the encoder's features and proprioception alone
        model.about |= {name: start.about[name] for name in ("policy", "careful") if name in start.about}
    model.save(out / "model.safetensors")
    return out / "model.safetensors"


def learn_hazard(
    predictor: Predictor, features: dict[str, np.ndarray | Tensor], parts: dict[str, Dataset], frames: dict[str, Frames], seed: int,
    epochs: int = 6, look: AttentiveProbe | None = None,
) -> tuple[Hazard, dict[str, float]]:  # fmt: skip
    """A hazard head from the steps of `train`, as a predictor imagines them, and what it is worth on those of `held`; each dictionary has both."""
    unsafe = {name: part.load(keys=(LABEL,)).arrays[LABEL] for name, part in parts.items()}
    told = {name: imagined_proprio(predictor, features[name], frames[name], seed) for name in parts}
    hazard = fit_hazard(features["train"], told["train"], frames["train"], unsafe["train"], epochs, seed=seed, look=look)
    scores = judge_hazard(hazard, features["held"], told["held"], frames["held"], unsafe["held"])
    return hazard.cpu(), scores


def _reader_of(features: dict[str, np.ndarray | Tensor], frames: dict[str, Frames], seed: int) -> tuple[AttentiveProbe, list[float]]:
    """A reader of proprioception, trained on `train`, and its root mean squared errors on 2,000 to 4,000 frames of `held`, or all."""
    targets = torch.from_numpy(frames["train"].proprio)
    reader = fit(features["train"], targets, torch.ones_like(targets), READER_EPOCHS, seed).cpu()
    seen = slice(None, None, max(1, len(frames["held"]) // 2000))
    wrong = reader(gather(features["held"], seen, "cpu")) - gather(frames["held"].proprio, seen)
    return reader, wrong.square().mean(0).sqrt().tolist()


def has(data: Dataset, key: str) -> bool:
    """Whether all episodes of a dataset record something."""
    return all(key in keys_of(episode.path) for episode in data.episodes)
