"Adapters: what their lessons show badly. Hypothetical boxes through text and back, damaged sheets, and the real tables."
import io
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrkit.boxes import pairwise_iou
from cxrkit.comps import nih_rsna, rsna_pneumonia, siim_covid19
from cxrkit.dicomwrite import write_dicom
from cxrkit.metrics import score
from cxrkit.spec import CompTables, check_contract, truth_as_predictions
from cxrkit.submit import check_submission, parse_submission
from cxrkit.tables import TableError, empty_table

CORNERS = ["x1", "y1", "x2", "y2"]
STUDIES = {"sa": "typical", "sb": "negative", "sc": "atypical"}
IMAGES = { # image → study, patient, (height, width), boxes x y w h
    "12e5": ("sa", "p1", (48, 64), [(-3.5, 10., 20., 30.25), (40., 12., 18., 25.)]), "ia2": ("sa", "p1", (48, 64), []),
    "ib1": ("sb", "007", (60, 40), []), "ic1": ("sc", "p3", (40, 72), [(30.125, 5., 20., 18.)])}


def write_siim(root, images=IMAGES, studies=STUDIES, dicoms=True):
    "A competition in SIIM's layout."
    columns = siim_covid19.STUDY_COLUMNS
    pd.DataFrame([[f"{s}_study", *(int(v == true) for v in columns.values())] for s, true in studies.items()], columns=["id", *columns]).to_csv(root/"train_study_level.csv", index=False)
    rows = []
    for i, (study, _, _, boxes) in images.items():
        text = str([dict(zip(("x", "y", "width", "height"), b)) for b in boxes]) if boxes else ""
        label = " ".join(f"opacity 1 {x} {y} {x+w} {y+h}" for x, y, w, h in boxes) or "none 1 0 0 1 1"
        rows.append((f"{i}_image", text, label, study))
    pd.DataFrame(rows, columns=["id", "boxes", "label", "StudyInstanceUID"]).to_csv(root/"train_image_level.csv", index=False)
    for i, (study, patient, size, _) in images.items():
        if not dicoms: continue
        (root/"train"/study/"series").mkdir(parents=True, exist_ok=True)
        write_dicom(root/"train"/study/"series"/f"{i}.dcm", np.zeros(size, np.uint8), tags={"PatientID": patient})
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def sample_for(tables):
    train = tables.images[tables.images.split == "train"]
    ids = [*(train.study_id.drop_duplicates()+"_study"), *(train.image_id+"_image")]
    return pd.DataFrame({"id": ids, "PredictionString": ""})


def contract(spec, tables, sample):
    "Truth through CSV text and back; the report of `check_contract`."
    def truth_score(cls_preds, box_preds): return score(spec, tables.labels, tables.boxes, cls_preds, box_preds, images=tables.images).overall
    return check_contract(spec, tables, sample, parse_submission, truth_score)


def parse(submission):
    "An independent reader of prediction strings: id, label, score, x1, y1, x2, y2."
    words = submission.set_index(submission.columns[0]).PredictionString.str.split().explode().dropna()
    rows = words.to_numpy().reshape(-1, 6)
    table = pd.DataFrame(rows, columns=["label", "score", *CORNERS]).astype(dict.fromkeys(["score", *CORNERS], float))
    return table.assign(id=words.index[::6])


@pytest.fixture
def siim(tmp_path): return write_siim(tmp_path)


# SIIM: reading

def test_ids_stay_text(siim):
    tables = siim_covid19.read(siim)
    assert set(tables.images.image_id) == set(IMAGES) and "007" in set(tables.images.patient_id)
    assert tables.images.set_index("image_id").loc["12e5", ["height", "width"]].tolist() == [48, 64]
    assert tables.boxes[CORNERS].iloc[0].tolist() == [-3.5, 10, 16.5, 40.25]


def test_rows_of_the_sheets_may_come_in_any_order(siim):
    first = siim_covid19.read(siim)
    for name in ("train_study_level.csv", "train_image_level.csv"): pd.read_csv(siim/name, dtype=str).sample(frac=1, random_state=3).to_csv(siim/name, index=False)
    for a, b in zip(first, siim_covid19.read(siim)):
        keys = [c for c in a.columns if c != "rater"]
        pd.testing.assert_frame_equal(a.sort_values(keys, ignore_index=True), b.sort_values(keys, ignore_index=True))


