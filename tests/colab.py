"Puts what Colab needs on top of each chapter that lacks it: `python tests/colab.py`"

import json, re
from pathlib import Path

NBS = Path(__file__).resolve().parents[1] / 'nbs'
COLAB = 'https://colab.research.google.com'
REPOSITORY = 'mmneurons/mmneurons'
SETUP = f'''#| hide
#| eval: false
# On Colab, run this first: it fetches the chapters' data, installs the package, leaves costly cells to you, and names the GPU.
!test -d /content/mmneurons || git clone -q --depth 1 https://github.com/{REPOSITORY} /content/mmneurons
%pip install -q '/content/mmneurons[dev]'
%cd -q /content/mmneurons/nbs
get_ipython().input_transformers_cleanup.append(lambda lines: ["print('left out: to run it, delete its line with slow, gpu or eval')"]
    if {{'#| slow', '#| gpu', '#| eval: false'}} & {{line.strip() for line in lines[:3]}} else lines)
!nvidia-smi -L || echo 'No GPU: the pocket model needs none; for more, choose Runtime > Change runtime type.\''''


def top(name):
    "The cells on top of the chapter `name`: a badge that opens it in Colab, and the first cell to run there"
    badge = f'[![Run on Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{REPOSITORY}/blob/main/nbs/{name}.ipynb)'
    return [
        dict(cell_type='markdown', id='colab-badge', metadata={}, source=[badge]),
        dict(
            cell_type='code',
            execution_count=None,
            id='colab-setup',
            metadata={},
            outputs=[],
            source=SETUP.splitlines(True),
        ),
    ]


def chapters():
    "The notebooks that export a module, by path: the index, which has nothing to run, is not among them"
    found = {path: json.loads(path.read_text('utf-8')) for path in sorted(NBS.glob('*.ipynb'))}
    return {path: nb for path, nb in found.items() if re.search(r'#\| default_exp', json.dumps(nb))}


if __name__ == '__main__':
    for path, nb in chapters().items():
        title, *rest = nb['cells']
        nb['cells'] = [
            title,
            *top(path.stem),
            *(cell for cell in rest if cell['id'] not in ('colab-badge', 'colab-setup')),
        ]
        path.write_text(
            json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', 'utf-8'
        )
