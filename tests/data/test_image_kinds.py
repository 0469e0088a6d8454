"""Pictures of every kind and the files that they lie in: the pixels that are right, or what is said."""

from __future__ import annotations

import gzip
import io
import warnings
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import sources
from fedsim.data.decoding import decode
from fedsim.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


def one(blob, channels=3):
    """Pixels (H, W, C) of one picture."""
    return decode([blob], channels=channels, size=None, source="s")[0].transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("PPM", {})]
)
def test_formats_of_8_bits_are_read_exactly(kind, options):
    np.testing.assert_array_equal(one(encoded(RGB, kind, **options)), RGB)


def test_grey_beside_rgb_has_three_equal_channels():
    both = decode([encoded(RGB), encoded(GREY), encoded(GREY > 100)], channels=3, size=None, source="s")
    np.testing.assert_array_equal(both[0], RGB.transpose(2, 0, 1))
    np.testing.assert_array_equal(both[1], np.stack([GREY] * 3))
    np.testing.assert_array_equal(both[2], np.stack([np.where(GREY > 100, 255, 0)] * 3))


def test_colours_where_grey_is_wanted_are_refused():
    np.testing.assert_array_equal(one(encoded(np.stack([GREY] * 3, -1)), channels=1)[..., 0], GREY)
    with pytest.raises(DataError, match="row 0: a picture in colours, but this data set is grey"):
        one(encoded(RGB), channels=1)


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_set_upright(turn):
    ways = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    ways |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, -1)}
    ways[7] = lambda a: np.rot90(a.swapaxes(0, 1), 2)
    stored = np.ascontiguousarray(ways[turn](RGB))  # what a camera held that way writes
    exif = Image.Exif()
    exif[0x0112] = turn
    np.testing.assert_array_equal(one(encoded(stored, "PNG", exif=exif)), RGB)


def test_transparent_pixels_are_laid_on_white():
    alpha = np.full((3, 4), 255, np.uint8)
    np.testing.assert_array_equal(one(encoded(np.dstack([RGB, alpha]))), RGB)
    alpha[0] = 0
    alpha[1] = 51  # a fifth
    found = one(encoded(np.dstack([RGB, alpha])))
    assert (found[0] == 255).all() and (found[2] == RGB[2]).all()
    np.testing.assert_allclose(found[1], 0.2 * RGB[1] + 0.8 * 255, atol=1)
    grey = one(encoded(np.dstack([GREY, alpha])), channels=1)[..., 0]
    assert (grey[0] == 255).all() and (grey[2] == GREY[2]).all()
    palette = Image.fromarray(GREY).convert("P")
    assert (one(encoded(palette, transparency=int(np.asarray(palette)[0, 0])))[0, 0] == 255).all()


def deep_rgb():
    """A PNG of 16 bits a channel: Pillow reads such files as 8 bits, and writes none."""
    import struct
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.uint16) * 4)
    head = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (encoded(GREY.astype(np.uint16) * 300), "16 bits a channel; expected 8 bits.*scale it"),
        (encoded(GREY.astype(np.uint16) * 300, "TIFF"), "16 bits a channel"),
        (encoded(GREY.astype(np.uint16) * 300, "PPM"), "a channel; expected 8 bits"),
        (b"P6 2 1 65535\n" + bytes(12), "16 bits a channel"),
        (deep_rgb(), "16 bits a channel"),
        (encoded(GREY.astype(np.float32) / 255, "TIFF"), "32-bit floats a channel"),
        (encoded(GREY.astype(np.int32) * 9000, "TIFF"), "32-bit integers a channel"),
        (encoded(Image.new("1", (14000, 14000))), "too many pixels.*shrink it"),
        (encoded(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(RGB)]), "several pictures"),
        (encoded(RGB)[:50], "not a readable image"),
    ],
)
def test_what_cannot_be_read_in_one_way_is_refused(blob, words):
    with pytest.raises(DataError, match=f"s, row 0: .*{words}"):
        one(blob)


