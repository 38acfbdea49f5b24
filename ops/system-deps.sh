#!/usr/bin/env bash
# Installs the system packages that blipstream needs on Debian and Ubuntu, and only those that are missing.
#
#   ops/system-deps.sh             to build it
#   ops/system-deps.sh --runtime   to run it
#   ops/system-deps.sh --tests     what some tests need: Java 17, Maven, Python with venv, openssl, kcat, oneDNN,
#                                  libjpeg-turbo
#   ops/system-deps.sh --check     only says what is missing to build; exit code 1 if anything is
set -euo pipefail

# librdkafka is compiled from its source with the system's OpenSSL and zlib; the rest is Rust.
build=(build-essential pkg-config libssl-dev zlib1g-dev ca-certificates)
# curl serves the health check of the container.
runtime=(libssl3 zlib1g ca-certificates curl)

packages=("${build[@]}")
check=false
# Whether to go on without what is missing and cannot be installed.
optional=false
case "${1:-}" in
  "") ;;
  --runtime) packages=("${runtime[@]}") ;;
  --check) check=true ;;
  --tests)
    # Whatever provides them will do, so programs are looked for, not packages.
    packages=()
    java=$({ java -version 2>&1 || true; } | sed -n 's/.*version "\([0-9]*\).*/\1/p')
    [ "${java:-0}" -ge 17 ] || packages+=(openjdk-17-jre-headless)
    command -v mvn >/dev/null || packages+=(maven)
    command -v python3 >/dev/null || packages+=(python3)
    # Debian has a part of the standard library in a package of its own.
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
    command -v openssl >/dev/null || packages+=(openssl)
    command -v kcat >/dev/null || packages+=(kcat)
    # oneDNN, of whatever version this release has.
    libraries=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p)
    [[ $libraries == *libdnnl.so.[23]* ]] || packages+=(libdnnl2)
    [[ $libraries == *libturbojpeg.so.0* ]] || packages+=(libturbojpeg0)
    # Without them those tests are skipped, and say so; under CI they must run.
    [ -n "${CI:-}" ] || optional=true
    if [ ${#packages[@]} -eq 0 ]; then
      echo "for the tests: all there (java $java, maven, python3 with venv, openssl, kcat, oneDNN, libjpeg-turbo)"
      exit 0
    fi
    ;;
  *)
    echo "usage: $0 [--runtime | --tests | --check]" >&2
    exit 2
    ;;
esac

if $optional && ! command -v apt-get >/dev/null; then
  echo "Some tests need ${packages[*]}; without them they are skipped." >&2
  exit 0
fi
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
    if $optional; then
      echo "Some tests are skipped. They need: sudo apt-get install ${missing[*]}" >&2
      exit 0
    fi
    echo "These packages are missing and only root can install them: ${missing[*]}" >&2
    echo "Ask an administrator, or run: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "installing: ${missing[*]}"
"${as_root[@]}" apt-get update -qq
# A release has one or two versions of Java and of oneDNN, and any of these will do; Ubuntu has another name for libjpeg-turbo.
for number in "${!missing[@]}"; do
  case "${missing[number]}" in
    openjdk-17-jre-headless) others=(openjdk-{17,21,25}-jre-headless) ;;
    libturbojpeg0) others=(libturbojpeg0 libturbojpeg) ;;
    libdnnl2) others=(libdnnl2 libdnnl3 libdnnl3.{1,2,3,4,5,6,7,8}) ;;
    *) continue ;;
  esac
  for other in "${others[@]}"; do
    if apt-cache show "$other" >/dev/null 2>&1; then
      missing[number]=$other
      break
    fi
  done
done
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
