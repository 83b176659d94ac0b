"""Which mechanism runs with which method, under which relation and claim level, or why not: asked of the code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from callbacks import GradientPrivatizer, PrivacyAccountant
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.claiming import make_claim
from lightning_dp.accounting.events import RELATION_NAMES
from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import Mechanism
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.public_facts import PublicFacts

_DELTA = 1e-5  # of a claim whose level alone is looked at


@dataclass(frozen=True)
class Pair:
    """What a method and a mechanism make of each other.

    Attributes:
        method: Name of the method's configuration.
        module: Class of the method.
        mechanism: Class of the mechanism.
        levels: Claim level per relation with a proof; empty where the pair is refused.
        refusals: Why, per relation without one.
    """

    method: str
    module: str
    mechanism: str
    levels: Mapping[str, ClaimLevel]
    refusals: Mapping[str, str]

    @property
    def runs(self) -> bool:
        """Whether the pair runs under any relation."""
        return bool(self.levels)


def judge_pair(method: str, module: PrivateModule, data: PublicFacts, mechanisms: Iterable[Mechanism]) -> Pair:
    """Return whether a mechanism runs with a method, by planning one release under every relation.

    Args:
        method: Name of the method's configuration.
        module: The method.
        data: Public facts of its data; no record is read.
        mechanisms: The same mechanism with different options, at least one; the first that runs decides.
    """
    pairs = [_judge(method, module, data, mechanism) for mechanism in mechanisms]
    return next((pair for pair in pairs if pair.runs), pairs[0])


def _judge(method: str, module: PrivateModule, data: PublicFacts, mechanism: Mechanism) -> Pair:
    levels: dict[str, ClaimLevel] = {}
    refusals: dict[str, str] = {}
    for relation in sorted(RELATION_NAMES):
        try:
            levels[relation] = _level(module, data, mechanism, relation)
        except ConfigurationError as error:
            refusals[relation] = " ".join(str(error).split())
    return Pair(method, type(module).__name__, type(mechanism).__name__, levels, refusals)


def _level(module: PrivateModule, data: PublicFacts, mechanism: Mechanism, relation: str) -> ClaimLevel:
    settings = PrivacySettings(neighboring_relation=relation, noise_multiplier=1.0, target_delta=_DELTA)
    privatizer = GradientPrivatizer(mechanism=mechanism, accountant=PrivacyAccountant(privacy=settings))
    privatizer.plan_run(module, data, 1)
    assert privatizer.plan is not None  # plan_run has just made it
    event = mechanism.step_event(privatizer.plan)
    claim = make_claim(
        {(event, module.sampling): 1},
        delta=_DELTA,
        relation=relation,
        unit=privatizer.plan.spec.unit,
        mechanism=type(mechanism).__name__,
        conditional_on=module.conditional_on,
        unverified=module.unverified,
    )
    return claim.level


LETTERS = {"add_or_remove_one": "A", "replace_one": "R", "replace_special": "Z"}
"""How a table names the relations: add-or-remove-one, replace-one, zero-out."""


def cell_text(pair: Pair, reasons: list[str]) -> str:
    """Return what a table shows of a pair: level and relations, and the number of the reason for each missing one.

    Args:
        pair: The pair.
        reasons: Reasons so far; new ones are appended.
    """
    by_level: dict[str, list[str]] = {}
    for relation, level in pair.levels.items():
        by_level.setdefault(str(level), []).append(LETTERS[relation])
    by_reason: dict[str, list[str]] = {}
    for relation, reason in pair.refusals.items():
        by_reason.setdefault(reason, []).append(LETTERS[relation])
    parts = [f"{level} {' '.join(letters)}" for level, letters in by_level.items()]
    for reason, letters in by_reason.items():
        if reason not in reasons:
            reasons.append(reason)
        which = f"{' '.join(letters)} " if pair.runs else ""
        parts.append(f"{which}refused [{reasons.index(reason) + 1}]")
    return "; ".join(parts)


def merged_methods(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Return the pairs by method, configurations of one class with equal answers under one name.

    Args:
        pairs: All pairs.

    Returns: Pairs by the names of the configurations, in the order of their first appearance.
    """
    by_method: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_method.setdefault(pair.method, []).append(pair)
    groups: dict[tuple[object, ...], list[str]] = {}
    for method, own in by_method.items():
        answers = tuple(
            (pair.module, pair.mechanism, *sorted(pair.levels.items()), *sorted(pair.refusals.items())) for pair in own
        )
        groups.setdefault(answers, []).append(method)
    return {", ".join(names): by_method[names[0]] for names in groups.values()}
