"The pages in a real browser: mouse, keyboard, what a screen reader is told, and that nothing is fetched."

import re
from pathlib import Path
import pytest
from mmneurons.activations import Baseline
from mmneurons.atlas import atlas
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


def test_the_atlas_sorts_finds_and_opens(browser, tmp_path):
    index = atlas(Path(__file__).parents[1] / 'nbs' / 'data' / 'run-held-out', tmp_path, n=100)
    page, said, fetched = browser.new_page(viewport=dict(width=390, height=844)), [], []
    page.on('console', lambda m: said.append(m.text))
    page.on('request', lambda r: fetched.append(r.url))
    page.goto(index.as_uri())
    for at, name in ((1, 'layer'), (3, 'tokens'), (4, 'category')):
        button = page.get_by_role('button', name=name)
        for order in ('ascending', 'descending'):
            button.focus(), page.keyboard.press('Enter')
            assert (
                page.locator('thead th').nth(at).get_attribute('aria-sort') == order
                and order in page.locator('output').inner_text()
            )
            if name == 'layer':
                layers = [
                    int(td) for td in page.locator('tbody td:nth-of-type(1)').all_text_contents()
                ]
                assert layers == sorted(layers, reverse=order == 'descending')
    find, visible = page.get_by_role('searchbox', name='Find'), page.locator('tbody tr:visible')
    find.fill('photographs')  # not among the five tokens of the row
    assert (
        visible.count() == 1
        and page.locator('output').inner_text() == '1 neuron'
        and 'photographs' not in visible.inner_text()
    )
    find.fill('seagull')
    assert 0 < visible.count() < page.locator('tbody tr').count()
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    page.locator('tbody a:visible').first.click()
    assert (
        page.locator('section:target .best img').first.evaluate(
            'i => i.decode().then(() => i.naturalWidth)'
        )
        > 0
    )
    page.go_back()
    assert bool(find.input_value()) == (visible.count() < page.locator('tbody tr').count())
    assert not said and all(url.startswith(('file:', 'data:')) for url in fetched)
    page.close()
