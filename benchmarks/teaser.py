"""The figure on the first page: own against another noun's neurons, and one catalogued neuron for each concept.

    python benchmarks/teaser.py        nbs/images/teaser.png, from nbs/data/causes.csv and the catalogue that ships

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
ARMS = {'contrast': "the noun's own", 'another noun': "another noun's", 'random': 'random'}
COLOURS = '#3b6fb6', '#d1762c', '#999999'


def draw_falls(ax, effects):
    "Mean fall of log P(noun) with its interval, for 25 neurons of three kinds"
    chosen = effects[(effects.k == 25) & (effects.value == 'resample')]
    for x, (arm, label) in enumerate(ARMS.items()):
        falls = chosen[chosen.ranking == arm].log_prob
        low, high = interval(falls)
        ax.bar(x, falls.mean(), 0.7, color=COLOURS[x])
        ax.plot([x, x], [low, high], color='black', lw=1.5)
        ax.text(x, high + 0.02, f'{falls.mean():.2f}', ha='center', va='bottom', fontsize=11)
    ax.set_xticks(range(len(ARMS)), ARMS.values(), fontsize=10)
    ax.set_ylabel('fall of log P(noun), nats', fontsize=10)
    title = f'25 neurons replaced by those of another image\n{chosen.image_id.nunique()} held-out images'
    ax.set_title(title, fontsize=11, loc='left')
    ax.spines[['top', 'right']].set_visible(False)


def first_rows(catalogue):
    "The row with the lowest false discovery rate of each concept, at the image positions"
    rows = catalogue.rows[catalogue.rows.place == 'image']
    return rows.drop_duplicates('concept').drop_duplicates(['layer', 'unit', 'sign'])


def draw_neuron(fig, cells, row, images, strength):
    "A neuron's name and tokens, and the images of the gallery on which it is most active"
    name = neuron_name(row.layer, row.unit, row.sign)
    text = fig.add_subplot(cells[0])
    text.axis('off')
    tokens = ', '.join(list(dict.fromkeys(row.english))[:4])
    text.text(
        0, 0.62, f'{name}: {row.concept}, AUC {row.auc_confirmed:.2f}', fontsize=10, weight='bold'
    )
    text.text(0, 0.22, tokens, fontsize=10)
    for cell, n in zip(cells[1:], strength.argsort(descending=True)[:3].tolist()):
        ax = fig.add_subplot(cell)
        ax.imshow(images[n].resize((96, 96)))
        ax.axis('off')


def main():
    mm = MultimodalLM.from_pretrained('pocket')
    images = [ex.image for ex in gallery()]
    acts = image_activations(mm, mm.soft_prompt(images))[:, 0]
    rows = first_rows(own_catalogue(mm))
    fig = plt.figure(figsize=(10, 3.6), layout='constrained')
    grid = fig.add_gridspec(len(rows), 5, width_ratios=[4.2, 4.4, 0.8, 0.8, 0.8])
    draw_falls(fig.add_subplot(grid[:, 0]), pd.read_csv(ROOT / 'nbs' / 'data' / 'causes.csv'))
    for line, row in enumerate(rows.itertuples()):
        strength = acts[:, row.layer, row.unit] * row.sign
        draw_neuron(fig, [grid[line, n] for n in range(1, 5)], row, images, strength)
    fig.savefig(ROOT / 'nbs' / 'images' / 'teaser.png', dpi=100)


if __name__ == '__main__':
    main()
