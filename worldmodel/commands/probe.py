"""Measure what an encoder's frozen features know: gripper and object position (mm) and object yaw (degrees).

Probes are trained on single frames of freshly collected episodes and tested on other episodes, where the object is in
view, beside the same probes on a randomly initialised encoder and on raw pixels. Box and cup by turns; yaw is the
box's, modulo a quarter turn, on whichever face it lies. Errors are root mean squares, per axis of the robot's base frame. The episodes
lie in a temporary folder meanwhile (2 GB with the defaults).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from worldmodel.commands.collect import Level

BOUNDS = ((0.34, 0.66), (-0.23, 0.23), (0.0, 0.40))  # m, x y z: where the default camera sees the object
IN_VIEW = 25  # pixels of the object, of about 90 where nothing hides it: with less, one guesses where it is behind the hand
STEPS, EVERY = 24, 2  # of an episode; an object often lies still: more episodes teach more than more frames of each


def episodes_for(frames: int) -> int:
    """How many episodes give so many frames; a quarter more, for what is hidden or falls off the table."""
    return max(2, -(-frames * 5 // 4 * EVERY // (STEPS + 1)))


@dataclass(frozen=True)
class Config:
    """What to probe, and with how much."""

    encoder: Path | None = None
    """encoder.safetensors or model.safetensors to probe, or efficientnet-lite0 (None: the shipped model's)"""
    frames: int = 20_000
    """frames to train the probes on"""
    test_frames: int = 3_000
    """frames of other episodes to test them on"""
    seed: int = 5000
    """seed of the first training episode"""
    test_seed: int = 10_000
    """seed of the first test episode"""
    epochs: int = 40
    """passes of the attentive probe over its training frames"""
    baselines: bool = True
    """also probe raw pixels and a randomly initialised encoder of the same sizes; not beside efficientnet-lite0"""
    ridge: bool = True
    """also the ridge probe: linear in all patches"""
    randomization: Level = "none"
    """how much cameras, light and distractors vary between episodes (mild), colours, mass and friction as well (strong), or
    one thing: the shifts"""
    cameras: tuple[str, ...] = ("front",)
    """views, as the encoder was trained with"""
    workers: int = 2
    """processes that collect; changes no result"""
    threads: int = 2
    """processor threads of encoding and of the probes' training"""

    def __post_init__(self):
        for name in ("frames", "test_frames", "epochs", "workers", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        trained, tested = (range(first, first + episodes_for(count)) for first, count in ((self.seed, self.frames), (self.test_seed, self.test_frames)))
        if trained.start in tested or tested.start in trained:
            raise ValueError(
                f"the {len(tested)} test episodes from test-seed {self.test_seed} on are among the {len(trained)} training episodes from {self.seed} on"
            )


def frames_of(config: Config, folder: Path, seed: int, count: int, image_size: int = 96):
    """Collect `count` frames, or a few less, with the object in view: pixels uint8 [M, h, w, 3] and their labels."""
    import numpy as np

    from worldmodel.commands import collect
    from worldmodel.data import Dataset
    from worldmodel.probe import Labels, yaw_of_cube

    recipe = collect.Config(
        out=folder, object="both", policy="mixture", episodes=episodes_for(count), seed=seed, max_steps=STEPS,
        workers=config.workers, stop_on_success=False, randomization=config.randomization, visibility=True,
        cameras=config.cameras, image_size=image_size,
    )  # fmt: skip
    collect.run(recipe)
    keys = ("pixels", "privileged/tcp_pos", "privileged/object_pos", "privileged/object_quat", "privileged/object_pixels")
    frames = Dataset.open(folder).load(keys=keys)
    place, quat = frames.arrays["privileged/object_pos"], frames.arrays["privileged/object_quat"]
    low, high = np.array(BOUNDS).T
    shown = frames.arrays["privileged/object_pixels"] >= IN_VIEW
    seen = (((place > low) & (place < high)).all(-1) & shown).nonzero()[0][::EVERY][:count]
    box = (seed + frames.episode_of[seen]) % 2 == 0  # as collect alternates
    labels = Labels(
        frames.arrays["privileged/tcp_pos"][seen].astype(float), place[seen].astype(float),
        yaw_of_cube(quat[seen]), np.where(box, 4, 0),
    )  # fmt: skip
    return frames.pixels[seen], labels


def run(config: Config) -> dict:
    """Train and test the probes."""
    import torch

    from worldmodel import probe
    from worldmodel.encoder import VideoEncoder
    from worldmodel.interface import Encoder
    from worldmodel.model import shipped
    from worldmodel.hub import load_encoder

    torch.set_num_threads(config.threads)
    path = config.encoder or shipped()
    encoder = load_encoder(path)
    size, views = encoder.config.image_size, encoder.config.views
    if views != len(config.cameras):
        raise ValueError(f"{path} looks through {views} cameras, got {', '.join(config.cameras)}; name as many")
    kinds = ("attentive", "ridge") if config.ridge else ("attentive",)
    with tempfile.TemporaryDirectory() as folder:
        train, train_labels = frames_of(config, Path(folder, "train"), config.seed, config.frames, size)
        test, test_labels = frames_of(config, Path(folder, "test"), config.test_seed, config.test_frames, size)
    labels = (train_labels, test_labels)

    def judged(subject: Encoder) -> dict:
        features = probe.features_of(subject, train), probe.features_of(subject, test)
        return probe.judge(*features, labels, config.epochs, kinds)

    scores = judged(encoder)
    result = {"encoder": str(path), **scores["attentive"], "frames": {"train": len(train), "test": len(test)}}
    result["seeds"] = {"train": config.seed, "test": config.test_seed}
    result["ridge"] = scores.get("ridge")
    if config.baselines and isinstance(encoder, VideoEncoder):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            other = VideoEncoder(encoder.config)
        result["random_init"] = _flat(judged(other))
        patches = [probe.pixels_of(encoder.config, pixels) for pixels in (train, test)]
        pixels = probe.judge(*patches, labels, config.epochs, ("attentive",))
        if config.ridge:
            pixels |= probe.judge(probe.coarse(train), probe.coarse(test), labels, config.epochs, ("ridge",))
        result["pixels"] = _flat(pixels)
    return result


def _flat(scores: dict) -> dict:
    return {**scores["attentive"], "ridge": scores.get("ridge")}


def report(result: dict) -> str:
    """The errors as a table: root mean squares, and medians."""
    rows = [("features", "probe", "gripper x y z (mm)", "object x y z (mm)", "yaw (deg)", "medians: gripper", "object (mm)")]
    keys = [f"{name}_{kind}_mm" for kind in ("rmse", "median") for name in ("gripper", "object")]
    for name, scores in (("encoder", result), ("random init", result.get("random_init")), ("pixels", result.get("pixels"))):
        for kind, row in (("attentive", scores), ("ridge", scores and scores.get("ridge"))):
            if row:
                places = [" ".join(f"{v:5.1f}" for v in row[key]) for key in keys]
                yaw = row["object_yaw_rmse_deg"]
                rows.append((name, kind, *places[:2], "-" if yaw is None else f"{yaw:.1f}", *places[2:]))
    table = "\n".join("  ".join(f"{cell:<20}" for cell in row).rstrip() for row in rows)
    return f"{table}\n{result['frames']['train']} training and {result['frames']['test']} test frames of {result['encoder']}"
