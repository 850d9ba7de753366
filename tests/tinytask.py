"A task small enough to train in a second, with data; also a program that trains it, to be killed."
import sys

import numpy as np
import pandas as pd
import torch

from cxrkit.datasets import RadiographDataset
from cxrkit.schedule import TrainConfig
from cxrkit.train import fit, seed_all

ids = [f'p{i:02}' for i in range(40)]
images = pd.DataFrame(dict(image_id=ids, study_id=ids, patient_id=ids, path='', height=16, width=24, split='train'))
labels = pd.DataFrame(dict(level='image', unit_id=ids, label='disc', value=[i % 2 for i in range(40)]))
cache = {image_id: np.clip(np.random.default_rng(i).normal(100+25*(i % 2), 40, (16, 24)), 0, 255).astype(np.uint8) for i, image_id in enumerate(ids)}


class TinyTask(torch.nn.Module):
    "Batch normalisation and dropout included: both would betray an inexact resume."
    def __init__(self, seed=0, dropout=.2):
        super().__init__()
        seed_all(seed)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5, stride=2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(dropout),
                                       torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1))

    def forward(self, batch):
        logits = self.net(batch['image']/255-.4)
        return {'loss': torch.nn.functional.binary_cross_entropy_with_logits(logits, batch['target']), 'logits': logits.detach()}


def dataset(rows=slice(0, 28), augment='light', seed=0):
    return RadiographDataset(images.iloc[rows], cache, (16, 24), labels=labels, names=('disc',), augment=augment, seed=seed)


def evaluate(task):
    with torch.inference_mode():
        logits = task.net(torch.from_numpy(np.stack([cache[i] for i in ids[28:]]))[:, None].to(next(task.parameters()).device)/255-.4)[:, 0].cpu().numpy()
    return {'mean_auc': float((logits[1::2][:, None] > logits[0::2]).mean())}


def config(**changes): return TrainConfig(**{**dict(metric='mean_auc', epochs=5, batch_size=8, lr=.02), **changes})


def train(out, task=None, **changes):
    return fit(task or TinyTask(), dataset(), dataset(slice(28, 40), None), config(**changes), out, evaluate)


if __name__ == '__main__': train(sys.argv[1], epochs=int(sys.argv[2]))
