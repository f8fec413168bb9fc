"""Measurements over many images, whose tables the chapters show. A measurement that was stopped continues with the next image.

    python benchmarks/measure.py naming --corpus data/corpus       which object captions name, against baselines
    python benchmarks/measure.py neurons --corpus data/corpus      whether the highest-scoring neurons fit the object, and are active on it
    python benchmarks/measure.py fidelity --corpus data/corpus     the effect of ablating a neuron, against each score's estimate
    python benchmarks/measure.py patches --corpus data/corpus      the effect of ablating it at one patch, against the score there
    python benchmarks/measure.py where --corpus data/corpus        at which positions and layers tokens fit the image
    python benchmarks/measure.py lenses --corpus data/corpus       which lens finds tokens that fit the image
    python benchmarks/measure.py agreement --corpus data/corpus    neurons' tokens against captions and nouns
    python benchmarks/measure.py layers --corpus data/corpus       in which layers the highest-scoring neurons are
    python benchmarks/measure.py ablation --corpus data/corpus -n 200   P(noun) without its neurons, or without others
    python benchmarks/measure.py steering --corpus data/corpus -n 200   whether an image's caption can be made to name another object
    python benchmarks/measure.py transplant --corpus data/corpus -n 200 how many neurons must be patched for that
    python benchmarks/measure.py overlap --corpus data/corpus --split test -n 400    whether heatmaps cover the object, against controls
    python benchmarks/measure.py selectivity --corpus data/corpus -n 200             whether a class's neurons prefer it, on CIFAR-10
    python benchmarks/measure.py words --corpus data/corpus -n 24                    whether a colour, a number or a place is lost while the noun stays
    python benchmarks/measure.py forms --corpus data/corpus                          whether an object's photograph, drawing, emoji and name share neurons

    python benchmarks/measure.py all --corpus data/corpus          each table that is stale (benchmarks/measured.py)

The tables go to nbs/data (--out); --model pocket-smollm2 measures the second pair of models.
"""

import argparse, csv, re, sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np, pandas as pd, torch
from measured import measure_again
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mmneurons.ablation import ablation_curve, against_original, paper_arms, paper_ks
from mmneurons.activations import Baseline, patch_activations, unit_activations
from mmneurons.attribution import Attribution, attribute, attribute_words, top_neurons
from mmneurons.data import Example, corpus, gallery
from mmneurons.decoding import (
    decode,
    decode_all,
    decode_prompt,
    embedding_spread,
    random_vectors,
    token_lists,
)
from mmneurons.hooks import hook_neurons
from mmneurons.images import open_image
from mmneurons.model import MultimodalLM
from mmneurons.neurons import KEY, matched, random_neurons, random_units
from mmneurons.overlaps import control_maps, overlap
from mmneurons.receptive_fields import to_pixels
from mmneurons.stats import interval, roc_auc
from mmneurons.studies.agreement import bert_scores, best_of, load_bert, minilm
from mmneurons.studies.beyond import (
    RANKINGS,
    dissociation,
    form_shares,
    label_test,
    masked_mean,
    own_text_auc,
    same_and_other,
    shared_fractions,
    specific_neurons,
    text_activations,
    words_in,
    written_word,
)
from mmneurons.studies.fidelity import (
    ESTIMATES,
    fidelity,
    patch_effects,
    rank_correlations,
    sample_neurons,
)
from mmneurons.studies.lenses import jacobian_lens, load_lens, own_text, save_lens, tuned_lens
from mmneurons.studies.selectivity import class_means, class_neurons
from mmneurons.studies.steering import steering_curve, transplant_curve
from mmneurons.targets import Target, token_at
from mmneurons.text import first_noun, same_noun
from mmneurons.train import init_projection
from mmneurons.wordnet import kind_of, names_match, related_words

ROOT = Path(__file__).resolve().parents[1]
PAPER = dict(paper=True)  # the score of these tables: eq. 2, maximum over patches
ZERO = dict(value='zero', positions='all')  # and the paper's intervention


def drawn(data, n):
    "The rows of `n` images, in a fixed random order"
    return np.random.default_rng(0).permutation(len(data))[:n].tolist()


def held_out(args, split='val'):
    "Images of the corpus that were not trained on"
    rest = corpus(args.corpus, split) if args.corpus else []
    for i in drawn(rest, args.n):
        yield rest[i]


def gallery_and_held_out(args):
    "The gallery, then held-out images"
    yield from gallery()
    for split in args.split:
        yield from held_out(args, split)


def append(rows, file):
    "Add rows to a table"
    rows.to_csv(file, mode='a', header=not file.exists(), index=False, float_format='%.4g')


def resumed(args, name, measure, folder=None, examples=None):
    "Add the table `measure(example)` of each image that the file lacks, and return the whole file"
    file = Path(folder or args.out) / f'{name}.csv'
    file.parent.mkdir(parents=True, exist_ok=True)
    done, left = set(pd.read_csv(file).image_id) if file.exists() else set(), args.limit
    for ex in gallery_and_held_out(args) if examples is None else examples:
        if ex.image_id in done or not left:
            continue
        try:
            table = measure(ex)
        except ValueError as e:
            print(ex.image_id, e)
            continue
        left -= 1
        append(table, file)
        print(ex.image_id, flush=True)
    return pd.read_csv(file)


def run_fidelity(args, mm):
    def measure(ex):
        table = fidelity(mm, ex.image, ex.image_id, args.top, args.random, args.every)
        units = Path(args.out) / 'fidelity-units.csv'
        if ex.image_id == 'horse' and not units.exists():
            table.to_csv(units, index=False, float_format='%.4g')
        return rank_correlations(table)

    resumed(args, 'fidelity', measure)


def decoded_neurons(args, mm):
    "Every neuron of the model with its tokens, decoded once: layer, unit, sign, interpretable, tokens"
    file = Path(args.work) / f'{args.model}.parquet'
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        decode_all(mm, file, chunk=128)
    return token_lists(pd.read_parquet(file))


