"""The one family of errors that a caller can catch."""


class HireRewriteError(ValueError):
    """Bad input: the message names the site or argument, the reason, and what to change."""
