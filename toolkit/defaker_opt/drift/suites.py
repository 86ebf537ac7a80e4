"""What `--suite` may name: our own sets of forgeries, a table of the user's, or a benchmark of the registry."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from defaker_opt.benchmarks import Benchmark, Item, Locator
from defaker_opt.benchmarks.load import load_benchmark, load_suite_file
from defaker_opt.errors import SuiteError
from defaker_opt.forgery.cache import CachedExample
from defaker_opt.forgery.sets import load_set
from defaker_opt.progress import Progress

# Suites that come with the package, and the set of `calibration/` that each is.
SETS = MappingProxyType({"embedded": "drift-test", "quick": "quick", "calibration": "calibration"})


def load_suite(name: str, data_root: Path | None, cache_folder: Path, progress: Progress) -> Benchmark:
    """A suite by name, table or entry; our sets are drawn on first use. Raises DefakerError if it cannot be used."""
    if name in SETS:
        return forgery_suite(name, SETS[name], cache_folder, progress)
    if Path(name).suffix == ".csv":
        return load_suite_file(Path(name), data_root)
    if data_root is None:
        raise SuiteError(
            f"--suite {name}: say with --data where your benchmarks lie; {', '.join(SETS)} come with this package"
        )
    return load_benchmark(name, data_root)


def forgery_suite(name: str, set_name: str, cache_folder: Path, progress: Progress) -> Benchmark:
    """A set of forgeries as a benchmark: twins share their base photograph, and a pair.

    Raises DefakerError.
    """
    images = load_set(set_name, cache_folder / "forgeries", progress)
    return Benchmark(name, tuple(_item(images.folder, row) for row in images.rows))


def _item(folder: Path, row: CachedExample) -> Item:
    mask = Locator(folder / row.mask_file) if row.mask_file else None
    slices = {
        "domain": row.domain,
        "operation": row.operation,
        "codec": codec_slice(row.codec.format, row.codec.quality),
    }
    return Item(
        key=Path(row.file).stem,
        image=Locator(folder / row.file),
        label=row.label,
        mask=mask,
        source=row.sources[0],
        pair=Path(row.file).stem.rpartition("-")[0],
        slices=MappingProxyType(slices),
    )


def codec_slice(codec: str, quality: int) -> str:
    """The codec, JPEG by how much it takes away."""
    if codec != "jpeg":
        return codec
    return "jpeg<75" if quality < 75 else "jpeg75-89" if quality < 90 else "jpeg>=90"
