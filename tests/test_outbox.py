"""What is logged to a server of MLflow arrives once and in order, whatever happens to the server or to the process."""
import http.server, json, os, shutil, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cmr_diffusion import outbox, sender, store_checks, stores, tracking
from cmr_diffusion.core import CMRError
from cmr_diffusion.left_runs import process_tags
from cmr_diffusion.outbox import Outbox, something_waits, sync_pending
from cmr_diffusion.registry import register
from cmr_diffusion.tracking import (
    check_store, find_run, log_config, log_figure, log_folder, log_metrics, log_tags, open_run, resolve_run,
    staging_folder, start_run)
from cmr_diffusion.ui import run_address


class Picture:
    "A figure that is drawn at once."
    def savefig(self, target, format='png'):
        from PIL import Image
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(target, format)


class Server:
    "A server of MLflow on this machine, which can be killed and started again."
    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.port = free.getsockname()[1]
        self.uri = f'http://127.0.0.1:{self.port}'

    def start(self):
        line = [Path(sys.executable).with_name('mlflow'), 'server', '--port', str(self.port), '--workers', '1',
                '--backend-store-uri', f'sqlite:///{self.folder}/server.db']
        env = os.environ | dict(MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false')
        env.pop('MLFLOW_TRACKING_URI', None)
        with open(self.folder/'log', 'a') as log:
            options = dict(env=env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
            self.process = subprocess.Popen(line, **options)

    def answers(self):
        with socket.socket() as asked: return asked.connect_ex(('127.0.0.1', self.port)) == 0

    def wait(self):
        while not self.answers(): time.sleep(.05)

    def kill(self):
        if self.process is None: return
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


@pytest.fixture(scope='module')
def mlflow_server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp('server'))
    found.start()
    found.wait()
    yield found
    found.kill()


@pytest.fixture
def server(mlflow_server, monkeypatch, tmp_path):
    "That server, up and in use, and a queue of its own."
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('MLFLOW_TRACKING_URI', mlflow_server.uri)
    monkeypatch.chdir(tmp_path)
    if mlflow_server.process is None: mlflow_server.start()
    mlflow_server.wait()
    return mlflow_server


@pytest.fixture
def local(monkeypatch, template, tmp_path):
    "A local store in a folder of its own."
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mlruns').mkdir()
    shutil.copy(template, tmp_path/'mlruns')
    return tmp_path/'mlruns'


class Watch:
    "The longest time that a call took."
    longest = 0.
    @contextmanager
    def __call__(self):
        start = time.monotonic()
        yield
        self.longest = max(self.longest, time.monotonic() - start)


def log_step(step, watch=Watch()):
    "What a training logs at a step: three numbers, a picture every twenty steps, a checkpoint every fifty."
    with watch(): log_metrics({'loss': 1/(step + 1), 'speed': float(step), 'step': step}, step)
    if step % 20 == 0:
        with watch(): log_figure(Picture(), 'samples/grid', step)
    if step % 50 == 0:
        with staging_folder() as folder:
            (folder/'step').write_text(str(step))
            with watch(): log_folder(folder)


def check_run(run_id, steps):
    "All that was logged at the steps is in the store once, and in order; return MLflow's run."
    run, client = find_run(run_id), stores.open_client(stores.tracking_uri())
    for name in ('loss', 'speed', 'step'):
        points = client.get_metric_history(run_id, name)
        assert [m.step for m in points] == list(range(steps)), name
        assert [m.timestamp for m in points] == sorted(m.timestamp for m in points)
    assert [m.value for m in client.get_metric_history(run_id, 'loss')] == [1/(s + 1) for s in range(steps)]
    names = [Path(f.path).name for f in client.list_artifacts(run_id, 'images')]
    for ending in ('.png', '.webp'):
        assert sorted(int(n.split('+')[2]) for n in names if n.endswith(ending)) == list(range(0, steps, 20))
    assert (resolve_run(run_id)/'step').read_text() == str((steps - 1)//50*50)
    return run


LOGGING = '''
import os, sys, time
sys.path.insert(0, sys.argv[1])
from test_outbox import *
with start_run('outbox', sys.argv[2]) as run:
    print(run.id, flush=True)
    step = 0
    while not os.path.exists('stop'):
        log_step(step)
        step += 1
        with open('steps', 'w') as file: file.write(str(step))
        time.sleep(.05)
'''

def logging_process(folder, name):
    "Another process that logs until there is a file `stop`: process and run id."
    folder.mkdir()
    words = [sys.executable, '-c', LOGGING, str(Path(__file__).parent), name]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=open(folder/'errors', 'w'), text=True)
    return process, process.stdout.readline().strip()


# ---- a server that goes away

def test_a_server_that_is_killed_for_ten_seconds(server, monkeypatch, caplog, tmp_path):
    "MLflow's own retries are over long before."
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '1')
    watch, step, killed, started = Watch(), 0, None, False
    with start_run('outbox', 'away') as run:
        page = f'/#/experiments/{run.experiment_id}/runs/{run.id}?workflowType=machine_learning'
        assert run.folder is None and run_address(run) == f'{server.uri}{page}'
        with watch(): log_config(dict(size=32, model=dict(width=8)), 'train.')
        with watch(): log_tags(cache='a1b2')
        while killed is None or time.monotonic() - killed < 12 or not server.answers():
            log_step(step, watch)
            step += 1
            time.sleep(.05)
            if step == 30:
                server.kill()
                killed = time.monotonic()
            if killed and not started and time.monotonic() - killed > 10: started = server.start() is None
    assert watch.longest < 1, watch.longest
    found = check_run(run.id, step)
    assert found.info.status == 'FINISHED' and found.data.params == {'train.size': '32', 'train.model.width': '8'}
    assert found.data.tags['cache'] == 'a1b2'
    assert [('no server answers' in m, 'is back' in m) for m in caplog.messages if 'MLflow store' in m] == [
        (True, False), (False, True)]
    assert not list((tmp_path/'mlruns'/'pending').iterdir())


