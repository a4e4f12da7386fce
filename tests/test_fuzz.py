"""Two thousand damaged files, drawn by hypothesis: none may crash the reader, hang it or take a gigabyte.

What no slice can survive must become a finding; whatever passes must be sound. The reading runs in a process of its own, with a memory limit, so that
a crash or a hang of a decoder is seen too; it prints the counts."""
import gzip, io, json, math, re, resource, subprocess, sys, tempfile, time, warnings
from collections import Counter
from pathlib import Path

EACH = {  # (file, damage): whether no slice can survive it, how many
    ('good.dcm', 'cut'): (True, 200), ('good.dcm', 'flipped'): (False, 200), ('good.dcm', 'head_flipped'): (False, 200), ('good.dcm', 'without_tags'): (True, 100), ('good.dcm', 'resized'): (True, 150),
    ('good.dcm', 'retagged'): (True, 100), ('good.dcm', 'anything'): (False, 100), ('j2k.dcm', 'stream_flipped'): (False, 60), ('jls.dcm', 'stream_flipped'): (False, 60), ('rle.dcm', 'stream_flipped'): (False, 60),
    ('good.json', 'cut'): (True, 100), ('good.json', 'flipped'): (False, 100), ('good.json', 'rewritten'): (True, 200),
    ('i-contours/icontour.txt', 'reworded'): (True, 100), ('i-contours/icontour.txt', 'cut_early'): (True, 20), ('o-contours/ocontour.txt', 'flipped'): (False, 100), ('good.nii.gz', 'cut'): (True, 80),
    ('good.nii.gz', 'flipped'): (False, 80), ('good.nii.gz', 'volume_resized'): (True, 60), ('good.nii.gz', 'header_flipped'): (False, 60), ('good_gt.nii.gz', 'cut'): (True, 40), ('good_gt.nii.gz', 'header_flipped'): (False, 40)}


def test_damaged_files_become_findings():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    total, found, harmless = map(int, re.search(r'(\d+) damaged inputs: (\d+) findings, (\d+) harmless', done.stdout).groups())
    assert total == found + harmless >= 2000 and found > 1000


