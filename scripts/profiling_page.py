"""Runs every command of docs/PROFILING.md (`--commands`), and writes its table of the documents that this project began
with: what their tools do, our command for it, and the first lines that it prints (`--table`).

python scripts/profiling_page.py --commands     # some minutes; exits with code 1 if a command fails
python scripts/profiling_page.py --table
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "PROFILING.md"
BEGIN, END = "<!-- documents: scripts/profiling_page.py --table -->", "<!-- end of documents -->"
LIMIT_S = 600  # of one command
WIDTH, NUM_LINES = 110, 3  # of the output's lines in the table
# Commands that need what a machine may not have, by a part of them, and what that is.
NEEDS = {
    "DEV=CUDA": "an NVIDIA GPU",
    "CPU,CL": "an OpenCL device",
    "http://other:8000": "another server",
    "/tmp/benchy": "a package of another benchmark",
    "/tmp/mlx": "MLX",
    "mlx-": "MLX's runs",
    "llama.json": "llama.cpp's runs",
    "smollm2-135m-instruct-mlx-4": "a model that `tinyvllm quantize --to mlx-4` writes",
    "ours.json llama.json": "llama.cpp's runs",
}
NOISE = re.compile(r"^(\d{4}-\d\d-\d\d |\S+ +[━╸╺ ]+)|^\s*$")  # log lines, progress, and empty ones


@dataclass(frozen=True)
class Tool:
    """What a tool of a document does, and the command that does it here. `shown`: where the lines to show begin."""

    document: str
    does: str
    command: str
    shown: str = ""


LATENCY = "tinyvllm bench latency --prefill 64 --batch 1 --context 64"
THROUGHPUT = "tinyvllm bench throughput --num-prompts 4 --input-len 32 --output-len 16"
LEDGER = "tinyvllm profile --json step.json && tinyvllm bench ledger step.json"
TRACE = (
    "NO_COLOR=1 DEBUG=2 tinyvllm generate --raw --prompt 'The sky is' --max-tokens 4 2>&1"
    " | grep -E '(scheduled|copy|tm.*ms|GFLOPS|GB/s)' | tail -3"
)
TOOLS = (
    Tool(
        "Agave's profiling", "`--profile`: time of each operation and layer of a token", "tinyvllm profile --by layer"
    ),
    Tool("", "dispatches, barriers and syncs of a token, and their limits", "tinyvllm profile", "a step's counts"),
    Tool("", "missing kernels are errors, never a silent fallback", "tinyvllm doctor", "fused kernels"),
    Tool("ZigLlama's profiler", "named blocks: count, mean, median, p95, p99", LATENCY),
    Tool("", "peak and change of memory by block", "tinyvllm bench breakdown", "memory"),
    Tool("", "benchmark runner: warm-up, repeats, throughput", THROUGHPUT),
    Tool("", "roofline and bottleneck of an operation", "tinyvllm profile", "floor"),
    Tool("akunu, profiling", "`akunu_bench`: prefill and decode as llama-bench prints them", f"{LATENCY} --markdown"),
    Tool("", "`akunu_benchmark`: real prompts, time to first token", "tinyvllm bench breakdown"),
    Tool("", "`akunu_profile`: kernels of a step, sorted by cost", "tinyvllm profile --by kernel"),
    Tool("", "the kernels of a Mac that is not here", "tinyvllm profile --predict m4 --shape tinyllama-1.1b"),
    Tool("tinyvllm's first analysis", "`DEBUG=2`: every kernel with its time and rates", TRACE),
    Tool("", "the share of copies, scheduling and kernels in a token", "tinyvllm bench breakdown --per-token", "token"),
    Tool("akunu, optimization patterns", "fusion: what it saves", "tinyvllm profile --unfused", "fused"),
    Tool("", "what to optimize first, and what it would gain", LEDGER, "entry"),
)


@dataclass(frozen=True)
class Result:
    command: str
    status: int | None  # None: not run
    output: str
    why: str = ""


def run(command: str, folder: Path) -> Result:
    """A command line in a folder that has the checkout's files, with tinyvllm of this environment first on the path."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "160"}
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
        return Result(command, 124, output, f"longer than {LIMIT_S} s")
    return Result(command, process.returncode, output)


