"Mistakes of real competitors that datasets, classifier and detector must refuse; numbers as in the list of guards."
import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxrkit import detector as detector_module
from cxrkit.classifier import ClassifierConfig, DistilledClassifier, build_classifier, distillation_loss, load_classifier
from cxrkit.datasets import RadiographDataset, albumentations, check_same_statistics, collate, label_targets, make_loader, network_boxes
from cxrkit.detector import DetectorConfig, build_detector, check_effdet_layout, detection_rows, from_effdet, to_effdet
from cxrkit.weights import load_state, load_weights, read_state, save_weights

A = albumentations()
SIZE = (64, 96)
STUDY = ClassifierConfig("test_efficientnet", SIZE, ("negative", "typical"))
NAMES = ("opacity",)


def chest_images(n=8, height=400, width=600):
    ids = [f"i{k}" for k in range(n)]
    return pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids, "path": "x", "height": height, "width": width, "split": "train"})


def boxes(*rows): return pd.DataFrame(rows, columns=["image_id", "label", "x1", "y1", "x2", "y2"]).assign(rater=None)


def cache(n=8, size=SIZE): return {f"i{k}": np.random.default_rng(k).integers(40, 220, size, dtype=np.uint8) for k in range(n)}


def batch(n=2, size=SIZE):
    return {"image": torch.randint(0, 256, (n, 1, *size), dtype=torch.uint8), "image_id": [f"i{k}" for k in range(n)], "target": torch.eye(2)[[k % 2 for k in range(n)]]}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_detector(DetectorConfig(size=(128, 256)))


# ---- 1: labels joined by position

def test_guard_01_labels_are_joined_by_id():
    labels = pd.DataFrame({"level": "image", "unit_id": [f"i{k}" for k in range(8)], "label": "opacity", "value": [float(k % 2) for k in range(8)]})
    shuffled = labels.sample(frac=1, random_state=1)                 # a position join would now be wrong
    np.testing.assert_array_equal(label_targets(chest_images(), shuffled, NAMES), label_targets(chest_images(), labels, NAMES))
    with pytest.raises(ValueError, match="8 of 8 image ids of the images have no label row"): label_targets(chest_images(), labels.assign(unit_id=[f"t{k}" for k in range(8)]), NAMES)


# ---- 2 to 4: normalisation

def test_guard_02_validation_not_divided_by_255():
    "As made: training images are scaled to 0…1, validation images are not."
    train = RadiographDataset(chest_images(), cache(), SIZE, augment=A.Compose([A.Normalize(mean=0., std=1.)]))
    with pytest.raises(ValueError, match="expected uint8, got float32; leave normalisation .* to the task"): train[0]
    scaled = RadiographDataset(chest_images(), {k: (v/255).astype(np.uint8) for k, v in cache().items()}, SIZE)
    with pytest.raises(ValueError, match="training and validation look different"): check_same_statistics(scaled, RadiographDataset(chest_images(), cache(), SIZE))
    with pytest.raises(ValueError, match="expected uint8 images, got torch.float32"): build_classifier(STUDY)({**batch(), "image": batch()["image"]/255})


def test_guard_03_normalize_in_validation_only():
    train = RadiographDataset(chest_images(), cache(), SIZE, augment="light")
    valid = RadiographDataset(chest_images(), cache(), SIZE, augment=A.Compose([A.Normalize()]))
    with pytest.raises(ValueError, match="leave normalisation"): check_same_statistics(train, valid)
    check_same_statistics(train, RadiographDataset(chest_images(), cache(), SIZE))


def test_guard_04_normalisation_cannot_be_forgotten_and_travels_with_the_weights(tmp_path):
    task = build_classifier(STUDY)
    seen = []
    task.net.conv_stem.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    task.predict({**batch(), "image": torch.full((2, 1, *SIZE), 255, dtype=torch.uint8)})
    assert seen[0].mean() == pytest.approx((1-.449)/.226, rel=1e-4)
    save_weights(task, tmp_path/"a.safetensors")
    with pytest.raises(ValueError, match=r"mean: the file was trained with \[0.449\], this task has \[0.5\]"): load_weights(build_classifier(replace(STUDY, mean=(.5,))), tmp_path/"a.safetensors")


# ---- 5 to 8, 10: coordinates

def test_guard_05_swapped_x_and_y(detector):
    "As made: y1, x1, y2, x2 handed to a detector that wants x first; it trained for a week at mAP 0."
    truth = torch.tensor([[150., 20., 240., 50.]])
    pair = {"image": torch.zeros(1, 1, 128, 256, dtype=torch.uint8), "image_id": ["a"], "box_labels": [torch.tensor([0])]}
    detector({**pair, "boxes": [truth]})
    with pytest.raises(ValueError, match="were x and y swapped"): detector({**pair, "boxes": [truth[:, [1, 0, 3, 2]]]})
    with pytest.raises(ValueError, match="entirely outside their image.*swapped"):
        RadiographDataset(chest_images(), cache(), SIZE, boxes=boxes(("i0", "opacity", 30., 450., 100., 590.)), names=NAMES)   # x 450…590 of 600 written as y