def test_a_server_that_does_not_come_back(server, monkeypatch, caplog, tmp_path):
    "A run ends without its server, and another process is killed; what they left is sent when the server is there."
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '1')
    monkeypatch.setattr(sender, 'GRACE', 1)
    other, other_id = logging_process(tmp_path/'other', 'killed')
    steps = tmp_path/'other'/'steps'
    while not steps.exists() or int(steps.read_text() or 0) < 30: time.sleep(.02)
    with start_run('outbox', 'unsent') as run:
        for step in range(20): log_step(step)
        server.kill()
        for step in range(20, 110): log_step(step)
        end = time.monotonic()
    assert time.monotonic() - end < 5
    assert f'entries wait in {tmp_path}/mlruns/pending/{run.id}' in caplog.text and 'cmr_sync' in caplog.text
    other.kill()
    other.wait()
    waits = sync_pending()
    assert something_waits()
    assert f'run unsent ({run.id}): ' in waits
    assert f'entries wait in {tmp_path}/mlruns/pending/{run.id}: MLflow store' in waits
    server.start()
    server.wait()
    said = sync_pending()
    assert f'run unsent ({run.id}): ' in said and f'entries sent to {server.uri}' in said
    found = check_run(run.id, 110)
    assert found.info.status == 'FINISHED' and found.info.end_time/1000 < time.time() - 1
    assert sync_pending() == f'nothing waits in {tmp_path}/mlruns/pending'
    monkeypatch.chdir(tmp_path/'other')
    left = Outbox(server.uri, other_id, 'killed').entries()
    assert left
    found = find_run('killed')  # any command that uses the store sends what was left, and closes the run
    done = max(m.step for m in stores.open_client(server.uri).get_metric_history(other_id, 'loss')) + 1
    assert done >= int(steps.read_text() or 0)
    found = check_run(other_id, done)
    assert (found.info.status, 'its process is gone' in found.data.tags['cmr.note']) == ('KILLED', True)
    assert not list((tmp_path/'other'/'mlruns'/'pending').iterdir())


