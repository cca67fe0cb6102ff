#!/bin/sh
# Makes this clone ready to run: Debian packages, a virtual environment in .venv, the pinned dependencies in it, and the
# package itself with its compiled parts. ./demo, ./test and the Makefile call it first; when nothing has changed since,
# it is through in a moment.
#
# Usage: scripts/setup.sh runtime|test|dev|fuzz
#
#   runtime  what ./demo needs
#   test     runtime, and what ./test and `make bench` need
#   dev      test, and what `make check` and `make lock` need; also QEMU, libvirt, a guest's kernel and Chromium, for the tests with them
#   fuzz     test, and what `make fuzz` needs
#
# Environment:
#   PYTHON                  the interpreter to make .venv with (default: the first of python3, /usr/bin/python3,
#                           python3.13, python3.12 and python3.11 that is new enough)
#   SPVTPM_SKIP_PACKAGES=1  do not look for Debian packages: whatever is needed was installed in another way
#
# Exit codes: 0 ready; 2 wrong usage; 4 something is missing, and was named.
set -eu
unset CDPATH
cd -- "$(dirname -- "$0")/.."
root=$(pwd -P)
venv=$root/.venv
log=$venv/setup.log

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    for line; do say "$line"; done
    exit 4
}

# Runs a command with its output in a file; on failure shows the end of that.
logged() {
    file=$1
    shift
    "$@" >>"$file" 2>&1 </dev/null && return
    say "failed: $*"
    say "the end of $file:"
    tail -n 30 -- "$file" >&2
    return 1
}

# libtpms: the TPM. libssl: frames in VM memory. libseccomp: the workers' sandbox. The TPM client libraries of the `cmd` and `swtpm` kind: how
# tpm2-tools reaches a vTPM. libc6-dev: without recommended packages gcc comes alone.
packages="gcc libc6-dev libtpms-dev libssl-dev libseccomp-dev tpm2-tools libtss2-tcti-cmd0 libtss2-tcti-swtpm0 openssl"
# tpm2-pytss is compiled here. swtpm and its tools: the benchmarks compare with them, and it is the host's TPM. softhsm2: a PKCS#11 token.
# postgresql: the tests start servers of their own from its programs; the one that Debian sets up is not used.
# spin: the checker of models/.
test_packages="libtss2-dev pkgconf swtpm swtpm-tools softhsm2 postgresql spin"
# What runs the tests' guests.
guest_packages="qemu-system-x86 ovmf libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu"
level=${1-}
case $level in
runtime) enough="runtime test dev fuzz" ;;
test) enough="test dev fuzz" packages="$packages $test_packages" ;;
dev) enough="dev" packages="$packages $test_packages $guest_packages chromium make git" ;;
fuzz) enough="fuzz" packages="$packages $test_packages clang" ;; # and its sanitizers, see below
*)
    echo "usage: scripts/setup.sh runtime|test|dev|fuzz" >&2
    exit 2
    ;;
esac

# Python

new_enough() {
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Can it make virtual environments, and compile for itself? Debian keeps both in packages of their own.
complete() {
    "$1" -c '
import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON-}" ]; then
        python=$PYTHON
        command -v "$python" >/dev/null || fail "PYTHON=$PYTHON is not there"
        new_enough "$python" && return
        fail "Python 3.11 or newer is needed; PYTHON=$PYTHON is $("$python" -V 2>&1 || true)"
    fi
    for python in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        new_enough "$python" && return
    done
    python=
}

venv_works() {
    [ -x "$venv/bin/python" ] && grep -qsF -- "$venv" "$venv/bin/activate" && new_enough "$venv/bin/python" || return 1
    [ -z "${PYTHON-}" ] || "$PYTHON" -c 'import os, sys; sys.exit(os.path.realpath(sys.executable) != sys.argv[1])' \
        "$(readlink -f -- "$venv/bin/python")" 2>/dev/null
}

# Is everything there?

builders=$(find src -name '*_build.py' | sort) # x_build.py compiles _x*.so beside itself
compiled_in="$(find src -name '*.h' | sort) src/spvtpm/wire/crb.py src/spvtpm/wire/crb_header.py"

