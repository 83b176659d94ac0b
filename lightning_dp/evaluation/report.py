"""The run card: what one run claims, measured and cost, as JSON, as one self-contained page, and as a table."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.card_page import render_page
from lightning_dp.evaluation.card_text import ceil_text, is_proved, number_text, seconds_text

CARD_FORMAT = 1
JSON_NAME = "run_card.json"
HTML_NAME = "run_card.html"
_LEVELS = ("PROVED", "CONDITIONAL", "UNVERIFIED", "NONPRIVATE")
_CLAIM_KEYS = ("level", "epsilon", "delta", "relation", "unit")


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """Everything a colleague needs to judge one run. All values are plain JSON types.

    Guarantee: a card takes no `raw/` value, and no epsilon unless the claim's level is PROVED.

    Attributes:
        title: One line that names the run.
        run_id: Identifier of the run, as in the ledger.
        created: Time of the card, ISO 8601 with offset.
        claim: `PrivacyClaim.to_dict()`: level, epsilon (None unless PROVED), delta, relation, unit, accountant,
            sampler, num_releases, mechanism, assumptions, not_covered, warnings.
        claim_statement: `PrivacyClaim.statement()`, the claim in one sentence.
        budget: What was asked, e.g. target_epsilon, target_delta, noise_multiplier, planned_releases.
        mechanism: name, its settings, noise_std, l2_sensitivity.
        sampler: scheme, rate, executed.
        seed_policy: Where randomness came from, in words.
        data: name, num_records, image_shape, fingerprint and the like.
        model: method, network, parameter counts, size of the release checkpoint.
        evaluation: `EvaluationResult.to_dict()` or `ClassificationResult.to_dict()`; None if nothing was evaluated.
        epsilon_curve: (number of releases, epsilon spent) pairs. Shown only for PROVED.
        cost: train_time_s, evaluation_time_s, total_time_s, peak_memory_mb, device, and the like.
        versions: Version per package, Python included.
        config: The resolved configuration.
        sample_grid: File name of the sample grid inside the run folder, or None.
    """

    title: str
    run_id: str
    created: str
    claim: Mapping[str, Any]
    claim_statement: str
    budget: Mapping[str, Any] = field(default_factory=dict)
    mechanism: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)
    seed_policy: str = "not stated"
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    epsilon_curve: tuple[tuple[float, float], ...] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    sample_grid: str | None = None

    def __post_init__(self) -> None:
        missing = [key for key in _CLAIM_KEYS if key not in self.claim]
        if missing:
            raise ConfigurationError(f"Expected the keys {', '.join(_CLAIM_KEYS)} in a claim, got none of {missing}.")
        level, epsilon = str(self.claim["level"]).upper(), self.claim["epsilon"]
        if level not in _LEVELS:
            raise ConfigurationError(f"Expected a claim level out of {', '.join(_LEVELS)}, got level={level}.")
        is_number = isinstance(epsilon, int | float) and math.isfinite(epsilon)
        if not (is_number if is_proved(self.claim) else epsilon is None):
            raise ConfigurationError(
                f"Expected a finite epsilon for level PROVED and none for any other, got level={level}, "
                f"epsilon={epsilon}. Build the claim with make_claim."
            )
        raw = [name for name in _keys(self.to_dict()) if name.startswith("raw/")]
        if raw:
            raise ConfigurationError(f"Expected no un-noised value in a run card, got {raw}. Leave raw/ metrics out.")
        if self.sample_grid is not None and Path(self.sample_grid).name != self.sample_grid:
            raise ConfigurationError(
                f"Expected a file name inside the run folder for sample_grid, got {self.sample_grid!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; infinities and NaN become the texts inf, -inf and nan."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"format": CARD_FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunCard":
        """Rebuild a card from `to_dict`.

        Raises:
            ConfigurationError: Another format, unknown fields, missing ones, or values that a card refuses.
        """
        values = dict(values)
        if (found := values.pop("format", CARD_FORMAT)) != CARD_FORMAT:
            raise ConfigurationError(f"Expected a run card of format {CARD_FORMAT}, got format={found!r}.")
        values.pop("metric_curves", None)  # always empty, in the cards that have one
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigurationError(
                f"Expected fields out of {', '.join(f.name for f in fields(cls))} in a run card, got {unknown}."
            )
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigurationError(f"Expected the fields {', '.join(needed)} in a run card, got none of {missing}.")
        values["epsilon_curve"] = _points(values.get("epsilon_curve", ()))
        return cls(**values)


def _points(curve: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in curve)


def _keys(value: Any) -> Iterator[str]:
    """Yield all mapping keys at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _plain(value: Any) -> Any:
    """Return the value as JSON types: mappings and sequences copied, paths, enums and others as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)


def write_run_card(folder: Path | str, card: RunCard | Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the card as JSON and as a page that needs no other file and no network.

    Args:
        folder: Run folder; made if missing. Holds the sample grid that the card names.
        card: The card, or its dictionary.

    Returns: Paths of the JSON and the HTML file.

    Raises:
        ConfigurationError: The dictionary is no card, the sample grid is missing, or the folder cannot be written.
    """
    card = _as_card(card)
    folder = Path(folder)
    json_path, html_path = folder / JSON_NAME, folder / HTML_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        grid = None if card.sample_grid is None else (folder / card.sample_grid).read_bytes()
        json_path.write_text(json.dumps(card.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        html_path.write_text(render_page(card.to_dict(), sample_grid=grid), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"Expected a writable run folder{' with ' + card.sample_grid if card.sample_grid else ''}, got {folder}: "
            f"{error}."
        ) from error
    return json_path, html_path


def read_run_card(path: Path | str) -> RunCard:
    """Read a card that `write_run_card` wrote.

    Args:
        path: The JSON file, or the run folder that holds it.

    Raises:
        ConfigurationError: Missing, not JSON, or not a card.
    """
    path = Path(path)
    path = path / JSON_NAME if path.is_dir() else path
    try:
        return RunCard.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Expected a run card, got {path}: {error}.") from error


def metrics_table(card: RunCard | Mapping[str, Any]) -> Table:
    """Return the table that ends a run: privacy first, then quality, then time.

    Args:
        card: The card, or its dictionary.

    Returns: A table of two columns, for `rich.print`. Without an epsilon it shows the claim's own statement instead.
    """
    values = _as_card(card).to_dict()
    table = Table(title=Text(values["title"]), show_header=False, title_justify="left")
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in [*_claim_rows(values), *_quality_rows(values["evaluation"]), *_cost_rows(values["cost"])]:
        table.add_row(Text(name), Text(value))
    return table


def quality_table(title: str, evaluation: Mapping[str, Any]) -> Table:
    """Return a table of quality alone, for samples of which no claim is known.

    Args:
        title: What was judged.
        evaluation: `EvaluationResult.to_dict`.
    """
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in [("privacy", "not known: no claim comes with these samples"), *_quality_rows(evaluation)]:
        table.add_row(Text(name), Text(value))
    return table


def _claim_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    claim = values["claim"]
    if is_proved(claim):
        first = [("epsilon", ceil_text(claim["epsilon"])), ("delta", number_text(claim["delta"]))]
    else:
        first = [("privacy", values["claim_statement"])]
    middle = [("relation", str(claim["relation"])), ("privacy unit", str(claim["unit"]))]
    warnings = [("warning", str(text)) for text in claim.get("warnings", ())]
    return [*first, *middle, ("claim level", str(claim["level"]).upper()), *warnings]


def _quality_rows(evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if evaluation is None:
        return [("evaluation", "none")]
    accuracy = [(f"accuracy, {name}", number_text(value)) for name, value in evaluation["accuracy"].items()]
    if "fid" not in evaluation:  # a classifier, judged by its own accuracy
        return accuracy
    rows = [(f"FID ({evaluation['fid_extractor']})", number_text(evaluation["fid"]))]
    rows.append(("precision / recall", f"{number_text(evaluation['precision'])} / {number_text(evaluation['recall'])}"))
    rows += accuracy
    rows.append(("protocol", f"{evaluation['protocol_hash']}, {evaluation['num_samples']} synthetic images"))
    return [*rows, *(("note", str(text)) for text in evaluation.get("warnings", ()))]


def _cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = [key for key in ("total_time_s", "train_time_s", "evaluation_time_s") if key in cost]
    return [("time", ", ".join(f"{seconds_text(cost[key])} {key.removesuffix('_time_s')}" for key in seconds) or "-")]


def _as_card(card: RunCard | Mapping[str, Any]) -> RunCard:
    return card if isinstance(card, RunCard) else RunCard.from_dict(card)
