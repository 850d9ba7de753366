"Mistakes of training and prediction, planted as their authors made them; numbers as in the list of logged mistakes."
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tinytask import TinyTask, config, dataset, evaluate, train

from cxrkit.boxes import clip_boxes
from cxrkit.metrics import average_precision
from cxrkit.predict import average_views, check_border, check_unseen, check_views, fuse_views, predict_table, predict_views, prediction_card, to_original
from cxrkit.schedule import TrainConfig, check_lr, history, lr_curve, scaled_lr
from cxrkit.train import fit

BOX = ['x1', 'y1', 'x2', 'y2']


class Finder(torch.nn.Module):
    "A detector that boxes the bright pixels of each image."
    def __init__(self, size, threshold=128):
        super().__init__()
        self.config, self.threshold = type('Config', (), dict(size=size, labels=('opacity',), task='detector'))(), threshold

    def predict(self, batch):
        found = []
        for image_id, image in zip(batch['image_id'], batch['image'][:, 0].numpy()):
            ys, xs = np.nonzero(image > self.threshold)
            if len(ys): found.append((image_id, 'opacity', .9, xs.min(), ys.min(), xs.max()+1, ys.max()+1))
        return pd.DataFrame(found, columns=['image_id', 'label', 'score', *BOX])


def chests(n=8, size=(96, 128)):
    "Images of different shapes, each with one bright box on one side, and the truth."
    rng = np.random.default_rng(0)
    images = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], study_id=[f's{k}' for k in range(n)], patient_id=[f'p{k}' for k in range(n)], path='',
                               height=rng.integers(300, 900, n), width=rng.integers(300, 900, n), split='train'))
    cache, truth = {}, []
    for row in images.itertuples():
        x, y = rng.integers(5, 20), rng.integers(5, 30)
        cache[row.image_id] = np.full(size, 30, np.uint8)
        cache[row.image_id][y:y+40, x:x+30] = 220
        truth.append((row.image_id, 'opacity', *(np.array([x, y, x+30, y+40])*np.array([row.width/size[1], row.height/size[0]]*2))))
    return images, cache, pd.DataFrame(truth, columns=['image_id', 'label', *BOX])


def test_guard_09_tta_boxes_not_flipped_back_when_training():
    "AP .2523 with one view became .0720 with eight."
    images, cache, truth = chests()
    rows = predict_views(Finder((96, 128)), images, cache, 'identity hflip')
    flipped = rows.view == 'hflip'
    forgotten = rows.assign(x1=np.where(flipped, 128-rows.x2, rows.x1), x2=np.where(flipped, 128-rows.x1, rows.x2))
    forgotten = to_original(forgotten, images, (96, 128))
    with pytest.raises(ValueError, match=r'with identity alone; the worst is hflip with 0\.000: are its boxes mapped back'):
        check_views(truth, forgotten, fuse_views(forgotten))
    preds, _ = predict_table(Finder((96, 128)), images, cache, 'identity hflip', truth=truth)
    assert average_precision(truth, preds).ap.iloc[0] == 1


def test_guard_10_clip_to_512_at_size_1024():
    "np.clip(boxes, 0, 512) survived the change of image size: leaderboard .211, then .128."
    rng = np.random.default_rng(0)
    images = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(60)], height=1024, width=1024))
    corner = rng.uniform(0, 700, (60, 2))
    boxes = np.c_[corner, corner+rng.uniform(100, 320, (60, 2))]
    preds = pd.DataFrame(boxes, columns=BOX).assign(image_id=images.image_id, label='opacity', score=.5)
    with pytest.raises(ValueError, match=r'end with \w\d at exactly 0\.500 of the \w+, inside the image: they were clipped to another size'):
        check_border(preds.assign(**{c: preds[c].clip(0, 512) for c in BOX}), images)
    report = check_border(preds, images)
    assert list(report.columns) == ['at_border', 'inside_at', 'inside_share']
    rows = predict_views(Finder((1024, 768)), images.iloc[:1], {'i0': np.pad(np.full((600, 500), 255, np.uint8), ((424, 0), (268, 0)))}, 'identity')
    assert rows[BOX].to_numpy().tolist() == [[268, 424, 768, 1024]], 'the size comes from the image'


def test_guard_16_submitted_without_tta_when_training(tmp_path):
    "The submission used one view; nothing said so."
    train(tmp_path, epochs=2)
    card = prediction_card(tmp_path/'model.safetensors', 'identity')
    assert card['n_views'] == 1 and card['views'] == ['identity'] and len(card['sha256']) == 64
    assert card['metric'] == 'mean_auc' and 0 <= card['score'] <= 1 and card['epoch'] in (1, 2)
    assert prediction_card(tmp_path/'model.safetensors', 'identity hflip')['n_views'] == 2


def test_guard_19_cv_over_other_folds_than_those_left_out():
    "trn_fold stayed [0] while the score was taken over all folds."
    images, cache, truth = chests(10)
    folds = images[['image_id', 'patient_id']].assign(fold=np.arange(10) % 5)
    check_unseen(images[folds.fold == 2], folds, 2)
    with pytest.raises(ValueError, match="8 of 10 belong to other folds than 2, such as 'i0'; the model was trained on them"):
        check_unseen(images, folds, 2)


def test_guard_22_seeds_not_fixed_conclusion_from_noise(tmp_path):
    "Without seeds .2559, .2512 and .2495 were three 'results'."
    first, again, other = train(tmp_path/'a', epochs=2), train(tmp_path/'b', epochs=2), train(tmp_path/'c', epochs=2, seed=1)
    assert first.drop(columns='seconds').equals(again.drop(columns='seconds')), 'same seed, same numbers'
    assert not first.train_loss.equals(other.train_loss), 'another seed shows the spread'
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


