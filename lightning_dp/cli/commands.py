"""The commands, each a function from its arguments to an exit code."""

import json
import logging
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser

from lightning_dp.cli.messages import nearest
from lightning_dp.cli.parsing import check_class_names, check_config_files, check_given_once, one_line, parse, spelt_out
from lightning_dp.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from lightning_dp.accounting.claim import PrivacyClaim


_SIGNS_OF_A_RUN = ("ledger.jsonl", "config.yaml", "release", "generator.json", "classifier.json")
_GIVE_A_RUN = "Give the folder of a run (the one that fit printed, with ledger.jsonl in it)."


def fit(arguments: list[str]) -> int:
    """Train one private generator and print the table that ends a run."""
    from rich.console import Console

    from lightning_dp.cli.fit import ROOTS, FitCLI
    from lightning_dp.cli.plugins import WARM_STARTS  # makes the names of flags known
    from lightning_dp.evaluation.report import metrics_table

    # Lightning sets its level when it is imported; its greetings would bury our lines.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    arguments = spelt_out(arguments, ROOTS, {short: kind.__name__ for short, kind in WARM_STARTS.items()})
    check_class_names(arguments, ROOTS)
    check_given_once(arguments, ROOTS)
    check_config_files(arguments)
    cli = FitCLI(arguments)
    card = cli.run()
    if card is None:
        return 0  # another process tells
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

    parser = ArgumentParser(
        prog="lightning-dp sample", exit_on_error=False, allow_abbrev=False, description=sample.__doc__
    )
    parser.add_argument("run", type=str, help="Run folder, or a copy of its release folder.")
    parser.add_argument("--num", type=int, default=10_000, help="Number of images, labels in equal shares.")
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="File to write (default: RUN/samples.npz; here, for a release folder).",
    )
    parser.add_argument("--seed", type=int | None, default=None, help="Makes the samples reproducible.")
    options: Any = parse(parser, arguments)
    if options.num < 1:
        raise ConfigurationError(f"Expected --num >= 1, got {options.num}.")
    generator, claim = load_generator(Path(options.run))
    images, labels = generator.sample(options.num, seed=options.seed)
    run = Path(options.run)
    # Whoever publishes a release folder publishes all that lies in it, so samples go elsewhere.
    out = Path(options.out) if options.out else (Path() if (run / "generator.json").exists() else run) / "samples.npz"
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

    from lightning_dp.cli.judging import evaluate_files, is_about_files

    if is_about_files(arguments):
        return evaluate_files(arguments)
    from lightning_dp.evaluation.protocol import EvaluationProtocol, evaluate_samples
    from lightning_dp.evaluation.report import metrics_table, read_run_card
    from lightning_dp.modules.published import load_generator

    parser = ArgumentParser(
        prog="lightning-dp evaluate", exit_on_error=False, allow_abbrev=False, description=evaluate.__doc__
    )
    parser.add_argument("run", type=str, help="Run folder (or samples of another program, with --data NAME).")
    parser.add_class_arguments(EvaluationProtocol, "evaluation", help="As in the run, unless a flag says otherwise.")
    parser.add_argument("--root", type=str | None, default=None, help="Data root (default: as in the run).")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the samples.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    run = Path(str(parse(parser, arguments).run))  # type: ignore[attr-defined]
    if run.exists() and not any((run / name).exists() for name in _SIGNS_OF_A_RUN):
        raise ConfigurationError(
            f"Expected a run folder, got {str(run)!r}. For samples (an .npz file, or a folder per class), name the "
            "data whose test split they are held to: --data NAME."
        )
    generator, _ = load_generator(run)
    config = _config_of(run)
    parser.set_defaults({"evaluation": config["evaluation"]})
    options: Any = parse(parser, arguments)
    protocol: EvaluationProtocol = one_line(lambda: parser.instantiate_classes(options), {}).evaluation
    card = read_run_card(run)
    data = _data_of(config, options.root)
    data.setup("test")
    images, labels = generator.sample(protocol.num_samples, seed=options.seed)
    result = evaluate_samples(images, labels, data.test_images, data.test_labels, protocol)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        Console().print(metrics_table({**card.to_dict(), "evaluation": result.to_dict()}))
    return 0


