"""What can be wrong with what a user gave us, said so that they can mend it.

Belongs here: the exception types that end a command with one clear line instead of a traceback.
"""


class M2MError(Exception):
    """Something the user can act on; the command line prints its text alone and exits with 2."""


class InputError(M2MError):
    """A file or folder given to the project is missing, malformed or of the wrong kind."""


class ConfigError(M2MError):
    """A profile or an override names an unknown setting or has a value that is not allowed."""


class ArtifactError(M2MError):
    """An output folder is missing, not whole, or was made by something else than what is asked for."""


class CheckFailed(M2MError):
    """A stage ran, but what it made does not hold what it promises; the output is not put in place."""
