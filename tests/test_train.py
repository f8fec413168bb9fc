"Training as it really goes: killed and started again, on images that cannot be read, on a full disk."

import errno, itertools, multiprocessing, os, random, re, resource, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from conftest import PRELOAD, ROOT
from mmneurons.data import Example, Reader
from mmneurons.images import open_image
from mmneurons.encoders import ENCODERS, Encoder
from mmneurons.model import MultimodalLM, tiny_model
from mmneurons.pairs import load_projection
from mmneurons.runs import processes
from mmneurons.train import Features, TrainConfig, caption_loss, lr_at, train_projection

COLOURS = dict(red=(200, 60, 60), grass=(60, 160, 60), river=(60, 60, 200))
CFG = TrainConfig(steps=4, batch_size=5, warmup=2, val_every=2, checkpoint_every=2)
ALL = replace(
    CFG,
    accumulate=2,
    feature_dropout=0.2,
    dropout=0.1,
    vocab='captions',
    precision='bf16',
    schedule='linear',
    samples=1,
)


def pictures(folder, n=12):
    "Files in `folder`, made where missing, noisy and of one colour, each with two captions that name the colour"
    folder.mkdir(exist_ok=True)
    rows = [
        dict(
            image_id=f'p{i}',
            file=folder / f'{i}.png',
            captions=(f'a {colour} on the', f'the {colour} on a'),
        )
        for i, colour in zip(range(n), itertools.cycle(COLOURS))
    ]
    for i, row in enumerate(rows):
        if row['file'].exists():
            continue
        noise = np.random.default_rng(i).integers(-40, 40, (32, 32, 3))
        Image.fromarray((noise + COLOURS[row['captions'][0].split()[1]]).astype(np.uint8)).save(
            row['file']
        )
    return Reader(
        rows, lambda row: Example(row['image_id'], open_image(row['file']), row['captions'])
    )


def fresh(func, *args):
    "The exit code of a fresh process, with one thread, that runs `func(*args)`"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=func, args=args)
    process.start()
    process.join()
    return process.exitcode


def die_at(moment, folder, events):
    "Kill this process just before an event ('open', 'os.rename') happens to a file under `folder` for the time number `moment`"
    moments = itertools.count(1)

    def hook(event, args):
        if event in events and str(folder) in str(args[0]) and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at_each_moment(func, home):
    "Folders in which `func(home, folder, moment)` was killed, each at another moment, and then started again"
    for moment in itertools.count(1):
        folder = home / f'killed-{moment}'
        code = fresh(func, home, folder, moment)
        assert code in (0, -signal.SIGKILL) and fresh(func, home, folder) == 0
        yield folder
        if code == 0:
            return  # there was no such moment: it had come to its end


def extract(home, folder, moment=None):
    torch.set_num_threads(1)
    if moment:
        die_at(moment, folder, ['open'])
    Features(tiny_model(), pictures(home / 'pictures'), folder, block=4)


def train(home, folder, moment=None, cfg=ALL):
    torch.set_num_threads(1)
    mm = tiny_model()
    features = Features(mm, pictures(home / 'pictures'), home / 'features')
    if moment:
        die_at(moment, folder, ['os.rename'])  # a new file is whole, and has not yet taken its name
    train_projection(mm, features, cfg, folder, val=features)


def train_on_a_full_disk(home, folder, limit):
    "No file may grow beyond `limit` bytes; the error is the exit code"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(home, folder)
    except OSError as e:
        sys.exit(e.errno)


def bits(tensors):
    return {name: t.detach().cpu().numpy().tobytes() for name, t in tensors.items()}


def outcome(folder):
    "What a finished run leaves: its projection bit by bit, and its log but for the time it took"
    log, said = (
        pd.read_csv(folder / 'log.csv').drop(columns='seconds'),
        (folder / 'samples.csv').read_text(),
    )
    checkpoint = torch.load(folder / 'checkpoint.pt', weights_only=True)
    return (
        bits(checkpoint['projection']),
        bits(load_file(folder / 'projection.safetensors')),
        log.to_csv(),
        said,
    )


