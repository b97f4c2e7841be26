"""What exact resume and signal handling use of Lightning beyond its public interface."""

from __future__ import annotations

import inspect

import lightning
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from sslzoo.run.trainer import NoProfiler, build_trainer


def test_the_version_is_the_one_that_the_kill_tests_were_written_for():
    assert lightning.__version__.startswith("2.6."), (
        "Lightning left 2.6: run `pytest -m 'slow or not slow' tests/test_resume.py` several times, check the "
        "private names below, then move the pin in pyproject.toml"
    )


def test_the_methods_that_preemption_switches_off_exist_and_are_called():
    assert callable(_SignalConnector.register_signal_handlers)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)


def test_a_checkpoint_at_the_start_of_a_batch_counts_as_killed_inside_it():
    # `ready` is counted before the callbacks' hook, `started` after; the restart goes back to `completed`.
    source = inspect.getsource(_TrainingEpochLoop.advance)
    order = ["increment_ready()", '"on_train_batch_start"', "increment_started()", '"on_train_batch_end"']
    assert [source.index(part) for part in order] == sorted(source.index(part) for part in order)
    assert "reset_on_restart" in inspect.getsource(_TrainingEpochLoop.reset)


def test_the_position_is_restored_before_the_loaders_are_made():
    source = inspect.getsource(_CheckpointConnector._restore_modules_and_callbacks)
    assert source.index("restore_datamodule") < source.index("restore_callbacks")


def test_callbacks_hear_of_an_exit_code():
    source = inspect.getsource(call._call_and_handle_interrupt)
    assert "except BaseException" in source and "raise" in source


def test_actions_are_profiled_only_if_the_recipe_asks(tmp_path):
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1}
    for asked, kind in (({}, NoProfiler), ({"profiler": "simple"}, SimpleProfiler)):
        trainer = build_trainer(options | asked, run_dir=tmp_path, callbacks=[])
        assert isinstance(vars(trainer)["profiler"], kind)
    # Lightning uses the context as a context, and the profiler for nothing else in a step.
    assert "with trainer.profiler.profile(" in inspect.getsource(call._call_lightning_module_hook)
    assert "with trainer.profiler.profile(" in inspect.getsource(call._call_callback_hooks)
