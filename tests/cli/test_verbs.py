"""The light verbs: what they print, their exit codes, and that they import nothing heavy."""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sslzoo
from sslzoo.cli.main import main, verbs
from sslzoo.recipe import registry
from sslzoo.recipe.catalog import DATASETS
from sslzoo.recipe.header import read_header

NAME = "simclr_cifar10"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit code and lines of both streams."""
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse's way out
        code = left.code if isinstance(left.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_verbs_are_the_files() -> None:
    folder = Path(sslzoo.__file__).parent / "cli"
    assert set(verbs()) == {path.stem.replace("_", "-") for path in folder.glob("*.py")} - {
        "main",
        "--init--",
    }
    assert {"cp", "diff", "doctor", "ls", "show", "validate"} <= set(verbs())


@pytest.mark.parametrize("verb", ["", *verbs()])
def test_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, err = run(capsys, *([verb] if verb else []), "--help")
    assert code == 0
    assert out[0].startswith(f"usage: sslzoo {verb}".rstrip())
    assert not err


def test_a_font_that_matplotlib_does_not_find_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("matplotlib.font_manager").setLevel(logging.NOTSET)
    assert run(capsys, "ls", "methods")[0] == 0
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.WARNING)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, [f"sslzoo {sslzoo.__version__}"], [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: VERB"),
        (["shwo"], "no verb 'shwo'; did you mean show?"),
        (["cp", NAME], "the following arguments are required: DEST"),
        (["ls", "everything"], "invalid choice: 'everything'"),
        (["show", "--nope", NAME], "sslzoo show: unknown argument '--nope'"),
        (
            ["fit", "--recipe", NAME, "--rseume", "auto"],
            "sslzoo fit: unknown argument '--rseume'; did you mean --resume?",
        ),
        (
            ["fit", "--recipe", NAME, "--resume", "auto", "--init-from", "x"],
            "not allowed with argument --resume",
        ),
        (
            ["fit", "--recipe", NAME, "trainer.devices=gpu", "trainer.accelerator=cpu"],
            "trainer.devices: must be a number of devices",
        ),
        (["show", "simclr_cifar11"], "did you mean simclr_cifar10"),
        (["show", NAME, "optim.lrr=3"], "override: optim.lrr: unknown key; did you mean optim.lr?"),
        (["diff", NAME, "nothing_like_it"], "no recipe 'nothing_like_it'"),
        (["cp", "nothing_like_it", "x.yaml"], "no recipe 'nothing_like_it'"),
        (["validate", "optim.lr=3"], "no recipe given, only overrides"),
        (
            ["fit", "--recipe", NAME, "--bogus"],
            "unknown argument '--bogus' (there are --recipe, --out, --resume, --init-from, --dry-run); see",
        ),
        (["ls", "--json"], "unknown argument '--json' (there are "),
        (
            ["show", "nosuch"],
            "no recipe 'nosuch': neither a file nor a bundled name; sslzoo ls recipes lists them",
        ),
        (["show", "/tmp"], "no recipe '/tmp': it is a folder; name a file in it"),
        (
            ["fit", NAME, "--out", "x"],
            f"sslzoo fit: the recipe is an option: --recipe {NAME}; see",
        ),
        (["submit", "mine.yaml"], "the recipe is an option: --recipe mine.yaml"),
        (["wandb"], "sslzoo wandb: the following arguments are required: push, RUN; see"),
        (["eval", "knn"], "are required: RUN|CHECKPOINT|EXPORT|BACKBONE; see"),
        (
            ["show", NAME, "seed=1", "optim.lr=3", "seed=2"],
            "override: seed: is set twice, by seed=1 and seed=2; keep one of them",
        ),
        (["bench", NAME, "seed=1", "seed=1"], "override: seed: is set twice"),
        (["show", NAME, "trainer.precision=fp16"], "trainer.precision: 'fp16' is called 16-mixed here"),
        (["show", NAME, "data.foo=1"], "override: data.foo: unknown key (known: dataset, "),
        (["show", NAME, "optim.name=lamb"], "must be one of lars, sgd, adam, adamw; got 'lamb'\n"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert said in err[0] + "\n"


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {
        "methods": registry.methods(),
        "analyses": registry.analyses(),
        "protocols": registry.protocols(),
        "recipes": registry.recipes(),
        "datasets": DATASETS,
    }
    parts = []
    for kind, names in listed.items():
        code, out, _ = run(capsys, "ls", kind)
        assert code == 0
        assert max(map(len, out)) <= 100
        assert [line.split()[0] for line in out[1 : 1 + len(names)]] == list(names)
        parts += [f"{kind}:", *out, ""]
    assert run(capsys, "ls")[1] == parts[:-1]


def test_ls_shows_a_recipe_s_data_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "ls", "recipes")
    rows = [re.split("  +", line) for line in out]
    assert "ours: protocol honest (SGD), mean of the seeds" in out
    assert rows[0] == ["recipe", "method", "data", "backbone", "epochs", "published", "ours"]
    assert ["sce_in1k", "sce", "imagenet1k", "resnet50", "200", "72.7", "-"] in rows
    ours = read_header(registry.recipes()["quickstart"]).ours
    assert len(ours) == 5  # seeds
    mean = f"{sum(map(float, ours)) / len(ours):.1f}"
    assert ["quickstart", "sce", "fashion_mnist_12k", "conv5", "22", "-", mean] in rows
    table = out[: 1 + len(registry.recipes())]
    assert {len(line) for line in table} == {len(table[0])}  # aligned: the last column is filled to the right


@pytest.mark.parametrize(
    ("options", "recipes", "variants"),
    [
        (["--method", "sce", "--data", "imagenet100"], ["sce_in100"], []),
        (
            ["--data=imagenet", "--method=mmcl"],
            ["mmcl_in100", "mmcl_in1k", "mmcl_tiny_imagenet"],
            ["mmcl_in100"],
        ),
        (["--backbone", "vit"], ["sce_in1k_vit_s16"], []),
        (["--data", "cifar100", "--method", "sce"], [], ["sce_cifar10"]),  # a variant alone
        (["--data", "cifar10", "--method", "simclr"], ["simclr_cifar10"], []),  # the name itself, not a part
    ],
)
def test_ls_chooses(
    capsys: pytest.CaptureFixture[str], options: list[str], recipes: list[str], variants: list[str]
) -> None:
    for kind in ([], ["recipes"]):
        code, out, _ = run(capsys, "ls", *kind, *options)
        assert code == 0
        cut = out.index("also, by overrides:") if "also, by overrides:" in out else len(out)
        assert [line.split()[0] for line in out[:cut] if line.split(" ")[0] in registry.recipes()] == recipes
        also = [line.split()[0] for line in out[cut + 1 :] if not line.startswith("    ")]
        assert also == variants


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "sec"], "no recipe has --method=sec; did you mean sce? (there are margin, "),
        (["--method", "sce", "--data", "mnist1k"], "no recipe with --method=sce has --data=mnist1k"),
        (["datasets", "--data", "cifar10"], "--data selects recipes; write sslzoo ls recipes"),
    ],
)
def test_ls_says_what_there_is(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = run(capsys, "ls", *arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"sslzoo ls: {said}")


def test_cp(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundled = registry.recipes()[NAME].read_text()
    code, _, err = run(capsys, "cp", NAME, str(tmp_path))
    assert (code, err) == (0, [])
    copy = tmp_path / f"{NAME}.yaml"
    assert copy.read_text() == bundled

    copy.write_text("mine")
    code, out, err = run(capsys, "cp", f"{NAME}.yaml", str(copy))
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].endswith(f"{copy} exists; --force replaces it")
    assert copy.read_text() == "mine"

    assert run(capsys, "cp", "--force", NAME, str(copy))[0] == 0
    assert copy.read_text() == bundled

    code, _, err = run(capsys, "cp", NAME, str(tmp_path / "no" / "where.yaml"))
    assert (code, len(err)) == (2, 1)


@pytest.mark.parametrize("end", ["/", "//", "/.", "/.."])
def test_cp_to_a_folder_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, end: str
) -> None:
    dest = f"{tmp_path}/missing{end}"
    code, out, err = run(capsys, "cp", NAME, dest)
    assert (code, out) == (2, [])
    assert err == [f"sslzoo cp: {dest} is not a folder; create it first, or name a file"]
    assert list(tmp_path.iterdir()) == []


def test_cp_onto_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a bundled name in the working directory is what ``NAME.yaml`` means."""
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "cp", NAME, ".")[0] == 0
    copy = tmp_path / f"{NAME}.yaml"
    copy.write_text("mine")
    code, _, err = run(capsys, "cp", "--force", copy.name, ".")
    assert code == 2 and "is the same file; for the bundled recipe leave .yaml out" in err[0]
    assert copy.read_text() == "mine"
    assert run(capsys, "cp", "--force", NAME, ".")[0] == 0
    assert copy.read_text() == registry.recipes()[NAME].read_text()


