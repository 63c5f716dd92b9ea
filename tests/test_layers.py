"""The house stands: imports point downward, none in a circle, each library has its door, adapters use public names."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guardmw"
ADAPTERS = ROOT / "adapters"

# From the ground up; a module imports from its own storey and from those before it.
STOREYS = (
    {"_yaml", "errors", "conversation", "identifiers", "taxonomy"},
    {"verdict", "settings"},
    {"arguments", "running", "tools"},
    {"policy"},
    {"backends", "dialects"},
    {"guard", "stream", "testing"},
    {"telemetry", "audit"},
    {"evaluate"},
    {"train", "serve", "scale"},
    {"cli", "demo", "terminal", "__main__"},
)
# Where a library may be imported. Pydantic and numpy may everywhere.
DOORS = {
    "anyio": ("backends/_http.py",),
    "datasets": ("evaluate/datasets.py",),
    "httpx": ("backends/_http.py", "train/llm/"),
    "huggingface_hub": ("backends/onnx.py",),
    "jsonschema": ("arguments.py",),
    "llmcompressor": ("train/miniguard/quantise.py",),
    "onnx": ("train/",),
    "onnxruntime": ("backends/onnx.py", "train/"),
    "peft": ("train/miniguard/network.py",),
    "pyarrow": ("train/ingest.py",),
    "redis": ("backends/redis.py",),
    "referencing": ("arguments.py",),
    "rich": ("terminal.py", "demo.py"),
    "sentencepiece": ("backends/_artefact.py",),
    "tokenizers": ("backends/onnx.py", "backends/_artefact.py", "train/"),
    "torch": ("backends/transformers.py", "train/"),
    "transformers": ("backends/transformers.py", "train/"),
    "vllm": ("backends/engine.py",),
    "yaml": ("_yaml.py", "terminal.py"),
}
ANYWHERE = {"numpy", "pydantic"}


class Import(NamedTuple):
    """One import statement, of one name."""

    path: Path
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}: {self.module} {self.name}".rstrip()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import that runs, at the top or nested; those only for the type checker do not."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (Import(path, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (Import(path, node.module or "", alias.name) for alias in node.names)
        else:
            waiting += ast.iter_child_nodes(node)


def module_of(path: Path) -> str:
    """guardmw/backends/onnx.py as guardmw.backends.onnx."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def target(given: Import) -> str:
    """The module that an import of ours means: `from guardmw import cli` is of guardmw.cli."""
    longer = f"{given.module}.{given.name}"
    return longer if longer in MODULES else given.module


def storey(module: str) -> int:
    """Counted from the ground; the package itself gathers what the guard's storey and those below it offer."""
    room = module.split(".")[1] if "." in module else "guard"
    return next(level for level, rooms in enumerate(STOREYS) if room in rooms)


INSIDE = [given for path in MODULES.values() for given in imports_of(path)]
OURS = [given for given in INSIDE if given.module.split(".")[0] == "guardmw"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_has_its_storey(module: str) -> None:
    """A new room is put on the plan when it is built."""
    storey(module)


def test_imports_point_downward() -> None:
    """What is below works without what is above."""
    assert [str(given) for given in OURS if storey(target(given)) > storey(module_of(given.path))] == []


def test_nothing_inside_imports_the_package_itself() -> None:
    """Its public names are for those outside."""
    assert [str(given) for given in OURS if target(given) == "guardmw"] == []


def test_no_import_goes_in_a_circle() -> None:
    """Nested imports count too."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for given in OURS:
        graph[module_of(given.path)].add(target(given))
    TopologicalSorter(graph).prepare()


def test_each_library_has_its_door() -> None:
    """It can be replaced, or be missing, in one place."""
    wrong = []
    for given in INSIDE:
        library = given.module.split(".")[0]
        if library in sys.stdlib_module_names or library in ANYWHERE or library == "guardmw":
            continue
        doors = DOORS.get(library, ())
        if not any(given.path.relative_to(PACKAGE).as_posix().startswith(door) for door in doors):
            wrong.append(str(given))
    assert wrong == []


def test_adapters_use_public_names() -> None:
    """What an adapter can do, anyone can."""
    outside = [given for path in ADAPTERS.glob("*/*_*/**/*.py") for given in imports_of(path)]
    assert outside
    wrong = [
        str(given)
        for given in outside
        if given.module.split(".")[0] == "guardmw"
        and any(part.startswith("_") for part in (*given.module.split("."), given.name))
    ]
    assert wrong == []


def test_what_the_type_checker_alone_imports_does_not_count(tmp_path: Path) -> None:
    """And everything else does, however deep."""
    path = tmp_path / "module.py"
    path.write_text(
        "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    try:\n        from c import d\n"
        "    finally:\n        import e.f\n",
        encoding="utf-8",
    )
    assert {(given.module, given.name) for given in imports_of(path)} == {("b", ""), ("c", "d"), ("e.f", "")}
