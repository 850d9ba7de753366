"""Metrics against slow, independent references: the VOC devkit's rules in plain Python, pycocotools, scikit-learn, RSNA's text."""
import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.metrics import (METRICS, average_precision, best_f1_threshold, cls_as_boxes, coco_precision, get_metric, join_units, log_loss, match_boxes, matched_precision,
                            probabilistic_f1, roc_auc, rsna_2018, score)

SIDES = ["x1", "y1", "x2", "y2"]
COLUMNS = ["image_id", "label", *SIDES]


def iou_of(a, b):
    w, h = min(a[2], b[2])-max(a[0], b[0]), min(a[3], b[3])-max(a[1], b[1])
    if w <= 0 or h <= 0: return 0.
    return w*h/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-w*h)


def devkit_ap(truth, preds, iou, points=0):
    "VOCevaldet.m, line by line, with Python lists; truth: [(image, box)], preds: [(image, score, box)]."
    boxes = {}
    for image, box in truth: boxes.setdefault(image, []).append([box, False])
    ranked = sorted(range(len(preds)), key=lambda i: -preds[i][1]) # Python's sort is stable, MATLAB's too
    tp = []
    for i in ranked:
        image, _, box = preds[i]
        most, best = -np.inf, None
        for candidate in boxes.get(image, []):
            overlap = iou_of(box, candidate[0])
            if overlap > most: most, best = overlap, candidate
        hit = best is not None and most > iou and not best[1]
        if hit: best[1] = True
        tp.append(hit)
    recall, precision, found = [], [], 0
    for n, hit in enumerate(tp, 1):
        found += hit
        recall.append(found/len(truth))
        precision.append(found/n)
    if points: return sum(max([p for r, p in zip(recall, precision) if r >= t], default=0) for t in np.linspace(0, 1, points))/points
    mrec, mpre = [0., *recall, 1.], [0., *precision, 0.]
    for i in range(len(mpre)-2, -1, -1): mpre[i] = max(mpre[i], mpre[i+1])
    return sum((mrec[i+1]-mrec[i])*mpre[i+1] for i in range(len(mrec)-1) if mrec[i+1] != mrec[i])


def make_case(seed, n_images=4, labels=("a", "b"), grid=6):
    "Coarse boxes and scores: ties, duplicates, images without truth, IoUs exactly at common thresholds."
    rng = np.random.default_rng(seed)
    def boxes(n):
        corner = rng.integers(0, grid, (n, 2))
        return np.concatenate([corner, corner+rng.integers(1, grid, (n, 2))], axis=1).astype(float)
    def table(n):
        out = pd.DataFrame(boxes(n), columns=SIDES)
        return out.assign(image_id=rng.integers(0, n_images, n).astype(str), label=rng.choice(labels, n))
    truth = table(rng.integers(1, 9))
    preds = table(rng.integers(0, 25))
    preds["score"] = rng.integers(0, 6, len(preds))/5
    return truth, preds[preds.label.isin(truth.label.unique())].reset_index(drop=True)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), iou=st.sampled_from([0., .25, 1/3, .4, .5, .75]), points=st.sampled_from([0, 11, 101]))
def test_ap_equals_the_devkit(seed, iou, points):
    truth, preds = make_case(seed)
    table = average_precision(truth, preds, iou, points=points)
    assert table.label.tolist() == sorted(truth.label.unique())
    for row in table.itertuples():
        t, p = truth[truth.label == row.label], preds[preds.label == row.label]
        want = devkit_ap(list(zip(t.image_id, t[SIDES].to_numpy().tolist())), list(zip(p.image_id, p.score, p[SIDES].to_numpy().tolist())), iou, points)
        assert row.ap == pytest.approx(want, abs=1e-12)
        assert (row.n_truth, row.n_preds) == (len(t), len(p))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_of_rows_only_matters_in_ties(seed):
    truth, preds = make_case(seed)
    preds["score"] = np.random.default_rng(seed).permutation(len(preds))/100
    shuffled = preds.sample(frac=1, random_state=seed)
    pd.testing.assert_frame_equal(average_precision(truth, preds), average_precision(truth, shuffled))


