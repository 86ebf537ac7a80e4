"""TensorRT engines on an NVIDIA GPU: what `compile` made of a build's graphs here."""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.errors import BuildError
from defaker_opt.runtime.backends import OpenStage, Tensors, check_input
from defaker_opt.runtime.build import MANIFEST, file_sha256
from defaker_opt.runtime.cuda import Buffer, Gpu, Stream, read_gpu
from defaker_opt.runtime.engines import RECORD, engines_folder, read_record
from defaker_opt.runtime.spec import StageSpec

# JetPack's and NVIDIA's own come first; TensorRT for RTX has the same interface.
LIBRARIES = ("tensorrt", "tensorrt_rtx")


def library(names: Sequence[str] = LIBRARIES) -> ModuleType:
    """TensorRT's Python module, the first that is there. Raises BuildError if there is none."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BuildError(
        "TensorRT is not installed; on a Jetson JetPack has it, and a virtual environment sees it with "
        "--system-site-packages; elsewhere: pip install tensorrt, or for RTX: pip install 'defaker-opt[rtx]'"
    )


def open_stage(file: Path, spec: StageSpec, options: Mapping[str, Any]) -> OpenStage:
    """Open the engine of a build's stage. Raises BuildError if it was not made here, of this build."""
    folder = engines_folder(file.parent)
    record = read_record(folder, str(options.get("record", RECORD)))
    if record is None or spec.name not in record["stages"]:
        raise BuildError(f"{folder}: no engine of {spec.name}; make it with: defaker-opt compile {file.parent}")
    tensorrt = library()
    check_record(folder, record, file_sha256(file.parent / MANIFEST), tensorrt, read_gpu())
    entry = record["stages"][spec.name]
    path = folder / entry["file"]
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: cannot be read ({error.strerror}); remove {folder} and compile again") from error
    if hashlib.sha256(plan).hexdigest() != entry["sha256"]:
        raise BuildError(f"{path}: its bytes are not those that were written; remove {folder} and compile again")
    return Engine(tensorrt, plan, spec, str(path))


def check_record(folder: Path, record: Mapping[str, Any], build: str, tensorrt: ModuleType, gpu: Gpu) -> None:
    """Raise BuildError unless engines are of this build, and were made with this TensorRT on such a GPU and driver."""
    here: dict[str, Any] = {"build": build, "tensorrt": f"{tensorrt.__name__} {tensorrt.__version__}", "gpu": vars(gpu)}
    words = {"build": "another build", "tensorrt": record["tensorrt"], "gpu": _described(record["gpu"])}
    now = {"build": "this one", "tensorrt": here["tensorrt"], "gpu": _described(here["gpu"])}
    for key, value in here.items():
        if record[key] != value:
            raise BuildError(
                f"{folder}: its engines are of {words[key]}, and here is {now[key]}; engines run only where they were "
                f"made, so make them again: defaker-opt compile {str(folder).removesuffix('.engines')}"
            )


def _described(gpu: Mapping[str, Any]) -> str:
    return f"a GPU of SM {gpu.get('sm')} with a driver for CUDA {gpu.get('driver')}"


class Engine:
    """An engine ready to run; its buffers grow to the largest picture it has seen."""

    def __init__(self, tensorrt: ModuleType, plan: bytes, spec: StageSpec, name: str) -> None:
        self._spec = spec
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildError(f"{name}: TensorRT {tensorrt.__version__} cannot open it; compile the build again")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BuildError(f"{name}: the GPU has no room for what it works on; close other programs that use it")
        self._stream = Stream()
        self._buffers: dict[str, Buffer] = defaultdict(Buffer)
        self._bounds = [self._bounds_of(index) for index in range(self._engine.num_optimization_profiles)]
        self._profile = 0
        # Buffers are written and read by every call, so calls of several threads take turns.
        self._turn = threading.Lock()

    def __call__(self, tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """See `OpenStage`. Every output is computed; those that are asked for come back. Any thread may call."""
        check_input(self._spec, tensors)
        with self._turn:
            return self._run(tensors, outputs)

    def _run(self, tensors: Tensors, outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        self._choose_profile(tensors)
        given = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        for name, array in given.items():
            self._context.set_input_shape(name, array.shape)
            self._context.set_tensor_address(name, self._buffers[name].write(array, self._stream))
        shapes = {tensor.name: tuple(self._context.get_tensor_shape(tensor.name)) for tensor in self._spec.outputs}
        dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in self._spec.outputs}
        for name, shape in shapes.items():
            size = int(np.prod(shape)) * dtypes[name].itemsize
            self._context.set_tensor_address(name, self._buffers[name].reserve(max(1, size)))
        if not self._context.execute_async_v3(self._stream.handle):
            raise BuildError(f"{self._spec.name}: its engine failed; run the build's --self-test, or compile again")
        results = {name: self._buffers[name].read(shapes[name], dtypes[name], self._stream) for name in outputs}
        self._stream.wait()
        return results

    def _bounds_of(self, index: int) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
        bounds: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
        for tensor in self._spec.inputs:
            least, _, most = self._engine.get_tensor_profile_shape(tensor.name, index)
            bounds[tensor.name] = (tuple(least), tuple(most))
        return bounds

    def _choose_profile(self, tensors: Tensors) -> None:
        """The first range of sizes that the arrays are in. Raises BuildError if they are in none."""
        for index, bounds in enumerate(self._bounds):
            if all(_within(tensors[name].shape, *bounds[name]) for name in bounds):
                if index != self._profile:
                    self._context.set_optimization_profile_async(index, self._stream.handle)
                    self._stream.wait()
                    self._profile = index
                return
        sizes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in self._bounds[0])
        raise BuildError(f"{self._spec.name}: its engine is not made for {sizes}; compile again with this version")


def _within(shape: Sequence[int], least: Sequence[int], most: Sequence[int]) -> bool:
    return all(low <= size <= high for low, size, high in zip(least, shape, most))
