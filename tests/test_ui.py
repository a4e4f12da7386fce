"""Two tiny runs are compared in MLflow's user interface in a real browser, as a person does it."""
import importlib.util, os, re, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('screenshots', ROOT/'docs'/'screenshots.py')
screenshots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshots)
until = screenshots.until

NAMES = 'first', 'second'
STEPS = 40, 80


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def grid(number):
    "A grid of samples of the size that a training logs; its grey says which run it is of."
    from cmr_diffusion.figures import image_grid
    image = np.random.default_rng(number).random((48, 48))
    return image_grid([[image] * 4] * 3, names=('label map', 'painted', 'outlines'), cell=1.8)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "A store with two runs that logged what a training logs, by the same functions."
    from cmr_diffusion.about import describe, log_cohort
    from cmr_diffusion.tracking import log_figure, log_metrics, log_parameters, start_run
    folder, ids = tmp_path_factory.mktemp('ui').resolve(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('IN_TEST', raising=False)
        patch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{folder}/mlruns/mlflow.db')
        for number, name in enumerate(NAMES):
            with start_run('pictures', name) as run:
                log_parameters(dict(preset='tiny', steps=80, seed=number))
                describe('Training', f'The network of {name} learns.')
                log_cohort('a1b2', 16, dict(T1=48), dict(train=48))
                log_figure(grid(number), 'samples/grid', 0)
                for step in STEPS:
                    names = 'training', 'validation', 'validation_shuffled_masks'
                    log_metrics({f'loss/{name}': number + 1 / step for name in names}, step)
                    log_figure(grid(10 * step + number), 'samples/grid', step)
            ids.append(run.id)
        yield folder, run.experiment_id, ids


@pytest.fixture(scope='module')
def served(store):
    "`cmr_ui` on that store: the page that it says to open, the process, and what it says."
    folder, port = store[0], free_port()
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'SSH_CONNECTION')}
    env['MLFLOW_TRACKING_URI'] = f'sqlite:///{folder}/mlruns/mlflow.db'
    said = folder/'said'
    with said.open('w') as file:
        line = [Path(sys.executable).with_name('cmr_ui'), '--port', str(port)]
        process = subprocess.Popen(line, env=env, cwd=folder, stdout=file, stderr=file)
    try:
        until(lambda: 'open http' in said.read_text() or process.poll() is not None, 'the address of the page', 180)
        assert process.poll() is None, said.read_text()
        yield re.search(r'open (http\S+)', said.read_text())[1], process, said
    finally:
        if process.poll() is None: process.terminate()  # which ends the server, too
        process.wait(60)


@pytest.fixture(scope='module')
def window(served):
    if not screenshots.is_there(): pytest.skip(screenshots.MISSING)
    with screenshots.browser() as found: yield found


def test_the_command_says_what_it_waits_for_and_what_to_open(store, served):
    page, _, said = served
    lines = said.read_text().splitlines()
    assert lines[0].startswith('waiting for the MLflow server') and lines[-1] == 'Ctrl-C ends it'
    assert page.endswith(f'/#/experiments/{store[1]}/runs?workflowType=machine_learning&compareRunsMode=CHART')


def test_the_page_of_runs(served, window):
    screenshots.open_runs(window, served[0], NAMES)
    text = screenshots.text_of(window)
    order = [text.index(name) for name in ('loss/training', 'loss/validation', 'samples/grid')]
    assert order == sorted(order)  # the losses come first
    assert 'seed=0' in text and 'seed=1' in text  # the caption of each grid
    for natural, width in screenshots.grids(window): assert natural >= 500 and width > 150


def test_a_grid_at_every_step(served, window):
    screenshots.open_runs(window, served[0], NAMES)
    def step_shown():
        sources = 'return [...document.images].map(i => i.src).filter(s => s.includes("get-artifact"))'
        return {int(re.search(r'step(?:%2B|\+)(\d+)', s)[1]) for s in window.execute_script(sources)}
    until(lambda: step_shown() == {0}, 'the grids of step 0')
    for step in STEPS:
        assert screenshots.next_step(window)
        until(lambda: step_shown() == {step}, f'the grids of step {step}')
    assert not screenshots.next_step(window)


def test_the_page_that_compares(store, served, window):
    from cmr_diffusion.ui import compare_page
    window.get(compare_page(served[0].partition('/#')[0], store[1], store[2]))
    until(lambda: all(word in screenshots.text_of(window) for word in (*NAMES, 'seed', 'loss/validation')), 'both runs')
    until(lambda: screenshots.lines_drawn(window), 'a chart')


def test_the_page_of_a_run(store, served, window):
    from cmr_diffusion.ui import run_page
    window.get(run_page(served[0].partition('/#')[0], store[1], store[2][0]))
    told = 'The network of first learns.', 'T1 of 16 patients', 'loss/training'
    until(lambda: all(word in screenshots.text_of(window) for word in told), 'description, cohort and losses')


def test_the_same_store_is_served_once(store, served):
    page, port = served[0], re.search(r':(\d+)/', served[0])[1]
    env = os.environ | dict(MLFLOW_TRACKING_URI=f'sqlite:///{store[0]}/mlruns/mlflow.db')
    env.pop('IN_TEST', None)
    line = [Path(sys.executable).with_name('cmr_ui'), '--port', port]
    again = subprocess.run(line, env=env, cwd=store[0], capture_output=True, text=True, timeout=180)
    assert again.returncode == 0 and 'is on port' in again.stdout + again.stderr and page in again.stdout + again.stderr


def test_a_port_that_another_program_uses(store):
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        env = os.environ | dict(MLFLOW_TRACKING_URI=f'sqlite:///{store[0]}/mlruns/mlflow.db')
        env.pop('IN_TEST', None)
        line = [Path(sys.executable).with_name('cmr_ui'), '--port', str(port)]
        done = subprocess.run(line, env=env, cwd=store[0], capture_output=True, text=True, timeout=180)
    said = done.stderr.splitlines()
    assert done.returncode == 2 and len(said) == 1
    assert f'--port {port}: another program uses it' in said[0] and 'or give --port' in said[0]


def test_ctrl_c_ends_the_server(served):
    page, process, said = served
    port = int(re.search(r':(\d+)/', page)[1])
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and 'the runs are kept' in said.read_text()
    time.sleep(.5)
    with socket.socket() as asked: assert asked.connect_ex(('127.0.0.1', port)) != 0
    assert 'Traceback' not in said.read_text()