def named_right(mm, ex):
    "The model's caption; an error if its first noun does not name the object"
    said = mm.caption(ex.image)
    if not names_match(first_noun(said) or '', ex.nouns[0]):
        raise ValueError(f'is called {said!r}')
    return said


def fits_of(table, noun):
    "For each row of a table of neurons: is one of its tokens related to `noun`?"
    return np.array([bool(related_words(tokens, noun)) for tokens in table.tokens], bool)


def strata(pool, noun):
    "The proportion of the interpretable neurons of each layer and sign whose tokens fit `noun`: the expectation of a random draw"
    return pool.assign(fits=fits_of(pool, noun)).groupby(['layer', 'sign']).fits.mean()


def summary(raw, by):
    "Mean proportions over images with their intervals"
    rows = []
    for key, part in raw.groupby(by, sort=False):
        for arm in ('top', 'random'):
            lo, hi = interval(part[arm])
            rows.append(
                dict(
                    zip(by, key),
                    arm=arm,
                    pictures=part.image_id.nunique(),
                    share=part[arm].mean(),
                    lo=lo,
                    hi=hi,
                )
            )
    return pd.DataFrame(rows)


def run_patches(args, mm):
    "For each image: the effect of ablating a neuron at the patch of its maximum, and the maximum"

    def measure(ex):
        seen = mm.see(ex.image)
        a = attribute(mm, seen, **PAPER)
        units = sample_neurons(mm, top_neurons(a, args.top), args.random, args.every)
        at = torch.tensor(units.layer.to_numpy()), torch.tensor(units.unit.to_numpy())
        target = Target(a.target, a.token_id, a.text_ids)
        exact = patch_effects(mm, seen, target, units.assign(patch=a.patch[at].numpy()))
        return rank_correlations(
            units.assign(
                image_id=ex.image_id, exact=exact, **{'eq. 2, maximum': a.scores[at].numpy()}
            )
        )

    resumed(args, 'fidelity-patches', measure)


def run_where(args, mm):
    "For each image that is named correctly, kind of position and layer: do the tokens of its 20 highest-scoring interpretable neurons fit?"
    pool = decoded_neurons(args, mm).query('interpretable')

    def measure(ex):
        a, acts = (
            attribute(
                mm, ex.image, caption=named_right(mm, ex), positions='all', full=True, **PAPER
            ),
            [None] * mm.n_layers,
        )
        with torch.no_grad(), hook_neurons(mm, lambda l, z: acts.__setitem__(l, z[0].T)):
            mm(mm.embed(mm.soft_prompt([ex.image]), a.text_ids))
        acts = torch.stack(acts)
        base, start, end, rows = (
            strata(pool, ex.nouns[0]),
            mm.image_positions.start,
            mm.image_positions.stop,
            [],
        )
        for kind, at in dict(
            image=slice(start, end), text=slice(end, -1), predicting=slice(-1, None)
        ).items():
            best, where = a.full[..., at].max(-1)
            sign = acts[..., at].gather(-1, where[..., None])[..., 0].sign()
            layer, unit = torch.meshgrid(*map(torch.arange, best.shape), indexing='ij')
            part = pd.DataFrame(
                dict(
                    layer=layer.flatten(),
                    unit=unit.flatten(),
                    sign=sign.flatten().int(),
                    score=best.flatten(),
                )
            )
            top = pool.merge(part, on=['layer', 'unit', 'sign']).sort_values(
                'score', ascending=False
            )
            top = top[top.score > 0].groupby('layer').head(args.top_layer)
            top['fits'], top['base'] = (
                fits_of(top, ex.nouns[0]),
                [base.get((l, s), 0) for l, s in zip(top.layer, top.sign)],
            )
            for layer, g in top.groupby('layer'):
                rows.append(
                    dict(
                        image_id=ex.image_id,
                        positions=kind,
                        layer=layer,
                        n=len(g),
                        top=g.fits.mean(),
                        random=g.base.mean(),
                    )
                )
        return pd.DataFrame(rows)

    raw = resumed(args, f'where-{args.model}', measure, args.work)
    summary(raw, ['positions', 'layer']).to_csv(
        Path(args.out) / f'where-{args.model}.csv', index=False, float_format='%.4g'
    )


def run_lenses(args, mm):
    "The same at the image positions, for each lens, over the 20 highest-scoring neurons of a layer, interpretable or not, against 60 random ones"
    ready, lenses = (
        {ex.image_id: ex.image for ex, _ in zip(held_out(args), range(40))},
        dict(logit=None),
    )
    for name, make in dict(
        tuned=lambda: tuned_lens(mm, own_text(mm, 48, 128)),
        jacobian=lambda: jacobian_lens(mm, list(ready.values())),
    ).items():
        file = Path(args.work) / f'{args.model}-{name}.safetensors'
        if not file.exists():
            save_lens(make(), file)
        lenses[name] = load_lens(file)
    some = random_units(mm.n_layers, mm.n_units, 60)
    drawn = {name: token_lists(decode(mm, some, lens=lens)) for name, lens in lenses.items()}

    def measure(ex):
        if ex.image_id in ready:
            raise ValueError('the Jacobian lens was made from it')
        a = attribute(mm, ex.image, caption=named_right(mm, ex), **PAPER)
        best = a.scores.topk(args.top_layer).indices
        top = pd.DataFrame(
            [
                (l, u, 1 if a.activation[l, u] >= 0 else -1)
                for l in range(mm.n_layers - 1)
                for u in best[l].tolist()
            ],
            columns=['layer', 'unit', 'sign'],
        )
        rows = []
        for name, lens in lenses.items():
            share = {
                arm: t.assign(fits=fits_of(t, ex.nouns[0])).groupby('layer').fits.mean()
                for arm, t in (
                    ('top', token_lists(decode(mm, top, lens=lens))),
                    ('random', drawn[name]),
                )
            }
            rows += [
                dict(
                    image_id=ex.image_id,
                    lens=name,
                    layer=l,
                    top=share['top'][l],
                    random=share['random'][l],
                )
                for l in share['top'].index
            ]
        return pd.DataFrame(rows)

    raw = resumed(args, f'lenses-{args.model}', measure, args.work)
    summary(raw, ['lens', 'layer']).to_csv(
        Path(args.out) / f'lenses-{args.model}.csv', index=False, float_format='%.4g'
    )


