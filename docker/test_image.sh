#!/bin/bash
# Builds the image of Dockerfile_ssh, logs in to it as a user does, and says what works. Slow: run it by hand.
#   docker/test_image.sh                     with docker where its daemon answers, else with buildah (as root)
#   PACKAGES=.venv/lib/python3.11/site-packages docker/test_image.sh
#                                            packages that are there are mounted instead of installed: minutes instead of 7 GB
# Further settings: ENGINE=docker|buildah; BASE=an image for docker; IMAGE=NAME, which is built already and kept;
# WORK=folder for what is made, which is kept (else it is removed); USER_ID=number of the user in the image; PORT.
# Needs openssh-server on this machine, and for buildah also: apt-get install buildah mmdebstrap
# buildah needs no image from a registry: mmdebstrap makes a base of this machine's Debian, and chroot isolation needs no
# daemon. It shares processes and network with this machine, so that sshd listens on its loopback as docker's -p does.
set -u
cd "$(dirname "$0")/.." || exit 1
KEEP=${WORK:-} BUILT=
WORK=${WORK:-$(mktemp -d)} PORT=${PORT:-2222} USER_ID=${USER_ID:-23456} PACKAGES=${PACKAGES:-} IMAGE=${IMAGE:-}
JUMP_PORT=$((PORT + 1))
NAME=cmr_test_$$
mkdir -p "$WORK"
HERE=$(mktemp -d "$WORK/trial.XXXX")
if [ -z "${ENGINE:-}" ]; then
    if docker info > /dev/null 2>&1; then ENGINE=docker; else ENGINE=buildah; fi
fi
if [ "$ENGINE" = buildah ]; then
    if [ "$(id -u)" != 0 ] || ! command -v buildah mmdebstrap > /dev/null; then
        echo 'buildah, mmdebstrap and root are needed, or a docker daemon that answers' >&2
        exit 2
    elif pgrep -u "$USER_ID" > /dev/null; then
        echo "user $USER_ID has programs on this machine, which a stop of the container would end: choose another USER_ID" >&2
        exit 2
    fi
fi
export CONTAINERS_STORAGE_CONF=$WORK/storage.conf
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/storage"\nrunroot = "%s/run"\n' "$WORK" "$WORK" > "$CONTAINERS_STORAGE_CONF"

passed=0 failed=0 mounts=() variables=()

# check WHAT COMMAND...: runs the command and says whether it worked; what it said is shown where it did not.
check() {
    local what=$1
    shift
    if "$@" > "$HERE/said" 2>&1; then
        passed=$((passed + 1))
        echo "passed: $what"
    else
        failed=$((failed + 1))
        echo "failed: $what"
        sed 's/^/    /' "$HERE/said" | tail -15
    fi
}

# says WORDS COMMAND...: whether the output of a command has these words, whatever its exit code.
says() {
    local words=$1
    shift
    "$@" > "$HERE/output" 2>&1
    cat "$HERE/output"
    grep -q -e "$words" "$HERE/output"
}

# silent COMMAND...: whether a command works and says nothing.
silent() {
    "$@" > "$HERE/output" 2>&1 || return 1
    cat "$HERE/output"
    [ ! -s "$HERE/output" ]
}

patiently() { for _ in $(seq 300); do "$@" > /dev/null 2>&1 && return; sleep 0.5; done; "$@"; }

# ---- the engines: build, create (a container from the image), begin (its first process), halt, discard, log

base_of_this_machine() {
    local sources=(/etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list) given=() file
    for file in "${sources[@]}"; do if [ -s "$file" ]; then given+=("$file"); fi; done
    local certificates=/usr/local/share/ca-certificates
    # shellcheck disable=SC2016 # $1 is the new system's folder, and is filled in by mmdebstrap
    mmdebstrap --quiet --variant=apt --include=ca-certificates --dpkgopt=force-unsafe-io \
        --customize-hook="copy-in $certificates /usr/local/share" --customize-hook='chroot "$1" update-ca-certificates' \
        --customize-hook='printf "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n" > "$1/etc/pip.conf"' \
        "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$WORK/new.tar" "${given[@]}" && mv "$WORK/new.tar" "$WORK/base.tar"
}

