"What the lesson on training cannot show: kills, full disks, processes, and the arithmetic of updates."
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from tinytask import TinyTask, cache, config, dataset, evaluate, images, labels, train

from cxrkit.datasets import RadiographDataset
from cxrkit.schedule import TrainConfig, check_lr, history, lr_curve, scaled_lr
from cxrkit.train import fit
from cxrkit.weights import load_meta, read_state

TINY = str(Path(__file__).with_name('tinytask.py'))


def same_weights(a, b):
    a, b = read_state(a/'model.safetensors'), read_state(b/'model.safetensors')
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(log): return log.drop(columns='seconds').to_csv()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Folder and log of an undisturbed run."
    out = tmp_path_factory.mktemp('whole')
    return out, train(out)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, tmp_path):
    out, log = whole
    assert rows(train(tmp_path/'again')) == rows(log) and (tmp_path/'again/model.safetensors').read_bytes() == (out/'model.safetensors').read_bytes()
    assert rows(train(tmp_path/'other', seed=1)) != rows(log)


def test_workers_do_not_change_the_result(whole, tmp_path):
    assert rows(train(tmp_path, workers=2)) == rows(whole[1]) and same_weights(tmp_path, whole[0])


@pytest.mark.parametrize('epoch', [1, 3, 4])
def test_interrupted_after_any_epoch_and_resumed_bit_for_bit(whole, tmp_path, epoch):
    calls = []

    def cut(task):
        calls.append(1)
        if len(calls) > epoch: raise KeyboardInterrupt
        return evaluate(task)
    with pytest.raises(KeyboardInterrupt):
        fit(TinyTask(), dataset(), dataset(slice(28, 40), None), config(), tmp_path, cut)
    log = train(tmp_path, task=TinyTask(seed=99))                  # the resumed state replaces whatever the new task began with
    assert rows(log) == rows(whole[1]) and (tmp_path/'model.safetensors').read_bytes() == (whole[0]/'model.safetensors').read_bytes()


def test_kill_9_and_resume_bit_for_bit(tmp_path):
    epochs = 25
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NO_ALBUMENTATIONS_UPDATE': '1'}
    process = subprocess.Popen([sys.executable, TINY, str(tmp_path/'killed'), str(epochs)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path/'killed/state.pt').exists(): time.sleep(.05)
    time.sleep(.2)
    process.send_signal(signal.SIGKILL); process.wait()
    done = len(torch.load(tmp_path/'killed/state.pt', weights_only=True)['log'])
    assert 1 <= done, 'the state that was left is whole'
    resumed, undisturbed = train(tmp_path/'killed', epochs=epochs), train(tmp_path/'undisturbed', epochs=epochs)
    assert rows(resumed) == rows(undisturbed) and (tmp_path/'killed/model.safetensors').read_bytes() == (tmp_path/'undisturbed/model.safetensors').read_bytes()


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    train(tmp_path)
    before = (tmp_path/'model.safetensors').stat().st_mtime_ns
    assert rows(train(tmp_path)) == rows(whole[1]) and (tmp_path/'model.safetensors').stat().st_mtime_ns == before


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    train(tmp_path, epochs=2)
    before = (tmp_path/'state.pt').read_bytes()
    (tmp_path/'state.pt').rename(tmp_path/'kept'); (tmp_path/'kept').rename(tmp_path/'state.pt')

    def full(data, file): file.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    from cxrkit.train import load_loop, save_state, start_loop
    loop = start_loop(TinyTask(), dataset(), config(epochs=2))
    load_loop(loop, tmp_path/'state.pt')
    with pytest.raises(OSError, match='No space left'):
        save_state(loop, tmp_path/'state.pt')
    assert (tmp_path/'state.pt').read_bytes() == before


def test_accumulated_small_batches_are_one_large_batch(tmp_path):
    "4 x 2 images without dropout, batch normalisation or clipping move the weights as 8 images do."
    class Plain(TinyTask):
        def __init__(self):
            super().__init__(dropout=0)
            self.net[1] = torch.nn.Identity()
    settings = dict(epochs=2, ema_decay=0., optimizer='sgd', lr=.5, clip_norm=0., weight_decay=0.)
    for name, more in {'large': {}, 'small': dict(batch_size=4, accumulate=2)}.items():
        train_set = dataset(slice(0, 24), None)
        fit(Plain(), train_set, None, config(**settings, **more), tmp_path/name, evaluate)
    large, small = (torch.load(tmp_path/n/'state.pt', weights_only=True)['task'] for n in ('large', 'small'))
    assert all(torch.allclose(large[k], small[k], atol=1e-5) for k in large)


def test_an_incomplete_last_group_is_averaged_over_its_own_size(tmp_path):
    log = train(tmp_path, accumulate=2, epochs=2)                   # 28 images, 3 batches of 8: updates of 2 and 1 batches
    assert log.train_loss.notna().all()


def test_early_stop_plateau_and_rare_evaluations(tmp_path):
    scores = iter([.5, .6, .6, .55, .9, .9])
    log = fit(TinyTask(), dataset(), None, config(epochs=20, early_stop=2, schedule='plateau', patience=0, warmup_epochs=0), tmp_path/'a', lambda task: {'mean_auc': next(scores)})
    assert len(log) == 4 and load_meta(tmp_path/'a/model.safetensors')['epoch'] == 2
    assert np.allclose(log.lr, [.01, .01, .01, .003])               # 8 of 16 images: half of .02; after the first wait, times .3
    log = fit(TinyTask(), dataset(), None, config(epochs=5, evaluate_every=2), tmp_path/'b', lambda task: {'mean_auc': .5})
    assert log.mean_auc.notna().tolist() == [False, True, False, True, True]


def test_the_checkpoint_follows_the_metric_and_not_the_loss(tmp_path):
    scores = iter([.2, .8, .4])
    fit(TinyTask(), dataset(), dataset(slice(28, 40), None), config(epochs=3), tmp_path/'auc', lambda task: {'mean_auc': next(scores)})
    assert load_meta(tmp_path/'auc/model.safetensors')['epoch'] == 2
    log = fit(TinyTask(), dataset(), dataset(slice(28, 40), None), config(epochs=3, metric='loss'), tmp_path/'loss', lambda task: {})
    assert load_meta(tmp_path/'loss/model.safetensors')['epoch'] == log.epoch[log.loss.idxmin()]


def test_saved_weights_are_the_averaged_ones(tmp_path):
    train(tmp_path/'ema', epochs=1, ema_decay=.9)
    train(tmp_path/'raw', epochs=1, ema_decay=0.)
    for name, part in (('ema', 'ema'), ('raw', 'task')):
        state = torch.load(tmp_path/name/'state.pt', weights_only=True)[part]
        saved = read_state(tmp_path/name/'model.safetensors')
        assert all(torch.equal(v, state[k] if part == 'task' else state[f'module.{k}']) for k, v in saved.items())


def test_labels_that_are_not_annotated_pass_and_empty_sets_do_not(tmp_path):
    with pytest.raises(ValueError, match='at least one row'):
        RadiographDataset(images.iloc[:0], cache, (16, 24), labels=labels, names=('disc',))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 3), st.sampled_from(['mean_auc', 'log_loss']))
