# Sourced by serve.sh and test.sh: a virtual environment in the checkout with tinyvllm installed in place, and a compiler
# where the device needs one. Quick when nothing has changed: a stamp in .venv says what was installed from what.
# Works with bash 3.2, which is what macOS ships.

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$repo/.venv"
default_model=smollm2-135m-instruct
export TINYVLLM_MODELS="${TINYVLLM_MODELS:-$repo/models}"

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

# set_up [EXTRA]: the whole of it; EXTRA is an extra of pyproject.toml, such as dev.
set_up() {
  make_venv
  install_package "${1:-}"
  ensure_compiler
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints a Python of at least 3.11: $PYTHON if given, else the first that is found.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" || fail "PYTHON is $PYTHON, which is not a Python of at least 3.11"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python of at least 3.11 was found: install one (Debian and Ubuntu: apt-get install python3 python3-venv;" \
    "macOS: brew install python), or name it: PYTHON=/path/to/python3.12 bash $0"
}

make_venv() {
  local python
  # Also false for an environment whose Python was since removed, and for one that was made without pip.
  if is_new_enough "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
  python="$(find_python)" || exit 1
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian keeps these in a package of their own
    apt_install python3-venv "$python cannot make virtual environments (it lacks venv or ensurepip)" \
      "install them (Debian and Ubuntu: apt-get install python3-venv), or name another Python: PYTHON=... bash $0"
  fi
  say "Making a virtual environment in .venv"
  "$python" -m venv --clear "$venv" || fail "could not make a virtual environment in .venv; see above for the reason"
  # The pip that comes with Python 3.11 takes 34 CPU seconds to find what the tests need, and pip 26 takes 13.
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --upgrade pip 2>/dev/null || true # the old one works
}

install_package() {
  local extra="$1" source stamp
  stamp="$venv/.installed-${extra:-run}"
  # What an installation depends on: where the checkout lies, its pyproject.toml, and the Python.
  source="$repo $(cksum <"$repo/pyproject.toml") $("$venv/bin/python" -V)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$source" ]; then return; fi
  say "Installing tinyvllm and its libraries into .venv (a minute or two the first time)"
  # Developers' tools are not compiled, which takes 28 of 70 CPU seconds: Python compiles what is imported.
  (cd "$repo" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check ${extra:+--no-compile} \
    -e ".${extra:+[$extra]}") ||
    fail "pip could not install tinyvllm; see above for the reason"
  printf '%s\n' "$source" >"$stamp"
  printf '%s\n' "$source" >"$venv/.installed-run" # every extra includes the package itself
}

# True when the device that tinyvllm will choose is the CPU, whose kernels a C compiler builds as the engine starts.
uses_cpu() {
  case "${DEV:-}" in
    CPU*) return 0 ;;
    ?*) return 1 ;;
  esac
  [ "$(uname)" != Darwin ] && ! "$venv/bin/python" -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library("cuda"))'
}

has_compiler() {
  if [ "$(uname)" = Darwin ] && [ -z "${CC:-}" ]; then
    xcode-select -p >/dev/null 2>&1 # without the tools, /usr/bin/clang is there and only asks to install them
  else
    command -v "${CC:-clang}" >/dev/null 2>&1
  fi
}

ensure_compiler() {
  if ! uses_cpu || has_compiler; then return; fi
  if [ -n "${CC:-}" ]; then fail "CC is $CC, which was not found: name a clang there, or unset it"; fi
  if [ "$(uname)" = Darwin ]; then
    fail "DEV=CPU compiles its kernels with clang: run xcode-select --install, or use the GPU: DEV=METAL bash $0"
  fi
  apt_install clang "the CPU device compiles its kernels with clang, which was not found" \
    "install it (Debian and Ubuntu: apt-get install clang; Fedora: dnf install clang; Arch: pacman -S clang)," \
    "or name one: CC=/path/to/clang bash $0"
}

# apt_install PACKAGE PROBLEM REMEDY...: installs it where we may without asking; else says what is wrong and what to do.
apt_install() {
  local package="$1" problem="$2" sudo=""
  shift 2
  if ! command -v apt-get >/dev/null 2>&1; then fail "$problem: $*"; fi
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || fail "$problem: $*"
    sudo="sudo -n"
  fi
  say "Installing $package with apt-get: $problem"
  if ! { $sudo apt-get -qq update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 \
    install -y --no-install-recommends "$package" >/dev/null; }; then
    fail "apt-get could not install $package. $problem: $*"
  fi
}