build() {
    local arguments=(--build-arg "USER_ID=$USER_ID")
    if [ -n "$PACKAGES" ]; then arguments+=(--build-arg PIP_NO_DEPS=1); fi
    if [ "$ENGINE" = docker ]; then
        if [ -n "${BASE:-}" ]; then arguments+=(--build-arg "BASE=$BASE"); fi
        docker build -q -f Dockerfile_ssh "${arguments[@]}" -t "$IMAGE" .
        return
    fi
    if ! buildah inspect --type image localhost/cmr_base > /dev/null 2>&1; then
        [ -s "$WORK/base.tar" ] || base_of_this_machine || return 1
        local base
        base=$(buildah from scratch) && buildah add -q "$base" "$WORK/base.tar" && buildah commit -q "$base" cmr_base && buildah rm "$base" || return 1
    fi
    buildah bud --isolation chroot -f Dockerfile_ssh --build-arg BASE=localhost/cmr_base "${arguments[@]}" -t "$IMAGE" .
}

# The first process of buildah's container, as this machine sees it.
first_process() { pgrep -xf "/bin/bash /usr/local/bin/start_sshd -p $PORT -o ListenAddress=127.0.0.1"; }

create() {
    if [ "$ENGINE" = docker ]; then
        docker create --name "$NAME" --stop-timeout 120 -p "127.0.0.1:$PORT:22" "${variables[@]/#/--env=}" "${mounts[@]/#/--volume=}" "$IMAGE"
    else
        buildah from --name "$NAME" "$IMAGE"
    fi
}

begin() {
    if [ "$ENGINE" = docker ]; then
        docker start "$NAME"
    else
        buildah run --isolation chroot "${variables[@]/#/--env=}" "${mounts[@]/#/--volume=}" "$NAME" -- \
            /bin/bash /usr/local/bin/start_sshd -p "$PORT" -o ListenAddress=127.0.0.1 >> "$HERE/log" 2>&1 < /dev/null &
    fi
}

halt() {
    if [ "$ENGINE" = docker ]; then docker stop "$NAME"; return; fi
    local first
    first=$(first_process) && kill "$first" || return 1
    for _ in $(seq 600); do kill -0 "$first" 2> /dev/null || return 0; sleep 0.2; done
    return 1
}

discard() { if [ "$ENGINE" = docker ]; then docker rm -f "$NAME"; else buildah rm "$NAME"; fi; }
log() { if [ "$ENGINE" = docker ]; then docker logs "$NAME" 2>&1; else cat "$HERE/log"; fi; }

# refused WORDS MOUNT...: a container with these mounts ends at once, with exit code 1 and these words in one line.
refused() {
    local words=$1 code
    shift
    if [ "$ENGINE" = docker ]; then
        docker run --rm "${@/#/--volume=}" "$IMAGE" > "$HERE/refusal" 2>&1
    else
        local one=${NAME}_refused
        buildah from -q --name "$one" "$IMAGE" > /dev/null
        buildah run --isolation chroot "${@/#/--volume=}" "$one" -- /bin/bash /usr/local/bin/start_sshd -p "$PORT" > "$HERE/refusal" 2>&1
    fi
    code=$?
    if [ "$ENGINE" = buildah ]; then buildah rm "$one" > /dev/null; fi
    cat "$HERE/refusal"
    [ $code = 1 ] && [ "$(grep -c -e "$words" "$HERE/refusal")" = 1 ]
}

clean() {
    if [ -n "${forward:-}" ]; then kill "$forward"; fi
    if [ -n "${jump:-}" ]; then kill "$jump"; fi
    if [ "$ENGINE" = buildah ]; then halt; fi
    discard
    if [ -n "$BUILT" ] && [ "$ENGINE" = docker ]; then docker rmi "$IMAGE"; fi
    if [ -z "$KEEP" ]; then
        if [ "$ENGINE" = buildah ]; then buildah rmi --all --force; fi
        rm -rf "$WORK"
    fi
} > /dev/null 2>&1
trap clean EXIT

# ---- the user's computer: keys, the block of docker/ssh_config, and a second sshd that plays the server

ssh-keygen -q -t ed25519 -N '' -f "$HERE/key"
ssh-keygen -q -t ed25519 -N '' -f "$HERE/stranger"
ssh-keygen -q -t ed25519 -N '' -f "$HERE/jump_host_key"
mkdir "$HERE/mlruns" "$HERE/data" "$HERE/foreign" "$HERE/folder.pub"
chown "$USER_ID" "$HERE/mlruns" "$HERE/data" 2> /dev/null
chmod 755 "$WORK" "$HERE"
cat > "$HERE/ssh_config" <<EOF
Host gpu
    HostName 127.0.0.1
    User $(id -un)
    Port $JUMP_PORT
Host cmr
    Port $PORT
Host *
    IdentityFile ${HERE}/key
    IdentitiesOnly yes
    BatchMode yes
    ConnectTimeout 10
    UserKnownHostsFile ${HERE}/known_hosts
    StrictHostKeyChecking accept-new
