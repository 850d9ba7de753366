"""Reading radiographs: exact against pydicom, every transfer syntax, every tag that changes a grey."""
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from cxrkit.codecs import identify_stream
from cxrkit.dicom import Policy, UnreadableImage, boxes_from_crop, boxes_to_crop, crop_windows, read_radiograph
from cxrkit.dicomwrite import SYNTAXES, encode_frame, write_dicom
from cxrkit.photometry import GreyTags, grey_table, modality_values, over_patterns, stored_values, voi_values
from cxrkit.radiograph import read_pixels, read_radiographs, stored_image

REAL = Path(__file__).resolve().parents[2]/"shared/realdata/dicom"
REAL_FILES = sorted(REAL.glob("*.dcm"))
LOSSLESS = [s for s in SYNTAXES if s not in ("jpeg", "jpeg-extended", "jpeg-ls-near", "j2k-lossy", "htj2k-lossy")]
real = pytest.mark.skipif(not REAL_FILES, reason="the folder of real DICOM files is not beside the project")


def phantom(h=61, w=83, bits=12, signed=False, seed=0):
    "A smooth picture with noise that uses the whole range, wider than high, of odd sides."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    soft = .5+.45*np.sin(y/h*5+1)*np.cos(x/w*7)+rng.normal(0, .01, (h, w))
    top = 2**bits-1
    values = np.clip(soft*top, 0, top).round().astype(np.int64)
    values[0, 0], values[-1, -1] = 0, top
    size = 8 if bits <= 8 else 16
    return (values-2**(bits-1)).astype(f"i{size//8}") if signed else values.astype(f"u{size//8}")


def naive(path, size):
    "What everybody's loop does, with the modality LUT that most of them forget."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        image = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(np.float64)
    if ds.PhotometricInterpretation == "MONOCHROME1": image = image.max()-image
    image -= image.min()
    image = (image/max(image.max(), 1e-12)*255).astype(np.uint8)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


@real
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda p: p.stem)
def test_real_files_are_pixel_exact_and_within_one_grey_of_the_naive_loop(path):
    stored = stored_image(read_pixels(path))
    try: expected = pydicom.dcmread(path).pixel_array
    except Exception: pytest.skip(f"pydicom has no decoder for it here; ours gives {stored.shape}")
    if path.stem == "RG2_JPLY_fixed": # lossy 12-bit JPEG: decoders round their inverse DCT differently
        assert np.abs(stored-expected.astype(int)).max() <= 1
        return
    np.testing.assert_array_equal(stored, expected)
    for size in ((300, 400), (256, 256)):
        ours = read_radiograph(path, size, Policy("minmax", voi=True))
        assert np.abs(ours.astype(int)-naive(path, size)).max() <= 1


@real
def test_the_broken_lossless_file_is_read_as_pydicom_reads_it_or_refused():
    path = REAL/"JPEGLossless_1s_1f_i_16_16_bad.dcm"
    np.testing.assert_array_equal(stored_image(read_pixels(path)), pydicom.dcmread(path).pixel_array)


@real
@pytest.mark.parametrize("name", ["RG1_J2KI", "RG3_J2KI", "RG3_J2KR", "rsna2018_jpeg_baseline_8bit"])
def test_reduced_decoding_of_real_files_is_close(name):
    full, default, fast = (read_radiograph(REAL/f"{name}.dcm", 256, Policy(detail=d)).astype(float) for d in ("full", "default", "fast"))
    psnr = lambda a: 10*np.log10(255**2/max(((a-full)**2).mean(), 1e-9))
    assert psnr(default) >= 49 and psnr(fast) >= 40
    assert abs(default.mean()-full.mean()) < .5 and abs(fast.mean()-full.mean()) < .5


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_lossless_syntaxes_return_what_was_stored(tmp_path, syntax, bits, signed):
    image = phantom(bits=bits, signed=signed)
    path = write_dicom(tmp_path/"a.dcm", image, syntax, bits)
    np.testing.assert_array_equal(stored_image(read_pixels(path)), image)
    if syntax.startswith("jpeg") and signed: return # pydicom leaves the sign of these to its plug-ins, which disagree
    try: theirs = pydicom.dcmread(path).pixel_array
    except Exception: return # no plug-in for it, or one that refuses these bits
    np.testing.assert_array_equal(stored_image(read_pixels(path)), theirs)


