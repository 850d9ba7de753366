"Datasets: boxes follow the image, seeds, refusals."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cxrkit.datasets import (AUGMENTS, EpochSampler, albumentations, Normalize, RadiographDataset, as_size, check_same_statistics, collate, label_targets, make_augment,
                             make_loader, network_boxes, seed_augment)

A = albumentations()
SIZE = (96, 160)


def images(n=6, height=480, width=320):
    return pd.DataFrame({"image_id": [f"i{k}" for k in range(n)], "study_id": [f"s{k//2}" for k in range(n)], "patient_id": [f"p{k//4}" for k in range(n)],
                         "path": "x", "height": height, "width": width, "split": "train"})


def boxes(rows): return pd.DataFrame(rows, columns=["image_id", "label", "x1", "y1", "x2", "y2"]).assign(rater=None)


def cache(n=6): return {f"i{k}": np.random.default_rng(k).integers(0, 256, SIZE, dtype=np.uint8) for k in range(n)}


NAMES = ("opacity",)


def test_boxes_scaled_per_axis():
    out = network_boxes(images(), boxes([("i0", "opacity", 32, 48, 64, 480)]), SIZE)
    np.testing.assert_allclose(out[["x1", "y1", "x2", "y2"]].to_numpy(float), [[16, 9.6, 32, 96]], rtol=1e-5)


def test_negative_coordinate_is_clipped():
    data = RadiographDataset(images(), cache(), SIZE, boxes=boxes([("i3", "opacity", -3.6, 10, 100, 600)]), names=NAMES)
    np.testing.assert_allclose(data[3]["boxes"], [[0, 2, 50, 96]], rtol=1e-5)


@pytest.mark.parametrize("row", [(330, 10, 400, 50), (-50, 10, -1, 50), (10, 490, 50, 600)])
def test_boxes_outside_are_refused(row):
    with pytest.raises(ValueError, match="entirely outside"): RadiographDataset(images(), cache(), SIZE, boxes=boxes([("i0", "opacity", *row)]), names=NAMES)


@pytest.mark.parametrize("row", [(50, 10, 10, 50), (10, 50, 50, 10), (10, 10, 10, 50), (np.nan, 10, 20, 50)])
def test_inverted_boxes_are_refused(row):
    with pytest.raises(ValueError): RadiographDataset(images(), cache(), SIZE, boxes=boxes([("i0", "opacity", *row)]), names=NAMES)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(AUGMENTS), st.integers(0, 2**31), st.integers(0, 3))
def test_augmented_boxes_are_always_valid(strength, seed, n):
    rng = np.random.default_rng(seed)
    corners = rng.random((n, 2, 2))
    rows = [("i0", "opacity", *(np.r_[c.min(0)*.9, c.max(0)*.9+.1]*[320, 480, 320, 480])) for c in corners]
    data = RadiographDataset(images(), cache(), SIZE, boxes=boxes(rows), names=NAMES, augment=strength, seed=seed)
    item = data[0]
    assert item["image"].dtype == np.uint8 and item["image"].shape == SIZE
    assert item["boxes"].dtype == np.float32 and item["boxes"].shape == (len(item["box_labels"]), 4) and len(item["boxes"]) <= n
    assert (item["boxes"][:, 2:] > item["boxes"][:, :2]).all() and (item["boxes"] >= 0).all() and (item["boxes"] <= [160, 96, 160, 96]).all()


@pytest.mark.parametrize("strength", AUGMENTS)
def test_boxes_follow_their_object(strength):
    "A bright rectangle on black: after any augmentation its box holds nearly all of the brightness, and little else."
    image = np.zeros(SIZE, np.uint8); image[20:60, 90:130] = 200
    data = RadiographDataset(images(), {f"i{k}": image for k in range(6)}, SIZE, boxes=boxes([("i0", "opacity", 180, 100, 260, 300)]), names=NAMES, augment=strength)
    for epoch in range(12):
        data.set_epoch(epoch)
        item = data[0]
        if not len(item["boxes"]): continue
        x1, y1, x2, y2 = item["boxes"][0].round().astype(int)
        bright = item["image"] > (float(item["image"].max())+float(item["image"].min()))/2
        inside = bright[y1:y2, x1:x2]
        assert inside.sum() > .85*bright.sum() and inside.mean() > .65, (strength, epoch, item["boxes"])


def test_flip_is_a_flip():
    "A lone horizontal flip moves x and leaves y alone, on a non-square image."
    flip = A.Compose([A.HorizontalFlip(p=1)], bbox_params=A.BboxParams("pascal_voc", label_fields=["box_labels"]))
    data = RadiographDataset(images(), cache(), SIZE, boxes=boxes([("i0", "opacity", 32, 48, 64, 480)]), names=NAMES, augment=flip)
    np.testing.assert_allclose(data[0]["boxes"], [[160-32, 9.6, 160-16, 96]], rtol=1e-4)
    assert (data[0]["image"] == cache()["i0"][:, ::-1]).all()