def coco_eval(truth, preds, iou):
    "pycocotools on the same tables: {label: AP}."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    images, labels = sorted(set(truth.image_id) | set(preds.image_id)), sorted(truth.label.unique())
    as_rows = lambda t: [dict(id=i+1, image_id=images.index(r.image_id), category_id=labels.index(r.label)+1, bbox=[r.x1, r.y1, r.x2-r.x1, r.y2-r.y1],
                              area=(r.x2-r.x1)*(r.y2-r.y1), iscrowd=0, **({"score": r.score} if "score" in t else {})) for i, r in enumerate(t.itertuples())]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(images=[dict(id=i) for i in range(len(images))], categories=[dict(id=i+1) for i in range(len(labels))], annotations=as_rows(truth))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(as_rows(preds)), "bbox")
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return {label: evaluation.eval["precision"][0, :, i, 0, -1].mean() for i, label in enumerate(labels)}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), iou=st.sampled_from([.25, .5, .75]))
def test_coco_precision_equals_pycocotools(seed, iou):
    truth, preds = make_case(seed)
    if not len(preds): return
    want = coco_eval(truth, preds, iou)
    for row in coco_precision(truth, preds, iou).itertuples(): assert row.ap == pytest.approx(want[row.label], abs=1e-12)


def test_coco_precision_counts_a_hundred_per_image():
    rng = np.random.default_rng(0)
    corner = rng.random((300, 2))*50
    preds = pd.DataFrame(np.concatenate([corner, corner+30], 1), columns=SIDES).assign(image_id="x", label="a", score=rng.random(300))
    truth = preds.sample(20, random_state=1).drop(columns="score")
    assert coco_precision(truth, preds).ap[0] == pytest.approx(coco_eval(truth, preds, .5)["a"], abs=1e-12)


def test_iou_exactly_at_the_threshold_is_no_hit():
    truth = pd.DataFrame([("x", "a", 0., 0, 2, 1)], columns=COLUMNS)
    preds = pd.DataFrame([("x", "a", 0., 0, 1, 1, .9)], columns=[*COLUMNS, "score"])
    assert average_precision(truth, preds, .5).ap[0] == 0 and average_precision(truth, preds, .4999).ap[0] == 1
    assert coco_precision(truth, preds, .5).ap[0] == 1


def test_truth_is_worth_one_and_silence_nothing():
    truth, _ = make_case(5)
    truth = truth.drop_duplicates(["image_id", "label"])
    assert (average_precision(truth, truth.assign(score=.3)).ap == 1).all()
    assert (average_precision(truth, truth.head(0).assign(score=0.)).ap == 0).all()


def test_float32_tables_and_large_images():
    truth = pd.DataFrame([("x", "a", 1000.25, 2000.5, 3000.75, 4000.)], columns=COLUMNS).astype({c: np.float32 for c in SIDES})
    assert average_precision(truth, truth.assign(score=np.float32(.5)), .999).ap[0] == 1


def test_coverage_sets_the_denominator():
    truth, preds = make_case(11)
    ids = sorted(truth.image_id.unique())[:1]
    inside = preds[preds.image_id.isin(ids)]
    small = average_precision(truth, inside[inside.label.isin(truth[truth.image_id.isin(ids)].label)], coverage=ids)
    assert small.n_truth.sum() == truth.image_id.isin(ids).sum()
    table = pd.DataFrame({"run_id": "r", "image_id": ids, "fold": 0})
    pd.testing.assert_frame_equal(small, average_precision(truth, inside[inside.label.isin(truth[truth.image_id.isin(ids)].label)], coverage=table))
    with pytest.raises(ValueError, match="on images that coverage does not list"): average_precision(truth, preds, coverage=ids)


