"""A cohort is the same whoever paints it, in however many pieces: killed at random, stopped, by two processes."""
import errno, json, logging, os, signal, subprocess, sys, time, tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

from cmr_diffusion import CMRError, Geometry, output, prepare, read_cohort, results, synthesize
from cmr_diffusion.cohort.slices import load_slices
from cmr_diffusion.core import STRUCTURES
from cmr_diffusion.grid.loaders import grid_slices
from cmr_diffusion.grid.tissue import measure_slices, TissueModel
from cmr_diffusion.marks import MARK
from cmr_diffusion.model.checkpoint import Checkpoint, save_checkpoint
from cmr_diffusion.model.edm import EDMDenoiser
from cmr_diffusion.model.painting import paint
from cmr_diffusion.model.sdm import SDM, sdm_config
from cmr_diffusion.synthesis import cohort as synthesis, records as kept
from cmr_diffusion.synthesis.inputs import warn_of_types
from cmr_diffusion.synthesis.label_maps import mask_grid, mask_rows
from cmr_diffusion.synthesis.phantom_masks import phantom_masks
from cmr_diffusion.synthesis.records import with_sources
from cmr_diffusion.synthesis.settings import read_settings
from cmr_diffusion.synthesis.wanted import AskedValues, SyntheticPatients
from cmr_diffusion.toy import toy_cohort
from test_output import Faults, clean, in_child, kill

SCRIPTS = Path(sys.executable).parent
ONE_BY_ONE = dict(splits=('test',), steps=1, per_mask=2, seed=1, batch_size=1, precision='float32', device='cpu')


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    "Nothing waits for the disk, which matters after a power cut alone."
    for module in (output, results): monkeypatch.setattr(module, 'to_disk', lambda path: None)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "A child that was forked cannot use the threads of its parent."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('synthesis').resolve()


@pytest.fixture(scope='module')
def cohort(work): return read_cohort(toy_cohort(work/'toy', 3, splits=('train', 'test', 'test'), shape=32), 'csv')


@pytest.fixture(scope='module')
def cache(work, cohort): return prepare(cohort, work/'cache', Geometry(16, 4., 'heart'), workers=0)


@pytest.fixture(scope='module')
def checkpoint(cache):
    "A network that has learned nothing."
    torch.manual_seed(0)
    model = SDM(sdm_config('tiny', label_channels=cache.spec.channels, hidden=8))
    torch.nn.init.normal_(model.out.weight, std=.05)
    return Checkpoint(EDMDenoiser(model), cache.spec, cache.values, cache.geometry, dict(run_id=None))


@pytest.fixture(scope='module')
def saved(work, checkpoint): return save_checkpoint(work/'checkpoint', checkpoint)


@pytest.fixture(scope='module')
def whole(work, checkpoint, cache):
    "The cohort of a painting that nobody has stopped: 24 images."
    return contents(synthesize(checkpoint, cache, work/'whole', **ONE_BY_ONE))


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


def images(folder): return sum(1 for f in folder.rglob('*.dcm') if '.tmp' not in str(f))


def refused(call):
    with pytest.raises(CMRError) as found: call()
    assert '\n' not in str(found.value)
    return str(found.value)


@pytest.fixture
def painted(monkeypatch):
    "The seeds of all images that are painted."
    seeds = []
    def counting(checkpoint, grids, numbers, **options):
        seeds.extend(numbers)
        return paint(checkpoint, grids, numbers, **options)
    monkeypatch.setattr(synthesis, 'paint', counting)
    return seeds


def after(n, action, monkeypatch):
    "Do something instead of keeping the image that comes after n whole ones."
    keep_image = kept.keep_image
    def keep(room, records, *args):
        if records.count() == n: action()
        keep_image(room, records, *args)
    monkeypatch.setattr(synthesis, 'keep_image', keep)


# ---- killed

