"""Pretraining, predictor training and probes on tiny data: they learn, resume bit-exactly, and refuse what does not fit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from worldmodel import files, training
from worldmodel.checkpoint import load_tensors, save_tensors
from worldmodel.data import Dataset, Frames, checksum, episode_path, read_episode, write_episode, write_recipe
from worldmodel.encoder import EncoderConfig, VideoEncoder, patchify, positions
from worldmodel.forks import Forks
from worldmodel.hub import load_encoder, save_encoder
from worldmodel.masking import KINDS, Masks, draw
from worldmodel.model import load
from worldmodel.pretrain import PIXEL_FLOOR, PretrainConfig, Pretraining, SummaryPredictor, pretrain
from worldmodel.policy import Policy
from worldmodel.predictor import Predictor, PredictorConfig
from worldmodel.probe import Labels, attentive, ridge, yaw_of_cube
from worldmodel.targets import blurred, edges, histograms
from worldmodel.train import TrainConfig, cached_features, identify, train
from worldmodel.training import effective_rank, set_rate

TINY = EncoderConfig(image_size=24, patch_size=8, embed_dim=24, depth=1, num_heads=1)


@pytest.fixture
def data(tmp_path):
    """A bright square that actions push about: 12 episodes of 8 steps."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(12):
        rng = np.random.default_rng(i)
        place, frames, actions = rng.uniform(4, 20, 2), [], []
        for _ in range(9):
            frame = np.full((24, 24, 3), 30, np.uint8)
            x, y = place.astype(int)
            frame[y - 3 : y + 3, x - 3 : x + 3] = 220
            frames.append((frame, np.r_[place / 10, np.zeros(5)]))
            actions.append(rng.uniform(-1, 1, 4))
            place = np.clip(place + 3 * actions[-1][:2], 4, 20)
        pixels, proprio = map(np.array, zip(*frames, strict=True))
        episode = {"pixels": pixels, "proprio": proprio.astype(np.float32), "actions": np.array(actions[:-1], np.float32)}
        write_episode(episode_path(folder, i), episode)
    write_recipe(folder, "test", {}, 12, [checksum(episode_path(folder, i)) for i in range(12)])
    return Dataset.open(folder)


def recipe(**changes):
    return PretrainConfig(**{"encoder": TINY, "predictor_dim": 24, "predictor_depth": 1, "predictor_heads": 1, "batch": 4, "steps": 6} | changes)


@pytest.mark.parametrize("changes", [
    {}, {"target": "pixels", "summary_weight": 1.0, "summary_dim": 6},
    {"encoder": replace(TINY, stem=8, conv=2), "target": "pixels", "visible_weight": 1.0, "summary_weight": 1.0, "summary_dim": 6, "edge_weight": 2.0},
])  # fmt: skip
def test_pretraining_resumes_bit_exactly(data, tmp_path, changes):
    whole = pretrain(recipe(**changes), data, tmp_path / "whole")
    assert pretrain(recipe(**changes), data, tmp_path / "parts", minutes=1e-9) is None
    for _ in range(10):
        path = pretrain(recipe(**changes), data, tmp_path / "parts", minutes=1e-9, resume=True)
        if path is not None:
            break
    a, b = load_tensors(whole, "encoder")[0], load_tensors(path, "encoder")[0]
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"spread", "rank"} <= lines[-1].keys() | lines[0].keys() | lines[1].keys()


def test_a_frozen_encoder_can_be_the_target(data, tmp_path):
    teacher = pretrain(recipe(target="pixels"), data, tmp_path / "pixels")
    student = pretrain(recipe(target=str(teacher), seed=1), data, tmp_path / "latents")
    assert load_encoder(student).config == TINY


