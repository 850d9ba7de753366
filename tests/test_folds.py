"Folds: properties that hold for any population, planted crossings, and the real tables."
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.comps import nih_rsna, siim_covid19
from cxrkit.folds import FoldLeak, audit_folds, fold_shares, group_images, keep_images, make_folds, near_duplicates, oversample, perceptual_hash, split_fold
from cxrkit.tables import TableError

CLASSES = ("negative", "typical", "indeterminate", "atypical")


def tables_of(studies, true=None):
    "Images and labels from (study, patient or None, number of images) triples."
    images = [(f"{s}-{k}", s, p) for s, p, n in studies for k in range(n)]
    images = pd.DataFrame(images, columns=["image_id", "study_id", "patient_id"]).assign(path="x.dcm", height=64, width=48, split="train")
    true = true or {s: CLASSES[k % 4] for k, (s, _, _) in enumerate(studies)}
    labels = [("study", s, c, float(c == true[s])) for s, _, _ in studies for c in CLASSES]
    labels += [("image", i, "none", float(true[s] == "negative")) for i, s in zip(images.image_id, images.study_id)]
    return images, pd.DataFrame(labels, columns=["level", "unit_id", "label", "value"])


population = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 40)), st.integers(1, 4)), min_size=12, max_size=80).map(
    lambda rows: [(f"s{k}", None if p is None else f"p{p}", n) for k, (p, n) in enumerate(rows)])


@settings(max_examples=10, deadline=None)
@given(population, st.integers(2, 4), st.integers(0, 2**32-1))
def test_nothing_crosses_whatever_the_population(studies, n_folds, seed):
    images, labels = tables_of(studies)
    if len(set(group_images(images))) < n_folds: return
    folds = make_folds(images, labels, n_folds, seed)
    assert sorted(folds.image_id) == sorted(images.image_id) and set(folds.fold) == set(range(n_folds))
    joined = folds.drop(columns="patient_id").merge(images, on="image_id")
    assert joined.groupby("study_id").fold.nunique().max() == 1
    assert (joined.dropna(subset="patient_id").groupby("patient_id").fold.nunique() == 1).all()
    again = make_folds(images.sample(frac=1, random_state=1), labels.sample(frac=1, random_state=2), n_folds, seed)
    pd.testing.assert_frame_equal(folds, again)
    pd.testing.assert_frame_equal(audit_folds(folds, images), audit_folds(folds.sample(frac=1, random_state=3), images.iloc[::-1]))


@settings(max_examples=10, deadline=None)
@given(population, st.data())
def test_every_planted_crossing_is_refused(studies, data):
    images, labels = tables_of(studies+[("sx", "px", 2), ("sy", "px", 1)])
    folds = make_folds(images, labels, 3)
    several = images.groupby(images.patient_id.fillna(images.study_id)).filter(lambda g: len(g) > 1)
    moved = data.draw(st.sampled_from(sorted(several.image_id)))
    planted = folds.assign(fold=folds.fold.where(folds.image_id != moved, (folds.fold+1) % 3))
    with pytest.raises(FoldLeak, match="(patients|studies) in several folds, such as"): audit_folds(planted, images)


def test_empty_patient_id_is_not_a_patient():
    images, labels = tables_of([(f"s{k}", "", 1) for k in range(20)])
    folds = make_folds(images, labels, 5)
    assert folds.fold.value_counts().eq(4).all() and set(folds.patient_id) == set(images.study_id)


def test_half_known_patients_hold_together():
    images, labels = tables_of([("s0", "p0", 2), ("s1", None, 2), ("s2", "p0", 1), *((f"t{k}", None, 1) for k in range(9))])
    fold = make_folds(images, labels, 3).set_index("image_id").fold
    assert fold["s0-0"] == fold["s0-1"] == fold["s2-0"] and fold["s1-0"] == fold["s1-1"]


def test_pairs_hold_together_through_others():
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    pairs = pd.DataFrame({"image_id_a": ["s0-0", "s1-0"], "image_id_b": ["s1-0", "s2-0"]})
    for seed in range(5):
        folds = make_folds(images, labels, 4, seed, pairs)
        assert folds.set_index("image_id").fold[["s0-0", "s1-0", "s2-0"]].nunique() == 1
    audit_folds(folds, images, pairs)
    apart = folds.assign(fold=np.where(folds.image_id == "s0-0", (folds.fold+1) % 4, folds.fold))
    audit_folds(apart, images)
    with pytest.raises(FoldLeak, match="1 near-duplicates in several folds, such as s0-0~s1-0"): audit_folds(apart, images, pairs)
    with pytest.raises(ValueError, match="pairs: 1 image.s. are not in images, such as nobody"): make_folds(images, labels, 4, 0, pairs.replace("s2-0", "nobody"))
    with pytest.raises(ValueError, match="pairs: expected columns image_id_a, image_id_b"): make_folds(images, labels, 4, 0, pairs.set_axis(["a", "b"], axis=1))