def test_samples_depend_on_seed_epoch_and_index_alone():
    make = lambda seed=0: RadiographDataset(images(), cache(), SIZE, augment="strong", seed=seed)
    one, other = make(), make()
    for i in (5, 0, 3): other[i]                                     # another order of access
    assert all((one[i]["image"] == other[i]["image"]).all() for i in range(6))
    other.set_epoch(1)
    assert any((one[i]["image"] != other[i]["image"]).any() for i in range(6))
    assert any((one[i]["image"] != make(1)[i]["image"]).any() for i in range(6))


def test_loader_is_the_same_for_any_number_of_workers():
    data = RadiographDataset(images(), cache(), SIZE, augment="medium")
    read = lambda workers: [(b["image_id"], b["image"].numpy().tobytes()) for b in make_loader(data, 4, shuffle=True, seed=3, workers=workers)]
    assert read(0) == read(2)
    first = read(0)
    data.set_epoch(1)
    assert [i for i, _ in read(0)] != [i for i, _ in first] and sorted(sum((i for i, _ in read(0)), [])) == sorted(data.image_ids)


def test_loader_leaves_global_random_numbers_alone():
    data = RadiographDataset(images(), cache(), SIZE, augment="strong")
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    list(make_loader(data, 2, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_last_batch():
    data = RadiographDataset(images(5), cache(), SIZE)
    assert [len(b["image_id"]) for b in make_loader(data, 2)] == [2, 2, 1]
    assert [len(b["image_id"]) for b in make_loader(data, 2, drop_last=True)] == [2, 2]
    with pytest.raises(ValueError, match="no batch would be left"): make_loader(data, 8, drop_last=True)


def test_steps_of_an_augmentation_are_independent():
    both = A.Compose([A.HorizontalFlip(p=.5), A.InvertImg(p=.5)])
    probe, seen = np.uint8([[0, 100]]), set()
    for i in range(60):
        seed_augment(both, (0, 0, i))
        seen.add(tuple(both(image=probe)["image"][0].tolist()))
    assert len(seen) == 4                                            # neither, one, the other, both


def test_labels_and_boxes_together():
    labels = pd.DataFrame({"level": "image", "unit_id": [f"i{k}" for k in range(6)], "label": "opacity", "value": [1., 0, 1, 0, np.nan, 0]})
    data = RadiographDataset(images(), cache(), SIZE, labels=labels, boxes=boxes([("i0", "opacity", 10, 10, 50, 50)]), names=NAMES)
    batch = collate([data[0], data[4]])
    assert batch["target"].shape == (2, 1) and batch["target"][1].isnan() and [len(b) for b in batch["boxes"]] == [1, 0]
    assert "6 images of (96, 160), 1 boxes, opacity 2" in repr(data)


def test_label_table_refusals():
    labels = pd.DataFrame({"level": "study", "unit_id": ["s0", "s1", "s2"], "label": "typical", "value": 1.})
    np.testing.assert_array_equal(label_targets(images(), labels, ("typical",)), np.ones((6, 1)))
    with pytest.raises(ValueError, match=r"expected rows of one level .* got \['study', 'image'\]"): label_targets(images(), pd.concat([labels, labels.assign(level="image")]), ("typical",))
    with pytest.raises(ValueError, match="1 rows repeat a unit and label, such as 's0' 'typical'"): label_targets(images(), pd.concat([labels, labels[:1]]), ("typical",))
    with pytest.raises(ValueError, match="names: expected the labels in the order"): RadiographDataset(images(), cache(), SIZE, labels=labels)


@pytest.mark.parametrize("size, message", [((96,), "expected an int or"), (0, "expected an int or"), ((96.5, 160), "whole pixels"), ("96", "whole pixels")])
def test_sizes(size, message):
    with pytest.raises(ValueError, match=message): as_size(size)


def test_normalisation():
    image = torch.randint(0, 256, (2, 1, *SIZE), dtype=torch.uint8)
    colours = Normalize(SIZE, (.485, .456, .406), (.229, .224, .225))(image)
    torch.testing.assert_close(colours[:, 1], (image[:, 0]/255-.456)/.224)
    assert Normalize(SIZE, in_chans=1)(image).shape == (2, 1, *SIZE)
    with pytest.raises(ValueError, match="expected 1 or 3 means"): Normalize(SIZE, (.4, .5))


def test_a_cache_of_another_size_is_found_out_late_too():
    odd = {**cache(), "i4": np.zeros((160, 96), np.uint8)}           # one image transposed
    data = RadiographDataset(images(), odd, SIZE)
    with pytest.raises(ValueError, match=r"image 'i4': expected one channel of \(96, 160\)"): data[4]


def test_empty_fold():
    with pytest.raises(ValueError, match="expected at least one row"): RadiographDataset(images(0), cache(), SIZE)
