"""Self-supervised pretraining of the video encoder: predict the features of hidden patches.

V-JEPA (arXiv 2404.08471, section 3; V-JEPA 2, arXiv 2506.09985, section 2.1): a context encoder sees the visible
tokens, a mask predictor fills in the hidden ones, an exponential moving average of the encoder gives the layer-normed
targets, the loss is L1. Two other targets share all of it: the pixels, or the features of a frozen first encoder
trained on pixels (SALT, arXiv 2509.24317). Pixels are whitened by place: over a still background all that varies, a
small object too, then counts alike.

Beside the mask predictor, `summary_weight` adds a second one that sees the visible tokens through a bottleneck alone, a
few numbers that attention has pooled (as the token bottleneck of ToBo, arXiv 2507.06543), and draws the whole frame from
them, blurred. The mask predictor is content with features that say what their own patch looks like; the bottleneck has
room only for where things are, and a blurred picture of a small thing tells its way to a place where it is not yet. With
`summary_views` it draws, from what the encoder saw in its own view, what other cameras saw at that moment: that takes
knowing how far away things are.

Features from which a small thing's pixels can be drawn may still hide which way it is turned. `edge_weight` has a linear map tell
from each visible token how strong the edges in its patch are in each direction (HOG as a target: MaskFeat, arXiv 2112.09133), and
the bottleneck's pictures have such edges beside their colours.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.checkpoint import fill, load_tensors
from worldmodel.data import Dataset
from worldmodel.encoder import Block, EncoderConfig, VideoEncoder, initialise, patchify, positions, rotation, scaled, sinusoids, take
from worldmodel.hub import load_encoder, save_encoder
from worldmodel.masking import KINDS, Masks, draw
from worldmodel.targets import blurred, cells_of, channels_of, edge_numbers, histograms
from worldmodel.training import MODULE, Run, Stepper, check_run, effective_rank, optimizer_for, placed, set_rate

PIXEL_FLOOR = 0.1  # least deviation of a pixel over the data, of `scaled` pixels: below it is noise
BLURRED_FLOOR = 0.02  # the same of a blurred one
EDGE_FLOOR = 0.05  # the same of an entry of an edge histogram
WHITENED_AT_ONCE = 128  # frames; bounds memory
KIND = "pretraining"  # of its checkpoints
_PLACE = 96  # sines and cosines of a place that the summary predictor knows


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining recipe; its fields and the data decide the weights."""

    encoder: EncoderConfig = EncoderConfig()
    predictor_dim: int = 96
    predictor_depth: int = 3
    predictor_heads: int = 3
    target: str = "ema"  # ema, pixels, or the path of a frozen encoder
    start: str = ""  # path of an encoder, or of a run's checkpoint, which has the predictors too, to start from; empty: random
    pixel_weight: float = 0.0  # adds a pixel reconstruction loss beside the latent one
    visible_weight: float = 0.0  # adds the loss on visible tokens (V-JEPA 2.1, arXiv 2603.14482)
    summary_weight: float = 0.0  # adds the loss of blurred frames drawn from a bottleneck
    summary_dim: int = 64  # numbers in the bottleneck
    summary_views: int = 0  # views that are drawn from it, side by side in the data, the encoder's first; 0: the encoder's
    edge_weight: float = 0.0  # adds the loss of edge histograms told by visible tokens, and edges to what is drawn from the bottleneck
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

    @property
    def drawn(self) -> tuple[int, int]:
        """Patches (rows, columns) of what is drawn from the bottleneck."""
        rows, columns = self.encoder.grid
        return rows, columns * (self.summary_views or self.encoder.views) // self.encoder.views

    def __post_init__(self) -> None:
        for name in ("predictor_dim", "predictor_depth", "predictor_heads", "summary_dim", "frames", "stride", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        check_run(self.rate, self.seed)
        for name in ("pixel_weight", "visible_weight", "summary_weight", "edge_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.predictor_dim % (2 * self.predictor_heads):
            raise ValueError(f"predictor_dim {self.predictor_dim} does not split into {self.predictor_heads} heads of an even size")
        if self.summary_views and not (self.summary_weight and self.summary_views >= self.encoder.views):
            raise ValueError(
                f"summary_views is {self.summary_views}: expected at least the encoder's {self.encoder.views}, and a "
                "summary_weight above 0"
            )
        unknown = set(self.masks + self.image_masks) - KINDS.keys()
        if unknown:
            raise ValueError(f"unknown masks {sorted(unknown)}; known: {sorted(KINDS)}")
        if not 0 <= self.image_share <= 1 or not all(0 <= share <= 1 for share in self.ema):
            raise ValueError(f"image_share is {self.image_share} and ema {self.ema}: expected 0 to 1")
        clips, pictures = self.frames > 1 and self.image_share < 1, self.frames == 1 or self.image_share > 0
        if clips and not self.masks or pictures and (not self.image_masks or "future" in self.image_masks):
            raise ValueError(
                f"masks is {self.masks} and image_masks {self.image_masks}: expected at least one for what is trained on, and not 'future' of a single frame"
            )
        if "open" in self.masks + self.image_masks and not self.visible_weight:
            raise ValueError("the mask 'open' hides nothing: it needs a visible_weight above 0")
        tube = self.encoder.tubelet_size
        if self.frames > 1 and (self.frames % tube or self.frames == tube):
            raise ValueError(f"frames is {self.frames}: expected 1, or a multiple of {tube} above {tube}, tubelets in time")


class MaskPredictor(nn.Module):
    """Narrow transformer that predicts targets at every token from the visible tokens' features."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        dim, wide = config.predictor_dim, config.encoder.embed_dim
        latent, pixels = config.target != "pixels", config.target == "pixels" or config.pixel_weight > 0
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
        by = rotation(where, head_dim, self.config.encoder.rope_base, self.config.encoder.rope_tiled)
        for block in self.blocks:
            x = block(x, by)
        return self.norm(x)

    def error(self, name: str, filled: Tensor, target: Tensor) -> Tensor:
        """Error of tokens [B, n, predictor_dim] for a target [B, n, C]: absolute for `latent`, squared for `pixels`."""
        if name == "latent":
            return (self.to_latent(filled).float() - target).abs()
        weight, bias = self.to_pixels.weight, self.to_pixels.bias
        if target.shape[-1] < len(bias):  # a single frame: the mean of what is said of the tubelet's times
            times = self.config.encoder.tubelet_size
            weight, bias = (w.unflatten(0, (3, times, -1)).mean(1).flatten(0, 1) for w in (weight, bias))
        return (F.linear(filled, weight, bias).float() - target).square()


class SummaryPredictor(nn.Module):
    """Draws blurred pictures from a few numbers that attention has pooled from the visible tokens' features."""

    def __init__(self, config: PretrainConfig, heads: int = 16, dim: int = 256) -> None:
        super().__init__()
        wide = config.encoder.embed_dim
        self.score = nn.Linear(wide, heads)
        self.value = nn.Parameter(torch.randn(heads, wide, 16) * wide**-0.5)
        self.squeeze = nn.Sequential(nn.LayerNorm(16 * heads), nn.Linear(16 * heads, config.summary_dim))
        self.place = nn.Linear(_PLACE, dim)
        self.modulate = nn.ModuleList(nn.Linear(config.summary_dim, 2 * dim) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.to_cells = nn.Linear(dim, channels_of(config.edge_weight > 0) * cells_of(config.encoder) ** 2)

    def forward(self, seen: Tensor, where: Tensor) -> Tensor:
        """Features seen [B, V, D], places where [L, 3] -> [B, L, channels * cells^2], as `blurred`."""
        pooled = self.score(seen).softmax(1).transpose(1, 2) @ seen  # [B, heads, D]
        values = torch.bmm(pooled.transpose(0, 1), self.value).transpose(0, 1).flatten(1)
        summary = self.squeeze(values)  # [B, summary_dim]
        place = self.place(sinusoids(where, _PLACE))  # [L, dim]
        (scale1, shift1), (scale2, shift2) = (m(summary)[:, None].chunk(2, -1) for m in self.modulate)
        x = F.gelu(self.mix[0](F.gelu(place * (1 + scale1) + shift1)))  # [B, L, dim]
        return self.to_cells(x + F.gelu(self.mix[1](x) * (1 + scale2) + shift2))


class Pretraining(nn.Module):
    """Context encoder, predictors and target, with the loss that ties them."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        torch_state = torch.get_rng_state()
        torch.manual_seed(config.seed)  # module constructors draw from the global state: lend it, give it back
        self.encoder = VideoEncoder(config.encoder)
        self.predictor = MaskPredictor(config)
        self.summary = SummaryPredictor(config) if config.summary_weight else None
        told = edge_numbers(config.encoder)
        self.to_edges = nn.Linear(config.encoder.embed_dim, told) if config.edge_weight else None
        torch.set_rng_state(torch_state)
        self.teacher = None
        if config.target != "pixels":
            ema = config.target == "ema"
            self.teacher = copy.deepcopy(self.encoder) if ema else load_encoder(config.target, config.encoder)
            self.teacher.requires_grad_(False)
        drawn = config.drawn[0] * config.drawn[1]
        sizes = {
            "pixel": (config.encoder.patches, 3 * config.encoder.patch_size**2),
            "blurred": (drawn, channels_of(config.edge_weight > 0) * cells_of(config.encoder) ** 2),
        }
        if config.edge_weight:
            sizes["edge"] = config.encoder.patches, told
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        if config.start:
            self._start_from(config.start)

    def _start_from(self, path: str) -> None:
        """Take over an encoder, or all modules of a run's checkpoint. Raises ValueError where they do not fit."""
        tensors, _, _ = load_tensors(path, "encoder", "model", KIND)
        if any(name.startswith(MODULE) for name in tensors):
            fill(self, {k[len(MODULE) :]: v for k, v in tensors.items() if k.startswith(MODULE)}, path)
            return
        self.encoder.load_state_dict(load_encoder(path, self.config.encoder).state_dict())
        if self.config.target == "ema":
            self.teacher.load_state_dict(self.encoder.state_dict())

    def own(self, clips: Tensor) -> Tensor:
        """The encoder's views [B, T, h, w, 3] of clips that hold more of them, side by side."""
        rows, columns = self.config.drawn
        if clips.shape[-2] % clips.shape[-3]:
            raise ValueError(f"pictures are {clips.shape[-2]} wide and {clips.shape[-3]} high: expected square ones, of several cameras side by side; crop them")
        if clips.shape[-3] * columns != clips.shape[-2] * rows:
            raise ValueError(
                f"expected {columns // rows} views side by side, got pictures {clips.shape[-2]} wide and {clips.shape[-3]} high; "
                "give the number of the data's cameras as --views, or as --summary-views where the encoder is to see fewer"
            )
        return self.config.encoder.own(clips)

    def whiten(self, frames: Tensor) -> None:
        """Take mean and deviation of every pixel, and blurred pixel, from frames uint8 [M, h, w, 3], all views."""
        pixels = scaled(patchify(self.own(frames[:, None]), self.config.encoder))  # [M, P, 3 * patch^2]
        self.pixel_mean.copy_(pixels.mean(0))
        self.pixel_std.copy_(pixels.std(0).clamp_min(PIXEL_FLOOR))
        parts = [part[:, None] for part in frames.split(WHITENED_AT_ONCE)]
        coarse = torch.cat([blurred(part, self.config.encoder, self.config.edge_weight > 0) for part in parts])
        self.blurred_mean.copy_(coarse.mean(0))
        self.blurred_std.copy_(coarse.std(0).clamp_min(BLURRED_FLOOR))
        if self.to_edges is not None:
            told = torch.cat([histograms(self.own(part), self.config.encoder) for part in parts])
            self.edge_mean.copy_(told.mean(0))
            self.edge_std.copy_(told.std(0).clamp_min(EDGE_FLOOR))

    def loss(self, clips: Tensor, masks: Masks) -> dict[str, Tensor]:
        """Losses of clips uint8 [B, T, h, w, 3], all views; `loss` is the one to minimise."""
        config = self.config
        own = self.own(clips)
        patches = patchify(own, config.encoder)  # [B, L, C]
        where = positions(patches.shape[1] // config.encoder.patches, config.encoder.grid, clips.device)
        index, split = torch.cat(masks, 1), masks.visible.shape[1]
        seen = self.encoder(patches, masks.visible)
        filled = self.predictor(seen, masks, where)  # [B, V + M, predictor_dim]
        out = {}
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(patches).float()
                target = F.layer_norm(target, target.shape[-1:])  # [B, L, D]
            out["latent"] = self._spread(self.predictor.error("latent", filled, take(target, index)), split)
        if self.predictor.to_pixels is not None:
            target = self._whitened(patches)
            out["pixels"] = self._spread(self.predictor.error("pixels", filled, take(target, index)), split)
        out["loss"] = out.get("latent", 0) + (1.0 if self.teacher is None else config.pixel_weight) * out.get("pixels", 0)
        if self.to_edges is not None:
            target = _by_place(histograms(own, config.encoder), self.edge_mean, self.edge_std)
            out["edges"] = (self.to_edges(seen).float() - take(target, masks.visible)).square().mean()
            out["loss"] = out["loss"] + config.edge_weight * out["edges"]
        if self.summary is not None:
            target = _by_place(blurred(clips, config.encoder, config.edge_weight > 0), self.blurred_mean, self.blurred_std)
            where = positions(len(target[0]) // len(self.blurred_mean), config.drawn, clips.device)
            error = (self.summary(seen, where).float() - target).square().unflatten(2, (channels_of(config.edge_weight > 0), -1))
            out["summary"] = error[:, :, :3].mean() + (error[:, :, 3:].mean() if config.edge_weight else 0.0)
            out["loss"] = out["loss"] + config.summary_weight * out["summary"]
        return out

    def _whitened(self, patches: Tensor) -> Tensor:
        """Pixels [B, L, C] in units of their own deviation over the data, at their place."""
        x = scaled(patches).unflatten(2, (3, -1, self.config.encoder.patch_size**2))  # [B, L, 3, times, patch^2]
        x = x.unflatten(1, (-1, self.config.encoder.patches))
        mean, std = (b.unflatten(1, (3, 1, -1)) for b in (self.pixel_mean, self.pixel_std))
        return ((x - mean) / std).flatten(1, 2).flatten(2)

    def _spread(self, error: Tensor, split: int) -> Tensor:
        """Mean error on hidden tokens, plus the weighted one on visible tokens (the first `split`)."""
        weight = self.config.visible_weight
        hidden = error[:, split:].mean() if split < error.shape[1] else 0.0
        return hidden + (weight * error[:, :split].mean() if weight else 0.0)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the EMA target encoder towards the context encoder."""
        if self.config.target == "ema":
            for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)

    def result(self) -> VideoEncoder:
        """The encoder to keep: the EMA where there is one (as V-JEPA), else the context encoder."""
        return self.teacher if self.config.target == "ema" else self.encoder


def _by_place(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Tokens [B, L, C] in units of their deviation [P, C] from the mean at their place."""
    return ((x.unflatten(1, (-1, len(mean))) - mean) / std).flatten(1, 2)


def health(encoder: VideoEncoder, pixels: Tensor) -> dict[str, float]:
    """Signs of collapse on frames uint8 [M, h, w, 3]: spread over the frames at each position, and effective rank.

    Layer-normed features have unit variance, so a spread near 0 means that a patch looks the same whatever it shows.
    """
    features = encoder.encode(pixels)  # [M, P, D]
    centred = features - features.mean(0)
    sample = centred.flatten(0, 1)[:: max(1, centred.shape[0] * centred.shape[1] // 2048)]
    return {"spread": float(centred.square().mean().sqrt()), "rank": effective_rank(sample)}


def pretrain(
    config: PretrainConfig, data: Dataset, out: Path, minutes: float | None = None, resume: bool = False, device: str = "cpu"
) -> Path | None:
    """Train and write `out/encoder.safetensors`; None when `minutes` ended first (resume to go on).

    Raises RuntimeError when the loss is no number, or the features have collapsed: spread below 0.02, looked at every 500 steps
    after the first tenth of them, and at the end.
    """
    frames = data.load(keys=("pixels",))
    model = Pretraining(config)
    rng = np.random.default_rng(config.seed)
    model.whiten(torch.from_numpy(frames.sample_clips(4000, 1, 1, rng)["pixels"][:, 0]))
    shown = model.own(torch.from_numpy(frames.sample_clips(256, 1, 1, rng)["pixels"]))[:, 0]
    model.to(device)
    optimizer = optimizer_for(model, config.weight_decay)
    run = Run(out, KIND, _plain(config, data), model, optimizer, config.steps, minutes, resume)
    pixels = placed([frames.pixels], device)[0]
    advance = Stepper(lambda clips, *index: model.loss(clips, Masks(*index)), model, optimizer, 3.0)
    for step in run:
        rng = np.random.default_rng([config.seed, step])
        single = config.frames == 1 or rng.random() < config.image_share
        length = 1 if single else config.frames
        index = frames.clip_index(config.batch, length, config.stride, rng)
        clips = torch.as_tensor(pixels[index if isinstance(pixels, np.ndarray) else torch.from_numpy(index)], device=device)
        kinds = config.image_masks if single else config.masks
        kind = KINDS[kinds[rng.integers(len(kinds))]]
        tubes = max(1, length // config.encoder.tubelet_size)
        masks = (index.to(device) for index in draw(kind, len(clips), tubes, config.encoder.grid, rng))
        rate = set_rate(optimizer, config.rate, step, config.steps)
        losses = advance(clips, *masks)
        first, last = config.ema
        model.follow(first + (last - first) * step / config.steps)
        if run.tells:
            mode = "image" if single else "video"
            run.log(rate=rate, **{f"{mode}/{k}": float(v) for k, v in losses.items()})
        if step % 500 == 0:
            signs = health(model.result(), shown)
            run.log(**signs)
            if step > config.steps / 10:
                _check_spread(signs)
    if not run.done:
        return None
    signs = health(model.result(), shown)
    _check_spread(signs)
    path = out / "encoder.safetensors"
    about = {"recipe": _plain(config, data), "minutes": round(run.seconds / 60, 1), **signs}
    save_encoder(path, model.result().cpu(), about)
    return path


def _check_spread(signs: dict[str, float]) -> None:
    """Raise RuntimeError where features hardly differ from frame to frame."""
    if not signs["spread"] >= 0.02:
        raise RuntimeError(
            f"the features collapsed: spread {signs['spread']:.4f} over the frames at each position (below 0.02), effective rank "
            f"{signs['rank']:.1f}; use more varied data, a pixel_weight, or another target"
        )


def _plain(config: PretrainConfig, data: Dataset) -> dict:
    return asdict(config) | {"data": data.fingerprint}
