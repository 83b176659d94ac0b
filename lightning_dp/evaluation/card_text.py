"""How a run card writes its numbers: one spelling for the table and the page."""

import math
from collections.abc import Mapping
from typing import Any


def is_proved(claim: Mapping[str, Any]) -> bool:
    """Tell whether the claim's level, an enum or its text, is PROVED: only then may an epsilon be shown."""
    return str(claim["level"]).upper() == "PROVED"


def ceil_text(epsilon: float | str) -> str:
    """Return epsilon with four decimals, rounded up: a printed epsilon must never be below the one spent.

    Example:
        >>> ceil_text(0.99991)
        '1.0000'
        >>> ceil_text(9.9872)
        '9.9872'
    """
    if isinstance(epsilon, str) or not math.isfinite(epsilon):
        return str(epsilon)
    text = f"{epsilon:.4f}"
    if float(text) < epsilon:
        text = f"{float(text) + 1e-4:.4f}"
    return text


def number_text(value: Any) -> str:
    """Return a number with four significant digits, thousands of a whole number apart; other values as text.

    Example:
        >>> number_text(0.87654), number_text(60000), number_text(1e-5)
        ('0.8765', '60,000', '1e-05')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def seconds_text(seconds: Any) -> str:
    """Return a duration as a reader says it.

    Example:
        >>> seconds_text(8.25), seconds_text(754)
        ('8.2 s', '12 min 34 s')
    """
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
