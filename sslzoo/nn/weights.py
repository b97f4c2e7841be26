"""Initial weights of an encoder: those that torchvision or timm publish, or a file.

No code in a file is executed: it is read by safetensors, or by ``torch.load`` with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from sslzoo.checks import listed, require
from sslzoo.recipe.sections import PRETRAINED, BackboneConfig

log = logging.getLogger(__name__)

HEADS = ("fc.", "classifier.", "heads.", "head.")  # classifiers, which an encoder does not have
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DDP and torch.compile add to every name


class MissingWeights(ValueError):
    """The file is missing and cannot be downloaded."""


def weights_file(cfg: BackboneConfig) -> Path:
    """Return the file that ``cfg.weights`` refers to, downloading published weights unless they are in the cache.

    Raises :class:`MissingWeights`, which says how to get the file, and ``ValueError`` if none are published.
    """
    if cfg.weights != PRETRAINED:
        path = Path(cfg.weights or "").expanduser()
        if not path.is_file():
            raise MissingWeights(
                f"backbone.weights: there is no file {path}; give a file, or {PRETRAINED} for the library's own weights"
            )
        return path
    return _of_timm(cfg) if cfg.name.startswith("timm/") else _of_torchvision(cfg)


def _of_torchvision(cfg: BackboneConfig) -> Path:
    from torchvision import models

    default = getattr(models.get_model_weights(cfg.name), "DEFAULT", None)
    require(
        default is not None,
        f"backbone.weights: torchvision has no weights for {cfg.name}; leave backbone.weights out",
    )
    return _in_torch_hub(cast(Any, default).url)


def _of_timm(cfg: BackboneConfig) -> Path:
    import timm

    name = cfg.name.removeprefix("timm/")
    try:
        own = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        own = None
    if own is not None and own.hf_hub_id:
        return _in_hugging_face(own.hf_hub_id, own.hf_hub_filename)
    if own is not None and isinstance(own.url, str) and own.url:
        return _in_torch_hub(own.url)
    having = timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)
    others = f"; there are weights for {listed([f'timm/{n}' for n in having])}" if having else ""
    raise ValueError(f"backbone.weights: timm has no weights for {name}{others}; leave backbone.weights out")


def _in_torch_hub(url: str) -> Path:
    """Return the file of ``url`` in the cache of torch.hub, downloading it if necessary."""
    from filelock import FileLock

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    if path.exists():
        return path
    try:
        log.warning("downloading %s", url)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # only one of a run's processes downloads
            if not path.exists():
                match = torch.hub.HASH_REGEX.search(path.name)
                torch.hub.download_url_to_file(url, str(path), match.group(1) if match else None)
    except (OSError, RuntimeError) as error:  # no network; a damaged download
        raise MissingWeights(
            f"backbone.weights: {path.name} is not in {folder} and cannot be downloaded ({_brief(error)}); "
            f"download {url} elsewhere and copy it there, or set TORCH_HOME to a folder with hub/checkpoints"
        ) from error
    return path


def _in_hugging_face(repository: str, filename: str | None) -> Path:
    """Return the file of weights of ``repository`` (``owner/name``, optionally with ``@revision``) in the cache of
    Hugging Face, downloading it if necessary. A safetensors file is preferred to ``filename``."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = repository.partition("@")
    stem = Path(filename or "model").stem
    safe = "model.safetensors" if stem == "pytorch_model" else f"{stem}.safetensors"
    names = dict.fromkeys((safe, filename or "pytorch_model.bin"))
    for name in names:
        cached = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    failure: BaseException | None = None
    log.warning("downloading the weights of %s from Hugging Face", repository)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError as error:  # no network
            failure = error.__cause__ or error
            break
        except EntryNotFoundError as error:
            failure = error  # try the next name
        except Exception as error:  # the HTTP library, and so its errors, depend on the version
            failure = error
            break
    raise MissingWeights(
        f"backbone.weights: {safe} of {repository} is not in {constants.HF_HUB_CACHE} and cannot be downloaded "
        f"({_brief(failure)}); run `hf download {repository} {safe}` elsewhere and copy its cache here, or set "
        "HF_HOME to a folder that has it in hub"
    ) from failure


