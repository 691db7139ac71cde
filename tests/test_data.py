import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from worldmodel import data, files

COMMAND = "worldmodel collect --episodes 8"


def make_episode(seed: int, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(5, 12))
    return {
        "pixels": rng.integers(0, 256, (steps + 1, size, size, 3), dtype=np.uint8),
        "proprio": np.full((steps + 1, 7), seed, np.float32),
        "actions": rng.uniform(-1, 1, (steps, 4)).astype(np.float32),
        "privileged/object_pos": np.stack([np.full(3, seed), *np.arange(3 * steps).reshape(steps, 3)]).astype(float),
        "seed": np.int64(seed),
        "task": "pick-place",
    }


def make_dataset(folder, episodes: int = 8, first: int = 0, finished: bool = True, size: int = 16):
    folder.mkdir()
    paths = [data.episode_path(folder, i) for i in range(episodes)]
    for i, path in enumerate(paths):
        data.write_episode(path, make_episode(first + i, size))
    checksums = [data.checksum(path) for path in paths] if finished else None
    data.write_recipe(folder, COMMAND, {"seed": first}, episodes, checksums)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path / "set")


def test_episode_returns_as_written(tmp_path):
    path, episode = tmp_path / "a.npz", make_episode(3)
    data.write_episode(path, episode)
    back = data.read_episode(path)
    assert set(back) == set(episode)
    for key, value in episode.items():
        assert back[key].dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(back[key], value)


def test_equal_episodes_give_equal_bytes(tmp_path):
    for name in "ab":
        data.write_episode(tmp_path / name, make_episode(3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    data.write_episode(tmp_path / "c", make_episode(4))
    assert data.checksum(tmp_path / "a") == data.checksum(tmp_path / "b") != data.checksum(tmp_path / "c")


@pytest.mark.parametrize("key", ["proprio", "actions", "privileged/object_pos"])
def test_bad_arrays_are_refused_and_leave_no_file(tmp_path, key):
    episode = make_episode(0)
    with pytest.raises(ValueError, match=f"{key} has"):
        data.write_episode(tmp_path / "a.npz", {**episode, key: episode[key][:-1]})
    episode[key][0] = np.nan
    with pytest.raises(ValueError, match=f"NaN or infinity in {key}"):
        data.write_episode(tmp_path / "a.npz", episode)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: e.pop("actions"), "the episode has no actions; expected pixels, proprio, actions"),
        (lambda e: e.update(pixels=e["pixels"] / 255), "pixels are float64 .* expected uint8"),
        (lambda e: e.update(proprio=np.float32(0)), r"proprio is float32 .*, expected float32 \[T \+ 1, S\]"),
        (lambda e: e.update(actions=e["actions"][:, 0]), r"expected float32 \[T, A\]"),
        (lambda e: e.update(proprio=e["proprio"].astype(int)), "proprio is int64"),
        (lambda e: e.update(proprio=e["proprio"].astype(object)), "proprio is of object, expected real numbers"),
        (lambda e: e.update(other=np.complex64(1)), "other is of complex64"),
        (lambda e: e.update(actions=50 * np.ones_like(e["actions"])), "actions reach 50, expected -1 to 1; divide them"),
    ],
)
def test_recordings_of_another_kind_are_refused(tmp_path, change, told):
    episode = dict(make_episode(0))
    change(episode)
    with pytest.raises(ValueError, match=told):
        data.write_episode(tmp_path / "a.npz", episode)
    assert not list(tmp_path.iterdir())


def test_writer_killed_in_the_middle_leaves_only_a_leftover(tmp_path):
    code = (
        "import os, pathlib, sys; from worldmodel import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.npz")], check=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    lives = tmp_path / f".features.{os.getpid()}.tmp"
    lives.touch()
    files.remove_leftovers(tmp_path, shared=True)
    assert list(tmp_path.iterdir()) == [lives]
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_every_damaged_byte_is_noticed(folder):
    path = data.episode_path(folder, 2)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 30, len(whole) - 1, *rng.integers(len(whole), size=40)]:
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        try:
            back = data.Dataset.open(folder).load(keys=("pixels", "proprio", "actions", "privileged/object_pos", "seed"))
        except ValueError as error:
            assert str(path) in str(error) and COMMAND in str(error)
        else:  # a byte of the container that changes no value
            path.write_bytes(whole)
            sound = data.Dataset.open(folder).load()
            np.testing.assert_array_equal(back.pixels, sound.pixels)


