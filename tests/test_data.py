"""Data sources: IDX files, Fashion-MNIST, arrays, image folders."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from asesearch.config import DataConfig
from asesearch.data import (
    ImageArray,
    ImageFolder,
    cache_dir,
    centre_crop,
    fashion_mnist,
    open_data,
    read_idx,
)
from asesearch.data import fashion as data
from asesearch.data.outputs import refuse_among_data
from asesearch.errors import ConfigError, DataError


def idx_bytes(array):
    return (
        b"\x00\x00\x08"
        + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape)
        + array.tobytes()
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def write_image(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


# -- IDX -------------------------------------------------------------------------------------------

ARRAY = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "array", [ARRAY, ARRAY.reshape(-1), ARRAY[:0]], ids=["3-d", "1-d", "empty"]
)
def test_idx_round_trip(tmp_path, array, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(array)))
    again = read_idx(path)
    assert again.dtype == np.uint8 and again.shape == array.shape and (again == array).all()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00",
        b"\x00\x00\x08\x03\x00\x00",  # a header cut short
        b"\x00\x00\x0d" + idx_bytes(ARRAY)[3:],  # floats
        idx_bytes(ARRAY)[:-1],
        idx_bytes(ARRAY)[:16],  # a header and nothing else
        idx_bytes(ARRAY) + b"\x00",
        b"\x00\x00\x08\x02\x80\x00\x00\x00\x00\x00\x00\x02",  # says 2^32 bytes, has none
        b"<html>404</html>",
        gzip.compress(idx_bytes(ARRAY))[:-9],
        gzip.compress(idx_bytes(ARRAY))[:12] + b"\xff" * 30,
        b"\x1f\x8bnot gzip",
    ],
    ids=range(12),
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_idx(path)


def test_every_flipped_or_missing_byte_of_a_gzipped_idx_file_is_noticed(tmp_path):
    """All damage ends in a DataError or, where gzip ignores the byte (its header's), in the same
    array."""
    whole = gzip.compress(idx_bytes(ARRAY), mtime=0)
    path = tmp_path / "file"
    for i in range(2, len(whole)):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x5A]) + whole[i + 1 :]):
            path.write_bytes(content)
            try:
                assert (read_idx(path) == ARRAY).all()
            except DataError as error:
                assert str(path) in str(error)


def test_a_missing_idx_file_names_its_path(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "none"))):
        read_idx(tmp_path / "none")


# -- Fashion-MNIST ---------------------------------------------------------------------------------


def test_shipped_fashion_mnist_is_the_published_one():
    test = fashion_mnist("test")
    assert (len(test), test.shape, test.num_classes, test.name) == (
        10_000,
        (1, 28, 28),
        10,
        "fashion-mnist/test",
    )
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert len(data.FASHION_MNIST_CLASSES) == 10
    x_start, y = test.batch([0, 9999])
    assert (
        x_start.dtype == torch.float32
        and x_start.min() == -1
        and x_start.max() <= 1
        and y.tolist() == [9, 5]
    )


def test_fashion_mnist_is_read_once_in_a_process(monkeypatch):
    digest = fashion_mnist("test").digest
    monkeypatch.setattr(data, "_content", lambda path: pytest.fail(f"read {path} again"))
    assert fashion_mnist("test").digest == digest


def test_fashion_mnist_with_one_pixel_changed_is_refused(tmp_path):
    source = data.resources.files("asesearch") / "assets" / "fashion-mnist"
    labels = bytearray(gzip.decompress((source / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    (tmp_path / "t10k-images-idx3-ubyte.gz").symlink_to(source / "t10k-images-idx3-ubyte.gz")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    # uncompressed, and whole
    assert fashion_mnist("test", tmp_path).digest == fashion_mnist("test").digest
    labels[-1] ^= 1
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match="not Fashion-MNIST's t10k-labels"):
        fashion_mnist("test", tmp_path)


def test_missing_fashion_mnist_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        fashion_mnist("train")
    for part in (
        str(tmp_path / "debian"),
        str(tmp_path / "cache" / "fashion-mnist"),
        "dataset-fashion-mnist",
        "download",
    ):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="nowhere"):
        # a folder that is given is never downloaded into
        fashion_mnist("train", tmp_path / "nowhere", download=True)
    with pytest.raises(DataError, match="splits train and test; got 'valid'"):
        fashion_mnist("valid")


class Response:
    def __init__(self, content):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def read(self):
        return self.content


def test_a_download_is_checked_before_it_is_kept(tmp_path, monkeypatch):
    source = data.resources.files("asesearch") / "assets" / "fashion-mnist"
    good = (source / "t10k-labels-idx1-ubyte.gz").read_bytes()
    urls = []

    def answer(content):
        return lambda url, timeout: (urls.append(url), Response(content))[1]

    monkeypatch.setattr(data.urllib.request, "urlopen", answer(good[:-20]))
    with pytest.raises(DataError, match="t10k-labels"):
        data._download_fashion_mnist("t10k-labels-idx1-ubyte", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(data.urllib.request, "urlopen", answer(good))
    kept = data._download_fashion_mnist("t10k-labels-idx1-ubyte", tmp_path)
    assert list(tmp_path.iterdir()) == [kept] and kept.read_bytes() == good
    assert urls == [data.FASHION_MNIST_URL + "t10k-labels-idx1-ubyte.gz"] * 2

    def offline(url, timeout):
        raise data.urllib.request.URLError("no route")

    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match="no route.*by hand"):
        data._download_fashion_mnist("t10k-images-idx3-ubyte", tmp_path)


def test_a_data_path_that_is_a_link_to_itself(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    config = DataConfig(kind="image-folder", path=str(loop), image_size=8)
    refuse_among_data([config], tmp_path / "out", "--out")
    with pytest.raises(DataError, match=r"no image folder .*loop \(Too many levels of symbolic"):
        open_data(config)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("ASESEARCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "asesearch"
    monkeypatch.setenv("ASESEARCH_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ASESEARCH_CACHE", "~/c")  # as quotes keep the shell from expanding it
    assert cache_dir() == tmp_path / "c"


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "classes", "rule"),
    [
        (np.zeros((2, 8, 8), np.uint8), None, None, "uint8 of shape"),
        (np.zeros((2, 1, 8, 8), np.float32), None, None, "uint8 of shape"),
        (np.zeros((0, 1, 8, 8), np.uint8), None, None, "N > 0"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.array([0]), None, "one label per image"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.array([[0, 1]]), None, "one label per image"),
        (
            np.zeros((2, 1, 8, 8), np.uint8),
            np.array([-1, 1]),
            None,
            "labels must lie in 0…1; got -1…1",
        ),
        (np.zeros((2, 1, 8, 8), np.uint8), np.array([0, 3]), 3, "labels must lie in 0…2; got 0…3"),
    ],
)
def test_image_array_rules(images, labels, classes, rule):
    with pytest.raises(DataError, match=rule):
        ImageArray(images, labels, "bad", num_classes=classes)


def test_image_array_values_labels_and_classes():
    images = np.array([0, 255, 51], np.uint8).reshape(3, 1, 1, 1)
    x_start, y = ImageArray(images, np.array([0, 4, 2]), "three").batch([2, 0, 1])
    torch.testing.assert_close(x_start.view(-1), torch.tensor([-0.6, -1.0, 1.0]))
    assert y.tolist() == [2, 0, 4] and y.dtype == torch.int64
    assert ImageArray(images, np.array([0, 4, 2]), "three").num_classes == 5
    assert ImageArray(images, np.array([0, 4, 2]), "three", num_classes=7).num_classes == 7
    bare = ImageArray(images, None, "bare")
    assert bare.num_classes == 0 and bare.batch([0])[1] is None


def test_image_array_keeps_its_own_copy_and_its_digest_sees_everything():
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 2, 2), np.uint8)
    labels = np.array([0, 1, 0, 1])
    kept = ImageArray(images, labels, "a")
    before = kept.batch([0])[0].clone()
    other = images.copy()
    other[3, 0, 1, 1] ^= 1
    variants = [
        kept,
        ImageArray(other, labels, "a"),
        ImageArray(images, labels[::-1].copy(), "a"),
        ImageArray(images, None, "a"),
        ImageArray(images, labels, "a", flip=True),
        ImageArray(images.reshape(4, 1, 1, 4), labels, "a"),
    ]
    assert len({v.digest for v in variants}) == len(variants)
    assert ImageArray(images.copy(), labels.copy(), "another name").digest == kept.digest
    images[:] = 0
    assert torch.equal(kept.batch([0])[0], before)


# -- image folders ---------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path):
    """Three classes in ImageNet's layout, one of them nested deeper, file types mixed; every pixel
    tells its file."""
    root = tmp_path / "pictures"
    files = ["n01/b.png", "n01/a.JPEG", "n02/c.webp", "n10/deep/d.bmp", "n10/e.ppm"]
    for i, name in enumerate(files):
        write_image(root / name, np.full((20, 24, 3), 40 * (i + 1), np.uint8))
    (root / "n01" / "notes.txt").write_text("not an image")
    return root


def test_imagenet_layout(imagenet):
    folder = ImageFolder(imagenet, 16)
    assert [f.relative_to(imagenet).as_posix() for f in folder.files] == [
        "n01/a.JPEG",
        "n01/b.png",
        "n02/c.webp",
        "n10/deep/d.bmp",
        "n10/e.ppm",
    ]
    x_start, y = folder.batch(range(5))
    assert y.tolist() == [0, 0, 1, 2, 2] and folder.num_classes == 3 and folder.name == "pictures"
    assert x_start.shape == (5, 3, 16, 16) and folder.shape == (3, 16, 16) and len(folder) == 5
    levels = (x_start.mean(dim=(1, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(
        levels, torch.tensor([80.0, 40.0, 120.0, 160.0, 200.0]), atol=1.5, rtol=0
    )


def test_a_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.png"):
        write_image(tmp_path / name, np.full((8, 8), ord(name[0]), np.uint8))
    folder = ImageFolder(tmp_path, 8, channels=1)
    x_start, y = folder.batch([0, 1])
    assert y is None and folder.num_classes == 0
    assert ((x_start + 1) * 127.5).round()[:, 0, 0, 0].tolist() == [97, 98]


def test_wrong_folders_are_refused(tmp_path, imagenet):
    with pytest.raises(DataError, match="no image folder"):
        ImageFolder(tmp_path / "none", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        ImageFolder(tmp_path / "empty", 16)
    (imagenet / ".cache").mkdir()
    ImageFolder(imagenet, 16)
    (imagenet / "n03").mkdir()
    # or n10 would be class 2 with the folder and class 3 without
    with pytest.raises(DataError, match="got none in n03"):
        ImageFolder(imagenet, 16)
    (imagenet / "n03").rmdir()
    write_image(imagenet / "stray.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"beside them \(stray.png\)"):
        ImageFolder(imagenet, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "ppm"])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path, suffix):
    path = tmp_path / f"damaged.{suffix}"
    write_image(path, np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    whole = path.read_bytes()
    assert ImageFolder(tmp_path, 16).batch([0])[0].shape == (1, 3, 16, 16)
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            ImageFolder(tmp_path, 16).batch([0])


def test_damage_inside_a_png_gives_an_image_or_our_error(tmp_path):
    """Pillow's errors are of many classes; none of them gets out."""
    path = tmp_path / "damaged.png"
    rng = np.random.default_rng(0)
    write_image(path, rng.integers(0, 256, (12, 12, 3), np.uint8))
    whole = path.read_bytes()
    refused = 0
    for i in range(0, len(whole), 4):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xA5]) + whole[i + 1 :])
        try:
            ImageFolder(tmp_path, 8).read(0)
        except DataError:
            refused += 1
    assert refused > len(whole) // 8


