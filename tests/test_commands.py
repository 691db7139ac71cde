"""The command line as its users call it: every command with its debug preset, its streams and exit codes, bad inputs."""

import filecmp
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from worldmodel import data
from worldmodel.commands import bench, cli, collect, throughput, workers
from worldmodel.model import load

ROOT = Path(__file__).parent.parent
EXISTING = [name for name in cli.COMMANDS if importlib.util.find_spec(f"worldmodel.commands.{name}")]
TASKS = "reach", "grasp", "reach-with-object", "pick-place"


def words(*args) -> list[str]:
    return [str(arg) for arg in args]


def call(*args, **environment) -> subprocess.CompletedProcess:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "worldmodel", *words(*args)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def refuse(capfd, *args) -> str:
    """The one line that a bad input gets, called in this process."""
    capfd.readouterr()
    code = cli.main(words(*args))
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("worldmodel ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    assert cli.main(words("collect", "--preset", "debug", "--out", folder)) == 0
    return folder


def needs(command: str):
    return pytest.mark.skipif(command not in EXISTING, reason=f"there is no {command}")


# Help


def test_help_names_the_commands_and_is_quick():
    start = time.perf_counter()
    result = call("--help")
    assert time.perf_counter() - start < 5
    assert result.returncode == 0 and result.stderr == ""
    assert all(f"  {name} " in result.stdout for name in EXISTING)
    nothing = call()
    assert nothing.returncode == 2 and nothing.stdout == "" and "usage" in nothing.stderr


@pytest.mark.parametrize("command", EXISTING)
def test_help_of_every_command_has_flags_and_presets(command, capfd):
    assert cli.main([command, "--help"]) == 0
    out = capfd.readouterr().out
    assert "--preset" in out and "debug" in out and "default" in out


def test_help_loads_nothing_heavy():
    code = "import sys; from worldmodel.commands import cli, collect, show; print([m for m in ('torch', 'mujoco', 'cv2') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", EXISTING)
def test_every_command_has_a_debug_preset_and_all_presets_fit(command):
    module = importlib.import_module(f"worldmodel.commands.{command}")
    assert "debug" in cli.presets(command)
    needed = {"show": ["somewhere"]}.get(command, [])
    for preset in cli.presets(command):
        assert isinstance(cli.parse(command, module, needed, preset), module.Config)


# Collect


