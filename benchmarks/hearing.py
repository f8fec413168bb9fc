"""Hearing: train the audio projection, and compare the neurons of sounds with the neurons of images.

    python benchmarks/sounds.py data/sounds                                  the recordings
    python benchmarks/hearing.py all --sounds data/sounds --corpus data/corpus   the projection (to `data/ear`) and the tables hearing*.csv (to nbs/data)

One of its steps can be named in place of `all`: train, naming, images, sounds, overlap, time, catalogue. The steps train, images and sounds
continue after a stop.
"""

import argparse
from pathlib import Path

import numpy as np, pandas as pd, torch

from mmneurons.activations import Baseline, neuron_activations
from mmneurons.attribution import attribute, top_neurons
from mmneurons.data import corpus
from mmneurons.studies.hearing import (
    WINDOW,
    audio_model,
    best_neurons,
    is_loud,
    mean_scores,
    read_sound,
    shared_neurons,
    sounds,
    spectrogram,
    time_course,
    window,
    with_article,
)
from mmneurons.catalogue import own_catalogue
from mmneurons.neurons import KEY, random_neurons
from mmneurons.model import MultimodalLM
from mmneurons.stats import roc_auc
from mmneurons.train import Features, TrainConfig, train_projection

RECIPE = TrainConfig(
    steps=1000,
    batch_size=8,
    lr=2e-3,
    warmup=30,
    keep=0.5,
    prompt='The sound of',
    feature_dropout=0.1,
    vocab='captions',
    val_every=10**6,
    checkpoint_every=25,
)


def run_train(args, mm):
    "The audio projection, from the recordings of the training split"
    listener = audio_model(mm, False)
    train = Features(
        listener, sounds(args.sounds, 'train', args.copies), Path(args.work) / 'features'
    )
    train_projection(listener, train, RECIPE, args.work)


def cached(file, make):
    "The result of `make()`, computed once"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    return torch.load(file)


@torch.no_grad()
def choices(mm, image, firsts):
    "Probabilities of the words, at the step after the article"
    seen = mm.see(image, False)
    articles = {w: mm.tokenizer(f' {w}', add_special_tokens=False).input_ids for w in ('a', 'an')}
    start, out = mm.next_probabilities(seen.soft_prompt)[0], {}
    after = {w: mm.next_probabilities(seen.soft_prompt, ids)[0] for w, ids in articles.items()}
    for word, first in firsts.items():
        a = with_article(word).split()[0]
        out[word] = (start[articles[a][0]] * after[a][first]).item()
    return pd.Series(out) / sum(out.values())


def heard_features(listener, data, rows):
    "(row, d_image): the features of recordings, the mean over time"
    return torch.stack([listener.patches([data[int(i)].image])[0].float().mean(0) for i in rows])


def nearest(train, labels, test):
    "The word whose mean training features are nearest, by cosine: what the encoder knows without a language model"
    mean, std = train.mean(0), train.std(0)
    words = sorted(set(labels))
    centre = torch.stack([((train - mean) / std)[[l == w for l in labels]].mean(0) for w in words])
    cosine = (
        torch.nn.functional.normalize((test - mean) / std, dim=1)
        @ torch.nn.functional.normalize(centre, dim=1).T
    )
    return [words[i] for i in cosine.argmax(1).tolist()]


