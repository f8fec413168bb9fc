"""Somebody's first ten minutes, with what the README tells them to type, word for word; and what the wheel holds.

The package is built and installed for real, into empty virtual environments. The 5 GB that it requires are not fetched a
second time: one `.pth` file lends those environments what the one that runs the tests has, which an editable install is not part of."""

import ast, json, os, re, shutil, subprocess, sys, sysconfig, venv, zipfile
from configparser import ConfigParser
from difflib import get_close_matches
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text('utf-8')
NOT_IN_A_CLONE = shutil.ignore_patterns(
    '.git',
    '_docs',
    '_proc',
    '.*cache*',
    '__pycache__',
    '*.egg-info',
    'build',
    'dist',
    'runs',
    '.venv',
    '*.html',
)


def block(language, having):
    "The README's first block of code in `language` that has these words"
    return next(
        text
        for kind, text in re.findall(r'(?ms)^```(\w*)\n(.*?)\n```$', README)
        if kind == language and having in text
    )


def environment(folder):
    "An empty virtual environment; what it needs to be run in"
    venv.create(folder, with_pip=True)
    site = Path(sysconfig.get_path('purelib', 'venv', dict(base=folder, installed_base=folder)))
    site.joinpath('lent.pth').write_text(
        '\n'.join(path for path in sys.path if path.endswith('site-packages'))
    )
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ('PYTHONPATH', 'IN_TEST', 'PYTHONHOME')
    }
    return env | dict(
        PATH=f'{folder / "bin"}:{os.environ["PATH"]}',
        PIP_NO_DEPS='1',
        PIP_NO_BUILD_ISOLATION='0',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
    )


def run(command, cwd, env, **kwargs):
    "The finished process of one line in a shell"
    return subprocess.run(
        ['bash', '-c', command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        encoding='utf-8',
        timeout=900,
        **kwargs,
    )


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp('clone') / 'mmneurons', symlinks=True, ignore=NOT_IN_A_CLONE
    )


@pytest.fixture(scope='module')
def newcomer(clone):
    "The environment after the README's first command, and what that printed"
    env = environment(clone.parent / 'empty')
    return env, run(block('sh', 'pip install'), clone, env)


def test_the_first_command_of_the_readme(newcomer, clone):
    _, done = newcomer
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    said = next(
        line for line in block('', '“').splitlines() if '“' in line
    )  # the README shows what it prints
    assert said in done.stdout and (page := re.search(r'page: (\S+\.html)', done.stdout)), (
        done.stdout
    )
    report = (clone / page[1]).read_text('utf-8')
    assert (
        report.lstrip().lower().startswith('<!doctype html>')
        and '<h1' in report
        and re.search('“(.+?)”', said)[1] in report
    )


def test_the_lines_of_the_readme_typed_and_a_mistake(newcomer, tmp_path):
    env, _ = newcomer
    typed = block('python', 'from_pretrained') + "\n\nmn.MultimodalLM.from_pretrained('pokcet')\n"
    done = run('python -i -q', tmp_path, env, input=typed)
    assert (
        'token' in done.stdout
        and 'array([[[' in done.stdout
        and re.search(r"(?m)^'.+'$", done.stdout)
    ), done.stdout + done.stderr
    error = done.stderr.strip().removesuffix('>>>').strip().splitlines()[-1]
    assert done.stderr.count('Traceback') == 1 and error.startswith(
        "ValueError: unknown model 'pokcet'; there are"
    ), done.stderr
    assert (
        get_close_matches('pokcet', re.findall(r'[\w-]+', error.partition('there are')[2]))[0]
        == 'pocket'
    )


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The wheel of the repository, and the one that is built from the source distribution"
    source = shutil.copytree(
        ROOT, tmp_path_factory.mktemp('built') / 'mmneurons', symlinks=True, ignore=NOT_IN_A_CLONE
    )
    build = f'{sys.executable} -m build --no-isolation --outdir'
    made = run(f'{build} direct --wheel . && {build} both .', source, os.environ)
    assert made.returncode == 0, made.stdout + made.stderr
    return [next((source / folder).glob('*.whl')) for folder in ('direct', 'both')]


def content(wheel):
    with zipfile.ZipFile(wheel) as z:
        return {name: z.read(name) for name in z.namelist() if not name.endswith('RECORD')}


def test_the_wheel_is_whole_and_light(built):
    held = content(built[0])
    assert held == content(built[1])  # through the source distribution
    assert built[0].stat().st_size < 7e6
    package = built[0].parents[1] / 'mmneurons'
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob('*')
        if path.is_file() and path.suffix != '.pyc'
    }
    assert (
        {'mmneurons/py.typed', 'mmneurons/__init__.pyi', 'mmneurons/assets/pocket.safetensors.xz'}
        <= files
        <= held.keys()
    )


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    "An environment with the wheel, and an empty folder"
    folder = tmp_path_factory.mktemp('installed')
    env = environment(folder / 'env')
    done = run(f'pip install {built[0]}', folder, env)
    assert done.returncode == 0, done.stderr
    (folder / 'here').mkdir()
    return env, folder / 'here'