def test_a_server_that_is_silent(server, monkeypatch, tmp_path):
    "It takes the connection and says nothing: the end of the run does not wait for what MLflow waits for, two minutes."
    monkeypatch.setattr(sender, 'GRACE', .5)
    with monkeypatch.context() as patch, start_run('outbox', 'silent') as run:
        log_step(0)
        os.killpg(server.process.pid, signal.SIGSTOP)
        try:
            patch.setattr(store_checks, 'PATIENCE', .3)
            for step in range(1, 30): log_step(step)
            end = time.monotonic()
            run_closed = sender.sender_of(run.id)
            run_closed.close()
            assert time.monotonic() - end < 10
        finally: os.killpg(server.process.pid, signal.SIGCONT)
    while not sync_pending().startswith('nothing waits'): time.sleep(.1)
    check_run(run.id, 30)
    assert not list((tmp_path/'mlruns'/'pending').iterdir())


def test_a_kill_between_sending_and_removing(server, monkeypatch):
    "Everything is sent a second time by a process that does not know that it was sent."
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, 'remove', lambda self, folder: None)
        patch.setattr(sender, 'GRACE', .2)
        patch.setattr(sender.Sender, 'problem', lambda self: 'x')
        with start_run('outbox', 'twice') as run:
            for step in range(60): log_step(step)
            log_config(dict(a=1))
            sent = Outbox(server.uri, run.id, '')
            deadline = time.monotonic() + 20
            while 'step' not in find_run(run.id).data.metrics and time.monotonic() < deadline: time.sleep(.05)
    assert len(sent.entries()) > 60
    sync_pending()
    assert check_run(run.id, 60).data.params == {'a': '1'}


# ---- a server that refuses

def test_what_a_server_refuses_is_set_aside(server, caplog, tmp_path):
    with start_run('outbox', 'refused') as run:
        log_step(0)
        run.client.log_param(run.id, 'a', 1)
        run.client.log_param(run.id, 'a', 2)
        log_metrics({'bad?name': 1.}, 1)
        for step in range(1, 5): log_step(step)
    check_run(run.id, 5)
    refused = tmp_path/'mlruns'/'pending'/run.id/'refused'
    assert len(list(refused.glob('*/reason.txt'))) == 2
    assert [f'it is kept in {refused}' in m for m in caplog.messages if 'refuses' in m] == [True]
    assert sync_pending().startswith('nothing waits')


@pytest.fixture
def strict(monkeypatch, tmp_path):
    "A web server that gives one answer to everything."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get('Content-Length', 0)))
            self.server.asked += 1
            self.send_response(self.server.code)
            self.end_headers()
            self.wfile.write(b'{}')
        do_GET = do_POST
        def log_message(self, *args): pass
    found = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    found.asked, found.code = 0, 200
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'http://me:secret@127.0.0.1:{found.server_port}')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    monkeypatch.chdir(tmp_path)
    yield found
    found.shutdown()
    found.server_close()


def test_a_server_that_lets_nobody_in(strict, caplog, tmp_path):
    "Nothing is lost and nothing goes round in circles; the password is not on the disk."
    strict.code = 401
    found = sender.start_sender(stores.tracking_uri(), '0'*32, 'secret')
    for step in range(5): found.client.log_metric('0'*32, 'loss', 1., step=step)
    time.sleep(1.5)
    asked = strict.asked
    assert asked < 10 and found.waiting() == 5
    sender.GRACE, grace = .1, sender.GRACE
    try: found.close()
    finally: sender.GRACE = grace
    assert 'it answers 401' in caplog.text and 'MLFLOW_TRACKING_USERNAME' in caplog.text
    assert 'secret@' not in caplog.text
    assert not any(b'secret@' in f.read_bytes() for f in (tmp_path/'mlruns'/'pending').rglob('*') if f.is_file())
    assert 'it answers 401' in sync_pending()
    strict.code = 200
    assert '5 entries sent to' in sync_pending()


