"The catalogue on tiny models: known answers, a planted neuron, the null, resuming, and what is left out."

from functools import partial
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from mmneurons.activations import Baseline
from mmneurons.atlas import atlas, save_shown, shown_images
from mmneurons.catalogue import (
    PROMOTES,
    Catalogue,
    Evidence,
    count_table,
    evidence_rows,
    find_neurons,
    concept_aucs,
    meaning_neurons,
    with_sign,
)
from mmneurons.data import Example, Reader
from mmneurons.hooks import hook_neurons
from mmneurons.images import ImageError
from mmneurons.families import output_vectors, readout
from mmneurons.model import tiny_model
from mmneurons.promotion import concept_words, vocabulary_moments, word_scores
from mmneurons.recording import ActivationRun, Recording, image_activations, record_activations

COLOURS = dict(dog=(210, 40, 40), cat=(40, 210, 40), horse=(40, 40, 210))


def painted(row, broken=()):
    "A noisy square of one colour: what the label is can be seen from it"
    if row['image_id'] in broken:
        raise ImageError(f'{row["image_id"]}: it cannot be read')
    rng = np.random.default_rng(row['seed'])
    pixels = rng.normal(COLOURS.get(row['noun'], (90, 90, 90)), 40, (32, 32, 3)).clip(0, 255)
    return Example(row['image_id'], Image.fromarray(pixels.astype(np.uint8)), (), (row['noun'],))


def squares(n=24, nouns=tuple(COLOURS), more=(), broken=(), start=0):
    "`n` squares of each noun"
    named = [noun for _ in range(n) for noun in nouns] + [*more]
    rows = [
        dict(image_id=f'{noun}{start + i}', noun=noun, seed=start + i)
        for i, noun in enumerate(named)
    ]
    return Reader(rows, partial(painted, broken=broken))


@pytest.fixture(scope='module')
def mm():
    return tiny_model('gemma3_text')


def recording(mm, data, folder, **options):
    run = ActivationRun(mm, data, folder, **options)
    run.record()
    return Recording([run])


@torch.no_grad()
def plant(mm, layer, unit, sign, noun):
    "Let a neuron promote one noun and nothing else"
    token = mm.tokenizer.convert_tokens_to_ids(noun)
    rows = readout(mm, torch.eye(mm.d_model))
    wanted = torch.zeros(rows.shape[1])
    wanted[token] = sign
    vector = torch.linalg.lstsq(rows.T, wanted - wanted.mean()).solution
    column = mm.down(layer).weight[:, unit]
    gain = output_vectors(mm, layer, [unit])[0] / column
    column.copy_(0.01 * vector / gain)


def test_activations_are_the_means_that_a_hook_sees(mm):
    image, kept = squares()[0].image, {}
    x = mm.soft_prompt([image])
    found = image_activations(mm, x)
    with torch.no_grad(), hook_neurons(mm, lambda layer, acts: kept.update({layer: acts[0]})):
        mm(mm.embed(x, mm.tokenizer(' a', add_special_tokens=False).input_ids))
    for layer, acts in kept.items():
        torch.testing.assert_close(found[0, 0, layer], acts[mm.image_positions].mean(0))
        torch.testing.assert_close(found[0, 1, layer], acts[-1])


def test_auc_is_that_of_scikit_learn_up_to_the_ties_of_rounding(mm, tmp_path):
    seen = recording(mm, squares(), tmp_path)
    own, second = seen.own(['dog', 'horse']), seen.images.second.to_numpy()
    exact = torch.cat(
        [image_activations(mm, mm.soft_prompt([ex.image])) for ex in squares()]
    ).numpy()
    rounded = seen.layer(1)
    found = concept_aucs(rounded, own, second)
    for unit in range(0, mm.n_units, 7):
        for c in range(2):
            for half, aucs in ((~second, found[0]), (second, found[1])):
                truth, plain = own[c, half], exact[half, 0, 1, unit]
                inside, outside = rounded[unit, half][truth], rounded[unit, half][~truth]
                tied = (inside[:, None] == outside).mean()
                assert abs(roc_auc_score(truth, plain) - aucs[unit, c]) <= tied / 2 + 1e-12
                assert roc_auc_score(truth, -plain) == pytest.approx(
                    with_sign(found, -1)[int(half is second)][unit, c], abs=tied / 2 + 1e-12
                )


