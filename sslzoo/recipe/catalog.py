"""The data sets that a recipe may name, and what is known before they are opened. Importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sslzoo.checks import did_you_mean
from sslzoo.recipe.class_lists import CLASS_LISTS


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The facts about a data set. A recipe may override mean, std and the choice of classes."""

    reader: str  # module:function, called with the recipe's section and the number of channels
    description: str
    page: str = ""  # where the data set can be downloaded
    layout: str  # of the files under data.root; empty for embedded data
    splits: tuple[str, ...]  # empty: any folder name
    mean: tuple[float, ...] = ()  # per channel, for images in [0, 1]; empty: unknown
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] | int = (
        0  # names in label order, or their number if the files hold the names; 0: by folder, or no classes
    )
    class_list: str = ""  # the key of CLASS_LISTS that defines the data set, if any
    sizes: Mapping[str, int] = field(default_factory=dict)  # images per split; empty: depends on the folder
    labelled: tuple[str, ...] | None = None  # splits with labels; None: all
    decoded_by_workers: bool = False  # one by one, from files of any size; otherwise all images are in memory

    def has_labels(self, split: str) -> bool:
        """Whether the images of ``split`` have labels."""
        return self.labelled is None or split in self.labelled

    @property
    def channels(self) -> int:
        return len(self.mean) or 3

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order; empty if they are in the files."""
        return self.classes if isinstance(self.classes, tuple) else ()

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: given by the folders, or no classes."""
        return len(self.classes) if isinstance(self.classes, tuple) else self.classes

    def nominal_size(self, split: str, classes: str | tuple[str, ...]) -> int | None:
        """Number of images in ``split`` for the class list ``classes``; None if unknown: any folder, or hand-picked
        classes."""
        sizes = CLASS_LISTS[classes].sizes if isinstance(classes, str) else {} if classes else self.sizes
        return sizes.get(split)


_READERS = "sslzoo.data.datasets:"
_CLASS_FOLDERS = "{train,val}/<class>/<image>"
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's

DATASETS: dict[str, DatasetInfo] = {
    "fashion_mnist_12k": DatasetInfo(
        reader=_READERS + "fashion_mnist_12k",
        description="part of Fashion-MNIST, bundled, 28 px",
        layout="",
        splits=("train", "test"),
        mean=(0.2860,),
        std=(0.3530,),
        classes=_FASHION,
        sizes={"train": 12_000, "test": 2_000},
    ),
    "fashion_mnist": DatasetInfo(
        reader=_READERS + "fashion_mnist",
        description="Fashion-MNIST, 28 px, grey",
        page="https://github.com/zalandoresearch/fashion-mnist",
        layout="{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], there or in FashionMNIST/raw/",
        splits=("train", "test"),
        mean=(0.2860,),
        std=(0.3530,),
        classes=_FASHION,
        sizes={"train": 60_000, "test": 10_000},
    ),
    # Published code has two versions of CIFAR's std; recipes whose authors used the other one (0.2023, ...) set it.
    "cifar10": DatasetInfo(
        reader=_READERS + "cifar10",
        description="CIFAR-10, 32 px",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",
        splits=("train", "test"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        classes=10,
        sizes={"train": 50_000, "test": 10_000},
    ),
    "cifar100": DatasetInfo(
        reader=_READERS + "cifar100",
        description="CIFAR-100, 32 px",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-100-python/{train,test,meta}",
        splits=("train", "test"),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        classes=100,
        sizes={"train": 50_000, "test": 10_000},
    ),
    "stl10": DatasetInfo(
        reader=_READERS + "stl10",
        description="STL-10, 96 px; 100,000 more without labels",
        page="https://cs.stanford.edu/~acoates/stl10/",
        layout="stl10_binary/{unlabeled_X,train_X,train_y,test_X,test_y}.bin",
        splits=("unlabeled", "train+unlabeled", "train", "test"),
        # CIFAR-10's, as in the code of arXiv:2111.14585 and, rounded, in solo-learn's.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        classes=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        sizes={"unlabeled": 100_000, "train+unlabeled": 105_000, "train": 5_000, "test": 8_000},
        labelled=("train", "test"),
    ),
    "tiny_imagenet": DatasetInfo(
        reader=_READERS + "tiny_imagenet",
        description="Tiny-ImageNet, 64 px",
        page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        layout="tiny-imagenet-200/{train/<wnid>/images/*.JPEG,val/images/*.JPEG,val/val_annotations.txt}",
        splits=("train", "test"),
        mean=_IMAGENET_MEAN,  # it is a subset of ImageNet, and no author's code uses other values
        std=_IMAGENET_STD,
        classes=200,
        sizes={"train": 100_000, "test": 10_000},
        decoded_by_workers=True,
    ),
    "imagenet100": DatasetInfo(
        reader=_READERS + "imagenet",
        description="100 classes of ImageNet, by default CMC's",
        page="https://www.image-net.org/download.php",
        layout=_CLASS_FOLDERS,
        splits=("train", "test"),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        classes=100,
        class_list="imagenet100_cmc",
        sizes=CLASS_LISTS["imagenet100_cmc"].sizes,
        decoded_by_workers=True,
    ),
    "imagenet1k": DatasetInfo(
        reader=_READERS + "imagenet",
        description="ImageNet-1k",
        page="https://www.image-net.org/download.php",
        layout=_CLASS_FOLDERS,
        splits=("train", "test"),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        classes=1000,
        sizes={"train": 1_281_167, "test": 50_000},
        decoded_by_workers=True,
    ),
    "imagefolder": DatasetInfo(
        reader=_READERS + "imagefolder",
        description="your images, a folder per split and class",
        layout="<split>/<class>/<image>",
        splits=(),
        decoded_by_workers=True,
    ),
    "folder": DatasetInfo(
        reader=_READERS + "folder",
        description="your images in any folders, no labels",
        layout="<image> or <folders>/<image>",
        splits=(),
        labelled=(),
        decoded_by_workers=True,
    ),
    "webdataset": DatasetInfo(
        reader="sslzoo.data.tar_shards:webdataset",
        description="your images in tar files (WebDataset)",
        layout="<split>/*.tar or *<split>-*.tar, with members KEY.jpg (or .png, ...) and KEY.cls or KEY.json",
        splits=(),
        decoded_by_workers=True,
    ),
    "huggingface": DatasetInfo(
        reader="sslzoo.data.huggingface:huggingface",
        description="images saved by HF's datasets",
        layout="<split>/{state.json,dataset_info.json,*.arrow}, as save_to_disk of datasets writes them",
        splits=(),
        decoded_by_workers=True,
    ),
    "packed": DatasetInfo(
        reader=_READERS + "packed",
        description="images packed by sslzoo pack",
        layout="<split>/{packed.json,images.bin,index.npy,names.npy}",
        splits=(),
        decoded_by_workers=True,
    ),
}


def dataset_info(name: str) -> DatasetInfo:
    """The entry of the data set ``name``; ``ValueError`` suggests the closest known name.

    Nothing is known about a plug-in, ``module:function``, before it is opened.
    """
    if ":" in name:
        return DatasetInfo(reader=name, description="a plug-in", layout="", splits=())
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f"; known are {', '.join(DATASETS)}"
        raise ValueError(f"unknown data.dataset {name!r}{hint}")
    return DATASETS[name]
