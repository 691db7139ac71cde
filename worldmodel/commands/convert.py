"""Turn weights of V-JEPA 2 into files of this project, and encoders of this project into a VJEPA2Model.

--source takes what Meta publishes: an original checkpoint (vitl.pt, vith.pt, vitg.pt, vitg-384.pt, vjepa2-ac-vitg.pt), a
folder of a VJEPA2Model, or its repository (facebook/vjepa2-vitl-fpc64-256; needs the extra `hub`). random:vitl and the like
make random weights of a size (vitl, vith, vitg, vitg-384, vjepa2-ac-vitg), to see what fits before a download.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """What to turn into what."""

    source: str
    """checkpoint, folder, repository, a file of this project, or random:SIZE"""
    out: Path
    """file to write; with --to transformers a new folder"""
    to: Literal["worldmodel", "transformers"] = "worldmodel"
    """whose format: one safetensors file of this project, or a folder that VJEPA2Model.from_pretrained takes"""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """type of the weights; half the memory in half precision"""
    heads: int | None = None
    """attention heads of the encoder, for original checkpoints of other widths than Meta's, which do not tell"""


def run(config: Config) -> dict:
    """Convert, and say what was written."""
    import torch

    from worldmodel import hub
    from worldmodel.encoder import VideoEncoder
    from worldmodel.model import LatentModel

    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; give a path that does not")
    dtype = None if config.dtype == "stored" else getattr(torch, config.dtype)
    made = hub.load_any(config.source, dtype, config.heads)
    encoder = made.encoder if isinstance(made, LatentModel) else made
    if not isinstance(encoder, VideoEncoder):
        raise ValueError(f"{config.source} is no video encoder of this project's kind; there is nothing to convert")
    if config.to == "transformers":
        hub.export(encoder, config.out)
        made = encoder
    elif isinstance(made, LatentModel):
        made.save(config.out)
    else:
        hub.save_encoder(config.out, encoder, {"source": Path(config.source).name})
    weights = sum(p.numel() for p in made.parameters())
    size = sum(p.numel() * p.element_size() for p in made.parameters())
    kind = "model" if isinstance(made, LatentModel) else "encoder"
    return {"out": str(config.out), "kind": kind, "parameters": weights, "megabytes": round(size / 1e6, 1), "encoder": encoder.metadata()}


def report(result: dict) -> str:
    """What was written, in words, and what its encoder does to pictures."""
    sizes = result["encoder"]
    return (
        f"{result['out']}: {result['kind']}, {result['parameters'] / 1e6:.1f} M parameters, {result['megabytes']:.0f} MB\n"
        f"pictures: shorter side resized to {sizes['resize'] or sizes['image_size']}, the middle {sizes['image_size']} x "
        f"{sizes['image_size']} cropped, (x / 255 - {list(sizes['mean'])}) / {list(sizes['std'])}"
    )