def make_folder() -> Path:
    """A folder for what commands write, with links to the checkout's own."""
    folder = Path(tempfile.mkdtemp(prefix="profiling-page-"))
    for name in ("scripts", "tests", "models", "tinyvllm", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


# -- every command of the page ---------------------------------------------------------------------------------------


def blocks(text: str) -> list[str]:
    """The shell blocks of the page, outside the generated table."""
    before, _, after = text.partition(BEGIN)
    text = before + after.partition(END)[2]
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def missing(command: str) -> str:
    """What a command needs that this machine lacks; empty if it can run."""
    return next((need for part, need in NEEDS.items() if part in command), "")


def run_blocks() -> Iterator[Result]:
    """Each block by one shell, whose background servers end with it, without the lines that cannot run here."""
    for block in blocks(PAGE.read_text()):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
        kept = []
        for line in lines:
            if why := missing(line):
                yield Result(line, None, "", f"needs {why}")
            else:
                kept.append(line)
        if not kept:
            continue
        folder = make_folder()
        wait = "for _ in $(seq 120); do curl -sf http://127.0.0.1:8000/health >/dev/null && break; sleep 1; done"
        script = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null' EXIT"]
        for line in kept:
            script.append(line)
            if re.search(r"&\s*(#.*)?$", line):
                script.append(wait if "serve" in line else "sleep 3")
        found = run("\n".join(script), folder)
        shutil.rmtree(folder, ignore_errors=True)
        yield Result("\n".join(kept), found.status, found.output, found.why)


def show_commands() -> int:
    failed = 0
    for result in run_blocks():
        status = "not run" if result.status is None else "ok" if result.status == 0 else f"failed ({result.status})"
        print(
            f"{status}{f', {result.why}' if result.why else ''}:\n  " + result.command.replace("\n", "\n  "), flush=True
        )
        if result.status:
            failed += 1
            print("\n".join(result.output.splitlines()[-15:]))
    print(f"{failed} failed")
    return min(failed, 1)


# -- the table -------------------------------------------------------------------------------------------------------


def first_lines(output: str, shown: str) -> list[str]:
    """The first lines of an answer, from the one that has `shown` in it on, without log lines and progress."""
    lines = [line.rstrip() for line in output.splitlines() if not NOISE.search(line)]
    start = next((place for place, line in enumerate(lines) if shown in line), 0)
    return [" ".join(line.split())[:WIDTH] for line in lines[start : start + NUM_LINES]]


def make_table() -> str:
    rows = ["| document | what its tool does | here | the first lines of the answer |", "|---|---|---|---|"]
    outputs: dict[str, Result] = {}
    folder = make_folder()
    for tool in TOOLS:
        result = outputs.setdefault(tool.command, outputs.get(tool.command) or run(tool.command, folder))
        if result.status:
            raise SystemExit(f"{tool.command} failed:\n{result.output[-2000:]}")
        lines = "<br>".join(f"`{line.replace('|', '¦')}`" for line in first_lines(result.output, tool.shown))
        command = tool.command.replace("|", "\\|")
        rows.append(f"| {tool.document} | {tool.does} | `{command}` | {lines} |")
        print(rows[-1], flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return "\n".join(rows)


def write_table() -> int:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{make_table()}\n\n{END}{after}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--commands", action="store_true", help="run every command of the page")
    choice.add_argument("--table", action="store_true", help="run the commands of the table, and write it")
    return show_commands() if parser.parse_args().commands else write_table()


if __name__ == "__main__":
    sys.exit(main())
