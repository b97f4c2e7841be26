"""Linear evaluation as in the two parts of MMCL's code (arXiv:2112.11450)."""

from __future__ import annotations

from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, ViewConfig

MMCL = ViewProtocol(
    name="mmcl",
    source="MMCL (arXiv:2112.11450), official code, SSLEval with configs/imagenet100_eval.yaml",
    summary="SGD, rate 1.6, linear decay over 28,080 steps on ImageNet, batch 4,096",
    remarks="The authors' images have values in [0, 1] without mean and std; here they are the recipe's.",
    view=ViewConfig(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip_p=0.5),
    plain=PlainView(size=224, proportion=0.875, square=False, interpolation="bicubic"),
    initial="zeros",
    lrs=(0.1,),
    lr_scaling="linear",
    schedule="linear",
    batch_size=4096,
    keep_last=True,
    epochs=90,
    iterations={"imagenet1k": 28_080, "imagenet100": 3_902},
)

MMCL_CIFAR = ViewProtocol(
    name="mmcl_cifar",
    source="MMCL (arXiv:2112.11450), official code, CIFAR100/linear.py",
    summary="Adam, rate 0.001, 100 epochs, batch norm of the encoder in training mode",
    remarks=(
        "The encoder's running statistics move while the classifier is trained, in the code as here. The authors "
        "report the best of 20 tests."
    ),
    reported="best",
    view=ViewConfig(
        size=32,
        scale=(0.08, 1.0),
        flip_p=0.5,
        jitter_p=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        grayscale_p=0.2,
        blur_p=0.5,
        blur_kernel=3,
    ),
    plain=PlainView(size=32),
    batch_norm="train",
    initial="default",
    optimizer="adam",
    weight_decay=1e-6,
    lrs=(1e-3,),
    lr_scaling="none",
    schedule="constant",
    batch_size=512,
    keep_last=True,
    epochs=100,
    test_epochs=5,
)
