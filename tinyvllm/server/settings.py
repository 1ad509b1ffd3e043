"""The server's settings: limits, timeouts and access. Checked once, when the flags are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyvllm.errors import TinyvllmError

API_KEY_VARIABLE = "TINYVLLM_API_KEY"  # environment variable: accepted API keys, separated by whitespace
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")  # names of the loopback address
APIS = ("openai", "anthropic", "ollama")  # whose routes a server may have
# A stop takes at most 5 s after the drain: of these, the engine's last step has the first, and clients that still read
# their last bytes have the second. See also server/stop_clock.py, which ends what takes longer.
ENGINE_END_S = 2.5
LAST_WRITES_S = 1
MIN_KEY_CHARS = 8  # a shorter one can be guessed over the network


@dataclass(frozen=True)
class Cors:
    """Which origins' pages may call this server, besides its own. None, unless they are listed."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False


@dataclass(frozen=True)
class ServerSettings:
    """Limits and timeouts of one server. None means no limit. Times are in seconds."""

    max_num_queued_requests: int | None = 2048  # sequences beyond those that can run; the most that one call may have
    max_num_queued_tokens: int | None = None  # prompt tokens of sequences without output
    max_connections: int | None = None  # of all front-ends; None: as many as the limit of open files allows
    max_body_bytes: int = 16 * 2**20  # a few million tokens of text, more than any context that a laptop serves
    clamp_max_tokens: bool = False  # a max_tokens that the context has no room for becomes the room; else it is refused
    request_timeout_s: float | None = None  # from arrival to the last token
    idle_timeout_s: float | None = 60.0  # without a byte sent or read, in the middle of a request or response
    keepalive_s: float | None = 15.0  # a stream that is silent for so long sends a comment
    watchdog_timeout_s: float | None = 300.0  # a step that takes longer makes /health report a stalled engine
    shutdown_timeout_s: float = 25.0  # for running requests after a signal; below the 30 s that orchestrators allow
    stats_interval_s: float | None = 10.0  # between status lines in the log
    log_requests: bool = False  # log prompts and settings of requests
    allow_runtime_lora: bool = False  # allow /v1/load_lora_adapter and /v1/unload_lora_adapter
    enable_profiling: bool = False  # allow /start_profile and /stop_profile
    apis: tuple[str, ...] = APIS
    model_aliases: tuple[str, ...] = ()  # further names of the served model
    api_keys: tuple[str, ...] = ()
    cors: Cors = Cors()
    allowed_hosts: tuple[str, ...] | None = None  # host names that the server answers to; None: any

    def __post_init__(self) -> None:
        def check(ok: bool, flag: str, value: object, remedy: str) -> None:
            if not ok:
                raise TinyvllmError(f"--{flag} is {value}: {remedy}")

        for flag, count in (
            ("max-num-queued-requests", self.max_num_queued_requests),
            ("max-num-queued-tokens", self.max_num_queued_tokens),
        ):
            check(count is None or count >= 0, flag, count, "give 0 or more, or leave it out")
        count = self.max_connections
        check(count is None or count >= 1, "max-connections", count, "give 1 or more, or leave it out")
        check(self.max_body_bytes >= 1024, "max-body-bytes", self.max_body_bytes, "give at least 1024")
        check(self.shutdown_timeout_s >= 0, "shutdown-timeout", self.shutdown_timeout_s, "give 0 seconds or more")
        for flag, seconds in (
            ("request-timeout", self.request_timeout_s),
            ("idle-timeout", self.idle_timeout_s),
            ("sse-keepalive-interval", self.keepalive_s),
            ("watchdog-timeout", self.watchdog_timeout_s),
            ("log-stats-interval", self.stats_interval_s),
        ):
            check(seconds is None or seconds > 0, flag, seconds, "give a number of seconds above 0, or 0 for none")
        if self.cors.credentials and "*" in self.cors.origins:
            raise TinyvllmError("--allow-credentials with --allowed-origins '*' would admit every page: list origins")


def gather_api_keys(given: list[str], file: str | None, environment: str | None) -> tuple[str, ...]:
    """The keys of the flag, the file (one per line; # starts a comment line) and the environment, without duplicates.

    Raises TinyvllmError, whose message never contains a key.
    """
    keys = [key.strip() for key in given]
    if file is not None:
        keys += _read_keys(file)
    if environment is not None:
        keys += environment.split()
    for key in keys:
        if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise TinyvllmError(
                f"an API key has {len(key)} characters: use at least {MIN_KEY_CHARS} printable ASCII ones and no spaces"
            )
    return tuple(dict.fromkeys(keys))


def _read_keys(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TinyvllmError(f"--api-key-file {file} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:  # an empty file would silently open the server to everyone
        raise TinyvllmError(f"--api-key-file {file} has no key: write one per line")
    return keys
