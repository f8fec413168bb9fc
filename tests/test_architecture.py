"The rules of the house, checked on the notebooks and on what is exported from them; a new chapter needs no edit here."

import ast, base64, io, json, os, re, shutil, statistics, struct, subprocess, sys, tokenize
from functools import cache
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
    r'#\| (export|hide|eval: false|gpu|slow|echo: false|fig-alt: ".+"|default_exp [\w.]+)'
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
PACKAGE = ROOT / 'mmneurons'
MODULES = [PACKAGE / f'{name.replace(".", "/")}.py' for name in ORDER]
HAND_WRITTEN = {'__init__.py', '_modidx.py', 'studies/__init__.py', 'corpus/__init__.py'}


def named(path):
    "The name of the module at `path`, without the package's own"
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def ids(paths):
    return dict(
        argvalues=paths, ids=[named(path) if path.suffix == '.py' else path.stem for path in paths]
    )


@cache
def tree(path):
    return ast.parse(path.read_text('utf-8'))


def imported(path):
    "The modules of this package that the module at `path` imports anywhere, also inside a function"
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            here = ['mmneurons', *path.relative_to(PACKAGE).parts][: -node.level or None]
            base = '.'.join(filter(None, [*here[: node.level and None], node.module]))
            found |= {base} | {f'{base}.{alias.name}' for alias in node.names}
    return {name.removeprefix('mmneurons.') for name in found} & set(ORDER)


@pytest.mark.parametrize('path', **ids(MODULES))
def test_a_module_imports_only_from_chapters_before_it(path):
    later = ORDER[ORDER.index(named(path)) :]
    assert not imported(path) & set(later), (
        f'{named(path)} imports from a later chapter; the order is {" < ".join(ORDER)}'
    )


@pytest.mark.parametrize('path', **ids([path for path in MODULES if path.stem in SIDE_BY_SIDE]))
def test_analyses_stand_side_by_side(path):
    assert not imported(path) & SIDE_BY_SIDE


def test_each_module_has_one_chapter():
    assert len(set(ORDER)) == len(ORDER)
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py')}
    assert found - HAND_WRITTEN == {path.relative_to(PACKAGE).as_posix() for path in MODULES}


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
    for name in HAND_WRITTEN - {'_modidx.py'}:
        (tmp_path / 'mmneurons' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / 'mmneurons' / name)
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
            for path in [*root.glob('mmneurons/**/*.py'), *root.glob('nbs/*.yml')]
        }

    here, fresh = made(ROOT), made(tmp_path)
    stale = sorted(name for name in here | fresh if here.get(name) != fresh.get(name))
    assert not stale, f'run nbdev_export and nbdev_sidebar: {stale} differ from the notebooks'


def statements(source):
    "How many statements `source` has; what documents it does not count"
    nodes = list(ast.walk(ast.parse(source)))
    documented = [
        node
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)
    ]
    return sum(isinstance(node, ast.stmt) for node in nodes) - len(documented)


def tenth(values):
    "What a tenth of `values` is above"
    return sorted(values)[int(0.9 * len(values))]


@pytest.mark.parametrize('path', **ids(NBS))
def test_a_chapter_is_made_of_small_cells(path):
    assert path.stat().st_size <= 500_000
    assert len(cells(path)) <= 150
    sizes = [statements(cell['source']) for cell in exported(path)] or [0]
    median, longest = statistics.median(sizes), max(sizes)
    assert (median <= 8) & (longest <= 40), f'exported cells: {median=}, {longest=} statements'


def test_nine_cells_of_ten_are_small():
    assert tenth([statements(cell['source']) for path in NBS for cell in exported(path)]) <= 20


def comments(path):
    "The column of the comment on each line of the module at `path` that has one"
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text('utf-8')).readline)
    return {token.start[0]: token.start[1] for token in tokens if token.type == tokenize.COMMENT}


@pytest.mark.parametrize('path', **ids(MODULES))
def test_lines_are_narrow(path):
    "Lines as wide as a page shows them; a comment behind the code may go somewhat further"
    lines = path.read_text('utf-8').splitlines()
    column = comments(path)
    wide = [len(line) for line in lines]
    written = [n for n, line in enumerate(lines, 1) if line.strip() and line[:7] != '__all__']
    code = [len(lines[n - 1][: column.get(n)].rstrip()) for n in written]
    assert (tenth(code) <= 100) & (max(code) <= 120) & (max(wide) <= 130), (
        f'{tenth(code)=}, {max(code)=}, {max(wide)=}: '
        + '\n'.join(line for line in lines if len(line) > 120)
    )


