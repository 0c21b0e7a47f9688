"""qcow2 images: what we write QEMU reads, and the other way round; counts of references stay right."""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest

from qemu_user.backends.block.opening import create_overlay, open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.qcow2.image import Qcow2Image
from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.errors import BackendError
from tests.framework.disk_tools import check, compare, needs_qemu_img, qemu_img, qemu_io

MIB = 1 << 20


def opened(path: Path, readonly: bool = False) -> Qcow2Image:
    image = open_disk(str(path), "qcow2", readonly)
    assert isinstance(image, Qcow2Image)
    return image


def read(image: Qcow2Image, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    cut = length // 3
    image.read(offset, [memoryview(buffer)[:cut], memoryview(buffer)[cut:]])
    return bytes(buffer)


def write(image: Qcow2Image, offset: int, data: bytes) -> None:
    cut = len(data) // 3
    image.write(offset, [memoryview(data)[:cut], memoryview(data)[cut:]])


class Model:
    """A disk in memory, changed the same way as an image."""

    def __init__(self, random: random.Random, content: bytes) -> None:
        self.random, self.content = random, bytearray(content)

    def place(self, most: int) -> tuple[int, int]:
        """A random stretch of whole sectors."""
        sectors = len(self.content) // 512
        first = self.random.randrange(sectors)
        count = min(sectors - first, self.random.choice([1, 7, 8, 64, 128, 129, most // 512]))
        return 512 * first, 512 * count

    def step(self, image: Qcow2Image) -> None:
        """One random operation on both."""
        offset, length = self.place(400 << 10)
        what = self.random.choices(["write", "read", "zero", "unmap", "discard", "flush"], [6, 4, 1, 1, 1, 1])[0]
        if what == "write":
            data = self.random.randbytes(length)
            write(image, offset, data)
            self.content[offset : offset + length] = data
        elif what == "read":
            assert read(image, offset, length) == self.content[offset : offset + length]
        elif what == "flush":
            image.flush()
        elif what == "discard":
            image.punch(offset, length)
            # what discarded sectors hold is the image's choice
            self.content[offset : offset + length] = read(image, offset, length)
        else:
            image.zero(offset, length, unmap=what == "unmap")
            self.content[offset : offset + length] = bytes(length)


@needs_qemu_img
@pytest.mark.parametrize(("bits", "order"), [(9, 4), (9, 6), (12, 4), (12, 2), (16, 4), (16, 0), (21, 4)])
def test_random_operations_agree_with_qemu(tmp_path: Path, bits: int, order: int) -> None:
    path = tmp_path / "d.qcow2"
    dice = random.Random(100 * bits + order)
    size = (6 if bits == 9 else 21) * MIB + 512 * 5
    create_qcow2(path, size, cluster_bits=bits, refcount_order=order)
    model = Model(dice, bytes(size))
    for _ in range(3):
        image = opened(path)
        for _ in range(40):
            model.step(image)
        image.close()
        check(path)
        compare(path, bytes(model.content), tmp_path)
        # and QEMU goes on with it
        offset, length = model.place(64 << 10)
        qemu_io(path, f"write -P 0x5a {offset} {length}")
        model.content[offset : offset + length] = b"\x5a" * length
    image = opened(path, readonly=True)
    assert read(image, 0, size) == model.content
    image.close()


@needs_qemu_img
@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10", "lazy_refcounts=on", "preallocation=metadata", "cluster_size=4k"]
)
def test_images_made_by_qemu(tmp_path: Path, options: str) -> None:
    path = tmp_path / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "40M")
    qemu_io(path, "write -P 1 0 1M", "write -z 256k 64k", "discard 512k 128k", "write -P 3 30M 1k")
    content = bytearray(40 * MIB)
    content[:MIB] = b"\1" * MIB
    content[256 << 10 : 320 << 10] = bytes(64 << 10)
    content[30 * MIB : 30 * MIB + 1024] = b"\3" * 1024
    model = Model(random.Random(7), bytes(content))
    image = opened(path)
    model.content[512 << 10 : 640 << 10] = read(image, 512 << 10, 128 << 10)
    assert read(image, 0, 40 * MIB) == model.content
    for _ in range(60):
        model.step(image)
    image.close()
    check(path)
    compare(path, bytes(model.content), tmp_path)


@needs_qemu_img
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters(tmp_path: Path, kind: str) -> None:
    if kind == "zstd":
        pytest.importorskip("zstandard", reason="pip install zstandard")
    dice = random.Random(3)
    content = b"".join(bytes(dice.randrange(1, 7) for _ in range(1024)) * 64 + dice.randbytes(512) * 128 for _ in range(32))
    raw, path = tmp_path / "r", tmp_path / "d.qcow2"
    raw.write_bytes(content)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, path)
    model = Model(dice, content)
    image = opened(path)
    assert read(image, 0, len(content)) == content
    for _ in range(60):
        model.step(image)
    image.close()
    check(path)
    compare(path, bytes(model.content), tmp_path)


@needs_qemu_img
def test_internal_snapshots_stay_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    dice = random.Random(9)
    create_qcow2(path, 8 * MIB, cluster_bits=12)
    model = Model(dice, bytes(8 * MIB))
    image = opened(path)
    for _ in range(30):
        model.step(image)
    image.close()
    kept = bytes(model.content)
    qemu_img("snapshot", "-c", "before", path)
    image = opened(path)
    with pytest.raises(OSError, match="internal snapshots"):
        image.resize(16 * MIB)
    for _ in range(40):
        model.step(image)
    image.close()
    check(path)
    compare(path, bytes(model.content), tmp_path)
    qemu_img("snapshot", "-a", "before", path)
    check(path)
    compare(path, kept, tmp_path)


@needs_qemu_img
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("version", [3, 2])
def test_chain_of_overlays(tmp_path: Path, base_format: str, version: int) -> None:
    dice = random.Random(version)
    base, middle, top = tmp_path / "base", tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    content = dice.randbytes(3 * MIB + 512 * 3)
    base.write_bytes(content)
    if base_format == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", base, tmp_path / "other")
        (tmp_path / "other").rename(base)
    model = Model(dice, content + bytes(10 * MIB - len(content)))
    create_qcow2(middle, 10 * MIB, "base", base_format, version=version, cluster_bits=14)
    before = base.read_bytes()
    image = opened(middle)
    for _ in range(40):
        model.step(image)
    image.close()
    check(middle)
    compare(middle, bytes(model.content), tmp_path)
    beneath = middle.read_bytes()
    create_overlay(middle, top, 12 * MIB)
    model.content += bytes(2 * MIB)
    image = opened(top)
    for _ in range(60):
        model.step(image)
    image.close()
    check(top)
    compare(top, bytes(model.content), tmp_path)
    assert base.read_bytes() == before
    assert middle.read_bytes() == beneath
    assert "backing file format: qcow2" in qemu_img("info", top)


def test_overlays_are_refused_when_they_make_no_sense(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create_qcow2(base, MIB)
    with pytest.raises(BackendError, match="less than"):
        create_overlay(base, top, MIB - 512)
    create_overlay(base, top)
    with pytest.raises(BackendError, match="there is one already"):
        create_overlay(base, top)
    with pytest.raises(BackendError, match="there is one already"):
        create_qcow2(base, MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.qcow2", "top.qcow2"]
    create_qcow2(base, MIB, "top.qcow2", "qcow2", replace=True)
    for path in (base, top):
        with pytest.raises(BackendError, match="a loop"):
            opened(path)
    create_qcow2(base, MIB, "base.qcow2", "qcow2", replace=True)
    with pytest.raises(BackendError, match="a loop"):
        opened(base)
    create_qcow2(base, MIB, "none", "raw", replace=True)
    with pytest.raises(BackendError, match=r"backing file .*none: No such file"):
        opened(top)
    with pytest.raises(BackendError, match="too long"):
        create_qcow2(tmp_path / "x", MIB, "n" * 1024)


def test_formats_are_not_guessed_from_what_a_guest_wrote(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    create_qcow2(disk, MIB)
    with pytest.raises(BackendError, match="say format="):
        open_disk(str(disk))
    open_disk(str(disk), "raw").close()
    named = tmp_path / "disk.qcow2"
    named.write_bytes(bytes(MIB))
    with pytest.raises(BackendError, match="say format="):
        open_disk(str(named))
    with pytest.raises(BackendError, match="not a qcow2 image"):
        open_disk(str(named), "qcow2")
    with pytest.raises(BackendError, match="format 'vmdk'"):
        open_disk(str(named), "vmdk")


@needs_qemu_img
def test_resize(tmp_path: Path) -> None:
    path, base = tmp_path / "d.qcow2", tmp_path / "base.qcow2"
    create_qcow2(base, 3 * MIB)
    image = opened(base)
    write(image, 0, b"b" * 3 * MIB)
    image.close()
    create_qcow2(path, MIB + 512, "base.qcow2", "qcow2", cluster_bits=12)
    image = opened(path)
    write(image, MIB - 512, b"w" * 512)
    image.resize(20 * MIB)
    content = bytearray(b"b" * MIB + bytes(19 * MIB))
    content[MIB : MIB + 512] = b"b" * 512
    content[MIB - 512 : MIB] = b"w" * 512
    assert image.size == 20 * MIB
    assert read(image, 0, 20 * MIB) == content
    write(image, 19 * MIB, b"e" * MIB)
    image.resize(19 * MIB + 512)
    image.resize(21 * MIB)
    content[19 * MIB :] = b"e" * 512 + bytes(2 * MIB - 512)
    assert read(image, 0, 21 * MIB) == content
    image.resize(512 * 3)
    image.resize(MIB)
    content[:] = b"b" * 512 * 3 + bytes(MIB - 512 * 3)
    assert read(image, 0, MIB) == content
    with pytest.raises(OSError, match="too large"):
        image.resize(1 << 50)
    image.close()
    check(path)
    compare(path, bytes(content), tmp_path)


@needs_qemu_img
def test_small_clusters_outgrow_the_refcount_table(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 24 * MIB, cluster_bits=9, refcount_order=6)
    content = random.Random(1).randbytes(24 * MIB)
    image = opened(path)
    for offset in range(0, len(content), MIB):
        write(image, offset, content[offset : offset + MIB])
    image.close()
    check(path)
    compare(path, content, tmp_path)
    image = opened(path)
    image.punch(0, 24 * MIB)
    image.flush()
    image.close()
    assert check(path).get("allocated-clusters", 0) == 0
    assert path.stat().st_blocks * 512 < 8 * MIB, "freed clusters are given back to the file system"


@needs_qemu_img
def test_freed_clusters_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 64 * MIB)
    image = opened(path)
    for number in range(30):
        write(image, 2 * MIB * number, bytes([number]) * 2 * MIB)
        image.punch(2 * MIB * number, 2 * MIB)
        image.flush()
    write(image, 0, b"x" * MIB)
    image.close()
    assert path.stat().st_size < 8 * MIB
    check(path)
    compare(path, b"x" * MIB + bytes(63 * MIB), tmp_path)


@needs_qemu_img
def test_caches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mapping", "refcounts"):
        monkeypatch.setattr(f"qemu_user.backends.block.qcow2.{module}.CACHE_BYTES", 4 * 512)
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 8 * MIB, cluster_bits=9)
    model = Model(random.Random(5), bytes(8 * MIB))
    image = opened(path)
    for _ in range(150):
        model.step(image)
        assert image._mapping.cached <= 4 + 1
        assert image._refcounts.cached <= 4 + 1
    image.close()
    check(path)
    compare(path, bytes(model.content), tmp_path)


@needs_qemu_img
def test_requests_of_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 16 * MIB, cluster_bits=14)
    image = opened(path)
    content = bytearray(15 * MIB)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        # Threads share clusters, never sectors.
        dice = random.Random(number)
        try:
            for _ in range(300):
                offset = 512 * (dice.randrange(0, 15 * MIB // 512 // 4) * 4 + number)
                what = dice.random()
                if what < 0.6:
                    data = dice.randbytes(512)
                    write(image, offset, data)
                    content[offset : offset + 512] = data
                elif what < 0.7:
                    image.zero(offset, 512, unmap=True)
                    content[offset : offset + 512] = bytes(512)
                elif what < 0.75:
                    image.flush()
                else:
                    assert read(image, offset, 512) == content[offset : offset + 512]
        except BaseException as error:
            failures.append(error)

    def churn() -> None:
        # Whole clusters of its own, freed and taken again under the others' eyes.
        dice = random.Random(99)
        try:
            for _ in range(150):
                image.punch(15 * MIB, MIB)
                write(image, 15 * MIB + 16384 * dice.randrange(32), dice.randbytes(32768))
                image.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    threads.append(threading.Thread(target=churn, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert read(image, 0, 15 * MIB) == content
    image.close()
    check(path)


@needs_qemu_img
def test_one_writer_or_many_readers_among_all_programs(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    image = opened(path)
    for readonly in (False, True):
        with pytest.raises(BackendError, match="another VM or process"):
            opened(path, readonly)
    qemu_img("info", path, status=1)
    qemu_img("check", path, status=1)
    image.close()
    readers = [opened(path, readonly=True) for _ in range(2)]
    qemu_img("info", path)
    with pytest.raises(BackendError, match="in use"):
        opened(path)
    qemu_img("resize", path, "2M", status=1)
    create_overlay(path, tmp_path / "top.qcow2")
    top = opened(tmp_path / "top.qcow2")
    for reader in readers:
        reader.close()
    with pytest.raises(BackendError, match="in use"):
        opened(path)
    top.close()
    opened(path).close()


@needs_qemu_img
def test_handing_over_to_another_process(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    source = opened(path)
    write(source, 0, b"s" * 4096)
    destination = open_disk(str(path), "qcow2", locked=False)
    write(source, 4096, b"t" * 4096)
    with pytest.raises(OSError, match="another process"):
        destination.read(0, [memoryview(bytearray(512))])
    destination.flush()
    with pytest.raises(BackendError):
        destination.lock()
    source.unlock()
    destination.lock()
    buffer = bytearray(8192)
    destination.read(0, [memoryview(buffer)])
    assert buffer == b"s" * 4096 + b"t" * 4096
    destination.write(65536, [memoryview(b"d" * 512)])
    destination.unlock()
    source.lock()
    assert read(source, 65536, 512) == b"d" * 512
    destination.close()
    source.close()
    check(path)


def test_what_holds_data(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create_qcow2(base, MIB)
    image = opened(base)
    write(image, 128 << 10, bytes([1]) * 65536)
    image.close()
    create_overlay(base, top)
    image = opened(top)
    write(image, 0, b"x" * 512)
    image.zero(256 << 10, 65536, unmap=True)
    assert image.with_data(65536, chain=False) == bytes([1, 0, 0, 0, 1] + [0] * 11)
    assert image.with_data(65536) == bytes([1, 0, 1] + [0] * 13)
    image.close()


# -- images that nobody may trust ------------------------------------------------------------------


def _patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


HEADER_DAMAGE = {
    "version": (4, struct.pack(">I", 9), "version 9"),
    "cluster bits small": (20, struct.pack(">I", 8), "clusters of 2"),
    "cluster bits large": (20, struct.pack(">I", 63), "clusters of 2"),
    "encrypted": (32, struct.pack(">I", 1), "encrypted"),
    "huge disk": (24, struct.pack(">Q", (1 << 64) - 512), "damaged"),
    "disk beyond L1": (24, struct.pack(">Q", 1 << 45), "L1 table has"),
    "no disk": (24, struct.pack(">Q", 0), "no size"),
    "L1 huge": (36, struct.pack(">I", 0xFFFFFFFF), "L1 table has"),
    "L1 unaligned": (40, struct.pack(">Q", 0x30200), "L1 table is at"),
    "L1 outside": (40, struct.pack(">Q", 1 << 40), "beyond the end"),
    "L1 over the header": (40, struct.pack(">Q", 0), "L1 table is at"),
    "L1 over the refcounts": (40, struct.pack(">Q", 0x10000), "lies over"),
    "refcount table huge": (56, struct.pack(">I", 0xFFFFFFFF), "refcount table has"),
    "refcount table none": (56, struct.pack(">I", 0), "no refcount table"),
    "refcount table outside": (48, struct.pack(">Q", 1 << 62), "beyond the end"),
    "refcount order": (96, struct.pack(">I", 7), "reference counts"),
    "header length": (100, struct.pack(">I", 1 << 20), "header of"),
    "unknown feature": (72, struct.pack(">Q", 1 << 20), "not known here"),
    "data file": (72, struct.pack(">Q", 4), "data_file"),
    "subclusters": (72, struct.pack(">Q", 16), "subclusters"),
    "corrupt": (72, struct.pack(">Q", 2), "marked as damaged"),
    "compression": (72, struct.pack(">Q", 8), "contradictory"),
    "snapshots": (60, struct.pack(">IQ", 0xFFFFFFFF, 0x10000), "snapshots"),
    "backing name long": (8, struct.pack(">QI", 200, 5000), "backing file's name"),
    "backing name outside": (8, struct.pack(">QI", 1 << 40, 5), "outside the header"),
    "extension": (112, struct.pack(">II", 0x12345678, 0xFFFFFFF0), "extension"),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_damaged_headers_are_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    offset, data, message = HEADER_DAMAGE[damage]
    _patched(path, offset, data)
    before = path.read_bytes()
    with pytest.raises(BackendError, match=message) as caught:
        opened(path)
    assert path.read_bytes() == before
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 71, 90, 65535, 65536, 131072, 196610])
def test_cut_off_images_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    with path.open("r+b") as file:
        file.truncate(length)
    with pytest.raises(BackendError):
        opened(path)


L2_DAMAGE = {
    "header": 1 << 63,
    "refcount table": 1 << 63 | 0x10000,
    "L1 table": 1 << 63 | 0x30000,
    "itself": 1 << 63 | 0x40000,
    "unaligned": 1 << 63 | 0x50200,
    "far away": 1 << 63 | 1 << 50,
    "compressed far away": 1 << 62 | 1 << 45,
}


@pytest.mark.parametrize("damage", L2_DAMAGE)
def test_entries_that_point_at_metadata_never_let_it_be_overwritten(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    image = opened(path)
    write(image, 0, b"x" * 512)
    image.close()
    l2 = struct.unpack(">Q", path.read_bytes()[0x30000:0x30008])[0] & 0xFFFFFFFFFFFE00
    entry = 1 << 63 | l2 if damage == "itself" else L2_DAMAGE[damage]
    _patched(path, l2, struct.pack(">Q", entry))
    before = path.read_bytes()
    image = opened(path)
    told: list[str] = []
    image.report = lambda event, text: told.append(event)
    if damage == "header":
        write(image, 0, b"y" * 512)  # an entry of offset 0 is an unallocated one
    else:
        with pytest.raises(OSError, match="damaged"):
            write(image, 0, b"y" * 512)
        assert told == ["BLOCK_IMAGE_CORRUPTED"]
        with pytest.raises(OSError, match="damaged"):
            write(image, 65536, b"y" * 512)
        with pytest.raises(OSError, match="damaged"):
            image.flush()
    image.close()
    after = path.read_bytes()
    if damage != "header":
        assert after[:79] + after[80:] == before[:79] + before[80:]
        assert after[79] == 2, "marked as damaged"
        with pytest.raises(BackendError, match="marked as damaged"):
            opened(path)
        opened(path, readonly=True).close()


def test_counts_that_call_metadata_free(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    _patched(path, 0x20000, bytes(16))
    image = opened(path)
    with pytest.raises(OSError, match="counts as free"):
        write(image, 0, b"x" * 512)
    image.close()
    content = path.read_bytes()
    assert content[:4] == b"QFI\xfb"
    assert content[0x10000:0x10008] == struct.pack(">Q", 0x20000)


@needs_qemu_img
def test_random_damage_never_crashes(tmp_path: Path) -> None:
    dice = random.Random(11)
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 4 * MIB, cluster_bits=12)
    image = opened(path)
    for number in range(40):
        write(image, dice.randrange(0, 4 * MIB - 8192) & -512, bytes([number]) * 8192)
    image.close()
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 3, 20])):
            at = dice.choice([dice.randrange(0, 120), dice.randrange(0, 0x6000), dice.randrange(len(whole))])
            damaged[at] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            image = opened(path)
        except BackendError:
            continue
        for _ in range(6):
            try:
                offset = dice.randrange(0, max(image.size - 8192, 512)) & -512
                length = min(8192, image.size - offset)
                read(image, offset, length)
                write(image, offset, b"w" * length)
                image.punch(offset, length)
                image.flush()
            except OSError:
                pass
        image.close()


@needs_qemu_img
def test_images_that_were_not_closed_are_repaired(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", path, "16M")
    qemu_io(path, "write -P 7 0 3M")
    # as a killed QEMU leaves it: marked, with counts that nobody has written
    content = bytearray(path.read_bytes())
    content[79] = 1
    (table,) = struct.unpack_from(">Q", content, 48)
    (block,) = struct.unpack_from(">Q", content, table)
    content[block + 64 : block + 1024] = bytes(960)
    path.write_bytes(content)
    image = opened(path)
    write(image, 3 * MIB, b"\7" * MIB)
    image.close()
    check(path)
    compare(path, b"\7" * 4 * MIB + bytes(12 * MIB), tmp_path)


@needs_qemu_img
def test_features_that_we_do_not_keep_up_are_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, MIB)
    qemu_img("bitmap", "--add", path, "b0")
    assert path.read_bytes()[95] == 1
    opened(path, readonly=True).close()
    assert path.read_bytes()[95] == 1
    opened(path).close()
    assert path.read_bytes()[95] == 0


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 4 * MIB)
    image = opened(path)
    write(image, 0, b"a" * 65536)
    image.flush()
    real = RawImage.write
    full = True

    def failing(self: RawImage, offset: int, views: list[memoryview]) -> None:
        if full and offset + sum(map(len, views)) > 0x60000:
            raise OSError(28, "No space left on device")
        real(self, offset, views)

    monkeypatch.setattr(RawImage, "write", failing)
    for _ in range(5):
        with pytest.raises(OSError, match="No space"):
            write(image, MIB, b"b" * 65536)
    image.flush()
    assert read(image, MIB, 65536) == bytes(65536)
    full = False
    write(image, MIB, b"c" * 65536)
    image.close()
    assert path.stat().st_size <= 0x70000, "clusters of failed writes were used again"
    image = opened(path, readonly=True)
    assert read(image, 0, 65536) == b"a" * 65536
    assert read(image, MIB, 65536) == b"c" * 65536
    image.close()
