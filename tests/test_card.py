"""The scorecard and the model card quote what a report holds, name what is missing, and give nobody away."""
import re
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest

from cmr_diffusion.cohort.table import read_cohort
from cmr_diffusion.core import CMRError, STRUCTURES
from cmr_diffusion.evaluation.adherence import adherence
from cmr_diffusion.evaluation.agreement import agreement, image_types
from cmr_diffusion.evaluation.arms import arm_parts, arms, Painted
from cmr_diffusion.evaluation.card import CARD, copy_card, discreet, facts_of_cohort, model_card, UNKNOWN, write_card
from cmr_diffusion.evaluation.distances import distances
from cmr_diffusion.evaluation.edges import edges
from cmr_diffusion.evaluation.features import find_encoders
from cmr_diffusion.evaluation.fidelity import slice_values, values
from cmr_diffusion.evaluation.levels import by_level
from cmr_diffusion.evaluation.overlap import Part
from cmr_diffusion.evaluation.patients import patients
from cmr_diffusion.evaluation.physics import physics
from cmr_diffusion.evaluation.privacy import privacy
from cmr_diffusion.evaluation.quotes import answer, NOT, Quote, quoted, written
from cmr_diffusion.evaluation.resolution import resolution
from cmr_diffusion.evaluation.scorecard import (
    failures, FIGURES, QUESTIONS, scorecard, scorecard_html, scorecard_lines, scorecard_markdown, TASK)
from cmr_diffusion.evaluation.segmentation import SegConfig, train_segmentation
from cmr_diffusion.evaluation.summary import Report
from cmr_diffusion.evaluation.tissue import ASKED, tissue_table
from cmr_diffusion.evaluation.utility import utility
from cmr_diffusion.grid.cache import prepare
from cmr_diffusion.grid.geometry import Geometry
from cmr_diffusion.grid.loaders import grid_slices, make_dataloaders
from cmr_diffusion.model.checkpoint import load_checkpoint, save_checkpoint
from cmr_diffusion.toy import toy_cohort
from cmr_diffusion.training.learner import sdm_learner

ALL = [quote for quotes in FIGURES.values() for quote in quotes] + list(TASK)
CONFIG = SegConfig(decoder=(32, 16, 16), steps=3, batch_size=8)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('card')
    cohort = toy_cohort(folder/'cohort', patients=16, splits=('train', 'test'), spacings=(2.,), shape=32)
    return prepare(read_cohort(cohort, 'csv'), folder/'cache', Geometry(32, 'native'), workers=0)


@pytest.fixture(scope='module')
def checkpoint(cache):
    return sdm_learner(make_dataloaders(cache, 4, device='cpu'), 'tiny', precision='float32').checkpoint


