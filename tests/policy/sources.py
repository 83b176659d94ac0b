"""Reads the project's own source files for the policy tests."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("lightning_dp", "callbacks", "datamodules")


@dataclass(frozen=True)
class Source:
    """One Python file of the project."""

    path: Path
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports(self) -> Iterator[str]:
        """Yield the dotted name of everything that is imported, at any depth: `a.b.c` for `from a.b import c`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}: relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    """Return all files of the three packages."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return tuple(Source(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths)


def parse(text: str, path: str) -> Source:
    """Return a made-up file, for tests of the tests."""
    return Source(ROOT / path, ast.parse(text))
