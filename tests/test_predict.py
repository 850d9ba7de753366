"Prediction with made-up networks whose answers are known: sizes, counts, batches, views, mistakes."
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cxrkit.metrics import average_precision
from cxrkit.predict import average_views, check_views, fuse_views, load_task, predict_table, predict_views, prediction_card, to_original

BOX = ['x1', 'y1', 'x2', 'y2']


@dataclass(frozen=True)
class Config:
    size: tuple
    labels: tuple
    task: str


class Finder(torch.nn.Module):
    "A detector that boxes the bright pixels of each image."
    def __init__(self, size):
        super().__init__()
        self.config = Config(size, ('opacity',), 'detector')

    def predict(self, batch):
        found = []
        for image_id, image in zip(batch['image_id'], batch['image'][:, 0].numpy()):
            ys, xs = np.nonzero(image > 128)
            if len(ys): found.append((image_id, 'opacity', .9, xs.min(), ys.min(), xs.max()+1, ys.max()+1))
        return pd.DataFrame(found, columns=['image_id', 'label', 'score', *BOX])


class Brightness(torch.nn.Module):
    "A classifier: left half brighter than right half."
    def __init__(self, size, labels=('left', 'right')):
        super().__init__()
        self.config = Config(size, labels, 'classifier')

    def predict(self, batch):
        half = batch['image'].shape[-1]//2
        left, right = (batch['image'][..., s].float().mean((1, 2, 3)) for s in (slice(half), slice(half, None)))
        p = (left/(left+right)).numpy()
        return pd.DataFrame({'image_id': np.repeat(batch['image_id'], 2), 'label': list(self.config.labels)*len(p), 'prob': np.stack([p, 1-p], 1).ravel()})


