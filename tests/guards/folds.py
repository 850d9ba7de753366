"Guards 1, 12, 13, 20, 21, 25, 33, 34 and 41 (see GUARDS): tables, folds and writers refuse the mistakes of real logs."
import re

import numpy as np
import pandas as pd
import pytest

from cxrkit.comps import siim_covid19 as siim
from cxrkit.folds import FoldLeak, audit_folds, make_folds, oversample, split_fold
from cxrkit.tables import TableError


def population(n_patients=30):
    "Images and labels of patients with one or two studies; some images are of the test set."
    rows = [(f"i{p}-{s}", f"s{p}-{s}", f"p{p}") for p in range(n_patients) for s in range(1+p % 2)]
    images = pd.DataFrame(rows, columns=["image_id", "study_id", "patient_id"]).assign(path="x.dcm", height=64, width=48, split="train")
    true = {r.study_id: siim.LABELS["study"][k % 4] for k, r in enumerate(images.itertuples())}
    study = [("study", s, x, float(x == t)) for s, t in true.items() for x in siim.LABELS["study"]]
    image = [("image", r.image_id, "none", float(true[r.study_id] == "negative")) for r in images.itertuples()]
    return images, pd.DataFrame(study+image, columns=["level", "unit_id", "label", "value"])


def predictions(studies=("sa", "sb"), images=("ia", "ib")):
    "Final predictions for all of a sample submission, and the sample."
    rows = [("study", u, x, .25) for u in studies for x in siim.LABELS["study"]]+[("image", u, "none", .5) for u in images]
    cls_preds = pd.DataFrame(rows, columns=["level", "unit_id", "label", "prob"]).assign(run_id="r", fold=0)
    boxes = pd.DataFrame([(images[0], "opacity", .9, 1., 2., 30., 50.)], columns=["image_id", "label", "score", "x1", "y1", "x2", "y2"]).assign(run_id="r", fold=0)
    ids = [f"{u}_study" for u in studies]+[f"{u}_image" for u in images]
    return cls_preds, boxes, pd.DataFrame({"id": ids, "PredictionString": ["negative 1 0 0 1 1"]*len(studies)+["none 1 0 0 1 1"]*len(images)})


def test_guard_01_validation_rows_from_test():
    images, labels = population()
    images.loc[images.index[-5:], "split"] = "test"
    folds = make_folds(images, labels)
    assert set(folds.image_id) == set(images.image_id[images.split == "train"])
    drawn = folds.copy()
    drawn.loc[drawn.index[:5], "image_id"] = images.image_id[-5:].to_numpy() # "validation rows" that are test rows
    with pytest.raises(FoldLeak, match="5 test images in the folds, such as i2"): audit_folds(drawn, images)


