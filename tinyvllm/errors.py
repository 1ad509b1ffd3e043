"""Every error that tinyvllm raises on purpose. A message names the thing, the value, the limit and the remedy.

`server/failures.py` alone maps these to HTTP status codes; the command line prints them without a traceback.
"""


class TinyvllmError(Exception):
    """The root of all our errors."""


class RequestError(TinyvllmError):
    """The caller asked for something that cannot be done: HTTP 400. `param` is the offending request field, if any."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """Prompt and requested output do not fit into max_model_len, or can never fit into the KV pool."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelError(TinyvllmError):
    """A model cannot be found, downloaded, read or run."""


class UnsupportedModelError(ModelError):
    """An unknown architecture, quantization, rope type or file kind; the message lists the known ones."""


class WeightMismatchError(ModelError):
    """A tensor is missing, surplus or has the wrong shape; the message names it."""


class DownloadError(ModelError):
    """A download failed, was cut short or has the wrong checksum. Nothing is left behind."""


class CapacityError(TinyvllmError):
    """The device's memory cannot hold the weights and the KV blocks of one sequence; the message has the numbers."""


class DeviceError(TinyvllmError):
    """The device lacks something we need (a compiler, a driver, a feature), or a step failed on it."""


class CacheError(TinyvllmError):
    """A cache's folder or file cannot be trusted or used; the message says why and what to do."""


class ProfilingError(TinyvllmError):
    """A measurement cannot be made: another one is running, or its subject is unknown."""


class LostError(TinyvllmError):
    """The engine could not handle or answer a message of this caller, for a reason of its own; the engine goes on."""


class EngineDeadError(TinyvllmError):
    """The engine's thread has stopped; nothing more can be generated in this process."""


class InvariantError(TinyvllmError):
    """A bug in tinyvllm: a state that must not occur. The message has the numbers."""
