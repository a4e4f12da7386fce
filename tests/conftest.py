"""A tiny pipeline, run once by the installed commands as a user would type them, that the tests then look at."""
import contextlib, io, os, runpy, signal, subprocess, sys
from pathlib import Path

import pydicom
import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ['MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING'] = 'false'  # what a machine was busy with is no property of a run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it


class Workplace:
    "A folder to work in, with a store of runs of its own."
    def __init__(self, folder):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
        self.env['MLFLOW_TRACKING_URI'] = f'sqlite:///{folder}/mlruns/mlflow.db'

    def run(self, name, *words):
        "A console script of this repository: exit code, standard output, standard error."
        command = [Path(sys.executable).with_name(name), *map(str, words)]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=600)

    def here(self, name, *words):
        "The same in this process, which has imported PyTorch already: for the many calls that fail."
        script, out, err = str(Path(sys.executable).with_name(name)), io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(self.folder)
            patch.setattr(sys, 'argv', [script, *map(str, words)])
            patch.setenv('MLFLOW_TRACKING_URI', self.env['MLFLOW_TRACKING_URI'])
            patch.delenv('IN_TEST', raising=False)
            try: code = runpy.run_path(script, run_name='__main__') and 0
            except SystemExit as e: code = e.code or 0
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def must(self, name, *words):
        "The same; it has to succeed."
        done = self.run(name, *words)
        assert done.returncode == 0, f'{name} {" ".join(map(str, words))}\n{done.stdout}\n{done.stderr}'
        return done.stdout


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp('work').resolve())


@pytest.fixture(scope='session')
def store(place):
    "The same store of runs for this process."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MLFLOW_TRACKING_URI', place.env['MLFLOW_TRACKING_URI'])
        patch.delenv('IN_TEST', raising=False)
        yield


SECRETS = dict(PatientName='Doe^Secretive', PatientID='SECRET-4711', PatientBirthDate='19500203',
               AccessionNumber='SECRET-0815', InstitutionName='Secret Hospital')

@pytest.fixture(scope='session')
def phantom(place):
    "A cohort whose headers name patients, as those of a hospital do."
    place.must('cmr_phantom', 'phantom', '--patients', 5)
    for f in (place.folder/'phantom').rglob('*.dcm'):
        d = pydicom.dcmread(f)
        for tag, value in SECRETS.items(): setattr(d, tag, value)
        d.save_as(f)
    return place.folder/'phantom'


@pytest.fixture(scope='session')
def cache(place, phantom):
    place.must('cmr_prepare', phantom, 'cache', '--size', 32, '--spacing', '3-4', '--workers', 1)
    return place.folder/'cache'


@pytest.fixture(scope='session')
def trained(place, cache):
    "The name of a run that trained for a few steps."
    options = ('--preset', 'tiny', '--steps', 8, '--checks', 1, '--batch_size', 4, '--device', 'cpu')
    place.must('cmr_train', cache, *options, '--run_name', 'few_steps')
    return 'few_steps'


@pytest.fixture(scope='session')
def synthetic(place, cache, trained):
    place.must('cmr_sample', trained, '--masks', cache, 'synthetic', '--steps', 3, '--per_mask', 1, '--device', 'cpu')
    return place.folder/'synthetic'


@pytest.fixture(scope='session')
def template(tmp_path_factory):
    "A store as the first training makes it."
    from cmr_diffusion.tracking import check_store
    folder = tmp_path_factory.mktemp('template')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{folder}/mlflow.db')
        patch.delenv('IN_TEST', raising=False)
        check_store(write=True)
    return folder/'mlflow.db'
