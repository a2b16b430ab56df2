# Sourced by the other scripts: creates .venv, and again when it is broken or pyproject.toml has
# changed. Does not change the folder, so relative paths are the caller's.
# Usage: source launch/environment.sh EXTRAS   (a comma-separated list, may be empty)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
extras=$1
stamp=$venv/installed-${extras:-core}
for extra in ${extras//,/ }; do
  if ! grep -q "^$extra = \[" "$root/pyproject.toml"; then
    echo "error: EXTRAS is '$extras': must be such as cuda, tpu or photos, which pyproject.toml has" >&2
    exit 2
  fi
done

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! is_new_enough "$venv/bin/python" || ! cmp -s "$root/pyproject.toml" "$stamp"; then
  if ! is_new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if ! is_new_enough "${PYTHON:-python3}"; then
      echo "error: PYTHON is '${PYTHON:-python3}': must be Python 3.11 or newer, as in" \
        "PYTHON=python3.12 $0" >&2
      exit 2
    fi
    "${PYTHON:-python3}" -m venv --clear "$venv"
  fi
  echo "installing into $venv (once) ..." >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --config-settings editable_mode=compat -e "$root${extras:+[$extras]}" >&2
  cp "$root/pyproject.toml" "$stamp"
fi
