"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something only the user can put right: a bad file, a wrong option, a full disk.

    The message is one line that names the file or key, says what is wrong and what to do about it.
    Commands print it without a traceback and exit with code 2; nothing has been written by then.
    """