def test_collect_prints_a_table_or_json(dataset, tmp_path):
    result = call("collect", "--preset", "debug", "--out", tmp_path / "set", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert told["episodes"] == told["collected"] == 4 and told["steps"] == told["frames"] - 4
    assert told["fingerprint"] == data.Dataset.open(dataset).fingerprint
    _, *flags = data.read_recipe(dataset)["command"].split()[1:]
    assert call("collect", *flags, "--out", tmp_path / "same").returncode == 0 and same_bytes(dataset, tmp_path / "same")
    again = call("collect", "--preset", "debug", "--out", tmp_path / "set")  # complete: nothing to do
    assert again.returncode == 0 and "new: 0 episodes" in again.stdout
    assert same_bytes(dataset, tmp_path / "set")


def test_episodes_hold_what_they_promise(dataset):
    for i, episode in enumerate(data.Dataset.open(dataset).episodes):
        arrays = data.read_episode(episode.path)
        assert arrays["pixels"].shape[1:] == (96, 96, 3) and arrays["pixels"].dtype == "uint8"
        assert arrays["proprio"].shape[1:] == (7,) and arrays["proprio"].dtype == "float32"
        assert arrays["actions"].shape[1:] == (4,) and abs(arrays["actions"]).max() <= 1
        assert arrays["privileged/object_pos"].shape == (episode.frames, 3)
        assert arrays["seed"] == i and arrays["task"] == "pick-place" and arrays["policy"] == "mixture"
        assert (arrays["pixels"][0] != arrays["pixels"][-1]).any()


@pytest.mark.parametrize("task", TASKS)
def test_collect_of_every_task_and_object(task, tmp_path):
    args = ("collect", "--preset", "debug", "--task", task, "--object", "both", "--episodes", 2, "--max-steps", 3)
    assert cli.main(words(*args, "--out", tmp_path / "set")) == 0
    episodes = [data.read_episode(e.path) for e in data.Dataset.open(tmp_path / "set").episodes]
    assert {str(e["object"]) for e in episodes} == {"box", "cup"}
    assert {str(e["task"]) for e in episodes} == {task}


def test_number_of_workers_changes_nothing(dataset, tmp_path):
    assert cli.main(words("collect", "--preset", "debug", "--workers", 3, "--out", tmp_path / "set")) == 0
    assert same_bytes(dataset, tmp_path / "set")


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def collect_while_killing(args: list[str], folder: Path, kills: int, longest: float, seed: int) -> None:
    """Start, kill -9 at a random moment, check that the set opens; `kills` times, then let it end."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-m", "worldmodel", *args], cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, longest))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if any(folder.glob("*.npz")):
            data.Dataset.open(folder).load()
    end = subprocess.run([sys.executable, "-m", "worldmodel", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr


def test_killed_and_resumed_collect_ends_with_the_same_bytes(tmp_path):
    args = words("collect", "--episodes", 60, "--workers", 2, "--max-steps", 20, "--out")
    assert cli.main([*args, str(tmp_path / "whole")]) == 0
    collect_while_killing([*args, str(tmp_path / "killed")], tmp_path / "killed", kills=2, longest=4.0, seed=0)
    assert same_bytes(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_collect_killed_ten_times_ends_with_the_same_bytes(tmp_path):
    args = words("collect", "--episodes", 1200, "--object", "both", "--workers", 2, "--out")
    assert cli.main([*args, str(tmp_path / "whole")]) == 0
    collect_while_killing([*args, str(tmp_path / "killed")], tmp_path / "killed", kills=10, longest=6.0, seed=1)
    assert same_bytes(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_collect_is_fast(tmp_path):
    result = call("collect", "--episodes", 600, "--workers", 2, "--out", tmp_path / "set", "--json")
    assert json.loads(result.stdout)["steps_per_second"] > 500  # 1,000 where nothing else runs


def test_workers_end_with_a_killed_parent(tmp_path):
    args = words("collect", "--episodes", 500, "--workers", 2, "--out", tmp_path / "set")
    process = subprocess.Popen([sys.executable, "-m", "worldmodel", *args], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "set").glob("*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1.0)
    there = set(os.listdir(tmp_path / "set"))
    time.sleep(1.0)
    assert set(os.listdir(tmp_path / "set")) == there and len(there) < 400


def test_threads_of_too_many_workers_wait_asleep(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for threads, policy in ((1, None), (2, "passive")):
        with workers.pool(2, threads, time.sleep, 0) as pool:
            assert [pool.submit(os.getenv, name).result() for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")] == [str(threads), policy]
    assert "OMP_WAIT_POLICY" not in os.environ


def test_collect_mends_what_is_damaged_or_missing(dataset, tmp_path):
    folder = tmp_path / "set"
    args = words("collect", "--preset", "debug", "--out", folder)
    assert cli.main(args) == 0
    path = data.episode_path(folder, 1)
    path.write_bytes(path.read_bytes()[:5000])
    data.episode_path(folder, 2).unlink()
    (folder / ".episode-000002.npz.77.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="mend it with: worldmodel collect .*--out"):
        data.Dataset.open(folder)
    assert cli.main(args) == 0
    assert same_bytes(dataset, folder)


# Bad inputs


BAD_FLAGS = {
    "--task fly": "'reach', 'grasp', 'reach-with-object', 'pick-place'",
    "--object spoon": "'box', 'cup', 'can', 'both'",
    "--policy expret": "'expert'",
    "--preset nothing": "known are base, careful, careful-mild, cube, debug",
    "--epsiodes 3": "--episodes",
    "--episodes 0": "episodes is 0, expected at least 1",
    "--episodes -3": "episodes is -3, expected at least 1",
    "--episodes many": "--episodes",
    "--workers 0": "workers is 0",
    "--seed -1": "seed is -1",
    "--image-size 0": "image-size is 0",
    "--image-size 7": "expected 16 to 1024",
    "--cameras above": "front",
    "--max-steps 0": "max-steps is 0",
}


@pytest.mark.parametrize("flags, expected", BAD_FLAGS.items())
def test_bad_flags_get_one_line_that_names_what_exists(flags, expected, tmp_path, capfd):
    line = refuse(capfd, "collect", *flags.split(), "--out", tmp_path / "set")
    assert expected in line
    assert not list(tmp_path.iterdir())  # no half file


def test_missing_flag_and_unknown_command(capfd):
    assert "--out" in refuse(capfd, "collect", "--episodes", 3)
    assert "known are collect" in refuse(capfd, "colect")


def test_bad_input_of_a_process(tmp_path):
    result = call("collect", "--episodes", 0, "--out", tmp_path / "set")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "worldmodel collect: episodes is 0, expected at least 1\n"
    shown = call("collect", "--episodes", 0, "--out", tmp_path / "set", WORLDMODEL_TRACEBACK="1")
    assert shown.returncode == 2 and "Traceback" in shown.stderr


def test_unknown_preset_key_is_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cli, "PRESETS", tmp_path)
    (tmp_path / "collect").mkdir()
    preset = tmp_path / "collect" / "mine.yaml"
    for text, expected in {
        "epsiodes: 3": "unknown key 'epsiodes'; known are out, task, object, policy, episodes",
        "episodes: {a: 3}": "unknown key 'episodes.a'",
        "episodes: -2": "episodes is -2",
        "task: fly": "'reach', 'grasp'",
        "- 3": "holds list, expected keys and values",
        "a: [": "is not YAML",
    }.items():
        preset.write_text(text)
        assert expected in refuse(capfd, "collect", "--preset", "mine", "--out", tmp_path / "set")
    assert os.listdir(tmp_path) == ["collect"]


def test_one_preset_serves_a_whole_pipeline(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cli, "PRESETS", tmp_path)
    text = "env: {id: Reacher-v5, proprio: [0, 1]}\ncollect: {episodes: 3, out: there}\ntrain: {data: there, encoder: e, out: run}\n"
    (tmp_path / "mine.yaml").write_text(text)
    for name in ("mine", str(tmp_path / "mine.yaml")):
        config = cli.parse("collect", collect, [], name)
        assert (config.env.id, config.env.proprio, config.episodes, config.out) == ("Reacher-v5", (0, 1), 3, Path("there"))
        assert cli.parse("train", importlib.import_module("worldmodel.commands.train"), ["--steps", "7"], name).steps == 7
    assert cli.presets("collect") == cli.presets("train") == ["mine"] and cli.presets("bench") == []
    assert "has no part for bench" in refuse(capfd, "bench", "--preset", "mine", "--out", tmp_path / "set")
    assert "and paths of .yaml files" in refuse(capfd, "bench", "--preset", tmp_path / "none.yaml", "--out", tmp_path / "set")
    (tmp_path / "mine.yaml").write_text("colect: {}\n")
    assert "unknown key 'colect'; expected env, and commands: collect" in refuse(capfd, "bench", "--preset", "mine", "--out", tmp_path)


def test_flags_know_all_tasks_and_levels():
    from envs.randomize import LEVELS
    from envs.tasks import TASKS

    assert set(get_args(collect.Task)) == set(TASKS) and set(get_args(collect.Level)) == set(LEVELS)


def test_flags_override_presets(tmp_path, monkeypatch):
    from worldmodel.commands import collect

    monkeypatch.setattr(cli, "PRESETS", tmp_path)
    (tmp_path / "collect").mkdir()
    text = "episodes: 3\ncameras: [front, side]\nstop_on_success: false\ntask: reach\n"
    (tmp_path / "collect" / "mine.yaml").write_text(text)
    config = cli.parse("collect", collect, ["--out", "x", "--episodes", "5"], "mine")
    assert config == collect.Config(Path("x"), "reach", episodes=5, cameras=("front", "side"), stop_on_success=False)


def test_folder_with_something_else_is_left_alone(dataset, tmp_path, capfd):
    before = sorted(os.listdir(dataset))
    line = refuse(capfd, "collect", "--preset", "debug", "--seed", 9, "--out", dataset)
    assert "holds another dataset, with seed 0 instead of 9" in line
    assert "episodes 4 instead of 5" in refuse(capfd, "collect", "--preset", "debug", "--episodes", 5, "--out", dataset)
    assert sorted(os.listdir(dataset)) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds notes.txt" in refuse(capfd, "collect", "--preset", "debug", "--out", tmp_path)
    assert "is a file" in refuse(capfd, "collect", "--preset", "debug", "--out", tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_two_collects_do_not_write_into_one_folder(dataset, capfd):
    from worldmodel import files

    with files.owned(dataset, "collect"):
        assert "another collect is writing" in refuse(capfd, "collect", "--preset", "debug", "--out", dataset)


def test_without_gl_library_one_line_says_what_to_install(tmp_path):
    result = call("collect", "--preset", "debug", "--out", tmp_path / "set", MUJOCO_GL="osmesa")
    if result.returncode == 0:
        pytest.skip("this machine has OSMesa")
    assert result.returncode == 2 and "Traceback" not in result.stderr and "install libegl1" in result.stderr
    assert not list(tmp_path.iterdir())


def test_failure_that_is_no_bad_input_shows_its_traceback(tmp_path, capfd, monkeypatch):
    from worldmodel.commands import collect

    def fail(config, folder):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(collect, "_begin", fail)
    assert cli.main(words("collect", "--preset", "debug", "--out", tmp_path / "set")) == 1
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" in err and "ZeroDivisionError: ours" in err
    assert cli.noticed(collect.__file__, "raise ValueError(") and not cli.noticed(collect.__file__, "a, b = pair")
    assert not cli.noticed(json.__file__, "raise JSONDecodeError")


def test_results_become_json():
    import numpy as np

    value = {"a": np.float32(1), "b": (np.int64(2), [float("nan")]), "c": np.arange(2), "d": Path("x"), 1: None, "e": True}
    told = {"a": 1.0, "b": [2, [None]], "c": [0, 1], "d": "x", "1": None, "e": True}
    assert json.loads(json.dumps(cli._jsonable(value))) == told


# Show


@pytest.mark.parametrize("suffix, images", [(".png", 1), (".webp", 13)])
def test_show_episode_and_dataset(dataset, tmp_path, capfd, suffix, images):
    from PIL import Image

    for name, path in {"episode": data.episode_path(dataset, 0), "dataset": dataset}.items():
        capfd.readouterr()
        out = tmp_path / f"{name}{suffix}"
        assert cli.main(words("show", path, "--preset", "debug", "--out", out, "--json")) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["kind"] == name and told["images"] == images
        with Image.open(out) as image:
            assert list(image.size) == told["size"] and getattr(image, "n_frames", 1) == images


def test_show_training_and_benchmarks(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    rows = [{"step": i, "minutes": i / 60, "loss": 1 / (i + 1), "rank": 3} for i in range(50)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for policy in ("planner", "random"):
        (tmp_path / "bench" / policy).mkdir(parents=True)
        result = {
            "config": {"task": "reach", "policy": policy},
            "episodes": [{}] * 10,
            "summary": {"success_rate": 0.5, "success_ci95": [0.24, 0.76], "unsafe_rate": 0.1},
        }
        (tmp_path / "bench" / policy / "results.json").write_text(json.dumps(result))
    (tmp_path / "bench" / "offline").mkdir()  # a recording, whose steps succeed at nothing
    (tmp_path / "bench" / "offline" / "results.json").write_text(json.dumps({"config": {}, "steps": [], "summary": {"error_mm": 3.0}}))
    assert "tells of episodes" in refuse(capfd, "show", tmp_path / "bench" / "offline", "--out", tmp_path / "a" / "offline.png")
    for name in ("run", "bench"):
        assert cli.main(words("show", tmp_path / name, "--out", tmp_path / "a" / f"{name}.png")) == 0
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "does not move" in refuse(capfd, "show", tmp_path / name, "--out", tmp_path / "a" / f"{name}.webp")
    assert sorted(os.listdir(tmp_path / "a")) == ["bench.png", "run.png"]


def test_show_refuses_what_it_cannot_read(dataset, tmp_path, capfd):
    out = tmp_path / "a.png"
    assert "is missing" in refuse(capfd, "show", tmp_path / "nowhere", "--out", out)
    assert "nothing to show" in refuse(capfd, "show", tmp_path, "--out", out)
    assert ".png or .webp" in refuse(capfd, "show", dataset, "--out", tmp_path / "a.gif")
    assert "scale is 0" in refuse(capfd, "show", dataset, "--scale", 0, "--out", out)
    (tmp_path / "episode-000000.npz").write_bytes(data.episode_path(dataset, 0).read_bytes()[:9000])
    assert "is damaged" in refuse(capfd, "show", tmp_path / "episode-000000.npz", "--out", out)
    (tmp_path / "metrics.jsonl").write_text("{")
    assert "metrics.jsonl is damaged" in refuse(capfd, "show", tmp_path, "--out", out)
    assert not out.exists()


# Training


@pytest.fixture(scope="module")
def encoder(dataset, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("pretrain") / "run"
    result = call("pretrain", "--preset", "debug", "--data", dataset, "--out", run, "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1 and Path(told["encoder"]).parent == run
    return Path(told["encoder"])


@needs("pretrain")
def test_curves_of_a_pretraining_can_be_shown(encoder, tmp_path):
    assert cli.main(words("show", encoder.parent, "--out", tmp_path / "curves.png")) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000


@needs("pretrain")
def test_trainings_refuse_bad_input(encoder, dataset, tmp_path, capfd):
    args = ("pretrain", "--preset", "debug", "--data", dataset)
    assert "--resume" in refuse(capfd, *args, "--out", encoder.parent)
    out = ("--out", tmp_path / "run")
    assert "make one with" in refuse(capfd, "pretrain", "--preset", "debug", "--data", tmp_path / "nowhere", *out)
    for flag in ("--batch", "--steps", "--frames", "--minutes", "--depth"):
        assert flag[2:] in refuse(capfd, *args, flag, 0, *out)
        assert flag[2:] in refuse(capfd, *args, flag, -1, *out)
    damaged = tmp_path / "damaged"
    assert cli.main(words("collect", "--preset", "debug", "--out", damaged)) == 0
    data.episode_path(damaged, 1).unlink()
    assert "episode-000001.npz is missing" in refuse(capfd, "pretrain", "--preset", "debug", "--data", damaged, *out)
    data.episode_path(damaged, 1).write_bytes(data.episode_path(dataset, 1).read_bytes()[:9999])
    assert "episode-000001.npz is damaged" in refuse(capfd, "pretrain", "--preset", "debug", "--data", damaged, *out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "other" in refuse(capfd, *args, "--out", tmp_path / "other")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def model(encoder, dataset, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("train") / "run"
    args = words("train", "--preset", "debug", "--data", dataset, "--encoder", encoder, "--out", run, "--cache", run.parent / "cache")
    assert cli.main(args) == 0
    return run / "model.safetensors"


def damaged_weights(good: Path, folder: Path) -> dict[Path, str]:
    """Files that are no weights of the wanted kind, and what is said of them."""
    files = {name: folder / f"{name}.safetensors" for name in ("truncated", "text", "absent")}
    files["truncated"].write_bytes(good.read_bytes()[:-1000])
    files["text"].write_text("this is not safetensors")
    return {path: path.name for path in files.values()}


@needs("train")
def test_train_refuses_bad_input(model, encoder, dataset, tmp_path, capfd):
    args = ("train", "--preset", "debug", "--data", dataset, "--cache", tmp_path / "features")
    out = ("--out", tmp_path / "run")
    assert "--resume" in refuse(capfd, *args, "--encoder", encoder, "--out", model.parent)
    for path, expected in damaged_weights(encoder, tmp_path).items():
        assert expected in refuse(capfd, *args, "--encoder", path, *out)
    for flag in ("--batch", "--steps", "--transitions", "--rollout"):
        assert flag[2:] in refuse(capfd, *args, "--encoder", encoder, flag, 0, *out)
    assert "5 heads" in refuse(capfd, *args, "--encoder", encoder, "--num-heads", 5, *out)
    assert not (tmp_path / "run").exists()


@needs("probe")
def test_probe_tells_all_errors(encoder, tmp_path, capfd):
    assert cli.main(words("probe", "--preset", "debug", "--encoder", encoder, "--json")) == 0
    told = json.loads(capfd.readouterr().out)
    for scores in (told, told["ridge"], told["random_init"], told["pixels"]):
        assert len(scores["gripper_rmse_mm"]) == len(scores["object_rmse_mm"]) == 3
        assert scores["object_yaw_rmse_deg"] > 0
    assert told["frames"] and told["seeds"]
    for path, expected in damaged_weights(encoder, tmp_path).items():
        assert expected in refuse(capfd, "probe", "--preset", "debug", "--encoder", path)
    assert "frames is 0" in refuse(capfd, "probe", "--preset", "debug", "--frames", 0)
    for seeds in ("--seed 5000 --test-seed 5000", "--seed 5000 --test-seed 4999 --test-frames 1000"):
        assert "are among the" in refuse(capfd, "probe", "--preset", "debug", *seeds.split())


# Bench


@needs("bench")
@pytest.mark.parametrize("policy", ["planner", "simulator", "expert", "random", "nothing"])
def test_bench_of_every_policy(policy, model, tmp_path, capfd):
    args = words("bench", "--preset", "debug", "--model", model, "--policy", policy, "--out", tmp_path / "bench")
    assert cli.main([*args, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert 0 <= told["success_ci95"][0] <= told["success_rate"] <= told["success_ci95"][1] <= 1
    assert told["decision_seconds"]["median"] <= told["decision_seconds"]["p95"] and told["unsafe_rate"] >= 0
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert set(results) == {"config", "episodes", "summary"} and results["summary"] == told
    assert cli.main(words("show", tmp_path / "bench", "--out", tmp_path / "rates.png")) == 0


@needs("imitate")
def test_a_policy_that_imitates_is_trained_and_benched(model, dataset, tmp_path, capfd):
    out = tmp_path / "run"
    args = words("imitate", "--preset", "debug", "--data", dataset, "--model", model, "--cache", tmp_path / "cache")
    assert cli.main([*args, "--out", str(out), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    policy = told["model"]
    assert told["held_out"] > 0
    assert cli.main(words("bench", "--preset", "debug", "--model", policy, "--out", tmp_path / "plan", "--json")) == 0
    played = json.loads((tmp_path / "plan" / "results.json").read_text())
    assert played["config"]["energy"] == "last" and played["config"]["std"] == 0.3
    straight = ("--begin", "guide", "--model", policy, "--out", tmp_path / "straight")
    assert cli.main(words("bench", "--preset", "debug", *straight)) == 0
    assert json.loads((tmp_path / "straight" / "results.json").read_text())["config"]["energy"] == "sum"
    capfd.readouterr()
    bench = ("bench", "--preset", "debug", "--policy", "imitation")
    assert cli.main(words(*bench, "--model", policy, "--out", tmp_path / "bench", "--json")) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["goals"] == "final, pictures alone" and told["unsafe_rate"] >= 0
    assert "`worldmodel imitate`" in refuse(capfd, *bench, "--model", model, "--out", tmp_path / "other")
    assert "3 sub-goals" in refuse(capfd, *bench, "--model", policy, "--goal", "subgoals", "--subgoal-steps", 3, 4, "--out", tmp_path / "other")
    assert "search for plans" in refuse(capfd, *bench, "--model", policy, "--begin", "guide", "--out", tmp_path / "other")
    assert "expected one of guide, nothing" in refuse(capfd, "bench", "--model", model, "--begin", "policy", "--out", tmp_path / "other")
    others = ("collect", "--preset", "debug", "--action-dim", 7, "--out", tmp_path / "others")
    assert cli.main(words(*others)) == 0
    wrong = ("imitate", "--preset", "debug", "--data", tmp_path / "others", "--model", model, "--out", tmp_path / "other")
    assert "actions of the data have 7 numbers, the model's have 4" in refuse(capfd, *wrong)
    assert "reach is 0" in refuse(capfd, *args, "--reach", 0, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@needs("hazard")
def test_a_hazard_head_is_trained_on_what_was_played(model, dataset, tmp_path, capfd):
    args = words("hazard", "--preset", "debug", "--data", dataset, "--model", model, "--cache", tmp_path / "cache", "--seed", 1)
    assert cli.main([*args, "--out", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    before, after = load(model), load(told["model"])
    assert torch.equal(before.predictor.place, after.predictor.place)
    assert not torch.equal(before.hazard.feel[0].weight, after.hazard.feel[0].weight)
    assert "not empty" in refuse(capfd, *args, "--out", tmp_path / "run")
    assert "epochs is 0" in refuse(capfd, *args, "--epochs", 0, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@needs("bench")
def test_bench_refuses_bad_input(model, tmp_path, capfd):
    args = ("bench", "--preset", "debug", "--model", model)
    out = ("--out", tmp_path / "bench")
    for flags, expected in {
        "--task fly": "'reach', 'grasp', 'reach-with-object', 'pick-place'",
        "--object spoon": "'box', 'cup'",
        "--policy magic": "'planner', 'simulator'",
        "--goal none": "'final', 'subgoals'",
        "--episodes 0": "episodes is 0",
        "--episodes -1": "episodes is -1",
        "--samples 0": "samples is 0",
        "--seed -1": "seed is -1",
        "--progress nan": "progress is nan, expected a number",
    }.items():
        assert expected in refuse(capfd, *args, *flags.split(), *out)
    for path, expected in damaged_weights(model, tmp_path).items():
        assert expected in refuse(capfd, "bench", "--preset", "debug", "--model", path, *out)
    assert not (tmp_path / "bench").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "notes.txt" in refuse(capfd, *args, "--out", tmp_path / "other")


def test_a_benchmark_without_a_failure_can_be_shown(tmp_path):
    for won, played in ((200, 200), (50, 50), (0, 3), (250, 250)):
        low, high = bench.wilson(won, played)
        assert 0 <= low <= won / played <= high <= 1
        (tmp_path / str(played)).mkdir(exist_ok=True)
        summary = {"success_rate": won / played, "success_ci95": [low, high], "unsafe_rate": 0.0}
        (tmp_path / str(played) / "results.json").write_text(json.dumps({"config": {}, "episodes": [{}] * played, "summary": summary}))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "results.json").write_text("[1, 2]")
    assert cli.main(words("show", tmp_path, "--out", tmp_path / "rates.png")) == 0


def test_what_others_print_is_not_the_result(tmp_path):
    (tmp_path / "talks.py").write_text(
        "import os\nimport sys\nimport gymnasium as gym\nimport numpy as np\nos.write(1, b'banner\\n')\n\n\n"
        "class Talks(gym.Env):\n"
        "    action_space, observation_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Dict({'pixels': gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)})\n"
        "    def reset(self, *, seed=None, options=None):\n        print('homing', file=sys.__stdout__)\n        return {'pixels': np.zeros((32, 32, 3), np.uint8)}, {}\n"
        "    def step(self, action):\n        return {'pixels': np.full((32, 32, 3), 9, np.uint8)}, 0.0, False, False, {}\n\n\n"
        "gym.register('Talks-v0', Talks)\n"
    )
    result = call(
        "collect", "--env.id", "talks:Talks-v0", "--policy", "random", "--episodes", 2, "--max-steps", 3, "--image-size", 32, "--workers", 2,
        "--out", tmp_path / "data", "--json", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0 and json.loads(result.stdout)["episodes"] == 2, result.stderr
    assert "homing" in result.stderr and "banner" in result.stderr


def test_on_and_off_in_a_preset_are_words(tmp_path, capfd):
    preset = tmp_path / "mine.yaml"
    preset.write_text("bench: {gate: on, policy: nothing}")
    assert "--gate on needs --calibration" in refuse(capfd, "bench", "--preset", preset, "--out", tmp_path / "out")
    preset.write_text("bench: {gate: off, policy: nothing, episodes: 1, max_steps: 2}")
    assert cli.main(words("bench", "--preset", preset, "--out", tmp_path / "out")) == 0
    preset.write_bytes(b"bench: {policy: \xff}")
    assert "is not YAML" in refuse(capfd, "bench", "--preset", preset, "--out", tmp_path / "no")


@pytest.mark.parametrize(("command", "flags", "told"), [
    ("collect", ("--env.frame-skip", 2), "--env.frame-skip is of an environment of others"),
    ("collect", ("--env.id", "mine:Mine-v0", "--task", "reach"), "--task is of the robot's tasks"),
    ("pretrain", ("--seed", -1), "seed is -1"), ("pretrain", ("--rate", 0), "rate is 0"), ("pretrain", ("--stem", -1), "stem is -1"),
    ("train", ("--seed", -1), "seed is -1"), ("train", ("--rate", -1), "rate is -1"), ("train", ("--hidden", -1), "hidden is -1"), ("hazard", ("--seed", -1), "seed is -1"),
    ("pretrain", ("--summary-weight", -1), "summary_weight is -1"), ("bench", ("--draw",), "--draw is for --policy imitation"),
    ("bench", ("--env.id", "mine:Mine-v0", "--policy", "random", "--randomization", "light"), "--randomization is of the robot's tasks"),
])  # fmt: skip
def test_numbers_and_words_that_mean_nothing_are_refused(command, flags, told, dataset, encoder, model, tmp_path, capfd):
    given = {"pretrain": ("--data", dataset), "train": ("--data", dataset, "--encoder", encoder), "hazard": ("--data", dataset, "--model", model)}
    assert told in refuse(capfd, command, *given.get(command, ()), *flags, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_two_cameras_from_collect_to_speed(tmp_path, capfd):
    cameras, model = ("--cameras", "front", "wrist"), tmp_path / "model" / "model.safetensors"
    small = "--embed-dim 24 --depth 1 --num-heads 1 --batch 4 --steps 4 --threads 1".split()
    few = *cameras, "--samples", 4, "--iterations", 1, "--threads", 1
    for line in (
        ("collect", *cameras, "--episodes", 4, "--max-steps", 6, "--image-size", 24, "--workers", 1, "--out", tmp_path / "data"),
        ("pretrain", "--data", tmp_path / "data", *small, "--image-size", 24, "--views", 2, "--stride", 1, "--out", tmp_path / "encoder"),
        ("train", "--data", tmp_path / "data", "--encoder", tmp_path / "encoder" / "encoder.safetensors", *small, "--merge", 1, "--transitions", 2,
         "--out", model.parent),
        ("bench", "--model", model, *few, "--elites", 2, "--episodes", 1, "--max-steps", 3, "--video", 1, "--record", "--out", tmp_path / "bench"),
        ("speed", "--model", model, *few, "--decisions", 2, "--no-peers", "--no-growth", "--no-training"),
    ):  # fmt: skip
        assert cli.main(words(*line)) == 0, line[0]
    played = np.load(next((tmp_path / "bench" / "data").glob("*.npz")))
    assert played["pixels"].shape[1:] == (24, 48, 3)
    recording = tmp_path / "recording.npz"
    np.savez(recording, observations=played["pixels"][None, :, :20, :40], states=played["proprio"][None])
    assert "expected 48 and 24, those of 2 cameras" in refuse(capfd, "energy", "--model", model, "--trajectory", recording, "--out", tmp_path / "energy")


def test_benchmarks_are_timed_with_one_and_two_processes():
    config = bench.Config(out=Path("."), policy="random", max_steps=3)
    told = throughput.playing(config, few=1, many=4)["bench_decisions_per_second"]
    assert list(told) == ["1", "2"] and all(np.isfinite(list(told.values())))
