"""A world-model planning stack: `load_encoder` and `load_ac` are at hand here, the rest in the modules."""


def __getattr__(name: str):
    """`load_encoder` and `load_ac` of `worldmodel.hub`, imported when first asked for: torch takes seconds."""
    if name in ("load_encoder", "load_ac"):
        from worldmodel import hub

        return getattr(hub, name)
    raise AttributeError(f"module 'worldmodel' has no attribute {name!r}")
