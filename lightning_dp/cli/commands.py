"""The commands, each a function from its arguments to an exit code."""

import json
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_dp.cli.parsing import check_class_names, nearest, one_line, parse
from lightning_dp.errors import ConfigurationError, DataError


def fit(arguments: list[str]) -> int:
    """Train one private generator and print the table that ends a run."""
    from rich.console import Console

    from datamodules import MNIST, EmbeddedDigits, FashionMNIST, ImageDataModule  # noqa: F401  (names for flags)
    from lightning_dp.cli import plugins  # noqa: F401  (names for flags)
    from lightning_dp.cli.fit import FitCLI
    from lightning_dp.evaluation.report import metrics_table
    from lightning_dp.mechanisms.base import Mechanism
    from lightning_dp.modules.base import PrivateModule

    roots = {"mechanism": Mechanism, "model": PrivateModule, "data": ImageDataModule}
    check_class_names(arguments, roots)
    cli = one_line(lambda: FitCLI(arguments), roots)
    card = cli.run()
    console = Console()
    console.print(metrics_table(card))
    console.print(card.claim_statement)
    for label, name in (("samples", "samples.png"), ("report", "run_card.html"), ("released model", "release")):
        if (cli.run_dir / name).exists():
            console.print(f"{label}: {cli.run_dir / name}", soft_wrap=True)
    return 0


def sample(arguments: list[str]) -> int:
    """Draw samples of a released generator into an .npz file."""
    import numpy as np

    from lightning_dp.modules.published import load_generator

    parser = ArgumentParser(prog="lightning-dp sample", exit_on_error=False, description=sample.__doc__)
    parser.add_argument("run", type=str, help="Run folder, or a copy of its release folder.")
    parser.add_argument("--num", type=int, default=10_000, help="Number of images, labels in equal shares.")
    parser.add_argument("--out", type=str | None, default=None, help="File to write (default: RUN/samples.npz).")
    parser.add_argument("--seed", type=int | None, default=None, help="Makes the samples reproducible.")
    options: Any = parse(parser, arguments)
    if options.num < 1:
        raise ConfigurationError(f"Expected --num >= 1, got {options.num}.")
    generator, claim = load_generator(Path(options.run))
    images, labels = generator.sample(options.num, seed=options.seed)
    out = Path(options.out) if options.out else Path(options.run) / "samples.npz"
    if out.suffix != ".npz":
        raise ConfigurationError(f"Expected --out to end in .npz, got {out}.")
    pixels = (images * 255).round().clamp(0, 255).to(dtype=__import__("torch").uint8).numpy()
    try:
        np.savez_compressed(out, images=pixels, labels=labels.numpy())
    except OSError as error:
        raise ConfigurationError(f"Cannot write {out} ({error.strerror}); choose another --out.") from None
    print(f"{options.num} images of shape {tuple(pixels.shape[1:])} and their labels: {out}")
    print(_statement(claim))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Judge fresh samples of a released generator against the real test split."""
    from rich.console import Console

    from lightning_dp.evaluation.protocol import EvaluationProtocol, evaluate_samples
    from lightning_dp.evaluation.report import metrics_table, read_run_card
    from lightning_dp.modules.published import load_generator

    parser = ArgumentParser(prog="lightning-dp evaluate", exit_on_error=False, description=evaluate.__doc__)
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_class_arguments(EvaluationProtocol, "evaluation")
    parser.add_argument("--root", type=str | None, default=None, help="Data root (default: as in the run).")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the samples.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options: Any = parse(parser, arguments)
    protocol: EvaluationProtocol = one_line(lambda: parser.instantiate_classes(options), {}).evaluation
    run = Path(options.run)
    card = read_run_card(run)
    generator, _ = load_generator(run)
    data = _data_of(run, options.root)
    data.setup("test")
    images, labels = generator.sample(protocol.num_samples, seed=options.seed)
    result = evaluate_samples(images, labels, data.test_images, data.test_labels, protocol)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        Console().print(metrics_table({**card.to_dict(), "evaluation": result.to_dict()}))
    return 0


def account(arguments: list[str]) -> int:
    """Recompute the claim of a run from its ledger alone."""
    from lightning_dp.accounting.claim import PrivacyClaim, claim_from_ledger
    from lightning_dp.accounting.ledger import PrivacyLedger

    parser = ArgumentParser(prog="lightning-dp account", exit_on_error=False, description=account.__doc__)
    parser.add_argument("run", type=str, help="Run folder, or a ledger file.")
    parser.add_argument("--delta", type=float | None, default=None, help="Delta (default: the run's).")
    parser.add_argument("--json", action="store_true", help="Print the claim as JSON.")
    options: Any = parse(parser, arguments)
    run = Path(options.run)
    path = run if run.is_file() else run / "ledger.jsonl"
    if not path.is_file():
        raise DataError(f"Expected a ledger at {path}, found nothing. Give the folder of a run.")
    ledger = PrivacyLedger.read(path)
    claim = claim_from_ledger(ledger, delta=options.delta)
    recorded = path.parent / "claim.json"
    agrees = None
    if recorded.exists():
        stored = json.loads(recorded.read_text())
        same_delta = stored.get("delta") == claim.delta
        stored.pop("statement", None)
        agrees = PrivacyClaim.from_dict(stored) == claim if same_delta else None
    if options.json:
        print(json.dumps({**claim.to_dict(), "statement": claim.statement(), "agrees_with_run": agrees}, indent=2))
        return 0
    print(claim.statement())
    print(f"releases: {claim.num_releases}; sampler: {claim.sampler}; data: {ledger.header.get('dataset')}")
    for title, lines in (
        ("assumes", claim.assumptions),
        ("not covered", claim.not_covered),
        ("warning", claim.warnings),
    ):
        for line in lines:
            print(f"  {title}: {line}")
    if agrees is not None:
        print("agrees with the run's own claim" if agrees else "DIFFERS from the run's own claim (claim.json)")
    return 0


def data(arguments: list[str]) -> int:
    """Fill a data root with verified files."""
    if not arguments or arguments[0] != "fetch":
        got = arguments[0] if arguments else "nothing"
        raise ConfigurationError(f"Expected 'lightning-dp data fetch NAME', got {got!r} after data.")
    from datamodules.fetch import fetch, names

    parser = ArgumentParser(prog="lightning-dp data fetch", exit_on_error=False, description=data.__doc__)
    parser.add_argument("name", type=str, help=f"Data set: {', '.join(names())}.")
    parser.add_argument("--root", type=str, default="data", help="Data root to fill.")
    options: Any = parse(parser, arguments[1:])
    for path in fetch(options.name, Path(options.root)):
        print(path)
    return 0


def _data_of(run: Path, root: str | None) -> Any:
    """Return the data module of a run's configuration."""
    import datamodules

    try:
        config = yaml.safe_load((run / "config.yaml").read_text())["data"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"Expected the configuration of a run in {run / 'config.yaml'} ({error}).") from None
    name = str(config["class_path"]).rpartition(".")[2]
    if name not in datamodules.__all__:
        raise ConfigurationError(f"Unknown data module {name!r}.{nearest(name, datamodules.__all__)}")
    options = dict(config.get("init_args") or {})
    if root is not None:
        options["root"] = root
    return getattr(datamodules, name)(**options)


def _statement(claim: dict[str, Any]) -> str:
    from lightning_dp.accounting.claim import PrivacyClaim

    return PrivacyClaim.from_dict(claim).statement()
