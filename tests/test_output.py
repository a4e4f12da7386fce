"""A fault at every step of writing a result leaves the old or the new one, whole, and the next command clears up."""
import errno, json, os, shutil, signal, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmr_diffusion import output, results, rooms
from cmr_diffusion.core import CMRError
from cmr_diffusion.marks import LOCK, MARK, UNFINISHED
from cmr_diffusion.output import atomic_path, is_working_name, working_name
from cmr_diffusion.places import check_place, is_mount
from cmr_diffusion.results import check_finished, check_result, result

STEPS = ('rename', 'replace', 'unlink', 'remove', 'mkdir', 'rmdir', 'chmod', 'open')
OLD = {'cohort.json': 'old', 'P1/T1_Mapping_/Mid.dcm': 'old', 'P2/a/b': 'old', 'only_old': 'old', 'turned': 'old'}
NEW = {'cohort.json': 'new', 'P1/T1_Mapping_/Mid.dcm': 'new', 'P3/c': 'new', 'only_new': 'new', 'turned/x': 'new'}
THIRD = {'cohort.json': 'third'}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    "Nothing waits for the disk, which matters after a power cut alone."
    for module in (output, results): monkeypatch.setattr(module, 'to_disk', lambda path: None)


class Faults:
    "Count the steps that change the disk, and do something before the n-th of them, or before it and all later ones."
    def __init__(self, n=0, action=None, on=False): self.n, self.action, self.on, self.count = n, action, on, 0

    def step(self):
        self.count += 1
        if self.action and (self.count == self.n or self.on and self.count > self.n): self.action()

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in STEPS: self.patch.setattr(os, name, self.counted(getattr(os, name), name))
        self.patch.setattr(output, 'exchange', self.counted(output.exchange, 'exchange'))
        return self

    def __exit__(self, *args): self.patch.undo()

    def counted(self, function, name):
        def counted(*args, **kwargs):
            writes = name != 'open' or len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes: self.step()
            return function(*args, **kwargs)
        return counted


def kill(): os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise OSError(errno.EIO, 'disk on fire')
def interrupt(): raise KeyboardInterrupt


def in_child(function):
    "Run a function in a process of its own; whether it came to its end (43: it did, in spite of a fault)."
    pid = os.fork()
    if not pid:
        try: code = function() or 0
        except BaseException as e: code = 42 if isinstance(e, (CMRError, OSError, KeyboardInterrupt)) else 99
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 42, 43, -signal.SIGKILL), code
    return code == 0


def write(place, files, kind='cohort', **options):
    with result(place, kind, **options) as room:
        for name, text in files.items():
            (room/name).parent.mkdir(parents=True, exist_ok=True)
            (room/name).write_text(text)


def read(place, but=()):
    "What a reader sees: all files but marks, rooms and locks."
    def hidden(f): return any(is_working_name(p) or p == MARK or p.endswith(LOCK) for p in f.relative_to(place).parts)
    files = [f for f in sorted(place.rglob('*')) if f.is_file() and not hidden(f)]
    texts = {f.relative_to(place).as_posix(): f.read_text() for f in files}
    return {name: text for name, text in texts.items() if name not in but}


def clean(folder):
    "Nothing of ours is left below a folder but marks."
    ours = [f for f in folder.rglob('*') if is_working_name(f.name) or f.name.endswith(LOCK) or f.name == UNFINISHED]
    assert not ours, ours


@contextmanager
def without_exchange():
    "As on a file system that cannot let two folders change places."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, 'exchange', lambda one, other: False)
        yield


@contextmanager
def mounted(place, real=False):
    "A folder that is, or is taken for, a mount point."
    if real:
        place.mkdir(exist_ok=True)
        done = subprocess.run(['mount', '-t', 'tmpfs', 'none', str(place)], capture_output=True, text=True)
        if done.returncode: pytest.skip(f'a tmpfs cannot be mounted here: {done.stderr.strip()}')
        try: yield
        finally: subprocess.run(['umount', '-l', str(place)], check=True)
        return
    with pytest.MonkeyPatch.context() as patch:
        place.mkdir(exist_ok=True)
        known = os.path.ismount
        patch.setattr(os.path, 'ismount', lambda path: str(path) == str(place) or known(path))
        yield


