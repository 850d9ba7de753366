"Classifier and detector: losses, predictions, weights from files, refusals."
import copy
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cxrkit.boxes import pairwise_iou
from cxrkit.classifier import ClassifierConfig, aggregate_studies, build_classifier, load_classifier, masked_binary_cross_entropy, masked_cross_entropy, timm
from cxrkit.detector import (Detector, DetectorConfig, build_detector, check_detector_size, detection_rows, effdet, effdet_config, from_effdet, load_detector, n_anchors,
                             to_effdet)
from cxrkit.modes import refresh_batch_norm
from cxrkit.weights import save_weights

STUDY = ClassifierConfig("test_efficientnet", (64, 96), ("negative", "typical"))
D0 = DetectorConfig(size=128)


def cls_batch(n=3, size=(64, 96), n_labels=2):
    return {"image": torch.randint(0, 256, (n, 1, *size), dtype=torch.uint8), "image_id": [f"i{k}" for k in range(n)], "target": torch.eye(n_labels)[torch.arange(n) % n_labels]}


def det_batch(n=2, size=(128, 128)):
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    found = torch.tensor([[40., 20., 120., 60.]]), torch.tensor([0])
    pairs = [found if k == 0 else none for k in range(n)]
    return {"image": torch.randint(0, 256, (n, 1, *size), dtype=torch.uint8), "image_id": [f"i{k}" for k in range(n)], "boxes": [b for b, _ in pairs], "box_labels": [l for _, l in pairs]}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_detector(D0)


# ---------------------------------------------------------------- classifier

def test_losses_against_torch():
    logits, target = torch.randn(5, 3), torch.eye(3)[[0, 1, 2, 0, 1]]
    torch.testing.assert_close(masked_cross_entropy(logits, target, .1), torch.nn.functional.cross_entropy(logits, target.argmax(1), label_smoothing=.1))
    half = target.clone(); half[1] = float("nan"); half[3, 0] = float("nan")
    torch.testing.assert_close(masked_cross_entropy(logits, half), torch.nn.functional.cross_entropy(logits[[0, 2, 4]], target[[0, 2, 4]].argmax(1)))
    known = ~half.isnan()
    torch.testing.assert_close(masked_binary_cross_entropy(logits, half), torch.nn.functional.binary_cross_entropy_with_logits(logits[known], target[known]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 1000))
def test_not_annotated_values_have_no_gradient(n, labels, seed):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 2, (n, labels), generator=g).float()
    hidden = torch.rand(n, labels, generator=g) < .5
    logits = torch.randn(n, labels, generator=g, requires_grad=True)
    masked_binary_cross_entropy(logits, target.masked_fill(hidden, float("nan"))).backward()
    assert logits.grad.isfinite().all() and (logits.grad[hidden] == 0).all()


@pytest.mark.parametrize("head, in_chans", [("multiclass", 3), ("binary", 1), ("binary", 3)])
def test_classifier_contract(head, in_chans):
    task, batch = build_classifier(replace(STUDY, head=head, in_chans=in_chans)), cls_batch()
    task(batch)["loss"].backward()
    rows = task.predict(batch)
    assert list(rows.columns) == ["image_id", "label", "prob"] and len(rows) == 6 and rows.prob.between(0, 1).all() and rows.prob.dtype == np.float64
    assert rows.image_id.tolist() == ["i0", "i0", "i1", "i1", "i2", "i2"] and rows.label.tolist() == ["negative", "typical"]*3
    assert (head == "binary") or np.allclose(rows.groupby("image_id").prob.sum(), 1)
    assert task.training


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet", "test_convnext"])
def test_other_families(backbone):
    task, batch = build_classifier(replace(STUDY, backbone=backbone, size=(96, 96))), cls_batch(size=(96, 96))
    assert task(batch)["loss"].isfinite() and len(task.predict(batch)) == 6


def test_predictions_do_not_depend_on_the_batch():
    task, batch = build_classifier(STUDY), cls_batch(4)
    alone = pd.concat([task.predict({"image": batch["image"][k:k+1], "image_id": batch["image_id"][k:k+1]}) for k in range(4)], ignore_index=True)
    pd.testing.assert_frame_equal(task.predict(batch), alone, atol=1e-5)


