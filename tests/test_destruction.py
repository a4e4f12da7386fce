"""No command deletes or replaces what is not its own, and none loses its own work: one test per fault that was seen."""
import contextlib, errno, json, os, shutil, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from cmr_diffusion import results
from cmr_diffusion.core import CMRError
from cmr_diffusion.marks import MARK, UNFINISHED
from cmr_diffusion.output import atomic_path
from test_output import clean, in_child, kill, mounted, without_exchange

COMMANDS = ('cmr_phantom', 'cmr_prepare', 'cmr_sample', 'cmr_evaluate', 'cmr_check')
KNOWN_BY = dict(cmr_phantom='cohort.json', cmr_prepare='cache.json', cmr_sample='synthesis.json',
                cmr_evaluate='report.json', cmr_check='findings.html')


@pytest.fixture(scope='module')
def words(phantom, cache, trained, synthetic):
    "The words of a command that writes to a folder; `other` makes another result."
    def words(name, out, other=False):
        small = ('--size', 32, '--spacing', '3-4', '--workers', 1)
        quick = ('--steps', 2, '--device', 'cpu', '--seed', int(other))
        return {
            'cmr_phantom': (out, '--patients', 1, '--seed', int(other)),
            'cmr_prepare': (phantom, out, *small, *(('--type', 'T1') if other else ())),
            'cmr_sample': (trained, '--masks', cache, out, '--split', 'val', *quick),
            'cmr_evaluate': (cache, synthetic, '--out', out, '--quick', *quick),
            'cmr_check': (phantom, '--out', out)}[name]
    return words