def test_pairs_with_test_images_do_no_harm():
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    images.loc[11, "split"] = "test"
    folds = make_folds(images, labels, 3, pairs=pd.DataFrame({"image_id_a": ["s0-0"], "image_id_b": ["s11-0"]}))
    assert "s11-0" not in set(folds.image_id)


def test_one_enormous_patient():
    studies = [(f"b{k}", "big", 1) for k in range(40)]+[(f"s{k}", f"p{k}", 1) for k in range(60)]
    images, labels = tables_of(studies)
    sizes = make_folds(images, labels, 5).fold.value_counts()
    assert sizes.max() == 40 and sizes.nsmallest(4).between(14, 16).all()


@pytest.mark.parametrize("n_folds", [-1, 0, 1, 13])
def test_number_of_folds(n_folds):
    images, labels = tables_of([(f"s{k}", f"p{k}", 2) for k in range(12)])
    with pytest.raises(ValueError, match=rf"n_folds: expected 2 to 12 \(there are 12 groups of patients\), got {n_folds}"): make_folds(images, labels, n_folds)


def test_input_that_cannot_be_split():
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    for change, message in [({"study_id": None}, "image without study: s0-0, s1-0, s2-0 …"), ({"study_id": ""}, "image without study"), ({"split": "test"}, "no row has split 'train'"),
                            ({"image_id": "one"}, "1 image id.s. appear more than once .12 rows for 1 images., such as one"), ({"image_id": range(12)}, "images.image_id: expected text, got int")]:
        with pytest.raises(ValueError, match=message): make_folds(images.assign(**change), labels)
    for value in (2, -1, .5):
        with pytest.raises(TableError, match="value is 0, 1 or NaN"): make_folds(images, labels.assign(value=value))
    with pytest.raises(ValueError, match="labels: level 'breast' needs a column breast_id in images"): make_folds(images, labels.assign(level="breast"))
    assert len(make_folds(images, labels.assign(value=np.nan))) == len(make_folds(images, labels.head(0))) == 12 # nothing annotated: still folds


def test_labels_of_other_units_are_ignored():
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    more = pd.concat([labels, labels.assign(unit_id="of-a-test-"+labels.unit_id)])
    pd.testing.assert_frame_equal(make_folds(images, labels, 3), make_folds(images, more, 3))


AUDIT = { # mistake → change to (folds, images), message
    "test image": (lambda f, i: (f, i.assign(split=np.where(i.image_id == "s3-0", "test", "train"))), "1 test images in the folds, such as s3-0"),
    "unknown image": (lambda f, i: (f.replace("s3-0", "zz"), i), "1 images that are not in the images table, such as zz"),
    "forgotten image": (lambda f, i: (f[f.image_id != "s3-0"], i), "1 training images without a fold, such as s3-0"),
    "row per box": (lambda f, i: (pd.concat([f, f.head(2)]), i), "2 images with several rows, such as s0-0, s1-0"),
    "same image, two folds": (lambda f, i: (pd.concat([f, f.head(1).assign(fold=(f.fold[0]+1) % 3)]), i), "1 images in several folds, such as s0-0"),
    "negative fold": (lambda f, i: (f.assign(fold=f.fold.where(f.image_id != "s3-0", -1)), i), r"1 folds outside 0…2, such as s3-0"),
    "fold that is missing": (lambda f, i: (f.assign(fold=f.fold+(f.fold == 2)), i), "1 empty folds, such as 2"),
    "no number": (lambda f, i: (f.assign(fold=f.fold.astype(float).where(f.image_id != "s3-0")), i), "1 folds outside 0…2, such as s3-0"),
}


@pytest.mark.parametrize("mistake", AUDIT)
def test_audit_refuses(mistake):
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    change, message = AUDIT[mistake]
    with pytest.raises(FoldLeak, match=message): audit_folds(*change(make_folds(images, labels, 3), images))


def test_audit_knows_how_many_folds_there_should_be():
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    folds = make_folds(images, labels, 3)
    assert audit_folds(folds, images, n_folds=3).set_index("check").found[["rows", "rows per image", "images in fold 0"]].tolist() == [12, "1", 4]
    with pytest.raises(FoldLeak, match="2 empty folds, such as 3, 4"): audit_folds(folds, images, n_folds=5)
    with pytest.raises(FoldLeak, match="4 folds outside 0…1"): audit_folds(folds, images, n_folds=2)


