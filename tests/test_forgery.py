"""Pairs of forgeries: pure functions of their seed, exact masks, the promised areas, and no cue but the forgery."""

import io
import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from defaker_opt.catalog import module_names
from defaker_opt.errors import DefakerError
from defaker_opt.forgery import DOMAINS, GLOBAL_DOMAINS, SPLITS
from defaker_opt.forgery.domains import aigc, deepfake, document, natural
from defaker_opt.forgery.generate import Draft, digest, make_draft, make_example, make_pair
from defaker_opt.forgery.sources import Library, load_library

PAIRS = 192
SIZE = 320


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library()


@pytest.fixture(scope="module")
def drafts(library: Library) -> list[Draft]:
    return [make_draft(11, index, SPLITS[index % 3], library, SIZE) for index in range(PAIRS)]


def pair_digests(index: int) -> tuple[str, str]:
    pair = make_pair(3, index, "test", load_library(), SIZE)
    return digest(pair.authentic.image, pair.authentic.mask), digest(pair.forged.image, pair.forged.mask)


def test_a_pair_is_the_same_in_any_order_thread_and_process(library):
    indices = [9, 2, 7, 0, 5]
    with ThreadPoolExecutor(3) as executor:
        threaded = dict(zip(indices, executor.map(pair_digests, indices)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = dict(zip(indices[:2], pool.map(pair_digests, indices[:2])))
    for index in indices:
        assert threaded[index] == pair_digests(index)
    assert elsewhere == {index: threaded[index] for index in indices[:2]}


def test_seed_split_and_index_each_change_the_picture(library):
    asked = [(1, 4, "train"), (2, 4, "train"), (1, 8, "train"), (1, 4, "test"), (1, 4, "calibration")]
    files = {make_pair(seed, index, split, library, SIZE).authentic.file for seed, index, split in asked}
    assert len(files) == len(asked)


def test_even_examples_are_authentic_and_odd_ones_their_twins(library):
    pair = make_pair(1, 6, "train", library, SIZE)
    even, odd = make_example(1, 12, "train", library, SIZE), make_example(1, 13, "train", library, SIZE)
    assert (even.label, odd.label) == (0, 1)
    assert even.file == pair.authentic.file
    assert odd.file == pair.forged.file
    assert not even.mask.any()
    assert odd.mask.any()


def test_twins_are_equal_outside_the_mask_and_differ_inside(drafts):
    for draft in drafts:
        differs = (draft.edit.authentic != draft.edit.forged).any(-1)
        assert not differs[~draft.edit.mask].any(), draft.operation
        assert differs[draft.edit.mask].mean() > 0.4, draft.operation
        moved = np.abs(draft.edit.forged.astype(int) - draft.edit.authentic)[draft.edit.mask].mean()
        assert moved >= (2 if draft.domain in GLOBAL_DOMAINS else 4), draft.operation


def test_twins_and_masks_have_one_size_and_the_example_is_what_its_file_decodes_to(library):
    for index in range(24):
        pair = make_pair(5, index, "train", library, SIZE)
        for example in (pair.authentic, pair.forged):
            with Image.open(io.BytesIO(example.file)) as image:
                assert np.array_equal(np.asarray(image.convert("RGB")), example.image)
            assert example.mask.shape == example.image.shape[:2] == pair.forged.mask.shape
            assert example.image.dtype == np.uint8
            assert max(example.image.shape) <= SIZE


def test_areas_cover_the_range_and_a_quarter_is_small(drafts):
    local = [float(draft.edit.mask.mean()) for draft in drafts if draft.domain not in GLOBAL_DOMAINS]
    assert min(local) >= 0.003
    assert max(local) < 0.6
    assert max(local) > 0.3
    assert min(local) < 0.008
    assert np.mean(np.array(local) < 0.02) == pytest.approx(0.25, abs=0.02)


def test_generated_pictures_are_forged_everywhere(drafts):
    assert all(draft.edit.mask.all() for draft in drafts if draft.domain in GLOBAL_DOMAINS)


def test_domains_take_turns_and_every_operation_occurs_small_and_large(drafts):
    assert set(Counter(draft.domain for draft in drafts).values()) == {PAIRS // len(DOMAINS)}
    for name, module in (("natural", natural), ("document", document), ("deepfake", deepfake)):
        for small in (True, False):
            seen = {d.operation for d in drafts if d.domain == name and (d.edit.mask.mean() < 0.02) == small}
            assert seen == set(module.OPERATIONS), (name, small)
    assert {d.operation for d in drafts if d.domain == "aigc"} == set(aigc.OPERATIONS)


def test_every_domain_file_is_a_domain():
    assert sorted(DOMAINS) == module_names("forgery.domains")


def file_facts(file: bytes) -> tuple[object, ...]:
    with Image.open(io.BytesIO(file)) as image:
        tables = getattr(image, "quantization", None) or {}
        return image.format, image.mode, image.size, *(tuple(table) for table in tables.values())


def test_format_size_and_quality_do_not_tell_the_label(library):
    """Read from the files themselves: every combination is as common among authentic files as among forged ones."""
    pairs = [make_pair(21, index, "train", library, SIZE) for index in range(64)]
    authentic, forged = ([file_facts(getattr(pair, side).file) for pair in pairs] for side in ("authentic", "forged"))
    assert authentic == forged
    assert len({facts[0] for facts in authentic}) == 3
    assert len({pair.forged.codec.quality for pair in pairs}) > 10
    assert len({facts[2] for facts in authentic}) > 15
    for pair in pairs:
        assert pair.authentic.codec == pair.forged.codec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0, "tests", 320), "split: 'tests' is not one of calibration, test, train .did you mean 'test'?."),
        ((1, 0, "test", 64), "size: 64 px is not in 192…1024; choose one that is"),
        ((1, -1, "test", 320), "seed 1 and index -1: both must be 0 or more"),
    ],
)
def test_impossible_orders_are_refused(library, arguments, message):
    seed, index, split, size = arguments
    with pytest.raises(DefakerError, match=message):
        make_pair(seed, index, split, library, size)
