"""The figures on the first page: own neurons against the controls, and six neurons of the catalogue.

    python benchmarks/teaser.py --corpus data/corpus      nbs/images/teaser.png and neurons.png

No neuron is picked by hand: the six at the image positions with the lowest false discovery rates are shown, with their
concepts, their first English tokens, and their activations on those images of the catalogue that no training saw.
"""

import argparse

from pathlib import Path
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from multimodal import cutout, drawn_concepts

from mmneurons.catalogue import own_catalogue
from mmneurons.model import MultimodalLM
from mmneurons.neurons import KEY, neuron_name
from mmneurons.recording import ActivationRun, Recording
from mmneurons.stats import interval

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    'contrast': "the image's own",
    'wrong word': "a wrong word's, same image",
    'another noun': "another image's",
    'random': 'random',
}
COLOURS = '#3b6fb6', '#8c6bb1', '#d1762c', '#777777'


def draw_falls(ax, effects):
    "Mean fall of log P(noun) with its interval, against the number of neurons that are set to their mean"
    chosen = effects[effects['value'] == 'mean']
    for (arm, label), colour in zip(ARMS.items(), COLOURS):
        falls = chosen[chosen.ranking == arm].groupby('k').log_prob
        bands = falls.agg(interval)
        ax.plot(falls.mean(), marker='o', ms=4, color=colour, label=label)
        ax.vlines(bands.index, bands.str[0], bands.str[1], color=colour, lw=2, alpha=0.5)
    ax.set(xscale='log', xticks=[1, 5, 10, 25, 100, 200], xlabel='neurons set to their mean')
    ax.xaxis.set_major_formatter('{x:.0f}')
    ax.minorticks_off()
    ax.set_ylabel('fall of log P(noun), nats')
    ax.set_title(f'{chosen.image_id.nunique()} held-out images', fontsize=11, loc='left')
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, fontsize=9)


def first_neurons(catalogue, n=6):
    "The neurons at the image positions with the lowest false discovery rates, each with all its concepts"
    rows = catalogue.rows[catalogue.rows.place == 'image'].sort_values('fdr', kind='stable')
    concepts = rows.groupby(KEY).concept.agg(lambda c: ', '.join(dict.fromkeys(c)))
    return rows.drop_duplicates(KEY).head(n).join(concepts.rename('concepts'), on=KEY)


def draw_neuron(axes, row, values, own):
    "A neuron's name, concepts and tokens, beside its activations on images of the concepts and on all others"
    text, ax = axes
    text.axis('off')
    name = f'{neuron_name(row.layer, row.unit, row.sign)}: {row.concepts}'
    text.text(0, 0.6, shorten(name, 46, placeholder=' …'), fontsize=9, weight='bold')
    text.text(
        0, 0.15, ', '.join(list(dict.fromkeys(w.lower() for w in row.english))[:4]), fontsize=9
    )
    values = (values - values.mean()) / values.std()
    height = np.random.default_rng(0).uniform(0, 1, len(values))
    ax.plot(values[~own], height[~own], '.', ms=2, color='#bbbbbb')
    ax.plot(values[own], height[own], '.', ms=5, color='#d1762c')
    ax.set(yticks=[], ylim=(-0.3, 1.3), xlim=(-3.5, 6))
    ax.spines[['top', 'right', 'left']].set_visible(False)


def draw_neurons(mm, args):
    "The first neurons of the catalogue, a line each, on the images of its data set that no training saw"
    data = drawn_concepts(args.corpus)
    run = Recording([ActivationRun(mm, data, Path(args.work) / 'corpus' / 'images', group=cutout)])
    split = pd.DataFrame(data.rows).set_index('image_id')['split'].loc[run.images.image_id]
    unseen, rows = (split != 'train').to_numpy(), first_neurons(own_catalogue(mm))
    fig, axes = plt.subplots(
        len(rows), 2, figsize=(5.4, 3.4), layout='constrained', width_ratios=[3, 2.4]
    )
    for line, row in zip(axes, rows.itertuples()):
        own = run.own(row.concepts.split(', ')).any(0)[unseen]
        draw_neuron(line, row, run.layer(row.layer)[row.unit, unseen] * row.sign, own)
    for ax in axes[:-1, 1]:
        ax.set_xticklabels([])
    axes[-1, 1].set_xlabel('activation, standard deviations', fontsize=8)
    axes[0, 1].set_title('orange: images of the concepts', fontsize=8)
    print(f'{unseen.sum()} images')
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', required=True, help='made by: mmneurons corpus')
    parser.add_argument('--work', default=ROOT / 'data' / 'catalogue', help='of multimodal.py find')
    args = parser.parse_args()
    fig, ax = plt.subplots(figsize=(4.8, 3.3), layout='constrained')
    draw_falls(ax, pd.read_csv(ROOT / 'nbs' / 'data' / 'causes.csv'))
    folder = ROOT / 'nbs' / 'images'
    fig.savefig(folder / 'teaser.png', dpi=100)
    mm = MultimodalLM.from_pretrained('pocket')
    draw_neurons(mm, args).savefig(folder / 'neurons.png', dpi=100)


if __name__ == '__main__':
    main()
