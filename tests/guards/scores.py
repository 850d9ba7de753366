"""Mistakes around boxes, scores and submissions, planted as their authors made them; numbers as in the list of logged mistakes."""
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cxrkit.blend import count_boxes, fuse_boxes, mean_predictions
from cxrkit.errors import diagnose_boxes
from cxrkit.external import calibrate, finish_external, fit_calibration
from cxrkit.metrics import average_precision, join_units, score
from cxrkit.recipe import Recipe
from cxrkit.submit import SubmissionError, check_submission, keep_labels, record_submission, submission_gaps, write_submission
from cxrkit.tables import TableError, check_table
from cxrkit.tune import OutOfFold, tune_blend

SIDES = ["x1", "y1", "x2", "y2"]
SPEC = SimpleNamespace(name="siim", labels={"study": ("negative", "typical"), "image": ("none",)}, box_labels=("opacity",), metric="siim_map", grammar=("label", "score", "x1", "y1", "x2", "y2"), group="patient_id")
SAMPLE = pd.DataFrame({"id": ["s1_study", "s2_study", "a_image", "b_image"], "PredictionString": ["negative 1 0 0 1 1"]*2+["none 1 0 0 1 1"]*2})


def world(n=60, seed=0, shy=False):
    "Wide images, true boxes off the diagonal and off the centre, and a fair detector of two runs; a shy one gives true boxes low scores and false ones lower, as trained detectors do."
    rng = np.random.default_rng(seed)
    images = pd.DataFrame({"image_id": [f"i{k}" for k in range(n)], "study_id": [f"s{k}" for k in range(n)], "patient_id": [f"p{k}" for k in range(n)], "height": 400, "width": 900})
    corner = np.stack([rng.uniform(500, 640, n), rng.uniform(20, 120, n)], 1)
    truth = pd.DataFrame(np.concatenate([corner, corner+[210, 130]], 1), columns=SIDES).assign(image_id=images.image_id, label="opacity")
    def run(name):
        found = truth.assign(score=rng.beta(2, 4, n) if shy else rng.uniform(.05, .95, n), **{c: truth[c]+rng.normal(0, 8, n) for c in SIDES})
        false = found.assign(score=rng.beta(1, 9, n) if shy else rng.uniform(.01, .6, n), x1=found.x1-400, x2=found.x2-400)
        return pd.concat([found, false]).assign(run_id=name, fold=0)
    return images, truth, pd.concat([run("a"), run("b")], ignore_index=True)


def pooled(preds, truth): return average_precision(truth, preds).ap[0]


def test_guard_05_swapped_x_and_y_is_diagnosed():
    images, truth, preds = world()
    swapped = fuse_boxes(preds, "nms", .5).rename(columns={"x1": "y1", "y1": "x1", "x2": "y2", "y2": "x2"})
    assert pooled(swapped, truth) == 0 and pooled(truth.assign(score=1.), truth) == 1
    spec = SimpleNamespace(**{**vars(SPEC), "labels": {}})
    with pytest.warns(UserWarning, match="not one finds any of 60 true boxes; that is rarely a bad detector: cxrkit.errors.diagnose_boxes"): score(spec, pd.DataFrame(columns=["level", "unit_id", "label", "value"]), truth, None, swapped)
    assert diagnose_boxes(truth, swapped, images)["mix-up"][0] == "x and y are swapped"
    strings = swapped.head(1).apply(lambda r: f"opacity {r.score} {r.x1} {r.y1} {r.x2} {r.y2}", axis=1)
    submission = pd.DataFrame({"id": [swapped.image_id[0]+"_image"], "PredictionString": strings.tolist()})
    with pytest.raises(SubmissionError, match="boxes inside their image, in pixels of the original; were boxes of the resized image written, or x and y swapped"): check_submission(submission, submission, SPEC, images)


