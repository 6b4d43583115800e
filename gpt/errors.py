"""The exception for a user's mistake, and what a full disk looks like."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, beyond a quota, beyond a limit on file sizes


class UserError(Exception):
    """Something the user can put right: the message names the thing, its value, what was expected and what to do.

    Commands print the message as one line and exit with status 2. Any other exception is a bug or a fault of
    the machine that nobody foresaw, and keeps its traceback.
    """