def run_agreement(args, mm):
    "Tables 1 and 2: for each image the best of the interpretable neurons among the top 100 against baselines; the soft prompt's nearest tokens against random ones"
    pool, bert = decoded_neurons(args, mm).query('interpretable'), load_bert(minilm())
    examples, spread = list(gallery_and_held_out(args)), embedding_spread(mm)

    def captions(ex):
        return list(ex.captions)

    def scores(table, ex, own=True):
        return dict(
            bert=best_of(
                table.tokens, lambda texts: bert_scores(bert, texts, [captions(ex)] * len(texts))
            ),
            fits=float(fits_of(table, ex.nouns[0]).any()) if len(table) else np.nan,
            share=fits_of(table, ex.nouns[0]).mean() if len(table) else np.nan,
            n=len(table),
        )

    def text_scores(texts, ex):
        return dict(
            bert=bert_scores(bert, texts, [captions(ex)] * len(texts)).mean(),
            fits=np.mean([bool(related_words(re.findall(r'\w+', t), ex.nouns[0])) for t in texts]),
        )

    def measure(ex):
        seen = mm.see(ex.image, image_id=ex.image_id)
        a = attribute(mm, seen, **PAPER)
        top = top_neurons(a, 100).merge(pool, on=['layer', 'unit', 'sign'])
        i = [e.image_id for e in examples].index(ex.image_id)
        other = next(
            e
            for e in examples[i + 1 :] + examples[:i]
            if not related_words([e.nouns[0]], ex.nouns[0])
        )
        vectors = seen.soft_prompt[0]
        near = {
            k: decode_prompt(mm, v)
            .groupby('vector')
            .token.agg(lambda t: ' '.join(x.strip() for x in t))
            .tolist()
            for k, v in dict(
                prompt=vectors,
                **{
                    f'random, {like}': random_vectors(vectors, of, i)
                    for like, of in dict(norm=None, embedding=spread).items()
                },
            ).items()
        }
        rows = [
            dict(table=1, arm='neurons', **scores(top, ex)),
            dict(table=1, arm='wrong image', **scores(top, other)),
            dict(table=1, arm='random neurons', **scores(matched(pool, top, i), ex)),
            dict(
                table=1,
                arm="model's caption",
                bert=bert_scores(bert, [a.caption], [captions(ex)])[0],
                fits=float(bool(related_words(re.findall(r'\w+', a.caption), ex.nouns[0]))),
            ),
        ]
        rows += [dict(table=2, arm=k, **text_scores(texts, ex)) for k, texts in near.items()]
        rows += [dict(table=2, arm="image's nouns", **text_scores([' '.join(ex.nouns)], ex))]
        return pd.DataFrame(rows).assign(image_id=ex.image_id, target=a.target)

    raw = resumed(args, f'agreement-{args.model}', measure, args.work)
    raw.drop(columns='target').to_csv(
        Path(args.out) / f'agreement-{args.model}.csv', index=False, float_format='%.3g'
    )


def run_layers(args, mm):
    "Fig. S.4: distinct neurons among the top 100 of all images, by layer, all and interpretable"
    table, key = decoded_neurons(args, mm), ['layer', 'unit', 'sign']

    def measure(ex):
        a = attribute(mm, ex.image, image_id=ex.image_id, **PAPER)
        top = top_neurons(a, 100).merge(table, on=key)
        return top[['image_id', *key, 'interpretable']]

    raw = resumed(args, f'layers-{args.model}', measure, args.work)
    different = (
        raw.drop_duplicates(key)
        .groupby('layer')
        .interpretable.agg(units='size', interpretable='sum')
    )
    share = table.groupby('layer').interpretable.mean()
    different = (
        different.join(share.rename('share_of_all'), how='outer')
        .fillna(0)
        .assign(pictures=raw.image_id.nunique())
        .reset_index()
    )
    different.to_csv(Path(args.out) / f'layers-{args.model}.csv', index=False, float_format='%.4g')


SPLITS = dict(cifar_test=1000, test=400, test_source=120, test_concept=120)


def outside(folder):
    "Photographs from outside the corpus: a folder with `outside.csv` (image, noun)"
    for r in csv.DictReader(open(Path(folder) / 'outside.csv', encoding='utf-8')):
        yield (
            Example(
                Path(r['image']).stem, open_image(Path(folder) / r['image']), (), (r['noun'],), {}
            ),
            dict(style='photo', concept=''),
        )


@cache
def first_tokens(mm, nouns):
    "The first token of each noun, and which nouns take \"an\""
    ids = torch.tensor([mm.word_ids(n)[0] for n in nouns])
    return ids, torch.tensor([n[0] in 'aeiou' for n in nouns])


@torch.no_grad()
def five(mm, image, nouns):
    "The five nouns that the model finds likeliest after \"A picture of a\", or \"an\""
    (ids, vowel), soft_prompt, scores = first_tokens(mm, nouns), mm.soft_prompt([image]), []
    for article in 'a', 'an':
        token = mm.tokenizer(f' {article}', add_special_tokens=False).input_ids
        x = mm.embed(soft_prompt, token)
        first, second = (
            mm.lm(inputs_embeds=x, logits_to_keep=2, use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)
        )
        scores.append(first[token[0]] + second[ids])
    return [nouns[i] for i in torch.where(vowel, scores[1], scores[0]).topk(5).indices]