def test_grey_and_colour(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[255, 0, 0]]], np.uint8).repeat(8, 0).repeat(8, 1))
    write_image(tmp_path / "b.png", np.full((8, 8), 7, np.uint8))
    write_image(tmp_path / "c.png", np.full((8, 8, 4), 9, np.uint8))
    colour = ImageFolder(tmp_path, 8)
    grey = ImageFolder(tmp_path, 8, channels=1)
    assert colour.read(0)[:, 0, 0].tolist() == [255, 0, 0]
    assert grey.read(0)[:, 0, 0].tolist() == [76]  # ITU-R 601 luma
    assert (
        colour.read(1)[:, 0, 0].tolist() == [7] * 3
        and colour.read(2)[:, 0, 0].tolist() == [246] * 3
    )
    assert grey.shape == (1, 8, 8) and grey.digest != colour.digest


def official_crop(image, size):
    """ADM's arithmetic in plain numbers: halve with a box filter while both halves cover the crop,
    bicubic, crop by floor."""
    width, height = image.size
    while min(width, height) // 2 >= size:
        width = width // 2
        height = height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    factor = size / min(width, height)
    array = np.array(
        image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    )
    top = (array.shape[0] - size) // 2
    left = (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "size", [(16, 16), (33, 47), (64, 31), (31, 200), (129, 65), (32, 33), (10, 13)]
)
def test_centre_crop_is_the_official_one(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    cropped = np.asarray(centre_crop(Image.fromarray(pixels), 16))
    assert (
        cropped.shape == (16, 16, 3)
        and (cropped == official_crop(Image.fromarray(pixels), 16)).all()
    )


def test_the_crop_check_sees_a_bicubic_that_skips_the_halving():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    direct = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    assert (direct != official_crop(Image.fromarray(pixels), 16)).any()


def sources(tmp_path, flip):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 8, 8), np.uint8)
    for i, image in enumerate(images):
        write_image(tmp_path / f"{i:02d}.png", image.transpose(1, 2, 0))
    return [ImageArray(images, None, "array", flip=flip), ImageFolder(tmp_path, 8, flip=flip)]


