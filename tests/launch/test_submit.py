"""Jobs of SLURM: the script that ``sslzoo submit`` writes, and a run that is requeued until it is done."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from sslzoo.cli.main import main
from sslzoo.launch.cluster import Cluster, check_time, read_profile
from sslzoo.records.directory import new_run_id
from sslzoo.testing.kills import digest_of
from tests.command import Command, _environment, codes, group, manifest, saved, shell, until, write_recipe
from tests.slurm import Slurm, options_of

Screen = tuple[int, str, str]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A cluster of its own, in whose queue the commands of this test put jobs, and no profile."""
    slurm = Slurm.create(tmp_path / "slurm")
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SSLZOO_CLUSTER", raising=False)
    monkeypatch.chdir(tmp_path)
    return slurm


def _submit(capsys: pytest.CaptureFixture[str], *arguments: str) -> Screen:
    code = main(["submit", "--recipe", "quickstart", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


# -- the script ------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_script_and_leaves_nothing(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--nodes", "2", "--gpus-per-node", "4", "--time", "4:00:00", "--partition", "gpu")
    more = ("--out", "new", "trainer.accelerator=gpu", "data.workers=7", "data.global_batch_size=128")
    code, script, note = _submit(capsys, *where, *more, "--dry-run")
    assert code == 0 and note.endswith("nothing was submitted\n")
    assert not slurm.jobs() and not (tmp_path / "new").exists()
    (tmp_path / "script").write_text(script)
    options = options_of(tmp_path / "script")
    asked = {
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "8",
        "time": "4:00:00",
    }
    assert options.items() >= (asked | {"signal": "USR2@120", "requeue": "", "partition": "gpu"}).items()
    assert "trainer.devices=4" in script and "trainer.num_nodes=2" in script and "--resume auto" in script
    assert subprocess.run(["bash", "-n", tmp_path / "script"], check=False).returncode == 0


def test_a_recipe_without_gpus_asks_for_none_and_states_its_own_size(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    code, script, _ = _submit(capsys, "--dry-run")
    assert code == 0
    assert "--nodes=1\n" in script and "--ntasks-per-node=1\n" in script and "--gpus" not in script


def test_the_profile_of_a_cluster(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "config" / "sslzoo" / "cluster.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text(
        "partition: gpu\naccount: mine\ntime: '1:00:00'\nmodules: [cuda/12.4]\noptions: [--constraint=a100]\n"
        f"container: apptainer exec --nv image.sif\nscratch: {tmp_path}/scratch\n"
    )
    assert read_profile().options == ("--constraint=a100",)
    code, script, note = _submit(capsys, "--dry-run", "--time", "2:00:00")
    assert code == 0 and f"{tmp_path}/scratch/runs/quickstart/" in note
    for line in ("#SBATCH --account=mine", "#SBATCH --constraint=a100", "#SBATCH --time=2:00:00"):
        assert f"\n{line}\n" in script
    assert "\nmodule load cuda/12.4\n" in script
    assert "\n  apptainer exec --nv image.sif sslzoo fit \\\n" in script
    for text, said in (
        ("partitoin: gpu", "partitoin: unknown key; did you mean partition?"),
        ("time: 24:00:00", "time: must be text, got 86400; put it in quotes"),
        ("time: a day", "cluster.yaml: time: 'a day' is no time limit; write hours:minutes:seconds"),
        ("modules: cuda", "modules: must be a list of texts, got 'cuda'"),
        ("- gpu", "must be a mapping with keys among partition, account"),
        ("a: b: c", "cannot be read"),
    ):
        profile.write_text(text)
        code, _, error = _submit(capsys, "--dry-run")
        assert code == 2 and said in error and len(error.splitlines()) == 1
    monkeypatch.setenv("SSLZOO_CLUSTER", str(tmp_path / "nothing.yaml"))
    code, _, error = _submit(capsys, "--dry-run")
    assert (code, error) == (
        2,
        f"sslzoo submit: SSLZOO_CLUSTER names {tmp_path}/nothing.yaml, which does not exist\n",
    )
    profile.write_text("")
    monkeypatch.delenv("SSLZOO_CLUSTER")
    assert read_profile() == Cluster()


@pytest.mark.parametrize("time", ["90", "90:00", "24:00:00", "2-12", "2-12:00", "2-12:00:00", "UNLIMITED"])
def test_slurms_formats_of_time(time: str) -> None:
    check_time(time, "--time")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.devices=2"], "leave out trainer.devices=2: --gpus-per-node and --nodes set it"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed: fp16 is not available on a CPU"),
        (["--time", "foo"], "--time: 'foo' is no time limit; write hours:minutes:seconds such as 24:00:00, "),
        (["--gpus-per-node", "0"], "--nodes and --gpus-per-node must be positive"),
        (["--nodes", "-1"], "--nodes and --gpus-per-node must be positive"),
        (["trainer.accelerator=gpu", "--gpus-per-node", "7"], "make it a multiple of 7"),
        (["--array", "seed"], "must have the form KEY=A,B,... such as seed=1,2,3"),
        (["--array", "seed=1,1"], "names a value twice"),
        (["--array", "seed=1,2", "seed=3"], "seed: is set twice, by seed=3 and seed=1,2"),
        (["--array", "data.root=a/b,c"], "a/b cannot be part of a folder's name"),
        (["--array", "optim.lr=0.1,-1"], "override: optim.lr: must be positive, got -1"),
        (["--out", "occupied"], "occupied is not empty and contains no run; give --out a new directory"),
    ],
)
def test_what_would_be_refused_in_the_job_is_refused_before_it(
    arguments: list[str], said: str, slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").touch()
    code, out, error = _submit(capsys, *arguments)
    assert (code, out) == (2, "") and said in error and len(error.splitlines()) == 1
    assert not slurm.jobs()


def test_without_sbatch_it_says_where_to_run_it(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm.folder / "bin" / "sbatch").unlink()
    code, _, error = _submit(capsys)
    assert code == 2 and "there is no sbatch on this machine" in error
    program = slurm.folder / "bin" / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    code, _, error = _submit(capsys, "--out", "refused")
    assert code == 2 and "submit.sh: sbatch: error: invalid partition specified: x" in error


# -- what the script does when the run has ended ----------------------------------------------------------

# In place of a run: writes the manifest that the last argument describes, and leaves with a code.
_RUN = """\
import json, os, sys
run, code, exit_code, message = sys.argv[1:]
if exit_code != "absent":
    number = None if exit_code == "null" else int(exit_code)
    error = None if number in (None, 0) else {"rank": 0, "message": message}
    end = {"exit_code": number, "error": error, "finished": os.getpid()}  # as a time: another in each start
    os.makedirs(run, exist_ok=True)
    first = {"exit_code": 1, "error": {"message": "an earlier start"}}
    with open(run + "/manifest.json", "w") as file:
        json.dump({"sessions": [first, end], **end, "seed": 3}, file, indent=2)
sys.exit(int(code))
"""


@pytest.mark.parametrize(
    ("code", "recorded", "state", "said"),
    [
        (0, "0", "COMPLETED", "is finished"),
        (75, "75", "PENDING", 'requeue job JOB: SIGUSR2: saved \\"at\\" step 4'),
        (137, "75", "PENDING", "requeue job JOB"),  # a rank was killed after all had saved
        (75, "absent", "PENDING", "requeue job JOB: see the lines above"),  # while it was starting
        (1, "1", "FAILED", "not requeued, the run ended with exit code 1: SIGUSR2: saved"),
        (1, "76", "FAILED", "not requeued, the run ended with exit code 76"),
        (77, "77", "FAILED", "not requeued, the run ended with exit code 77"),
        (2, "absent", "FAILED", "not requeued, the run ended with exit code 2: see the lines above"),
        (137, "null", "FAILED", "not requeued, the run ended with exit code 137: all processes were killed"),
    ],
)
def test_the_script_requeues_on_75_alone(
    code: int,
    recorded: str,
    state: str,
    said: str,
    slurm: Slurm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _submit(capsys, "--out", "run")[0] == 0
    (job,) = slurm.jobs()
    script = Path(slurm.read(job)["script"])
    (tmp_path / "run.py").write_text(_RUN)
    message = 'SIGUSR2: saved "at" step 4'
    instead = shlex.join(
        ["python3", str(tmp_path / "run.py"), str(tmp_path / "run"), str(code), recorded, message]
    )
    lines = script.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("srun"))
    last = lines.index("code=$?")
    script.write_text("\n".join([*lines[:first], f"srun {instead}", *lines[last:]]) + "\n")
    for _ in range(2):  # the second time, the manifest of the first is there
        process = slurm.start(job, dict(os.environ))
        assert slurm.end(job, process, 20) == state, slurm.output(job)
        assert said.replace("JOB", job) in slurm.output(job)
        if recorded == "absent":
            (tmp_path / "run").mkdir(exist_ok=True)
            old = {"exit_code": 75, "error": {"message": "an earlier start"}}
            (tmp_path / "run" / "manifest.json").write_text(json.dumps(old, indent=2))
    assert "an earlier start" not in slurm.output(job)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_was_cancelled_is_not_requeued(
    state: str, slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(capsys, "--out", "run")[0] == 0
    (job,) = slurm.jobs()
    (slurm.folder / "bin" / "srun").write_text("#!/bin/sh\nexit 75\n")
    (slurm.folder / "bin" / "squeue").write_text(f"#!/bin/sh\necho {state}\n")
    assert slurm.end(job, slurm.start(job, dict(os.environ)), 20) == "FAILED"
    assert f"the job is {state} and not requeued by this script" in slurm.output(job)


def test_a_directory_is_submitted_once(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _submit(capsys, "--out", "run")
    (job,) = slurm.jobs()
    assert code == 0 and out.startswith(f"job {job} submitted: ") and f"slurm/{job}.out" in out
    code, _, error = _submit(capsys, "--out", "run")
    assert code == 2 and f"job {job} for " in error and "still in the queue (PENDING)" in error
    slurm.change(job, state="COMPLETED")
    assert _submit(capsys, "--out", "run")[0] == 0
    assert len(slurm.jobs()) == 2


def test_each_run_of_an_array_has_its_directory_and_requeues_itself_alone(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _submit(capsys, "--out", "runs", "--array", "seed=5,7")
    jobs = slurm.jobs()
    number = jobs[0].partition("_")[0]
    assert (code, jobs) == (0, [f"{number}_0", f"{number}_1"]) and "2 runs in" in out
    (slurm.folder / "bin" / "srun").write_text('#!/bin/sh\necho "$@"\nexit 75\n')
    assert slurm.end(jobs[0], slurm.start(jobs[0], dict(os.environ)), 20) == "PENDING"
    assert slurm.read(jobs[1])["restarts"] == 0
    assert f"--out {tmp_path}/runs/seed=5 --resume auto" in slurm.output(jobs[0])
    assert slurm.output(jobs[0]).splitlines()[0].endswith(" seed=5")


def test_steps_of_a_job_are_different_runs() -> None:
    first = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
    assert new_run_id({"SLURM_JOB_ID": "4711"}) == new_run_id(first) == "slurm-4711"
    assert new_run_id(first | {"SLURM_STEP_ID": "1"}) == "slurm-4711.1"
    assert new_run_id(first | {"SLURM_STEP_ID": "4294967291"}) == "slurm-4711"


# -- a real run ---------------------------------------------------------------------------------------------

LIMIT = 300  # seconds; every process of a job imports everything anew
SHORT = ("trainer.max_epochs=2", "eval.every_epochs=2")
NODES = ("--nodes", "2", "--gpus-per-node", "1")  # two processes


@pytest.mark.slow  # five starts of two processes
def test_a_job_is_preempted_requeued_and_resumed_until_it_is_done(slurm: Slurm, tmp_path: Path) -> None:
    """By a signal, at the time limit, and without warning; its end equals that of the run never disturbed."""
    write_recipe(tmp_path)
    jobs = {}
    for run in ("run", "whole"):
        arguments = ("submit", "--recipe", "tiny.yaml", *NODES, "--out", run, *SHORT)
        command = shell(tmp_path, *arguments, environment=slurm.environment, name=f"submit-{run}")
        assert command.wait() == 0, command.said
        jobs[run] = json.loads((tmp_path / run / "slurm" / "submitted.json").read_text())["job"]
    whole = slurm.start(jobs["whole"], _environment({}, {}))
    assert slurm.end(jobs["whole"], whole, LIMIT) == "COMPLETED", slurm.output(jobs["whole"])

    job, run = jobs["run"], tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL):
        before = saved(run)[-1:]
        script = slurm.start(job, _environment({"pause": 0.3}, {}))
        assert until(lambda b=before, s=script: saved(run)[-1:] > b or s.poll() is not None, LIMIT)
        assert script.poll() is None, slurm.output(job)
        if number == signal.SIGKILL:
            slurm.fail_machines(job, script)
        else:
            slurm.signal(job, number)
            slurm.end(job, script, LIMIT)
        assert slurm.state(job) == "PENDING", slurm.output(job)
    last = slurm.start(job, _environment({}, {}))
    assert slurm.end(job, last, LIMIT) == "COMPLETED", slurm.output(job)

    starts = manifest(run)["sessions"]
    assert [start["exit_code"] for start in starts] == [75, 75, None, 0]
    assert manifest(run)["run_id"] == f"slurm-{job}"
    assert digest_of(run) == digest_of(tmp_path / "whole")
    assert (run / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_a_second_srun_in_a_job_is_another_run_or_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)

    def step(number: int, out: str, name: str, pause: float) -> list[Command]:
        environment = {"SLURM_STEP_ID": str(number), "MASTER_PORT": ""}
        (tmp_path / name).mkdir()
        run = ("--out", tmp_path / out, "--resume", "auto", "trainer.devices=2", *SHORT)
        recipe = ("--recipe", tmp_path / "tiny.yaml")
        faults = {"pause": pause}
        return group(
            tmp_path / name, "fit", *recipe, *run, starter="srun", environment=environment, faults=faults
        )

    first = step(0, "one", "first", 0.3)
    assert until(lambda: saved(tmp_path / "one") or first[0].ended), first[0].said
    same, other = step(1, "one", "same", 0.0), step(2, "two", "other", 0.0)
    assert codes(same) == [2, 2], same[0].said
    assert "one is in use by process" in same[0].err
    assert codes(other) == [0, 0], other[0].said
    assert codes(first) == [0, 0], first[0].said
    assert manifest(tmp_path / "one")["run_id"] == "slurm-4711"
    assert manifest(tmp_path / "two")["run_id"] == "slurm-4711.2"
