"""Which files of a folder are images, and which class each folder is."""

import errno
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asesearch.config import DataConfig, parse_study
from asesearch.data import ImageFolder, cache_dir, open_data
from asesearch.data.folder import list_folder
from asesearch.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def write(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), 7, np.uint8) if pixels is None else pixels).save(
        path, **options
    )
    return path


@pytest.fixture
def pets(tmp_path):
    root = tmp_path / "pets"
    for name in ("ant/a.png", "cat/a.png", "cat/b.jpg", "dog/c.png"):
        write(root / name)
    return root


def names(folder):
    return [f.relative_to(folder.root).as_posix() for f in folder.files]


# -- what is not read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints",
        ".thumbnails",
        ".git",
        "@eaDir",
        "__MACOSX",
        "#recycle",
        "lost+found",
        "$RECYCLE.BIN",
        "@Recycle",
        "~snapshot",
        "@SynoEAStream",
        "@__thumb",
        "RECYCLED",
        "_gsdata_",
    ],
)
@pytest.mark.parametrize("where", ["", "ant/", "cat/deep/"])
def test_hidden_folders_are_no_classes_and_hold_no_images(pets, hidden, where):
    write(pets / "cat/deep/d.png")
    plain = ImageFolder(pets, 8)
    write(pets / where / hidden / "a-checkpoint.png")
    write(pets / where / hidden / "deeper" / "b.png")
    folder = ImageFolder(pets, 8)
    assert (folder.num_classes, folder.labels.tolist()) == (3, [0, 1, 1, 1, 2])
    assert folder.digest == plain.digest and names(folder) == names(plain)


def test_a_flat_folder_stays_flat_beside_hidden_folders(tmp_path):
    write(tmp_path / "a.png")
    for name in ("._a.png", ".hidden.jpg", ".ipynb_checkpoints/a.png", "@eaDir/a.png/x.jpg"):
        write(tmp_path / name, format="png")
    folder = ImageFolder(tmp_path, 8)
    assert names(folder) == ["a.png"] and folder.labels is None


def test_a_folder_below_a_hidden_one_can_be_given(tmp_path):
    write(tmp_path / ".cache" / "@eaDir" / "a.png")
    assert len(ImageFolder(tmp_path / ".cache" / "@eaDir", 8)) == 1


def test_what_is_left_out_is_said_once(pets, caplog):
    for name in (
        "ant/x.gif",
        "ant/y.GIF",
        "dog/z.gif",
        "notes.txt",
        "cat/._a.png",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "LICENSE",
    ):
        (pets / name).touch()
    (pets / ".git").mkdir()
    (pets / "dog" / "@eaDir").mkdir()
    (pets / "metadata.jsonl").touch()
    folder = ImageFolder(pets, 8)
    folder.batch([0])
    ImageFolder(pets, 8)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        f"{pets}: reads 4 of 7 images; left out 3 .gif, 1 .txt, 1 @eaDir folder, 1 Thumbs.db file, "
        "1 file without suffix, 2 hidden files, 1 hidden folder"
    )


