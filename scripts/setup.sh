# Sourced by the other scripts: makes .venv and installs this project into it, once.

# setup_venv REQUIREMENT: installs `-e REQUIREMENT` (`.` or `.[dev]`) unless that is done already
setup_venv() {
  local requirement=$1 python="" candidate
  for candidate in python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "aixsim needs Python 3.11 or 3.12 on the PATH" >&2
    return 2
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # shellcheck disable=SC1091
  source .venv/bin/activate
  local stamp wanted
  stamp=.venv/installed-$(printf '%s' "$requirement" | tr -c 'a-z0-9' '_')
  # a C library is compiled too
  wanted=$(cksum pyproject.toml kernels/aixsim_kernels/*/*.[ch])
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $requirement into .venv (several minutes on a new machine)"
    python -m pip install --quiet --disable-pip-version-check -e "$requirement"
    printf '%s' "$wanted" >"$stamp"
  fi
}