def test_killed_at_random_moments(work, tmp_path, checkpoint, cache, whole, painted, caplog):
    "Whatever step of writing a kill cuts off, the same call ends with the same bytes, and paints what was missing."
    def paint_it(out): synthesize(checkpoint, cache, out, **ONE_BY_ONE)
    with Faults() as faults: paint_it(tmp_path/'counted')
    assert contents(tmp_path/'counted') == whole
    moments, seen = np.random.default_rng(len(whole)).choice(np.arange(5, faults.count - 5), 6, replace=False), 0
    for n in sorted(map(int, moments)):
        out = tmp_path/f'out{n}'
        def killed():
            with Faults(n, kill): paint_it(out)
        assert not in_child(killed)
        assert not out.exists() or contents(out) == whole
        left = [f for f in tmp_path.glob(f'.{out.name}.*.room')]
        there = sum(np.count_nonzero(kept.Records(f/'records.bin', 24).read()['digest']) for f in left if images(f))
        painted.clear()
        with caplog.at_level(logging.INFO, 'cmr_diffusion'): paint_it(out)
        assert contents(out) == whole
        if len(left) == 1 and 0 < there < 24:
            assert len(painted) == 24 - there and f'{there} of 24 images are there already' in caplog.text
            seen += 1
        clean(tmp_path)
    assert seen >= 3, seen


def test_killed_again_and_again(tmp_path, checkpoint, cache, painted):
    "In batches, too: one of which a part is missing is painted as a whole, so that its pixels are the same."
    options = ONE_BY_ONE | dict(batch_size=5)
    expected = contents(synthesize(checkpoint, cache, tmp_path/'expected', **options))
    def killed_after(n):
        with pytest.MonkeyPatch.context() as patch:
            after(n, kill, patch)
            synthesize(checkpoint, cache, tmp_path/'out', **options)
    for n in (1, 7, 8, 19): assert not in_child(lambda: killed_after(n)), n
    painted.clear()
    synthesize(checkpoint, cache, tmp_path/'out', **options)
    assert contents(tmp_path/'out') == expected
    assert len(painted) == 24 - 15  # the batches of 15 to 19 and of 20 to 23
    clean(tmp_path)


def test_files_unlike_their_record_are_painted_again(tmp_path, checkpoint, cache, whole, painted, monkeypatch):
    "A power cut may take what seemed to be on the disk."
    def stop(): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after(10, stop, patch)
        synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)
    files = [sorted(tmp_path.rglob(f'.out*/new/*/*/{name}'))[-1] for name in ('*.dcm', 'labels.png', 'Contours.json')]
    files[0].write_bytes(files[0].read_bytes()[:-10])
    files[1].write_bytes(bytes(files[1].stat().st_size))
    files[2].unlink()
    painted.clear()
    assert contents(synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)) == whole
    assert 15 <= len(painted) <= 17


# ---- stopped

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_the_line_that_goes_on(tmp_path, checkpoint, cache, whole, painted, monkeypatch, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(sys, 'argv', ['/usr/bin/cmr_sample', 'a run', '--steps', '1', 'out'])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        after(7, lambda: signal.raise_signal(number), patch)
        synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)
    assert stopped.value.code == 128 + number
    line = f"{tmp_path}/out: stopped; 7 of 24 images are there; go on with: cmr_sample 'a run' --steps 1 out"
    assert str(stopped.value) == line
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (tmp_path/'out').exists()
    painted.clear()
    assert contents(synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)) == whole
    assert len(painted) == 17


def test_the_line_names_torchrun(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['cmr_sample', 'run', '--masks', 'a b', 'out'])
    for name, value in dict(WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, RANK=1).items(): monkeypatch.setenv(name, str(value))
    assert kept.same_command() == "torchrun --nproc-per-node 2 -m cmr_diffusion sample run --masks 'a b' out"
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    assert kept.same_command() == ''


