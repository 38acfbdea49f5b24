#!/usr/bin/env bash
# Installs the system packages that blipstream needs on Debian and Ubuntu, and only those that are missing.
#
#   ops/system-deps.sh             to build it
#   ops/system-deps.sh --runtime   to run it
#   ops/system-deps.sh --check     only says what is missing to build; exit code 1 if anything is
set -euo pipefail

# librdkafka is compiled from its source with the system's OpenSSL and zlib; the rest is Rust.
build=(build-essential pkg-config libssl-dev zlib1g-dev ca-certificates)
# curl serves the health check of the container.
runtime=(libssl3 zlib1g ca-certificates curl)

packages=("${build[@]}")
check=false
case "${1:-}" in
  "") ;;
  --runtime) packages=("${runtime[@]}") ;;
  --check) check=true ;;
  *)
    echo "usage: $0 [--runtime | --check]" >&2
    exit 2
    ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  # Packages have other names elsewhere; what is needed is the same.
  echo "This script knows Debian and Ubuntu only. blipstream needs a C and C++ compiler, make, pkg-config, and the" >&2
  echo "development files of OpenSSL 3 and zlib. If they are there, go on with: cargo build --release --locked" >&2
  exit 0
fi

installed() {
  # Newer releases renamed libssl3 and zlib1g in part (libssl3t64): what is provided counts too.
  dpkg-query -W -f '${db:Status-Status} ${Package} ${Provides}\n' 2>/dev/null |
    awk -v name="$1" '$1 == "installed" { gsub(/,/, " "); for (i = 2; i <= NF; i++) if ($i == name) found = 1 } END { exit !found }'
}

missing=()
for package in "${packages[@]}"; do
  installed "$package" || missing+=("$package")
done

if [ ${#missing[@]} -eq 0 ]; then
  echo "system packages: all there (${packages[*]})"
  exit 0
fi
if $check; then
  echo "system packages missing: ${missing[*]}" >&2
  exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  # Without a terminal nobody can type a password: fail with words instead of waiting.
  if ! command -v sudo >/dev/null || { [ ! -t 0 ] && ! sudo -n true 2>/dev/null; }; then
    echo "These packages are missing and only root can install them: ${missing[*]}" >&2
    echo "Ask an administrator, or run: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "installing: ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
