"""Linear evaluation as in the code of SCE (arXiv:2111.14585)."""

from __future__ import annotations

from sslzoo.protocols.protocol import ViewProtocol
from sslzoo.recipe.sections import PlainView, ViewConfig

SCE = ViewProtocol(
    name="sce",
    source="SCE (arXiv:2111.14585), official code, configuration mocov3/resnet50 of its linear classifier",
    summary="SGD, rate 0.4, cosine, 90 epochs of random resized crops",
    remarks="The authors keep the classifier that is best on the test images.",
    reported="best",
    view=ViewConfig(size=224, scale=(0.08, 1.0), flip_p=0.5),
    plain=PlainView(size=224, resize=256),
    initial="normal",
    lrs=(0.1,),
    lr_scaling="linear",
    schedule="cosine",
    batch_size=1024,
    keep_last=False,
    epochs=90,
    test_epochs=1,
)

SCE_CIFAR = ViewProtocol(
    name="sce_cifar",
    source="SCE (arXiv:2111.14585), official code, configuration moco/resnet18 of its linear classifier",
    summary="SGD, rate 30, times 0.1 at epochs 60, 80 of 100, crops of padded images",
    remarks="The authors keep the classifier that is best on the test images.",
    reported="best",
    view=ViewConfig(size=32, padding=4, flip_p=0.5),
    plain=PlainView(size=32),
    initial="normal",
    lrs=(30.0,),
    lr_scaling="none",
    schedule="steps",
    milestones=(60, 80),
    batch_size=256,
    keep_last=False,
    epochs=100,
    test_epochs=1,
)
