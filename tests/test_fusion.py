"""Box fusion against ensemble-boxes, torchvision and a plain Python soft-NMS, ties and odd cases included."""
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from ensemble_boxes import nms, non_maximum_weighted, weighted_boxes_fusion
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.blend import count_boxes, fuse_boxes
from cxrkit.fusion_kernels import AVERAGES
from cxrkit.kernels import group_rows, sorted_rows

pytestmark = pytest.mark.filterwarnings("ignore:skip=")
SIDES = ["x1", "y1", "x2", "y2"]


def make_preds(seed, n_images=3, n_sources=3, n_boxes=12, grid=0, n_labels=1):
    "Random boxes within 0…1; `grid` > 0 makes coordinates and scores coarse, so that ties and exact overlaps abound."
    rng = np.random.default_rng(seed)
    rows = []
    for source in range(n_sources):
        for image in range(n_images):
            for _ in range(rng.integers(0, n_boxes+1)):
                corner, side, score = rng.random(2)*.6, .1+rng.random(2)*.3, rng.random()
                if grid: corner, side, score = np.floor(corner*grid)/grid, np.ceil(side*.9*grid)/grid, np.ceil(score*5)/5
                rows.append((f"m{source}", 0, f"i{image}", f"l{rng.integers(n_labels)}", score, *corner, *(corner+side)))
    preds = pd.DataFrame(rows, columns=["run_id", "fold", "image_id", "label", "score", *SIDES])
    return preds.astype({c: float for c in ["score", *SIDES]})


def lists(preds, image, n_sources, labels):
    "One image in the reference's form."
    parts = [preds[(preds.image_id == image) & (preds.run_id == f"m{s}")] for s in range(n_sources)]
    return [p[SIDES].to_numpy() for p in parts], [p.score.to_numpy() for p in parts], [p.label.map(labels.index).to_numpy(float) for p in parts]


def compare(preds, fused, reference, n_sources=3):
    "The reference's result on every image, in order."
    labels = sorted(preds.label.unique())
    for image in preds.image_id.unique():
        mine = fused[fused.image_id == image]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            boxes, scores, codes = reference(*lists(preds, image, n_sources, labels))
        assert len(mine) == len(boxes)
        np.testing.assert_allclose(mine.score, scores, rtol=0, atol=1e-6)
        np.testing.assert_allclose(mine[SIDES].to_numpy(), boxes, rtol=0, atol=1e-6)
        assert mine.label.map(labels.index).tolist() == list(codes)


cases = dict(seed=st.integers(0, 10**6), grid=st.sampled_from([0, 8, 20]), iou=st.sampled_from([.2, .3, 1/3, .5, .55, .6, .75]), n_labels=st.integers(1, 3))


@settings(max_examples=30, deadline=None)
@given(**cases, average=st.sampled_from(AVERAGES), weights=st.sampled_from([None, [1., 2., .5], [3., 1., 1.]]), skip=st.sampled_from([0., .3]))
def test_wbf_equals_reference(seed, grid, iou, n_labels, average, weights, skip):
    preds = make_preds(seed, grid=grid, n_labels=n_labels)
    if preds.run_id.nunique() < 3: return # the reference needs to be told how many models there are
    given_weights = None if weights is None else dict(zip(("m0", "m1", "m2"), weights))
    fused = fuse_boxes(preds, "wbf", iou, skip, given_weights, average, ties="reference")
    kind = dict(conf_type="avg", allows_overflow=True) if average == "overflow" else dict(conf_type=average)
    compare(preds, fused, lambda b, s, l: weighted_boxes_fusion(b, s, l, weights=weights, iou_thr=iou, skip_box_thr=skip, **kind))


@settings(max_examples=15, deadline=None)
@given(**cases, weights=st.sampled_from([None, [1., 2., .5]]))
def test_nmw_equals_reference(seed, grid, iou, n_labels, weights):
    preds = make_preds(seed, grid=grid, n_labels=n_labels)
    if preds.run_id.nunique() < 3: return
    fused = fuse_boxes(preds, "nmw", iou, weights=weights and dict(zip(("m0", "m1", "m2"), weights)))
    compare(preds, fused, lambda b, s, l: non_maximum_weighted(b, s, l, weights=weights, iou_thr=iou))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), iou=st.sampled_from([.2, 1/3, .5, .75]), n_labels=st.integers(1, 3))
def test_nms_equals_reference(seed, iou, n_labels):
    preds = make_preds(seed, n_labels=n_labels)
    fused = fuse_boxes(preds, "nms", iou)
    def reference(boxes, scores, codes): # its nms crashes on a model without boxes
        full = [i for i, b in enumerate(boxes) if len(b)]
        return nms([boxes[i] for i in full], [scores[i] for i in full], [codes[i] for i in full], iou_thr=iou)
    compare(preds, fused, reference)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), grid=st.sampled_from([0, 8, 20]), iou=st.sampled_from([.2, .25, .5, .75]))