EOF
sed 's/LocalForward \([0-9]\)/LocalForward 1\1/' docker/ssh_config >> "$HERE/ssh_config" # 18888 and 15000: this machine may use the others
cp "$HERE/key.pub" "$HERE/jump_keys"
mkdir -p /run/sshd 2> /dev/null
/usr/sbin/sshd -D -f /dev/null -h "$HERE/jump_host_key" -p "$JUMP_PORT" -o ListenAddress=127.0.0.1 -o "AuthorizedKeysFile=$HERE/jump_keys" \
    -o StrictModes=no -o PasswordAuthentication=no -o UsePAM=no -o PidFile=none -E "$HERE/jump.log" &
jump=$!

# A session without the two forwards, and one straight to the container for keys and users that are to be refused.
cmr() { ssh -F "$HERE/ssh_config" -o ClearAllForwardings=yes cmr "$@"; }
straight() { ssh -F "$HERE/ssh_config" -o ProxyJump=none -o HostName=127.0.0.1 -o ClearAllForwardings=yes "$@"; }
transfer() { printf '%s\n' "$@" | sftp -q -F "$HERE/ssh_config" -o ClearAllForwardings=yes -b - cmr; }

# ---- the trial

echo "engine: $ENGINE; packages: ${PACKAGES:-installed from the index}"
if [ -z "$IMAGE" ]; then
    IMAGE=cmr_image_test BUILT=yes
    check 'the image is built' build
    [ $failed = 0 ] || exit 1
fi

key=$HERE/key.pub:/keys.pub:ro
check 'no key mounted: refused in one line' refused 'no public key at /keys.pub' "$HERE/mlruns:/home/cmr/cmr_diffusion/mlruns"
check 'a folder in place of the key: refused in one line' refused '/keys.pub is a folder' "$HERE/folder.pub:/keys.pub:ro"
check 'a private key: refused in one line' refused 'is a private key' "$HERE/key:/keys.pub:ro"
check 'no key at all in the file: refused in one line' refused 'not a public key' "$PWD/LICENSE:/keys.pub:ro"
check 'mlruns of another owner: refused in one line' refused "cannot write to .*chown -R $USER_ID" "$key" "$HERE/foreign:/home/cmr/cmr_diffusion/mlruns"
check 'data of another owner: refused in one line' refused "cannot write to /data.*chown -R $USER_ID" "$key" "$HERE/foreign:/data"

mounts=("$key" "$HERE/mlruns:/home/cmr/cmr_diffusion/mlruns" "$HERE/data:/data")
variables=(MLFLOW_EXPERIMENT_NAME=trial OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE)
if [ -n "$PACKAGES" ]; then
    site=/home/cmr/cmr_diffusion/.venv
    echo /packages > "$HERE/packages.pth"
    printf '#!/bin/sh\nexec %s/bin/python -m mlflow "$@"\n' $site > "$HERE/mlflow"
    chmod 755 "$HERE/mlflow"
    mounts+=("$(realpath "$PACKAGES"):/packages:ro" "$HERE/packages.pth:$site/lib/$(basename "$(dirname "$(realpath "$PACKAGES")")")/site-packages/packages.pth:ro")
    mounts+=("$HERE/mlflow:$site/bin/mlflow:ro")
fi
create > /dev/null
begin > /dev/null
check 'the container starts, and a key logs in through the server (ProxyJump)' patiently says '^cmr$' cmr id -un
check 'a password is refused' says 'Permission denied (publickey)' straight -o PubkeyAuthentication=no -o BatchMode=no -o PreferredAuthentications=password,keyboard-interactive cmr true
check 'root is refused with the same key' says 'Permission denied' straight -o User=root cmr true
check "a stranger's key is refused" says 'Permission denied' straight -o IdentityFile=none -o "IdentityFile=$HERE/stranger" -F /dev/null -p "$PORT" \
    -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes cmr@127.0.0.1 true

head -c 300000 /dev/urandom > "$HERE/sent"
check 'sftp: put and get give the same file' eval 'transfer "put $HERE/sent /data/sent" "get /data/sent $HERE/got" && cmp "$HERE/sent" "$HERE/got"'
check 'what is put to /data lies on the server' cmp "$HERE/sent" "$HERE/data/sent"
if command -v rsync > /dev/null; then
    check 'rsync' rsync -e "ssh -F $HERE/ssh_config -o ClearAllForwardings=yes" "$HERE/sent" cmr:sent
else
    echo 'skipped: rsync is not installed here'
