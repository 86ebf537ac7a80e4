"""Builds of the embedded detector, made once, and the checkpoints that parity is checked on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("DEFAKER_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))

COMMAND = [sys.executable, "-m", "defaker_opt"]

# Kernels run in Triton's interpreter, as no GPU is here. Read when triton is first imported, which is after this.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Test workers and the commands they run share the cores; with a thread for each core in each of them, torch's threads
# wait for one another most of the time. Read when torch is first imported, which is after this.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# ModelOpt takes most of a minute for each.
MODELOPT_RECIPES = ("modelopt-int4", "modelopt-int8", "modelopt-fp8")
MODELOPT_PARAMS = [pytest.param(name, marks=pytest.mark.ci) for name in MODELOPT_RECIPES]

# Files that take minutes. They begin first, or one worker would still be busy with them when all others have finished.
_LONGEST = ("test_training", "test_engines", "test_convert_memory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def defaker_opt(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the real command line in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)  # type: ignore[call-overload,no-any-return]


def make_build(recipe: str, output: Path, *options: str, **process: object) -> Path:
    done = defaker_opt("quantize", "--recipe", recipe, "--output", output, "--json", *options, **process)
    assert done.returncode == 0, done.stderr
    (output.parent / f"{output.name}.json").write_text(done.stdout.splitlines()[-1])
    return output


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for builds that all test workers share: who comes first makes a build, the others wait for it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "builds"
    return tmp_path_factory.getbasetemp() / "builds"


def shared_build(builds: Path, recipe: str, target: str = "") -> Path:
    """The build of a recipe, for its own target or another; a lock file keeps two workers from making it at once.

    Its cache knows no statistics, whatever was made on this machine before: what making it costs is tested too.
    """
    import fcntl

    builds.mkdir(exist_ok=True)
    output = builds / (f"{recipe}-{target}" if target else recipe)
    with (builds / f"{output.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return output
        cache = cache_without_statistics(builds / f"{output.name}.cache")
        chosen = ("--target", target) if target else ()
        return make_build(recipe, output, *chosen, env={**os.environ, "DEFAKER_CACHE_DIR": str(cache)})


def cache_without_statistics(folder: Path) -> Path:
    """A cache folder that has the pictures and the traced graphs of the usual one."""
    from defaker_opt.files import default_cache_folder

    folder.mkdir()
    for name in ("forgeries", "graphs"):
        (default_cache_folder() / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to((default_cache_folder() / name).absolute())
    return folder


@pytest.fixture(scope="session")
def float_build(builds: Path) -> Path:
    return shared_build(builds, "float32")


@pytest.fixture(scope="session")
def int8_build(builds: Path) -> Path:
    return shared_build(builds, "int8")


@pytest.fixture(scope="session")
def int4_build(builds: Path) -> Path:
    return shared_build(builds, "int4")


@pytest.fixture(scope="session")
def untaught_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded architecture with drawn weights, of which every output says so."""
    return make_build("float32", tmp_path_factory.mktemp("untaught") / "build", "--source", "reference:random")


@pytest.fixture(params=["float32", "int8", "int4"])
def any_build(request: pytest.FixtureRequest, builds: Path) -> Path:
    return shared_build(builds, request.param)


def summary_of(build: Path) -> dict[str, object]:
    """What `quantize --json` said when it made a shared build."""
    summary: dict[str, object] = json.loads((build.parent / f"{build.name}.json").read_text())
    return summary


def golden_folders() -> list[Path]:
    """Every checkpoint folder with the original code's outputs beside it."""
    return sorted(path.parent for path in GOLDEN.glob("*/golden.safetensors"))