@pytest.mark.parametrize("syntax, bits, worst", [("jpeg", 8, 12), ("jpeg-extended", 12, 20), ("jpeg-ls-near", 12, 2), ("j2k-lossy", 12, 40), ("htj2k-lossy", 12, 40)])
def test_lossy_syntaxes_are_near(tmp_path, syntax, bits, worst):
    image = phantom(bits=bits)
    path = write_dicom(tmp_path/"a.dcm", image, syntax, bits)
    stored = stored_image(read_pixels(path))
    assert np.abs(stored-image.astype(int)).max() <= worst
    try: theirs = pydicom.dcmread(path).pixel_array
    except Exception: return
    assert np.abs(stored-theirs.astype(int)).max() <= (1 if syntax.startswith("jpeg") and "ls" not in syntax else 0)


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_lossless_decoder_equals_libjpeg(seed):
    "Random sizes, precisions and roughness; and whatever a damaged stream does, it does not take the process along."
    import imagecodecs
    from cxrkit.losslessjpeg import decode_lossless
    rng = np.random.default_rng(seed)
    bits, h, w = int(rng.integers(2, 17)), *rng.integers(1, 60, 2)
    image = np.cumsum(rng.normal(0, 2.**rng.integers(0, bits), (h, w)), 1).astype(np.int64) % 2**bits
    image = image.astype(np.uint8 if bits <= 8 else np.uint16)
    stream = imagecodecs.jpeg8_encode(image, lossless=True, predictor=1, bitspersample=bits)
    np.testing.assert_array_equal(decode_lossless(memoryview(stream)), image)
    np.testing.assert_array_equal(decode_lossless(memoryview(stream)), imagecodecs.jpeg8_decode(stream))
    damaged = bytearray(stream)
    for at in rng.integers(0, len(damaged), 3): damaged[at] = rng.integers(0, 256)
    out = decode_lossless(memoryview(bytes(damaged)))
    assert out is None or out is False or out.dtype.kind == "u"


def test_unused_high_bits_are_masked_and_signs_extended(tmp_path):
    image = phantom(bits=12, signed=True)
    dirty = (image.view(np.uint16) & 0x0FFF) | (np.random.default_rng(1).integers(0, 16, image.shape).astype(np.uint16) << 12)
    path = write_dicom(tmp_path/"a.dcm", dirty.view(np.int16), "explicit", 12)
    np.testing.assert_array_equal(stored_image(read_pixels(path)), image)
    clean = write_dicom(tmp_path/"b.dcm", image, "explicit", 12)
    for policy in ("minmax", "percentile"):
        np.testing.assert_array_equal(read_radiograph(path, 32, policy), read_radiograph(clean, 32, policy))


@given(bits=st.integers(2, 16), signed=st.booleans(), slope=st.floats(-4, 4).filter(lambda s: abs(s) > .01), intercept=st.floats(-2000, 2000),
    center=st.floats(-3000, 5000), width=st.floats(1, 6000), function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]))
@settings(max_examples=60, deadline=None)
def test_rescale_and_windows_equal_pydicom(bits, signed, slope, intercept, center, width, function):
    slope, intercept, center, width = (float(f"{v:.6g}") for v in (slope, intercept, center, width))
    width = max(width, 1.)
    tags = GreyTags(bits, signed, slope=slope, intercept=intercept, windows=((center, width),), voi_function=function)
    ds = Dataset()
    ds.BitsStored, ds.PixelRepresentation, ds.PhotometricInterpretation = bits, int(signed), "MONOCHROME2"
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = slope, intercept, center, width, function
    stored = stored_values(tags)
    values = apply_modality_lut(stored, ds)
    np.testing.assert_allclose(modality_values(tags), values, rtol=1e-12, atol=1e-9)
    low, high = (-(2**(bits-1)), 2**(bits-1)-1) if signed else (0, 2**bits-1)
    low, high = low*slope+intercept, high*slope+intercept
    theirs = (apply_voi_lut(values, ds)-low)/(high-low)
    np.testing.assert_allclose(voi_values(modality_values(tags), tags), theirs, atol=1e-9)


