"""Every wrong call of every command ends in one line that names the option or the file, with exit code 2, before any
long work begins. The calls run in this process; `test_in_a_process_of_its_own` runs some as a user would."""
import importlib, json, math, os, shutil, subprocess, sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import Workplace

HUGE = str(10**30)
LONG = (  # what nothing may reach after a wrong call: module and name
    ('cohort.phantom', 'fill_semmelweis'), ('cohort.quality', 'write_findings'), ('grid.cache', '_write'),
    ('training.learner', 'SDMLearner.fit'), ('synthesis.cohort', 'paint'),
    ('evaluation.segmentation', 'train_segmentation'), ('evaluation.report', 'evaluation_parts'))
WHOLE = dict(  # command: its options that take a whole number
    cmr_phantom='patients seed', cmr_check='observer seed', cmr_prepare='size jitter observer seed workers',
    cmr_train='steps batch-size checks seed', cmr_sample='steps per-mask seed batch-size',
    cmr_evaluate='steps generator-steps seed', cmr_demo='patients size steps seed')
FROM_ZERO = ('seed', 'jitter', 'workers')  # whose 0 is right
NUMBERS = dict(cmr_train='minutes learning-rate save-every', cmr_sample='guidance', cmr_demo='minutes guidance')
RIGHT = dict(  # the words of a right call
    cmr_phantom=['new'], cmr_check=['{cohort}', '--layout', 'csv', '--out', 'new'],
    cmr_prepare=['{cohort}', 'new', '--layout', 'csv', '--size', '32', '--spacing', '3-4'],
    cmr_train=['{cache}'], cmr_sample=['{model}', '--masks', '{cache}', 'new'],
    cmr_evaluate=['{cache}', '{synthetic}'], cmr_demo=['new'])
COHORT = ('cmr_check', 'cmr_prepare')  # the commands that read a cohort's folder
WORDS = [  # commands, option, values, what the line names besides the option
    (RIGHT, 'device', ('abacus', 'cuda:99', 'cpu:x', '-1', 'meta'), 'cpu'),
    (('cmr_check', 'cmr_prepare', 'cmr_evaluate'), 'layout', ('nonsense', 'CSV,acdc'), 'semmelweis'),
    (COHORT, 'split', ('no.csv', 'test,foo'), '--split'), (COHORT, 'split', ('{junk}', '{cohort}', '{image}'), ''),
    (COHORT, 'split', ('semmelweis',), "split 'semmelweis'"),
    (COHORT, 'scale', ('T2', 'T2=x', 'T2=0', 'T2=-1', 'T2=nan', 'T2=inf', 'T2=1,', '=1', 'T9=1'), '--scale'),
    (COHORT, 'pseudonymise', ('no.txt', '{cohort}', '{empty_file}', '{image}'), 'secret'),
    (COHORT, 'observer', ('2', '99'), 'semmelweis'),
    (('cmr_prepare',), 'type', ('LGE', 't1,T2', '../T1'), '--type'),
    (('cmr_prepare',), 'crop', ('hart', 'none,heart'), 'none'),
    (('cmr_prepare', 'cmr_sample', 'cmr_demo'), 'spacing',
     ('0', '-2', 'nan', 'inf', '2.5-1.5', '1-2-3', 'fine', '2mm', '1e9', '1e-9', '-', '1-', 'nan-nan'), 'native'),
    (('cmr_prepare',), 'size', ('7', '33', '4098', '100000'), 'from 8 to 4096'),
    (('cmr_prepare',), 'jitter', ('-5', '32', '1000'), '31'),
    (('cmr_train',), 'preset', ('huge', 'TINY'), 'tiny'), (('cmr_train',), 'recipe', ('cake', 'EDM'), 'edm'),
    (('cmr_train', 'cmr_sample'), 'precision', ('float16', '32'), 'bfloat16'),
    (('cmr_train',), 'init', ('no/such', '{cache}', '{empty}'), ''),
    (('cmr_train',), 'resume', ('no/such', '{cache}', '{empty}', '{model}'), ''),
    (('cmr_train',), 'register', ('a/b', 'a:b', 'x@y', ' ', '"'), '--register'),
    (('cmr_train',), 'batch-size', ('Auto', 'auto,16', '16.0'), "a whole number from 1 to 4096, or 'auto'"),
    (('cmr_sample',), 'sampler', ('euler', 'DDIM'), 'dpmpp_2m'), (('cmr_sample',), 'type', ('LGE', 'T1,T2'), ''),
    (('cmr_sample',), 'split', ('foo', 'test,foo', ',', 'test,', 'Test'), 'train, val, test'),
    (('cmr_sample',), 'masks', ('no/such', '{junk}', '{empty}', '{model}'), ''),
    (('cmr_sample',), 'masks', ('phantom:', 'phantom:0', 'phantom:-1', 'phantom:many', 'phantom:100001', 'phantom:1.5',
                                f'phantom:{HUGE}'), 'phantom:200'),
    (('cmr_sample',), 'values', ('Draw', 'T1', 'T1 myocardium', 'T1 myocardium=', 'T1 myocardium=nan', 'T1 spleen=9',
                                 'T1 myocardium=-5', 'T1 myocardium=1e9', 'T1 myocardium=1200-1100', 'myocardium=50',
                                 'T1 myocardium=1100, T1 myocardium=1200', 'LGE myocardium=1'), '--values'),
    (('cmr_sample',), 'format', ('NIfTI', 'dcm'), 'one of dicom, nifti'),
    (('cmr_evaluate',), 'judge', ('nnU-Net', 'Unet'), 'nnunet'),
    (('cmr_evaluate',), 'max-copies', ('-1', 'nan', 'few'), '--max-copies'),
    (('cmr_evaluate',), 'max-auc', ('0.4', '1.1', 'nan', 'low'), '--max-auc'),
    (('cmr_evaluate',), 'fractions', ('0', '10,0', '-1', '10,,100', 'all', 'nan', '101'), 'fractions'),
    (('cmr_evaluate',), 'spacings', ('0', '-1', '1.5,', 'fine', 'inf', '1000'), 'spacings'),
    (('cmr_evaluate',), 'model', ('no/such', '{cache}', '{empty}'), ''),
    (('cmr_evaluate',), 'encoders', ('no/such', '{junk}'), '')]
