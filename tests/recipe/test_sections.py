"""The framework's sections: what is a choice, what has no effect and is refused for it, and what was renamed."""

from __future__ import annotations

import re

import pytest

from sslzoo.recipe.load import RecipeError, load_recipe
from sslzoo.recipe.sections import (
    AdamConfig,
    ConstantSchedule,
    CosineSchedule,
    LARSConfig,
    SGDConfig,
    StepSchedule,
)

ADAM = "optim={name: adam, lr: 1e-3, lr_scaling: none, weight_decay: 0.1, warmup_epochs: 0}"
LARS = "optim={name: lars, lr: 0.3, lr_scaling: linear, weight_decay: 1e-6, warmup_epochs: 10}"
SGD = "optim={name: sgd, lr: 0.1, lr_scaling: linear, weight_decay: 0.1, warmup_epochs: 1}"
ON_FASHION_MNIST = "quickstart"  # AdamW, one channel, jitter and blur in view 1, none in view 0
ON_CIFAR = "simclr_cifar10"  # LARS, RGB


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return re.sub(r"^(override|\S+\.yaml:\d+): ", "", text)


def test_one_optimiser_or_another() -> None:
    assert isinstance(load_recipe(ON_CIFAR).recipe.optim, LARSConfig)
    adam = load_recipe(ON_CIFAR, [ADAM, "optim.betas=[0.8,0.9]"]).recipe.optim
    assert isinstance(adam, AdamConfig) and adam.betas == (0.8, 0.9)
    sgd = load_recipe(ON_CIFAR, [SGD, "optim.nesterov=true"]).recipe.optim
    assert isinstance(sgd, SGDConfig) and sgd.nesterov