@given(first=st.integers(-50, 300), n=st.integers(2, 400), bits=st.sampled_from([8, 10, 12, 16]), signed=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_luts_equal_pydicom(first, n, bits, signed, seed):
    first = first if signed else abs(first)
    entries = np.random.default_rng(seed).integers(0, 2**bits, n).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [n, first, bits])
    item.add_new("LUTData", "US", entries.tolist())
    ds = Dataset()
    ds.BitsStored, ds.PixelRepresentation = 10, int(signed)
    tags, stored = GreyTags(10, signed), stored_values(GreyTags(10, signed))
    ds.VOILUTSequence = [item]
    voi = GreyTags(10, signed, voi_luts=((first, bits, entries),))
    theirs = apply_voi_lut(stored, ds)
    expected = entries[np.clip(stored-first, 0, n-1)] # pydicom 3.0 wraps differences beyond the entry's type
    if bits > 8: np.testing.assert_array_equal(theirs, expected)
    np.testing.assert_allclose(voi_values(modality_values(tags), voi), expected/(2**bits-1))
    if bits not in (8, 16): return # pydicom reads a modality LUT of these only
    ds.ModalityLUTSequence = [item]
    np.testing.assert_array_equal(modality_values(GreyTags(10, signed, modality_lut=(first, bits, entries))), apply_modality_lut(stored, ds))