def refused(done, *parts):
    lines = [line for line in done.stderr.strip().splitlines() if '\r' not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    for part in parts: assert str(part) in lines[0], lines[0]


def snapshot(folder):
    "All files below a folder, with their bytes."
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


# ---- somebody else's files

@pytest.mark.parametrize('name', COMMANDS)
def test_a_folder_of_somebody_else_is_left_alone(place, words, tmp_path, name):
    "`cmr_evaluate --out DIR` deleted everything in DIR, whatever it was."
    mine = tmp_path/'mine'
    (mine/'photos').mkdir(parents=True)
    (mine/'thesis.txt').write_text('years of work')
    (mine/'photos'/'1.jpg').write_text('picture')
    before = snapshot(mine)
    done = place.here(name, *words(name, mine))
    if name == 'cmr_check': assert done.returncode == 0  # findings may lie beside other files
    else: refused(done, mine, 'not overwritten', 'choose another folder')
    assert {n: text for n, text in snapshot(mine).items() if n in before} == before
    clean(tmp_path)


@pytest.mark.parametrize('name', COMMANDS)
def test_home_and_root_are_never_a_result(place, words, tmp_path, monkeypatch, name):
    home = tmp_path/'users'/'me'
    home.mkdir(parents=True)
    monkeypatch.setenv('HOME', str(home))
    for folder in (home, home.parent, '/'):
        refused(place.here(name, *words(name, folder)), folder, 'give a folder of its own')
    if name in ('cmr_prepare', 'cmr_sample', 'cmr_check'):  # the others take '' for nothing given
        refused(place.here(name, *words(name, '')), "'': it is empty; give a value")
    refused(place.here(name, *words(name, '~/out')), "begins with '~'")
    assert not list(home.glob('[!.]*')) and not (place.folder/'~').exists()  # libraries keep hidden files there


@pytest.mark.parametrize('name', COMMANDS[:4])
def test_foreign_files_in_an_old_result_do_not_vanish(place, words, tmp_path, name):
    out = tmp_path/'out'
    assert place.here(name, *words(name, out)).returncode == 0
    (out/'notes').mkdir()
    (out/'notes'/'thesis.txt').write_text('years of work')
    before = snapshot(out)
    assert MARK in before and KNOWN_BY[name] in before
    refused(place.here(name, *words(name, out, other=True)), out, 'notes/thesis.txt', 'not replaced', 'move it away')
    assert snapshot(out) == before
    shutil.rmtree(out/'notes')
    assert place.here(name, *words(name, out, other=True)).returncode == 0
    assert snapshot(out) != before
    clean(tmp_path)


def test_a_file_that_somebody_has_changed_does_not_vanish(place, words, tmp_path):
    out = tmp_path/'out'
    assert place.here('cmr_sample', *words('cmr_sample', out)).returncode == 0
    (out/'splits.csv').write_text('patient,split\n')
    refused(place.here('cmr_sample', *words('cmr_sample', out, other=True)), out, 'splits.csv was changed')
    assert (out/'splits.csv').read_text() == 'patient,split\n'


def test_findings_do_not_replace_a_table_of_the_same_name(place, words, tmp_path):
    (tmp_path/'findings.csv').write_text('years of work')
    refused(place.here('cmr_check', *words('cmr_check', tmp_path)), 'findings.csv that was not written here')
    assert snapshot(tmp_path) == {'findings.csv': b'years of work'}
    (tmp_path/'findings.csv').rename(tmp_path/'mine.csv')
    for _ in range(2): assert place.here('cmr_check', *words('cmr_check', tmp_path)).returncode == 0
    assert (tmp_path/'mine.csv').read_text() == 'years of work'
    clean(tmp_path)


def test_a_result_of_another_kind_is_not_replaced(place, words, tmp_path, cache):
    copy = tmp_path/'cache'
    shutil.copytree(cache, copy)
    before = snapshot(copy)
    for name in ('cmr_phantom', 'cmr_sample', 'cmr_evaluate', 'cmr_check'):
        refused(place.here(name, *words(name, copy)), copy, 'holds a cache')
    assert snapshot(copy) == before


@pytest.mark.parametrize('name', ('cmr_phantom', 'cmr_prepare', 'cmr_sample'))
def test_results_of_earlier_versions_are_known(place, words, tmp_path, name):
    "They have neither a mark nor a .gitignore; a file of somebody else in them stays, too."
    out = tmp_path/'out'
    assert place.here(name, *words(name, out)).returncode == 0
    (out/MARK).unlink()
    (out/'.gitignore').unlink(missing_ok=True)
    (out/'thesis.txt').write_text('years of work')
    refused(place.here(name, *words(name, out, other=True)), 'holds thesis.txt')
    (out/'thesis.txt').unlink()
    assert place.here(name, *words(name, out, other=True)).returncode == 0 and (out/MARK).exists()


# ---- inputs

def test_a_result_equal_to_its_masks_does_not_replace_them(place, words, tmp_path, trained, synthetic):
    masks = tmp_path/'masks'
    shutil.copytree(synthetic, masks)
    (tmp_path/'link').symlink_to(masks)
    before = snapshot(masks)
    for out in (masks, tmp_path/'link', tmp_path/'.'/'masks'):
        refused(place.here('cmr_sample', trained, '--masks', masks, out, '--steps', 1), 'the input')
    assert snapshot(masks) == before
    clean(tmp_path)


def test_a_result_equal_to_its_cache_does_not_replace_it(place, tmp_path, trained, cache, synthetic):
    before = snapshot(cache)
    refused(place.here('cmr_sample', trained, '--masks', cache, cache, '--steps', 1), cache)
    refused(place.here('cmr_evaluate', cache, synthetic, '--out', cache), cache)
    assert snapshot(cache) == before


def test_a_result_inside_its_masks_would_be_read_as_a_batch(place, tmp_path, trained, synthetic):
    masks = tmp_path/'masks'
    shutil.copytree(synthetic, masks)
    before = snapshot(masks)
    refused(place.here('cmr_sample', trained, '--masks', masks, masks/'2024_01_01', '--steps', 1), 'lies in the input')
    refused(place.here('cmr_sample', trained, '--masks', masks, tmp_path, '--steps', 1), 'holds the input')
    assert snapshot(masks) == before


def test_a_cache_does_not_replace_the_cohort(place, words, tmp_path, phantom):
    cohort = tmp_path/'cohort'
    shutil.copytree(phantom, cohort)
    before = snapshot(cohort)
    small = ('--size', 32, '--spacing', '3-4', '--workers', 1)
    for out in (cohort, tmp_path, cohort/'cache'): refused(place.here('cmr_prepare', cohort, out, *small), out)
    assert snapshot(cohort) == before


# ---- mount points and links

@pytest.mark.parametrize('name', COMMANDS)
def test_a_mount_point_is_written_into(place, words, tmp_path, name):
    "The volume of a container cannot be renamed: all work was lost at the end."
    out = tmp_path.resolve()/'volume'
    with mounted(out, real=True):
        number = out.stat().st_ino
        for other in (False, True):
            done = place.here(name, *words(name, out, other))
            assert done.returncode == 0, done.stderr
            clean(tmp_path)
        assert (out/KNOWN_BY[name]).is_file() and out.stat().st_ino == number
        if name == 'cmr_check': return
        (out/'thesis.txt').write_text('years of work')
        refused(place.here(name, *words(name, out)), 'holds thesis.txt')


def test_readers_refuse_a_mount_point_that_is_unfinished(place, words, tmp_path, trained):
    out = tmp_path.resolve()/'volume'
    with mounted(out, real=True):
        assert place.here('cmr_prepare', *words('cmr_prepare', out)).returncode == 0
        (out/UNFINISHED).write_text('{"room": ".gone.room"}')
        refused(place.here('cmr_train', out, '--steps', 1), out, 'is unfinished')
        refused(place.here('cmr_sample', trained, '--masks', out, tmp_path/'x', '--steps', 1), out, 'is unfinished')


@pytest.mark.parametrize('name', COMMANDS)
def test_a_link_is_not_replaced_by_a_folder(place, words, tmp_path, name):
    disk, out = tmp_path/'disk', tmp_path/'out'
    disk.mkdir()
    out.symlink_to(disk)
    for other in (False, True): assert place.here(name, *words(name, out, other)).returncode == 0
    assert out.is_symlink() and (disk/KNOWN_BY[name]).is_file()
    clean(tmp_path)


# ---- errors and kills

@pytest.mark.parametrize('fault', (kill, KeyboardInterrupt))
@pytest.mark.parametrize('by', ('result', 'atomic_path'))
def test_a_fault_between_the_two_renames_loses_neither_old_nor_new(tmp_path, monkeypatch, by, fault):
    "An error there deleted both, and after a kill neither was in place. (test_output.py tries all other moments.)"
    out, rename = tmp_path.resolve()/'out', os.rename

    def write(text):
        if by == 'result':
            with results.result(out, 'evaluation') as room: (room/'report.json').write_text(text)
        else:
            with atomic_path(out/'report.json') as new: new.write_text(text)

    def second(one, other):
        if Path(other) in (out, out/'report.json'): fault() if fault is kill else (_ for _ in ()).throw(fault)
        rename(one, other)

    def faulty():
        monkeypatch.setattr(os, 'rename', second)
        monkeypatch.setattr(os, 'replace', second)
        with without_exchange(): write('new')
    write('old')
    assert not in_child(faulty)
    results.check_finished(out)
    assert (out/'report.json').read_text() in ('old', 'new')
    write('third')
    assert (out/'report.json').read_text() == 'third'
    clean(tmp_path)


@pytest.mark.parametrize('name', ('cmr_phantom', 'cmr_prepare', 'cmr_sample'))
def test_a_killed_command_leaves_nothing_for_ever(place, words, tmp_path, name):
    "Temporary folders of killed commands stayed for ever. The next command on the folder removes them."
    out = tmp_path.resolve()/'out'
    assert place.here(name, *words(name, out)).returncode == 0
    before = snapshot(out)
    longer = dict(cmr_phantom=('--patients', 50), cmr_sample=('--steps', 2000), cmr_prepare=())[name]
    command = [Path(sys.executable).with_name(name), *map(str, (*words(name, out, other=True), *longer))]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=place.folder, env=place.env, **quiet)
    while process.poll() is None and not list(tmp_path.glob('.out.*.room')): time.sleep(.001)
    process.kill()
    process.wait()
    assert snapshot(out) == before or name == 'cmr_prepare' and json.loads((out/'cache.json').read_text())
    assert place.here(name, *words(name, out, other=True)).returncode == 0
    assert snapshot(out) != before
    clean(tmp_path)


