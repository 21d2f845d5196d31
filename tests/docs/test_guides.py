"""The guides' commands: those that can run here are run, in their order, in a folder that has `examples` and what the
guide itself makes; of the others, moray's options and the files they name are there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from guide_blocks import GUIDES, NEEDS, PROGRAMS, Block, blocks
from patience import PATIENCE_S
from ports import free_port
from repository import ROOT

from moray.batch.spec.sections import EngineSpec, WorkersSpec
from moray.jobs.cli import app

LINKED = ("examples", "jobs", "k8s", "benchmarks")
RUN = [guide for guide in GUIDES if any(block.is_shell and not block.needs for block in blocks(guide))]
QUICK = ("kubernetes.md", "security.md")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def name(guide: Path) -> str:
    return str(guide.relative_to(ROOT))


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_blocks_say_what_they_are(guide: Path) -> None:
    for block in blocks(guide):
        if block.is_shell:
            assert set(block.needs) <= NEEDS.keys(), f"{guide.name}:{block.line}: {block.info}"
        else:
            lines = [line for line in block.text.splitlines() if line.startswith(tuple(f"{p} " for p in PROGRAMS))]
            assert lines == [], f"{guide.name}:{block.line}: a command in a block that is not sh"


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_links_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", guide.read_text()):
        path, _, anchor = target.partition("#")
        there = guide.parent / path if path else guide
        assert there.exists(), f"{guide.name}: {target}"
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [slug(heading) for heading in headings], f"{guide.name}: {target}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_commands_are_such_as_there_are(guide: Path) -> None:
    for block in blocks(guide):
        where = f"{guide.name}:{block.line}"
        if block.is_shell:
            for command in block.commands():
                check(where, command)
        for line in re.findall(r"^\$ (moray .*)$", block.text, re.M):  # of a transcript
            check(where, Block(guide, block.line, "sh", line).commands()[0])


def test_commands_are_found() -> None:
    found = [command for guide in GUIDES for block in blocks(guide) if block.is_shell for command in block.commands()]
    assert sum(command[0] == "moray" for command in found) > 40
    assert {"python", "curl", "kubectl", "make"} <= {command[0] for command in found}
    (line,) = Block(ROOT, 1, "sh", "A=b moray run 'a b' --set x=1 > log  # why\n").commands()
    assert line == ["moray", "run", "a b", "--set", "x=1"]


def check(where: str, command: list[str]) -> None:
    program, *arguments = command
    if program == "moray":
        check_moray(where, arguments)
    elif program == "make":
        assert set(arguments) <= TARGETS, f"{where}: {command}"
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), f"{where}: {command}"
    for word in arguments:
        if word.startswith(("k8s/", "jobs/examples/", "examples/", "benchmarks/")):
            assert list(ROOT.glob(word)), f"{where}: {word} is not there"


def check_moray(where: str, arguments: list[str]) -> None:
    """It parses: command, options, number of arguments. Nothing is run."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    if arguments == ["--version"] or "--help" in arguments:
        return
    command = group.commands[arguments[0]]
    try:
        command.make_context(arguments[0], arguments[1:])
    except click.ClickException as error:
        pytest.fail(f"{where}: moray {' '.join(arguments)}: {error.message}")


def test_every_engine_and_worker_key_is_explained() -> None:
    text = (ROOT / "docs/tuning.md").read_text()
    keys = [f"engine.{key}" for key in EngineSpec.model_fields]
    keys += [f"workers.{key}" for key in WorkersSpec.model_fields]
    missing = [key for key in keys if f"`{key}`" not in text and f"`.{key.partition('.')[2]}`" not in text]
    assert missing == []


@pytest.mark.parametrize(
    "guide", [pytest.param(g, id=name(g), marks=[] if g.name in QUICK else pytest.mark.slow) for g in RUN]
)
def test_commands_run(guide: Path, tmp_path: Path) -> None:
    for folder in LINKED:
        (tmp_path / folder).symlink_to(ROOT / folder)
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    bare = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    script = write_script(guide)
    if re.search("kubectl|--kuberay", script) and shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=bare | own,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def write_script(guide: Path) -> str:
    """The guide's blocks as one bash script that ends at the first command which does not end as it should: with 0, or
    as a comment behind it says."""
    port = str(free_port())
    parts = ["set -mx -e -o pipefail", "trap 'ended=$?; set +e; kill $(jobs -p) 2> /dev/null; wait; exit $ended' EXIT"]
    for block in blocks(guide):
        if not block.is_shell or block.needs:
            continue
        text = re.sub(
            r"^(.*\S)\s+# exit code (\d+).*$", r"code=0; \1 || code=$?; test $code = \2", block.text, flags=re.M
        )
        text = re.sub(r"^moray serve(?! --help)", f"moray serve --port {port}", text, flags=re.M)
        parts.append(text.replace("localhost:8000", f"localhost:{port}"))
    return "\n".join(parts)
