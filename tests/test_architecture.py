"The rules of the house, checked on the notebooks and on what is exported from them; a new chapter needs no edit here."

import ast, base64, io, json, os, re, shutil, statistics, struct, subprocess, sys, tokenize
from pathlib import Path
import pytest
from readme import readme

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(
    path
    for path in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(part[0] in '_.' for part in path.relative_to(ROOT / 'nbs').parts)
)
DIRECTIVES = re.compile(
    r'#\| (export|hide|eval: false|gpu|slow|echo: false|fig-alt: ".+"|default_exp \w+)'
)
SIDE_BY_SIDE = {
    'attribution',
    'decoding',
    'receptive_fields',
    'ablation',
}  # they hand each other tables, not functions
INSTALL = "pip install -e '.[pocket]' && mmneurons look nbs/images/"
TEST = "pip install -e '.[dev]' && python -m pytest"


def cells(path, kind=None):
    "The cells of the notebook at `path`, of one `kind`, each with its source in one string"
    found = [
        cell | {'source': ''.join(cell['source'])}
        for cell in json.loads(path.read_text('utf-8'))['cells']
    ]
    return [cell for cell in found if kind in (None, cell['cell_type'])]


def directives(cell):
    "The leading comment lines of a code cell that nbdev would read"
    lines = [line for line in cell['source'].splitlines() if line.strip()]
    n = next((i for i, line in enumerate(lines) if not re.match(r'\s*#\s*\|', line)), len(lines))
    return [line.rstrip() for line in lines[:n]]


def code(cell):
    return [
        line for line in cell['source'].splitlines() if line.strip() and not line.startswith('#|')
    ]


def exported(path):
    return [cell for cell in cells(path, 'code') if '#| export' in directives(cell) and code(cell)]


def module(path):
    "The name of the module that the chapter at `path` exports, or None"
    names = [
        d.split()[-1]
        for cell in cells(path, 'code')
        for d in directives(cell)
        if d.startswith('#| default_exp')
    ]
    return names[0] if names else None


CHAPTERS = [path for path in NBS if module(path)]
ORDER = [module(path) for path in CHAPTERS]
MODULES = [ROOT / 'mmneurons' / f'{name}.py' for name in ORDER]


def ids(paths):
    return dict(argvalues=paths, ids=[path.stem for path in paths])


def imported(path):
    "The modules of this package that the module at `path` imports anywhere, also inside a function"
    found = set()
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['mmneurons' if node.level else '', node.module]))
            found |= {base} | {f'{base}.{alias.name}' for alias in node.names}
    return {name.split('.')[1] for name in found if name.startswith('mmneurons.')} & set(ORDER)


@pytest.mark.parametrize('path', **ids(MODULES))
def test_a_module_imports_only_from_chapters_before_it(path):
    later = ORDER[ORDER.index(path.stem) :]
    assert not imported(path) & set(later), (
        f'{path.stem} imports from a later chapter; the order is {" < ".join(ORDER)}'
    )


@pytest.mark.parametrize('path', **ids([path for path in MODULES if path.stem in SIDE_BY_SIDE]))
def test_analyses_stand_side_by_side(path):
    assert not imported(path) & SIDE_BY_SIDE


def test_each_module_has_one_chapter():
    assert len(set(ORDER)) == len(ORDER)
    assert {path.stem for path in (ROOT / 'mmneurons').glob('*.py') if path.stem[0] != '_'} == set(
        ORDER
    )


@pytest.mark.parametrize('path', **ids(NBS))
def test_directives_are_known_and_on_top(path):
    "nbdev ignores a directive that is misspelt, or that stands below the first line of code"
    for cell in cells(path, 'code'):
        like = re.findall(
            r'(?m)^\s*#\s*(?:\|.*|(?:export|hide|gpu|slow|default_exp|eval|echo)\b.*)',
            cell['source'],
        )
        top = directives(cell)
        assert [line.strip() for line in like] == top, (
            f'cell {cell["id"]}: misspelt, or not on top: {like}'
        )
        assert all(DIRECTIVES.fullmatch(line) for line in top), (
            f'cell {cell["id"]}: not on the list of directives: {top}'
        )


def test_export_and_sidebar_are_what_the_notebooks_say(tmp_path):
    skipped = shutil.ignore_patterns('images', '_proc', '.ipynb_checkpoints')
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=skipped)
    for name in ('settings.ini', '_quarto.yml'):
        shutil.copy(ROOT / name, tmp_path)
    make = (
        'from nbdev.doclinks import nbdev_export; from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml;'
        'nbdev_export(); nbdev_sidebar(); refresh_quarto_yml()'
    )
    env = {
        name: value for name, value in os.environ.items() if name != 'IN_TEST'
    }  # under it nbdev exports nothing
    subprocess.run([sys.executable, '-c', make], cwd=tmp_path, env=env, check=True)

    def made(root):
        return {
            path.relative_to(root).as_posix(): path.read_text('utf-8')
            for path in [*root.glob('mmneurons/*.py'), *root.glob('nbs/*.yml')]
        }

    here, fresh = made(ROOT), made(tmp_path)
    stale = sorted(name for name in here | fresh if here.get(name) != fresh.get(name))
    assert not stale, f'run nbdev_export and nbdev_sidebar: {stale} differ from the notebooks'


def documentation(source):
    "How many lines of `source` are docstrings or parameters that have a line, and so a docment, of their own"
    lines = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        first = node.body[0]
        if ast.get_docstring(node) is not None:
            lines += first.end_lineno - first.lineno + 1
        if isinstance(node, ast.FunctionDef):
            lines += max(0, first.lineno - node.lineno - 1)
    return lines


