#!/bin/sh
# Makes .venv with everything that `longvpo run miniature`, the checks and the tests need, and installs what is missing for it.
#
# It leaves .venv (and .venv-uv, if this machine has no working uv). While nothing changed it ends within a second and
# touches no network: .venv/longvpo-setup.stamp keeps a checksum of what went in. Every package is installed by hash, as a
# wheel wherever it has one. System packages are installed only as root on Debian or Ubuntu; elsewhere the script stops
# with the one command to type.
set -eu

cd "$(dirname "$0")/.."
root=$(pwd -P)
stamp=.venv/longvpo-setup.stamp
# torch asks for 3.11 or later; torchcodec 0.17 has wheels up to 3.14.
python_request='>=3.11,<3.15'
# What lmms-eval needs and publishes no wheels of. Building these runs their setup.py.
no_wheels='antlr4-python3-runtime transformers-stream-generator zss'
unset PYTHONHOME PYTHONPATH || true

say() { printf 'setup: %s\n' "$*"; }

# stop REASON [COMMAND]: ends the set-up; COMMAND is the one thing to type, on a line of its own.
stop() {
    printf 'setup: %s\n' "$1" >&2
    if [ $# -gt 1 ]; then
        printf 'setup: type this, then repeat what you were doing:\n\n    %s\n\n' "$2" >&2
    fi
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }

# system_command APT DNF BREW CONDA: prints the command that installs these packages with the manager found here, or nothing.
system_command() {
    sudo='sudo '
    ! is_root || sudo=''
    if have apt-get; then
        echo "${sudo}apt-get update && ${sudo}apt-get install -y --no-install-recommends $1"
    elif have dnf; then
        echo "${sudo}dnf install -y $2"
    elif have brew; then
        echo "brew install $3"
    elif have conda; then
        echo "conda install -y -c conda-forge $4"
    fi
}

# apt_install PACKAGE: as root on Debian or Ubuntu installs it, otherwise fails.
apt_install() {
    is_root && have apt-get || return 1
    say "installing $1 with apt-get"
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$1"
}

# What decides whether .venv is up to date.
wanted() {
    { printf '%s\n' "$root"; cat pyproject.toml constraints.txt scripts/uv.txt scripts/setup.sh; grep '^__version__' src/longvpo_hf/__init__.py; } |
        cksum
}

# ---------------------------------------------------------------------------------------------------------------- uv

# A uv that does not start (a version manager's empty shim, say) counts as none.
find_uv() {
    if uv --version >/dev/null 2>&1; then
        uv=uv
    elif .venv-uv/bin/uv --version >/dev/null 2>&1; then
        uv=.venv-uv/bin/uv
    else
        return 1
    fi
}

# Installs uv into .venv-uv and never into the machine's own Python, which many systems forbid ("externally managed").
# With a venv module by venv, with pip alone by --target: Debian ships either without the other.
install_uv() {
    rm -rf .venv-uv
    uv_by_hash='--quiet --only-binary :all: --require-hashes --requirement scripts/uv.txt'
    # shellcheck disable=SC2086  # several words
    if python3 -m venv .venv-uv >/dev/null 2>&1 && .venv-uv/bin/python -m pip install $uv_by_hash; then
        return 0
    fi
    rm -rf .venv-uv
    # shellcheck disable=SC2086
    python3 -m pip --version >/dev/null 2>&1 && python3 -m pip install --target .venv-uv $uv_by_hash
}

need_uv() {
    ! find_uv || return 0
    say "uv is missing, installing it into .venv-uv"
    install_uv || { apt_install python3-venv && install_uv; } || true
    find_uv || stop "uv is missing and could not be installed: python3 here has neither a working venv nor pip, or no package index answers." \
        "$(system_command python3-venv python3-pip uv uv)"
}

# ------------------------------------------------------------------------------------------------------------- Python

python_fits() {
    .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null
}

make_venv() {
    say "making .venv"
    "$uv" venv --quiet --clear --python "$1" .venv
}

need_venv() {
    ! python_fits || return 0
    make_venv "$python_request" ||
        stop "no Python $python_request was found, and uv could not fetch one (offline, or downloads are switched off)." \
            "$uv python install 3.12"
}

# ------------------------------------------------------------------------------------------------------------- FFmpeg

# Whether .venv's Python finds FFmpeg's shared libraries, of one of the major versions torchcodec supports (4 to 9).
ffmpeg_loads() {
    .venv/bin/python - 2>/dev/null <<'PYTHON'
import ctypes, itertools, sys
first = {"avutil": 56, "avcodec": 58, "avformat": 58, "avdevice": 58, "avfilter": 7}  # sonames of FFmpeg 4; each major adds 1
folders = ["", "/opt/homebrew/opt/ffmpeg/lib/", "/opt/homebrew/lib/", "/usr/local/lib/"] if sys.platform == "darwin" else [""]
form = "{}lib{}.{}.dylib" if sys.platform == "darwin" else "{}lib{}.so.{}"
for newer, folder in itertools.product(range(6), folders):
    try:
        for name, soname in first.items():
            ctypes.CDLL(form.format(folder, name, soname + newer))
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
PYTHON
}

need_ffmpeg() {
    ! ffmpeg_loads || return 0
    # conda's libraries are found only by conda's own Python.
    if [ -n "${CONDA_PREFIX:-}" ] && ls "$CONDA_PREFIX"/lib/libavcodec.* >/dev/null 2>&1; then
        make_venv "$CONDA_PREFIX/bin/python" || true
        ! { python_fits && ffmpeg_loads; } || return 0
        need_venv
    fi
    apt_install ffmpeg || true
    ffmpeg_loads || stop "FFmpeg's shared libraries (version 4 to 9) are missing." "$(system_command ffmpeg ffmpeg-free ffmpeg ffmpeg)"
}

# Importing torchcodec proves nothing (it loads FFmpeg at first use), hence a tiny video there and back.
torchcodec_works() {
    .venv/bin/python - <<'PYTHON'
import torch
from torchcodec.decoders import VideoDecoder
from torchcodec.encoders import VideoEncoder

frames = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
assert len(VideoDecoder(VideoEncoder(frames, frame_rate=4).to_tensor(format="mp4"))) == 4
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------- all

find_uv || true
if [ -n "${uv:-}" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted)" ] && python_fits && ffmpeg_loads; then
    exit 0
fi

need_uv
need_venv
need_ffmpeg
rm -f "$stamp"
say "installing the package and its dependencies into .venv (the first time about 6 GB, from your package index)"
# Compiled once here, which takes a minute on two cores: importing the trainer takes 13 s of processor time without, 5.5 s with.
sources=''
for package in $no_wheels; do
    sources="$sources --no-binary $package"
done
# shellcheck disable=SC2086  # several words
"$uv" pip install --python .venv/bin/python --compile-bytecode --require-hashes --only-binary :all: $sources \
    --build-constraint constraints.txt --requirement constraints.txt ||
    stop "the dependencies could not be installed; uv's reason stands above."
# The package itself; its build tool has the pinned version.
"$uv" pip install --python .venv/bin/python --no-deps --build-constraint constraints.txt --editable . ||
    stop "the package could not be installed; uv's reason stands above."
torchcodec_works || stop "torchcodec cannot write and read a video; its reason stands above. FFmpeg 4 to 9 with an H.264 encoder is needed."
wanted >"$stamp"
if [ "$uv" = uv ]; then
    say "done. Try: uv run longvpo run miniature"
else
    say "done. Try: .venv/bin/longvpo run miniature  (no working uv is on your PATH; one lies in .venv-uv/bin)"
fi
