"""The figures on the first page: own neurons against the controls, and six neurons of the catalogue.

    python benchmarks/teaser.py --corpus data/corpus      nbs/images/teaser.png (from nbs/data/causes.csv) and neurons.png

No neuron is picked by hand: the six at the image positions with the lowest false discovery rates are shown, with their
concepts, their first English tokens, and the three images on which each is most active. The images are all cut-outs that no
training saw, on plain ground, under the MIT or Apache licence.
"""

import argparse

from pathlib import Path
from textwrap import shorten

import matplotlib.pyplot as plt
import pandas as pd
import torch
from tqdm import tqdm

from mmneurons.catalogue import own_catalogue
from mmneurons.data import corpus
from mmneurons.model import MultimodalLM
from mmneurons.neurons import KEY, neuron_name
from mmneurons.recording import image_activations
from mmneurons.stats import interval

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    'contrast': "the image's own",
    'wrong word': "a wrong word's, same image",
    'another noun': "another image's",
    'random': 'random',
}
UNSEEN = 'val', 'test', 'test_source', 'test_concept'
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


def shown_images(folder):
    "Cut-outs that no training saw, on plain ground, whose licence lets a page show them"
    rows = [row for split in UNSEEN for row in corpus(folder, split).rows]
    free = [r for r in rows if r['licence'] in ('MIT', 'Apache-2.0') and r['background'] == 'plain']
    data = corpus(folder, UNSEEN[0])
    return [data.load(row).image for row in free]


def draw_neuron(fig, cells, row, images, strength):
    "A neuron's name, concepts and tokens, and the images on which it is most active"
    text = fig.add_subplot(cells[0])
    text.axis('off')
    name = f'{neuron_name(row.layer, row.unit, row.sign)}: {row.concepts}'
    text.text(0, 0.62, shorten(name, 44, placeholder=' …'), fontsize=9, weight='bold')
    text.text(
        0, 0.2, ', '.join(list(dict.fromkeys(w.lower() for w in row.english))[:4]), fontsize=9
    )
    for cell, n in zip(cells[1:], strength.argsort(descending=True)[:3].tolist()):
        ax = fig.add_subplot(cell)
        ax.imshow(images[n].resize((64, 64)))
        ax.axis('off')


def draw_neurons(mm, folder):
    "The first neurons of the catalogue, a line each"
    images = shown_images(folder)
    parts = [images[i : i + 8] for i in range(0, len(images), 8)]
    acts = torch.cat([image_activations(mm, mm.soft_prompt(p))[:, 0] for p in tqdm(parts)])
    rows = first_neurons(own_catalogue(mm))
    fig = plt.figure(figsize=(4.8, 3.3), layout='constrained')
    grid = fig.add_gridspec(len(rows), 4, width_ratios=[4, 0.9, 0.9, 0.9])
    for line, row in enumerate(rows.itertuples()):
        strength = acts[:, row.layer, row.unit] * row.sign
        draw_neuron(fig, [grid[line, n] for n in range(4)], row, images, strength)
    print(f'{len(images)} images')
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', required=True, help='made by: mmneurons corpus')
    args = parser.parse_args()
    fig, ax = plt.subplots(figsize=(4.8, 3.3), layout='constrained')
    draw_falls(ax, pd.read_csv(ROOT / 'nbs' / 'data' / 'causes.csv'))
    folder = ROOT / 'nbs' / 'images'
    fig.savefig(folder / 'teaser.png', dpi=100)
    mm = MultimodalLM.from_pretrained('pocket')
    draw_neurons(mm, args.corpus).savefig(folder / 'neurons.png', dpi=100)


if __name__ == '__main__':
    main()