@pytest.mark.parametrize("target", ["ema", "pixels"])
def test_pretraining_goes_on_from_an_encoder_or_from_all_of_a_run(data, tmp_path, target):
    first = recipe(target=target, summary_weight=1.0, summary_dim=6)
    path = pretrain(first, data, tmp_path / "first")
    trained = load_tensors(path.parent / "checkpoint.safetensors", "pretraining")[0]
    whole = Pretraining(replace(first, start=str(path.parent / "checkpoint.safetensors"), seed=1)).state_dict()
    assert all(torch.equal(value, trained[f"module.{name}"]) for name, value in whole.items())
    part = Pretraining(replace(first, start=str(path), seed=1))
    assert all(torch.equal(a, b) for a, b in zip(part.encoder.state_dict().values(), load_encoder(path).state_dict().values(), strict=True))
    assert part.teacher is None or torch.equal(part.teacher.norm.weight, part.encoder.norm.weight)
    with pytest.raises(ValueError, match="of another architecture"):
        Pretraining(replace(first, summary_dim=7, start=str(path.parent / "checkpoint.safetensors")))


def test_losses_by_target():
    clips = torch.randint(0, 256, (3, 4, 24, 24, 3), dtype=torch.uint8)
    masks = draw(KINDS["half"], 3, 2, (3, 3), np.random.default_rng(0))
    assert set(Pretraining(recipe()).loss(clips, masks)) == {"latent", "loss"}
    assert set(Pretraining(recipe(target="pixels")).loss(clips, masks)) == {"pixels", "loss"}
    both = Pretraining(recipe(pixel_weight=0.5)).loss(clips, masks)
    torch.testing.assert_close(both["loss"], both["latent"] + 0.5 * both["pixels"])
    through = Pretraining(recipe(summary_weight=2.0)).loss(clips, masks)
    torch.testing.assert_close(through["loss"], through["latent"] + 2.0 * through["summary"])
    turned = Pretraining(recipe(target="pixels", edge_weight=3.0)).loss(clips, masks)
    torch.testing.assert_close(turned["loss"], turned["pixels"] + 3.0 * turned["edges"])


def test_the_summary_draws_views_that_the_encoder_does_not_see():
    both = torch.randint(0, 256, (3, 4, 24, 48, 3), dtype=torch.uint8)
    masks = draw(KINDS["half"], 3, 2, (3, 3), np.random.default_rng(0))
    model = Pretraining(recipe(target="pixels", summary_weight=1.0, summary_views=2))
    model.whiten(both[:, 0])
    assert model.blurred_mean.shape[0] == 18 and model.pixel_mean.shape[0] == 9
    one, losses = both.clone(), model.loss(both, masks)
    one[..., 24:, :] = 255 - one[..., 24:, :]
    changed = model.loss(one, masks)
    torch.testing.assert_close(changed["pixels"], losses["pixels"])  # of its own view
    assert changed["summary"] != losses["summary"]
    with pytest.raises(ValueError, match="expected 2 views side by side"):
        model.loss(both[..., :24, :], masks)
    with pytest.raises(ValueError, match="summary_weight above 0"):
        recipe(summary_views=2)


def test_an_open_mask_trains_on_visible_tokens_alone():
    clips = torch.randint(0, 256, (3, 1, 24, 24, 3), dtype=torch.uint8)
    masks = draw(KINDS["open"], 3, 1, (3, 3), np.random.default_rng(0))
    assert masks.visible.shape == (3, 9) and masks.hidden.shape == (3, 0)
    assert torch.isfinite(Pretraining(recipe(target="pixels", visible_weight=1.0)).loss(clips, masks)["loss"])
    with pytest.raises(ValueError, match="visible_weight"):
        recipe(image_masks=("open",))


def test_the_summary_predictor_sees_the_tokens_through_its_bottleneck_alone():
    predictor = SummaryPredictor(recipe(summary_dim=3))
    where, seen = positions(1, (3, 3)), torch.randn(2, 5, 24)
    drawn = predictor(seen, where)
    assert drawn.shape == (2, 9, 48)
    torch.testing.assert_close(predictor(seen[:, torch.randperm(5)], where), drawn)  # pooled: order is nothing
    slopes = torch.func.jacrev(lambda x: predictor(x[None], where)[0].flatten())(seen[0]).flatten(1)
    assert torch.linalg.matrix_rank(slopes, rtol=1e-4) <= 3


def test_blurred_pictures_keep_places():
    frame = torch.zeros(1, 1, 24, 24, 3, dtype=torch.uint8)
    frame[0, 0, 17:19, 3:5] = 255
    drawn = blurred(frame, TINY)  # [1, 9, 48]
    assert drawn.shape == (1, 9, 48) and drawn.mean(-1).argmax() == 6  # third row, first column
    torch.testing.assert_close(blurred(frame.expand(-1, 4, -1, -1, -1), TINY), drawn.repeat(1, 2, 1))


