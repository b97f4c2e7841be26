"""The run directory: made once, refused when it is another's, taken up when it is the same run's."""

from __future__ import annotations

import json
import re

import pytest

from sslzoo.config import LoggingConfig, WandbConfig
from sslzoo.loggers import build_loggers
from sslzoo.recipe import load_recipe
from sslzoo.run import RunError, newest, open_run

RECIPE = "simclr_fashion_mnist"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SSLZOO_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSLZOO_RUN", "")  # restored afterwards


def _open(tmp_path, *overrides, resume=False, world_size=1, out=None):
    loaded = load_recipe(RECIPE, overrides)
    return open_run(loaded, world_size=world_size, out=out, resume=resume, root=tmp_path)


def test_a_new_run_writes_what_was_run_with_what(tmp_path):
    run = _open(tmp_path, "seed=7")
    assert run.path.parent == tmp_path / RECIPE and run.path.name == run.run_id and not run.resumed
    manifest = run.read_manifest()
    assert manifest["seed"] == 7 and manifest["world_size"] == 1 and manifest["exit_code"] is None
    assert {"python", "torch", "lightning", "sslzoo"} <= manifest["versions"].keys()
    assert re.search(r"^seed: 7 +# override$", run.recipe.read_text(), re.MULTILINE)
    run.finish(75)
    assert run.read_manifest()["exit_code"] == 75


def test_other_ranks_follow(tmp_path, monkeypatch):
    run = _open(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _open(tmp_path) == run


def test_a_directory_with_another_run_is_refused(tmp_path):
    out = tmp_path / "out"
    _open(tmp_path, out=out)
    with pytest.raises(RunError, match="holds another run"):
        _open(tmp_path, out=out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RunError, match="holds no run"):
        _open(tmp_path, out=tmp_path / "full")


def test_resuming_checks_recipe_and_world_size(tmp_path):
    out = tmp_path / "out"
    first = _open(tmp_path, out=out)
    lr = load_recipe(RECIPE).recipe.optim.lr
    with pytest.raises(RunError, match=rf"optim\.lr was {lr}, is 0\.1"):
        _open(tmp_path, "optim.lr=0.1", out=out, resume=True)
    with pytest.raises(RunError, match="1 processes, not 2"):
        _open(tmp_path, out=out, resume=True, world_size=2)
    again = _open(tmp_path, "trainer.max_epochs=30", "logging.every_steps=5", out=out, resume=True)
    assert again.run_id == first.run_id and again.resumed
    assert len(again.read_manifest()["sessions"]) == 2


def test_auto_takes_the_newest_run_that_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLZOO_RUN_ID", "a")
    a = _open(tmp_path)
    monkeypatch.setenv("SSLZOO_RUN_ID", "b")
    _open(tmp_path)
    assert newest(tmp_path / RECIPE) is None
    (a.checkpoints / "step=000000005.ckpt").touch()
    assert _open(tmp_path, resume=True).path == a.path


def test_wandb_never_fails_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if it were not installed
    assert build_loggers(LoggingConfig(wandb=WandbConfig()), tmp_path, "id") == []
    assert sum("W&B" in record.message for record in caplog.records) == 1


def test_a_resolved_recipe_compares_equal_to_itself(tmp_path):
    run = _open(tmp_path)
    assert json.loads(run.manifest.read_text())["recipe"]["method.temperature"] == 0.2