def test_the_command_is_stopped_and_goes_on(tmp_path, saved, cache):
    words = [saved, '--masks', cache.folder, 'out', '--steps', 1, '--per-mask', 100, '--batch-size', 1]
    words += ['--device', 'cpu']
    command = [SCRIPTS/'cmr_sample', *map(str, words)]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(OMP_NUM_THREADS='1')
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        until = time.time() + 60
        while images(tmp_path) < 3 and time.time() < until and process.poll() is None: time.sleep(.05)
        process.terminate()
        lines = process.stderr.read().strip().splitlines()
    assert process.returncode == 143, lines
    assert lines[-1].endswith(f"go on with: cmr_sample {' '.join(map(str, words))}") and 'of 1800 images' in lines[-1]
    assert not (tmp_path/'out').exists() and images(tmp_path) >= 3


def test_an_error_keeps_images_and_removes_an_empty_room(tmp_path, checkpoint, cache, whole, painted, monkeypatch):
    def full(): raise OSError(errno.ENOSPC, 'No space left on device')
    for n in (0, 9):
        with monkeypatch.context() as patch:
            after(n, full, patch)
            said = refused(lambda: synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE))
        assert 'make room' in said and str(tmp_path/'out') in said
        assert (images(tmp_path), len(list(tmp_path.iterdir()))) == (n, n and 1)
    painted.clear()
    assert contents(synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)) == whole
    assert len(painted) == 15


# ---- other settings, other processes

def test_other_settings_are_told_and_not_resumed(
        tmp_path, checkpoint, cache, cohort, whole, painted, monkeypatch, caplog):
    def stop(): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after(5, stop, patch)
        synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)
    changed = [dict(steps=2), dict(seed=2), dict(guidance=1.5), dict(per_mask=1), dict(splits=None), dict(type='T1'),
               dict(spacing=5.), dict(sampler='heun'), dict(precision='bfloat16')]
    changed += [dict(deform=True), dict(stacks=False)]
    other = replace(checkpoint, values=checkpoint.values | dict(T1=replace(checkpoint.values['T1'], maximum=3000.)))
    calls = [(checkpoint, cache, ONE_BY_ONE | change) for change in changed]
    calls += [(other, cache, ONE_BY_ONE), (checkpoint, cohort, ONE_BY_ONE)]
    texts = set()
    def not_painted(out, inputs, text, plan):
        texts.add(text)
        raise InterruptedError
    with monkeypatch.context() as patch:
        patch.setattr(synthesis, 'shared_room', not_painted)
        same = [dict(), dict(batch_size=7), dict(device=None), dict(format='nifti'), dict(values='none')]
        for model, masks, options in [(checkpoint, cache, ONE_BY_ONE | change) for change in same] + calls:
            with pytest.raises(InterruptedError): synthesize(model, masks, tmp_path/'out', **options)
    assert len(texts) == 1 + len(calls)
    painted.clear()
    synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE | dict(seed=2))
    assert len(painted) == 24 and 'unfinished work' in caplog.text and 'already' not in caplog.text
    painted.clear()
    assert contents(synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)) == whole
    assert len(painted) == 19


def test_a_second_painting_of_the_same_folder_is_refused(tmp_path, checkpoint, cache, monkeypatch):
    def second():
        def again():
            said = refused(lambda: synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE))
            assert 'is being written by another command' in said and 'wait for it' in said
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthesis, 'keep_image', kept.keep_image)
            assert in_child(again)
    after(2, second, monkeypatch)
    synthesize(checkpoint, cache, tmp_path/'out', **ONE_BY_ONE)
    assert images(tmp_path/'out') == 24


KILLED = """
import os, signal, sys
from cmr_diffusion.processes import rank
from cmr_diffusion.synthesis import cohort, records
from cmr_diffusion.grid.cache import CohortCache
kept = 0
def keep(*args):
    global kept
    kept += 1
    if rank() == 1 and kept == 4: os.kill(os.getpid(), signal.SIGKILL)
    records.keep_image(*args)
cohort.keep_image = keep
cohort.synthesize(sys.argv[1], CohortCache(sys.argv[2]), 'out', ('test',), steps=1, per_mask=2, seed=1, batch_size=2,
                  precision='float32', device='cpu')
"""

