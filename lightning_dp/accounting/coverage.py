"""What an epsilon does not speak of."""

from collections.abc import Sequence

from lightning_dp.accounting.composition import Counts

_FLOATING_POINT = "the gap between real-valued noise and the floating-point sampler"
_TIME = "time and memory that the run took"
_TIME_OF_A_CHOICE = (
    "time and memory that the choice took, as dates of its files tell it too: it betrays roughly how many runs were "
    "made, and the price is that of a number which nobody learns"
)
_LAST_BITS = "the last bits of a row, where floating-point kernels let them depend on who else takes part"

DEFAULT_NOT_COVERED: tuple[str, ...] = (
    "the choice of hyper-parameters, and of when to stop, if it looked at the private records",
    "the set of labels and the number of records, which are treated as public",
    "held-out records: numbers by which they judge what was released have no noise",
    _FLOATING_POINT,
    _TIME,
    "what an author's code calls public: initial weights, PublicRows, PublicSamples, Released.map, log names",
    "other runs on the same records (each ledger speaks for itself)",
)
"""What an epsilon of ours never covers unless a method says otherwise; see `default_not_covered`."""


def default_not_covered(counts: Counts) -> tuple[str, ...]:
    """Return what an epsilon of these releases does not cover.

    Where all noise was drawn in whole numbers, exactly and onto exact sums, the gap of floating-point noise is closed;
    what remains of floating point is how the rows themselves were computed.

    Args:
        counts: The releases.
    """
    is_exact = bool(counts) and all(event.is_exact for event, _ in counts)
    return tuple(_LAST_BITS if is_exact and text == _FLOATING_POINT else text for text in DEFAULT_NOT_COVERED)


def beyond_the_usual(not_covered: Sequence[str] | None) -> tuple[str, ...]:
    """Return what the list of one run names beyond the usual: whoever speaks of several runs repeats it.

    Args:
        not_covered: The list, None for the usual one.
    """
    return tuple(text for text in not_covered or () if text not in {*DEFAULT_NOT_COVERED, _LAST_BITS})


def selection_not_covered(counts: Counts, *, is_random: bool) -> tuple[str, ...]:
    """Return what an epsilon of a choice among runs does not cover, apart from its score.

    Args:
        counts: What the choice is charged.
        is_random: The number of runs is random, and must stay unknown.
    """
    usual = [text for text in default_not_covered(counts) if not text.startswith("the choice of hyper")]
    first = "the choice of the candidates and of how to draw them, if it looked at the private records"
    return (first, *(_TIME_OF_A_CHOICE if is_random and text == _TIME else text for text in usual))
