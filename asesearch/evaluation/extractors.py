"""Feature extractors: the networks whose features a metric compares, all of them torch-fidelity's
kind.

The registry is torch-fidelity's own, so every extractor it knows works here by name, and ours work
in `torch_fidelity.calculate_metrics`. Ours: `fashion-cnn` and `fashion-vit`, small classifiers of
Fashion-MNIST that travel in the package.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import (
    FeatureExtractorBase,
    FeatureExtractorInceptionV3,
    register_feature_extractor,
)
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINOV2
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from asesearch.backbones.device import tf32
from asesearch.backbones.digests import weights_digest
from asesearch.errors import AseSearchError, EvaluationError, first_line, is_out_of_memory
from asesearch.evaluation.fashion_cnn import FashionCNN
from asesearch.evaluation.fashion_vit import FashionViT
from asesearch.files import file_sha256
from asesearch.foreign import foreign

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
INCEPTION_SHA256_PREFIX = INCEPTION_FILE.rsplit("-", 1)[-1].removesuffix(".pth")

#: Features of extractors whose weights may still have to be fetched, by name.
KNOWN_DIMS = {
    INCEPTION: 2048,
    "vgg16": 4096,
    "dinov2-vit-s-14": 384,
    "dinov2-vit-b-14": 768,
    "dinov2-vit-l-14": 1024,
    "dinov2-vit-g-14": 1536,
}


@dataclass(frozen=True)
class Extractor:
    """A loaded feature extractor.

    Attributes:
        name: its name in the registry.
        digest: SHA-256 of its weights (names, types, shapes and values), whatever file they came
            from; of a class of one's own with its code.
        channels: C of the images it takes; grey images are repeated where it takes three.
        dim: D, the number of features.
        net: the network, in eval mode.
        device: where it is.
    """

    name: str
    digest: str
    channels: int
    dim: int
    net: FeatureExtractorBase
    device: torch.device

    def check_shape(self, channels: int, name: str) -> None:
        """Refuse images of another number of channels.

        Raises:
            EvaluationError: neither grey nor the extractor's number.
        """
        if channels not in (1, self.channels):
            raise EvaluationError(
                f"the extractor {self.name} takes images of {self.channels} channel(s) or grey "
                f"ones; got {channels} in {name}; choose another extractor, or decode latents to "
                "images first"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images: (N, C, H, W) uint8 -> (N, D) float64 on the CPU.

        Raises:
            EvaluationError: not uint8 of four axes, another number of channels, or a network that
                fails or gives something else than D finite features of each.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise EvaluationError(
                f"images must be uint8 of shape (N, C, H, W); got {images.dtype} "
                f"{tuple(images.shape)}; convert with to_uint8"
            )
        self.check_shape(images.shape[1], "this batch")
        images = images.to(self.device).expand(-1, self.channels, -1, -1)  # (N, channels, H, W)
        return _features(self.name, self.net, images, self.dim)


def _features(
    name: str, net: FeatureExtractorBase, images: Tensor, dim: int | None = None
) -> Tensor:
    """(N, D) float64 on the CPU; `dim` is D where it is known.

    Raises:
        EvaluationError: the network fails, or gives something else.
    """
    # TF32 would make a GPU's features differ from the shipped reference's in the third digit
    try:
        with torch.no_grad(), tf32(False), _deterministic():
            found = net(images)
    except (Exception, SystemExit) as error:  # whatever a class of one's own raises
        if isinstance(error, AseSearchError) or is_out_of_memory(error):
            raise
        raise EvaluationError(
            f"the extractor {name} fails on {_in_words(images)}: {_reason(error)}; correct its "
            "class, or choose another"
        ) from error
    one = found[0] if isinstance(found, tuple | list) and len(found) == 1 else None
    out = one.double().cpu() if isinstance(one, Tensor) and one.ndim == 2 else torch.empty(0, 0)
    wanted = (len(images), dim or max(1, out.shape[1]))
    if out.shape != wanted:
        raise EvaluationError(
            f"an extractor must give one tensor of features, ({len(images)}, {dim or 'D'}) for "
            f"{len(images)} images, in a tuple; got {_in_words(found)} from {name}; correct its "
            "class"
        )
    if not bool(out.isfinite().all()):
        bad = int((~out.isfinite().all(dim=1)).sum())
        raise EvaluationError(
            f"features must be finite; got NaN or infinity from the extractor {name} for {bad} of "
            f"{len(images)} images; correct its class or weights, or choose another"
        )
    return out


def _in_words(value: object) -> str:
    """A tensor by type and shape, and what holds some."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(map(_in_words, value)) or 'nothing'}"
    return f"a {type(value).__name__}"


