"""``lightning-dp account --dataset DIR``: what all runs within the budget of one data set may spend together."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_dp.accounting.accountants import checked_delta
from lightning_dp.accounting.budget_state import FIXED_LIST, BudgetState
from lightning_dp.accounting.claim import epsilon_text
from lightning_dp.accounting.dataset_budget import DatasetBudget, epsilon_of_run
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark.plan import RESERVATIONS_FILE
from lightning_dp.cli.parsing import parse
from lightning_dp.errors import DataError
from lightning_dp.wording import counted


def is_about_dataset(arguments: list[str]) -> bool:
    """Tell whether `account` was asked of a data set."""
    return any(argument == "--dataset" or argument.startswith("--dataset=") for argument in arguments)


def account_dataset(arguments: list[str]) -> int:
    """Compose all runs within the budget of a data set, at any delta."""
    parser = ArgumentParser(
        prog="lightning-dp account", exit_on_error=False, allow_abbrev=False, description=account_dataset.__doc__
    )
    parser.add_argument("--dataset", type=str, required=True, help="Folder of the budget.")
    parser.add_argument("--delta", type=float | None, default=None, help="Delta (default: the budget's).")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    parser.add_argument(
        "--give_back",
        type=str | None,
        default=None,
        help="Run folder without a release: its reservation goes back; or a comparison's, for all such cells.",
    )
    options: Any = parse(parser, arguments)
    budget = DatasetBudget(Path(options.dataset))
    if options.delta is not None:
        checked_delta(options.delta)
    if options.give_back is not None:
        _give_back(budget, Path(options.give_back))
    state = budget.state()
    delta = state.terms.delta if options.delta is None else options.delta
    if options.json:
        print(json.dumps(_as_dict(state, delta), indent=2))
    else:
        print("\n".join(_lines(state, delta)))
    return 0


def _give_back(budget: DatasetBudget, run: Path) -> None:
    if (run / RESERVATIONS_FILE).is_file():
        _give_back_cells(budget, run)
        return
    path = run if run.is_file() else run / "ledger.jsonl"
    if not path.is_file():
        raise DataError(
            f"Expected the ledger of a run at {path}: only an empty ledger shows that nothing was released."
        )
    with PrivacyLedger.reopen(path) as ledger:
        budget.give_back(str(ledger.header.get("run_id")), ledger)


def _give_back_cells(budget: DatasetBudget, folder: Path) -> None:
    from lightning_dp.benchmark.reservations import read_names
    from lightning_dp.benchmark.runner import RUNS_FOLDER, only_here

    with only_here(folder):
        held = budget.state().runs
        for name, run in read_names(folder).items():
            if run not in held or held[run].writers:
                continue
            path = folder / RUNS_FOLDER / name / "ledger.jsonl"
            if not path.is_file():
                budget.give_back(run, None)
                continue
            with PrivacyLedger.reopen(path) as ledger:
                if not len(ledger):
                    budget.give_back(run, ledger)


def _lines(state: BudgetState, delta: float) -> list[str]:
    terms, claim, composed = state.terms, state.claim(delta), state.composed(delta)
    rule = "gaussian" if terms.rule == "gaussian" else f"renyi of order {terms.filter.order:g}"
    lines = [
        f"{terms.dataset}, all runs in this budget: {claim.statement()}",
        f"budget: epsilon={terms.epsilon:g} at delta={terms.delta:g}, rule {rule}; "
        f"{100 * state.spent:.3g} % of it reserved by {counted(len(state.runs), 'run')}",
    ]
    if composed is not None and not state.is_fixed_list:
        lines.append(
            f"composed as one list: epsilon={epsilon_text(composed.epsilon)} at delta={delta!r}, a bound {FIXED_LIST}"
        )
    for charge in state.runs.values():
        epsilon = epsilon_of_run(charge, terms, delta)
        alone = "" if epsilon is None else f", epsilon={epsilon_text(epsilon)} alone"
        lines.append(f"  {charge.name}: {sum(charge.counts.values())} of {charge.mechanism}{alone}: {charge.level}")
    for title, texts in (("assumes", claim.assumptions), ("not covered", claim.not_covered)):
        lines += [f"  {title}: {text}" for text in texts]
    return lines


def _as_dict(state: BudgetState, delta: float) -> dict[str, Any]:
    terms, claim, composed = state.terms, state.claim(delta), state.composed(delta)
    return {
        "budget": terms.to_dict(),
        "claim": claim.to_dict(),
        "spent_share": state.spent,
        "composed": None
        if composed is None
        else {
            "epsilon": composed.epsilon,
            "delta": delta,
            "accountant": composed.accountant,
            "condition": None if state.is_fixed_list else FIXED_LIST,
        },
        "runs": [
            {
                "run": charge.run,
                "name": charge.name,
                "mechanism": charge.mechanism,
                "level": str(charge.level),
                "releases": sum(charge.counts.values()),
                "epsilon": epsilon_of_run(charge, terms, delta),
                "reasons": list(charge.reasons),
            }
            for charge in state.runs.values()
        ],
    }
