"""What can be wrong with the store of runs ends in one line, within 30 seconds and before any work."""
import http.server, os, shutil, socket, sqlite3, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmr_diffusion import store_checks, stores
from cmr_diffusion.core import CMRError
from cmr_diffusion.tracking import (
    check_store, find_run, log_config, log_figure, log_folder, log_metrics, log_table, resolve_run, start_run)

FUTURE = 'fb000000abcd'  # a schema that no MLflow has


@pytest.fixture
def use(monkeypatch, tmp_path):
    "Use a store by its address, in a working directory of its own."
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.chdir(tmp_path)
    def use(uri):
        monkeypatch.setenv('MLFLOW_TRACKING_URI', str(uri))
    return use


@pytest.fixture
def database(use, template, tmp_path):
    "A copy of that store, in use; its file."
    file = tmp_path/'mlruns'/'mlflow.db'
    file.parent.mkdir()
    shutil.copy(template, file)
    use(f'sqlite:///{file}')
    return file


@pytest.fixture
def refused(capfd, recwarn):
    "What a call says that is refused: one line, soon, and nothing on the terminal."
    def refused(call, *words):
        capfd.readouterr()
        recwarn.clear()
        start = time.time()
        with pytest.raises(CMRError) as told: call()
        line = str(told.value)
        assert time.time() - start < 30
        assert len(line.splitlines()) == 1 and len(line) < 600, line
        assert ''.join(capfd.readouterr()) == '' and not len(recwarn)
        for word in words: assert str(word) in line, line
        return line
    return refused


def training(): return check_store(write=True)
def reading(): return find_run('someone')


@contextmanager
def mounted(folder, *options):
    "A small disk of its own."
    folder.mkdir(exist_ok=True)
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', folder], capture_output=True)
    if made.returncode: pytest.skip('a disk cannot be mounted here: this needs root')
    try: yield folder
    finally: subprocess.run(['umount', '-l', folder], check=True)


# ---- addresses

@pytest.mark.parametrize('uri', ['{0}/old', 'file://{0}/old', './old'])
def test_a_plain_folder(use, refused, tmp_path, uri):
    (tmp_path/'old').mkdir()
    use(uri.format(tmp_path))
    for call in (training, reading):
        refused(call, 'in which MLflow 3 keeps no runs', f'MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/old/mlflow.db',
                f'mlflow migrate-filestore --source {tmp_path}/old')


@pytest.mark.parametrize('uri', ['localhost:5000', 'htp://host:5000', 'nonsense://x', 'http://', 'http://[',
                                 'sqlite:/x', 'http://host:port', 'databricks', 'uc:x',
                                 'postgresql+nothing://host/x', 'mysql://'])
def test_junk_addresses(use, refused, monkeypatch, tmp_path, uri):
    monkeypatch.setattr(store_checks, 'PATIENCE', 1)
    use(uri)
    for call in (training, reading): refused(call, f'MLflow store {uri}: ', 'MLFLOW_TRACKING_URI')
    assert not list(tmp_path.iterdir())


def test_unknown_schemes_are_told_what_is_known(use, refused):
    use('localhost:5000')
    refused(training, 'not an address that MLflow knows', 'http://HOST:PORT', 'sqlite:////FOLDER/mlflow.db')


def test_kinds_that_mlflow_knows_are_left_to_it(use, refused, monkeypatch, tmp_path):
    use('databricks')
    monkeypatch.setenv('HOME', str(tmp_path))
    line = refused(training, 'MLflow store databricks: ')
    assert 'plain folder' not in line
    use(f'file://{tmp_path}/old')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    with start_run('x', 'mine') as run: log_config(dict(a=1))
    assert find_run('mine').info.run_id == run.id and run.folder.is_relative_to(tmp_path/'old')


def test_a_blank_address_is_none(use, tmp_path):
    use('  ')
    assert stores.tracking_uri() == f'sqlite:///{tmp_path}/mlruns/mlflow.db'


def test_no_password_is_shown(use, refused):
    use('http://me:secret@127.0.0.1:1')
    assert 'secret' not in refused(training, 'http://me:***@127.0.0.1:1', 'no server answers')


# ---- servers

