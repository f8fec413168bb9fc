"Sweeps as they really go: killed at random, on a full disk, with images that vanish, on two processes."

import json, multiprocessing, os, random, re, resource, shutil, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, psutil, pytest, torch
from conftest import PRELOAD, ROOT
from mmneurons import cli
from mmneurons.data import Example, Reader, coco, gallery, write_coco
from mmneurons.images import open_image
from mmneurons.model import tiny_model
from mmneurons.runs import RepeatedFault
from mmneurons.activations import Baseline
from mmneurons.sweeps import SCHEMAS, TASKS, SweepConfig, sweep
from mmneurons.sweeps import read_table
from test_train import fresh, pictures

CFG = SweepConfig(tasks=TASKS, k=8, ks=(0, 4), block=2, reference=4, pool=16, watch=3)


def masked(folder, n=24):
    "Images with captions, each with an object in its left half"
    data, left = pictures(folder, n), np.arange(32)[None] < np.full(32, 16)[:, None]
    return Reader(
        data.rows,
        lambda row: Example(
            row['image_id'],
            open_image(row['file']),
            row['captions'],
            (row['captions'][0].split()[1],),
            {'object': left},
        ),
    )


def go(home, folder, n=24, cfg=CFG, data=None, model=None):
    "A run in this process, quietly"
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, 'w')
    return sweep(model or tiny_model(seed=5), data or masked(home / 'pictures', n), folder, cfg)


def contents(folder):
    "Every table of a run, byte by byte, and what else it says of itself"
    files = [
        p for p in sorted(Path(folder).rglob('*')) if p.is_file() and not p.name.startswith('log-')
    ]
    return {p.relative_to(folder).as_posix(): content(p) for p in files}


def content(file):
    "The bytes of a file; of a baseline its parts, because safetensors writes metadata in any order"
    if file.suffix != '.safetensors':
        return file.read_bytes()
    b = Baseline.load(file)
    return b.n, b.source, b.pair, b.mean.numpy().tobytes()


def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(tmp_path):
    "Killed again and again, each time a moment after it has written something, until it is done"
    assert fresh(go, tmp_path, tmp_path / 'unbroken') == 0
    want, folder, kills, rng = (
        contents(tmp_path / 'unbroken'),
        tmp_path / 'killed',
        0,
        random.Random(0),
    )
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)

    def written():
        return sum(1 for _ in folder.glob('*/*'))

    while True:
        before, process = written(), context.Process(target=go, args=(tmp_path, folder))
        process.start()
        while process.is_alive() and written() == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.kill(), process.join()
        if process.exitcode == 0:
            break
        kills += 1
        for name, found in contents(folder).items():  # whatever is there is final
            assert Path(name).name.startswith('.') or found == want[name], name
    assert kills >= 20 and contents(folder) == want


def launch(*args, n=2):
    "Processes with one thread each that run this file, started by torchrun"
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
            str(n),
            __file__,
            *map(str, args),
        ],
        env=env,
        capture_output=True,
        text=True,
    )


def test_two_processes_do_what_one_does(tmp_path):
    assert fresh(go, tmp_path, tmp_path / 'one', 13) == 0
    done = launch(tmp_path, tmp_path / 'two', 13)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'two') == contents(tmp_path / 'one')
    logs = [pd.read_csv(tmp_path / 'two' / f'log-{p}.csv') for p in range(2)]
    for log in logs:
        assert {*log.task} >= {'attribute', 'masks', 'ablate', 'scores'}  # both of them worked
    assert not set(zip(logs[0].task, logs[0].block)) & set(zip(logs[1].task, logs[1].block))


# What a cluster has and this machine lacks: `srun` starts the processes, `scontrol` names the nodes.
STAND_INS = dict(
    srun="""
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & started+=($!)
done
for process in "${started[@]}"; do wait $process || failed=1; done
exit ${failed:-0}
""",
    scontrol='echo 127.0.0.1',
    mmneurons=f'exec {sys.executable} -m mmneurons.cli "$@"',
)