@pytest.mark.thorough
def test_what_is_left_out_is_seen_on_stderr(pets):
    (pets / "cat" / "._a.png").touch()
    code = (
        f"from asesearch.data import ImageFolder; ImageFolder({str(pets)!r}, 8); "
        f"ImageFolder({str(pets)!r}, 16)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stderr == f"{pets}: left out 1 hidden file\n" and shown.stdout == ""


def test_nothing_is_said_where_all_is_read(pets, caplog):
    ImageFolder(pets, 8)
    assert caplog.records == []


def test_no_images_says_what_there_is(tmp_path):
    for name in ("a.gif", "b.avif", ".c.png"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"no images .*it holds 1 \.avif, 1 \.gif, 1 hidden file; check the path"
    ):
        ImageFolder(tmp_path, 8)


def test_all_images_that_torchvision_reads_are_read(tmp_path, caplog):
    from torchvision.datasets.folder import IMG_EXTENSIONS

    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    sixteen = pixels.astype(np.uint16) * 257
    expected = ImageFolder(write(tmp_path / "one" / "a.png", pixels).parent, 8).read(0)
    for suffix in {*IMG_EXTENSIONS, ".jfif", ".jpe", ".TIF"}:
        root = tmp_path / suffix
        lossy = suffix in (".jpg", ".jpeg", ".jfif", ".jpe")
        write(root / "cat" / f"a{suffix}", pixels, **({"format": "JPEG"} if lossy else {}))
        got = ImageFolder(root, 8).read(0)
        assert np.abs(got.astype(int) - expected).max() <= (60 if lossy or suffix == ".webp" else 0)
    for suffix in (".pgm", ".tif", ".tiff"):
        deep = ImageFolder(write(tmp_path / f"deep{suffix}" / f"a{suffix}", sixteen).parent, 8)
        assert np.array_equal(deep.read(0), expected)
    assert caplog.records == []


def test_a_file_in_place_of_a_folder_is_told_as_one(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"got the file \S*/images\.tar; give the folder .*unpacked"
    ):
        ImageFolder(tmp_path / "images.tar", 8)


def test_the_digest_of_an_ordinary_folder_is_that_of_the_last_release(tmp_path):
    """An identity in studies, caches and latents: it must not change."""
    for name, content in {
        "b/z.png": b"12",
        "b/a.JPG": b"123",
        "a.b/c.png": b"",
        "a/x/deep.png": b"1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert (
        ImageFolder(tmp_path, 16).digest
        == "2415793105ee4b0ef00b9ae25571baa56734c1628d176c896f3c487d4d68795b"
    )


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_links_to_folders_and_files_are_followed(pets, tmp_path, relative):
    links = tmp_path / "links"
    plain = ImageFolder(pets, 8)
    (links / "dog").mkdir(parents=True)
    target = "../pets" if relative else str(pets)
    (links / "ant").symlink_to(f"{target}/ant")
    (links / "cat").symlink_to(f"{target}/cat", target_is_directory=True)
    (links / "dog" / "c.png").symlink_to(
        f"../{target}/dog/c.png" if relative else f"{target}/dog/c.png"
    )
    folder = ImageFolder(links, 8)
    assert folder.labels.tolist() == [0, 1, 1, 2] and names(folder) == names(plain)
    assert folder.digest == plain.digest and folder.batch(range(4))[0].shape == (4, 3, 8, 8)
    (tmp_path / "root").symlink_to(links)
    assert ImageFolder(tmp_path / "root", 8).digest == plain.digest


def test_one_folder_may_be_two_classes(tmp_path):
    write(tmp_path / "real" / "a.png")
    (tmp_path / "again").symlink_to("real")
    assert ImageFolder(tmp_path, 8).labels.tolist() == [0, 1]


@pytest.mark.parametrize("target", ["..", ".", "../../pets", "../cat"])
def test_links_that_lead_back_end(pets, target, caplog):
    (pets / "cat" / "loop").symlink_to(target)
    folder = ImageFolder(pets, 8)
    assert folder.labels.tolist() == [0, 1, 1, 2]
    assert "1 link back into the own path (cat/loop)" in caplog.text


def test_folders_may_lie_deeper_than_pythons_stack(tmp_path):
    deep = "d/" * 100 + "a.png"
    write(tmp_path / deep)
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 50)
        listing = list_folder(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert [file.name for file in listing.files] == [deep]
    assert names(ImageFolder(tmp_path, 8)) == [deep]


def test_two_folders_that_link_to_each_other_end(pets):
    (pets / "cat" / "dogs").symlink_to("../dog")
    (pets / "dog" / "cats").symlink_to("../cat")
    assert names(ImageFolder(pets, 8)) == [
        "ant/a.png",
        "cat/a.png",
        "cat/b.jpg",
        "cat/dogs/c.png",
        "dog/c.png",
        "dog/cats/a.png",
        "dog/cats/b.jpg",
    ]


@pytest.mark.parametrize("target", ["/nowhere/x.png", "gone.png"])
def test_broken_links_are_named(pets, target, caplog):
    (pets / "cat" / "gone.png").symlink_to(target)  # the second is a link to itself
    assert len(ImageFolder(pets, 8)) == 4
    assert f"1 broken link (cat/gone.png -> {target})" in caplog.text


def test_a_broken_link_in_place_of_a_class_is_refused(pets):
    (pets / "bee").symlink_to("/nowhere/bee")
    with pytest.raises(
        DataError,
        match="broken links where class folders are .bee -> /nowhere/bee.*labels.*would shift",
    ):
        ImageFolder(pets, 8)


def test_a_folder_of_broken_links_says_so(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").symlink_to(f"/nowhere/{i}.png")
    with pytest.raises(
        DataError, match=r"it holds 5 broken links \(0.png -> /nowhere/0.png, .* and 2 more\)"
    ):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ESTALE])