@pytest.fixture
def server(use):
    "A web server that gives one answer to everything; it is in use."
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get('Content-Length', 0)))
            code, text, wait = self.server.said
            time.sleep(wait)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text)
        do_GET = do_POST = answer
        def log_message(self, *args): pass
    found = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    use(f'http://127.0.0.1:{found.server_port}')
    def says(code, text=b'', wait=0): found.said = code, text, wait
    yield says
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize('code, text, words', [
    (200, b'<html>Hello</html>', 'not as an MLflow server does'),
    (200, b'', 'not as an MLflow server does'),
    (404, b'<html>Not found</html>', 'it answers 404'),
    (404, b'{"detail": "Not Found"}', 'not as an MLflow server does'),
    (401, b'You are not authenticated', 'MLFLOW_TRACKING_USERNAME'),
    (403, b'Invalid Host header', 'it answers 403'),
    (500, b'boom', 'it answers 500 Internal Server Error; look at the log of the server'),
    (503, b'', 'it answers 503')])
def test_a_server_that_is_none(server, refused, code, text, words):
    server(code, text)
    for call in (training, reading): refused(call, 'MLflow store http://127.0.0.1:', words)


def test_a_server_that_is_silent(server, refused, monkeypatch):
    monkeypatch.setattr(store_checks, 'PATIENCE', .3)
    server(200, wait=1)
    refused(training, 'no server answers there', 'imeout')


def test_a_dead_server(use, refused):
    with socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        use(f'http://127.0.0.1:{nobody.getsockname()[1]}')
        for call in (training, reading, lambda: start_run('x').__enter__()):
            refused(call, 'no server answers there (ConnectionRefusedError', 'start it, or give its address')


def test_a_host_that_is_not_there(use, refused):
    use('http://no-such-host.invalid:5000')
    refused(training, 'no server answers there')


def test_the_user_decides_how_often_a_server_is_asked(server, refused, monkeypatch):
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_TIMEOUT', '2')
    monkeypatch.setattr(store_checks, 'PATIENCE', .3)
    server(200, b'{}', wait=.6)
    check_store()


def test_a_database_behind_a_server(use, refused):
    use('mssql://me:secret@127.0.0.1:1/runs')
    assert 'secret' not in refused(training, 'mssql://me:***@127.0.0.1:1/runs', 'refused')


# ---- database files

def test_a_file_that_is_no_database(database, refused):
    for junk in (b'x', b'This is a letter. '*100, bytes(5000)):
        database.write_bytes(junk)
        for call in (training, reading): refused(call, database, 'is not an SQLite database', 'move it away')
        assert database.read_bytes() == junk


@pytest.mark.parametrize('share', [.0001, .01, .5, .99])
def test_a_database_that_is_cut_off(database, refused, share):
    os.truncate(database, int(database.stat().st_size*share))
    for call in (training, reading): refused(call, database, 'cut off', 'put back a copy')


def test_a_damaged_database(database, refused):
    with database.open('r+b') as f:
        f.seek(100)
        f.write(bytes(4000))
    for call in (training, reading): refused(call, database, 'damaged', 'put back a copy')


def test_what_a_kill_left_becomes_a_database(database):
    "An empty file, and half of a database under the name that one is made under."
    new = database.with_name('mlflow.db.new')
    shutil.copy(database, new)
    os.truncate(new, 40960)
    database.write_bytes(b'')
    with start_run('x', 'someone') as run: log_metrics({'a': 1.})
    assert find_run('someone').info.run_id == run.id
    assert not new.exists()


def test_the_database_of_another_program(database, refused):
    database.unlink()
    with sqlite3.connect(database) as other: other.execute('CREATE TABLE addresses (name)')
    other.close()
    before = database.read_bytes()
    for call in (training, reading): refused(call, 'belongs to another program (its tables: addresses)')
    assert database.read_bytes() == before


def revision(database, number):
    with sqlite3.connect(database) as found: found.execute('UPDATE alembic_version SET version_num = ?', (number,))
    found.close()


def test_the_database_of_an_older_mlflow(database, refused):
    from mlflow.store.db import utils
    from alembic.script import ScriptDirectory
    known = ScriptDirectory.from_config(utils._get_alembic_config(''))
    revision(database, known.get_revision(known.get_current_head()).down_revision)
    for call in (training, reading):
        refused(call, 'of an older MLflow', f'make a copy of it, then type: mlflow db upgrade sqlite:///{database}')


def test_the_database_of_a_newer_mlflow(database, refused):
    revision(database, FUTURE)
    for call in (training, reading): refused(call, 'of another MLflow', FUTURE, 'install a newer MLflow')


