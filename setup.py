"""Name, requirements and commands from settings.ini; the version from cmr_diffusion/__init__.py."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], inline_comment_prefixes=['#'], interpolation=None)
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
name = cfg['lib_name']
init, readme = ((here/f).read_text(encoding='utf-8') for f in (f'{name}/__init__.py', 'README.md'))
suffix = '_requirements'  # evaluate_requirements is what pip installs for cmr_diffusion[evaluate]

setup(
    name=name, version=re.search(r'__version__ = "([^"]+)"', init).group(1), description=cfg['description'],
    keywords=cfg['keywords'], author=cfg['author'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=readme, long_description_content_type='text/markdown',
    packages=find_packages(include=[name, f'{name}.*']),
    package_data={name: [f'{place}*.{kind}' for kind in ('json', 'csv', 'safetensors', 'md') for place in ('', '**/')]},
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={option.removesuffix(suffix): cfg[option].split() for option in cfg if option.endswith(suffix)},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
)