def test_two_processes_paint_what_one_paints(tmp_path, saved, cache, whole):
    "One of two is killed, which ends both; then torchrun goes on with the command as a user types it."
    (tmp_path/'killed.py').write_text(KILLED)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    torchrun = [SCRIPTS/'torchrun', '--standalone', '--nproc-per-node', '2']
    def run(*words):
        return subprocess.run([*torchrun, *map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True)
    done = run('killed.py', saved, cache.folder)
    assert done.returncode != 0 and not (tmp_path/'out').exists()
    there = images(tmp_path)
    assert 3 <= there < 24
    done = run('-m', 'cmr_diffusion', 'sample', saved, '--masks', cache.folder, 'out', '--split', 'test', '--steps', 1,
               '--per-mask', 2, '--seed', 1, '--batch-size', 2, '--precision', 'float32', '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    assert 'of 24 images are there already' in done.stderr and done.stdout.count('a synthetic cohort') == 1
    found = contents(tmp_path/'out')
    same_bytes = [name for name in found if not name.endswith(('.dcm', MARK, '.parquet'))]
    assert found.keys() == whole.keys() and all(found[name] == whole[name] for name in same_bytes)
    for name in [name for name in found if name.endswith('.dcm')]:
        one, two = (pydicom.dcmread(f) for f in (cache.folder.parent/'whole'/name, tmp_path/'out'/name))
        assert np.abs(one.pixel_array.astype(int) - two.pixel_array.astype(int)).max() <= 1
        for tag in ('PatientName', 'PatientID', 'StudyInstanceUID', 'SeriesInstanceUID', 'InstanceNumber'):
            assert one[tag].value == two[tag].value
    one, two = (pd.read_parquet(f/'manifest.parquet') for f in (cache.folder.parent/'whole', tmp_path/'out'))
    pd.testing.assert_frame_equal(one, two, atol=.01)
    assert (one.seed == two.seed).all()
    clean(tmp_path)


# ---- the manifest, and what it costs

def test_the_manifest_says_how_to_paint_each_image_again(work, whole, checkpoint, cache, cohort):
    folder = work/'whole'
    found, rows = with_sources(folder, cache).set_index('image'), mask_rows(cache).set_index('id')
    assert list(found) == ['patient', 'type', 'slice', 'split', 'mask', 'repetition', 'seed', 'guidance', 'steps',
                           'sampler', 'precision', 'checkpoint', 'clipped_share', 'shared_seed',
                           *(f'asked_{name}' for name in STRUCTURES), 'source']
    config = json.loads((save_checkpoint(work/'c', checkpoint)/'config.json').read_text())
    assert set(found.checkpoint) == {config['weights']}
    assert (found.source == with_sources(folder, cohort).set_index('image').source).all()  # from the files, too
    assert found.groupby('source').size().eq(2).all() and set(found.source) == set(rows.index[rows.split == 'test'])
    table = read_cohort(folder)
    assert table.usable.all() and sorted(table.image) == sorted(str(folder/image) for image in found.index)
    for written, row in zip(load_slices(table, workers=0), table.itertuples()):
        about = found.loc[str(Path(row.image).relative_to(folder))]
        assert (about.patient, about.type, about['slice'], about.split) == (row.patient, row.type, row.slice, row.split)
        assert about.split == rows.split[about.source]
        grid = mask_grid(cache.slice(rows.position[about.source]), cache.geometry)
        again = paint(checkpoint, [grid], [int(about.seed)], about.guidance, int(about.steps), about.sampler,
                      shared_seeds=[int(about.shared_seed)])[0]
        inside = again.labels != 255
        assert np.abs(written.pixels.ravel() - again.pixels[inside]).max() <= .11  # a step of the stored numbers
    for name, content in whole.items(): assert b'toy00' not in content and 'toy00' not in name


def test_without_the_image_of_the_mask_a_name_cannot_be_tested(checkpoint, cohort, cache, tmp_path):
    "A hash of the name alone could be made of every patient of a hospital."
    out = synthesize(checkpoint, cohort, tmp_path/'out', **ONE_BY_ONE)
    load = kept.mask_slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, 'mask_slices', lambda *a: (replace(s, pixels=s.pixels + 1e-3) for s in load(*a)))
        assert with_sources(out, cohort).source.isna().all()
    assert with_sources(out, cohort).source.notna().all()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, checkpoint, cohort, monkeypatch):
    "An image is 36 KB here; what stays of each is its line of the manifest, until a thousand of them are written."
    wide = replace(checkpoint, geometry=Geometry(96, 1., 'none'))
    begun = []
    def drawn(checkpoint, grids, seeds, **options):
        if not begun: tracemalloc.reset_peak()  # the weights were copied for their digest
        begun.append(seeds)
        return [replace(g, pixels=np.ones(g.labels.shape, np.float32)) for g in grids]
    monkeypatch.setattr(synthesis, 'paint', drawn)
    def peak(per_mask):
        options = ONE_BY_ONE | dict(per_mask=per_mask, type='T1', batch_size=4)
        begun.clear()
        tracemalloc.start()
        try: synthesize(wide, cohort, tmp_path/f'out{per_mask}', **options)
        finally: _, most = (tracemalloc.get_traced_memory(), tracemalloc.stop())[0]
        return most
    peak(1)
    few, many = peak(2), peak(14)
    assert images(tmp_path/'out14') == 84
    assert (many - few) / 72 < 6000, (few, many)  # a line takes 2 KB, or a little more or less by the machine


