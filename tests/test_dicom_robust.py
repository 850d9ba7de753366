"""Building caches out of files that lie, links that lead away, disks that fill and processes that die; 10,000 mutated files with CXRKIT_MUTATIONS=10000."""
import errno
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest

import cxrkit.imagecache as imagecache
from cxrkit.dicom import Limits, Policy, UnreadableImage, build_cache, open_cache, read_radiograph
from cxrkit.dicomfile import map_file
from cxrkit.dicomwrite import SYNTAXES, encode_frame, write_dicom
from cxrkit.radiograph import read_pixels

ROOT = Path(__file__).resolve().parents[1]
QUICK = dict(workers=1, backend="thread", progress=False)
MUTATIONS = int(os.environ.get("CXRKIT_MUTATIONS", 500))


def phantom(h=72, w=96, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    return np.clip(2000+1500*np.sin(y/17+seed)*np.cos(x/23)+rng.normal(0, 20, (h, w)), 0, 4095).astype(np.uint16)


def table(paths, **columns):
    return pd.DataFrame([dict(image_id=Path(p).stem, study_id="s", patient_id="p", path=str(p), split="train") for p in paths]).assign(**columns)


def folder_hash(folder):
    "Name and content of every file that a later stage reads."
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    names = ["explicit", "implicit", "rle", "jpeg-lossless", "jpeg-ls", "j2k", "htj2k"]
    out = [write_dicom(folder/f"{i}-{names[i % 7]}.dcm", phantom(70+i, 90+2*i, i), names[i % 7], 12) for i in range(14)]
    cv2.imwrite(str(folder/"14-png.png"), (phantom(seed=14) >> 4).astype(np.uint8))
    return [*out, folder/"14-png.png"]


# --- caches

@pytest.mark.parametrize("format", ["png", "jpeg", "memmap"])
def test_cache_equals_reading_each_file_and_is_the_same_bytes_however_built(tmp_path, files, format):
    images = table(files)
    for name, options in {"one": dict(workers=2), "threads": dict(workers=3, backend="thread")}.items():
        build_cache(images, tmp_path/name, [(48, 40), 32], format=format, progress=False, **options)
    assert folder_hash(tmp_path/"one") == folder_hash(tmp_path/"threads")
    for size in ((48, 40), (32, 32)):
        cache = open_cache(tmp_path/"one", size)
        assert len(cache) == 15 and cache.size == size
        for path in files[:6]:
            expected, got = read_radiograph(path, size), cache[path.stem]
            assert np.abs(got.astype(int)-expected).max() <= (6 if format == "jpeg" else 0)
    assert cache.images.height.tolist()[:3] == [70, 71, 72] and cache.images.width.tolist()[:3] == [90, 92, 94]
    assert not Path(cache.images.path[0]).suffix == ".dcm" and Path(cache.images.path[0]).is_file()


def test_a_cache_can_be_moved_pickled_and_opened_again(tmp_path, files):
    import pickle
    build_cache(table(files[:3]), tmp_path/"a", 32, format="memmap", **QUICK)
    (tmp_path/"a").rename(tmp_path/"b")
    cache = open_cache(tmp_path/"b")
    copy = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(cache["0-explicit"], copy["0-explicit"]) and Path(cache.images.path[0]).is_file()
    cache["0-explicit"][:] = 0 # a copy: the cache stays
    assert cache["0-explicit"].any()


def test_a_killed_build_continues_and_ends_with_the_same_bytes(tmp_path, files):
    images = table([*files, tmp_path/"missing.dcm"])
    build_cache(images, tmp_path/"whole", 40, workers=2, progress=False)
    images.to_parquet(tmp_path/"images.parquet")
    code = f"import pandas as pd; from cxrkit.dicom import build_cache; build_cache(pd.read_parquet({str(tmp_path/'images.parquet')!r}), {str(tmp_path/'cut')!r}, 40, workers=2, progress=False)"
    for least in (1, 6):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        journal, deadline = tmp_path/"cut/journal.jsonl", time.monotonic()+60
        while time.monotonic() < deadline and process.poll() is None:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= least: break
            time.sleep(.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(journal, "ab") as f: f.write(b'{"image_id": "torn')
    (tmp_path/"cut/40x40/.half.png.1.part").write_bytes(b"half")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"cut/40x40").glob("*.png")}
    build_cache(images, tmp_path/"cut", 40, **QUICK)
    assert folder_hash(tmp_path/"cut") == folder_hash(tmp_path/"whole")
    kept = sum((tmp_path/"cut/40x40").joinpath(p.name).stat().st_mtime_ns == t for p, t in before.items())
    assert kept >= 1, "nothing of the killed build was kept"


