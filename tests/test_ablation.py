"What ablation must keep up under load: the same numbers in two processes, and memory that does not grow with the images."

import hashlib, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import psutil

from mmneurons.ablation import ablation_curve, paper_arms
from mmneurons.attribution import attribute, top_neurons
from mmneurons.data import gallery
from mmneurons.model import tiny_model

ROOT = Path(__file__).resolve().parents[1]


def curve(n=1, ks=(0, 5, 30)):
    "The curves of the gallery's first image, `n` times, from iterators"
    mm, image = tiny_model(), gallery()[0].image
    a = attribute(mm, image, 'dog', caption='a dog')
    return ablation_curve(
        mm,
        (image for _ in range(n)),
        (replace(a, image_id=f'{i}') for i in range(n)),
        lambda a: paper_arms(mm, top_neurons(a, 30), k=30, seeds=(0, 1)),
        ks,
    )


def fingerprint():
    return hashlib.sha256(curve().to_csv().encode()).hexdigest()


def test_two_processes_give_the_same_numbers():
    code = 'import test_ablation; print(test_ablation.fingerprint())'
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])
    seen = [
        subprocess.run(
            [sys.executable, '-c', code],
            env=os.environ | dict(PYTHONPATH=path, PYTHONHASHSEED=str(i)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for i in range(2)
    ]
    assert seen[0].strip() and seen[0] == seen[1]


def test_memory_is_flat_over_500_images():
    def used():
        return psutil.Process().memory_info().rss / 2**20

    curve(50, (5,))
    before = used()
    rows = curve(500, (5,))
    assert len(rows) == 500 * 3 and used() - before < 40, (
        f'{used() - before:.0f} MB more after 500 images'
    )