def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path):
    assert fresh(train, tmp_path, tmp_path / 'unbroken') == 0
    want = outcome(tmp_path / 'unbroken')
    folders = list(killed_at_each_moment(train, tmp_path))
    assert len(folders) > 5
    for folder in folders:
        assert outcome(folder) == want, folder.name


def launch(*args):
    "Two processes with one thread each that run this file; on a CPU it is torchrun that starts them, and accelerate finds them"
    env = os.environ | dict(
        OMP_NUM_THREADS='1',
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    )
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nproc_per_node',
            '2',
            __file__,
            *map(str, args),
        ],
        env=env,
        capture_output=True,
        text=True,
    )


def together(home, folder):
    "What every process of `launch` does; the data set has failures, and blocks for both of them"
    cfg = replace(ALL, precision='no', accumulate=1, steps=8, val_every=4)
    train, val = (
        Features(tiny_model(), damaged(home, n), folder / 'features', block=3) for n in (12, 8)
    )
    os.write(
        1,
        f'{processes().num_processes} processes, {len(train)} pictures, {sorted(train.failures)} left out\n'.encode(),
    )
    train_projection(tiny_model(), train, cfg, folder, val)


def damaged(home, n):
    "Images of which one is missing"
    data = pictures(home / 'pictures', n)
    data.rows[1]['file'] = home / 'missing.png'
    return data


def test_a_run_killed_at_random_ends_as_an_unbroken_one(tmp_path):
    "Not at the moments when it touches a file, but whenever the clock says so"
    rng, context = random.Random(0), multiprocessing.get_context('forkserver')
    assert fresh(train_long, tmp_path, tmp_path / 'unbroken') == 0
    folder, kills = tmp_path / 'killed', 0
    while not (folder / 'projection.safetensors').exists():
        before = at(folder)
        process = context.Process(target=train_long, args=(tmp_path, folder))
        process.start()
        while process.is_alive() and at(folder) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        kills += process.is_alive()
        process.kill(), process.join()
    assert kills > 2 and outcome(folder) == outcome(tmp_path / 'unbroken')


def train_long(home, folder):
    train(home, folder, cfg=replace(ALL, steps=40, val_every=7))


def at(folder):
    "When the checkpoint in `folder` was written"
    return (
        os.stat(folder / 'checkpoint.pt').st_mtime_ns
        if (folder / 'checkpoint.pt').exists()
        else None
    )


def test_two_processes_do_what_one_does(tmp_path):
    assert fresh(together, tmp_path, tmp_path / 'one') == 0
    done = launch(tmp_path, tmp_path / 'two')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['2 processes, 11 pictures, [1] left out'] * 2
    one, two = (pd.read_csv(tmp_path / name / 'log.csv') for name in ('one', 'two'))
    for column in ('step', 'samples', 'lr', 'loss', 'val_loss'):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-5)
    one, two = (
        torch.load(tmp_path / name / 'checkpoint.pt', weights_only=True) for name in ('one', 'two')
    )
    for name in ('weight', 'bias'):
        torch.testing.assert_close(
            two['projection'][name], one['projection'][name], rtol=1e-4, atol=1e-6
        )
    assert two['samples'] == one['samples'] and len(two['samples']) == 2 * ALL.samples
    features = [
        sorted(
            path.relative_to(tmp_path / name).as_posix()
            for path in (tmp_path / name).rglob('*')
            if path.is_file()
        )
        for name in ('one', 'two')
    ]
    assert set(features[1]) - set(features[0]) == {
        f.replace('done-0', 'done-1') for f in features[0] if 'done-0' in f
    }
    assert done.stderr.count('training') and not re.search('Traceback|Warning', done.stderr), (
        done.stderr
    )


