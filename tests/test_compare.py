"Runs side by side: what is read of them, who is called better, and the page."
import json
from itertools import permutations

import numpy as np
import pandas as pd
import pytest

import cmr_diffusion
from cmr_diffusion.core import CMRError
from cmr_diffusion.evaluation.compare import compare_runs
from cmr_diffusion.evaluation.differences import settings_that_differ
from cmr_diffusion.evaluation.outcomes import ALONE, APART, figures_of, outcome, outcomes, SAME, SHOWN, UNKNOWN
from cmr_diffusion.evaluation.overlap import Part
from cmr_diffusion.evaluation.runs import LOSSES, read_run
from cmr_diffusion.evaluation.summary import Report
from cmr_diffusion.figures import Picture
from cmr_diffusion.results import result
from cmr_diffusion.tracking import (
    find_run, import_jsonl, log_config, log_figure, log_folder, log_metrics, start_run)
from conftest import Workplace
from test_page import HOSTILE, Tags

COLOURS = {0: '#000000', 20: '#ff0000', 33: '#00ff00', 40: '#0000ff'}  # of the toy grids, by step


def report_with(*biases, half=8.):
    "A report with the bias of some structures in ms."
    names = 'background', 'myocardium', 'left_ventricle', 'right_ventricle'
    rows = [dict(type='T1', structure=name, unit='ms', real_mean=1000., real_sd=40., bias=bias, bias_low=bias - half,
                 bias_high=bias + half) for name, bias in zip(names, biases)]
    return Report('toy', dict(values=Part(pd.DataFrame(rows), 'made up', '', ('bias',))), dict(seed=0))


def log_report(report, folder, cohort):
    report.write(folder/cohort)
    log_folder(folder/cohort, f'evaluation/{cohort}')
    log_metrics({f'scores/{name}': value for name, value in report.metrics.items()})


def log_run(name, folder, steps=(0, 20), report=None, cache='abc', new=True, **train):
    "Log what a training logs; its grids have the colour of their step."
    first, second = ('loss/training', 'loss/validation') if new else ('train/loss', 'valid/loss')
    with start_run('toys', name) as run:
        log_config(dict(preset='tiny', learning_rate=1e-3) | train, 'train.')
        log_config(dict(fingerprint=cache, geometry=dict(size=32)), 'cache.')
        for step in steps:
            log_metrics({first: 1 / (1 + step), second: 2 / (1 + step)}, step)
            log_figure(Picture(1, .5, facecolor=COLOURS[step]), 'samples/grid', step)
        if report is not None: log_report(report, folder, 'toy')
    return run.id