def test_an_error_of_the_server_is_tried_five_times(strict, monkeypatch):
    box = Outbox(stores.tracking_uri(), '0'*32, 'poison')
    box.put('log_batch', metrics=[['loss', 1., 1, 1]])
    box.put('set_terminated', status='FINISHED', end_time=1)
    def fail(*values, **options): raise RuntimeError('out of order')
    monkeypatch.setattr(stores.open_client(box.uri), 'log_batch', fail, raising=False)
    waiting = []
    while box.entries():
        box.send()
        waiting.append(len(box.entries()))
    assert waiting == [2]*(outbox.TRIES - 1) + [0]


# ---- the queue

def test_the_newest_checkpoint_replaces_an_unsent_one(strict, tmp_path):
    strict.code = 503
    found = sender.start_sender(stores.tracking_uri(), '0'*32, 'slow')
    (tmp_path/'weights').mkdir()
    for step in range(4):
        (tmp_path/'weights'/'w').write_text(str(step))
        found.client.log_artifacts('0'*32, str(tmp_path/'weights'), 'checkpoint')
    queued = [(f/'files'/'checkpoint'/'w').read_text() for f in found.box.entries()]
    assert queued[-1] == '3' and len(queued) <= 2  # one may be on its way
    found.stop.set()
    found.closing.set()
    found.wake.set()


def test_a_full_disk_ends_the_training_in_one_line(strict, tmp_path):
    disk = tmp_path/'mlruns'/'pending'
    disk.mkdir(parents=True)
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', disk], capture_output=True)
    if made.returncode: pytest.skip('a disk cannot be mounted here: this needs root')
    try:
        box = Outbox(stores.tracking_uri(), '0'*32, 'full')
        with pytest.raises(CMRError) as told:
            for step in range(1000): box.put('log_batch', metrics=[['loss', 1., 1, step]]*50)
        assert 'No space left' in str(told.value) and 'resume the run' in str(told.value)
        assert len(str(told.value).splitlines()) == 1
        whole = [json.loads((folder/'entry.json').read_text()) for folder in box.entries()]
        assert whole and len(list(box.folder.iterdir())) == len(whole)
    finally: subprocess.run(['umount', '-l', disk], check=True)


# ---- the local store

def test_a_locked_database_does_not_end_a_training(local):
    lock = 'import sqlite3, sys, time; d = sqlite3.connect(sys.argv[1]); d.execute("BEGIN EXCLUSIVE"); print(); ' \
           'sys.stdout.flush(); time.sleep(3); d.rollback()'
    with start_run('local', 'locked') as run:
        log_step(0)
        other = subprocess.Popen([sys.executable, '-c', lock, local/'mlflow.db'], stdout=subprocess.PIPE)
        other.stdout.readline()
        log_step(1)
        other.wait()
    check_run(run.id, 2)
    assert not (local/'pending').exists()


@pytest.mark.parametrize('where', ['local', 'server'])
def test_a_resumed_run_logs_nothing_twice(request, where):
    request.getfixturevalue(where)
    with pytest.raises(KeyboardInterrupt), start_run('resume') as run:
        for step in range(45): log_step(step)
        raise KeyboardInterrupt
    with start_run(run_id=run.id, resume=True):
        for step in range(30, 70): log_step(step)
    found = check_run(run.id, 70)
    assert found.info.status == 'FINISHED'
    assert {name: found.data.tags[name] for name in process_tags()} == process_tags()


