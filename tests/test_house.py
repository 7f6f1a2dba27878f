"""The laws of the house: floors, file sizes, packaging, names, configuration fields and forbidden calls."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from reca import config as config_module
from reca.models import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "reca": "reca",
    "kernels": "reca.kernels",
    "profiling": "reca.profiling",
    "benchmarks": "reca.benchmarks",
}
FLOORS = {
    "reca.kernels": 0,
    "reca.profiling": 0,
    "reca.types": 1,
    "reca.config": 1,
    "reca.errors": 1,
    "reca.randomness": 1,
    "reca.files": 1,
    "reca.images": 1,
    "reca.sheet": 1,
    "reca.assets": 1,
    "reca.layers": 2,
    "reca.objectives": 2,
    "reca.world": 2,
    "reca.models": 3,
    "reca.data": 3,
    "reca.engine": 3,
    "reca.recipes": 4,
    "reca.cli": 5,
    "reca.commands": 5,
    "reca.benchmarks": 5,
    "reca.__main__": 5,
}
MAX_LINES = 400


def modules() -> Iterator[tuple[str, Path]]:
    """Every module that ships, by dotted name."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts])
            yield name.removesuffix(".__init__"), path


def room(module: str) -> str | None:
    """The name in FLOORS that a module belongs to; None for the bare package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else None


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{module}:{node.lineno}: relative import; write it absolutely")
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def floor_violations(module: str, imported: Iterator[tuple[int, str]]) -> list[str]:
    """What breaks the floors: upward imports, siblings that meet, families that meet."""
    here, found = room(module), []
    for line, target in imported:
        if not target.startswith("reca.") or here is None:
            continue
        there = room(target)
        if there is None or there == here:
            mine, theirs = module.split(".")[2:3], target.split(".")[2:3]
            if (
                here == "reca.models"
                and mine != theirs
                and set(mine) & FAMILIES.keys()
                and set(theirs) & FAMILIES.keys()
            ):
                found.append(f"{module}:{line} imports its sibling family {target}")
            continue
        if there not in FLOORS:
            found.append(f"{module}:{line} imports {target}, which stands on no floor")
        elif FLOORS[there] > FLOORS[here] or (FLOORS[there] == FLOORS[here] and FLOORS[here] in (0, 3)):
            found.append(f"{module}:{line} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    return found


def test_every_module_stands_on_a_floor() -> None:
    homeless = [name for name, _ in modules() if room(name) is not None and room(name) not in FLOORS]
    assert homeless == []


def test_imports_point_strictly_downwards() -> None:
    found = [line for name, path in modules() for line in floor_violations(name, imports(path, name))]
    assert found == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("reca.kernels.x", "reca.engine.loop"),
        ("reca.engine.x", "reca.models.family"),
        ("reca.layers.x", "reca.models.family"),
        ("reca.profiling.x", "reca.kernels.op"),
    ],
)
def test_the_floor_law_catches_upward_and_sideways_imports(module: str, target: str) -> None:
    assert floor_violations(module, iter([(1, target)]))


def test_no_file_is_longer_than_the_limit() -> None:
    paths = [path for _, path in modules()] + sorted((ROOT / "tests").rglob("*.py"))
    long = {
        str(path.relative_to(ROOT)): n
        for path in paths
        if (n := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_the_package_list_names_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {name for name, path in modules() if path.name == "__init__.py"}
    assert set(listed) == present
    assert len(listed) == len(set(listed))


def test_no_family_is_named_outside_its_folder_and_the_recipes() -> None:
    pattern = re.compile(
        r"(?i)\b(" + "|".join([*FAMILIES, "show-o", "harmon", "showo", "openuni", "janus"]) + r")"
    )
    found = []
    for name, path in modules():
        if room(name) in (
            "reca.engine",
            "reca.data",
            "reca.kernels",
            "reca.layers",
            "reca.objectives",
            "reca.profiling",
        ):
            found += [
                f"{name}:{i}"
                for i, line in enumerate(path.read_text().splitlines(), 1)
                if pattern.search(line)
            ]
    assert found == []


def sections() -> dict[str, type[BaseModel]]:
    """Every part of the configuration, by class name."""
    values = vars(config_module).values()
    return {v.__name__: v for v in values if isinstance(v, type) and issubclass(v, config_module.Section)}


def test_every_configuration_field_is_read_somewhere() -> None:
    read = set()
    for name, path in modules():
        if name != "reca.config":
            nodes = ast.walk(ast.parse(path.read_text()))
            read |= {
                node.attr
                for node in nodes
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            }
    dead = {f"{s}.{f}" for s, cls in sections().items() for f in cls.model_fields if f not in read}
    assert dead == set()


def test_every_configuration_field_is_documented() -> None:
    missing = {
        f"{name}.{field}"
        for name, cls in sections().items()
        for field in cls.model_fields
        if not re.search(rf"\b{field}\b", cls.__doc__ or "")
        and not issubclass(config_module.TrainConfig, cls)
        and not (
            isinstance(cls.model_fields[field].annotation, type)
            and issubclass(cls.model_fields[field].annotation, config_module.Section)
        )
    }
    assert missing == set()


FORBIDDEN = {
    "import pickle": "pickle executes what it reads",
    "extractall": "tar members may point anywhere",
    "shell=True": "no shell",
    "trust_remote_code=True": "no remote code",
    "weights_only=False": "weights are data",
    "yaml.load(": "use the strict loader of reca.recipes.resolve",
    "yaml.unsafe_load": "use the strict loader",
    "os.environ": "the environment configures nothing",
}
# The one module that reads and writes releases in torch's own format: with weights_only=True, and through the
# file layer; it names pickle to catch its errors.
RELEASES = "reca.models.checkpoint"
ALLOWED = {("reca.recipes.strict_yaml", "yaml.load("), (RELEASES, "import pickle")}


def test_forbidden_calls_do_not_occur() -> None:
    found = []
    for name, path in modules():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("#")[0]
            found += [
                f"{name}:{number}: {text}: {why}"
                for text, why in FORBIDDEN.items()
                if text in code and (name, text) not in ALLOWED
            ]
    assert found == []


def test_no_bare_except_and_no_unfinished_work() -> None:
    found = []
    for name, path in modules():
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{name}:{node.lineno}: bare except")
        for number, line in enumerate(source.splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []


WRITERS = re.compile(r"""torch\.save\(|\bsave_file\(|open\([^)]*["'][wax]b""")


def test_only_the_file_layer_writes_binary_files() -> None:
    found = [
        f"{name}:{number}"
        for name, path in modules()
        if room(name) != "reca.files" and name != RELEASES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if WRITERS.search(line)
    ]
    assert found == []


def test_importing_reca_loads_neither_torch_nor_the_command_line() -> None:
    code = "import sys, reca; assert not {'torch', 'typer', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_importing_the_folder_as_kernels_fails_with_the_cure() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "reca.kernels" in result.stderr