# ---- tissue values, deformed hearts, stacks, volumes

ASKED = [f'asked_{name}' for name in STRUCTURES]
EVERYTHING = ONE_BY_ONE | dict(values='T1 myocardium=1000-1100', deform=True, format='nifti')


@pytest.fixture(scope='module')
def knowing(cache, checkpoint):
    "A network that takes tissue values, and has learned nothing."
    torch.manual_seed(1)
    model = SDM(replace(checkpoint.model.config, values=True))
    for weights in model.parameters():
        if not weights.any(): torch.nn.init.normal_(weights, std=.05)
    known = grid_slices(cache)
    measured = measure_slices(known, cache.spec, cache.values)
    tissue = TissueModel.fit(measured, known.rows.patient, cache.spec.names)
    return replace(checkpoint, denoise=EDMDenoiser(model), tissue=tissue)


@pytest.fixture(scope='module')
def wide(cache):
    "Limits that the round hearts of the toy cohort never reach, so that each of them can be deformed."
    from cmr_diffusion.synthesis.inputs import limits_of
    limits = limits_of(cache)
    return replace(limits, low=limits.low._replace(**{f: 0. for f in limits.low._fields}),
                   high=limits.high._replace(**{f: 1e3 for f in limits.high._fields}))


@pytest.fixture(scope='module')
def complete(work, knowing, cache, wide):
    "A cohort with everything that can be asked for: 24 images."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, 'limits_of', lambda *args: wide)
        return synthesize(knowing, cache, work/'complete', **EVERYTHING)


def manifest_of(folder): return pd.read_parquet(folder/'manifest.parquet')


