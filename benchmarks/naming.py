"""How often the pocket pair names objects correctly: its captions of validation and test images are judged.

    python benchmarks/naming.py --corpus data/corpus --packages data/corpus/packages

The captions go to a file in --work, image by image, so a run that was stopped continues. Two tables are made of them:
nbs/data/naming-pocket.csv has a row for each test image (with the generated noun only where it is correct or one of the nouns of
the images: other words are not published), and mmneurons/assets/pocket-naming.csv the rates on validation images, noun by noun.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from mmneurons.corpus.photographs import photographs
from mmneurons.data import Reader, corpus
from mmneurons.model import MultimodalLM
from mmneurons.naming import chance_match, judged, naming_rates
from mmneurons.pairs import projection_hash
from mmneurons.wordnet import lemmas

ROOT = Path(__file__).resolve().parents[1]
VALIDATION = 'val', 'cifar_val'
TEST = dict(photographs=None, test=300, cifar_test=300, test_source=60, test_concept=60)
COLUMNS = 'split image_id noun kind concept artist caption'.split()


def images_of(args, split):
    "The images of a split, in a fixed random order where only some of them are asked for"
    if split == 'photographs':
        return photographs(args.packages)
    data = corpus(args.corpus, split)
    n = len(data) if split in VALIDATION else TEST[split]
    order = np.random.default_rng(0).permutation(len(data))[:n].tolist()
    return Reader([data.rows[i] for i in order], data.load)


def caption_all(args, mm, file):
    "Caption the images that the file lacks"
    done = (
        set(pd.read_csv(file)[['split', 'image_id']].apply(tuple, axis=1)) if file.exists() else ()
    )
    with open(file, 'a', newline='', encoding='utf-8') as f:
        table = csv.DictWriter(f, COLUMNS)
        if not done:
            table.writeheader()
        for split in (*VALIDATION, *TEST):
            data = images_of(args, split)
            left = [i for i, r in enumerate(data.rows) if (split, r['image_id']) not in done]
            for at in tqdm(range(0, len(left), 16), desc=split, disable=not left):
                examples = [data[i] for i in left[at : at + 16]]
                said = mm.captions([ex.image for ex in examples])
                for i, ex, text in zip(left[at : at + 16], examples, said):
                    r = data.rows[i]
                    about = dict(kind=r.get('kind') or r['style'], concept=r.get('concept', ''))
                    named = dict(split=split, image_id=ex.image_id, noun=ex.nouns[0])
                    table.writerow(named | about | dict(artist=r.get('artist', ''), caption=text))
                f.flush()


def main(args):
    mm = MultimodalLM.from_pretrained('pocket', projection=args.projection)
    key = projection_hash(mm)
    file = Path(args.work) / f'naming-{key}.csv'
    file.parent.mkdir(parents=True, exist_ok=True)
    caption_all(args, mm, file)
    table = pd.read_csv(file, keep_default_na=False)
    judgements = map(judged, table.image_id, table.noun, table.caption)
    table = table.join(pd.DataFrame(judgements)[['said', 'same', 'match', 'broader', 'degenerate']])
    known = {r['concept'] for r in corpus(args.corpus, 'train').rows}
    table['known'] = table.concept.isin(known).where(table.split != 'photographs', '')
    for split, part in table.groupby('split'):
        table.loc[part.index, 'chance'] = chance_match(part)
    shown = set(table.noun)
    rates = naming_rates(table[table.split.isin(VALIDATION)])
    rates = rates[(rates.shown > 0) | rates.noun.map(lambda n: bool(lemmas(n)))]
    rates.insert(0, 'projection', key)
    table['said'] = table.said.where(table.match | table.said.isin(shown), '')
    test = table[table.split.isin(TEST)].assign(projection=key).drop(columns=['caption', 'concept'])
    kept = ['projection', 'split', 'kind', 'artist', 'known', 'noun', 'said']
    test = test[[*kept, 'same', 'match', 'broader', 'degenerate', 'chance']]
    test = test.astype(dict(same=int, match=int, broader=int)).round(4)
    if not args.projection:
        test.to_csv(ROOT / 'nbs/data/naming-pocket.csv', index=False)
        rates.to_csv(ROOT / 'mmneurons/assets/pocket-naming.csv', index=False)
    numbers = table.assign(degenerate=table.degenerate.notna()).groupby('split', sort=False)
    print(numbers[['same', 'match', 'broader', 'chance', 'degenerate']].mean().round(3))
    print(numbers.size())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', required=True)
    parser.add_argument('--packages', required=True, help='where packages are, or are fetched to')
    parser.add_argument('--projection', help='of another training; then no table is written')
    parser.add_argument('--work', default='data/measured')
    main(parser.parse_args())
