"""A command tells its outcome: lines for a person, one JSON object for a script, an object for a caller in Python."""
import json, os, subprocess, sys
from pathlib import Path

import pytest

QUICK = ('--device', 'cpu', '--json', '--quiet')


def said(done, code=0):
    "The JSON object on standard output, which holds nothing else."
    assert done.returncode == code, done.stderr
    found, = done.stdout.splitlines()
    found = json.loads(found)
    assert found['exit_code'] == code and ('reason' in found) == bool(code)
    return found


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    "What each command says about itself on the way from a phantom to an evaluation."
    from conftest import Workplace
    place = Workplace(tmp_path_factory.mktemp('outcomes').resolve())
    found = dict(phantom=said(place.run('cmr_phantom', 'phantom', '--patients', 4, '--json')))
    found['check'] = said(place.here('cmr_check', 'phantom', '--json'))
    grid = ('--size', 32, '--spacing', '3-4', '--workers', 0)
    found['prepare'] = said(place.here('cmr_prepare', 'phantom', 'cache', *grid, '--json'))
    steps = ('--preset', 'tiny', '--steps', 2, '--checks', 1, '--batch-size', 4, '--run-name', 'short')
    quiet = place.run('cmr_train', 'cache', *steps, *QUICK)
    assert 'look at it' not in quiet.stderr and '\r' not in quiet.stderr, quiet.stderr
    found['train'] = said(quiet)
    found['sample'] = said(place.here('cmr_sample', 'short', '--masks', 'cache', 'synthetic', '--steps', 1, *QUICK))
    strict = ('--quick', '--steps', 2, '--max-copies', 0, '--max-auc', .5)
    found['evaluate'] = said(place.here('cmr_evaluate', 'cache', 'synthetic', *strict, *QUICK), 1)
    found['sync'] = said(place.here('cmr_sync', '--json'))
    found['place'] = place
    return found


def test_paths_counts_and_figures(outcomes):
    at = outcomes['place'].folder
    assert outcomes['phantom'] == dict(command='cmr_phantom', exit_code=0, folder='phantom', patients=4, seed=0)
    check, prepare, train = outcomes['check'], outcomes['prepare'], outcomes['train']
    assert (check['slices'], check['patients'], check['errors_left']) == (24, 4, 0)
    assert (at/check['page']).is_file() and (at/check['table']).is_file()
    assert sum(split['slices'] for split in prepare['splits'].values()) == 24 and prepare['left_out'] == {}
    assert train['run_name'] == 'short' and len(train['run_id']) == 32 and (at/train['checkpoint']).is_dir()
    assert outcomes['sample']['run_id'] == train['run_id'] == outcomes['evaluate']['run_id']
    assert outcomes['sample']['images'] == 24 and (at/outcomes['sample']['folder']).is_dir()
    evaluate = outcomes['evaluate']
    assert (at/evaluate['report']).is_file() and evaluate['verdicts'][0]['part'] == 'privacy'
    assert all(isinstance(value, float) for value in evaluate['metrics'].values()) and evaluate['metrics']
    assert '--max-' in evaluate['reason'] and outcomes['sync']['waits'] is False


def test_an_error_is_told_to_a_script_and_to_a_person(outcomes):
    place = outcomes['place']
    for command, words, about in (
            ('cmr_train', ['no_such_cache', '--json'], 'no_such_cache'),
            ('cmr_train', ['cache', '--json', '--steps', '0'], '--steps 0'),
            ('cmr_train', ['cache', '--json', '--no-such-option'], '--no-such-option'),
            ('cmr_sample', ['--json'], 'required'), ('cmr_phantom', ['new', '--json', '--patients='], '--patients')):
        done = place.here(command, *words)
        found = said(done, 2)
        assert about in found['reason'] and done.stderr == f'{command}: {found["reason"]}\n'


def test_an_error_that_is_left_is_exit_code_1_with_strict(outcomes):
    place = outcomes['place']
    first = next((place.folder/'phantom').rglob('*Mapping_/Mid.dcm'))
    kept = first.read_bytes()
    first.write_bytes(b'damaged')
    try:
        assert said(place.here('cmr_check', 'phantom', '--out', 'found', '--json'))['errors_left'] == 1
        found = said(place.here('cmr_check', 'phantom', '--out', 'found', '--json', '--strict'), 1)
        assert found['reason'] == '1 error left that nothing has repaired (--strict)'
        person = place.here('cmr_check', 'phantom', '--out', 'found', '--strict')
        assert (person.returncode, person.stderr) == (1, f'cmr_check: {found["reason"]}\n')
        assert f'{found["page"]} shows each' in person.stdout
    finally: first.write_bytes(kept)


