"""Two thousand damaged files, drawn by hypothesis: none may crash the reader, hang it or take a gigabyte.

What no slice can survive must become a finding; whatever passes must be sound. The reading runs in a process of its
own, with a memory limit, so that a crash or a hang of a decoder is seen too; it prints the counts."""
import gzip, io, json, math, re, resource, subprocess, sys, tempfile, time, warnings
from collections import Counter
from pathlib import Path

DICOM, JSON, INNER, OUTER = 'good.dcm', 'good.json', 'i-contours/icontour.txt', 'o-contours/ocontour.txt'
VOLUME, LABELS = 'good.nii.gz', 'good_gt.nii.gz'
EACH = {  # (file, damage): whether no slice can survive it, how many
    (DICOM, 'cut'): (True, 200), (DICOM, 'flipped'): (False, 200), (DICOM, 'head_flipped'): (False, 200),
    (DICOM, 'without_tags'): (True, 100), (DICOM, 'resized'): (True, 150), (DICOM, 'retagged'): (True, 100),
    (DICOM, 'anything'): (False, 100),
    ('j2k.dcm', 'stream_flipped'): (False, 60), ('jls.dcm', 'stream_flipped'): (False, 60),
    ('rle.dcm', 'stream_flipped'): (False, 60),
    (JSON, 'cut'): (True, 100), (JSON, 'flipped'): (False, 100), (JSON, 'rewritten'): (True, 200),
    (INNER, 'reworded'): (True, 100), (INNER, 'cut_early'): (True, 20), (OUTER, 'flipped'): (False, 100),
    (VOLUME, 'cut'): (True, 80), (VOLUME, 'flipped'): (False, 80), (VOLUME, 'volume_resized'): (True, 60),
    (VOLUME, 'header_flipped'): (False, 60),
    (LABELS, 'cut'): (True, 40), (LABELS, 'header_flipped'): (False, 40)}


def test_damaged_files_become_findings():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = re.search(r'(\d+) damaged inputs: (\d+) findings, (\d+) harmless', done.stdout)
    total, found, harmless = map(int, counts.groups())
    assert total == found + harmless >= 2000 and found > 1000


def any_damage(st):
    "Damage to the bytes of any file: name -> (good bytes -> strategy of damaged ones)."
    def flip(data, places, bits):
        data = bytearray(data)
        for place, bit in zip(places, bits): data[place] ^= 1 << bit
        return bytes(data)

    def flipped(data, end=None):
        places = st.lists(st.integers(0, (end or len(data)) - 1), min_size=1, max_size=20)
        return st.builds(flip, st.just(data), places, st.lists(st.integers(0, 7), min_size=20, max_size=20))

    def cut(data):
        longest = len(data) - 400 if len(data) > 4000 else len(data) - 20
        return st.integers(0, longest).map(lambda n: data[:n])

    def stream_flipped(data):
        start = data.rindex(b'\xe0\x7f\x10\x00')  # the tag of the pixel data
        return flipped(data[start:], 250).map(lambda end: data[:start] + end)

    def header_flipped(data):
        return flipped(gzip.decompress(data), 352).map(lambda damaged: gzip.compress(damaged, 1))

    def anything(data):
        return st.one_of(st.binary(max_size=4000), st.binary(max_size=400).map(lambda end: data[:300] + end))

    def cut_early(data): return st.integers(0, 20).map(lambda n: data[:n])
    def head_flipped(data): return flipped(data, 700)

    return dict(cut=cut, cut_early=cut_early, flipped=flipped, head_flipped=head_flipped, stream_flipped=stream_flipped,
                header_flipped=header_flipped, anything=anything)


