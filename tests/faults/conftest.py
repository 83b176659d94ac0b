from tests.cli.runs import cli, fit

__all__ = ["cli", "fit"]
