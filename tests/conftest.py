"""What all tests share: the device, the versions in the report's head, and model files that are made or found once."""

from __future__ import annotations

import faulthandler
import functools
import gc
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

# Before tinyvllm.ops is imported, which is before tinygrad is: the tests' figures are those of the CPU device.
os.environ.setdefault("DEV", "CPU")
# What the command line prints must not depend on the terminal that the tests run in.
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "120"

import hypothesis
import pytest

from tinyvllm.config import CACHE_DIR_VARIABLE, CORES_VARIABLE, ModelFiles

# Where there is a worker for each core, an engine on all cores would mostly wait for those that others hold. Kernels
# are compiled where they are needed, since compiling processes would import tinygrad and build its rewriting rules for
# every engine anew, which takes over two seconds: tests of compiling processes take the fixture of this name.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault(CORES_VARIABLE, "1")
    os.environ.setdefault("PARALLEL", "0")  # tinygrad's

# Tests speak to this machine alone, and a proxy would answer for it.
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)

# Most kernels are compiled by clang_quick.sh, and what it returns is kept where only tests look for it: a file for each
# choice of flags, since tinygrad looks for a program by its source alone.
QUICK, AS_FOR_USERS = "-O1", ""
PROGRAM_FILES: dict[str, str] = {}
PROGRAMS: dict[str | None, dict[Any, Any]] = {}  # tinygrad's in memory, of flags that are not in use
if os.environ["DEV"].startswith("CPU"):
    os.environ.setdefault("TESTS_CC", os.environ.get("CC", "clang"))  # a worker has it
    os.environ["CC"] = str(Path(__file__).parent / "clang_quick.sh")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinygrad"
    PROGRAM_FILES = {QUICK: str(caches / "tests.db"), AS_FOR_USERS: str(caches / "tests_as_for_users.db")}
    os.environ.setdefault("CACHEDB", PROGRAM_FILES[AS_FOR_USERS])  # tinygrad's

# Kernels are compiled by rewriting millions of small objects, hardly any of them in cycles: Python's own threshold of
# 700 costs a fifth of the time.
gc.set_threshold(200_000, 20, 1000)

pytest.register_assert_rewrite("tests.ops", "tests.builders")