PLACES = dict(
    exchanged=lambda place: contextmanager(lambda: (yield))(),
    renamed=lambda place: without_exchange(),
    mount=lambda place: mounted(place),
    tmpfs=lambda place: mounted(place, real=True))


def every_fault(place, action, state, on=False, first=OLD, kept=()):
    "Write NEW over OLD with a fault at each step; `state(n)` looks at what is there before anybody recovers it."
    parent, n, ended = place.parent, 0, False
    while not ended:
        n += 1
        for f in [*place.iterdir()] if place.exists() else []: shutil.rmtree(f) if f.is_dir() else f.unlink()
        if first is None and place.exists() and not is_mount(place): place.rmdir()
        if first is not None: write(place, first)
        for name in kept:
            (place/name).parent.mkdir(exist_ok=True)
            (place/name).write_text('kept')

        def faulty():
            with Faults(n, action, on) as faults: write(place, NEW)
            return 43 if faults.count >= n else 0
        ended = in_child(faulty)
        assert n < 500
        state(n)
        write(place, THIRD)
        assert read(place, kept) == THIRD and all((place/name).exists() for name in kept), n
        clean(parent)
    return n


@pytest.fixture
def folder(tmp_path):
    "A folder in memory where there is one, as the disk of a busy machine takes minutes for these tests."
    memory = Path('/dev/shm')
    if not os.access(memory, os.W_OK): return (yield tmp_path.resolve())
    made = Path(tempfile.mkdtemp(dir=memory))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('action, on', [(kill, False), (fail, False), (fail, True), (interrupt, False)])
def test_a_fault_at_every_step_leaves_the_old_or_the_new_result(folder, name, action, on):
    place, seen = folder/'out', []

    def state(n):
        at_once = read(place) if place.exists() else None
        if name == 'exchanged': assert at_once in (OLD, NEW), (n, at_once)
        elif at_once not in (OLD, NEW): assert at_once is None or (place/UNFINISHED).exists(), (n, at_once)
        if (place/UNFINISHED).exists() and action is fail and not on: assert read(place, [UNFINISHED]) == NEW, n
        check_finished(place)
        assert read(place) in (OLD, NEW), (n, read(place))
        seen.append(read(place) == NEW)
    with PLACES[name](place):
        steps = every_fault(place, action, state, on)
    assert steps > 20 and False in seen and seen[-1]


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('action', [kill, fail])
def test_a_fault_at_every_step_of_a_first_result_leaves_nothing_or_all_of_it(folder, name, action):
    place = folder/'out'

    def state(n):
        check_finished(place)
        assert not place.exists() or read(place) in ({}, NEW), n
    with PLACES[name](place): assert every_fault(place, action, state, first=None) > 15


@pytest.mark.parametrize('name', ('renamed', 'tmpfs'))
def test_a_second_fault_while_the_first_is_repaired(folder, name):
    "A kill at every step of the recovery after a kill."
    place, worst = folder/'out', []
    with PLACES[name](place):
        def state(n):
            def recovering():
                with Faults(m, kill): check_result(place, 'cohort')
            for m in range(1 + n % 4, 60, 4):
                if in_child(recovering): break
            worst.append(m)
            check_finished(place)
            assert read(place) in (OLD, NEW), (n, m)
        every_fault(place, kill, state)
    assert max(worst) > 5


