"""How well each score predicts the exact effect of each intervention, for single neurons and for sets of 10, 25 and 100.

    python benchmarks/interventions.py --corpus data/corpus     adds to nbs/data/interventions.csv, image by image

On held-out CIFAR-10 images that the pocket names right, neurons are set to their mean over training images of the same
domain, to the activations of another image (resampling), or to zero, at the image positions, and the fall of the noun's
logit is measured. Single neurons: the first 20 by contrast, the first 20 by eq. 2, 40 random ones. Sets: the first by contrast,
the first by eq. 2, random ones of the layers of each. For each of them the table keeps every score's estimate, which for a set
is the sum over its neurons. A run that was stopped continues.
"""

import argparse
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from causes import cifar, named_right
from measure import append
from mmneurons.activations import Baseline, unit_activations
from mmneurons.attribution import attribute, top_neurons
from mmneurons.methods import ablation_effects, patching
from mmneurons.model import MultimodalLM
from mmneurons.neurons import KEY, random_elsewhere, random_ranking
from mmneurons.pairs import projection_hash
from mmneurons.targets import choose_target

ROOT = Path(__file__).resolve().parents[1]
SIZES = 10, 25, 100
NEURON = KEY[:2]


def estimates(mm, seen, target, donor, baseline):
    "Each score of every neuron, summed over the image positions: what it estimates is in its name"
    return {
        'contrast, mean': attribute(mm, seen, target, baseline=baseline),
        'contrast, other image': attribute(mm, seen, target, method=patching, counterfactual=donor),
        'eq. 2, sum': attribute(mm, seen, target, method='eq2'),
        'eq. 2, maximum': attribute(mm, seen, target, paper=True),
    }


def chosen(mm, scores, seed):
    "The sets of neurons of one image: arm, number of neurons, table"
    own, zero = (top_neurons(scores[name], 100) for name in ('contrast, mean', 'eq. 2, sum'))
    first = pd.concat([own.head(20), zero.head(20)]).drop_duplicates(NEURON)
    single = {'contrast': own.head(20), 'eq. 2': zero.head(20)}
    single['random'] = random_elsewhere(first, mm.n_layers - 1, mm.n_units, 40, seed)
    for arm, table in single.items():
        yield from ((arm, 1, table.iloc[[n]]) for n in range(len(table)))
    for arm, table in {'contrast': own, 'eq. 2': zero}.items():
        like = random_ranking(table, mm.n_units, seed)
        for k in SIZES:
            yield arm, k, table.head(k)
            yield f'random, layers of {arm}', k, like.head(k)


def measure(mm, seen, donor, baseline, seed):
    "All rows of one image: arm, k, the three exact effects, and each estimate of them"
    target = choose_target(mm, seen)
    scores = estimates(mm, seen, target, donor, baseline)
    arms, sizes, sets = zip(*chosen(mm, scores, seed))
    table = pd.DataFrame(dict(arm=arms, k=sizes))
    values = dict(mean=baseline, resample=unit_activations(mm, donor), zero=0.0)
    for name, value in values.items():
        table[f'exact, {name}'] = ablation_effects(mm, seen, target, list(sets), value).logit
    for name, score in scores.items():
        at = [[s[c].tolist() for c in NEURON] for s in sets]
        table[name] = [score.scores[layer, unit].sum().item() for layer, unit in at]
    return table


def main(args):
    mm = MultimodalLM.from_pretrained('pocket')
    images = [ex.image for ex in cifar(args.corpus, 'train', 200, 0)]
    baseline = Baseline.over(mm, images, '200 CIFAR-10 training images')
    done = set(pd.read_csv(args.out).image_id) if args.out.exists() else set()
    bar, donor = tqdm(total=args.images, initial=len(done), unit='image'), None
    for n, ex, seen in named_right(mm, args.corpus):
        if len(done) >= args.images:
            break
        if donor and donor[0] != ex.nouns[0] and ex.image_id not in done:
            table = measure(mm, seen, donor[1], baseline, n)
            table.insert(0, 'image_id', ex.image_id)
            append(table.assign(projection=projection_hash(mm)), args.out)
            done.add(ex.image_id)
            bar.update()
        donor = ex.nouns[0], ex.image


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', required=True, help='made by: mmneurons corpus')
    parser.add_argument('--images', type=int, default=40, help='images that are named right')
    parser.add_argument('--out', default=ROOT / 'nbs/data/interventions.csv', type=Path)
    main(parser.parse_args())
