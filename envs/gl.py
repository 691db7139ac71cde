"""Which GL library draws; importing this module decides, and it comes before mujoco is imported."""

from __future__ import annotations

import ctypes
import os
import sys

REMEDY = "cannot draw: no usable GL library; install libegl1 (or libosmesa6) and set MUJOCO_GL=egl (or osmesa)"
if "mujoco" in sys.modules and not os.environ.get("MUJOCO_GL"):  # it has chosen already
    REMEDY = "cannot draw: mujoco was imported before envs, which chooses what draws; import envs first, or start Python with MUJOCO_GL=egl (or osmesa)"
_LIBRARIES = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}


def _loads(name: str) -> bool:
    for library in _LIBRARIES[name]:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def choose() -> None:
    """Set MUJOCO_GL to EGL, else OSMesa, where it is unset; to "disable" where what it names is not installed.

    mujoco cannot even be imported with a library named that is not there; with "disable" all but drawing works.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")  # llvmpipe draws small pictures faster without threads of its own
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if sys.platform != "linux" or wanted not in ("", *_LIBRARIES):
        return
    names = [wanted] if wanted else list(_LIBRARIES)
    os.environ["MUJOCO_GL"] = next((name for name in names if _loads(name)), "disable")


choose()