def test_weights_from_timm_files(tmp_path):
    "A file as timm publishes it: 1000 classes, three channels; and the same in a .pth by another trainer."
    from safetensors.torch import save_file
    donor = timm.create_model("test_efficientnet", pretrained=False, num_classes=1000)
    save_file(donor.state_dict(), tmp_path/"model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in donor.state_dict().items()}}, tmp_path/"model.pth")
    for path in (tmp_path/"model.safetensors", tmp_path/"model.pth"):
        three, one = (build_classifier(replace(STUDY, in_chans=c, pretrained=str(path))) for c in (3, 1))
        assert torch.equal(three.net.conv_stem.weight, donor.conv_stem.weight)
        torch.testing.assert_close(one.net.conv_stem.weight, donor.conv_stem.weight.sum(1, keepdim=True))
        assert "classifier.weight" in three.weights_from and path.name in three.weights_from
    with pytest.raises(ValueError, match="does not fit ResNet"): build_classifier(replace(STUDY, backbone="test_resnet", pretrained=str(tmp_path/"model.pth")))
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.pth"): build_classifier(replace(STUDY, pretrained="nowhere.pth"))


def test_which_weights_are_used_is_said(capsys, monkeypatch):
    build_classifier(STUDY)
    assert "classifier test_efficientnet: random weights" in capsys.readouterr().out
    def offline(name, pretrained=False, **kwargs):
        if pretrained: raise OSError("no route to the hub")
        return make(name, pretrained=False, **kwargs)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match="could not be fetched .*no route to the hub.*give a local file"): build_classifier(replace(STUDY, pretrained="hub"))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: make(name, pretrained=False, **kwargs))
    build_classifier(replace(STUDY, pretrained="hub"))
    assert "ImageNet weights from the hub" in capsys.readouterr().out


def test_a_file_rebuilds_its_classifier(tmp_path):
    task, batch = build_classifier(replace(STUDY, head="binary", in_chans=1, mean=(.5,), std=(.3,))), cls_batch()
    save_weights(task, tmp_path/"a.safetensors")
    same = load_classifier(tmp_path/"a.safetensors")
    assert asdict(same.config) == asdict(task.config)
    pd.testing.assert_frame_equal(same.predict(batch), task.predict(batch))
    with pytest.raises(ValueError, match="describes classifier, expected a detector"): load_detector(tmp_path/"a.safetensors")


@pytest.mark.parametrize("changes, message", [({"labels": ("a", "a")}, "expected distinct names"), ({"labels": ()}, "expected distinct names"), ({"in_chans": 2}, "expected 1 or 3"),
                                              ({"size": (64,)}, "expected an int or"), ({"std": (0.,)}, "positive standard deviations"), ({"backbone": "resnet5O"}, "near names: .*resnet50")])
def test_classifier_refusals(changes, message):
    with pytest.raises(ValueError, match=message): build_classifier(replace(STUDY, **changes))


def test_study_aggregation():
    images = pd.DataFrame({"image_id": ["a", "b", "c"], "study_id": ["s", "s", "t"]})
    preds = pd.DataFrame({"image_id": ["c", "a", "b"], "label": "typical", "prob": [.2, .4, .8]})
    assert aggregate_studies(preds, images).prob.tolist() == pytest.approx([.6, .2])
    assert aggregate_studies(preds, images, "max").prob.tolist() == [.8, .2]
    with pytest.raises(ValueError, match="1 image ids are not in images, such as 'z'"): aggregate_studies(preds.assign(image_id=["z", "a", "b"]), images)
    with pytest.raises(ValueError, match="expected 'mean' or 'max'"): aggregate_studies(preds, images, "median")


# ---------------------------------------------------------------- detector

def test_detector_contract(detector):
    batch = det_batch()
    out = detector(batch)
    assert out["loss"].requires_grad and {"class_loss", "box_loss"} <= set(out)
    rows = detector.predict(batch)
    assert list(rows.columns) == ["image_id", "label", "score", "x1", "y1", "x2", "y2"]
    assert set(rows.label) == {"opacity"} and set(rows.image_id) == {"i0", "i1"} and rows.score.dtype == np.float64 and rows.x1.dtype == np.float32
    assert (rows.x1 < rows.x2).all() and (rows.y1 < rows.y2).all() and rows[["x1", "y1"]].min().min() >= 0 and rows[["x2", "y2"]].max().max() <= 128
    assert detector.training


