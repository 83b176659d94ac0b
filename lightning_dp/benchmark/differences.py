"""What tells run cards apart: claim, budget, mechanism, quality, cost and configuration, one line each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dp.benchmark.records import card_metrics, protocol_of
from lightning_dp.evaluation.card_text import ceil_text, is_proved, number_text, seconds_text
from lightning_dp.evaluation.report import RunCard

MISSING = "-"
_PARTS = ("budget", "mechanism", "sampler", "data", "model")
_CLAIM = ("level", "delta", "relation", "unit", "accountant", "sampler", "num_releases", "mechanism")
_LISTS = ("assumptions", "not_covered", "warnings")
_NOT_COMPARED = ("run_dir", "ckpt_path", "wandb", "wandb_group", "wandb_project")
_SAID_ELSEWHERE = ("target_epsilon",)  # an asked epsilon is shown with PROVED claims only, by the budget


@dataclass(frozen=True)
class Difference:
    """One line of a comparison of cards.

    Attributes:
        part: claim, budget, mechanism, sampler, data, model, quality, cost or config.
        name: What is compared.
        values: One text per card.
    """

    part: str
    name: str
    values: tuple[str, ...]

    @property
    def is_different(self) -> bool:
        """Whether the cards do not all say the same."""
        return len(set(self.values)) > 1


def card_lines(cards: Sequence[RunCard]) -> list[Difference]:
    """Return every line of a comparison, equal ones too.

    An epsilon appears for PROVED claims only; the others show their statement. FID and accuracy of two metric protocols
    stand side by side under a line that says that they do not compare.

    Args:
        cards: At least two.
    """
    lines = [Difference("claim", "statement", tuple(card.claim_statement for card in cards))]
    lines.append(Difference("claim", "epsilon", tuple(_epsilon(card) for card in cards)))
    lines += _mapped("claim", [{key: card.claim.get(key) for key in _CLAIM} for card in cards])
    lines += _mapped("claim", [{key: "; ".join(card.claim.get(key, ())) for key in _LISTS} for card in cards])
    lines.append(Difference("claim", "seed policy", tuple(card.seed_policy for card in cards)))
    for part in _PARTS:
        lines += _mapped(part, [getattr(card, part) for card in cards])
    lines += _quality(cards)
    lines += _cost(cards)
    lines += _mapped("config", [_compared(card.config) for card in cards])
    return lines


def _epsilon(card: RunCard) -> str:
    return ceil_text(card.claim["epsilon"]) if is_proved(card.claim) else MISSING


def _quality(cards: Sequence[RunCard]) -> list[Difference]:
    protocols = tuple(_protocol_text(card) for card in cards)
    lines = [Difference("quality", "metric protocol", protocols)]
    if len(set(protocols)) > 1:
        warning = "other protocols: the numbers below do not compare"
        lines.append(Difference("quality", "note", tuple(warning if index else "" for index in range(len(cards)))))
    return [*lines, *_mapped("quality", [card_metrics(card) for card in cards])]


def _protocol_text(card: RunCard) -> str:
    if card.evaluation is None:
        return "not evaluated"
    return protocol_of(card) or "accuracy of a released classifier"


def _cost(cards: Sequence[RunCard]) -> list[Difference]:
    costs = [{k: seconds_text(v) if k.endswith("_s") else v for k, v in card.cost.items()} for card in cards]
    return _mapped("cost", costs)


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _NOT_COMPARED}
    if isinstance(privacy := kept.get("privacy"), Mapping):
        kept["privacy"] = {key: value for key, value in privacy.items() if key not in _SAID_ELSEWHERE}
    return kept


def _mapped(part: str, sides: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return one line per key that any side has, nested mappings by dotted names."""
    flat = [dict(_flatten(side)) for side in sides]
    names = dict.fromkeys(name for side in flat for name in side)
    return [Difference(part, name, tuple(side.get(name, MISSING) for side in flat)) for name in names]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", MISSING if value is None else number_text(value)
