"""How a compiled stage is opened and run. One backend a file; the file name is the name a target gives."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from defaker_opt.errors import BuildError
from defaker_opt.runtime.spec import StageSpec

Tensors = Mapping[str, NDArray[Any]]


class OpenStage(Protocol):
    """A stage ready to run."""

    def __call__(self, tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Run once: input arrays by name → the requested outputs by name.

        Outputs may lie on a device: then they are what the next stage, `numpy.concatenate` and indexing take, and
        `numpy.asarray` reads them.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """A backend in place of the one that a build has here, and what it is told beside the target's options."""

    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    """One operator of one run: name: the graph's node; run: which run, from 0; milliseconds: in the operator itself."""

    run: int
    name: str
    kind: str
    milliseconds: float


@dataclass(frozen=True)
class Trace:
    """plain_ms: milliseconds of each run when nothing is traced. operators: of as many traced runs of the same calls,
    each with what tracing adds to it.
    """

    plain_ms: tuple[float, ...]
    operators: tuple[Operator, ...]


class Backend(Protocol):
    """What a backend module offers.

    One that can tell where time goes also has `trace_stage(file, spec, options, calls, repeat)`: each call, that is its
    input arrays and the names of its outputs, is run in turn, `repeat` times over, plain and traced; returns a Trace.
    """

    def open_stage(self, file: Path, spec: StageSpec, options: Mapping[str, Any]) -> OpenStage:
        """Open one compiled stage. `options` are the target's own, e.g. the number of threads."""
        ...


def find_backend(name: str) -> Backend:
    """The backend module of that name. Raises BuildError if its library is not installed."""
    try:
        module: Any = importlib.import_module(f"defaker_opt.runtime.backends.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("defaker_opt"):
            raise BuildError(f"backend {name}: this version of defaker-opt has no such backend; update it") from error
        raise BuildError(
            f"backend {name} needs the package {error.name!r}; install it, for example: pip install {error.name}"
        ) from error
    backend: Backend = module
    return backend


def check_input(spec: StageSpec, tensors: Tensors) -> None:
    """Assert that the arrays fit the contract; a mismatch is a mistake of ours, not of the user."""
    for tensor in spec.inputs:
        array = tensors[tensor.name]
        fits = len(array.shape) == len(tensor.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(tensor.shape, array.shape)
        )
        assert fits, f"{spec.name}.{tensor.name}: got {array.shape}, want {tensor.shape}"
        assert array.dtype == np.dtype(tensor.dtype), f"{spec.name}.{tensor.name}: got {array.dtype}"
