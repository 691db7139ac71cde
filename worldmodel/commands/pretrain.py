"""Pretrain the video encoder on episodes, without labels: V-JEPA's masked latent prediction.

The target is an EMA of the encoder (V-JEPA), the pixels, or a frozen encoder that was trained on pixels (SALT). Writes
RUN/encoder.safetensors at the end, and on the way checkpoints, metrics.jsonl and TensorBoard curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """What to train on, how long, and where to; every other field is part of the recipe."""

    data: tuple[Path, ...]
    """one or more folders that `worldmodel collect` made"""
    out: Path
    """folder of the run; new or empty, unless --resume"""
    minutes: float | None = None
    """stop after so many minutes, with a checkpoint that --resume goes on from; the schedule stays that of --steps
    (None: train to the end)"""
    resume: bool = False
    """go on with the run in --out from its last checkpoint, with the same recipe"""
    threads: int = 2
    """processor threads; the number is part of what makes two runs bit-equal"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it trains: cpu, cuda"""
    target: str = "ema"
    """what is predicted at hidden patches: ema (V-JEPA), pixels, or the path of an encoder.safetensors (SALT)"""
    start: str = ""
    """path of an encoder.safetensors, or of a run's checkpoint.safetensors, which has the predictors too, to start from;
    empty: random weights"""
    pixel_weight: float = 0.0
    """weight of a pixel reconstruction loss beside that of features; with --target pixels it changes nothing"""
    visible_weight: float = 0.0
    """weight of the loss on visible patches, beside 1 on hidden ones"""
    summary_weight: float = 0.0
    """weight of a second predictor's loss, which draws blurred frames from a bottleneck of --summary-dim numbers"""
    summary_dim: int = 64
    """numbers in that bottleneck"""
    summary_views: int = 0
    """cameras that are drawn from it, when the data has more, side by side, than the first --views, which the encoder sees
    (0: those that it sees)"""
    edge_weight: float = 0.0
    """weight of the loss of edges, by direction, that a linear map tells from visible patches; the bottleneck draws them too. It teaches
    which way things are turned"""
    image_size: int = 96
    """height and width of one view (pixels), as the data has it"""
    views: int = 1
    """cameras side by side in one image that the encoder sees, as the data has them"""
    patch_size: int = 12
    """height and width of a patch (pixels); divides --image-size"""
    embed_dim: int = 192
    """width of the encoder, D: numbers in a patch's features"""
    depth: int = 6
    """transformer blocks of the encoder"""
    num_heads: int = 3
    """attention heads of the encoder; divides --embed-dim"""
    stem: int = 0
    """hidden units of a two-layer patch embedding, which finds small things sooner; 0: one linear map, as V-JEPA 2"""
    conv: int = 0
    """channels of the first of three convolutions over the picture, before --stem; 0: none"""
    vjepa2_layout: bool = False
    """positions as V-JEPA 2 has them, rotary ones alone: `worldmodel convert --to transformers` takes such an encoder if it
    has no --stem"""
    frames: int = 4
    """frames in a clip: an even number, or 1 for single images alone (I-JEPA)"""
    stride: int = 2
    """steps of 0.2 s between the frames of a clip"""
    image_share: float = 0.5
    """share of the training steps that see single frames rather than clips (0 to 1)"""
    masks: tuple[str, ...] = ("short", "long", "half", "future")
    """what is hidden in clips; one is drawn for every step: short, long (V-JEPA's blocks), half (of the time), future, open (nothing)"""
    image_masks: tuple[str, ...] = ("image", "short")
    """the same in single frames, where image is I-JEPA's; name one twice for twice its share"""
    batch: int = 128
    """clips per step"""
    steps: int = 10_000
    """training steps in all; warm-up and cool-down of the learning rate are shares of them"""
    rate: float = 1e-3
    """highest learning rate (AdamW)"""
    seed: int = 0
    """seed of weights, clips and masks"""

    def __post_init__(self):
        for name in ("threads", "image_size", "views", "patch_size", "embed_dim", "depth", "num_heads", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, expected more than 0")


def run(config: Config) -> dict:
    """Pretrain, and return where the encoder is and how healthy its features are."""
    import torch

    from worldmodel.checkpoint import read_header
    from worldmodel.data import Dataset
    from worldmodel.encoder import usable
    from worldmodel.pretrain import pretrain

    torch.set_num_threads(config.threads)
    path = pretrain(recipe(config), Dataset.open(config.data), config.out, config.minutes, config.resume, usable(config.device))
    if path is None:
        return {"finished": False, "run": str(config.out)}
    _, _, about = read_header(path, "encoder")
    return {"finished": True, "encoder": str(path), **{k: about[k] for k in ("minutes", "spread", "rank")}}


def recipe(config: Config):
    """The recipe that a config stands for."""
    from worldmodel.commands.cli import shared
    from worldmodel.encoder import EncoderConfig
    from worldmodel.pretrain import PretrainConfig

    layout = {"absolute": False, "rope_base": 10000.0, "rope_tiled": True} if config.vjepa2_layout else {}
    encoder = EncoderConfig(
        config.image_size, config.views, config.patch_size, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, stem=config.stem, conv=config.conv, **layout,
    )  # fmt: skip
    return PretrainConfig(encoder=encoder, **shared(config, PretrainConfig))


def report(result: dict) -> str:
    """The result in words."""
    if not result["finished"]:
        return f"{result['run']}: stopped before the end of the schedule; the same command with --resume goes on"
    return (
        f"{result['encoder']}: {result['minutes']} minutes, spread over frames {result['spread']:.2f} (0 is collapse), "
        f"effective rank {result['rank']:.0f}"
    )