def test_a_copied_recipe_is_the_one_that_runs(tmp_path: Path) -> None:
    """As a user does it: copy, edit, and type the name that cp printed."""

    def typed(*arguments: str) -> str:
        command = [sys.executable, "-m", "sslzoo", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout

    (tmp_path / "my recipes").mkdir()
    for folder in (".", "my recipes"):
        said = typed("cp", NAME, folder)
        program, verb, option, name = shlex.split(said.rpartition(": now ")[2])
        assert (program, verb, option) == ("sslzoo", "fit", "--recipe")
        copy = tmp_path / name
        copy.write_text(copy.read_text().replace("temperature: 0.5", "temperature: 0.125"))
        shown = typed("show", name)
        assert ["temperature:", "0.125", "#", "recipe"] in [line.split() for line in shown.splitlines()]
        assert typed("diff", NAME, name).splitlines()[1].split() == ["method.temperature", "0.5", "0.125"]


def test_a_file_wins_over_a_bundled_name_at_its_own_path_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = registry.recipes()[NAME]
    assert registry.recipe_path(f"{NAME}.yaml") == registry.recipe_path(NAME) == bundled
    Path(f"{NAME}.yaml").touch()
    assert registry.recipe_path(f"{NAME}.yaml") == Path(f"{NAME}.yaml")
    assert registry.recipe_path(f"{NAME}.yml") == registry.recipe_path(NAME) == bundled
    Path("quickstart").mkdir()  # a folder is no recipe
    assert registry.recipe_path("quickstart") == registry.recipes()["quickstart"]


def test_show_prints_a_recipe_with_origins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "show", NAME, "optim.lr=0.25", "trainer.devices=2")
    assert code == 0
    assert ["lr:", "0.25", "#", "override"] in [line.split() for line in out]
    assert ["temperature:", "0.5", "#", "recipe"] in [line.split() for line in out]
    assert ["momentum:", "0.9", "#", "default"] in [line.split() for line in out]
    assert "# derived: peak_lr = 0.5" in out
    assert "# derived: micro_batch_size = 256" in out
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join(out))
    _, out, _ = run(capsys, "diff", NAME, str(mine))
    assert [line.split() for line in out] == [
        [NAME, str(mine)],
        ["optim.lr", "1.0", "0.25"],
        ["trainer.devices", "1", "2"],
    ]


