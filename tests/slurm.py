"""Stand-ins for SLURM's sbatch, srun, squeue and scontrol: programs in a folder that tests put first in PATH.

They refuse options that sbatch and srun do not have, and set the variables that SLURM sets. All machines of a job are
this one. Nothing starts or ends by itself: a test starts a job, sends its signals and fails its machines through
:class:`Slurm`. Run as a program, this file is one of the four commands.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
STATE = "SLURM_STAND_IN"  # variable: the folder with the jobs
BATCH_OPTIONS = (
    *(
        "job-name",
        "output",
        "open-mode",
        "chdir",
        "array",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
    ),
    *("signal", "partition", "account", "time", "requeue", "constraint"),
)
GONE = ("COMPLETED", "FAILED")  # states of jobs that squeue no longer shows


def options_of(script: Path) -> dict[str, str]:
    """The ``#SBATCH`` lines, as sbatch reads them: up to the first command; the last one of a name wins."""
    options: dict[str, str] = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            for word in shlex.split(line.removeprefix("#SBATCH")):
                name, _, value = word.removeprefix("--").partition("=")
                if not word.startswith("--") or name not in BATCH_OPTIONS:
                    raise SystemExit(f"sbatch: error: unrecognized option '{word}'")
                options[name] = value
        elif line and not line.startswith("#"):
            break
    return options


class Slurm:
    """The jobs that were submitted, and what happens to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path) -> Slurm:
        """Write the four programs to ``folder/bin``."""
        (folder / "bin").mkdir(parents=True)
        (folder / "jobs").mkdir()
        for name in COMMANDS:
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {__file__} {name} "$@"\n')
            program.chmod(0o755)
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that use it."""
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", STATE: str(self.folder)}

    def _file(self, job: str) -> Path:
        return self.folder / "jobs" / job / "job.json"

    def read(self, job: str) -> dict[str, Any]:
        """What is known of a job."""
        return json.loads(self._file(job).read_text())

    def change(self, job: str, **values: Any) -> None:
        """Write it."""
        part = self._file(job).with_suffix(".part")
        part.write_text(json.dumps((self.read(job) if self._file(job).exists() else {}) | values))
        part.replace(self._file(job))

    def jobs(self) -> list[str]:
        """Ids of all jobs, and of each run of an array."""
        return sorted(path.parent.name for path in self.folder.glob("jobs/*/job.json"))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED or FAILED."""
        return self.read(job)["state"]

    def output(self, job: str) -> str:
        """What its script and tasks have printed."""
        return Path(self.read(job)["output"]).read_text()

    def add(self, script: Path) -> str:
        """Accept a script; returns the id."""
        options = options_of(script)
        number = str(random.SystemRandom().randrange(10_000, 10_000_000))
        last = int(options.get("array", "0-0").partition("-")[2])
        for task in range(last + 1):
            job = f"{number}_{task}" if "array" in options else number
            self._file(job).parent.mkdir()
            output = options["output"].replace("%j", number).replace("%A", number).replace("%a", str(task))
            self.change(job, script=str(script), options=options, state="PENDING", restarts=0, output=output)
        return number

    # -- what happens to a job ----------------------------------------------------------------------

    def start(self, job: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run the batch script on the first machine."""
        known = self.read(job)
        options = known["options"]
        number, _, task = job.partition("_")
        variables = {
            "SLURM_JOB_ID": f"{int(number) + int(task or 0)}",  # of the first run of an array, the array's
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
            "SLURM_RESTART_COUNT": str(known["restarts"]),
        }
        if task:
            variables |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task}
        if not known["restarts"]:
            del variables["SLURM_RESTART_COUNT"]
        assert options["open-mode"] == "append"
        self.change(job, state="RUNNING", steps=0, tasks=[])
        with Path(known["output"]).open("ab") as output:
            script = subprocess.Popen(
                ["bash", known["script"]],
                cwd=options["chdir"],
                env=environment | self.environment | variables | {"SLURM_STAND_IN_JOB": job},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.change(job, batch=script.pid)
        return script

    def signal(self, job: str, number: int) -> None:
        """As ``--signal`` does before the time limit, and SIGTERM before a pre-emption: to the tasks."""
        for pid in self.read(job)["tasks"]:
            os.kill(pid, number)

    def fail_machines(self, job: str, script: subprocess.Popen[bytes]) -> None:
        """Everything dies without warning, and SLURM requeues the job."""
        self.signal(job, signal.SIGKILL)
        os.killpg(script.pid, signal.SIGKILL)
        script.wait()
        self._requeued(job)

    def end(self, job: str, script: subprocess.Popen[bytes], limit: float) -> str:
        """Wait for the end of the script; returns the new state of the job."""
        code = script.wait(limit)
        if self.state(job) == "REQUEUED":
            self._requeued(job)
        else:
            self.change(job, state="FAILED" if code else "COMPLETED")
        return self.state(job)

    def _requeued(self, job: str) -> None:
        assert "requeue" in self.read(job)["options"]
        self.change(job, state="PENDING", restarts=self.read(job)["restarts"] + 1)


# -- the four commands ------------------------------------------------------------------------------


def _srun(slurm: Slurm, arguments: list[str]) -> int:
    """Start the tasks of a step; returns the highest of their exit codes."""
    while arguments[0].startswith("--"):
        name = arguments.pop(0).partition("=")[0]
        if name not in ("--kill-on-bad-exit", "--cpus-per-task", "--ntasks-per-node", "--nodes"):
            raise SystemExit(f"srun: error: unrecognized option '{name}'")
    job = os.environ["SLURM_STAND_IN_JOB"]
    step = slurm.read(job)["steps"]
    nodes, per_node = (int(os.environ[name]) for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE"))
    tasks = []
    for rank in range(nodes * per_node):
        variables = {
            "SLURM_STEP_ID": str(step),
            "SLURM_NTASKS": str(nodes * per_node),
            "SLURM_STEP_NUM_TASKS": str(nodes * per_node),
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_NODEID": str(rank // per_node),
            "SLURM_STEP_NODELIST": ",".join(["127.0.0.1", *(f"node{n}" for n in range(1, nodes))]),
        }
        tasks.append(subprocess.Popen(arguments, env=os.environ | variables, stdin=subprocess.DEVNULL))
    slurm.change(job, steps=step + 1, tasks=[task.pid for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def _squeue(slurm: Slurm, arguments: list[str]) -> int:
    asked = next(word.removeprefix("--jobs=") for word in arguments if word.startswith("--jobs="))
    assert {"--noheader", "--format=%T"} <= set(arguments), arguments
    states = [slurm.state(job) for job in slurm.jobs() if job == asked or job.startswith(f"{asked}_")]
    if not states:
        raise SystemExit("slurm_load_jobs error: Invalid job id specified")
    sys.stdout.writelines(f"{state}\n" for state in states if state not in GONE)
    return 0


def main(command: str, arguments: list[str]) -> int:
    """Run as one of the four commands."""
    slurm = Slurm(Path(os.environ[STATE]))
    if command == "sbatch":
        *flags, script = arguments
        number = slurm.add(Path(script))
        assert flags == ["--parsable"]
        sys.stdout.write(f"{number}\n")
    elif command == "srun":
        return _srun(slurm, arguments)
    elif command == "squeue":
        return _squeue(slurm, arguments)
    else:
        verb, job = arguments
        assert verb == "requeue"
        slurm.change(job, state="REQUEUED")
        time.sleep(0.2)  # until SLURM ends the script that asked for it
        os.kill(slurm.read(job)["batch"], signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
