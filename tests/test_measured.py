"No page shows a table that was measured with another projection than the one that ships."

import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
from measured import DATA, measured, shipped, stale

from mmneurons.atlas import check_shown
from mmneurons.catalogue import Catalogue


def test_each_table_says_what_it_was_measured_with():
    tables = {path.name for kind in ('csv', 'parquet') for path in DATA.glob(f'*.{kind}')}
    tables -= {'measured.csv', 'exhibits.csv'}  # lists, which no command measures
    assert tables == set(measured().file)
    for row in measured().itertuples():
        assert (ROOT / 'benchmarks' / row.command.split()[0]).is_file(), row.command


def test_no_table_is_stale():
    assert not len(stale(measured())), stale(measured()).to_string()


def test_a_table_of_another_projection_is_found():
    table = measured()
    table.loc[table.file == 'causes.csv', 'projection'] = 'another'
    assert stale(table).file.tolist() == ['causes.csv']


@pytest.mark.parametrize('name', ['pocket-naming.csv', 'check.csv'])
def test_what_ships_with_the_package_is_of_its_projection(name):
    table = pd.read_csv(ROOT / 'mmneurons' / 'assets' / name)
    assert set(table.projection) == {shipped('pocket')}


def test_the_catalogue_is_of_the_projection_that_ships():
    found = Catalogue.load(ROOT / 'mmneurons' / 'assets' / 'pocket-catalogue.json')
    assert found.about['projection'] == shipped('pocket')


def test_the_images_of_the_atlas_are_of_the_catalogue_that_ships():
    "Each of its neurons, and no other; else: python benchmarks/multimodal.py shown"
    found = Catalogue.load(ROOT / 'mmneurons' / 'assets' / 'pocket-catalogue.json')
    shown = pd.read_parquet(DATA / 'pocket-shown.parquet')
    check_shown(found, shown)
    fewer = Catalogue(found.rows.iloc[:1], found.counts, found.about)
    with pytest.raises(ValueError, match='another catalogue'):
        check_shown(fewer, shown)
