"""Where a build will run: a frozen value, read from YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from defaker_opt import strict
from defaker_opt.catalog import find_yaml, module_names
from defaker_opt.device import FORMATS_OF, Device
from defaker_opt.errors import ConfigError, DefakerError, one_of

# For each kind of code, the ways of writing it into a graph; `graph/codes.py` says what each is.
ENCODINGS = {
    "float": ("matmul",),
    "int8": ("matmul_integer", "dq_int8"),
    "int8-token": ("matmul_integer_token", "dq_int8"),
    "int8-static": ("qdq_uint8", "qdq_int8"),
    "fp8-static": ("qdq_fp8",),
    "int4": ("matmul_nbits",),
    "int4-sym": ("matmul_nbits", "dq_int4"),
    "int2": ("matmul_nbits",),
    "nf4": ("matmul_bnb4",),
    "nvfp4": ("dq_nvfp4",),
    "int8-outlier": ("llm_int8",),
}

# The first compute capabilities with products of FP8, Ada's, and with FP4 in engines, Blackwell's. Torch's backend
# decodes FP4 by shifting bits; its kernels are compiled for Ampere and later.
_FIRST_SM = {"fp8-static": 89, "nvfp4": 80}
_FIRST_SM_OF_ENGINES = {**_FIRST_SM, "nvfp4": 100}

# Backends that targets may name for planning before this version can run them.
PLANNED_BACKENDS = ("onnx_runtime_web",)


# The backends that `compute` tells in which type to compute; runtime/engines.py knows the first as TORCH.
_CHOOSE_TYPE = ("torch_cuda", "openvino")


@dataclass(frozen=True)
class SessionOptions:
    """How a backend runs stages. threads: for each stage, 0 = one for each core.

    tiles and tokens: how many of a picture's tiles, and of the prefix's tokens, one call takes, 0 = all of them. Fewer
    need less memory, and tokens in blocks are not compared with later ones that they must not see.

    open_mb: stages of larger builds are opened when a picture needs them and closed after, at the cost of opening them
    for the next; 0 = all stay open.

    providers: of ONNX Runtime, the first one that has an operator runs it, such as CUDAExecutionProvider or
    TensorrtExecutionProvider; none = the CPU's.

    compute: of the backend torch_cuda, the type that linear layers hand on, and of attention where the graph does not
    say float16; norms, sums of residuals and what leaves a stage are float32 always, but for attention's values. Of the
    backend openvino, the type of everything that is not a product of codes.
    """

    threads: int = 0
    tiles: int = 0
    tokens: int = 0
    open_mb: int = 0
    providers: tuple[str, ...] = ()
    compute: Literal["float32", "bfloat16"] = "float32"

    CHECKS: ClassVar[Mapping[str, Callable[[int], str | None]]] = {
        name: lambda count: None if count >= 0 else f"must be 0 or more, got {count}"
        for name in ("threads", "tiles", "tokens", "open_mb")
    }


@dataclass(frozen=True)
class GraphLimits:
    """What a device's parser reads. opset: the newest; operators: by their names, those that are not ONNX's own with
    their domain before it; blocks: sizes of groups of codes that share a scale.
    """

    opset: int
    operators: tuple[str, ...]
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Target:
    """`encodings` says, for each kind of code the target can run, how it is written; a kind it lacks it cannot run.

    attention: the type of products of two activations, in stages that have codes; "int8": of queries and keys, where
    their ranges were found (`scores` of the pass quantize), and all else as the backend computes. `graph` has what the
    device's parser accepts, if that is less than what is written here; every stage's file is checked against it.
    `device` has the facts of a kind of machine, for planning; none for "the machine this runs on". A target whose
    backend is only planned has no encodings, and no builds.
    """

    name: str
    description: str
    backend: str
    encodings: dict[str, str]
    session: SessionOptions = SessionOptions()
    device: Device | None = None
    graph: GraphLimits | None = None
    attention: Literal["float32", "float16", "int8"] = "float32"

    def as_json(self) -> dict[str, Any]:
        """The form the manifest keeps: what decides a build's bytes. A corrected fact of a device changes no build."""
        data = dataclasses.asdict(self)
        del data["device"], data["graph"]
        return data

    @property
    def available(self) -> bool:
        """Whether this version has the backend."""
        return self.backend in module_names("runtime.backends")

    @property
    def compute_here(self) -> str:
        """What float stages compute in where the build is made; GPUs are elsewhere, so their graphs run as written."""
        return self.session.compute if self.backend == "openvino" else "float32"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of code it can run; with a planned backend, those that the device has a rate for."""
        if self.available or self.device is None:
            return tuple(self.encodings)
        return tuple(kind for kind in FORMATS_OF if self.device.best_format(kind))


def require_backend(target: Target) -> None:
    """Raise DefakerError if this version cannot make or run builds for the target."""
    if not target.available:
        raise DefakerError(
            f"target {target.name}: backend {target.backend} is not available in this version, which has "
            f"{', '.join(module_names('runtime.backends'))}; it can be planned for: "
            f"defaker-opt plan --target {target.name}"
        )


def load_target(name: str) -> Target:
    """Read a shipped target by name, or any by path. Raises ConfigError with every problem of the file."""
    path = find_yaml("profiling/targets", name, "target")
    problems: list[str] = []

    def report(where: str, what: str) -> None:
        problems.append(f"{where}: {what}" if where else what)

    data = strict.read_yaml(path)
    if isinstance(data, dict):
        if "name" in data:
            report("name", "unknown key; a target is called what its file is called")
        _check_names(data, report)
        data = {**data, "name": path.stem}
    parsed = strict.parse(Target, data, "", report)
    if isinstance(parsed, Target):
        _check_codes(parsed, report)
        _check_compute(parsed, report)
    if problems:
        raise ConfigError(path, problems)
    assert isinstance(parsed, Target)
    return parsed


def _check_codes(target: Target, report: strict.Report) -> None:
    """FP8 and FP4 came with a compute capability, which the device states."""
    sm = target.device.versions.get("sm", "") if target.device else ""
    first = _FIRST_SM_OF_ENGINES if target.backend == "tensor_rt" else _FIRST_SM
    for kind in [kind for kind in first if kind in target.encodings and sm.isdigit() and int(sm) < first[kind]]:
        report(
            f"encodings.{kind}",
            f"{target.encodings[kind]} needs a GPU from SM {first[kind]} on, and device.versions.sm is {sm}; "
            "leave it out, and make builds with int8-static",
        )


def _check_compute(target: Target, report: strict.Report) -> None:
    """Other backends compute as the graph says, and would ignore it."""
    if target.session.compute != SessionOptions.compute and target.backend not in _CHOOSE_TYPE:
        report(
            "session.compute",
            f"{target.session.compute} is chosen with the backends {' and '.join(_CHOOSE_TYPE)} alone, and backend is "
            f"{target.backend}; leave it out, or set backend: {_CHOOSE_TYPE[0]}",
        )


def _check_names(data: Mapping[str, Any], report: strict.Report) -> None:
    backends = module_names("runtime.backends")
    backend, encodings = data.get("backend"), data.get("encodings")
    if isinstance(backend, str) and backend not in (*backends, *PLANNED_BACKENDS):
        report("backend", one_of(backend, [*backends, *PLANNED_BACKENDS]))
    if not isinstance(encodings, Mapping):
        return
    if backend in PLANNED_BACKENDS and backend not in backends:
        if encodings:
            report("encodings", f"must be empty: {{}}, as this version has no backend {backend} to write them for")
        if "device" not in data:
            report("device", f"missing; a target with the planned backend {backend} has nothing else to plan with")
        return
    for kind, encoding in encodings.items():
        if kind not in ENCODINGS:
            report("encodings", f"unknown key, {one_of(kind, ENCODINGS)}")
        elif encoding not in ENCODINGS[kind]:
            report(f"encodings.{kind}", one_of(encoding, ENCODINGS[kind]))
    if "float" not in encodings:
        report("encodings.float", "missing; some weights always stay float")
