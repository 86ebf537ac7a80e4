"""The shape of the code: who may import whom, and how large things may be."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "toolkit" / "defaker_opt"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower layers know nothing of higher ones. A folder counts as one name.
LAYERS = (
    {"errors"},
    {"catalog", "strict", "progress"},
    {"runtime", "device", "machine"},
    {"files", "packing", "config", "target", "methods", "statistics", "savings", "limits", "explanation", "histogram"},
    {"recipe", "weights", "shards", "sample", "forgery", "spool", "streaming"},
    {"stages", "benchmarks", "presets", "checkpoint"},
    {"detector", "samples"},
    {"sources", "graph", "observe"},
    {"words"},
    {"passes", "convert", "gptq_folder", "stage_build", "build_facts"},
    {"pipeline", "training"},
    {"compiling"},
    {"preview", "drift", "never_slower", "doctor", "locked"},
    {"report", "planning"},
    {"profiles"},
    {"search"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def unit(module: str) -> str:
    """defaker_opt.graph.codes → graph."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("defaker_opt"):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from inner if node.module == "defaker_opt" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("defaker_opt"))


def module_of(path: Path) -> str:
    return ".".join(["defaker_opt", *path.relative_to(PACKAGE).with_suffix("").parts])


def test_files_were_found_and_each_has_a_layer() -> None:
    assert len(FILES) > 40
    assert {unit(module_of(path)) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = unit(module_of(path))
    for module in imports(path):
        other = unit(module)
        if other in (own, "__init__", "__version__"):
            continue
        assert LEVEL[other] < LEVEL[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_in_the_runtime_one_backend_alone_needs_torch(path: Path) -> None:
    """The rest of it must import where there is none."""
    inside = path.relative_to(PACKAGE).parts
    if inside[0] != "runtime" or "torch_graph" in inside or path.stem == "torch_cuda":
        return
    assert not [module for module in imports(path) if "torch_graph" in module or module.endswith("torch_cuda")]
    assert not re.search(r"^\s*(import|from) (torch|triton|onnx)\b", path.read_text(), re.MULTILINE)


SIBLINGS = ("methods", "passes", "stages", "runtime/backends", "benchmarks/layouts", "drift/engines")


@pytest.mark.parametrize("folder", SIBLINGS)
def test_files_of_a_folder_do_not_know_each_other(folder: str) -> None:
    """Nor do they know anything of each other but parts that several share, whose names begin with an underscore."""
    for path in (PACKAGE / folder).glob("*.py"):
        package = f"defaker_opt.{folder.replace('/', '.')}"
        siblings = [module for module in imports(path) if re.match(rf"{re.escape(package)}\.[^_]", module)]
        assert not siblings, f"{path.name} imports {siblings}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_fit_a_screen_and_files_300_lines(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception", "BaseException"), f"line {node.lineno}: a broad except"
        if isinstance(node, ast.Global):
            raise AssertionError(f"line {node.lineno}: module state that changes")


@pytest.mark.parametrize("path", sorted((ROOT / "profiling").glob("*.py")), ids=lambda path: path.name)
def test_what_scripts_import_of_the_package_is_there(path: Path) -> None:
    """No test runs them, so nothing else would notice that a name has moved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("defaker_opt"):
            continue
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            there = hasattr(module, alias.name) or importlib.util.find_spec(inner) is not None
            assert there, f"{path.name}:{node.lineno}: {node.module} has no {alias.name}"


def test_nothing_committed_names_a_machine() -> None:
    suspicious = re.compile(r"/(?:work|root|home|opt|tmp)/|/Users/|pypi\.org|huggingface\.co")
    tracked = [
        p for folder in ("toolkit", "recipes", "calibration", "profiling", "tests") for p in (ROOT / folder).rglob("*")
    ]
    tracked += [p for p in ROOT.glob("*") if p.is_file()]
    for path in tracked:
        if path.suffix in (".py", ".yaml", ".md", ".toml", ".json") and path != Path(__file__):
            found = suspicious.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found and found[0]}"
