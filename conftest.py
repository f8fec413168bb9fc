"""Every chapter is one pytest item, run in a fresh process by nbdev's own `test_nb`, which honours its directives.

python -m pytest nbs/02_attribution.ipynb              run one chapter
python -m pytest nbs/02_attribution.ipynb --save       the same, then write its outputs into the notebook
python -m pytest --run-slow --run-gpu                  run the cells tagged `#| slow` or `#| gpu` too
python -m pytest -m fast                               run the fast lane: the rules, and the chapters that others stand on
python -m pytest                                       run everything

The last two use as many processes as cores and memory allow; files that are named run in one.
"""

import contextlib, io, json, multiprocessing, os, shutil, sys, traceback
from pathlib import Path
import psutil, pytest
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent
FLAGS = get_config(path=ROOT).tst_flags.split()
# The fast lane: under three minutes on two cores. What takes a minute by itself does not belong here.
FAST = (
    'test_architecture 000_runs 001_neurons 002_hooks 003_images 004_weights 005_families'.split()
)
FAST += '006_encoders 007_pairs 009_stats 00_model 01a_activations 02_attribution'.split()
# Imported once, in the server from which each notebook's process is forked: no computation happens there.
PRELOAD = [
    'torch',
    'torchvision',
    'timm',
    'open_clip',
    'transformers.modeling_utils',
    'transformers.generation',
    'transformers.modeling_gguf_pytorch_utils',
    'spacy',
    'pandas',
    'pyarrow',
    'matplotlib.pyplot',
    'seaborn',
    'nbdev.test',
    'nbdev.showdoc',
]


def pytest_addoption(parser):
    group = parser.getgroup('notebooks')
    group.addoption(
        '--save',
        action='store_true',
        help='write the outputs of each notebook that passes back into it',
    )
    for flag in FLAGS:
        group.addoption(
            f'--run-{flag}', action='store_true', help=f'run the cells tagged #| {flag} too'
        )


def pytest_configure(config):
    os.environ['MPLBACKEND'] = 'agg'
    if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):  # they share the cores
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // int(workers))))


def pytest_xdist_auto_num_workers(config):
    "As many processes as there are cores, and 6 GB of free memory for each; none where files are named"
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    found = min(os.cpu_count(), int(psutil.virtual_memory().available / 6e9))
    return found if found > 1 else 0


def pytest_collection_modifyitems(config, items):
    "The files of the fast lane carry its mark"
    for item in items:
        if item.path.stem in FAST:
            item.add_marker(pytest.mark.fast)


def pytest_collect_file(file_path, parent):
    hidden = any(part[0] in '_.' for part in file_path.relative_to(parent.config.rootpath).parts)
    if file_path.suffix == '.ipynb' and not hidden:
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name=self.path.stem)


class NotebookError(Exception):
    pass


class NotebookItem(pytest.Item):
    def runtest(self):
        forced = [flag for flag in FLAGS if self.config.getoption(f'--run-{flag}')]
        error, outputs = in_fresh_process(run_notebook, self.path, forced)
        if error:
            raise NotebookError(error)
        if self.config.getoption('--save'):
            save_outputs(self.path, outputs)

    def repr_failure(self, excinfo):
        return (
            str(excinfo.value)
            if excinfo.errisinstance(NotebookError)
            else super().repr_failure(excinfo)
        )

    def reportinfo(self):
        return self.path, None, self.path.name


def in_fresh_process(func, *args):
    "`func(*args)` in a process forked from the preloaded server, so that nothing is left over from another notebook"
    sys.path.insert(0, str(ROOT))  # where the new process finds this file
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, func, args))
    try:
        process.start()
        sender.close()
        return receiver.recv()
    except EOFError:
        process.join()
        raise NotebookError(
            f'the process died without an answer (exit code {process.exitcode})'
        ) from None
    finally:
        sys.path.remove(str(ROOT))
        process.kill()
        process.join()


def send_result(sender, func, args):
    try:
        result = func(*args)
    except BaseException:
        result = traceback.format_exc(), {}
    sender.send(result)


def run_notebook(path, forced):
    "Run `path` except the cells whose flag is not `forced`; the error, if any, and each executed cell's outputs by id"
    import nbdev.test

    outputs, errors = {}, io.StringIO()

    class Recorder(nbdev.test.CaptureShell):
        def __init__(self, path):
            super().__init__(path, mpl_format='png')  # one pixel a dot, not two

        def cell(self, cell, **kwargs):
            if cell.cell_type != 'code':
                return
            cell.outputs, source = [], cell.source
            super().cell(cell, **kwargs)
            outputs[cell.id] = json.loads(json.dumps(cell.outputs))
            if self.exc:
                errors.write(f'{path.name}, cell {cell.id}:\n\n{source}\n\n')

    nbdev.test.CaptureShell = Recorder
    with contextlib.redirect_stderr(errors):
        passed, _ = nbdev.test.test_nb(path, skip_flags=FLAGS, force_flags=forced, basepath=ROOT)
    return None if passed else errors.getvalue(), outputs


def save_outputs(path, outputs):
    "Write `outputs` (by cell id, without stderr) into the notebook at `path`, cleaned; other cells keep what they have"
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import nbdev_clean

    nb = read_nb(path)
    for cell in nb.cells:
        if cell.id in outputs:
            cell.outputs = [o for o in outputs[cell.id] if o.get('name') != 'stderr']
    write_nb(nb, path)
    with contextlib.chdir(ROOT):
        nbdev_clean(str(path))


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium, for the tests of pages"
    found = next(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
    )
    if not found:
        pytest.skip('pages are opened in Chromium: apt install chromium')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()
