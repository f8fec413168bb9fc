"Puts the first cells on top of each notebook that lacks them: `python tests/colab.py`"

import json
from pathlib import Path

NBS = Path(__file__).resolve().parents[1] / 'nbs'
COLAB = 'https://colab.research.google.com'
REPOSITORY = 'mmneurons/mmneurons'
IDS = 'colab-badge', 'colab-setup', 'colab-pair'
# Laid out as `ruff format` does, which comes over the notebooks too.
SETUP = f'''#| hide
#| eval: false
# On Colab, run this first: it fetches the chapters' data, installs the package, and leaves costly cells to you.
!test -d /content/mmneurons || git clone -q --depth 1 https://github.com/{REPOSITORY} /content/mmneurons
%pip install -q '/content/mmneurons[notebooks]'
%cd -q /content/mmneurons/nbs
get_ipython().input_transformers_cleanup.append(
    lambda lines: (
        ["print('left out: to run it, delete its line with slow, gpu or eval')"]
        if {{'#| slow', '#| gpu', '#| eval: false'}} & {{line.strip() for line in lines[:3]}}
        else lines
    )
)'''
PAIR = """import mmneurons as mn

PAIR = mn.default_pair()  # or name one: PAIR = 'pocket'"""


def top(name, nb):
    "The cells below the title of the notebook `name`: a badge that opens it in Colab, what to run there, its pair of models"
    badge = f'[![Run on Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{REPOSITORY}/blob/main/nbs/{name}.ipynb)'
    rest = json.dumps([cell['source'] for cell in nb['cells'] if cell.get('id') not in IDS])
    sources = [badge, SETUP] + [PAIR] * ('from_pretrained(PAIR' in rest)
    made = [
        dict(cell_type='code', execution_count=None, id=id, metadata={}, outputs=[])
        | dict(source=source.splitlines(True))
        for id, source in zip(IDS, sources)
    ]
    made[0] = dict(cell_type='markdown', id=IDS[0], metadata={}, source=[badge])
    return made


def notebooks():
    "Every notebook, by its path"
    return {path: json.loads(path.read_text('utf-8')) for path in sorted(NBS.glob('*.ipynb'))}


def begun(name, nb):
    "The cells of the notebook `name` with those on top that belong there; a cell that is there keeps its outputs"
    title, *rest = nb['cells']
    there = {cell['id']: cell.get('outputs', []) for cell in rest}
    first = [
        cell | (dict(outputs=there.get(cell['id'], [])) if cell['cell_type'] == 'code' else {})
        for cell in top(name, nb)
    ]
    return [title, *first, *(cell for cell in rest if cell['id'] not in IDS)]


if __name__ == '__main__':
    for path, nb in notebooks().items():
        nb['cells'] = begun(path.stem, nb)
        path.write_text(
            json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', 'utf-8'
        )
