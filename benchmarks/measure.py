"""The measurements that the chapters show, picture by picture into small tables; stopped, it goes on where it was.

    python benchmarks/measure.py fidelity --corpus data/corpus     what silencing a neuron does, beside what each score says
    python benchmarks/measure.py where --corpus data/corpus        at which positions and layers pictures become words
    python benchmarks/measure.py lenses --corpus data/corpus       which lens finds words that fit the picture
    python benchmarks/measure.py agreement --corpus data/corpus    neurons' words against captions and nouns

The tables go to nbs/data (--out); --model pocket-smollm2 measures the second pair of models.
"""
import argparse, tempfile
from pathlib import Path

import numpy as np, pandas as pd, torch

from mmneurons.attribution import attribute
from mmneurons.corpus import corpus
from mmneurons.data import first_noun, gallery
from mmneurons.decoding import decode_all, words
from mmneurons.fidelity import fidelity, rank_correlations
from mmneurons.model import MultimodalLM
from mmneurons.wordnet import names_match

ROOT = Path(__file__).resolve().parents[1]

def pictures(args):
    "The gallery, then held-out pictures of the corpus, in a fixed random order"
    held_out = corpus(args.corpus, 'val') if args.corpus else []
    order = np.random.default_rng(0).permutation(len(held_out))[:args.n]
    yield from gallery()
    for i in order: yield held_out[int(i)]

def resumed(args, name, measure):
    "`measure(example)` → a table, for each picture that the file does not hold yet"
    file = Path(args.out)/f'{name}.csv'
    done = set(pd.read_csv(file).image_id) if file.exists() else set()
    for ex in pictures(args):
        if ex.image_id in done: continue
        try: table = measure(ex)
        except ValueError as e: print(ex.image_id, e); continue
        table.to_csv(file, mode='a', header=not file.exists(), index=False, float_format='%.4g')
        print(ex.image_id, flush=True)

def run_fidelity(args, mm):
    def measure(ex):
        table = fidelity(mm, ex.image, ex.image_id, args.top, args.random, args.every)
        units = Path(args.out)/'fidelity-units.csv'
        if ex.image_id == 'horse' and not units.exists(): table.to_csv(units, index=False, float_format='%.4g')
        return rank_correlations(table)
    resumed(args, 'fidelity', measure)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=[k[4:] for k in globals() if k.startswith('run_')])
    parser.add_argument('--model', default='pocket'); parser.add_argument('--corpus'); parser.add_argument('--out', default=ROOT/'nbs'/'data')
    parser.add_argument('-n', type=int, default=50, help='pictures of the corpus')
    parser.add_argument('--top', type=int, default=100); parser.add_argument('--random', type=int, default=200); parser.add_argument('--every', type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    globals()[f'run_{args.what}'](args, MultimodalLM.from_pretrained(args.model))
