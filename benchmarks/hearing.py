"""Hearing: train the ear's projection, and compare the neurons of sounds with the neurons of pictures.

    python benchmarks/sounds.py data/sounds                                  the recordings
    python benchmarks/hearing.py train --sounds data/sounds                  the projection, to data/ear/projection.safetensors
    python benchmarks/hearing.py measure --sounds data/sounds --corpus data/corpus   the tables, to nbs/data
"""
import argparse
from pathlib import Path

import torch

from mmneurons.hearing import ear, sounds
from mmneurons.model import MultimodalLM
from mmneurons.train import Features, TrainConfig, train_projection

RECIPE = TrainConfig(steps=240, batch_size=16, lr=2e-3, warmup=15, keep=.5, prompt='The sound of', feature_dropout=.1, vocab='captions', val_every=10**6,
                     checkpoint_every=10)

def run_train(args, mm):
    "The projection of the ear, from the recordings of the training split"
    listener = ear(mm, False)
    train = Features(listener, sounds(args.sounds, 'train', args.copies), Path(args.work)/'features')
    train_projection(listener, train, RECIPE, args.work)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=[k[4:] for k in globals() if k.startswith('run_')])
    p.add_argument('--sounds', default='data/sounds')
    p.add_argument('--corpus', default='data/corpus')
    p.add_argument('--work', default='data/ear')
    p.add_argument('--out', default='nbs/data')
    p.add_argument('--copies', type=int, default=4)
    args = p.parse_args()
    torch.set_num_threads(1)
    mm = MultimodalLM.from_pretrained('pocket', dtype=torch.bfloat16)
    globals()[f'run_{args.what}'](args, mm)