def test_nms_equals_torchvision_with_ties(seed, grid, iou):
    import torch
    pytest.importorskip("cxrkit.vision_ops").ensure_torchvision()
    from torchvision.ops import nms as torch_nms
    preds = make_preds(seed, n_images=1, grid=grid)
    keep = torch_nms(torch.tensor(preds[SIDES].to_numpy()), torch.tensor(preds.score.to_numpy()), iou)
    fused = fuse_boxes(preds, "nms", iou, ties="stable")
    np.testing.assert_allclose(fused[SIDES], preds[SIDES].to_numpy()[keep], atol=1e-6)


def plain_soft_nms(boxes, scores, iou, linear, sigma, floor):
    "Bodla et al. 2017, algorithm 1, as written."
    left, out = [(s, *b) for s, b in zip(scores, boxes)], []
    while left:
        lead = max(range(len(left)), key=lambda i: left[i][0])
        s, *m = left.pop(lead)
        out.append((s, *m))
        again = []
        for score, *b in left:
            w, h = min(m[2], b[2])-max(m[0], b[0]), min(m[3], b[3])-max(m[1], b[1])
            inter = max(w, 0)*max(h, 0)
            o = inter/((m[2]-m[0])*(m[3]-m[1])+(b[2]-b[0])*(b[3]-b[1])-inter)
            score *= (1-o if o > iou else 1) if linear else math.exp(-(o*o)/sigma)
            again.append((score, *b))
        left = again
    return np.array([r for r in out if r[0] > floor]).reshape(-1, 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), grid=st.sampled_from([0, 8, 20]), linear=st.booleans(), iou=st.sampled_from([.3, .5]), sigma=st.sampled_from([.1, .5]))
def test_soft_nms_follows_the_paper(seed, grid, linear, iou, sigma):
    preds = make_preds(seed, n_images=2, grid=grid)
    fused = fuse_boxes(preds, "soft_nms", iou, soft=("linear" if linear else "gaussian", sigma, .001))
    for image in preds.image_id.unique():
        mine, one = fused[fused.image_id == image], preds[preds.image_id == image]
        want = plain_soft_nms(one[SIDES].to_numpy(), one.score.to_numpy(), iou, linear, sigma, .001)
        np.testing.assert_allclose(mine[["score", *SIDES]].to_numpy(), want, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), far=st.sampled_from([1., 4000., 1e5]), small=st.sampled_from([1e-3, .05, 1.]), iou=st.sampled_from([.01, .2, .5, .9]))
def test_rough_search_never_decides(seed, far, small, iou):
    "Tiny boxes far from the origin, where float32 is at its worst, fuse exactly as in float64."
    preds = make_preds(seed, grid=16)
    preds[SIDES] = preds[SIDES]*small*100+far
    if preds.run_id.nunique() < 3: return
    fused = fuse_boxes(preds, "nms", iou, ties="stable")
    for image in preds.image_id.unique():
        rows = preds[preds.image_id == image].sort_values("score", ascending=False, kind="stable")[SIDES].to_numpy()
        kept = []
        for box in rows:
            inter = [max(min(box[2], k[2])-max(box[0], k[0]), 0)*max(min(box[3], k[3])-max(box[1], k[1]), 0) for k in kept]
            area = lambda b: (b[2]-b[0])*(b[3]-b[1])
            if all(i/(area(box)+area(k)-i) <= iou for i, k in zip(inter, kept)): kept.append(box)
        np.testing.assert_array_equal(fused.loc[fused.image_id == image, SIDES].to_numpy(), np.float32(kept))


def test_threads_do_not_change_the_result():
    rng = np.random.default_rng(0)
    n = 60_000
    corner = rng.random((n, 2))*500
    preds = pd.DataFrame({"run_id": rng.choice(["a", "b", "c"], n), "fold": 0, "image_id": rng.integers(0, 300, n).astype(str), "label": "opacity", "score": rng.random(n),
                          "x1": corner[:, 0], "y1": corner[:, 1], "x2": corner[:, 0]+80, "y2": corner[:, 1]+60})
    for method in ("wbf", "nms", "nmw", "soft_nms"):
        one, four = fuse_boxes(preds, method, .5, n_threads=1), fuse_boxes(preds, method, .5, n_threads=4)
        pd.testing.assert_frame_equal(one, four)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=300), st.integers(1, 4))
def test_sort_is_a_stable_sort(scores, n_groups):
    scores = np.array(scores, float)
    offsets, rows = group_rows(np.arange(len(scores)) % n_groups, n_groups)
    order = sorted_rows(scores, rows, offsets)
    for g in range(n_groups):
        mine = rows[offsets[g]:offsets[g+1]]
        assert order[offsets[g]:offsets[g+1]].tolist() == mine[np.argsort(-scores[mine], kind="stable")].tolist()


