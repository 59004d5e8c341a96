#!/usr/bin/env bash
# Installs what tests use and pip cannot bring, by Debian's apt-get. Starts no service. Returns at once if all is there.
set -euo pipefail

# A command that tests call -> the Debian package that brings it.
declare -A package_of=(
    [prometheus]=prometheus [promtool]=prometheus
    [sshd]=openssh-server [ssh]=openssh-client [rsync]=rsync [ip]=iproute2 # hosts of `ray up`: make test-hosts
)
# Packages -> their services, which must never run: the tests start servers of their own.
declare -A service_of=([prometheus]=prometheus [openssh-server]=ssh [rsync]=rsync)
PATH=$PATH:/usr/sbin:/sbin
policy=/usr/sbin/policy-rc.d # asked by packages that are about to start a service; 101 forbids it

fail() {
    echo "make system-deps: $1" >&2
    echo "Until then the tests that need them are skipped, and say so." >&2
    exit 1
}

declare -A wanted=()
for command in "${!package_of[@]}"; do
    command -v "$command" >/dev/null || wanted[${package_of[$command]}]=1
done
packages=("${!wanted[@]}")
if ((${#packages[@]} == 0)); then
    echo "system packages: all there"
    exit 0
fi

command -v apt-get >/dev/null || fail "no apt-get here: put these commands on PATH yourself: ${!package_of[*]}"
as_root=()
if ((EUID != 0)); then
    command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 ]]; } ||
        fail "needs root: run it as root, or: apt-get install --no-install-recommends ${packages[*]}"
    as_root=(sudo)
fi

if [[ -e $policy ]]; then
    verdict=0
    "${as_root[@]}" "$policy" prometheus start >/dev/null 2>&1 || verdict=$?
    ((verdict == 101)) || fail "$policy lets packages start services: let it forbid ${service_of[*]}, or install by hand: ${packages[*]}"
else
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
fi

apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120)
"${apt[@]}" update || fail "apt-get update failed"
"${apt[@]}" install --no-install-recommends "${packages[@]}" >/dev/null || fail "apt-get cannot install: ${packages[*]}"
for package in "${packages[@]}"; do
    # Nor at the next boot. A service of an earlier installation is left as it was.
    if [[ -n ${service_of[$package]:-} ]]; then
        "${as_root[@]}" update-rc.d "${service_of[$package]}" disable
    fi
done
echo "system packages: installed ${packages[*]}"