def test_two_commands_on_one_folder(place, words, tmp_path):
    out = tmp_path.resolve()/'out'
    command = [Path(sys.executable).with_name('cmr_phantom'), out, '--patients', '50']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = subprocess.Popen(command, cwd=place.folder, env=place.env, **quiet)
    try:
        while first.poll() is None and not list(tmp_path.glob('.out.*.room')): time.sleep(.01)
        refused(place.here('cmr_phantom', *words('cmr_phantom', out)), out, f'another command (process {first.pid}')
    finally:
        first.kill()
        first.wait()
    assert place.here('cmr_phantom', *words('cmr_phantom', out)).returncode == 0


def test_the_settings_of_a_synthesis_are_there_when_the_cohort_is(place, words, tmp_path, monkeypatch):
    "`synthesis.json` was written after the cohort was in place."
    there = []
    take_place = results.take_place
    def look(new, *more):
        there.append({f.name for f in new.iterdir()})
        return take_place(new, *more)
    monkeypatch.setattr(results, 'take_place', look)
    assert place.here('cmr_sample', *words('cmr_sample', tmp_path/'out')).returncode == 0
    assert [names >= {'synthesis.json', 'cohort.json', 'splits.csv', MARK} for names in there] == [True]


def test_weights_can_be_read_by_others(place, cache, trained, synthetic, store, words, tmp_path):
    "The library that writes them makes files for their owner alone."
    from cmr_diffusion.tracking import resolve_run
    assert place.here('cmr_evaluate', *words('cmr_evaluate', tmp_path/'out')).returncode == 0
    umask = os.umask(0)
    os.umask(umask)
    weights = [resolve_run(trained)/'model.safetensors', *(cache/'segmentation').glob('*.safetensors')]
    assert len(weights) > 1
    for f in weights: assert f.stat().st_mode & 0o777 == 0o666 & ~umask, f


