#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the tests of the remote tier need of the system: redis-server, and what Mooncake's wheel links to.
#
# Only root on Debian or its kin gets them; anybody else, or who has no network, is told what will be skipped.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

readonly packages=(redis-server libibverbs1 librdmacm1 libnuma1 libcurl4)
readonly libraries=(libibverbs.so.1 librdmacm.so.1 libnuma.so.1 libcurl.so.4)

missing() {
    command -v redis-server >/dev/null || echo redis-server
    local known library
    known=$(ldconfig -p)
    for library in "${libraries[@]}"; do
        grep -q "$library" <<<"$known" || echo "$library"
    done
}

install() {
    local apt=(apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${packages[@]}" >/dev/null
}

lacking=$(missing)
if [[ -n $lacking && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "servers: installing ${packages[*]}"
    install || echo "servers: apt-get failed" >&2
    lacking=$(missing)
fi
if [[ -n $lacking ]]; then
    echo "servers: without ${lacking//$'\n'/, }: tests of the remote tier will be skipped;" \
        "apt-get install ${packages[*]}" >&2
else
    echo "servers: redis-server and the libraries of Mooncake are here"
fi