def dicom_damage(st):
    "Damage to the tags of a DICOM file."
    import pydicom

    def saved(data, drop=(), **tags):
        ds = pydicom.dcmread(io.BytesIO(data))
        for keyword in drop: del ds[keyword]
        for keyword, value in tags.items(): setattr(ds, keyword, value)
        out = io.BytesIO()
        ds.save_as(out)
        return out.getvalue()

    def spliced(data, tag, value):
        "Another text in a decimal string, as no writer would write it."
        value += b' '*(len(value) % 2)
        place = data.index(tag.to_bytes(4, 'little') + b'DS') + 6
        end = place + 2 + int.from_bytes(data[place:place + 2], 'little')
        return data[:place] + len(value).to_bytes(2, 'little') + value + data[end:]

    def without(data, needed):
        "Without a tag that reading needs, and some others."
        tags = pydicom.dcmread(io.BytesIO(data))
        keywords = sorted(e.keyword for e in tags if e.keyword not in (needed, 'SOPClassUID'))
        return st.sets(st.sampled_from(keywords)).map(lambda others: others | {needed})

    def without_tags(data):
        needed = st.sampled_from(['Rows', 'Columns', 'BitsAllocated', 'PixelData'])
        return st.builds(saved, st.just(data), needed.flatmap(lambda keyword: without(data, keyword)))

    def resized(data):
        side = st.one_of(st.just(0), st.integers(500, 65535), st.sampled_from([60000, 65535]))
        other = st.one_of(side, st.just(40))
        return st.builds(lambda rows, columns: saved(data, Rows=rows, Columns=columns), side, other)

    def retagged(data):
        number = st.one_of(st.sampled_from([b'nan', b'inf', b'-inf', b'1e400', b'1\\2']),
                           st.text('abcdxyz+-', min_size=1, max_size=12).map(str.encode))
        modality = st.text('ABCDEFGHIJKLMNOPQSTUVWXYZ', min_size=2, max_size=8)
        return st.one_of(
            st.builds(spliced, st.just(data), st.sampled_from([0x10530028, 0x10520028]), number),
            st.integers(2, 10**6).map(lambda n: saved(data, NumberOfFrames=n)),
            st.integers(2, 65535).map(lambda n: saved(data, SamplesPerPixel=n)),
            st.floats(10.5, 1e12).map(lambda mm: saved(data, PixelSpacing=[f'{mm:.6g}', '1.5'])),
            modality.map(lambda m: saved(data, Modality='X' + m)),
            st.sampled_from([0, 3, 7, 12, 33, 65535]).map(lambda n: saved(data, BitsAllocated=n)))

    return dict(without_tags=without_tags, resized=resized, retagged=retagged)


def contour_damage(st):
    "Damage to what a contour file says."
    odd_values = [math.nan, math.inf, -math.inf, 1e300, 10**400, -500., None, 'x', [1]]

    def rewritten(data):
        lists = json.loads(data)
        n = len(lists['epicardial_contours_x'])
        one_odd = st.sampled_from(odd_values).flatmap(
            lambda value: st.integers(0, 5).map(lambda i: [value if k == i else 20. for k in range(n)]))
        lengths = {len(values) for values in lists.values()}
        other_length = st.lists(st.floats(0, 30), min_size=3, max_size=40).filter(lambda x: len(x) not in lengths)
        too_short = st.lists(st.floats(0, 50), max_size=2)
        bad = st.one_of(too_short, st.just('x'), st.just({}), st.integers(), st.booleans(), one_odd, other_length)
        keys = [key for key in lists if key.startswith('epi')]
        return st.builds(lambda key, value: json.dumps({**lists, key: value}).encode(), st.sampled_from(keys), bad)

    def reworded(data):
        lines = data.decode().splitlines()
        word = st.one_of(st.text('abcxyz+-', min_size=1, max_size=9),
                         st.sampled_from(['nan nan', 'inf 1', '1 2 3', '7', '1e9 1e9', '-300 20', '1e400 1']),
                         st.floats(600, 1e30).map(lambda v: f'{v} {v}'))

        def with_word(i, word): return '\n'.join([*lines[:i], word, *lines[i + 1:]]).encode()
        return st.builds(with_word, st.integers(0, len(lines) - 1), word)

    return dict(rewritten=rewritten, reworded=reworded)


def volume_damage(st):
    "Damage to the header of a NIfTI volume."
    import numpy as np

    def volume_resized(data):
        def claim(sizes):
            head = bytearray(gzip.decompress(data))
            np.frombuffer(head, np.int16, 8, 40)[1:4] = sizes
            return gzip.compress(bytes(head), 1)
        size = st.one_of(st.integers(-32768, 0), st.integers(600, 32767))
        return st.tuples(size, size, size).map(claim)

    return dict(volume_resized=volume_resized)


