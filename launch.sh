#!/usr/bin/env bash
# Sets gpt2ds up and trains. No root, no compiler, no GPU needed; what is done already is skipped.
#   ./launch.sh                  install, prepare the embedded text, train a few minutes, name the training log
#   ./launch.sh train [OPTIONS]  install, then train with these options, a rank per GPU
#   ./launch.sh --restarts N [OPTIONS]  the same, started again up to N times after a failure
#   ./launch.sh test [OPTIONS]   install what the tests need, then run them (options go to pytest)
#   ./launch.sh COMMAND ...      any other gpt2ds command: prepare, generate, evaluate, report, profiles
# Paths in options are taken from the repository's top folder.
# GPT2DS_VENV names another place for the virtual environment than .venv, GPT2DS_RANKS another number of ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${GPT2DS_VENV:-.venv}

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "needs Python 3.11 or newer with venv (on Debian and Ubuntu: apt install python3 python3-venv)."
}

# install EXTRAS: the pinned packages, once for each content of the files that name them. The test extras are kept.
install() {
  local extras=$1 stamp=$venv/.installed wanted python
  [ -e "$venv/.with-test" ] && extras=test
  wanted="$extras $(cat pyproject.toml constraints.txt | cksum)"
  if [ ! -x "$venv/bin/pip" ]; then
    [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ] &&
      fail "$venv holds something and is no virtual environment: name another folder in GPT2DS_VENV."
    python=$(find_python) || exit
    echo "Making $venv"
    "$python" -m venv --clear "$venv"
  fi
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "Installing the pinned packages (minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}" ||
    fail "the packages could not be installed; the message above says which one and why."
  [ "$extras" = test ] && touch "$venv/.with-test"
  echo "$wanted" >"$stamp"
}

gpus() {
  "$venv/bin/python" - <<'END'
import sys
from gpt2ds.devices import this_machine
from gpt2ds.errors import UserError

try:
    print(len(this_machine().gpus))
except UserError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
END
}

# train OPTIONS: through DeepSpeed's launcher, a rank per GPU, or per core and at most two where there is none.
# `exec`, so that a signal to this script is one to the program that passes it on to the ranks.
train() {
  local found ranks
  found=$(gpus)
  ranks=$found
  [ "$found" -gt 0 ] || ranks=$(($(nproc) > 1 ? 2 : 1))
  exec "$venv/bin/gpt2ds" train --gpus "${GPT2DS_RANKS:-$ranks}" "$@"
}

demo() {
  local run length found
  run=launch-$(date +%Y%m%d-%H%M%S)
  "$venv/bin/gpt2ds" prepare
  # Little accumulation, so that there is something to see. On GPUs model and micro-batch are chosen to fit the cards.
  length=(--hours 0.04 --accumulation 1)
  found=$(gpus)
  [ "$found" -gt 0 ] && length=(--hours 0.1 --accumulation 2)
  train --ds ds_configs/zero2.json --name "$run" --keep 1 "${length[@]}"
}

command=${1:-demo}
[ $# -gt 0 ] && shift
case $command in
demo)
  install ""
  demo
  ;;
train)
  install ""
  train "$@"
  ;;
--restarts | --restarts=*)
  install ""
  train "$command" "$@"
  ;;
test)
  install test
  # Two files at a time: many tests wait for processes of their own, and two cores are enough for that.
  exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
  ;;
*)
  install ""
  exec "$venv/bin/gpt2ds" "$command" "$@"
  ;;
esac