def test_layout():
    "Split by one formatter, so that no line is squeezed by hand"
    found = subprocess.run(
        [sys.executable, '-m', 'ruff', 'format', '--check', '.', *PACKAGE.glob('__init__.py*')],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not found.returncode, f'ruff format .\n{found.stdout}{found.stderr}'


MAIN = ['00_model', '01_train_projection', '02_attribution', '03_decoding', '04_receptive_fields']
MAIN += ['04c_catalogue', '05_ablation', '06_sweep']


def prose(path):
    "The text of a notebook, without code, links and images"
    text = '\n'.join(cell['source'] for cell in cells(path, 'markdown'))
    return re.sub(r'(?s)```.*?```|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)|`[^`\n]*`', ' ', text)


@pytest.mark.parametrize('path', **ids(CHAPTERS))
def test_a_chapter_explains_its_code_and_is_read_in_one_sitting(path):
    words = len(re.findall(r"\w[\w'’-]*", prose(path)))
    shown = [cell for cell in cells(path, 'code') if '#| hide' not in directives(cell)]
    ratio = words / sum(statements(cell['source']) for cell in shown)
    assert ratio >= 2, f'{ratio:.1f} words of prose for each statement'
    assert path.stem not in MAIN or words <= 2500, (
        f'{words} words: a main chapter has at most 2,500'
    )


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
    commented, missing = comments(path), []
    for name, node in public(tree(path)):
        first = (ast.get_docstring(node) or '').partition('\n')[0]
        if not first and not name.endswith('__init__'):
            missing.append(f'{name}: a docstring that opens with one line')
        if isinstance(node, ast.ClassDef):
            items = [(field.target.id, field) for field in fields(node)]
        else:
            items = [(arg.arg, arg) for arg in parameters(node)]
        lines = [item.end_lineno for _, item in items]
        missing += [
            f'{name}: a comment behind {label}, on a line of its own'
            for (label, _), line in zip(items, lines)
            if line not in commented or lines.count(line) > 1
        ]
    assert not missing, '\n'.join(missing)


def test_no_undefined_or_unused_name():
    places = ['mmneurons', 'tests', 'benchmarks', 'conftest.py', 'setup.py']
    found = subprocess.run(
        [sys.executable, '-m', 'pyflakes', *places], cwd=ROOT, capture_output=True, text=True
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


def returned(function):
    "Whether `function` itself, not one that is made inside it, returns or yields a value"
    nodes = [*function.body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, (ast.Yield, ast.YieldFrom)) or (
            isinstance(node, ast.Return) and node.value is not None
        ):
            return True
        nodes += ast.iter_child_nodes(node)
    return False


@pytest.mark.parametrize('path', **ids(MODULES))
def test_what_a_function_returns_is_annotated(path):
    bare = [
        name
        for name, node in public(tree(path))
        if isinstance(node, ast.FunctionDef) and returned(node) and node.returns is None
    ]
    assert not bare, f'{named(path)}: no return annotation: {bare}'


def private(path):
    "What the module at `path` takes from another of this package although its name begins with _"
    found, modules = [], {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or '')[:9] == 'mmneurons'
        ):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            found += [alias.name for alias in node.names if re.match('_(?!_)', alias.name)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            last = {name.rpartition('.')[2] for name in ORDER}
            if modules.get(node.value.id) in last and re.match('_(?!_)', node.attr):
                found.append(f'{node.value.id}.{node.attr}')
    return found


@pytest.mark.parametrize('path', **ids(MODULES))
def test_no_private_name_crosses_modules(path):
    assert not private(path)


@pytest.mark.parametrize('path', **ids([path for path in MODULES if named(path) != 'hooks']))
def test_only_hooks_registers_a_hook(path):
    found = re.findall(
        r'\.register_(?:forward|backward|full)\w*|\.register_\w*hook', path.read_text('utf-8')
    )
    assert not found, f'{found}: hooks.attached does this, and takes it away again'


DRAWS = {'default_rng', 'Generator', 'SeedSequence', 'PCG64'}


def global_draws(node, forked=False):
    "The calls below `node` that seed or advance a global random generator, except torch's inside torch.random.fork_rng"
    if isinstance(node, ast.With):
        forked |= any('fork_rng' in ast.unparse(item.context_expr) for item in node.items)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        ours = re.fullmatch(
            r'torch\.(random\.|cuda\.)?manual_seed(_all)?|(transformers\.)?set_seed', name
        )
        other = re.fullmatch(r'(?:np|numpy)\.random\.(\w+)|random\.(?!Random)(\w+)', name)
        if (ours and not forked) or (other and other[1] not in DRAWS):
            yield f'line {node.lineno}: {name}'
    for child in ast.iter_child_nodes(node):
        yield from global_draws(child, forked)


@pytest.mark.parametrize('path', **ids(MODULES))
def test_no_global_random_state_is_touched(path):
    assert not [*global_draws(tree(path))]


@pytest.mark.parametrize('path', **ids(MODULES))
def test_no_class_has_every_attribute_for_a_type_checker(path):
    "A `__getattr__` under TYPE_CHECKING would hide each misspelt name from it"
    blocks = [node for node in ast.walk(tree(path)) if isinstance(node, ast.If)]
    guarded = [node for node in blocks if 'TYPE_CHECKING' in ast.unparse(node.test)]
    inside = [sub for node in guarded for sub in ast.walk(node)]
    assert not [sub.lineno for sub in inside if getattr(sub, 'name', '') == '__getattr__']


DOOR = """
import sys, time
began = time.perf_counter()
import mmneurons as mn
took = time.perf_counter() - began
heavy = {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)
assert not heavy, heavy
assert took < .3, took
assert set(mn.__all__) <= set(dir(mn))
missing = {name for name in mn.__all__ if not callable(getattr(mn, name, None))}
assert not missing, missing
assert not hasattr(mn, 'atribute')
"""


def test_the_front_door():
    "It opens at once, brings nothing heavy, and each name of it is there"
    done = subprocess.run([sys.executable, '-c', DOOR], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_type_checkers_know_the_names_of_the_front_door():
    stub = ast.parse((PACKAGE / '__init__.pyi').read_text('utf-8'))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        source = tree(PACKAGE / f'{node.module.removeprefix("mmneurons.").replace(".", "/")}.py')
        there = {getattr(sub, 'name', None) for sub in source.body}
        for alias in node.names:
            assert alias.asname == alias.name, (
                f'{alias.name}: write "as {alias.name}", which exports it'
            )
            assert alias.name in there, f'{node.module} has no {alias.name}'


# Words that readers of the field would have to decode: what to write. (A photograph is right beside a drawing.)
WORDS = {
    r'eyes?': 'vision encoder',
    r'ears?': 'audio encoder',
    r'pictures?': 'image',
    r'units(?! of)': 'neurons',
    r'silent|silences|silenced|silencing|holes?': 'ablated, ablation',
    r'switch(?:ed|es|ing)? (?:it |them )?off': 'ablated, ablation',
    r'(?:held|holds?|holding) at': 'clamped to',
    r'lamp tests?': 'localisation test',
    r'opinions?': 'attribution, estimate',
    r'habits? of place': 'position bias',
    r'things?': 'object, concept',
    r'readable': 'interpretable',
    r'neurons? says?|what (?:it|they) says?': 'promotes tokens; its decoded tokens',
    r'what leads': 'highest-scoring',
    r'kin': 'related by WordNet',
    r'on the way of the gradient|behind the MLP': 'in the gradient path, after the MLP',
}
WORD = re.compile(rf'(?i)\b(?:{"|".join(WORDS)})\b')
# What is quoted, or is a caption that a model reads or writes, keeps its words.
QUOTED = re.compile(
    r'(?i)“[^”]*”|`[^`\n]*`|(?<!\*)\*[\w -]{1,30}\*|\b▁?a ▁?picture ▁?of\b|\bpictures? of an?\b'
)
NAMES = {'said', 'made', 'ours', 'placed', 'course', 'whole', 'fit', 'kept', 'shown'}


def messages(source):
    "The docstrings, the comments and the strings of several words in Python code"
    source = re.sub(r'(?m)^\s*[!%].*$', 'pass', source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith('#|'):
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if len(node.value.split()) > 2:
                yield node.value


def private_words(texts):
    "Each word of WORDS in `texts`, with what stands around it"
    return [
        ' '.join(f'{found[0]}: {text[max(0, found.start() - 30) : found.end() + 30]}'.split())
        for text in (QUOTED.sub(' ', text) for text in texts)
        for found in WORD.finditer(text)
    ]


def written(path):
    "The texts of a page, a script or a document"
    if path.suffix == '.py':
        return [*messages(path.read_text('utf-8'))]
    if path.suffix != '.ipynb':
        return [path.read_text('utf-8')]
    return [
        prose(path),
        *(text for cell in cells(path, 'code') for text in messages(cell['source'])),
    ]


DOCUMENTS = [
    ROOT / name for name in ('CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff', 'settings.ini')
]
DOCUMENTS += sorted((PACKAGE / 'assets').glob('*.j2')) + sorted((ROOT / 'benchmarks').glob('*.py'))


@pytest.mark.parametrize('path', NBS + DOCUMENTS, ids=lambda path: path.name)
def test_the_language_is_that_of_the_field(path):
    found = private_words(written(path))
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('path', **ids(MODULES))
def test_a_public_name_says_what_it_is(path):
    assert not NAMES & {name for name, _ in public(tree(path))}


def test_private_words_are_found():
    text = 'The eye saw a picture: the unit, silent, in units of nats. “An ear”, `eye`, a picture of a cat, *eyes*.'
    assert [found.partition(':')[0] for found in private_words([text])] == [
        'eye',
        'picture',
        'silent',
    ]
