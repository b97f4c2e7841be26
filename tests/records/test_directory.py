"""The run directory: made once, one run at a time, and clear about what the file system refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from sslzoo import pictures
from sslzoo.callbacks.representation import Representation
from sslzoo.checkpoints import load_checkpoint
from sslzoo.dashboards.loggers import PACKAGES
from sslzoo.exits import ExitCode, RunError
from sslzoo.processes.ending import Ending
from sslzoo.recipe.load import load_recipe, plain
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.records.directory import Run, begin, choose, newest
from sslzoo.records.lock import HEARTBEAT, STALE, RunLock, read_lock, refuse_if_owned
from tests.command import Command, fork, manifest, saved, shell, until, write_recipe

RECIPE = "simclr_fashion_mnist"
PLAN = TrainingPlan(dataset_size=96, global_batch_size=16, max_epochs=3)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SSLZOO_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.yaml`` lies."""
    folder = tmp_path_factory.mktemp("directory")
    write_recipe(folder)
    return folder


def _fit(folder: Path, run: str, *more: str, **options: Any) -> Command:
    return fork(folder, "fit", "--recipe", "tiny.yaml", "--out", run, *more, **options)


# -- what is written, and what is refused before ------------------------------------------------------


def _open(
    root: Path, *overrides: str, resume: str | None = None, plan: TrainingPlan = PLAN, **options: Any
) -> Run:
    loaded = load_recipe(RECIPE, overrides)
    choice = choose(
        loaded,
        plan,
        fingerprint="mine",
        out=options.get("out"),
        resume=resume,
        root=root,
        attempt=options.get("attempt", 0),
    )
    begin(choice, loaded, plan, fingerprint="mine", left_behind={}, parameters=1)
    return choice.run


def test_a_new_run_writes_what_was_run_with_what(tmp_path: Path) -> None:
    run = _open(tmp_path, "seed=7")
    assert run.path.parent == tmp_path / RECIPE and run.path.name == run.run_id
    kept = run.read_manifest()
    assert kept["seed"] == 7 and kept["world_size"] == 1 and kept["exit_code"] is None
    assert {"python", "torch", "lightning", "sslzoo"} <= kept["versions"].keys()
    assert kept["recipe"]["method.temperature"] == 0.2
    assert re.search(r"^seed: 7 +# override$", run.recipe.read_text(), re.MULTILINE)
    run.conclude(Ending(code=75, message="SIGTERM: saved at step 3"), {"training": 12.5})
    kept = run.read_manifest()
    assert kept["exit_code"] == 75 and kept["error"]["message"] == "SIGTERM: saved at step 3"
    assert kept["sessions"][0]["training_seconds"] == 12.5


def test_a_checkpoint_says_what_it_is_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    fit = _fit(folder, "says", "trainer.max_epochs=1", "seed=8")
    assert fit.wait() == 0, fit.said
    assert (
        "warning: the warm-up takes all 6 steps of the run" in fit.err and "optim.warmup_epochs=1 " in fit.err
    )
    (path,) = [p.rename(tmp_path / "left.ckpt") for p in (folder / "says/checkpoints").glob("*6.ckpt")]
    content = load_checkpoint(path)
    assert yaml.safe_load(content["recipe"]) == plain(load_recipe(str(folder / "says/recipe.yaml")).recipe)
    kept, said = manifest(folder / "says"), content["manifest"]
    for key in ("run_id", "started", "seed", "world_size", "data_fingerprint", "versions", "git", "hardware"):
        assert said[key] == kept[key]
    assert said["sessions"][0]["command"] == kept["sessions"][0]["command"]


def test_a_directory_with_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _open(tmp_path, out=out)
    with pytest.raises(RunError, match="already contains a run"):
        _open(tmp_path, out=out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RunError, match="contains no run"):
        _open(tmp_path, out=tmp_path / "full")


