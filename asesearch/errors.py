"""Exception classes. Every message gives the rule, the value got, and the fix."""


class AseSearchError(Exception):
    """Base of all errors asesearch raises on purpose; the CLI prints it as one line."""


class ConfigError(AseSearchError, ValueError):
    """A study file, option or argument breaks a rule."""


class ScheduleError(AseSearchError, ValueError):
    """An exit schedule breaks a rule, or does not fit the network it is used with."""


class DataError(AseSearchError, ValueError):
    """A data set is missing, unreadable, corrupt or of the wrong shape."""


class CheckpointError(AseSearchError, RuntimeError):
    """A checkpoint or bundle is unreadable, corrupt or does not fit the network."""


class EvaluationError(AseSearchError, RuntimeError):
    """A metric can't be computed, or two results may not be compared."""


class WriteError(AseSearchError, OSError):
    """A file or folder can't be written."""


class StudyError(AseSearchError, RuntimeError):
    """A study can't be opened, resumed or continued."""


class TrainingDiverged(AseSearchError, RuntimeError):
    """The loss or a gradient stopped being finite; the message says at which step."""
