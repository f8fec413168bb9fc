"Makes README.md from nbs/index.ipynb: `python tests/readme.py`"

import json, re
from pathlib import Path
from nbdev.frontmatter import _nbpath2html

ROOT = Path(__file__).resolve().parents[1]
SITE = 'https://mmneurons.github.io/mmneurons'


def readme():
    "The index as Markdown, with links that work from the root of the repository"
    parts = []
    for cell in json.loads((ROOT / 'nbs' / 'index.ipynb').read_text('utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            if '#| hide' in text:
                continue
            text = '```python\n' + re.sub(r'(?m)^#\|.*\n', '', text) + '\n```'
        parts.append(text)
    text = '\n\n'.join(parts).replace('](images/', '](nbs/images/')
    return (
        re.sub(r'\]\((\w+\.ipynb)\)', lambda link: f']({SITE}/{_nbpath2html(Path(link[1]))})', text)
        + '\n'
    )


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme(), 'utf-8')