EMPTY = {name: options for name, options in dict(
    cmr_check='layout out split scale pseudonymise',
    cmr_prepare='layout split type spacing crop scale pseudonymise',
    cmr_train='preset recipe init precision device experiment run-name resume batch-size register',
    cmr_sample='masks layout split type spacing sampler precision device values format',
    cmr_evaluate='layout out device model fractions spacings judge encoders',
    cmr_demo='out spacing device').items()}


def typed_values():
    "Every numeric option of every command with numbers out of range, and with what is no number."
    for command, options in WHOLE.items():
        for option in options.split():
            for value in ('-1', 'nan', 'inf', HUGE, 'many', '1.5', '') + (() if option in FROM_ZERO else ('0',)):
                yield command, [f'--{option}={value}'], f'--{option}'
    for command, options in NUMBERS.items():
        for option in options.split():
            for value in ('-1', 'nan', 'inf', '-inf', '1e9', 'much', '') + (() if option == 'guidance' else ('0',)):
                yield command, [f'--{option}={value}'], f'--{option}'


def typed_words():
    "Every option that takes a word, with unknown and with empty ones."
    for commands, option, values, named in WORDS:
        for command in commands:
            if option == 'device' and command in ('cmr_phantom', *COHORT): continue
            for value in values: yield command, [f'--{option}={value}'], named
    for command, options in EMPTY.items():
        for option in options.split():
            yield command, [f'--{option}='], f'--{option}'


