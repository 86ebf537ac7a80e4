"""Statistics in the cache: what is found there is what would be seen, bit for bit, and nothing runs that need not."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest

import defaker_opt.observe.cache as cache_module
import defaker_opt.observe.sweep as sweep_module
from defaker_opt.detector import Detector, load_detector
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder
from defaker_opt.methods import QuantizedWeight, Scheme, Statistics
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.observe.inputs import Balance
from defaker_opt.observe.sweep import observe_layers
from defaker_opt.samples import Samples, load_samples

VISION = [f"vision_encoder.tower.encoder.layer.{index}.mlp.fc1.weight" for index in range(4)]
LANGUAGE = [f"language.layers.{index}.mlp.down_proj.weight" for index in range(3)]
NAMES = [*VISION, "vision_encoder.projector.1.weight", *LANGUAGE, "language.seg_projection.0.weight"]
FIELDS = ("hessian", "shift", "mean_abs", "largest", "histogram")
Found = dict[str, Statistics]


@pytest.fixture(scope="module")
def samples() -> Samples:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    return Samples(whole.name, whole.digest, whole.items[:2])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache_module, "default_cache_folder", lambda: tmp_path)
    return tmp_path / "statistics"


def detector() -> Detector:
    return dataclasses.replace(load_detector("reference"), codes={})


def swept(
    samples: Samples,
    needs: tuple[str, ...] = ("hessian", "shift", "histogram"),
    bits: int = 4,
    names: list[str] = NAMES,
    balance: Balance | None = None,
    given: Detector | None = None,
) -> Found:
    """Statistics of the layers, each quantized when it has been shown."""
    whole, found = given or detector(), Found()
    for group in observe_layers(whole, samples, dict.fromkeys(names, needs), balance):  # type: ignore[arg-type]
        for name in group.keys() & set(names):
            found[name] = group[name]
            original = dataclasses.replace(whole, codes={}).read(name).numpy()
            whole.codes[name] = RoundToNearest().quantize(original, Scheme(bits))
    assert set(found) == set(names)
    return found


def uncached(monkeypatch: pytest.MonkeyPatch, samples: Samples, bits: int = 4) -> Found:
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "open_cache", lambda *given: None)
        return swept(samples, bits=bits)


def same(one: Found, other: Found) -> bool:
    return all(
        one[name].tokens == other[name].tokens
        and all(np.array_equal(getattr(one[name], field), getattr(other[name], field)) for field in FIELDS[:2])
        and np.array_equal(one[name].histogram, other[name].histogram)
        for name in one
    )


@pytest.fixture
def pictures_looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count: list[int] = []
    original = sweep_module.tile_inputs

    def counted(*given: object) -> Iterator[object]:
        for each in original(*given):  # type: ignore[arg-type]
            count.append(1)
            yield each

    monkeypatch.setattr(sweep_module, "tile_inputs", counted)
    return count


def test_a_second_job_finds_everything_and_runs_nothing(
    samples: Samples, folder: Path, monkeypatch: pytest.MonkeyPatch, pictures_looked_at: list[int]
) -> None:
    exact = uncached(monkeypatch, samples)
    first = swept(samples)
    looked = len(pictures_looked_at)
    assert same(exact, first) and len(list(folder.glob("*.statistics"))) == 9
    second = swept(samples)
    assert same(exact, second) and len(pictures_looked_at) == looked


@pytest.mark.parametrize("lost", range(9))
def test_whatever_is_lost_is_found_again_bit_for_bit(
    lost: int, samples: Samples, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = uncached(monkeypatch, samples)
    swept(samples)
    files = sorted(folder.glob("*.statistics"), key=lambda path: path.stat().st_mtime_ns)
    # One is gone, one is damaged, one is cut short: calls pass shown blocks in leaps of every length.
    files[lost].unlink()
    damaged = files[(lost + 3) % 9]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    files[(lost + 5) % 9].write_bytes(b"PK")
    assert same(exact, swept(samples))


def test_other_codes_before_a_layer_are_another_entry(
    samples: Samples, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(samples, bits=8)
    assert same(uncached(monkeypatch, samples), swept(samples))
    assert not same(swept(samples, bits=8), swept(samples, bits=4))
    # The first block of the vision encoder has nothing before it.
    assert len(list(folder.glob("*.statistics"))) == 2 * 9 - 1


def test_codes_around_a_layer_are_part_of_the_name(samples: Samples, folder: Path) -> None:
    def found(bits: int) -> Found:
        given = detector()

        def coded(layers: Collection[str]) -> dict[str, QuantizedWeight]:
            original = dataclasses.replace(given, codes={})
            return {n: RoundToNearest().quantize(original.read(n).numpy(), Scheme(bits)) for n in layers}

        result = Found()
        for group in observe_layers(given, samples, dict.fromkeys(NAMES, ("hessian", "histogram")), None, coded):
            for name in group.keys() & set(NAMES):
                result[name] = group[name]
            given.codes.update(coded(group))
        return result

    first = found(4)
    files = len(list(folder.glob("*.statistics")))
    assert same_histograms(first, found(4)) and len(list(folder.glob("*.statistics"))) == files
    # Also of the first block, whose layers see one another's codes.
    assert not same_histograms(first, found(8)) and len(list(folder.glob("*.statistics"))) == 2 * files


def same_histograms(one: Found, other: Found) -> bool:
    return all(np.array_equal(one[name].histogram, other[name].histogram) for name in one)


def test_codes_of_stages_that_nobody_looked_at_count_too(samples: Samples, folder: Path) -> None:
    names = LANGUAGE[:1]
    plain = swept(samples, ("mean_abs",), names=names)
    coarse = detector()
    for name in VISION:
        coarse.codes[name] = RoundToNearest().quantize(coarse.read(name).numpy(), Scheme(4))
    other = swept(samples, ("mean_abs",), names=names, given=coarse)
    assert not np.array_equal(plain[names[0]].mean_abs, other[names[0]].mean_abs)
    assert len(list(folder.glob("*.statistics"))) == 2


def test_ranges_of_activations_do_not_count(folder: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    codes = RoundToNearest().quantize(weight, Scheme(8))
    digest = cache_module._decoded_digest
    assert digest(codes) == digest(dataclasses.replace(codes, input_scale=0.5, scheme=Scheme(8, activations="static")))
    others: list[QuantizedWeight] = [
        dataclasses.replace(codes, scale=codes.scale * 2),
        dataclasses.replace(codes, codes=codes.codes[::-1]),
        dataclasses.replace(codes, input_factor=np.ones(32, np.float32)),
    ]
    assert len({digest(codes), *map(digest, others)}) == 4


def test_other_pictures_tokens_and_scales_are_other_entries(samples: Samples, folder: Path) -> None:
    names = LANGUAGE[:1]
    other = Samples(samples.name, samples.digest, samples.items[:1])
    scaled = detector()
    scaled.scale_("vision_encoder.tower.encoder.layer.0.layernorm_before.weight", rows=0.5)
    jobs = [
        swept(samples, ("mean_abs",), names=names),
        swept(other, ("mean_abs",), names=names),
        swept(samples, ("mean_abs",), names=names, balance=Balance(3, 1, 1)),
        swept(samples, ("mean_abs",), names=names, given=scaled),
        swept(samples, ("mean_abs", "largest"), names=names),
    ]
    sums = {float(np.sum(job[names[0]].mean_abs)) for job in jobs}  # type: ignore[arg-type]
    assert len(sums) == 4 and len(list(folder.glob("*.statistics"))) == 5


def test_what_is_too_large_is_not_kept(samples: Samples, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_LARGEST_BYTES", 192 * 192 * 8)
    swept(samples, ("hessian",), names=[*VISION[:1], *LANGUAGE[:1]])
    assert len(list(folder.glob("*.statistics"))) == 1


def test_what_was_not_used_for_longest_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_module.StatisticsCache(folder, "facts")
    seen = {"a": Statistics(1, mean_abs=np.zeros(100))}
    cache.keep("vision_encoder", {"a0": ("mean_abs",)}, seen)
    monkeypatch.setattr(cache_module, "_CACHE_BYTES", 3 * next(folder.iterdir()).stat().st_size)
    for index in range(5):
        cache.keep("vision_encoder", {f"a{index}": ("mean_abs",)}, seen)
        assert cache.read("vision_encoder", {"a0": ("mean_abs",)}), "it was used all the time"
    kept = [cache.read("vision_encoder", {f"a{index}": ("mean_abs",)}) is not None for index in range(5)]
    assert kept[0] and kept[4] and not kept[1]


def test_without_a_place_for_it_work_goes_on(samples: Samples, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = uncached(monkeypatch, samples)
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    assert same(exact, swept(samples))

    def nowhere() -> Path:
        raise DefakerError("no home")

    monkeypatch.setattr(cache_module, "default_cache_folder", nowhere)
    assert same(exact, swept(samples))
