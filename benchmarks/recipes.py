"""Whether another recipe of training gives a better pocket pair: how it names, and its multimodal neurons beside permuted words.

    python benchmarks/recipes.py --corpus data/corpus      trains each recipe (some 90 minutes on one core), then compares

A run that was stopped continues. Only validation images decide: the captions of all of them are judged, and neurons that fire
on CIFAR-10 images of the training set are confirmed on its validation images. nbs/data/recipes.csv has a row for each
projection and measure, with its 95 % interval and, for neurons, the number under permuted words.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from measure import append
from multimodal import cifar
from naming import VALIDATION
from mmneurons.catalogue import find_neurons
from mmneurons.data import corpus
from mmneurons.model import MultimodalLM
from mmneurons.naming import name_images
from mmneurons.pairs import projection_hash
from mmneurons.stats import interval
from mmneurons.train import Features, TrainConfig, embedding_spread, train_projection

ROOT = Path(__file__).resolve().parents[1]
COMMON = dict(steps=3200, keep=0.25, vocab='captions', precision='bf16', val_every=800)
RECIPES = dict(short=TrainConfig(**COMMON, noise=0.5, short=0.1))


def trained(args, recipe):
    "The file of a recipe's projection, trained where it is not there yet"
    file = Path(args.work) / recipe / 'projection.safetensors'
    if not file.exists():
        mm = MultimodalLM.from_pretrained('pocket', projection=False)
        train, val = (
            Features(mm, corpus(args.corpus, split), Path(args.work) / 'features')
            for split in ('train', 'val')
        )
        train_projection(mm, train, RECIPES[recipe], file.parent, val)
    return file


def named(args, mm):
    "How often captions of validation images name the object, or are no language"
    for split in VALIDATION:
        table = name_images(mm, corpus(args.corpus, split))
        found = dict(match=table.match, degenerate=table.degenerate.notna())
        for measure, values in found.items():
            low, high = interval(values.astype(float))
            yield dict(split=split, measure=measure, value=values.mean(), low=low, high=high)


def multimodal(args, mm, folder):
    "How many neurons fire for a class and promote its words, and how many do under permuted words"
    parts = cifar(args.corpus, 'train', 100), cifar(args.corpus, 'cifar_val', 20)
    counts = find_neurons(mm, parts[0], folder, confirm=parts[1], effects=0).counts
    for row in counts.query('layer == -1 and stage == "confirmed"').itertuples():
        about = dict(split='cifar_val', measure=f'neurons at {row.place}, AUC {row.auc:.2f}')
        yield about | dict(value=row.found, low=row.lo, high=row.hi, expected=row.expected, p=row.p)


@torch.no_grad()
def length(args, mm, n=64):
    "The length of image vectors, in lengths of a word embedding"
    images = [corpus(args.corpus, 'val')[i].image for i in range(n)]
    words = embedding_spread(mm) * mm.d_model**0.5
    values = mm.soft_prompt(images).float().norm(dim=-1).mean(1).cpu() / words
    low, high = interval(values.numpy())
    yield dict(split='val', measure='length', value=values.mean().item(), low=low, high=high)


def main(args):
    for recipe in args.recipes:
        file = None if recipe == 'shipped' else trained(args, recipe)
        mm = MultimodalLM.from_pretrained('pocket', projection=file)
        key = projection_hash(mm)
        if args.out.exists() and key in set(pd.read_csv(args.out).trained):
            continue
        folder = Path(args.work) / f'neurons-{key}'
        rows = [*length(args, mm), *named(args, mm), *multimodal(args, mm, folder)]
        table = pd.DataFrame(rows).reindex(
            columns='split measure value low high expected p'.split()
        )
        append(table.assign(recipe=recipe, trained=key), args.out)
        print(table.round(3).to_string(index=False))
    print({name: asdict(cfg) for name, cfg in RECIPES.items()})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', required=True, help='made by: mmneurons corpus')
    parser.add_argument('--recipes', nargs='*', default=['shipped', *RECIPES])
    parser.add_argument('--work', default=ROOT / 'data' / 'recipes')
    parser.add_argument('--out', default=ROOT / 'nbs' / 'data' / 'recipes.csv', type=Path)
    main(parser.parse_args())