def cluster(folder, tasks):
    "The chapter's Slurm script, and an environment in which the stand-ins are found"
    text = ''.join(
        ''.join(cell['source'])
        for cell in json.loads((ROOT / 'nbs' / '06_sweep.ipynb').read_text('utf-8'))['cells']
    )
    (script := folder / 'sweep.slurm').write_text(re.search(r'(?s)```bash\n(.*?)```', text)[1])
    (folder / 'bin').mkdir()
    for name, lines in STAND_INS.items():
        (file := folder / 'bin' / name).write_text(f'#!/bin/bash\n{lines}\n')
        file.chmod(0o755)
    paths = dict(PATH=[folder / 'bin', os.environ['PATH']], PYTHONPATH=[ROOT])
    env = os.environ | {name: os.pathsep.join(map(str, path)) for name, path in paths.items()}
    env |= dict(SLURM_JOB_ID=str(os.getpid()), SLURM_NTASKS=str(tasks), OMP_NUM_THREADS='1')
    return script, env | dict(SLURM_JOB_NODELIST='node[1]')


def test_the_slurm_script_of_the_chapter_does_what_one_process_does(tmp_path):
    pictures(tmp_path / 'pictures', 4)
    tiny_model(seed=5).save_pretrained(tmp_path / 'pair', whole=True)
    options = ['--data', f'folder:{tmp_path / "pictures"}', '--model', tmp_path / 'pair']
    options += ['--tasks', 'attribute,decode', '--k', 5, '--pool', 4, '--block', 1]
    options = [*map(str, options), '--device', 'cpu', '--out']
    script, env = cluster(tmp_path, 2)
    done = subprocess.run(
        ['bash', script, *options, tmp_path / 'two'], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert cli.main(['sweep', *options, str(tmp_path / 'one')]) == 0
    assert contents(tmp_path / 'two') == contents(tmp_path / 'one')
    assert len(read_table(tmp_path / 'two', 'images')) == 4
    logs = [pd.read_csv(tmp_path / 'two' / f'log-{p}.csv') for p in range(2)]
    blocks = [set(log[log.task == 'attribute'].block) for log in logs]
    assert blocks == [{0, 2}, {1, 3}]


def test_what_goes_wrong_with_an_image_is_listed_and_the_rest_goes_on(tmp_path):
    data = masked(tmp_path / 'pictures', 8)
    data.rows[1]['file'] = tmp_path / 'vanished.png'
    torn = data.rows[2]['file'].read_bytes()
    data.rows[2]['file'].write_bytes(torn[:500])
    data.rows[3]['captions'] = ('the red ' + 'x' * 10**7, 'the red on a')  # no reason to fail
    failures = sweep(tiny_model(seed=5), data, tmp_path / 'run', CFG)
    failures = failures[failures.lost].reset_index(drop=True)
    assert failures.image_id.tolist() == ['p1', 'p2'] and {*failures.task} == {'attribute'}
    assert (
        'vanished.png: there is no such file' in failures.reason[0]
        and 'cannot be read' in failures.reason[1]
    )
    for name in ('images', 'neurons', 'curve', 'scores', 'overlaps'):
        assert read_table(tmp_path / 'run', name).image_id.drop_duplicates().tolist() == [
            f'p{i}' for i in (0, 3, 4, 5, 6, 7)
        ]


def test_an_image_that_vanishes_between_two_tasks_is_lost_for_the_second_only(tmp_path):
    data, kept = masked(tmp_path / 'pictures', 6), tmp_path / 'run'
    load, seen = data.load, set()

    def once(row):  # it is deleted once it has been attributed
        if row['image_id'] == 'p4' and 'p4' in seen:
            Path(row['file']).unlink(missing_ok=True)
        seen.add(row['image_id'])
        return load(row)

    data.load = once
    failures = sweep(tiny_model(seed=5), data, kept, CFG).query('lost')
    assert {*failures.image_id} == {'p4'} and {*failures.task} == {'masks', 'ablate', 'scores'}
    assert 'p4' in set(read_table(kept, 'neurons').image_id) and 'p4' not in set(
        read_table(kept, 'curve').image_id
    )


def test_a_caption_without_a_noun_is_listed(tmp_path):
    "The model itself says so: this one's captions are empty, or of adjectives"
    failures = sweep(tiny_model(seed=9), gallery()[:6], tmp_path / 'run', CFG)
    assert (
        len(failures)
        and failures.reason.str.match(
            "its caption has no noun: |the caption '.*' has no word"
        ).all()
        and failures.lost.all()
    )
    rest = read_table(tmp_path / 'run', 'images')
    assert (
        len(rest) and not {*rest.image_id} & {*failures.image_id} and len(rest) + len(failures) == 6
    )


def test_a_fault_of_the_program_ends_the_run_with_its_traceback(tmp_path):
    "A thousand images that fail in the same way are one fault, not a thousand lost images"
    mm, tried = tiny_model(seed=5), []

    def broken(module, args):
        tried.append(len(args[0]))
        raise AttributeError('a module was renamed')

    handle = mm.encoder.register_forward_pre_hook(broken)
    cfg = SweepConfig(tasks=('attribute',), score='paper', k=8, block=8)
    with pytest.raises(RepeatedFault, match='came 3 times.*a module was renamed'):
        sweep(mm, masked(tmp_path / 'pictures', 16), tmp_path / 'run', cfg)
    handle.remove()
    assert tried == [8, 1, 1, 1] and not len(read_table(tmp_path / 'run', 'failures'))
    log = (tmp_path / 'run' / 'log-0.txt').read_text()
    assert log.count('a module was renamed') == log.count('Traceback') * 2 and 'in broken' in log
    failures = sweep(mm, masked(tmp_path / 'pictures', 16), tmp_path / 'run', cfg)
    assert not len(failures) and len(read_table(tmp_path / 'run', 'images')) == 16


def test_the_exit_status_tells_a_fault_from_bad_data(tmp_path, monkeypatch, capsys):
    mm, data = tiny_model(seed=5), tmp_path / 'pictures'
    pictures(data, 4)
    monkeypatch.setattr(cli, 'load', lambda args: mm)
    command = ['sweep', '--data', f'folder:{data}', '--tasks', 'attribute', '--k', '5']
    command += ['--score', 'paper', '--out']
    (data / '1.png').write_bytes(b'torn')
    assert cli.main([*command, str(tmp_path / 'bad data')]) == 1
    handle = mm.encoder.register_forward_pre_hook(lambda module, args: module.renamed)
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path / 'fault')]) == 3
    said = capsys.readouterr().err
    assert said.count('mmneurons: stopped: the same error came 3 times') == 1
    assert 'log-0.txt' in said and 'Traceback' not in said
    assert "has no attribute 'renamed'" in (tmp_path / 'fault' / 'log-0.txt').read_text()
    with pytest.raises(RepeatedFault):
        cli.main([*command, str(tmp_path / 'fault'), '--debug'])
    handle.remove()
    assert cli.main([*command, str(tmp_path / 'fault')]) == 1  # the torn image is left


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path):
    "The encoder asks for two fifths of this machine's memory for each image, which the allocator grants to two of them and refuses to four"
    mm, tried = tiny_model(seed=5), []

    def workspace(module, args):
        tried.append(len(args[0]))
        torch.empty(len(args[0]) * psutil.virtual_memory().total // 5 * 2, dtype=torch.uint8)

    cfg = SweepConfig(tasks=('attribute',), score='paper', k=8, block=8)
    data = masked(tmp_path / 'pictures', 16)
    handle = mm.encoder.register_forward_pre_hook(workspace)
    failures = sweep(mm, data, tmp_path / 'little', cfg)
    handle.remove()
    assert (
        tried == [8, 4, 2, 2, 4, 2, 2] + [2] * 4 and not failures.lost.any()
    )  # what the first block taught holds for the second
    assert failures.reason.value_counts().to_dict() == {
        '8 at a time were too many for the memory': 8,
        '4 at a time were too many for the memory': 8,
    }
    sweep(mm, data, tmp_path / 'much', cfg)
    one, two = (read_table(tmp_path / name, 'neurons') for name in ('much', 'little'))
    assert two.image_id.tolist() == one.image_id.tolist() and len(two) == 16 * 8
    np.testing.assert_allclose(np.sort(two.score), np.sort(one.score), rtol=1e-3)
    tried.clear()
    pixels = mm.encoder.pixels
    mm.encoder.pixels = lambda images: (workspace(mm, [images]), pixels(images))[1]
    cfg = SweepConfig(tasks=('attribute',), k=8, block=8, reference=8)
    assert not len(sweep(mm, data, tmp_path / 'baseline', cfg))
    assert tried == [8, 4] + [2] * 12  # what the baseline taught holds for the task


def test_the_baseline_is_measured_once_and_read_again(tmp_path):
    mm, cfg = tiny_model(seed=5), SweepConfig(tasks=('attribute',), k=8, block=2, reference=4)
    data = masked(tmp_path / 'pictures', 6)
    sweep(mm, data, tmp_path / 'run', cfg)
    kept = Baseline.load(file := tmp_path / 'run' / 'baseline.safetensors')
    fresh = Baseline.over(mm, [ex.image for ex in data[:4]])
    assert kept.n == 4 and torch.equal(kept.mean, fresh.mean)
    Baseline(0 * kept.mean, kept.spread, 4, 'planted', kept.pair).save(file)
    for table in ('neurons', 'failures'):
        [part.unlink() for part in (tmp_path / 'run' / table).glob('*')]
    before = read_table(tmp_path / 'run', 'images')
    sweep(mm, data, tmp_path / 'run', cfg)
    assert Baseline.load(file).source == 'planted'
    pd.testing.assert_frame_equal(read_table(tmp_path / 'run', 'images'), before)


def test_resampled_activations_come_from_an_image_of_another_noun(tmp_path):
    mm, data = tiny_model(seed=5), gallery()
    cfg = replace(CFG, tasks=('attribute', 'decode', 'ablate'), block=10)
    sweep(mm, data, tmp_path / 'mean', cfg)
    failures = sweep(mm, data, tmp_path / 'run', replace(cfg, value='resample'))
    assert failures.reason.str.contains('no image with another noun').all() and len(failures) < 3
    mean, new = (read_table(tmp_path / name, 'curve') for name in ('mean', 'run'))
    mean = mean[mean.image_id.isin(new.image_id)].reset_index(drop=True)
    assert new.image_id.tolist() == mean.image_id.tolist()
    ablated = new.n_ablated > 0
    assert np.array_equal(new.p_target[~ablated], mean.p_target[~ablated])
    assert (new.p_target[ablated] != mean.p_target[ablated]).mean() > 0.5
    about = json.loads((tmp_path / 'run' / 'run.json').read_text())
    assert about['config']['value'] == 'resample' and about['positions'] == 'image'


def test_an_arm_that_has_no_image_is_listed_and_loses_nothing(tmp_path):
    data = masked(tmp_path / 'pictures', 4)
    load, cfg = data.load, replace(CFG, tasks=('attribute', 'decode', 'ablate'))
    data.load = lambda row: replace(load(row), nouns=('photo',))
    failures = sweep(tiny_model(seed=5), data, tmp_path / 'run', cfg)
    assert failures.image_id.tolist() == data.image_ids and not failures.lost.any()
    said = 'no image has another noun: the arm "another noun" is left out for this image'
    assert {*failures.reason} == {said} and {*failures.task} == {'ablate'}
    curve = read_table(tmp_path / 'run', 'curve')
    assert {*curve.arm} == {'top', 'interpretable', 'random'} and curve.image_id.nunique() == 4


def test_a_run_of_an_older_version_is_refused(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.json').write_text('{"version": "0.0.9"}')
    with pytest.raises(ValueError, match='another version of mmneurons .0.0.9.*another folder'):
        sweep(tiny_model(seed=5), masked(tmp_path / 'pictures', 2), tmp_path / 'run', CFG)
    assert [p.name for p in (tmp_path / 'run').iterdir()] == ['run.json']


def on_a_full_disk(home, folder, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        go(home, folder, 6)
    except OSError as e:
        sys.exit(7 if 'make room and give the same command again' in str(e) else 8)


def test_a_full_disk_is_listed_the_rest_goes_on_and_nothing_is_lost(tmp_path):
    assert fresh(go, tmp_path, tmp_path / 'unbroken', 6) == 0
    want, folder = contents(tmp_path / 'unbroken'), tmp_path / 'full'
    sizes = sorted(len(want[f'neurons/{b:07}.parquet']) for b in range(3))
    images = max(len(want[f'images/{b:07}.parquet']) for b in range(3))
    limit = (
        (max(images, sizes[-2]) + sizes[-1]) // 2
        if max(images, sizes[-2]) < sizes[-1]
        else sizes[0] - 1
    )
    folder.mkdir()
    shutil.copy(tmp_path / 'unbroken' / 'baseline.safetensors', folder)
    assert fresh(on_a_full_disk, tmp_path, folder, limit) == 7
    failures = read_table(folder, 'failures')
    assert (
        len(failures)
        and failures.reason.str.contains('too large|make room').all()
        and failures.lost.all()
    )
    assert not (folder / 'decoding').exists()  # nothing is built on half a table
    assert fresh(go, tmp_path, folder, 6) == 0 and contents(folder) == want


def test_memory_does_not_grow_with_the_images(tmp_path):
    cfg = SweepConfig(tasks=('attribute', 'decode', 'masks'), k=8, block=8, reference=4, pool=16)
    data = masked(tmp_path / 'pictures', 12)
    many = Reader([dict(data.rows[i % 12], image_id=f'{i}') for i in range(480)], data.load)
    sweep(tiny_model(seed=5), many, tmp_path / 'run', cfg)
    log = pd.read_csv(tmp_path / 'run' / 'log-0.csv')
    for _, part in log[log.task != 'decode'].groupby('task'):
        assert part.memory_mb.iloc[-1] - part.memory_mb.iloc[10] < 40, part
    assert len(read_table(tmp_path / 'run', 'images')) == 480


def test_another_run_is_refused_and_left_alone(tmp_path):
    data = masked(tmp_path / 'pictures', 4)
    cfg = SweepConfig(tasks=('attribute',), k=8, block=2)
    sweep(tiny_model(seed=5), data, tmp_path / 'run', cfg)
    kept = contents(tmp_path / 'run')
    others = [
        (tiny_model(seed=4), data, cfg, 'model'),
        (tiny_model(seed=5), data[:3], cfg, 'images, captions or masks are not those of this run'),
        (tiny_model(seed=5), data, SweepConfig(tasks=('attribute',), k=9, block=2), '"k": 8'),
    ]
    for mm, pics, config, said in others:
        with pytest.raises(ValueError, match='is another run') as e:
            sweep(mm, pics, tmp_path / 'run', config)
        assert said in str(e.value)
    data.rows[3]['file'].write_bytes(data.rows[0]['file'].read_bytes())
    with pytest.raises(ValueError, match='are not those of this run; choose another folder'):
        sweep(tiny_model(seed=5), data, tmp_path / 'run', cfg)
    twice = Reader([data.rows[0]] * 2, data.load)
    with pytest.raises(ValueError, match="the first is 'p0'"):
        sweep(tiny_model(), twice, tmp_path / 'twice', cfg)
    with pytest.raises(ValueError, match='no image'):
        sweep(tiny_model(), data[:0], tmp_path / 'none', cfg)
    assert contents(tmp_path / 'run') == kept


def test_what_looks_like_coco_gives_what_its_origin_gives(tmp_path):
    write_coco(gallery()[:6], tmp_path / 'coco')
    names = dict(zip([f'{i}' for i in range(1, 7)], gallery().image_ids))

    def tables(data, folder):
        assert not sweep(tiny_model(seed=5), data, folder, CFG).lost.any()
        return {name: read_table(folder, name) for name in SCHEMAS}

    here, there = (
        tables(gallery()[:6], tmp_path / 'here'),
        tables(coco(tmp_path / 'coco'), tmp_path / 'there'),
    )
    for name, columns in dict(
        neurons=['layer', 'unit', 'score'],
        overlaps=['category', 'arm', 'baseline', 'iou'],
        curve=['arm', 'p_target', 'caption'],
    ).items():
        assert there[name].image_id.map(names).tolist() == here[name].image_id.tolist()
        pd.testing.assert_frame_equal(there[name][columns], here[name][columns])


def test_from_the_command_line(tmp_path):
    (tmp_path / 'pictures').mkdir()
    for i, name in enumerate(('dog', 'bus')):
        (tmp_path / 'pictures' / f'{2 * i}.jpg').write_bytes(
            (ROOT / 'mmneurons' / 'assets' / 'gallery' / f'{name}.jpg').read_bytes()
        )
    (tmp_path / 'pictures' / '1.png').write_bytes(b'torn')
    command = [
        sys.executable,
        '-m',
        'mmneurons.cli',
        'sweep',
        '--data',
        'folder:pictures',
        '--tasks',
        'attribute',
        '--out',
        'run',
        '--k',
        '5',
    ]
    for _ in range(2):  # the second finds everything done
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (
            done.returncode == 1 and done.stdout == 'run: 3 images, 1 of them not in every table\n'
        ), done.stderr
        assert (
            'mmneurons: 1: pictures/1.png: not an image' in done.stderr
            and 'Traceback' not in done.stderr
        )
    assert len(read_table(tmp_path / 'run', 'neurons')) == 10
    assert json.loads((tmp_path / 'run' / 'run.json').read_text())['model_name'] == 'pocket'
    other = subprocess.run([*command, '--seed', '3'], cwd=tmp_path, capture_output=True, text=True)
    assert (
        other.returncode == 1 and 'run is another run, with {"config": {"seed": 0}}' in other.stderr
    )


if __name__ == '__main__':
    go(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