def write(file: Path, blob: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(blob)


def folders(root, classes, count=10):
    """``count`` pictures of each of ``classes`` in two domains; the red channel is the place of the class."""
    for domain in ("inside", "outside"):
        for at, name in enumerate(classes):
            for i in range(count):
                write(root / domain / name / f"{i}.png", encoded(np.full((4, 4, 3), (at, i, 0), np.uint8)))


@pytest.mark.parametrize(
    "classes", [["1", "2", "3"], ["0", "1", "2"], ["7", "10", "20"], ["ant", "bee", "cat"]]
)
def test_class_folders_are_classes_0_to_c(tmp_path, classes):
    folders(tmp_path, classes)
    data = sources.domain_images(tmp_path, size=4, test_folds=[0])
    assert data.classes == tuple(classes)
    for part in (data.train, data.test):
        assert part.y.tolist() == part.x[:, 0, 0, 0].tolist()


def test_a_class_with_test_pictures_only_is_a_class(tmp_path):
    folders(tmp_path, ["ant", "cat"])
    write(tmp_path / "inside/bee/0.png", encoded(np.full((4, 4, 3), 9, np.uint8)))
    for fold in range(10):
        data = sources.domain_images(tmp_path, size=4, test_folds=[fold])
        assert data.classes == ("ant", "bee", "cat")
        for part in (data.train, data.test):
            assert part.y.tolist() == [{0: 0, 9: 1, 1: 2}[int(red)] for red in part.x[:, 0, 0, 0]]


def test_files_that_systems_leave_behind_are_no_samples(tmp_path):
    folders(tmp_path, ["ant", "bee"])
    for junk in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "notes.txt"):
        write(tmp_path / "inside" / "ant" / junk, b"no image")
    write(tmp_path / ".ipynb_checkpoints" / "ant" / "0.png", b"no image")
    write(tmp_path / "__MACOSX" / "ant" / "0.png", b"no image")
    data = sources.domain_images(tmp_path, size=4, test_folds=[0])
    assert data.domains == ("inside", "outside") and len(data.train) + len(data.test) == 40
    write(tmp_path / "inside" / "ant" / "scan.heic", b"an image that nobody here reads")
    with pytest.raises(DataError, match=r"scan\.heic: is no image that can be read.*convert or remove"):
        sources.domain_images(tmp_path, size=4, test_folds=[0])


@pytest.mark.parametrize("suffix", ["tif", "webp"])
def test_folders_of_tif_and_webp(tmp_path, suffix):
    for domain in ("a", "b"):
        for i in range(10):
            blob = encoded(
                RGB,
                {"tif": "TIFF", "webp": "WEBP"}[suffix],
                **({} if suffix == "tif" else {"lossless": True}),
            )
            write(tmp_path / domain / "k" / f"{i}.{suffix}", blob)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = sources.domain_images(tmp_path, size=4, test_folds=[0])
    assert len(data.train) + len(data.test) == 20


def shard(file, cells, labels):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, "label": labels}), file)


def load(path, **options):
    return sources.parquet(path, image="image", label="label", **options)


def test_shards_take_the_wider_type(tmp_path):
    cells = [encoded(RGB)] * 2
    shard(tmp_path / "train-0.parquet", pa.array(cells, pa.binary()), pa.array([0, 1], pa.int32()))
    shard(tmp_path / "train-1.parquet", pa.array(cells, pa.large_binary()), pa.array([2, 1], pa.int64()))
    shard(tmp_path / "train-2.parquet", cells, [0.0, 2.0])
    data = load(tmp_path)
    assert data.train.y.tolist() == [0, 1, 2, 1, 0, 2] and data.classes == ("0", "1", "2")
    shard(tmp_path / "train-3.parquet", cells, ["a", "b"])
    with pytest.raises(
        DataError, match=r"column 'label' is int32 in one file, .*string in another; write all with one type"
    ):
        load(tmp_path)


