"""Weights and run states as safetensors: whole or absent, with their config inside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from worldmodel.files import replacing

FORMAT = "worldmodel-1"
MAKERS = {"encoder": "pretrain", "model": "train", "calibration": "calibrate"}  # commands


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], config: dict, about: dict | None = None) -> None:
    """Write tensors with what they are (`kind`), their config, and how they were made (`about`)."""
    metadata = {"format": FORMAT, "kind": kind, "config": json.dumps(config), "about": json.dumps(about or {})}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(save({k: v.detach().contiguous() for k, v in tensors.items()}, metadata))


def load_tensors(path: str | Path, *kinds: str) -> tuple[dict[str, Tensor], dict, dict]:
    """Tensors, config and about of a file that `save_tensors` wrote.

    Raises FileNotFoundError without a file, ValueError when it is damaged, of another format or of none of the kinds.
    """
    _, config, about = read_header(path, *kinds)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, config, about


def read_header(path: str | Path, *kinds: str) -> tuple[str, dict, dict]:
    """Kind, config and about of such a file, without its tensors. Raises as `load_tensors`."""
    path = Path(path)
    if not path.is_file():
        makers = " or ".join(f"`worldmodel {MAKERS[kind]}`" for kind in kinds if kind in MAKERS)
        raise FileNotFoundError(f"no {' or '.join(kinds)} file at {path}" + (f"; make one with {makers}" if makers else ""))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again or train it anew") from error
    if metadata.get("format") != FORMAT or metadata.get("kind") not in kinds:
        found = metadata.get("kind", "a file of another program")
        wanted = " or ".join(map(repr, kinds))
        raise ValueError(f"{path} holds {found!r}, expected {wanted}; give a file that `worldmodel` wrote as {wanted}")
    return metadata["kind"], json.loads(metadata["config"]), json.loads(metadata["about"])


def fill(module: nn.Module, tensors: dict[str, Tensor], path: str | Path, assign: bool = False) -> None:
    """Load tensors into a module, or make them its own (`assign`); ValueError names the first one that does not fit."""
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        have = tuple(tensors[name].shape) if name in tensors else "nothing"
        want = tuple(wanted[name].shape) if name in wanted else "nothing"
        if have != want:
            raise ValueError(f"{path} is of another architecture: {name} is {have}, expected {want}; train it anew, or take a file that this version wrote")
    module.load_state_dict(tensors, assign=assign)


def sha256_of(path: Path) -> str:
    """The first 16 digits of a file's SHA-256: which weights, or limits, a result is of."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()[:16]