def test_edges_are_told_by_direction_and_a_views_border_is_none():
    x, y = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="xy")
    for angle, directions in ((0, {0: 1.0}), (45, {2: 1.0}), (90, {4: 1.0}), (157.5, {7: 1.0}), (11.25, {0: 0.5, 1: 0.5})):
        turn = torch.deg2rad(torch.tensor(angle))
        picture = (x * torch.cos(turn) + y * torch.sin(turn))[None, None].expand(1, 3, -1, -1)  # rises in that direction
        told = edges(picture)[0, :, 12, 12].unflatten(0, (3, 8))
        assert told.sum(1) == pytest.approx([2.0] * 3, abs=1e-4)
        for i, share in directions.items():
            assert told[:, i] == pytest.approx([2.0 * share] * 3, abs=1e-3)
    assert edges(torch.cat((torch.zeros(1, 3, 24, 24), torch.ones(1, 3, 24, 24)), 3)).abs().max() == 0
    stairs = (2 * y > x).float()[None, None].expand(1, 3, -1, -1)  # an edge of 26.6 degrees, drawn without antialiasing
    sharp, smooth = (edges(stairs, n)[0, :8, 4:20, 4:20].sum((1, 2)) for n in (0, 2))
    assert sharp[5] == 0 and smooth.argmax() == 5, "smoothed, it leads where it lies; jagged, along pixels' sides and diagonals"
    frame = torch.randint(0, 256, (2, 1, 24, 24, 3), dtype=torch.uint8)
    found = histograms(frame, TINY)
    assert found.shape == (2, 9, 96) and 0.5 < found.norm(dim=-1).min() and found.norm(dim=-1).max() < 1
    torch.testing.assert_close(histograms(frame.expand(-1, 2, -1, -1, -1), TINY), found)
    colours, both = blurred(frame, TINY), blurred(frame, TINY, with_edges=True)
    assert both.shape == (2, 9, 27 * 16)
    torch.testing.assert_close(both[..., : 3 * 16], colours)


def test_pixels_are_whitened_by_place(data):
    model = Pretraining(recipe(target="pixels"))
    frames = torch.from_numpy(data.load(keys=("pixels",)).pixels)
    model.whiten(frames)
    single, clips = model._whitened(patchify(frames[:, None], TINY)), frames[:8].unflatten(0, (2, 4))
    varies = model.pixel_std > PIXEL_FLOOR
    torch.testing.assert_close(single.mean(0), torch.zeros(9, 192), atol=1e-3, rtol=0)
    torch.testing.assert_close(single.std(0)[varies], torch.ones(int(varies.sum())), atol=1e-3, rtol=0)
    video = model._whitened(patchify(clips, TINY)).unflatten(2, (3, 2, -1)).unflatten(1, (2, 9))  # [B, t, P, 3, 2, p^2]
    torch.testing.assert_close(video[0, 1, :, :, 1].flatten(1), single[3], atol=1e-4, rtol=1e-4)


def test_the_target_is_not_trained_but_follows():
    model = Pretraining(recipe())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    with torch.no_grad():
        model.encoder.norm.bias.add_(1.0)
    model.follow(0.9)
    torch.testing.assert_close(model.teacher.norm.bias, torch.full_like(model.teacher.norm.bias, 0.1))