def test_what_can_not_be_looked_at_is_no_broken_link(pets, monkeypatch, number):
    """As in a folder that may be listed, but not entered: part of the data would be left out."""
    true_scan = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name = entry.name
            self.path = entry.path
            self.stat = entry.stat if pets / "cat" not in Path(entry.path).parents else self.fail
            self.is_dir = entry.is_dir
            self.is_file = entry.is_file
            self.is_symlink = entry.is_symlink

        def fail(self):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "scandir", lambda path: map(Entry, true_scan(path)))
    why = rf"can't read {re.escape(str(pets))}/cat/.*: {os.strerror(number)}; check the permissions"
    with pytest.raises(DataError, match=why):
        ImageFolder(pets, 8)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        *(("cat/Thumbs.db", False), ("@eaDir", False), ("cat/notes.txt", False)),
        *(("labels.csv", False), ("cat/classes.json", False)),
        *(("cat/x.PNG", True), ("cat/more", True), ("cow.2", True), ("classes.json", True)),
    ],
)
def test_what_is_no_image_need_not_be_looked_at(pets, monkeypatch, name, refused):
    """As a link into a folder of another user."""
    whole = ImageFolder(pets, 8)
    (pets / name).symlink_to("/nowhere")
    true_scan = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name = entry.name
            self.path = entry.path
            self.entry = entry

        def stat(self):
            if Path(self.path) == pets / name:
                raise PermissionError(errno.EACCES, "Permission denied")
            return self.entry.stat()

        def is_dir(self):
            return self.entry.is_dir()

        def is_file(self):
            return self.entry.is_file()

    monkeypatch.setattr(os, "scandir", lambda path: map(Entry, true_scan(path)))
    if refused:
        with pytest.raises(DataError, match=re.escape(f"can't read {pets / name}: Permission")):
            ImageFolder(pets, 8)
    else:
        assert len(ImageFolder(pets, 8)) == len(whole)


def test_a_class_of_images_that_are_not_read_says_so(pets):
    write(pets / "cow" / "a.gif")
    with pytest.raises(DataError, match=r"only \.gif, which is not read, in cow; convert it$"):
        ImageFolder(pets, 8)


# -- names that are not UTF-8 ----------------------------------------------------------------------