def test_oversampling_stays_in_the_training_part():
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(12)])
    folds = make_folds(images, labels, 3)
    train, valid = split_fold(folds, 1)
    assert len(train) == 8 and not set(train) & set(valid)
    rows = oversample(folds, 1, {train[0]: 3, train[1]: 0, valid[0]: 9})
    assert rows.image_id.value_counts().get(train[0]) == 3 and train[1] not in set(rows.image_id) and valid[0] not in set(rows.image_id)
    assert len(rows) == 8+2-1 and len(rows.drop_duplicates(["image_id", "copy"])) == len(rows)
    for times, message in [({"nobody": 2}, "times: 1 image.s. are not in folds, such as nobody"), ({train[0]: -1}, "whole numbers ≥ 0, got -1"), ({train[0]: 1.5}, "whole numbers ≥ 0, got 1.5")]:
        with pytest.raises(ValueError, match=message): oversample(folds, 1, times)


def test_blank_images_are_no_duplicates():
    images, _ = tables_of([("a", "pa", 1), ("b", "pb", 1)])
    blank = {i: np.zeros((50, 40), np.uint8) for i in images.image_id}
    assert len(near_duplicates(blank, images)) == 0 and len(near_duplicates({}, images.head(0))) == 0
    assert not perceptual_hash(blank["a-0"]).any()


def test_real_siim_folds(realdata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # the images are not there, only the tables
        images, labels, _ = siim_covid19.read(realdata/"siim_tables")
    for seed in (0, 1):
        folds = make_folds(images, labels, 5, seed)
        assert folds.patient_id.nunique() == 3261 and len(folds) == 6334 and folds.fold.value_counts().between(1250, 1284).all()
        assert fold_shares(folds, labels, images).spread.max() < .5 # percentage points; 2 were asked for
        joined = folds.merge(images, on="image_id", suffixes=("", "_"))
        for unit in ("study_id", "patient_id"): assert joined.groupby(unit).fold.nunique().max() == 1
        several = joined[joined.groupby("study_id").image_id.transform("size") > 1]
        assert several.drop_duplicates("study_id").fold.value_counts().between(42, 51).all() # 232 studies with several images


def test_real_radiographs_of_different_people_are_no_duplicates(realdata):
    import cv2
    images = nih_rsna.read(realdata/"nih_rsna").images.head(40)
    cache = {i: cv2.resize(cv2.imread(p, cv2.IMREAD_GRAYSCALE), (256, 256), interpolation=cv2.INTER_AREA) for i, p in zip(images.image_id, images.path)}
    assert len(near_duplicates(cache, images)) == 0
    first = images.image_id[0]
    copied = np.clip(cv2.resize(cache[first], (200, 220), interpolation=cv2.INTER_AREA)*.8+30, 0, 255).astype(np.uint8)
    pairs = near_duplicates(cache | {"copy": copied}, pd.concat([images, images.head(1).assign(image_id="copy", patient_id="somebody else")]))
    assert pairs[["image_id_a", "image_id_b", "same_patient"]].values.tolist() == [[first, "copy", False]]


def test_images_that_failed_in_the_cache_take_no_part_and_are_told(capsys):
    images, labels = tables_of([(f"s{k}", f"p{k}", 1) for k in range(40)])
    folds = make_folds(images, labels, 4)
    cached = images[~images.image_id.isin(["s3-0", "s17-0"])]
    with pytest.raises(FoldLeak, match="2 images that are not in the images table"): audit_folds(folds, cached)
    kept = keep_images(folds, cached)
    assert capsys.readouterr().out == "2 of 40 images of the folds are not in the cache, such as s17-0, s3-0; they take no part (failures.csv of the cache says why)\n"
    audit_folds(kept, cached, n_folds=4)
    assert len(kept) == 38 and kept.merge(folds, on=["image_id", "fold"]).shape[0] == 38
    pd.testing.assert_frame_equal(keep_images(folds, images), folds)
    assert not capsys.readouterr().out
    gone = folds.image_id[folds.fold == 2]
    with pytest.raises(ValueError, match="nothing is left of fold 2; repair the files"): keep_images(folds, images[~images.image_id.isin(gone)])
    with pytest.raises(ValueError, match="35 of 40 images of the folds are not in the cache.*is it the cache of other images"): keep_images(folds, images[:5])