@pytest.mark.parametrize('path', **ids(NBS))
def test_sizes(path):
    "Lines of code: what documents a function (docstring, a line for each parameter) does not count"
    assert path.stat().st_size <= 500_000
    assert len(cells(path)) <= 150
    lines = [len(code(cell)) - documentation(cell['source']) for cell in exported(path)]
    if not lines:
        return
    median, longest, total = statistics.median(lines), max(lines), sum(lines)
    assert (median <= 8) & (longest <= 50) & (total <= 350), (
        f'exported cells: {median=}, {longest=}, {total=} lines'
    )


@pytest.mark.parametrize('path', **ids(CHAPTERS))
def test_prose_for_the_code(path):
    shown = [cell for cell in cells(path, 'code') if '#| hide' not in directives(cell)]
    prose = re.sub(
        r'(?s)```.*?```|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)',
        ' ',
        '\n'.join(c['source'] for c in cells(path, 'markdown')),
    )
    ratio = len(re.findall(r"\w[\w'’-]*", prose)) / sum(len(code(cell)) for cell in shown)
    assert 2.5 <= ratio <= 8, f'{ratio:.1f} words of prose for each line of code'


@pytest.mark.parametrize('path', **ids(NBS))
def test_a_chapter_has_a_title_and_a_subtitle(path):
    assert re.match(r'# \S.*\n\n?> \S', cells(path)[0]['source']), (
        'the first cell reads "# Title", then "> one line"'
    )


PATHS = re.compile(
    r'(?<![\w.:/<])/(?:home|root|tmp|opt|work|usr|var|mnt|private|content|Users)/|[A-Z]:\\\\|site-packages'
)


def printed(output):
    "What `output` shows as text"
    texts = [output.get('text', '')] + [
        value for kind, value in output.get('data', {}).items() if kind[:5] == 'text/'
    ]
    return '\n'.join(''.join(text) for text in texts)


def dpi(png):
    "Dots per inch that a PNG file declares in its pHYs chunk"
    at = png.find(b'pHYs')
    return struct.unpack('>I', png[at + 4 : at + 8])[0] * 0.0254 if at > 0 else 0


@pytest.mark.parametrize('path', **ids(NBS))
def test_saved_outputs_are_clean(path):
    for cell in cells(path, 'code'):
        where = f'{path.name}, cell {cell["id"]}'
        assert cell['execution_count'] is None, f'{where}: run nbdev_clean'
        for output in cell['outputs']:
            assert output['output_type'] != 'error' and output.get('name') != 'stderr', (
                f'{where}: an error or a warning'
            )
            found = PATHS.search(printed(output)) or re.search(
                'Traceback|Warning:', printed(output)
            )
            assert not found, f'{where}: {found}'
            png = output.get('data', {}).get('image/png', '')
            assert dpi(base64.b64decode(''.join(png))) < 101, f'{where}: a figure above 100 dpi'


def parameters(function):
    "The named parameters of `function`, without self and cls"
    args = function.args
    return [
        arg
        for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]
        if arg.arg not in ('self', 'cls')
    ]


def public(tree):
    "Each public class and function of a module, and the public methods of those classes, with their names"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
            yield node.name, node
            for sub in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(sub, ast.FunctionDef) and (
                    sub.name[0] != '_' or sub.name == '__init__'
                ):
                    yield f'{node.name}.{sub.name}', sub


def fields(node):
    "The annotated fields of a dataclass"
    is_data = any('dataclass' in ast.unparse(decorator) for decorator in node.decorator_list)
    return [sub for sub in node.body if is_data and isinstance(sub, ast.AnnAssign)]


@pytest.mark.parametrize('path', **ids(MODULES))
def test_docstrings_and_docments(path):
    source = path.read_text('utf-8')
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    missing = []
    for name, node in public(ast.parse(source)):
        first = (ast.get_docstring(node) or '').partition('\n')[0]
        if not first and not name.endswith('__init__'):
            missing.append(f'{name}: a docstring that opens with one line')
        if isinstance(node, ast.ClassDef):
            named = [(field.target.id, field) for field in fields(node)]
        else:
            named = [(arg.arg, arg) for arg in parameters(node)]
        lines = [item.end_lineno for _, item in named]
        missing += [
            f'{name}: a comment behind {label}, on a line of its own'
            for (label, _), line in zip(named, lines)
            if line not in commented or lines.count(line) > 1
        ]
    assert not missing, '\n'.join(missing)


def test_no_undefined_or_unused_name():
    files = [
        *ROOT.glob('mmneurons/*.py'),
        *ROOT.glob('tests/*.py'),
        ROOT / 'conftest.py',
        ROOT / 'setup.py',
    ]
    found = subprocess.run(
        [sys.executable, '-m', 'pyflakes', *files], capture_output=True, text=True
    )
    assert not found.returncode, found.stdout + found.stderr


def test_no_large_file():
    "Weights and corpora come from a registry, not from this repository"
    listed = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip('not a git checkout')
    files = [ROOT / name for name in listed.stdout.split('\0') if name]
    large = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and path.stat().st_size > 3e6
    ]
    assert not large, f'above 3 MB: {large}'


def test_readme_index_and_ci_say_the_same():
    text = (ROOT / 'README.md').read_text('utf-8')
    assert text == readme(), 'README.md is made from nbs/index.ipynb: python tests/readme.py'
    assert INSTALL in text and re.search(rf'(?m)^\s*{re.escape(TEST)}\s*$', text)
    assert TEST in (ROOT / '.ci' / 'run').read_text('utf-8').splitlines()
