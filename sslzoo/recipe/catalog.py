"""The data sets that a recipe may name. Costs no torch to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sslzoo.checks import did_you_mean


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before it is opened."""

    description: str
    layout: str  # under data.root; empty for embedded data
    splits: tuple[str, ...]  # empty: any folder name
    channels: int = 3
    num_classes: int = 0  # 0: from the folders, or none
    sizes: Mapping[str, int] = field(default_factory=dict)  # images a split; empty: depends on the folder

    def nominal_size(self, split: str, classes: Sequence[str]) -> int | None:
        """Images of ``split``; None where the folder, or a choice of ``classes``, decides."""
        return None if classes else self.sizes.get(split)


_CLASS_FOLDERS = "{train,val}/<class>/<image>"

DATASETS: dict[str, DatasetInfo] = {
    "fashion_mnist_12k": DatasetInfo(
        description="12,000 + 2,000 images of Fashion-MNIST, 28 px grey, inside the package",
        layout="",
        splits=("train", "test"),
        channels=1,
        num_classes=10,
        sizes={"train": 12_000, "test": 2_000},
    ),
    "fashion_mnist": DatasetInfo(
        description="Fashion-MNIST, 60,000 + 10,000 images, 28 px grey",
        layout="{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], there or in FashionMNIST/raw/",
        splits=("train", "test"),
        channels=1,
        num_classes=10,
        sizes={"train": 60_000, "test": 10_000},
    ),
    "cifar10": DatasetInfo(
        description="CIFAR-10, 50,000 + 10,000 images, 32 px",
        layout="cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",
        splits=("train", "test"),
        num_classes=10,
        sizes={"train": 50_000, "test": 10_000},
    ),
    "cifar100": DatasetInfo(
        description="CIFAR-100, 50,000 + 10,000 images, 32 px",
        layout="cifar-100-python/{train,test,meta}",
        splits=("train", "test"),
        num_classes=100,
        sizes={"train": 50_000, "test": 10_000},
    ),
    "stl10": DatasetInfo(
        description="STL-10, 100,000 unlabelled + 5,000 + 8,000 images, 96 px",
        layout="stl10_binary/{unlabeled_X,train_X,train_y,test_X,test_y}.bin",
        splits=("unlabeled", "train+unlabeled", "train", "test"),
        num_classes=10,
        sizes={"unlabeled": 100_000, "train+unlabeled": 105_000, "train": 5_000, "test": 8_000},
    ),
    "tiny_imagenet": DatasetInfo(
        description="Tiny-ImageNet, 100,000 + 10,000 images of 200 classes, 64 px",
        layout="tiny-imagenet-200/{train/<wnid>/images/*.JPEG,val/images/*.JPEG,val/val_annotations.txt}",
        splits=("train", "test"),
        num_classes=200,
        sizes={"train": 100_000, "test": 10_000},
    ),
    "imagenet100": DatasetInfo(
        description="ImageNet, the 100 classes that data.classes lists",
        layout=_CLASS_FOLDERS,
        splits=("train", "test"),
        num_classes=100,
        sizes={"train": 126_689, "test": 5_000},  # of the usual list (CMC's)
    ),
    "imagenet1k": DatasetInfo(
        description="ImageNet-1k, 1,281,167 + 50,000 images",
        layout=_CLASS_FOLDERS,
        splits=("train", "test"),
        num_classes=1000,
        sizes={"train": 1_281_167, "test": 50_000},
    ),
    "imagefolder": DatasetInfo(
        description="your images, one folder a class under one folder a split",
        layout="<split>/<class>/<image>",
        splits=(),
    ),
    "folder": DatasetInfo(
        description="your images without labels, in any folders under data.root",
        layout="<image> or <folders>/<image>",
        splits=(),
    ),
}


def dataset_info(name: str) -> DatasetInfo:
    """The entry ``name``, or a ``ValueError`` with the closest right name. Of a plug-in, ``module:function``, nothing
    is known before it is opened."""
    if ":" in name:
        return DatasetInfo(description="a plug-in", layout="", splits=())
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f"; known are {', '.join(DATASETS)}"
        raise ValueError(f"unknown data.dataset {name!r}{hint}")
    return DATASETS[name]