def test_validate_prints_a_line_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(registry.recipes()[NAME].read_text().replace("temperature:", "temprature:"))
    line = bad.read_text()[: bad.read_text().index("temprature")].count("\n") + 1
    code, out, err = run(capsys, "validate", NAME, str(bad), "simclr_stl10", "optim.lr=1")
    assert code == 2
    assert out == [f"{NAME}: fine", "simclr_stl10: fine"]
    assert err == [f"{bad}:{line}: method.temprature: unknown key; did you mean method.temperature?"]
    assert run(capsys, "validate", NAME) == (0, [f"{NAME}: fine"], [])


def test_diff_shows_nothing_where_nothing_differs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "diff", NAME, NAME) == (0, [], [])
    mine = tmp_path / "mine.yaml"
    classes = [f"c{i}" for i in range(100)]
    mine.write_text(registry.recipes()[NAME].read_text().replace("data:", f"data:\n  classes: {classes}"))
    _, out, _ = run(capsys, "diff", NAME, str(mine))
    assert any(line.startswith("data.classes ") and "100 items: c0 .. c99" in line for line in out)


def test_an_interrupt_is_130_and_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    def break_down(args: object) -> int:
        raise ValueError("not a recipe's fault")

    monkeypatch.setattr("sslzoo.cli.ls.run", interrupt)
    assert main(["ls"]) == 130
    monkeypatch.setattr("sslzoo.cli.ls.run", break_down)
    with pytest.raises(ValueError, match="not a recipe's fault"):
        main(["ls"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["fit", "--help"] if "fit" in verbs() else ["--version"],
        ["ls"],
        ["show", NAME],
        ["validate", *registry.recipes()],
        ["validate", NAME, "method.no_such_key=3"],
        ["diff", NAME, "simclr_in1k"],
        ["submit", "--recipe", NAME, "--gpus-per-node", "8", "--dry-run"],
    ],
    ids=" ".join,
)
def test_light_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    """Torch takes a second to import, Lightning four; these answer at once."""
    code = (
        "import sys\n"
        "from sslzoo.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'timm', 'wandb', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "light = {'--help': {'omegaconf', 'rich', 'yaml'}, 'ls': {'omegaconf', 'rich'}}.get(sys.argv[1], set())\n"
        "assert not light & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    """``sslzoo ls | head -1``."""
    done = subprocess.run(
        f"{sys.executable} -m sslzoo ls recipes | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr, done.stderr


def test_python_m_sslzoo_and_its_exit_code(tmp_path: Path) -> None:
    """From any folder, with the exit code and the one line that a shell sees."""
    command = [sys.executable, "-m", "sslzoo", "show", NAME, "optim.lr=fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "override: optim.lr: expected a number, got 'fast'\n"