def test_a_synthetic_patient_is_one_heart(complete, cache):
    "Its slices and types share values, heart and low frequencies; another repetition has others."
    found = with_sources(complete, cache)
    rows = mask_rows(cache).set_index('id')
    found['of'] = rows.patient[found.source].to_numpy()
    patients = found.groupby('patient')
    assert patients.of.nunique().eq(1).all() and patients.repetition.nunique().eq(1).all() and len(patients) == 4
    of_t1 = found[(found.type == 'T1') & found.asked_myocardium.notna()]  # a slice may have too few pixels of it
    assert len(of_t1) > 9
    assert of_t1.groupby('patient').asked_myocardium.agg(np.ptp).max() < .01  # it was asked for
    assert of_t1.asked_myocardium.between(999.9, 1100.1).all() and of_t1.asked_myocardium.round(3).nunique() == 4
    for _, own in found.groupby(['patient', 'type']):
        assert own.shared_seed.nunique() == 1 and own.asked_background.nunique() == 3
    assert found.shared_seed.nunique() == 8 and not set(found.shared_seed) & set(found.seed)
    within = found.groupby(['patient', 'type']).asked_left_ventricle.std().groupby('type').mean()
    between = found.groupby(['type', 'patient']).asked_left_ventricle.mean().groupby('type').std()
    assert between.T1 > within.T1, (within, between)
    hearts = {row.image: s.labels for row, s in zip(found.sort_values('image').itertuples(), written(complete))}
    for _, same_mask in found.groupby('source'):
        one, two = (hearts[image] for image in same_mask.image)
        assert one.shape != two.shape or (one != two).any()


def written(folder):
    "The slices of a cohort, in the order of the files' names."
    table = read_cohort(folder)
    assert table.usable.all()
    return list(load_slices(table.sort_values('image'), workers=0))


def test_each_image_can_be_painted_again(complete, knowing):
    "The manifest has all that is needed beside the label map, which is in the cohort."
    found = manifest_of(complete).sort_values('image', ignore_index=True)
    grids = [mask_grid(s, replace(knowing.geometry, spacing='native', crop='none')) for s in written(complete)]
    asked = [{name: v for name, v in zip(STRUCTURES, row) if np.isfinite(v)} for row in found[ASKED].to_numpy()]
    for i in (0, 7, 20):
        about = found.iloc[i]
        def again(**changes):
            options = dict(values=[asked[i]], shared_seeds=[int(about.shared_seed)]) | changes
            return paint(knowing, [replace(grids[i], pixels=None)], [int(about.seed)], steps=1, **options)[0]
        inside = grids[i].labels != 255
        def difference(painted): return np.abs(painted.pixels - grids[i].pixels)[inside].max()
        assert difference(again()) <= .11, (i, difference(again()))
        assert difference(again(values=None)) > .5 and difference(again(shared_seeds=None)) > .5


def test_everything_is_the_same_in_pieces(tmp_path, complete, knowing, cache, wide, painted, monkeypatch):
    "A painting with all options is stopped and goes on; what is made of the images at the end is made anew."
    def stop(): raise KeyboardInterrupt
    monkeypatch.setattr(synthesis, 'limits_of', lambda *args: wide)
    for n in (5, 17):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            after(n, stop, patch)
            synthesize(knowing, cache, tmp_path/'out', **EVERYTHING | dict(format='dicom'))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthesis, 'fill_nifti', lambda folder, *args, **options: (folder/'half').touch() or stop())
        synthesize(knowing, cache, tmp_path/'out', **EVERYTHING)
    assert len(painted) == 6 + 13 + 7  # the image at which it was stopped was painted twice
    for _ in range(2):  # the second time, the finished cohort is replaced
        synthesize(knowing, cache, tmp_path/'out', **EVERYTHING)
        assert contents(tmp_path/'out') == contents(complete)
    clean(tmp_path)


