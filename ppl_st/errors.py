"""The one exception that means "the input or the request is wrong", raised by every room and shown by the CLI without a traceback."""


class UserError(ValueError):
    """A mistake the user can mend.

    The message names the file or role, the key, the offending values and the remedy; the command line prints it and exits with code 2.
    """
