"The report: its JSON, its verdicts, the names of its metrics, its page, and the pictures of the worst images."
import inspect, json, re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.utils.validation import _validate_metric_name

from cmr_diffusion.core import CMRError, MYOCARDIUM, STRUCTURES
from cmr_diffusion.evaluation.copies import all_distances, copies
from cmr_diffusion.evaluation.fidelity import values
from cmr_diffusion.evaluation.overlap import Part
from cmr_diffusion.evaluation.page import cells, ordered, page, with_interval, write_page
from cmr_diffusion.evaluation.physics import physics
from cmr_diffusion.evaluation.privacy import copy_verdict, membership_verdict, privacy
from cmr_diffusion.evaluation.questions import ABOUT, SHOWN
from cmr_diffusion.evaluation.summary import Report, Verdict
from cmr_diffusion.evaluation.worst import in_units, MEASURES, ranked, value_scores, worst_figure
from cmr_diffusion.figures import Picture
from cmr_diffusion.grid.geometry import Geometry
from cmr_diffusion.grid.values import ValueTransform
from cmr_diffusion.toy import toy_grid

TRANSFORMS, GRID = {'T1': ValueTransform('T1', 2000., 4095.)}, Geometry(32, (1.5, 1.5))
MISSING = Part(None, 'not assessed: no images were painted at several spacings (cmr_evaluate --spacings)')


@pytest.fixture(scope='module')
def slices():
    "Real slices of three splits, and test slices that are a little too bright."
    train, val, test = (toy_grid(8, split=split) for split in ('train', 'val', 'test'))
    return train + val + test, replace(test, images=test.images + np.float32(.05))


@pytest.fixture(scope='module')
def report(slices):
    parts = dict(values=values(*slices, TRANSFORMS), physics=physics(*slices, TRANSFORMS, GRID), resolution=MISSING,
                 privacy=privacy(*slices))
    return Report('toy: 24 images into test masks', parts, dict(synthetic='toy', geometry=dict(size=32)))


def test_the_json_has_every_figure(report, tmp_path):
    "Beside its interval, its counts, its verdict and its control; what is not defined is null."
    report.write(tmp_path/'report')
    text = (report.folder/'report.json').read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert found['format'] == 2 and list(found['parts']) == list(report.parts)
    for name, part in report.parts.items():
        kept = found['parts'][name]
        assert kept['note'] == part.note
        if part.table is None:
            assert kept['table'] is None
            continue
        back = pd.DataFrame(kept['table'])
        assert list(back.columns) == list(part.table.columns) and len(back) == len(part.table)
        for column in part.table:
            for one, other in zip(back[column], part.table[column]):
                assert (pd.isna(one) and pd.isna(other)) or one == other, (name, column)
    assert set(found) == {'format', 'title', 'verdicts', 'parts', 'settings', 'metrics', 'run_id'}
    assert [each['text'] for each in found['verdicts']] == [each.text for each in report.verdicts]


def test_privacy_comes_first(report, tmp_path):
    "In the text, in the JSON and on the page."
    report.write(tmp_path/'report', also=[partial(write_page, shows_patients=False)])
    first = report.verdicts[0]
    assert first.part == 'privacy' and first.text.startswith('privacy: copies, T1 (pixels): ')
    assert (report.folder/'report.txt').read_text().split('\n')[:3] == [report.title, '', first.text]
    written = (report.folder/'report.html').read_text()
    places = [written.index(verdict.text.split(' (')[0]) for verdict in report.verdicts]
    assert places == sorted(places) and places[-1] < written.index('<nav')
    assert report.verdicts[-1] == Verdict('resolution', 'open', f'resolution: {MISSING.note}')


COPIES = dict(type='T1', space='pixels', caught=.9, false_flags=0., flagged=0, images=40, near=0., near_low=0.,
              near_real=.01, copies_high=.07)
MEMBERS = dict(type='T1', attack='loss', auc=.5, auc_low=.48, auc_high=.53, blind=.5, blind_low=.3, blind_high=.7)


@pytest.mark.parametrize('judge, row, tone', [
    (copy_verdict, COPIES, 'good'), (copy_verdict, COPIES | dict(flagged=1), 'bad'),
    (copy_verdict, COPIES | dict(near=.3, near_low=.2), 'open'), (copy_verdict, COPIES | dict(caught=.1), 'open'),
    (copy_verdict, COPIES | dict(caught=np.nan), 'open'), (membership_verdict, MEMBERS, 'good'),
    (membership_verdict, MEMBERS | dict(auc_high=.9), 'open'),
    (membership_verdict, MEMBERS | dict(auc=.9, auc_low=.8, auc_high=1.), 'bad'),
    (membership_verdict, MEMBERS | dict(auc=np.nan), 'open'),
    (membership_verdict, MEMBERS | dict(blind=.8, blind_low=.7), 'open')])
