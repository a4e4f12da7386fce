"""Wrong calls end in one line that names what is wrong and what to do, with exit code 2 and no traceback."""
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ('cmr_phantom', 'cmr_check', 'cmr_prepare', 'cmr_train', 'cmr_sync', 'cmr_sample', 'cmr_evaluate',
            'cmr_demo', 'cmr_ui', 'cmr_compare')


def one_line(done, *parts):
    lines = re.sub(r'[^\n]*\r', '', done.stderr).strip().splitlines()  # without the progress bars of a slow machine
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    for part in parts: assert part in lines[0], lines[0]


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_option_and_what_it_does(place, name):
    done = place.run(name, '--help')
    assert done.returncode == 0 and 'usage: ' + name in done.stdout
    options = re.split(r'^  (?=-)', done.stdout, flags=re.M)[1:]
    assert options and all(re.fullmatch(r'-\S[^\n]*?(?:  +|\n +)\S.*', o, re.S) for o in options), options  # with help
    for word in ('None', '(str', '(int', '(float', 'default: True', 'default: False'): assert word not in done.stdout


def test_a_switch_that_turns_off_has_no_default_of_its_own(place):
    said = ' '.join(place.here('cmr_train', '--help').stdout.split())
    assert 'a model that cannot be asked for tissue values --checks' in said


def test_options_with_underscores_are_options_with_hyphens(place):
    for option in ('--per_mask', '--per-mask'):
        done = place.run('cmr_sample', 'r', '--masks', 'm', 'o', option, 'many')
        assert done.returncode == 2 and "--per-mask 'many': give a whole number from 1 to" in done.stderr


def test_wrong_path(place, cache, trained):
    one_line(place.here('cmr_prepare', 'no/such/root', 'c'), 'no/such/root')
    one_line(place.here('cmr_train', 'no/such/cache', '--steps', 1), 'no/such/cache')
    one_line(place.here('cmr_sample', 'no_such_run', '--masks', cache, 'out'), 'no_such_run')
    one_line(place.here('cmr_sample', trained, '--masks', 'no/such/masks', 'out'), 'no/such/masks')
    one_line(place.here('cmr_evaluate', cache, 'no/such/synthetic'), 'no/such/synthetic')
    assert not (place.folder/'c').exists() and not (place.folder/'out').exists()


def test_empty_cohort(place):
    (place.folder/'empty').mkdir()
    one_line(place.run('cmr_prepare', 'empty', 'c'), 'empty')


def test_unknown_words(place, phantom, cache, trained):
    one_line(place.here('cmr_prepare', phantom, 'c', '--layout', 'nonsense'), 'nonsense', 'semmelweis')
    one_line(place.here('cmr_prepare', phantom, 'c', '--type', 'LGE'), 'LGE', 'T1, T2')
    one_line(place.here('cmr_prepare', phantom, 'c', '--spacing', 'fine'), 'fine')
    one_line(place.here('cmr_prepare', phantom, 'c', '--split', 'no.csv'), 'no.csv')
    one_line(place.here('cmr_train', cache, '--steps', 1, '--preset', 'huge'), 'huge', 'tiny')
    one_line(place.here('cmr_train', cache, '--steps', 1, '--recipe', 'cake'), 'cake', 'edm')
    one_line(place.here('cmr_sample', trained, '--masks', cache, 'out', '--type', 'LGE'), 'LGE')
    one_line(place.here('cmr_sample', trained, '--masks', cache, 'out', '--split', 'best'), 'best')


def test_a_slice_larger_than_the_grid_is_never_cut(place, phantom):
    whole = ('--size', 64, '--spacing', 'native', '--crop', 'none')
    one_line(place.here('cmr_prepare', phantom, 'c', *whole), '64 x 64', '--size', '--crop heart')


def test_a_checkpoint_of_another_shape(place, phantom, cache, trained):
    place.must('cmr_prepare', phantom, 'only_T1', '--size', 32, '--spacing', '3-4', '--type', 'T1', '--workers', 1)
    one_line(place.here('cmr_train', 'only_T1', '--init', trained, '--steps', 1), trained)


def test_nothing_of_the_user_is_overwritten(place, phantom, cache, trained):
    mine = place.folder/'mine'
    mine.mkdir()
    (mine/'thesis.txt').write_text('years of work')
    one_line(place.here('cmr_phantom', mine, '--patients', 1), 'mine')
    one_line(place.here('cmr_prepare', phantom, mine, '--size', 32, '--spacing', '3-4', '--workers', 1), 'mine')
    one_line(place.here('cmr_sample', trained, '--masks', cache, mine, '--steps', 1, '--split', 'test'), 'mine')
    assert [f.name for f in mine.iterdir()] == ['thesis.txt']


