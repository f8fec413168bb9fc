"""Makes the documentation site in `_docs`: `python tests/pages.py`, which needs Quarto (https://quarto.org).

`nbdev_docs` would run each cell that imports something, without the cells before it on which it builds. Here no cell is
run: the chapters' outputs are saved, and only the documentation of what they export is made afresh. The atlas of the
catalogue that ships is made too, in the folder `pocket-atlas`."""

import ast, inspect, os, re, shutil, subprocess, sys
from functools import cached_property
from importlib import import_module
from pathlib import Path
import pandas as pd
from execnb.nbio import read_nb, write_nb
from fastcore.xtras import dict2obj
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import (
    FilterDefaults,
    _default_exp,
    _show_docs,
    add_fold,
    add_links,
    exec_show_docs,
    rm_export,
)
from nbdev.showdoc import show_doc
from mmneurons.atlas import catalogue_atlas
from mmneurons.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[1]


def names_of(module):
    "The names of a module, those too that it imports for a type checker only: its annotations are evaluated here"
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING':
            exec(compile(ast.Module(node.body, []), module.__file__, 'exec'), vars(module))
    return vars(module)


class document(Processor):
    "Give each `show_doc` cell its output: signature, parameters and source link, of a class also of its public methods"

    def begin(self):
        module = _default_exp(self.nb)
        self.names = names_of(import_module(f'mmneurons.{module}')) if module else {}
        self.shown = {
            symbol(call) for cell in self.nb.cells for call in _show_docs(cell.parsed_() or [])
        }

    def cell(self, cell):
        for call in _show_docs(cell.parsed_() or []):
            name = symbol(call)
            found = eval(name, self.names)
            found = getter(found) or found
            texts = [doc(found, name, 3)] + [
                doc(f, n, 4) for n, f in members(found, name).items() if n not in self.shown
            ]
            data = {'text/markdown': '\n\n'.join(texts).splitlines(True)}
            cell.outputs = [dict2obj(dict(output_type='display_data', metadata={}, data=data))]


def symbol(call):
    return ast.unparse(call.value.args[0])


def getter(obj):
    "The function behind a property, also one that keeps its value; None of anything else"
    return getattr(obj, 'fget', None) or (obj.func if isinstance(obj, cached_property) else None)


def members(obj, name):
    "The functions of the public methods and properties that the class `obj`, called `name`, itself defines, by their names"
    own = vars(obj) if inspect.isclass(obj) else {}
    found = {f'{name}.{n}': getter(v) or getattr(obj, n) for n, v in own.items() if n[0] != '_'}
    return {
        n: f
        for n, f in found.items()
        if inspect.isroutine(f) and f.__doc__ and f.__module__ == obj.__module__
    }


def doc(obj, name, level):
    "`obj` documented under a heading of this `level`, by nbdev, which links to its source but not to the line"
    line = inspect.getsourcelines(inspect.unwrap(obj))[1]
    return (
        show_doc(obj, name=name, title_level=level)
        ._repr_markdown_()
        .replace('#LNone', f'#L{line}')
        .replace(':NoneType=None', '=None')
    )


def link(cell):
    "Link the symbols in prose and in documentation to their pages; nbdev would do so inside the code of signatures too"
    if cell.cell_type == 'markdown':
        cell.source = linked(cell.source)
    for output in cell.get('outputs', []):
        if 'text/markdown' in output.get('data', {}):
            text = linked(''.join(output.data['text/markdown']))
            output.data['text/markdown'] = text.splitlines(True)


def linked(text):
    "`text` with its symbols linked, except those inside a link"
    lookup, parts = NbdevLookup(), re.split(r'(\[[^]\n]*\]\([^)\n]*\))', text)
    held = {f'⟦{i}⟧': part for i, part in enumerate(parts) if i % 2}
    text = lookup.linkify(''.join(f'⟦{i}⟧' if i % 2 else part for i, part in enumerate(parts)))
    return re.sub(r'⟦\d+⟧', lambda mark: held[mark[0]], text)


def keep(cell):
    "Leave out what is hidden, and imports; what is exported stays, and nbdev moves it below its documentation"
    if not cell.directives_.keys() & {'export', 'hide', 'default_exp'}:
        return
    imports = all(
        isinstance(node, (ast.Import, ast.ImportFrom)) or ast.unparse(node).startswith('_all_ =')
        for node in cell.parsed_() or []
    )
    if 'export' in cell.directives_ and not imports:
        cell.directives_['exports'] = []
    else:
        del cell['source']


def fold(cell):
    "The source of a function or class is folded away until a reader wants it; a table of constants is there to be read"
    names = (
        [node.name for node in cell.parsed_() or [] if hasattr(node, 'name')]
        if cell.cell_type == 'code' and 'exports' in cell.directives_
        else []
    )
    if names:
        cell.source = (
            f'#| code-fold: true\n#| code-summary: "Source of {", ".join(names)}"\n{cell.source}'
        )


class Pages(FilterDefaults):
    def base_procs(self):
        ours = {exec_show_docs: document, add_links: link, rm_export: keep, add_fold: fold}
        return [ours.get(proc, proc) for proc in super().base_procs()]


def process(folder, nbs=ROOT / 'nbs'):
    "Write the notebooks of `nbs` into `folder` as Quarto wants them, and every other file as it is; their names"
    for path in sorted(nbs.rglob('*')):
        name = path.relative_to(nbs)
        if path.is_dir() or any(part[0] in '_.' for part in name.parts if part != '_quarto.yml'):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != '.ipynb':
            shutil.copy(path, folder / name)
        else:
            nb = read_nb(path)
            Pages()(nb)
            write_nb(nb, folder / name)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*.ipynb'))


def pocket_atlas(folder):
    "Write the atlas of the catalogue that ships, on images of the gallery, into a folder of the site; its list"
    catalogue = Catalogue.load(ROOT / 'mmneurons' / 'assets' / 'pocket-catalogue.json')
    shown = pd.read_parquet(ROOT / 'nbs' / 'data' / 'pocket-shown.parquet')
    return catalogue_atlas(catalogue, shown, folder / 'pocket-atlas')


if __name__ == '__main__':
    if not shutil.which('quarto'):
        sys.exit('The site is rendered by Quarto: install it from https://quarto.org')
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    made, site = ROOT / '_proc', ROOT / '_docs'
    for folder in (made, site):
        shutil.rmtree(folder, ignore_errors=True)
    process(made)
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=made, check=True)
    shutil.move(made / '_docs', site)
    pocket_atlas(site)