def test_a_file_name_may_be_any_bytes(tmp_path):
    root = tmp_path / os.fsdecode(b"ann\xe9e")
    write(root / "cat" / "a.png")
    for old, new in ((b"cat", b"ch\xe2t"), (b"ch\xe2t/a.png", b"ch\xe2t/caf\xe9.png")):
        os.rename(os.fsencode(root) + b"/" + old, os.fsencode(root) + b"/" + new)
    write(root / "dog" / "a.png")
    folder = ImageFolder(root, 8)
    assert folder.batch([0, 1])[1].tolist() == [0, 1] and folder.files[1].parent.name == "dog"
    folder.check()
    json.dumps([folder.name, folder.digest]).encode("ascii")
    folder.name.encode("utf-8")
    first = folder.digest
    bad = root / os.fsdecode(b"ch\xe2t/caf\xe9.png")
    bad.rename(bad.with_name(os.fsdecode(b"caf\xe8.png")))
    assert ImageFolder(root, 8).digest != first
    bad.with_name(os.fsdecode(b"caf\xe8.png")).write_bytes(b"")
    with pytest.raises(DataError, match="caf") as caught:
        ImageFolder(root, 8).check()
    str(caught.value).encode("utf-8")
    skipping = ImageFolder(tmp_path / os.fsdecode(b"ann\xe9e"), 8)
    with pytest.raises(DataError, match="caf") as caught:
        skipping.read(
            [f.suffix == ".png" and f.stat().st_size == 0 for f in skipping.files].index(True)
        )
    str(caught.value).encode("utf-8")


# -- classes ---------------------------------------------------------------------------------------

ORDERS = [
    (["dog", "ant", "cat"], [1, 2, 2, 0], 3),
    ({"ant": 7, "cat": 281, "dog": 207}, [7, 281, 281, 207], 282),
    ({"dog": 2, "ant": 0, "cat": 1}, [0, 1, 1, 2], 3),
]


@pytest.mark.parametrize(("classes", "labels", "count"), ORDERS)
@pytest.mark.parametrize("place", ["file", "config", "both"])
def test_a_mapping_gives_the_labels(pets, place, classes, labels, count):
    if place != "config":
        wrong = {"ant": 5, "cat": 3, "dog": 4}
        (pets / "classes.json").write_text(
            json.dumps(wrong if place == "both" else classes), encoding="utf-8"
        )
    given = None if place == "file" else classes
    folder = open_data(DataConfig(kind="image-folder", path=str(pets), image_size=8, classes=given))
    assert folder.labels.tolist() == labels == folder.batch(range(4))[1].tolist()
    assert folder.num_classes == count and not folder.labels_by_order
    assert folder.classes == {n: labels[i] for n, i in (("ant", 0), ("cat", 1), ("dog", 3))}


def test_a_mapping_may_be_in_utf_16(pets):
    (pets / "classes.json").write_text('["dog", "cat", "ant"]', encoding="utf-16")
    assert ImageFolder(pets, 8).classes == {"ant": 2, "cat": 1, "dog": 0}
    (pets / "classes.json").write_text('["dog", "cat", "ant"]', encoding="utf-16-le")
    with pytest.raises(DataError, match=r"classes\.json: it has NUL characters.*save it as UTF-8"):
        ImageFolder(pets, 8)


def test_names_stay_on_one_line(pets):
    (pets / "ow\nl").mkdir()
    with pytest.raises(DataError, match=r"got none in ow\\nl; remove or fill it$"):
        ImageFolder(pets, 8)


def test_the_largest_index_is_taken(pets):
    (pets / "classes.json").write_text('{"ant": 0, "cat": 1, "dog": 999999999}')
    assert ImageFolder(pets, 8).labels.tolist() == [0, 1, 1, 999_999_999]