def strategies(good):
    "Damage by name: good bytes of a file -> strategy of damaged ones."
    import numpy as np, pydicom
    from hypothesis import strategies as st

    def flip(data, places, bits):
        data = bytearray(data)
        for place, bit in zip(places, bits): data[place] ^= 1 << bit
        return bytes(data)

    def flipped(data, end=None):
        places = st.lists(st.integers(0, (end or len(data)) - 1), min_size=1, max_size=20)
        return st.builds(flip, st.just(data), places, st.lists(st.integers(0, 7), min_size=20, max_size=20))

    def saved(data, drop=(), **tags):
        ds = pydicom.dcmread(io.BytesIO(data))
        for keyword in drop: del ds[keyword]
        for keyword, value in tags.items(): setattr(ds, keyword, value)
        out = io.BytesIO(); ds.save_as(out)
        return out.getvalue()

    def spliced(data, tag, value):
        value += b' '*(len(value) % 2)
        place = data.index(tag.to_bytes(4, 'little') + b'DS') + 6
        return data[:place] + len(value).to_bytes(2, 'little') + value + data[place + 2 + int.from_bytes(data[place:place + 2], 'little'):]

    def without_tags(data):
        some = st.sampled_from(['Rows', 'Columns', 'BitsAllocated', 'PixelData']).flatmap(lambda needed: st.sets(st.sampled_from(sorted(
            e.keyword for e in pydicom.dcmread(io.BytesIO(data)) if e.keyword not in (needed, 'SOPClassUID')))).map(lambda others: others | {needed}))
        return st.builds(saved, st.just(data), some)

    def resized(data):
        side = st.one_of(st.just(0), st.integers(500, 65535), st.sampled_from([60000, 65535]))
        other = st.one_of(side, st.just(40))
        return st.builds(lambda rows, columns: saved(data, Rows=rows, Columns=columns), side, other)

    def retagged(data):
        number = st.one_of(st.sampled_from([b'nan', b'inf', b'-inf', b'1e400', b'1\\2']), st.text('abcdxyz+-', min_size=1, max_size=12).map(str.encode))
        return st.one_of(st.builds(spliced, st.just(data), st.sampled_from([0x10530028, 0x10520028]), number), st.integers(2, 10**6).map(lambda n: saved(data, NumberOfFrames=n)),
                         st.integers(2, 65535).map(lambda n: saved(data, SamplesPerPixel=n)), st.floats(10.5, 1e12).map(lambda mm: saved(data, PixelSpacing=[f'{mm:.6g}', '1.5'])),
                         st.text('ABCDEFGHIJKLMNOPQSTUVWXYZ', min_size=2, max_size=8).map(lambda m: saved(data, Modality='X' + m)), st.sampled_from([0, 3, 7, 12, 33, 65535]).map(lambda n: saved(data, BitsAllocated=n)))

    def rewritten(data):
        lists = json.loads(data)
        n = len(lists['epicardial_contours_x'])
        bad = st.one_of(st.lists(st.floats(0, 50), max_size=2), st.just('x'), st.just({}), st.integers(), st.booleans(), st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 10**400, -500., None, 'x', [1]]).flatmap(
            lambda v: st.integers(0, 5).map(lambda i: [v if k == i else 20. for k in range(n)])), st.lists(st.floats(0, 30), min_size=3, max_size=40).filter(lambda x: len(x) not in map(len, lists.values())))
        return st.builds(lambda key, value: json.dumps({**lists, key: value}).encode(), st.sampled_from([k for k in lists if k.startswith('epi')]), bad)

    def reworded(data):
        lines = data.decode().splitlines()
        word = st.one_of(st.text('abcxyz+-', min_size=1, max_size=9), st.sampled_from(['nan nan', 'inf 1', '1 2 3', '7', '1e9 1e9', '-300 20', '1e400 1']), st.floats(600, 1e30).map(lambda v: f'{v} {v}'))
        return st.builds(lambda i, w: '\n'.join([*lines[:i], w, *lines[i + 1:]]).encode(), st.integers(0, len(lines) - 1), word)

    def volume_resized(data):
        def claim(sizes):
            head = bytearray(gzip.decompress(data)); np.frombuffer(head, np.int16, 8, 40)[1:4] = sizes
            return gzip.compress(bytes(head), 1)
        size = st.one_of(st.integers(-32768, 0), st.integers(600, 32767))
        return st.tuples(size, size, size).map(claim)

    return dict(cut=lambda d: st.integers(0, len(d) - 400 if len(d) > 4000 else len(d) - 20).map(lambda n: d[:n]), cut_early=lambda d: st.integers(0, 20).map(lambda n: d[:n]), flipped=flipped,
                head_flipped=lambda d: flipped(d, 700), stream_flipped=lambda d: flipped(d[d.rindex(b'\xe0\x7f\x10\x00'):], 250).map(lambda end: d[:d.rindex(b'\xe0\x7f\x10\x00')] + end), without_tags=without_tags, resized=resized, retagged=retagged, anything=lambda d: st.one_of(st.binary(max_size=4000), st.binary(max_size=400).map(lambda b: d[:300] + b)),
                rewritten=rewritten, reworded=reworded, volume_resized=volume_resized,
                header_flipped=lambda d: flipped(gzip.decompress(d), 352).map(lambda b: gzip.compress(b, 1)))