def test_an_extraction_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path):
    def left(folder):
        return [
            next(folder.glob(f'*/{name}')).read_bytes() for name in ('features.f16', 'done-0.jsonl')
        ]

    assert fresh(extract, tmp_path, tmp_path / 'unbroken') == 0
    want = left(tmp_path / 'unbroken')
    folders = list(killed_at_each_moment(extract, tmp_path))
    assert len(folders) > 6
    for folder in folders:
        assert left(folder) == want, folder.name


def test_what_cannot_be_used_is_listed_and_left_out(tmp_path):
    data = pictures(tmp_path / 'pictures', 8)
    data.rows[1]['file'] = tmp_path / 'missing.png'
    data.rows[2]['file'].write_bytes(data.rows[2]['file'].read_bytes()[:500])
    for i, said in {4: (), 5: ('', ' \n'), 6: (' ', 'the red on a')}.items():
        data.rows[i]['captions'] = said
    mm = tiny_model()
    for _ in range(2):  # extracted, then found again
        features = Features(mm, data, tmp_path / 'features', block=3)
        assert list(features.failures) == [1, 2, 4, 5]
        reasons = (
            'p1: .*missing.png: there is no such file',
            'p2: .*cannot be read',
            'p4: empty caption',
            'p5: empty',
        )
        for reason, said in zip(reasons, features.failures.values()):
            assert re.match(reason, said)
        assert features.rows == [0, 3, 6, 7] and len(features) == 4
        assert [features.caption(2, epoch) for epoch in range(2)] == ['the red on a'] * 2
        for row, i in enumerate(features.rows):
            assert torch.equal(features[[row]], mm.patches([data[i].image]).half())

    with pytest.raises(
        ValueError, match='none of 2 images can be used.*missing.png: there is no such file'
    ):
        Features(mm, data[1:3], tmp_path / 'features')


def test_features_are_used_again_only_where_they_are_the_same(tmp_path):
    data, read = pictures(tmp_path / 'pictures', 4), []
    load = data.load
    data.load = lambda row: read.append(row['image_id']) or load(row)

    def reads(mm):
        "How many images the features of `mm` had to be made of"
        read.clear()
        assert Features(mm, data, tmp_path / 'features')[[0]].shape == (1, mm.n_patches, mm.d_image)
        return len(read)

    cnn = tiny_model('gemma3_text')
    small = MultimodalLM(Encoder(ENCODERS['tiny-cnn'], (64, 64)), cnn.lm, cnn.tokenizer, cnn.config)
    for mm in (tiny_model(), cnn, small):
        assert (reads(mm), reads(mm)) == (4, 0)
    data.rows[0]['captions'] = ('the picture',)
    assert reads(cnn) == 4
    assert (reads(tiny_model(seed=1)), reads(tiny_model())) == (4, 4)
    data.rows[1]['file'].write_bytes(data.rows[2]['file'].read_bytes())
    assert (reads(tiny_model()), reads(tiny_model())) == (4, 0)  # an image changed, not its name


def test_there_need_be_no_warm_up():
    assert lr_at(0, replace(CFG, warmup=0)) == CFG.lr


def wider(mm):
    "`mm` with a wider language model under the same name"
    config = mm.lm.config.__class__(**mm.lm.config.to_dict() | dict(n_embd=48))
    return MultimodalLM(
        mm.encoder, AutoModelForCausalLM.from_config(config).eval(), mm.tokenizer, mm.config
    )


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    def go(mm, cfg=CFG, n=8):
        train_projection(
            mm,
            Features(mm, pictures(tmp_path / 'pictures', n), tmp_path / 'features'),
            cfg,
            tmp_path,
        )

    go(tiny_model())
    checkpoint = tmp_path / 'checkpoint.pt'
    kept = checkpoint.read_bytes()
    for other in [
        (tiny_model(), replace(CFG, lr=1e-4)),
        (tiny_model('gemma3_text'),),
        (wider(tiny_model()),),
        (tiny_model(), CFG, 4),
    ]:
        with pytest.raises(ValueError, match='checkpoint.pt is of') as e:
            go(*other)
        assert '\n' not in str(e.value)
        assert checkpoint.read_bytes() == kept
    go(tiny_model())  # the run itself is still there