def test_the_tone_of_every_sentence_about_privacy(judge, row, tone):
    "Nothing that was not found out is good."
    sentence = judge(SimpleNamespace(**row))
    assert '; ' not in sentence  # it separates the sentences
    found, = Report('', dict(privacy=Part(None, f'copies, {sentence}'))).verdicts
    assert (found.tone, found.text) == (tone, f'privacy: copies, {sentence}')


def judged(verdicts, **columns):
    "The verdict about a part with these verdicts."
    table = pd.DataFrame(dict(type='T1', structure='myocardium', measure='noise', verdict=verdicts)).assign(**columns)
    return Report('', dict(physics=Part(table, '', 'measure'))).verdicts[0]


@pytest.mark.parametrize('verdicts, tone, text', [
    (['within', 'within'], 'good', '2 within'), (['within', 'open'], 'open', '1 within, 1 open'),
    (['within', 'beyond', 'open'], 'bad', '1 within, 1 open, 1 beyond (T1 myocardium noise)'),
    (['within', ''], 'open', '1 within, 1 not judged'), ([''], 'open', '1 not judged'),
    ([], 'open', 'nothing is judged'),
    (['better', 'equal', 'no worse'], 'good', '1 better, 1 equal, 1 no worse'),
    (['worse', 'no better'], 'bad', '1 no better, 1 worse (T1 myocardium noise)')])
def test_figures_are_counted_by_their_verdicts(verdicts, tone, text):
    assert judged(verdicts) == Verdict('physics', tone, f'physics: {text}')


def test_a_measure_that_misses_its_control_promises_nothing():
    found = judged(['within', 'within'], caught=['yes', 'no'])
    assert found.tone == 'open' and found.text.endswith('; 1 missed the control (T1 myocardium noise)')


def test_controls_are_not_counted():
    "Real images that are read as a control, and arms without synthetic images."
    assert judged(['within', 'beyond'], images=['synthetic', 'real']).text == 'physics: 1 within'
    arms = ['real + synthetic, 100 %', 'real, not augmented, 100 %']
    assert judged(['equal', 'worse'], arm=arms).text == 'physics: 1 equal'


def test_the_names_of_metrics_pass_mlflow():
    "And no two figures have one name."
    arms = [f'{name}{more}, {percent} %' for name in ('real', 'synthetic', 'real + synthetic', 'synthetic + deformed')
            for more in ('', ', not augmented') for percent in ('10', '2.5', '100')]
    odd = ['synthetic diameter at 1.5 mm', 'Fréchet distance, vit_small.pth: <T1>', '100%', 'a\\b"c\'d\n']
    table = pd.DataFrame(dict(arm=arms + odd, type='T1', structure='myocardium', dice=.5, surface_95=1.))
    metrics = Report('', {'tissue readings': Part(table, '', 'arm', ('dice', 'surface_95'))}).metrics
    assert len(metrics) == 2 * len(table)
    for name in metrics:
        _validate_metric_name(f'scores/{name}')
        assert ':' not in name  # which MLflow refuses on Windows


class Tags(HTMLParser):
    "Collects addresses and ids of a page, and checks that its tags are closed in order."
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.images, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed')
        assert not [name for name in found if name.startswith('on')]
        self.addresses += [found[name] for name in ('href', 'src') if name in found]
        self.ids += [found['id']] if 'id' in found else []
        self.images += [found['alt']] if tag == 'img' else []
        if tag not in ('meta', 'img', 'br'): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.words.append(data)


def test_the_page_needs_nothing_else(report):
    "No address outside of the page, every link has its target, and every tag is closed."
    found = Tags(page(replace(report, pictures={'worst Dice': Picture(2, 1)}), False))
    assert not found.open and len(found.ids) == len(set(found.ids)) == len(report.parts)
    for address in found.addresses:
        assert address.startswith('data:image/png;base64,') or address[1:] in found.ids
    style = page(report).split('<style>')[1].split('</style>')[0]
    assert 'url(' not in style and '@import' not in style and '@media print' in style
    assert found.images == ['Worst Dice', *(f'Chart of the part {name}' for name in ('values', 'physics', 'privacy'))]


HOSTILE = '<script>alert(1)</script>"\'&<b>{{ 1 + 1 }}'


def test_no_text_becomes_html():
    "Names of patients, types, parts, columns and settings."
    table = pd.DataFrame({'type': [HOSTILE], 'structure': HOSTILE, 'images': HOSTILE, HOSTILE: 1., 'verdict': 'beyond'})
    part = Part(table, HOSTILE, 'images', (HOSTILE,), figure=Picture(1, 1))
    parts = {HOSTILE: part, 'values': part, 'physics': Part(None, HOSTILE), 'privacy': Part(None, HOSTILE)}
    found = Report(HOSTILE, parts, {HOSTILE: HOSTILE, 'x': {HOSTILE: [HOSTILE]}}, pictures={HOSTILE: Picture(1, 1)})
    written = page(found)
    assert not Tags(written).open and '<b>{{' not in written and '<script' not in written
    assert ''.join(Tags(written).words).count('<script>alert(1)</script>') > 8


