"""The language part of a quantized detector as a folder for readers of GPTQ checkpoints: GPTQModel, vLLM, lmdeploy.

Codes are those of the build. Scales and everything that has no codes become float16, the type these readers compute in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from defaker_opt import __version__
from defaker_opt.checkpoint import gptq, tensors_of
from defaker_opt.detector import Detector, linear_weights, parameter_shapes
from defaker_opt.errors import PassError, SourceError, write_failure
from defaker_opt.files import held, read_json_object, write_json
from defaker_opt.gptq_folder.layout import Layout
from defaker_opt.gptq_folder.model import LAYERS, model_config, model_name, own_name
from defaker_opt.methods import QuantizedWeight, decode
from defaker_opt.packing import pack
from defaker_opt.progress import Progress
from defaker_opt.shards import SHARD_BYTES, Entry, write_shards
from defaker_opt.sources._vocabulary import TOKENIZER_FILES
from defaker_opt.weights import open_weights

_TYPES = {gptq.CODES: torch.int32, gptq.ZEROS: torch.int32, gptq.SCALES: torch.float16, gptq.GROUPS: torch.int32}

# Rounding to float16 changes a number by 2^-11 of it at most, unless it is too small or too large for float16.
_ALLOWED = 2.0**-11


def is_written(folder: Path, key: str) -> bool:
    """Whether the folder is there and of the job with this key. Raises SourceError if something else is there, or if
    its tensors are not all there.
    """
    if not folder.exists() and not folder.is_symlink():
        return False
    if _settings(folder).get("meta", {}).get("plan_sha256") != key:
        raise SourceError(f"{folder}: already exists; choose another folder for --gptq or remove it")
    try:
        open_weights(folder)
    except SourceError as error:
        raise SourceError(
            f"{folder}: the GPTQ checkpoint of this very job, but damaged ({error}); remove it, and it is made anew"
        ) from error
    return True


def check_apart(folder: Path, output: Path) -> None:
    """Raise SourceError unless neither of checkpoint and build would lie in the other, or where the build is made."""
    hidden = [output.parent / f".{output.name}.{end}" for end in ("partial", "old")]
    ours = folder.resolve()
    for place in (each.resolve() for each in (output, *hidden)):
        if ours == place or ours in place.parents or place in ours.parents:
            raise SourceError(
                f"--gptq {folder}: the build goes to {output}, and one would overwrite the other; give each a folder "
                f"outside of the other, for example --gptq {output.parent / (output.name or 'build')}-gptq"
            )


@contextlib.contextmanager
def hold(folder: Path | None) -> Iterator[None]:
    """Hold the folder to be written, if there is one. Raises DefakerError if another process does, or if it cannot."""
    with contextlib.ExitStack() as stack:
        if folder is not None:
            busy = SourceError(
                f"{folder}: another process is writing this GPTQ checkpoint; wait, or choose another folder for --gptq"
            )
            try:
                stack.enter_context(held(_partial(folder), busy))
            except OSError as error:
                raise write_failure(folder, error) from error
        yield


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def gptq_facts(folder: Path) -> dict[str, Any]:
    """What there is to say of a folder that `write_gptq` wrote."""
    settings = _settings(folder)
    return {
        "folder": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        **{key: settings[key] for key in ("bits", "group_size", "sym", "checkpoint_format")},
        "largest_float16_difference": settings["meta"]["largest_float16_difference"],
    }


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder that we wrote; empty for any other."""
    found = (read_json_object(folder / "config.json") or {}).get(gptq.SETTINGS)
    if isinstance(found, dict) and isinstance(found.get("meta"), dict):
        return found
    return {}


