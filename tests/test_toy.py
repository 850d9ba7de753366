"""The toy competition: its files are real, its bytes repeatable, its quirks present, its pictures readable."""
import hashlib
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cxrkit.comps import siim_covid19, toy, toy_files
from cxrkit.comps.toy_anatomy import draw_anatomy, draw_view
from cxrkit.comps.toy_radiographs import draw_findings, draw_radiograph

SIZE = (96, 128)


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(root).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A toy of 24 patients with tiny pictures."
    return toy.write_toy(tmp_path_factory.mktemp("toy")/"toy", patients=24, size=SIZE)


@pytest.fixture(scope="module")
def tables(small):
    return toy.SPEC.read(small)


def plan(patients=48, split="train", seed=0):
    return toy.plan_images(toy.plan_studies(patients, split, seed), seed, (320, 640))


# files

@pytest.mark.parametrize("workers", [1, 2])
def test_same_seed_same_bytes(small, tmp_path, workers):
    again = toy.write_toy(tmp_path/"again", patients=24, size=SIZE, workers=workers)
    assert digests(again) == digests(small)


def test_another_seed_is_another_competition(small, tmp_path):
    other = toy.write_toy(tmp_path/"other", patients=24, seed=1, size=SIZE)
    assert not set(digests(other)) & {name for name in digests(small) if name.endswith(".dcm")}


def test_every_file_decodes_to_its_picture(small):
    rows = toy.plan_images(toy.plan_studies(18, "train", 0), 0, SIZE).to_dict("records")
    for row in rows[:8]:
        data = pydicom.dcmread(small/row["split"]/row["study_id"]/row["series_id"]/f"{row['image_id']}.dcm")
        picture, _ = toy.draw_image(row)
        assert np.array_equal(data.pixel_array, toy_files.to_counts(picture, row["bits"], row["inverted"]))
        assert (data.PatientID, int(data.BitsStored), data.Rows != data.Columns) == (row["patient_id"], row["bits"], True)


def test_formats_vary():
    images = plan()
    assert set(images.syntax) == set(toy_files.SYNTAXES)
    assert set(images.bits) == {12, 13, 14, 15, 16}
    assert images.inverted.nunique() == images.window.nunique() == 2
    assert (images.height != images.width).all() and images[["height", "width"]].stack().between(320, 640).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 16).flatmap(lambda bits: st.tuples(st.just(bits), arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2**bits-1)))))
def test_lossless_jpeg_is_lossless(case):
    bits, counts = case
    decoded = imagecodecs.jpegsof3_decode(toy_files.encode_lossless_jpeg(counts, bits))
    assert np.array_equal(np.reshape(decoded, counts.shape), counts)


def test_lossless_jpeg_reads_in_gdcm(tmp_path):
    gdcm = pytest.importorskip("gdcm")
    counts = np.random.default_rng(0).integers(0, 2**16, (40, 61)).astype(np.uint16)
    path = toy_files.write_dicom(tmp_path/"00ab.dcm", counts, 16, False, "jpeg_lossless_sv1", {"PatientID": "1"})
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    buffer = reader.GetImage().GetBuffer().encode("utf-8", errors="surrogateescape")
    assert np.array_equal(np.frombuffer(buffer, "<u2").reshape(counts.shape), counts)


# people

@pytest.mark.parametrize("patients", [32, 64, 150])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_each_class_has_several_patients(patients, seed):
    for split, n, least in (("train", patients-round(patients/4), 4), ("test", round(patients/4), 2)):
        images = plan(n, split, seed)
        assert set(images.label) == set(toy.SHARES)
        assert images.groupby("label").patient_id.nunique().min() >= least
        assert images.patient_id.nunique() == n


def test_shares_of_a_large_toy_are_those_of_siim():
    studies = toy.plan_studies(600, "train", 0)
    share = studies.label.value_counts(normalize=True)
    assert all(abs(share[label]-expected) < .03 for label, expected in toy.SHARES.items())
    assert 1.3 < len(plan(600))/600 < 2


def test_splits_share_no_patient_and_no_id(tables):
    images = tables.images
    train, test = (images[images.split == split] for split in ("train", "test"))
    for column in ("patient_id", "study_id", "image_id"): assert not set(train[column]) & set(test[column])


