"""Self-supervised pretraining of the video encoder: predict the features of hidden patches.

V-JEPA (arXiv 2404.08471, section 3; V-JEPA 2, arXiv 2506.09985, section 2.1): a context encoder sees the visible
tokens, a mask predictor fills in the hidden ones, an exponential moving average of the encoder gives the layer-normed
targets, the loss is L1. Two other targets share all of it: the pixels, or the features of a frozen first encoder
trained on pixels (SALT, arXiv 2509.24317).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.checkpoint import fill, load_tensors, save_tensors
from worldmodel.data import Dataset
from worldmodel.encoder import Block, EncoderConfig, VideoEncoder, autocast, initialise, patchify, positions, rotation, scaled, sinusoids, take
from worldmodel.masking import KINDS, Masks, draw
from worldmodel.training import Run, effective_rank, optimizer_for, set_rate


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining recipe; its fields and the data decide the weights."""

    encoder: EncoderConfig = EncoderConfig()
    predictor_dim: int = 96
    predictor_depth: int = 3
    predictor_heads: int = 3
    target: str = "ema"  # ema, pixels, or the path of a frozen encoder
    start: str = ""  # path of an encoder to start from; empty: random
    pixel_weight: float = 0.0  # adds a pixel reconstruction loss beside the latent one
    visible_weight: float = 0.0  # adds the loss on visible tokens (V-JEPA 2.1, arXiv 2603.14482)
    frames: int = 4  # per clip; 1 is image mode
    stride: int = 2  # environment steps between the frames of a clip
    image_share: float = 0.5  # share of the steps that train on single frames
    masks: tuple[str, ...] = ("short", "long", "half", "future")  # one of masking.KINDS is drawn for every step
    image_masks: tuple[str, ...] = ("image", "short")
    batch: int = 128  # clips per step
    steps: int = 10_000
    rate: float = 1e-3
    weight_decay: float = 0.04
    ema: tuple[float, float] = (0.99, 0.9995)  # first to last step
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("predictor_dim", "predictor_depth", "predictor_heads", "frames", "stride", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        unknown = set(self.masks + self.image_masks) - KINDS.keys()
        if unknown:
            raise ValueError(f"unknown masks {sorted(unknown)}; known: {sorted(KINDS)}")
        tube = self.encoder.tubelet_size
        if self.frames > 1 and (self.frames % tube or self.frames == tube):
            raise ValueError(f"frames is {self.frames}: expected 1, or a multiple of {tube} above {tube}, tubelets in time")


class MaskPredictor(nn.Module):
    """Narrow transformer that predicts targets at every token from the visible tokens' features."""

    def __init__(self, config: PretrainConfig, latent: bool, pixels: bool) -> None:
        super().__init__()
        dim, wide = config.predictor_dim, config.encoder.embed_dim
        self.config = config
        self.predictor_embed = nn.Linear(wide, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, config.predictor_heads, 4.0) for _ in range(config.predictor_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_latent = nn.Linear(dim, wide) if latent else None
        size = 3 * config.encoder.tubelet_size * config.encoder.patch_size**2
        self.to_pixels = nn.Linear(dim, size) if pixels else None
        initialise(self)

    def forward(self, seen: Tensor, masks: Masks, where: Tensor) -> Tensor:
        """seen [B, V, D] at masks.visible, where [L, 3] -> [B, V + M, predictor_dim]: the visible tokens first."""
        hidden = self.mask_token.expand(len(seen), masks.hidden.shape[1], -1)
        x = torch.cat((self.predictor_embed(seen), hidden.to(seen.dtype)), 1)
        head_dim = self.config.predictor_dim // self.config.predictor_heads
        where = where[torch.cat(masks, 1)]  # [B, V + M, 3]
        if self.config.encoder.absolute:
            x = x + sinusoids(where, x.shape[-1])
        by = rotation(where, head_dim, self.config.encoder.rope_base)
        for block in self.blocks:
            x = block(x, by)
        return self.norm(x)


class Pretraining(nn.Module):
    """Context encoder, mask predictor and target, with the loss that ties them."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        torch_state = torch.get_rng_state()
        torch.manual_seed(config.seed)  # module constructors draw from the global state: lend it, give it back
        self.encoder = VideoEncoder(config.encoder)
        latent, pixels = config.target != "pixels", config.target == "pixels" or config.pixel_weight > 0
        self.predictor = MaskPredictor(config, latent, pixels)
        torch.set_rng_state(torch_state)
        if config.start:
            self.encoder.load_state_dict(load_encoder(config.start, config.encoder).state_dict())
        self.teacher = None
        if latent:
            ema = config.target == "ema"
            self.teacher = copy.deepcopy(self.encoder) if ema else load_encoder(config.target, config.encoder)
            self.teacher.requires_grad_(False)

    def loss(self, clips: Tensor, masks: tuple[Masks, ...]) -> dict[str, Tensor]:
        """Losses of clips uint8 [B, T, h, w, 3]; `loss` is the one to minimise."""
        patches = patchify(clips, self.config.encoder)  # [B, L, C]
        where = positions(patches.shape[1] // self.config.encoder.patches, self.config.encoder.grid, clips.device)
        target = None
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(patches).float()
                target = F.layer_norm(target, target.shape[-1:])  # [B, L, D]
        out: dict[str, Tensor] = {}
        for mask in masks:
            filled = self.predictor(self.encoder(patches, mask.visible), mask, where)  # [B, V + M, dim]
            index, split = torch.cat(mask, 1), mask.visible.shape[1]
            if not self.config.visible_weight:
                filled, index, split = filled[:, split:], mask.hidden, 0
            terms = {}
            if target is not None:
                terms["latent"] = self._spread((self.predictor.to_latent(filled).float() - take(target, index)).abs(), split)
            if self.predictor.to_pixels is not None:
                error = (self.predictor.to_pixels(filled).float() - scaled(take(patches, index))).square()
                terms["pixels"] = self._spread(error, split)
            for name, value in terms.items():
                out[name] = out.get(name, 0) + value / len(masks)
        weight = 1.0 if self.teacher is None else self.config.pixel_weight
        out["loss"] = out.get("latent", 0) + weight * out.get("pixels", 0)
        return out

    def _spread(self, error: Tensor, split: int) -> Tensor:
        """Mean error on hidden tokens, plus the weighted one on visible tokens (the first `split`)."""
        hidden = error[:, split:].mean()
        return hidden + self.config.visible_weight * error[:, :split].mean() if split else hidden

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the EMA target encoder towards the context encoder."""
        if self.config.target == "ema":
            for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)

    def result(self) -> VideoEncoder:
        """The encoder to keep: the EMA where there is one (as V-JEPA), else the context encoder."""
        return self.teacher if self.config.target == "ema" else self.encoder


def health(encoder: VideoEncoder, pixels: Tensor) -> dict[str, float]:
    """Signs of collapse on frames uint8 [M, h, w, 3]: spread over the frames at each position, and effective rank.

    Layer-normed features have unit variance, so a spread near 0 means that a patch looks the same whatever it shows.
    """
    features = encoder.encode(pixels)  # [M, P, D]
    centred = features - features.mean(0)
    sample = centred.flatten(0, 1)[:: max(1, centred.shape[0] * centred.shape[1] // 2048)]
    return {"spread": float(centred.square().mean().sqrt()), "rank": effective_rank(sample)}


def pretrain(
    config: PretrainConfig, data: Dataset, out: Path, minutes: float | None = None, resume: bool = False
) -> Path | None:
    """Train and write `out/encoder.safetensors`; None when `minutes` ended first (resume to go on).

    Raises RuntimeError when the features collapse (spread below 0.02 after the first tenth of the steps).
    """
    frames = data.load(keys=("pixels",))
    model = Pretraining(config)
    optimizer = optimizer_for(model, config.weight_decay)
    run = Run(out, "pretraining", _plain(config, data), model, optimizer, config.steps, minutes, resume)
    held = torch.from_numpy(frames.sample_clips(256, 1, 1, np.random.default_rng(config.seed))["pixels"][:, 0])
    for step in run:
        rng = np.random.default_rng([config.seed, step])
        single = config.frames == 1 or rng.random() < config.image_share
        length = 1 if single else config.frames
        clips = torch.from_numpy(frames.sample_clips(config.batch, length, config.stride, rng)["pixels"])
        kinds = config.image_masks if single else config.masks
        kind = KINDS[kinds[rng.integers(len(kinds))]]
        tubes = max(1, length // config.encoder.tubelet_size)
        masks = (draw(kind, len(clips), tubes, config.encoder.grid, rng),)
        rate = set_rate(optimizer, config.rate, step, config.steps)
        with autocast("cpu"):
            losses = model.loss(clips, masks)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        first, last = config.ema
        model.follow(first + (last - first) * step / config.steps)
        if step % 20 == 0:
            mode = "image" if single else "video"
            run.log(rate=rate, norm=float(norm), **{f"{mode}/{k}": float(v.detach()) for k, v in losses.items()})
        if step % 500 == 0:
            signs = health(model.result(), held)
            run.log(**signs)
            if step > config.steps / 10 and signs["spread"] < 0.02:
                run.save()
                raise RuntimeError(
                    f"the features collapsed: spread {signs['spread']:.4f} over the frames at each position (below "
                    f"0.02), effective rank {signs['rank']:.1f}; use more varied data, a pixel_weight, or another target"
                )
    if not run.done:
        return None
    path = out / "encoder.safetensors"
    about = {"recipe": _plain(config, data), "minutes": round(run.seconds / 60, 1), **health(model.result(), held)}
    save_encoder(path, model.result(), about)
    return path


def _plain(config: PretrainConfig, data: Dataset) -> dict:
    return asdict(config) | {"data": data.fingerprint}


def save_encoder(path: str | Path, encoder: VideoEncoder, about: dict) -> None:
    """Write an encoder's weights as safetensors."""
    save_tensors(path, "encoder", encoder.state_dict(), encoder.metadata(), about)


def load_encoder(path: str | Path, expected: EncoderConfig | None = None) -> VideoEncoder:
    """A frozen encoder from a file. ValueError when its config is not the expected one."""
    tensors, config, _ = load_tensors(path, "encoder")
    try:
        found = EncoderConfig(**config)
    except TypeError as error:
        raise ValueError(f"{path} is of another architecture: {error}") from error
    if expected is not None and found != expected:
        raise ValueError(f"{path} is of another architecture: it holds {found}, expected {expected}")
    encoder = VideoEncoder(found)
    fill(encoder, tensors, path)
    return encoder.requires_grad_(False).eval()