def test_a_folder_in_the_place_of_the_database(database, refused):
    database.unlink()
    database.mkdir()
    for call in (training, reading): refused(call, 'this is a folder', f'sqlite:///{database}/mlflow.db')


def test_a_file_in_the_place_of_the_folder(use, refused, tmp_path):
    (tmp_path/'mlruns').write_text('')
    use(f'sqlite:///{tmp_path}/mlruns/mlflow.db')
    refused(training, f'{tmp_path}/mlruns cannot be written')


@contextmanager
def somebody(code, *words):
    "Another process that does something and waits."
    line = f'{code}; print(flush=True); sys.stdin.read()'
    other = subprocess.Popen([sys.executable, '-c', f'import sys; {line}', *map(str, words)], stdin=-1, stdout=-1)
    other.stdout.readline()
    try: yield
    finally: other.communicate()


def test_a_locked_database(database, refused, monkeypatch):
    monkeypatch.setattr(store_checks, 'PATIENCE', .3)
    lock = 'import sqlite3; found = sqlite3.connect(sys.argv[1]); found.execute("BEGIN {}")'
    with somebody(lock.format('EXCLUSIVE'), database):
        for call in (training, reading): refused(call, database, 'another process has locked')
    with somebody(lock.format('IMMEDIATE'), database):
        refused(training, 'another process has locked', 'wait for that process')
        with pytest.raises(CMRError, match='no run of that id'): reading()
    training()


def test_another_process_that_makes_the_store(database, refused, monkeypatch):
    database.unlink()
    monkeypatch.setattr(stores, 'PATIENCE', .2)
    lock = 'from filelock import FileLock; held = FileLock(sys.argv[1]); held.acquire()'
    with somebody(lock, database.parent/'.lock'):
        refused(training, 'another process has been making the store')


# ---- disks

def test_a_full_disk(use, refused, template, tmp_path):
    with mounted(tmp_path/'disk', 'size=1m') as disk:
        use(f'sqlite:///{disk}/new/mlflow.db')
        refused(training, 'its disk is full', 'make room')
        assert not list((disk/'new').iterdir())
    with mounted(tmp_path/'disk', 'size=1m') as disk:
        shutil.copy(template, disk)
        with (disk/'data').open('wb') as data:
            data.write(bytes(shutil.disk_usage(disk).free))
        use(f'sqlite:///{disk}/mlflow.db')
        refused(training, 'its disk is full', 'make room')
        with pytest.raises(CMRError, match='no run of that id'): reading()


def test_a_disk_that_can_only_be_read(use, refused, database, tmp_path):
    with start_run('x', 'someone') as run: log_metrics({'a': 1.})
    with mounted(tmp_path/'disk', 'size=9m') as disk:
        shutil.copy(database, disk)
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        use(f'sqlite:///{disk}/mlflow.db')
        assert find_run('someone').info.run_id == run.id
        refused(training, f'{disk} cannot be written (Read-only file system)')
        use(f'sqlite:///{disk}/mlruns/mlflow.db')
        refused(training, 'cannot be written (Read-only file system)')


def test_a_database_that_only_its_owner_may_write(database, refused):
    with start_run('x', 'someone') as run: pass
    database.chmod(0o444)
    bound = False
    if os.access(database, os.W_OK):  # for root
        bound = not subprocess.run(['mount', '--bind', database, database], capture_output=True).returncode
        if not bound: pytest.skip('root may write everywhere, and no disk can be mounted here')
        subprocess.run(['mount', '-o', 'remount,bind,ro', database], check=True)
    try:
        refused(training, 'the database can be read only', 'ask its owner for the right to write')
        assert find_run('someone').info.run_id == run.id
    finally:
        if bound: subprocess.run(['umount', '-l', database], check=True)


# ---- a store that was moved

@pytest.fixture
def trained(use, template, tmp_path):
    "A run with a checkpoint, in a store that is moved afterwards: its id."
    old, new, weights = tmp_path/'project'/'mlruns', tmp_path/'elsewhere'/'runs', tmp_path/'weights'
    for folder in (old, new.parent, weights): folder.mkdir(parents=True)
    shutil.copy(template, old)
    (weights/'w').write_text('w')
    use(f'sqlite:///{old}/mlflow.db')
    with start_run('x', 'trained') as run:
        log_config(dict(steps=3), 'train.')
        log_folder(weights)
    with start_run('x', 'untrained'): log_config(dict(steps=3), 'train.')
    old.rename(new)
    use(f'sqlite:///{new}/mlflow.db')
    stores._tell_moved.cache_clear()
    return run.id