def test_quirks_are_there(small, tables):
    counts = siim_covid19.oddities(tables, pd.read_csv(small/"sample_submission.csv")).set_index("what")["count"]
    assert counts["boxes with a negative coordinate"] == 1
    assert counts["boxes beyond the right or lower edge"] == 0
    assert counts["… with boxes on several of them"] == counts["opacity images in negative studies"] == 0
    for what in ("… with boxes on exactly one of them", "none images in studies that are not negative", "patients with several studies"): assert counts[what] > 0, what


def test_hidden_truth_answers_the_sample(small):
    truth, sample = toy.read_solution(small), pd.read_csv(small/"sample_submission.csv")
    assert set(truth.images.image_id+"_image") | set(truth.images.study_id+"_study") == set(sample["id"])
    assert (truth.labels[truth.labels.level == "study"].groupby("unit_id").value.sum() == 1).all()
    boxed = set(truth.boxes.image_id)
    none = truth.labels[(truth.labels.level == "image")].set_index("unit_id").value
    assert boxed and all((value == 1) == (unit not in boxed) for unit, value in none.items())


# pictures

def halves(boxes, width):
    return set(np.sign(boxes[:, [0, 2]].mean(1)-width/2).tolist())


def test_position_follows_the_class():
    seen = {"typical": [], "indeterminate": []}
    for label in seen:
        for i in range(12):
            rng = np.random.default_rng((i, 3))
            _, boxes = draw_radiograph(draw_anatomy(rng), draw_view(rng, (120, 140)), draw_findings(rng, label))
            seen[label].append(len(halves(boxes, 140)))
    assert min(seen["typical"]) == 2
    assert set(seen["indeterminate"]) == {1, 2}


@pytest.mark.parametrize("label", ["typical", "indeterminate", "atypical"])
def test_opacities_brighten_their_boxes(label):
    for i in range(6):
        rng = np.random.default_rng((i, 5))
        patient, view, findings = draw_anatomy(rng), draw_view(rng, (160, 190)), draw_findings(rng, label)
        ill, boxes = draw_radiograph(patient, view, findings)
        well, none = draw_radiograph(patient, view)
        assert len(boxes) == len(findings) and not len(none)
        for x1, y1, x2, y2 in boxes.round().astype(int): assert (ill-well)[y1:y2, x1:x2].mean() > .03
        assert 0 <= ill.min() and ill.max() <= 1 and ill.std() > .1


def test_large_pictures_keep_their_boxes():
    rng = np.random.default_rng(4)
    row = plan().query("boxed and not tight").iloc[3].to_dict()
    for size in ((200, 260), (1000, 1300)):
        picture, boxes = toy.draw_image(row | dict(height=size[0], width=size[1]))
        assert picture.shape == size and (boxes[:, 2:] <= [size[1], size[0]]).all()


# planted mistakes

def test_a_kill_half_way_leaves_nothing_to_trust(tmp_path, monkeypatch):
    out, write = tmp_path/"toy", toy.write_image
    calls = []
    def fails(row, root):
        calls.append(row)
        if len(calls) > 3: raise KeyboardInterrupt
        return write(row, root)
    monkeypatch.setattr(toy, "write_image", fails)
    with pytest.raises(KeyboardInterrupt): toy.write_toy(out, patients=8, size=SIZE)
    assert not out.exists()
    monkeypatch.setattr(toy, "write_image", write)
    toy.write_toy(out, patients=8, size=SIZE)
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
    assert len(list(out.glob("*/*/*/*.dcm"))) == len(toy.SPEC.read(out).images)


def test_two_toys_do_not_mix(small, tmp_path):
    before = digests(small)
    with pytest.raises(FileExistsError, match="'patients': 24"): toy.write_toy(small, patients=25, size=SIZE)
    assert toy.write_toy(small, patients=24, size=SIZE) == small and digests(small) == before
    (tmp_path/"thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no toy"): toy.write_toy(tmp_path, patients=24)
    assert (tmp_path/"thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong, message", [(dict(patients=3), "patients: expected 8 or more, got 3"), (dict(seed=-1), "seed: expected 0 or more"),
                                            (dict(size=(500, 400)), "shortest < longest"), (dict(size=(10, 400)), "64 <=")])
def test_wrong_parameters(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message): toy.write_toy(tmp_path/"toy", **wrong)


def test_no_solution_in_a_real_competition(tmp_path):
    with pytest.raises(FileNotFoundError, match="keep it to themselves"): toy.read_solution(tmp_path)
