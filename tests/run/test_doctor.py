"""The doctor: every problem is found, rated and comes with its repair."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from sslzoo.cli.main import main
from sslzoo.dashboards.login import reachable
from sslzoo.recipe import registry
from sslzoo.recipe.load import load_recipe
from sslzoo.run import doctor
from sslzoo.run.doctor import BROKEN, FINE, NOTE, Finding


def test_findings_that_are_not_fine_say_how_to_repair() -> None:
    findings = doctor.examine()
    assert {"python", "torch", "lightning", "methods", "threads", "data", "wandb"} <= {
        f.subject for f in findings
    }
    assert all(bool(finding.fix) == (finding.state != FINE) for finding in findings)


def test_exit_code_is_1_only_where_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for state, code in ((FINE, 0), (NOTE, 0), (BROKEN, 1)):
        monkeypatch.setattr(
            doctor, "examine", lambda _, s=state: [Finding(subject="x", detail="y", state=s, fix="z")]
        )
        assert main(["doctor"]) == code
        assert "-> z" in capsys.readouterr().out


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["omegaconf>=2.4", "omegaconf<1", "no-such-package-here"]
    )
    fine, old, missing = doctor.packages()
    assert fine.state == FINE
    assert (old.state, old.fix) == (BROKEN, "pip install 'omegaconf<1'")
    assert (missing.state, missing.detail) == (BROKEN, "not installed")
    monkeypatch.setattr(doctor, "requires", lambda name: ["no-such-board>=1; extra == 'boards'"])
    (extra,) = doctor.packages()
    assert (extra.state, extra.fix) == (NOTE, "pip install 'sslzoo[boards]'")


def test_a_method_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    point = registry.EntryPoint(name="gone", value="gone_package.method:Gone", group=registry.GROUP)
    monkeypatch.setattr(registry, "methods", lambda: {"gone": point})
    (finding,) = doctor.methods()
    assert (finding.subject, finding.state) == ("method gone", BROKEN)
    monkeypatch.setattr(registry, "methods", dict)
    (finding,) = doctor.methods()
    assert (finding.subject, finding.state) == ("methods", BROKEN)


def test_data(tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    assert doctor.data({}).state == NOTE
    assert doctor.data({"SSLZOO_DATA_DIR": str(tmp_path / "no")}).state == BROKEN
    found = doctor.data({"SSLZOO_DATA_DIR": str(tmp_path)})
    assert (found.state, found.detail) == (FINE, f"{tmp_path}: imagenet")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(doctor.shared_memory(tmp_path / "no", 1)) == []
    usage = type(shutil.disk_usage(tmp_path))
    for free, needed, state in (
        (1 << 30, 1 << 30, FINE),
        (64 << 20, 1 << 30, NOTE),
        (24 << 30, 28 << 30, NOTE),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free, 0, free))
        (finding,) = doctor.shared_memory(tmp_path, needed)
        assert finding.state == state
    assert "--shm-size=28g" in finding.fix


def test_a_recipe_says_how_much_shared_memory_its_workers_fill(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "sce_in1k", "trainer.devices=8"]) in (0, 1)  # ImageNet may be here
    # 8 devices x 12 workers x 2 batches x 512 images x 2 views x 3 x 224 x 224 bytes.
    assert f"{8 * 12 * 2 * 512 * 2 * 3 * 224 * 224 >> 20} needed" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "sce_in1k", "data.global_batch_size=4097"]) == 2
    assert "make it a multiple of 8" in capsys.readouterr().err
    assert main(["doctor", "sce_in1kk"]) == 2
    assert "did you mean sce_in1k?" in capsys.readouterr().err


def test_a_recipe_that_can_start_here_and_what_another_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "processors", lambda: 2)
    missing = [f"data.root={tmp_path}"]
    quickstart = load_recipe("quickstart").recipe
    assert [(f.subject, f.state) for f in doctor.needs(quickstart)] == [("trainer", FINE), ("images", FINE)]
    cifar = load_recipe("sce_cifar10", missing).recipe
    device, images = doctor.needs(cifar)
    assert device.state == images.state == BROKEN
    assert device.fix == "to use its CPU, add trainer.accelerator=cpu trainer.precision=bf16-mixed"
    assert images.detail.startswith("cannot open cifar10 (split 'train'): there is no cifar-10-batches-py")
    assert images.fix.startswith(
        "set data.root=PATH to the folder that contains it, or export SSLZOO_DATA_DIR"
    )
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in images.fix
    on_cpu = ["trainer.accelerator=cpu", "trainer.devices=1", "data.workers=3"]
    device, images, workers = doctor.needs(load_recipe("simclr_in1k", [*missing, *on_cpu]).recipe)
    assert (device.state, images.state, workers.state) == (FINE, BROKEN, NOTE)
    assert workers.fix.startswith("set data.workers=2")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (finding,) = doctor.threads()
    assert finding.state == FINE
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    (finding,) = doctor.threads()
    assert finding.state == NOTE and "OMP_NUM_THREADS" in finding.fix


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is recommended, for W&B's server and one's own: online, offline, or to send runs afterwards."""
    login = tmp_path / "netrc"
    nobody = {"NETRC": str(login), "HOME": str(tmp_path)}
    monkeypatch.chdir(tmp_path)

    def found(**more: str) -> Finding:
        (finding,) = doctor.wandb({**nobody, **more})
        return finding

    connections: list[str] = []
    monkeypatch.setattr(doctor, "reachable", lambda url: connections.append(url) or "away" not in url)
    assert found().state == NOTE and found().detail.startswith("no login for https://api.wandb.ai;")
    assert "sslzoo wandb push RUN" in found().fix
    assert found(WANDB_MODE="offline").detail == "offline, by WANDB_MODE"
    assert found(WANDB_API_KEY="x").detail == "online, with a login for https://api.wandb.ai"
    login.write_text(
        "machine api.wandb.ai login user password x\nmachine wandb.lab:8080 login user password y\n"
    )
    assert found().detail == "online, with a login for https://api.wandb.ai"
    (tmp_path / ".config/wandb").mkdir(parents=True)
    (tmp_path / ".config/wandb/settings").write_text("[default]\nbase_url = http://wandb.lab:8080/\n")
    assert found().detail == "online, with a login for http://wandb.lab:8080"
    assert connections == ["https://api.wandb.ai"] * 2 + ["http://wandb.lab:8080"]
    other = found(WANDB_BASE_URL="https://away.org", WANDB_API_KEY="x")
    assert other.state == NOTE and "no connection from here" in other.detail and "mode=offline" in other.fix
    assert found(WANDB_BASE_URL="https://elsewhere.org").state == NOTE
    for nonsense in (b"this is no netrc", b"\xff"):
        login.write_bytes(nonsense)
        (tmp_path / ".config/wandb/settings").write_bytes(nonsense)
        assert found().state == NOTE
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert not list(doctor.wandb(nobody))


def test_a_server_is_reachable_if_it_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert reachable(url)
    assert not reachable(url)


def test_the_profile_of_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    environ = {"SSLZOO_CLUSTER": str(profile)}
    (finding,) = doctor.cluster(environ)
    assert finding.state == BROKEN and "does not exist" in finding.detail
    profile.write_text("partition: gpu\nmodules: [gcc, cuda]\n")
    (finding,) = doctor.cluster(environ)
    assert (finding.state, finding.detail) == (FINE, f"{profile}: partition gpu; modules gcc, cuda")
    nowhere = {"XDG_CONFIG_HOME": str(tmp_path)}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not list(doctor.cluster(nowhere))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (finding,) = doctor.cluster(nowhere)
    assert finding.state == NOTE and f"{tmp_path}/sslzoo/cluster.yaml" in finding.fix