def test_row_order_is_by_score_within_images(detector):
    for _, part in detector.predict(det_batch()).groupby("image_id"): assert (part.score.diff().dropna() <= 0).all()


@pytest.mark.parametrize("size, per_image", [((128, 128), 9*341), ((128, 256), 9*682), ((512, 512), 49104)])
def test_number_of_anchors(size, per_image):
    assert n_anchors(size) == per_image
    assert len(effdet.anchors.Anchors.from_config(effdet_config(DetectorConfig(size=size))).boxes) == per_image


def test_more_candidates_than_anchors():
    "Small images have fewer anchors than effdet's 5,000 candidates; topk must not fail."
    task = build_detector(replace(D0, max_candidates=5000))
    assert task.net.config.max_detection_points == 9*341 and len(task.predict(det_batch())) > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_sizes(height, width):
    if height % 128 == width % 128 == 0: assert check_detector_size((height, width)) == (height, width)
    else:
        with pytest.raises(ValueError, match=r"expected multiples of 128 \(height, width\), got .*nearest: \(\d+, \d+\)"): check_detector_size((height, width))


def test_boxes_to_effdet_and_back():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((20, 2, 2))*[256, 128]+np.array([0, 1])[:, None], axis=1)
    boxes = torch.tensor(corners.reshape(20, 4), dtype=torch.float32)
    yxyx, labels = to_effdet([boxes], [torch.zeros(20, dtype=torch.long)], (256, 512))
    assert torch.equal(yxyx[0], boxes[:, [1, 0, 3, 2]]) and (labels[0] == 1).all()
    out = torch.cat([boxes, torch.rand(20, 1), torch.ones(20, 1)], 1)
    back, scores, found = from_effdet(out, (256, 512), 0.)
    np.testing.assert_allclose(back, boxes.numpy()); assert (found == 0).all() and (scores == out[:, 4].numpy()).all()


@pytest.mark.parametrize("boxes, labels, message", [
    (torch.zeros(1, 4), torch.zeros(1), "expected x1 < x2"), (torch.tensor([[1., 2, 3, 4]]), torch.zeros(2), "expected .n,4. with n labels"), (torch.zeros(4), torch.zeros(1), "expected .n,4."), (torch.tensor([[1., 2, 3, 140]]), torch.zeros(1), "were x and y swapped")])
def test_bad_boxes_in_a_batch(boxes, labels, message):
    with pytest.raises(ValueError, match=message): to_effdet([boxes], [labels], (128, 128))


def test_loss_counts_empty_images(detector):
    batch = det_batch(2)
    empty = {**batch, "boxes": [torch.zeros(0, 4)]*2, "box_labels": [torch.zeros(0, dtype=torch.long)]*2}
    out = detector(empty)
    out["loss"].backward()
    gradient = detector.net.class_net.predict.conv_pw.bias.grad
    assert out["loss"].isfinite() and gradient.abs().sum() > 0 and out["box_loss"] == 0
    detector.zero_grad()


def test_predictions_are_independent_of_batch_size(detector):
    batch = det_batch(3)
    whole = detector.predict(batch)
    alone = pd.concat([detector.predict({"image": batch["image"][k:k+1], "image_id": batch["image_id"][k:k+1]}) for k in range(3)], ignore_index=True)
    assert len(whole) == len(alone) and whole.image_id.tolist() == alone.image_id.tolist()
    np.testing.assert_allclose(whole.score, alone.score, atol=1e-4)


def test_copies_are_independent(detector):
    "Averaged weights (EMA) are a deep copy: same predictions, other memory, anchors along."
    twin, batch = copy.deepcopy(detector), det_batch()
    pd.testing.assert_frame_equal(twin.predict(batch), detector.predict(batch))
    assert twin.labeler.anchors is twin.anchors and twin.anchors is not detector.anchors
    assert not any("anchors" in k for k in detector.state_dict())


