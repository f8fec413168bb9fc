"The pages in a real browser: mouse, keyboard, what a screen reader is told, and that nothing is fetched."

import re
from pathlib import Path
import pandas as pd, pytest
from mmneurons.activations import Baseline
from mmneurons.atlas import atlas, catalogue_atlas
from mmneurons.catalogue import Catalogue
from mmneurons.data import gallery
from mmneurons.model import tiny_model
from mmneurons.report import elsewhere, html_page, look


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    "The report of a tiny model on ten images"
    mm, path = tiny_model(seed=5), tmp_path_factory.mktemp('report') / 'all.html'
    examples = list(gallery())[:10]
    usual = Baseline.over(mm, [ex.image for ex in examples])
    how = dict(target='dog', k=6, n_ablated=20, baseline=usual)
    looks = [look(mm, ex.image, image_id=ex.image_id, **how) for ex in examples]
    path.write_text(html_page(looks, elsewhere(mm, looks, baseline=usual)), 'utf-8')
    return path


@pytest.fixture(
    params=[dict(width=1200, height=900), dict(width=390, height=844)], ids=['desk', 'phone']
)
def page(browser, file, request):
    "The opened report; at the end nothing must have been fetched, and nothing complained of"
    page, said, fetched = browser.new_page(viewport=request.param), [], []
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on(
        'request', lambda r: fetched.append(r.url[:80]) if not r.url.startswith('data:') else None
    )
    page.goto(file.as_uri())
    yield page
    page.close()
    assert not said and fetched == [file.as_uri()[:80]]


def shown(page, name):
    return page.locator(f'#look-0 {name}:visible')


def test_size_and_width(page, file):
    assert file.stat().st_size < 5e6
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), (
        'the page is wider than the screen'
    )
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")


def test_a_click_on_a_neuron_shows_it(page):
    picks = page.locator('#look-0 .pick')
    for i in (3, 1):
        picks.nth(i).click()
        assert [p.get_attribute('aria-pressed') for p in picks.all()] == [
            str(j == i).lower() for j in range(6)
        ]
        assert shown(page, '.panel').count() == shown(page, '.heat').count() == 1
        name = picks.nth(i).locator('.neuron').inner_text()
        assert shown(page, '.panel h2').inner_text() == f'{name} promotes' and name in shown(
            page, '.heat'
        ).get_attribute('alt')
        assert shown(page, '.panel .words li').count() >= 5
        assert shown(page, '.panel .scale').count() == 1
    picks.nth(1).click()
    assert (
        shown(page, '.panel').count() == shown(page, '.heat').count() == 0
        and shown(page, '.hint').count() == 1
    )


def test_the_slider_moves_through_the_captions(page):
    slider, told = page.locator('#look-0 input[type=range]'), []
    slider.focus()
    for n in (0, 1, 5, 10, 20):
        assert shown(page, '.step').count() == 1 and shown(page, '.step .bar').count() == (
            3 if n else 1
        )
        told.append(slider.get_attribute('aria-valuetext'))
        assert told[-1].startswith(f'{n} ablated')
        page.keyboard.press('ArrowRight')
    assert len(set(told)) == 5
    page.keyboard.press('Home')
    assert slider.get_attribute('aria-valuetext') == told[0]


def test_a_keyboard_is_enough(page):
    focused = "document.activeElement.matches('#look-0 .pick') && [...document.querySelectorAll('#look-0 .pick')].indexOf(document.activeElement)"
    page.locator('nav a').last.focus(), page.keyboard.press('Tab')  # behind the list of photographs
    assert page.evaluate(focused) == 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != 'none'
    (
        page.keyboard.press('ArrowRight'),
        page.keyboard.press('ArrowRight'),
        page.keyboard.press('Enter'),
    )
    assert (
        page.evaluate(focused) == 2
        and page.locator('#look-0 .pick').nth(2).get_attribute('aria-pressed') == 'true'
    )
    page.keyboard.press('ArrowLeft'), page.keyboard.press('Space')
    assert page.locator('#look-0 .pick').nth(1).get_attribute('aria-pressed') == 'true'


def test_everything_has_a_name(page):
    nameless = page.evaluate("""[...document.querySelectorAll('button, input, a, summary, [role=region]')].filter(e =>
        !(e.innerText || '').trim() && !e.getAttribute('aria-label') && e.offsetParent).length""")
    assert nameless == 0 and page.locator('img:not([alt])').count() == 0
    assert page.locator('#look-0 [aria-live=polite]').count() == 1
    for of in page.locator('[aria-controls], [aria-labelledby]').all():
        named = of.get_attribute('aria-controls') or of.get_attribute('aria-labelledby')
        assert page.locator(f'[id="{named}"]').count() == 1