def run_naming(args, mm):
    "The word that the model generates for each recording, against the encoder alone and silence: all test recordings, a third of the training's"
    listener, rows = audio_model(mm, args.projection), []
    train, test = sounds(args.sounds, 'train'), sounds(args.sounds, 'test')
    words = sorted({r['word'] for r in [*train.rows, *test.rows]})
    firsts = {w: mm.word_ids(w)[0] for w in words}
    silent = choices(
        listener, spectrogram(np.random.default_rng(0).standard_normal(WINDOW) * 1e-3), firsts
    )
    known, labels = (
        heard_features(listener, train, range(len(train))),
        [r['word'] for r in train.rows],
    )
    for data, split, some in (
        (test, 'test', range(len(test))),
        (train, 'train', range(0, len(train), 3)),
    ):
        near = nearest(known, labels, heard_features(listener, data, some))
        for i, alone in zip(some, near):
            ex = data[i]
            p, word = choices(listener, ex.image, firsts), ex.nouns[0]
            rows.append(
                dict(
                    image_id=ex.image_id,
                    split=split,
                    package=data.rows[i]['package'],
                    word=word,
                    said=p.idxmax(),
                    p=p[word],
                    rank=int((p > p[word]).sum()) + 1,
                    noise=silent.idxmax(),
                    nearest=alone,
                )
            )
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(
        Path(args.out) / 'hearing-naming.csv', index=False, float_format='%.4g'
    )


def images_of(args, word, n):
    "Images of an object, held-out ones first"
    data = corpus(args.corpus)
    order = {'train': 9}
    rows = [r for r in data.rows if r['noun'] == word]
    rng = np.random.default_rng(0)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return [data.load(r) for r in sorted(rows, key=lambda r: order.get(r['split'], 0))[:n]]


def run_images(args, mm):
    "The scores of each word for images"
    for word in sorted({r['word'] for r in sounds(args.sounds, 'test').rows}):
        cached(
            Path(args.work) / 'eye' / f'{word}.pt',
            lambda: mean_scores(
                mm, [ex.image for ex in images_of(args, word, args.n)], word
            ).half(),
        )
        print(word, flush=True)


def run_sounds(args, mm):
    "The scores of each word for sounds: its own held-out ones, those that were trained on, and, as a control, held-out ones of other words"
    listener, data, train = (
        audio_model(mm, args.projection),
        sounds(args.sounds, 'test'),
        sounds(args.sounds, 'train'),
    )
    rng, words = np.random.default_rng(0), sorted({r['word'] for r in data.rows})
    for word in words:
        own, known = (
            [d[i].image for i, r in enumerate(d.rows) if r['word'] == word][: args.n]
            for d in (data, train)
        )
        others = rng.permutation([i for i, r in enumerate(data.rows) if r['word'] != word])[
            : len(own)
        ]
        cached(
            Path(args.work) / 'ear' / f'{word}.pt', lambda: mean_scores(listener, own, word).half()
        )
        cached(
            Path(args.work) / 'trained' / f'{word}.pt',
            lambda: mean_scores(listener, known, word).half(),
        )
        cached(
            Path(args.work) / 'other' / f'{word}.pt',
            lambda: mean_scores(listener, [data[int(i)].image for i in others], word).half(),
        )
        print(word, flush=True)


def run_overlap(args, mm):
    "The table of shared neurons, from what `images` and `sounds` left"
    load = lambda arm: {
        f.stem: torch.load(f).float() for f in sorted((Path(args.work) / arm).glob('*.pt'))
    }
    seen, rows = load('eye'), []
    n_units = next(iter(seen.values())).shape[1]
    for k in (25, 100):
        for specific in (True, False):
            eye = best_neurons(seen, k, specific)
            for arm, name in dict(
                ear='own sounds', trained='trained sounds', other='other sounds'
            ).items():
                heard = best_neurons(load(arm), k, specific)
                rows.append(
                    shared_neurons(heard, eye, n_units).assign(arm=name, k=k, specific=specific)
                )
    pd.concat(rows).to_csv(Path(args.out) / 'hearing-overlap.csv', index=False, float_format='%.4g')


