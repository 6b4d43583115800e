"""The exception for user errors."""


class UserError(Exception):
    """An error that the user can fix: the message says what is wrong, with the value, and what to
    do.

    Commands print the message as one line and exit with status 2. Any other exception is a bug or
    an unexpected machine failure and keeps its traceback.
    """