def _brief(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of a module's weights and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- loading a file into an encoder ---------------------------------------------------------------


def load_file(model: nn.Module, path: Path, cfg: BackboneConfig) -> None:
    """Load every tensor of ``model`` from ``path``, matched by name and shape.

    Other tensors in the file, such as a classifier, are left out and named in the log. If ``cfg.in_channels`` is not 3,
    the first convolution of an RGB file is adapted as in timm. Raises ``ValueError`` naming missing tensors and wrong
    shapes.
    """
    own, state = model.state_dict(), read_state(path)
    count = "num_batches_tracked"  # absent in files from before 2019
    missing = [name for name in own if name not in state and not name.endswith(count)]
    require(
        not missing,
        f"backbone.weights: {path} lacks {len(missing)} of the {len(own)} tensors of {cfg.name}: {listed(missing)} "
        f"(it has {listed(list(state))}); set backbone as it was when the file was made",
    )
    taken = {name: _adapted(state[name], own[name], cfg) for name in own if name in state}
    wrong = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in taken.items()
        if value.shape != own[name].shape
    ]
    require(
        not wrong,
        f"backbone.weights: {path} has different shapes from {cfg.name} with stem {cfg.stem} and in_channels "
        f"{cfg.in_channels}: {listed(wrong)}; set backbone as it was when the file was made",
    )
    model.load_state_dict(own | taken)
    _say_left_out(path, [name for name in state if name not in own])


def _say_left_out(path: Path, names: list[str]) -> None:
    heads = all(name.startswith(HEADS) for name in names)
    if names:
        log.log(
            logging.INFO if heads else logging.WARNING,
            "backbone.weights: tensors in %s that the encoder does not have were ignored: %s",
            path,
            listed(names),
        )


def _adapted(value: Tensor, own: Tensor, cfg: BackboneConfig) -> Tensor:
    """Adapt ``value`` to the shape of ``own`` if it is a first convolution with another number of channels."""
    first = value.ndim == own.ndim == 4 and (value.shape[1], own.shape[1]) == (3, cfg.in_channels)
    if not first or cfg.in_channels == 3:
        return value
    from timm.models import adapt_input_conv

    return adapt_input_conv(cfg.in_channels, value)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or of a state dict that torch saved, which may be the entry ``state_dict``
    or ``model`` of a dict. Raises ``ValueError`` for anything else."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"backbone.weights: {path} is damaged ({_brief(error)}); download it again"
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"backbone.weights: {path} is refused: it is damaged, or contains more than tensors and plain values, and "
            "code in a file is never executed; give one made by torch.save(model.state_dict(), PATH)"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"backbone.weights: {path} is damaged ({_brief(error)}); download it again"
        ) from error
    require(
        not (isinstance(content, dict) and "optimizer_steps" in content),
        f"backbone.weights: {path} is an sslzoo checkpoint; start from it with --init-from {path}",
    )
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    require(
        len(tensors) > 0,
        f"backbone.weights: {path} contains no state dict; give one made by torch.save(model.state_dict(), PATH)",
    )
    return {_unwrapped(name): value for name, value in tensors.items()}


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


@contextmanager
def timm_checked(path: Path, cfg: BackboneConfig) -> Iterator[None]:
    """Raise ``ValueError`` if timm, while it loads ``path``, logs that tensors are missing or fails."""
    heard = _Heard()
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    try:
        yield
    except (RuntimeError, NotImplementedError, FileNotFoundError) as error:
        raise ValueError(
            f"backbone.weights: {path} does not fit {cfg.name}: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        logger.setLevel(level)
        logger.removeHandler(heard)
    for message in heard.messages:
        require(
            not message.startswith("Missing keys"),
            f"backbone.weights: {path} lacks tensors of {cfg.name}: {message[:200]}",
        )
        if message.startswith("Unexpected keys"):
            log.warning("backbone.weights: %s: %s", path, message[:200])


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def described(cfg: BackboneConfig) -> Mapping[str, Any] | None:
    """Return the manifest's entry on the initial weights: the file and its SHA-256; None if they are random."""
    if cfg.weights is None:
        return None
    path = weights_file(cfg)
    return {"weights": cfg.weights, "file": str(path.absolute()), "sha256": digest(path)}
