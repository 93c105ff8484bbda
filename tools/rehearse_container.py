"""Runs a Dockerfile without Docker and without its base image, which cannot be pulled everywhere.

    unshare --mount python tools/rehearse_container.py Dockerfile --bundle BUNDLE --port 8001

Each stage gets a root of its own: this machine's files, read-only, under a layer in memory (overlayfs), in which the
stage's steps run by `chroot` as Docker would run them. Of the base image only Python is taken for granted: this one's.
Then the entry point starts as the image's user; once the health check passes, a text is embedded, and SIGTERM ends it.
Prints one JSON document. Needs root, in a mount namespace of its own (`unshare --mount`); leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

WAIT = 300.0
"""Seconds until a start or a stop has failed: far more than either takes, on a loaded machine too."""


@dataclass
class Stage:
    """One stage: its root folder, and what its instructions have set so far."""

    root: Path
    arguments: dict[str, str]
    environment: dict[str, str]
    folder: str = "/"
    user: str = "0:0"
    health: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, command: list[str], **more: object) -> subprocess.Popen[bytes]:
        """A process in the root, as the stage's user and with its environment."""
        variables = [f"{key}={value}" for key, value in {**self.arguments, **self.environment}.items()]
        inside = ["env", "-i", f"--chdir={self.folder}", *variables, *command]
        return subprocess.Popen(["chroot", f"--userspec={self.user}", str(self.root), *inside], **more)  # type: ignore[call-overload]

    def path(self, name: str) -> Path:
        return self.root / os.path.normpath(os.path.join(self.folder, name)).lstrip("/")  # noqa: PTH118


def new_root(parent: Path, number: int) -> Path:
    """This machine's files under a layer in memory."""
    layer = parent / str(number)
    for name in ("upper", "work", "root"):
        (layer / name).mkdir(parents=True)
    options = f"lowerdir=/,upperdir={layer / 'upper'},workdir={layer / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(layer / "root")], check=True)
    for name in ("dev", "proc"):
        subprocess.run(["mount", "--rbind", f"/{name}", str(layer / "root" / name)], check=True)
    for folder in (Path(sys.base_prefix), *Path(sys.base_prefix).parents):  # the image's Python is for everyone
        inside = layer / "root" / str(folder).lstrip("/")
        inside.chmod(inside.stat().st_mode | 0o555)
    return layer / "root"


def started(stage: Stage) -> None:
    """The environment that the base image would have, and what pip needs to find its index here."""
    stage.environment["PATH"] = f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"
    passed = ("PIP_", "SSL_CERT", "HTTP", "HTTPS", "NO_PROXY", "http", "https", "no_proxy", "REQUESTS_CA")
    stage.environment |= {key: value for key, value in os.environ.items() if key.startswith(passed)}


def expanded(text: str, stage: Stage) -> str:
    for key, value in {**stage.arguments, **stage.environment}.items():
        text = text.replace(f"${{{key}}}", value).replace(f"${key}", value)
    return text


def copy(stage: Stage, words: list[str], context: Path, stages: dict[str, Stage]) -> None:
    source = context
    if words[0].startswith("--from="):
        source = stages[words.pop(0).partition("=")[2]].root
    *names, target = words
    for name in names:
        found, place = source / name.lstrip("/"), stage.path(target)
        if found.is_dir():
            shutil.copytree(
                found, place, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            place = place / found.name if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, place)


def health_command(value: str) -> list[str]:
    """The JSON form behind the options of HEALTHCHECK."""
    found: list[str] = json.loads(value.partition("CMD")[2])
    return found


def execute(stage: Stage, instruction: str, value: str, context: Path, stages: dict[str, Stage]) -> None:
    """One instruction that is not FROM."""
    if instruction == "RUN":
        code = stage.run(["/bin/sh", "-c", value], stdout=sys.stderr).wait()
        if code:
            sys.exit(f"RUN {value} ended with {code}")
    elif instruction == "COPY":
        copy(stage, shlex.split(value), context, stages)
    elif instruction == "ARG":
        name, _, default = value.partition("=")
        stage.arguments.setdefault(name, "".join(shlex.split(default)))
    elif instruction == "ENV":
        pairs = dict(word.split("=", 1) for word in shlex.split(value))
        stage.environment |= {key: expanded(text, stage) for key, text in pairs.items()}
    elif instruction == "WORKDIR":
        stage.folder = value
        stage.path(".").mkdir(parents=True, exist_ok=True)
    elif instruction == "USER":
        stage.user = value
    elif instruction == "HEALTHCHECK":
        stage.health = health_command(value)
    elif instruction in ("ENTRYPOINT", "CMD"):
        setattr(stage, "entry" if instruction == "ENTRYPOINT" else "command", json.loads(value))
    elif instruction not in ("EXPOSE", "VOLUME", "STOPSIGNAL", "COMMENT", "LABEL"):
        sys.exit(f"{instruction} is not known here; teach tools/rehearse_container.py what it does")


def build(dockerfile: Path, layers: Path) -> tuple[Stage, list[str]]:
    """Every stage in turn; the last one, and the RUN steps that were executed."""
    parser = DockerfileParser(fileobj=dockerfile.open("rb"))
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    done: list[str] = []
    for step in parser.structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "FROM":
            current = Stage(new_root(layers, len(stages)), {}, {})
            stages[value.rpartition(" AS ")[2]] = current
            started(current)
        elif current is not None:  # an ARG before the first FROM chooses the base image
            execute(current, instruction, value, dockerfile.parent, stages)
            done += [value] if instruction == "RUN" else []
    if current is None:
        sys.exit(f"{dockerfile} has no FROM")
    return current, done


def embed(port: int) -> int:
    """How many numbers the service gives for a text."""
    body = json.dumps({"input": ["a cup"]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return len(json.load(answer)["data"][0]["embedding"])


def rehearse(stage: Stage, bundle: Path, port: int) -> dict[str, object]:
    """Start, wait for the health check, ask for something, and stop."""
    shutil.copytree(bundle, stage.root / "bundle")
    stage.environment["QPERT_PORT"] = str(port)
    service = stage.run([*stage.entry, "--port", str(port)], stdout=sys.stderr)
    checks, end = [], time.monotonic() + WAIT
    while time.monotonic() < end and service.poll() is None:
        checks.append(stage.run(stage.health, stderr=subprocess.DEVNULL).wait())
        if checks[-1] == 0:
            break
        time.sleep(0.5)
    if not checks or checks[-1]:
        service.kill()
        sys.exit(f"the health check never passed: {checks}; the service ended with {service.poll()}")
    user = Path(f"/proc/{service.pid}").stat().st_uid
    numbers = embed(port)
    service.terminate()
    code = service.wait(WAIT)
    after = stage.run(stage.health, stderr=subprocess.DEVNULL).wait()
    return {"user": user, "checks": checks, "numbers": numbers, "exit": code, "check_after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    layers = Path(tempfile.mkdtemp(prefix="qpert-container-"))
    layers.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(layers)], check=True)
    try:
        stage, done = build(options.dockerfile.absolute(), layers)
        print(json.dumps({"run": done} | rehearse(stage, options.bundle, options.port)))
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(layers)], check=False)
        layers.rmdir()


if __name__ == "__main__":
    main()