@pytest.mark.parametrize("length", [0, 10, 3000])
def test_truncated_episode_is_named(folder, length):
    path = data.episode_path(folder, 5)
    path.write_bytes(path.read_bytes()[:length])
    assert not data.check_episode(path)
    with pytest.raises(ValueError, match="episode-000005.npz is damaged .* mend it with: worldmodel collect"):
        data.Dataset.open(folder)


def test_missing_or_exchanged_episode_is_named(folder):
    data.write_episode(data.episode_path(folder, 4), make_episode(99))
    with pytest.raises(ValueError, match="episode-000004.npz is not the one collected; mend it with"):
        data.Dataset.open(folder)
    data.episode_path(folder, 4).unlink()
    with pytest.raises(FileNotFoundError, match="episode-000004.npz is missing; mend it with: worldmodel collect"):
        data.Dataset.open(folder)


def test_unfinished_dataset_opens_with_what_it_has(tmp_path, caplog):
    folder = make_dataset(tmp_path / "set", finished=False)
    data.episode_path(folder, 1).unlink()
    assert len(data.Dataset.open(folder).episodes) == 7
    assert "unfinished: 7 of 8" in caplog.text
    for path in folder.glob("*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match="no episodes yet"):
        data.Dataset.open(folder)


def test_folder_without_dataset_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no dataset in .* make one with: worldmodel collect"):
        data.Dataset.open(tmp_path / "nowhere")
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json is damaged"):
        data.Dataset.open(folder)
    (folder / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="not of format"):
        data.Dataset.open(folder)
    with pytest.raises(ValueError, match="no dataset named"):
        data.Dataset.open([])


def test_frames_are_the_episodes_in_order(tmp_path, folder):
    other = make_dataset(tmp_path / "other", episodes=3, first=50)
    dataset = data.Dataset.open([folder, other])
    frames = dataset.load(keys=(*data.KEYS, "privileged/object_pos"))
    assert len(frames) == dataset.frames == len(frames.pixels)
    for e, seed in enumerate([*range(8), 50, 51, 52]):
        episode, (start, end) = make_episode(seed), frames.offsets[e : e + 2]
        np.testing.assert_array_equal(frames.pixels[start:end], episode["pixels"])
        np.testing.assert_array_equal(frames.actions[start : end - 1], episode["actions"])
        np.testing.assert_array_equal(frames.actions[end - 1], 0)
        np.testing.assert_array_equal(frames.arrays["privileged/object_pos"][start:end], episode["privileged/object_pos"])
        assert (frames.episode_of[start:end] == e).all()


def test_load_with_limit_and_keys(folder):
    frames = data.Dataset.open(folder).load(limit=3, keys=("proprio",))
    assert [str(episode.path.name) for episode in frames.episodes] == [f"episode-{i:06d}.npz" for i in (0, 4, 7)]
    assert set(frames.arrays) == {"proprio"} and set(frames.proprio[:, 0]) == {0, 4, 7}
    with pytest.raises(ValueError, match="has no depth; it has actions"):
        data.Dataset.open(folder).load(keys=("depth",))
    with pytest.raises(ValueError, match="limit is 0"):
        data.Dataset.open(folder).load(limit=0)


@pytest.mark.parametrize("key", ["proprio", "actions"])
def test_numbers_that_are_not_finite_are_refused_and_their_episode_named(folder, key):
    dataset, path = data.Dataset.open(folder), data.episode_path(folder, 1)
    broken = data.read_episode(path)
    broken[key][0, 0] = np.nan
    np.savez(path, **broken)  # as others write them
    with pytest.raises(ValueError, match=f"episode-000001.npz: {key} holds NaN or infinity"):
        dataset.load(keys=(key,))


def test_datasets_that_do_not_fit_are_refused(tmp_path, folder):
    other = make_dataset(tmp_path / "other", size=24)
    with pytest.raises(ValueError, match=r"pixels is \[24, 24, 3\] per frame, expected \[16, 16, 3\]"):
        data.Dataset.open([folder, other]).load()
    with pytest.raises(ValueError, match="is named twice"):
        data.Dataset.open([folder, other, folder / ".." / folder.name])
    whole = make_dataset(tmp_path / "whole")
    episode = dict(make_episode(0))
    places = episode["privileged/object_pos"]
    data.write_episode(data.episode_path(whole, 0), episode | {"privileged/object_pos": np.ones_like(places, int)})
    data.write_recipe(whole, "test", {}, 8, [data.checksum(data.episode_path(whole, i)) for i in range(8)])
    with pytest.raises(ValueError, match=f"object_pos is {places.dtype}, expected int64"):
        data.Dataset.open(whole).load(keys=("privileged/object_pos",))


def test_what_the_system_refuses_is_no_damage(folder, monkeypatch):
    def refused(*args):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(data.zipfile, "ZipFile", refused)
    with pytest.raises(OSError, match="too many open files"):
        data.check_episode(data.episode_path(folder, 0))


def test_split_is_by_episode_and_of_every_folder(tmp_path, folder):
    other = make_dataset(tmp_path / "other", first=50)
    dataset = data.Dataset.open([folder, other])
    train, held = dataset.split(0.25)
    assert [(e.path.parent.name, e.path.name[8:14]) for e in held.episodes] == [
        ("set", "000006"), ("set", "000007"), ("other", "000006"), ("other", "000007")
    ]  # fmt: skip
    assert len(train.episodes) == 12 and not set(train.episodes) & set(held.episodes)
    assert dataset.split(0.25)[1] == held
    for bad in (0, 1, -1):
        with pytest.raises(ValueError, match="expected a fraction"):
            dataset.split(bad)


def test_fingerprint_tells_data_apart(tmp_path, folder):
    same = make_dataset(tmp_path / "same")
    other = make_dataset(tmp_path / "other", first=1)
    prints = [data.Dataset.open(each).fingerprint for each in (folder, same, other)]
    assert prints[0] == prints[1] != prints[2]
    train, held = data.Dataset.open(folder).split()
    assert len({train.fingerprint, held.fingerprint, prints[0]}) == 3


@pytest.mark.parametrize("length, stride", [(1, 1), (4, 1), (2, 3), (3, 2)])
def test_clips_lie_within_episodes_and_are_all_drawn(folder, length, stride):
    frames = data.Dataset.open(folder).load()
    every = frames.every_clip(length, stride)
    assert (frames.episode_of[every] == frames.episode_of[every[:, :1]]).all()
    assert (np.diff(every, axis=1) == stride).all()
    assert len(every) == sum(max(0, e.frames - (length - 1) * stride) for e in frames.episodes)
    drawn = frames.clip_index(5000, length, stride, np.random.default_rng(0))
    assert set(map(tuple, drawn)) == set(map(tuple, every))
    counts = np.unique(drawn[:, 0], return_counts=True)[1]
    assert counts.max() < 2.5 * counts.mean()  # uniform over clips


def test_sampled_clips_are_frames_and_the_actions_between(folder):
    frames = data.Dataset.open(folder).load(keys=(*data.KEYS, "privileged/object_pos"))
    clips = frames.sample_clips(32, 3, 2, np.random.default_rng(5))
    index = frames.clip_index(32, 3, 2, np.random.default_rng(5))
    assert set(clips) == set(data.KEYS)  # what no model may read is left out
    assert clips["pixels"].shape == (32, 3, 16, 16, 3) and clips["actions"].shape == (32, 4, 4)
    np.testing.assert_array_equal(clips["pixels"], frames.pixels[index])
    np.testing.assert_array_equal(clips["actions"][:, 2], frames.actions[index[:, 1]])
    asked = frames.sample_clips(2, 1, 1, np.random.default_rng(5), keys=("privileged/object_pos",))
    assert asked["privileged/object_pos"].shape == (2, 1, 3)


def test_impossible_clips_are_refused(folder):
    frames = data.Dataset.open(folder).load()
    for length, stride in [(0, 1), (2, 0), (-1, 1)]:
        with pytest.raises(ValueError, match="expected both to be at least 1"):
            frames.every_clip(length, stride)
    with pytest.raises(ValueError, match="no episode has 40 frames"):
        frames.clip_index(4, 40, 1, np.random.default_rng(0))
