"""What pip installs: the archives hold what they must, each works alone, and what is missing is said in one line.

No test here needs a network. Where a bare environment may see a package of this one, a link in it leads there."""
import ast, os, shutil, subprocess, sys, sysconfig, tarfile, venv, zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmr_diffusion import __version__, extras
from cmr_diffusion.grid.cache import CohortCache
from cmr_diffusion.training import learner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))
from constraints import settings  # noqa: E402

SITE = Path(sysconfig.get_path('purelib'))
FOLDERS = ('cmr_diffusion', 'nbs', 'tests', 'docs', 'benchmarks', 'docker')
NOT_COPIED = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '*.egg-info', 'build', 'dist', 'site')
FOR_COMMANDS = ('numpy', 'numpy.libs', 'fastcore', 'tqdm', 'annotated_types')  # what `cmr_train --version` imports
BUILD = """
import sys
from setuptools import build_meta
print('\\n' + getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2]))
"""


def run(*command, **options):
    "Run a command that must succeed, without this repository on its path: what it printed."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=env, **options)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return done.stdout


def built(kind, source, out):
    "An archive of what is in a folder, made by the setuptools of this environment."
    out.mkdir()
    return out/run(sys.executable, '-c', BUILD, kind, out, cwd=source).split()[-1]


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    "Source distribution, wheel of it, and wheel of the repository; all in copies, so that no build/ is left there."
    folder = tmp_path_factory.mktemp('dist')
    for name in FOLDERS:
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, folder/'source'/name, ignore=NOT_COPIED)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != '.git': shutil.copy(file, folder/'source')
    sdist = built('sdist', folder/'source', folder/'sdist')
    safely = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}  # Python 3.11.4 and newer
    with tarfile.open(sdist) as archive: archive.extractall(folder/'unpacked', **safely)
    again, = (folder/'unpacked').iterdir()
    return sdist, built('wheel', again, folder/'wheel'), built('wheel', folder/'source', folder/'direct')


def contents(wheel):
    "The files of a wheel: name -> bytes."
    with zipfile.ZipFile(wheel) as archive: return {n: archive.read(n) for n in archive.namelist()}


def test_the_source_distribution_has_what_work_on_the_package_takes(archives):
    with tarfile.open(archives[0]) as archive: names = {n.partition('/')[2] for n in archive.getnames()}
    needed = {'settings.ini', 'setup.py', 'pyproject.toml', 'constraints.txt', 'MANIFEST.in', 'Makefile', 'README.md',
              'LICENSE', 'tests/run.py', 'tests/conftest.py', 'docs/constraints.py', 'docs/demo.png'}
    needed |= {f'nbs/{n.name}' for n in (ROOT/'nbs').glob('*.ipynb')}
    assert not needed - names
    assert not [n for n in names if n.startswith(('mlruns', 'demo', '.venv', 'build')) or n.endswith('.pyc')]


def test_a_wheel_has_modules_data_and_licence_and_nothing_else(archives):
    files = contents(archives[1])
    place = ROOT/'cmr_diffusion'
    kinds = {'.py', '.json', '.csv', '.safetensors', '.md'}
    there = {f.relative_to(ROOT).as_posix() for f in place.rglob('*') if f.suffix in kinds and f.name != '_modidx.py'}
    assert 'cmr_diffusion/semmelweis.json' in there and not there - set(files)
    others = {n for n in files if n not in there and n != 'cmr_diffusion/_modidx.py'}
    assert all(n.startswith(f'cmr_diffusion-{__version__}.dist-info/') for n in others)
    assert any(n.endswith('/LICENSE') for n in others)


def test_the_source_distribution_makes_the_wheel_of_the_repository(archives):
    assert contents(archives[1]) == contents(archives[2])