def run_naming(args, mm):
    "For each image: the first noun of the caption, and whether it names the object; an arm's rows of a split are written together or not at all"
    file, data = (
        Path(args.out) / 'naming.csv',
        {split: corpus(args.corpus, split) for split in ('train', *SPLITS)},
    )
    nouns = tuple(sorted({r['noun'] for d in data.values() for r in d.rows}))
    known = {r['concept'] for r in data['train'].rows}
    done = (
        set(map(tuple, pd.read_csv(file)[['arm', 'split']].drop_duplicates().to_numpy()))
        if file.exists()
        else set()
    )

    def blind():
        model = MultimodalLM.from_pretrained(args.model, projection=False, dtype=mm.lm.dtype)
        init_projection(model)
        return model

    def shuffled():
        return MultimodalLM.from_pretrained(args.model, projection=args.shuffled, dtype=mm.lm.dtype)

    arms = dict(
        trained=(lambda: mm, SPLITS | (dict(outside=None) if args.outside else {})),
        random=(blind, dict(cifar_test=200, test=200)),
    )
    if args.shuffled:
        arms['shuffled'] = shuffled, dict(cifar_test=200, test=200)
    for arm, (load, splits) in arms.items():
        for split in [split for split in splits if (arm, split) not in done]:
            pairs, model = (
                [*outside(args.outside)]
                if split == 'outside'
                else [
                    (data[split][i], data[split].rows[i]) for i in drawn(data[split], splits[split])
                ],
                load(),
            )
            rows = []
            for i in tqdm(range(0, len(pairs), 16), desc=f'{arm} {split}'):
                batch = pairs[i : i + 16]
                for (ex, r), text in zip(batch, model.captions([ex.image for ex, _ in batch])):
                    word, noun = first_noun(text) or '', ex.nouns[0]
                    match = bool(word) and names_match(word, noun)
                    rows.append(
                        dict(
                            arm=arm,
                            split=split,
                            style=r['style'],
                            known=r['concept'] in known,
                            noun=noun,
                            said=word if match or word in nouns else '',
                            same=int(bool(word) and same_noun(word, noun)),
                            match=int(match),
                            top5=int(any(names_match(n, noun) for n in five(mm, ex.image, nouns)))
                            if arm == 'trained' and split != 'cifar_test'
                            else '',
                        )
                    )
            append(pd.DataFrame(rows), file)


def top_25(a, pool):
    "The 25 highest-scoring neurons of `pool` among an attribution's top 400, with their tokens"
    return top_neurons(a, 400)[['layer', 'unit', 'sign']].merge(pool).head(25)


def run_neurons(args, mm):
    "For each held-out image: of its 25 highest-scoring interpretable neurons and of random ones, how many fit a noun, and where they are active"
    train, data, file = (
        corpus(args.corpus, 'train'),
        corpus(args.corpus, 'test'),
        Path(args.out) / 'neurons.csv',
    )
    pool, order = decoded_neurons(args, mm).query('interpretable'), drawn(data, args.n)
    images = [train[i].image for i in drawn(train, 48)]
    usual = Baseline.over(mm, images, '48 training images').mean
    about = {
        data.rows[k]['image_id']: (k, data.rows[k]['style'], data.rows[j]['noun'])
        for k, j in zip(order, np.roll(order, 1))
    }  # with another image's noun

    def measure(ex):
        seen = mm.see(ex.image, image_id=ex.image_id)
        (k, style, other), a = about[ex.image_id], attribute(mm, seen, **PAPER)
        best = top_25(a, pool)
        arms = dict(top=best, random=matched(pool, best, seed=k))
        row = dict(
            image_id=ex.image_id,
            style=style,
            noun=ex.nouns[0],
            target=a.target,
            prob=a.prob,
            **{f'n_{arm}': len(units) for arm, units in arms.items()},
        )
        acts = unit_activations(mm, seen)
        truth = np.asarray(Image.fromarray(ex.masks[ex.nouns[0]]).resize((36, 36), Image.NEAREST))
        for arm, units in arms.items():
            row |= {
                f'{arm}_{name}': fits_of(units, noun).sum()
                for name, noun in dict(noun=ex.nouns[0], target=a.target, other=other).items()
            }
            plain = patch_activations(acts, units)
            for name, heat in dict(
                plain=plain, corrected=plain - patch_activations(usual, units)
            ).items():
                row[f'{arm}_{name}'] = np.nanmean(
                    roc_auc(to_pixels(heat, mm.grid, truth.shape), truth)
                )
        hits = best.assign(words=best.tokens.str.join(', '))
        hits = hits[fits_of(best, ex.nouns[0])][[*KEY, 'words']]
        if len(hits):
            append(
                hits.assign(image_id=ex.image_id, noun=ex.nouns[0]), file.with_stem('neurons-hits')
            )
        return pd.DataFrame([row])

    resumed(args, file.stem, measure, examples=(data[k] for k in order))


def named(text, nouns):
    "A caption's first noun, if it is one of the corpus's: other words of a model are not published"
    noun = (first_noun(text) or '').lower()
    return noun if noun in nouns else ''


def partner(data, k, same):
    "The index of another image: of the same noun, from another cut-out where there is one (None where there is no other image); or of another concept"
    rows, own = data.rows, data.rows[k]

    def cutout(r):
        return r['image_id'].rpartition('-')[0]

    if same:
        found = sorted(
            (j for j, r in enumerate(rows) if r['noun'] == own['noun'] and j != k),
            key=lambda j: cutout(rows[j]) == cutout(own),
        )
    else:
        found = [
            j
            for j in np.random.default_rng(k).permutation(len(rows))
            if not related_words([rows[j]['noun']], own['noun'])
        ]
    return int(found[0]) if found else None