@pytest.mark.parametrize('name', ('exchanged', 'mount'))
def test_what_another_command_added_survives_every_fault(folder, name):
    place, networks = folder/'cache', ('segmentation/unet_1.safetensors',)
    old = {f: 'old' for f in ('cache.json', 'pixels.bin')}
    with PLACES[name](place), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), 'NEW', dict(old, **{'cache.json': 'new'}))
        patch.setitem(globals(), 'THIRD', dict(old, **{'cache.json': 'third'}))
        writes = write
        patch.setitem(globals(), 'write', lambda place, files, **o: writes(place, files, 'cache', **o))

        def state(n):
            check_finished(place)
            assert read(place, networks) in (old, NEW), n
        every_fault(place, kill, state, first=old, kept=networks)


@pytest.mark.parametrize('action', [kill, fail, interrupt])
def test_a_fault_at_every_step_of_a_file_leaves_the_old_or_the_new_file(folder, action):
    path, n, ended = folder/'sub'/'note.txt', 0, False

    def faulty():
        with Faults(n, action) as faults, atomic_path(path) as new: new.write_text('new')
        return 43 if faults.count >= n else 0
    while not ended:
        n += 1
        with atomic_path(path) as new: new.write_text('old')
        ended = in_child(faulty)
        assert path.read_text() in ('old', 'new') and n < 50
        with atomic_path(path) as new: new.write_text('next')
        assert [f.name for f in path.parent.iterdir()] == ['note.txt']
    assert n > 3


def test_folders_are_no_files(tmp_path):
    "Folders are written by `result`, which knows whose they are; `atomic_path` once replaced them, too."
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('years of work')
    with pytest.raises(CMRError, match='mine: is a folder, expected the name of a file'):
        with atomic_path(tmp_path/'mine') as new: new.mkdir()
    with pytest.raises(CMRError, match='other: a folder was made, expected a file'):
        with atomic_path(tmp_path/'other') as new: new.mkdir()
    assert read(tmp_path) == {'mine/thesis.txt': 'years of work'} and len(list(tmp_path.iterdir())) == 1


# ---- locks and left-overs

HOLDS = '''import sys, time
from cmr_diffusion.results import result
with result(sys.argv[1], 'cohort') as room:
    (room/'half').touch()
    print('writing', flush=True)
    time.sleep(100)'''