def _reason(error: BaseException) -> str:
    """What was raised, in one line."""
    return f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"


def register_extractor(name: str, cls: type[FeatureExtractorBase]) -> None:
    """Make a `torch_fidelity.FeatureExtractorBase` available by name, here and in torch-fidelity.

    Its default layer for "fid" must give (N, D) features. A class attribute `channels` says how
    many channels it takes (3 if there is none). Two extractors that differ in anything but weights
    need different names.

    Raises:
        EvaluationError: the name is taken, or not a FeatureExtractorBase.
    """
    if not (isinstance(cls, type) and issubclass(cls, FeatureExtractorBase)):
        raise EvaluationError(
            f"an extractor must be a subclass of torch_fidelity.FeatureExtractorBase; got {cls!r}; "
            "subclass it"
        )
    try:
        register_feature_extractor(name, cls)
    except ValueError as error:
        raise EvaluationError(
            f"can't register the extractor {name!r}: {error}; choose another name"
        ) from error


#: Classifiers of Fashion-MNIST that travel in the package, by name.
SHIPPED_CLASSIFIERS = {cls.extractor: cls for cls in (FashionCNN, FashionViT)}
for _name, _cls in SHIPPED_CLASSIFIERS.items():
    register_extractor(_name, _cls)


def make_extractor(
    name: str, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """Load a registered extractor.

    Args:
        name: `inception-v3-compat` (2048 features; the score is FID), `fashion-cnn` or
            `fashion-vit` (64 features, 28×28 grey), another of torch-fidelity's, one from
            `register_extractor`, or `module:Class`, a class that is imported and registered under
            that name.
        weights: file with the weights; by default the shipped ones, or torch-fidelity's download.
        device: where to run it.

    Raises:
        EvaluationError: unknown name, a class that can't be imported or is no extractor, or weights
            that are missing, unreadable or of another network.
    """
    if ":" in name and name not in FEATURE_EXTRACTORS_REGISTRY:
        register_extractor(name, _imported(name))
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
        raise EvaluationError(
            f"unknown extractor {name!r}; choose one of {known}, write your own as module:Class, "
            "or register it with register_extractor"
        )
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    path = None if weights is None else Path(weights)
    if path is not None and not path.is_file():
        raise EvaluationError(
            f"the weights of the extractor {name} must be a file; got {weights!s:.200}; check the "
            "path"
        )
    if name in DINOV2 and path is not None:
        raise EvaluationError(
            f"torch-fidelity takes {name} from torch hub and from no file; got {path}; name it "
            f"without a file, and {_from_hub(name)}"
        )
    with _one_line_errors(name, path):
        layer = cls.get_default_feature_layer_for_metric("fid")
        if issubclass(cls, FeatureExtractorInceptionV3):
            path = _inception_weights(name, path)
        where = None if path is None else str(path)
        net = (
            cls(name, [layer], feature_extractor_weights_path=where, verbose=False)
            .requires_grad_(False)
            .eval()
        )
        channels = int(getattr(cls, "channels", 3))
        dummy = _dummy_of(net, channels)
    if channels < 1:
        raise EvaluationError(
            f"an extractor takes images of 1 channel or more; got {channels} from {name}; correct "
            "the class attribute channels"
        )
    dim = _features(name, net, dummy).shape[1]
    if ":" in name and not torch.equal(*(_features(name, net, dummy, dim) for _ in range(2))):
        raise EvaluationError(
            f"an extractor must give the same features of the same images; got others from {name} "
            "at a second call; leave out what is random in it"
        )
    digest = weights_digest(net)
    if code := _own_code(cls):
        digest = hashlib.sha256(f"{digest} {code}".encode()).hexdigest()
    return Extractor(name, digest, channels, dim, net.to(device), torch.device(device))


def _own_code(cls: type) -> str:
    """What a class of one's own is written in, without empty lines and lines of comments: its
    module and those of its bases in the same package; of what a script or a notebook defines,
    the class alone.

    Empty for torch-fidelity's and ours.
    """
    package = cls.__module__.partition(".")[0]
    if package in ("torch_fidelity", "asesearch"):
        return ""
    lines: list[str] = []
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != package:
            continue
        module = None if base.__module__ == "__main__" else sys.modules.get(base.__module__)
        with suppress(OSError, TypeError):  # no source: compiled, or typed in
            lines += inspect.getsource(module or base).splitlines()
    return "\n".join(x for line in lines if (x := line.rstrip()) and not x.lstrip().startswith("#"))


def _dummy_of(net: FeatureExtractorBase, channels: int) -> Tensor:
    """Images that an extractor takes; by default grey ones of Inception-v3's size."""
    try:
        dummy: Tensor = net.get_dummy_input_for_compile()
    except NotImplementedError:  # a class of one's own need not have it
        return torch.full((2, max(channels, 1), 299, 299), 128, dtype=torch.uint8)
    return dummy


def _imported(name: str) -> type[FeatureExtractorBase]:
    """The class of `module:Class`."""
    module, _, attribute = name.partition(":")
    try:
        found: type[FeatureExtractorBase] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"can't import the extractor {name}: {error}; install its package, or put its folder "
            "on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise EvaluationError(
            f"an extractor of your own is named module:Class; got {name}: {error}; check the name"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise EvaluationError(
            f"can't import the extractor {name}: {_reason(error)}; correct its module"
        ) from error
    return found


@contextmanager
def _deterministic() -> Iterator[None]:
    """Inside, a GPU takes the same kernels of cuDNN each time."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _one_line_errors(name: str, path: Path | None) -> Iterator[None]:
    """Errors of a network's making, for one of torch-fidelity's or of one's own."""
    try:
        yield
    except (Exception, SystemExit) as error:  # whatever a class of one's own raises
        if isinstance(error, AseSearchError) or is_out_of_memory(error):
            raise
        own = ":" in name
        source = "" if own and path is None else f" from {'its download' if path is None else path}"
        fix = "give a file with its weights as extractor_weights (of confirm.also: in a table, "
        fix += "name = file)"
        if path is not None:
            what, told = _foreign(path)
            source += what and f", which {what}"
            kind = ", in safetensors" if name in SHIPPED_CLASSIFIERS else ""
            fix = told or f"give the file of this network's own weights{kind}"
        fix = f"correct its class, or {fix}" if own else fix
        if name in DINOV2:
            fix = _from_hub(name)
        raise EvaluationError(
            f"can't load the extractor {name}{source}: {_reason(error)}; {fix}"
        ) from error


def _foreign(path: Path) -> tuple[str, str]:
    """What a file of weights is that is none, and what to do about it; empty where it may be
    one."""
    with suppress(OSError):
        what, _, fix = (foreign(path, plain_text=False) or "").rpartition("; ")
        return what, fix
    return "", ""


def _from_hub(name: str) -> str:
    """Where DINOv2's code and weights come from where there is no internet."""
    call = f"torch.hub.load('facebookresearch/dinov2', '{DINOV2[name]}')"
    return (
        f"where there is no internet, run {call} elsewhere and copy the folder that it fills, "
        f"torch.hub.get_dir(), to {torch.hub.get_dir()}"
    )


def _inception_weights(name: str, path: Path | None) -> Path:
    """The file to load: checked, and downloaded to torch's hub folder where none is given.

    Under the name that stands for FID only torch-fidelity's own file is taken; other weights need a
    name of their own.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            _download_inception(path)
    if name == INCEPTION:
        found = file_sha256(path)
        if not found.startswith(INCEPTION_SHA256_PREFIX):
            what = _foreign(path)[0]
            what = f"which {what}" if what else "damaged or other weights"
            raise EvaluationError(
                f"the extractor {INCEPTION} needs {INCEPTION_FILE} (SHA-256 "
                f"{INCEPTION_SHA256_PREFIX}…); got {path} ({found[:8]}…), {what}; fetch "
                f"it again from {URL_INCEPTION_V3}, or register other weights under another name"
            )
    # refuses code before torch-fidelity unpickles it
    torch.load(path, map_location="cpu", weights_only=True)
    return path


def _download_inception(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(target), INCEPTION_SHA256_PREFIX, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise EvaluationError(
            f"can't download the weights of {INCEPTION}: {first_line(error)}; fetch "
            f"{URL_INCEPTION_V3} elsewhere and put it at {target}, or give its path as "
            "extractor_weights"
        ) from error