def test_an_unfinished_cache_is_not_opened_and_another_plan_is_refused(tmp_path, files):
    out = tmp_path/"c"
    build_cache(table(files[:3]), out, 32, **QUICK)
    for changed in (dict(size=48), dict(size=32, policy="minmax"), dict(size=32, format="memmap")):
        with pytest.raises(ValueError, match="holds another cache"): build_cache(table(files[:3]), out, progress=False, **changed)
    with pytest.raises(ValueError, match="n_images: has 3, wanted 2"): build_cache(table(files[:2]), out, 32, progress=False)
    (out/"cache.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished cache .* it continues where it stopped"): open_cache(out)


def test_a_changed_source_is_read_again(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(seed=1), "explicit", 12)
    build_cache(table([path]), tmp_path/"c", 32, **QUICK)
    before = open_cache(tmp_path/"c")["a"]
    write_dicom(path, phantom(seed=2), "explicit", 12)
    build_cache(table([path]), tmp_path/"c", 32, **QUICK)
    assert not np.array_equal(before, open_cache(tmp_path/"c")["a"])


@pytest.mark.parametrize("format", ["png", "memmap"])
def test_a_full_disk_leaves_nothing_that_is_trusted_and_the_build_continues(tmp_path, files, monkeypatch, format):
    images, written = table(files[:8]), []
    build_cache(images, tmp_path/"whole", 32, format=format, **QUICK)
    real_write, real_pwrite = Path.write_bytes, os.pwrite
    def full(): raise OSError(errno.ENOSPC, "No space left on device")
    def write_bytes(self, data):
        if self.suffix == ".part" and ".png" in self.name:
            written.append(self)
            if len(written) > 4:
                real_write(self, data[:len(data)//2])
                full()
        return real_write(self, data)
    def pwrite(handle, data, at):
        written.append(at)
        if len(written) > 4: full()
        return real_pwrite(handle, data, at)
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", write_bytes)
        m.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="the disk is full after 4 of 8 files; make room and run build_cache again"):
            build_cache(images, tmp_path/"cut", 32, format=format, **QUICK)
    with pytest.raises(FileNotFoundError, match="no finished cache"): open_cache(tmp_path/"cut")
    assert not list((tmp_path/"cut").rglob("*.part"))
    build_cache(images, tmp_path/"cut", 32, format=format, **QUICK)
    assert folder_hash(tmp_path/"cut") == folder_hash(tmp_path/"whole")


def test_no_room_for_the_memory_map_is_said_before_the_first_file(tmp_path, files, monkeypatch):
    def fallocate(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OSError, match="No space left"): build_cache(table(files[:2]), tmp_path/"c", 32, format="memmap", progress=False)
    assert not list((tmp_path/"c").glob("*.npy")) and not list((tmp_path/"c").glob(".*.part"))


def test_failures_are_rows_and_may_leave_a_black_image(tmp_path, files):
    (tmp_path/"text.dcm").write_text("no image")
    images = table([files[0], tmp_path/"text.dcm", tmp_path/"missing.dcm"])
    cached = build_cache(images, tmp_path/"drop", 32, **QUICK)
    failures = pd.read_csv(tmp_path/"drop/failures.csv")
    assert cached.image_id.tolist() == ["0-explicit"] and failures.image_id.tolist() == ["text", "missing"] and not failures.kept.any()
    assert "neither DICOM" in failures.reason[0] and "no file" in failures.reason[1].lower() or "No such file" in failures.reason[1]
    with pytest.raises(KeyError, match="see its failures.csv"): open_cache(tmp_path/"drop")["zzz"]
    cached = build_cache(images, tmp_path/"blank", 32, on_failure="blank", **QUICK)
    assert len(cached) == 3 and pd.read_csv(tmp_path/"blank/failures.csv").kept.all()
    assert not open_cache(tmp_path/"blank")["text"].any() and open_cache(tmp_path/"blank")["0-explicit"].any()
    with pytest.raises(ValueError, match="none of 1 files could be read; the first reason: neither DICOM"):
        build_cache(images[1:2], tmp_path/"none", 32, **QUICK)


def test_wrong_and_swapped_sizes_in_the_table_are_refused(tmp_path, files):
    images = table(files[:3], height=[70, 92, 500], width=[90, 71, 500])
    build_cache(images, tmp_path/"c", 32, **QUICK)
    reasons = pd.read_csv(tmp_path/"c/failures.csv").set_index("image_id").reason
    assert "92 × 71 (height × width), the file is 71 × 92; they are swapped" in reasons["1-implicit"]
    assert "the file is 72 × 94; is it another image?" in reasons["2-rle"] and len(reasons) == 2


@pytest.mark.parametrize("bad, message", [
    (lambda t: t.drop(columns="path"), "path missing"),
    (lambda t: pd.concat([t, t]), "occurs more than once; one row per image"),
])
def test_bad_tables_are_refused_before_anything_is_written(tmp_path, files, bad, message):
    with pytest.raises(ValueError, match=message): build_cache(bad(table(files[:2])), tmp_path/"c", 32, progress=False)
    assert not (tmp_path/"c").exists()


def test_ids_that_are_no_file_names_stay_inside_the_cache(tmp_path, files):
    images = table(files[:3]).assign(image_id=["../../evil", "a/b", ".hidden"])
    build_cache(images, tmp_path/"in/c", 32, **QUICK)
    cache = open_cache(tmp_path/"in/c")
    assert all(cache[i].shape == (32, 32) for i in images.image_id)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_damaged_cache_files_are_noticed(tmp_path, files):
    build_cache(table(files[:2]), tmp_path/"c", 32, **QUICK)
    first, second = (tmp_path/"c/32x32"/f"{p.stem}.png" for p in files[:2])
    first.write_bytes(first.read_bytes()[:50])
    cv2.imwrite(str(second), np.zeros((8, 8), np.uint8))
    cache = open_cache(tmp_path/"c")
    for i, message in (("0-explicit", "got none that can be read"), ("1-implicit", "expected a 32x32 image, got 8x8")):
        with pytest.raises(ValueError, match=message): cache[i]


def test_a_cache_says_how_it_was_made(tmp_path, files, capsys):
    "cache.json: policy, sizes, decoders, versions and a hash of the sources; decoded.csv: who decoded each file; a bar with files/s and time left."
    policy = Policy("window", clahe=2., detail="fast")
    build_cache(table(files), tmp_path/"a", [40, 24], policy=policy, workers=1, backend="thread")
    assert "file/s" in (shown := capsys.readouterr().err) and "15/15" in shown and "<" in shown
    info, decoded = json.loads((tmp_path/"a/cache.json").read_text()), pd.read_csv(tmp_path/"a/decoded.csv")
    assert info["policy"] == vars(policy) == open_cache(tmp_path/"a").policy and info["sizes"] == [[40, 40], [24, 24]] and (info["n_cached"], info["n_failed"]) == (15, 0)
    assert info["decoders"] == decoded.decoder.value_counts().to_dict() and info["decoders"]["cxrkit.losslessjpeg"] == 2
    assert info["versions"]["numpy"] == np.__version__ and len(info["source"]) == 64
    build_cache(table(files), tmp_path/"b", 32, **QUICK)
    assert json.loads((tmp_path/"b/cache.json").read_text())["source"] == info["source"], "the same files, made into something else"


def test_several_sizes_come_from_one_decode(tmp_path, files, monkeypatch):
    import cxrkit.radiograph as radiograph
    read, calls = radiograph.read_pixels, []
    monkeypatch.setattr(radiograph, "read_pixels", lambda *a: calls.append(a) or read(*a))
    build_cache(table(files[:5]), tmp_path/"c", [48, 32, (20, 30)], **QUICK)
    assert len(calls) == 5


def test_crops_are_windows_of_the_original(tmp_path, files):
    "The cached window is the window of the image, with its own size in the table; boxes go along and come back."
    from cxrkit.dicom import boxes_from_crop, boxes_to_crop, crop_windows
    images = table(files[:3])
    whole = build_cache(images, tmp_path/"whole", None, policy="minmax", **QUICK)
    lungs = pd.DataFrame([dict(image_id=i, x1=20, y1=10, x2=60, y2=50) for i in images.image_id])
    crops = crop_windows(lungs, whole, margin=.1)
    inner = build_cache(images, tmp_path/"crop", None, policy=Policy("minmax"), crops=crops, **QUICK)
    cache = open_cache(tmp_path/"crop")
    assert crops[["x1", "y1", "x2", "y2"]].iloc[0].tolist() == [16, 6, 64, 54] and inner[["height", "width"]].to_numpy().tolist() == [[48, 48]]*3
    pd.testing.assert_frame_equal(cache.crops[["image_id", "x1", "y1", "x2", "y2"]], crops, check_dtype=False)
    cut, full = cache["0-explicit"].astype(float), open_cache(tmp_path/"whole")["0-explicit"][6:54, 16:64].astype(float)
    assert np.corrcoef(cut.ravel(), full.ravel())[0, 1] > .999 and cut.max() == 255 and cut.min() == 0
    boxes = pd.DataFrame([dict(image_id="0-explicit", label="opacity", x1=30., y1=20., x2=40., y2=45.)])
    moved = boxes_to_crop(boxes, cache.crops)
    assert moved[["x1", "y1", "x2", "y2"]].iloc[0].tolist() == [14, 14, 24, 39]
    assert boxes_from_crop(moved, cache.crops)[["x1", "y1", "x2", "y2"]].iloc[0].tolist() == [30, 20, 40, 45]
    with pytest.raises(ValueError, match="holds another cache .*crops"): build_cache(images, tmp_path/"crop", None, policy="minmax", **QUICK)


def test_a_decoder_that_crashes_takes_only_its_worker(tmp_path, files, monkeypatch):
    "A decoding library that writes where it must not: its file is listed, all others are cached."
    (tmp_path/"imagecodecs.py").write_text("import ctypes\ndef jpegls_decode(data): ctypes.string_at(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    cached = build_cache(table(files), tmp_path/"c", 32, workers=2, progress=False)
    failures = pd.read_csv(tmp_path/"c/failures.csv").set_index("image_id").reason
    assert failures[["4-jpeg-ls", "11-jpeg-ls"]].tolist() == ["the decoder crashed its worker (SIGSEGV)"]*2
    assert {"0-explicit", "3-jpeg-lossless", "12-j2k", "14-png"} <= set(cached.image_id) and len(cached)+len(failures) == 15


# --- hostile files

def reason(path, **options):
    with pytest.raises(UnreadableImage) as e: read_radiograph(path, 32, **options)
    return str(e.value)


def test_links_out_of_the_folder_are_refused_unless_meant(tmp_path, files):
    inside = tmp_path/"data"
    inside.mkdir()
    (inside/"real.dcm").write_bytes(files[0].read_bytes())
    (inside/"link.dcm").symlink_to(files[1])
    (inside/"near.dcm").symlink_to(inside/"real.dcm")
    images = table(sorted(inside.iterdir()))
    build_cache(images, tmp_path/"a", 32, **QUICK)
    failures = pd.read_csv(tmp_path/"a/failures.csv")
    assert failures.image_id.tolist() == ["link"] and "a link leads out of" in failures.reason[0] and "follow_links=True" in failures.reason[0]
    assert len(build_cache(images, tmp_path/"b", 32, follow_links=True, **QUICK)) == 3
    (tmp_path/"elsewhere").symlink_to(inside) # a whole folder behind a link is how data sets are mounted
    assert len(build_cache(table([tmp_path/"elsewhere/real.dcm", tmp_path/"elsewhere/near.dcm"]), tmp_path/"c", 32, **QUICK)) == 2


def test_pipes_folders_and_empty_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path/"pipe.dcm")
    (tmp_path/"empty.dcm").touch()
    (tmp_path/"folder.dcm").mkdir()
    assert reason(tmp_path/"pipe.dcm") == "not a regular file" == reason(tmp_path/"folder.dcm")
    assert reason(tmp_path/"empty.dcm") == "the file is empty"


def test_hostile_dimensions_cost_nothing(tmp_path):
    image = phantom()
    for syntax in ("explicit", "deflated", "rle"):
        path = write_dicom(tmp_path/"a.dcm", image, syntax, 12, {"Rows": 65535, "Columns": 65535})
        assert "claims 65535 × 65535 pixels" in reason(path)
    j2k = bytearray(encode_frame(image, "j2k", 12))
    j2k[8:16] = struct.pack(">II", 65535, 65535)
    png = bytearray(cv2.imencode(".png", (image >> 4).astype(np.uint8))[1].tobytes())
    png[16:24] = struct.pack(">II", 65535, 65535)
    (tmp_path/"b.png").write_bytes(png)
    assert "claims 65535 × 65535 pixels" in reason(tmp_path/"b.png")
    assert "claims 65535 × 65535 pixels" in reason(write_dicom(tmp_path/"c.dcm", image, "j2k", 12, stream=bytes(j2k)))
    for syntax in ("jpeg", "jpeg-extended", "jpeg-lossless", "jpeg-ls", "htj2k"):
        pixels = (image >> 4).astype(np.uint8) if syntax == "jpeg" else image
        stream = bytearray(encode_frame(pixels, syntax, 8 if syntax == "jpeg" else 12))
        if syntax == "htj2k": stream[8:16] = struct.pack(">II", 65535, 65535)
        else:
            at = stream.index(struct.pack(">HH", *image.shape)) # of the frame header
            stream[at:at+4] = struct.pack(">HH", 65535, 65535)
        assert "claims 65535 × 65535 pixels" in reason(write_dicom(tmp_path/"d.dcm", pixels, syntax, 12, stream=bytes(stream))), syntax
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 << 20 # kilobytes


def test_lying_lengths_and_cut_files_are_refused(tmp_path):
    image = phantom()
    for syntax in ("explicit", "jpeg-lossless", "jpeg-ls", "j2k", "htj2k", "rle", "deflated", "jpeg-extended"):
        data = write_dicom(tmp_path/"a.dcm", image, syntax, 12).read_bytes()
        (tmp_path/"b.dcm").write_bytes(data[:len(data)*3//5])
        assert any(w in reason(tmp_path/"b.dcm") for w in ("cut off", "cut-off", "damaged")), syntax
    data = write_dicom(tmp_path/"a.dcm", image, "explicit", 12).read_bytes()
    at = data.index(b"\xe0\x7f\x10\0OW")
    (tmp_path/"b.dcm").write_bytes(data[:at+8]+struct.pack("<I", 0x7FFFFFF0)+data[at+12:])
    assert read_radiograph(tmp_path/"b.dcm", 32).any() # the length is too long, the pixels are all there
    (tmp_path/"b.dcm").write_bytes(data[:at+8]+struct.pack("<I", 100)+data[at+12:])
    assert "holds 100 bytes" in reason(tmp_path/"b.dcm")


def test_cut_streams_inside_whole_files_are_refused(tmp_path):
    image = phantom()
    for syntax in ("jpeg-lossless", "jpeg-extended", "jpeg-ls", "j2k", "htj2k"):
        stream = encode_frame(image, syntax, 12)
        path = write_dicom(tmp_path/"a.dcm", image, syntax, 12, stream=stream[:len(stream)//2])
        message = reason(path)
        assert "cut off" in message or "no decoder could read it" in message or "pydicom returned" in message, (syntax, message)


def test_truncated_pictures_are_refused(tmp_path):
    image = (phantom() >> 4).astype(np.uint8)
    for kind in ("png", "jpg"):
        data = cv2.imencode(f".{kind}", image)[1].tobytes()
        (tmp_path/f"a.{kind}").write_bytes(data[:len(data)//2])
        assert "cut off" in reason(tmp_path/f"a.{kind}")


def test_undefined_lengths_without_end_and_deep_nesting_are_refused(tmp_path):
    image = phantom()
    data = write_dicom(tmp_path/"a.dcm", image, "explicit", 12).read_bytes()
    at = data.index(b"\x28\0\x02\0US")
    open_sequence = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff"
    (tmp_path/"b.dcm").write_bytes(data[:at]+open_sequence+data[at:])
    assert "DICOM" in reason(tmp_path/"b.dcm")
    item = b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    (tmp_path/"c.dcm").write_bytes(data[:at]+(open_sequence+item)*1000+data[at:])
    assert "nested deeper than 16" in reason(tmp_path/"c.dcm")
    (tmp_path/"d.dcm").write_bytes(data[:at]+b"\x09\0\x01\0LO\0\0"*60_000+data[at:])
    assert "more than 50,000 elements" in reason(tmp_path/"d.dcm")


def test_deflate_bombs_are_bounded(tmp_path):
    import zlib
    data = write_dicom(tmp_path/"a.dcm", phantom(), "deflated", 12).read_bytes()
    meta = pydicom.filereader.read_file_meta_info(tmp_path/"a.dcm")
    start = 132+12+meta.FileMetaInformationGroupLength
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(24))+packer.flush()
    (tmp_path/"b.dcm").write_bytes(data[:start]+bomb)
    assert (tmp_path/"b.dcm").stat().st_size < 1 << 20
    assert "unpacks to more than" in reason(tmp_path/"b.dcm")


def test_absent_tags_have_one_sensible_reading_or_are_refused(tmp_path):
    image = phantom()
    path = write_dicom(tmp_path/"a.dcm", image, "explicit", 12)
    full = read_radiograph(path, 32)
    for tag, message in {"PixelRepresentation": None, "BitsStored": None, "PhotometricInterpretation": None, "SamplesPerPixel": None,
            "Rows": "0 × 96 pixels", "BitsAllocated": "expected 8 or 16, got 0", "PixelData": "without pixel data"}.items():
        ds = pydicom.dcmread(path)
        delattr(ds, tag)
        ds.save_as(tmp_path/"b.dcm")
        if message is None: np.testing.assert_array_equal(read_radiograph(tmp_path/"b.dcm", 32), full)
        else: assert message in reason(tmp_path/"b.dcm")


# --- mutations

def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    "One to three of the things that happen to files, or that somebody does to them."
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        n = max(len(out), 1)
        near = int(rng.integers(0, min(n, 1500))) if rng.random() < .4 else int(rng.integers(0, n)) # headers are where lies hurt
        match int(rng.choice(9, p=[.3, .12, .12, .04, .08, .1, .08, .12, .04])):
            case 0: out[near:near+1] = bytes([int(rng.integers(0, 256))])
            case 1: out[near:near+4] = struct.pack("<I", int(rng.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 65536, n])))
            case 2: out[near:near+2] = struct.pack("<H", int(rng.choice([0, 1, 0xFFFF, 0x8000, 0x7FFF, 255])))
            case 3: del out[near:]
            case 4: del out[near:near+int(rng.integers(1, 64))]
            case 5: out[near:near] = rng.bytes(int(rng.integers(1, 64)))
            case 6: out[near:near] = out[near:near+int(rng.integers(1, 400))]
            case 7: out[near:near+int(rng.integers(1, 64))] = bytes(int(rng.integers(1, 64)))
            case 8: out += out[near:]
    return bytes(out)


def seeds(folder: Path) -> list[bytes]:
    "A small file in every syntax, with LUTs, windows, sequences, frames and pictures among them."
    image, out = phantom(40, 56), []
    for s in SYNTAXES: out.append(write_dicom(folder/"seed.dcm", (image >> 4).astype(np.uint8) if s == "jpeg" else image, s, 8 if s == "jpeg" else 12,
        {"WindowCenter": [2000, 900], "WindowWidth": [3000, 500], "RescaleSlope": 1.5, "RescaleIntercept": -20, "PixelPaddingValue": 0}).read_bytes())
    lut = pydicom.Dataset()
    lut.LUTDescriptor, lut.LUTData = [256, 0, 16], list(range(0, 65536, 256))
    lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
    out.append(write_dicom(folder/"seed.dcm", image, "explicit", 12, {"VOILUTSequence": [lut], "ModalityLUTSequence": [lut]}).read_bytes())
    out.append(write_dicom(folder/"seed.dcm", np.stack([image]*3), "j2k", 12).read_bytes())
    for kind in (".png", ".jpg"): out.append(cv2.imencode(kind, (image >> 4).astype(np.uint8))[1].tobytes())
    return out


def test_mutated_files_are_cached_or_explained(tmp_path):
    "No crash or hang of the parent, every file accounted for, no worker over 2 GB."
    rng, originals, folder = np.random.default_rng(20261120), seeds(tmp_path), tmp_path/"files"
    folder.mkdir()
    for i in range(MUTATIONS): (folder/f"{i:05}.dcm").write_bytes(mutate(originals[i % len(originals)], rng))
    images = table(sorted(folder.iterdir()))
    policies = [Policy(), Policy("window", frame=0), Policy("minmax", voi=True, clahe=2., frame=0), Policy(detail="fast")]
    start, cached, failed = time.monotonic(), 0, []
    for k, policy in enumerate(policies):
        part, out = images[k::len(policies)], tmp_path/f"cache{k}"
        build_cache(part, out, [32, (20, 48)], workers=2, policy=policy, limits=Limits(seconds=10, memory=2 << 30), progress=False)
        info, failures = json.loads((out/"cache.json").read_text()), pd.read_csv(out/"failures.csv")
        assert info["n_cached"]+len(failures) == len(part) and failures.reason.str.len().min() > 5
        cache = open_cache(out)
        assert all(cache[i].shape == (32, 32) for i in list(cache)[:40])
        cached, failed = cached+info["n_cached"], failed+failures.reason.tolist()
    assert cached > MUTATIONS//10 and len(failed) > MUTATIONS//10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20, "a worker held more than 2 GB"
    crashed, late = (sum(word in r for r in failed) for word in ("crashed its worker", "took longer"))
    unforeseen = [r for r in failed if "not foreseen" in r]
    print(f"{MUTATIONS} mutated files in {time.monotonic()-start:.0f} s: {cached} cached, {len(failed)} refused, {crashed} crashed a worker, {late} too slow, {len(unforeseen)} unforeseen", *sorted(set(unforeseen))[:12], sep="\n")


def test_mapping_does_not_keep_files_open(tmp_path, files):
    view = map_file(files[0])
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(50): read_pixels(files[0])
    assert not before or len(os.listdir("/proc/self/fd")) <= before+2
    assert bytes(view[128:132]) == b"DICM"