def test_a_device_that_is_not_there(place, cache):
    one_line(place.here('cmr_train', cache, '--steps', 1, '--device', 'abacus'), "--device 'abacus'", 'cpu')


def test_settings_of_a_run_that_is_resumed_are_those_that_were_typed(place, cache, trained):
    one_line(place.here('cmr_train', cache, '--resume', trained, '--run_name', 'other'), '--run-name', 'leave it out')
    one_line(place.here('cmr_train', cache, '--resume', trained, '--register', 'a/b'), "--register 'a/b'")
    done = place.here('cmr_train', cache, '--resume', trained, '--register', 'heart')
    assert done.returncode == 0 and 'registered as models:/heart/1\n' in done.stdout, done.stderr


def test_a_training_that_is_stopped_goes_on(place, cache):
    name, options = 'stopped', ('--preset', 'tiny', '--steps', 40, '--checks', 1, '--batch-size', 4, '--device', 'cpu')
    command = [Path(sys.executable).with_name('cmr_train'), cache, *options, '--run-name', name]
    training = subprocess.Popen(list(map(str, command)), cwd=place.folder, env=place.env, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for line in training.stderr:
        if line.startswith('look at it'): break
    training.send_signal(signal.SIGTERM)
    *_, told = training.stderr.read().splitlines()
    assert training.wait(60) == 143 and re.search('^cmr_train: stopped after step [0-9]+; go on with: ', told), told
    line = told.partition('go on with: ')[2]
    program, folder, *resume = line.split()
    assert (program, folder, resume[0]) == ('cmr_train', str(cache), '--resume')
    one_line(place.here('cmr_train', cache, *resume, '--steps', 50, '--device', 'cpu'), '--steps 50', 'has 40')
    for switch, own in (('--no-tissue-values', True), ('--balance', False)):
        refused = place.here('cmr_train', cache, *resume, switch, '--device', 'cpu')
        one_line(refused, f'{switch}: the training that is resumed has {own}; leave it out')
    done = place.run('cmr_train', cache, *resume, '--steps', 40, '--device', 'cpu')
    assert done.returncode == 0 and f'run {name} (' in done.stdout and 'goes on from step' in done.stderr, done.stderr
    assert 'training: step 40 (100 %)' in done.stderr and '\r' not in done.stderr


def test_tissue_values_new_hearts_and_volumes(place, cache, trained):
    from cmr_diffusion.cohort.table import read_cohort
    from cmr_diffusion.synthesis.records import with_sources
    from cmr_diffusion.grid.cache import CohortCache
    quick = ('--steps', 1, '--device', 'cpu', '--seed', 4)
    asked = ('--values', 'T1 left ventricle=1500-1600', '--deform', '--format', 'nifti', '--per-mask', 2)
    place.must('cmr_sample', trained, '--masks', cache, 'hearts', '--split', 'test', *asked, *quick)
    found = with_sources(place.folder/'hearts', CohortCache.load(cache))
    blood = found[found.type == 'T1'].groupby('patient').asked_left_ventricle.agg(['min', 'max'])
    assert len(blood) == 2 and found.source.notna().all()
    assert blood.stack().between(1499.9, 1600.1).all() and (blood['max'] - blood['min']).max() < .01
    assert not place.run('cmr_check', 'hearts', '--out', 'hearts_findings').stdout.count('nifti')
    both = [read_cohort(place.folder/'hearts'), read_cohort(place.folder/'hearts'/'nifti', 'csv')]
    for table in both: assert table.usable.all() and table.synthetic.all() and len(table) == len(found)
    said = place.must('cmr_sample', trained, '--masks', 'phantom:3', 'new_hearts', *quick)
    assert 'a synthetic cohort' in said and set(read_cohort(place.folder/'new_hearts').split) == {'train'}
    one_line(place.here('cmr_sample', trained, '--masks', 'phantom:3', 'x', '--values', 'own'), "--values 'own'")
    one_line(place.here('cmr_sample', trained, '--masks', 'phantom:3', 'x', '--split', 'test'), 'split test')


def test_a_training_without_tissue_values(place, cache):
    options = ('--preset', 'tiny', '--steps', 1, '--checks', 1, '--batch-size', 4, '--device', 'cpu')
    place.must('cmr_train', cache, *options, '--no-tissue-values', '--run-name', 'without')
    one_line(place.here('cmr_sample', 'without', '--masks', cache, 'x', '--values', 'own', '--device', 'cpu'),
             "--values 'own': the model takes no tissue values")
    options = ('--split', 'test', '--steps', 1, '--device', 'cpu')
    done = place.run('cmr_sample', 'without', '--masks', cache, 'plain', *options)
    assert done.returncode == 0 and 'takes no tissue values' in done.stderr, done.stderr
