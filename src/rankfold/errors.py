"""The one error that means "the input is wrong": its message names the field, the value and the fix."""

from __future__ import annotations


class RankfoldError(ValueError):
    """A mistake of the user's, in one sentence. The command line prints it without a traceback; any other ValueError is a bug."""