def test_flips_need_a_generator_and_follow_from_it(tmp_path):
    for source in sources(tmp_path, flip=True):
        still = source.batch(range(12))[0]
        assert torch.equal(still, source.batch(range(12))[0])
        moved = source.batch(range(12), generator(1))[0]
        assert torch.equal(moved, source.batch(range(12), generator(1))[0])
        assert not torch.equal(moved, source.batch(range(12), generator(2))[0])
        mirrored = [torch.equal(m, s.flip(-1)) for m, s in zip(moved, still, strict=True)]
        assert 0 < sum(mirrored) < 12
        assert all(f or torch.equal(m, s) for m, s, f in zip(moved, still, mirrored, strict=True))


def test_half_of_the_images_are_mirrored_each_by_itself(tmp_path):
    side = np.zeros((4, 1, 2, 2), np.uint8)
    side[..., 1] = 255  # bright on the right
    for i, image in enumerate(side):
        write_image(tmp_path / f"{i}.png", image[0])
    for source in (
        ImageArray(side, None, "array", flip=True),
        ImageFolder(tmp_path, 2, 1, flip=True),
    ):
        # (400, 4)
        drawn = torch.stack(
            [source.batch(range(4), generator(s))[0][:, 0, 0, 0] > 0 for s in range(400)]
        )
        assert abs(drawn.float().mean() - 0.5) < 0.05  # four standard errors of 1,600 draws
        assert all(abs(share - 0.5) < 0.1 for share in drawn.float().mean(0))  # of each image
        per_batch = torch.bincount(drawn.sum(1), minlength=5) / 400
        expected = torch.tensor([1, 4, 6, 4, 1]) / 16  # all or none in one batch of eight
        assert (per_batch - expected).abs().max() < 0.1


