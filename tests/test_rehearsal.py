"The rehearsal of the paper's pair, small: what a hub would give is written, and each command runs on it offline."

import subprocess, sys

import pandas as pd

from conftest import ROOT


def test_each_command_runs_on_a_pair_in_the_layout_of_the_hub(tmp_path):
    script, table = ROOT / 'benchmarks' / 'rehearsal.py', tmp_path / 'rehearsal.csv'
    command = [sys.executable, script, tmp_path / 'home', '--size', 'small', '--out', table]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pd.read_csv(table).set_index('step')
    assert rows.index.tolist() == ['look', 'sweep', 'paper', 'atlas', 'find', 'check']
    given = dict(look=1, sweep=4, paper=0, atlas=0, find=40, check=0)
    assert rows.images.to_dict() == given
    # `check` says what the weights are not
    assert rows.status.to_dict() == dict.fromkeys(rows.index, 0) | dict(check=1)
    assert (rows.peak > 0.1).all() and (rows.processor > 0).all()