def test_processes_that_torchrun_restarts_continue_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = _open(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    begun = _open(tmp_path)
    assert begun.path.name.startswith("torchrun-")
    assert _open(tmp_path, attempt=1).path == begun.path
    assert _open(tmp_path, attempt=2, resume=str(begun.path)).path == begun.path
    assert len(begun.read_manifest()["sessions"]) == 3
    named = tmp_path / "named"
    _open(tmp_path, out=named)
    assert _open(tmp_path, out=named, attempt=1).path == named
    with pytest.raises(RunError, match="no checkpoint in"):  # they had not begun to continue that one
        _open(tmp_path, attempt=1, resume=str(older.path))


def test_resuming_checks_the_recipe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _open(tmp_path, out=out)
    lr = load_recipe(RECIPE).recipe.optim.lr
    with pytest.raises(RunError, match=rf"optim\.lr was {lr}, is 0\.1"):
        _open(tmp_path, "optim.lr=0.1", out=out, resume="auto")
    again = _open(tmp_path, "trainer.max_epochs=30", "logging.every_steps=5", out=out, resume="auto")
    assert again.run_id == first.run_id
    starts = again.read_manifest()["sessions"]
    assert [s["recipe"]["trainer.max_epochs"] for s in starts] == [15, 30]


def test_auto_takes_the_newest_run_that_has_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    assert newest(tmp_path / RECIPE) is None
    for name in ("a", "b"):
        assert (
            fork(
                tmp_path, "fit", "--recipe", folder / "tiny.yaml", environment={"SSLZOO_RUN_ID": name}
            ).wait()
            == 0
        )
    shutil.rmtree(tmp_path / "runs" / "tiny" / "b" / "checkpoints")
    last = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", "--resume", "auto")
    assert last.wait() == 0
    assert f"{tmp_path / 'runs/tiny/a'} is finished" in last.out, last.said


def _without_extras() -> None:
    from sslzoo.dashboards import loggers

    loggers.find_spec = lambda name, package=None: None


@pytest.mark.parametrize("ask", ["logging.tensorboard=true", "logging.wandb={mode: offline}"])
def test_a_logger_that_is_not_installed_is_refused_before_the_run(folder: Path, ask: str) -> None:
    for more in ([], ["--dry-run"]):
        run = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", "run", *more, ask, before=_without_extras)
        assert run.wait() == ExitCode.USAGE
        name = ask.removeprefix("logging.").partition("=")[0]
        assert f"logging.{name} needs the package {name}: pip install {PACKAGES[name]}," in run.err, run.said
        assert len(run.err.splitlines()) == 1 and not (folder / "run").exists()


# -- one run at a time ----------------------------------------------------------------------------------


def test_a_second_run_in_a_directory_is_refused_by_its_owners_name(folder: Path) -> None:
    first = _fit(folder, "shared", faults={"pause": 0.1})
    assert until(lambda: first.ended or saved(folder / "shared")), first.said
    second = _fit(folder, "shared", "--resume", "auto", name="second")
    assert second.wait() == ExitCode.USAGE
    assert f"is in use by process {first.pid} on {platform.node()}" in second.err, second.said
    assert len(manifest(folder / "shared")["sessions"]) == 1
    first.signal(signal.SIGKILL)
    first.wait()
    # Its lock stays, and is no hindrance: the process is gone.
    assert (read_lock(folder / "shared") or {})["pid"] == first.pid
    third = _fit(folder, "shared", "--resume", "auto", name="third")
    assert third.wait() == 0, third.said
    assert read_lock(folder / "shared") is None


@pytest.mark.parametrize(
    ("owner", "age", "environment", "taken"),
    [
        ({"host": "elsewhere"}, 0.0, {}, False),
        ({"host": "elsewhere"}, STALE + 5, {}, True),
        (
            {"host": "elsewhere", "job": "4711", "restart": [1, 0]},
            0.0,
            {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"},
            True,
        ),
        ({"host": "elsewhere", "job": "4711", "restart": [0, 0]}, 0.0, {"SLURM_JOB_ID": "4711"}, False),
        ({"host": "elsewhere", "job": "4711"}, 0.0, {"SLURM_JOB_ID": "4712"}, False),
        ({"pid_started": "1"}, 0.0, {}, True),  # the number is another process's now
        (
            {"pid_namespace": "pid:[1]"},
            0.0,
            {},
            False,
        ),  # in another container, whose processes cannot be seen
    ],
    ids=["other-host", "silent", "requeued", "another-step", "other-job", "reused-pid", "container"],
)
def test_whose_lock_is_taken_over(
    owner: dict[str, str], age: float, environment: dict[str, str], taken: bool, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run, seconds=dict, on_lost=print)
    lock.acquire()
    content = read_lock(run) or {}
    lock.release()
    (run / "run.lock").write_text(json.dumps(content | {"id": "theirs", "pid": os.getppid()} | owner))
    then = time.time() - age
    os.utime(run / "run.lock", (then, then))
    # A directory with nothing but a lock: a run that was killed while it started.
    command = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", "--out", "run", environment=environment)
    assert command.wait() == (0 if taken else ExitCode.USAGE), command.said
    if not taken:
        assert "is in use by process" in command.err and owner.get("host", platform.node()) in command.err


TURNS = 40


def _race(folder: Path, gate: Any, owners: Any) -> None:
    """Take the lock as soon as ``gate`` opens, in each turn; tell whether it was had."""
    for _ in range(TURNS):
        lock = RunLock(folder, seconds=dict, on_lost=print)
        gate.wait()
        try:
            lock.acquire()
        except RunError:
            owners.put(False)
        else:
            owners.put(True)
            time.sleep(0.05)
            lock.release()
        gate.wait()


def test_of_two_that_take_over_one_lock_one_has_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    lock = RunLock(tmp_path, seconds=dict, on_lost=print)
    lock.acquire()
    owner = read_lock(tmp_path) or {}
    lock.release()
    gate, owners = context.Barrier(3, timeout=30), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, gate, owners)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for turn in range(TURNS):
        (tmp_path / "run.lock").write_text(json.dumps(owner | {"id": f"dead-{turn}", "pid_started": "1"}))
        gate.wait()
        assert sum(owners.get(timeout=10) for _ in racers) == 1, f"turn {turn}"
        gate.wait()
        assert not list(tmp_path.iterdir())
    for racer in racers:
        racer.join()


def test_a_lock_that_cannot_be_read_for_a_moment_ends_nothing(tmp_path: Path) -> None:
    lost: list[str] = []
    lock = RunLock(tmp_path, seconds=dict, on_lost=lost.append)
    lock.acquire()
    (tmp_path / "run.lock").write_text("")
    lock.beat()
    assert not lost and (read_lock(tmp_path) or {})["pid"] == os.getpid()
    lock.release()


def test_a_silent_run_that_lost_its_directory_ends(tmp_path: Path) -> None:
    lost: list[str] = []
    lock = RunLock(tmp_path, seconds=lambda: {"training": 1.5}, on_lost=lost.append)
    lock.acquire()
    lock.beat()
    assert (read_lock(tmp_path) or {})["seconds"] == {"training": 1.5}
    (tmp_path / "run.lock").write_text(
        json.dumps({"id": "theirs", "host": "elsewhere", "pid": 5, "job": "8"})
    )
    lock.beat()
    assert lost == ["process 5 on elsewhere, job 8"]
    lock.release()
    assert (read_lock(tmp_path) or {})["id"] == "theirs"  # not ours to remove
    with pytest.raises(RunError, match="is in use by process 5 on elsewhere, job 8"):
        refuse_if_owned(tmp_path)
    assert HEARTBEAT * 5 < STALE


# -- what the file system refuses -------------------------------------------------------------------------


def _small_files() -> None:
    """As a full disk: nothing over a megabyte can be written. A checkpoint is larger, nothing else is."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def _one_error(command: Command, code: int, said: str) -> None:
    assert command.wait() == code, command.said
    lines = command.err.splitlines()
    assert lines[0].startswith("sslzoo fit: ") and said in lines[0], command.said
    assert "Traceback" not in command.err and len(lines) <= 2


def test_a_full_disk_ends_the_run_in_one_line(folder: Path) -> None:
    _one_error(_fit(folder, "full", before=_small_files), ExitCode.FAILURE, "File too large")
    assert manifest(folder / "full")["exit_code"] == ExitCode.FAILURE
    assert not list((folder / "full").rglob("*.part")) and not list(
        (folder / "full" / "checkpoints").iterdir()
    )


def test_a_disk_without_a_byte_left_ends_the_run_in_one_line(folder: Path, tmp_path: Path) -> None:
    """Not even the manifest can be written then; what it says stands on the terminal, and the directory is free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fill = f'dd if=/dev/zero of="{disk}/fill" bs=64k 2> /dev/null'
    script = f'mount -t tmpfs -o size=40m none "{disk}" && ("$@"; echo $? > code) & sleep 0.1; '
    script += f'until [ -e "{disk}/run/checkpoints/step=000000002.ckpt" ]; do sleep 0.1; done; {fill}; wait; '
    script += f'ls -A "{disk}/run" "{disk}/run/checkpoints" > left'
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounting needs a privilege that this machine refuses")
    recipe = ("fit", "--recipe", folder / "tiny.yaml", "--out", disk / "run")
    run = shell(tmp_path, *recipe, prefix=("unshare", "-m", "sh", "-c", script, "sh"), faults={"pause": 0.2})
    run.wait(90)
    assert (tmp_path / "code").read_text() == "1\n", run.said
    assert "No space left on device" in run.err and "Traceback" not in run.err, run.said
    left = (tmp_path / "left").read_text()
    assert "run.lock" not in left and ".part" not in left, left


def test_what_only_people_look_at_ends_no_run(folder: Path, tmp_path: Path) -> None:
    def full(*args: Any, **keys: Any) -> None:
        raise OSError("the disk is full")

    def fill() -> None:
        Figure.savefig = Representation._write = pictures.atomically = full

    run = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", "--out", "run", before=fill)
    assert run.wait() == 0, run.said
    for name in ("views.png", "views", "neighbours and map", "curves.png"):
        assert f"{name} could not be drawn: OSError: the disk is full" in run.err
    assert "spectrum.csv could not be written" in run.err
    assert (tmp_path / "run" / "eval" / "summary.json").exists()


def test_a_start_that_found_no_room_does_not_block_the_next(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock.0123.part").write_text("")  # of one that was killed at its very start
    again = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", "--out", "run", "--resume", "auto")
    assert again.wait() == 0, again.said


def test_a_directory_that_cannot_be_written_is_refused(folder: Path) -> None:
    _one_error(_fit(folder, "/proc/sslzoo"), ExitCode.USAGE, "/proc/sslzoo")
    (folder / "file").write_text("a file")
    _one_error(_fit(folder, "file/run"), ExitCode.USAGE, "file/run")


def test_a_directory_that_is_deleted_ends_the_run_in_one_line(folder: Path) -> None:
    run = _fit(folder, "deleted", faults={"pause": 0.1})
    assert until(lambda: run.ended or saved(folder / "deleted")), run.said
    (folder / "deleted").rename(folder / "moved-away")  # at once, where rmtree races with what is written
    assert run.wait() == ExitCode.FAILURE, run.said
    assert "the run directory" in run.err and "is gone" in run.err and "Traceback" not in run.err, run.said
    assert not (folder / "deleted").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_empty_manifest_is_refused_in_one_line(content: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "manifest.json").write_text(content)
    command = fork(tmp_path, "fit", "--recipe", folder / "tiny.yaml", "--out", "run", "--resume", "auto")
    _one_error(command, ExitCode.USAGE, "manifest.json is empty or damaged")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.accelerator=gpu",), "this machine has no GPU that torch can use"),
        (
            ("trainer.accelerator=gpu", "trainer.precision=16-mixed"),
            "to use its CPU, add trainer.accelerator=cpu trainer.precision=bf16-mixed",
        ),
        (
            ("trainer.precision=16-mixed",),
            "fp16 is not available on a CPU; set trainer.precision=bf16-mixed or",
        ),
        (("trainer.accelerator=auto", "trainer.precision=16"), "trainer.precision=16: fp16 is not available"),
    ],
)
def test_what_this_machine_lacks_is_refused_in_one_line(
    overrides: tuple[str, ...], said: str, folder: Path
) -> None:
    command = fork(
        folder,
        "fit",
        "--recipe",
        "tiny.yaml",
        "--out",
        "gpu",
        *overrides,
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    _one_error(command, ExitCode.USAGE, said)
    assert not (folder / "gpu").exists()


def test_weights_that_are_not_there_say_what_may_be_given(folder: Path) -> None:
    command = fork(folder, "fit", "--recipe", "tiny.yaml", "--out", "nowhere-run", "--init-from", "nowhere")
    _one_error(
        command,
        ExitCode.USAGE,
        "--init-from nowhere: no such file or folder; give a run directory, a checkpoint such as "
        "RUN/checkpoints/last.ckpt, or an exported backbone.safetensors",
    )


def test_too_little_memory_in_an_evaluation_names_its_own_batch(folder: Path) -> None:
    command = _fit(folder, "memory-evaluation", faults={"memory_in_evaluation": True})
    _one_error(
        command, ExitCode.FAILURE, "out of memory on cpu while evaluating; set eval.batch_size below 32"
    )
    assert "continue with: " in command.err  # that may change


def test_too_little_memory_on_a_device_names_what_to_set(folder: Path) -> None:
    command = _fit(folder, "memory", faults={"memory_at": 5})
    _one_error(command, ExitCode.FAILURE, "out of memory on cpu with 16 samples in a forward pass")
    assert "trainer.accumulate_grad_batches=2" in command.err
    assert "OutOfMemoryError" in (folder / "memory" / "logs" / "rank-0.log").read_text()