def test_values_are_never_those_of_one_patient(work, complete, knowing, cache, tmp_path):
    "Only `own` asks for what was measured; what is drawn depends on the pixels of the masks, and cannot be guessed."
    own = synthesize(knowing, cache, tmp_path/'own', **ONE_BY_ONE | dict(values='own'))
    found = with_sources(own, cache)
    rows = mask_rows(cache).set_index('id')
    for row in found.itertuples():
        grid = cache.grid(rows.position[row.source])
        measured = [grid.pixels[grid.labels == n].mean() for n in range(len(STRUCTURES))]
        np.testing.assert_allclose([getattr(row, name) for name in ASKED], measured, rtol=2e-3)
    drawn = manifest_of(synthesize(knowing, cache, tmp_path/'drawn', **ONE_BY_ONE))
    for image_type, of_type in found.groupby('type'):
        values, new = (t[t.type == image_type][ASKED].to_numpy() for t in (found, drawn))
        assert np.abs(values[:, None] - new[None]).min() > 1e-3
    again = manifest_of(synthesize(knowing, cache, tmp_path/'more', **ONE_BY_ONE | dict(per_mask=3)))
    same = again.merge(drawn, on='seed')
    assert len(same) == len(drawn)
    for name in ASKED: assert (same[f'{name}_x'] == same[f'{name}_y']).all()  # whatever `per_mask` is
    moved = read_cohort(toy_cohort(work/'moved', 3, splits=('train', 'test', 'test'), shape=32), 'csv')
    for path in moved.image: np.save(path, np.load(path) + np.float32(.001))  # the same names, other pixels
    other = manifest_of(synthesize(knowing, moved, tmp_path/'moved', **ONE_BY_ONE))
    assert not set(other.asked_background.round(6)) & set(drawn.asked_background.round(6))
    for folder in (complete, own):
        for name, content in contents(folder).items(): assert b'toy00' not in content and 'toy00' not in name


def test_a_model_without_tissue_values(tmp_path, checkpoint, knowing, cache, whole, caplog):
    with caplog.at_level(logging.INFO, 'cmr_diffusion'):
        assert contents(synthesize(checkpoint, cache, tmp_path/'draw', **ONE_BY_ONE | dict(values='draw'))) == whole
    assert 'the model takes no tissue values' in caplog.text
    assert read_settings(tmp_path/'draw').values == 'none' and manifest_of(tmp_path/'draw')[ASKED].isna().all(axis=None)
    for values in ('own', 'T1 myocardium=1100'):
        said = refused(lambda: synthesize(checkpoint, cache, tmp_path/'x', **ONE_BY_ONE | dict(values=values)))
        assert said.startswith(f"values '{values}': the model takes no tissue values")
    for values in ('T1 spleen=3', 'Draw', '', 'T1 myocardium=many', None, {'myocardium': 1100}):
        said = refused(lambda: synthesize(knowing, cache, tmp_path/'x', **ONE_BY_ONE | dict(values=values)))
        assert said.startswith(f'values {values!r}: give') and ' values: ' not in said
    phantoms = phantom_masks(2, cache.spec.types)
    said = refused(lambda: synthesize(knowing, phantoms, tmp_path/'x', values='own', device='cpu'))
    assert said.startswith("values 'own': phantom masks")
    assert not (tmp_path/'x').exists()


@pytest.mark.parametrize('values', (5, 'T1 myocardium=1100', [5], ['myocardium'], [[1100.]]))
def test_what_paint_takes_no_values_from(knowing, cache, values):
    said = refused(lambda: paint(knowing, [cache.grid(0)], [1], values=values))
    assert said.startswith('values ') and 'one such dict per label map' in said


def test_wishes_that_no_image_can_have_are_told(tmp_path, knowing, cache, caplog):
    settings = ONE_BY_ONE | dict(type='T2', values='T1 myocardium=1000')
    with caplog.at_level(logging.WARNING, 'cmr_diffusion'): synthesize(knowing, cache, tmp_path/'out', **settings)
    assert 'T1 myocardium: no image of this type is painted' in caplog.text
    rows = cache.usable
    warn_of_types(AskedValues('own', knowing.spec, knowing.values, knowing.tissue), rows, 'T2')
    assert f"values 'own': {(rows.type != 'T2').sum()} of {len(rows)} label maps have no T2 image" in caplog.text
    caplog.clear()
    warn_of_types(AskedValues('own', knowing.spec, knowing.values, knowing.tissue), rows, None)
    warn_of_types(AskedValues('T2 myocardium=50', knowing.spec, knowing.values, knowing.tissue), rows, None)
    assert not caplog.records


