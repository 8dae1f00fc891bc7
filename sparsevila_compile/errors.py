"""The one exception type that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: bad input, a missing file, an unsupported model.

    The message is one line and says which file and key, what is wrong, and what to do. The command
    line prints it without a traceback and exits with code 2; library callers get the exception.
    """


class GraphError(Exception):
    """A graph broke one of its own rules: a defect in a pass, never the user's fault."""