def test_a_projection_of_another_width_is_refused(tmp_path):
    mm = tiny_model()
    train_projection(
        mm,
        Features(mm, pictures(tmp_path / 'pictures', 4), tmp_path),
        replace(CFG, steps=1),
        tmp_path,
    )
    other = wider(mm)
    before = bits(other.projection.state_dict())
    with pytest.raises(
        ValueError,
        match=r'projection of another model: its matrix is \(32, 24\), .* needs \(48, 24\)',
    ):
        load_projection(other, tmp_path / 'projection.safetensors')
    assert bits(other.projection.state_dict()) == before


def test_a_full_disk_is_an_error_and_costs_no_checkpoint(tmp_path):
    folder, checkpoint = tmp_path / 'run', tmp_path / 'run' / 'checkpoint.pt'
    assert fresh(train, tmp_path, tmp_path / 'unbroken') == 0
    next(
        moment
        for moment in itertools.count(1)
        if fresh(train, tmp_path, folder, moment) and checkpoint.exists()
    )
    kept = checkpoint.read_bytes()
    assert 0 < torch.load(checkpoint, weights_only=True)['step'] < CFG.steps
    assert fresh(train_on_a_full_disk, tmp_path, folder, len(kept) // 2) == errno.EFBIG
    assert checkpoint.read_bytes() == kept
    assert fresh(train, tmp_path, folder) == 0 and outcome(folder) == outcome(tmp_path / 'unbroken')


def test_a_full_disk_is_an_error_while_images_are_encoded(tmp_path):
    assert fresh(extract_on_a_full_disk, tmp_path, tmp_path / 'features', 4000) == errno.EFBIG
    assert (
        fresh(extract, tmp_path, tmp_path / 'features')
        == 0
        == fresh(extract, tmp_path, tmp_path / 'unbroken')
    )
    for name in ('features.f16', 'done-0.jsonl'):
        assert (
            next((tmp_path / 'features').glob(f'*/{name}')).read_bytes()
            == next((tmp_path / 'unbroken').glob(f'*/{name}')).read_bytes()
        )


def extract_on_a_full_disk(home, folder, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        extract(home, folder)
    except OSError as e:
        sys.exit(e.errno)


def test_a_checkpoint_that_is_damaged_is_refused_and_kept(tmp_path):
    for content in (b'', b'not a checkpoint', b'PK damaged'):
        (tmp_path / 'checkpoint.pt').write_bytes(content)
        with pytest.raises(ValueError, match='checkpoint.pt is damaged'):
            train_projection(tiny_model(), pictures(tmp_path / 'p', 4), CFG, tmp_path)
        assert (tmp_path / 'checkpoint.pt').read_bytes() == content and not (
            tmp_path / 'projection.safetensors'
        ).exists()


def test_features_of_another_encoder_are_refused(tmp_path):
    features = Features(tiny_model(seed=1), pictures(tmp_path / 'pictures', 4), tmp_path)
    with pytest.raises(ValueError, match='features of another encoder'):
        train_projection(tiny_model(), features, CFG, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def losses(tmp_path, **changes):
    "The losses of a short run"
    cfg, mm = replace(CFG, steps=6, **changes), tiny_model()
    return train_projection(
        mm, pictures(tmp_path / 'pictures', 12), cfg, tmp_path / repr(changes)
    ).loss.to_numpy()


def test_parts_and_precision_change_nothing_but_rounding(tmp_path):
    want = losses(tmp_path)
    np.testing.assert_allclose(losses(tmp_path, accumulate=3), want, rtol=1e-5)
    np.testing.assert_allclose(
        losses(tmp_path, accumulate=9), want, rtol=1e-5
    )  # more parts than images
    for precision in ('bf16', 'fp16'):
        got = losses(tmp_path, precision=precision)
        np.testing.assert_allclose(got, want, rtol=0.02)
        assert (got != want).any()
    for hidden in (dict(feature_dropout=0.3), dict(dropout=0.3)):
        assert (losses(tmp_path, **hidden) != want).all()


def test_the_log_is_of_the_users_choice(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = pictures(tmp_path / 'pictures', 8)
    log = train_projection(tiny_model(), data, CFG, tmp_path / 'run', data, log='tensorboard')
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard')).Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars('loss')], log.loss, rtol=1e-6)
    assert [e.step for e in events.Scalars('val_loss')] == [2, 4] and len(
        events.Tags()['tensors']
    ) == CFG.samples
    assert not list((tmp_path / 'run').glob('*.csv'))
    monkeypatch.setitem(sys.modules, 'tensorboard', None)  # as if it were not installed
    with pytest.raises(
        ValueError,
        match=r"log='tensorboard' needs the package tensorboard: pip install 'mmneurons\[train\]'",
    ):
        train_projection(tiny_model(), data, CFG, tmp_path / 'other', data, log='tensorboard')
    with pytest.raises(ValueError, match="log='html'"):
        train_projection(tiny_model(), data, CFG, tmp_path / 'other', data, log='html')


@pytest.mark.parametrize('kind', ['gptj', 'gemma3_text'])
def test_only_the_projection_changes(tmp_path, kind):
    mm = tiny_model(kind)
    before = bits(mm.state_dict())
    train_projection(mm, Features(mm, pictures(tmp_path / 'pictures'), tmp_path), CFG, tmp_path)
    after = bits(mm.state_dict())
    assert {name for name in before if before[name] != after[name]} == {
        'projection.weight',
        'projection.bias',
    }
    assert not any(p.requires_grad for p in mm.parameters())
    assert all(p.grad is None for part in (mm.lm, mm.encoder) for p in part.parameters())


def taught(mm):
    "`mm`, whose language model has learned from words alone to repeat the colour that it reads"
    embed, opt = (
        mm.lm.get_input_embeddings(),
        torch.optim.Adam(mm.lm.requires_grad_(True).parameters(), 1e-2),
    )
    ids = torch.tensor(
        [mm.tokenizer.convert_tokens_to_ids([colour] * mm.n_patches) for colour in COLOURS]
    )
    for _ in range(100):
        opt.zero_grad()
        caption_loss(
            mm, embed(ids), [f'a {colour} on the' for colour in COLOURS], CFG.prompt
        ).backward()
        opt.step()
    mm.lm.requires_grad_(False)
    return mm


@pytest.mark.parametrize('kind', ['gptj', 'gemma3_text'])
def test_images_find_their_words_unless_the_captions_are_shuffled(tmp_path, kind):
    cfg = replace(
        CFG, steps=60, batch_size=16, lr=3e-3, warmup=5, val_every=60, checkpoint_every=60
    )
    n, names = 72, list(COLOURS)
    shown = [names[i % 3] for i in range(n)]

    def learn(said, folder):
        "The loss on the first batch and on held-out images, and whether each of their captions names the colour"
        mm, data = taught(tiny_model(kind)), pictures(tmp_path / 'pictures', n)
        for row, colour in zip(data.rows, said):
            row['captions'] = (f'a {colour} on the',)
        train, val = (Features(mm, part, folder) for part in (data[:48], data[48:]))
        log = train_projection(mm, train, cfg, folder, val)
        captions = mm.captions([example.image for example in data[48:]], max_new_tokens=5)
        return (
            log.loss[0],
            log.val_loss.iloc[-1],
            [colour in text for colour, text in zip(shown[48:], captions)],
        )

    guess = np.log(3) / 5  # one of three colours, in one word of five
    first, last, named = learn(shown, tmp_path / 'true')
    assert last < guess / 2 and last < first / 5 and all(named)
    _, last, named = learn([names[i // 3 % 3] for i in range(n)], tmp_path / 'shuffled')
    assert last > 0.8 * guess and not all(named)  # a guess, up to the luck of 24 images


if __name__ == '__main__':
    together(*map(Path, sys.argv[1:]))