def test_other_photographs_are_links_to_them(page):
    for link in page.locator('.others a').all():
        name = re.search(r'(?m)^\S+$', link.locator('.soft').text_content())[0]
        assert name in page.locator(f'{link.get_attribute("href")} header').inner_text()


def test_colours_follow_the_reader(browser, file):
    seen = {}
    for scheme in ('light', 'dark'):
        page = browser.new_page(color_scheme=scheme, reduced_motion='reduce')
        page.goto(file.as_uri())
        seen[scheme] = page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.panel')).animationName")
            == 'none'
        )
        page.close()
    assert seen['light'] != seen['dark']


def test_without_scripts_everything_is_there(browser, file):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(file.as_uri())
    assert (
        page.locator('#look-0 .panel:visible').count() == 6
        and page.locator('#look-0 .step:visible').count() == 5
    )


NBS = Path(__file__).parents[1] / 'nbs'


def pocket_atlas(out):
    catalogue = Catalogue.load(NBS.parent / 'mmneurons' / 'assets' / 'pocket-catalogue.json')
    return catalogue_atlas(catalogue, pd.read_parquet(NBS / 'data' / 'pocket-shown.parquet'), out)


def swept_atlas(out):
    return atlas(NBS / 'data' / 'run-held-out', out)


@pytest.mark.parametrize(
    'make, columns, once, some',
    [
        (pocket_atlas, ['layer', 'concept', 'position', 'AUC', 'z', 'FDR'], 'livestock', 'car'),
        (swept_atlas, ['layer', 'images', 'category'], 'photographs', 'seagull'),
    ],
    ids=['catalogue', 'sweep'],
)
def test_the_atlas_sorts_finds_and_opens(browser, tmp_path, make, columns, once, some):
    page, said, fetched = browser.new_page(viewport=dict(width=390, height=844)), [], []
    page.on('console', lambda m: said.append(m.text))
    page.on('request', lambda r: fetched.append(r.url))
    page.goto(make(tmp_path).as_uri())
    rows, heads = page.locator('tbody tr'), page.locator('thead th')
    first = 'FDR' if 'FDR' in columns else 'images'
    assert heads.nth(columns.index(first) + 1).get_attribute('aria-sort')
    for at, name in enumerate([*columns, 'tokens'], 1):
        button = heads.nth(at).get_by_role('button', name=name)
        for order in ('ascending', 'descending'):
            button.focus(), page.keyboard.press('Enter')
            assert (
                heads.nth(at).get_attribute('aria-sort') == order
                and order in page.locator('output').inner_text()
            )
            keys = [row.locator('td').nth(at - 1).get_attribute('data-key') for row in rows.all()]
            if name in ('layer', 'images', 'AUC', 'z', 'FDR'):
                keys = [float(key) for key in keys]
                assert keys == sorted(keys, reverse=order == 'descending')
    find, visible = page.get_by_role('combobox', name='Find'), page.locator('tbody tr:visible')
    find.fill(once)
    assert visible.count() == 1 and page.locator('output').inner_text() == '1 neuron'
    find.fill(some)
    assert 0 < visible.count() < rows.count()
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    name = page.locator('tbody a:visible').first.inner_text()
    page.locator('tbody a:visible').first.click()
    assert page.locator('h1').inner_text() == name
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).fontFamily").count('serif')
    shown = page.locator('.best img').first
    assert shown.evaluate('i => i.decode().then(() => i.naturalWidth)') > 0
    assert page.locator('nav a').count() in (2, 3)
    page.go_back()
    assert bool(find.input_value()) == (visible.count() < rows.count())
    assert not said and all(url.startswith(('file:', 'data:')) for url in fetched)
    page.close()


def test_a_page_says_how_much_is_chance(browser, tmp_path):
    page = browser.new_page()
    page.goto(pocket_atlas(tmp_path).as_uri())
    assert 'permuted words give' in page.locator('main').inner_text()
    assert 'sorted by evidence' in page.locator('main').inner_text()
    shown = 0
    while page.locator('[rel=next]').count() or page.locator('table').count():
        page.locator('[rel=next], tbody a').first.click()
        parts = page.locator('section[aria-labelledby^=part]')
        for part in parts.all():
            text = part.inner_text()
            assert 'false discovery rate' in text and 'permuted words give' in text
            assert 'AUC' in text and 'z-score' in text and 'log P(' in text
        images = page.locator('.best img').count()
        none = 'On none of the images is it unusually active'
        assert parts.count() and (images or none in page.locator('main').inner_text())
        shown += images
        for of in page.locator('[aria-labelledby]').all():
            assert page.locator(f'[id="{of.get_attribute("aria-labelledby")}"]').count() == 1
    assert shown > 141  # more than one for each page on average
    page.close()
