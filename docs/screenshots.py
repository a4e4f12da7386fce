"""The pictures of MLflow's user interface in the documentation: `make screenshots`.

Two small networks are trained on a phantom cohort, the user interface is served on this machine alone, and Debian's
chromium takes the pictures. It needs the packages `chromium` and `chromium-driver`, and selenium."""
import argparse, json, os, shutil, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MISSING = 'no browser here: apt-get install chromium chromium-driver, and pip install selenium'
PATIENCE = 90  # seconds that a page is given
SHOWN = ("const all = [...document.images].filter(i => i.src.includes('get-artifact') && i.naturalWidth > 300);"
         "return all.map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
TO_TOP = "for (const part of document.querySelectorAll('*')) part.scrollTop = 0"
CHARTS = ("return [...document.querySelectorAll('.js-plotly-plot')].map(p => [p.querySelectorAll('.js-line').length,"
          " p.closest('[data-testid]')?.textContent || p.textContent])")


def is_there():
    "Whether chromium, its driver and selenium are installed."
    try: import selenium  # noqa: F401
    except ImportError: return False
    return bool(shutil.which('chromium') and shutil.which('chromedriver'))


@contextmanager
def browser(width=1400, height=1000):
    "A window of chromium that nobody sees and that keeps nothing."
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    options = ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for word in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'disable-quic', 'no-first-run',
                 'disable-background-networking', 'disable-component-update', 'disable-sync', 'hide-scrollbars',
                 f'window-size={width},{height}'):
        options.add_argument(f'--{word}')
    window = Chrome(options=options, service=Service(shutil.which('chromedriver')))
    window.set_page_load_timeout(PATIENCE)
    try: yield window
    finally: window.quit()


def until(question, what, patience=PATIENCE):
    "Ask until the answer is true, and return it."
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if answer := question(): return answer
        time.sleep(.3)
    raise TimeoutError(f'not within {patience} seconds: {what}')


def text_of(window):
    "What a person can read on the page."
    return window.execute_script('return document.body.innerText')


def close_assistant(window):
    "Close MLflow's assistant, which opens by itself at the first visit and covers a quarter of the page."
    close = '[data-component-id="mlflow.assistant.chat_panel.close"]'
    for button in window.find_elements('css selector', close): window.execute_script('arguments[0].click()', button)


def grids(window):
    "The sample grids that have been loaded on the page: pixels of the file, pixels on the page."
    return window.execute_script(SHOWN)


def lines_drawn(window):
    "How many lines each chart of the page has."
    return [n for n, _ in window.execute_script(CHARTS)]


def open_runs(window, page, names, charts=3):
    "Open the page of runs, and wait until it shows these runs, charts of as many lines, and a sample grid of each."
    window.get(page)
    until(lambda: all(name in text_of(window) for name in names), f'the names of the runs on {page}')
    close_assistant(window)
    until(lambda: sum(n >= len(names) for n in lines_drawn(window)) >= charts, 'charts with a line of each run')
    until(lambda: len(grids(window)) >= len(names), 'a sample grid of each run')


def train_two(folder, steps, init):
    "Train two small networks on a phantom cohort, perhaps from a checkpoint; return the ids of their runs."
    from cmr_diffusion import Geometry, TrainConfig, make_phantom, prepare, read_cohort, train
    table = read_cohort(make_phantom(folder/'phantom', patients=6), seed=0)
    cache, ids = prepare(table, folder/'cache', Geometry(48, (2., 3.), 'heart', 2)), []
    for name, rate in {'rate 0.001': 1e-3, 'rate 0.0002': 2e-4}.items():
        config = TrainConfig('tiny', steps=steps, batch_size=4, learning_rate=rate, warmup=20, checks=5)
        ids.append(train(cache, config, 'phantom', name, init, device='cpu')[0])
    return ids


def take(folder, out):
    "Take the pictures of the two runs of a store in `folder`."
    from PIL import Image
    from cmr_diffusion.ui import experiment_shown, is_free, runs_page, ui_server
    from cmr_diffusion.runs import find_run
    from cmr_diffusion.stores import open_client, tracking_uri
    port = next(n for n in range(5050, 5150) if is_free(n))
    ids = json.loads((folder/'ids.json').read_text())
    names, experiment = [find_run(run_id).info.run_name for run_id in ids], experiment_shown('phantom')
    for run_id, colour in zip(ids, ('#d55e00', '#0072b2')):  # else MLflow takes any, perhaps the same twice
        open_client(tracking_uri()).set_tag(run_id, 'mlflow.runColor', colour)
    with ui_server(port) as (address, _), browser(1760, 1300) as window:
        open_runs(window, runs_page(address, experiment), names)
        while next_step(window): pass
        window.execute_script(TO_TOP)
        time.sleep(3)  # the last animation
        window.save_screenshot(folder/'ui_runs.png')
        grids_side_by_side(window)
        time.sleep(3)
        window.save_screenshot(folder/'ui_compare.png')
    for name in ('ui_runs.png', 'ui_compare.png'):
        picture = Image.open(folder/name).convert('RGB')
        picture.thumbnail((1400, 1400))
        picture.quantize(200, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out/name, optimize=True)
        print(out/name, f'{(out/name).stat().st_size // 1000} KB')


def next_step(window):
    "Move the slider of the sample grid to its next step; False where it is at the last one."
    from selenium.webdriver import Keys
    slider, = window.find_elements('css selector', '[role=slider]')
    now, last = (float(slider.get_attribute(f'aria-value{which}')) for which in ('now', 'max'))
    if now >= last: return False
    slider.send_keys(Keys.ARROW_RIGHT)  # the slider knows no other keys than the arrows
    until(lambda: float(slider.get_attribute('aria-valuenow')) > now, 'the next step of the slider')
    until(lambda: grids(window), 'the sample grids of this step')
    return True


def grids_side_by_side(window):
    "Show the chart of the sample grids in the whole window, as its button for the full screen does."
    card = "//*[normalize-space(text())='samples/grid']/ancestor::*[.//*[@role='slider']][1]"
    for button in window.find_element('xpath', card).find_elements('css selector', 'button'):
        if 'fullscreen' in (button.get_attribute('data-component-id') or button.get_attribute('outerHTML')).lower():
            window.execute_script('arguments[0].click()', button)
            break
    else: raise LookupError('this MLflow has no button for the full screen')
    until(lambda: sum(shown > 400 for _, shown in grids(window)) > 1, 'two large grids')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT/'docs', help='folder of the pictures')
    parser.add_argument('--work', type=Path, help='folder to work in, and to find the trainings of an earlier call in')
    parser.add_argument('--steps', type=int, default=400, help='of each training: 400 take ten minutes on two cores')
    parser.add_argument('--init', help='checkpoint of a network of the preset tiny that the trainings begin with')
    options = parser.parse_args()
    if not is_there(): sys.exit(MISSING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.pop('IN_TEST', None)
        os.environ['MLFLOW_TRACKING_URI'] = f'sqlite:///{folder}/mlruns/mlflow.db'
        if not (folder/'ids.json').exists():
            (folder/'ids.json').write_text(json.dumps(train_two(folder, options.steps, options.init)))
        take(folder, options.out)


if __name__ == '__main__': main()