def test_detector_files(tmp_path, detector):
    from safetensors.torch import save_file
    save_weights(detector, tmp_path/"d0.safetensors")
    batch, same = det_batch(), load_detector(tmp_path/"d0.safetensors")
    pd.testing.assert_frame_equal(same.predict(batch), detector.predict(batch))
    bench = {f"model.model.{k}": v for k, v in detector.net.state_dict().items()} | {"model.anchors.boxes": torch.zeros(5, 4)}
    torch.save(bench, tmp_path/"bench.pth")                          # as a trainer around effdet's bench saves it
    other = build_detector(replace(D0, labels=("nodule", "mass"), pretrained=str(tmp_path/"bench.pth")))
    assert "class layer random" in other.weights_from and torch.equal(other.net.fpn.state_dict()["cell.0.fnode.0.combine.edge_weights"], detector.net.fpn.state_dict()["cell.0.fnode.0.combine.edge_weights"])
    donor = timm.create_model("tf_efficientnet_b0", pretrained=False)
    save_file(donor.state_dict(), tmp_path/"b0.safetensors")
    started = build_detector(replace(D0, in_chans=1, pretrained=str(tmp_path/"b0.safetensors")))
    assert torch.equal(started.net.backbone.state_dict()["blocks.0.0.conv_dw.weight"], donor.state_dict()["blocks.0.0.conv_dw.weight"])
    broken = {k: v for k, v in donor.state_dict().items() if k != "blocks.1.0.bn1.weight"}
    save_file(broken, tmp_path/"broken.safetensors")
    with pytest.raises(ValueError, match="1 missing: blocks.1.0.bn1.weight"): build_detector(replace(D0, pretrained=str(tmp_path/"broken.safetensors")))


def test_hub_weights_without_a_network(monkeypatch, capsys, detector):
    def offline(*args, **kwargs): raise OSError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(RuntimeError, match="weights of tf_efficientdet_d0 could not be fetched.*give a local file"): build_detector(replace(D0, pretrained="hub"))
    coco = Detector(replace(D0, labels=tuple(map(str, range(90))))).net.state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: coco)
    task = build_detector(replace(D0, pretrained="hub"))
    assert "COCO weights from the hub, class layer random" in capsys.readouterr().out
    assert torch.equal(task.net.backbone.conv_stem.weight, coco["backbone.conv_stem.weight"])


@pytest.mark.parametrize("changes, message", [({"size": 200}, r"nearest: \(128, 128\), \(128, 256\), \(256, 128\), \(256, 256\)"), ({"labels": ()}, "expected distinct names"),
                                              ({"backbone": "tf_efficientdet_d8"}, "near names: tf_efficientdet_d"), ({"bn_momentum": 0.}, "bn_momentum"), ({"in_chans": 4}, "expected 1 or 3")])
def test_detector_refusals(changes, message):
    with pytest.raises(ValueError, match=message): build_detector(replace(D0, **changes))


def test_rows_of_nothing():
    rows = detection_rows(torch.zeros(2, 100, 6), ["a", "b"], D0)
    assert len(rows) == 0 and list(rows.columns) == ["image_id", "label", "score", "x1", "y1", "x2", "y2"] and rows.score.dtype == np.float64


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["efficientdetv2_dt", "tf_efficientdet_d1"])
def test_other_detectors_learn_one_box(backbone):
    torch.manual_seed(0)
    task = build_detector(DetectorConfig(backbone, size=(128, 256)))
    box = torch.tensor([[150., 20., 240., 50.]])
    image = torch.randint(60, 100, (2, 1, 128, 256), dtype=torch.uint8); image[0, 0, 20:50, 150:240] += 100
    batch = {"image": image, "image_id": ["a", "b"], "boxes": [box, torch.zeros(0, 4)], "box_labels": [torch.tensor([0]), torch.zeros(0, dtype=torch.long)]}
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    for step in range(25):
        optimizer.param_groups[0]["lr"] = 2e-3*min(1, (step+1)/10)
        optimizer.zero_grad(); task(batch)["loss"].backward(); torch.nn.utils.clip_grad_norm_(task.parameters(), 10.); optimizer.step()
    refresh_batch_norm(task, [batch])
    best = task.predict(batch).sort_values("score").iloc[-1]
    assert best.image_id == "a" and pairwise_iou([best[["x1", "y1", "x2", "y2"]].tolist()], box.numpy())[0, 0] > .5