def test_guard_05_truth_as_prediction_comes_back(detector):
    "Truth through effdet's own targets and decoder, on a non-square image: the same box."
    truth = torch.tensor([[150., 20., 240., 50.]])
    yxyx, labels = to_effdet([truth], [torch.tensor([0])], (128, 256))
    classes, offsets, _ = detector.labeler.batch_label_anchors(yxyx, labels)
    flat_classes, flat = torch.cat([c.reshape(-1) for c in classes]), torch.cat([o.reshape(-1, 4) for o in offsets])
    hits = torch.nonzero(flat_classes == 0)[:, 0]
    out = detector_module.generate_detections(torch.full((len(hits), 1), 5.), flat[hits], detector.anchors.boxes, hits, torch.zeros(len(hits), dtype=torch.long), None, None, 10)
    found, scores, names = from_effdet(out, (128, 256), .5)
    np.testing.assert_allclose(found, truth.numpy(), atol=.01); assert names.tolist() == [0]


def test_guard_06_one_place_owns_the_exchange():
    "Flipping in the dataset and again in the task cancels out; so only the detector may reorder coordinates."
    folder = Path(detector_module.__file__).parent
    def swaps(path):
        orders = [ast.literal_eval(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.List) and len(n.elts) == 4 and all(isinstance(e, ast.Constant) for e in n.elts)]
        return [1, 0, 3, 2] in orders or ["y1", "x1", "y2", "x2"] in orders
    assert [p.name for p in folder.rglob("*.py") if swaps(p)] == ["detector.py"]
    pair = {"image": torch.zeros(1, 1, 128, 256, dtype=torch.uint8), "image_id": ["a"], "box_labels": [torch.tensor([0])], "boxes": [torch.tensor([[150., 20., 240., 50.]])]}
    twice = to_effdet(to_effdet(pair["boxes"], pair["box_labels"], (128, 256))[0], pair["box_labels"], (256, 256))[0][0]
    assert twice.tolist() == pair["boxes"][0].tolist()               # what the second flip would have done, silently


@pytest.mark.parametrize("order", [[1, 0, 3, 2, 4, 5], "xywh", "label"])
def test_guard_07_another_version_returns_another_layout(monkeypatch, order):
    "As made: the output was taken for xywh, or came y first, depending on the installed effdet."
    original = detector_module.generate_detections
    def other(*args, **kwargs):
        out = original(*args, **kwargs)
        if order == "xywh": out[:, 2:4] -= out[:, :2].clone()
        elif order == "label": out[:, 5] -= 1
        else: out = out[:, order]
        return out
    monkeypatch.setattr(detector_module, "generate_detections", other)
    check_effdet_layout.cache_clear()
    with pytest.raises(RuntimeError, match="effdet .*: expected output x1, y1, x2, y2, score, label.*install effdet>=0.4.1"): build_detector(DetectorConfig(size=128))
    monkeypatch.undo()
    check_effdet_layout.cache_clear()
    assert check_effdet_layout()


def test_guard_08_width_and_height_swapped():
    "As made: dim0 of a meta file was taken for the width."
    found = boxes(("i0", "opacity", 450., 30., 590., 100.))           # right edge of a 400 × 600 (height × width) image
    np.testing.assert_allclose(network_boxes(chest_images(), found, SIZE)[["x1", "y1", "x2", "y2"]].to_numpy(float), [[72, 4.8, 94.4, 16]], rtol=1e-5)
    with pytest.raises(ValueError, match="entirely outside their image.*height and width, swapped"): network_boxes(chest_images(height=600, width=400), found, SIZE)