def good_files(base):
    "A T1 map of a made-up heart with its contours in every form, and a volume with labels."
    import nibabel, numpy as np, pydicom
    from cmr_diffusion.cohort.contours import contours_of, write_contours
    from cmr_diffusion.cohort.dicom_writing import write_dicom
    from cmr_diffusion.core import Slice
    y, x = np.mgrid[:40, :52]
    r = np.hypot(y - 20, x - 30)
    ring = np.where(r < 6, 2, np.where(r < 10, 1, 0)).astype(np.uint8)
    noise = np.random.default_rng(0).normal(1, .03, ring.shape)
    pixels = (np.array([400, 1000, 1600])[ring]*noise).astype(np.float32)
    write_dicom(base/DICOM, Slice(pixels, (1.5, 1.5), 'T1', ring, 'p', 's'), synthetic=False)
    compressions = dict(j2k=(pydicom.uid.JPEG2000Lossless, 'pylibjpeg'), jls=(pydicom.uid.JPEGLSLossless, 'pyjpegls'),
                        rle=(pydicom.uid.RLELossless, 'pydicom'))
    for name, (syntax, plugin) in compressions.items():
        ds = pydicom.dcmread(base/DICOM)
        ds.compress(syntax, encoding_plugin=plugin)
        ds.save_as(base/f'{name}.dcm')
    write_contours(base/JSON, contours_of(ring))
    angle = np.linspace(0, 2*np.pi, 40, endpoint=False)
    for file, radius in ((OUTER, 10), (INNER, 6)):
        (base/file).parent.mkdir()
        np.savetxt(base/file, np.c_[30 + radius*np.cos(angle), 20 + radius*np.sin(angle)], fmt='%.2f')
    for file, a in ((VOLUME, pixels), (LABELS, ring)):
        nibabel.save(nibabel.Nifti1Image(np.repeat(a.T[..., None], 3, 2), np.diag([1.5, 1.5, 8, 1])), base/file)


def row_for(base, file):
    "The row that reads the damaged file together with good ones."
    from cmr_diffusion.cohort.layouts import slice_row
    nifti = file in (VOLUME, LABELS)
    image = file if file.endswith('.dcm') else VOLUME if nifti else DICOM
    label = LABELS if nifti else JSON if file == JSON else INNER
    index = 1 if nifti else -1
    return slice_row(patient='p', type='T1', slice='s', image=str(base/image), label=str(base/label),
                     image_index=index, label_index=index)


def examine(base, file, damaged, fatal):
    "The row of a damaged file, as a cohort has it; sound, or with a reason."
    import numpy as np
    from cmr_diffusion.cohort.files import load_slice
    from cmr_diffusion.cohort.layouts import examine_volume
    from cmr_diffusion.cohort.quality import SEVERITY
    (base/file).write_bytes(damaged)
    row = examine_volume([row_for(base, file)])[0]
    row['usable'] = not row['reason']
    if row['reason']:
        kind = row['reason'].partition(': ')[0]
        assert kind in SEVERITY and '\n' not in row['reason'] and 'Memory' not in row['reason'], row['reason']
        return row
    assert not fatal, f'{file}: passed'
    s = load_slice(row)
    assert np.isfinite(s.pixels).all() and s.pixels.min() < s.pixels.max() and s.pixels.shape == s.labels.shape
    assert {1, 2} <= set(np.unique(s.labels)) <= {0, 1, 2, 3}
    assert all(math.isnan(v) or .2 <= v <= 10 for v in s.spacing)
    return row


def main():
    import pandas as pd
    from hypothesis import HealthCheck, given, settings, strategies as st
    from cmr_diffusion.cohort.quality import findings
    warnings.simplefilter('ignore')
    damages = any_damage(st) | dicom_damage(st) | contour_damage(st) | volume_damage(st)
    count, slowest = Counter(), 0.
    with tempfile.TemporaryDirectory() as d:
        base = Path(d)
        good_files(base)
        for file in sorted({file for file, _ in EACH}):
            assert examine(base, file, (base/file).read_bytes(), False)['usable'], file
        resource.setrlimit(resource.RLIMIT_AS, (8*2**30,)*2)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        for (file, damage), (fatal, times) in EACH.items():
            good, rows = (base/file).read_bytes(), []

            @settings(max_examples=times, derandomize=True, database=None, deadline=None,
                      suppress_health_check=list(HealthCheck))
            @given(damages[damage](good))
            def damaged(data):
                nonlocal slowest
                began = time.perf_counter()
                rows.append(examine(base, file, data, fatal and data != good))
                slowest = max(slowest, time.perf_counter() - began)

            damaged()
            (base/file).write_bytes(good)
            table = pd.DataFrame(rows)
            excluded = int((findings(table).action == 'excluded').sum())
            results = Counter(harmless=int(table.usable.sum()), finding=excluded)
            assert results.total() == len(rows)
            print(f'{file:24} {damage:16} {dict(results)}')
            count += results
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/2**20
    print(f"{count.total()} damaged inputs: {count['finding']} findings, {count['harmless']} harmless; none crashed;",
          f'slowest {slowest:.2f} s, memory +{grown:.2f} GB, {time.process_time() - start:.0f} s of one core')
    assert grown < 1 and slowest < 20


if __name__ == '__main__': main()