def test_the_page_says_whether_it_shows_patients(report, tmp_path):
    "It says so unless the caller knows better."
    assert 'images of real patients. Keep it' in page(report) and 'no image of a real patient' not in page(report)
    assert 'no image of a real patient' in page(report, shows_patients=False)
    assert write_page(report, tmp_path) == tmp_path/'report.html'
    assert write_page(report, tmp_path/'other.html').is_file()


def test_no_figure_of_a_table_is_left_out(report):
    "What is not a column of its own stands in the cell of its figure."
    for name, part in report.parts.items():
        if part.table is None: continue
        shown, units = ordered(part, ABOUT[name].units), ABOUT[name].units
        ends = {f'{column}_{end}' for column in shown for end in ('low', 'high')}
        empty = {column for column in part.table if (part.table[column].astype(str) == '').all()}
        assert set(part.table) <= {*shown, *ends, *empty, *({'unit'} if 'row' in units.values() else ())}
        assert set(units) - {'tpr'} <= set(part.table)  # `tpr` comes with membership
        headings, rows = cells(part, units)
        assert {len(row) for row in rows} == {len(headings)} and len(rows) == len(part.table)
    physics_page = page(replace(report, parts={'physics': report.parts['physics']}))
    row = report.parts['physics'].table.iloc[0]
    text = with_interval(row.difference, row.difference_low, row.difference_high, sign=True)
    assert f'{text} {row.unit}</td>' in physics_page


def test_every_part_has_its_question():
    "The names of the parts that the report documents, and of the pictures."
    comment = inspect.getsource(Report).split('# by name: ')[1].split('parts:')[0]
    names = [name.strip() for name in comment.replace('#', ' ').replace('\n', ' ').split(',')]
    assert {re.sub(' +', ' ', name) for name in names} == set(ABOUT)
    assert {m.figure for m in MEASURES.values()} < set(SHOWN)


def test_a_page_that_fails_leaves_the_report_that_is_there(report, tmp_path):
    report.write(tmp_path/'report')
    before = (tmp_path/'report'/'report.json').read_text()
    def fail(report, folder): raise CMRError('no page')
    with pytest.raises(CMRError, match='no page'): replace(report, title='new').write(tmp_path/'report', also=[fail])
    assert (tmp_path/'report'/'report.json').read_text() == before


def test_pictures_lie_beside_the_report(report, tmp_path):
    "Under names that any disk takes, and are replaced with it."
    drawn = replace(report, pictures={'worst Dice': Picture(1, 1), 'a/b: <c>': Picture(1, 1)})
    for _ in range(2): drawn.write(tmp_path/'report', also=[write_page])
    assert {file.name for file in (tmp_path/'report'/'pictures').iterdir()} == {'worst_Dice.png', 'a_b_c.png'}
    assert f'pictures {tmp_path/"report"/"pictures"}' in drawn.text()
    report.write(tmp_path/'report')
    assert not (tmp_path/'report'/'pictures').exists() and 'report.html' not in report.text()


def test_the_worst_come_first(slices):
    "The planted one, whatever the order of the scores; images without a score are counted."
    real, synthetic = slices
    images = synthetic.images.copy()
    images[5, 0][synthetic.label_maps[5] == MYOCARDIUM] += 1.
    empty = synthetic.label_maps.copy()
    empty[7] = 255  # padding only
    spoilt = replace(synthetic, images=images, label_maps=empty)
    scores = value_scores(spoilt, real, TRANSFORMS)
    assert len(scores) == len(spoilt) and scores.score.isna().sum() == 1
    order = ranked(scores, 'values')
    assert order.position.iloc[0] == 5 and order.structure.iloc[0] == STRUCTURES[MYOCARDIUM] and 7 not in order.position
    assert ranked(scores.sample(frac=1, random_state=0), 'values').position.tolist() == order.position.tolist()
    figure = worst_figure(spoilt, scores, TRANSFORMS, 'values')
    assert figure.get_suptitle().startswith('worst values: 10 of 23 images') and '1 more have' in figure.get_suptitle()
    assert np.array_equal(figure.axes[0].images[0].get_array(), in_units(spoilt[[5]], TRANSFORMS)[0].pixels)


def test_few_real_slices_say_nothing_about_values(slices):
    real, synthetic = slices
    assert value_scores(synthetic, real[:4], TRANSFORMS).score.isna().all()


def test_the_images_nearest_to_training_are_those_of_the_search(slices):
    from cmr_diffusion.evaluation.worst import training_scores
    real, synthetic = slices
    found = all_distances(synthetic, real)
    scores = training_scores(found)
    assert ranked(scores, 'training distance').score.is_monotonic_increasing
    own = found[(found.images == 'synthetic') & (found.space == 'pixels')]
    assert scores.set_index('position').score.to_dict() == own.set_index('number').distance.to_dict()
    assert copies(real, synthetic).table.distance[0] == pytest.approx(scores.score.median())