def test_a_test_file_without_rows_is_no_test_set(tmp_path):
    shard(tmp_path / "train-0.parquet", [encoded(RGB)] * 2, [3, 4])
    shard(tmp_path / "test-0.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    data = load(tmp_path)
    assert data.test is None and data.train.y.tolist() == [0, 1] and data.classes == ("3", "4")
    shard(tmp_path / "train-0.parquet", pa.array([], pa.binary()), pa.array([], pa.string()))
    with pytest.raises(DataError, match=r"train-0\.parquet: no rows in it"):
        load(tmp_path)


def test_a_class_of_the_test_file_only_is_a_class(tmp_path):
    shard(tmp_path / "train-0.parquet", [encoded(RGB)] * 2, ["a", "c"])
    shard(tmp_path / "test-0.parquet", [encoded(RGB)] * 2, ["b", "c"])
    data = load(tmp_path)
    assert (
        data.classes == ("a", "b", "c") and data.train.y.tolist() == [0, 2] and data.test.y.tolist() == [1, 2]
    )


def test_pictures_by_path_only_are_named(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": encoded(RGB), "path": None}, {"bytes": None, "path": "a.png"}], struct)
    shard(tmp_path / "train-0.parquet", cells, [0, 1])
    with pytest.raises(
        DataError, match=r"'image', row 1: holds no image, only the path 'a\.png'; write the images'"
    ):
        load(tmp_path)


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.tobytes(), 1)


def test_data_of_another_set_are_named(tmp_path):
    labels = np.array([9, 0, 0, 3, 0, 2, 7, 2, 5, 5] + [0] * 59_990, np.uint8)  # as Fashion-MNIST begins
    for stem, y in (("train", labels), ("t10k", labels[:10])):
        write(tmp_path / "f" / f"{stem}-images-idx3-ubyte.gz", idx(np.zeros((len(y), 2, 2), np.uint8)))
        write(tmp_path / "f" / f"{stem}-labels-idx1-ubyte.gz", idx(y))
    with pytest.raises(
        DataError, match=r"holds IDX files, as MNIST and Fashion-MNIST do.*data=fashion_mnist"
    ):
        sources.cifar10(tmp_path / "f")
    with pytest.raises(
        DataError, match="is zalando-datasets/fashion_mnist, not ylecun/mnist; type data=fashion_mnist"
    ):
        sources.mnist(tmp_path / "f")
    assert len(sources.fashion_mnist(tmp_path / "f").train) == 60_000
    shard(tmp_path / "c" / "train-0.parquet", [encoded(RGB)] * 2, [3, 4])
    with pytest.raises(DataError, match="a picture in colours, but this data set is grey"):
        sources.mnist(tmp_path / "c")
    with pytest.raises(
        DataError, match="has the columns image, label, as mnist or fashion_mnist has; expected img"
    ):
        sources.cifar10(tmp_path / "c")


def test_what_lies_apart_and_folders_without_images_are_said(tmp_path, caplog):
    for place in ("train/ant/0.png", "train/bee/0.png", "train/bee/more/0.png", "train/0.png"):
        write(tmp_path / place, encoded(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "train" / "cat").mkdir()
    data = sources.image_folder(tmp_path, size=4)
    assert data.classes == ("ant", "bee") and len(data.train) == 2
    left, empty = (record.getMessage() for record in caplog.records)
    assert "train/0.png' and 1 more: left out" in left and "no class 'cat'" in empty


def test_train_and_test_without_folders_of_classes_are_no_classes(tmp_path):
    for place in ("train/0.png", "test/0.png"):
        write(tmp_path / place, encoded(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(DataError, match="holds no images; expected <class>/<image>"):
        sources.image_folder(tmp_path, size=4)


def test_folders_beside_train_and_test_are_named(tmp_path):
    for place in ("train/ant/0.png", "test/ant/0.png", "val/ant/0.png"):
        write(tmp_path / place, encoded(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(DataError, match="in folders test, train, val; no 'val' is read: move or rename it"):
        sources.image_folder(tmp_path, size=4)
    with pytest.raises(DataError, match=r"0\.png is a file; expected <class>/<image>"):
        sources.image_folder(tmp_path / "train" / "ant" / "0.png")


def test_a_split_that_is_not_read_is_said(tmp_path, caplog):
    for name in ("train-0.parquet", "validation-0.parquet"):
        shard(tmp_path / name, [encoded(RGB)] * 2, [0, 1])
    assert len(load(tmp_path).train) == 2
    assert "validation-0.parquet is not read" in caplog.text