def write_gptq(detector: Detector, layout: Layout, folder: Path, tokenizer: Path, key: str, progress: Progress) -> None:
    """Write the folder: layers' codes, the two tables and norms in float16, configuration, the tokenizer's files.

    tokenizer: the folder that has those. Who else might write it is kept out by `hold`. Raises DefakerError, and leaves
    nothing.
    """
    # Another process may have finished it before this one held it.
    if is_written(folder, key):
        return
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        entries = list(_entries(detector, layout))
        write_shards(
            partial,
            entries,
            lambda name: iter([_tensor(detector, layout, name)]),
            lambda done, total: progress("write gptq", done / total),
            SHARD_BYTES,
        )
        settings = layout.as_json()
        config = {**model_config(detector.config.language, tokenizer), gptq.SETTINGS: settings}
        difference = _check(partial, config, detector, layout)
        settings["meta"] = {
            "quantizer": [f"defaker-opt:{__version__}"],
            "plan_sha256": key,
            "largest_float16_difference": difference,
        }
        write_json(partial / "config.json", config)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, partial / name)
        os.replace(partial, folder)
    except OSError as error:
        raise write_failure(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _entries(detector: Detector, layout: Layout) -> Iterator[Entry]:
    """Every tensor of the folder, by its name there."""
    language = detector.config.language
    coded = linear_weights(detector.config, "language")
    table = (language.vocab_size, language.hidden_size)
    yield Entry("lm_head.weight", torch.float16, table)
    yield Entry("model.embed_tokens.weight", torch.float16, table)
    for name, shape in parameter_shapes(detector.config, "language").items():
        if name.startswith(LAYERS) and name in coded:
            rows, columns = shape
            groups, per_word = columns // layout.group_size, 32 // layout.bits
            module = model_name(name).removesuffix(".weight")
            shapes = {
                gptq.CODES: (columns // per_word, rows),
                gptq.ZEROS: (groups, rows // per_word),
                gptq.SCALES: (groups, rows),
                gptq.GROUPS: (columns,),
            }
            yield from (Entry(f"{module}.{part}", _TYPES[part], shapes[part]) for part in _TYPES)
        elif name.startswith(LAYERS) or name == "language.norm.weight":
            yield Entry(model_name(name), torch.float16, shape)


def _tensor(detector: Detector, layout: Layout, name: str) -> torch.Tensor:
    module, _, part = name.rpartition(".")
    if part not in _TYPES:
        return _narrowed(name, detector.read(own_name(name)))
    weight = detector.codes[own_name(f"{module}.weight")]
    columns = weight.codes.shape[1]
    if part == gptq.GROUPS:
        # Also where GPTQ took columns in another order: its groups are of columns as they stand.
        return torch.arange(columns, dtype=torch.int32) // layout.group_size
    if part == gptq.SCALES:
        return torch.from_numpy(_cut(_half(weight), columns, layout).T.copy())
    if part == gptq.CODES:
        stored = (weight.codes.astype(np.int16) + layout.middle).astype(np.uint8)
        return torch.from_numpy(pack(np.ascontiguousarray(stored.T), layout.bits))
    zero = np.zeros(weight.scale.shape, np.int16) if weight.zero is None else weight.zero.astype(np.int16)
    points = _cut(zero + layout.middle - gptq.OFFSETS[layout.format], columns, layout).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pack(points, layout.bits).T))


def _cut(values: NDArray[Any], columns: int, layout: Layout) -> NDArray[Any]:
    """One value for each of our groups [out, groups] → one for each group of the folder."""
    return np.repeat(values, columns // values.shape[1] // layout.group_size, axis=1)


def _half(weight: QuantizedWeight) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # what is no float16 is found when the folder is checked
        return weight.scale.astype(np.float16)


def _narrowed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    narrow = tensor.to(torch.float16)
    if not torch.isfinite(narrow).all():
        raise PassError(
            f"--gptq: {name}: {float(tensor.abs().max()):.3g} is beyond float16's "
            f"{torch.finfo(torch.float16).max:.0f}, the type such checkpoints are in; make the build without --gptq"
        )
    return narrow


def _check(folder: Path, config: Mapping[str, Any], detector: Detector, layout: Layout) -> float:
    """Read the folder back: codes must be those of the build. Returns the largest ‖difference‖ / ‖weight‖ that float16
    makes of scales.
    """
    read = gptq.unpacked(folder, tensors_of(open_weights(folder)), config)
    worst = 0.0
    for name in linear_weights(detector.config, "language"):
        if not name.startswith(LAYERS):
            continue
        ours = detector.codes[name]
        got = read.read(model_name(name)).numpy()
        if not np.array_equal(got, decode(ours.codes, _half(ours).astype(np.float32), ours.zero), equal_nan=True):
            raise PassError(
                f"--gptq: {name}: decodes to other weights than its codes; a fault of ours, please report it"
            )
        exact = ours.dequantize().astype(np.float64)
        difference = float(np.linalg.norm(got - exact) / max(float(np.linalg.norm(exact)), 1e-300))
        if not difference <= _ALLOWED:
            raise PassError(
                f"--gptq: {name}: its scales, {np.abs(ours.scale).min():.3g} to {np.abs(ours.scale).max():.3g}, are no "
                f"numbers that float16 holds: weights change by {difference:.2%}, and {_ALLOWED:.2%} is allowed; "
                "give it a scheme whose scales are float16, int4-sym-g128"
            )
        worst = max(worst, difference)
    return worst
