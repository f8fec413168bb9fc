"""The site as a reader meets it: each page is rendered and opened in a browser as wide as a phone, and as wide as a desk.

The public site is rendered by Quarto. Here pandoc stands in for it, with the same style sheet and bibliography, in a page
that has Quarto's columns, classes and rules for code (`tests/quarto.css`)."""

import json, re, shutil, subprocess, sys
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin
import pytest, yaml
from nbdev.frontmatter import _nbpath2html
from colab import begun, notebooks
from mmneurons._modidx import d as modules
from mmneurons.catalogue import Catalogue
from mmneurons.neurons import KEY

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / 'nbs').glob('*.ipynb'))
needs_pandoc = pytest.mark.skipif(
    not shutil.which('pandoc'), reason='pages are rendered by pandoc: apt install pandoc'
)

ATLAS = 'pocket-atlas'  # a folder of the site
SITE, HERE = 'https://mmneurons.github.io/mmneurons/', 'http://site/'
REPOSITORY = re.compile(r'https://github\.com/mmneurons/mmneurons/(?:blob|tree)/main/([^#?]*)')
READER = 'ipynb+citations+fenced_divs+footnotes+header_attributes+implicit_figures+link_attributes-gfm_auto_identifiers'
TEMPLATE = '''<!doctype html><html lang="en"><head><meta charset="utf-8"><title>$title$</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<link rel="stylesheet" href="quarto.css"><style>$highlighting-css$</style><link rel="stylesheet" href="styles.css"></head>
<body class="floating quarto-light"><div id="quarto-content" class="page-columns">
<nav class="sidebar-navigation"></nav><main class="content"><h1>$title$</h1><p>$subtitle$</p>$body$</main></div></body></html>'''
# The columns of Quarto's floating sidebar, as wide as `_quarto.yml` has them, or as Quarto has them where it says nothing.
GRID = dict(sidebar='250px', margin='250px', body='800px') | {
    name.removesuffix('-width'): width
    for name, width in yaml.safe_load((ROOT / '_quarto.yml').read_text())['format']['html']
    .get('grid', {})
    .items()
}
QUARTO = ':root {%s}' % ''.join(f'--{name}: {width};' for name, width in GRID.items()) + (
    ROOT / 'tests' / 'quarto.css'
).read_text('utf-8')
WIDTHS = {'phone': 390, 'desk': 1200}
FOLDED = '''<details class="code-fold"><summary>%s</summary>
<div class="sourceCode"><pre class="sourceCode python"><code class="sourceCode python">%s</code></pre></div></details>'''
# The classes that Quarto gives to outputs, for the style sheet; and no empty box where the code is not shown.
FILTER = '''
function CodeBlock(c) if c.text == '' then return {} end end
function Div(d)
  if d.classes:includes 'output' then
    d.classes:extend{'cell-output', d.classes:includes 'stream' and 'cell-output-stdout' or 'cell-output-display'}
  elseif d.classes:includes 'code' then
    d.classes:extend{'cell'}
  end
  return d
end
function Table(t) t.classes:insert 'table' return t end
function Math(m) if m.mathtype == 'DisplayMath' then return pandoc.Span({m}, {class = 'math display'}) end end'''
LOOK = '''() => {
  document.querySelectorAll('details').forEach(e => e.open = true)
  const all = (selector, f) => [...document.querySelectorAll(selector)].map(f).filter(x => x)
  const width = document.documentElement.clientWidth
  const boxed = e => e && (!/^(visible|clip)$/.test(getComputedStyle(e).overflowX) && getComputedStyle(e).display != 'inline' || boxed(e.parentElement))
  return {ids: all('[id]', e => e.id), links: all('a[href]', e => e.getAttribute('href')),
          mute: all('main img', e => (e.getAttribute('alt') || '').trim() ? '' : e.outerHTML.slice(0, 120)),
          broken: all('img', e => e.complete && e.naturalWidth ? '' : e.getAttribute('src')), text: document.body.innerText,
          cut: all('main pre.sourceCode', e => Math.max(e.scrollWidth - e.clientWidth,
                   e.parentElement.scrollWidth - e.parentElement.clientWidth) < 2 ? '' : e.innerText.slice(0, 120)),
          scrolls: document.documentElement.scrollWidth <= width ? [] : ['the page', ...
                   all('body *', e => e.getBoundingClientRect().right > width + 1 && !boxed(e.parentElement) ? e.outerHTML.slice(0, 120) : '')]}}'''