def test_values_beyond_the_training_are_told_once(tmp_path, knowing, cache, caplog):
    with caplog.at_level(logging.WARNING, 'cmr_diffusion'):
        synthesize(knowing, cache, tmp_path/'out', **ONE_BY_ONE | dict(values='T1 myocardium=1900, T2 myocardium=79'))
    told = [r.getMessage() for r in caplog.records if 'myocardium' in r.getMessage()]
    assert len(told) == 1 and '1900 ms' in told[0] and 'range' in told[0], told


def test_the_reader_does_not_see_the_volumes(complete, tmp_path):
    "The cohort is the same with and without them, and they hold the same slices."
    from cmr_diffusion.cohort.quality import findings
    table = read_cohort(complete)
    assert len(table) == 24 and table.usable.all() and not findings(table, complete).kind.str.contains('nifti').any()
    volumes = read_cohort(complete/'nifti', 'csv')
    assert volumes.usable.all() and len(volumes) == 24 and read_settings(complete).nifti
    assert sorted(volumes.split) == sorted(table.split) and sorted(volumes.patient) == sorted(table.patient)
    one, two = ({(r.patient, r.type, r.slice): s for r, s in zip(t.itertuples(), load_slices(t, workers=0))}
                for t in (table, volumes))
    assert one.keys() == two.keys()
    for key, s in one.items():
        for kind, number in zip(STRUCTURES[1:], (1, 2, 3)):
            mean, again = (x.pixels[x.labels == number].mean() for x in (s, two[key]))
            assert abs(mean - again) < .1, (key, kind)


def test_phantoms_are_masks(tmp_path, knowing, cache, painted):
    "The same number and seed give the same cohort; all of it is for training; `with_sources` knows the masks."
    masks = phantom_masks(2, cache.spec.types, seed=3)
    options = dict(steps=1, seed=1, batch_size=4, precision='float32', device='cpu')
    out = synthesize(knowing, masks, tmp_path/'out', deform=True, **options)
    assert images(out) == 12 and set(read_cohort(out).split) == {'train'} and read_settings(out).masks == 'phantom:2'
    assert contents(synthesize(knowing, phantom_masks(2, cache.spec.types, seed=3), tmp_path/'again', deform=True,
                               **options)) == contents(out)
    assert set(with_sources(out, masks).source) == set(masks.usable.id)
    assert with_sources(out, cache).source.isna().all()
    assert 'no masks of split test' in refused(lambda: synthesize(knowing, masks, tmp_path/'x', ('test',), **options))


def test_hearts_that_cannot_be_deformed_are_counted(tmp_path, knowing, cache, wide, monkeypatch, caplog):
    from cmr_diffusion.cohort.shapes import ShapeLimits
    monkeypatch.setattr(ShapeLimits, 'keeps', lambda *args: False)
    with caplog.at_level(logging.WARNING, 'cmr_diffusion'):
        out = synthesize(knowing, cache, tmp_path/'out', **ONE_BY_ONE | dict(deform=True))
    assert '4 synthetic patients have the heart of their mask' in caplog.text and images(out) == 24


def test_a_deformation_is_found_once_per_patient(knowing, cache, wide, monkeypatch):
    from cmr_diffusion.synthesis import wanted
    from cmr_diffusion.synthesis.plan import Plan
    calls, find = [], wanted.find_deformation
    monkeypatch.setattr(wanted, 'find_deformation', lambda *args: calls.append(len(args[0])) or find(*args))
    patients = SyntheticPatients(Plan(mask_rows(cache, ('test',)), None, 2, 1), cache, limits=wide)
    assert len(list(wanted.wanted_images(patients, range(24), cache.geometry))) == 24
    assert calls == [6] * 4  # of all slices and types of the patient
