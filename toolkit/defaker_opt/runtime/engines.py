"""Engines: what `compile` makes of a build's graphs on the machine that runs them, in a folder beside the build.

engines.json        what they are of, what they were made with and on, and why a stage is not as the build has it
<stage>.engine      one plan a stage
timing.cache        what the builder has timed, so that a second build is quick
compile.log         what the builder said
An engine runs only on the kind of GPU and with the version of TensorRT that made it, so the folder is no part of the
build, which is the same everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defaker_opt.errors import BuildError
from defaker_opt.runtime.backends import Choice
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.cuda import has_gpu

RECORD = "engines.json"
BACKEND = "tensor_rt"

# Runs graphs on a GPU without engines.
TORCH = "torch_cuda"

# Run the graphs of builds whose backend cannot run here, as they are written: the second has the codes that the first
# has no operator for on a CPU (onnxruntime 1.31.1).
_UNCOMPILED = Choice("onnx_runtime")
_ON_CPU = Choice(TORCH, {"device": "cpu", "compute": "float32"})
_ON_CPU_BY_TORCH = "nvfp4"


def engines_folder(build: Path) -> Path:
    """Where a build's engines lie."""
    # Not resolved: a link to a build has engines of its own. Made absolute, as "." has no name.
    place = Path(os.path.abspath(build))  # noqa: PTH100
    return place.with_name(f"{place.name}.engines")


def read_record(folder: Path, name: str = RECORD) -> Mapping[str, Any] | None:
    """What a folder of engines says of itself; None without one. Raises BuildError if it is damaged."""
    path = folder / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BuildError(f"{path}: cannot be read ({error}); remove the folder and compile again") from error
    if not isinstance(data, dict) or not {"build", "tensorrt", "gpu", "stages"} <= data.keys():
        raise BuildError(f"{path}: damaged; remove the folder and compile again")
    return data


def backend_of(build: Build) -> str:
    """What runs a build here: the backend it is made for, or the one that stands in for it."""
    substitute = stand_in(build)
    return substitute.backend if substitute else str(build.manifest.data["target"]["backend"])


def stand_in(build: Build) -> Choice | None:
    """What runs a build in place of the backend it is made for, if that wants engines or a GPU that is not there: ONNX
    Runtime, or torch on the CPU for codes that ONNX Runtime does not know.
    """
    made_for = str(build.manifest.data["target"]["backend"])
    missing = {
        BACKEND: lambda: read_record(engines_folder(build.folder)) is None,
        TORCH: lambda: not has_gpu(),
    }
    if made_for not in missing or not missing[made_for]():
        return None
    notes = [notes for each in build.manifest.data.get("passes", ()) for notes in each.values()]
    schemes = [scheme for each in notes for scheme in each.get("quantized", {}).values()]
    return _ON_CPU if any(scheme.startswith(_ON_CPU_BY_TORCH) for scheme in schemes) else _UNCOMPILED