def test_runs_of_dead_processes_are_closed(local):
    script = '''
import os, sys
import mlflow
from cmr_diffusion.tracking import log_metrics, start_run
child = os.fork()
if child: os.waitpid(child, 0)
with start_run('dead') as run:
    log_metrics({'loss': 1.}, 1)
    print(run.id, flush=True)
    if not child: os.kill(os.getpid(), 9)
    sys.stdin.read()
'''
    alive = subprocess.Popen([sys.executable, '-c', script], stdin=-1, stdout=-1, text=True)
    killed, alive_id = [alive.stdout.readline().strip() for _ in range(2)]
    with start_run('dead', 'elsewhere') as other: pass
    other.client.set_tag(other.id, 'cmr.host', 'elsewhere')
    other.client.set_tag(other.id, 'cmr.pid', '1')
    other.client.update_run(other.id, status='RUNNING')
    check_store()
    found = find_run(killed)
    assert (found.info.status, 'its process is gone' in found.data.tags['cmr.note']) == ('KILLED', True)
    assert [find_run(name).info.status for name in (alive_id, other.id)] == ['RUNNING']*2
    with start_run(run_id=killed, resume=True):
        again = find_run(killed)
        assert again.info.status == 'RUNNING' and 'cmr.note' not in again.data.tags
    alive.communicate('')
    assert find_run(alive_id).info.status == 'FINISHED'


# ---- several processes

def test_only_the_main_process_logs(local, monkeypatch):
    "What the others do; tests/test_distributed.py has real ones."
    with start_run('several', 'both') as main: log_step(0)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, 'is_main', lambda: False)
        patch.setattr(tracking, 'from_main', lambda value: (main, ''))
        with start_run('several', 'both') as run:
            assert run == open_run() == main and run.folder == main.folder
            for step in (0, 1): log_step(step)
            log_config(dict(rank=1))
            log_tags(rank=1)
        patch.setattr(tracking, 'from_main', lambda value: (None, 'MLflow store x: no server answers'))
        with pytest.raises(CMRError, match='no server answers'), start_run(): pass
    assert 'rank' not in check_run(main.id, 1).data.tags


def test_all_processes_are_told_that_no_run_began(local, monkeypatch):
    told = []
    monkeypatch.setattr(tracking, 'from_main', told.append)
    with pytest.raises(CMRError), start_run(run_id='0'*32): pass
    assert told[0][0] is None and 'no run of that id' in told[0][1]


# ---- a server at rest

def test_a_server_of_mlflow(server, tmp_path):
    with start_run('x', 'trained') as run, staging_folder() as folder:
        (folder/'w').write_text('w')
        log_folder(folder)
    with start_run('x', 'untrained'): log_config(dict(steps=3))
    assert run.folder is None and find_run('trained').info.run_id == run.id
    assert (resolve_run('trained')/'w').read_text() == 'w'
    with pytest.raises(CMRError, match='train again'): resolve_run('untrained')
    with pytest.raises(CMRError, match='no run of that id'): find_run('0'*32)
    assert register('trained', 'heart', 'champion') == 'models:/heart/1'
    for name in ('models:/heart@champion', 'models:/heart/1', 'models:/heart/latest'):
        assert (resolve_run(name)/'w').read_text() == 'w'
    with pytest.raises(CMRError, match='has no alias best'): resolve_run('models:/heart@best')
    with pytest.raises(CMRError, match='no model nobody'): resolve_run('models:/nobody/1')
    with pytest.raises(CMRError, match='has no checkpoint'): register('untrained', 'heart')


def test_runs_on_a_server_are_compared(server, tmp_path):
    "Settings, losses, grids and evaluations come from the server, and none of their files stays here."
    import tempfile
    from cmr_diffusion.evaluation.compare import compare_runs
    ids = []
    for rate in (1e-3, 4e-4):
        with start_run('compare', f'rate {rate}') as run:
            log_config(dict(learning_rate=rate), 'train.')
            for step in (0, 20):
                log_metrics({'loss/training': rate * step}, step)
                log_figure(Picture(), 'samples/grid', step)
        ids.append(run.id)
    kept = set(Path(tempfile.gettempdir()).iterdir())
    made = compare_runs(*ids)
    assert made.step == 20 and all(pixels.shape == (8, 8, 3) for pixels, _ in made.pictures.values())
    assert made.settings.loc['training', 'learning rate'].to_list() == ['0.001', '0.0004']
    assert [curve.training.to_list() for curve in made.curves.values()] == [[0, 20 * rate] for rate in (1e-3, 4e-4)]
    assert 'Evaluation: no run has one' in made.text()
    assert set(Path(tempfile.gettempdir()).iterdir()) <= kept
