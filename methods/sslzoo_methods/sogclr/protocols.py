"""Linear evaluation as in the three versions of SogCLR's code (arXiv:2202.12387)."""

from __future__ import annotations

from dataclasses import replace

from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, ViewConfig

SOGCLR = ViewProtocol(
    name="sogclr",
    source="SogCLR (arXiv:2202.12387), official PyTorch code, lincls.py",
    summary="SGD, rate 0.4, cosine by epoch, 90 epochs of random resized crops",
    remarks="The authors report the best test accuracy of all epochs.",
    reported="best",
    view=ViewConfig(size=224, scale=(0.08, 1.0), flip_p=0.5),
    plain=PlainView(size=224, resize=256),
    initial="normal",
    lrs=(0.1,),
    lr_scaling="linear",
    schedule="cosine_by_epoch",
    batch_size=1024,
    keep_last=True,
    epochs=90,
    test_epochs=1,
)

SOGCLR_CIFAR = replace(
    SOGCLR,
    name="sogclr_cifar",
    source="SogCLR (arXiv:2202.12387), official PyTorch code, branch cifar, lincls.py",
    summary="SGD, rate 0.4, cosine by epoch, 90 epochs of random crops of 32 px",
    view=replace(SOGCLR.view, size=32),
    plain=PlainView(size=32),
)

SOGCLR_TF = ViewProtocol(
    name="sogclr_tf",
    source="SogCLR (arXiv:2202.12387), official TensorFlow code, evaluation after training (SimCLR's code)",
    summary="SGD, Nesterov, rate 1.6, cosine, 90 epochs of random resized crops",
    remarks=(
        "The code also has a classifier trained during pre-training, and does not say which of the two gave the "
        "figures of its tables. Its batches run over the ends of epochs; here the last partial batch of an epoch is "
        "dropped."
    ),
    view=ViewConfig(size=224, scale=(0.08, 1.0), interpolation="bicubic", flip_p=0.5),
    plain=PlainView(size=224, proportion=0.875, interpolation="bicubic"),
    initial="zeros",
    nesterov=True,
    lrs=(0.1,),
    lr_scaling="linear",
    schedule="cosine",
    batch_size=4096,
    keep_last=False,
    epochs=90,
)
