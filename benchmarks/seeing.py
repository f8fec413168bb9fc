"""What the shipped projection sees, measured on pictures that no training saw; stopped, it goes on where it was.

    python benchmarks/seeing.py naming  --corpus DIR [--outside DIR]   what captions call the things, beside three baselines
    python benchmarks/seeing.py neurons --corpus DIR                   whether the top neurons are about the thing, and fire on it

The tables go to nbs/data (--out), one row a picture; `--part 0/2` and `--part 1/2` share the work between two processes.
"""
import argparse, csv
from functools import cache
from pathlib import Path

import numpy as np, pandas as pd, torch
from PIL import Image
from tqdm import tqdm

from mmneurons.attribution import attribute, top_neurons
from mmneurons.data import Example, corpus, first_noun, open_image, same_noun
from mmneurons.decoding import decode, matched, random_words, words
from mmneurons.model import MultimodalLM
from mmneurons.receptive_fields import patch_activations, position_mean, roc_auc, to_pixels, unit_activations
from mmneurons.train import init_projection
from mmneurons.wordnet import names_match, related_words

ROOT = Path(__file__).resolve().parents[1]
SPLITS = dict(cifar_test=1000, test=400, test_source=120, test_concept=120)

def drawn(data, n):
    "`n` pictures of a split, drawn with seed 0"
    return [data[int(i)] for i in np.random.default_rng(0).permutation(len(data))[:n]]

def outside(folder):
    "Photographs of nobody's corpus: a folder with `outside.csv` (image, noun)"
    for r in csv.DictReader(open(Path(folder)/'outside.csv', encoding='utf-8')):
        yield Example(Path(r['image']).stem, open_image(Path(folder)/r['image']), (), (r['noun'],), {})

def append(rows, file):
    "Add rows to a table"
    pd.DataFrame(rows).to_csv(file, mode='a', header=not file.exists(), index=False, float_format='%.4g')

@cache
def first_tokens(mm, nouns):
    "The first token of each noun, and which nouns take \"an\""
    ids = torch.tensor([mm.tokenizer(f' {n}', add_special_tokens=False).input_ids[0] for n in nouns])
    return ids, torch.tensor([n[0] in 'aeiou' for n in nouns])

@torch.no_grad()
def five(mm, image, nouns):
    "The five nouns that the model finds likeliest after \"A picture of a\", or \"an\""
    (ids, vowel), soft_prompt, scores = first_tokens(mm, nouns), mm.soft_prompt([image]), []
    for article in ' a', ' an':
        token = mm.tokenizer(article, add_special_tokens=False).input_ids
        x = mm.embed(soft_prompt, token)
        first, second = mm.lm(inputs_embeds=x, logits_to_keep=2, use_cache=False).logits[0].float().log_softmax(-1)
        scores.append(first[token[0]] + second[ids])
    return [nouns[i] for i in torch.where(vowel, scores[1], scores[0]).topk(5).indices]

def run_naming(args, mm):
    file, part, parts = Path(args.out)/'naming.csv', *map(int, args.part.split('/'))
    if parts > 1: file = file.with_stem(f'naming-{part}')
    nouns = tuple(sorted({r['noun'] for r in csv.DictReader(open(Path(args.corpus)/'manifest.csv', encoding='utf-8'))}))
    known = {r['concept'] for r in corpus(args.corpus, 'train').rows}
    done = set(map(tuple, pd.read_csv(file)[['arm', 'split']].drop_duplicates().to_numpy())) if file.exists() else set()
    arms = {'trained': (mm, SPLITS)} | {name: (None, dict(cifar_test=200, test=200)) for name in ('random', 'shuffled')}
    for arm, (model, splits) in arms.items():
        if arm == 'random': model = MultimodalLM.from_pretrained(args.model, projection=False, dtype=mm.lm.dtype); init_projection(model)
        if arm == 'shuffled' and args.shuffled: model = MultimodalLM.from_pretrained(args.model, projection=args.shuffled, dtype=mm.lm.dtype)
        for split in [*splits, *(['outside'] if args.outside and arm == 'trained' else [])]:
            if model is None or (arm, split) in done: continue
            data = [*outside(args.outside)] if split == 'outside' else None
            if data is None:
                d = corpus(args.corpus, split)
                pick = [int(i) for i in np.random.default_rng(0).permutation(len(d))[:splits[split]]]
                data, about = [d[i] for i in pick], [d.rows[i] for i in pick]
            else: about = [dict(style='photo', concept='') for _ in data]
            rows = []
            for i in tqdm(range(part*16, len(data), 16*parts), desc=f'{arm} {split}'):
                batch = data[i:i + 16]
                for ex, r, text in zip(batch, about[i:i + 16], mm.caption([e.image for e in batch]) if model is mm else model.caption([e.image for e in batch])):
                    word, noun = first_noun(text) or '', ex.nouns[0]
                    match = bool(word) and names_match(word, noun)
                    rows.append(dict(arm=arm, split=split, style=r['style'], known=r['concept'] in known, noun=noun,
                                     said=word if match or word in nouns else '', same=int(bool(word) and same_noun(word, noun)), match=int(match),
                                     top5=int(any(names_match(n, noun) for n in five(mm, ex.image, nouns))) if arm == 'trained' and split != 'cifar_test' else ''))
            append(rows, file)