@pytest.fixture(scope='module')
def place_of_runs(tmp_path_factory, template):
    "A folder with a store of toy runs, which this process uses for the module."
    made = Workplace(tmp_path_factory.mktemp('compare'))
    (made.folder/'mlruns').mkdir()
    (made.folder/'mlruns'/'mlflow.db').write_bytes(template.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MLFLOW_TRACKING_URI', made.env['MLFLOW_TRACKING_URI'])
        patch.delenv('IN_TEST', raising=False)
        log_run('first', made.folder, report=report_with(5., 10., -30.))
        log_run('second', made.folder, (0, 20, 40), report_with(5., 60., 30.), new=False, learning_rate=4e-4)
        log_run('other', made.folder, (0, 33), cache='def')
        made.twins = [log_run('twin', made.folder) for _ in range(2)]
        log_run(HOSTILE + '$x$', made.folder, note=HOSTILE)
        with pytest.raises(CMRError), start_run('toys', 'broken'): raise CMRError('the training diverged')
        (made.folder/'log.jsonl').write_text('{"loss": 1}\n')
        import_jsonl(made.folder/'log.jsonl', run_name='imported')
        with result(made.folder/'taken', 'evaluation') as room: (room/'report.json').write_text('{}')
        yield made


@pytest.fixture
def runs(place_of_runs): return place_of_runs


def test_settings_losses_and_grids_are_read(runs):
    "By whatever names a version logged them."
    first, second = read_run('first'), read_run('second')
    assert first.settings['train'] == {'preset': 'tiny', 'learning rate': '0.001'}
    assert list(first.curves) == list(second.curves) == list(LOSSES)[:2] == ['training', 'validation']
    assert second.curves.training.to_dict() == {0: 1, 20: 1 / 21, 40: 1 / 41}
    assert list(second.grids) == [0, 20, 40]
    assert (second.grid(40) == np.uint8([0, 0, 255])).all() and (second.grid(20) == np.uint8([255, 0, 0])).all()
    assert first.note == 'evaluated on toy' and len(first.evaluation.parts['values'].table) == 3


def test_grids_stand_side_by_side_at_the_same_step(runs):
    made = compare_runs('first', 'second')
    assert made.step == 20 and 'Grids at step 20' in made.page() and 'The last grids' in made.page()
    for pixels, words in made.pictures.values():
        assert words == 'step 20' and (pixels == np.uint8([255, 0, 0])).all()
    assert [s.text for s in made.sentences][0] == 'Settings that differ: learning rate (0.001 / 0.0004)'
    assert 'at step 20: first 0.0952, second 0.0952' in made.text()
    assert made.outcomes.outcome.to_list() == [SAME, 'first', APART]


def test_runs_without_a_common_step_say_so(runs):
    made = compare_runs('second', 'other')
    page = ' '.join(made.page().split())
    assert made.step == 0 and 'The runs share only step 0' in page and 'Grids at step' not in page
    assert [words for _, words in made.pictures.values()] == ['step 40', 'step 33']
    assert 'trained on different caches (second: abc, other: def)' in page.replace('&#39;', "'")
    assert 'Careful: The runs were trained on different caches' in made.text()
    assert 'there is nothing to compare: other not evaluated' in made.text()


def test_what_a_run_lacks_is_no_error(runs, tmp_path):
    "One that failed, one of another machine's log, and one whose files were removed."
    made = compare_runs('first', 'broken', 'imported', out=tmp_path/'three')
    assert made.step is None and list(made.costs.loc['state']) == ['finished', 'failed', 'finished']
    assert 'broken: failed, the training diverged' in made.text()
    assert made.page().count('no sample grid was logged') == 2
    nothing = compare_runs('broken', 'imported', out=tmp_path/'nothing')
    assert sorted(f.name for f in (tmp_path/'nothing').glob('[!.]*')) == ['comparison.html']  # there is nothing to draw
    assert 'Settings: none are recorded of broken, imported' in made.text()
    assert 'Validation loss: no run has one' in nothing.text()


def test_names_that_are_not_unique_or_not_tame(runs):
    ids = runs.twins
    made = compare_runs(*ids, HOSTILE + '$x$')
    assert list(made.runs)[:2] == [f'twin ({run_id[:6]})' for run_id in ids]
    page = made.page()
    assert '<script' not in page and '<b>{{' not in page and not Tags(page).open
    assert made.figure.png()


def test_the_page_needs_nothing_else(runs, tmp_path):
    made = compare_runs('first', 'second', out=tmp_path/'page')
    page = (tmp_path/'page'/'comparison.html').read_text()
    found = Tags(page)
    assert not found.open and not found.ids and all(a.startswith('data:image/png;base64,') for a in found.addresses)
    assert len(found.images) == 6 and all(found.images)  # two grids twice, losses, intervals: each has its words
    for word in ('http://', 'https://', 'url(', '@import', str(tmp_path)): assert word not in page
    said = ' '.join(''.join(found.words).split())
    assert 'keep this page where the data are kept. Nothing of it was logged.' in said
    assert 'Differences inside the intervals are not differences' in said
    assert '@media print' in page and 'width=device-width' in page
    assert made.text().splitlines()[-1] == str(tmp_path/'page'/'comparison.html')
    compare_runs('first', 'other', out=tmp_path/'page')  # an older one is replaced
    assert 'Runs compared: first, other' in (tmp_path/'page'/'comparison.html').read_text()


def test_nothing_is_logged(runs):
    "Neither a file nor a tag nor a point is added, and the time at which a run ended stays."
    def state(): return [find_run(name).to_dictionary() for name in ('first', 'second')]
    files, before = sorted(runs.folder.rglob('mlruns/artifacts/**/*')), state()
    compare_runs('first', 'second').page()
    assert state() == before and sorted(runs.folder.rglob('mlruns/artifacts/**/*')) == files


@pytest.mark.parametrize('words, said', [
    (['first'], '1 run: give two or more'), ([], 'are required: RUNS'), (['first', 'first'], 'is given twice'),
    (['first', 'nobody'], "'nobody' is no folder, and no run of that id or name"), (['first', ''], 'is no name'),
    (['first', 'twin'], "'twin' is that of 2 runs; give the id"), (list('abcdefg'), '7 runs cannot be told apart'),
    (['first', 'mlruns'], 'mlruns: is a folder, which has neither losses nor grids; give the name or the id of a run'),
    (['first', 'models:/none/1'], 'no model none is registered'), (['first', 'no/such'], "'no/such' is no folder"),
    (['first', 'second', '--out', 'taken'], 'taken: holds an evaluation, not'),
    (['first', 'second', '--out', 'log.jsonl'], 'is a file'),
    (['first', 'second', '--out='], "--out '': it is empty"), (['first', 'second', '--in', 'x'], '--in')])
def test_wrong_calls_end_in_one_line(runs, words, said):
    done = runs.here('cmr_compare', *words)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and not done.stdout, done.stderr
    assert done.stderr.startswith('cmr_compare: ') and said in done.stderr, done.stderr
    assert not (runs.folder/'comparison').exists()


def test_the_command(runs):
    done = runs.here('cmr_compare', 'first', find_run('second').info.run_id, '--out', 'beside')
    assert done.returncode == 0 and done.stdout.startswith('Runs compared: first, second\n'), done.stderr
    written = {file.name for file in (runs.folder/'beside').iterdir()}
    assert {'comparison.html', 'comparison.png', '.gitignore'} <= written
    found = json.loads(runs.here('cmr_compare', 'first', 'second', '--json', '--out', 'beside').stdout)
    assert (found['step'], found['page'], list(found['runs'])) == (20, 'beside/comparison.html', ['first', 'second'])
    assert [each['outcome'] for each in found['outcomes']] == [SAME, 'first', APART]


def test_the_name_and_its_docstring():
    assert cmr_diffusion.compare_runs is compare_runs
    for word in ('Arguments:', 'Returns:', 'Raises:', 'runs:', 'out:'): assert word in compare_runs.__doc__


def test_the_last_of_several_evaluations_is_taken(runs, tmp_path):
    "The one whose figures are those of the run, whatever the names of the cohorts."
    run_id = log_run('twice', tmp_path, report=report_with(5.))
    with start_run(run_id=run_id): log_report(report_with(7.), tmp_path, 'another')
    assert read_run('twice').note == 'evaluated on another'
    with start_run(run_id=run_id): log_report(report_with(9.), tmp_path, 'toy')
    assert read_run('twice').note == 'evaluated on toy'


def test_nobody_is_better_inside_the_intervals():
    "Whatever the figures are, and in whatever order the runs come."
    random = np.random.default_rng(0)
    counts = dict.fromkeys(('better', SAME, APART), 0)
    for _ in range(60):
        reports = {name: report_with(random.normal(0, 20), half=random.uniform(1, 12)) for name in 'abc'}
        figures = figures_of(reports)
        rows, = (rows for _, rows in figures.groupby('name'))
        found = outcome(rows)
        assert {outcome(rows.set_index('run', drop=False).loc[list(order)]) for order in permutations('abc')} == {found}
        ends = rows.set_index('run')[['low', 'high']]
        apart = [(p, q) for p, q in permutations('abc', 2) if ends.high[p] < ends.low[q]]
        counts['better' if found in reports else found] += 1
        if found == SAME: assert not apart
        else: assert apart
        if found not in reports: continue
        away = rows.set_index('run')['value'].abs()
        assert away.idxmin() == found
        for other in set('abc') - {found}: assert (found, other) in apart or (other, found) in apart
    assert min(counts.values()) > 5, counts  # each of the three has been met


def test_figures_without_intervals_tell_nobody_apart():
    one, two = report_with(1.), report_with(90.)
    for report in (one, two): report.parts['values'].table[['bias_low', 'bias_high']] = np.nan
    assert outcomes(figures_of(dict(a=one, b=two))).outcome.to_list() == [UNKNOWN]
    assert outcomes(figures_of(dict(a=one, b=None))).outcome.to_list() == [ALONE]
    assert len({shown.name for shown in SHOWN}) == len(SHOWN)


def test_a_training_of_today_has_every_curve(place, trained, monkeypatch):
    "The names that this version logs are among those that are read."
    monkeypatch.setenv('MLFLOW_TRACKING_URI', place.env['MLFLOW_TRACKING_URI'])  # the toy runs above have another store
    monkeypatch.delenv('IN_TEST', raising=False)
    run = read_run(trained)
    assert list(run.curves) == list(LOSSES) and list(run.grids) == [0, 8] and run.steps == 8
    assert {'train', 'model', 'recipe', 'cache', 'machine'} <= set(run.settings)
    assert run.seconds > 0 and run.speed > 0 and run.settings['machine']['device'] == 'cpu'
    kept = json.loads((place.folder/'cache'/'cache.json').read_text())
    assert run.settings['cache']['fingerprint'] == kept['fingerprint']
    assert len(settings_that_differ({'a': run, 'b': run})[0]) == 0
