"""Public names exist and say what they are."""

import ast
import importlib
import inspect
from functools import cached_property
from types import FunctionType, ModuleType

import pytest

from tests.policy.sources import ROOT, sources

SOURCES = [source for source in sources() if source.path.name != "__main__.py"]
METHODS = (FunctionType, property, cached_property, classmethod, staticmethod)
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def undocumented(module: ModuleType) -> list[str]:
    """Return public classes, functions and methods without a docstring; an overridden method has its base's."""
    missing = [] if module.__doc__ else ["the module itself"]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            missing += [] if value.__doc__ else [name]
        if inspect.isclass(value):
            names = [key for key, member in vars(value).items() if isinstance(member, METHODS) and key[0] != "_"]
            missing += [f"{name}.{key}" for key in names if not _has_doc(value, key)]
    return missing


def _has_doc(cls: type, name: str) -> bool:
    return any(getattr(vars(kind).get(name), "__doc__", None) for kind in cls.__mro__)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_public_names_have_docstrings(source):
    assert undocumented(importlib.import_module(source.module)) == []


@pytest.mark.parametrize(
    "source",
    [source for source in sources() if source.path.name == "__init__.py"],
    ids=lambda source: source.module,
)
def test_every_name_in_all_exists(source):
    module = importlib.import_module(source.module)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(module, name, None) is not None, name


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_all_of_a_file_exists(source):
    declared = [
        ast.literal_eval(node.value)
        for node in source.tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    module = importlib.import_module(source.module) if declared else None
    for names in declared:
        assert not [name for name in names if not hasattr(module, name)]


def test_no_file_has_a_vague_name():
    assert not [source.module for source in sources() if source.path.stem in VAGUE]


def test_tests_mirror_the_packages():
    """Every folder of tests is named after a package, or is one of the kinds that span packages."""
    packages = {path.name for path in (ROOT / "lightning_dp").iterdir() if path.is_dir()} | {"callbacks", "datamodules"}
    spanning = {
        "contracts",
        "faults",
        "policy",
        "integration",
        "privacy",
        "devices",
        "distributed",
        "benchmarks",
        "__pycache__",
    }
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert folders <= packages | spanning


def test_the_rule_sees_a_missing_docstring():
    class Base:
        """Doc."""

        def inherited(self):
            """Doc."""

    class Public(Base):
        """Doc."""

        def inherited(self): ...

        def forgotten(self): ...

        def _private(self): ...

        @property
        def size(self): ...

    module = ModuleType("made_up", "Doc.")
    Public.__module__ = "made_up"
    module.Public = Public
    assert undocumented(module) == ["Public.forgotten", "Public.size"]