@given(bits=st.integers(4, 16), signed=st.booleans(), scaling=st.sampled_from(["minmax", "percentile", "window"]), voi=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_two_monochrome_readings_are_inverses(bits, signed, scaling, voi, seed):
    raw = phantom(bits=bits, seed=seed).astype(np.uint16)
    tables = [grey_table(raw, GreyTags(bits, signed, inverted, windows=((100., 300.),)), Policy(scaling, voi=voi)) for inverted in (False, True)]
    np.testing.assert_allclose(tables[0]+tables[1], 255, atol=1e-4+1e-6*np.abs(tables[0]).max()) # beyond black and white they are large, and clipped after averaging


@given(bits=st.integers(1, 16), signed=st.booleans(), wide=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_quick_ways_equal_those_of_the_table(bits, signed, wide, seed):
    "Unused bits set at random, sizes that no cell divides."
    from cxrkit.area import extremes, grid_means, plain_extremes
    from cxrkit.photometry import Sampling, apply_table, make_greys, plain_code, stored_extremes, stored_range
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 65536 if wide else 256, rng.integers(1, 300, 2)).astype(np.uint16 if wide else np.uint8)
    tags = GreyTags(bits, signed)
    table = over_patterns(stored_values(tags), raw)
    inside = np.ones(len(table), bool)
    np.testing.assert_allclose(stored_range(raw, tags, Policy(), stored_values(tags), Sampling()), np.percentile(grid_means(raw, table, inside), (.5, 99.5)), rtol=1e-5, atol=1e-3)
    for scaling in ("minmax", "percentile"):
        sizes = [None, *{tuple(int(n) for n in np.maximum(np.array(raw.shape)//k, 1)) for k in (3, 2)}, (301, 5)]
        for image, size in zip(make_greys(raw, tags, Policy(scaling), sizes), sizes):
            slow = apply_table(raw, grey_table(raw, tags, Policy(scaling)), size)
            assert image.shape == slow.shape and np.abs(image.astype(int)-slow).max() <= 1
    expected = table[raw].min(), table[raw].max()
    assert plain_extremes(raw, *plain_code(tags)) == expected == extremes(raw, table, inside) == stored_extremes(raw, tags, stored_values(tags))


def test_several_windows_and_luts_are_chosen_by_number(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(), "explicit", 12, {"WindowCenter": [2000, 500], "WindowWidth": [4000, 200]})
    first, second = (read_radiograph(path, policy=Policy("window", index=i)) for i in (0, 1))
    assert (first != second).mean() > .5
    with pytest.raises(UnreadableImage, match=r"expected a number below 2, got 2; the file has 0 VOI LUT\(s\) and 2 window"): read_radiograph(path, policy=Policy("window", index=2))


def test_window_without_a_window_says_that_it_fell_back(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(), "explicit", 12)
    images, report = read_radiographs(path, [None], Policy("window"))
    np.testing.assert_array_equal(images[0], read_radiograph(path, policy="minmax"))
    assert report.notes == ("no VOI LUT or window in the file: minmax was used",)


@pytest.mark.parametrize("scaling", ["minmax", "percentile"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_scale(tmp_path, scaling, photometric):
    image = phantom(120, 160)//2+1000
    padded = image.copy()
    padded[:, :60] = 4095
    tags = {"PhotometricInterpretation": photometric}
    with_tag = read_radiograph(write_dicom(tmp_path/"a.dcm", padded, "explicit", 12, tags | {"PixelPaddingValue": 4095}), policy=scaling)
    alone = read_radiograph(write_dicom(tmp_path/"b.dcm", np.ascontiguousarray(image[:, 60:]), "explicit", 12, tags), policy=scaling)
    assert (with_tag[:, :60] == 0).all()
    assert np.abs(with_tag[:, 60:].astype(int)-alone).max() <= (0 if scaling == "minmax" else 8)
    ranged = read_radiograph(write_dicom(tmp_path/"c.dcm", padded, "j2k", 12, tags | {"PixelPaddingValue": 4090, "PixelPaddingRangeLimit": 4095}), policy=scaling)
    np.testing.assert_array_equal(ranged, with_tag)


def test_constant_image_is_black_not_an_error(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", np.full((20, 30), 77, np.uint16), "explicit", 12)
    for policy in ("minmax", "percentile"): assert not read_radiograph(path, 8, policy).any()


def test_nonsense_rescale_is_refused(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(), "explicit", 12, {"RescaleSlope": "1e308", "RescaleIntercept": "1e308"})
    with pytest.raises(UnreadableImage, match="expected a finite slope"): read_radiograph(path)


@pytest.mark.parametrize("mode", ["grey", "grey alpha", "rgb", "rgba", "palette", "grey 16", "rgb 16", "rgba 16", "jpg", "jpg rgb"])
def test_pictures_of_every_kind_become_the_same_grey(tmp_path, mode):
    from PIL import Image
    grey = phantom(bits=8)
    path = tmp_path/("a.jpg" if "jpg" in mode else "a.png")
    if "16" in mode:
        wide = grey.astype(np.uint16)*257
        cv2.imwrite(str(path), wide if mode == "grey 16" else cv2.merge([wide]*3+[np.full_like(wide, 65535)]*(mode == "rgba 16")))
    else:
        kind = {"grey": "L", "grey alpha": "LA", "rgb": "RGB", "rgba": "RGBA", "palette": "P", "jpg": "L", "jpg rgb": "RGB"}[mode]
        Image.fromarray(grey).convert(kind).save(path, **({"quality": 100, "subsampling": 0} if "jpg" in mode else {}))
    difference = np.abs(read_radiograph(path, policy="minmax").astype(int)-grey)
    assert difference.max() <= (3 if "jpg" in mode else 0)


def test_real_colour_becomes_luma(tmp_path):
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[..., 1], colour[0, 0] = 200, (255, 255, 255)
    cv2.imwrite(str(tmp_path/"a.png"), colour[..., ::-1])
    assert read_pixels(tmp_path/"a.png").raw[1, 1] == round(.587*200)


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_dicom_becomes_luma(tmp_path, planar):
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    path = write_dicom(tmp_path/"a.dcm", rgb[..., 0].copy(), "explicit", 8)
    ds = pydicom.dcmread(path)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", planar
    ds.PixelData = (rgb if not planar else np.moveaxis(rgb, -1, 0)).tobytes()
    ds.save_as(path)
    expected = np.rint(rgb @ [.299, .587, .114])
    np.testing.assert_array_equal(read_pixels(path).raw, expected)


def test_one_frame_of_several_when_asked(tmp_path):
    frames = np.stack([phantom(seed=i) for i in range(3)])
    for syntax in ("explicit", "rle", "j2k", "jpeg-lossless"):
        path = write_dicom(tmp_path/f"{syntax}.dcm", frames, syntax, 12)
        with pytest.raises(UnreadableImage, match=r"3 frames; expected one, choose with Policy\(frame=0\)"): read_radiograph(path)
        for i in range(3): np.testing.assert_array_equal(stored_image(read_pixels(path, policy=Policy(frame=i))), frames[i])
        with pytest.raises(UnreadableImage, match="expected below 3, got 3"): read_radiograph(path, policy=Policy(frame=3))


def test_fragments_offset_tables_and_delimiters(tmp_path):
    "One frame in many fragments, with and without a table of offsets, with the final delimiter missing."
    from pydicom.encaps import encapsulate
    image = phantom()
    stream = encode_frame(image, "j2k", 12)
    path = write_dicom(tmp_path/"a.dcm", image, "j2k", 12)
    for fragments, table in ((1, True), (5, True), (5, False)):
        ds = pydicom.dcmread(path)
        ds.PixelData = encapsulate([stream], fragments_per_frame=fragments, has_bot=table)
        ds.save_as(tmp_path/"b.dcm")
        np.testing.assert_array_equal(stored_image(read_pixels(tmp_path/"b.dcm")), image)
    data = (tmp_path/"b.dcm").read_bytes()
    assert data.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    (tmp_path/"c.dcm").write_bytes(data[:-8])
    np.testing.assert_array_equal(stored_image(read_pixels(tmp_path/"c.dcm")), image)


def test_wrong_transfer_syntax_is_read_by_its_magic_and_mentioned(tmp_path):
    image = phantom()
    for claimed in ("jpeg-ls", "rle", "jpeg-lossless", "j2k"):
        for true in ("j2k", "jpeg-ls", "jpeg-lossless"):
            path = write_dicom(tmp_path/"a.dcm", image, claimed, 12, stream=encode_frame(image, true, 12))
            p = read_pixels(path)
            np.testing.assert_array_equal(stored_image(p), image)
            assert bool(p.notes) == (claimed != true), (claimed, true)


def test_uncompressed_elements_decide_whether_they_name_their_type(tmp_path):
    "A header that says implicit over explicit elements, and the reverse."
    image = phantom()
    for true, claimed in (("explicit", "implicit"), ("implicit", "explicit")):
        data = write_dicom(tmp_path/"a.dcm", image, true, 12).read_bytes()
        lie = data.replace(SYNTAXES[true].encode()+b"\0"*(len(SYNTAXES[true]) % 2), SYNTAXES[claimed].encode().ljust(len(SYNTAXES[true])+len(SYNTAXES[true]) % 2, b"\0"), 1)
        if len(SYNTAXES[claimed]) > len(SYNTAXES[true])+1: continue
        (tmp_path/"b.dcm").write_bytes(lie)
        p = read_pixels(tmp_path/"b.dcm")
        np.testing.assert_array_equal(stored_image(p), image)
        assert "its elements" in p.notes[0]


@pytest.mark.parametrize("syntax", ["j2k", "jpeg-lossless", "rle"])
@pytest.mark.parametrize("claimed", ["explicit", "implicit"])
def test_compressed_pixels_in_a_file_that_says_uncompressed(tmp_path, syntax, claimed):
    "The pixel data's own magic decides, in items as in one plain value, and says so."
    image = phantom()
    data = write_dicom(tmp_path/"a.dcm", image, syntax, 12).read_bytes()
    uid = SYNTAXES[syntax].encode()
    lie = data.replace(uid+b"\0"*(len(uid) % 2), SYNTAXES[claimed].encode().ljust(len(uid)+len(uid) % 2, b"\0"), 1)
    (tmp_path/"b.dcm").write_bytes(lie)
    p = read_pixels(tmp_path/"b.dcm")
    np.testing.assert_array_equal(stored_image(p), image)
    assert any(f"the header says {claimed}, the pixel data is {syntax}" in n for n in p.notes)


def test_a_stream_without_items_is_read_by_its_magic(tmp_path):
    image = phantom()
    path = write_dicom(tmp_path/"a.dcm", image, "explicit", 12)
    ds, stream = pydicom.dcmread(path), encode_frame(image, "j2k", 12)
    ds.PixelData = stream+b"\0"*(len(stream) % 2)
    ds.save_as(path)
    p = read_pixels(path)
    np.testing.assert_array_equal(stored_image(p), image)
    assert p.notes == ("the header says explicit, the pixel data is j2k",)


def test_nested_sequences_and_private_elements_are_skipped(tmp_path):
    image = phantom()
    path = write_dicom(tmp_path/"a.dcm", image, "explicit", 12)
    for undefined in (False, True):
        ds = pydicom.dcmread(path)
        inner = Dataset()
        inner.Rows, inner.PixelData = 3, b"\0"*64 # an icon with pixel data of its own
        inner["PixelData"].VR = "OW"
        outer = Dataset()
        outer.IconImageSequence = [inner, inner]
        ds.IconImageSequence = [inner]
        ds.RequestAttributesSequence = [outer]
        ds.add_new(0x00091010, "UN", b"\1\2\3\4")
        for name in ("IconImageSequence", "RequestAttributesSequence"): ds[name].is_undefined_length = undefined
        ds.save_as(tmp_path/"b.dcm")
        np.testing.assert_array_equal(stored_image(read_pixels(tmp_path/"b.dcm")), image)


def test_fallback_to_pydicom_is_used_and_reported(tmp_path, monkeypatch):
    import cxrkit.codecs as codecs
    def missing(function, *args, **options): raise codecs.CodecFailed(f"imagecodecs.{function}: ModuleNotFoundError")
    image = phantom()
    path = write_dicom(tmp_path/"a.dcm", image, "jpeg-lossless-14", 12)
    monkeypatch.setattr(codecs, "_imagecodecs", missing)
    p = read_pixels(path)
    np.testing.assert_array_equal(stored_image(p), image)
    assert p.decoder == "pydicom" and "imagecodecs.jpeg8_decode" in p.notes[-1]
    broken = write_dicom(tmp_path/"b.dcm", image, "htj2k", 12)
    try: pydicom.dcmread(broken).pixel_array
    except Exception:
        with pytest.raises(UnreadableImage, match="no decoder could read it"): read_pixels(broken)


@pytest.mark.parametrize("syntax", [s for s in SYNTAXES if s not in ("implicit", "explicit", "big-endian", "deflated")])
def test_every_syntax_without_its_fast_library_is_decoded_by_pydicom_or_refused(tmp_path, monkeypatch, syntax):
    "No imagecodecs, no OpenCV for JPEG, no OpenJPEG: the same pixels from pydicom and its plug-ins, or a reason; and the report names who decoded."
    import cxrkit.codecs as codecs
    import cxrkit.losslessjpeg as lossless
    def missing(*args, **options): raise codecs.CodecFailed("no fast library")
    image = phantom(300, 400, bits=8 if syntax == "jpeg" else 12)
    path = write_dicom(tmp_path/"a.dcm", image, syntax, 8 if syntax == "jpeg" else 12)
    fast = read_pixels(path)
    for name in ("_imagecodecs", "decode_jpeg8", "decode_openjpeg"): monkeypatch.setattr(codecs, name, missing)
    monkeypatch.setattr(codecs, "openjpeg", lambda: None)
    monkeypatch.setattr(lossless, "decode_lossless", lambda data: None)
    try: p = read_pixels(path)
    except UnreadableImage as e:
        assert "no decoder could read it: no fast library; pydicom: " in str(e) and syntax in ("htj2k", "htj2k-lossy", "jpeg-extended")
        return
    assert p.decoder == "pydicom" and "pydicom decoded it" in p.notes[-1] and fast.decoder != "pydicom"
    np.testing.assert_array_equal(stored_image(p), stored_image(fast))
    assert read_radiographs(path, [(32, 32)], Policy(detail="fast"))[1].reduced == 1


@pytest.mark.parametrize("scaling", ["minmax", "percentile", "window"])
def test_the_two_monochrome_files_are_inverses(tmp_path, scaling):
    image, tags = phantom(120, 160), {"WindowCenter": 2000, "WindowWidth": 3000}
    one, two = (read_radiograph(write_dicom(tmp_path/f"{n}.dcm", image, "jpeg-lossless", 12, tags | {"PhotometricInterpretation": f"MONOCHROME{n}"}), (50, 70), scaling) for n in (1, 2))
    assert np.abs(one.astype(int)+two-255).max() <= 1 and one.std() > 20


@given(h=st.integers(2, 90), w=st.integers(2, 90), th=st.integers(1, 120), tw=st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_resize_agrees_with_opencv_for_every_size(tmp_path_factory, h, w, th, tw):
    from cxrkit.photometry import apply_table
    raw = np.random.default_rng(h*w).integers(0, 256, (h, w)).astype(np.uint8)
    table = np.arange(256, dtype=np.float32)
    ours = apply_table(raw, table, (th, tw))
    assert ours.shape == (th, tw) and ours.dtype == np.uint8
    if th <= h and tw <= w: assert np.abs(ours-cv2.resize(raw.astype(np.float32), (tw, th), interpolation=cv2.INTER_AREA)).max() <= .51
    elif th >= h and tw >= w: assert np.abs(ours.astype(int)-cv2.resize(raw, (tw, th), interpolation=cv2.INTER_LINEAR)).max() <= 1


def test_reduced_decoding_happens_and_keeps_the_greys(tmp_path):
    image = cv2.GaussianBlur(np.random.default_rng(0).normal(2000, 900, (1100, 1500)), (0, 0), 6)
    image = np.clip((image-2000)*6+2000, 0, 4095).astype(np.uint16)
    for syntax in ("j2k", "htj2k"):
        path = write_dicom(tmp_path/"a.dcm", image, syntax, 12)
        outs = {d: read_radiographs(path, [(260, 260)], Policy(detail=d)) for d in ("full", "default", "fast")}
        assert [r.reduced for _, r in outs.values()] == [1, 2, 4]
        full = outs["full"][0][0].astype(float)
        for detail, least in (("default", 49), ("fast", 40)):
            error = outs[detail][0][0]-full
            assert 10*np.log10(255**2/(error**2).mean()) >= least, (syntax, detail)
            assert abs(error.mean()) < .3
        assert read_radiographs(path, [(260, 260)], Policy("minmax"))[1].reduced == 1 # extremes are only known at full size
        assert read_radiographs(path, [None], Policy(detail="fast"))[1].reduced == 1


def test_identify_needs_no_more_than_the_first_bytes():
    image = phantom()
    for s in ("jpeg-extended", "jpeg-lossless", "jpeg-ls", "j2k", "htj2k"):
        stream = identify_stream(memoryview(encode_frame(image, s, 12)))
        assert (stream.height, stream.width) == image.shape and stream.kind == s


def test_over_patterns_repeats_the_bits_that_count():
    table = over_patterns(np.arange(16), np.zeros((1, 1), np.uint8))
    assert len(table) == 256 and table[0xF3] == 3


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_boxes_go_into_crops_and_back(seed):
    import pandas as pd
    rng = np.random.default_rng(seed)
    images = pd.DataFrame(dict(image_id=["a", "b"], height=[300, 500], width=[400, 250]))
    lungs = pd.DataFrame([dict(image_id="a", x1=50, y1=40, x2=350, y2=260), dict(image_id="b", x1=10, y1=-5, x2=240, y2=480)])
    crops = crop_windows(lungs, images, rng.uniform(0, .4))
    assert (crops[["x1", "y1"]] >= 0).all(None) and (crops.x2 <= [400, 250]).all() and (crops.y2 <= [300, 500]).all()
    low = np.stack([rng.uniform(60, 150, 8), rng.uniform(50, 120, 8)], 1)
    high = low+rng.uniform(1, 80, (8, 2))
    boxes = pd.DataFrame(np.hstack([low, high]).astype(np.float32), columns=["x1", "y1", "x2", "y2"]).assign(image_id=rng.choice(["a", "b"], 8), label="opacity")
    back = boxes_from_crop(boxes_to_crop(boxes, crops), crops)
    np.testing.assert_allclose(back[["x1", "y1", "x2", "y2"]], boxes[["x1", "y1", "x2", "y2"]], atol=1e-4)
    outside = boxes.assign(x1=-50., x2=-20.)
    assert boxes_to_crop(outside, crops).empty and boxes_to_crop(boxes[:0], crops).empty


def test_oblong_pixels_are_kept_and_mentioned(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(), "j2k", 12, {"PixelSpacing": [.2, .1]})
    images, report = read_radiographs(path, [None], Policy())
    assert images[0].shape == (61, 83) and report.notes == ("pixels are 2 times as high as wide; kept as stored",)


def test_palettes_and_wide_pixels_are_refused_by_name(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(), "explicit", 12, {"PhotometricInterpretation": "PALETTE COLOR"})
    with pytest.raises(UnreadableImage, match="expected MONOCHROME1 or MONOCHROME2 .* got PALETTE COLOR"): read_radiograph(path)
    path = write_dicom(tmp_path/"b.dcm", phantom(), "explicit", 12, {"BitsAllocated": 32})
    with pytest.raises(UnreadableImage, match="BitsAllocated: expected 8 or 16, got 32"): read_radiograph(path)


def test_clahe_is_opencvs(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", phantom(), "explicit", 12)
    plain = read_radiograph(path, 64)
    np.testing.assert_array_equal(read_radiograph(path, 64, Policy(clahe=3.)), cv2.createCLAHE(3., (8, 8)).apply(plain))


@pytest.mark.parametrize("bad", [dict(scaling="min-max"), dict(low=99., high=1.), dict(clahe=-1.), dict(detail="draft")])
def test_policies_without_a_meaning_are_refused(bad):
    with pytest.raises(ValueError, match="expected"): Policy(**bad)
