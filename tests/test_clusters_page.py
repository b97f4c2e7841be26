"""The page on clusters: every command is executed or marked as needing a cluster, and every message exists.

Schedulers are the stand-ins of ``tests/slurm.py`` and a ``qsub`` of one line. ``sslzoo fit`` and torchrun stop before
the training: their arguments are parsed, and recipe and number of processes are checked.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sslzoo
from tests.command import ROOT
from tests.slurm import Slurm

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
MARK = re.compile(r"# needs a (cluster|network|container runtime)")
EXECUTED = [block for block in BLOCKS if not MARK.search(block)]

# `sslzoo` and `python -m sslzoo`, which train nothing; a dry run and the doctor, tested elsewhere, would import torch.
_SSLZOO = """\
import json, os, sys
from pathlib import Path
from sslzoo.cli.main import _parse, main
from sslzoo.recipe.load import load_recipe
from sslzoo.processes.placement import check_world_size, place
args = _parse(sys.argv[1:])
if args.verb == "doctor":
    sys.exit(0)
if args.verb != "fit":
    sys.exit(main(sys.argv[1:]))
recipe = load_recipe(args.recipe, args.overrides).recipe
if place().starter != "alone":
    check_world_size(place(), recipe)
if args.out is not None and not args.dry_run:
    out = Path(os.environ["PAGE"] + str(args.out)) if args.out.is_absolute() else args.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").write_text(json.dumps({"exit_code": 75}, indent=2))
print("parsed", args.recipe)
"""
# torchrun with the options of the page, as the first rank of the first machine.
_TORCHRUN = """\
import argparse, os, subprocess, sys
parser = argparse.ArgumentParser()
parser.add_argument("--standalone", action="store_true")
parser.add_argument("--nnodes", type=int, default=1)
for name in ("--nproc-per-node", "--max-restarts"):
    parser.add_argument(name, type=int)
for name in ("--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"):
    parser.add_argument(name)
parser.add_argument("-m", dest="rest", nargs=argparse.REMAINDER)
args = parser.parse_args()
module, *arguments = args.rest
assert module == "sslzoo" and args.standalone != bool(args.rdzv_endpoint)
size = args.nproc_per_node
world = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": size, "WORLD_SIZE": size * args.nnodes, "MASTER_PORT": 1}
variables = {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
sys.exit(subprocess.run(["sslzoo", *arguments], env=os.environ | variables).returncode)
"""


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of the page's commands."""
    slurm = Slurm.create(tmp_path / "slurm")
    programs = {"sslzoo": _SSLZOO, "torchrun": _TORCHRUN, "qsub": "import sys; open(sys.argv[1])"}
    for name, code in programs.items():
        program = slurm.folder / "bin" / name
        source = slurm.folder / f"{name}_stand_in.py"
        source.write_text(code)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {source} "$@"\n')
        program.chmod(0o755)
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "methods", "recipes"))
    config = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "PAGE": str(tmp_path)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SSLZOO_")}
    return kept | slurm.environment | config | {"PYTHONPATH": paths}


@pytest.mark.parametrize("block", EXECUTED, ids=lambda block: block.split("\n")[0][:40])
def test_commands_are_executed(block: str, shell: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "sce").mkdir(parents=True)
    (tmp_path / "runs" / "sce" / "manifest.json").write_text(json.dumps({"exit_code": 75}, indent=2))
    script = f"set -e\n{block}\nwait\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=shell, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "job.pbs" in block:  # what qsub would run
        job = subprocess.run(
            ["bash", "job.pbs"],
            cwd=tmp_path,
            env=shell | {"PBS_O_WORKDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (job.returncode, job.stdout) == (0, "parsed sce_in1k\n"), job.stderr


def test_no_command_escapes_the_test() -> None:
    assert len(EXECUTED) >= 6 and len(BLOCKS) > len(EXECUTED)
    fences = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    assert set(fences) == {"", "bash", "yaml"}


def test_the_profile_on_the_page_is_valid(tmp_path: Path) -> None:
    from sslzoo.launch.cluster import read_profile

    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "cluster.yaml").write_text(text)
    profile = read_profile({"SSLZOO_CLUSTER": str(tmp_path / "cluster.yaml")})
    assert profile.time == "24:00:00" and profile.scratch == "/scratch/me" and profile.container


def test_messages_on_the_page_are_the_framework_s() -> None:
    """Each part of a message between its variable parts is in a text of the source."""
    texts = [
        node.value
        for path in Path(sslzoo.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tables = PAGE[PAGE.index("### It hangs") :]
    messages = re.findall(r"^\| `([^`]+)`", tables, re.MULTILINE)
    assert len(messages) > 10
    foreign = ("bus error",)
    messages.remove("waiting for the other processes (ranks …) for … s")  # tested in test_ranks.py
    for message in messages:
        parts = [part.strip(" ,;") for part in re.split(r"…|SIGKILL|nan", message)]
        for part in parts:
            assert message in foreign or any(part in text for text in texts), (message, part)