def test_patient_missing_in_the_header_is_not_a_patient(tmp_path):
    images = IMAGES | {"id1": ("sa", "", (30, 40), []), "ie1": ("sb", "  ", (30, 40), [])}
    tables = siim_covid19.read(write_siim(tmp_path, images))
    assert tables.images.set_index("image_id").patient_id[["id1", "ie1"]].isna().all()
    assert siim_covid19.oddities(tables).set_index("what")["count"]["images without a patient id"] == 2


def test_not_annotated_is_nan_not_zero(siim):
    edit(siim/"train_study_level.csv", "sa_study,0,1,0,0", "sa_study,,,,")
    labels = siim_covid19.read(siim).labels.query("unit_id == 'sa' and level == 'study'")
    assert len(labels) == 4 and labels.value.isna().all()


DAMAGE = { # what was done → file, old, new, message
    "label 2": ("train_study_level.csv", "sa_study,0,1,0,0", "sa_study,0,2,0,0", "expected 0, 1 or nothing in the class columns; 1 row.s. have something else, such as sa_study"),
    "study twice": ("train_study_level.csv", "sb_study", "sa_study", "1 id.s. appear more than once, such as sa_study"),
    "study without row": ("train_study_level.csv", "sb_study,1,0,0,0\n", "", "1 studies with images have no row there, such as sb"),
    "suffix": ("train_study_level.csv", "sa_study", "sa", "expected ids that end in _study, got sa"),
    "image twice": ("train_image_level.csv", "ia2_image", "ib1_image", "1 id.s. appear more than once, such as ib1_image"),
    "image without study": ("train_image_level.csv", "none 1 0 0 1 1,sb", "none 1 0 0 1 1,", "image without study: ib1"),
    "image of another study": ("train_image_level.csv", "none 1 0 0 1 1,sb", "none 1 0 0 1 1,sc", "1 image.s. have another study there than in their folder or image_meta.csv, such as ib1"),
    "broken box": ("train_image_level.csv", "'height': 18.0}]", "'height': 18.0", "boxes of image ic1: expected a list of dicts with x, y, width and height"),
    "box without width": ("train_image_level.csv", "'x': 30.125, ", "", "boxes of image ic1: .*KeyError: 'x'"),
    "label against boxes": ("train_image_level.csv", "none 1 0 0 1 1,sb", "opacity 1 0 0 5 5,sb", "boxes and label name different numbers of opacities for 1 image.s., such as ib1"),
    "inverted box": ("train_image_level.csv", "'width': 20.0, 'height': 18.0", "'width': -20.0, 'height': 18.0", "x1 < x2 and y1 < y2"),
    "column renamed": ("train_image_level.csv", "StudyInstanceUID", "study", "expected column.s. StudyInstanceUID; got id, boxes, label, study"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sheets_are_refused(siim, damage):
    name, old, new, message = DAMAGE[damage]
    edit(siim/name, old, new)
    with pytest.raises(ValueError, match=message): siim_covid19.read(siim)


def test_missing_sheet(siim):
    (siim/"train_image_level.csv").unlink()
    with pytest.raises(FileNotFoundError, match="train_image_level.csv: not found in .*unpack the competition's files there"): siim_covid19.read(siim)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_unreadable_images_are_named_or_left_out(siim, damage):
    path = siim/"train"/"sa"/"series"/"ia2.dcm"
    if damage == "missing": path.unlink()
    else: path.write_bytes({"truncated": path.read_bytes()[:200], "text": b"not an image", "empty": b""}[damage])
    with pytest.raises(ValueError, match="ia2.*on_error='skip'"): siim_covid19.read(siim)
    with pytest.warns(UserWarning, match="ia2"): tables = siim_covid19.read(siim, on_error="skip")
    assert sorted(tables.images.image_id) == ["12e5", "ib1", "ic1"] and "ia2" not in set(tables.labels.unit_id)
    with pytest.raises(ValueError, match="expected 'raise' or 'skip', got 'ignore'"): siim_covid19.read(siim, on_error="ignore")


def test_training_file_without_label(siim):
    write_dicom(siim/"train"/"sa"/"series"/"extra.dcm", np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"0 labelled image.s. without a readable file \(-\), 1 training file.s. without a label \(extra\)"): siim_covid19.read(siim)


def test_meta_sizes_must_be_positive(siim):
    tables = siim_covid19.read(siim)
    meta = tables.images.assign(series_id="series")[siim_covid19.META_COLUMNS]
    meta.assign(width=0).to_csv(siim/"image_meta.csv", index=False)
    with pytest.raises(ValueError, match="image_meta.csv: expected positive height and width, 4 image.s. have none"): siim_covid19.read(siim)
    meta.to_csv(siim/"image_meta.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error") # every image lies where the path says
        again = siim_covid19.read(siim)
    assert set(again.images.path) == set(tables.images.path)


# Writing

box = st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(1, 900), st.integers(1, 900)).map(lambda t: (t[0]/8-4, t[1]/8, t[2]/8, t[3]/8))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(box, max_size=4, unique=True), min_size=1, max_size=6))
def test_boxes_survive_text_table_and_submission(tmp_path_factory, drawn):
    images = {f"i{k}": ("sa", "p1", (230, 300+k), boxes) for k, boxes in enumerate(drawn)}
    root = write_siim(tmp_path_factory.mktemp("siim"), images, {"sa": "typical"}, dicoms=False)
    pd.DataFrame([(i, s, "series", p, *size) for i, (s, p, size, _) in images.items()], columns=siim_covid19.META_COLUMNS).to_csv(root/"image_meta.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = siim_covid19.read(root)
    submission = siim_covid19.write(*truth_as_predictions(tables), sample_for(tables))
    back = parse(pd.read_csv(io.StringIO(submission.to_csv(index=False))))
    for i, (_, _, _, boxes) in images.items():
        corners = back[(back["id"] == f"{i}_image") & (back.label == "opacity")][CORNERS].to_numpy()
        expected = np.array([(x, y, x+w, y+h) for x, y, w, h in boxes]).reshape(-1, 4)
        assert np.allclose(sorted(corners.tolist()), sorted(expected.tolist()), atol=.0051)
        assert len(back[(back["id"] == f"{i}_image") & (back.label == "none")]) == 1


def test_every_id_is_answered_in_the_order_of_the_sample(siim):
    tables = siim_covid19.read(siim)
    cls_preds, box_preds = truth_as_predictions(tables)
    sample = sample_for(tables).sample(frac=1, random_state=0)
    first = siim_covid19.write(cls_preds, box_preds, sample)
    assert first["id"].tolist() == sample["id"].tolist() and list(first.columns) == list(sample.columns)
    again = siim_covid19.write(cls_preds.sample(frac=1, random_state=1), box_preds.sample(frac=1, random_state=2), sample)
    pd.testing.assert_frame_equal(*(t.assign(PredictionString=t.PredictionString.str.split().map(sorted)) for t in (first, again)))
    study = first.set_index("id").PredictionString["sa_study"]
    assert study == "negative 0 0 0 1 1 typical 1 0 0 1 1 indeterminate 0 0 0 1 1 atypical 0 0 0 1 1"


def test_probabilities_keep_their_ranking(siim):
    tables = siim_covid19.read(siim)
    cls_preds, box_preds = truth_as_predictions(tables)
    cls_preds["prob"] = np.random.default_rng(0).uniform(0, 1e-4, len(cls_preds)).astype(np.float32)
    written = parse(siim_covid19.write(cls_preds, box_preds.head(0), sample_for(tables)))
    expected = cls_preds.assign(id=cls_preds.unit_id+"_"+cls_preds.level).set_index(["id", "label"]).prob
    assert (written.set_index(["id", "label"]).score.sort_values().index == expected.sort_values().index).all()


@pytest.mark.parametrize("prob", [np.nan, 1.5, -.1, np.inf])
def test_probabilities_outside_0_to_1_are_refused(siim, prob):
    tables = siim_covid19.read(siim)
    cls_preds, box_preds = truth_as_predictions(tables)
    cls_preds.loc[3, "prob"] = prob
    with pytest.raises(TableError, match="prob is finite and within 0…1"): siim_covid19.write(cls_preds, box_preds, sample_for(tables))


@pytest.mark.parametrize("spec", [siim_covid19.SPEC, nih_rsna.SPEC], ids=lambda s: s.name)
def test_silence_is_a_valid_file(spec):
    levels = list(spec.labels)
    sample = pd.DataFrame({"id": ["a_study", "a_image", "b_image"], "PredictionString": "x"})
    silent = spec.write(empty_table("cls_preds"), empty_table("box_preds"), sample)
    assert silent.PredictionString.tolist() == [f"{spec.labels['study'][0]} 1 0 0 1 1", "none 1 0 0 1 1", "none 1 0 0 1 1"] and levels == ["study", "image"]


def test_a_part_alone_with_nothing_found(siim):
    tables = siim_covid19.read(siim)
    cls_preds, _ = truth_as_predictions(tables)
    assert siim_covid19.write(cls_preds, empty_table("box_preds"), sample_for(tables), only=("opacity",)).PredictionString.eq("").all()


# RSNA 2018

@pytest.fixture
def rsna(tmp_path):
    (tmp_path/"stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\n0a,6.0,8.0,14.0,20.0,1\n0a,40.0,10.0,15.0,24.0,1\n0b,,,,,0\n0c,,,,,0\n")
    (tmp_path/"stage_2_detailed_class_info.csv").write_text("patientId,class\n0a,Lung Opacity\n0a,Lung Opacity\n0b,Normal\n0c,No Lung Opacity / Not Normal\n")
    (tmp_path/"stage_2_sample_submission.csv").write_text("patientId,PredictionString\n0d,0.5 0 0 100 100\n")
    for i, size in {"0a": (48, 64), "0b": (60, 40), "0c": (64, 64), "0d": (50, 70)}.items():
        folder = tmp_path/f"stage_2_{'test' if i == '0d' else 'train'}_images"
        folder.mkdir(exist_ok=True)
        write_dicom(folder/f"{i}.dcm", np.zeros(size, np.uint8), tags={"PatientID": i})
    return tmp_path


RSNA_DAMAGE = {
    "box without target": ("stage_2_train_labels.csv", "40.0,10.0,15.0,24.0,1", "40.0,10.0,15.0,24.0,0", "Target 1 and a box belong together; 1 row.s. have one without the other, such as 0a"),
    "target 0 and 1": ("stage_2_train_labels.csv", "0a,40.0,10.0,15.0,24.0,1", "0a,,,,,0", "1 image.s. have rows with Target 0 and with Target 1, such as 0a"),
    "word for number": ("stage_2_train_labels.csv", "40.0,10.0", "forty,10.0", "expected numbers in x, y, width, height and Target 0 or 1; 1 row.s. have something else, such as 0a"),
    "class against target": ("stage_2_detailed_class_info.csv", "0b,Normal", "0b,Lung Opacity", "class and Target disagree for 1 image.s., such as 0b"),
    "two classes": ("stage_2_detailed_class_info.csv", "0c,No Lung Opacity / Not Normal", "0c,Normal\n0c,No Lung Opacity / Not Normal", "1 image.s. have two different classes, such as 0c"),
    "unknown class": ("stage_2_detailed_class_info.csv", "0b,Normal", "0b,Fine", "unknown class Fine; expected Lung Opacity"),
    "image without class": ("stage_2_detailed_class_info.csv", "0b,Normal\n", "", "1 image.s. are in only one of this file and stage_2_train_labels.csv, such as 0b"),
    "label without image": ("stage_2_train_labels.csv", "0a,", "0z,", "0z"),
}


@pytest.mark.parametrize("damage", RSNA_DAMAGE)
def test_damaged_rsna_sheets_are_refused(rsna, damage):
    name, old, new, message = RSNA_DAMAGE[damage]
    edit(rsna/name, old, new)
    with pytest.raises(ValueError, match=message): rsna_pneumonia.read(rsna)


def test_rsna_one_row_an_image_and_nothing_of_the_sample(rsna):
    tables = rsna_pneumonia.read(rsna)
    assert tables.images.image_id.is_unique and len(tables.images) == 4 and len(tables.boxes) == 2
    assert tables.labels.groupby("unit_id").value.sum().eq(1).all()
    sample = pd.read_csv(rsna/"stage_2_sample_submission.csv", dtype=str)
    assert rsna_pneumonia.write(empty_table("cls_preds"), empty_table("box_preds"), sample).PredictionString.tolist() == [""]


def test_rsna_writes_corner_and_size(rsna):
    tables = rsna_pneumonia.read(rsna)
    sample = pd.DataFrame({"patientId": ["0c", "0a"], "PredictionString": "0.5 0 0 100 100"})
    written = rsna_pneumonia.write(*truth_as_predictions(tables), sample)
    assert written.PredictionString.tolist()[0] == "" and sorted(re.findall(r"1 (\S+ \S+ \S+ \S+)", written.PredictionString[1])) == ["40.00 10.00 15.00 24.00", "6.00 8.00 14.00 20.00"]


def test_rsna_true_patients_from_a_meta_table(rsna):
    pd.DataFrame({"image_id": ["0a", "0b", "0c"], "patient_id": ["007", "007", "8"], "height": 50, "width": 60}).to_csv(rsna/"image_meta.csv", index=False)
    tables = rsna_pneumonia.read(rsna)
    assert tables.images.set_index("image_id").patient_id.to_dict() == {"0a": "007", "0b": "007", "0c": "8", "0d": "0d"}


# Contract and real tables

def test_contract_on_images_that_are_not_square(tmp_path):
    tables = siim_covid19.read(write_siim(tmp_path, IMAGES | {"id1": ("sd", "p4", (33, 44), [(3., 4., 5., 6.)])}, STUDIES | {"sd": "indeterminate"}))
    assert (tables.images.height != tables.images.width).all()
    assert contract(siim_covid19.SPEC, tables, sample_for(tables)).truth_score == 1


def test_rsna_contract_on_images_that_are_not_square(rsna):
    tables = rsna_pneumonia.read(rsna)
    train = tables.images[tables.images.split == "train"]
    sample = pd.DataFrame({"patientId": train.image_id.to_numpy(), "PredictionString": ""})
    assert contract(rsna_pneumonia.SPEC, CompTables(train, tables.labels, tables.boxes), sample).truth_score == 1


def test_real_siim_tables(realdata):
    root = realdata/"siim_tables"
    with pytest.warns(UserWarning, match="6334 of 6334 image files are missing"): tables = siim_covid19.read(root)
    sample = siim_covid19.read_sheet(root/"sample_submission.csv", ["id"])
    found = siim_covid19.oddities(tables, sample).set_index("what")["count"]
    expected = {"images": 6334, "studies": 6054, "patients": 3261, "boxes with a negative coordinate": 1, "boxes beyond the right or lower edge": 0,
                "studies with several images": 232, "… with boxes on several of them": 0, "none images in studies that are not negative": 304,
                "opacity images in negative studies": 0, "image files that are missing": 6334, "ids of the sample submission without an image": 2477}
    assert found[list(expected)].to_dict() == expected and len(tables.boxes) == 7853
    negative = tables.boxes[tables.boxes.x1 < 0]
    assert negative.image_id.tolist() == ["6ea732c63929"] and abs(negative.x1.item()+3.556) < 1e-3
    assert tables.images.set_index("image_id").loc["000a312787f2", ["height", "width"]].tolist() == [3488, 4256] # height first

    assert contract(siim_covid19.SPEC, tables, sample_for(tables)).truth_score == 1
    written = siim_covid19.write(*truth_as_predictions(tables), sample_for(tables))
    back = parse(written)
    assert len(back) == 6054*4+6334+7853
    opacities = back[back.label == "opacity"].sort_values(["id", "x1", "y1"])
    truth = tables.boxes.assign(id=tables.boxes.image_id+"_image").sort_values(["id", "x1", "y1"])
    assert np.allclose(opacities[CORNERS], truth[CORNERS], atol=.0051)


def test_real_folder_of_pngs(realdata):
    tables = nih_rsna.read(realdata/"nih_rsna")
    assert (len(tables.images), len(tables.boxes), tables.labels.query("label == 'none'").value.sum()) == (136, 90, 80)
    sample = nih_rsna.sample_submission(tables.images)
    assert contract(nih_rsna.SPEC, tables, sample).truth_score == 1
    written = nih_rsna.write(*truth_as_predictions(tables), sample)
    assert check_submission(written, sample, nih_rsna.SPEC, tables.images)[["rows", "empty_rows", "opacity", "none"]].tolist() == [272, 0, 90, 136]
    best = parse(written).query("label == 'opacity'")
    for i, rows in tables.boxes.groupby("image_id"):
        assert np.allclose(pairwise_iou(rows[CORNERS], best[best["id"] == f"{i}_image"][CORNERS]).max(1), 1, atol=1e-3)


def test_folder_of_pngs_refuses_contradictions(tmp_path):
    images = "image_id,patient_id,rsna_class,height,width\na,1,Lung Opacity,40,60\nb,1,Normal,40,60\n"
    for name, text in {"images.csv": images, "boxes.csv": "image_id,x,y,width,height\na,1,2,3,4\n"}.items(): (tmp_path/name).write_text(text)
    with pytest.warns(UserWarning, match="2 of 2 image files are missing"): assert len(nih_rsna.read(tmp_path).images) == 2
    for old, new, message in [("a,1,2,3,4", "b,1,2,3,4", "rsna_class 'Lung Opacity' and boxes disagree for 2 image.s."), ("b,1,2", "z,1,2", "1 image.s. are not in images.csv, such as z"),
                              ("z,1,2", "z,one,2", "expected numbers in x, y, width, height; 1 row.s. have something else, such as z")]:
        edit(tmp_path/"boxes.csv", old, new)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
            warnings.simplefilter("ignore")
            nih_rsna.read(tmp_path)
