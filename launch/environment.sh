# Sourced by the other scripts: makes .venv on first use, or again when pyproject.toml has changed.
# Usage: source launch/environment.sh EXTRAS   (a comma-separated list, may be empty)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extras=$1
stamp=.venv/installed-${extras:-core}
if ! cmp -s pyproject.toml "$stamp"; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  echo "installing into .venv (once) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" >&2
  cp pyproject.toml "$stamp"
fi