def run_ablation(args, mm):
    "P(noun) and captions as neurons are ablated: the paper's arms, other rankings, and the neurons of other images"
    data, every, bert = corpus(args.corpus, args.split[0]), corpus(args.corpus), load_bert(minilm())
    pool, k, nouns = decoded_neurons(args, mm), paper_ks(mm)[-1], {r['noun'] for r in every.rows}
    at = {data.rows[i]['image_id']: i for i in drawn(data, args.n)}
    train = corpus(args.corpus, 'train')
    images = (train[i].image for i in drawn(train, 100))
    usual = Baseline.over(mm, images, '100 training images')

    def best(image):
        return top_neurons(attribute(mm, image, **PAPER), k)

    def measure(ex):
        seen = mm.see(ex.image, image_id=ex.image_id)
        a = attribute(mm, seen, **PAPER)
        target, i = Target(a.target, a.token_id, a.text_ids), at[ex.image_id]
        arms = paper_arms(mm, top_neurons(a, k), top_neurons(a, k, interpretable=pool), k=k)
        draws = arms['random']
        arms['random'] = {0: draws.pop(0)}
        more = dict(
            random=draws,
            activation=top_neurons(replace(a, scores=unit_activations(mm, seen).abs().amax(-1)), k),
        )
        more |= {
            name: top_neurons(attribute(mm, seen, target, **how), k)
            for name, how in ESTIMATES.items()
            if how != PAPER
        }
        more |= {
            f'of {name} noun': best(data[j].image)
            for name, j in {
                'the same': partner(data, i, True),
                'another': partner(data, i, False),
            }.items()
            if j is not None
        }
        curve = against_original(
            ablation_curve(mm, [seen], [a], arms, paper_ks(mm), **ZERO),
            lambda new, old: bert_scores(bert, [text or '.' for text in new], old).round(3),
        )  # an empty text has no score
        curve['said'] = [named(text, nouns) for text in curve.caption]
        ks = paper_ks(mm)
        rest = [ablation_curve(mm, [seen], [a], more, ks, caption=False, **ZERO)]
        for name, value in dict(zero='zero', mean=usual).items():
            arm = {f'{name} at the image': arms['top']}
            rest.append(ablation_curve(mm, [seen], [a], arm, ks, value, caption=False))
        rest = pd.concat(rest)
        return pd.concat([curve, rest[rest.n_ablated > 0]]).assign(noun=ex.nouns[0])[
            ['image_id', 'noun', 'arm', 'draw', 'n_ablated', 'p_target', 'said', 'score']
        ]

    resumed(
        args,
        f'ablation{"" if args.model == "pocket" else "-" + args.model}',
        measure,
        examples=(data[i] for i in at.values()),
    )


def right(mm, ex):
    "The attribution of an image that is named correctly"
    return attribute(mm, ex.image, caption=named_right(mm, ex), image_id=ex.image_id, **PAPER)


def donor_for(mm, data, ex):
    "Another image that is named correctly, of an object unrelated to this one's: its attribution, its index"
    seed = next(i for i, r in enumerate(data.rows) if r['image_id'] == ex.image_id)
    for i in np.random.default_rng(seed).permutation(len(data))[:40]:
        if related_words([data.rows[i]['noun']], ex.nouns[0]):
            continue
        try:
            return right(mm, data[i]), i
        except ValueError:
            pass
    raise ValueError('no donor is named right')


def run_steering(args, mm):
    "Pairs of images that are named correctly: a donor's neurons are driven in a host; outcomes only"
    data, train = corpus(args.corpus, args.split[0]), corpus(args.corpus, 'train')

    @cache
    def usual():
        return torch.stack(
            [
                attribute(mm, train[i].image, train[i].nouns[0], **PAPER).scores
                for i in tqdm(drawn(train, 48), desc='usual scores')
            ]
        ).mean(0)

    def measure(ex):
        host, (donor, i) = right(mm, ex), donor_for(mm, data, ex)
        top = top_neurons(donor, 100)
        blind = random_neurons(top, mm.n_units).assign(
            activation=top.sort_values('layer', kind='stable').activation.to_numpy()
        )
        arms = {
            '1': top.head(1),
            '10': top.head(10),
            '100': top,
            '100 specific': top_neurons(donor, 100, specific=usual()),
            '100 random': blind,
        }
        table = pd.concat(
            [
                steering_curve(mm, ex.image, host, donor, arms, s, how)
                for how, s in dict(clamp=(0.1, 0.3, 1, 3), add=(0.01, 0.03, 0.1, 0.3)).items()
            ]
        )
        return table.drop(columns='caption').assign(noun=ex.nouns[0], new=data.rows[i]['noun'])

    resumed(
        args,
        f'steering{"" if args.model == "pocket" else "-" + args.model}',
        measure,
        examples=(data[i] for i in drawn(data, args.n)),
    )


