"""Write constraints.txt: the versions that are installed here of all that the package and its extras need."""
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, PackageNotFoundError
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HEAD = '''\
# The versions that cmr_diffusion was made and tested with: make setup keeps to them, and so does
#     pip install -c constraints.txt cmr_diffusion
# What the package needs at least is in settings.ini. This file was written by python docs/constraints.py, in a virtual
# environment of Python {python} ({system}) with the extras {extras}.
'''

# newer ones refuse Python 3.11.0 to 3.11.4, and Debian 12 has 3.11.2
OLDER = {'pymdown-extensions': '12.3', 'soupsieve': '2.10'}


def settings():
    "The requirements of settings.ini: '' or the name of an extra -> list of requirements."
    config = ConfigParser(delimiters=['='], inline_comment_prefixes=['#'], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    options = {name: text.split() for name, text in config['DEFAULT'].items()}
    return {n.removesuffix('requirements').rstrip('_'): o for n, o in options.items() if n.endswith('requirements')}


def needed(lines):
    "Every package that some requirements lead to, as far as it is installed: name -> version."
    found, ahead = {}, [(Requirement(line), '') for line in lines]
    while ahead:
        requirement, extra = ahead.pop()
        name = canonicalize_name(requirement.name)
        if name == 'cmr-diffusion' or requirement.marker and not requirement.marker.evaluate({'extra': extra}): continue
        try: package = distribution(name)
        except PackageNotFoundError: continue
        for of in {'', *requirement.extras} - found.get(name, (None, set()))[1]:
            ahead += [(Requirement(line), of) for line in package.requires or ()]
        extras = {'', *requirement.extras} | found.get(name, (None, set()))[1]
        found[name] = package.version.partition('+')[0], extras
    return {name: version for name, (version, _) in sorted(found.items())}


def constraints():
    "The text of the file; where an extra is not installed, all lines stay that the file has for other packages."
    extras = settings()
    lines = [line for lines in extras.values() for line in lines]
    packages = needed(lines)
    missing = {canonicalize_name(Requirement(line).name) for line in lines} - {*packages, 'cmr-diffusion'}
    if missing:
        old = [line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if line[0] != '#']
        packages = dict(sorted((dict(old) | packages).items()))
        print(f'not installed here, so no line of the file is removed: {", ".join(sorted(missing))}', file=sys.stderr)
    python, system = '.'.join(map(str, sys.version_info[:3])), sys.platform
    head = HEAD.format(python=python, system=system, extras=', '.join(name for name in extras if name))
    return head + ''.join(f'{name}=={OLDER.get(name, version)}\n' for name, version in packages.items())


if __name__ == '__main__': (ROOT/'constraints.txt').write_text(constraints(), encoding='utf-8')
