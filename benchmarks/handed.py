"""The language model's part in naming: its captions when it is given a noun in place of an image.

    python benchmarks/handed.py --corpus data/corpus        ten minutes on one core, once the features are computed

Validation images of the corpus whose noun is in a training caption, under six arms: the shipped projection; a projection
that no caption loss trained, by ridge regression from the mean patch vector to the noun's embedding; the noun whose
embedding is nearest to that regression's answer (as it is, and read by the language model at every image position); the
image's own noun and another image's, read in the same way. nbs/data/handed.csv has a row for each image and arm.
"""

import argparse
from pathlib import Path

import numpy as np, pandas as pd, torch
import torch.nn.functional as F
from tqdm import tqdm

from mmneurons.data import corpus
from mmneurons.text import first_noun
from mmneurons.model import MultimodalLM
from mmneurons.train import Features, channel_stats
from mmneurons.wordnet import names_match


def rows_of(features, data):
    return [data.rows[i] for i in features.rows]


def means(features, standardise):
    "Mean patch vector of each image: (image, d_image)"
    return torch.cat(
        [
            standardise(features[range(i, min(i + 256, len(features)))]).mean(1)
            for i in range(0, len(features), 256)
        ]
    )


def ridge(x, y, weights, penalty=100.0):
    "W that brings x W nearest to y"
    return torch.linalg.solve(
        (x * weights).T @ x + penalty * torch.eye(x.shape[1]), (x * weights).T @ y
    )


@torch.no_grad()
def main(args):
    mm = MultimodalLM.from_pretrained('pocket')
    train, val = (corpus(args.corpus, split) for split in ('train', 'val'))
    features, seen = (Features(mm, d, args.features) for d in (train, val))
    mean, std = channel_stats(features)

    def standardise(x):
        return (x.float() - mean) / std

    nouns = [r['noun'] for r in rows_of(features, train)]
    names = sorted(set(nouns))
    place = {n: i for i, n in enumerate(names)}
    table = mm.lm.get_input_embeddings()
    vectors = torch.stack(
        [
            table(torch.tensor(mm.tokenizer(f' {n}', add_special_tokens=False).input_ids)).mean(0)
            for n in names
        ]
    )
    centre, at = vectors.mean(0), torch.tensor([place[n] for n in nouns])
    weights = (
        torch.bincount(at)[at].float().rsqrt()[:, None]
    )  # between every image alike and every noun alike
    w = ridge(means(features, standardise), vectors[at] - centre, weights / weights.mean())
    picked = [
        i
        for i, r in enumerate(rows_of(seen, val))
        if r['noun'] in place and r['artist'] != 'cifar10'
    ]
    rows = [rows_of(seen, val)[i] for i in picked]
    own = torch.tensor([place[r['noun']] for r in rows])
    answers = means(seen, standardise)[picked] @ w
    near = (F.normalize(answers, dim=1) @ F.normalize(vectors - centre, dim=1).T).argmax(1)

    def filled(which):
        return lambda part: vectors[which[part]][:, None].expand(-1, mm.n_patches, -1)

    def features_of(part):
        return seen[[picked[i] for i in part]]

    arms = {
        'the shipped projection': lambda part: mm.projection(features_of(part).float()),
        'ridge regression to the noun': lambda part: centre + standardise(features_of(part)) @ w,
        'the nearest noun': filled(near),
        'its own noun': filled(own),
        "another image's noun": filled(
            own[torch.tensor(np.random.default_rng(0).permutation(len(own)))]
        ),
    }
    found = [
        dict(
            arm='nobody: the nearest noun as it is',
            said=names[i],
            **{k: r[k] for k in ('image_id', 'style', 'noun')},
        )
        for i, r in zip(near, rows)
    ]
    for arm, vectors_of in arms.items():
        for i in tqdm(range(0, len(rows), 16), desc=arm):
            part = range(i, min(i + 16, len(rows)))
            texts = mm.tokenizer.batch_decode(
                mm.caption_ids(vectors_of(part).contiguous()), skip_special_tokens=True
            )
            found += [
                dict(
                    arm=arm,
                    said=first_noun(t) or '',
                    **{k: rows[j][k] for k in ('image_id', 'style', 'noun')},
                )
                for j, t in zip(part, texts)
            ]
    d = pd.DataFrame(found)
    d['match'] = [int(bool(s) and names_match(s, n)) for s, n in zip(d.said, d.noun)]
    d.to_csv(Path(args.out) / 'handed.csv', index=False)
    print(d.groupby('arm', sort=False).match.agg(['size', 'mean']).round(3))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', required=True)
    parser.add_argument('--features', default='runs/features')
    parser.add_argument('--out', default=Path(__file__).resolve().parents[1] / 'nbs' / 'data')
    main(parser.parse_args())