def run_transplant(args, mm):
    "Pairs as above: the host's neurons take the donor's activations, patch by patch; how many are needed?"
    data, train = corpus(args.corpus, args.split[0]), corpus(args.corpus, 'train')
    usual = torch.stack(
        [
            attribute(mm, train[i].image, train[i].nouns[0], **PAPER).scores
            for i in tqdm(drawn(train, 48), desc='usual scores')
        ]
    ).mean(0)

    def measure(ex):
        host, (donor, i) = right(mm, ex), donor_for(mm, data, ex)
        ranked = {
            'score': donor.scores,
            'specific': donor.scores - usual,
            'random': torch.rand(
                donor.scores.shape, generator=torch.Generator().manual_seed(int(i))
            ),
        }

        def order(scores):
            best = scores.flatten().argsort(descending=True)
            return pd.DataFrame(
                dict(layer=(best // mm.n_units).numpy(), unit=(best % mm.n_units).numpy())
            )

        table = transplant_curve(
            mm,
            ex.image,
            host,
            donor,
            unit_activations(mm, data[i].image),
            {arm: order(s) for arm, s in ranked.items()},
        )
        return table.drop(columns='caption').assign(noun=ex.nouns[0], new=data.rows[i]['noun'])

    resumed(args, 'transplant', measure, examples=(data[i] for i in drawn(data, args.n)))


KINDS = (
    'bird',
    'insect',
    'fish',
    'reptile',
    'dog',
    'feline',
    'ungulate',
    'rodent',
    'mammal',
    'animal',
    'fruit',
    'vegetable',
    'flower',
    'tree',
    'plant',
    'food',
    'weapon',
    'footwear',
    'clothing',
    'furniture',
    'ship',
    'boat',
    'aircraft',
    'vehicle',
    'building',
    'structure',
    'container',
    'tool',
    'device',
    'instrumentality',
    'artifact',
)  # fixed before anything was measured


def run_overlap(args, mm):
    "Fig. 5 on images of the corpus: do heatmaps of the highest-scoring neurons cover the object better than those of random neurons, of another image's, and maps without neurons?"
    train = corpus(args.corpus, 'train')
    order = [
        ex
        for split in args.split
        for ex in (
            (lambda d: [d.rows[i] | dict(of=d) for i in drawn(d, args.n)])(
                corpus(args.corpus, split)
            )
        )
    ]
    order = [r | dict(kind=kind_of(r['noun'], KINDS)) for r in order if kind_of(r['noun'], KINDS)]
    at = {r['image_id']: i for i, r in enumerate(order)}
    pool, some = (
        decoded_neurons(args, mm).query('interpretable'),
        [train[i] for i in drawn(train, 48)],
    )

    def usual_controls(ex):
        "At the word that the corpus's caption has"
        ids = mm.word_ids(ex.captions[0])
        return control_maps(mm, ex.image, ids[: token_at(mm, ids, ex.nouns[0]) or 0])

    usual, maps = (
        Baseline.over(mm, [ex.image for ex in some], '48 training images').mean,
        [usual_controls(ex) for ex in tqdm(some, desc='controls')],
    )
    usual_maps = {name: sum(m[name] for m in maps) / len(maps) for name in maps[0]}

    @cache
    def found(i):
        a = attribute(mm, order[i]['of'][order[i]['image_id']].image, **PAPER)
        return a, top_25(a, pool)

    def measure(ex):
        i = at[ex.image_id]
        j = next(
            k % len(order)
            for k in range(i + 1, i + len(order))
            if order[k % len(order)]['kind'] != order[i]['kind']
        )
        (a, best), acts, rows = found(i), unit_activations(mm, ex.image), []
        truth = np.asarray(Image.fromarray(ex.masks[ex.nouns[0]]).resize((72, 72), Image.NEAREST))
        if not len(best) or truth.all() or not truth.any():
            raise ValueError('no interpretable neuron, or no mask to compare with')
        plain = {
            arm: (patch_activations(acts, units), patch_activations(usual, units))
            for arm, units in dict(
                top=best, random=matched(pool, best, i), elsewhere=found(j)[1]
            ).items()
        }
        plain |= {
            name: (m, usual_maps[name])
            for name, m in control_maps(mm, ex.image, a.text_ids).items()
        }
        for arm, (here, mean) in plain.items():
            for kind, grid in dict(plain=here, corrected=here - mean).items():
                scale = (
                    grid.abs().amax(1, keepdim=True).clamp(1e-9)
                )  # so that no neuron with large activations dominates the mean
                for of, g in dict(
                    single=grid,
                    **({} if len(grid) == 1 else dict(mean=(grid / scale).mean(0, keepdim=True))),
                ).items():
                    rows.append(
                        dict(
                            image_id=ex.image_id,
                            kind=order[i]['kind'],
                            area=truth.mean(),
                            arm=arm,
                            map=kind,
                            of=of,
                            n=len(g),
                            **overlap(to_pixels(g, mm.grid, truth.shape), truth).mean(),
                        )
                    )
        return pd.DataFrame(rows)

    resumed(args, 'overlap', measure, examples=(r['of'][r['image_id']] for r in order))


def run_selectivity(args, mm):
    "Fig. S.2: for each class of CIFAR-10, the 20 neurons most often among the interpretable top 100 of its training images, by count or by preference for the class; means on test images"
    train, test, table, key = (
        corpus(args.corpus, 'train'),
        corpus(args.corpus, 'cifar_test'),
        decoded_neurons(args, mm).query('interpretable'),
        ['layer', 'unit', 'sign'],
    )
    classes = sorted({r['noun'] for r in test.rows})
    own = {
        c: [
            i
            for i in drawn(train, len(train))
            if train.rows[i]['noun'] == c and 'cifar' in train.rows[i]['source']
        ][: args.n]
        for c in classes
    }

    def measure(ex):
        return top_neurons(
            attribute(mm, ex.image, image_id=ex.image_id, **PAPER), 100, interpretable=table
        ).assign(**{'class': ex.nouns[0]})[['image_id', 'class', *key]]

    tops = resumed(
        args,
        f'selectivity-{args.model}-tops',
        measure,
        args.work,
        (train[i] for c in classes for i in own[c]),
    )
    arms = {}
    for name, specific in dict(top=False, specific=True).items():
        arms[name] = class_neurons(tops, 20, specific)
        arms[f'random of {name}'] = pd.concat(
            [
                random_neurons(part, mm.n_units, i).assign(**{'class': c})
                for i, (c, part) in enumerate(arms[name].groupby('class'))
            ]
        )
    both = pd.concat([part.assign(arm=arm) for arm, part in arms.items()], ignore_index=True)
    seen = [test[i] for i in drawn(test, args.measured)]
    means = class_means(mm, both, seen)
    out = (
        both[['arm', 'class', *key]]
        .join(means)
        .melt(['arm', 'class', *key], var_name='label', value_name='mean')
    )
    out.assign(
        chosen_on=tops.groupby('class').image_id.nunique().max(), measured_on=len(seen)
    ).to_csv(Path(args.out) / f'selectivity-{args.model}.csv', index=False, float_format='%.4g')


def with_words(data, n):
    "Images, in a fixed random order, until each kind of word is in `n` captions, with those words"
    counts = Counter()
    for i in drawn(data, len(data)):
        found = words_in(data.rows[i]['caption'], data.rows[i]['noun'])
        if any(counts[kind] < n for kind in found):
            counts.update(list(found))
            yield i, found


def asked(mm, ex, found, style):
    "The corpus's caption attributed word by word; for a photo or drawing, once more after the name of its style: [noun, style]"
    noun, (caption,) = ex.nouns[0], ex.captions
    style = style.replace('3d', '')  # no word that a caption would have
    said = dict(
        zip(
            ['noun', *found],
            attribute_words(
                mm,
                ex.image,
                [noun, *found.values()],
                caption=caption,
                image_id=ex.image_id,
                **PAPER,
            ),
        )
    )
    if not style:
        return said, None
    return said, attribute_words(
        mm,
        ex.image,
        [noun, style],
        caption=f'a {style} of {caption}',
        image_id=ex.image_id,
        **PAPER,
    )


def run_words(args, mm):
    "Neurons of colours, numbers, qualities, relations, places and styles: which words are lost and which stay when they are ablated, and whether they recur"
    splits = {split: corpus(args.corpus, split) for split in ('val', 'test', 'train')}
    wanted, file, units = (
        dict(val=max(1, args.n // 4), test=args.n),
        Path(args.work) / 'words-usual.safetensors',
        Path(args.work) / 'words-units.csv',
    )
    chosen = [
        (split, n, i, found)
        for split, few in wanted.items()
        for n, (i, found) in enumerate(with_words(splits[split], few))
    ]
    listed = {
        (r := splits[split].rows[i])['image_id']: (
            split,
            r['style'] if n < dict(val=3, test=12)[split] else '',
            found,
        )
        for split, n, i, found in chosen
    }  # style: of the first ones
    if not file.exists():
        total, counts = Counter(), Counter()
        for i, found in tqdm([*with_words(splits['train'], 6)], desc='usual scores'):
            said, styled = asked(mm, splits['train'][i], found, splits['train'].rows[i]['style'])
            for kind, a in (said | (dict(style=styled[1]) if styled else {})).items():
                total[kind] = total[kind] + a.scores
                counts[kind] += 1
        save_file({kind: total[kind] / counts[kind] for kind in total}, file)
    usual = load_file(file)

    def kept(kind, a):
        return dict(
            image_id=a.image_id,
            kind=kind,
            word=a.target,
            units=' '.join(
                str(u)
                for u in (a.scores - usual[kind.split()[-1]]).flatten().topk(100).indices.tolist()
            ),
        )

    def measure(ex):
        split, style, found = listed[ex.image_id]
        how = ZERO | (dict(ks=(64,), rankings=RANKINGS) if split == 'val' else {})
        said, styled = asked(mm, ex, found, style)
        out = [
            dissociation(
                mm, ex.image, said['noun'], {kind: said[kind] for kind in found}, usual, **how
            )
        ]
        if styled:
            out.append(dissociation(mm, ex.image, styled[0], dict(style=styled[1]), usual, **how))
        rows = [kept(kind, a) for kind, a in said.items()] + (
            [kept('style', styled[1])] if styled else []
        )
        if 'colour' in found:  # a colour that is not there
            colours = [
                c for c in ('blue', 'green', 'red', 'white', 'yellow') if c != found['colour']
            ]
            wrong = colours[len(ex.image_id) % len(colours)]
            rows.append(
                kept(
                    'absent colour',
                    attribute(
                        mm,
                        ex.image,
                        wrong,
                        caption=ex.captions[0].replace(found['colour'], wrong, 1),
                        image_id=ex.image_id,
                        **PAPER,
                    ),
                )
            )
        append(pd.DataFrame(rows), units)
        return pd.concat(out).assign(image_id=ex.image_id, split=split, noun=ex.nouns[0])

    table = resumed(
        args, 'words', measure, args.work, (splits[split][i] for split, _, i, _ in chosen)
    )
    table.to_csv(Path(args.out) / 'words.csv', index=False, float_format='%.3g')
    raw, out = pd.read_csv(units).drop_duplicates(['image_id', 'kind']), []
    raw = raw[raw.image_id.map(lambda i: listed[i][0]) == 'test']
    nouns = raw.image_id.map({r['image_id']: r['noun'] for r in splits['test'].rows}).to_numpy()
    for kind, part in raw[raw.kind != 'absent colour'].groupby('kind', sort=False):
        if part.word.nunique() < 2:
            continue
        things = None if kind == 'noun' else nouns[raw.kind == kind]
        shares = shared_fractions([u.split() for u in part.units])
        table = same_and_other(shares, part.word, things).assign(
            kind=kind, word=part.word.to_numpy(), p=label_test(shares, part.word, things)
        )
        if kind == 'colour':
            absent = raw[raw.kind == 'absent colour']
            both = shared_fractions([u.split() for u in [*part.units, *absent.units]])[
                : len(part), len(part) :
            ]
            match = np.equal.outer(
                part.word.to_numpy(), absent.word.to_numpy()
            ) & np.not_equal.outer(things, nouns[raw.kind == 'absent colour'])
            table['absent'] = masked_mean(both, match)
        out.append(table)
    pd.concat(out).to_csv(Path(args.out) / 'words-shared.csv', index=False, float_format='%.4g')


def form_of(row):
    "Photograph, drawing, emoji or 3d: emoji are told by the package they come from"
    if row['style'] == 'drawing' and re.search('emoj|noto', row['source']):
        return 'emoji'
    return row['style'].replace('photo', 'photograph')


def run_forms(args, mm, each=2):
    "The neurons of objects as photographs, drawings, emoji, 3d models and written words; and of their names in images of another object"
    data, found, folder = corpus(args.corpus), {}, Path(args.work) / 'forms'
    folder.mkdir(parents=True, exist_ok=True)
    for i in sorted(
        drawn(data, len(data)), key=lambda i: data.rows[i]['split'] == 'train'
    ):  # held-out images first
        r = data.rows[i]
        if 'cifar' not in r['source']:
            found.setdefault(r['noun'], {}).setdefault(form_of(r), {}).setdefault(
                r['image_id'].rpartition('-')[0], i
            )
    concepts = sorted(
        noun
        for noun, forms in found.items()
        if len(forms) == 4 and all(len(f) >= each for f in forms.values())
    )
    following = dict(zip(concepts, np.roll(concepts, -1)))

    def composed(noun, form, j):
        "The image, and its row of the corpus"
        if form == 'written':
            return written_word(noun, ink=('black', 'white')[j], ground=('white', 'navy')[j]), {}
        if form == 'blank':
            return Image.new('RGB', (384, 384), ('white', 'gray')[j]), {}
        of, form = (following[noun], 'photograph') if form == 'another object' else (noun, form)
        i = list(found[of][form].values())[j]
        return data[i].image, data.rows[i]

    forms = 'photograph', 'drawing', 'emoji', '3d', 'written', 'another object', 'blank'
    wanted = {
        f'{noun} {form} {j}': (noun, form, j)
        for noun in concepts
        for form in forms
        for j in range(each if form in forms[:5] else 1)
    }

    def article(noun):
        return f'{"an" if noun[0] in "aeiou" else "a"} {noun}'

    def measure(ex):
        noun, form, _ = wanted[ex.image_id]
        a = attribute(mm, ex.image, noun, caption=article(noun), image_id=ex.image_id, **PAPER)
        a.save(folder / f'{ex.image_id}.safetensors')
        row = composed(*wanted[ex.image_id])[1]
        return pd.DataFrame(
            [
                dict(
                    image_id=ex.image_id,
                    concept=noun,
                    form=form,
                    split=row.get('split', ''),
                    prob=a.prob,
                )
            ]
        )

    table = resumed(
        args,
        'forms-pictures',
        measure,
        examples=(Example(name, composed(*of)[0]) for name, of in wanted.items()),
    )
    concepts = [
        c
        for c, n in Counter(noun for noun, *_ in wanted.values()).items()
        if (table.concept == c).sum() == n
    ]  # of a run that was stopped, the complete ones
    table = table[table.concept.isin(concepts)].assign(order=table.form.map(forms.index))
    table = table.sort_values(['order', 'concept'], kind='stable')
    all_ = [Attribution.load(folder / f'{i}.safetensors') for i in table.image_id]
    scores, names = torch.stack([a.scores for a in all_]), (table.concept, table.form)
    best = specific_neurons(scores, *names)
    layers = np.stack([np.bincount(b // mm.n_units, minlength=mm.n_layers) for b in best])
    by_form = form_shares(shared_fractions(best), *names)
    by_form['random'] = form_shares(
        layers @ layers.T / (mm.n_units * best.shape[1]), *names
    ).different  # neurons permuted within their layers
    by_form.to_csv(Path(args.out) / 'forms.csv', index=False, float_format='%.3g')
    rows = []
    for frame in ('{}', 'A picture of {}', 'on a beach, {}'):
        acts = {c: text_activations(mm, frame.format(article(c)), c) for c in concepts}
        for form in forms:
            mean = {
                c: torch.stack(
                    [a.scores for a, x, f in zip(all_, *names) if (x, f) == (c, form)]
                ).mean(0)
                for c in concepts
            }
            own = {
                c: next(
                    replace(a, scores=mean[c])
                    for a, x, f in zip(all_, *names)
                    if (x, f) == (c, form)
                )
                for c in concepts
            }
            top = {
                c: top_neurons(
                    own[c],
                    100,
                    specific=torch.stack([m for x, m in mean.items() if x != c]).mean(0),
                )
                for c in concepts
            }
            chance = own_text_auc(
                {c: random_neurons(t, mm.n_units) for c, t in top.items()}, acts
            ).auc
            rows.append(
                own_text_auc(top, acts).assign(form=form, text=frame.format('…'), random=chance)
            )
    pd.concat(rows).to_csv(Path(args.out) / 'forms-text.csv', index=False, float_format='%.3g')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = [k[4:] for k in globals() if k.startswith('run_')]
    parser.add_argument('what', choices=['all', *steps])
    parser.add_argument('--model', default='pocket')
    parser.add_argument('--corpus')
    parser.add_argument('--out', default=ROOT / 'nbs' / 'data')
    parser.add_argument(
        '--work',
        default=ROOT / 'data' / 'measured',
        help='folder for large files: decodings, lenses, single images',
    )
    parser.add_argument('-n', type=int, default=50, help='images of each split of the corpus')
    parser.add_argument('--split', nargs='*', default=['val'])
    parser.add_argument('--limit', type=int, default=-1, help='images of this run')
    parser.add_argument('--projection', help='a projection file in place of the shipped one')
    parser.add_argument(
        '--top-layer', type=int, default=20, help='neurons of each layer (where, lenses)'
    )
    parser.add_argument('--outside', help='folder with outside.csv (naming)')
    parser.add_argument('--shuffled', help='a projection trained on shuffled captions (naming)')
    parser.add_argument('--measured', type=int, default=1000, help='test images (selectivity)')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
    parser.add_argument('--top', type=int, default=100)
    parser.add_argument('--random', type=int, default=200)
    parser.add_argument('--every', type=int, default=1)
    args = parser.parse_args()
    if args.what == 'all':
        measure_again(args.corpus)
        sys.exit()
    torch.manual_seed(0)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    globals()[f'run_{args.what}'](
        args,
        MultimodalLM.from_pretrained(
            args.model, projection=args.projection, dtype=getattr(torch, args.dtype)
        ),
    )