def test_z_scores_are_those_of_all_logits(mm):
    words = concept_words(mm, ['dog', 'cat'])
    assert set(words.text) == {'dog', 'cat'}
    logits = readout(mm, output_vectors(mm, 1)).numpy()
    z = (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    found = word_scores(mm, 1, words, vocabulary_moments(mm, chunk=8))
    for (_, word), column in found.items():
        token = mm.tokenizer.convert_tokens_to_ids(word)
        np.testing.assert_allclose(column, z[:, token], rtol=1e-3, atol=1e-4)


def test_a_planted_neuron_is_found_and_what_promotes_another_word_is_not(tmp_path):
    mm, data = tiny_model('gemma3_text'), squares()
    seen = recording(mm, data, tmp_path / 'before')
    own, second = seen.own(['dog']), seen.images.second.to_numpy()
    evidence = [
        with_sign(concept_aucs(seen.layer(0), own, second), sign)[..., 0] for sign in (1, -1)
    ]
    good = [np.where(mean > 0, np.minimum(a, b), 0) for a, b, mean in evidence]
    sign, unit = np.unravel_index(np.argmax(good), (2, mm.n_units))
    assert good[sign][unit] > 0.9, 'no neuron of the tiny model fires for a colour'
    sign = (1, -1)[sign]
    plant(mm, 0, unit, sign, 'dog')
    found = find_neurons(mm, data, tmp_path / 'after', effects=4, permutations=500)
    rows = found.rows.query('layer == 0 and unit == @unit and place == "image"')
    assert rows[['sign', 'concept', 'word']].values.tolist() == [[sign, 'dog', 'dog']]
    assert rows.tokens.iloc[0][0] == 'dog' and rows.z.iloc[0] > PROMOTES
    last = found.rows.query('layer == 1 and place == "image"')
    assert not len(last), 'nothing reads what the last layer writes at the image positions'
    assert np.isfinite(rows[['score', 'effect', 'effect_other']]).all(axis=None)

    shown = data[rows.images.iloc[0][0]].image  # where the neuron is most active
    baseline = Baseline.over(mm, [ex.image for ex in data])
    for catalogue in (found, None):
        meant = meaning_neurons(mm, shown, 'dog', catalogue, 50, baseline)
        assert ((meant.layer == 0) & (meant.unit == unit) & (meant.sign == sign)).any()
        assert not len(
            meaning_neurons(mm, data['cat1'].image, 'dog', catalogue, baseline=baseline).query(
                'layer == 0 and unit == @unit'
            )
        )

    found.about['projection'] = 'another'
    with pytest.raises(ValueError, match='is of the projection another'):
        meaning_neurons(mm, shown, 'dog', found, baseline=baseline)

    plant(mm, 0, unit, sign, 'cat')
    other = find_neurons(mm, data, effects=0, permutations=500)
    assert not len(other.rows.query('layer == 0 and unit == @unit and place == "image"'))


def random_evidence(seed, aligned=0):
    "Neurons that fire for one of ten concepts and promote the words of one, `aligned` of them of the same"
    rng, n, c = np.random.default_rng(seed), 600, 10
    fires, promotes = rng.integers(c, size=n), rng.integers(c, size=n)
    promotes[:aligned] = fires[:aligned]
    auc = np.full((n, c), 0.5)
    auc[range(n), fires] = 0.95
    scores = np.zeros((n, c))
    scores[range(n), promotes] = 4.0
    names = [f'c{i}' for i in range(c)]
    columns = pd.MultiIndex.from_tuples([(name, name) for name in names])
    evidence = Evidence((1,), names)
    evidence.add(
        'image', 0, np.stack([auc, auc, 0 * auc + 1]), pd.DataFrame(scores, columns=columns)
    )
    return evidence


def test_without_alignment_as_many_are_found_as_chance_gives():
    tables = [
        count_table(random_evidence(seed), 500).query('layer == -1 and stage == "confirmed"')
        for seed in range(40)
    ]
    first = pd.concat(t[t.auc == 0.9] for t in tables)
    assert first.expected.mean() == pytest.approx(60, abs=2)
    assert first.found.mean() == pytest.approx(60, abs=5)
    assert (first.p < 0.05).mean() <= 0.15


def test_aligned_neurons_stand_out_and_their_rate_is_the_ratio():
    evidence = random_evidence(0, aligned=100)
    row = (
        count_table(evidence, 500)
        .query('layer == -1 and stage == "confirmed" and auc == 0.85')
        .iloc[0]
    )
    assert row.found > 130 and row.hi < row.found and row.p < 0.01
    rows = evidence_rows(evidence)
    assert len(rows) == row.found
    assert rows.fdr.iloc[0] == pytest.approx(600 / 10 / row.found)  # all pairs, dealt at random


def test_a_run_that_was_stopped_gives_the_same_table(mm, tmp_path):
    class Stopped(Exception):
        pass

    data, whole = squares(12), squares(12)
    load, seen = data.load, []

    def once(row):
        seen.append(row)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return load(row)

    with pytest.raises(KeyboardInterrupt):
        ActivationRun(mm, Reader(data.rows, once), tmp_path / 'a', block=8).record()
    parts = len([*(tmp_path / 'a').glob('activations/*.parquet')])
    assert 0 < parts < 5
    a, b = (recording(mm, whole, tmp_path / name, block=8) for name in 'ab')
    pd.testing.assert_frame_equal(a.images, b.images)
    assert (a.layer(1) == b.layer(1)).all()
    with pytest.raises(ValueError, match='another run'):
        ActivationRun(tiny_model('gemma3_text', seed=1), whole, tmp_path / 'a', block=8)


def test_a_label_with_one_image_is_left_out_by_name(mm):
    found = find_neurons(mm, squares(more=['tree']), effects=0, permutations=500)
    assert found.about['concepts'] == ['cat', 'dog', 'horse']
    assert '1 images' in found.about['skipped']['tree']
    with pytest.raises(ValueError, match='tree: 1 images'):
        find_neurons(mm, squares(0, more=['tree', 'house']), effects=0)


def test_a_label_without_a_token_is_left_out_by_name(mm):
    found = find_neurons(mm, squares(nouns=('dog', 'cat', 'giraffe')), effects=0, permutations=500)
    assert found.about['skipped'] == dict(giraffe='no word of it is a single token')


def test_images_that_cannot_be_read_are_listed_and_passed_over(mm, tmp_path):
    run = ActivationRun(mm, squares(broken=('dog0', 'cat7')), tmp_path)
    run.record()
    assert len(run.images()) == 70 and 'dog0' not in set(run.images().image_id)
    failures = pd.concat(map(pd.read_parquet, (tmp_path / 'failures').glob('*.parquet')))
    assert set(failures.image_id) == {'dog0', 'cat7'} and failures.lost.all()


def test_confirmation_on_other_images(mm, tmp_path):
    found = find_neurons(mm, squares(), confirm=squares(10, start=500), effects=0, permutations=500)
    assert found.about['images'] == 102
    with pytest.raises(ValueError, match="two images are called 'dog0'"):
        find_neurons(mm, squares(), confirm=squares(10), effects=0)


def test_a_catalogue_comes_back_from_its_file(mm, tmp_path):
    found = find_neurons(mm, squares(), effects=0, permutations=500)
    found.save(tmp_path / 'c.json')
    again = Catalogue.load(tmp_path / 'c.json')
    pd.testing.assert_frame_equal(again.counts, found.counts.round(4), check_dtype=False)
    assert again.about == found.about


def test_concepts_come_from_nouns_or_masks_or_a_function(mm):
    by = lambda ex: ['cat' if ex.image_id.startswith('cat') else 'dog']
    found = find_neurons(mm, squares(), concepts=by, effects=0, permutations=500)
    assert found.about['concepts'] == ['cat', 'dog']
    with pytest.raises(ValueError, match="'nouns', 'masks' or a function"):
        ActivationRun(mm, squares(), 'nowhere', by='labels').record()


def test_the_atlas_of_a_run_shows_its_own_images_or_says_what_is_missing(mm, tmp_path):
    "Pages of a tiny model's catalogue; without rows, the list alone; of an unfinished run, an error"
    data = squares()
    found = find_neurons(mm, data, tmp_path, effects=0, permutations=500)
    found.save(tmp_path / 'catalogue.json')
    with pytest.raises(FileNotFoundError, match='no finished run'):
        atlas(tmp_path)
    seen = record_activations(mm, dict(images=data), tmp_path)
    baseline = seen.baseline(mm)
    row = dict(layer=0, unit=3, sign=1, concept='dog', word='dog', auc=0.9, auc_confirmed=0.9)
    row |= dict(z=4.0, fdr=0.1, english=['dog'], other=[], tokens=['dog'])
    two = pd.DataFrame([row | dict(place='image'), row | dict(place='predicting', sign=-1)])
    for rows in (two, found.rows.iloc[:0]):
        Catalogue(rows, found.counts, found.about).save(tmp_path / 'catalogue.json')
        shown = shown_images(mm, rows, seen, 'squares', baseline, k=1)
        save_shown(shown, tmp_path / 'shown.parquet')
        index = atlas(tmp_path, tmp_path / f'atlas-{len(rows)}')
        assert len([*index.parent.glob('L*.html')]) == len(shown) == len(rows)
        assert 'permuted words give' in index.read_text('utf-8')
        for row, place in zip(rows.itertuples(), rows.place):
            highest = (seen.layer(0, place)[3] * row.sign).argmax()
            best = shown[shown.place == place].image_id.tolist()
            assert best == [seen.images.image_id[highest]]
