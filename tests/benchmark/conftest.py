from tests.cli.runs import cli

__all__ = ["cli"]