# The same examples in every run, and no limit on the time of one, or of making it: what fails here fails everywhere.
hypothesis.settings.register_profile(
    "tinyvllm",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tinyvllm")

CERTIFICATES = os.environ.get("SSL_CERT_FILE")
SHOWN_VERSIONS = ("tinygrad", "numpy", "tokenizers", "safetensors", "gguf", "fastapi", "openai")
STDERR = pytest.StashKey[int]()
GRACE_S = 30.0  # for a test to fail by the limit's signal, and for its teardown
REFERENCE = Path(__file__).parent / "data" / "smollm2_reference.json"


def pytest_report_header() -> str:
    installed = {distribution.name for distribution in distributions()}  # on a GPU machine perhaps not all are
    versions = ", ".join(f"{name} {version(name)}" for name in SHOWN_VERSIONS if name in installed)
    return f"device {os.environ['DEV']}, Python {platform.python_version()}, {versions}"


def pytest_configure(config: pytest.Config) -> None:
    from tests import sweeps
    from tests.cpu_seconds import CpuSeconds

    sweeps.is_sweeping = "not sweep" not in config.option.markexpr
    config.stash[STDERR] = os.dup(2)  # where capturing does not reach
    config.pluginmanager.register(CpuSeconds())
    if PROGRAM_FILES and shutil.which(os.environ["TESTS_CC"]) is None:
        raise pytest.UsageError(
            f"tests compile kernels with {os.environ['TESTS_CC']!r}, which is not on the PATH: install clang (Debian: "
            "apt-get install clang), or name it in CC"
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile the kernels of real models, and those that are C for certain processors, as they are compiled for users:
    clang optimizes less for all others."""
    is_quick = item.path.parent.name != "cpu" and item.get_closest_marker("model") is None
    flags = QUICK if is_quick else AS_FOR_USERS
    if flags != (before := os.environ.get("TESTS_CFLAGS")):
        os.environ["TESTS_CFLAGS"] = flags
        if os.environ.get("CACHEDB") in PROGRAM_FILES.values():  # nobody has named another one
            os.environ["CACHEDB"] = PROGRAM_FILES[flags]
            if "tinygrad" in sys.modules:
                _change_programs(before, flags)


def _change_programs(before: str | None, flags: str) -> None:
    """Those that tinygrad has in memory, which later tests with the same flags find again, and the file from which it
    reads others."""
    from tinygrad import helpers
    from tinygrad.codegen import to_program_cache

    PROGRAMS[before] = dict(to_program_cache)
    to_program_cache.clear()
    to_program_cache.update(PROGRAMS.pop(flags, {}))
    helpers.CACHEDB, helpers._db_connection = os.environ["CACHEDB"], None
    helpers._db_tables.clear()
    if "tinyvllm.device.disk_cache" in sys.modules:  # which has opened the other one for any thread
        from tinyvllm.device.disk_cache import share_disk_cache

        share_disk_cache()


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    os.close(config.stash[STDERR])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to workers, as their fixtures are shared, the longest first. A device's tests share nothing but
    the device, and half of them are in one file: they are given out one by one."""
    from tests.workers import FileScheduler

    return None if config.option.markexpr.startswith("gpu") else FileScheduler(config, log)


def pytest_collection_finish() -> None:
    """Compile as compiling processes do, which ask less of tinygrad: a tenth of the time of a large kernel. Let clients
    of HTTP share what they trust. And wait for what is slow."""
    from tests.patience import be_patient

    be_patient()
    if "httpx" in sys.modules:
        _share_certificates()
    if "tinygrad" in sys.modules:
        from tinyvllm.device.rewriting import rewrite_faster

        rewrite_faster()


def _share_certificates() -> None:
    """Each client would read those of the public authorities anew, 36 ms of a core, and tests make some thousand."""
    from httpx._transports import default

    module: Any = default  # it does not export the function
    read = module.create_ssl_context
    read_once = functools.cache(read)

    def shared(verify: Any, cert: Any, trust_env: bool) -> Any:
        is_usual = verify is True and cert is None and os.environ.get("SSL_CERT_FILE") == CERTIFICATES
        return (read_once if is_usual else read)(verify=verify, cert=cert, trust_env=trust_env)

    module.create_ssl_context = shared


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are named by their argument: each worker collects the tests itself, and compressed data may hold a time."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Iterator[None]:
    """End the run where the time limit's signal cannot end a test: a call that never returns to Python, or a test that
    took the signal's handler for itself. The tracebacks of all threads go to stderr first."""
    result = yield
    if hasattr(item, "cancel_timeout"):  # it has a limit here
        faulthandler.dump_traceback_later(settings.timeout + GRACE_S, exit=True, file=item.config.stash[STDERR])
    return result


@pytest.hookimpl(wrapper=True)
def pytest_timeout_cancel_timer() -> Iterator[None]:
    faulthandler.cancel_dump_traceback_later()
    return (yield)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sets up logging for the whole process, and others' tests in the same process look at records."""
    root, names = logging.getLogger(), ("tinyvllm", "uvicorn.access")
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).propagate = True  # uvicorn changes it where no access is logged


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Engines of one run share their compiled programs, and leave the user's alone."""
    base = tmp_path_factory.getbasetemp()
    # a worker's folder lies in its run's
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ[CACHE_DIR_VARIABLE] = str(folder)


@pytest.fixture
def compiling_processes() -> Iterator[None]:
    """Engines have processes that trace and compile, in every run."""
    yield from _with_compiling_processes()


@pytest.fixture(scope="module")
def shared_compiling_processes() -> Iterator[None]:
    """The same ones for a file's tests: their template takes over two seconds to start."""
    yield from _with_compiling_processes()


def _with_compiling_processes() -> Iterator[None]:
    from tinygrad.helpers import PARALLEL, Context

    from tinyvllm.device.compiling import _end_pool

    with Context(PARALLEL=max(1, PARALLEL.value)):
        yield
        _end_pool()


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    """The default model's files. A test that takes them carries the mark `model`."""
    from tinyvllm.errors import ModelError
    from tinyvllm.storage.catalog import DEFAULT_MODEL
    from tinyvllm.storage.resolve import resolve_model

    try:
        return resolve_model(DEFAULT_MODEL)
    except ModelError as error:
        pytest.fail(f"{error}\nscripts/test.sh fetches it; by hand: tinyvllm pull {DEFAULT_MODEL}", pytrace=False)


@pytest.fixture(scope="session")
def smollm2_reference() -> dict[str, Any]:
    """What transformers generates with the default model; scripts/make_reference.py wrote it and names its fields."""
    reference: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    return reference


@pytest.fixture(scope="session")
def tiny_hf_files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A tiny llama in Hugging Face's format, for tests that only read it; others use tests.builders."""
    from tests.builders import write_tiny_hf_llama

    return write_tiny_hf_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gguf_files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The same weights, quantized, as one .gguf file."""
    from tests.builders import write_tiny_gguf

    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny-llama.gguf")