def test_out_of_fold_counts_only_the_runs_of_the_fold():
    rows = [("a-f0", 0, "x", .8), ("b-f0", 0, "x", .8), ("a-f1", 1, "y", .6), ("b-f1", 1, "y", .6), ("a-f1", 1, "z", .6)]
    preds = pd.DataFrame([(r, f, i, "opacity", s, 0., 0, 10, 10) for r, f, i, s in rows], columns=["run_id", "fold", "image_id", "label", "score", *SIDES])
    fused = fuse_boxes(preds, "wbf", .5).set_index("image_id")
    assert fused.score.round(6).to_dict() == {"x": .8, "y": .6, "z": .3}
    assert fused.fold.to_dict() == {"x": 0, "y": 1, "z": 1}


def test_test_predictions_count_every_source():
    rows = [("a-f0", 0, "x", .8), ("a-f1", 1, "x", .8), ("a-f1", 1, "y", .8)]
    preds = pd.DataFrame([(r, f, i, "opacity", s, 0., 0, 10, 10) for r, f, i, s in rows], columns=["run_id", "fold", "image_id", "label", "score", *SIDES])
    assert fuse_boxes(preds, "wbf", .5).set_index("image_id").score.round(6).to_dict() == {"x": .8, "y": .4}


def test_coverage_decides_who_could_have_found_it():
    preds = pd.DataFrame([("a", 0, "x", "opacity", .8, 0., 0, 10, 10), ("b", 0, "y", "opacity", .8, 0., 0, 10, 10)], columns=["run_id", "fold", "image_id", "label", "score", *SIDES])
    coverage = pd.DataFrame([("a", "x", 0), ("b", "y", 0)], columns=["run_id", "image_id", "fold"])
    assert fuse_boxes(preds, "wbf", .5).score.tolist() == [.4, .4]
    assert fuse_boxes(preds, "wbf", .5, coverage=coverage).score.tolist() == [.8, .8]
    with pytest.raises(ValueError, match="has boxes on images that it does not list"): fuse_boxes(preds, "wbf", .5, coverage=coverage.head(1))


def test_zero_scores_give_no_nan():
    preds = make_preds(1).assign(score=0.)
    for method in ("wbf", "nmw", "nms", "soft_nms"): assert np.isfinite(fuse_boxes(preds, method, .5)[["score", *SIDES]].to_numpy()).all()


@pytest.mark.parametrize("change, message", [
    (dict(x1=np.nan), "expected a finite box and score"), (dict(x2=-1.), "expected x1 < x2 and y1 < y2"), (dict(x1=.5, x2=.5), "expected x1 < x2"),
    (dict(score=1.5), "a score within 0…1"), (dict(x1=-.1), "no negative coordinate")])
def test_bad_rows_are_named(change, message):
    preds = make_preds(2).reset_index(drop=True)
    for column, value in change.items(): preds.loc[5, column] = value
    with pytest.raises(ValueError, match=message) as e: fuse_boxes(preds, "nms", .5)
    assert "the first is row 5" in str(e.value)
    with pytest.warns(UserWarning, match="dropped"): fuse_boxes(preds, "nms", .5, invalid="drop")


def test_boxes_outside_their_image_are_refused():
    preds = make_preds(3)
    images = pd.DataFrame({"image_id": preds.image_id.unique(), "height": 1, "width": 1})
    fuse_boxes(preds, "nms", .5, images=images)
    with pytest.raises(ValueError, match="corners within the image"): fuse_boxes(preds.assign(x2=preds.x2+1), "nms", .5, images=images)


def test_nothing_in_nothing_out():
    empty = make_preds(0).head(0)
    for method in ("wbf", "nmw", "nms", "soft_nms"):
        out = fuse_boxes(empty, method, .5)
        assert len(out) == 0 and list(out.columns) == ["run_id", "fold", "image_id", "label", "score", *SIDES]


def test_wrong_settings_are_explained():
    preds = make_preds(0)
    with pytest.raises(ValueError, match="method: expected one of nms, soft_nms, wbf, nmw, got 'wbff'"): fuse_boxes(preds, "wbff", .5)
    with pytest.raises(ValueError, match="iou: expected a number within 0…1, got 50"): fuse_boxes(preds, "nms", 50)
    with pytest.raises(ValueError, match="average: expected one of avg"): fuse_boxes(preds, "wbf", .5, average="mean")
    with pytest.raises(ValueError, match="weights: expected 3 numbers"): fuse_boxes(preds, "wbf", .5, weights=[1, 2])


def test_counts_in_and_out():
    preds = make_preds(0)
    counts = count_boxes(preds, fuse_boxes(preds, "nms", .3))
    assert counts.n_in.sum() == len(preds) and (counts.n_out <= counts.n_in).all() and (counts.best_in == counts.best_out).all()