def test_collapse_fails_loudly(data, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoEncoder, "encode", lambda self, pixels: torch.zeros(len(pixels), 9, 24))
    with pytest.raises(RuntimeError, match="collapsed: spread 0.0000"):
        pretrain(recipe(steps=1001), data, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()  # it did not go on to the end


def test_folders_and_settings_are_guarded(data, tmp_path):
    pretrain(recipe(), data, tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume"):
        pretrain(recipe(), data, tmp_path / "run")
    with pytest.raises(ValueError, match="rate = 0.001, not 0.1"):
        pretrain(recipe(rate=0.1), data, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="unknown masks"):
        recipe(masks=("tubes",))
    for changes in ({"masks": ()}, {"image_masks": ("future",)}, {"image_share": 3.0}, {"ema": (2.0, 2.0)}):
        with pytest.raises(ValueError, match="expected"):
            recipe(**changes)
    assert recipe(masks=(), image_share=1.0).masks == () and recipe(image_masks=("future",), image_share=0.0).image_share == 0
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".checkpoint.safetensors.1.tmp").touch()
    assert pretrain(recipe(), data, killed) is not None and not list(killed.glob("*.tmp"))
    (killed / "checkpoint.safetensors").unlink()
    with pytest.raises(FileExistsError, match="add --resume"):
        pretrain(recipe(), data, killed)


def test_two_trainings_do_not_share_a_folder(data, tmp_path):
    pretrain(recipe(), data, tmp_path / "run", minutes=1e-9)
    with files.owned(tmp_path / "run", "pretraining"), pytest.raises(FileExistsError, match="another pretraining is writing"):
        pretrain(recipe(), data, tmp_path / "run", resume=True)
    assert pretrain(recipe(), data, tmp_path / "run", resume=True) is not None


@pytest.fixture
def interruptible():
    """As in a terminal; what a script runs in the background ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_step_and_is_gone_on_from(data, tmp_path, monkeypatch, interruptible):
    whole = pretrain(recipe(), data, tmp_path / "whole")
    seen = []

    def interrupted(self, momentum):
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        seen.append(momentum)
        return follow(self, momentum)

    follow = Pretraining.follow
    monkeypatch.setattr(Pretraining, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 6, which is kept: the same command with --resume"):
        pretrain(recipe(), data, tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    path = pretrain(recipe(), data, tmp_path / "parts", resume=True)
    a, b = load_tensors(whole, "encoder")[0], load_tensors(path, "encoder")[0]
    assert len(seen) == 6 and all(torch.equal(a[k], b[k]) for k in a)
    seen.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert pretrain(recipe(), data, tmp_path / "ignored") is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("steps", [5, 40])
def test_a_training_that_diverges_fails_loudly(data, tmp_path, steps):
    config = TrainConfig(merge=1, embed_dim=24, depth=1, num_heads=1, batch=4, steps=steps, transitions=3, rate=float("inf"))
    with pytest.raises(RuntimeError, match="diverged: loss is nan at step"):
        train(config, VideoEncoder(TINY), data, tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_training_resumes_bit_exactly_and_learns_something(data, tmp_path):
    torch.manual_seed(0)
    encoder = VideoEncoder(TINY)
    config = TrainConfig(merge=1, embed_dim=24, depth=1, num_heads=1, batch=4, steps=5, transitions=3)
    whole = train(config, encoder, data, tmp_path / "whole", tmp_path / "cache")
    path = train(config, encoder, data, tmp_path / "parts", tmp_path / "cache", minutes=1e-9)
    for _ in range(10):
        if path is not None:
            break
        path = train(config, encoder, data, tmp_path / "parts", tmp_path / "cache", minutes=1e-9, resume=True)
    a, b = load_tensors(whole, "model")[0], load_tensors(path, "model")[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_predictor_goes_on_from_another_of_the_same_features(data, tmp_path):
    torch.manual_seed(0)
    encoder = VideoEncoder(TINY)
    sizes = dict(merge=1, embed_dim=24, depth=1, num_heads=1, batch=4, steps=2, transitions=3)
    first = train(TrainConfig(**sizes, rate=1e-2), encoder, data, tmp_path / "first", tmp_path / "cache")
    assert identify(load_encoder(first)) == identify(encoder)
    still = TrainConfig(**sizes, start=str(first), rate=1e-30)
    a, b = (load_tensors(path, "model")[0] for path in (first, train(still, encoder, data, tmp_path / "on", tmp_path / "cache")))
    assert all(torch.allclose(a[k], b[k]) for k in a if k.startswith("predictor."))
    with pytest.raises(ValueError, match="another encoder"):
        train(still, VideoEncoder(TINY), data, tmp_path / "other", tmp_path / "cache")
    with pytest.raises(ValueError, match="another architecture"):
        train(TrainConfig(**sizes | {"depth": 2}, start=str(first)), encoder, data, tmp_path / "deeper", tmp_path / "cache")


@pytest.fixture
def forks(data, tmp_path):
    """Steps with three ends each, which differ in the lower right patch alone."""
    folder = tmp_path / "forks"
    folder.mkdir()
    for i in range(12):
        episode = {key: array[: 5 - (key == "actions")] for key, array in read_episode(data.episodes[i // 3].path).items()}
        episode["pixels"] = episode["pixels"].copy()
        episode["pixels"][-1, 16:, 16:] = 40 * (i % 3)
        write_episode(episode_path(folder, i), episode | {"privileged/fork": np.full(5, i // 3)})
    write_recipe(folder, "test", {}, 12, [checksum(episode_path(folder, i)) for i in range(12)])
    return Dataset.open(folder)


def test_forks_are_drawn_by_steps_and_count_where_their_ends_differ(forks):
    frames = forks.load(keys=("proprio", "actions", "privileged/fork"))
    pixels = forks.load(keys=("pixels",)).pixels
    features = pixels.reshape(60, 3, 8, 3, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(60, 9, -1)  # of patches, their pixels
    drawn = Forks(features, frames, 3, 2.0)
    index, counts = drawn.draw(10, np.random.default_rng(0))
    assert index.shape == (10, 4) and (np.diff(index) == 1).all() and (index[:, -1] % 5 == 4).all()
    assert (index[:4, -1] // 15 == index[0, -1] // 15).all() and len(set(index[:4, -1])) == 3  # all ends of one step
    assert (counts[:, :-1] == 1).all() and (counts[:, -1, :-1] == 1).all() and torch.allclose(counts[:, -1, -1], torch.tensor(19.0))
    elsewhere = [replace(e, path=Path("other") / e.path.name) if i % 3 else e for i, e in enumerate(frames.episodes)]
    apart = Forks(features, replace(frames, episodes=tuple(elsewhere)), 3, 2.0)  # the same labels in another folder are of other steps
    assert sorted(map(len, drawn.ends)) == [3] * 4 and sorted(map(len, apart.ends)) == [2] * 4
    with pytest.raises(ValueError, match="4 transitions each, fewer than a clip's 5"):
        Forks(features, frames, 5, 2.0)
    alone = forks.split(0.9)[0].load(keys=("proprio", "actions", "privileged/fork"))
    with pytest.raises(ValueError, match="no step of the forks has several ends"):
        Forks(features, alone, 3, 2.0)


def test_training_with_forks_resumes_bit_exactly_and_goes_on_from_a_model_without(data, forks, tmp_path):
    torch.manual_seed(0)
    encoder = VideoEncoder(TINY)
    config = TrainConfig(merge=1, embed_dim=24, depth=1, num_heads=1, batch=8, steps=5, transitions=3)
    start = train(config, encoder, data, tmp_path / "start", tmp_path / "cache")
    config = replace(config, pooled=True, start=str(start))
    whole = train(config, encoder, data, tmp_path / "whole", tmp_path / "cache", forks=forks)
    path = train(config, encoder, data, tmp_path / "parts", tmp_path / "cache", minutes=1e-9, forks=forks)
    for _ in range(10):
        if path is not None:
            break
        path = train(config, encoder, data, tmp_path / "parts", tmp_path / "cache", minutes=1e-9, resume=True, forks=forks)
    a, b = load_tensors(whole, "model")[0], load_tensors(path, "model")[0]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert load(whole).about["recipe"]["forks"] == forks.fingerprint
    with pytest.raises(ValueError, match="--forks has whole episodes"):
        train(config, encoder, data, tmp_path / "refused", tmp_path / "cache", forks=data)
    other = load_tensors(train(config, encoder, data, tmp_path / "none", tmp_path / "cache"), "model")[0]
    assert any(not torch.equal(a[k], other[k]) for k in a if k.startswith("predictor."))


def test_a_short_last_episode_is_judged_by_as_many_steps_as_it_has(data, tmp_path):
    path = episode_path(tmp_path / "data", 11)
    short = {key: array[: 4 - (key == "actions")] for key, array in read_episode(path).items()}
    path.unlink()
    write_episode(path, short)
    checksums = [checksum(episode_path(tmp_path / "data", i)) for i in range(12)]
    with pytest.raises(ValueError, match="11 checksums of 12 episodes"):
        write_recipe(tmp_path / "data", "test", {}, 12, checksums[:11])
    write_recipe(tmp_path / "data", "test", {}, 12, checksums)
    config = TrainConfig(merge=1, embed_dim=24, depth=1, num_heads=1, batch=4, steps=2, transitions=2, rollout=1)
    path = train(config, VideoEncoder(TINY), Dataset.open(tmp_path / "data"), tmp_path / "run", tmp_path / "cache")
    assert "open_loop/3" in (told := load_tensors(path, "model")[2]["held_out"]) and "open_loop/4" not in told


def test_the_policy_of_a_start_is_kept(data, tmp_path):
    torch.manual_seed(0)
    encoder = VideoEncoder(TINY)
    config = TrainConfig(merge=1, embed_dim=24, depth=1, num_heads=1, batch=4, steps=2, transitions=3)
    first = load(train(config, encoder, data, tmp_path / "first", tmp_path / "cache"))
    sizes = encoder.config.patches, encoder.config.embed_dim, first.predictor.config.proprio_dim, first.action_dim
    first.policy, first.about["policy"] = Policy(*sizes, 8), {"minutes": 1}
    first.save(tmp_path / "acts.safetensors")
    on = load(train(replace(config, start=str(tmp_path / "acts.safetensors")), encoder, data, tmp_path / "on", tmp_path / "cache"))
    assert all(map(torch.equal, on.policy.parameters(), first.policy.parameters()))
    assert on.about["policy"] == {"minutes": 1}


def test_features_are_cached_once(data, tmp_path):
    torch.manual_seed(0)
    encoder = VideoEncoder(TINY)
    features = cached_features(encoder, data, tmp_path)
    assert features.shape == (data.frames, 9, 24) and features.dtype == np.float16
    stamp = next(tmp_path.glob("features-*")).stat().st_mtime_ns
    cached_features(encoder, data, tmp_path)
    assert [p.stat().st_mtime_ns for p in tmp_path.glob("features-*")] == [stamp]


def test_features_are_of_the_encoders_views_in_data_of_more_cameras_and_of_one(data, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for i in range(2):
        episode = read_episode(episode_path(tmp_path / "data", i))
        write_episode(episode_path(both, i), episode | {"pixels": np.concatenate((episode["pixels"], 255 - episode["pixels"]), 2)})
    write_recipe(both, "test", {}, 2, [checksum(episode_path(both, i)) for i in range(2)])
    torch.manual_seed(0)
    encoder = VideoEncoder(TINY)
    mixed = cached_features(encoder, Dataset.open([tmp_path / "data", both]), tmp_path)
    alone = cached_features(encoder, data, tmp_path)
    assert np.array_equal(mixed[: data.frames], alone)
    assert np.allclose(mixed[data.frames :], alone[:18], atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_recorded_step_is_the_same_step(monkeypatch):
    def trained(before: int) -> list[torch.Tensor]:
        monkeypatch.setattr(training, "SEEN_BEFORE", before)
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2).cuda()
        optimizer = training.optimizer_for(layer, 0.1)
        advance = training.Stepper(lambda x, y: {"loss": (layer(x).float() - y).square().mean()}, layer, optimizer, 1.0)
        generator = torch.Generator().manual_seed(1)
        for step in range(12):
            set_rate(optimizer, 0.01, step, 12)
            size = (4, 8)[step % 2]
            losses = advance(torch.randn(size, 3, generator=generator).cuda(), torch.randn(size, 2, generator=generator).cuda())
        return [*layer.parameters(), losses["loss"], losses["norm"]]

    for recorded, plain in zip(trained(2), trained(100), strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-3, atol=1e-4)


def test_an_encoder_of_other_sizes_is_refused(tmp_path):
    save_encoder(tmp_path / "e.safetensors", VideoEncoder(TINY), {})
    with pytest.raises(ValueError, match="another architecture"):
        load_encoder(tmp_path / "e.safetensors", EncoderConfig())
    save_tensors(tmp_path / "f.safetensors", "encoder", {"a": torch.zeros(2)}, VideoEncoder(TINY).metadata())
    with pytest.raises(ValueError, match="another architecture"):
        load_encoder(tmp_path / "f.safetensors")


def test_a_cubes_yaw_is_that_of_its_sides_on_whichever_face_it_lies():
    rng, faces = np.random.default_rng(0), Rotation.create_group("O")
    yaw = rng.uniform(-np.pi, np.pi, 200)
    tilt = Rotation.from_rotvec(np.column_stack((rng.uniform(-0.3, 0.3, (200, 2)), np.zeros(200))))
    turned = tilt * Rotation.from_euler("z", yaw[:, None]) * faces[rng.integers(len(faces), size=200)]
    x, y, z, w = turned.as_quat().T
    off = yaw_of_cube(np.column_stack((w, x, y, z))) - yaw
    np.testing.assert_allclose((off + np.pi / 4) % (np.pi / 2), np.pi / 4, atol=1e-9)


def test_probes_find_what_is_there():
    rng = np.random.default_rng(0)
    gripper, thing, yaw = rng.normal(0, 0.1, (2000, 3)), rng.normal(0, 0.1, (2000, 3)), rng.uniform(-0.5, 0.5, 2000)
    labels = Labels(gripper, thing, yaw, np.full(2000, 4))
    patch = np.column_stack((gripper, thing, 0.1 * np.cos(4 * yaw), 0.1 * np.sin(4 * yaw))) * 10
    features = torch.from_numpy(np.stack((np.zeros_like(patch), patch), 1)).half()
    errors = labels.errors(ridge(features, labels.targets(), features))
    assert max(errors["gripper_rmse_mm"] + errors["object_rmse_mm"]) < 10 and errors["object_yaw_rmse_deg"] < 5
    guess = attentive(features, labels.targets(), features, torch.ones(2000, 8), epochs=80)
    assert max(labels.errors(guess)["gripper_rmse_mm"]) < 30
    exact = labels.targets().double().numpy()
    assert labels.errors(exact)["object_yaw_rmse_deg"] == pytest.approx(0, abs=0.01)


def test_schedule_and_rank():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    rates = [set_rate(optimizer, 1.0, step, 100) for step in range(100)]
    assert rates[0] < 0.2 and max(rates) == 1.0 and rates[-1] < 0.05
    assert effective_rank(torch.randn(500, 4)) == pytest.approx(4, abs=0.2)
    assert effective_rank(torch.randn(500, 1) @ torch.ones(1, 4)) == pytest.approx(1, abs=0.01)


def test_some_parameters_may_learn_faster():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    assert len(training.optimizer_for(layers, 0.1, layers[1].parameters()).param_groups) == 2  # as fast is not apart
    optimizer = training.optimizer_for(layers, 0.1, layers[1].parameters(), 3.0)
    rate = set_rate(optimizer, 1.0, 50, 100)
    told = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for layer, own in ((layers[0], rate), (layers[1], 3 * rate)):
        assert told[id(layer.weight)] == (own, 0.1) and told[id(layer.bias)] == (own, 0.0)


def test_all_steps_are_imagined_in_pieces_as_in_one(monkeypatch):
    from worldmodel import train as module

    rng = np.random.default_rng(0)
    offsets = np.array([0, 9, 10, 17])
    proprio, actions = rng.normal(size=(17, 7)).astype(np.float32), rng.normal(size=(17, 4)).astype(np.float32)
    frames = Frames({"proprio": proprio, "actions": actions}, offsets, (None,) * 3)
    features = rng.normal(size=(17, 16, 12)).astype(np.float16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        predictor = Predictor(PredictorConfig(12, (4, 4), embed_dim=24, depth=2, num_heads=2)).requires_grad_(False)
        for head in (predictor.to_features, predictor.to_proprio):
            torch.nn.init.normal_(head.weight, std=0.1)
    told = []
    for size in (32, 2):
        monkeypatch.setattr(module, "IMAGINED_AT_ONCE", size)
        monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(*shape))
        told.append(module.imagined_proprio(predictor, features, frames, 0))
    assert all(np.array_equal(x[offsets[:-1]], proprio[offsets[:-1]]) for x in told)
    assert np.allclose(*told, atol=0.02) and not np.allclose(told[0], proprio, atol=0.02)