def rsna_by_hand(truth, preds, thresholds):
    "The competition's text, image by image."
    values = []
    for image in sorted(set(truth.image_id) | set(preds.image_id)):
        boxes, found = truth.loc[truth.image_id == image, SIDES].to_numpy(), preds[preds.image_id == image].sort_values("score", ascending=False, kind="stable")[SIDES].to_numpy()
        per_threshold = []
        for t in thresholds:
            free, tp = list(range(len(boxes))), 0
            for p in found:
                if not free: break
                overlaps = [iou_of(p, boxes[j]) for j in free]
                if max(overlaps) > t:
                    free.pop(int(np.argmax(overlaps)))
                    tp += 1
            per_threshold.append(tp/(len(found)+len(boxes)-tp))
        values.append(np.mean(per_threshold))
    return np.mean(values)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rsna_equals_its_definition(seed):
    truth, preds = make_case(seed, labels=("opacity",))
    thresholds = (.4, .45, .5, .55, .6, .65, .7, .75)
    assert rsna_2018(truth, preds).score[0] == pytest.approx(rsna_by_hand(truth, preds, thresholds), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auc_and_log_loss_equal_scikit_learn(pairs):
    from sklearn.metrics import log_loss as sk_log_loss
    from sklearn.metrics import roc_auc_score
    values, probs = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])/5
    if 0 < values.sum() < len(values): assert roc_auc(values, probs) == pytest.approx(roc_auc_score(values, probs), abs=1e-12)
    assert log_loss(values, probs) == pytest.approx(sk_log_loss(values, np.clip(probs, 1e-7, 1-1e-7), labels=[0, 1]), abs=1e-9)


def pfbeta(labels, predictions, beta):
    "As the competition's page gives it (RSNA screening mammography, 2023), rewritten as a loop."
    total, ctp, cfp = 0, 0., 0.
    for label, prediction in zip(labels, predictions):
        prediction = min(max(prediction, 0), 1)
        total += bool(label)
        if label: ctp += prediction
        else: cfp += prediction
    precision, recall = ctp/(ctp+cfp) if ctp+cfp else 0, ctp/total
    return (1+beta**2)*precision*recall/(beta**2*precision+recall) if precision > 0 and recall > 0 else 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(-.2, 1.2)), min_size=1, max_size=40), st.sampled_from([.5, 1, 2]))
def test_pf1_equals_its_definition(pairs, beta):
    values, probs = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if values.any(): assert probabilistic_f1(values, probs, beta) == pytest.approx(pfbeta(values, probs, beta), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30))
def test_best_threshold_is_the_best_of_all(pairs):
    values, probs = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])/6
    if not values.any(): return
    f1 = lambda t: 2*(values & (probs >= t)).sum()/((probs >= t).sum()+values.sum())
    threshold, best = best_f1_threshold(values, probs)
    assert best == pytest.approx(max(f1(t) for t in np.unique(probs)), abs=1e-12) and f1(threshold) == pytest.approx(best, abs=1e-12)


SPEC = SimpleNamespace(name="mini", labels={"study": ("negative", "typical"), "image": ("none",)}, box_labels=("opacity",), metric="siim_map")


def mini_truth():
    labels = pd.DataFrame([("study", f"s{i}", name, float((i % 2 == 0) == (name == "negative"))) for i in range(6) for name in ("negative", "typical")]
                          + [("image", f"i{i}", "none", float(i % 2 == 0)) for i in range(6)], columns=["level", "unit_id", "label", "value"])
    boxes = pd.DataFrame([(f"i{i}", "opacity", 10., 20, 110, 220) for i in (1, 3, 5)], columns=COLUMNS)
    return labels, boxes


def test_truth_scores_one_for_every_competition_metric():
    labels, boxes = mini_truth()
    preds = labels.rename(columns={"value": "prob"})
    for name in ("siim_map", "vinbig_map", "rsna_2018", "mean_auc", "pf1"):
        result = score(SimpleNamespace(**{**vars(SPEC), "metric": name}), labels, boxes, preds, boxes.assign(score=.7))
        assert result.overall == 1, name
        assert result.as_dict()[name] == 1