key() {
    {
        printf '%s\n' "$root"
        readlink -f -- "$venv/bin/python" || true
        # shellcheck disable=SC2086  # words
        cat -- scripts/setup.sh pyproject.toml setup.py requirements/*.txt $builders $compiled_in
    } | sha256sum
}

# Is each part compiled, and after the file given, if one is? Older builds of it are deleted: by its name, one of them could
# be the one that Python finds first.
compiled() {
    for builder in $builders; do
        name=${builder##*/}
        name="_${name%_build.py}.*.so"
        [ -z "${1-}" ] || find "${builder%/*}" -maxdepth 1 -name "$name" ! -newer "$1" -delete
        [ "$(find "${builder%/*}" -maxdepth 1 -name "$name")" ] || return 1
    done
}

ready() {
    venv_works && compiled || return 1
    now=$(key)
    for other in $enough; do
        [ "$now" = "$(cat -- "$venv/.ready-$other" 2>/dev/null)" ] && return
    done
    return 1
}

# Debian packages

find_missing() {
    # shellcheck disable=SC2086  # words
    installed=$(for package in $packages; do echo "$package" "${package}t64"; done |
        xargs dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p')
    missing=
    for package in $packages; do # since 2024 the names of some libraries end in t64
        printf '%s\n' "$installed" | grep -qx -e "$package" -e "${package}t64" || missing="$missing $package"
    done
    if [ "$1" = with_python ]; then
        find_python
        if [ -z "$python" ] || { [ -z "${PYTHON-}" ] && ! complete "$python"; }; then
            missing="$missing python3 python3-venv python3-dev"
        fi
    fi
}

install_packages() {
    by_hand="sudo apt-get install$missing"
    skip="if they are there in another way, run this again with SPVTPM_SKIP_PACKAGES=1"
    command -v apt-get >/dev/null || fail "these Debian packages are missing, and there is no apt-get:$missing" "$skip"
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        as_root=sudo
    else
        fail "these Debian packages are missing, and sudo cannot be used to install them:$missing" \
            "have them installed with: $by_hand" "$skip"
    fi
    say "installing Debian packages:$missing"
    apt_log=$(mktemp)
    # An update that fails matters only if the install then does, and that says why.
    $as_root apt-get update >>"$apt_log" 2>&1 || true
    # shellcheck disable=SC2086  # words
    logged "$apt_log" $as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        -o DPkg::Lock::Timeout=300 $missing || fail "apt-get could not install the packages; by hand: $by_hand" "$skip"
    rm -f -- "$apt_log"
}

if ready; then is_ready=yes; else is_ready=; fi
if [ -z "${SPVTPM_SKIP_PACKAGES-}" ]; then
    command -v dpkg-query >/dev/null || fail "this is neither Debian nor Ubuntu; needed are what they call: $packages" \
        "once that is there, run this again with SPVTPM_SKIP_PACKAGES=1"
    if [ "$is_ready" ] || venv_works; then find_missing without_python; else find_missing with_python; fi
    [ -z "$missing" ] || install_packages
    if [ "$level" = fuzz ]; then # clang's sanitizers are in a package named after the version that `clang` stands for
        packages=$(dpkg-query --show --showformat='${Depends}' clang | sed -n 's/.*clang-\([0-9]*\).*/libclang-rt-\1-dev/p')
        find_missing without_python
        [ -z "$missing" ] || install_packages
    fi
fi

# What guests boot; where it cannot be had, the tests with guests say so, and are skipped.
fetch_guest_kernel() {
    [ "$level" = dev ] && [ -z "${SPVTPM_SKIP_PACKAGES-}" ] && [ ! -e "$venv/guest/ready" ] || return 0
    say "fetching the kernel of the tests' guests"
    scripts/guest-kernel.sh "$venv/guest" >>"$log" 2>&1 || say "no kernel for the tests' guests can be had; see $log"
}

if [ "$is_ready" ]; then
    fetch_guest_kernel
    exit 0
fi

# The virtual environment

exec 9<scripts/setup.sh
if ! flock -n 9; then
    say "waiting for another set-up of this clone to end"
    flock 9
    if ready; then exit 0; fi
fi

if ! venv_works; then
    find_python
    [ "$python" ] || fail "Python 3.11 or newer is needed; python3 is $(python3 -V 2>&1 || true)" "name one with PYTHON=…"
    complete "$python" || fail "$("$python" -V) at $(command -v "$python") lacks its C headers, or the modules venv and ensurepip" \
        "install those (Debian: the packages python3.X-dev and python3.X-venv), or name another with PYTHON=…"
    say "making .venv with $("$python" -V)"
    said=$("$python" -m venv --clear "$venv" 2>&1) || fail "venv failed: $said"
fi
rm -f -- "$venv"/.ready-* "$log"

pip() { logged "$log" "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# No build isolation: what a build uses is pinned too. So what builds use has to be there first.
say "installing pinned dependencies: runtime"
pip install --require-hashes --no-build-isolation -r requirements/build.txt -r requirements/runtime.txt || exit 4
if [ "$level" != runtime ]; then
    say "installing pinned dependencies: $level"
    pip install --require-hashes --no-build-isolation -r "requirements/$level.txt" || exit 4
fi
say "compiling and installing spvtpm"
touch "$venv/.compiling"
pip install --no-build-isolation --no-deps --editable . || exit 4
compiled "$venv/.compiling" || fail "the compiled parts are not where they belong, in src; see $log"
key >"$venv/.ready-$level"
fetch_guest_kernel
say "ready"
