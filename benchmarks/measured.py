"""Which projection each table of nbs/data was measured with, and how it is measured again.

    python benchmarks/measured.py                          the tables that are stale
    python benchmarks/measured.py --corpus data/corpus     measures these again (so does `measure.py all`)

`nbs/data/measured.csv` has a row for each table. A table is stale if the pair ships another projection by now. Its old
rows are removed before it is measured again, and a measurement that is stopped goes on where it was.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

from mmneurons.pairs import read_projection, state_hash

ROOT = Path(__file__).resolve().parents[1]
DATA, ASSETS = ROOT / 'nbs' / 'data', ROOT / 'mmneurons' / 'assets'


def measured():
    "The list of tables: file, pair, projection, command; a table that depends on no pair has neither of the middle two"
    return pd.read_csv(DATA / 'measured.csv', keep_default_na=False)


def shipped(pair):
    "The hash of the projection that ships with a pair"
    return state_hash(read_projection(ASSETS / f'{pair}.safetensors.xz')[0])


def stale(table):
    "The rows whose pair has another projection now"
    now = {pair: shipped(pair) for pair in set(table.pair) - {''}}
    return table[(table.pair != '') & (table.projection != table.pair.map(now))]


def measure_again(corpus):
    "Run the command of each stale table, and write down what it was measured with"
    for command, rows in stale(measured()).groupby('command', sort=False):
        begun = DATA / f'{rows.file.iloc[0]}.begun'  # the old rows are gone, a run may go on
        if not begun.exists():
            for name in rows.file:
                (DATA / name).unlink(missing_ok=True)
            begun.touch()
        script, *options = command.split()
        full = [sys.executable, ROOT / 'benchmarks' / script, *options, '--corpus', corpus]
        subprocess.run(full, check=True)
        table = measured()
        here = table.file.isin(rows.file)
        table.loc[here, 'projection'] = table[here].pair.map(shipped)
        table.to_csv(DATA / 'measured.csv', index=False)
        begun.unlink()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--corpus', help='made by: mmneurons corpus')
    args = parser.parse_args()
    if args.corpus:
        measure_again(args.corpus)
    print(stale(measured()).to_string(index=False))
