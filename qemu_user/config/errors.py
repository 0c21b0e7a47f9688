"""ConfigError: what the user asked for cannot be. Its text is one sentence that says what is allowed."""

from __future__ import annotations


class ConfigError(Exception):
    """Raised by the validation and by the option parser; printed as it is, exit status 1 (2 for the
    command line).
    """
