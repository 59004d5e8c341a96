#!/usr/bin/env bash
# Installs moecluster on a node of a Ray cluster; `ray up` copies it there and runs it (clusters/*.yaml). Into a virtual
# environment of its own, with the pinned versions of constraints.txt, and on the login PATH. May be run again.
# usage: node_setup.sh [PACKAGE ...]    packages that Ray's autoscaler needs on the head, such as boto3
set -euo pipefail

home=$HOME/moecluster
dist=$home/dist # moecluster-VERSION.whl and constraints.txt
venv=$home/venv

fail() {
    echo "node_setup.sh on $(hostname): $1" >&2
    exit 1
}

wheel=$(find "$dist" -maxdepth 1 -name 'moecluster-*.whl' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1) || true
wheel=${wheel#* } # the newest, without its time
[[ -n $wheel && -f $dist/constraints.txt ]] ||
    fail "$dist lacks a wheel or constraints.txt; make dist writes both, where ray up is run"

if [[ ! -x $venv/bin/python ]]; then
    found=
    for python in "${MOECLUSTER_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found=$python
            break
        fi
    done
    [[ -n $found ]] || fail "needs Python 3.11 or newer: install it, or set MOECLUSTER_PYTHON to its path"
    "$found" -m venv "$venv" || fail "$found cannot create environments: install its venv module (Debian: python3-venv)"
fi

pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-compile -c "$dist/constraints.txt")
"${pip[@]}" "$wheel[serve,plots,jobs]" "$@" || fail "pip cannot install $wheel"
# A wheel of the same version may have other contents.
"${pip[@]}" --no-deps --force-reinstall "$wheel"

# Ray's commands come through a login shell, and ray down is silent where that does not find `ray`.
profile=$HOME/.profile
for file in "$HOME/.bash_login" "$HOME/.bash_profile"; do
    [[ -f $file ]] && profile=$file # bash reads the first that exists, in the opposite order
done
grep -qsF "$venv/bin" "$profile" || echo "export PATH=\"$venv/bin:\$PATH\" RAY_AUTH_MODE=token" >>"$profile"

chmod 600 "$HOME/.ray/auth_token"
echo "$(hostname): $("$venv/bin/python" -c 'import moecluster, ray; print("moecluster", moecluster.__version__, "ray", ray.__version__)')"