def test_guard_26_teacher_without_annotation_when_training():
    "The teacher was given the student's image."
    from cxrkit.classifier import ClassifierConfig, DistilledClassifier, build_classifier
    student, teacher = (build_classifier(ClassifierConfig('test_efficientnet', (64, 64), ('a', 'b'))) for _ in range(2))
    image = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match='teacher and student see the same image'):
        DistilledClassifier(student, teacher)({'image': image, 'teacher_image': image, 'target': torch.eye(2), 'image_id': ['a', 'b']})


def test_guard_27_batch_changed_without_learning_rate(tmp_path):
    "Halving the batch and keeping lr, or the reverse, cost three versions."
    small = TrainConfig(batch_size=8)
    assert scaled_lr(replace(small, batch_size=16)) == 2*scaled_lr(small) == scaled_lr(replace(small, accumulate=2)) == scaled_lr(small, world=2)
    logs = [train(tmp_path/str(b), epochs=1, batch_size=b, schedule='constant', warmup_epochs=0) for b in (4, 8)]
    assert np.isclose(2*logs[0].lr.iloc[0], logs[1].lr.iloc[0])


def test_guard_28_no_box_found_anywhere():
    "An empty result of non-maximum suppression crashed the run."
    images, cache, truth = chests()
    preds, coverage = predict_table(Finder((96, 128), threshold=255), images, cache, 'identity hflip scale0.8', truth=truth)
    assert len(preds) == 0 and set(BOX) <= set(preds.columns) and len(coverage) == len(images)
    assert average_precision(truth, preds, coverage=coverage).ap.iloc[0] == 0
    half = {k: v if k in ('i0', 'i1') else np.zeros_like(v) for k, v in cache.items()}
    assert set(predict_table(Finder((96, 128)), images, half)[0].image_id) == {'i0', 'i1'}


def test_guard_30_plateau_waits_for_a_loss_to_rise():
    "mode='max' on a loss: the learning rate fell while training went well."
    falling = [1., .8, .6, .5, .45, .4]
    assert history(falling, TrainConfig(metric='loss', schedule='plateau', patience=1))[2] == 1
    assert history(falling[::-1], TrainConfig(metric='loss', schedule='plateau', patience=1))[2] < 1
    assert history(falling[::-1], TrainConfig(metric='siim_map', schedule='plateau', patience=1))[2] == 1
    with pytest.raises(ValueError, match="no metric is called 'val_score'"):
        TrainConfig(metric='val_score')


def test_guard_35_model_built_outside_the_fold_loop(tmp_path):
    "All folds trained the same weights; each saw its validation images in an earlier fold."
    task = TinyTask()
    train(tmp_path/'fold0', task=task, epochs=1)
    with pytest.raises(ValueError, match='this task was already trained .* build a new one'):
        train(tmp_path/'fold1', task=task, epochs=1)
    copied = TinyTask()
    copied.load_state_dict(task.state_dict())                     # the same mistake, better hidden
    with pytest.raises(ValueError, match=r'mean_auc is 0\.990 before any training, beyond start_limit=0\.9: these weights have seen the validation images'):
        fit(copied, dataset(), None, config(start_limit=.9), tmp_path/'fold2', lambda task: {'mean_auc': .99})


def test_guard_36_number_of_tta_steps_rounded_down():
    "steps = n // batch left the last images out; shapes no longer fitted."
    images, cache, truth = chests(7)
    rows = predict_views(Finder((96, 128)), images, cache, 'identity hflip', batch_size=3)
    assert rows.groupby('view').image_id.nunique().tolist() == [7, 7]
    views = pd.concat([pd.DataFrame(dict(image_id=list('abcdefg'), label='none', prob=.5, view=v)) for v in ('identity', 'hflip')], ignore_index=True)
    with pytest.raises(ValueError, match=re.escape('expected 7 image-label pairs × 2 views = 14 rows, got 13; a view was skipped')):
        average_views(views.iloc[:-1])


def test_guard_38_nan_loss(tmp_path):
    "val_loss was nan in stage 2; days passed before anyone knew since when."
    class Log(TinyTask):
        def forward(self, batch):
            out = super().forward(batch)
            return {**out, 'loss': out['loss']+(torch.log(torch.zeros(()))*0 if 'p13' in batch['image_id'] else 0)}
    with pytest.raises(FloatingPointError, match=r'epoch 1, step \d: loss is nan .*images of the batch: .*p13'):
        train(tmp_path, task=Log())
    assert not (tmp_path/'model.safetensors').exists()

    class Explodes(TinyTask):
        def forward(self, batch):
            out = super().forward(batch)
            return {**out, 'loss': out['loss']+torch.sqrt((self.net[-1].bias*0).sum())}      # finite loss, infinite gradient
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan"):
        train(tmp_path/'gradient', task=Explodes())
    with pytest.raises(ValueError, match='mean_auc=nan; expected a number'):
        fit(TinyTask(), dataset(), None, config(), tmp_path/'score', lambda task: {'mean_auc': float('nan')})


def test_guard_40_schedule_that_killed_learning(tmp_path):
    "lr = max(lr*exp(-.1), 1e-6), meant per epoch, applied per step."
    with pytest.raises(ValueError, match='is the decay applied per step instead of per epoch'):
        check_lr(np.maximum(5e-3*np.exp(-.1*np.arange(30*100)), 1e-6))
    with pytest.raises(ValueError, match='too small to move a weight'):
        train(tmp_path, lr=1e-7, reference_batch=256)
    assert lr_curve(TrainConfig(epochs=3), 10).shape == (30,), 'the curve can be looked at before training'