def test_a_schedule_by_name_or_with_numbers() -> None:
    def schedule(*overrides: str) -> object:
        return load_recipe(ON_CIFAR, overrides).recipe.optim.schedule

    assert schedule() == CosineSchedule()
    assert schedule("optim.schedule.min_lr=0.1") == CosineSchedule(min_lr=0.1)
    assert schedule("optim.schedule=constant") == ConstantSchedule()
    assert schedule("optim.schedule={name: step, milestones: [3, 5]}") == StepSchedule(milestones=(3, 5))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((LARS, "optim.nesterov=true"), "optim.nesterov: not a key of optim lars, but of sgd"),
        ((LARS, "optim.decay_1d=true"), "optim.decay_1d: not a key of optim lars, but of sgd, adam, adamw"),
        ((LARS, "optim.betas=[0.9,0.9]"), "optim.betas: not a key of optim lars, but of adam, adamw"),
        ((ADAM, "optim.momentum=0.5"), "optim.momentum: not a key of optim adam, but of lars, sgd"),
        (
            (ADAM, "optim.trust_coefficient=9"),
            "optim.trust_coefficient: not a key of optim adam, but of lars",
        ),
        (
            ("optim.schedule.gamma=0.5",),
            "optim.schedule.gamma: not a key of optim.schedule cosine, but of step",
        ),
        (
            ("optim.schedule={name: constant, min_lr: 0.1}",),
            "optim.schedule.min_lr: not a key of optim.schedule constant, but of cosine",
        ),
        (("optim.schedule=step",), "optim.schedule.milestones: missing key; optim.schedule step needs it"),
        (
            (ADAM, "optim.warmup_ramp=open"),
            "optim.warmup_ramp: must stay closed with warmup_epochs=0, got open",
        ),
        (
            (ADAM, "optim.warmup_start_lr=0.1"),
            "optim.warmup_start_lr: must stay 0.0 with warmup_epochs=0, got 0.1",
        ),
        ((SGD, "optim.nesterov=true", "optim.momentum=0"), "optim.nesterov: must be false with momentum=0"),
        (
            (SGD, "optim.decay_1d=true", "optim.weight_decay=0"),
            "optim.decay_1d: must be false with weight_decay=0",
        ),
    ],
)
def test_a_number_that_this_optimiser_or_schedule_does_not_heed(
    overrides: tuple[str, ...], said: str
) -> None:
    assert refused(ON_CIFAR, *overrides) == said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.min_lr=0.1", "optim.min_lr: renamed: use optim.schedule.min_lr"),
        ("optim.gamma=0.5", "optim.gamma: renamed: use optim.schedule.gamma"),
        ("optim.milestones=[3]", "optim.milestones: renamed: use optim.schedule.milestones"),
        ("eval.resize=0", "eval.resize: must be at least size=32, got 0; null leaves the images as they are"),
        ("eval.bank_size=0", "eval.bank_size: must be positive, got 0; null takes all training samples"),
    ],
)
def test_what_earlier_recipes_said(override: str, said: str) -> None:
    assert refused(ON_CIFAR, override) == said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("views.0.brightness=0.9",),
            "views.0.brightness: must stay 0.0 with jitter_p=0, which never jitters",
        ),
        (
            ("views.1.jitter_p=0",),
            "views.1.brightness: must stay 0.0 with jitter_p=0, which never jitters; so must contrast",
        ),
        (
            ("views.1.brightness=0", "views.1.contrast=0"),
            "views.1.jitter_p: must be 0 without brightness, contrast, saturation or hue, got 1.0",
        ),
        (
            ("views.0.blur_sigma=[1,2]",),
            "views.0.blur_sigma: must stay (0.1, 2.0) with blur_p=0, which never blurs",
        ),
        (("views.1.blur_p=0",), "views.1.blur_kernel: must stay 23 with blur_p=0, which never blurs"),
        (
            ("views.0.solarize_threshold=0.3",),
            "views.0.solarize_threshold: must stay 0.5 with solarize_p=0, which never solarises",
        ),
        (("views.1.hue=0.1",), "views.1.hue: must be 0 with backbone.in_channels=1: it needs RGB images"),
        (
            ("views.0.grayscale_p=0.1",),
            "views.0.grayscale_p: must be 0 with backbone.in_channels=1: it needs RGB images",
        ),
        (("views.1.blur_kernel=1",), "views.1.blur_kernel: must be odd and at least 3, got 1"),
        (("views.1.solarize_threshold=1.5",), "views.1.solarize_threshold: must lie in [0, 1], got 1.5"),
        (("backbone.stem=small",), "backbone.stem: must be left out: conv5 has its own stem"),
        (("backbone.options={width: 3}",), "backbone.options: must be left out: conv5 has no options"),
        (("data.root=there",), "data.root: must be left out: fashion_mnist_12k comes with the package"),
        (("eval.bank_size=10",), "eval.knn_k: must be at most bank_size=10, got 20"),
        (
            ("eval.knn_k=20000",),
            "eval.knn_k: must be at most 12000, the number of training samples, got 20000",
        ),
        (
            ("logging.keep_epochs=[3,50]",),
            "logging.keep_epochs.1: must be at most trainer.max_epochs=22, got 50",
        ),
        (
            ("probe.train_size=1",),
            "probe.train_size: must be at least 2, got 1; null takes all training samples",
        ),
        (
            ("eval.baselines=false", "probe.momentum=0.5"),
            "probe.momentum: must stay 0.9: nothing learns by SGD without probe.online=true, eval.baselines=true or "
            "eval.after=[honest]",
        ),
        (
            ("probe.lrs=[0.1,0.1]",),
            "probe.lrs: must list one or more, such as 0.1, each once; got [0.1, 0.1]",
        ),
        (
            ("probe.layers=[]",),
            "probe.layers: must list one or more, such as backbone, each once; got []",
        ),
        (
            ("trainer.gradient_clip_algorithm=norm",),
            "trainer.gradient_clip_algorithm: must be left out without trainer.gradient_clip_val",
        ),
        (
            ("trainer.gradient_clip_val=0",),
            "trainer.gradient_clip_val: must be positive, got 0; leave it out to disable clipping",
        ),
    ],
)
def test_a_setting_without_effect(overrides: tuple[str, ...], said: str) -> None:
    assert refused(ON_FASHION_MNIST, *overrides) == said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr=.nan", "optim.lr: must be finite, got nan"),
        ("optim.lr=nan", "optim.lr: must be finite, got nan"),
        ("optim.lr=1e999", "optim.lr: must be finite, got inf"),
        ("probe.lrs=[.inf]", "probe.lrs.0: must be finite, got inf"),
        ("backbone.options={a: {b: .nan}}", "backbone.options.a.b: must be finite, got nan"),
        ("trainer.gradient_clip_val=.inf", "trainer.gradient_clip_val: must be finite, got inf"),
        ("method.temperature=.inf", "method.temperature: must be finite, got inf"),
        ("seed=99999999999999999999", "seed: must be a number of at most 64 bits"),
        ("optim.lr=???", "optim.lr: ??? stands for a value to be filled in; write one, or leave the key out"),
        ("eval.batch_size=-1", "eval.batch_size: must be positive, got -1"),
        ("eval.size=0", "eval.size: must be positive, got 0"),
        ("views.0.size=-20", "views.0.size: must be positive, got -20"),
        ("views.0.scale=[-1,1]", "views.0.scale: must be positive, got [-1.0, 1.0]"),
        ("views.0.scale=null", "views.0.scale: missing key; a view needs it, such as [0.2, 1.0], or padding"),
        (
            "views.0.padding=4",
            "views.0.scale: must be left out with padding, which cuts a crop without resizing",
        ),
        ("method.projector={widths: [-1]}", "method.projector.widths: must be positive, got [-1]"),
        ("data.workers=-1", "data.workers: must not be negative, got -1"),
        ("data.max_bad_fraction=2", "data.max_bad_fraction: must lie in [0, 1], got 2.0"),
        ("logging.keep_epochs=[0]", "logging.keep_epochs: must be positive, got [0]"),
        ("optim.betas=[2,3]", "optim.betas: must lie in [0, 1), got [2.0, 3.0]"),
        (
            "optim.schedule={name: step, milestones: [5,3]}",
            "optim.schedule.milestones: must be increasing epochs, got [5, 3]",
        ),
        (
            "optim.schedule={name: step, milestones: [5], gamma: 1}",
            "optim.schedule.gamma: must not be 1, which changes nothing; use schedule: constant",
        ),
        ("name=../x", "name: must be a single folder name, got '../x'"),
        ("name=..", "name: must be a single folder name, got '..'"),
        ("method.name=..:x", "method.name: must have the form module:attribute, got '..:x'"),
        ("method.name=nope:X", "method.name: 'nope:X' cannot be loaded: No module named 'nope'"),
        ("backbone.name=a-b:x", "backbone.name: must have the form module:attribute, got 'a-b:x'"),
        ("data.dataset=..:x", "data.dataset: must have the form module:attribute, got '..:x'"),
        (
            "trainer.precision=bf61",
            "trainer.precision: must be one of 32-true, 16-mixed, bf16-mixed, 16-true, bf16-true, 64-true, 32, 16, "
            "bf16, 64; got 'bf61'; did you mean bf16?",
        ),
        ("trainer.num_nodes=0", "trainer.num_nodes: must be positive, got 0"),
        ("optim.LR=3", "optim.LR: unknown key; did you mean optim.lr?"),
        ("Optim.lr=3", "Optim: unknown key; did you mean optim?"),
    ],
)
def test_a_value_that_cannot_be(override: str, said: str) -> None:
    assert refused(ON_FASHION_MNIST, override) == said


@pytest.mark.parametrize("devices", ["0", "-2", "[]", "'0,0'", "[0,0]", "[-1]", "'0'", "'-2'", "two"])
def test_devices_that_are_none(devices: str) -> None:
    said = "trainer.devices: must be a number of devices, a list of distinct indices, or auto; got "
    assert refused(ON_FASHION_MNIST, f"trainer.devices={devices}").startswith(said)


@pytest.mark.parametrize(
    ("devices", "count"), [("2", 2), ("'2'", 2), ("[0,3]", 2), ("'0,3'", 2), ("'3,'", 1)]
)
def test_devices_that_are_counted(devices: str, count: int) -> None:
    derived = load_recipe(ON_FASHION_MNIST, [f"trainer.devices={devices}"]).derived
    assert derived["micro_batch_size"] == 128 / count


@pytest.mark.parametrize("devices", ["auto", "-1", "'-1'"])
def test_devices_that_the_machine_counts(devices: str) -> None:
    assert "micro_batch_size" not in load_recipe(ON_CIFAR, [f"trainer.devices={devices}"]).derived


def test_precision_as_a_number() -> None:
    assert load_recipe(ON_FASHION_MNIST, ["trainer.precision=16"]).recipe.trainer["precision"] == "16"
