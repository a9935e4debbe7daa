"""The one exception type of the package, so that callers can tell bad input from a bug."""


class LlamaJaxError(ValueError):
    """Bad input: the message names the value, what was expected and the remedy.

    The command line prints it as one line and exits with 1; nothing else is caught there, so a bug keeps its
    traceback.
    """
