"""The exception for a user's mistake."""


class UserError(ValueError):
    """Something the user can put right: the message names the thing, its value, what was expected and what to do.

    Commands print the message as one line and exit with status 2. Any other exception is a bug or a fault of
    the machine and keeps its traceback.
    """