def places():
    "Paths that are not there, are something else, cannot be written, or are of no file system."
    for command in RIGHT:
        yield command, ['--no-such-option'], 'no-such-option'
        yield command, 'no words', ('new' if command == 'cmr_demo' else 'required')
        yield command, 'zero byte', 'zero byte'
    yield 'cmr_sync', ['--no-such-option'], 'no-such-option'
    yield 'cmr_sync', ['now'], 'now'
    yield 'cmr_ui', ['--no-such-option'], 'no-such-option'
    yield 'cmr_ui', ['--experiment', 'no such'], "--experiment 'no such'"
    for port in ('0', '65536', 'x'): yield 'cmr_ui', ['--port', port], '--port'
    for name in ('run-name', 'experiment'):
        yield 'cmr_train', ['{cache}', '--resume', 'some_run', f'--{name}', 'other'], f'--{name}'
    for path in ('no/such', '{junk}', '{empty}', '{image}', '{model}/config.json'):
        yield 'cmr_train', [path], path
        yield 'cmr_evaluate', [path, '{synthetic}'], path
        yield 'cmr_evaluate', ['{cache}', path], path
        yield 'cmr_sample', [path, '--masks', '{cache}', 'new'], path
        yield 'cmr_check', [path, '--out', 'new'], ('is a file' if path in ('{junk}', '{image}') else path)
        yield 'cmr_prepare', [path, 'new'], path
        yield 'cmr_prepare', [path, 'new', '--layout', 'csv'], path
    for command, before in dict(cmr_phantom=[], cmr_prepare=['{cohort}', '--layout=csv'], cmr_demo=[],
                                cmr_sample=['{model}', '--masks', '{cache}']).items():
        for out in ('{mine}', '{junk}', '{junk}/in_a_file', '/proc/new', 'x' * 300):
            if command == 'cmr_demo': out = f'--out={out}'
            if out != '--out={mine}': yield command, [*before, out], out[:40].removeprefix('--out=')
    for out in ('{cohort}', '{cohort}/images', '{cohort}/new'):
        yield 'cmr_prepare', ['{cohort}', out, '--layout=csv'], out
    for out in ('{cache}', '{cache}/new', '{model}', '{model}/new'):
        yield 'cmr_sample', ['{model}', '--masks', '{cache}', out], out
    for out in ('{mine}', '{cache}', '{cache}/new', '{synthetic}', '{junk}'):
        yield 'cmr_evaluate', ['{cache}', '{synthetic}', '--out', out], out
    for out in ('{junk}', '{junk}/new'):
        yield 'cmr_check', ['{cohort}', '--layout=csv', '--out', out], out


def of(field, value):
    "Change one field of JSON; a field within another is written with a point."
    def change(path):
        read = json.loads(path.read_text())
        inside, *last = field.rpartition('.')[::2]
        target = read
        for step in filter(None, inside.split('.')): target = target[int(step) if step.isdigit() else step]
        name = last[0] if isinstance(target, dict) else int(last[0])
        if value is ...: del target[name]
        else: target[name] = value
        path.write_text(json.dumps(read))
    return change