def run_time(args, mm):
    "Are a sound's neurons active while it sounds? Chosen with the sound early in the window, measured with the sound late in it"
    listener, data, rows = audio_model(mm, args.projection), sounds(args.sounds, 'test'), []
    train = sounds(args.sounds, 'train', 1)
    some = np.random.default_rng(0).permutation(range(len(train) // 2, len(train)))[
        :40
    ]  # augmented: anywhere in the window
    usual = Baseline.over(listener, [train[int(i)].image for i in some], '40 training sounds')
    for row in data.rows:
        samples = read_sound(Path(args.sounds) / row['file'])
        early, late = window(samples, 0), window(samples, 1)
        truth = is_loud(late)
        if len(samples) > WINDOW or truth.mean() > 0.5:
            continue
        word = row['word']
        a = attribute(listener, spectrogram(early), word, caption=with_article(word), paper=True)
        top = top_neurons(a, 100)
        for arm, units in dict(top=top, random=random_neurons(top, listener.n_units)).items():
            heat = time_course(listener, spectrogram(late), units, usual)
            rows.append(
                dict(
                    image_id=row['image_id'],
                    word=row['word'],
                    arm=arm,
                    loud=truth.mean(),
                    auc=roc_auc(heat.numpy()[:, None], truth[None]).mean(),
                )
            )
        print(rows[-2:], flush=True)
    pd.DataFrame(rows).to_csv(Path(args.out) / 'hearing-time.csv', index=False, float_format='%.4g')


def run_catalogue(args, mm):
    "Do the catalogue's neurons, found with images, tell sounds of their concept from other sounds?"
    listener = audio_model(mm, args.projection)
    data = [
        (split, row['word'], ex)
        for split in ('train', 'test')
        for d in [sounds(args.sounds, split)]
        for row, ex in zip(d.rows, d)
    ]
    splits, words = (np.array([row[i] for row in data]) for i in (0, 1))
    found = own_catalogue(mm).rows
    found = found[(found.place == 'image') & found.concept.isin(words)]
    units = found[KEY].drop_duplicates().sort_values(KEY).reset_index(drop=True)
    both = pd.concat([units, random_neurons(units, mm.n_units)], ignore_index=True)
    acts = [neuron_activations(listener, ex.image, both).mean(1) for *_, ex in data]
    acts, tables = torch.stack(acts, 1).numpy(), []  # (neuron, recording)
    for split in ('train', 'test'):
        some = splits == split
        kinds = np.unique(words[some])
        aucs = roc_auc(acts[:, some], kinds[:, None] == words[some])
        every = units.join(pd.DataFrame(aucs[: len(units)], columns=kinds))
        every = every.melt(KEY, var_name='word', value_name='auc')
        every['random'] = aucs[len(units) :].T.ravel()
        every['n'] = every.word.map(pd.Series(words[some]).value_counts())
        rows = found[[*KEY, 'concept']].drop_duplicates().merge(every, on=KEY)
        own, other = (rows[(rows.word == rows.concept) == same] for same in (True, False))
        other = other.groupby([*KEY, 'concept']).auc.mean().rename('other_words').reset_index()
        own = own.drop(columns='word').merge(other)
        tables.append(own.assign(split=split, recordings=int(some.sum())))
    table = pd.concat(tables)
    table.to_csv(Path(args.out) / 'hearing-catalogue.csv', index=False, float_format='%.4g')


def run_all(args, mm):
    "All steps"
    run_train(args, mm)
    args.projection = Path(args.work) / 'projection.safetensors'
    for step in (run_naming, run_images, run_sounds, run_overlap, run_time, run_catalogue):
        step(args, mm)


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('what', choices=[k[4:] for k in globals() if k.startswith('run_')])
    p.add_argument('--sounds', default='data/sounds')
    p.add_argument('--corpus', default='data/corpus')
    p.add_argument('--work', default='data/ear')
    p.add_argument('--out', default='nbs/data')
    p.add_argument('--projection')
    p.add_argument('--copies', type=int, default=4)
    p.add_argument('-n', type=int, default=3)
    args = p.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    mm = MultimodalLM.from_pretrained('pocket', dtype=torch.bfloat16)
    globals()[f'run_{args.what}'](args, mm)
