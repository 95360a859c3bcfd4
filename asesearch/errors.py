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


_NO_MEMORY = (
    "can't allocate memory",  # PyTorch on a CPU
    "Cannot allocate memory",  # the system, of a mapped file
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Error [CUDA]: out of memory",  # Triton
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",  # onnxruntime
)


#: How what `memory_told` says begins.
OUT_OF_MEMORY = "out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the machine itself: PyTorch has a class of its own for
    a GPU alone, and CUDA's libraries raise plain errors."""
    if isinstance(error, AseSearchError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and any(sign in told for sign in _NO_MEMORY)


def memory_told(error: BaseException) -> str:
    """What an error for which `is_out_of_memory` holds says, in one line."""
    reason = (str(error).strip().splitlines() or [""])[0].rpartition("err == 0. ")[2]
    return f"{OUT_OF_MEMORY}: {reason}" if reason else OUT_OF_MEMORY


def in_one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line of at most so many characters; its class where it says
    nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, at most so many characters of it, where more lines are
    of no use; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