CHATTY = """
import os, subprocess, sys, time
from cmr_diffusion.command_line import command
from cmr_diffusion.core import logger
from cmr_diffusion.outcome import Outcome
from cmr_diffusion.output import progress
@command
def cmr_work(
    fault: bool = False,  # of the package
):
    "Work."
    print('printed by a library')
    os.write(1, b'written by a library that is not Python\\n')
    subprocess.run(['echo', 'printed by another program'])
    logger.info('a line of the log')
    logger.warning('a warning')
    for _ in progress(range(3), description='working', delay=0): time.sleep(.01)
    if fault: raise ZeroDivisionError('by zero')
    return Outcome(('done',), dict(share=float('nan')))
if __name__ == '__main__': sys.exit(cmr_work())
"""


def chat(folder, *words):
    (folder/'cmr_work.py').write_text(CHATTY)
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'TQDM_DISABLE')}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run([sys.executable, 'cmr_work.py', *words], cwd=folder, env=env, capture_output=True, text=True)


def test_standard_output_holds_nothing_but_the_object(tmp_path):
    done = chat(tmp_path, '--json')
    assert said(done) == dict(command='cmr_work', exit_code=0, share=None)
    for line in ('printed by a library', 'that is not Python', 'printed by another program', 'a line of the log',
                 'a warning', 'working: 3 of 3'): assert line in done.stderr, done.stderr


def test_quiet_leaves_warnings_and_the_outcome(tmp_path):
    done = chat(tmp_path, '--quiet')
    assert done.stderr == 'a warning\n' and done.stdout.endswith('done\n')
    assert 'a line of the log' in chat(tmp_path).stderr


def test_a_fault_of_the_package_keeps_its_traceback(tmp_path):
    done = chat(tmp_path, '--json', '--fault')
    assert said(done, 1)['reason'] == 'ZeroDivisionError: by zero'
    assert 'Traceback' in done.stderr and done.stderr.endswith('ZeroDivisionError: by zero\n')


def test_a_caller_in_python_gets_the_outcome(tmp_path, capsys):
    from cmr_diffusion.cli import cmr_phantom
    done = cmr_phantom(tmp_path/'p', patients=1)
    assert done.facts['patients'] == 1 and str(done) == f'{tmp_path/"p"}: 1 patient' and not capsys.readouterr().out


def test_what_shows_patients_stays_out_of_git(outcomes):
    "A cohort is checked, prepared and evaluated within somebody's own repository."
    at = outcomes['place'].folder
    def git(*words): return subprocess.run(['git', *words], cwd=at, capture_output=True, text=True, check=True).stdout
    git('init', '-q')
    new = {line.split(maxsplit=1)[1].strip('"') for line in git('status', '--porcelain', '-uall').splitlines()}
    assert any(name.startswith('phantom/') for name in new)  # git sees what is no secret
    secret = ('findings/', 'cache/', 'synthetic/evaluation/')
    assert all((at/folder).is_dir() for folder in secret)
    assert not [name for name in new if name.startswith(secret)]
    assert '*' in (at/'cache'/'.gitignore').read_text().splitlines()


def test_a_folder_with_other_files_is_not_left_out_of_git(outcomes):
    place, at = outcomes['place'], outcomes['place'].folder/'other'
    at.mkdir()
    (at/'thesis.txt').write_text('years of work')
    assert said(place.here('cmr_check', 'phantom', '--out', 'other', '--json'))
    assert 'findings.html' in (at/'.gitignore').read_text() and '*' not in (at/'.gitignore').read_text()
    (at/'.gitignore').write_text('*.log\n')
    done = place.here('cmr_check', 'phantom', '--out', 'other')
    assert done.returncode == 0 and (at/'.gitignore').read_text() == '*.log\n'


def test_a_reader_that_goes_away_is_no_fault(place, phantom):
    "As `head -1` does; a full disk is one."
    script = Path(sys.executable).with_name('cmr_check')
    for target, code, said in (('| true', 0, ''), ('> /dev/full', 2, 'cannot be written to standard output')):
        line = f'set -o pipefail; {script} {phantom} --out {place.folder}/piped {target}'
        done = subprocess.run(['bash', '-c', line], env=place.env, capture_output=True, text=True)
        assert done.returncode == code and 'Traceback' not in done.stderr and said in done.stderr, done.stderr