def test_an_evaluation_in_a_cohort_and_networks_in_a_cache_are_not_foreign(place, words, tmp_path, phantom):
    cohort, cache = tmp_path/'cohort', tmp_path/'cache'
    assert place.here('cmr_prepare', *words('cmr_prepare', cache)).returncode == 0
    assert place.here('cmr_sample', *words('cmr_sample', cohort)).returncode == 0
    assert place.here('cmr_evaluate', cache, cohort, '--quick', '--steps', 2, '--device', 'cpu').returncode == 0
    networks = sorted((cache/'segmentation').iterdir())
    assert networks and (cohort/'evaluation'/'report.json').is_file()
    assert place.here('cmr_prepare', *words('cmr_prepare', cache, other=True)).returncode == 0
    assert place.here('cmr_sample', *words('cmr_sample', cohort, other=True)).returncode == 0
    assert sorted((cache/'segmentation').iterdir()) == networks  # they are found again by content
    assert not (cohort/'evaluation').exists()  # it was about other images


# ---- bytes that have changed

@pytest.mark.parametrize('name', ('pixels.bin', 'labels.bin'))
def test_64_changed_bytes_of_a_cache_are_noticed(place, tmp_path, phantom, cache, caplog, name):
    "A training went on with the changed image."
    from cmr_diffusion.grid.cache import CohortCache
    copy = tmp_path/'cache'
    shutil.copytree(cache, copy)
    of_val = int(CohortCache(copy).rows('val')[0])  # all of these are read at a check
    start = int(np.load(copy/'index.npy')['offset' if name == 'pixels.bin' else 'label_offset'][of_val])
    with open(copy/name, 'r+b') as f:
        f.seek(start)
        f.write(b'\7' * 64)
    options = ('--preset', 'tiny', '--steps', 4, '--checks', 1, '--batch_size', 4, '--device', 'cpu')
    done = place.here('cmr_train', copy, *options)
    last = done.stderr.strip().splitlines()[-1]
    said = f'cmr_train: {copy}: slice {of_val} differs from what was written: run cmr_prepare again'
    assert done.returncode == 2 and last == said, done.stderr
    again = place.here('cmr_prepare', phantom, copy, '--size', 32, '--spacing', '3-4', '--workers', 1)
    assert again.returncode == 0 and f'slice {of_val} differs from what was written; all of it is made' in caplog.text
    CohortCache(copy).check()
    for f in ('pixels.bin', 'labels.bin', 'index.npy'): assert (copy/f).read_bytes() == (cache/f).read_bytes()


