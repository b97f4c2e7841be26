"""Job scripts for SLURM: written as text that can be read and edited, and submitted with sbatch. Importable without
torch.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sslzoo.exits import ExitCode
from sslzoo.files import write_json, write_text
from sslzoo.launch.cluster import Cluster
from sslzoo.records.directory import SLURM_FOLDER

WARNING = 120  # seconds before the time limit at which SLURM asks the run to save and leave


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, or with ``values`` an array of runs, as a job of SLURM."""

    name: str
    folder: Path  # the run directory; of an array, the folder that contains the run directories
    directory: Path  # working directory
    recipe: str  # bundled name or path
    nodes: int
    per_node: int  # tasks per node, one per GPU
    cpus: int  # per task
    gpus: bool = True  # whether the tasks need GPUs
    overrides: tuple[str, ...] = ()
    key: str = ""  # the recipe's key that differs between the runs of an array
    values: tuple[str, ...] = ()  # its values, one per run
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def script(self) -> Path:
        """The job script."""
        return self.folder / SLURM_FOLDER / "submit.sh"

    @property
    def record(self) -> Path:
        """File with the id of the submitted job."""
        return self.folder / SLURM_FOLDER / "submitted.json"

    @property
    def runs(self) -> list[Path]:
        """The run directories."""
        return [self.folder / f"{self.key}={value}" for value in self.values] or [self.folder]

    def output(self, job: str) -> Path:
        """Where SLURM writes the output of ``job``, an id or SLURM's placeholder for it."""
        return self.folder / SLURM_FOLDER / f"{job}.out"


# -- the script -------------------------------------------------------------------------------------


def script_of(job: Job, command: Sequence[str]) -> str:
    """The job script; ``command`` is how it was asked for."""
    return "\n".join([*_head(job, command), "", *_setup(job), "", *_run(job), "", _END])


def _head(job: Job, command: Sequence[str]) -> Iterator[str]:
    yield "#!/bin/bash"
    yield f"# {shlex.join(command)}"
    yield f"# To submit it again: sbatch {shlex.quote(str(job.script))}"
    cluster = job.cluster
    options = {
        "job-name": job.name,
        "output": str(job.output("%A_%a" if job.values else "%j")),
        "open-mode": "append",  # of the same job, requeued
        "chdir": str(job.directory),
        "array": f"0-{len(job.values) - 1}" if job.values else None,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.per_node),
        "cpus-per-task": str(job.cpus),
        "gpus-per-node": str(job.per_node) if job.gpus else None,
        "signal": f"USR2@{WARNING}",
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
    }
    for name, value in options.items():
        if value is not None:
            yield f"#SBATCH --{name}={shlex.quote(value)}"
    yield "#SBATCH --requeue"
    for option in cluster.options:
        yield f"#SBATCH {option}"


def _setup(job: Job) -> Iterator[str]:
    yield "trap : TERM  # the script outlives a signal, to act on how the run ended"
    for module in job.cluster.modules:
        yield f"module load {shlex.quote(module)}"
    if job.values:
        yield f"values=({' '.join(map(shlex.quote, job.values))})"
        yield 'value="${values[$SLURM_ARRAY_TASK_ID]}"'
        yield f'run={shlex.quote(str(job.folder))}/{job.key}="$value"'
        yield 'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    else:
        yield f"run={shlex.quote(str(job.folder))}"
        yield 'job="$SLURM_JOB_ID"'


def _run(job: Job) -> Iterator[str]:
    program = [sys.executable, "-m", "sslzoo"]
    start = f"{job.cluster.container} sslzoo" if job.cluster.container else shlex.join(program)
    words = [
        f"--recipe {shlex.quote(job.recipe)}",
        '--out "$run" --resume auto',
        *map(shlex.quote, job.overrides),
    ]
    words += [f'{job.key}="$value"'] if job.values else []
    yield 'before="$(cksum "$run/manifest.json" 2>/dev/null)"'
    # A rank that has saved must not be taken for a failed one, and the first to fail reports to the others itself.
    yield 'srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\'
    yield f"  {start} fit \\"
    yield " \\\n".join(f"  {word}" for word in words)
    yield "code=$?"


_END = f"""\
# srun returns the highest code of its tasks; the manifest has the run's own, unless it could not begin.
reason="see the lines above"
if [ "$(cksum "$run/manifest.json" 2>/dev/null)" != "$before" ]; then
  recorded="$(sed -n 's/^  "exit_code": \\([0-9]*\\),*$/\\1/p' "$run/manifest.json")"
  message="$(sed -n 's/^    "message": "\\(.*\\)",*$/\\1/p' "$run/manifest.json")"
  if [ -n "$recorded" ]; then
    code="$recorded"
    reason="$message"
  elif [ "$code" -ne {ExitCode.PREEMPTED} ]; then
    reason="all processes were killed without warning, perhaps because the memory was not enough"
  fi
fi
if [ "$code" -eq {ExitCode.DONE} ]; then
  echo "sslzoo submit: $run is finished"
elif [ "$code" -eq {ExitCode.PREEMPTED} ]; then
  state="$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null)"
  case "$state" in
    CANCELLED | COMPLETING | PENDING | REQUEUE*) # SLURM itself is ending or requeueing the job
      echo "sslzoo submit: the job is $state and not requeued by this script: $reason"
      ;;
    *)
      echo "sslzoo submit: requeue job $job: $reason"
      scontrol requeue "$job" || echo "sslzoo submit: cannot requeue; submit it again: sbatch $0" >&2
      ;;
  esac
else
  echo "sslzoo submit: not requeued, the run ended with exit code $code: $reason" >&2
fi
exit "$code"
"""


# -- submitting -------------------------------------------------------------------------------------


def refuse_if_queued(job: Job) -> None:
    """Raise ``ValueError`` if the job submitted for the same directory is still in the queue. Without squeue, or if it
    fails, jobs count as gone; the run's lock protects the directory then."""
    if not job.record.exists() or shutil.which("squeue") is None:
        return
    number = json.loads(job.record.read_text(encoding="utf-8"))["job"]
    states = sorted(set(_output("squeue", "--noheader", f"--jobs={number}", "--format=%T").split()))
    if states:
        raise ValueError(
            f"job {number} for {job.folder} is still in the queue ({', '.join(states)}); wait for it, or remove it "
            f"with scancel {number}"
        )


def submit(job: Job, command: Sequence[str]) -> str:
    """Write the script into the run directory and submit it; returns the id of the job.

    Raises ``ValueError`` if there is no sbatch, or if it refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch on this machine; run it where jobs are submitted, or see the script with --dry-run"
        )
    refuse_if_queued(job)
    job.script.parent.mkdir(parents=True, exist_ok=True)
    write_text(job.script, script_of(job, command))
    done = subprocess.run(
        ["sbatch", "--parsable", str(job.script)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"sbatch refused {job.script}: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().partition(";")[0]  # followed by the cluster's name, if there are several
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(job.record, {"job": number, "submitted": now, "command": list(command)})
    return number


def _output(*command: str) -> str:
    """What ``command`` prints; empty if it fails, as squeue does for a job that it no longer knows."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