def test_guard_01_labels_joined_by_position():
    images, labels = population()
    by_id = make_folds(images, labels)
    other_order = make_folds(images.sample(frac=1, random_state=0), labels.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(by_id, other_order)
    sheet = pd.DataFrame({"image_id": images.image_id, "study_id": np.roll(images.study_id, 1)}) # ids of one row, study of the next
    with pytest.raises(ValueError, match=f"{len(images)} image.s. have another study there"): siim.match_images(images, sheet)


def test_guard_12_stacked_into_strings():
    cls_preds, boxes, sample = predictions()
    columns = ["level", "unit_id", "label", "prob", "run_id", "fold"]
    stacked = pd.DataFrame(np.stack([np.array(row) for row in cls_preds[columns].to_numpy().tolist()]), columns=columns)
    assert stacked.prob.map(type).eq(str).all() # what np.stack does to a mixed list
    with pytest.raises(TableError, match="expected .* numbers, got text such as"): siim.write(stacked, boxes, sample)
    with pytest.raises(TableError, match="box_preds.score: expected float64 numbers, got text"): siim.write(cls_preds, boxes.assign(score="0.9"), sample)


def test_guard_13_class_names_mixed():
    cls_preds, boxes, sample = predictions()
    with pytest.raises(ValueError, match="unknown label in image ia 1, image ib 1; this submission has study negative, .* image none"):
        siim.write(cls_preds.replace({"label": {"none": "1"}}), boxes, sample)
    with pytest.raises(ValueError, match="box_preds: unknown label 0; boxes of this submission are opacity"):
        siim.write(cls_preds, boxes.assign(label="0"), sample)
    with pytest.raises(TableError, match="labels.label: expected text, got int"):
        images, labels = population()
        make_folds(images, labels.assign(label=1))


def test_guard_20_study_rows_left_at_the_default():
    cls_preds, boxes, sample = predictions()
    image_part = cls_preds[cls_preds.level == "image"]
    with pytest.raises(ValueError, match="8 unit label.s. without a prediction, such as study sa atypical.*only=.* writes a part"): siim.write(image_part, boxes, sample)
    alone = siim.write(image_part, boxes, sample, only=("none", "opacity")).set_index("id").PredictionString
    assert alone["sa_study"] == alone["sb_study"] == ""
    assert alone["ia_image"] == "none 0.5 0 0 1 1 opacity 0.9 1.00 2.00 30.00 50.00" and alone["ib_image"] == "none 0.5 0 0 1 1"
    one_class = siim.write(cls_preds, boxes, sample, only=("typical",)).set_index("id").PredictionString
    assert one_class["sa_study"] == "typical 0.25 0 0 1 1" and one_class["ia_image"] == ""
    with pytest.raises(ValueError, match="only: unknown label 'opacities'; expected some of negative"): siim.write(cls_preds, boxes, sample, only=("opacities",))


def test_guard_21_duplicate_studies_in_folds():
    cls_preds, boxes, sample = predictions()
    with pytest.raises(TableError, match="one row per run_id"): siim.write(pd.concat([cls_preds, cls_preds.head(4)]), boxes, sample)
    two_runs = pd.concat([cls_preds, cls_preds.head(4).assign(run_id="another")])
    with pytest.raises(ValueError, match="4 duplicate row.s., such as study sa negative.*average folds and models first"): siim.write(two_runs, boxes, sample)
    with pytest.raises(ValueError, match="1 unit label.s. without a prediction, such as study sa typical"): siim.write(cls_preds.drop(cls_preds.index[1]), boxes, sample)
    with pytest.raises(ValueError, match="1 box.es. are there twice"): siim.write(cls_preds, pd.concat([boxes, boxes]), sample)
    with pytest.raises(ValueError, match="sample submission: 1 id.s. appear more than once, such as sa_study"): siim.write(cls_preds, boxes, pd.concat([sample, sample.head(1)]))


def test_guard_25_rows_per_box():
    images, labels = population()
    per_box = pd.concat([images, images.head(9), images.head(3)]) # updated_train_labels.csv: one row per box
    with pytest.raises(FoldLeak, match=rf"9 image id.s. appear more than once \({len(per_box)} rows for {len(images)} images\).*one row per image"): make_folds(per_box, labels)
    folds = pd.DataFrame({"image_id": per_box.image_id, "patient_id": per_box.patient_id, "fold": np.arange(len(per_box)) % 5}) # StratifiedKFold on box rows
    with pytest.raises(FoldLeak) as refused: audit_folds(folds, images)
    for what in ("9 images with several rows", "images in several folds", "patients in several folds"): assert what in str(refused.value)


def test_guard_25_patients_cross():
    images, labels = population()
    rows = make_folds(images, labels)
    twice = rows.index[rows.patient_id == "p1"]
    rows.loc[twice[0], "fold"] = (rows.fold[twice[0]]+1) % 5
    with pytest.raises(FoldLeak, match="1 patients in several folds, such as p1"): audit_folds(rows, images)


def test_guard_33_index_becomes_a_column_in_folds(tmp_path):
    cls_preds, boxes, sample = predictions()
    sample.to_csv(tmp_path/"sample.csv") # index and all
    with pytest.raises(ValueError, match=r"expected columns id, PredictionString and nothing else, got \['Unnamed: 0'"): siim.write(cls_preds, boxes, pd.read_csv(tmp_path/"sample.csv"))


def test_guard_34_resampled_before_the_split():
    images, labels = population()
    balanced = images.sample(n=200, replace=True, random_state=0) # resample(replace=True) BEFORE the split
    with pytest.raises(FoldLeak, match=r"appear more than once \(200 rows for .*oversample inside the training part only: oversample\(folds, fold, times\)"): make_folds(balanced, labels)
    folds = make_folds(images, labels)
    more = oversample(folds, 2, {i: 5 for i in images.image_id})
    assert set(more.image_id) == set(split_fold(folds, 2)[0]) and (more.image_id.value_counts() == 5).all()
    copies = folds.merge(more.head(40).drop(columns="copy"), on="image_id")
    with pytest.raises(FoldLeak, match="images with several rows"): audit_folds(copies, images)
    with pytest.raises(FoldLeak, match="oversample after the split"): oversample(copies, 2, {})


def test_guard_41_extra_column_in_folds():
    cls_preds, boxes, sample = predictions()
    assert list(siim.write(cls_preds.assign(file_path="a.dcm"), boxes.assign(file_path="a.dcm"), sample).columns) == ["id", "PredictionString"]
    with pytest.raises(ValueError, match=re.escape("expected columns id, PredictionString and nothing else, got ['id', 'PredictionString', 'file_path']")):
        siim.write(cls_preds, boxes, sample.assign(file_path="a.dcm"))