def text(content): return lambda path: path.write_text(content)
def cut(path): path.write_bytes(path.read_bytes()[:-7])
def half(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
def longer(path): path.write_bytes(path.read_bytes() + b'more')
def gone(path): path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def no_columns(path): pd.DataFrame(dict(a=[1])).to_parquet(path)
def other_array(path): np.save(path, np.zeros(3))
def pickled(path): np.save(path, np.array([{}], object), allow_pickle=True)


JUNK = {'nothing': text(''), 'a_word': text('hello'), 'a_list': text('[1, 2]'), 'null': text('null'), 'half': half,
        'a_folder': folder, 'deep': text('[' * 100_000), 'bytes': lambda path: path.write_bytes(bytes(range(256))),
        'digits': text('1' * 5000)}
FILES = {  # file of the folder: damages
    'cache/cache.json': JUNK | {f'{field}={str(value)[:9]}': of(field, value) for field, value in (
        ('version', 1), ('version', 'two'), ('version', 10**30), ('version', ...), ('fingerprint', 3), ('geometry', []),
        ('geometry.size', 0), ('geometry.size', '32'), ('geometry.size', 10**9), ('geometry.size', True),
        ('geometry.jitter', -5), ('geometry.jitter', 10**30), ('geometry.spacing', -1), ('geometry.spacing', math.nan),
        ('geometry.spacing', [3, 2]), ('geometry.crop', 'hart'), ('geometry.crop', ...), ('geometry.more', 1),
        ('values', {}), ('values', []), ('values.0.type', 'T9'),
        ('values.0.knee', math.nan), ('values.0.knee', 0), ('values.0.knee', 'x'),
        ('values.0.maximum', -1), ('values.1.shoulder', 2), ('values.0.unit', 'km'),
        ('spec', 7), ('spec.0', []), ('spec.0.1', ['spleen']),
        ('bytes', [1]), ('bytes', ['a', 'b']), ('bytes', [-1, -1]), ('bytes', [10**30, 1]))},
    'cache/table.parquet': dict(nothing=text(''), a_word=text('x'), half=half, gone=gone, folder=folder,
                                no_columns=no_columns),
    'cache/index.npy': dict(nothing=text(''), a_word=text('x'), half=half, gone=gone, folder=folder, other=other_array,
                            pickled=pickled),
    'cache/pixels.bin': dict(cut=cut, longer=longer, gone=gone, nothing=text('')),
    'cache/labels.bin': dict(cut=cut, longer=longer, gone=gone, nothing=text('')),
    'model/config.json': JUNK | {f'{field}={str(value)[:9]}': of(field, value) for field, value in (
        ('format', 99), ('format', 'x'), ('format', ...), ('model', []), ('model.width', 0), ('model.width', 10**12),
        ('model.width', '32'), ('model.multipliers', []), ('model.more', 1), ('model.blocks', -1), ('recipe', {}),
        ('recipe.name', 'cake'), ('recipe.sigma_data', 0), ('recipe.sigma_data', math.nan), ('geometry.size', 0),
        ('geometry.spacing', 'fine'), ('values', []), ('values.T1.knee', math.nan),
        ('values.T1.knee', 0), ('values.T2.maximum', -1), ('spec', {}), ('spec', []), ('info', 3), ('weights', 'abc'),
        ('model.values', False), ('model.values', 'yes'), ('tissue', None), ('tissue', 3), ('tissue', ...),
        ('tissue.names', ['T1']), ('tissue.names.1', 'T1 spleen'), ('tissue.mean', []), ('tissue.mean.1', math.nan),
        ('tissue.low.2', 'x'), ('tissue.between.1.1', -1), ('tissue.within.0', 7), ('tissue.more', 1),
        ('recipe.centres', 3), ('recipe.centres', ...), ('recipe.centres.T1', math.nan), ('recipe.centres.T9', 0.))},
    'model/model.safetensors': dict(nothing=text(''), a_word=text('x'), half=half, cut=cut, gone=gone, folder=folder),
    'synthetic/splits.csv': dict(nothing=text(''), a_word=text('x'), gone=gone, folder=folder,
                                 unknown=text('patient,split\nPatient (1),best\n'), zeros=text('\0\0\0')),
    'synthetic/synthesis.json': {name: JUNK[name] for name in ('nothing', 'a_word', 'a_list', 'a_folder', 'deep')} | {
        f'{field}={value}': of(field, value) for field, value in (
            ('format', 99), ('format', 1), ('format', 2), ('values', 3), ('deform', 'yes'), ('guidance', -1))},
    'cohort/cohort.csv': dict(nothing=text(''), a_word=text('x'), zeros=text('\0\0\0'), folder=folder,
                              unknown=text('image,label\na.npy,b.npy\n'), bytes=JUNK['bytes'])}
READS = dict(cache=('cmr_train', 'cmr_sample', 'cmr_evaluate'), model=('cmr_sample', 'cmr_train'),
             synthetic=('cmr_evaluate',), cohort=COHORT)


def damages():
    "Every damage to every file, for every command that reads it; one of the commands after the first few."
    for n, (file, ways) in enumerate(FILES.items()):
        for k, (name, change) in enumerate(ways.items()):
            commands = READS[Path(file).parts[0]]
            for command in commands if k < 6 else commands[k % len(commands):][:1]:
                yield command, file, change, name


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder with a cohort, its cache, a checkpoint that was never trained, and a synthetic cohort."
    from cmr_diffusion import Geometry, prepare, read_cohort
    from cmr_diffusion.cohort.semmelweis_writing import fill_semmelweis
    from cmr_diffusion.grid.loaders import make_dataloaders
    from cmr_diffusion.model.checkpoint import save_checkpoint
    from cmr_diffusion.toy import toy_cohort, toy_slices
    from cmr_diffusion.training.learner import sdm_learner
    place = Workplace(tmp_path_factory.mktemp('wrong').resolve())
    at = place.folder
    toy_cohort(at/'cohort')
    cache = prepare(read_cohort(at/'cohort', 'csv'), at/'cache', Geometry(32, (3., 4.), 'heart'), workers=0)
    learn = sdm_learner(make_dataloaders(cache, 4, 0, device='cpu'), 'tiny')
    save_checkpoint(at/'model', learn.checkpoint)
    (at/'synthetic').mkdir()
    fill_semmelweis(at/'synthetic', toy_slices(3), synthetic=True, splits={f'toy{p:03d}': 'train' for p in range(3)})
    (at/'synthetic'/'synthesis.json').write_text('{"run_id": null}')
    for name in ('empty', 'mine'): (at/name).mkdir()
    (at/'mine'/'thesis.txt').write_text('years of work')
    (at/'junk.bin').write_bytes(bytes(range(256)) * 9)
    (at/'nothing.txt').write_text('')
    place.words = {name: name for name in ('cohort', 'cache', 'model', 'synthetic', 'empty', 'mine')}
    image = str(next((at/'cohort'/'images').glob('*.npy')))
    place.words |= dict(junk='junk.bin', empty_file='nothing.txt', image=image)
    return place


@pytest.fixture(scope='module', autouse=True)
def nothing_long(world):
    "Long work fails a test that reaches it."
    def began(*args, **options): raise AssertionError('long work began')
    with pytest.MonkeyPatch.context() as patch:
        for module, name in LONG:
            owner = importlib.import_module(f'cmr_diffusion.{module}')
            *inside, name = name.split('.')
            for step in inside: owner = getattr(owner, step)
            patch.setattr(owner, name, began)
        yield


COUNTS = Counter()


def wrong(place, command, words, named):
    "Run a wrong call; what is wrong with how it ended, or ''."
    COUNTS['calls'] += 1
    before = {f for f in place.folder.iterdir()}
    try: done = place.here(command, *words)
    except BaseException as e: return f'{type(e).__name__}: {str(e)[:150]}'
    for new in set(place.folder.iterdir()) - before:
        if new.name not in ('mlruns', 'new'): return f'made {new.name}'
    left = (place.folder/'new').exists()
    shutil.rmtree(place.folder/'new', ignore_errors=True)
    lines = done.stderr.strip().splitlines()
    if done.returncode != 2: return f'exit code {done.returncode}, {lines[-1:]}'
    if len(lines) != 1: return f'{len(lines)} lines: {lines}'
    if not lines[0].startswith(f'{command}: ') or len(lines[0]) > 600: return f'odd line: {lines[0][:700]}'
    if named not in lines[0]: return f'{named!r} is not in: {lines[0]}'
    if left: return f'made new: {lines[0]}'
    COUNTS['one line'] += 1
    print(' '.join(map(str, words))[-60:], '->', lines[0])
    return ''


def filled(place, words): return [word.format(**place.words) if '{' in word else word for word in words]


def call_of(place, command, words):
    "The words of a call: a right call with a wrong option, or the words as they are."
    right = filled(place, RIGHT.get(command, []))
    if words == 'no words': return [] if command != 'cmr_demo' else ['new']
    if words == 'zero byte': return ['a\0b', *right[1:]] if command != 'cmr_demo' else ['--out=a\0b']
    if isinstance(words, list) and words[0].startswith('--') and '=' in words[0] or words == ['--no-such-option']:
        right = [] if command == 'cmr_demo' else right
        if words[0].startswith('--masks'): right = [right[0], right[-1]]
        return right + filled(place, words)
    return filled(place, words)


def report(faults, total):
    print(f'{total} wrong calls, {len(faults)} of them not told in one line')
    assert not faults, '\n' + '\n'.join(faults)


@pytest.mark.parametrize('kind', (typed_values, typed_words, places), ids=lambda kind: kind.__name__)
def test_options_and_paths(world, kind):
    calls = list(kind())
    faults = []
    for command, words, named in calls:
        words = call_of(world, command, words)
        fault = wrong(world, command, words, named.format(**world.words) if named.startswith('{') else named)
        if fault: faults.append(f'{command} {" ".join(map(str, words))}: {fault}'.replace(HUGE, 'HUGE'))
    report(faults, len(calls))


def test_damaged_files(world):
    calls, faults = list(damages()), []
    for command, file, change, name in calls:
        part = Path(file).parts[0]
        shutil.rmtree(world.folder/'damaged', ignore_errors=True)
        shutil.copytree(world.folder/part, world.folder/'damaged')
        change(world.folder/'damaged'/Path(file).name)
        kept, world.words[part] = world.words[part], 'damaged'
        words = filled(world, RIGHT[command])
        if (part, command) == ('model', 'cmr_train'): words = ['cache', '--init', 'damaged', '--device=cpu']
        world.words[part] = kept
        fault = wrong(world, command, words, 'damaged')
        if fault: faults.append(f'{command}, {file} {name}: {fault}')
    report(faults, len(calls))


def test_a_size_that_the_network_cannot_halve(world):
    shutil.copytree(world.folder/'cache', world.folder/'damaged', dirs_exist_ok=True)
    of('geometry.size', 34)(world.folder/'damaged'/'cache.json')
    assert not (fault := wrong(world, 'cmr_train', ['damaged', '--device=cpu'], '34')), fault


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read and write everything')
def test_without_permission(world):
    for part, command in (('cache', 'cmr_train'), ('model', 'cmr_sample'), ('cohort', 'cmr_prepare')):
        at = world.folder/part
        at.chmod(0)
        try: fault = wrong(world, command, filled(world, RIGHT[command]), part)
        finally: at.chmod(0o755)
        assert not fault, fault


def test_in_a_process_of_its_own(world):
    for command, words, named in (
            ('cmr_train', ['cache', '--batch-size', 0], '--batch-size 0: give a whole number from 1 to'),
            ('cmr_prepare', ['cohort', 'new', '--layout=csv', '--size', 100000], '--size 100000: give an even number'),
            ('cmr_phantom', ['new', '--patients', 'many'], "--patients 'many': give a whole number from 1 to")):
        done = world.run(command, *words)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and named in lines[0], (command, done.stderr)
    assert not (world.folder/'new').exists()


@pytest.mark.parametrize('command', (*RIGHT, 'cmr_sync', 'cmr_ui', 'cmr_compare'))
def test_version(world, command):
    from cmr_diffusion import __version__
    done = world.here(command, '--version')
    assert (done.returncode, done.stdout) == (0, f'{command} {__version__} (cmr_diffusion)\n')


def test_a_right_call_is_none_of_these(world):
    "The calls above are wrong in one thing only: without it, long work begins."
    more = dict(cmr_train=['--balance', '--batch_size', '4', '--no-tissue-values'],
                cmr_prepare=['--workers', '0', '--scale', 't2=1'],
                cmr_sample=['--split', 'train,test', '--guidance', '0', '--values', 'T1 left ventricle=1400-1500',
                            '--deform', '--no-stacks', '--format', 'nifti'])
    for command in RIGHT:
        words = filled(world, RIGHT[command]) + more.get(command, []) if command != 'cmr_demo' else []
        with pytest.raises(AssertionError, match='long work began'): world.here(command, *words)
        shutil.rmtree(world.folder/'new', ignore_errors=True)


def test_help_is_light():
    "Neither --help nor what checks values waits for PyTorch."
    script = ('import sys, cmr_diffusion.cli, cmr_diffusion.validation; '
              'print({"torch", "fastai", "pandas", "mlflow"} & set(sys.modules))')
    assert subprocess.run([sys.executable, '-c', script], capture_output=True, text=True).stdout == 'set()\n'


def test_count(world):
    print(f'{COUNTS["calls"]} wrong calls in all, {COUNTS["one line"]} told in one line')
    assert COUNTS['one line'] == COUNTS['calls'] >= 209
