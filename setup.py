"Everything comes from settings.ini, which nbdev reads too."

import json
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
EXTRA = '_requirements'
extras = {
    name.removesuffix(EXTRA): value.split() for name, value in cfg.items() if name.endswith(EXTRA)
}
extras['notebooks'] = sorted({one for name in extras if name != 'dev' for one in extras[name]})
extras['dev'] += extras['notebooks']


class BuildWithChapters(build_py):
    "A built package holds the chapters, without their outputs, and what they read; an editable one finds them in nbs/"

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for pattern in ('[!_.]*.ipynb', 'data/**/[!_.]*', 'images/*.png'):
            for path in filter(Path.is_file, Path('nbs').glob(pattern)):
                out = Path(self.build_lib, 'mmneurons', 'notebooks', path.relative_to('nbs'))
                self.mkpath(str(out.parent))
                out.write_bytes(
                    without_outputs(path) if path.suffix == '.ipynb' else path.read_bytes()
                )


def without_outputs(path):
    nb = json.loads(path.read_text('utf-8'))
    for cell in nb['cells']:
        cell |= dict(outputs=[]) if cell['cell_type'] == 'code' else {}
    return json.dumps(nb, indent=1, ensure_ascii=False).encode()


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    long_description=Path('README.md').read_text('utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        f'Intended Audience :: {cfg["audience"]}',
        f'Programming Language :: Python :: {cfg["min_python"]}',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    packages=find_packages(include=['mmneurons', 'mmneurons.*']),
    package_data={'mmneurons': ['assets/**', 'py.typed', '__init__.pyi']},
    cmdclass=dict(build_py=BuildWithChapters),
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': ['mmneurons=mmneurons._modidx:d'],
    },
    zip_safe=False,
)