def good_files(base):
    "A T1 map of a made-up heart with its contours in every form, and a volume with labels."
    import nibabel, numpy as np, pydicom
    from cmr_diffusion.cohort.contours import contours_of, write_contours
    from cmr_diffusion.core import Slice
    from cmr_diffusion.cohort.dicom_writing import write_dicom
    y, x = np.mgrid[:40, :52]
    r = np.hypot(y - 20, x - 30)
    ring = np.where(r < 6, 2, np.where(r < 10, 1, 0)).astype(np.uint8)
    pixels = (np.array([400, 1000, 1600])[ring]*np.random.default_rng(0).normal(1, .03, ring.shape)).astype(np.float32)
    write_dicom(base/'good.dcm', Slice(pixels, (1.5, 1.5), 'T1', ring, 'p', 's'), synthetic=False)
    for name, syntax, plugin in (('j2k', pydicom.uid.JPEG2000Lossless, 'pylibjpeg'), ('jls', pydicom.uid.JPEGLSLossless, 'pyjpegls'), ('rle', pydicom.uid.RLELossless, 'pydicom')):
        ds = pydicom.dcmread(base/'good.dcm'); ds.compress(syntax, encoding_plugin=plugin); ds.save_as(base/f'{name}.dcm')
    write_contours(base/'good.json', contours_of(ring))
    angle = np.linspace(0, 2*np.pi, 40, endpoint=False)
    for k, radius in (('o', 10), ('i', 6)):
        (base/f'{k}-contours').mkdir(); np.savetxt(base/f'{k}-contours'/f'{k}contour.txt', np.c_[30 + radius*np.cos(angle), 20 + radius*np.sin(angle)], fmt='%.2f')
    for name, a in (('good', pixels), ('good_gt', ring)): nibabel.save(nibabel.Nifti1Image(np.repeat(a.T[..., None], 3, 2), np.diag([1.5, 1.5, 8, 1])), base/f'{name}.nii.gz')


def row_for(base, file):
    "The row that reads the damaged file together with good ones."
    from cmr_diffusion.cohort.layouts import slice_row
    nifti = 'nii' in file
    label = 'good_gt.nii.gz' if nifti else 'good.json' if file == 'good.json' else 'i-contours/icontour.txt'
    return slice_row(patient='p', type='T1', slice='s', image=str(base/(file if file.endswith('.dcm') else 'good.nii.gz' if nifti else 'good.dcm')), label=str(base/label), image_index=1 if nifti else -1, label_index=1 if nifti else -1)


def examine(base, file, damaged, fatal):
    "The row of a damaged file, as a cohort has it; sound, or with a reason."
    import numpy as np
    from cmr_diffusion.cohort.layouts import _examined_volume
    from cmr_diffusion.cohort.files import load_slice
    from cmr_diffusion.cohort.quality import SEVERITY
    (base/file).write_bytes(damaged)
    row = _examined_volume([row_for(base, file)])[0]
    row['usable'] = not row['reason']
    if row['reason']:
        assert row['reason'].partition(': ')[0] in SEVERITY and '\n' not in row['reason'] and 'Memory' not in row['reason'], row['reason']
        return row
    assert not fatal, f'{file}: passed'
    s = load_slice(row)
    assert np.isfinite(s.pixels).all() and s.pixels.min() < s.pixels.max() and s.pixels.shape == s.labels.shape and {1, 2} <= set(np.unique(s.labels)) <= {0, 1, 2, 3}
    assert all(math.isnan(v) or .2 <= v <= 10 for v in s.spacing)
    return row


def main():
    import pandas as pd
    from hypothesis import HealthCheck, given, settings
    from cmr_diffusion.cohort.quality import findings
    warnings.simplefilter('ignore')
    count, slowest = Counter(), 0.
    with tempfile.TemporaryDirectory() as d:
        base = Path(d); good_files(base)
        for file in sorted({file for file, _ in EACH}): assert examine(base, file, (base/file).read_bytes(), False)['usable'], file
        resource.setrlimit(resource.RLIMIT_AS, (8*2**30,)*2)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        for (file, damage), (fatal, times) in EACH.items():
            good, rows = (base/file).read_bytes(), []

            @settings(max_examples=times, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
            @given(strategies(good)[damage](good))
            def damaged(data):
                nonlocal slowest
                began = time.perf_counter()
                rows.append(examine(base, file, data, fatal and data != good))
                slowest = max(slowest, time.perf_counter() - began)

            damaged()
            (base/file).write_bytes(good)
            table = pd.DataFrame(rows)
            results = Counter(harmless=int(table.usable.sum()), finding=int((findings(table).action == 'excluded').sum()))
            assert results.total() == len(rows)
            print(f'{file:24} {damage:16} {dict(results)}'); count += results
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/2**20
    print(f"{count.total()} damaged inputs: {count['finding']} findings, {count['harmless']} harmless; none crashed; slowest {slowest:.2f} s, memory +{grown:.2f} GB, {time.process_time() - start:.0f} s of one core")
    assert grown < 1 and slowest < 20


if __name__ == '__main__': main()