def made_up(n, size, seed=0, empty=()):
    "Images of different shapes in a cache of one size, each with one bright box, and the truth."
    rng = np.random.default_rng(seed)
    images = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], study_id=[f's{k//2}' for k in range(n)], patient_id=[f'p{k//2}' for k in range(n)], path='',
                               height=rng.integers(200, 2000, n), width=rng.integers(200, 2000, n), split='train'))
    cache, truth = {}, []
    for k, row in enumerate(images.itertuples()):
        cache[row.image_id] = np.full(size, 30, np.uint8)
        if k in empty: continue
        x, y = rng.integers(8, size[1]//2), rng.integers(8, size[0]//2)
        w, h = rng.integers(12, size[1]//2-8), rng.integers(12, size[0]//2-8)
        cache[row.image_id][y:y+h, x:x+w] = 220
        ratio = np.array([row.width/size[1], row.height/size[0]]*2)
        truth.append((row.image_id, 'opacity', *(np.array([x, y, x+w, y+h])*ratio)))
    return images, cache, pd.DataFrame(truth, columns=['image_id', 'label', *BOX])


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.tuples(st.integers(64, 140), st.integers(64, 140)), st.integers(1, 12),
       st.lists(st.sampled_from(['identity', 'hflip', 'vflip', 'rot180', 'scale0.8', 'shift0.05,-0.05']), min_size=1, max_size=4, unique=True), st.integers(0, 99))
def test_boxes_of_any_shape_come_back_to_the_truth(n, size, batch_size, tta, seed):
    images, cache, truth = made_up(n, size, seed)
    preds, coverage = predict_table(Finder(size), images, cache, tuple(tta), batch_size, 'r', 3)
    assert len(coverage) == n and (preds.fold == 3).all() and len(preds) == n
    assert average_precision(truth, preds, .8, coverage).ap.iloc[0] == 1
    sizes = images.set_index('image_id').loc[preds.image_id]
    assert (preds[BOX] >= 0).all(None) and (preds.x2 <= sizes.width.to_numpy()).all() and (preds.y2 <= sizes.height.to_numpy()).all()


@pytest.mark.parametrize('n,batch_size', [(7, 3), (8, 3), (9, 3), (1, 16), (16, 16), (17, 16)])
def test_every_image_is_predicted_for_every_batch_size(n, batch_size):
    images, cache, _ = made_up(n, (64, 96))
    task = Brightness((64, 96))
    preds, coverage = predict_table(task, images, cache, 'identity hflip', batch_size)
    assert preds.unit_id.nunique() == n == len(coverage) and len(preds) == 2*n
    one, _ = predict_table(task, images, cache, 'identity hflip', 1)
    pd.testing.assert_frame_equal(preds, one)
    assert np.allclose(preds.prob, .5), 'a view and its mirror image cancel out'


def test_probabilities_of_a_study_are_those_of_its_images():
    images, cache, _ = made_up(6, (64, 96))
    task = Brightness((64, 96))
    by_image, _ = predict_table(task, images, cache, 'identity')
    by_study, _ = predict_table(task, images, cache, 'identity', level='study')
    expected = by_image.assign(study=images.set_index('image_id').loc[by_image.unit_id].study_id.to_numpy()).groupby(['study', 'label']).prob.mean()
    assert np.allclose(by_study.set_index(['unit_id', 'label']).prob.loc[expected.index], expected) and (by_study.level == 'study').all()
    with pytest.raises(ValueError, match="level: expected 'image' or 'study', got 'patient'"):
        predict_table(task, images, cache, level='patient')


def test_images_without_finds_make_no_rows_but_are_covered():
    images, cache, truth = made_up(3, (64, 96), empty=(0, 1, 2))
    for tta in ('identity', 'identity hflip scale0.8'):
        preds, coverage = predict_table(Finder((64, 96)), images, cache, tta, truth=truth.iloc[:0])
        assert len(preds) == 0 and len(coverage) == 3 and list(preds.columns)[:4] == ['run_id', 'fold', 'image_id', 'label']


def test_a_box_that_clipping_leaves_nothing_of_is_dropped():
    images = pd.DataFrame(dict(image_id=['a'], height=[100], width=[200]))
    rows = pd.DataFrame([('a', 'opacity', .5, -9, 3, 0, 20), ('a', 'opacity', .4, 10, 10, 300, 20)], columns=['image_id', 'label', 'score', *BOX])
    out = to_original(rows, images, (50, 50))
    assert out[BOX].to_numpy().tolist() == [[40, 20, 200, 40]]


def test_rows_of_strangers_missing_rows_and_nan_are_refused():
    images, cache, _ = made_up(4, (64, 96))

    class Broken(Brightness):
        def __init__(self, change): super().__init__((64, 96)); self.change = change
        def predict(self, batch): return self.change(super().predict(batch))
    for change, message in [(lambda r: r.assign(image_id='x'), "rows for .'x'., which are not among"), (lambda r: r.iloc[1:], '4 images × 2 labels = 8 rows, got 7'),
                            (lambda r: r.assign(prob=np.nan), 'prob is nan for image i0'), (lambda r: pd.concat([r.iloc[:1], r.iloc[:-1]]), '7 distinct')]:
        with pytest.raises(ValueError, match=message):
            predict_table(Broken(change), images, cache)
    with pytest.raises(ValueError, match='batch_size'):
        predict_table(Brightness((64, 96)), images, cache, batch_size=0)


def test_a_classifier_goes_through_its_file(tmp_path):
    from cxrkit.classifier import ClassifierConfig, build_classifier
    from cxrkit.train import seed_all
    from cxrkit.weights import save_weights
    seed_all(0)
    task = build_classifier(ClassifierConfig('test_efficientnet', (64, 96), ('none', 'some'))).eval()
    sha = save_weights(task, tmp_path/'model.safetensors', {'epoch': 3, 'metric': 'siim_map', 'score': .5, 'fold': 1})
    images, cache, _ = made_up(5, (64, 96))
    first, _ = predict_table(task, images, cache, batch_size=5)
    again, _ = predict_table(load_task(tmp_path/'model.safetensors'), images, cache, batch_size=2)
    pd.testing.assert_frame_equal(first, again, rtol=1e-5)
    card = prediction_card(tmp_path/'model.safetensors', 'identity hflip')
    assert card['sha256'] == sha and card['n_views'] == 2 and card['size'] == [64, 96] and (card['epoch'], card['score'], card['fold']) == (3, .5, 1)


def test_an_untrained_detector_goes_through_its_file_and_all_views(tmp_path):
    from cxrkit.detector import DetectorConfig, build_detector
    from cxrkit.train import seed_all
    from cxrkit.weights import save_weights
    seed_all(0)
    task = build_detector(DetectorConfig('tf_efficientdet_d0', (128, 256), min_score=0.)).eval()
    save_weights(task, tmp_path/'model.safetensors', {})
    images, cache, _ = made_up(2, (128, 256))
    preds, coverage = predict_table(load_task(tmp_path/'model.safetensors'), images, cache, 'identity hflip scale0.8', batch_size=2)
    sizes = images.set_index('image_id').loc[preds.image_id]
    assert len(coverage) == 2 and len(preds) and (preds.x2 <= sizes.width.to_numpy()).all() and (preds.y2 <= sizes.height.to_numpy()).all()
    with pytest.raises(FileNotFoundError): load_task(tmp_path/'nothing.safetensors')
    torch.save({}, tmp_path/'x.pth')


def test_weights_of_others_are_not_a_task(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(1)}, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='describes no task'): load_task(tmp_path/'other.safetensors')


def test_average_and_fusion_of_one_view_change_nothing():
    rows = pd.DataFrame(dict(image_id=['a', 'b'], label='none', prob=[.2, .8], view='identity'))
    assert average_views(rows).prob.tolist() == [.2, .8]
    images, cache, truth = made_up(3, (64, 96))
    rows = to_original(predict_views(Finder((64, 96)), images, cache, 'identity'), images, (64, 96))
    assert fuse_views(rows)[BOX].equals(rows[BOX])
    assert check_views(truth, rows, fuse_views(rows)).tolist() == [1, 1]