SAYS = [  # change of cache.json, what is said
    (lambda c: c | dict(version=99), ': a cache of version 99, made by a newer cmr_diffusion'),
    (lambda c: c | dict(version=2), ': a cache of version 2, made by an older cmr_diffusion'),
    (lambda c: c | dict(version=0), '/cache.json: is damaged (version 0: give 3)'),
    (lambda c: {k: v for k, v in c.items() if k != 'version'}, '/cache.json: is damaged (version is missing)'),
    (lambda c: [], '/cache.json: is damaged (version is missing)'),
    (lambda c: c | dict(values=[c['values'][0] | dict(knee=float('nan'))]), '/cache.json: values.0.knee nan: give ')]

@pytest.mark.parametrize('change, words', SAYS)
def test_what_is_wrong_with_the_settings_of_a_cache(cache, tmp_path, change, words):
    from cmr_diffusion.grid.cache import CohortCache
    shutil.copytree(cache, tmp_path/'cache')
    settings = json.loads((cache/'cache.json').read_text())
    (tmp_path/'cache'/'cache.json').write_text(json.dumps(change(settings)))
    with pytest.raises(CMRError) as found: CohortCache(tmp_path/'cache')
    message = str(found.value)
    assert message.startswith(f'{tmp_path}/cache{words}') and message.endswith('; run cmr_prepare again'), message
    assert '\n' not in message


# ---- before the work begins

@contextlib.contextmanager
def volume(folder, options):
    "A small file system."
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'none', str(folder)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'a tmpfs cannot be mounted here: {done.stderr.strip()}')
    try: yield folder
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.parametrize('name', COMMANDS)
def test_a_folder_that_cannot_be_written_is_said_before_the_work(place, words, tmp_path, monkeypatch, name):
    with volume(tmp_path.resolve()/'disk', 'size=1m') as disk:
        (disk/'there').mkdir()
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        start = time.time()
        for out in (disk/'out', disk/'there', disk):
            refused(place.here(name, *words(name, out)), out, 'cannot be written')
    (tmp_path/'file').write_text('mine')
    refused(place.here(name, *words(name, tmp_path/'file')), 'file, not a folder')
    refused(place.here(name, *words(name, tmp_path/'file'/'out')), 'file is a file, not a folder')
    assert (tmp_path/'file').read_text() == 'mine' and time.time() - start < 60


def test_a_disk_that_is_full_in_the_middle_leaves_the_old_result(tmp_path):
    with volume(tmp_path.resolve()/'disk', 'size=400k') as disk:
        def write(size):
            with results.result(disk/'out', 'evaluation') as room: (room/'report.json').write_bytes(bytes(size))
        write(1000)
        with pytest.raises(CMRError, match='out: there is no room for it .No space left.*; make room'): write(10**6)
        assert (disk/'out'/'report.json').read_bytes() == bytes(1000)
        clean(disk)


def test_a_disk_that_fills_while_images_are_written(place, tmp_path):
    "pydicom raises an error of the disk again without its number, and with a traceback of eight lines in its text."
    with volume(tmp_path.resolve()/'disk', 'size=300k') as disk:
        for out in (disk, disk/'out'):
            done = place.here('cmr_phantom', out, '--patients', 4)
            refused(done, f'{out}: there is no room for it (No space left on device); make room')
            assert not list(disk.iterdir())


def test_an_error_of_the_disk_is_one_line(tmp_path, monkeypatch):
    from cmr_diffusion.cohort.phantom import make_phantom
    def broken(path): raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr('pydicom.filewriter.write_data_element', lambda *a: broken(a))
    with pytest.raises(CMRError) as found: make_phantom(tmp_path/'out', 1)
    text = f'{tmp_path.resolve()}/out: cannot be written (OSError: [Errno 5] Input/output error); put that right'
    assert str(found.value).startswith(text) and '\n' not in str(found.value), found.value
    clean(tmp_path)


def test_a_disk_without_room_is_said_before_the_work(tmp_path, phantom):
    from cmr_diffusion.cohort.table import read_cohort
    from cmr_diffusion.grid.cache import prepare
    from cmr_diffusion.grid.geometry import Geometry
    def never(row): raise AssertionError('read')
    with volume(tmp_path.resolve()/'disk', 'size=200k') as disk:
        with pytest.raises(CMRError, match='GB are free on its disk') as e:
            prepare(read_cohort(phantom), disk/'cache', Geometry.parse(32, '3-4', 'heart'), workers=0, load=never)
        assert '\n' not in str(e.value) and not list(disk.iterdir())