def test_without_flip_a_generator_changes_nothing(tmp_path):
    for source in sources(tmp_path, flip=False):
        assert torch.equal(source.batch(range(12), generator())[0], source.batch(range(12))[0])


def test_array_and_folder_of_the_same_pixels_agree(tmp_path):
    array, folder = sources(tmp_path, flip=False)
    assert torch.equal(array.batch([3, 1])[0], folder.batch([3, 1])[0])


def test_folder_digest_follows_names_sizes_and_settings_but_not_the_place(imagenet, tmp_path):
    digest = ImageFolder(imagenet, 16).digest
    moved = imagenet.rename(tmp_path / "elsewhere")
    assert ImageFolder(moved, 16).digest == digest
    others = {
        ImageFolder(moved, 8).digest,
        ImageFolder(moved, 16, 1).digest,
        ImageFolder(moved, 16, flip=True).digest,
    }
    (moved / "n01" / "b.png").rename(moved / "n01" / "z.png")
    others.add(ImageFolder(moved, 16).digest)
    assert len(others | {digest}) == 5


# -- the study file's data -------------------------------------------------------------------------


def test_open_data_by_kind(imagenet):
    assert open_data(DataConfig(kind="fashion-mnist", split="test")).name == "fashion-mnist/test"
    folder = open_data(
        DataConfig(kind="image-folder", path=str(imagenet), image_size=16, channels=1, flip=True)
    )
    assert isinstance(folder, ImageFolder) and folder.shape == (1, 16, 16) and folder.flip


@pytest.mark.parametrize("kind", ["image-folder", "latents"])
def test_open_data_needs_a_path(kind):
    with pytest.raises(ConfigError, match="data.path is needed"):
        open_data(DataConfig(kind=kind))


def test_open_data_needs_an_image_size(imagenet):
    with pytest.raises(ConfigError, match="data.image_size is needed"):
        open_data(DataConfig(kind="image-folder", path=str(imagenet)))


def test_open_data_of_a_folder_without_latents(imagenet):
    with pytest.raises(DataError, match="index of latents"):
        open_data(DataConfig(kind="latents", path=str(imagenet)))
