"""The image and the manifest of scripts/deploy: facts that no linter knows. docs/SCALING.md names the linters."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.server.fake_engine import FakeEngine
from tinyvllm.server.app import make_app

DEPLOY = Path(__file__).parent.parent / "scripts" / "deploy"


def read_deployment() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    return dict(deployment["spec"]["template"]["spec"])


def test_the_image_passes_its_arguments_to_the_server(tmp_path: Path) -> None:
    line = re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    command = tmp_path / "tinyvllm"
    command.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TINYVLLM_DEVICE": "CPU"}
    said = subprocess.check_output([*json.loads(line[1]), "a model", "--seed", "1"], env=environment, text=True)
    assert said.splitlines() == [
        "serve",
        "a model",
        "--seed",
        "1",
        *["--device", "CPU", "--host", "0.0.0.0", "--pull"],
    ]


def test_a_pod_has_time_to_answer_before_it_is_killed() -> None:
    pod = read_deployment()
    (container,) = pod["containers"]
    arguments = container["args"]
    shutdown_s = int(arguments[arguments.index("--shutdown-timeout") + 1])
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= shutdown_s + pre_stop_s + 10


def test_probes_ask_for_routes_that_exist() -> None:
    (container,) = read_deployment()["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    known = make_app(FakeEngine()).openapi()["paths"]  # type: ignore[arg-type]
    assert {"/health", "/ready", "/metrics"} <= set(known)