def test_guard_10_clipping_follows_the_size():
    "As made: boxes were clipped to 0…512 although the network saw 1024 px."
    out = torch.tensor([[900., 600., 1000., 1010., .9, 1.], [1000., 700., 1100., 1200., .8, 1.]])
    rows = detection_rows(out[None], ["a"], DetectorConfig(size=1024))
    assert rows[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == [[900, 600, 1000, 1010], [1000, 700, 1024, 1024]]
    wide = detection_rows(out[None], ["a"], DetectorConfig(size=(1024, 1152)))
    assert wide.x2.tolist() == [1000, 1100] and wide.y2.max() == 1024


# ---- 14, 15, 17, 18, 37: weights and versions

def test_guard_14_prefixes_and_lenient_loading(tmp_path):
    "As made: keys began with model.model., strict=False loaded nothing, and the model was trained again."
    task, fresh = build_classifier(STUDY), build_classifier(STUDY)
    torch.save({f"model.model.{k}": v for k, v in task.net.state_dict().items()}, tmp_path/"a.pth")
    load_weights(fresh, tmp_path/"a.pth")
    assert torch.equal(fresh.net.conv_stem.weight, task.net.conv_stem.weight)
    wrong = {f"encoder.{k}": v for k, v in task.net.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit Classifier .* missing: conv_stem.weight \(near: encoder.conv_stem.weight\).* unexpected: encoder.conv_stem.weight"): load_state(fresh, wrong)


def test_guard_15_both_libraries_in_one_process(tmp_path, detector):
    "timm's features and effdet's pyramid must fit; weights saved by another version are refused by name."
    assert detector.predict({"image": torch.zeros(1, 1, 128, 256, dtype=torch.uint8), "image_id": ["a"]}).image_id.eq("a").all()
    assert len(build_classifier(STUDY).predict(batch())) == 4
    state = {k.replace("blocks.0.0.", "blocks.0."): v for k, v in detector.state_dict().items()}       # as an old timm flattened them
    with pytest.raises(ValueError, match="missing: backbone.blocks.0.0.* version of timm"): load_state(detector, state)


@pytest.mark.parametrize("trained, fed", [((96, 96), (128, 128)), ((128, 128), (96, 96))])
def test_guard_17_classifier_fed_another_size(tmp_path, trained, fed):
    "As made: trained at 384, fed 512 in the submission (and in 18 the other way round)."
    task = build_classifier(replace(STUDY, size=trained))
    save_weights(task, tmp_path/"a.safetensors")
    assert load_classifier(tmp_path/"a.safetensors").config.size == trained                             # the file knows
    with pytest.raises(ValueError, match=f"expected images .b, 1, {trained[0]}, {trained[1]}., the size this network was trained for, got .2, 1, {fed[0]}"): task.predict(batch(size=fed))
    with pytest.raises(ValueError, match=rf"size: the file was trained with \[{trained[0]}, {trained[1]}\], this task has \[{fed[0]}, {fed[1]}\]"): build_classifier(replace(STUDY, size=fed), weights=tmp_path/"a.safetensors")


def test_guard_18_larger_net_on_a_smaller_cache():
    with pytest.raises(ValueError, match=r"expected images of \(128, 128\) .* got \(96, 96\)"): RadiographDataset(chest_images(), cache(size=(96, 96)), 128)


def test_guard_37_inference_builds_the_class_that_was_trained(tmp_path):
    task = build_classifier(replace(STUDY, head="binary", labels=("none",), in_chans=1))
    save_weights(task, tmp_path/"a.safetensors")
    images = batch()
    pd.testing.assert_frame_equal(load_classifier(tmp_path/"a.safetensors").predict(images), task.predict(images))
    with pytest.raises(ValueError, match=r"backbone: the file was trained with test_efficientnet, this task has test_resnet"): build_classifier(replace(task.config, backbone="test_resnet"), weights=tmp_path/"a.safetensors")
    with pytest.raises(ValueError, match="head: the file was trained with binary, this task has multiclass"): build_classifier(STUDY, weights=tmp_path/"a.safetensors")


# ---- 25: rows per box

def test_guard_25_one_row_an_image():
    per_box = chest_images().loc[[0, 0, 1, 2]]
    with pytest.raises(ValueError, match="1 rows repeat an image, such as 'i0'; expected one row an image .is this a table with a row per box"): RadiographDataset(per_box, cache(), SIZE)


# ---- 26, 39: teacher and student

def test_guard_26_teacher_without_annotation_in_models():
    student, teacher = build_classifier(STUDY), build_classifier(STUDY)
    pair = DistilledClassifier(student, teacher)
    with pytest.raises(ValueError, match="teacher and student see the same image"): pair({**batch(), **{"image": (b := batch())["image"], "teacher_image": b["image"].clone()}})
    with pytest.raises(ValueError, match="expected teacher_image"): pair(batch())


def test_guard_39_distillation_on_probabilities():
    student = (torch.randn(4, 3)*8).requires_grad_()
    teacher = torch.randn(4, 3)*8
    with pytest.raises(ValueError, match="expected logits, got values that all lie within 0…1"): distillation_loss(student.sigmoid(), teacher.sigmoid())
    assert distillation_loss(teacher, teacher) == 0
    distillation_loss(student, -student.detach()).backward()
    assert student.grad.abs().min() > 1e-4                               # not saturated, however certain the student is
    with pytest.raises(ValueError, match="expected equal shapes"): distillation_loss(student, teacher[:2])


# ---- 28: nothing found

def test_guard_28_images_without_boxes(detector):
    "As made: the first image without a detection ended the submission run."
    none = detection_rows(torch.zeros(2, 100, 6), ["a", "b"], detector.config)
    assert len(none) == 0 and list(none.columns) == ["image_id", "label", "score", "x1", "y1", "x2", "y2"]
    strict = build_detector(replace(detector.config, min_score=.99))
    rows = strict.predict({"image": torch.zeros(2, 1, 128, 256, dtype=torch.uint8), "image_id": ["a", "b"]})
    assert len(rows) == 0
    data = RadiographDataset(chest_images(), cache(size=(128, 256)), (128, 256), boxes=boxes(("i0", "opacity", 10, 10, 100, 100)), names=NAMES, augment="strong")
    empty = collate([data[3], data[5]])
    assert [tuple(b.shape) for b in empty["boxes"]] == [(0, 4), (0, 4)] and detector(empty)["loss"].isfinite()