def account(arguments: list[str]) -> int:
    """Recompute the claim of a run from its ledger alone; exit code 1 if the run's own claim is another."""
    from lightning_dp.accounting.claiming import claim_from_ledger
    from lightning_dp.accounting.ledger import PrivacyLedger
    from lightning_dp.cli.dataset import account_dataset, is_about_dataset

    if is_about_dataset(arguments):
        return account_dataset(arguments)
    parser = ArgumentParser(
        prog="lightning-dp account", exit_on_error=False, allow_abbrev=False, description=account.__doc__
    )
    parser.add_argument(
        "run",
        type=str,
        help="Run folder, or a ledger file. (--dataset DIR --help: flags of a shared budget.)",
    )
    parser.add_argument("--delta", type=float | None, default=None, help="Delta (default: the run's).")
    parser.add_argument("--json", action="store_true", help="Print the claim as JSON.")
    options: Any = parse(parser, arguments)
    run = Path(options.run)
    path = run if run.is_file() else run / "ledger.jsonl"
    if not path.is_file():
        raise DataError(f"Expected a ledger at {path}, found nothing. {_GIVE_A_RUN}")
    ledger = PrivacyLedger.read(path)
    claim = claim_from_ledger(ledger, delta=options.delta)
    agrees = _agrees(claim, path.parent / "claim.json")
    code = 1 if agrees is False else 0
    if options.json:
        print(json.dumps({**claim.to_dict(), "statement": claim.statement(), "agrees_with_run": agrees}, indent=2))
        return code
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
    return code


def data(arguments: list[str]) -> int:
    """Fill a data root with verified files."""
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ["fetch", "--help"]
    if not arguments or arguments[0] != "fetch":
        got = arguments[0] if arguments else "nothing"
        raise ConfigurationError(f"Expected 'lightning-dp data fetch NAME', got {got!r} after data.")
    from datamodules.fetch import FETCH_NAMES, fetch, find_dataset, progress_bar

    parser = ArgumentParser(
        prog="lightning-dp data fetch", exit_on_error=False, allow_abbrev=False, description=data.__doc__
    )
    parser.add_argument("name", type=str, help=f"Data set: {', '.join(FETCH_NAMES)}.")
    parser.add_argument("--root", type=str, default="data", help="Data root to fill.")
    options: Any = parse(parser, arguments[1:])
    find_dataset(options.name)  # a misspelt name is refused before a bar is drawn
    with progress_bar() as progress:
        paths = fetch(options.name, Path(options.root), progress)
    for path in paths:
        print(path)
    return 0


def _agrees(claim: "PrivacyClaim", recorded: Path) -> bool | None:
    """Tell whether the run's own claim is this one; None if there is none, or it is about another delta."""
    from lightning_dp.accounting.claim import PrivacyClaim

    if not recorded.exists():
        return None
    try:
        stored = PrivacyClaim.from_dict(json.loads(recorded.read_text()))
    except (ValueError, TypeError, OSError):  # not JSON, or no claim: whatever it is, it does not agree
        return False
    return stored == claim if stored.delta == claim.delta else None


def _config_of(run: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        return {"data": dict(config["data"]), "evaluation": dict(config["evaluation"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(
            f"Expected the configuration of a run in {run / 'config.yaml'} ({reason}). {_GIVE_A_RUN}"
        ) from None


def _data_of(config: dict[str, Any], root: str | None) -> Any:
    """Return the data module of a run's configuration, of ours or of a plug-in; nothing else is imported for it."""
    import datamodules

    for exported in datamodules.__all__:
        getattr(datamodules, exported)  # imported on first use
    name = str(config["data"]["class_path"]).rpartition(".")[2]
    known: dict[str, type] = {kind.__name__: kind for kind in _all_subclasses(datamodules.ImageDataModule)}
    if name not in known:
        raise ConfigurationError(f"Unknown data module {name!r}.{nearest(name, known)}")
    options = dict(config["data"].get("init_args") or {})
    if root is not None:
        if "root" not in signature(known[name]).parameters:
            raise ConfigurationError(f"--root {root} has no meaning for {name}, which has no root; leave it out.")
        options["root"] = root
    return known[name](**options)


def _all_subclasses(base: type) -> list[type]:
    subs: list[type] = base.__subclasses__()
    return [kind for sub in subs for kind in (sub, *_all_subclasses(sub))]


def _statement(claim: dict[str, Any]) -> str:
    from lightning_dp.accounting.claim import PrivacyClaim

    return PrivacyClaim.from_dict(claim).statement()