def test_the_installed_wheel_answers_anywhere(installed):
    env, here = installed
    version = re.search(r'(?m)^version = (.+)$', (ROOT / 'settings.ini').read_text())[1]
    assert run('mmneurons --version', here, env).stdout == f'mmneurons {version}\n'
    where = run('python -c "import mmneurons; print(mmneurons.__file__)"', here, env).stdout
    assert where.startswith(str(here.parent))


CHAPTER = """
import nbformat, sys
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=600, kernel_name='python3').execute()
"""


def test_the_chapters_come_with_it_and_run(installed):
    "One that reads a table and looks at an image; every other one is run by pytest from the repository"
    from mmneurons.book import book

    env, here = installed
    done = run('mmneurons notebooks', here, env)
    assert done.returncode == 0, done.stderr
    copied = {
        path.relative_to(here / 'notebooks').as_posix()
        for path in (here / 'notebooks').rglob('*')
        if path.is_file()
    }
    assert (
        copied == book().keys() and {path.name for path in (ROOT / 'nbs').glob('*.ipynb')} <= copied
    )
    (here / 'chapter.py').write_text(CHAPTER)
    done = run('python ../chapter.py 04a_overlap.ipynb', here / 'notebooks', env)
    assert done.returncode == 0, done.stderr[-3000:]


def required(name, extras=(), seen=None):
    "Every distribution that installing `name` brings"
    seen = {} if seen is None else seen
    key = canonicalize_name(name)
    if set(extras) <= seen.get(key, {None}) and key in seen:
        return seen.keys()
    seen[key] = seen.get(key, set()) | set(extras)
    try:
        needs = map(Requirement, distribution(name).requires or [])
    except ImportError:
        return seen.keys()  # not needed on this machine
    for r in needs:
        if r.marker is None or any(r.marker.evaluate(dict(extra=e)) for e in ('', *extras)):
            required(r.name, r.extras, seen)
    return seen.keys()


def test_the_chapters_import_only_what_the_notebooks_extra_brings():
    there, of = required('mmneurons', ['notebooks']), packages_distributions()
    for path in (ROOT / 'nbs').glob('*.ipynb'):
        cells = [
            ''.join(cell['source'])
            for cell in json.loads(path.read_text('utf-8'))['cells']
            if cell['cell_type'] == 'code' and '#| eval: false' not in ''.join(cell['source'])
        ]
        for node in (node for source in cells for node in ast.walk(ast.parse(source))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in {name.split('.')[0] for name in names} - {
                *sys.stdlib_module_names,
                'mmneurons',
            }:
                assert any(canonicalize_name(d) in there for d in of.get(name, [name])), (
                    f'{path.name} imports {name}, which mmneurons[notebooks] does not bring'
                )


def requirements(extra=''):
    "The distributions that `settings.ini` names, of the package itself or of one of its extras"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    listed = ini['DEFAULT'][f'{extra}_requirements' if extra else 'requirements'].split()
    assert all(re.search('[=<>]', one) for one in listed), f'a bound for each of {listed}'
    return {canonicalize_name(Requirement(one).name) for one in listed}


def asked(tree):
    "What a module imports outside the standard library and this package, and the (package, extra) of each call of needs"
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'needs':
            yield tuple(argument.value for argument in node.args[:2])
        for name in {name.split('.')[0] for name in names}:
            if name not in sys.stdlib_module_names and name != 'mmneurons':
                yield name, ''


@pytest.mark.parametrize('path', sorted((ROOT / 'mmneurons').rglob('*.py')), ids=lambda p: p.stem)
def test_what_a_module_imports_is_required(path):
    "By the package itself; what an extra brings is asked for by `needs`, which names the extra"
    of = packages_distributions()
    for name, extra in asked(ast.parse(path.read_text('utf-8'))):
        brings = {canonicalize_name(d) for d in of.get(name.split('.')[0], [name])}
        assert brings & requirements(extra), (
            f'{name} is not among the requirements of {extra or "the package"}'
        )


def test_the_version_is_the_same_wherever_it_is_said():
    version = re.search(r'(?m)^version = (.+)$', (ROOT / 'settings.ini').read_text())[1]
    for name, line in {
        'CITATION.cff': f'version: {version}',
        'CHANGELOG.md': f'## {version}',
        'mmneurons/__init__.py': f'__version__ = "{version}"',
    }.items():
        assert re.search(rf'(?m)^{re.escape(line)}(?![\w.])', (ROOT / name).read_text('utf-8')), (
            name
        )


def test_types(tmp_path):
    "What is exported, and the README's lines as a user's editor would see them"
    (tmp_path / 'typed.py').write_text(block('python', 'from_pretrained'))
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', 'mmneurons', tmp_path / 'typed.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