def test_a_moved_store_is_found_and_told_once(trained, caplog, tmp_path):
    new = tmp_path/'elsewhere'/'runs'
    assert (resolve_run('trained')/'w').read_text() == 'w'
    assert resolve_run(trained) == new/'artifacts'/trained/'artifacts'/'checkpoint'
    assert [str(tmp_path/'project'/'mlruns'/'artifacts') in m and 'was moved' in m for m in caplog.messages] == [True]
    with pytest.raises(CMRError, match='has no checkpoint: its training ended before'): resolve_run('untrained')


def test_runs_write_into_the_present_folder(trained, tmp_path):
    import pandas as pd
    from cmr_diffusion.figures import Picture
    new, picture = tmp_path/'elsewhere'/'runs'/'artifacts', Picture(1, 1)
    for run_id in (trained, None):
        with start_run('x', run_id=run_id) as run:
            log_config(dict(size=1), 'model.')
            log_table(pd.DataFrame(dict(a=[1])), 'report')
            log_figure(picture, 'grid')
            log_figure(picture, 'samples/grid', step=2)
            log_folder(new.parent.parent.parent/'weights', 'other')
            assert run.folder == new/run.id/'artifacts'
        files = {f.relative_to(run.folder).parts[0] for f in run.folder.rglob('*') if f.is_file()}
        assert files >= {'config', 'report.csv', 'grid.png', 'images', 'other'}
    assert resolve_run(run.id, 'other').is_dir()
    assert not (tmp_path/'project'/'mlruns').exists()


def test_files_that_are_nowhere(trained, refused, tmp_path):
    new = tmp_path/'elsewhere'/'runs'/'artifacts'
    new.rename(tmp_path/'lost')
    old = tmp_path/'project'/'mlruns'/'artifacts'
    line = refused(lambda: resolve_run('trained'), f'are not in {old}/{trained}/artifacts', f'nor in {new}',
                   f'move the folder {trained} to {new}')
    assert 'train again' not in line
    (tmp_path/'lost').rename(new)
    assert resolve_run('trained').is_dir()


def test_files_that_are_lost_where_the_store_stayed(database, refused):
    with start_run('x', 'trained') as run: log_config(dict(steps=3), 'train.')
    shutil.rmtree(database.parent/'artifacts')
    assert 'train again' not in refused(lambda: resolve_run('trained'), f'move the folder {run.id} to')


def test_a_copied_store_does_not_write_into_its_original(trained, use, tmp_path):
    shutil.copytree(tmp_path/'elsewhere'/'runs', tmp_path/'project'/'mlruns')
    with start_run('x') as run: log_config(dict(a=1))
    assert run.folder.is_relative_to(tmp_path/'elsewhere'/'runs') and run.folder.is_dir()


def test_a_place_of_files_that_somebody_chose_is_kept(database, tmp_path):
    client = stores.open_client(stores.tracking_uri())
    for name in ('artifacts', 'files'): client.create_experiment(name, str(tmp_path/'big'/name))
    (tmp_path/'big').mkdir()
    for name in ('artifacts', 'files'):
        with start_run(name) as run: log_config(dict(a=1))
        assert run.folder.is_relative_to(tmp_path/'big'/name) and run.folder.is_dir()


# ---- finding runs

def test_names_with_every_sign(database, refused):
    names = ["it's", 'the "best"', '''"both's"''', '100 %', 'a_b', 'a\\b', '`x`', '"', 'x = 1 OR 1', '🫀', ' blank ']
    for name in names:
        with start_run('x', name) as run: pass
        assert find_run(name).info.run_id == run.id, name
    refused(lambda: find_run('the _best_'), 'no run of that id or name')
    refused(lambda: find_run('THE "BEST"'), 'no run of that id or name')


def test_runs_that_are_not_there(database, refused):
    for name in ('', ' ', '\t'):
        for call in (find_run, resolve_run): refused(lambda: call(name), 'is no name', 'give a run id, a run name')
    for name in ('nobody', '~nobody', 'x'*300, 'a\nb', '"', '%'):
        refused(lambda: resolve_run(name), 'no run of that id or name', 'give a run id, a run name')
    for call in (find_run, resolve_run, lambda name: start_run(run_id=name).__enter__()):
        refused(lambda: call('0'*32), 'no run of that id is in')