def run_neurons(args, mm):
    file, part, parts = Path(args.out)/'seeing.csv', *map(int, args.part.split('/'))
    if parts > 1: file = file.with_stem(f'seeing-{part}')
    done = set(pd.read_csv(file).image_id) if file.exists() else set()
    train, data = corpus(args.corpus, 'train'), corpus(args.corpus, 'test')
    pool = random_words(mm, 200).query('interpretable')
    usual = position_mean(mm, [e.image for e in drawn(train, 48)])
    read = {}
    order = np.random.default_rng(0).permutation(len(data))[:args.n]
    other = dict(zip(order.tolist(), [data.rows[int(i)]['noun'] for i in np.roll(order, 1)]))   # another picture's noun
    for k in tqdm(order[part::parts], desc='neurons'):
        ex = data[int(k)]
        if ex.image_id in done: continue
        try: a = attribute(mm, ex.image, image_id=ex.image_id)
        except ValueError as e: print(ex.image_id, e); continue
        top = top_neurons(a, 400)
        fresh = top[[key not in read for key in zip(top.layer, top.unit, top.sign)]]
        for r in words(decode(mm, fresh)).itertuples() if len(fresh) else (): read[r.layer, r.unit, r.sign] = r
        said = [read[key] for key in zip(top.layer, top.unit, top.sign)]
        best = pd.DataFrame([r._asdict() for r in said if r.interpretable]).head(25)
        rand = matched(pool, best, seed=int(k))
        row = dict(image_id=ex.image_id, style=data.rows[int(k)]['style'], noun=ex.nouns[0], target=a.target, prob=a.prob, n_top=len(best), n_random=len(rand))
        acts, truth = unit_activations(mm, ex.image), ex.masks[ex.nouns[0]]
        small = np.asarray(Image.fromarray(truth).resize((36, 36), Image.NEAREST))
        for arm, units in dict(top=best, random=rand).items():
            for about, noun in dict(noun=ex.nouns[0], target=a.target, other=other[int(k)]).items():
                row[f'{arm}_{about}'] = sum(bool(related_words(w, noun)) for w in units.words)
            plain = patch_activations(acts, units)
            for name, heat in dict(plain=plain, corrected=plain - patch_activations(usual, units)).items():
                row[f'{arm}_{name}'] = np.nanmean(roc_auc(to_pixels(heat, mm.grid, small.shape), small))
        append([row], file)
        hits = [dict(image_id=ex.image_id, noun=ex.nouns[0], layer=r.layer, unit=r.unit, sign=r.sign, words=r.words) for r in best.itertuples() if related_words(r.words, ex.nouns[0])]
        if hits: append(hits, file.with_stem(file.stem + '-hits'))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['naming', 'neurons'])
    parser.add_argument('--model', default='pocket'); parser.add_argument('--projection'); parser.add_argument('--corpus', required=True)
    parser.add_argument('--outside'); parser.add_argument('--shuffled', help='a projection trained on shuffled captions')
    parser.add_argument('--out', default=ROOT/'nbs'/'data'); parser.add_argument('--dtype', default='float32'); parser.add_argument('--part', default='0/1')
    parser.add_argument('-n', type=int, default=520, help='pictures for `neurons`')
    args = parser.parse_args()
    torch.manual_seed(0)
    globals()[f'run_{args.what}'](args, MultimodalLM.from_pretrained(args.model, projection=args.projection, dtype=getattr(torch, args.dtype)))
