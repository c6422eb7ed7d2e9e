"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake the user can repair: a missing file, an empty folder, an option that cannot work.

    The message is one line: what is wrong, where, and the remedy. The command line prints it without a
    traceback and exits with code 2; every other exception is a bug and keeps its traceback.
    """