# Waits for lazy images too. `wait_for_function` would compile its condition in the page, which the report's policy forbids.
ALL_IMAGES = '''async () => {
  for (const image of document.images) image.loading = 'eager'
  await Promise.all([...document.images].map(image => image.complete || new Promise(done => {
    image.onload = image.onerror = done })))}'''


def for_pandoc(nb):
    "The notebook `nb` with the cell options obeyed that Quarto obeys, and its title, subtitle and file name"
    head, *cells = nb['cells']
    about = next(yaml.safe_load_all(''.join(head['source'])))
    for cell in cells:
        if cell['cell_type'] == 'markdown':  # pandoc would fetch what Quarto leaves to the browser
            cell['source'] = re.sub(
                r'!\[([^]]*)\]\((https?:[^)]*)\)',
                r'<img src="\2" alt="\1">',
                ''.join(cell['source']),
            )
        if cell['cell_type'] != 'code':
            continue
        for counted in cell, *cell['outputs']:
            counted['execution_count'] = 0  # pandoc's reader wants a number
        source = ''.join(cell['source'])
        if described := re.search(r'(?m)^#\| fig-alt: "(.*)"\n', source):
            source = source.replace(described[0], '')
            for output in cell['outputs']:
                output['metadata'] = {
                    kind: dict(alt=described[1]) for kind in ('image/png', 'image/jpeg')
                }
        if folded := re.match(r'#\| code-fold: true\n#\| code-summary: "(.*)"\n', source):
            lines = [f'<span>{escape(line)}</span>' for line in source[folded.end() :].split('\n')]
            cell.update(cell_type='markdown', source=FOLDED % (folded[1], '\n'.join(lines)))
            del cell['execution_count'], cell['outputs']
            continue
        cell['source'] = (
            '' if '#| echo: false\n' in source else re.sub(r'(?m)^#\| eval: \w+\n', '', source)
        )
        if '#| output: asis\n' in source:
            cell.update(
                cell_type='markdown',
                source=[line for o in cell.pop('outputs') for line in o['data']['text/markdown']],
            )
            del cell['execution_count']
    return nb | {'cells': cells}, about