def test_guard_06_double_flip_is_diagnosed():
    images, truth, preds = world()
    mirrored = fuse_boxes(preds.assign(x1=900-preds.x2, x2=900-preds.x1).query("x1 >= 0"), "nms", .5)
    assert pooled(mirrored, truth) < .1
    assert diagnose_boxes(truth, mirrored, images)["mix-up"][0] == "they are mirrored left to right"


def test_guard_07_output_thought_to_be_corner_and_size():
    images, truth, preds = world()
    as_size = preds.assign(x2=preds.x2-preds.x1, y2=preds.y2-preds.y1)
    with pytest.raises(ValueError, match="expected x1 < x2 and y1 < y2; .* the first is row 0"): fuse_boxes(as_size, "nms", .5)
    assert diagnose_boxes(truth, as_size, images)["mix-up"][0] == "they are x, y, width, height"


def test_guard_08_width_and_height_swapped_on_the_way_back():
    images, truth, preds = world()
    network = fuse_boxes(preds, "nms", .5)
    wrong = network.assign(x1=network.x1/900*400, x2=network.x2/900*400, y1=network.y1/400*900, y2=network.y2/400*900)
    assert diagnose_boxes(truth, wrong, images)["mix-up"][0] == "they were scaled by height for width"
    with pytest.raises(ValueError, match="corners within the image; are x and y, or two sizes, mixed up"): fuse_boxes(wrong.assign(y2=wrong.y2+200), "nms", .5, images=images)


def test_guard_09_a_view_that_was_not_flipped_back_stands_out():
    images, truth, preds = world()
    views = preds.assign(view=np.where(preds.run_id == "a", "identity", "hflip"), run_id="d-f0-00000000")
    flipped = views.view == "hflip"
    views.loc[flipped, ["x1", "x2"]] = 900-views.loc[flipped, ["x2", "x1"]].to_numpy()
    views = views[views.x1 >= 0]
    alone = {view: pooled(fuse_boxes(part.drop(columns="view"), "nms", .5), truth) for view, part in views.groupby("view")}
    assert alone["hflip"] < alone["identity"]/4
    oof = OutOfFold(images, pd.DataFrame(columns=["level", "unit_id", "label", "value"]), truth, pd.DataFrame(columns=["run_id", "fold", "level", "unit_id", "label", "prob"]), views)
    spec = SimpleNamespace(**{**vars(SPEC), "labels": {}})
    found = tune_blend(oof, spec, {f"weight:d@{v}": [1., 0.] for v in ("identity", "hflip")}, Recipe(iou=.5), n_parts=3, progress=False)
    assert dict(found.recipe.weights) == {"d@hflip": 0.}


def test_guard_10_boxes_clipped_to_another_image():
    images, truth, preds = world()
    fused = fuse_boxes(preds, "nms", .5)
    clipped = fused.assign(x1=fused.x1.clip(upper=500), x2=fused.x2.clip(upper=512))
    submission = lambda t: t.assign(text="opacity "+t[["score", *SIDES]].astype(str).agg(" ".join, axis=1)).groupby("image_id").text.agg(" ".join).rename_axis("id").rename("PredictionString").rename(lambda i: i+"_image").reset_index()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_submission(submission(fused), submission(fused), SPEC, images)["at_border"] < 5
    with pytest.warns(UserWarning, match="boxes end at x = 512, which is not the border of their images; were they clipped to the size of another image"):
        check_submission(submission(clipped), submission(clipped), SPEC, images)