@pytest.fixture(scope='module')
def report(cache, checkpoint):
    "A report with every part that an evaluation may have, but textures, which takes more slices."
    real = grid_slices(cache)
    fake = replace(real, images=real.images + np.float32(.03), rows=real.rows.assign(synthetic=True))
    model, compared = train_segmentation(real.of('train'), CONFIG, device='cpu'), (real, fake, cache.values)
    encoders, missing = find_encoders(model, None, 'cpu')
    parts = dict(
        values=values(*compared), patients=patients(*compared), edges=edges(*compared, cache.geometry),
        tissue=Part(tissue_table(fake, asked_of(real, cache.values), cache.values), ''),
        physics=physics(*compared, cache.geometry), distances=distances(real, fake, encoders, missing),
        adherence=adherence(real, fake, model), levels=by_level(*compared, model),
        agreement=agreement(real, fake, model, cache.geometry),
        utility=utility(real, fake, CONFIG, model, device='cpu'),
        resolution=resolution(model, fake, np.repeat([[1.5, 1.5], [2., 2.]], len(fake) // 2, axis=0)),
        privacy=privacy(real, fake, checkpoint)) | {'image types': image_types(real, fake, model)}
    seen = tuple(real.of('train').rows.patient.unique())
    rows = arms(real, {100.: [Painted(fake.of('train'), seen)]}, cache.values, cache.geometry, CONFIG, (0, 1), False,
                device='cpu')
    return Report('toy: 48 images into test masks', parts | arm_parts(rows), dict(fingerprint=cache.fingerprint))


def asked_of(real, transforms):
    "What each structure of each slice is asked for: its own mean."
    found = slice_values(real, transforms).pivot(index='position', columns='structure', values='mean')
    return found.reindex(index=range(len(real)), columns=range(len(STRUCTURES))).set_axis(ASKED, axis=1)


def test_every_quote_finds_its_column(report):
    "A column that is renamed in its chapter would leave the card silently, as 'no such figure'."
    for quote in ALL:
        said, figures = answer(report, quote)
        if quote.part == 'textures' or 'density' in str(quote.rows): continue
        assert figures and not said.startswith(NOT), quote
        table = report.parts[quote.part].table
        assert {quote.column, *quote.beside.values(), *quote.rows} <= set(table), quote
        assert quote.unit != 'own' or 'unit' in table, quote


def test_figures_are_those_of_the_tables(report):
    "Every number that is quoted stands in the table of its part, with the ends of its interval."
    for quote in ALL:
        part = report.parts.get(quote.part)
        if part is None or part.table is None or quote.column not in part.table: continue
        for _, row in part.table[np.isfinite(part.table[quote.column].astype(float))].iterrows():
            names = [n for n in (quote.column, f'{quote.column}_low', f'{quote.column}_high') if n in row.index]
            for text in written([row[n] for n in names], quote.unit):
                assert text == '-' or text.lstrip('+-') in quoted(row, part, quote), (quote, text)


def test_verdicts_are_counted_and_the_worst_stand_first(report):
    quote = next(q for q in FIGURES['congruence'] if q.part == 'physics')
    table = report.parts['physics'].table
    said, figures = answer(report, quote, most=len(table))
    for word, n in table.verdict.value_counts().items(): assert f'{word}: {n}' in said
    order = [re.search(r'(beyond|open|within)\)$', figure)[1] for figure in figures]
    assert order == sorted(order, key=('beyond', 'open', 'within').index) and len(figures) == len(table)
    bad = [figure for lines in failures(report).values() for figure in lines if figure in figures]
    assert len(bad) == (table.verdict == 'beyond').sum() > 0


@pytest.mark.parametrize('missing', sorted({quote.part for quote in ALL}))
@pytest.mark.parametrize('how', ['absent', 'not computed', 'empty'])
def test_any_part_may_be_missing(report, missing, how):
    parts = {name: part for name, part in report.parts.items() if name != missing}
    if how == 'not computed': parts[missing] = Part(None, 'not computed: for a reason')
    if how == 'empty' and missing in report.parts:
        old = report.parts[missing]
        parts[missing] = replace(old, table=old.table.iloc[:0], note='')
    poorer = Report('toy', parts)
    table = scorecard(poorer)
    assert list(table.criterion.unique()) == list(QUESTIONS)
    own = table[table.part == missing]
    assert own.answer.str.startswith(f'{NOT}: ').all() and not own.figures.any()
    assert how != 'not computed' or own.answer.str.contains('for a reason').all()
    for text in ('\n'.join(scorecard_lines(table)), scorecard_markdown(table), scorecard_html(table)):
        assert all(question in text for question in QUESTIONS.values())


def test_nothing_is_graded_or_added_up(report):
    "An answer counts, quotes or says why not."
    table = scorecard(report)
    begins = table.answer.str.match(rf'{NOT}: |figures for which|copies, |membership, |\d+ of \d+ parts|[a-z ]+: \d')
    assert begins.all(), table.answer[~begins].tolist()


def test_a_blind_measure_is_named():
    rows = pd.DataFrame(dict(type='T1', structure='', difference=[1., 2.], margin=1., verdict='within', control=0.,
                             caught=['no', 'yes']))
    quote = Quote('physics', '', 'difference', lambda t: t.difference)
    assert answer(Report('', dict(physics=Part(rows, ''))), quote)[0] == \
        'within: 2, planted fault missed by the measure: 1'


def test_html_is_escaped():
    note = 'not computed: <script>alert(1)</script> & so on'
    page = scorecard_html(scorecard(Report('', dict(values=Part(None, note)))))
    assert '<script>' not in page and '&lt;script&gt;' in page


def test_card_gives_nobody_away(cache, checkpoint, report, tmp_path):
    "Neither names nor paths, even where a reason holds them."
    facts, name = facts_of_cohort(cache), cache.usable.patient[0]
    notes = dict(adherence=f'not assessed: images show masks of {name}', utility="not assessed: '/home/me' is missing",
                 levels=f'not assessed: {tmp_path}/a.dcm: damaged', privacy=f'not assessed: {name} is damaged; copy it')
    parts = report.parts | {part: Part(None, note) for part, note in notes.items()}
    text = model_card(checkpoint, replace(report, parts=parts), facts)
    assert not any(hidden in text for hidden in (*facts['names'], str(tmp_path), '/home/me', str(cache.folder)))
    assert text.count('the reason is in report.txt') >= 5 and cache.usable.id[0] not in text
    assert discreet('not assessed: a ratio of 1/2, T1/T2') == 'not assessed: a ratio of 1/2, T1/T2'


def test_card_says_what_it_knows_and_what_not(cache, checkpoint, report):
    text = model_card(checkpoint, report, facts_of_cohort(cache, name='toy', licence='CC0'), date(2026, 1, 2))
    assert '2026-01-02' in text and checkpoint.digest() in text and 'CC0' in text
    assert 'training patients: 8' in text and f'{cache.fingerprint}, that of the training' in text
    assert text.index('## Privacy') < text.index('## What it is') < text.index('## Where it fails')
    assert all(sentence in text for sentence in report.parts['privacy'].note.split('; '))
    assert all(figure in text for figures in failures(report).values() for figure in figures)
    assert 'started from: random weights' in model_card(replace(checkpoint, info=dict(started_from='')))
    poor = model_card(replace(checkpoint, info={}))
    assert poor.count(UNKNOWN) > 8 and 'do not hand them on' in poor and 'no evaluation was made' in poor
    assert 'NOT that of the training' in model_card(checkpoint, replace(report, settings=dict(fingerprint='other')))


def test_the_code_of_a_card_paints(cache, checkpoint, tmp_path, monkeypatch):
    save_checkpoint(tmp_path/'CHECKPOINT', checkpoint)
    (tmp_path/'CACHE').symlink_to(cache.folder.resolve())
    monkeypatch.chdir(tmp_path)
    code, found = re.search(r'```python\n(.*?)```', model_card('CHECKPOINT'), re.S)[1], {}
    assert 'values=dict(myocardium=' in code
    exec(code, found)
    assert found['painted'].pixels.shape == (32, 32) and np.isfinite(found['painted'].pixels).all()


def test_card_beside_weights(checkpoint, tmp_path, caplog):
    folder = save_checkpoint(tmp_path/'checkpoint', checkpoint)
    digest, text = load_checkpoint(folder).digest(), model_card(folder)
    assert write_card(folder, text) == folder/CARD and (folder/CARD).read_text().startswith(text)
    assert 'written by: cmr_diffusion' in text and load_checkpoint(folder).digest() == digest
    write_card(folder, text + '\nmore\n')  # its own card is replaced
    save_checkpoint(folder, checkpoint)  # and carried, as a training writes again and again
    assert 'more' in (folder/CARD).read_text() and load_checkpoint(folder).digest() == digest
    (folder/CARD).write_text((folder/CARD).read_text().replace('more', 'a remark of a user'))
    with pytest.raises(CMRError, match='was edited'): write_card(folder, text)
    assert 'a remark of a user' in (folder/CARD).read_text()
    save_checkpoint(folder, checkpoint)
    assert 'a remark of a user' in (folder/CARD).read_text()
    with pytest.raises(CMRError, match='no such folder'): write_card(tmp_path/'nowhere', text)
    (tmp_path/'report').mkdir()
    source = write_card(tmp_path/'report', text)
    with pytest.raises(CMRError, match='was edited'): copy_card(tmp_path/'report', folder)
    assert copy_card(tmp_path/'report', save_checkpoint(tmp_path/'new', checkpoint)).read_text() == source.read_text()