def test_a_mac_and_a_keyboard_write_one_class_name(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for on_disk, listed in ((decomposed, composed), (composed, decomposed)):
        root = tmp_path / f"{len(on_disk)}"
        write(root / on_disk / "a.png")
        write(root / "zoo" / "a.png")
        exact = ImageFolder(root, 8, classes=["zoo", on_disk])
        folder = ImageFolder(root, 8, classes=["zoo", listed])
        assert folder.classes == {on_disk: 1, "zoo": 0} and folder.labels.tolist() == [1, 0]
        assert folder.digest == exact.digest
        with pytest.raises(DataError, match="no folder cafe and no index for the folder caf"):
            ImageFolder(root, 8, classes=["zoo", "cafe"])
        with pytest.raises(DataError, match="got no folder caf"):  # which of them is not guessed
            ImageFolder(root, 8, classes=["zoo", composed, decomposed])


def test_without_a_mapping_folders_are_counted_in_order(pets):
    folder = ImageFolder(pets, 8)
    assert folder.labels_by_order and folder.classes == {"ant": 0, "cat": 1, "dog": 2}


def test_the_digest_follows_the_mapping_where_it_changes_labels(pets):
    digests = [ImageFolder(pets, 8, classes=c).digest for c in (None, *(c for c, _, _ in ORDERS))]
    assert digests[0] == digests[3] and len(set(digests)) == 3


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('["ant", "cat"]', "got no index for the folder dog"),
        ('["ant", "cat", "dog", "eel"]', "got no folder eel"),
        ('{"ant": 0, "cat": 1, "dgo": 2}', "got no folder dgo and no index for the folder dog"),
        ('{"ant": 0, "cat": 1, "dog": 1}', "an index of its own; got 1 for cat, dog"),
        ('{"ant": 0, "cat": 1, "dog": -1}', "integers from 0 to 999,999,999; got dog: -1"),
        ('{"ant": 0, "cat": 1, "dog": true}', "999,999,999; got dog: true"),
        ('{"ant": 0, "cat": 1, "dog": 2.0}', "999,999,999; got dog: 2.0"),
        ('{"ant": 0, "cat": 1, "dog": "2"}', '999,999,999; got dog: "2"'),
        ('{"ant": 0, "cat": 1, "dog": 99999999999999999999}', "got dog: 99999999999999999999; "),
        ('{"ant": 0, "cat": 1, "dog": 1000000000}', "got dog: 1000000000; correct it"),
        ('{"ant": 0, "cat": 1, "dog": 2, "cat": 3}', "it has the key 'cat' twice"),
        ('["ant", "cat", "dog", "cat"]', "got cat more than once"),
        ('{"ant": 0, "cat": 1, "dog": 2, "\\ud800": 3}', "got no folder"),
        ("[1, 2, 3]", r"must hold a list of folder names .* got \[1, 2, 3\]"),
        ('"ant"', "must hold a list of folder names"),
        ("null", "must hold a list of folder names"),
        ("{ant: 0}", "can't read .*must hold a list of folder names"),
        ("", "can't read"),
        ("[" * 100_000, "can't read"),
    ],
)
def test_wrong_mappings_are_refused_in_one_line(pets, text, rule):
    (pets / "classes.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rule) as caught:
        ImageFolder(pets, 8)
    assert str(pets / "classes.json") in str(caught.value) and "\n" not in str(caught.value)
    str(caught.value).encode("utf-8")


def test_the_data_sections_classes_are_named_when_they_are_wrong(pets, tmp_path):
    with pytest.raises(
        DataError, match="the data section's classes must name exactly.*no folder cow"
    ):
        ImageFolder(pets, 8, classes={"ant": 0, "cat": 1, "dog": 2, "cow": 3})
    write(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="got no folder ant"):
        ImageFolder(tmp_path / "flat", 8, classes=["ant"])


def test_a_flat_folder_has_no_use_for_a_classes_file_and_says_so(tmp_path, caplog):
    write(tmp_path / "a.png")
    (tmp_path / "classes.json").write_text("[]")
    assert ImageFolder(tmp_path, 8).labels is None and "1 classes.json" in caplog.text


@pytest.mark.parametrize("classes", [["ant", "cat"], {"ant": 3, "cat": 1}])
def test_a_study_file_takes_both_forms(classes):
    study = {
        "name": "s",
        "backbone": {},
        "data": {"kind": "image-folder", "path": "x", "classes": classes},
    }
    given = parse_study(study, "s.toml").data.classes
    assert given == (tuple(classes) if isinstance(classes, list) else classes)
    assert (
        parse_study(json.loads(parse_study(study, "s").model_dump_json()), "again").data.classes
        == given
    )


@pytest.mark.parametrize("classes", [{"ant": True}, {"ant": "1"}, {"ant": 1.5}, "ant", [1]])
def test_a_study_file_with_classes_of_another_form_is_refused(classes):
    study = {
        "name": "s",
        "backbone": {},
        "data": {"kind": "image-folder", "path": "x", "classes": classes},
    }
    with pytest.raises(ConfigError, match=r"s\.toml: data\.classes"):
        parse_study(study, "s.toml")


# -- a user without a home -------------------------------------------------------------------------


def test_without_a_home_the_cache_is_a_folder_for_temporary_files(monkeypatch, tmp_path):
    for name in ("ASESEARCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert cache_dir() == tmp_path / f"asesearch-{os.getuid()}"
    monkeypatch.setenv("ASESEARCH_CACHE", "~/c")  # which would be a folder named ~
    assert cache_dir() == tmp_path / f"asesearch-{os.getuid()}"
    monkeypatch.delenv("ASESEARCH_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir().as_posix() == "/home/someone/.cache/asesearch"


@pytest.mark.thorough
def test_a_folder_is_sent_to_another_process_as_a_few_arrays(tmp_path):
    """A path an image would take half a minute of ImageNet's, for each process that reads."""
    root = tmp_path / "many"
    write(root / "a" / "0.png")
    odd = os.fsdecode(b"caf\xe9 \n\xc3\xa9.png")
    names = [f"{c}/{i:05}.png" for c in "ab" for i in range(1000)] + [f"b/{odd}"]
    for name in names[1:]:
        (root / name).parent.mkdir(exist_ok=True)
        os.link(root / "a" / "0.png", root / name)
    os.rename(root / "a" / "0.png", root / names[0])
    folder = ImageFolder(root, 8, 1)
    sent = pickle.dumps(folder)
    # names, ends, sizes, times and labels: no object for an image
    assert len(sent) < len("".join(names)) + 4 * 8 * len(names) + 4000
    got = pickle.loads(sent)
    assert got.files == folder.files == [root / name for name in sorted(names)]
    assert len(got) == 2001 and got.digest == folder.digest and not got.damaged()
    assert np.array_equal(got.read(2000), folder.read(0))
    with pytest.raises(IndexError):
        got.read(2001)


# -- what may be meant otherwise -------------------------------------------------------------------


def test_numbers_in_the_order_of_text_are_said_once(tmp_path, caplog):
    for name in range(1, 12):
        write(tmp_path / str(name) / "a.png")
    assert ImageFolder(tmp_path, 8).classes["10"] == 1
    ImageFolder(tmp_path, 16)
    (record,) = caplog.records
    told = record.getMessage()
    assert "11 before 2: 11 is class 2, 2 class 3;" in told
    assert 'classes = { "2" = 2, … }' in told
    ImageFolder(tmp_path, 8, classes=[str(name) for name in range(1, 12)])
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (["class_1", "class_2", "class_10"], "class_10 before class_2"),
        (["1.0", "2.0", "10.0"], "10.0 before 2.0"),
        (["v2 kind 9", "v2 kind 30"], "v2 kind 30 before v2 kind 9"),
    ],
)
def test_numbers_with_the_same_words_around_are_said(tmp_path, caplog, folders, told):
    for name in folders:
        write(tmp_path / name / "a.png")
    ImageFolder(tmp_path, 8)
    (record,) = caplog.records
    second = told.rpartition(" before ")[2]
    number = re.findall(r"\d+", second.removesuffix(".0"))[-1]
    assert told in record.getMessage() and f'"{second}" = {number}' in record.getMessage()


def test_a_folder_around_the_class_folders_is_said(tmp_path, caplog):
    for name in ("cat/a.png", "dog/b.png"):
        write(tmp_path / "images" / name)
    assert ImageFolder(tmp_path, 8).num_classes == 1
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: the images of cat, dog are all of one class, images; if these are its "
        f"classes, give the folder {tmp_path / 'images'}"
    )
    caplog.clear()
    ImageFolder(tmp_path / "images", 8)
    ImageFolder(tmp_path, 8, classes=["images"])
    for name in ("00000/a.png", "01000/b.png"):  # parts, as FFHQ has them
        write(tmp_path / "faces" / "images1024x1024" / name)
    ImageFolder(tmp_path / "faces", 8)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "label": 3}', True),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "no label"}', False),  # captions
        ("metadata.csv", "file_name,label", True),
        ("metadata.csv", "file_name;class_id;text\na.png;3;a cat", True),
        ("metadata.csv", "file_name,text\na.png,a label", False),
        ("dataset.json", '{"labels": null}', False),
        ("dataset.json", '{"labels": [["a.png", 3]]}', True),
        ("labels.tsv", "file_name\tlabel\na.png\t3", True),
        ("labels.jsonl", '{"file_name": "a.png", "label": 3}', True),
        ("Labels.csv", "file_name,label", True),
        ("labels.csv", "file_name,label\n".encode("utf-16"), True),
        ("labels.json", '{"a.png": 1}', True),
        ("labels.json", '{\n  "a.png": "cat",\n  "b.png": "dog"\n}', True),
        ("train.csv", "id,label\na,3", True),
        ("annotations.csv", "a.png,3\n", True),
        ("labels.csv", "a.png,cat\nb.png,dog\n", True),
        ("captions.json", '{"a.png": "a cat on a mat"}', False),
        ("captions.csv", "a.png,a cat on a mat\n", False),
        ("sizes.csv", "file_name,width\na.png,3", False),
        ("settings.json", '{"lr": 1}', False),
    ],
)
def test_labels_in_a_table_are_said_not_to_be_read(tmp_path, caplog, name, content, said):
    write(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert ImageFolder(tmp_path, 8).labels is None
    lines = [r.getMessage() for r in caplog.records if ": labels in" in r.getMessage()]
    assert [f"labels in {name} are not read, and it has no classes; if" in x for x in lines] == (
        [True] * said
    )


@pytest.mark.parametrize(
    "folders",
    [["0", "1", "9"], ["01", "02", "10"], ["1", "10", "2a"], ["a10", "b2"], ["cat", "dog10"]],
)
def test_no_order_is_questioned_where_there_is_but_one(tmp_path, caplog, folders):
    for name in folders:
        write(tmp_path / name / "a.png")
    ImageFolder(tmp_path, 8)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train/cat/a.png", "val/cat/b.png"], "train, val"),
        (["Train/cat/a.png"], "Train"),
        (["test/a.png", "train/a.png", "validation/b.png"], "test, train, validation"),
        (["training/a.png", "testing/b.png"], "testing, training"),
        (["train2017/a.png", "val2017/b.png"], "train2017, val2017"),
        (["test_set/a.png", "training_set/b.png"], "test_set, training_set"),
        (["train_64x64/a.png", "valid_64x64/b.png"], "train_64x64, valid_64x64"),
        (["images_train/a.png", "images_val/b.png"], "images_train, images_val"),
        (["dev/a.png", "eval/b.png"], "dev, eval"),
        (["images/a.png", "masks/b.png"], "images, masks"),
        (["images/a.png"], None),
        (["images/a.png", "cats/b.png"], None),
        (["train/a.png"], None),
        (["trains/a.png", "testers/b.png"], None),
        (["train/x/a.png", "plane/x/b.png"], None),
    ],
)
def test_the_parts_of_a_data_set_are_told_where_they_are_read_as_classes(
    tmp_path, caplog, files, told
):
    for name in files:
        write(tmp_path / name)
    classes = sorted({name.split("/")[0] for name in files})
    assert ImageFolder(tmp_path, 8).num_classes == len(classes)
    said = [r.getMessage() for r in caplog.records if "parts of a data set" in r.getMessage()]
    if told is None:
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"{tmp_path}: the images of {told} are all read, and these are")
        assert line.endswith(f"such as {tmp_path}/{told.split(', ')[0]}")
    caplog.clear()
    ImageFolder(tmp_path, 8, classes=classes)  # said in the study file
    assert "parts of a data set" not in caplog.text
