"""The errors a caller may want to tell apart; the command line prints the first three as one line, exit code 2."""


class ConfigurationError(ValueError):
    """A setting that cannot work: the message says what was expected, what was given, and how to mend it."""


class DataError(ConfigurationError):
    """A data file that is missing, truncated, corrupt or of the wrong shape."""


class LedgerError(ConfigurationError):
    """A privacy ledger that cannot be trusted: unreadable, altered, or in use by another process."""


class BudgetExceededError(ConfigurationError):
    """A run that would cross the budget of its data set: the message says what is left and what would fit."""


class PrivacyProtocolError(RuntimeError):
    """The release protocol was broken: no privatizer, two releases, an unreleased gradient, or a crossed budget."""


class PeerError(RuntimeError):
    """Another process of this run failed or is gone; what went wrong is told there."""
