"""Words of the messages that more than one package writes."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 release", "3 releases".

    Args:
        number: How many.
        noun: The noun of one; its plural ends in s.
    """
    return f"{number} {noun}{'s' * (number != 1)}"