@pytest.mark.parametrize('number', [0, 1], ids=['sdist', 'wheel'])
def test_each_archive_works_alone(archives, number, tmp_path):
    "It is installed without its requirements and imported; with the few packages that a command needs, one is called."
    venv.create(tmp_path/'venv', symlinks=os.name != 'nt')
    bin, = (f.parent for f in (tmp_path/'venv').glob('*/python*') if f.stem == 'python')
    python = bin/'python'
    site = Path(run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def link(*names):
        "Let the bare environment see a package of this one."
        links = [site/found.name for name in names for found in SITE.glob(name)]
        for place in links: place.symlink_to(SITE/place.name)
        return links
    builders = link('setuptools', '_distutils_hack', 'setuptools-*.dist-info')  # with a network, pip would fetch them
    install = ('install', '-q', '--no-deps', '--no-index', '--no-build-isolation')
    run(sys.executable, '-m', 'pip', '--python', python, *install, archives[number], cwd=tmp_path)
    for place in builders: place.unlink()
    script = ('import sys, cmr_diffusion; print(cmr_diffusion.__version__, cmr_diffusion.__file__); '
              'assert "train" in cmr_diffusion.__all__ and "numpy" not in sys.modules')
    found, file = run(python, '-c', script, cwd=tmp_path).split()
    assert found == __version__ and Path(file).is_relative_to(tmp_path)
    link(*FOR_COMMANDS)
    assert run(bin/'cmr_train', '--version', cwd=tmp_path).split()[:2] == ['cmr_train', __version__]


def test_ranges_have_reasons_and_hold_the_tried_versions():
    text = (ROOT/'settings.ini').read_text(encoding='utf-8')
    lines = text.partition('\nrequirements =\n')[2].partition('\n#')[0].splitlines()
    assert len(lines) > 15 and all(len(line.partition('  # ')[2]) > 5 for line in lines), 'each range has its reason'
    tried = [line for line in (ROOT/'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    assert all(line.count('==') == 1 for line in tried)
    tried = dict(line.split('==') for line in tried)
    assert list(tried) == sorted(tried)
    for extra, requirements in settings().items():
        for requirement in map(Requirement, requirements):
            if requirement.name == 'cmr_diffusion': continue
            name, operators = canonicalize_name(requirement.name), {s.operator for s in requirement.specifier}
            assert operators == {'>=', '<'}, f'{extra}: {requirement} is no range'
            assert name in tried, f'{extra}: {name} is not in constraints.txt: python docs/constraints.py'
            assert requirement.specifier.contains(tried[name]), f'{extra}: {requirement}, but {tried[name]} was tried'


def test_every_import_is_a_requirement():
    "What the modules import comes with the package or with one of the extras that users have."
    known = settings()
    names = [Requirement(line).name for extra in ('', 'evaluate', 'several', 'decode') for line in known[extra]]
    names = {canonicalize_name(n) for n in names} | {'annotated-types', 'sqlalchemy'}  # of pydantic and mlflow
    names |= {'torch-fidelity'}  # whose absence has a line of its own: only who has its weights needs it
    provided = packages_distributions() | {'torch_fidelity': ['torch-fidelity']}  # may be absent
    for module in (ROOT/'cmr_diffusion').rglob('*.py'):
        for node in ast.walk(ast.parse(module.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and not node.level: imported = [node.module]
            elif isinstance(node, ast.Import): imported = [alias.name for alias in node.names]
            else: continue
            for top in {name.partition('.')[0] for name in imported}:
                if top in sys.stdlib_module_names or top == 'cmr_diffusion': continue
                assert {canonicalize_name(n) for n in provided[top]} & names, f'{module.name} imports {top}'


def test_extras_are_those_of_the_settings():
    provided = packages_distributions()
    for name, (_, packages) in extras.EXTRAS.items():
        brought = {canonicalize_name(Requirement(line).name) for line in settings()[name]}
        assert {canonicalize_name(provided[package][0]) for package in packages} == brought
    all_of_them = Requirement(settings()['all'][0]).extras
    assert set(extras.EXTRAS) | {'decode', 'kernel'} == all_of_them


BLOCKED = """
import sys
names = sys.argv.pop(1).split(',')
sys.modules.update(dict.fromkeys(names))  # None there: the import fails, and nothing is found
"""
PAINT = """
from pathlib import Path
import numpy as np
from cmr_diffusion import load_checkpoint, paint_label_map, synthesize, toy_label_map
from cmr_diffusion.synthesis.phantom_masks import phantom_masks
checkpoint = load_checkpoint('example:phantom')
painted = paint_label_map(checkpoint, toy_label_map(64), 'T1', 2., steps=2)
assert np.isfinite(painted.pixels).all() and painted.pixels.std() > 50, 'milliseconds'
masks = phantom_masks(1, checkpoint.spec.types)
synthesize(sys.argv[1], masks, 'synthetic', steps=2, device='cpu')
assert not any(sys.modules[name] for name in names)
print(len(list(Path('synthetic').rglob('*_Mapping_/*.dcm'))), len(masks))
"""
ONLY_FOR_OTHERS = 'mlflow,timm,accelerate,nbdev,execnb,IPython,segmentation_models_pytorch,sklearn,fastai,torchvision'


def blocked(names, script, *words, **options):
    "A script in a process that has no such packages."
    path = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-W', 'ignore', '-c', BLOCKED + script, names, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=path, **options)


def test_painting_needs_no_package_of_other_tasks(tmp_path):
    "Neither tracking nor training nor evaluation nor notebooks: a model is read, one image painted, and a cohort."
    example = ROOT/'cmr_diffusion'/'example_models'/'phantom'
    done = blocked(ONLY_FOR_OTHERS, PAINT, example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    painted, masks = map(int, done.stdout.split()[-2:])
    assert painted == masks > 0


def test_the_blocking_blocks():
    for name in ONLY_FOR_OTHERS.split(','):
        if name in ('IPython', 'execnb'): continue
        assert name in packages_distributions(), f'{name} is not installed, so the test above proves nothing'
    assert "No module named 'fastai" in blocked('fastai', 'import cmr_diffusion.training.learner').stderr


COMMAND = """
sys.argv[0] = 'cmr_evaluate'
from cmr_diffusion.cli import cmr_evaluate
sys.exit(cmr_evaluate())
"""

def test_a_missing_extra_is_one_line(tmp_path):
    done = blocked('segmentation_models_pytorch', COMMAND, 'cache', 'synthetic', cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == ('cmr_evaluate: an evaluation needs segmentation_models_pytorch, which is not installed: '
                           "pip install 'cmr_diffusion[evaluate]'\n")


def test_a_training_in_several_processes_asks_for_its_extra_first(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    monkeypatch.setattr(learner, 'world_size', lambda: 2)
    with pytest.raises(extras.MissingExtra, match='cmr_diffusion.several'):
        learner.train(object.__new__(CohortCache), learner.TrainConfig(steps=1))