def test_deleted_runs_and_experiments(database, refused):
    with start_run('x', 'gone') as run: log_config(dict(a=1))
    run.client.delete_run(run.id)
    for call in (find_run, resolve_run, lambda name: start_run(run_id=name).__enter__()):
        refused(lambda: call(run.id), 'was deleted', f'mlflow runs restore --run-id {run.id}')
    refused(lambda: find_run('gone'), 'no run of that id or name')
    experiment = run.client.get_experiment_by_name('x').experiment_id
    run.client.delete_experiment(experiment)
    refused(lambda: start_run('x').__enter__(), "experiment 'x' was deleted", f'--experiment-id {experiment}')


def test_asking_makes_no_store(use, refused, tmp_path):
    use('')
    refused(lambda: find_run('someone'), 'no run of that id or name is in', tmp_path)
    check_store()
    assert not list(tmp_path.iterdir())


# ---- the life of a run

def test_a_failed_run_says_why(database):
    for error in (CMRError('the loss is not finite'), ValueError('of\nsome kind')):
        with pytest.raises(type(error)), start_run('x') as run: raise error
        info = find_run(run.id)
        assert info.info.status == 'FAILED'
        assert info.data.tags['reason'].endswith(' '.join(str(error).split()))
    with start_run(run_id=run.id): pass
    assert find_run(run.id).info.status == 'FINISHED' and 'reason' not in find_run(run.id).data.tags


def test_a_store_that_breaks_hides_no_error(database, caplog, capfd):
    with pytest.raises(ValueError, match='mine'), start_run('x'):
        with sqlite3.connect(database) as found: found.execute('DROP TABLE runs')
        found.close()
        with pytest.raises(CMRError, match='MLflow store .*no such table: runs'): log_metrics({'a': 1.})
        raise ValueError('mine')
    assert any('stays open' in m for m in caplog.messages) and 'Traceback' not in ''.join(capfd.readouterr())


# ---- commands

def command(name, *words, **environment):
    env = {name: value for name, value in os.environ.items() if name != 'IN_TEST'} | environment
    script = Path(sys.executable).with_name(name)
    return subprocess.run([script, *map(str, words)], env=env, capture_output=True, text=True, timeout=60)


def test_a_training_asks_before_it_makes_a_network(database, refused, monkeypatch):
    from cmr_diffusion.grid.cache import CohortCache
    from cmr_diffusion.training import learner
    database.write_text('This is a letter.')
    monkeypatch.setattr(learner, 'config_learner', None)
    cache, config = object.__new__(CohortCache), learner.TrainConfig(steps=1)
    refused(lambda: learner.train(cache, config, device='cpu'), 'is not an SQLite database')


def test_a_command_prints_one_line(tmp_path):
    uri = 'http://127.0.0.1:1'
    done = command('cmr_sample', 'someone', '--masks', tmp_path, tmp_path/'out', MLFLOW_TRACKING_URI=uri)
    assert (done.returncode, done.stdout) == (2, '')
    assert len(done.stderr.splitlines()) == 1 and f'cmr_sample: MLflow store {uri}: no server answers' in done.stderr


def test_a_process_prints_nothing_else(database):
    "Everything that is loud without us, in one process: junk, a locked database, a dead server, a good store."
    junk = database.with_name('junk.db')
    junk.write_text('This is a letter. '*100)
    script = """
import os, sqlite3, sys
from cmr_diffusion import store_checks, tracking
store_checks.PATIENCE = .3
held = sqlite3.connect(sys.argv[2])
held.execute('BEGIN EXCLUSIVE')
for uri in (f'sqlite:///{sys.argv[1]}', f'sqlite:///{sys.argv[2]}', 'http://127.0.0.1:1'):
    os.environ['MLFLOW_TRACKING_URI'] = uri
    try: tracking.check_store(write=True)
    except tracking.CMRError as e: print(e)
held.rollback()
os.environ['MLFLOW_TRACKING_URI'] = f'sqlite:///{sys.argv[2]}'
with tracking.start_run('x'): tracking.log_metrics({'loss': 1.})
"""
    done = subprocess.run([sys.executable, '-c', script, junk, database], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    junk_line, locked_line, dead_line = done.stdout.splitlines()
    assert 'is not an SQLite' in junk_line and 'has locked' in locked_line and 'no server answers' in dead_line
