"""The figure on the first page: own against another noun's neurons, and one catalogued neuron for each concept.

    python benchmarks/teaser.py        nbs/images/teaser.png and neurons.png, from nbs/data/causes.csv and the catalogue that ships

No neuron is picked by hand: each concept's row with the lowest false discovery rate is shown, with its first English
tokens and the three images of the gallery on which it is most active. The gallery had no part in choosing it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from mmneurons.catalogue import own_catalogue
from mmneurons.data import gallery
from mmneurons.model import MultimodalLM
from mmneurons.neurons import neuron_name
from mmneurons.recording import image_activations
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


def first_rows(catalogue):
    "The row with the lowest false discovery rate of each concept, at the image positions"
    rows = catalogue.rows[catalogue.rows.place == 'image']
    return rows.drop_duplicates('concept').drop_duplicates(['layer', 'unit', 'sign'])


def draw_neuron(fig, cells, row, images, strength):
    "A neuron's name and tokens, and the images of the gallery on which it is most active"
    text = fig.add_subplot(cells[0])
    text.axis('off')
    name = (
        f'{neuron_name(row.layer, row.unit, row.sign)}: {row.concept}, AUC {row.auc_confirmed:.2f}'
    )
    text.text(0, 0.62, name, fontsize=9, weight='bold')
    text.text(0, 0.2, ', '.join(list(dict.fromkeys(row.english))[:4]), fontsize=9)
    for cell, n in zip(cells[1:], strength.argsort(descending=True)[:3].tolist()):
        ax = fig.add_subplot(cell)
        ax.imshow(images[n].resize((64, 64)))
        ax.axis('off')


def draw_neurons(mm):
    "One neuron of each concept of the catalogue, a line each"
    images = [ex.image for ex in gallery()]
    acts = image_activations(mm, mm.soft_prompt(images))[:, 0]
    rows = first_rows(own_catalogue(mm))
    fig = plt.figure(figsize=(4.8, 3.3), layout='constrained')
    grid = fig.add_gridspec(len(rows), 4, width_ratios=[4, 0.9, 0.9, 0.9])
    for line, row in enumerate(rows.itertuples()):
        strength = acts[:, row.layer, row.unit] * row.sign
        draw_neuron(fig, [grid[line, n] for n in range(4)], row, images, strength)
    return fig


def main():
    fig, ax = plt.subplots(figsize=(4.8, 3.3), layout='constrained')
    draw_falls(ax, pd.read_csv(ROOT / 'nbs' / 'data' / 'causes.csv'))
    folder = ROOT / 'nbs' / 'images'
    fig.savefig(folder / 'teaser.png', dpi=100)
    draw_neurons(MultimodalLM.from_pretrained('pocket')).savefig(folder / 'neurons.png', dpi=100)


if __name__ == '__main__':
    main()
