"""The shape of the repository: what lies where, who may import whom, and what a wheel carries."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lethe_compile"
ROOMS = ("passes", "kernels", "models", "tools")  # folders at the top, symlinked into the package

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "lethe_compile", *ROOMS, "tests"),
    *("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "constraints.txt"),
}
GENERATED = ("build", "dist", "*.egg-info", "__pycache__")  # ignored by git, and no part of the tree

# tools → lethe_compile → passes → kernels → base, which is config, errors, settings. Models stand aside: the tools
# load them, and the compiler never sees them.
MAY_IMPORT = {
    "tools": {"tools", "lethe_compile", "passes", "kernels", "models", "base"},
    "lethe_compile": {"lethe_compile", "passes", "kernels", "base"},
    "passes": {"passes", "kernels", "base"},
    "kernels": {"kernels", "base"},
    "models": {"models", "base"},
    "base": {"base"},
}
BASE = {"config", "errors", "settings"}
SHELL = {"cli", "__main__"}  # the command line lives in the package but belongs with the tools


def source_files(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, symlinked folders included, apart from what tools leave behind."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def test_top_level_is_fixed() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in visible if not any(fnmatch(name, pattern) for pattern in GENERATED)} == TOP_LEVEL


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_symlinked_into_the_package(room: str) -> None:
    link = PACKAGE / room
    assert link.is_symlink(), f"{link} must be a symlink to ../{room}; is core.symlinks on in git?"
    assert os.readlink(link) == f"../{room}"
    assert not (ROOT / room).is_symlink()


def test_namespace_folders_have_no_init() -> None:
    # With kernels/__init__.py, a Python started here would let transformers import our folder as `kernels`.
    inits = [ROOT / room / "__init__.py" for room in ("kernels", "models", "tools")]
    inits += (ROOT / "tests").rglob("__init__.py")
    assert [str(init.relative_to(ROOT)) for init in inits if init.exists()] == []


def test_no_tool_shadows_the_standard_library() -> None:
    # `python tools/profile.py` puts tools/ first on sys.path.
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} & set(sys.stdlib_module_names) == set()


def test_weights_are_in_small_shards() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "models").rglob("*.safetensors")}
    assert {name: size for name, size in sizes.items() if size >= 16 << 20} == {}
    assert sum(sizes.values()) <= 40 << 20


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None for a module that is not ours."""
    package, *rest = module.split(".")
    if package != "lethe_compile":
        return None
    first = rest[0] if rest else ""
    if first in ROOMS:
        return first
    return "base" if first in BASE else "tools" if first in SHELL else "lethe_compile"


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in `tree`, a module of `package`, wherever it stands and however it is spelled."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from lethe_compile import kernels` names its room only in the alias.
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "lethe_compile" else [origin]
            yield from ((node.lineno, name) for name in names)


def violations(source: str, module: str, package: str) -> list[str]:
    room = room_of(module)
    assert room is not None
    targets = ((line, name, room_of(name)) for line, name in imported_modules(ast.parse(source), package))
    return [
        f"{line}: {room} may not import {name} ({target})"
        for line, name, target in targets
        if target is not None and target not in MAY_IMPORT[room]
    ]


def test_rooms_import_one_way() -> None:
    found = []
    for path in source_files(PACKAGE):
        if path.suffix == ".py":
            parts = path.relative_to(ROOT).with_suffix("").parts
            package = ".".join(parts[:-1])
            module = package if parts[-1] == "__init__" else ".".join(parts)
            file = path.resolve().relative_to(ROOT)
            found += [f"{file}:{line}" for line in violations(path.read_text(), module, package)]
    assert found == [], "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import lethe_compile.passes",
        "from lethe_compile.runtime import Runtime",
        "from lethe_compile import passes",
        "from lethe_compile import optimize",
        "from ...passes.base import Pass",
        "from ... import passes",
        "def late():\n    import lethe_compile.api",
    ],
)
def test_an_import_against_the_order_is_found(source: str) -> None:
    assert len(violations(source, "lethe_compile.kernels.attention.cpu", "lethe_compile.kernels.attention")) == 1


@pytest.mark.parametrize("source", ["from ..paging import x", "from . import y", "from lethe_compile import errors"])
def test_an_import_along_the_order_passes(source: str) -> None:
    assert violations(source, "lethe_compile.kernels.attention.cpu", "lethe_compile.kernels.attention") == []


def test_what_runs_artifacts_needs_no_torch() -> None:
    heavy, torch_runs = {"torch", "transformers", "triton"}, {"pt2.py", "aoti.py", "aoti_cuda.py"}
    torch_runs |= {"tensorrt.py", "torch_device.py", "torch_tensors.py"}
    runners = [path for path in (PACKAGE / "artifact").glob("*.py") if path.name not in torch_runs]
    files = [*runners, ROOT / "tools" / "run.py", PACKAGE / "config.py", PACKAGE / "errors.py"]
    found = {
        f"{path.name}:{line}"
        for path in files
        for line, module in imported_modules(ast.parse(path.read_text()), "lethe_compile.artifact")
        if module.split(".")[0] in heavy
    }
    assert found == set()


def run_python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    ran = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_import_is_light() -> None:
    seconds, loaded = run_python(
        "import sys, time, torch\n"
        "start = time.perf_counter()\n"
        "import lethe_compile\n"
        "heavy = {'transformers', 'onnx', 'lethe_compile.models', 'lethe_compile.tools'}\n"
        "print(time.perf_counter() - start, sorted(heavy & sys.modules.keys()))"
    ).split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 3


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, straight or by way of the sdist."""
    folder = tmp_path_factory.mktemp(request.param)
    ignore = shutil.ignore_patterns(*GENERATED, ".*")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignore)
    straight = ["--wheel"] if request.param == "tree" else []  # by default, build makes the wheel from the sdist
    command = [sys.executable, "-m", "build", "--no-isolation", *straight, "--outdir", str(folder), "source"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = wheel.parent / "source"
    assert packed == {path.relative_to(source).as_posix() for path in source_files(source / "lethe_compile")}


def test_installed_wheel_claims_one_import_name(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from importlib.util import find_spec\n"
        f"print([name for name in {('lethe_compile', *ROOMS)!r} if find_spec(name)])"
    )
    assert run_python(code, "-I", "-S", cwd=tmp_path).strip() == "['lethe_compile']"
