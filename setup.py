"""Name, requirements and commands from settings.ini; the version from cmr_diffusion/__init__.py."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
version = re.search(r'__version__ = "([^"]+)"', (here/cfg['lib_name']/'__init__.py').read_text()).group(1)
extras = {name: cfg[f'{name}_requirements'].split() for name in ('dev', 'bench', 'notebooks')}

setup(
    name=cfg['lib_name'], version=version, description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    license='Apache-2.0', license_files=['LICENSE'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    package_data={cfg['lib_name']: ['*.json', '*.csv', '**/*.json', '**/*.csv']},
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
)