def render(path, folder):
    "The HTML file that pandoc makes in `folder` of the processed notebook at `path`, and what pandoc complained of"
    nb, about = for_pandoc(json.loads(path.read_text('utf-8')))
    for name, text in {
        'template.html': TEMPLATE,
        'filter.lua': FILTER,
        'quarto.css': QUARTO,
    }.items():
        (folder / name).write_text(text)
    found = subprocess.run(
        [
            'pandoc',
            '-f',
            READER,
            '-t',
            'html',
            '--template=template.html',
            '--lua-filter=filter.lua',
            '--mathml',
            '--citeproc',
            '--bibliography=references.bib',
            f'--extract-media=media/{path.stem}',
            '-M',
            f'title={about["title"]}',
            '-M',
            f'subtitle={about.get("description", "")}',
            '-o',
            about['output-file'],
        ],
        input=json.dumps(nb),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return about['output-file'], found.stderr.splitlines()


def answer(folder, sizes, route):
    "Serve what the page asks for from `folder`, counting bytes; an image for each badge that the world outside would serve"
    url = urldefrag(route.request.url)[0]
    path = folder / unquote(url.removeprefix(HERE))
    if not url.startswith(HERE):
        route.fulfill(
            body='<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>',
            content_type='image/svg+xml',
        )
    elif not path.is_file():
        route.fulfill(status=404)
    else:
        sizes.append(path.stat().st_size)
        route.fulfill(path=path)


def visit(browser, folder, names):
    "What the browser finds in each page of `folder`, by its name; what does not fit is looked for at each width"
    page, seen = browser.new_page(), {}
    errors, sizes = [], []
    page.on(
        'console', lambda message: errors.append(message.text) if message.type == 'error' else None
    )
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.route('**/*', partial(answer, folder, sizes))
    for name in names:
        errors.clear(), sizes.clear()
        unfit = {}
        for where, width in WIDTHS.items():
            page.set_viewport_size(dict(width=width, height=844))
            if where == 'phone':
                page.goto(HERE + name)
                page.evaluate(ALL_IMAGES)
            found = page.evaluate(LOOK)
            unfit[where] = {kind: found[kind] for kind in ('scrolls', 'cut')}
        seen[name] = found | dict(unfit=unfit, errors=[*errors], weight=sum(sizes))
    page.close()
    return seen


def dead(href, name, seen, files, pages):
    "Whether the link `href` of page `name` leads nowhere: to no page of `seen`, no id in it, or no file of the repository"
    repository = REPOSITORY.match(href)
    if repository:
        return not (ROOT / unquote(repository[1])).exists()
    url = href.replace(SITE, HERE) if href.startswith(SITE) else urljoin(HERE + name, href)
    if not url.startswith(HERE):
        return False
    url, anchor = urldefrag(url)
    target = url.removeprefix(HERE) or 'index.html'
    target = pages.get(target, target)  # Quarto makes a link to a page of a link to its notebook
    if target not in seen:
        return not (files / target).is_file()
    return bool(anchor) and unquote(anchor) not in seen[target]['ids']


def problems(name, seen, files, pages):
    "All that is wrong with the page `name` of the pages `seen`"
    page = seen[name]
    found = [f'missing image: {src[:200]}' for src in page['broken']]
    found += [f'nothing describes the image: {image}' for image in page['mute']]
    found += [
        f'dead link: {href}' for href in page['links'] if dead(href, name, seen, files, pages)
    ]
    found += [f'console error: {error}' for error in page['errors']]
    found += [
        f'raw {text} in the text'
        for text in ('#|', 'Traceback (most recent call last)', '](http')
        if re.search(
            rf'(?m)^\s*{re.escape(text)}' if text == '#|' else re.escape(text), page['text']
        )
    ]
    for where, unfit in page['unfit'].items():
        found += [f'scrolls sideways ({where}): {element}' for element in unfit['scrolls'][:3]]
        found += [f'code is cut at the right ({where}): {code}' for code in unfit['cut'][:3]]
    return found + [f'weighs {page["weight"] / 1e6:.1f} MB'][: page['weight'] > 3e6]


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "The folder that Quarto renders"
    folder = tmp_path_factory.mktemp('site')
    make = 'import pages, sys; from pathlib import Path; folder = Path(sys.argv[1]); '
    make += 'pages.process(folder); pages.pocket_atlas(folder)'
    path = f'import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}; '
    subprocess.run([sys.executable, '-c', path + make, folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope='module')
def site(processed, browser):
    "What is wrong with each page, by the name of its notebook, and with some of the atlas, by the name of its file"
    made = {path.stem: render(path, processed) for path in sorted(processed.glob('*.ipynb'))}
    pages = {f'{stem}.ipynb': name for stem, (name, _) in made.items()}
    atlas = sorted(path.name for path in processed.glob(f'{ATLAS}/*.html'))
    made |= {name: (f'{ATLAS}/{name}', []) for name in ['index.html', *atlas[::8]]}
    seen = visit(browser, processed, [name for name, _ in made.values()])
    return {
        stem: warnings + problems(name, seen, processed, pages)
        for stem, (name, warnings) in made.items()
    }


@needs_pandoc
@pytest.mark.parametrize('chapter', CHAPTERS)
def test_a_page_has_no_fault(site, chapter):
    assert not site[chapter], '\n'.join(site[chapter])


@needs_pandoc
def test_the_atlas_on_the_site_is_whole_small_and_without_fault(site, processed):
    "A page for each neuron of the catalogue that ships; every eighth was opened"
    catalogue = Catalogue.load(ROOT / 'mmneurons' / 'assets' / 'pocket-catalogue.json')
    faults = {name: faults for name, faults in site.items() if name.endswith('.html')}
    assert len(faults) > 10 and not any(faults.values())
    files = [path for path in (processed / ATLAS).rglob('*') if path.is_file()]
    pages = [path for path in files if path.suffix == '.html']
    assert len(pages) == 1 + len(catalogue.rows.drop_duplicates(KEY))
    assert sum(path.stat().st_size for path in files) < 1_500_000


GOOD = '<h1 id="here">Good</h1><p>A <a href="01_other.ipynb#there">link</a>, <a href="#here">another</a>.<img src="a.svg" alt="A square"></p>'
FAULTS = [
    ('missing image', '<img src="none.png" alt="x">'),
    ('nothing describes', '<main><img src="a.svg"></main>'),
    ('dead link', '<a href="none.ipynb">x</a>'),
    ('dead link', '<a href="#nowhere">x</a>'),
    ('dead link', '<a href="01_other.ipynb#nowhere">x</a>'),
    ('dead link', f'<a href="{SITE}none.html#attribute">x</a>'),
    ('dead link', '<a href="https://github.com/mmneurons/mmneurons/blob/main/none.py#L1">x</a>'),
    ('console error', '<script>console.error("oh")</script>'),
    ('console error', '<script>oh()</script>'),
    ('raw #|', '<pre>#| hdie</pre>'),
    ('raw Traceback', '<pre>Traceback (most recent call last):</pre>'),
    ('raw ](', '<p>[<code>x</code>](https://a.b)</p>'),
    ('scrolls', '<table><tr><td>' + 'wide' * 60 + '</td></tr></table>'),
    ('weighs', '<!--' + 'x' * 3_000_000 + '-->'),
]


@pytest.mark.parametrize(
    'kind, fault', FAULTS, ids=[f'{kind}-{i}' for i, (kind, _) in enumerate(FAULTS)]
)
def test_each_fault_is_found(kind, fault, browser, tmp_path):
    "On two pages without a fault, and on the same two with one"
    pages = {'00_good.ipynb': 'good.html', '01_other.ipynb': 'other.html'}
    (tmp_path / 'a.svg').write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    )
    (tmp_path / 'other.html').write_text(
        '<!doctype html><link rel="icon" href="data:,"><h2 id="there">Other</h2>'
    )

    def found(html):
        (tmp_path / 'good.html').write_text('<!doctype html><link rel="icon" href="data:,">' + html)
        return problems('good.html', visit(browser, tmp_path, pages.values()), tmp_path, pages)

    assert found(GOOD) == []
    faults = found(GOOD + fault)
    assert any(f.startswith(kind) for f in faults), faults


LONG = 'a_call(of_some, length) ' * 9
WIDE = {
    'code in a list': f'<ul><li><code>{LONG}</code></li></ul>',
    'an equation': f'<p><span class="math display"><math display="block"><mi>{"x" * 150}</mi></math></span></p>',
    'a table of words': f'<table class="table"><tr>{"<td>representation</td>" * 12}</tr></table>',
    'a table of numbers': f'<div class="cell-output"><table class="dataframe">{"<td>.12345</td>" * 30}</table></div>',
    'code': f'<div class="sourceCode"><pre class="sourceCode"><code class="sourceCode"><span>{LONG}</span></code></pre></div>',
}


@pytest.mark.parametrize('what', WIDE)
def test_what_is_wide_fits_by_our_style_sheet_alone(what, browser, tmp_path):
    page = TEMPLATE.replace('$body$', WIDE[what])
    (tmp_path / 'quarto.css').write_text(QUARTO)
    (tmp_path / 'wide.html').write_text(re.sub(r'\$[\w-]+\$', '', page))

    def found(style):
        (tmp_path / 'styles.css').write_text(style)
        return problems('wide.html', visit(browser, tmp_path, ['wide.html']), tmp_path, {})

    assert found('') and not found((ROOT / 'nbs' / 'styles.css').read_text())


@needs_pandoc
def test_pandoc_tells_of_an_unknown_citation(tmp_path):
    (tmp_path / 'references.bib').write_text('@misc{known, title={Known}}')
    cells = [
        dict(cell_type='raw', metadata={}, source='---\ntitle: A\noutput-file: a.html\n---'),
        dict(cell_type='markdown', metadata={}, source='As @known and @unknown say.'),
    ]
    (tmp_path / 'a.ipynb').write_text(
        json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    )
    name, warnings = render(tmp_path / 'a.ipynb', tmp_path)
    assert name == 'a.html' and len(warnings) == 1 and 'unknown' in warnings[0]


def leaves(entry):
    "The notebooks that an entry of the sidebar names"
    if isinstance(entry, str):
        return [entry]
    return [entry['section']] * entry['section'].endswith('.ipynb') + sum(
        map(leaves, entry['contents']), []
    )


def test_each_page_stands_in_the_sidebar_once():
    "It is sorted by kind, so by hand"
    sidebar = yaml.safe_load((ROOT / 'nbs' / 'sidebar.yml').read_text('utf-8'))['website'][
        'sidebar'
    ]
    assert sorted(sum(map(leaves, sidebar['contents']), [])) == sorted(
        f'{name}.ipynb' for name in CHAPTERS
    )


def test_each_notebook_begins_alike():
    wrong = [path.name for path, nb in notebooks().items() if nb['cells'] != begun(path.stem, nb)]
    assert not wrong, f'python tests/colab.py: {wrong} differ from it'


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_nothing_stands_in_the_cell_of_the_title(chapter):
    "nbdev makes front matter of it, and drops the rest"
    title = ''.join(
        json.loads((ROOT / 'nbs' / f'{chapter}.ipynb').read_text('utf-8'))['cells'][0]['source']
    )
    assert re.fullmatch(r'# [^\n]+\n\n> [^\n]+', title)


def test_the_readme_links_to_pages_of_the_site():
    found = set(re.findall(rf'{SITE}([^)#]*)', (ROOT / 'README.md').read_text('utf-8')))
    pages = {_nbpath2html(Path(name)).name for name in CHAPTERS} | {f'{ATLAS}/index.html'}
    assert {'index.html', 'attribution.html'} & found and not found - pages


def test_what_a_chapter_exports_is_documented_on_its_page(processed):
    "Each public function, class and method has a heading there, under a link to its line"
    pages = {_nbpath2html(path).name: path for path in processed.glob('*.ipynb')}
    missing = []
    for module, symbols in ((m, s) for m, s in modules['syms'].items() if s):
        names = [name.removeprefix(f'{module}.') for name in symbols]
        text = shown(pages[next(iter(symbols.values()))[0].split('#')[0]])
        missing += [
            f'{module}: {name}'
            for name in names
            if not re.search(r'(^|\.)_', name)
            and not re.search(
                rf'/blob/main/{module.replace(".", "/")}\.py#L\d+\).*\n\n###+ {re.escape(name)}\n',
                text,
            )
        ]
    assert not missing, '\n'.join(missing)


def shown(path):
    "What the `show_doc` cells of the processed notebook at `path` show"
    outputs = [
        output
        for cell in json.loads(path.read_text('utf-8'))['cells']
        for output in cell.get('outputs', [])
    ]
    return ''.join(''.join(output.get('data', {}).get('text/markdown', '')) for output in outputs)