def test_history_finds_the_first_best_and_only_waits_lower_the_rate(scores, patience, metric):
    best, since, factor = history(scores, TrainConfig(metric=metric, schedule='plateau', patience=patience))
    assert best == (np.argmax(scores) if metric == 'mean_auc' else np.argmin(scores)) and best+since == len(scores)-1
    drops = round(math.log(factor)/math.log(.3))
    assert math.isclose(factor, .3**drops) and drops <= (len(scores)-1)//(patience+1)


@given(st.sampled_from(['cosine', 'poly', 'constant', 'plateau']), st.integers(2, 20), st.integers(1, 50), st.integers(1, 64), st.integers(1, 4))
def test_rates_stay_below_their_scaled_peak(schedule, epochs, n_updates, batch, accumulate):
    settings = TrainConfig(schedule=schedule, epochs=epochs, batch_size=batch, accumulate=accumulate, warmup_epochs=1)
    curve = lr_curve(settings, n_updates)
    assert len(curve) == epochs*n_updates and (curve > 0).all() and curve.max() <= scaled_lr(settings)*(1+1e-9)
    assert math.isclose(scaled_lr(settings), 3e-4*batch*accumulate/16)


@pytest.mark.parametrize('changes,message', [
    (dict(epochs=0), 'epochs: expected at least 1'), (dict(batch_size=0), 'batch_size'), (dict(metric='f9'), "no metric is called 'f9'"),
    (dict(schedule='step'), 'schedule: expected cosine'), (dict(precision='fp8'), 'precision: expected auto'), (dict(ema_decay=1.), 'ema_decay'),
    (dict(lr=0.), 'lr: expected'), (dict(lr=float('nan')), 'lr: expected'), (dict(workers=-1), 'workers')])
def test_senseless_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.slow
def test_more_than_one_process(tmp_path):
    "Two processes on the CPU share an epoch and end with one set of weights."
    if sys.platform != 'linux': pytest.skip('gloo')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NO_ALBUMENTATIONS_UPDATE': '1', 'ACCELERATE_USE_CPU': 'true'}
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', TINY, str(tmp_path), '3'],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_meta(tmp_path/'model.safetensors')['images_per_update'] == 16 and len(pd.read_csv(tmp_path/'log.csv')) == 3