def test_siim_score_is_the_mean_over_labels_of_pooled_ap():
    labels, boxes = mini_truth()
    rng = np.random.default_rng(0)
    preds = labels.drop(columns="value").assign(prob=rng.random(len(labels)))
    found = boxes.assign(score=rng.random(3), x1=boxes.x1+rng.random(3)*60)
    result = score(SPEC, labels, boxes, preds, found)
    want = []
    for level, name in [("study", "negative"), ("study", "typical"), ("image", "none")]:
        t, p = labels[(labels.level == level) & (labels.label == name)], preds[(preds.level == level) & (preds.label == name)]
        want.append(devkit_ap([(u, [0, 0, 1, 1]) for u in t.unit_id[t.value == 1]], [(r.unit_id, r.prob, [0, 0, 1, 1]) for r in p.itertuples()], .5))
        unit_boxes = average_precision(cls_as_boxes(t), cls_as_boxes(p)).ap[0]
        assert unit_boxes == pytest.approx(want[-1], abs=1e-12)
    want.append(average_precision(boxes, found).ap[0])
    assert result.table.value.tolist() == pytest.approx(want, abs=1e-12) and result.overall == pytest.approx(np.mean(want), abs=1e-12)


def test_equal_probabilities_rank_in_the_order_of_the_predictions():
    labels, boxes = mini_truth()
    preds = labels.drop(columns="value").assign(prob=.5).sample(frac=1, random_state=3)
    table = score(SPEC, labels, boxes, preds, boxes.assign(score=1.)).table.set_index("label").value
    for name in ("negative", "typical", "none"):
        t, p = labels[labels.label == name], preds[preds.label == name]
        assert table[name] == average_precision(cls_as_boxes(t), cls_as_boxes(p)).ap[0]


def test_units_not_annotated_do_not_count():
    labels, boxes = mini_truth()
    preds = labels.rename(columns={"value": "prob"})
    labels.loc[labels.label == "none", "value"] = [1, 0, np.nan, 0, 1, np.nan]
    assert score(SPEC, labels, boxes, preds, boxes.assign(score=1.)).table.set_index("label").n_preds["none"] == 4


def test_covered_units_must_all_be_predicted():
    labels, boxes = mini_truth()
    preds = labels.rename(columns={"value": "prob"})
    images = pd.DataFrame({"image_id": [f"i{i}" for i in range(6)], "study_id": [f"s{i}" for i in range(6)]})
    covered = [f"i{i}" for i in range(4)]
    result = score(SPEC, labels, boxes, preds[preds.unit_id.str[1:].astype(int) < 4], boxes.assign(score=1.).head(2), covered, images)
    assert result.overall == 1 and result.table.n_truth.sum() == 8
    with pytest.raises(ValueError, match="of 4 labelled units have no prediction.*was the last batch dropped"):
        score(SPEC, labels, boxes, preds[preds.unit_id.str[1:].astype(int) < 3], None, covered, images)


def test_unfused_and_unaveraged_predictions_are_refused():
    labels, boxes = mini_truth()
    preds, found = labels.rename(columns={"value": "prob"}), boxes.assign(score=1., run_id="a", fold=0)
    with pytest.raises(ValueError, match="predicted more than once; average the runs first"): score(SPEC, labels, boxes, pd.concat([preds, preds]), found)
    with pytest.raises(ValueError, match="has boxes of 2 runs; fuse them first"): score(SPEC, labels, boxes, preds, pd.concat([found, found.assign(run_id="b")]))


def test_not_finite_is_refused():
    truth, preds = make_case(3)
    with pytest.raises(ValueError, match="preds: row 0 is not finite"): average_precision(truth, preds.assign(score=np.nan))
    with pytest.raises(ValueError, match="truth: row 0 is not finite"): average_precision(truth.assign(x1=np.inf), preds)
    with pytest.raises(ValueError, match="missing column"): average_precision(truth, preds.drop(columns="score"))
    with pytest.raises(ValueError, match="not finite"): join_units(*[mini_truth()[0].assign(prob=np.nan)]*2)


def test_every_metric_knows_its_direction():
    for name, metric in METRICS.items():
        assert metric.direction in ("max", "min") and metric.about
        assert metric.better(1., metric.worst) if metric.direction == "max" else metric.better(0., metric.worst)
        assert not metric.better(np.nan, metric.worst)
    assert get_metric("loss").better(.1, .2) and get_metric("siim_map").better(.2, .1)


def test_matches_serve_all_thresholds():
    truth, preds = make_case(8)
    matches = match_boxes(truth, preds)
    for iou in (.3, .5, .7): pd.testing.assert_frame_equal(matched_precision(matches, iou), average_precision(truth, preds, iou))
