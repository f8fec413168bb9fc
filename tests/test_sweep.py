"Sweeps as they really go: killed at random, on a full disk, with pictures that vanish, on two processes."
import itertools, json, os, random, resource, signal, subprocess, sys, time, multiprocessing
from pathlib import Path
import numpy as np, pandas as pd, psutil, pytest, torch
from conftest import PRELOAD, ROOT
from mmneurons.data import Example, Reader, coco, gallery, open_image, write_coco
from mmneurons.model import MultimodalLM, tiny_lm, tiny_model
from mmneurons.sweep import SCHEMAS, TASKS, SweepConfig, read_table, sweep
from test_train import fresh, pictures

CFG = SweepConfig(tasks=TASKS, k=8, counts=(0, 4), block=2, habits=4, pool=16, watch=3)

def masked(folder, n=24):
    "Pictures with captions, each with a thing in its left half"
    data, left = pictures(folder, n), np.arange(32)[None] < np.full(32, 16)[:, None]
    return Reader(data.rows, lambda row: Example(row['image_id'], open_image(row['file']), row['captions'], (row['captions'][0].split()[1],), {'thing': left}))

def go(home, folder, n=24, cfg=CFG, data=None, model=None):
    "A run in this process, quietly"
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, 'w')
    return sweep(model or tiny_model(seed=5), data or masked(home/'pictures', n), folder, cfg)

def contents(folder):
    "Every table of a run, byte by byte, and what else it says of itself"
    files = [p for p in sorted(Path(folder).rglob('*')) if p.is_file() and not p.name.startswith('log-')]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(tmp_path):
    "Killed again and again, each time a moment after it has written something, until it is done"
    assert fresh(go, tmp_path, tmp_path/'unbroken') == 0
    want, folder, kills, rng = contents(tmp_path/'unbroken'), tmp_path/'killed', 0, random.Random(0)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    def written(): return sum(1 for _ in folder.glob('*/*'))
    while True:
        before, process = written(), context.Process(target=go, args=(tmp_path, folder))
        process.start()
        while process.is_alive() and written() == before: time.sleep(.002)
        time.sleep(rng.uniform(0, .3))
        process.kill(), process.join()
        if process.exitcode == 0: break
        kills += 1
        for name, content in contents(folder).items():                    # whatever is there is final
            assert content == want[name] or Path(name).name.startswith('.'), name
    assert kills >= 20 and contents(folder) == want
