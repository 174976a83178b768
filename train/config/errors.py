"""The one error that is for people."""


class InputError(ValueError):
    """What a person asked for cannot be done: the message names the value, the reason and the flag or file to mend."""
