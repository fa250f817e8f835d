"""The one exception a user is meant to read."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input, told in one line: what it is, what is wanted and how to mend it.

    The command line prints the message alone and exits with code 2; inside FastDeploy the message
    ends the start-up. It is never used for a defect of this package.
    """