@contextmanager
def other_command(place):
    "Another process that writes there."
    process = subprocess.Popen([sys.executable, '-c', HOLDS, str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == 'writing\n'
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize('name', ('exchanged', 'tmpfs'))
def test_the_second_of_two_commands_on_one_folder_is_refused(tmp_path, name):
    place = tmp_path.resolve()/'out'
    with PLACES[name](place):
        with other_command(place) as process:
            for call in (check_result, lambda *a: write(place, THIRD)):
                with pytest.raises(CMRError, match=f'another command .process {process.pid} on ') as e:
                    call(place, 'cohort')
                assert '\n' not in str(e.value)
        write(place, THIRD)  # its lock went with it, and so does its room
        assert read(place) == THIRD
        clean(tmp_path)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc, where nobody can make a file')
def test_a_place_without_room_for_a_lock_is_not_said_to_be_in_use():
    with pytest.raises(CMRError, match='/proc/new: cannot be written'): check_result('/proc/new', 'cohort')


def test_readers_of_a_folder_that_is_just_being_written_are_told(tmp_path):
    place = tmp_path.resolve()/'out'
    with mounted(place, real=True), other_command(place):
        with pytest.raises(CMRError, match='another command'): check_finished(place)


def test_the_lock_of_a_dead_process_does_not_block_another_user(tmp_path):
    place = tmp_path.resolve()/'out'
    with other_command(place): pass
    lock = next(tmp_path.glob(f'.*{LOCK}'))
    assert lock.stat().st_mode & 0o666 == 0o666
    write(place, OLD)
    clean(tmp_path)


def test_a_room_of_a_container_that_is_gone_is_removed(tmp_path, monkeypatch):
    place = tmp_path.resolve()/'out'
    monkeypatch.setattr(output, 'this_system', lambda: 'aaaaaaaa')  # its processes are not ours

    def killed():
        with result(place, 'cohort') as room:
            (room/'half').touch()
            kill()
    in_child(killed)
    monkeypatch.setattr(output, 'this_system', lambda: 'bbbbbbbb')
    assert len(rooms.rooms_of(place)) == 1
    write(place, OLD)
    clean(tmp_path)


def test_a_room_on_another_machine_is_left_alone_for_a_day(tmp_path, monkeypatch):
    place = tmp_path.resolve()/'out'
    name = working_name('out', 'room').replace(output.this_system(), 'aaaaaaaa')
    room = rooms.Room(tmp_path.resolve()/name, place, 'cohort')
    room.path.mkdir(parents=True)
    room.note(place='out', kind='cohort', host='elsewhere', boot='another', pid=1, since='today')
    with pytest.raises(CMRError, match='process 1 on elsewhere'): write(place, OLD)
    long_ago = time.time() - 2 * output.DAY
    os.utime(room.folder, (long_ago, long_ago))
    write(place, OLD)
    clean(tmp_path)


def test_the_number_of_a_dead_process_may_be_that_of_a_living_one(tmp_path):
    "The room says when its process began, so a process that got the same number later is not taken for it."
    place = tmp_path.resolve()/'out'
    mine = working_name('out', 'room').split('.')[2]
    pid, start, *rest = mine.split('-')
    (tmp_path/f'.out.{"-".join([pid, str(int(start) - 1), *rest])}.room'/'new').mkdir(parents=True)
    write(place, OLD)
    clean(tmp_path)


def test_a_command_in_the_folder_is_not_disturbed(tmp_path):
    "An evaluation is written into a synthetic cohort, which is not replaced meanwhile."
    place = tmp_path.resolve()/'cohort'
    write(place, {'cohort.json': '{"slices": 0}'})
    with result(place/'evaluation', 'evaluation') as room:
        (room/'report.json').write_text('{}')
        with pytest.raises(CMRError, match='writes evaluation in it'): write(place, NEW)
    write(place, NEW)  # the evaluation of the old images goes with them
    assert read(place) == NEW


def test_work_is_resumed_after_a_kill_and_never_removed_as_a_left_over(tmp_path):
    place = tmp_path.resolve()/'out'

    def killed():
        with result(place, 'cohort', resume='seed 0') as room:
            (room/'cohort.json').write_text('half')
            with atomic_path(room.state) as new: new.write_text('1 of 2')
            kill()
    in_child(killed)
    write(place, THIRD)  # other work, to its end
    assert read(place) == THIRD and len(rooms.rooms_of(place)) == 1
    write(place, THIRD, resume='seed 1')
    with result(place, 'cohort', resume='seed 0') as room:
        assert room.resumed and (room/'cohort.json').read_text() == 'half' and room.state.read_text() == '1 of 2'
        (room/'more').write_text('whole')
    assert read(place) == {'cohort.json': 'half', 'more': 'whole'}
    clean(tmp_path)


# ---- places

def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path.resolve()/'disk'/'target', tmp_path.resolve()/'link'
    target.mkdir(parents=True)
    link.symlink_to('disk/target')
    for files in (OLD, NEW):
        write(link, files)
        assert link.is_symlink() and read(target) == read(link) == files
    clean(tmp_path)
    shutil.rmtree(target)
    with pytest.raises(CMRError, match='is a link to disk/target, which is not there'): write(link, OLD)


def test_a_folder_in_which_the_user_works_is_not_taken_away(tmp_path, monkeypatch):
    place = tmp_path.resolve()/'out'
    place.mkdir()
    monkeypatch.chdir(place)
    before = place.stat().st_ino
    for files in (OLD, NEW): write('.', files)
    assert place.stat().st_ino == before and read(place) == NEW and Path.cwd() == place
    clean(tmp_path)


def test_a_folder_that_is_mounted_from_the_same_disk(tmp_path):
    source, place = tmp_path.resolve()/'source', tmp_path.resolve()/'out with blanks'
    for folder in (source, place): folder.mkdir()
    if subprocess.run(['mount', '--bind', str(source), str(place)], capture_output=True).returncode:
        pytest.skip('a folder cannot be mounted here')
    try:
        assert is_mount(place)
        for files in (OLD, NEW): write(place, files)
        assert read(place) == read(source) == NEW
        with pytest.raises(CMRError, match='is also the input'): check_place(place, [source])
    finally: subprocess.run(['umount', '-l', str(place)], check=True)


def test_a_disk_that_is_not_known_to_refuse_a_rename(tmp_path, monkeypatch):
    "A layer of a container's image: folders cannot be renamed, files can."
    place, rename = tmp_path.resolve()/'out', os.rename
    write(place, OLD)

    def renamed(one, other):
        if Path(one).is_dir() and place in (Path(one), Path(other)): raise OSError(errno.EXDEV, 'other device')
        rename(one, other)
    monkeypatch.setattr(os, 'rename', renamed)
    with without_exchange(): write(place, NEW)
    assert read(place) == NEW
    clean(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason='only root can become somebody else')
def test_a_folder_in_a_folder_of_somebody_else(tmp_path):
    "The parent cannot be written, so the files are moved into the folder; a new folder cannot be made there."
    parent = tmp_path.resolve()/'shared'
    place = parent/'mine'
    place.mkdir(parents=True)
    os.chown(place, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents[:3]): os.chmod(folder, os.stat(folder).st_mode | 0o055)

    def as_nobody():
        os.setgid(65534)
        os.setuid(65534)
        for files in (OLD, NEW): write(place, files)
        try: write(parent/'other', OLD)
        except CMRError as e: assert 'cannot be written by you' in str(e)
        else: raise AssertionError('written')
    assert in_child(as_nobody)
    assert read(place) == NEW and sorted(f.name for f in parent.iterdir()) == ['mine']


def test_permissions_are_the_usual_ones(tmp_path):
    place = tmp_path.resolve()/'out'
    for umask in (0o022, 0o027, 0o077):
        before = os.umask(umask)
        try:
            with result(place, 'cohort') as room:
                (room/'P1').mkdir(mode=0o700)
                (room/'P1'/'a').touch(mode=0o600)
                (room/'run.sh').touch(mode=0o700)
        finally: os.umask(before)
        modes = {f.name: f.stat().st_mode & 0o777 for f in place.rglob('*')}
        usual = 0o666 & ~umask
        assert modes == {'P1': 0o777 & ~umask, 'a': usual, 'run.sh': 0o700 | usual, MARK: usual}
        shutil.rmtree(place)


def test_the_mark_is_the_same_for_the_same_result(tmp_path):
    for name in ('a', 'b'): write(tmp_path/name, OLD)
    assert (tmp_path/'a'/MARK).read_bytes() == (tmp_path/'b'/MARK).read_bytes()
    assert json.loads((tmp_path/'a'/MARK).read_text())['kind'] == 'cohort'


def test_a_copy_of_a_result_is_a_result(tmp_path):
    write(tmp_path/'a', OLD)
    shutil.copytree(tmp_path/'a', tmp_path/'b', copy_function=shutil.copyfile)  # all times are new
    write(tmp_path/'b', NEW)
    assert read(tmp_path/'b') == NEW


def test_a_mark_that_somebody_else_made_opens_no_other_folder(tmp_path):
    place, mine = tmp_path.resolve()/'out', tmp_path.resolve()/'mine.txt'
    mine.write_text('years of work')
    write(place, OLD)
    mark = json.loads((place/MARK).read_text())
    mark['files'] |= {'../mine.txt': [], str(mine): []}
    (place/MARK).write_text(json.dumps(mark))
    write(place, NEW)
    assert mine.read_text() == 'years of work' and read(place) == NEW