def test_guard_11_skip_threshold_and_fusion_of_a_single_model():
    "The log: .2495 with NMS of one model, .0929 with WBF of it and skip .43."
    images, truth, preds = world(shy=True)
    with pytest.warns(UserWarning, match=r"skip=0.43 leaves out \d+ of 240 boxes before fusing; low-scored boxes carry much of the average precision"): skipped = fuse_boxes(preds, "wbf", .5, skip=.43)
    with pytest.warns(UserWarning, match="wbf of a single source moves its boxes towards their worse neighbours"): fuse_boxes(preds[preds.run_id == "a"], "wbf", .5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = fuse_boxes(preds, "wbf", .5) # the default skips nothing
    assert pooled(skipped, truth) < pooled(full, truth)/2 and pooled(full, truth) > .8
    counts = count_boxes(preds, skipped)
    assert counts.n_in.sum() == 240 and counts.n_out.sum() < count_boxes(preds, full).n_out.sum()


def test_guard_12_a_mixed_list_stacked_into_strings():
    stacked = pd.DataFrame(np.stack([["a", "0", "i0", "opacity", .9, 1, 2, 3, 4]]), columns=["run_id", "fold", "image_id", "label", "score", *SIDES])
    with pytest.raises(TableError, match="expected float64 numbers, got text"): check_table(stacked.assign(fold=0), "box_preds")
    with pytest.raises(ValueError, match="expected numbers in x1, y1, x2, y2, got .*; a list of mixed types was probably stacked into strings"): average_precision(world()[1], stacked.assign(score=.9, image_id="i0"))


def test_guard_13_class_codes_instead_of_names():
    images, truth, preds = world()
    with pytest.raises(ValueError, match=r"label '1': 240 predictions but no true box \(labels with truth: 'opacity'\)"): average_precision(truth, preds.assign(label="1"))
    strings = SAMPLE.assign(PredictionString=["0 1 0 0 1 1"]*2+["1 .9 0 0 1 1"]*2)
    with pytest.raises(SubmissionError, match="a label, not a number: class codes must be written as the competition's names"): check_submission(strings, SAMPLE)


def test_guard_20_study_rows_left_at_their_default():
    left = SAMPLE.assign(PredictionString=["negative 1 0 0 1 1"]*2+["opacity .7 10 20 300 400"]*2)
    boxes_only = keep_labels(left, ("opacity",), SPEC)
    assert boxes_only.PredictionString.tolist() == ["", "", "opacity .7 10 20 300 400", "opacity .7 10 20 300 400"]
    report = check_submission(boxes_only, SAMPLE, SPEC)
    assert report.empty_rows == 2 and "negative" not in report


def test_guard_21_duplicate_studies_in_scores():
    twice = pd.concat([SAMPLE, SAMPLE.iloc[[1]]])
    with pytest.raises(SubmissionError, match="ids: 1 rows repeat an id: 's2_study'; each id is answered once"): check_submission(twice, SAMPLE)
    with pytest.raises(SubmissionError, match=r"1 of the sample's 4 are missing \('s2_study'\)"): check_submission(SAMPLE.drop(1), SAMPLE)
    cls = pd.DataFrame([("r", 0, "study", "s1", "negative", .5)]*2, columns=["run_id", "fold", "level", "unit_id", "label", "prob"])
    labels = pd.DataFrame([("study", "s1", "negative", 1.)], columns=["level", "unit_id", "label", "value"])
    with pytest.raises(ValueError, match="is predicted more than once; average the runs first"): join_units(labels, cls)


def test_guard_23_an_empty_class_is_not_averaged_in():
    labels = pd.DataFrame([("study", "s1", "negative", 1.), ("study", "s1", "typical", 0.), ("image", "i0", "none", 1.)], columns=["level", "unit_id", "label", "value"])
    _, truth, _ = world(1)
    with pytest.raises(ValueError, match="siim_map: no truth for 'typical'; a label without truth is not averaged in, it is an error"): score(SPEC, labels, truth, labels.rename(columns={"value": "prob"}), truth.assign(score=1.))


def test_guard_24_precision_is_pooled_over_images():
    truth = pd.DataFrame([(f"i{k}", "opacity", 0., 0., 10., 10.) for k in range(3)], columns=["image_id", "label", *SIDES])
    preds = pd.concat([truth.assign(score=[.9, .2, .1]), truth.head(1).assign(image_id="healthy", score=.8)], ignore_index=True)
    per_image = np.mean([pooled(preds[preds.image_id == i], truth[truth.image_id == i]) for i in truth.image_id])
    assert per_image == 1 and pooled(preds, truth) == pytest.approx(1/3+1/3*3/4+1/3*3/4) # the false box on the healthy image counts


def test_guard_28_no_boxes_and_scores_of_another_scale():
    images, truth, preds = world()
    nothing = fuse_boxes(preds.head(0), "nms", .5)
    assert len(nothing) == 0 and pooled(nothing, truth) == 0
    one_silent = fuse_boxes(preds[(preds.run_id == "a") | (preds.image_id == "i0")], "wbf", .5)
    assert len(one_silent)
    shy = preds.assign(score=np.where(preds.run_id == "b", preds.score**4, preds.score))
    curves = {name: fit_calibration(part, truth) for name, part in shy.groupby("run_id")}
    fair = calibrate(shy, curves)
    spread = lambda t: abs(np.subtract(*t.groupby("run_id").score.mean()))
    assert spread(fair) < spread(shy)/4


def test_guard_33_and_41_index_and_extra_column(tmp_path):
    SAMPLE.to_csv(tmp_path/"index.csv")
    with pytest.raises(SubmissionError, match="header: expected .*written with the index"): check_submission(tmp_path/"index.csv", SAMPLE)
    with pytest.raises(SubmissionError, match="extra: 'file_path'.*Kaggle scores exactly these columns"): check_submission(SAMPLE.assign(file_path="x.png"), SAMPLE)
    path = write_submission(SAMPLE, tmp_path/"submission.csv", SAMPLE, SPEC)
    assert path.read_text().splitlines()[0] == "id,PredictionString"


def test_guard_36_a_dropped_last_batch():
    labels = pd.DataFrame([("image", f"i{k}", "none", float(k % 2)) for k in range(10)], columns=["level", "unit_id", "label", "value"])
    preds = labels.head(8).rename(columns={"value": "prob"})
    with pytest.raises(ValueError, match="2 of 10 labelled units have no prediction, such as .*'i8'.*was the last batch dropped"): join_units(labels, preds, units=set(labels.unit_id))
    runs = pd.concat([preds.assign(run_id="a", fold=0), labels.rename(columns={"value": "prob"}).assign(run_id="b", fold=0)])
    with pytest.raises(ValueError, match="has 1 predictions where other units have 2; a run or a batch is missing"): mean_predictions(runs)


def test_guard_42_a_gap_unlike_the_others(tmp_path):
    for name, expected, public in [("fold 0", .52, .507), ("5 folds", .541, .53), ("tta", .55, .536), ("buggy", .60, .51), ("larger", .556, .544)]: rows = record_submission(tmp_path/"log.csv", name, expected, public)
    gaps = submission_gaps(rows)
    assert gaps.name[gaps.odd].tolist() == ["buggy"] and gaps.gap.round(3).tolist() == [-.013, -.011, -.014, -.09, -.012]


def test_guard_45_a_rule_is_adopted_only_if_it_helps_other_patients():
    images, truth, preds = world(shy=True)
    oof = OutOfFold(images, pd.DataFrame(columns=["level", "unit_id", "label", "value"]), truth, pd.DataFrame(columns=["run_id", "fold", "level", "unit_id", "label", "prob"]), preds)
    spec = SimpleNamespace(**{**vars(SPEC), "labels": {}})
    start = Recipe(method="wbf", iou=.5)
    result = tune_blend(oof, spec, {"scale": [1., .5, 2.], "skip": [0., .43]}, start, n_parts=3, progress=False)
    assert result.recipe == start and "nothing tried here is better than the start" in result.verdict
    effects = result.effects.set_index(["field", "value"]).difference
    assert effects["scale", .5] < -.5 and effects["skip", .43] < -.4


def test_external_boxes_of_a_resized_image_are_refused():
    images, truth, preds = world()
    with pytest.raises(ValueError, match="leave their image by more than 5%.*are they pixels of a resized image"): finish_external(preds.assign(y1=preds.y1*3, y2=preds.y2*3), images, "yolo")
