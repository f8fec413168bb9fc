"Everything comes from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
pocket, train, scores = (cfg[f'{extra}_requirements'].split() for extra in ('pocket', 'train', 'scores'))

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    long_description=Path('README.md').read_text('utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', license_files=['LICENSE'],
    classifiers=['Development Status :: 3 - Alpha', f'Intended Audience :: {cfg["audience"]}',
                 f'Programming Language :: Python :: {cfg["min_python"]}',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(),
    extras_require=dict(pocket=pocket, train=train, scores=scores, dev=pocket + train + scores + cfg['dev_requirements'].split()),
    packages=find_packages(include=['mmneurons', 'mmneurons.*']), package_data={'mmneurons': ['assets/**']},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['mmneurons=mmneurons._modidx:d']},
    zip_safe=False)