fi
check 'ssh host cmr_train --help' says 'Train a model on a cache' cmr cmr_train --help
check 'a log-in shell has the same commands' says '/home/cmr/cmr_diffusion/.venv/bin/cmr_train' cmr 'bash -lc "command -v cmr_train"'
check 'tmux, rsync, curl, less, nano, vi, git are there' eval '[ "$(cmr command -v tmux rsync curl less nano vi git | wc -l)" = 7 ]'
check "a client's locale that the image lacks gives no warning" silent env LANG=hu_HU.UTF-8 LC_ALL=hu_HU.UTF-8 \
    ssh -F "$HERE/ssh_config" -o ProxyJump=none -o HostName=127.0.0.1 -o ClearAllForwardings=yes -o SendEnv='LANG LC_*' cmr true
check 'docker run -e NAME=VALUE reaches the session' says '^trial$' cmr 'echo $MLFLOW_EXPERIMENT_NAME'
if [ -d .git ]; then
    check 'the image knows the commit' says "^$(git rev-parse HEAD)$" cmr git -C cmr_diffusion rev-parse HEAD
    check 'no tracked file is missing or changed' eval '[ "$(cmr git -C cmr_diffusion status --porcelain)" = "$(git status --porcelain)" ]'
    check "the remote repository's address stayed outside" says 'No such file' cmr ls cmr_diffusion/.git/config
fi
check 'a notebook runs' cmr 'cd cmr_diffusion && nbdev_test nbs/00_core.ipynb'

check 'cohort and cache on the data mount' cmr 'cd /data && cmr_phantom phantom --patients 6 && cmr_prepare phantom cache --size 32'
check 'a training is started in tmux' cmr 'tmux new -d -s night "cmr_train /data/cache --preset tiny --steps 100000 --minutes 30 --save-every 0.01 --run-name night 2>&1 | tee /data/night.log"'
points() { find "$HERE/mlruns" -name 'step_*' -newer "$1" | grep .; }
patiently points "$HERE/sent"
touch "$HERE/now"
check 'its line has dropped, and it trains on (a new point to resume from)' patiently points "$HERE/now"

# The forwards of docker/ssh_config, as an editor or a browser uses them.
cmr 'tmux new -d -s ui "cd cmr_diffusion && MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --port 5000 --backend-store-uri \$MLFLOW_TRACKING_URI"; tmux new -d -s web "cd /data && python -m http.server 8888 --bind 127.0.0.1"'
ssh -F "$HERE/ssh_config" -o ExitOnForwardFailure=yes -N cmr > "$HERE/forward.log" 2>&1 &
forward=$!
check 'port 8888 is forwarded (a small HTTP server)' patiently eval 'curl -sf http://localhost:18888/sent | cmp - "$HERE/sent"'
check 'port 5000 is forwarded (the MLflow UI is healthy)' patiently curl -sf http://localhost:15000/health
kill "$forward"
cmr 'tmux kill-session -t ui; tmux kill-session -t web'

cmr "cat >> .ssh/authorized_keys; chmod 600 .ssh/authorized_keys" < "$HERE/stranger.pub"
before=$(date +%s)
check 'docker stop (SIGTERM) ends the container' halt
echo "    in $(($(date +%s) - before)) s"
check 'its log says that programs were asked to stop' says 'asking [0-9]* program' log
check 'sshd is gone' eval '! straight cmr true'
check 'the training finished its step and said how to go on' grep -q 'cmr_train /data/cache --resume' "$HERE/data/night.log"
begin > /dev/null
check 'a second start, with the same host key' patiently cmr true
check 'a file in the home folder is kept' cmr test -s sent
check 'a key that the user added is kept' straight -o "IdentityFile=$HERE/stranger" cmr true
cmr 'tmux new -d -s night "cmr_train /data/cache --resume night 2>&1 | tee /data/second.log"'
check 'cmr_train --resume goes on with the training' patiently grep -q 'goes on from step' "$HERE/data/second.log"
halt > /dev/null

discard > /dev/null
create > /dev/null
begin > /dev/null
ssh-keygen -q -R cmr -f "$HERE/known_hosts" > /dev/null 2>&1
check 'a new container (after ssh-keygen -R cmr) has the runs and the data' patiently cmr 'test -s cmr_diffusion/mlruns/mlflow.db && test -s /data/cache/cache.json'
check 'and not what lay in the home folder' eval '! cmr test -e sent'
before=$(date +%s)
check 'docker stop where nothing runs' halt
check 'takes less than 10 s' [ $(($(date +%s) - before)) -lt 10 ]

echo "$passed passed, $failed failed"
[ $failed = 0 ]
